"""A job: one run to make or to go on with, from what the command line composed."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from lora_bench.checks import need
from lora_bench.errors import Code, LostFolderError
from lora_bench.help import GROUPS, conf_folder
from lora_bench.record import Run, discard, read
from lora_bench.recorded import ModelPlaces, differences, edited, restored
from lora_bench.resume import refuse_difference, refuse_hidden, refuse_prompted, refuse_unloadable
from lora_bench.sweep import key_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from lora_bench.claim import Identity


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


def compose_tasks(cfg: DictConfig, overrides: Sequence[str], sources: Sequence[Any]) -> None:
    """Put the data of each task that `data.tasks` names into the config; nothing where it names none.

    Each is what the same overrides with `data=NAME` in the place of `data.tasks` would have: `tasks.<name>` is its
    data, and `data` the first's.

    Args:
        cfg: composed of these overrides, without its `hydra` node.
        overrides: as typed.
        sources: where Hydra looked for choices.

    Raises:
        UserError: there is one task, or one twice.
        HydraException: a name is no choice of `data`, or an override suits one task and not another.
    """
    names = cfg.data.get("tasks")
    if not isinstance(names, ListConfig):  # none, or what `config.build` refuses
        return
    names = [str(name) for name in names]
    alone = "data=NAME trains on one by itself."
    need(len(names) > 1, "data.tasks", names, "names one task, where several are learned together", alone)
    twice = next((name for name in names if names.count(name) > 1), None)
    need(twice is None, "data.tasks", names, f"names {twice} twice", code=Code.INVALID_VALUE)
    odd = next((name for name in names if not re.fullmatch(r"\w[\w.-]*", name)), None)
    need(odd is None, "data.tasks", names, f"{odd!r} is not the plain name of a choice")
    places = [source.path for source in sources if source.provider == "command-line"]
    asked = tuple(text for text in overrides if _tells_of_data(key_of(text)))
    found: dict[str, Any] = {}
    for name in names:
        found[name] = _data_of(name, asked, places[0] if places else None) | {"tasks": names}
        if found[name].get("path"):
            found[name]["path"] = os.path.abspath(str(found[name]["path"]))
    with open_dict(cfg):
        cfg.tasks = found
        cfg.data = found[names[0]]


def _tells_of_data(key: str) -> bool:
    """Whether an override of this key says something of every task's data."""
    return key in ("experiment", "sweep") or (key.startswith("data.") and key != "data.tasks")


@cache  # jobs of a sweep mostly have the same tasks
def _data_of(task: str, overrides: tuple[str, ...], config_dir: str | None) -> dict[str, Any]:
    from lora_bench.hydra_errors import compose

    composed = compose(conf_folder(), "config", [*overrides, f"data={task}"], config_dir)
    found: Any = OmegaConf.to_container(composed.data, resolve=True)
    return dict(found)


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
