"""`lora-bench ls`: which runs it lists, in which order, and in which form."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from rich.cells import cell_len

from lora_bench.errors import Code
from tests.command_line import lora_bench, refused
from tests.stored_runs import make_run

if TYPE_CHECKING:
    from collections.abc import Sequence

NAMES = ["old", "dora", "broken", "killed", "best"]


@pytest.fixture
def runs(in_tmp: Path) -> None:
    """Runs whose names tell them apart, the newest last."""
    make_run(Path("outputs/z"), hour=0, name="old", tags=["a", "b"], mcc=0.3)
    make_run(Path("outputs/y"), hour=1, name="dora", tags=["a"], adapter="dora", mcc=0.4)
    make_run(Path("outputs/x"), "failed", hour=2, name="broken")
    make_run(Path("outputs/w"), "running", hour=3, name="killed")
    make_run(Path("outputs/v"), hour=4, name="best", mcc=0.9)


def listed(*arguments: str) -> list[str]:
    """Return the names of the runs that `ls` lists."""
    answer = lora_bench("ls", "--json", *arguments)
    assert answer.code == 0, answer
    return [run["name"] for run in json.loads(answer.out)]


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ([], NAMES),
        (["--tag", "a"], ["old", "dora"]),
        (["--tag", "a", "--tag", "b"], ["old"]),
        (["--status", "failed,killed"], ["broken", "killed"]),
        (["--method", "dora"], ["dora"]),
        (["--where", "adapter=lora and name!=best"], ["old", "broken", "killed"]),
        (["--sort", "metric", "--status", "done"], ["old", "dora", "best"]),
        (["--sort", "name"], sorted(NAMES)),
        (["-n", "2"], NAMES[-2:]),
        (["outputs/z", "outputs/v"], ["old", "best"]),
    ],
    ids=" ".join,
)
def test_runs_are_selected_and_sorted(arguments: Sequence[str], names: Sequence[str]) -> None:
    assert listed(*arguments) == names


@pytest.mark.usefixtures("runs")
def test_a_table_fits_its_width_and_a_pipe_shows_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    long = "a-name-of-fifty-nine-letters-that-no-narrow-terminal-can-show"[:59]
    make_run(Path("outputs/u"), hour=5, name=long)
    header, *rows = lora_bench("ls").out.splitlines()
    assert header.split() == ["id", "name", "status", "adapter", "model", "data", "mcc", "age", "tags", "overrides"]
    assert len(rows) == 6
    assert long in rows[-1]
    assert "0.900" in rows[-2]
    monkeypatch.setenv("COLUMNS", "80")
    narrow = lora_bench("ls").out.splitlines()
    assert len(narrow) == 7
    assert max(map(cell_len, narrow)) <= 80
    assert all(f"seed={i}" in row for i, row in enumerate(narrow[1:]))


@pytest.mark.usefixtures("runs")
def test_quiet_prints_folders_and_json_all_values() -> None:
    assert lora_bench("ls", "-q", "--status", "done").out.splitlines() == ["outputs/z", "outputs/y", "outputs/v"]
    run = json.loads(lora_bench("ls", "--json", "--tag", "b").out)[0]
    assert (run["folder"], run["status"], run["tags"]) == ("outputs/z", "done", ["a", "b"])
    assert run["score"] == {"validation/mcc": 0.3}
    assert run["cost"] == {"train_seconds": 60.0}


def test_nothing_to_list_is_no_error(in_tmp: Path) -> None:
    assert (lora_bench("ls").code, lora_bench("ls", "--json").out) == (0, "[]\n")
    make_run(Path("outputs/z"))
    answer = lora_bench("ls", "--tag", "none")
    assert (answer.code, answer.out) == (0, "")
    assert "1 run" in answer.err


def test_old_and_damaged_records_are_listed_or_noted(in_tmp: Path) -> None:
    old = make_run(Path("outputs/old"))
    Path("outputs/damaged").mkdir()
    Path("outputs/damaged/run.json").write_text("{")
    content = json.loads((old / "run.json").read_text())
    del content["config"], content["checksum"]
    (old / "run.json").write_text(json.dumps(content))
    answer = lora_bench("ls")
    assert (answer.code, len(answer.out.splitlines())) == (0, 2)
    assert "outputs/damaged" in answer.err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["nowhere"], Code.NOT_FOUND),
        (["--status", "finished"], Code.UNKNOWN_CHOICE),
        (["--sort", "age"], Code.INVALID_SYNTAX),
        (["-n", "0"], Code.INVALID_SYNTAX),
        (["--where", "adapter.rnak=8"], Code.UNKNOWN_KEY),
    ],
)
def test_wrong_arguments_are_refused(arguments: list[str], code: Code, in_tmp: Path) -> None:
    make_run(Path("outputs/z"))
    assert refused("ls", *arguments).code == code


def test_a_thousand_runs_take_less_than_two_seconds(in_tmp: Path) -> None:
    record = (make_run(Path("outputs/0")) / "run.json").read_bytes()
    for i in range(1, 1000):
        Path(f"outputs/{i}").mkdir()
        Path(f"outputs/{i}/run.json").write_bytes(record)
    began = time.process_time()
    assert len(lora_bench("ls").out.splitlines()) == 1001
    assert time.process_time() - began < 2
