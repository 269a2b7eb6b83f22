"""Reading files that anyone may have written: bounded, never blocking, with a reason for each refusal."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lora_bench.files import untrusted

if TYPE_CHECKING:
    from collections.abc import Callable


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path.name)


SPECIAL: dict[str, tuple[Callable[[Path], object], str]] = {
    "fifo": (os.mkfifo, "regular"),
    "folder": (Path.mkdir, "regular"),
    "zeros": (lambda path: path.symlink_to("/dev/zero"), "regular"),
    "socket": (make_socket, os.strerror(errno.ENXIO)),
    "loop": (lambda path: path.symlink_to(path.name), os.strerror(errno.ELOOP)),
    "dangling": (lambda path: path.symlink_to("nowhere"), "link"),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_what_is_no_regular_file_is_refused_without_blocking(in_tmp: Path, name: str) -> None:
    make, reason = SPECIAL[name]
    path = in_tmp / "x"
    make(path)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError):  # noqa: PT011
        untrusted.read_bytes(path)
    assert reason in str(untrusted.refusal(path))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_huge_file_is_refused_by_its_size(in_tmp: Path) -> None:
    with Path("x").open("wb") as file:
        file.truncate(10 * 2**30)
    with pytest.raises(OSError, match=r"\b10,737,418,240\b.*\b33,554,432\b"):
        untrusted.read_json(Path("x"))
    assert "10,737,418,240" in str(untrusted.refusal(Path("x")))
    assert untrusted.refusal(Path("absent")) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, r"nested .*\b40\b"),
        ("[" * 42 + "]" * 42, r"nested .*\b40\b"),
        ('{"a": {"b": 1, "b": 2}}', "'b'"),
        ('{"a": ', "Expecting value"),
    ],
)
def test_json_that_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        untrusted.parse_json(text)


def test_json_that_is_read() -> None:
    assert untrusted.parse_json("[" * 41 + "]" * 41)
    assert untrusted.parse_json(f"[{'9' * 5000}, -{'9' * 400}, 12, 1e999]") == [
        float("inf"),
        float("-inf"),
        12,
        float("inf"),
    ]
    numbers = [True, "1", None, float("nan"), float("inf"), 10**80, 1e61, [1], 5, -2.5]
    assert [untrusted.as_number(value) for value in numbers] == [None] * 8 + [5, -2.5]


def test_lines_that_are_damaged_are_left_out(in_tmp: Path) -> None:
    Path("log").write_bytes(b'{"a": 1}\n[1]\n\xff{\n{"a": 2}\n{"a": 3, "a": 4}\n{"a"')
    assert list(untrusted.read_json_lines(Path("log"))) == [{"a": 1}, {"a": 2}]
