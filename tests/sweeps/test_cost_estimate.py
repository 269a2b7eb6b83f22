"""`dry_run=true` of a sweep: a row for each pack and the sum of all, and nothing left behind."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from lora_bench.errors import Code
from lora_bench.run.inputs import SharedInputs
from lora_bench.run.settings import Experiment
from lora_bench.sweeps import cost_estimate, packing, workers
from lora_bench.sweeps.packing import MemoryDemand
from lora_bench.training.rehearsal import Estimate
from tests.command_line import lora_bench, refused, toy_run
from tests.helpers import composed

if TYPE_CHECKING:
    from pathlib import Path

ALONE = Estimate(
    adapter=1000,
    head=10,
    total=10_000,
    steps=5,
    train_flops=2e9,
    train_seconds=8.0,
    evaluation_seconds=1.0,
    peak_memory_bytes=5e8,
)


@pytest.fixture
def rehearsed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Methods that were rehearsed; each rank takes so many times what ALONE says."""
    found = []

    def estimate_run(experiment: Experiment, common: SharedInputs | None = None) -> Estimate:
        rank = getattr(experiment.adapter, "rank", 1)
        found.append(f"{experiment.adapter.method} {rank}")
        return replace(ALONE, train_flops=rank * ALONE.train_flops, train_seconds=rank * ALONE.train_seconds)

    monkeypatch.setattr(cost_estimate, "estimate_run", estimate_run)
    return found


def rows(out: str) -> list[list[str]]:
    """Cells of the table, headers left out."""
    lines = [re.split(r" {2,}", line.strip()) for line in out[out.index("computation") :].splitlines()[1:]]
    return [cells for cells in lines if len(cells) > 3]


def test_a_row_for_each_pack_and_their_sum(in_tmp: Path, rehearsed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        cost_estimate,
        "memory_demand",
        lambda common, experiment: MemoryDemand(persistent_bytes=1e8, step_bytes=1e9, depth=0),
    )
    asked = toy_run("adapter=lora", "adapter.rank=1,2", "seed=0,1", "dry_run=true")
    answer = lora_bench("train", "-m", *asked)
    assert (answer.code, answer.err) == (0, ""), answer
    assert rehearsed == ["lora 1", "lora 2"]  # a seed changes no cost
    pack, whole = rows(answer.out)
    assert pack[:2] == ["0 to 3", "adapter.rank=1 seed=0 …"]  # and what the last one has, on the next line
    assert "adapter.rank=2 seed=1" in answer.out
    # 2 x (1 + 2) times ALONE's 2 GFLOP and 8 s, 4 evaluations of 1 s; the largest member, and what three others keep
    assert pack[-4:] == ["4.0 k", "12 GFLOP", "52 s", "800 MB"]
    assert whole == ["all", "4 jobs in 1 pack", "4.0 k", "12 GFLOP", "52 s", "800 MB"]
    assert not any(in_tmp.iterdir())


@pytest.mark.usefixtures("in_tmp")
def test_what_runs_alone_has_a_row_of_its_own(rehearsed: list[str]) -> None:
    answer = lora_bench("train", "-m", *toy_run("adapter=lora,full,rslora", "dry_run=true"))
    assert answer.code == 0, answer
    assert rehearsed == ["lora 8", "lora 8", "full 1"]
    (first, second, whole) = rows(answer.out)
    assert (first[0], second[0]) == ("0, 2", "1")
    assert whole[1] == "3 jobs in 2 packs"


def test_the_frozen_layers_are_counted_once_where_all_have_one_seed() -> None:
    def experiments(*seeds: int) -> list[Experiment]:
        asked = ["data=toy", "data.train_rows=40", "data.validation_rows=8", "trainer.precision=fp32"]
        return [Experiment.build(composed(*asked, "adapter.layers=top:1", f"seed={seed}")) for seed in seeds]

    inputs = SharedInputs.load(experiments(0)[0])
    one, two = (cost_estimate._shared(experiments(*[0] * n), inputs) for n in (2, 4))
    # Of a member's p + s two do p once: p / (2 (p + s)); of four 3 p / (4 (p + s)).
    assert 0.1 < one < 0.5
    assert two == pytest.approx(1.5 * one)
    assert cost_estimate._shared(experiments(0, 1), inputs) == 0
    assert cost_estimate._shared(experiments(0), inputs) == 0


