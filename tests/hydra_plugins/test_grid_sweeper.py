"""Sweeps through the command line: folders, tables, presets, checks before the first job, failures told."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from lora_bench import train
from lora_bench.errors import Code, DivergedError
from lora_bench.records import run_folder
from tests.command_line import lora_bench, refused, toy_run

SWEEP = "hydra.sweep.dir=sweep"


def records(folder: Path) -> dict[str, dict[str, Any]]:
    """The jobs' records by the names of their folders."""
    return {path.parent.name: run_folder.read(path.parent) for path in sorted(folder.glob("*/run.json"))}


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "table.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_grid_of_ranks(in_tmp: Path) -> None:
    answer = lora_bench("train", "-m", *toy_run(), "adapter.rank=2,4,8")
    assert (answer.code, answer.err) == (0, "")
    (folder,) = in_tmp.glob("outputs/sweeps/*/*")
    found = records(folder)
    assert {name: each["config"]["adapter"]["rank"] for name, each in found.items()} == {"0": 2, "1": 4, "2": 8}
    assert {each["status"] for each in found.values()} == {"done"}
    assert found["1"]["overrides"] == [*toy_run(), "adapter.rank=4"]
    rows = table(folder)
    assert sorted(row["adapter.rank"] for row in rows) == ["2", "4", "8"]
    assert "adapter.rank" in (folder / "table.md").read_text(encoding="utf-8")
    lines = answer.out.splitlines()
    assert lines[0] == "3 jobs: checking"
    ended = [line for line in lines if re.match(r"\d/3  job ", line)]
    assert [line.split("  mcc ")[0] for line in ended] == [
        f"{k + 1}/3  job {k}: adapter.rank={2 << k}" for k in range(3)
    ]
    assert all(line.endswith(" in a pack of 3") for line in ended)
    assert not any(line.startswith(("step ", "epoch ", "record: ")) for line in lines)
    assert sum(line.startswith("toy: train ") for line in lines) == 1
    assert lines[-2] == f"3 of 3 jobs have ended: {folder.relative_to(in_tmp)}"
    assert lines[-1].startswith(f"next: lora-bench compare {folder.relative_to(in_tmp)}")
    assert "adapter.rank" in answer.out.partition("3/3")[2]  # the comparison


def test_hydras_own_launcher_shows_the_same_lines(in_tmp: Path) -> None:
    sweep = [
        *toy_run(SWEEP),
        "hydra/launcher=basic",
        "optimizer.warmup=0",
        "optimizer.lr=1e-3,1e30",
        "trainer.max_steps=2",
    ]
    answer = lora_bench("train", "-m", *sweep)
    assert answer.code == 1
    first, second = (line for line in answer.out.splitlines() if re.match(r"\d/2  job |job ", line))
    assert re.fullmatch(r"1/2  job 0: optimizer\.lr=0\.001  mcc -?\d\.\d+  \d.* s", first)
    assert second.startswith("job 1 failed: step ")
    assert not any(line.startswith(("step ", "record: ")) for line in answer.out.splitlines())


def test_seeds_of_one_experiment_are_one_row(in_tmp: Path) -> None:
    assert lora_bench("train", "-m", *toy_run(SWEEP), "seed=range(2)", "adapter.rank=2").code == 0
    assert len(records(in_tmp / "sweep")) == 2
    assert len(table(in_tmp / "sweep")) == 1


def test_a_preset_is_a_sweep_and_the_command_line_replaces_its_grid(in_tmp: Path) -> None:
    answer = lora_bench("train", *toy_run(SWEEP), "sweep=rank", "adapter.rank=1,3")
    assert answer.code == 0
    found = records(in_tmp / "sweep")
    assert [each["config"]["adapter"]["rank"] for each in found.values()] == [1, 3]
    assert found["0"]["choices"]["sweep"] == "rank"


def test_rank_preset_as_it_is(in_tmp: Path) -> None:
    assert lora_bench("train", *toy_run(SWEEP), "sweep=rank").code == 0
    ranks = [each["config"]["adapter"]["rank"] for each in records(in_tmp / "sweep").values()]
    assert ranks == [1, 2, 4, 8, 16, 32]


def test_baselines_are_eleven_runs(in_tmp: Path) -> None:
    """Three families by four methods, without T5's head alone: it has none."""
    answer = lora_bench("train", *toy_run(SWEEP, "model=tiny_bert,tiny_roberta,tiny_t5"), "sweep=baselines")
    assert (answer.code, answer.err) == (0, "")
    found = records(in_tmp / "sweep")
    assert {(each["choices"]["model"], each["choices"]["adapter"]) for each in found.values()} == {
        (model, adapter)
        for model in ("tiny_bert", "tiny_roberta", "tiny_t5")
        for adapter in ("full", "head_only", "lora", "enhanced")
        if (model, adapter) != ("tiny_t5", "head_only")
    }
    assert {each["status"] for each in found.values()} == {"done"}
    assert len(found) == len(table(in_tmp / "sweep")) == 11
    rates = {each["choices"]["adapter"]: each["config"]["optimizer"]["lr"] for each in found.values()}
    assert rates == {"full": 5e-5, "head_only": 1e-3, "lora": 5e-4, "enhanced": 4e-4}


