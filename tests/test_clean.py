"""`lora-bench clean` removes cache files, and nothing else."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from lora_bench.errors import Code
from lora_bench.files import cache
from lora_bench.files.cache import CacheFiles
from lora_bench.records import folder_lock
from tests.command_line import files_below, lora_bench, refused
from tests.stored_runs import make_run

TOKENS, PREFIX = CacheFiles("tokens"), CacheFiles("prefix")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with two token files, a prefix file, what a killed process left, answers, and files of others."""
    monkeypatch.setenv("LORA_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for files, key, size in ((TOKENS, "a" * 40, 2000), (TOKENS, "b" * 40, 2000), (PREFIX, "c" * 40, 5_000_000)):
        written = files.write(key, lambda file, size=size: file.write(bytes(size)), size_bytes=size)  # type: ignore[misc]
        assert written is not None
        written.close()
    (tmp_path / f"cache/prefix/{'d' * 40}.hidden.x1.part").write_bytes(bytes(1_000_000))
    (tmp_path / "cache/prompt").mkdir()
    (tmp_path / "cache/prompt/answers.sqlite").write_bytes(bytes(700))
    (tmp_path / "mine.arrow").write_text("mine")
    (tmp_path / "cache/mine.arrow").write_text("mine")
    (tmp_path / "cache/tokens/mine.arrow").write_text("mine")
    (tmp_path / f"cache/tokens/{'e' * 40}.arrow").symlink_to(tmp_path / "mine.arrow")
    (tmp_path / f"cache/tokens/{'f' * 40}.arrow").mkdir()
    return tmp_path / "cache"


def listed(text: str) -> dict[str, tuple[int, str, str]]:
    """Number of files, size and outcome by kind."""
    rows = re.findall(r"^ (\w+) +(\d+) +(\d\S* \w*B) +(\S.*?) *$", text, re.MULTILINE)
    return {cache: (int(count), size, outcome) for cache, count, size, outcome in rows}


def test_a_dry_run_lists_sizes_and_removes_nothing(folder: Path) -> None:
    before = files_below(folder)
    answer = lora_bench("clean", "--dry-run")
    assert (answer.code, answer.err) == (0, "")
    assert str(folder) in answer.out
    assert listed(answer.out) == {
        "tokens": (2, "4.1 kB", "would be removed"),
        "prefix": (2, "6.0 MB", "would be removed"),
        "prompt": (1, "700 B", "kept: answers cost money"),
        "checkpoints": (0, "0 B", "none"),
    }
    assert files_below(folder) == before


def test_cache_files_are_removed_and_nothing_else(folder: Path) -> None:
    before = set(files_below(folder))
    answer = lora_bench("clean")
    assert (answer.code, answer.err) == (0, "")
    gone = {path.rsplit("/", 1)[1] for path in before - set(files_below(folder))}
    assert gone == {f"{'a' * 40}.arrow", f"{'b' * 40}.arrow", f"{'c' * 40}.hidden", f"{'d' * 40}.hidden.x1.part"}
    assert (folder.parent / "mine.arrow").read_text() == "mine"
    again = lora_bench("clean")
    assert (again.code, listed(again.out)["tokens"]) == (0, (0, "0 B", "empty"))


def test_one_kind_is_removed_alone(folder: Path) -> None:
    answer = lora_bench("clean", "prefix")
    assert answer.code == 0
    assert listed(answer.out)["tokens"] == (2, "4.1 kB", "kept")
    assert (len(TOKENS.complete()), len(PREFIX.complete())) == (2, 0)


def test_a_link_to_a_folder_is_not_followed(folder: Path) -> None:
    os.rename(folder / "prefix", folder.parent / "elsewhere")
    (folder / "prefix").symlink_to(folder.parent / "elsewhere")
    before = files_below(folder.parent / "elsewhere")
    answer = lora_bench("clean", "prefix")
    assert (answer.code, listed(answer.out)["prefix"][2]) == (0, "a link: not followed")
    assert files_below(folder.parent / "elsewhere") == before


def test_what_is_being_written_stays(folder: Path) -> None:
    def fill(file: object) -> None:
        assert lora_bench("clean").code == 0

    written = TOKENS.write("a" * 40, fill, size_bytes=0)
    assert written is not None
    written.close()
    assert len(TOKENS.complete()) == 1


def test_files_that_cannot_be_removed_fail_the_command(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    def refuse(*arguments: object, **keywords: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cache.Path, "unlink", refuse)
    answer = lora_bench("clean", "tokens")
    assert (answer.code, listed(answer.out)["tokens"][2]) == (1, "2 cannot be removed")
    assert str(folder) in answer.err


def test_wrong_requests_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for argument in ("checkpoint", "--force", "tokens=1", "-n", ""):
        error = refused("clean", argument)
        assert (error.code, error.key) == (Code.UNKNOWN_CHOICE, "clean")
        assert repr(argument) in error.reason
        assert "--dry-run" in str(error.remedy)
    file = tmp_path / "mine.arrow"
    monkeypatch.setenv("LORA_BENCH_CACHE", str(file))
    error = refused("clean")
    assert (error.code, error.key, error.value) == (Code.NOT_A_FILE, "LORA_BENCH_CACHE", file)


def test_without_a_cache_there_is_nothing_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_BENCH_CACHE", str(tmp_path / "none"))
    answer = lora_bench("clean")
    assert (answer.code, set(listed(answer.out))) == (0, {"tokens", "prefix", "prompt", "checkpoints"})
    assert not (tmp_path / "none").exists()


def test_checkpoints_are_removed_by_name_but_not_those_of_a_running_run(folder: Path) -> None:
    runs = [make_run(Path(f"outputs/{name}"), "running") for name in ("killed", "training")]
    for run in runs:
        (run / "checkpoints/step-00000001").mkdir(parents=True)
        (run / "checkpoints/step-00000001/state").write_bytes(bytes(3000))
    claim = folder_lock.acquire(runs[1])
    assert claim is not None
    assert listed(lora_bench("clean").out)["checkpoints"] == (2, "6.0 kB", "kept: unfinished runs resume from them")
    assert listed(lora_bench("clean", "checkpoints", "--dry-run").out)["checkpoints"][2] == "would be removed"
    answer = lora_bench("clean", "checkpoints")
    claim.release()
    assert answer.code == 0
    assert [(run / "checkpoints").exists() for run in runs] == [False, True]