@pytest.mark.usefixtures("in_tmp")
def test_the_kept_prefix_is_made_once_for_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = replace(ALONE, prefix_flops=5e8, prefix_seconds=2.0)  # of 2 GFLOP and 8 s
    monkeypatch.setattr(cost_estimate, "estimate_run", lambda experiment, common: alone)
    asked = toy_run("adapter.layers=top:1", "adapter.rank=1,2,3,4", "pack.size=2", "dry_run=true")
    first, second, whole = rows(lora_bench("train", "-m", *asked).out)
    assert first[-3:-1] == ["3.5 GFLOP", "16 s"]  # 2 x 1.5 + 0.5; 2 x 6 + 2, and 2 evaluations of 1 s
    assert second[-3:-1] == ["3.0 GFLOP", "14 s"]
    assert whole[-3:-1] == ["6.5 GFLOP", "30 s"]


@pytest.mark.usefixtures("in_tmp")
def test_what_halving_stops_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = replace(ALONE, steps=80, evaluations=2, seconds_per_evaluation=0.1)  # of 2 GFLOP, 8 s and 1 s of evaluation
    monkeypatch.setattr(cost_estimate, "estimate_run", lambda experiment, common: alone)
    asked = toy_run("adapter.rank=1,2,3,4,5,6,7,8", "pack.halving=true", "dry_run=true")
    pack, _ = rows(lora_bench("train", "-m", *asked).out)
    # As much as 2.5 of 8 train: 5 GFLOP, 20 s. Looks of 0.1 s: 8, 4 and 2 members where some are stopped (the half is
    # due besides), 1 at the end; and 0.8 s for the last look and the reported splits of who is left.
    assert pack[-3:-1] == ["5.0 GFLOP", "22 s"]


@pytest.mark.usefixtures("in_tmp")
def test_packs_are_those_of_the_workers_and_gpus_work_at_the_same_time(
    monkeypatch: pytest.MonkeyPatch, rehearsed: list[str]
) -> None:
    asked = toy_run("adapter.rank=1", "seed=0,1,2,3", "dry_run=true")
    (*_, whole) = rows(lora_bench("train", "-m", *asked, "pack.workers=2").out)
    assert (whole[1], whole[-2]) == ("4 jobs in 2 packs", "36 s")  # on one CPU
    monkeypatch.setattr(workers.Workers, "of", lambda jobs: workers.Workers(2, ["0", "1"]))
    (*_, whole) = rows(lora_bench("train", "-m", *asked).out)
    assert (whole[1], whole[-2]) == ("4 jobs in 2 packs", "18 s")


def test_a_sweep_as_it_is(in_tmp: Path) -> None:
    answer = lora_bench("train", "-m", *toy_run("adapter=lora,full", "dry_run=true"))
    assert answer.code == 0, answer
    assert [cells[0] for cells in rows(answer.out)] == ["0", "1", "all"]
    assert "rehearsing job 0\n" in answer.out
    assert not any(in_tmp.iterdir())


@pytest.mark.usefixtures("in_tmp")
def test_a_job_that_cannot_be_is_refused_and_leaves_nothing() -> None:
    error = refused("train", "-m", *toy_run("adapter.target_modules=nothing", "adapter.rank=1,2", "dry_run=true"))
    assert error.code == Code.NO_MATCH
    assert "2 of 2" in str(error)


def test_packs_are_those_of_the_sweep(monkeypatch: pytest.MonkeyPatch, in_tmp: Path, rehearsed: list[str]) -> None:
    packs_per_group: list[list[Any]] = []
    split = packing.split_into_packs

    def note(*given: Any) -> Any:
        packs_per_group.append(packs := split(*given))
        return packs

    monkeypatch.setattr(cost_estimate, "split_into_packs", note)
    assert lora_bench("train", "-m", *toy_run("seed=0,1,2", "pack.size=2", "dry_run=true")).code == 0
    assert [[len(pack) for pack in packs] for packs in packs_per_group] == [[2, 1]]
