"""A job: one run to make or to go on with, from what the command line composed."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from lora_bench.config.build import Settings
from lora_bench.config.groups import GROUPS
from lora_bench.config.keys import key_of
from lora_bench.config.multitask import compose_tasks
from lora_bench.errors import LostFolderError
from lora_bench.records.backfill import ModelPlaces, differences, edited, restored
from lora_bench.records.resume import refuse_difference, refuse_hidden, refuse_prompted, refuse_unloadable
from lora_bench.records.run_folder import Run, discard, read

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from lora_bench.records.folder_lock import Identity


@dataclass(frozen=True)
class Job:
    """What was asked for, and where its record goes."""

    cfg: DictConfig
    folder: Path
    choices: dict[str, str]
    """The option chosen of each group."""
    overrides: list[str]
    """As typed."""
    begun: Run | None = None
    """The run in `folder`, reopened, that began with this config."""
    title: str = ""
    """What a sweep calls it."""
    sweep: Identity | None = None
    """The folder of its sweep, as it was when the sweep was claimed."""

    @classmethod
    def composed(
        cls, cfg: DictConfig, hydra: DictConfig, folder: Path, title: str = "", sweep: Identity | None = None
    ) -> Job:
        """The job of a composed config.

        Args:
            cfg: the config without its `hydra` node, which is the next argument.
            folder: where a new run's record goes; `resume` in the config names another.
            title: what a sweep calls it.
            sweep: the folder of its sweep.

        Raises:
            UserError: the run to go on with is not there, is another's, or began with another config.
        """
        choices = {group: hydra.runtime.choices.get(group) for group in GROUPS if hydra.runtime.choices.get(group)}
        overrides: Any = OmegaConf.to_container(hydra.overrides.task, resolve=False)  # as typed
        compose_tasks(cfg, overrides, hydra.runtime.config_sources)
        for node, key in ((cfg.model, "path"), (cfg.data, "path"), (cfg.adapter, "init_from")):
            if node.get(key) and isinstance(node[key], str | int | float):  # a folder may be called 2024
                node[key] = os.path.abspath(str(node[key]))  # so that the record can be used from any folder
        tokenizer = cfg.model.get("tokenizer")
        if isinstance(tokenizer, str | int | float) and os.path.exists(str(tokenizer)):  # else it may be a hub id
            cfg.model.tokenizer = os.path.abspath(str(tokenizer))
        if not cfg.resume:
            refuse_unloadable(cfg)
            return cls(cfg, folder, choices, overrides, title=title, sweep=sweep)
        run = Run.reopen(Path(cfg.resume))
        try:
            refuse_hidden(run.folder, run.record["config"])
            typed = {key_of(text) for text in overrides}
            path, tokenizer = (cfg.model.get(key) if f"model.{key}" in typed else None for key in ("path", "tokenizer"))
            begun = restored(run.folder, run.record, ModelPlaces(model_path=path, tokenizer=tokenizer))
            refuse_difference(run.record["choices"], begun, cfg, overrides, GROUPS)
        except BaseException:
            run.release()
            raise
        return cls(begun, run.folder, run.record["choices"], run.record["overrides"], run, title, sweep)

    @cached_property
    def settings(self) -> Settings:
        """The settings of the run, built once; a `UserError` where one is out of range."""
        return Settings.build(self.cfg)

    @property
    def config(self) -> dict[str, Any]:
        """The config resolved, as the record has it."""
        resolved = OmegaConf.to_container(self.cfg, resolve=True)
        assert isinstance(resolved, dict)
        return {str(key): value for key, value in resolved.items()}

    def check_record(self, config: Mapping[str, Any] | None) -> None:
        """Refuse to resume a run whose record was edited since.

        Args:
            config: the record's, as its checkpoint has it; None in a checkpoint of an older version.
        """
        if self.begun is None or config is None:
            return
        for difference in differences(self.begun.record, config):
            raise edited(self.begun.folder, *difference)

    @property
    def config_as_written(self) -> Any:
        """The config with its interpolations."""
        return OmegaConf.to_container(self.cfg, resolve=False)

    def fail(self, error: Exception) -> None:
        """Leave a record of a job that could not begin; one that has begun says itself how it ended."""
        if not isinstance(error, LostFolderError) and not (self.folder / "run.json").exists():
            config = self.config_as_written
            Run.claim(self.folder, choices=self.choices, config=config, overrides=self.overrides).fail(error)


@contextmanager
def following(cfg: DictConfig, folder: Path) -> Iterator[Path]:
    """Where a process writes its record that `torchrun` started beside the leading one: away from the run's folder.

    A run to go on with is copied, so that all begin at the same step; the leader alone goes on in its folder.
    """
    try:
        with tempfile.TemporaryDirectory() as place:
            own = Path(place, "run")
            if cfg.resume:
                shutil.copytree(cfg.resume, own, ignore=shutil.ignore_patterns(".lock"))
                cfg.resume = str(own)
            yield own
    finally:
        discard(folder)


def is_done(cfg: DictConfig) -> bool:
    """Whether nothing is left of the run to go on with; then what a kill after its end left of its checkpoints goes."""
    if not cfg.resume:
        return False
    folder = Path(cfg.resume)
    record = read(folder)
    refuse_prompted(folder, record)
    if record["status"] == "done":
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return bool(record["status"] == "done")


def titled(number: int, overrides: Sequence[str]) -> str:
    """What a sweep calls its job: its number and what tells it from the others."""
    return f"job {number}: {' '.join(overrides)}"
