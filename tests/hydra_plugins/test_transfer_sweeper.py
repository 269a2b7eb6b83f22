"""The transfer matrix: each task as a single run, scored zero-shot on the other tasks, then few-shot runs."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lora_bench import train
from lora_bench.data.toy import generate
from lora_bench.errors import Code
from tests.command_line import interrupt_and_resume, lora_bench, refused, toy_run

FEW = ["hydra.sweeper.shots=[4,8]", "hydra.sweeper.few.trainer.max_steps=2", "hydra.sweeper.few.data.selection_size=4"]
ASKED = [each for each in toy_run("sweep=transfer", "data=pairs") if not each.startswith("data.")]
ASKED += [*FEW, "data.path=one,two", "hydra.sweep.dir=sweep"]


@pytest.fixture
def tasks(in_tmp: Path) -> None:
    """Two tasks in folders of their own."""
    for seed, task in enumerate(("one", "two")):
        Path(task).mkdir()
        for split, rows in (("train", 40), ("validation", 16)):
            found = generate(rows, seed, split)
            assert found.labels is not None
            lines = ["\t".join(map(str, row)) for row in zip(*found.texts, found.labels.tolist(), strict=True)]
            Path(task, f"{split}.tsv").write_text("question1\tquestion2\tlabel\n" + "\n".join(lines) + "\n")


def record(name: str) -> dict[str, Any]:
    return json.loads(Path("sweep", name, "run.json").read_text())  # type: ignore[no-any-return]


def matrix() -> list[dict[str, str]]:
    with Path("sweep/transfer.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.usefixtures("tasks")
def test_the_matrix_of_two_tasks_in_one_command_and_its_rest_after_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = interrupt_and_resume(monkeypatch, ASKED, (2, 7))[-1]
    assert answer.code == 0, answer

    found = {(row["trained_on"], row["tested_on"], row["examples"]): row for row in matrix()}
    other = {"one": "two", "two": "one"}
    expected = {(task, task, "all") for task in other} | {(task, other[task], "0") for task in other}
    expected |= {(start, task, n) for task in other for start in (other[task], "no source adapter") for n in ("4", "8")}
    assert found.keys() == expected
    for number, task in enumerate(other):
        run = record(f"train/{number}")
        assert float(found[task, task, "all"]["mcc"]) == run["metrics"]["validation/mcc"]
        scored = json.loads(Path(f"sweep/train/{number}/evaluations/{other[task]}.json").read_text())
        assert float(found[task, other[task], "0"]["accuracy"]) == scored["metrics"]["validation/accuracy"]
    jobs = [record(path.parent.relative_to("sweep").as_posix()) for path in Path("sweep/few").glob("*/run.json")]
    assert len(jobs) == 8
    for job in jobs:
        start, data = job["config"]["adapter"]["init_from"], job["config"]["data"]
        assert (data["train_size"], data["selection_size"]) in ((4, 4), (8, 4))
        if start is not None:
            assert Path(start).parts[-2:] == ("train", str(["two", "one"].index(Path(data["path"]).name)))
    text = Path("sweep/transfer.md").read_text()
    assert "| mcc, zero-shot: trained on | one | two |" in text
    assert "| mcc, after 8 examples of it: trained on | one | two |" in text
    assert text in answer.out


@pytest.mark.usefixtures("tasks")
def test_tasks_that_do_not_fit_leave_their_cells_empty() -> None:
    Path("single").mkdir()
    for split in ("train", "validation"):
        text = Path("two", f"{split}.tsv").read_text().splitlines()
        rows = [line.split("\t") for line in text]
        Path("single", f"{split}.tsv").write_text("\n".join(f"{row[0]}\t{row[2]}" for row in rows) + "\n")
    Path("conf/data").mkdir(parents=True)
    for task, columns in (("one", "[question1, question2]"), ("single", "[question1]")):
        Path(f"conf/data/{task}_task.yaml").write_text(
            f"defaults: [pairs, _self_]\npath: {Path(task).absolute()}\ntext_columns: {columns}\n"
        )
    asked = [each for each in ASKED if not each.startswith(("data", "hydra.sweeper.shots"))]
    tasks = ["--config-dir", "conf", "data=one_task,single_task", "hydra.sweeper.shots=[4]"]
    answer = lora_bench("train", *tasks, *asked)
    assert answer.code == 0, answer
    assert "one_task cannot be scored on single_task: data.text_columns" in answer.out
    found = {(row["trained_on"], row["tested_on"], row["examples"]) for row in matrix()}
    assert ("one_task", "single_task", "0") not in found
    assert {("one_task", "single_task", "4"), ("single_task", "one_task", "4")} <= found


def as_choices(*names: str) -> list[str]:
    """The tasks as choices of `data`, and the sweep over them."""
    Path("conf/data").mkdir(parents=True)
    for name in names:
        settings = f"defaults: [pairs, _self_]\npath: {Path(name).absolute()}\n"
        Path(f"conf/data/{name}_task.yaml").write_text(settings)
    asked = [each for each in ASKED if not each.startswith(("data", "hydra.sweeper.shots"))]
    data = f"data={','.join(f'{name}_task' for name in names)}"
    return ["--config-dir", "conf", data, *asked, "hydra.sweeper.shots=[4]"]


@pytest.mark.usefixtures("tasks")
def test_one_adapter_for_all_tasks_stands_beside_those_of_each() -> None:
    answer = lora_bench("train", *as_choices("one", "two"), "hydra.sweeper.together=true")
    assert answer.code == 0, answer
    found = {(row["trained_on"], row["tested_on"], row["examples"]): row for row in matrix()}
    run = record("train/2")
    assert run["config"]["data"]["tasks"] == ["one_task", "two_task"]
    for task in ("one_task", "two_task"):
        assert float(found["all tasks", task, "0"]["mcc"]) == run["metrics"][f"validation/{task}/mcc"]
        assert ("all tasks", task, "4") in found
    starts = [record(f"few/{n}")["config"]["adapter"]["init_from"] for n in range(6)]
    assert [str(Path(start).relative_to(Path("sweep/train").absolute())) for start in starts if start] == [
        "1",
        "2/tasks/one_task",
        "0",
        "2/tasks/two_task",
    ]
    text = Path("sweep/transfer.md").read_text()
    assert text.count("| all tasks |") == 2
    assert "the task tested on among them" in text


@pytest.mark.usefixtures("tasks")
def test_a_source_that_failed_is_gone_on_from_once_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    fit, calls = train.PackTraining.fit, iter(range(99))

    def sometimes(*arguments: Any, **keywords: Any) -> Any:
        if next(calls) == 1:
            raise RuntimeError("a cable")
        return fit(*arguments, **keywords)

    monkeypatch.setattr(train.PackTraining, "fit", sometimes)
    assert lora_bench("train", *as_choices("one", "two")).code == 1
    assert ("two_task", "one_task", "4") not in {(r["trained_on"], r["tested_on"], r["examples"]) for r in matrix()}
    begun = sorted(path.parent.name for path in Path("sweep/few").glob("*/run.json"))
    assert begun == ["0", "1", "2"]  # each task from nothing, and one from the other
    answer = lora_bench("train", "-m", "resume=sweep")
    assert answer.code == 0, answer
    assert record("few/3")["config"]["adapter"]["init_from"].endswith("train/1")
    found = {(row["trained_on"], row["tested_on"], row["examples"]) for row in matrix()}
    assert {("two_task", "one_task", "4"), ("two_task", "one_task", "0")} <= found
    assert len(list(Path("sweep/few").iterdir())) == 4


@pytest.mark.usefixtures("tasks")
def test_what_is_no_matrix_is_refused() -> None:
    one = [each.replace("data.path=one,two", "data.path=one") for each in ASKED]
    shutil.copytree("two", "deeper/one")
    alike = [each.replace("data.path=one,two", "data.path=one,deeper/one") for each in ASKED]
    few = "hydra.sweeper.few.trainer.max_steps="
    second_stage = [*(text for text in ASKED if not text.startswith(few)), f"{few}0"]
    for overrides, expected in (
        (one, (Code.CONFLICT, "data", None)),
        ([*ASKED, "pack.halving=true"], (Code.CONFLICT, "pack.halving", "true")),
        ([*ASKED, "hydra.sweeper.together=true"], (Code.CONFLICT, "hydra.sweeper.together", None)),
        (alike, (Code.CONFLICT, "data", "one")),
        (second_stage, (Code.INVALID_VALUE, "trainer.max_steps", 0)),  # before the first stage begins
    ):
        error = refused("train", *overrides)
        assert (error.code, error.key, error.value) == expected


@pytest.mark.usefixtures("tasks")
def test_what_it_would_cost_is_told_and_nothing_is_left() -> None:
    answer = lora_bench("train", *ASKED, "dry_run=true", "hydra.sweeper.shots=[4]")
    assert answer.code == 0, answer
    assert "6 jobs in" in answer.out
    assert not Path("sweep").exists()
