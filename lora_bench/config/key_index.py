"""The index of all keys: `keys.json`, which `scripts/config_reference.py` writes from the dataclasses and `conf/`.

Help and shell completion read it, since importing the dataclasses would take longer than a key press may.
"""

from __future__ import annotations

import json
import os
from functools import cache
from typing import NamedTuple


class KeyEntry(NamedTuple):
    """A key of the configuration: its type, default, values and meaning, read without importing its settings class."""

    key: str
    """Its dotted name."""
    group: str
    """Its first part; empty for a key at the top."""
    section: str
    """The settings that declare it: `adapter`, or a choice that adds it, as `adapter=vera`."""
    type: str
    """In words; empty if its settings have no dataclass."""
    default: str | None
    """As in YAML; None if each choice sets it, or it has none."""
    values: list[str]
    """Values that it can have; empty if they are open."""
    text: str
    """Its meaning."""


class CommandIndex(NamedTuple):
    """The options, groups and keys of a command."""

    options: dict[str, str]
    """Help by names, as `-m, --multirun`."""
    groups: list[str]
    """Groups whose choices the command takes."""
    keys: list[KeyEntry]
    """A key that several choices declare has several entries."""


@cache
def read_index() -> dict[str, CommandIndex]:
    """Return the index of each command that has one."""
    with open(os.path.join(os.path.dirname(__file__), "keys.json"), encoding="utf-8") as file:
        content = json.load(file)
    return {
        command: CommandIndex(entry["options"], entry["groups"], [KeyEntry(**key) for key in entry["keys"]])
        for command, entry in content.items()
    }
