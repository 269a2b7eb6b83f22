"""Files of ours on disk: each is written beside its place and renamed into it, so that it is whole or not there.

Whoever reads one, or comes after a crash, sees the old file or the new one. A number that is not finite is written as
null, since JSON has no NaN.
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

MAKE_ROOM = "Make room, and go on with: lora-bench train resume=DIR."


def write(folder: Path, name: str, content: bytes) -> Path:
    """Write the whole file `name` below `folder` beside its place, then rename it there.

    Raises:
        RunFailedError: it cannot be written; an older one is as it was.
    """
    path = folder / name
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with writing(path):
        for below in reversed(Path(name).parents[:-1]):  # not the folder: a run that was deleted stays so
            (folder / below).mkdir(exist_ok=True)
        try:
            with part.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    return path


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Tell what the operating system refuses as what it means for the run: no room, or its folder is gone."""
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
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def to_json(value: Any, name: str = "") -> Any:
    """`value` in the types that JSON has; a number that is not finite becomes None, and secrets are hidden.

    Args:
        value: what to write.
        name: the key that holds it.
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
    raise TypeError(f"{type(value).__name__} has no place in a run's record")


def dump(content: dict[str, Any]) -> str:
    # ASCII: a command line with bytes that are no text (lone surrogates in Python) can still be written and read back.
    return json.dumps(content, indent=2, allow_nan=False) + "\n"
