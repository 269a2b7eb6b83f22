"""Input and output paths that a user typed: streams, and files that are written atomically.

A file is written under a temporary name in the same folder and renamed; a link is followed first. Streams (`-`,
`/dev/stdout`, a FIFO, `/dev/null`) are written directly.
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
    """Return the file descriptor that a path such as `/dev/stdout` or `/dev/fd/3` stands for; None for other paths."""
    match = re.fullmatch(r"/dev/(stdin|stdout|stderr)|/(?:dev|proc/self)/fd/([0-9]{1,6})", str(path))
    if match is None:
        return None
    return ("stdin", "stdout", "stderr").index(match[1]) if match[1] else int(match[2])


def is_stream(path: str | Path) -> bool:
    """Return whether a path is `-`, a file descriptor, a FIFO or a character device."""
    if str(path) == STREAM or descriptor_of(path) is not None:
        return True
    with suppress(OSError, ValueError):
        mode = os.stat(path).st_mode
        return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)
    return False


def is_same_file(source: str, output: str) -> bool:
    """Return whether two paths lead to the same file or FIFO, links followed; False if one does not exist.

    Args:
        source: of the input; `-` is standard input.
        output: of the output; `-` is standard output.
    """
    try:
        read = os.fstat(0) if source == STREAM else os.stat(source)
        written = os.fstat(1) if output == STREAM else os.stat(output)
    except (OSError, ValueError):
        return False
    return os.path.samestat(read, written) and (stat.S_ISREG(read.st_mode) or stat.S_ISFIFO(read.st_mode))


def read_input(path: str | Path, source: str) -> bytes:
    """Return the content of a file, a FIFO or standard input.

    Args:
        path: the file, or a stream.
        source: its name in messages.

    Raises:
        UserError: it cannot be read, or is a device, which may have no end; a terminal and the null device are
            accepted.
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
    """Return standard input as a binary stream; a `UserError` if it is closed."""
    if sys.stdin is None:
        raise UserError("is closed", file="standard input", code=Code.UNREADABLE)
    return sys.stdin.buffer  # type: ignore[return-value]


def _is_endless(file: BufferedReader) -> bool:
    """Return whether a file is a device, but not a terminal or the null device."""
    try:
        status = os.fstat(file.fileno())
    except OSError:  # a stream in memory
        return False
    if stat.S_ISCHR(status.st_mode):
        return not (file.isatty() or os.path.samestat(status, os.stat(os.devnull)))
    return stat.S_ISBLK(status.st_mode)


def check_output(path: str | Path, key: str, size: int = 0, *, make_folders: bool = False) -> None:
    """Check that an output file can be written; it is not made.

    Args:
        path: the file, or a stream, which is not checked.
        key: the config key that holds it, for messages.
        size: minimum bytes that it will have.
        make_folders: its folder may be missing, as it will be made.

    Raises:
        UserError: it is read-only, a folder or a block device, its folder is missing or read-only, or there is no room.
    """
    if str(path) == STREAM or descriptor_of(path) is not None:
        return
    with _translate_write_errors(path, key):
        mode = _mode(path)
        folder = os.path.dirname(os.path.realpath(path))
        if make_folders and not os.path.lexists(folder):
            check_folder(folder, key)
        elif mode is None or stat.S_ISREG(mode):
            _probe(folder, size)


def check_folder(path: str | Path, key: str) -> None:
    """Check that an output folder is writable, or can be made below the nearest existing one; it is not made.

    Raises:
        UserError: the path, or the existing path nearest above it, is not a folder or is read-only.
    """
    with _translate_write_errors(path, key, "Give a folder where you may write."):
        folder = os.path.realpath(path)
        while not os.path.lexists(folder):
            folder = os.path.dirname(folder)
        _probe(folder, 0)


def write_output(path: str | Path, content: bytes, key: str, *, make_folders: bool = False) -> None:
    """Write a file atomically, or into a stream.

    Args:
        path: the file, which replaces an older one and keeps its mode, or a stream.
        content: of the file.
        key: the config key that holds the path, for messages.
        make_folders: make missing folders.

    Raises:
        UserError: it cannot be written; an older file is unchanged.
        BrokenPipeError: the reader of a stream is gone.
    """
    descriptor = descriptor_of(path)
    with _translate_write_errors(path, key):
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
            target = os.path.realpath(path)
            if make_folders:
                os.makedirs(os.path.dirname(target), exist_ok=True)
            _replace(target, content)


def _mode(path: str | Path) -> int | None:
    """Return the mode of an existing path, links followed, or None if there is none.

    Raises:
        OSError: it is a folder, a block device or read-only.
    """
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
    """Create a temporary file in a folder and remove it, to check that the folder is writable and has room.

    Args:
        folder: an existing folder.
        size: bytes to reserve; they are not checked where the system cannot reserve any.

    Raises:
        OSError: the file cannot be created, or there is no room.
    """
    temporary, descriptor = _make_temporary(folder)
    try:
        if size and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno in _NO_ROOM:  # other errors: the file system does not support it
            raise
    finally:
        os.close(descriptor)
        os.unlink(temporary)


def _replace(path: str, content: bytes) -> None:
    """Write a file atomically, with the mode of the older file if there is one; an OSError leaves it unchanged."""
    temporary, descriptor = _make_temporary(os.path.dirname(path))
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileNotFoundError):
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _make_temporary(folder: str) -> tuple[str, int]:
    """Make an empty file with a new name and the default mode; return its path and its descriptor."""
    path = os.path.join(folder, f".{os.getpid()}-{secrets.token_hex(4)}.part")
    return path, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)


@contextmanager
def _translate_write_errors(
    path: str | Path, key: str, remedy: str = "Give a path in an existing, writable folder with enough room."
) -> Iterator[None]:
    """Translate errors of writing `path` within the context into a `UserError`.

    These are every `OSError` but `BrokenPipeError`, and `ValueError`, which a NUL in the path raises.

    Args:
        path: the output.
        key: the config key that holds it.
        remedy: of the error.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = f"cannot be written: {getattr(error, 'strerror', None) or error}"
        raise UserError(reason, key=key, value=path, remedy=remedy, code=Code.UNWRITABLE) from None
