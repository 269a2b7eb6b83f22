"""Commands, configuration groups and their choices."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

COMMANDS = {
    "train": "train, evaluate and record a run; with -m or sweep=NAME, a sweep",
    "search": "find the best setting within a budget of trials, FLOPs or minutes",
    "eval": "score a finished run, or an adapter made by PEFT, on another data set",
    "predict": "label new pairs with a finished run",
    "export": "write a finished run as an adapter for PEFT or as a plain Hugging Face model",
    "push": "publish a finished run on the Hugging Face hub, with a model card",
    "prompt": "a language model behind an OpenAI-compatible server as a baseline; or answers in a file",
    "compare": "tables over finished runs: what varies, how good, at what cost",
    "ls": "list runs, with their names, states and scores",
    "show": "one run: settings, metrics, costs, files, next commands",
    "watch": "a live table of the runs that are training",
    "rm": "remove runs",
    "clean": "remove cached tokens and prefixes, and checkpoints, or list them with their sizes",
    "doctor": "versions, devices, precisions, and what is missing here",
    "completion": "print a script that completes commands, keys and values in bash, zsh or fish",
    "help": "explain a command, a group or a key: help train, help adapter, help adapter.rank",
}
"""Commands with their one-line help."""


GROUPS = (
    "model",
    "adapter",
    "data",
    "optimizer",
    "trainer",
    "metric",
    "tracking",
    "experiment",
    "sweep",
)
"""Groups of `lora-bench train`, in the order of the help text and of records."""


PROMPT_GROUPS = ("data", "prompt", "metric", "tracking")
"""Groups of `lora-bench prompt`."""


ANY_MODEL = "auto"
"""The choice of `model` for weights without a choice of their own."""


def model_name(record: Mapping[str, Any]) -> str:
    """Return the name under which a run's model is reported: its choice, or for `auto` that of its folder or hub id.

    A choice of the family `auto` loads any classifier. With `model.path` the folder names it.

    Args:
        record: of the run, with its choices and its config.
    """
    choice = str(record["choices"].get("model"))
    settings = record["config"].get("model")
    if not isinstance(settings, dict):
        return choice
    location = settings.get("path") if settings.get("family") == "auto" else None
    location = location or (settings.get("hub_id") if choice == ANY_MODEL else None)
    return str(location).rstrip("/").rpartition("/")[2] if location else choice


def conf_folder() -> Path:
    """Return the folder with the configuration groups: inside the package in a wheel, else beside it, as in a clone."""
    package = Path(__file__).parent.parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


@cache
def choices(group: str) -> tuple[str, ...]:
    """Return the sorted choices of a group that ship with the package; a name that begins with `_` is no choice.

    An unknown group has none.
    """
    return tuple(sorted(path.stem for path in (conf_folder() / group).glob("[!_]*.yaml")))


def all_choices(group: str, config_dir: str | None = None) -> list[str]:
    """Return the sorted choices of a group: those of the package, of installed distributions and of a folder.

    Args:
        group: a name, as `adapter` or `hydra/launcher`.
        config_dir: the folder of `--config-dir`; None without one, and one that does not exist has no choices.
    """
    from lora_bench.extensions.entry_points import choices_of, conf_folders  # late: completion does not need it

    files = (path.stem for path in Path(config_dir, group).glob("[!_]*.yaml")) if config_dir else ()
    return sorted({*choices(group), *choices_of(conf_folders(), group), *files})
