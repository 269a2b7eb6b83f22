"""Keys of overrides and of nested configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


def flatten(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and what they hold."""
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def normalise_numbers(value: Any) -> Any:
    """`value` with 16.0 as 16, since `adapter.alpha=16` is what the YAML calls 16.0."""
    if isinstance(value, list):
        return [normalise_numbers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def key_of(override: str) -> str:
    """The key that an override sets."""
    return override.partition("=")[0].lstrip("+~")
