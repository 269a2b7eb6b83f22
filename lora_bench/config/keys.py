"""Keys of nested configuration and of overrides as they are typed: `adapter.rank=8`, `+metric.x=…`, `~tracking`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


def flatten(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys with their values; an empty dictionary is a value."""
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def split_override(override: str) -> tuple[str, str]:
    """Return the key and the value of an override as they are typed, without `+` and `~`; the value may be empty.

    `config.overrides.parse_override` reads values as Hydra does.
    """
    key, _, value = override.partition("=")
    return key.lstrip("+~"), value


def key_of(override: str) -> str:
    """Return the key that an override sets or deletes."""
    return split_override(override)[0]
