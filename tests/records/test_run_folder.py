"""The run folder: one owner, whole files, and honest reading of what others left."""

from __future__ import annotations

import json
import math
import os
import string
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from pathlib import Path
from threading import Barrier
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from lora_bench.console.redaction import redact
from lora_bench.errors import Code, RunFailedError, UserError, shell_argument
from lora_bench.files import atomic_io
from lora_bench.records import folder_lock, run_folder
from lora_bench.records.run_folder import Run, discard, find_runs, is_killed, read
from tests.command_line import refuses

if TYPE_CHECKING:
    from collections.abc import Callable

CHOICES = {"model": "tiny_bert", "adapter": "lora", "data": "toy"}


def take(folder: Path, **config: Any) -> Run:
    return Run.claim(folder, choices=CHOICES, config=config or {"seed": 0}, overrides=["seed=0"])


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return take(tmp_path / "a" / "run")


# -- claiming --


def test_a_claim_leaves_a_running_record_and_the_config(run: Run) -> None:
    assert files(run.folder) == {"run.json", ".lock", ".hydra/config.yaml", ".hydra/overrides.yaml"}
    record = read(run.folder)
    assert record == run.record
    assert list(record) == list(run_folder.LAYOUT)
    assert (record["schema"], record["status"], record["choices"], record["error"]) == (1, "running", CHOICES, None)
    assert record["created"].endswith("+00:00")
    assert record["finished"] is None
    assert yaml.safe_load((run.folder / ".hydra/config.yaml").read_text()) == {"seed": 0}
    assert yaml.safe_load((run.folder / ".hydra/overrides.yaml").read_text()) == ["seed=0"]


def test_a_folder_inside_a_run_is_refused_but_for_its_tasks(run: Run) -> None:
    before = files(run.folder)
    with refuses(Code.EXISTS, key="hydra.run.dir"):
        take(run.folder / "tasks" / "a")
    assert files(run.folder) == before
    Run.claim(run.folder / "tasks" / "a", choices={}, config={}, overrides=[], is_task=True).release()
    assert files(run.folder) > before


def test_a_folder_that_holds_runs_is_refused(run: Run) -> None:
    above = run.folder.parent
    before = files(above)
    with refuses(Code.EXISTS, key="hydra.run.dir") as caught:
        take(above)
    assert caught.value.value == above
    assert files(above) == before


def test_a_taken_folder_is_refused_and_untouched(run: Run) -> None:
    before = {name: (run.folder / name).read_bytes() for name in files(run.folder)}
    with refuses(Code.EXISTS, key="hydra.run.dir") as caught:
        take(run.folder, seed=7)
    assert caught.value.value == run.folder
    assert {name: (run.folder / name).read_bytes() for name in files(run.folder)} == before


def test_of_many_threads_one_gets_the_folder(tmp_path: Path) -> None:
    barrier = Barrier(8)

    def attempt(seed: int) -> int | None:
        barrier.wait()
        try:
            take(tmp_path / "run", seed=seed)
        except UserError:
            return None
        return seed

    with ThreadPoolExecutor(8) as pool:
        winners = [seed for seed in pool.map(attempt, range(8)) if seed is not None]
    assert len(winners) == 1
    assert read(tmp_path / "run")["config"] == {"seed": winners[0]}
    assert yaml.safe_load((tmp_path / "run/.hydra/config.yaml").read_text()) == {"seed": winners[0]}


def test_of_many_processes_one_gets_the_folder(tmp_path: Path) -> None:
    program = """
import sys, time
from pathlib import Path
from lora_bench.errors import RunFailedError, UserError
from lora_bench.records.run_folder import Run
while not Path(sys.argv[2]).exists():
    time.sleep(0.001)
try:
    Run.claim(Path(sys.argv[1]), choices={}, config={"pid": sys.argv[3]}, overrides=[])
except UserError:
    raise SystemExit(2)
"""
    start = tmp_path / "start"
    command = [sys.executable, "-c", program, str(tmp_path / "run"), str(start)]
    started = [subprocess.Popen([*command, str(i)], cwd=Path(__file__).parents[2]) for i in range(4)]
    start.touch()
    codes = [process.wait(60) for process in started]
    assert sorted(codes) == [0, 2, 2, 2]
    assert read(tmp_path / "run")["config"] == {"pid": str(codes.index(0))}


