"""Outputs are refused before the work where they cannot be written, and are whole or not there afterwards."""

from __future__ import annotations

import errno
import os
import resource
import threading
from pathlib import Path

import pytest

from lora_bench.errors import Code, UserError
from lora_bench.files import paths
from lora_bench.files.paths import check_folder, check_output, is_same_file, is_stream, write_output
from tests.command_line import refuses


def test_a_file_is_written_in_place_of_an_older_one_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "a.tsv"
    file.write_bytes(b"old")
    file.chmod(0o640)
    check_output(file, "output", 10)
    assert file.read_bytes() == b"old"
    write_output(file, b"new", "output")
    assert (file.read_bytes(), file.stat().st_mode & 0o777) == (b"new", 0o640)
    assert list(tmp_path.iterdir()) == [file]


def test_through_a_link_its_target_is_written(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "link.tsv").symlink_to(Path("far", "a.tsv"))
    for content in (b"first", b"second"):
        check_output(tmp_path / "link.tsv", "output")
        write_output(tmp_path / "link.tsv", content, "output")
        assert (tmp_path / "link.tsv").is_symlink()
        assert (tmp_path / "far" / "a.tsv").read_bytes() == content


@pytest.mark.parametrize("name", ["missing/a.tsv", "folder", "file/a.tsv", "circle", "x" * 300, "a\0", "dangling"])
def test_places_that_cannot_be_written_are_refused_before_and_at_writing(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "dangling").symlink_to(Path("missing", "a.tsv"))
    before = sorted(tmp_path.rglob("*"))
    for write in (lambda path: check_output(path, "output"), lambda path: write_output(path, b"x", "output")):
        with refuses(Code.UNWRITABLE, key="output") as caught:
            write(tmp_path / name)
        assert caught.value.value == tmp_path / name
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_what_is_protected_from_writing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes(b"old")
    (tmp_path / "a.tsv").chmod(0o444)
    for check, name in ((check_output, "a.tsv"), (check_output, "b"), (check_folder, "b")):
        tmp_path.chmod(0o755 if name == "a.tsv" else 0o555)
        with pytest.raises(UserError, match=os.strerror(errno.EACCES)) as caught:
            check(tmp_path / name, "output")
        assert (caught.value.code, caught.value.key) == (Code.UNWRITABLE, "output")
        assert caught.value.value == tmp_path / name
    tmp_path.chmod(0o755)


def test_too_little_room_is_noticed_before_and_at_writing(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    (tmp_path / "a.tsv").write_bytes(b"old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        check_output(tmp_path / "a.tsv", "output", 900)
        with pytest.raises(UserError) as checked:
            check_output(tmp_path / "a.tsv", "output", 1100)
        with pytest.raises(UserError) as written:
            write_output(tmp_path / "a.tsv", bytes(1100), "output")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    for error in (checked.value, written.value):
        assert (error.code, error.key) == (Code.UNWRITABLE, "output")
        assert os.strerror(errno.EFBIG) in error.reason
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.tsv", b"old")]


def test_an_interruption_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    (tmp_path / "a.tsv").write_bytes(b"old")
    monkeypatch.setattr(paths.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_output(tmp_path / "a.tsv", b"new", "output")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.tsv", b"old")]


def test_streams_are_written_as_they_are(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    contents: list[bytes] = []
    reader = threading.Thread(target=lambda: contents.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    check_output(tmp_path / "pipe", "output")
    write_output(tmp_path / "pipe", b"x", "output")
    reader.join()
    assert contents == [b"x"]
    (tmp_path / "null.tsv").symlink_to(os.devnull)
    write_output(tmp_path / "null.tsv", b"x", "output")
    assert Path(os.devnull).is_char_device()
    with refuses(Code.UNWRITABLE, key="output") as caught:
        write_output("/dev/full", b"x", "output")
    assert os.strerror(errno.ENOSPC) in caught.value.reason


def test_an_open_file_is_written_where_it_stands(tmp_path: Path) -> None:
    with (tmp_path / "log").open("ab") as file:
        file.write(b"before,")
        file.flush()
        write_output(f"/dev/fd/{file.fileno()}", b"after", "output")
    assert (tmp_path / "log").read_bytes() == b"before,after"


def test_folders_are_checked_and_made_only_where_asked(tmp_path: Path) -> None:
    file = tmp_path / "new" / "deep" / "a.html"
    check_output(file, "--html", make_folders=True)
    check_folder(file.parent, "output")
    assert list(tmp_path.iterdir()) == []
    write_output(file, b"x", "--html", make_folders=True)
    assert file.read_bytes() == b"x"
    with refuses(Code.UNWRITABLE, key="output") as caught:
        check_folder(file / "below", "output")
    assert caught.value.value == file / "below"


def test_one_file_under_several_names_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.tsv").write_bytes(b"x")
    Path("b.tsv").write_bytes(b"x")
    Path("link.tsv").symlink_to("a.tsv")
    Path("hard.tsv").hardlink_to("a.tsv")
    for other in ("a.tsv", "./a.tsv", str(tmp_path / "a.tsv"), f"../{tmp_path.name}/a.tsv", "link.tsv", "hard.tsv"):
        assert is_same_file("a.tsv", other), other
        assert is_same_file(other, "a.tsv"), other
    for other in ("b.tsv", "absent.tsv", "a\0", "/dev/null"):
        assert not is_same_file("a.tsv", other), other
    assert not is_same_file("/dev/null", "/dev/null")


def test_what_a_stream_is(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"x")
    for path in ("-", "/dev/stdin", "/dev/stdout", "/dev/fd/63", "/proc/self/fd/1", "/dev/null", tmp_path / "pipe"):
        assert is_stream(path), path
    for path in (tmp_path / "file", tmp_path, "absent", "/dev", "a\0"):
        assert not is_stream(path), path
