"""Keys of overrides and of nested configuration."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from lora_bench.errors import Code, UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


def flat(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and what they hold."""
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


RENAMED = {"adapter.matching": "head.pair_features"}
"""Keys of older versions with their present names: records are read with these, the command line refuses them."""


def with_present_keys(override: str) -> str:
    """Return an override of an older record with the present names of its keys, those inside its value included."""
    for old, new in RENAMED.items():
        override = re.sub(rf"(?<![\w.]){re.escape(old)}(?==)", new, override)
    return override


def renamed_key(key: str) -> UserError:
    """Return the refusal of a key that has another name now."""
    return UserError("is not a known key", key=key, remedy=f"It is called {RENAMED[key]} now.", code=Code.UNKNOWN_KEY)


def _level(value: Any) -> Any:
    """`value` with 16.0 as 16, since `adapter.alpha=16` is what the YAML calls 16.0."""
    if isinstance(value, list):
        return [_level(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def key_of(override: str) -> str:
    """The key that an override sets."""
    return override.partition("=")[0].lstrip("+~")


def with_present_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recorded config in which renamed keys have their present names; one that has both keeps the present."""
    present = dict(config)
    for old, new in RENAMED.items():
        (old_group, old_name), (group, name) = old.split("."), new.split(".")
        if isinstance(node := present.get(old_group), dict) and old_name in node:
            present[old_group] = {key: value for key, value in node.items() if key != old_name}
            target = present.get(group, {})
            if isinstance(target, dict):
                present[group] = {name: node[old_name]} | target
    return present