@pytest.mark.parametrize("folder", ["file", "file/below", "a" * 300, "nul\0"])
def test_an_impossible_folder_is_a_wrong_request(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_text("mine")
    with refuses(Code.UNWRITABLE, key="hydra.run.dir") as caught:
        take(tmp_path / folder)
    assert caught.value.value == tmp_path / folder
    assert files(tmp_path) == {"file"}
    assert (tmp_path / "file").read_text() == "mine"


def test_a_claim_that_cannot_be_completed_gives_the_folder_back(tmp_path: Path, full_disk: Callable[[], None]) -> None:
    full_disk()
    with refuses(Code.UNWRITABLE, key="hydra.run.dir") as caught:
        take(tmp_path / "run")
    assert caught.value.value == tmp_path / "run"
    assert "No space left" in str(caught.value)
    assert files(tmp_path) == set()


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    return lambda: monkeypatch.setattr(atomic_io.os, "fsync", fail)


# -- writing --


def test_update_merges_one_level_deep(run: Run) -> None:
    run.update(metrics={"validation/mcc": 0.5}, data={"rows": {"train": 8}})
    run.update(metrics={"validation/f1": 0.6}, data={"rows": {"validation": 4}}, error="x")
    record = read(run.folder)
    assert record["metrics"] == {"validation/mcc": 0.5, "validation/f1": 0.6}
    assert record["data"] == {"rows": {"validation": 4}}
    assert record["error"] == "x"
    with pytest.raises(TypeError, match="metric"):
        run.update(metric={})


class Colour(Enum):
    RED = "red"


def test_values_of_other_types_are_written_plainly(run: Run) -> None:
    run.update(
        metrics={"nan": math.nan, "inf": -math.inf, "f": np.float32(0.5), "np_nan": np.float64("nan")},
        config={"n": np.int64(3), "b": np.bool_(True), "t": (1, 2), "s": {2, 1}, "p": Path("x"), "e": Colour.RED, 4: 5},
    )
    assert read(run.folder)["metrics"] == {"nan": None, "inf": None, "f": 0.5, "np_nan": None}
    config = {"seed": 0, "n": 3, "b": True, "t": [1, 2], "s": [1, 2], "p": "x", "e": "red", "4": 5}
    assert read(run.folder)["config"] == config
    with pytest.raises(TypeError, match="object"):
        run.update(config={"x": object()})


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
TYPED = ("model", "adapter", "data", "optimizer", "trainer", "tasks")
"""Keys of a config whose values have a type in a finished record (`record_types.py`)."""
ANY_TEXT = st.text(st.characters(categories=None))  # lone surrogates too: a command line may hold any byte


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(config=st.dictionaries(st.text().filter(lambda key: key not in TYPED), PLAIN, max_size=4), override=ANY_TEXT)
def test_whatever_the_config_it_reads_back(
    tmp_path_factory: pytest.TempPathFactory, config: dict[str, Any], override: str
) -> None:
    assume((atomic_io.to_json(config), redact(override)) == (config, override))  # no secret, such as {"password": 0}
    run = Run.claim(tmp_path_factory.mktemp("x"), choices={}, config=config, overrides=[override])
    run.finish("done", error=override)
    record = read(run.folder)
    assert (record["config"], record["overrides"], record["error"]) == (config, [override], override)
    assert set(yaml.safe_load((run.folder / ".hydra/config.yaml").read_text())) == set(config)


def test_a_failing_write_leaves_the_older_record_whole(run: Run, full_disk: Callable[[], None]) -> None:
    run.update(metrics={"validation/mcc": 0.5})
    before, present = (run.folder / "run.json").read_bytes(), files(run.folder)
    full_disk()
    for file, write in (
        ("run.json", lambda: run.update(metrics={"validation/mcc": 0.9})),
        ("predictions/validation.parquet", lambda: run.write_predictions("validation", [1], [0], [0.5])),
    ):
        with refuses(Code.UNWRITABLE) as caught:
            write()
        assert isinstance(caught.value, RunFailedError)
        assert caught.value.file == run.folder / file
        assert "No space left" in str(caught.value)
    assert (run.folder / "run.json").read_bytes() == before
    assert files(run.folder) == present
    assert run.record == json.loads(before)


def test_the_log_has_a_line_for_each_evaluation(run: Run) -> None:
    run.log({"step": 1, "loss": math.nan})
    run.log({"step": 2, "split": "sélection"})
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": None}, {"step": 2, "split": "sélection"}]


def test_a_deleted_folder_is_not_brought_back(run: Run) -> None:
    for path in sorted(run.folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    run.folder.rmdir()
    for write in (lambda: run.finish("done"), lambda: run.log({}), lambda: run.write_predictions("test", [], [], [])):
        with refuses(Code.LOST) as caught:
            write()
        assert isinstance(caught.value, RunFailedError)
        assert caught.value.file == run.folder
    assert not run.folder.exists()


def test_finish_states_the_end(run: Run) -> None:
    run.finish("failed", "out of\nmemory")
    record = read(run.folder)
    assert (record["status"], record["error"]) == ("failed", "out of\nmemory")
    assert record["finished"] >= record["created"]
    for status in ("running", "finished"):
        with pytest.raises(ValueError, match="cannot end as"):
            run.finish(status)


def test_a_finished_run_has_given_up_its_claim(run: Run) -> None:
    assert folder_lock.is_locked(run.folder)
    assert not is_killed(run.folder, run.record)
    run.finish("done")
    assert not folder_lock.is_locked(run.folder)


def test_a_run_is_reopened_by_one_at_a_time_and_rewound(run: Run) -> None:
    for step in (5, 10, 15):
        run.log({"step": step, "split": "selection"})
    with refuses(Code.IN_USE) as in_use:
        Run.reopen(run.folder)
    assert in_use.value.file == run.folder
    run.release()  # as the end of the process would
    assert is_killed(run.folder, run.record)
    with refuses(Code.EXISTS, key="hydra.run.dir") as caught:
        take(run.folder)
    assert shell_argument("resume", run.folder) in str(caught.value)
    again = Run.reopen(run.folder)
    again.rewind(10)
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [5, 10]
    assert not is_killed(run.folder, again.record)


def test_an_empty_record_is_taken_over(tmp_path: Path) -> None:
    """A process was killed between making the file and writing it."""
    (tmp_path / "run.json").touch()
    assert read(take(tmp_path).folder)["status"] == "running"


def test_predictions_have_fixed_types_and_unknown_labels(run: Run) -> None:
    run.write_predictions("validation", np.array([3, 1], np.int32), [1, None], np.array([0.25, 0.75], np.float32))
    run.write_predictions("test", [0], None, [1])
    table = pq.read_table(run.folder / "predictions/validation.parquet")
    assert [(field.name, str(field.type)) for field in table.schema] == [
        ("id", "int64"),
        ("label", "int64"),
        ("score", "double"),
    ]
    assert table.to_pydict() == {"id": [3, 1], "label": [1, None], "score": [0.25, 0.75]}
    assert pq.read_table(run.folder / "predictions/test.parquet").to_pydict() == {
        "id": [0],
        "label": [None],
        "score": [1.0],
    }
    with pytest.raises(ValueError, match="length"):
        run.write_predictions("test", [0, 1], [0], [1.0])


def test_an_evaluation_replaces_the_one_of_its_name(run: Run) -> None:
    columns = ([1], [0], [0.5])
    run.write_evaluation("paws qqp", {"metrics": {"test/mcc": math.nan}}, {"test": columns, "validation": columns})
    path = run.write_evaluation("paws qqp", {"metrics": {"test/mcc": 0.1}}, {"test": columns})
    assert path == run.folder / "evaluations/paws-qqp.json"
    assert json.loads(path.read_text()) == {"metrics": {"test/mcc": 0.1}}
    assert files(run.folder / "evaluations") == {"paws-qqp.json", "paws-qqp/test.parquet"}


@pytest.mark.parametrize("name", ["", "..", ".", "../../x", "a/b", "a\\b", " ", ".hidden", "é", "x" * 300, "\0"])
def test_a_name_that_is_a_path_is_refused(run: Run, name: str) -> None:
    for write in (lambda: run.write_evaluation(name, {}), lambda: run.write_predictions(name, [], [], [])):
        with refuses(Code.INVALID_VALUE, key="name") as caught:
            write()
        assert caught.value.value == name
    assert files(run.folder) == {"run.json", ".lock", ".hydra/config.yaml", ".hydra/overrides.yaml"}


@given(st.text() | st.text(string.punctuation + "ab. "))
def test_a_file_name_is_plain_or_refused(name: str) -> None:
    try:
        file_name = run_folder.file_name(name)
    except UserError as error:
        assert (error.code, error.key, error.value) == (Code.INVALID_VALUE, "name", name)  # noqa: PT017
        return
    assert set(file_name) <= set(string.ascii_letters + string.digits + "._-")
    assert file_name
    assert not file_name.startswith(".")
    assert ".." not in file_name


# -- discarding --


def test_discard_removes_empty_folders_inside_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    current = tmp_path / "here"
    (current / "outputs/day/run").mkdir(parents=True)
    monkeypatch.chdir(current)
    discard(Path("outputs/day/run"))
    assert current.is_dir()
    assert not any(current.iterdir())
    discard(current)
    discard(Path("."))
    assert current.is_dir()


def test_discard_keeps_what_is_not_empty_and_what_lies_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "away/run").mkdir(parents=True)
    (tmp_path / "here/outputs/old").mkdir(parents=True)
    (tmp_path / "here/outputs/new").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    discard(tmp_path / "away/run")
    assert (tmp_path / "away").is_dir()
    assert not (tmp_path / "away/run").exists()
    discard(Path("outputs/new"))
    assert sorted(os.listdir("outputs")) == ["old"]
    (tmp_path / "here/outputs/old/file").touch()
    for folder in ("outputs/old", "outputs/none", "outputs/old/file", "nul\0", ".."):
        discard(Path(folder))
    assert (tmp_path / "here/outputs/old/file").exists()


# -- reading and finding --


@pytest.mark.parametrize(
    ("text", "datum"),
    [
        ("", ""),
        ('{"schema": 1, "sta', ""),
        ("[" * 100_000, ""),
        ("[]", ""),
        ("{}", "schema"),
        ('{"schema": 2}', "schema 2"),
        ('{"schema": 1, "status": "dono"}', "status"),
        ('{"schema": 1, "status": "done", "metrics": []}', "metrics"),
        ('{"schema": 1, "status": "done", "error": 3}', "error"),
        ('{"schema": 1, "status": "done", "overrides": {}}', "overrides"),
    ],
)
def test_an_unreadable_record_is_named_and_skipped(tmp_path: Path, text: str, datum: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with refuses(Code.DAMAGED) as caught:
        read(tmp_path)
    assert caught.value.file == tmp_path / "run.json"
    assert datum in caught.value.reason
    ((folder, why),) = find_runs([tmp_path])[1]
    assert folder == tmp_path
    assert caught.value.reason in why


def test_bytes_and_folders_in_place_of_a_record(tmp_path: Path) -> None:
    (tmp_path / "bytes").mkdir()
    (tmp_path / "bytes/run.json").write_bytes(b"\xff\xfe")
    (tmp_path / "folder/run.json").mkdir(parents=True)
    for name, code in (("bytes", Code.DAMAGED), ("none", Code.NOT_FOUND), ("folder", Code.UNREADABLE)):
        with refuses(code) as caught:
            read(tmp_path / name)
        assert caught.value.file == tmp_path / name / "run.json"


def test_reading_fills_absent_keys_and_drops_what_is_not_finite(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(
        '{"schema": 1, "status": "done", "cost": null, "metrics": {"a": NaN, "b": 1e999}}'
    )
    record = read(tmp_path)
    assert set(record) == set(run_folder.LAYOUT)
    assert (record["metrics"], record["cost"], record["overrides"]) == ({"a": None, "b": None}, {}, [])


def test_find_sorts_naturally_and_stays_out_of_run_folders(tmp_path: Path) -> None:
    for name in ("10", "2", "1", "x/3"):
        take(tmp_path / "sweep" / name)
    inner = tmp_path / "sweep/2/tasks/inner"
    Run.claim(inner, choices=CHOICES, config={}, overrides=[], is_task=True)
    (tmp_path / "sweep/9").mkdir()
    (tmp_path / "sweep/9/run.json").write_text("{")
    (tmp_path / "sweep/loop").symlink_to(tmp_path)
    runs, skipped = find_runs([tmp_path / "sweep/10", tmp_path, tmp_path / "sweep"])
    assert [str(folder.relative_to(tmp_path)) for folder, _ in runs] == [
        "sweep/1",
        "sweep/2",
        "sweep/10",
        "sweep/x/3",
    ]
    assert [folder for folder, _ in skipped] == [tmp_path / "sweep/9"]


def test_find_names_paths_that_are_no_folders(tmp_path: Path) -> None:
    (tmp_path / "table.md").touch()
    runs, ((skipped, reason),) = find_runs([tmp_path / "table.md"])
    assert (runs, skipped) == ([], tmp_path / "table.md")
    assert "Not a directory" in reason
    with refuses(Code.NOT_FOUND) as caught:
        find_runs([tmp_path, tmp_path / "outptus"])
    assert caught.value.file == tmp_path / "outptus"


def test_reading_a_run_needs_no_torch() -> None:
    heavy = {"torch", "pyarrow", "numpy", "pandas"}
    program = f"import sys, lora_bench.records.run_folder; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("section", "datum"),
    [
        ({"choices": {"model": ["bert"]}}, "choices.model"),
        ({"overrides": [1]}, "overrides"),
        ({"targets": {"a": "high"}}, "targets.a"),
        ({"config": {"trainer": [1]}}, "config.trainer"),
        ({"config": {"tasks": {"../../x": {}}}}, "config.tasks"),
        ({"config": {"a": json.loads("[" * 40 + "]" * 40)}}, "40"),
    ],
)
def test_a_record_with_other_types_than_its_readers_rely_on(
    tmp_path: Path, section: dict[str, Any], datum: str
) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"schema": 1, "status": "done"} | section))
    with refuses(Code.DAMAGED) as caught:
        read(tmp_path)
    assert caught.value.file == tmp_path / "run.json"
    assert datum in caught.value.reason


