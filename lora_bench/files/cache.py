"""Cache files: written beside their place and renamed, sealed with a checksum, bounded in size.

A cache file is a payload and a trailer: the XXH3 checksum of the file's key and its payload, and a mark of the format.
Anything else at its path (a cut or damaged file, one of another version, a link, a folder, a device) counts as absent:
a note names it, and its content is computed again. A cache that cannot be written never ends a run.

The files lie in $LORA_BENCH_CACHE (by default ~/.cache/lora-bench), one folder for each kind.
"""

from __future__ import annotations

import errno
import math
import os
import re
import stat
import tempfile
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
"""Of the files of each kind."""
TOKEN_LIMIT = "LORA_BENCH_TOKEN_CACHE_BYTES"
DEFAULT_TOKEN_BYTES = 4e9

MARK = b"lora-bench cache file, format 1\n"
TRAILER_BYTES = 16 + len(MARK)
CHUNK_BYTES = 1 << 20
"""Read at a time for a checksum: fits a core's own cache."""

# Files of ours by name: complete ones, those being written, and what older versions were writing.
_COMPLETE = re.compile(r"[0-9a-f]{40}\.(arrow|hidden)")
_PART = re.compile(r"[0-9a-f]{40}\.(arrow|hidden)\.\w+\.part|tmp\w{8}(\.part)?")


def cache_folder() -> Path:
    """Return the folder of all caches.

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
    """Return how many bytes the token cache may take: $LORA_BENCH_TOKEN_CACHE_BYTES, by default 4 GB; 0: no cache.

    Raises:
        UserError: the variable holds no such number.
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
    """A file in a cache folder, as it was when the folder was listed."""

    path: Path
    size_bytes: int
    used: float
    """When it was last used, in seconds since the epoch."""


@dataclass(frozen=True)
class CacheFiles:
    """The cache files of one kind.

    Args:
        kind: `tokens` or `prefix`; the folder's name.
        limit_bytes: the bytes that they may take together; the least recently used are removed to make room.
    """

    kind: str
    limit_bytes: float = math.inf

    @property
    def folder(self) -> Path:
        return cache_folder() / self.kind

    def path(self, key: str) -> Path:
        """Return where the file of a key (40 hex digits) lies."""
        return self.folder / f"{key}{SUFFIXES[self.kind]}"

    def read(self, key: str, parse: Callable[[bytes], T], *, max_bytes: int) -> T | None:
        """Return what `parse` makes of a verified payload; None where there is no sound file.

        Args:
            key: of the file.
            parse: raises ValueError for a payload that it cannot accept.
            max_bytes: of a payload; a larger file is not read.
        """

        def load(file: BinaryIO) -> T:
            with file:
                length, digest = _read_trailer(file)
                if length > max_bytes:
                    raise ValueError(f"holds {length} bytes where at most {max_bytes} belong")
                file.seek(0)
                payload = file.read(length)
            _require(digest == _digest(key, [payload]))
            return parse(payload)

        return self._load(key, load)

    def open(self, key: str, *, size_bytes: int) -> BinaryIO | None:
        """Open a verified file, whose payload begins at 0; None where there is no sound one.

        Args:
            key: of the file.
            size_bytes: of its payload.
        """

        def verify(file: BinaryIO) -> BinaryIO:
            length, digest = _read_trailer(file)
            if length != size_bytes:
                raise ValueError(f"holds {length} bytes where {size_bytes} belong")
            _require(digest == _digest(key, _chunks(file, length)))
            return file

        return self._load(key, verify)

    def write(
        self, key: str, fill: Callable[[BinaryIO], object], *, size_bytes: int, keep: Collection[str] = ()
    ) -> BinaryIO | None:
        """Write a file and return it open; None where it cannot be written, which a note says.

        Args:
            key: of the file; one that is there is replaced.
            fill: writes the payload into an empty file.
            size_bytes: of the payload: room is made for it.
            keep: keys of files that are not removed to make room.
        """
        path = self.path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for part in self.abandoned():
                remove(part)
            self._make_room(size_bytes + TRAILER_BYTES, {self.path(other) for other in keep})
            descriptor, part_name = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.", suffix=".part")
            try:
                _lock(descriptor)
                file = os.fdopen(descriptor, "w+b")
                try:
                    fill(file)
                    _seal(file, key)
                    os.replace(part_name, path)
                except BaseException:
                    with suppress(OSError):  # what could not be written cannot be flushed either
                        file.close()
                    raise
            except BaseException:
                with suppress(OSError):
                    os.unlink(part_name)
                raise
        except OSError as error:
            note(f"the cache file {path} cannot be written ({error.strerror or error}); continuing without it")
            return None
        return file

    def complete(self) -> list[Entry]:
        """Return the complete files, sound or not, the least recently used first."""
        return sorted(self._entries(_COMPLETE), key=lambda entry: entry.used)

    def abandoned(self) -> list[Entry]:
        """Return the files that processes were writing when they were killed."""
        return [entry for entry in self._entries(_PART) if _is_abandoned(entry.path)]

    def _load(self, key: str, load: Callable[[BinaryIO], T]) -> T | None:
        """Return what `load` makes of the open file; where it raises, say why the file is not used and return None."""
        path = self.path(key)
        try:
            file = _open_regular(path)
            with suppress(OSError):  # a folder that cannot be written can still be read
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
        """Remove the least recently used files until so many bytes more fit the limit."""
        entries = self.complete()
        total = sum(entry.size_bytes for entry in entries) + size_bytes
        for entry in entries:
            if total <= self.limit_bytes:
                return
            if entry.path not in keep and remove(entry):
                total -= entry.size_bytes

    def _entries(self, names: re.Pattern[str]) -> Iterator[Entry]:
        """Yield the regular files of these names; links are not followed."""
        try:
            found = list(os.scandir(self.folder))
        except OSError:
            return
        for each in found:
            with suppress(OSError):  # another process has just removed it
                facts = each.stat(follow_symlinks=False)
                if names.fullmatch(each.name) and stat.S_ISREG(facts.st_mode):
                    yield Entry(Path(each.path), facts.st_size, facts.st_mtime)


