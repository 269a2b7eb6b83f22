"""A job: one run to start or to resume, with the config that the command line composed."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_bench.config.groups import GROUPS
from lora_bench.config.keys import as_typed, key_of, with_present_names
from lora_bench.config.multitask import compose_tasks
from lora_bench.config.recorded_task import main_metric
from lora_bench.console.sweep_progress import JobResult
from lora_bench.errors import LostFolderError, UserError
from lora_bench.records import hub_run
from lora_bench.records.backfill import ModelPaths, differences, edited, restore_config
from lora_bench.records.folder_lock import LOCK_FILE
from lora_bench.records.resume import refuse_difference, refuse_hidden, refuse_prompted, refuse_unloadable
from lora_bench.records.run_folder import CHECKPOINTS, Run, discard, holds_run, read
from lora_bench.records.run_names import find_run
from lora_bench.records.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from lora_bench.records.folder_lock import Identity


@dataclass(frozen=True)
class Job:
    """One run to start or to resume."""

    cfg: DictConfig
    """The composed config; of a resumed run the config in its record."""
    folder: Path
    """The folder of its record."""
    choices: dict[str, str]
    """The chosen option of each config group."""
    overrides: list[str]
    """The overrides as typed."""
    resumed: Run | None = None
    """The run to resume, reopened; None for a new run."""
    title: str = ""
    """Its name within a sweep: `job 3: seed=1`."""
    sweep: Identity | None = None
    """The folder of its sweep, as it was when the sweep was claimed; None outside of sweeps."""

    @classmethod
    def composed(
        cls, cfg: DictConfig, hydra: DictConfig, folder: Path, title: str = "", sweep: Identity | None = None
    ) -> Job:
        """Return the job of a composed config, and reopen the run that its key `resume` names.

        Paths in the config are made absolute, so that the record can be used from any folder. A resumed job has the
        config, choices and overrides of its record.

        Args:
            cfg: the config without its `hydra` node; it is changed in place.
            hydra: that node.
            folder: for a new run, not created yet; a resumed run has its own.
            title: its name within a sweep.
            sweep: the folder of its sweep.

        Raises:
            UserError: the run to resume does not exist, is in use by another process, or started with another config;
                its claim is given up. Or the record of a new run would hide a value that loading needs.
        """
        choices = {group: hydra.runtime.choices.get(group) for group in GROUPS if hydra.runtime.choices.get(group)}
        overrides: Any = OmegaConf.to_container(hydra.overrides.task, resolve=False)  # as typed
        compose_tasks(cfg, overrides, hydra.runtime.config_sources)
        if cfg.adapter.get("init_from") and not cfg.resume:
            reference = as_typed(cfg.adapter.init_from, "adapter.init_from", overrides)
            cfg.adapter.init_from = str(_source_run(reference))
        for node, key in ((cfg.model, "path"), (cfg.data, "path"), (cfg.adapter, "init_from")):
            if node.get(key) and isinstance(node[key], str | int | float):  # a folder may be called 2024
                is_local = key == "path" or not hub_run.is_on_hub(str(node[key]))
                node[key] = os.path.abspath(str(node[key])) if is_local else str(node[key])
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
            recorded = restore_config(run.folder, run.record, ModelPaths(model_path=path, tokenizer=tokenizer))
            refuse_difference(run.record, recorded, cfg, overrides, GROUPS)
        except BaseException:
            run.release()
            raise
        return cls(recorded, run.folder, run.record["choices"], run.record["overrides"], run, title, sweep)

    @cached_property
    def settings(self) -> Settings:
        """The settings of the run, built once; a `UserError` where one is out of range."""
        return Settings.build(self.cfg)

    @property
    def config(self) -> dict[str, Any]:
        """The config for the record, with its interpolations resolved."""
        resolved = OmegaConf.to_container(self.cfg, resolve=True)
        assert isinstance(resolved, dict)
        return {str(key): value for key, value in resolved.items()}

    def check_record(self, config: Mapping[str, Any] | None) -> None:
        """Refuse to resume a run whose record was edited; a new run passes.

        Args:
            config: the copy of its config in a checkpoint; None in a checkpoint of an older version, which passes.

        Raises:
            UserError: a value differs between the two, with defaults for keys that one lacks; paths are not compared.
        """
        if self.resumed is None or config is None:
            return
        for difference in differences(self.resumed.record, with_present_names(config)):
            raise edited(self.resumed.folder, *difference)

    @property
    def config_as_written(self) -> Any:
        """The config with its interpolations, not resolved."""
        return OmegaConf.to_container(self.cfg, resolve=False)

    def fail(self, error: Exception) -> None:
        """Leave a failed record of a job that could not start, unless its folder holds a run or is lost.

        Raises:
            UserError: the folder cannot be claimed.
        """
        if not isinstance(error, LostFolderError) and not holds_run(self.folder):
            try:
                config = self.config
            except OmegaConfBaseException:  # which may be what the job failed of
                config = self.config_as_written
            Run.claim(self.folder, choices=self.choices, config=config, overrides=self.overrides).fail(error)


def _source_run(reference: str | Path) -> Path | str:
    """Return the folder of the run that `adapter.init_from` names; of one on the hub its reference with the commit.

    Raises:
        UserError: there is no such run, or it cannot be downloaded.
    """
    key = "adapter.init_from"
    return hub_run.pin(reference, key) if hub_run.is_on_hub(reference) else find_run(reference, key, finished=True)


@contextmanager
def follower_folder(cfg: DictConfig, folder: Path) -> Iterator[Path]:
    """Yield a temporary run folder for a follower: a process that `torchrun` started and that is not the leader.

    Only the leader writes the run's own folder. A run to resume is copied into the temporary one, and `cfg.resume` is
    set to the copy, so that all processes start at the same step. For a new run the yielded path does not exist yet.
    The temporary folder is removed at the end.

    Args:
        cfg: the composed config.
        folder: the folder that Hydra made for this process; it is removed at the end if it is empty.
    """
    try:
        with tempfile.TemporaryDirectory() as temporary:
            copy = Path(temporary, "run")
            if cfg.resume:
                shutil.copytree(cfg.resume, copy, ignore=shutil.ignore_patterns(LOCK_FILE))
                cfg.resume = str(copy)
            yield copy
    finally:
        discard(folder)


def is_done(cfg: DictConfig) -> bool:
    """Return whether the run to resume is done already; then checkpoints that a kill left behind are removed.

    It is False for a new run.

    Raises:
        UserError: the run to resume does not exist, its record is damaged, or it is a run of `lora-bench prompt`.
    """
    if not cfg.resume:
        return False
    folder = Path(cfg.resume)
    record = read(folder)
    refuse_prompted(folder, record)
    if record["status"] == "done":
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    return bool(record["status"] == "done")


def read_result(folder: Path, *, is_resumed: bool = False) -> JobResult | None:
    """Return how a job has ended, from its record; None if it has none that can be read.

    Its seconds are those of training. In a pack they are those from the start of the run to its end, or unknown if it
    was resumed.
    """
    try:
        record = read(folder)
    except UserError:
        return None
    metric, cost, data = main_metric(record), record["cost"], record["config"].get("data")
    seconds, finished = cost.get("train_seconds"), record["finished"]
    if seconds is None and finished and not is_resumed:
        seconds = (datetime.fromisoformat(finished) - datetime.fromisoformat(record["created"])).total_seconds()
    return JobResult(
        record["status"],
        metric,
        record["metrics"].get(f"selection/{metric}"),
        record["error"] or "",
        seconds,
        cost.get("pack_size") or 1,
        f"{record['choices'].get('data')} {data.get('path') if isinstance(data, dict) else ''}",
    )


def job_titles(jobs: Mapping[int, Sequence[str]]) -> dict[int, str]:
    """Return the title of each job of a sweep, `job 3: seed=1`: the overrides in which it differs from the others.

    Args:
        jobs: the overrides of each job by its number.
    """
    shared = set.intersection(*map(set, jobs.values())) if len(jobs) > 1 else set()
    return {
        number: f"job {number}: {' '.join(text for text in job if text not in shared and not _is_internal(text))}"
        for number, job in jobs.items()
    }


def _is_internal(override: str) -> bool:
    """Return whether the sweeper has added an override, for the folder of a job or to resume it."""
    return override.startswith(("resume=", "hydra."))
