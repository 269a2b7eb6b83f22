"""`dry_run=true` of a sweep: a row for each pack and the total, and no files."""

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

SINGLE_RUN = Estimate(
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
    """Method and rank of every rehearsed run; its estimate is that of `SINGLE_RUN` times the rank."""
    runs = []

    def estimate_run(experiment: Experiment, inputs: SharedInputs | None = None) -> Estimate:
        rank = getattr(experiment.adapter, "rank", 1)
        runs.append(f"{experiment.adapter.method} {rank}")
        return replace(
            SINGLE_RUN, train_flops=rank * SINGLE_RUN.train_flops, train_seconds=rank * SINGLE_RUN.train_seconds
        )

    monkeypatch.setattr(cost_estimate, "estimate_run", estimate_run)
    return runs


def rows(out: str) -> list[list[str]]:
    """Return the cells of the table without its header."""
    lines = [re.split(r" {2,}", line.strip()) for line in out[out.index("computation") :].splitlines()[1:]]
    return [cells for cells in lines if len(cells) > 3]


def test_table_has_a_row_for_each_pack_and_the_total(
    in_tmp: Path, rehearsed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        cost_estimate,
        "memory_demand",
        lambda inputs, experiment: MemoryDemand(persistent_bytes=1e8, step_bytes=1e9, depth=0),
    )
    monkeypatch.setattr(packing, "cpu_group_size", lambda backbone, members: min(2, members))
    overrides = toy_run("adapter=lora", "adapter.rank=1,2", "seed=0,1", "dry_run=true")
    answer = lora_bench("train", "-m", *overrides)
    assert (answer.code, answer.err) == (0, ""), answer
    assert rehearsed == ["lora 1", "lora 2"]  # the cost does not depend on the seed
    pack, total = rows(answer.out)
    assert pack[:2] == ["0 to 3", "adapter.rank=1 seed=0 …"]  # the last job is on the next line
    assert "adapter.rank=2 seed=1" in answer.out
    # 2 x (1 + 2) times 2 GFLOP and 8 s, 4 evaluations of 1 s; the memory of a step of two members, and of four members
    assert pack[-4:] == ["4.0 k", "12 GFLOP", "52 s", "1.8 GB"]
    assert total == ["all", "4 jobs in 1 pack", "4.0 k", "12 GFLOP", "52 s", "1.8 GB"]
    assert not any(in_tmp.iterdir())


@pytest.mark.usefixtures("in_tmp")
def test_a_job_that_cannot_be_packed_has_a_row(rehearsed: list[str]) -> None:
    answer = lora_bench("train", "-m", *toy_run("adapter=lora,full,rslora", "dry_run=true"))
    assert answer.code == 0, answer
    assert rehearsed == ["lora 8", "lora 8", "full 1"]
    (first, second, total) = rows(answer.out)
    assert (first[0], second[0]) == ("0, 2", "1")
    assert total[1] == "3 jobs in 2 packs"


def test_frozen_layers_are_counted_once_for_members_with_the_same_seed() -> None:
    def experiments(*seeds: int) -> list[Experiment]:
        overrides = ["data=toy", "data.train_rows=40", "data.validation_rows=8", "trainer.precision=fp32"]
        return [Experiment.build(composed(*overrides, "adapter.layers=top:1", f"seed={seed}")) for seed in seeds]

    inputs = SharedInputs.load(experiments(0)[0])
    of_two, of_four = (cost_estimate._shared(experiments(*[0] * n), inputs) for n in (2, 4))
    # with p for the prefix and s for the suffix: two members save p / (2 (p + s)), four save 3 p / (4 (p + s))
    assert 0.1 < of_two < 0.5
    assert of_four == pytest.approx(1.5 * of_two)
    assert cost_estimate._shared(experiments(0, 1), inputs) == 0
    assert cost_estimate._shared(experiments(0), inputs) == 0


@pytest.mark.usefixtures("in_tmp")
def test_the_cached_prefix_is_computed_once_for_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    single = replace(SINGLE_RUN, prefix_flops=5e8, prefix_seconds=2.0)  # of 2 GFLOP and 8 s
    monkeypatch.setattr(cost_estimate, "estimate_run", lambda experiment, inputs: single)
    overrides = toy_run("adapter.layers=top:1", "adapter.rank=1,2,3,4", "pack.size=2", "dry_run=true")
    first, second, total = rows(lora_bench("train", "-m", *overrides).out)
    assert first[-3:-1] == ["3.5 GFLOP", "16 s"]  # 2 x 1.5 + 0.5; 2 x 6 + 2, and 2 evaluations of 1 s
    assert second[-3:-1] == ["3.0 GFLOP", "14 s"]
    assert total[-3:-1] == ["6.5 GFLOP", "30 s"]


@pytest.mark.usefixtures("in_tmp")
def test_steps_after_elimination_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    single = replace(
        SINGLE_RUN, steps=80, evaluations=2, seconds_per_evaluation=0.1
    )  # of 2 GFLOP, 8 s and 1 s of evaluation
    monkeypatch.setattr(cost_estimate, "estimate_run", lambda experiment, inputs: single)
    overrides = toy_run("adapter.rank=1,2,3,4,5,6,7,8", "pack.halving=true", "dry_run=true")
    pack, _ = rows(lora_bench("train", "-m", *overrides).out)
    # The training of 2.5 of 8 members: 5 GFLOP, 20 s. Evaluations of 0.1 s: 8, 4 and 2 members where halving eliminates
    # some (one at half of the steps is regular), 1 at the end; and 0.8 s for the reported splits of the last member.
    assert pack[-3:-1] == ["5.0 GFLOP", "22 s"]


@pytest.mark.usefixtures("in_tmp")
def test_packs_are_divided_among_workers_and_gpus_run_at_the_same_time(
    monkeypatch: pytest.MonkeyPatch, rehearsed: list[str]
) -> None:
    overrides = toy_run("adapter.rank=1", "seed=0,1,2,3", "dry_run=true")
    (*_, total) = rows(lora_bench("train", "-m", *overrides, "pack.workers=2").out)
    assert (total[1], total[-2]) == ("4 jobs in 2 packs", "36 s")  # on one CPU
    monkeypatch.setattr(workers.Workers, "of", lambda jobs: workers.Workers(2, ["0", "1"]))
    (*_, total) = rows(lora_bench("train", "-m", *overrides).out)
    assert (total[1], total[-2]) == ("4 jobs in 2 packs", "18 s")


def test_a_dry_run_without_replaced_estimates(in_tmp: Path) -> None:
    answer = lora_bench("train", "-m", *toy_run("adapter=lora,full", "dry_run=true"))
    assert answer.code == 0, answer
    assert [cells[0] for cells in rows(answer.out)] == ["0", "1", "all"]
    assert "rehearsing job 0\n" in answer.out
    assert not any(in_tmp.iterdir())


@pytest.mark.usefixtures("in_tmp")
def test_a_sweep_with_invalid_jobs_is_refused_without_files() -> None:
    error = refused("train", "-m", *toy_run("adapter.target_modules=nothing", "adapter.rank=1,2", "dry_run=true"))
    assert error.code == Code.NO_MATCH
    assert "2 of 2" in str(error)


def test_packs_equal_those_of_the_sweep(monkeypatch: pytest.MonkeyPatch, in_tmp: Path, rehearsed: list[str]) -> None:
    packs_per_group: list[list[Any]] = []
    split = packing.split_into_packs

    def record(*arguments: Any) -> Any:
        packs_per_group.append(packs := split(*arguments))
        return packs

    monkeypatch.setattr(cost_estimate, "split_into_packs", record)
    assert lora_bench("train", "-m", *toy_run("seed=0,1,2", "pack.size=2", "dry_run=true")).code == 0
    assert [[len(pack) for pack in packs] for packs in packs_per_group] == [[2, 1]]