def remove(entry: Entry) -> bool:
    """Delete a file; return whether it is gone.

    A process that has it open goes on reading it. Where the system forbids to delete an open file, it stays.
    """
    try:
        entry.path.unlink(missing_ok=True)
    except OSError:
        return False
    return True


def _require(is_sound: bool) -> None:
    if not is_sound:
        raise ValueError("is damaged: its checksum differs")


def _open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading, never waiting and never following a link in its place."""
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise ValueError("is not a regular file")
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    return os.fdopen(os.open(path, flags), "rb")


def _read_trailer(file: BinaryIO) -> tuple[int, bytes]:
    """Return the size of the payload and its checksum."""
    length = os.fstat(file.fileno()).st_size - TRAILER_BYTES
    if length >= 0:
        file.seek(length)
        trailer = file.read(TRAILER_BYTES)
        if trailer.endswith(MARK) and len(trailer) == TRAILER_BYTES:
            return length, trailer[: -len(MARK)]
    raise ValueError("is cut short, or was not written by this version")


def _seal(file: BinaryIO, key: str) -> None:
    """Add the trailer to a file that holds its payload, and see to it that all of it is on the disk."""
    length = file.seek(0, os.SEEK_END)
    digest = _digest(key, _chunks(file, length))
    file.seek(length)
    file.write(digest + MARK)
    file.flush()
    os.fsync(file.fileno())


def _digest(key: str, payload: Iterable[bytes | memoryview]) -> bytes:
    digest = xxh3_128(key.encode())  # a sound file under another name is not sound
    for chunk in payload:
        digest.update(chunk)
    return digest.digest()


def _chunks(file: BinaryIO, length: int) -> Iterator[memoryview]:
    """Yield the first `length` bytes of a file in turn; each chunk is overwritten by the next."""
    buffer = memoryview(bytearray(min(CHUNK_BYTES, length)))
    file.seek(0)
    while length:
        count = file.readinto(buffer[:length])  # type: ignore[attr-defined]
        if not count:
            raise OSError(errno.EIO, "it was cut short meanwhile")
        yield buffer[:count]
        length -= count


def _lock(descriptor: int) -> None:
    """Mark a file as being written by this process, for as long as it has it open."""
    if fcntl is not None:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_abandoned(path: Path) -> bool:
    """Return whether no process is writing the file."""
    try:
        descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        return False
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True
