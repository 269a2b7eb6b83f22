"""Keys of nested configuration and of overrides as they are typed: `adapter.rank=8`, `+metric.x=…`, `~tracking`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from lora_bench.config.removed import REMOVED_GROUPS
from lora_bench.errors import Code, UserError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping


def flatten(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value); a list or an empty dictionary is a value."""
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def split_override(override: str) -> tuple[str, str]:
    """Return the key and the value of an override as they are typed, without `+` and `~`.

    The value is empty if there is no `=`. `config.overrides.parse_override` reads values as Hydra does.
    """
    key, _, value = override.partition("=")
    return key.lstrip("+~"), value


def key_of(override: str) -> str:
    """Return the key that an override sets or deletes."""
    return split_override(override)[0]


def as_typed(value: object, key: str, overrides: Iterable[str]) -> str:
    """Return the value of a text key as it was typed: Hydra reads the id `12e456` of a run as a number.

    Args:
        value: in the composed config.
        key: its key.
        overrides: as typed.
    """
    typed = [text for text in map(str, overrides) if key_of(text) == key]
    return split_override(typed[-1])[1] if typed and isinstance(value, float) else str(value)


OPEN_GROUPS = ("adapter.settings", "adapter.fields")
"""Keys below which any name may be given, since what they belong to checks the names itself."""


def with_open_groups(override: str) -> str:
    """Return an override that also adds its key if it lies in an open group; Hydra would want a `+` before it."""
    beginnings = tuple(f"{key}{sign}" for key in OPEN_GROUPS for sign in (".", "="))
    return f"++{override}" if override.startswith(beginnings) else override


RENAMED = {"adapter.matching": "head.pair_features"}
"""Keys of older versions with their present names: records are read with these, the command line refuses them."""

RENAMED_CHOICES = {("trainer.objective", "either_order"): "alternate_order"}
"""Values of keys in older versions with their present names; they are treated as renamed keys are."""


def with_present_keys(override: str) -> str:
    """Return an override of an older record with the present names of keys and choices, also of those in its value."""
    for old, new in RENAMED.items():
        override = re.sub(rf"(?<![\w.]){re.escape(old)}(?==)", new, override)
    for (key, old), new in RENAMED_CHOICES.items():
        if setting := re.search(rf"(?<![\w.]){re.escape(key)}=", override):
            values = re.sub(rf"(?<![\w.]){re.escape(old)}(?![\w.])", new, override[setting.end() :])
            override = override[: setting.end()] + values
    return override


def present_overrides(overrides: Iterable[str]) -> list[str]:
    """Return the overrides of an older record with present names, without those that chose a group that was removed."""
    removed = {f"{group}=default" for group in REMOVED_GROUPS}
    return [with_present_keys(text) for text in overrides if text.lstrip("+") not in removed]


def renamed_key(key: str) -> UserError:
    """Return the refusal of a key that has another name now."""
    return UserError("is not a known key", key=key, remedy=f"It is called {RENAMED[key]} now.", code=Code.UNKNOWN_KEY)


def renamed_choice_note(key: str, value: object) -> str | None:
    """Return a sentence with the present name of a renamed choice; None if it was not renamed."""
    present = RENAMED_CHOICES.get((key, str(value)))
    return f"It is called {present} now." if present else None


def present_choices(choices: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the choices of a record, with `data=stsb` of version 0.1, which has two classes, as `stsb_binary`.

    Args:
        choices: option by group.
        config: of the record; with the key `data.type` it is newer than that version.
    """
    data = config.get("data")
    is_older = isinstance(data, dict) and "type" not in data and data.get("label_threshold") is not None
    return {**choices, "data": "stsb_binary"} if is_older and choices.get("data") == "stsb" else dict(choices)


def with_present_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a recorded config in which renamed keys and choices have their present names.

    Of a key that has both names the present one stays. The given config is unchanged.
    """
    present = dict(config)
    for old, new in RENAMED.items():
        (old_group, old_name), (group, name) = old.split("."), new.split(".")
        if isinstance(node := present.get(old_group), dict) and old_name in node:
            present[old_group] = {key: value for key, value in node.items() if key != old_name}
            target = present.get(group, {})
            if isinstance(target, dict):
                present[group] = {name: node[old_name]} | target
    for (key, old), new in RENAMED_CHOICES.items():
        group, name = key.split(".")
        if isinstance(node := present.get(group), dict) and node.get(name) == old:
            present[group] = node | {name: new}
    return present
