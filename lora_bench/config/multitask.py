"""Configuration of a run that learns several tasks: the composed data of each task."""

from __future__ import annotations

import os
import re
from functools import cache
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from lora_bench.config.groups import conf_folder
from lora_bench.config.keys import key_of
from lora_bench.errors import Code, require

if TYPE_CHECKING:
    from collections.abc import Sequence


def compose_tasks(cfg: DictConfig, overrides: Sequence[str], sources: Sequence[Any]) -> None:
    """Add the data of each task in `data.tasks` to the config, as `tasks.<name>`; `data` becomes the first one.

    The data of a task is composed of the same overrides with `data=NAME` in place of `data.tasks`; a path in it becomes
    absolute. A config whose `data.tasks` is absent, null or no list stays as it is.

    Args:
        cfg: composed of these overrides, without its `hydra` node.
        overrides: as typed.
        sources: the config sources of Hydra, from its `hydra.runtime.config_sources`.

    Raises:
        UserError: `data.tasks` has fewer than two names, a name twice, or something other than a plain name.
        HydraException: a name is not a choice of `data`, or an override does not apply to one of the tasks.
    """
    names = cfg.data.get("tasks")
    if not isinstance(names, ListConfig):  # absent, or a type that `config.build` refuses
        return
    names = [str(name) for name in names]
    remedy = "Give data=NAME to train on one task."
    require(len(names) > 1, "data.tasks", names, "names one task, and needs at least two", remedy)
    twice = next((name for name in names if names.count(name) > 1), None)
    require(twice is None, "data.tasks", names, f"names {twice} twice", code=Code.INVALID_VALUE)
    odd = next((name for name in names if not re.fullmatch(r"\w[\w.-]*", name)), None)
    require(odd is None, "data.tasks", names, f"{odd!r} is not the plain name of a choice")
    folders = [source.path for source in sources if source.provider == "command-line"]
    common = tuple(text for text in overrides if _applies_to_tasks(key_of(text)))
    data_by_task: dict[str, Any] = {}
    for name in names:
        data = _compose_data(name, common, folders[0] if folders else None) | {"tasks": names}
        if data.get("path"):
            data["path"] = os.path.abspath(str(data["path"]))
        data_by_task[name] = data
    with open_dict(cfg):
        cfg.tasks = data_by_task
        cfg.data = data_by_task[names[0]]


def _applies_to_tasks(key: str) -> bool:
    """Return whether an override of this key changes the data of every task."""
    return key in ("experiment", "sweep") or (key.startswith("data.") and key != "data.tasks")


@cache  # jobs of a sweep mostly have the same tasks
def _compose_data(task: str, overrides: tuple[str, ...], config_dir: str | None) -> dict[str, Any]:
    """Return the node `data`, resolved, that the overrides and `data=TASK` compose; raises like `compose`.

    Equal arguments return the same dictionary, which must not be changed.
    """
    from lora_bench.config.compose import compose

    composed = compose(conf_folder(), "config", [*overrides, f"data={task}"], config_dir)
    data: Any = OmegaConf.to_container(composed.data, resolve=True)
    return dict(data)
