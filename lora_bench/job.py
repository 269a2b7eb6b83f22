"""A job: one run to make or to go on with, from what the command line composed."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from lora_bench.help import GROUPS
from lora_bench.record import Run, discard, read
from lora_bench.recorded import filled
from lora_bench.resume import refuse_difference, refuse_hidden, refuse_prompted

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


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

    @classmethod
    def composed(cls, cfg: DictConfig, hydra: DictConfig, folder: Path, title: str = "") -> Job:
        """The job of a composed config.

        Args:
            cfg: the config without its `hydra` node, which is the next argument.
            folder: where a new run's record goes; `resume` in the config names another.

        Raises:
            UserError: the run to go on with is not there, is another's, or began with another config.
        """
        choices = {group: hydra.runtime.choices.get(group) for group in GROUPS if hydra.runtime.choices.get(group)}
        overrides: Any = OmegaConf.to_container(hydra.overrides.task, resolve=False)  # as typed
        for node, key in ((cfg.model, "path"), (cfg.data, "path"), (cfg.adapter, "init_from")):
            if node.get(key) and isinstance(node[key], str | int | float):  # a folder may be called 2024
                node[key] = os.path.abspath(str(node[key]))  # so that the record can be used from any folder
        if not cfg.resume:
            return cls(cfg, folder, choices, overrides, title=title)
        run = Run.reopen(Path(cfg.resume))
        try:
            refuse_hidden(run.folder, run.record["config"])
            begun: Any = OmegaConf.create(filled(run.record))
            refuse_difference(run.record["choices"], begun, cfg, overrides, GROUPS)
        except BaseException:
            run.release()
            raise
        return cls(begun, run.folder, run.record["choices"], run.record["overrides"], run, title)

    @property
    def config(self) -> dict[str, Any]:
        """The config resolved, as the record has it."""
        resolved = OmegaConf.to_container(self.cfg, resolve=True)
        assert isinstance(resolved, dict)
        return {str(key): value for key, value in resolved.items()}

    def fail(self, error: Exception) -> None:
        """Leave a record of a job that could not begin; one that has begun says itself how it ended."""
        if not (self.folder / "run.json").exists():
            config: Any = OmegaConf.to_container(self.cfg, resolve=False)
            Run.claim(self.folder, choices=self.choices, config=config, overrides=self.overrides).fail(error)


@contextmanager
def following(cfg: DictConfig, folder: Path) -> Iterator[Path]:
    """Where a process writes its record that `torchrun` started beside the leading one: away from the run's folder.

    A run to go on with is copied, so that all begin at the same step; the leader alone goes on in its folder.
    """
    with tempfile.TemporaryDirectory() as place:
        own = Path(place, "run")
        if cfg.resume:
            shutil.copytree(cfg.resume, own, ignore=shutil.ignore_patterns(".lock"))
            cfg.resume = str(own)
        yield own
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
