"""Readers of small untrusted files: records, logs, predictions, settings of models and adapters.

Only regular files of a bounded size are read, and opening never blocks, as it would with a FIFO. JSON is bounded in
depth, and a duplicate key is an error. Errors are an `OSError` or a `ValueError` that gives the reason.
"""

from __future__ import annotations

import json
import math
import os
import stat
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from io import BufferedReader
    from pathlib import Path

MAX_BYTES = 32 * 2**20
"""Maximum bytes of a file that is held in memory, far more than a record or log has."""
MAX_DEPTH = 40
"""Maximum depth of JSON, which recursive functions walk through."""
MAX_MAGNITUDE = 1e60
"""Maximum magnitude of a measured number: means and squares of larger ones overflow."""


def open_file(path: Path, max_bytes: int = MAX_BYTES) -> BufferedReader:
    """Open a regular file of at most `max_bytes` for reading.

    Raises:
        OSError: it is absent, unreadable, too large, or a folder, FIFO, socket or device.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(None, "it is not a regular file")
        if status.st_size > max_bytes:
            raise OSError(None, f"it holds {status.st_size:,} bytes, and at most {max_bytes:,} are read")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def refusal(path: Path, max_bytes: int = MAX_BYTES) -> str | None:
    """Return the reason why an existing file cannot be opened (`open_file`); None if it can be, or is absent.

    A dangling link is refused. The content is not read.
    """
    try:
        open_file(path, max_bytes).close()
    except FileNotFoundError:
        return "it is a link to nothing" if os.path.lexists(path) else None
    except (OSError, ValueError) as error:
        return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return None


def read_bytes(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """Return the content of a regular file; raises like `open_file`."""
    with open_file(path, max_bytes) as file:
        return file.read(max_bytes)


def read_text(path: Path) -> str:
    """Return the text of a regular file in UTF-8; raises like `open_file`, and `ValueError` for other encodings."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("it is not text in UTF-8") from None


def read_json(path: Path) -> Any:
    """Return the JSON value in a file; raises like `read_text` and `parse_json`."""
    return parse_json(read_text(path))


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON Lines file; lines that are not valid JSON objects are skipped.

    Bytes that are not UTF-8 are replaced. The file is read as the first object is requested.

    Raises:
        OSError: as `open_file`.
    """
    for line in read_bytes(path).decode("utf-8", errors="replace").splitlines():
        try:
            value = parse_json(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


def parse_json(text: str) -> Any:
    """Return the value of a JSON text.

    An integer of more than 300 digits becomes infinite, as `1e999` does. `NaN` and `Infinity` are read as floats.

    Raises:
        ValueError: it is not JSON, is nested too deeply, or has a duplicate key.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_int=_integer)
    except RecursionError:
        value = None
        too_deep = True
    else:
        too_deep = _depth_exceeds(value, MAX_DEPTH)
    if too_deep:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    return value


def as_number(value: Any) -> float | int | None:
    """Return `value` if it is a number of at most `MAX_MAGNITUDE`, else None; NaN, True and False are none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_MAGNITUDE:
        return None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dict; ValueError if it has a duplicate key."""
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} is given twice")
    return content


def _integer(digits: str) -> int | float:
    """Return the integer in a JSON text, or infinity for more than 300 digits."""
    return int(digits) if len(digits) <= 300 else math.copysign(math.inf, -1 if digits.startswith("-") else 1)


def _depth_exceeds(value: Any, limit: int) -> bool:
    """Return whether dicts and lists are nested more than `limit` deep."""
    level = [value]
    for _ in range(limit + 1):
        level = [
            item
            for node in level
            if isinstance(node, dict | list)
            for item in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return False
    return True
