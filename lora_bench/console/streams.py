"""Standard streams that never fail: a closed pipe or a full disk behind them does not end a training."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class _Descriptor(io.FileIO):
    """A file descriptor that drops output it cannot write."""

    failure: OSError | None = None
    """The first error of writing."""
    replaced: io.TextIOWrapper | None = None
    """The former stream, kept because its deletion would close the file descriptor."""

    def write(self, data: ReadableBuffer) -> int:
        """Write bytes and return their number; an error is noted in `failure`, and all bytes count as written."""
        try:
            written: int = super().write(data)
        except OSError as error:
            self.failure = self.failure or error
            return memoryview(data).nbytes
        return written


def protect() -> None:
    """Replace standard output and error of the process by streams that never raise on writing.

    A stream that was closed before the process started becomes the null device, standard input too, so that no file
    that is opened later gets its descriptor. A stream that is no file descriptor, or is protected already, stays.
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
    """Flush standard output, and return its first error of writing; None if there was none but a closed pipe.

    None also for a stream that is not protected.
    """
    descriptor = _descriptor(sys.stdout)
    if not isinstance(descriptor, _Descriptor):
        return None
    sys.stdout.flush()
    return None if isinstance(descriptor.failure, BrokenPipeError) else descriptor.failure


def _descriptor(stream: object) -> object:
    """Return the raw file below a text stream; with `python -u` it is the buffer of the stream."""
    buffer = getattr(stream, "buffer", None)
    return getattr(buffer, "raw", buffer)


def _text(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    """Return a text stream on the same file descriptor with the same settings, which never raises on writing."""
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