def test_measurements_that_are_no_numbers_are_absent(tmp_path: Path) -> None:
    measured = {"a": "high", "b": True, "c": [1], "d": 10**400, "e": 1e300, "f": 0.5}
    sections = {"metrics": measured, "cost": measured, "params": measured, "targets": {"a": 4, "b": [2, 4]}}
    (tmp_path / "run.json").write_text(json.dumps({"schema": 1, "status": "done"} | sections))
    record = read(tmp_path)
    assert record["metrics"] == record["cost"] == record["params"] == dict.fromkeys("abcde") | {"f": 0.5}
    assert record["targets"] == sections["targets"]


def test_find_skips_what_is_no_file_or_folder_with_the_reason(tmp_path: Path) -> None:
    take(tmp_path / "whole")
    for name in ("fifo", "loop", "folder", "huge"):
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / "fifo/run.json")
    (tmp_path / "loop/run.json").symlink_to("run.json")
    (tmp_path / "folder/run.json").mkdir()
    with (tmp_path / "huge/run.json").open("wb") as file:
        file.truncate(10 * 2**30)
    (tmp_path / "self").symlink_to("self")
    runs, skipped = find_runs([tmp_path, tmp_path / "self"])
    assert [folder.name for folder, _ in runs] == ["whole"]
    reasons = {folder.name: reason for folder, reason in skipped}
    assert set(reasons) == {"fifo", "loop", "folder", "huge", "self"}
    assert reasons["fifo"] == reasons["folder"] != reasons["huge"]
    assert "symbolic links" in reasons["loop"]
    assert "symbolic links" in reasons["self"]
    assert "10,737,418,240 bytes" in reasons["huge"]


