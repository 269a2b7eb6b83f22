"""Cache files are verified, bounded and written whole; whatever else lies at their paths counts as absent."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import pytest

from lora_bench.errors import Code
from lora_bench.files import cache
from lora_bench.files.cache import TRAILER_BYTES, CacheFiles, cache_folder, token_limit_bytes
from tests.command_line import lora_bench, refuses, toy_run

if TYPE_CHECKING:
    from collections.abc import Callable

KEY, OTHER, THIRD = "a" * 40, "b" * 40, "c" * 40
PAYLOAD = bytes(range(256)) * 5000  # more than a chunk of the checksum
FILES = CacheFiles("tokens")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of tokens in a cache of its own."""
    monkeypatch.setenv("LORA_BENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/tokens"


def write(key: str = KEY, payload: bytes = PAYLOAD, files: CacheFiles = FILES, keep: tuple[str, ...] = ()) -> bool:
    written = files.write(key, lambda file: file.write(payload), size_bytes=len(payload), keep=keep)
    if written is None:
        return False
    written.close()
    return True


def read(key: str = KEY, max_bytes: int = 1 << 24) -> bytes | None:
    return FILES.read(key, bytes, max_bytes=max_bytes)


def opened(key: str = KEY, size_bytes: int = len(PAYLOAD)) -> bytes | None:
    file = FILES.open(key, size_bytes=size_bytes)
    if file is None:
        return None
    with file:
        return os.pread(file.fileno(), size_bytes, 0)


def change(path: Path, offset: int, by: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= by
    path.write_bytes(content)


def in_its_place(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


def link_to_a_sound_file(path: Path) -> None:
    os.rename(path, path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def make_socket(path: Path) -> None:
    where = os.getcwd()
    os.chdir(path.parent)  # the name of a socket is short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path.name)
    os.chdir(where)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "cut": lambda path: os.truncate(path, 100),
    "cut_by_one": lambda path: os.truncate(path, path.stat().st_size - 1),
    "only_the_trailer": lambda path: path.write_bytes(path.read_bytes()[-TRAILER_BYTES:]),
    "empty": lambda path: os.truncate(path, 0),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "zeros_in_the_middle": lambda path: path.write_bytes(PAYLOAD[:1000] + bytes(40) + path.read_bytes()[1040:]),
    "bit_at_the_start": lambda path: change(path, 0),
    "bit_in_the_second_chunk": lambda path: change(path, -TRAILER_BYTES - 1, 128),
    "bit_in_the_checksum": lambda path: change(path, -TRAILER_BYTES),
    "bit_in_the_mark": lambda path: change(path, -1),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "twice": lambda path: path.write_bytes(path.read_bytes() * 2),
    "text": lambda path: path.write_text("hello\n"),
    "old_version": lambda path: path.write_bytes(PAYLOAD),
    "newer_version": lambda path: path.write_bytes(path.read_bytes().replace(b"format 1", b"format 2")),
    "huge": lambda path: os.truncate(path, 1 << 40),
    "of_another_key": lambda path: (write(OTHER, b"other"), os.replace(FILES.path(OTHER), path)),
    "link": link_to_a_sound_file,
    "dangling_link": in_its_place(lambda path: path.symlink_to("nothing")),
    "link_to_itself": in_its_place(lambda path: path.symlink_to(path.name)),
    "fifo": in_its_place(os.mkfifo),
    "socket": in_its_place(make_socket),
    "device": in_its_place(lambda path: os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))),
}


@pytest.mark.parametrize("get", [read, opened])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_whatever_is_not_a_sound_file_is_absent_named_and_replaced(
    damage: Callable[[Path], Any], get: Callable[[], bytes | None], capfd: pytest.CaptureFixture[str]
) -> None:
    assert write()
    assert get() == PAYLOAD
    assert capfd.readouterr() == ("", "")
    path = FILES.path(KEY)
    try:
        damage(path)
    except PermissionError:
        pytest.skip("only root makes devices")
    assert get() is None
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("note: ")
    assert str(path) in err
    assert write()
    assert get() == PAYLOAD
    assert capfd.readouterr() == ("", "")


def test_a_link_in_its_place_is_replaced_and_its_target_stays(folder: Path) -> None:
    assert write()
    link_to_a_sound_file(FILES.path(KEY))
    target = (folder / "elsewhere").read_bytes()
    assert write(payload=b"new")
    assert (folder / "elsewhere").read_bytes() == target
    assert read() == b"new"


def test_a_file_that_is_not_there_is_absent_without_a_word(capfd: pytest.CaptureFixture[str]) -> None:
    assert read() is None
    assert opened() is None
    assert capfd.readouterr() == ("", "")


def test_a_sound_file_of_another_size_is_not_used(capfd: pytest.CaptureFixture[str]) -> None:
    write()
    assert read(max_bytes=len(PAYLOAD) - 1) is None
    assert opened(size_bytes=len(PAYLOAD) + 1) is None
    assert opened(size_bytes=len(PAYLOAD) - 1) is None
    assert capfd.readouterr().err.count(str(FILES.path(KEY))) == 3


def test_a_payload_that_is_not_accepted_is_absent(capfd: pytest.CaptureFixture[str]) -> None:
    def refuse(payload: bytes) -> None:
        raise ValueError("holds no tokens")

    write()
    assert FILES.read(KEY, refuse, max_bytes=1 << 24) is None
    assert "holds no tokens" in capfd.readouterr().err


@pytest.mark.parametrize("error", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_file_that_cannot_be_read_is_absent(
    error: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(error, os.strerror(error))

    write()
    with monkeypatch.context() as patch:
        patch.setattr(cache.os, "open", refuse)
        assert read() is None
        assert opened() is None
    assert capfd.readouterr().err.count(os.strerror(error)) == 2
    assert read() == PAYLOAD


def test_a_warm_cache_that_cannot_be_written_is_used(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: Any, **keywords: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    write()
    for name in ("utime", "unlink", "replace", "mkdir"):
        monkeypatch.setattr(cache.os, name, refuse)
    monkeypatch.setattr(cache.tempfile, "mkstemp", refuse)
    assert read() == PAYLOAD
    assert opened() == PAYLOAD
    assert capfd.readouterr() == ("", "")
    assert not write(OTHER)
    assert "Read-only file system" in capfd.readouterr().err


@pytest.mark.parametrize("above", ["cache", "cache/tokens"])
@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to(path), os.mkfifo])
def test_a_folder_that_cannot_be_made_is_named_and_done_without(
    above: str, make: Callable[[Path], Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / above).parent.mkdir(exist_ok=True)
    make(tmp_path / above)
    read()
    opened()
    assert not write()
    assert str(FILES.path(KEY)) in capfd.readouterr().err
    assert FILES.complete() == FILES.abandoned() == []


def test_a_folder_in_its_place_stays_and_is_done_without(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    FILES.path(KEY).mkdir(parents=True)
    assert read() is None
    assert not write()
    assert [path.name for path in folder.iterdir()] == [FILES.path(KEY).name]
    assert capfd.readouterr().err.count(str(FILES.path(KEY))) == 2


@pytest.mark.parametrize("failing", ["fill", "fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_what_cannot_be_written_whole_leaves_nothing_new(
    failing: str,
    error: BaseException,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def stop(*arguments: Any) -> None:
        raise error

    def fill(file: BinaryIO) -> None:
        file.write(b"new")
        if failing == "fill":
            stop()

    write(payload=b"old")
    if failing != "fill":
        monkeypatch.setattr(cache.os, failing, stop)
    if isinstance(error, OSError):
        assert FILES.write(KEY, fill, size_bytes=3) is None
        assert "No space left on device" in capfd.readouterr().err
    else:
        with pytest.raises(KeyboardInterrupt):
            FILES.write(KEY, fill, size_bytes=3)
    assert [path.name for path in folder.iterdir()] == [FILES.path(KEY).name]
    assert read() == b"old"


def test_the_least_recently_used_make_room(folder: Path) -> None:
    size = 100 + TRAILER_BYTES
    files = CacheFiles("tokens", 3 * size)
    for i, key in enumerate((KEY, OTHER, THIRD)):
        write(key, bytes(100), files)
        os.utime(files.path(key), (i, i))
    (folder / "notes.txt").write_text("not a cache file" * 100)
    assert read(KEY) == bytes(100)  # used now
    write("d" * 40, bytes(100), files)
    assert {entry.path for entry in files.complete()} == {files.path(key) for key in (KEY, THIRD, "d" * 40)}
    os.utime(files.path(KEY), (0, 0))
    write("e" * 40, bytes(200), files, keep=(KEY,))
    assert {entry.path for entry in files.complete()} == {files.path(key) for key in (KEY, "e" * 40)}
    assert (folder / "notes.txt").exists()


def test_parts_of_killed_processes_are_removed_and_others_stay(folder: Path) -> None:
    folder.mkdir(parents=True)
    killed = "\n".join(
        [
            "import os, signal",
            "from lora_bench.files.cache import CacheFiles",
            "kill = lambda file: os.kill(os.getpid(), signal.SIGKILL)",
            f"CacheFiles('tokens').write('{KEY}', kill, size_bytes=3)",
        ]
    )
    assert subprocess.run([sys.executable, "-c", killed], timeout=60).returncode == -9
    (temporary,) = folder.glob(f"{KEY}*.part")
    of_older_versions = [folder / "tmpab12_x9z", folder / "tmpab12_x9z.part"]
    for path in (*of_older_versions, folder / "draft.part", folder / "tmp"):
        path.touch()
    (folder / f"{OTHER}.arrow.x.part").symlink_to(folder / "draft.part")
    assert FILES.abandoned() == []  # empty ones may not be locked yet
    for path in (temporary, *of_older_versions):
        os.utime(path, (1, 1))
    assert {entry.path for entry in FILES.abandoned()} == {temporary, *of_older_versions}

    def fill(file: BinaryIO) -> None:
        """Another process writes meanwhile."""
        assert not temporary.exists()
        assert FILES.abandoned() == []
        assert write(OTHER, b"other")
        file.write(b"fine")

    written = FILES.write(KEY, fill, size_bytes=4)
    assert written is not None
    written.close()
    assert (read(KEY), read(OTHER)) == (b"fine", b"other")
    names = {f"{KEY}.arrow", f"{OTHER}.arrow", f"{OTHER}.arrow.x.part", "draft.part", "tmp"}
    assert {path.name for path in folder.iterdir()} == names


def test_a_file_that_is_open_is_read_on_after_its_removal() -> None:
    write()
    file = FILES.open(KEY, size_bytes=len(PAYLOAD))
    assert file is not None
    with file:
        (entry,) = FILES.complete()
        assert cache.remove(entry)
        assert os.pread(file.fileno(), len(PAYLOAD), 0) == PAYLOAD


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_BENCH_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("LORA_BENCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "lora-bench"
    monkeypatch.delenv("XDG_CACHE_HOME")

    def homeless() -> None:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(cache.Path, "home", homeless)
    with refuses(Code.MISSING, key="LORA_BENCH_CACHE"):
        cache_folder()


def test_the_limit_of_tokens_is_a_number_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(cache.TOKEN_LIMIT, raising=False)
    assert token_limit_bytes() == 4e9
    for text, limit in (("", 4e9), ("0", 0), ("1e6", 1e6), ("2500", 2500)):
        monkeypatch.setenv(cache.TOKEN_LIMIT, text)
        assert token_limit_bytes() == limit
    for text in ("-1", "nan", "inf", "4 GB", "1e400", "9" * 400):
        monkeypatch.setenv(cache.TOKEN_LIMIT, text)
        with refuses(Code.INVALID_VALUE, key=cache.TOKEN_LIMIT) as caught:
            token_limit_bytes()
        assert caught.value.value == text
    with suppress(KeyError):
        del os.environ[cache.TOKEN_LIMIT]


def test_a_run_on_damaged_caches_is_the_run_on_sound_ones(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_BENCH_CACHE", "cache")
    request = toy_run("trainer.max_steps=3", "adapter.layers=top:1", "trainer.epochs=5")

    def metrics(folder: str, *, cached: bool = True) -> tuple[dict[str, float], str]:
        answer = lora_bench("train", *request, f"hydra.run.dir={folder}")
        assert answer.code == 0, answer
        record = json.loads(Path(folder, "run.json").read_text())
        assert bool(record["cost"]["prefix_fill_flops"]) is cached
        return record["metrics"], answer.err

    cold, silent = metrics("cold")
    sound = {path: path.read_bytes() for path in Path("cache").rglob("*.*")}
    assert (silent, len(sound)) == ("", 5)  # tokens of train, selection and validation; the prefix of the first two
    for number, path in enumerate(sound):
        if number % 2:
            os.truncate(path, 100)
        else:
            change(path, path.stat().st_size // 2, 4)
    damaged, notes = metrics("damaged")
    assert damaged == cold
    assert all(notes.count(str(path)) == 1 for path in sound)
    assert {path: path.read_bytes() for path in Path("cache").rglob("*.*")} == sound
    assert metrics("warm") == (cold, "")
    for path in Path("cache").iterdir():
        shutil.rmtree(path)
        path.touch()
    without, notes = metrics("without", cached=False)
    assert without == pytest.approx(cold, abs=1e-4)
    assert notes.count("cannot be written") == 4  # after the first prefix the second is not tried
