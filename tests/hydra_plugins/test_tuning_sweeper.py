"""The sweep of two stages: rates chosen out of sight of the reported split, then each method reported at its own."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lora_bench import train
from lora_bench.adapters.methods.lora import LoRA
from lora_bench.errors import Code, DivergedError
from lora_bench.training import loop
from tests.command_line import interrupt_and_resume, lora_bench, refused, toy_run

if TYPE_CHECKING:
    from lora_bench.adapters.base import Update
    from lora_bench.training.member_run import MemberRun

FEW = ["hydra.sweeper.tune.data.train_size=20", "hydra.sweeper.tune.trainer.epochs=1"]
ASKED = toy_run("sweep=methods", "adapter=lora,head_only", "optimizer.lr=1e-3,1e-2", "seed=0,1", *FEW)
ASKED += ["hydra.sweep.dir=sweep"]


def records(stage: str) -> list[dict[str, Any]]:
    paths = sorted(Path("sweep", stage).glob("*/run.json"), key=lambda path: int(path.parent.name))
    return [json.loads(path.read_text()) for path in paths]


def table() -> list[dict[str, str]]:
    with Path("sweep/table.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[bool, float], float]:
    """The selection MCC of a run by whether it has an adapter and its rate, in the place of what it would have."""
    wanted: dict[tuple[bool, float], float] = {}
    update_best = loop.update_best

    def wanted_mcc(member: MemberRun, *arguments: Any, **options: Any) -> Any:
        line = update_best(member, *arguments, **options)
        assert member.progress.best is not None
        has_adapter = bool(member.pack.adapter_parameters(member.index))
        member.progress.best["metrics"]["mcc"] = wanted[has_adapter, member.settings.lr]
        return line

    monkeypatch.setattr(loop, "update_best", wanted_mcc)
    return wanted


@pytest.mark.usefixtures("in_tmp")
def test_each_method_is_reported_at_the_rate_that_is_best_on_selection(
    scored: dict[tuple[bool, float], float],
) -> None:
    scored |= {(True, 1e-3): 0.5, (True, 1e-2): 0.4, (False, 1e-3): 0.1, (False, 1e-2): 0.2}
    answer = lora_bench("train", *ASKED)
    assert (answer.code, answer.err) == (0, "")
    assert "adapter=lora: optimizer.lr=0.001 is best on the selection split (0.001: 0.5000, 0.01: 0.4000)" in answer.out
    assert "adapter=head_only: optimizer.lr=0.01 is best" in answer.out
    tuning, reported = records("tune"), records("report")
    assert [record["config"]["data"]["train_size"] for record in tuning] == [20] * 4
    assert all(not any(key.startswith("validation/") for key in record["metrics"]) for record in tuning)
    assert not list(Path("sweep/tune").glob("*/predictions/validation.parquet"))
    found = [
        (each["choices"]["adapter"], each["config"]["optimizer"]["lr"], each["config"]["seed"]) for each in reported
    ]
    assert found == [("lora", 1e-3, 0), ("lora", 1e-3, 1), ("head_only", 1e-2, 0), ("head_only", 1e-2, 1)]
    assert all("validation/mcc" in record["metrics"] for record in reported)
    assert {(row["adapter"], row["n"]) for row in table()} == {("lora", "2"), ("head_only", "2")}
    assert "4 runs that only chose" in answer.out
    assert lora_bench("train", "-m", "resume=sweep").code == 0
    assert len(records("report")) == 4


@pytest.mark.usefixtures("in_tmp")
def test_a_sweep_stopped_in_either_stage_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lora_bench("train", *ASKED).code == 0
    whole = Path("sweep").rename("whole")
    assert interrupt_and_resume(monkeypatch, ASKED, (2, 5))[-1].code == 0
    for stage in ("tune", "report"):
        for record in records(stage):
            assert record["status"] == "done"
    kept = {"adapter", "optimizer.lr", "mcc"}
    with (whole / "table.csv").open(newline="", encoding="utf-8") as file:
        expected = [{key: row[key] for key in kept & row.keys()} for row in csv.DictReader(file)]
    assert [{key: row[key] for key in kept & row.keys()} for row in table()] == expected


@pytest.mark.usefixtures("in_tmp")
def test_a_method_for_which_no_rate_works_is_said_and_the_others_are_reported() -> None:
    wild = [text.replace("optimizer.lr=1e-3,1e-2", "optimizer.lr=1e-3,1e38") for text in ASKED]
    answer = lora_bench("train", *wild, "optimizer.grad_clip_norm=null")
    assert answer.code == 0, answer
    assert "1e+38: no result" in answer.out
    assert {record["config"]["optimizer"]["lr"] for record in records("report")} == {1e-3}


@pytest.mark.usefixtures("in_tmp")
def test_a_method_whose_rates_were_not_all_tried_is_reported_once_they_are(
    scored: dict[tuple[bool, float], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here LoRA's better rate fails at first, by no fault of its own."""
    scored |= {(True, 1e-3): 0.5, (True, 1e-2): 0.6, (False, 1e-3): 0.1, (False, 1e-2): 0.2}

    def broken(self: LoRA, updates: dict[str, Update], step: int, steps: int) -> None:
        raise RuntimeError("a cable")

    make = train.PackTraining.fit

    def sometimes(training: Any, **keywords: Any) -> Any:
        with monkeypatch.context() as patch:
            if isinstance(training.pack.members[0].adapter, LoRA) and training.members[0].settings.lr == 1e-2:
                patch.setattr(LoRA, "after_step", broken)
            return make(training, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(train.PackTraining, "fit", sometimes)
        answer = lora_bench("train", *(text for text in ASKED if text != "pack.size=16"), "pack.size=1")
    assert answer.code == 1
    assert "1 of 6 jobs" in answer.err
    assert answer.out.count("adapter=lora: optimizer.lr") == 1
    assert [each["choices"]["adapter"] for each in records("report")] == ["head_only"] * 2
    answer = lora_bench("train", "-m", "resume=sweep")
    assert (answer.code, answer.err) == (0, "")
    found = [(each["choices"]["adapter"], each["config"]["optimizer"]["lr"]) for each in records("report")]
    assert found == [("head_only", 1e-2)] * 2 + [("lora", 1e-2)] * 2


@pytest.mark.usefixtures("in_tmp")
def test_a_chosen_rate_that_diverges_with_more_pairs_has_failed(
    scored: dict[tuple[bool, float], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    scored |= {(True, 1e-3): 0.5, (True, 1e-2): 0.4, (False, 1e-3): 0.1, (False, 1e-2): 0.2}
    update_best = loop.update_best

    def diverging(member: MemberRun, *arguments: Any, **options: Any) -> Any:
        if member.pack.members[member.index].seed == 1:  # only what is reported has such a seed
            raise DivergedError("the loss is nan")
        return update_best(member, *arguments, **options)

    monkeypatch.setattr(loop, "update_best", diverging)
    answer = lora_bench("train", *ASKED)
    assert answer.code == 1
    assert "2 of 8 jobs" in answer.err
    assert [each["status"] for each in records("report")] == ["done", "diverged"] * 2


@pytest.mark.usefixtures("in_tmp")
def test_methods_are_not_stopped_against_one_another() -> None:
    error = refused("train", *ASKED, "pack.halving=true")
    assert (error.code, error.key) == (Code.CONFLICT, "pack.halving")


@pytest.mark.usefixtures("in_tmp")
def test_rates_are_the_same_for_all_methods() -> None:
    own = [text.replace("optimizer.lr=1e-3,1e-2", "optimizer.lr=1e-3,${adapter.default_lr}") for text in ASKED]
    error = refused("train", *own)
    assert (error.code, error.key) == (Code.INVALID_VALUE, "optimizer.lr")
    assert "adapter.default_lr" in str(error.value)


@pytest.mark.usefixtures("in_tmp")
def test_one_rate_is_nothing_to_choose_from() -> None:
    one = [text.replace("optimizer.lr=1e-3,1e-2", "optimizer.lr=1e-3") for text in ASKED]
    error = refused("train", *one)
    assert (error.code, error.key) == (Code.CONFLICT, "optimizer.lr")


@pytest.mark.usefixtures("in_tmp")
def test_a_wrong_value_of_the_second_stage_is_refused_before_the_first() -> None:
    error = refused("train", *[text.replace("seed=0,1", "seed=0,-1") for text in ASKED])
    assert (error.code, error.key, error.value) == (Code.INVALID_VALUE, "seed", -1)


@pytest.mark.usefixtures("in_tmp")
def test_an_ablation_chooses_each_variants_rate_and_compares_with_the_whole() -> None:
    """The preset itself on the toy task, with one of its variants."""
    variants = "hydra.sweeper.variants=['','adapter.lr_ratio=1']"
    asked = toy_run("sweep=ablation", "optimizer.lr=1e-3,1e-2", "seed=0,1", *FEW, variants)
    asked += ["adapter.calibration_batches=1", "hydra.sweep.dir=sweep"]
    answer = lora_bench("train", *asked)
    assert (answer.code, answer.err) == (0, "")
    for kind in ("all", "adapter.lr_ratio=1"):
        assert f"{kind}: optimizer.lr=" in answer.out
    assert len(records("tune")) == 4
    reported = [each["config"] for each in records("report")]
    assert [(each["adapter"]["allocation"], each["adapter"]["lr_ratio"]) for each in reported[::2]] == [
        ("uniform", 4.0),
        ("uniform", 1.0),
    ]
    assert {each["trainer"]["objective"] for each in reported} == {None}
    baseline = next(row for row in table() if row["tests.verdict"] == "baseline")
    assert baseline["adapter.lr_ratio"] == "4.0"
