"""Cache files: written atomically, verified by a checksum, bounded in total size.

A cache file is a payload and a trailer, which holds the XXH3 checksum of the key and the payload, and a mark of the
format. Anything else at its path (a truncated or damaged file, another version, a link, a folder, a device) counts as
absent: a note names it, and its content is computed again. A cache that cannot be written never ends a run.

The files are in $LORA_BENCH_CACHE (by default ~/.cache/lora-bench), in a folder for each cache: `tokens`, `prefix`.
"""

from __future__ import annotations

import errno
import math
import os
import re
import stat
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from xxhash import xxh3_128

from lora_bench.console.text import note
from lora_bench.errors import Code, UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

try:
    import fcntl
except ImportError:  # Windows: a file that is open there cannot be deleted anyway
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")

SUFFIXES = {"tokens": ".arrow", "prefix": ".hidden"}
"""Suffix of the files of each cache."""
TOKEN_LIMIT = "LORA_BENCH_TOKEN_CACHE_BYTES"
"""The environment variable with the maximum bytes of the token cache."""
DEFAULT_TOKEN_BYTES = 4e9

MARK = b"lora-bench cache file, format 1\n"
TRAILER_BYTES = 16 + len(MARK)
CHUNK_BYTES = 1 << 20
"""Bytes read at a time for a checksum, which fit into the cache of a core."""

# Names of complete files, and of files being written by this and by older versions.
_COMPLETE = re.compile(r"[0-9a-f]{40}\.(arrow|hidden)")
_PART = re.compile(r"[0-9a-f]{40}\.(arrow|hidden)\.\w+\.part|tmp\w{8}(\.part)?")


def cache_folder() -> Path:
    """Return the folder of all caches: $LORA_BENCH_CACHE, else `lora-bench` in $XDG_CACHE_HOME or in ~/.cache.

    It is not created.

    Raises:
        UserError: no environment variable names one, and there is no home folder.
    """
    if folder := os.environ.get("LORA_BENCH_CACHE"):
        return Path(folder)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora-bench"
    except RuntimeError:
        reason = "is not set, and this user has no home folder"
        raise UserError(
            reason, key="LORA_BENCH_CACHE", remedy="Set it to a folder with room to write.", code=Code.MISSING
        ) from None


def token_limit_bytes() -> float:
    """Return the maximum bytes of the token cache: $LORA_BENCH_TOKEN_CACHE_BYTES, by default 4e9; 0: no cache.

    Raises:
        UserError: the variable is not a finite number from 0.
    """
    text = os.environ.get(TOKEN_LIMIT, "")
    try:
        limit = float(text) if text else DEFAULT_TOKEN_BYTES
    except ValueError:
        limit = math.nan
    if not (math.isfinite(limit) and limit >= 0):
        raise UserError(
            "is not a number of bytes",
            key=TOKEN_LIMIT,
            value=text,
            remedy="Give one from 0 (no cache), such as 4e9.",
            code=Code.INVALID_VALUE,
        )
    return limit


@dataclass(frozen=True)
class Entry:
    """A file in a cache folder, at the time when the folder was listed."""

    path: Path
    size_bytes: int
    used: float
    """Time of its last use, in seconds since the epoch."""


