"""Paths that a user gives for input and output: which are streams, and files that are written whole or not at all.

A file is written beside its place and renamed into it; through a link, beside what the link leads to. Streams (`-`,
`/dev/stdout`, a FIFO, `/dev/null`) are written as they are.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
import sys
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING

from lora_bench.errors import Code, UserError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from io import BufferedReader
    from pathlib import Path

STREAM = "-"
"""Standard input or standard output."""
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def descriptor_of(path: str | Path) -> int | None:
    """Return the number of the open file that a path such as `/dev/stdout` or `/dev/fd/3` stands for."""
    found = re.fullmatch(r"/dev/(stdin|stdout|stderr)|/(?:dev|proc/self)/fd/([0-9]{1,6})", str(path))
    if found is None:
        return None
    return ("stdin", "stdout", "stderr").index(found[1]) if found[1] else int(found[2])


def is_stream(path: str | Path) -> bool:
    """Return whether a path is `-`, an open file of this process, a FIFO or a character device."""
    if str(path) == STREAM or descriptor_of(path) is not None:
        return True
    with suppress(OSError, ValueError):
        mode = os.stat(path).st_mode
        return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)
    return False


def is_same_file(source: str, output: str) -> bool:
    """Return whether input and output are one file or FIFO, by whatever links and spellings."""
    try:
        read = os.fstat(0) if source == STREAM else os.stat(source)
        written = os.fstat(1) if output == STREAM else os.stat(output)
    except (OSError, ValueError):
        return False
    return os.path.samestat(read, written) and (stat.S_ISREG(read.st_mode) or stat.S_ISFIFO(read.st_mode))


def read_input(path: str | Path, source: str) -> bytes:
    """Read a file, a FIFO or standard input to its end; refuse a device, which may have none.

    Args:
        path: the file, or a stream.
        source: what an error names.
    """
    try:
        with nullcontext(_standard_input()) if str(path) == STREAM else open(path, "rb") as file:
            if _is_endless(file):
                raise UserError(
                    "is a device, not a file",
                    file=source,
                    remedy="Give a file with a header row.",
                    code=Code.NOT_A_FILE,
                )
            return file.read()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        codes: dict[type, Code] = {FileNotFoundError: Code.NOT_FOUND, IsADirectoryError: Code.NOT_A_FILE}
        raise UserError(
            f"cannot be read: {getattr(error, 'strerror', None) or error}",
            file=source,
            code=codes.get(type(error), Code.UNREADABLE),
        ) from None


def _standard_input() -> BufferedReader:
    if sys.stdin is None:
        raise UserError("is closed", file="standard input", code=Code.UNREADABLE)
    return sys.stdin.buffer  # type: ignore[return-value]


def _is_endless(file: BufferedReader) -> bool:
    try:
        status = os.fstat(file.fileno())
    except OSError:  # a stream of Python's own
        return False
    if stat.S_ISCHR(status.st_mode):
        return not (file.isatty() or os.path.samestat(status, os.stat(os.devnull)))
    return stat.S_ISBLK(status.st_mode)


def check_output(path: str | Path, key: str, size: int = 0, *, make_folders: bool = False) -> None:
    """Refuse a file that cannot be written.

    Args:
        path: the file, or a stream.
        key: what the command line calls it.
        size: bytes that it will have at least.
        make_folders: its folder may be missing, and will be made.

    Raises:
        UserError: it is a folder or a block device, its folder is missing or read-only, or there is no room.
    """
    if str(path) == STREAM or descriptor_of(path) is not None:
        return
    with _refused(path, key):
        mode = _mode(path)
        folder = os.path.dirname(os.path.realpath(path))
        if make_folders and not os.path.lexists(folder):
            check_folder(folder, key)
        elif mode is None or stat.S_ISREG(mode):
            _probe(folder, size)


def check_folder(path: str | Path, key: str) -> None:
    """Refuse a folder that can neither be written into nor be made.

    Raises:
        UserError: it, or what stands in its place or above it, is no folder or is read-only.
    """
    with _refused(path, key, "Give a folder where you may write."):
        folder = os.path.realpath(path)
        while not os.path.lexists(folder):
            folder = os.path.dirname(folder)
        _probe(folder, 0)


def write_output(path: str | Path, content: bytes, key: str, *, make_folders: bool = False) -> None:
    """Write a file whole, in place of an older one; or into a stream.

    Raises:
        UserError: it cannot be written; an older file is as it was.
    """
    descriptor = descriptor_of(path)
    with _refused(path, key):
        if str(path) == STREAM:
            sys.stdout.buffer.write(content)
            sys.stdout.buffer.flush()
        elif descriptor is not None:
            with open(descriptor, "wb", closefd=False) as file:
                file.write(content)
        elif (mode := _mode(path)) is not None and not stat.S_ISREG(mode):
            with open(path, "wb") as file:
                file.write(content)
        else:
            place = os.path.realpath(path)
            if make_folders:
                os.makedirs(os.path.dirname(place), exist_ok=True)
            _replace(place, content)


def _mode(path: str | Path) -> int | None:
    """Return the mode of what a path leads to; None where there is nothing yet."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    if stat.S_ISBLK(mode):
        raise OSError(errno.EINVAL, "it is a device")
    if not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return mode


def _probe(folder: str, size: int) -> None:
    """Make a file of `size` bytes in a folder, and remove it."""
    part, descriptor = _make_part(folder)
    try:
        if size and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno in _NO_ROOM:  # other errors: this file system reserves no room
            raise
    finally:
        os.close(descriptor)
        os.unlink(part)


def _replace(path: str, content: bytes) -> None:
    part, descriptor = _make_part(os.path.dirname(path))
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileNotFoundError):
            shutil.copymode(path, part)
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise


def _make_part(folder: str) -> tuple[str, int]:
    """Make a file of a new name in a folder, with the mode that the user's files have."""
    part = os.path.join(folder, f".{os.getpid()}-{secrets.token_hex(4)}.part")
    return part, os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)


@contextmanager
def _refused(
    path: str | Path, key: str, remedy: str = "Give a place that exists, where you may write and where there is room."
) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = f"cannot be written: {getattr(error, 'strerror', None) or error}"
        raise UserError(reason, key=key, value=path, remedy=remedy, code=Code.UNWRITABLE) from None
