"""Equality of settings: a canonical JSON form, and the hash of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any


def normalise_numbers(value: Any) -> Any:
    """Return a value with integral floats as integers: 16.0, which YAML has, as 16, which `adapter.alpha=16` gives.

    Lists are converted at every depth. Other containers, infinity and NaN are returned unchanged.
    """
    if isinstance(value, list):
        return [normalise_numbers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def settings_hash(value: Any) -> str:
    """Return the SHA-256 of settings in 64 hexadecimal digits; equal settings have equal hashes.

    Two settings are equal if their classes have the same name and their fields are equal. The order of keys does not
    matter, nor does 16 for 16.0 or a tuple for a list; true and 1 differ.

    Args:
        value: nested dataclasses, mappings, lists, tuples, texts, numbers, true, false and None.

    Raises:
        TypeError: something else is in it.
    """
    return hashlib.sha256(json.dumps(_canonical(value), sort_keys=True).encode()).hexdigest()


def _canonical(value: Any) -> Any:
    """Return settings as JSON types: a dataclass as its class name and fields, keys as text, 16.0 as 16.

    A value of another type is returned unchanged, for `json.dumps` to refuse.
    """
    if is_dataclass(value) and not isinstance(value, type):
        content = {field.name: _canonical(getattr(value, field.name)) for field in fields(value)}
        return {"class": type(value).__name__, "fields": content}
    if isinstance(value, Mapping):
        return {str(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    return normalise_numbers(value)