@dataclass(frozen=True)
class CacheFiles:
    """The files of one cache.

    Args:
        name: `tokens` or `prefix`, the name of its folder.
        limit_bytes: maximum bytes of all files; the least recently used are removed to make room.
    """

    name: str
    limit_bytes: float = math.inf

    @property
    def folder(self) -> Path:
        """The folder of the files; it may be missing."""
        return cache_folder() / self.name

    def path(self, key: str) -> Path:
        """Return the path of the file with this key (40 hexadecimal digits)."""
        return self.folder / f"{key}{SUFFIXES[self.name]}"

    def read(self, key: str, parse: Callable[[bytes], T], *, max_bytes: int) -> T | None:
        """Return the parsed payload of a file; None if there is no valid file.

        A file that is there but not valid, or cannot be read, is left as it is, and a note is printed. Reading counts
        as a use of the file.

        Args:
            key: of the file.
            parse: takes the verified payload; raises ValueError if it is not valid.
            max_bytes: maximum bytes of the payload; a larger file is not read.
        """

        def load(file: BinaryIO) -> T:
            """Return the parsed payload of an open file, and close it; ValueError if it is not valid."""
            with file:
                length, digest = _read_trailer(file)
                if length > max_bytes:
                    raise ValueError(f"holds {length} bytes, more than the maximum of {max_bytes}")
                file.seek(0)
                payload = file.read(length)
            _require(digest == _digest(key, [payload]))
            return parse(payload)

        return self._load(key, load)

    def open(self, key: str, *, size_bytes: int) -> BinaryIO | None:
        """Return a verified file, open for reading; None if there is no valid file.

        Its payload begins at byte 0; the file is not positioned there. In other respects it is as `read`.

        Args:
            key: of the file.
            size_bytes: bytes of its payload.
        """

        def verify(file: BinaryIO) -> BinaryIO:
            """Return an open file unchanged; ValueError if it is not valid."""
            length, digest = _read_trailer(file)
            if length != size_bytes:
                raise ValueError(f"holds {length} bytes instead of {size_bytes}")
            _require(digest == _digest(key, _chunks(file, length)))
            return file

        return self._load(key, verify)

    def write(
        self, key: str, fill: Callable[[BinaryIO], object], *, size_bytes: int, keep: Collection[str] = ()
    ) -> BinaryIO | None:
        """Write a file atomically and return it open; if it cannot be written, print a note and return None.

        Room is made first: abandoned files are removed, then the least recently used ones until the limit holds. A file
        above the limit is written nevertheless. The open file is readable and not positioned at its start.

        Args:
            key: of the file; an existing file is replaced.
            fill: writes the payload into an empty file; an error of it other than `OSError` is raised, and no file is
                left.
            size_bytes: bytes of the payload, for which room is made.
            keep: keys of files that are not removed to make room.
        """
        path = self.path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for entry in self.abandoned():
                remove(entry)
            self._make_room(size_bytes + TRAILER_BYTES, {self.path(other) for other in keep})
            descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.", suffix=".part")
            try:
                _lock(descriptor)
                file = os.fdopen(descriptor, "w+b")
                try:
                    fill(file)
                    _seal(file, key)
                    os.replace(temporary, path)
                except BaseException:
                    with suppress(OSError):  # closing flushes, which fails again
                        file.close()
                    raise
            except BaseException:
                with suppress(OSError):
                    os.unlink(temporary)
                raise
        except OSError as error:
            note(f"the cache file {path} cannot be written ({error.strerror or error}); continuing without it")
            return None
        return file

    def complete(self) -> list[Entry]:
        """Return the complete files, valid or not, the least recently used first."""
        return sorted(self._entries(_COMPLETE), key=lambda entry: entry.used)

    def abandoned(self) -> list[Entry]:
        """Return the unfinished files of processes that have ended."""
        return [entry for entry in self._entries(_PART) if _is_abandoned(entry.path)]

    def _load(self, key: str, load: Callable[[BinaryIO], T]) -> T | None:
        """Open a file, and return the result of `load` on it, which closes the file or keeps it open.

        None if there is no file; None after a note if it cannot be read or `load` raises ValueError. The file is marked
        as used now. Any error closes it, and other errors are raised.
        """
        path = self.path(key)
        try:
            file = _open_regular(path)
            with suppress(OSError):  # the folder may be read-only
                os.utime(file.fileno())
            try:
                return load(file)
            except BaseException:
                file.close()
                raise
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            reason = f"cannot be read ({error.strerror or error})"
        except ValueError as error:
            reason = str(error)
        note(f"the cache file {path} {reason}; computing its content again")
        return None

    def _make_room(self, size_bytes: int, keep: Collection[Path]) -> None:
        """Remove the least recently used files, except those to keep, until this many more bytes fit the limit.

        If they never fit, all others are removed.
        """
        entries = self.complete()
        total = sum(entry.size_bytes for entry in entries) + size_bytes
        for entry in entries:
            if total <= self.limit_bytes:
                return
            if entry.path not in keep and remove(entry):
                total -= entry.size_bytes

    def _entries(self, names: re.Pattern[str]) -> Iterator[Entry]:
        """Yield the regular files with names of this pattern, in no order; links are not followed.

        Nothing if the folder is missing.
        """
        try:
            files = list(os.scandir(self.folder))
        except OSError:
            return
        for file in files:
            with suppress(OSError):  # another process may have removed it
                status = file.stat(follow_symlinks=False)
                if names.fullmatch(file.name) and stat.S_ISREG(status.st_mode):
                    yield Entry(Path(file.path), status.st_size, status.st_mtime)


