"""Configuration of a run that learns several tasks: the data of each, composed."""

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
    require(len(names) > 1, "data.tasks", names, "names one task, where several are learned together", alone)
    twice = next((name for name in names if names.count(name) > 1), None)
    require(twice is None, "data.tasks", names, f"names {twice} twice", code=Code.INVALID_VALUE)
    odd = next((name for name in names if not re.fullmatch(r"\w[\w.-]*", name)), None)
    require(odd is None, "data.tasks", names, f"{odd!r} is not the plain name of a choice")
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
    from lora_bench.config.compose import compose

    composed = compose(conf_folder(), "config", [*overrides, f"data={task}"], config_dir)
    found: Any = OmegaConf.to_container(composed.data, resolve=True)
    return dict(found)
