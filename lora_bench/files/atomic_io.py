"""Atomic writing of files, and the JSON form of records.

A file is written under a temporary name in the same folder and renamed. A reader sees the old file or the new one, even
after a crash. A number that is not finite is written as null, since JSON has no NaN.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

from lora_bench.console.redaction import name_below, redact, redact_value
from lora_bench.errors import Code, RunFailedError

MAKE_ROOM = "Make room, then resume it: lora-bench train resume=DIR."


def write(folder: Path, name: str, content: bytes) -> Path:
    """Write the file `name` below `folder` atomically, and return its path.

    Args:
        folder: has to exist.
        name: may have folders, which are made.
        content: of the file.

    Raises:
        RunFailedError: it cannot be written; an older file is unchanged.
    """
    path = folder / name
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with writing(path):
        for below in reversed(Path(name).parents[:-1]):  # not `folder` itself: a run that was deleted stays deleted
            (folder / below).mkdir(exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    return path


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Translate an `OSError` of writing `path` within the context into a `RunFailedError`.

    If a file or folder is not found, the folder of `path` is gone (`Code.LOST`); otherwise `path` cannot be written
    (`Code.UNWRITABLE`).
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise RunFailedError(
                "is gone: it was deleted or moved while it was in use", file=path.parent, code=Code.LOST
            ) from None
        raise RunFailedError(
            f"cannot be written: {describe_error(error)}", file=path, remedy=MAKE_ROOM, code=Code.UNWRITABLE
        ) from None


def describe_error(error: Exception) -> str:
    """Return the reason of an error: for an `OSError` its message without number and path."""
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def to_json(value: Any, name: str = "") -> Any:
    """Convert a value to JSON types, with numbers that are not finite as None and secrets hidden.

    Args:
        value: nested mappings, lists, tuples and sets (sorted) of texts, paths, enums, and numbers of Python, numpy or
            torch; keys become text.
        name: the key that holds it, which tells whether it is a secret.

    Raises:
        TypeError: a value is of another type.
        ValueError: an array or tensor has more than one element.
    """
    if isinstance(value, Enum):
        return to_json(value.value, name)
    if value is None or isinstance(value, (bool, int, str)):
        return redact_value(value, name)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {redact(str(key)): to_json(item, name_below(name, str(key))) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_json(item, name) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, Path):
        return redact_value(str(value), name)
    if hasattr(value, "item"):  # a number of numpy's or torch's
        return to_json(value.item(), name)
    raise TypeError(f"{type(value).__name__} cannot be written into a run's record")


def dump(content: dict[str, Any]) -> str:
    """Return indented JSON in ASCII, so that arguments with undecodable bytes can be written and read back."""
    return json.dumps(content, indent=2, allow_nan=False) + "\n"
