"""Equality of settings: a canonical JSON form, and the hash of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any


def normalise_numbers(value: Any) -> Any:
    """Return a value, or a list of values, with 16.0 as 16: `adapter.alpha=16` is what the YAML calls 16.0."""
    if isinstance(value, list):
        return [normalise_numbers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def settings_hash(value: Any) -> str:
    """Return the SHA-256 of settings in 64 hexadecimal digits; equal settings have equal hashes.

    Two settings are equal if they are of the same class and their fields are equal. The order of keys does not matter,
    nor does 16 for 16.0.

    Args:
        value: nested dataclasses, mappings, lists, tuples, texts, numbers, true, false and None.

    Raises:
        TypeError: something else is in it.
    """
    return hashlib.sha256(json.dumps(_canonical(value), sort_keys=True).encode()).hexdigest()


def _canonical(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        content = {field.name: _canonical(getattr(value, field.name)) for field in fields(value)}
        return {"class": type(value).__name__, "fields": content}
    if isinstance(value, Mapping):
        return {str(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    return normalise_numbers(value)