def remove(entry: Entry) -> bool:
    """Delete a file, and return whether it is gone.

    A process that has it open can still read it. A system that does not delete open files keeps it.
    """
    try:
        entry.path.unlink(missing_ok=True)
    except OSError:
        return False
    return True


def _require(has_checksum: bool) -> None:
    """Raise ValueError unless the checksum is right."""
    if not has_checksum:
        raise ValueError("is damaged: its checksum differs")


def _open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading, without waiting and without following a link.

    Raises:
        ValueError: it is a link, a folder or a device.
        OSError: it is missing or cannot be read.
    """
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise ValueError("is not a regular file")
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    return os.fdopen(os.open(path, flags), "rb")


def _read_trailer(file: BinaryIO) -> tuple[int, bytes]:
    """Return the bytes of the payload and the checksum in the trailer; ValueError if there is no trailer."""
    length = os.fstat(file.fileno()).st_size - TRAILER_BYTES
    if length >= 0:
        file.seek(length)
        trailer = file.read(TRAILER_BYTES)
        if trailer.endswith(MARK) and len(trailer) == TRAILER_BYTES:
            return length, trailer[: -len(MARK)]
    raise ValueError("is truncated, or was written by another version")


def _seal(file: BinaryIO, key: str) -> None:
    """Append the trailer to a payload, and flush the file to disk; it stays positioned at its end."""
    length = file.seek(0, os.SEEK_END)
    digest = _digest(key, _chunks(file, length))
    file.seek(length)
    file.write(digest + MARK)
    file.flush()
    os.fsync(file.fileno())


def _digest(key: str, payload: Iterable[bytes | memoryview]) -> bytes:
    """Return the checksum of key and payload: a file under another key is not valid."""
    digest = xxh3_128(key.encode())
    for chunk in payload:
        digest.update(chunk)
    return digest.digest()


def _chunks(file: BinaryIO, length: int) -> Iterator[memoryview]:
    """Yield the first `length` bytes of a file in chunks; the next chunk overwrites the buffer of the last.

    Raises:
        OSError: the file is shorter.
    """
    buffer = memoryview(bytearray(min(CHUNK_BYTES, length)))
    file.seek(0)
    while length:
        count = file.readinto(buffer[:length])  # type: ignore[attr-defined]
        if not count:
            raise OSError(errno.EIO, "it was truncated while it was read")
        yield buffer[:count]
        length -= count


def _lock(descriptor: int) -> None:
    """Mark a file as being written by this process while it is open; do nothing where files cannot be locked."""
    if fcntl is not None:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


SECONDS_TO_LOCK = 10.0
"""Time that a process is given between creating a file and locking it."""


def _is_abandoned(path: Path) -> bool:
    """Return whether no process is writing the file; an empty one of the last `SECONDS_TO_LOCK` may not be locked yet.

    False for a file that cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        return False
    try:
        status = os.fstat(descriptor)
        if status.st_size == 0 and time.time() - status.st_mtime < SECONDS_TO_LOCK:
            return False
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True
