"""A run on disk as lists of runs show it: its id and name, its state, what was trained on what, and its score."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from xxhash import xxh3_64_hexdigest

from lora_bench.config.groups import model_name
from lora_bench.config.keys import key_of
from lora_bench.config.recorded_task import main_metric
from lora_bench.records.run_folder import find_runs, is_killed, is_prompted
from lora_bench.records.task_folders import task_names

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

STATES = ("running", "killed", "done", "failed", "diverged", "interrupted", "eliminated")
"""States of a run: those of its record, and `killed` for a run that is `running` there, but in no living process."""
_SHOWN_ELSEWHERE = ("model", "adapter", "data", "name", "tags", "notes")
_OWN_ID = re.compile(r"\d\d-\d\d-\d\d-\d{6}-([0-9a-f]{6})")
"""The name of a folder that ends in an id."""


@dataclass(frozen=True)
class StoredRun:
    """A run on disk: its folder and its record."""

    folder: Path
    record: dict[str, Any]

    @cached_property
    def id(self) -> str:
        """Six hexadecimal digits: those at the end of the folder's name, else a hash of that name and the time."""
        id_in_name = _OWN_ID.fullmatch(self.folder.name)
        return (
            id_in_name[1]
            if id_in_name
            else xxh3_64_hexdigest(f"{self.record['created']} {self.folder.name}".encode())[:6]
        )

    @property
    def name(self) -> str | None:
        """The name that the user gave; None without one."""
        name = self.record["config"].get("name")
        return None if name is None else str(name)

    @property
    def tags(self) -> list[str]:
        """The tags that the user gave."""
        tags = self.record["config"].get("tags")
        return [str(tag) for tag in tags] if isinstance(tags, list) else []

    @property
    def notes(self) -> str | None:
        """The user's text about the run; None without one."""
        notes = self.record["config"].get("notes")
        return None if notes is None else str(notes)

    @cached_property
    def state(self) -> str:
        """One of `STATES`, as it was when it was first asked for; the lock of a running run is tried."""
        return "killed" if is_killed(self.folder, self.record) else str(self.record["status"])

    @property
    def adapter(self) -> str:
        """The method, or the prompt of a prompted run; empty if the record has neither."""
        choices = self.record["choices"]
        return str(choices.get("adapter") or choices.get("prompt") or "")

    @property
    def model(self) -> str:
        """The name of the model; empty if the record has none."""
        if is_prompted(self.record):
            settings = self.record["config"]["llm"]
            return str(settings.get("model") or "") if isinstance(settings, dict) else ""
        return model_name(self.record) if self.record["choices"].get("model") else ""

    @property
    def data(self) -> str:
        """The data set, or the names of the tasks; empty if the record has none."""
        return ",".join(task_names(self.record["config"])) or str(self.record["choices"].get("data") or "")

    @property
    def main_metric(self) -> str:
        """The metric that chooses between the run's states."""
        return main_metric(self.record)

    @property
    def score(self) -> tuple[str, float] | None:
        """Key and value of the main metric on the reported split, as ("validation/mcc", 0.98); None without a value."""
        suffix = f"/{self.main_metric}"
        scores = {
            key.removesuffix(suffix): float(value)
            for key, value in self.record["metrics"].items()
            if key.endswith(suffix) and value is not None
        }
        splits = sorted(split for split in scores if "/" not in split and split not in ("train", "selection"))
        for split in ("validation", "test", *splits):
            if split in scores:
                return f"{split}{suffix}", scores[split]
        return None

    @property
    def other_overrides(self) -> list[str]:
        """The overrides as typed, without the choices above, the annotations and settings of Hydra."""
        keyed = ((key_of(text), text) for text in self.record["overrides"])
        return [text for key, text in keyed if key not in _SHOWN_ELSEWHERE and not key.startswith("hydra")]

    @property
    def is_usable(self) -> bool:
        """True if the run is done and left a model."""
        return self.record["status"] == "done" and not is_prompted(self.record)

    @property
    def label(self) -> str:
        """Id, name, state and folder in one line, for messages."""
        return f"{' '.join(filter(None, (self.id, self.name)))} ({self.state}, {self.folder})"


def differing_overrides(runs: Sequence[StoredRun]) -> list[str]:
    """Return the `other_overrides` of each run as one text; of several runs without those that all have."""
    shared = set.intersection(*(set(run.other_overrides) for run in runs)) if len(runs) > 1 else set()
    return [" ".join(text for text in run.other_overrides if text not in shared) for run in runs]


def stored_runs(folders: Sequence[Path]) -> tuple[list[StoredRun], list[tuple[Path, str]]]:
    """Read the runs at or below some folders, the newest last.

    Returns:
        The runs; and folders that cannot be read, with the reason.

    Raises:
        UserError: a folder does not exist.
    """
    records_by_folder, skipped = find_runs(folders)
    runs = [StoredRun(folder, record) for folder, record in records_by_folder]
    return sorted(runs, key=lambda run: run.record["created"] or ""), skipped  # stable: job 10 stays after job 2
