"""Standard streams that a command outlives: a reader that went away or a full disk behind them ends no training."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class _Descriptor(io.FileIO):
    """A file descriptor that drops what it cannot write and keeps the reason."""

    failure: OSError | None = None
    replaced: io.TextIOWrapper | None = None
    """The stream that stood here before; it would close the file descriptor if it were deleted."""

    def write(self, data: ReadableBuffer) -> int:
        try:
            written: int = super().write(data)
        except OSError as error:
            self.failure = self.failure or error
            return memoryview(data).nbytes
        return written


def protect() -> None:
    """Replace the process's own standard streams by ones that never raise on writing.

    A stream that was closed before the process began becomes the null device, so that no file that is opened later
    takes its descriptor.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor
        stream = getattr(sys, name)
        if stream is None:
            mode = "w" if number else "r"
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
        elif number and type(_descriptor(stream)) is io.FileIO:
            with suppress(OSError):
                stream.flush()
            setattr(sys, name, _text(stream))


def failure() -> OSError | None:
    """Return why standard output could not be written, if so; a reader that went away is no failure."""
    descriptor = _descriptor(sys.stdout)
    if not isinstance(descriptor, _Descriptor):
        return None
    sys.stdout.flush()
    return None if isinstance(descriptor.failure, BrokenPipeError) else descriptor.failure


def _descriptor(stream: object) -> object:
    """Return what a text stream writes to in the end; of `python -u` it is the stream's buffer itself."""
    buffer = getattr(stream, "buffer", None)
    return getattr(buffer, "raw", buffer)


def _text(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    descriptor = _Descriptor(stream.fileno(), "w", closefd=False)
    descriptor.replaced = stream
    binary = descriptor if isinstance(stream.buffer, io.FileIO) else io.BufferedWriter(descriptor)
    return io.TextIOWrapper(
        binary,
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