def test_a_log_that_cannot_be_read_is_not_rewound(run: Run) -> None:
    for line in ({"split": "selection", "step": "x"}, {"split": 3}, {"step": 1}, {"split": "selection", "step": 1}):
        run.log(line)
    run.rewind(1)
    log = run.folder / "metrics.jsonl"
    assert [json.loads(line) for line in log.read_text().splitlines()] == [{"split": "selection", "step": 1}]
    log.unlink()
    os.mkfifo(log)
    with refuses(Code.UNREADABLE) as caught:
        run.rewind(1)
    assert caught.value.file == log


# -- what was changed after it was written --


def test_a_record_that_was_changed_is_noticed(tmp_path: Path) -> None:
    run = run_folder.Run.claim(tmp_path / "run", choices={"model": "x"}, config={"seed": 1}, overrides=[])
    run.update(metrics={"validation/mcc": 0.25, "validation/nll": math.nan})
    run.finish("done")
    assert run_folder.altered_notes([(run.folder, run_folder.read(run.folder))]) == []
    path = run.folder / "run.json"
    written = path.read_text()
    for old, new in ((" 0.25", " 0.75"), ('"seed": 1', '"seed": 2'), ('"error": null,', "")):
        path.write_text(written.replace(old, new))
        assert written != path.read_text()
        (note,) = run_folder.altered_notes([(run.folder, run_folder.read(run.folder))])
        assert str(run.folder) in note
    older = json.loads(written)
    del older["checksum"]  # of a version that wrote none
    path.write_text(json.dumps(older))
    assert run_folder.altered_notes([(run.folder, run_folder.read(run.folder))]) == []