@pytest.mark.parametrize(
    ("overrides", "expected", "named"),
    [
        (["adapter.rank=2,4,abc"], (Code.INVALID_VALUE, "adapter.rank", "abc"), ""),
        (["adapter.rank=2,4,0"], (Code.INVALID_VALUE, "adapter.rank", 0), ""),
        (["model=tiny_bert,robrta"], (Code.UNKNOWN_CHOICE, "model", "robrta"), "Did you mean roberta?"),
        (["adapter=lora,full", "adapter.rnak=2"], (Code.UNKNOWN_KEY, "adapter.rnak", None), "adapter.rank"),
        (["seed=0,1,-1"], (Code.INVALID_VALUE, "seed", -1), ""),
        (
            ["sweep=baselines", "model=tiny_t5", "adapter=head_only"],
            (Code.NO_MATCH, "hydra.sweeper.exclude", "model=*t5* adapter=head_only"),
            "",
        ),
        (["seed=range(0)"], (Code.NO_MATCH, "seed", "range(0)"), ""),
        (["adapter.rank=interval(1,3)"], (Code.INVALID_SYNTAX, None, None), "INTERVAL_SWEEP"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_value_is_refused_before_the_first_job(
    in_tmp: Path, overrides: list[str], expected: tuple[Code, str | None, object], named: str
) -> None:
    error = refused("train", "-m", *toy_run(*overrides))
    assert (error.code, error.key, error.value) == expected
    assert named in str(error)
    assert not any(in_tmp.iterdir())


def test_a_job_that_fails_does_not_stop_the_others(in_tmp: Path) -> None:
    """A rank that only this backbone is too small for is found as its job starts."""
    answer = lora_bench("train", "-m", *toy_run(SWEEP), "adapter.rank=33,2,40")
    assert answer.code == 1
    assert "2 of 3 jobs" in answer.err
    assert "job 0 failed: adapter.rank=33:" in answer.out
    assert "job 2 failed: adapter.rank=40:" in answer.out
    found = records(in_tmp / "sweep")
    assert [each["status"] for each in found.values()] == ["failed", "done", "failed"]
    assert all(isinstance(each["config"]["optimizer"]["lr"], float) for each in found.values())  # no interpolation
    assert found["0"]["error"].startswith("adapter.rank=33:")
    assert found["2"]["config"]["adapter"]["rank"] == 40
    assert [row["adapter.rank"] for row in table(in_tmp / "sweep") if "adapter.rank" in row] in ([], ["2"])
    below = (in_tmp / "sweep" / "table.md").read_text(encoding="utf-8")
    assert "adapter.rank=33" in below
    assert "adapter.rank=40" in below


def test_all_jobs_wrong_is_a_wrong_request(in_tmp: Path) -> None:
    answer = lora_bench("train", "-m", *toy_run(SWEEP), "adapter.rank=33,40")
    assert answer.code == 2
    assert answer.error is not None
    assert answer.error.code == Code.INVALID_VALUE
    assert "2 of 2 jobs" in answer.err
    assert [each["status"] for each in records(in_tmp / "sweep").values()] == ["failed", "failed"]


def test_every_kind_of_failure_is_recorded_and_told(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit, failures = train.PackTraining.fit, iter([RuntimeError("a cable"), DivergedError("the loss is nan"), None])

    def sometimes(*arguments: Any, **keywords: Any) -> Any:
        failure = next(failures)
        if failure is not None:
            raise failure
        return fit(*arguments, **keywords)

    monkeypatch.setattr(train.PackTraining, "fit", sometimes)
    answer = lora_bench("train", "-m", *toy_run(SWEEP, "pack.size=1"), "seed=0,1,2")
    assert answer.code == 1
    assert "2 of 3 jobs" in answer.err
    assert "job 0 failed: a cable" in answer.out
    assert "job 1 failed: the loss is nan" in answer.out
    found = records(in_tmp / "sweep")
    assert [each["status"] for each in found.values()] == ["failed", "diverged", "done"]
    assert "a cable" in found["0"]["error"]
    assert "a cable" in (in_tmp / "sweep" / "0" / "run.log").read_text(encoding="utf-8")


def test_ctrl_c_keeps_what_is_finished(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit, calls = train.PackTraining.fit, iter(range(9))

    def interrupted(*arguments: Any, **keywords: Any) -> Any:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return fit(*arguments, **keywords)

    monkeypatch.setattr(train.PackTraining, "fit", interrupted)
    answer = lora_bench("train", "-m", *toy_run(SWEEP, "pack.size=1"), "seed=0,1,2")
    assert (answer.code, answer.err.count("\n")) == (130, 1), answer
    assert [each["status"] for each in records(in_tmp / "sweep").values()] == ["done", "interrupted"]
    assert len(table(in_tmp / "sweep")) == 1


def test_a_sweeps_folder_that_is_taken_is_refused(in_tmp: Path) -> None:
    assert lora_bench("train", "-m", *toy_run(SWEEP), "seed=0,1").code == 0
    error = refused("train", "-m", *toy_run(SWEEP), "seed=5,6")
    assert (error.code, error.key, error.value) == (Code.EXISTS, "hydra.sweep.dir", Path("sweep"))
    assert str(error).endswith("lora-bench train -m resume=sweep")


def test_folders_named_by_overrides(in_tmp: Path) -> None:
    asked = toy_run(SWEEP, "hydra.sweep.subdir=rank-${adapter.rank}/seed-${seed}")
    assert lora_bench("train", "-m", *asked, "adapter.rank=1,2", "seed=0,1").code == 0
    found = {str(path.parent.relative_to("sweep")) for path in Path("sweep").rglob("run.json")}
    assert found == {"rank-1/seed-0", "rank-1/seed-1", "rank-2/seed-0", "rank-2/seed-1"}
    shutil.rmtree("sweep/rank-1/seed-1")
    assert lora_bench("train", "-m", "resume=sweep").code == 0
    assert run_folder.read(Path("sweep/rank-1/seed-1"))["config"]["seed"] == 1
    error = refused(
        "train", "-m", *toy_run("hydra.sweep.dir=other", "hydra.sweep.subdir=seed-${seed}"), "adapter.rank=1,2"
    )
    assert (error.code, error.key, error.value) == (Code.CONFLICT, "hydra.sweep.subdir", "seed-0")


def test_jobs_in_batches_are_all_run(in_tmp: Path) -> None:
    answer = lora_bench("train", "-m", *toy_run(SWEEP), "seed=0,1,2", "hydra.sweeper.max_batch_size=2")
    assert answer.code == 0
    assert list(records(in_tmp / "sweep")) == ["0", "1", "2"]


def test_variants_are_overrides_that_go_together_and_are_compared_with_the_first(in_tmp: Path) -> None:
    variants = "hydra.sweeper.variants=['adapter.rank=4 adapter.alpha=8','adapter=bitfit','adapter.rank=2']"
    answer = lora_bench("train", "-m", *toy_run(SWEEP), "seed=0,1", variants)
    assert (answer.code, answer.err) == (0, "")
    found = [each["config"] for each in records(in_tmp / "sweep").values()]
    told = [(each["adapter"]["method"], each["adapter"].get("rank"), each["seed"]) for each in found]
    assert told == [
        ("lora", 4, 0),
        ("lora", 4, 1),
        ("bitfit", None, 0),
        ("bitfit", None, 1),
        ("lora", 2, 0),
        ("lora", 2, 1),
    ]
    assert [each["adapter"].get("alpha") for each in found[::2]] == [8, None, 16]
    baseline = next(row for row in table(in_tmp / "sweep") if row["tests.verdict"] == "baseline")
    assert (baseline["adapter"], baseline["adapter.rank"]) == ("lora", "4")
    assert "adapter.rank=4" in next(line for line in answer.out.splitlines() if line.startswith("tests of "))
    alike = "hydra.sweeper.variants=['','adapter.rank=8']"
    error = refused("train", "-m", *toy_run("hydra.sweep.dir=other"), "seed=0,1", alike)
    assert (error.code, error.key) == (Code.CONFLICT, "sweep")


def test_the_baseline_is_the_first_variant_at_its_chosen_learning_rate(in_tmp: Path) -> None:
    variants = "hydra.sweeper.variants=['','adapter=bitfit']"
    assert lora_bench("train", "-m", *toy_run(SWEEP), "optimizer.lr=0.1,0.2", variants).code == 0
    for name, mcc in (("0", 0.1), ("1", 0.5), ("2", 0.4), ("3", 0.3)):
        path = in_tmp / "sweep" / name / "run.json"
        record = json.loads(path.read_text(encoding="utf-8"))
        record["metrics"]["selection/mcc"] = mcc
        path.write_text(json.dumps(record), encoding="utf-8")
    answer = lora_bench("train", "-m", "resume=sweep")  # all jobs have ended: the tables are written again
    rows = [(row["adapter"], row["optimizer.lr"], row["tests.verdict"]) for row in table(in_tmp / "sweep")]
    assert sorted(rows) == [("bitfit", "0.1", "not tested"), ("lora", "0.2", "baseline")]
    assert "against adapter=lora optimizer.lr=0.2 (named by --baseline)" in " ".join(answer.out.split())
