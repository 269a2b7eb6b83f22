"""The commands, the configuration groups and their choices."""

from __future__ import annotations

from functools import cache
from pathlib import Path

COMMANDS = {
    "train": "train, evaluate and record a run; with -m or sweep=NAME, a sweep",
    "eval": "score a finished run, or an adapter made by PEFT, on another data set",
    "predict": "label new pairs with a finished run",
    "export": "write a finished run as an adapter for PEFT or as a plain Hugging Face model",
    "prompt": "a language model behind an OpenAI-compatible server as a baseline; or answers in a file",
    "compare": "tables over finished runs: what varies, how good, at what cost",
    "clean": "remove cached tokens and prefixes, or list them with their sizes",
    "doctor": "versions, devices, precisions, and what is missing here",
}


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
"""Of `train`, in the order in which they are told."""


PROMPT_GROUPS = ("data", "prompt", "metric", "tracking")


def conf_folder() -> Path:
    """The configuration groups: beside the package in a clone, inside it in an installed wheel."""
    package = Path(__file__).parent.parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


@cache
def choices(group: str) -> tuple[str, ...]:
    """Return the choices of a config group that ship with the package; a name that begins with `_` is none."""
    return tuple(sorted(path.stem for path in (conf_folder() / group).glob("[!_]*.yaml")))
