"""Jobs of a sweep in packs: each equals a single run, also if other jobs fail, diverge or are eliminated."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import pytest

from lora_bench.adapters.methods.lora import LoRA
from lora_bench.analysis.summary import summarise
from lora_bench.errors import Code
from lora_bench.records.run_folder import Run
from lora_bench.sweeps import packing
from lora_bench.training import prefix_cache
from lora_bench.training.checkpoint import Checkpoints
from tests.command_line import lora_bench, refused, toy_run

if TYPE_CHECKING:
    from lora_bench.adapters.base import Update

OVERRIDES = toy_run("trainer.max_steps=6", "trainer.eval_every=3", "data.train_rows=80")
RATE, SWEEP = "optimizer.lr=1e-2", "hydra.sweep.dir=sweep"


def record(folder: str) -> dict[str, Any]:
    return json.loads(Path(folder, "run.json").read_text())  # type: ignore[no-any-return]


def scores(folder: str) -> list[float]:
    return pq.read_table(f"{folder}/predictions/validation.parquet")["score"].to_pylist()  # type: ignore[no-any-return]


def assert_equal_runs(one: str, other: str, tolerance: float) -> None:
    assert scores(one) == pytest.approx(scores(other), abs=tolerance)
    assert record(one)["metrics"] == pytest.approx(record(other)["metrics"], abs=tolerance)
    assert record(one)["selection"] == pytest.approx(record(other)["selection"], abs=tolerance)
    assert record(one)["params"] == record(other)["params"]
    assert record(one)["cost"]["train_flops"] == record(other)["cost"]["train_flops"]


@pytest.mark.usefixtures("in_tmp")
def test_members_with_different_methods_learning_rates_and_seeds_equal_single_runs() -> None:
    answer = lora_bench(
        "train", "-m", *OVERRIDES, SWEEP, "adapter=lora,dora,pissa", "seed=0,1", "optimizer.lr=1e-3,1e-2"
    )
    assert answer.code == 0, answer
    assert "12 jobs on one tiny_bert" in answer.out
    for number, method, seed, rate in ((0, "lora", 0, "1e-3"), (7, "dora", 1, "1e-2"), (10, "pissa", 1, "1e-3")):
        job_overrides = [f"adapter={method}", f"seed={seed}", f"optimizer.lr={rate}"]
        assert lora_bench("train", *OVERRIDES, *job_overrides, f"hydra.run.dir=single{number}").code == 0
        assert record(f"sweep/{number}")["config"] == record(f"single{number}")["config"]
        assert_equal_runs(f"sweep/{number}", f"single{number}", 1e-4)
        cost = record(f"sweep/{number}")["cost"]
        assert (cost["pack_size"], cost["train_seconds"], cost["peak_memory_bytes"]) == (12, None, None)


@pytest.mark.usefixtures("in_tmp")
def test_failed_and_diverged_members_do_not_change_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lora_bench("train", "-m", *OVERRIDES, RATE, "hydra.sweep.dir=whole", "adapter.rank=2,3,4,5").code == 0

    def fail_or_diverge(self: LoRA, updates: dict[str, Update], step: int, steps: int) -> None:
        if self.rank == 3 and step == 2:
            raise RuntimeError("a test error")
        if self.rank == 4 and step == 2:
            next(iter(updates.values())).lora_B.data.fill_(math.nan)

    monkeypatch.setattr(LoRA, "after_step", fail_or_diverge)
    answer = lora_bench("train", "-m", *OVERRIDES, RATE, SWEEP, "adapter.rank=2,3,4,5")
    assert (answer.code, answer.error) == (1, None)
    assert "2 of 4" in answer.err
    assert [record(f"sweep/{k}")["status"] for k in range(4)] == ["done", "failed", "diverged", "done"]
    assert "a test error" in record("sweep/1")["error"]
    assert "a test error" in Path("sweep/1/run.log").read_text()
    assert re.search(r"job 1\b.* a test error", answer.out)
    assert re.search(r"job 2\b.* step 3\b.* nan\b", answer.out)
    for k in (0, 3):
        assert_equal_runs(f"sweep/{k}", f"whole/{k}", 1e-5)


@pytest.mark.usefixtures("in_tmp")
def test_a_job_whose_record_cannot_be_written_fails_and_the_others_train(monkeypatch: pytest.MonkeyPatch) -> None:
    update = Run.update

    def fail_for_seed_1(run: Run, **sections: Any) -> None:
        if run.record["config"]["seed"] == 1 and "environment" in sections:
            raise RuntimeError("a test error")
        update(run, **sections)

    monkeypatch.setattr(Run, "update", fail_for_seed_1)
    assert lora_bench("train", "-m", *OVERRIDES, SWEEP, "seed=0,1,2").code == 1
    assert [record(f"sweep/{k}")["status"] for k in range(3)] == ["done", "failed", "done"]
    assert "a test error" in record("sweep/1")["error"]


@pytest.mark.usefixtures("in_tmp")
def test_a_job_that_cannot_be_packed_runs_alone_with_a_reason() -> None:
    answer = lora_bench("train", "-m", *OVERRIDES, SWEEP, "adapter=lora,full,rslora,head_only")
    assert answer.code == 0, answer
    assert re.search(r"job 1\b.* full\b", answer.out)
    assert [record(f"sweep/{k}")["cost"]["pack_size"] for k in range(4)] == [2, 1, 2, 1]


@pytest.mark.usefixtures("in_tmp")
def test_on_a_cpu_a_pack_is_one_group_unless_jobs_share_layers_or_it_is_configured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packing, "cpu_group_size", lambda backbone, members: min(2, members))
    overrides = [text for text in OVERRIDES if not text.startswith("pack.")]
    answer = lora_bench("train", "-m", *overrides, SWEEP, "adapter.layers=all,top:1", "seed=0,1,2")
    assert answer.code == 0, answer
    costs = [record(f"sweep/{k}")["cost"] for k in range(6)]
    assert [cost["pack_size"] for cost in costs] == [2, 2, 1, 3, 3, 3]
    assert [cost["train_seconds"] is None for cost in costs] == [True, True, False, True, True, True]
    answer = lora_bench("train", "-m", *overrides, "hydra.sweep.dir=configured", "seed=0,1,2", "pack.size=3")
    assert answer.code == 0, answer
    assert [record(f"configured/{k}")["cost"]["pack_size"] for k in range(3)] == [3, 3, 3]
    for k in range(3):
        assert_equal_runs(f"configured/{k}", f"sweep/{k}", 1e-4)
    answer = lora_bench("train", "-m", *overrides, "hydra.sweep.dir=halved", "seed=0,1", "pack.halving=true")
    assert answer.code == 0, answer
    assert sorted(record(f"halved/{k}")["status"] for k in range(2)) == ["done", "eliminated"]


@pytest.mark.usefixtures("in_tmp")
def test_the_prefix_is_computed_once_for_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_BENCH_CACHE", "cache")  # other tests write the same prefix into the shared cache
    fills = []
    fill = prefix_cache._fill
    monkeypatch.setattr(prefix_cache, "_fill", lambda *arguments: fills.append(fill(*arguments)))
    top, uncached = "adapter.layers=top:1", "trainer.prefix_cache_bytes=0"
    answer = lora_bench("train", "-m", *OVERRIDES, SWEEP, RATE, top, "adapter.rank=2,3", "pack.size=1")
    assert (answer.code, len(fills)) == (0, 2)  # training and selection split
    assert lora_bench("train", *OVERRIDES, RATE, top, uncached, "adapter.rank=3", "hydra.run.dir=single").code == 0
    cost, without = record("sweep/1")["cost"], record("single")["cost"]
    assert scores("sweep/1") == pytest.approx(scores("single"), abs=1e-4)
    assert (without["prefix_fill_flops"], without["prefix_fill_seconds"]) == (None, None)
    assert cost["prefix_fill_flops"] == record("sweep/0")["cost"]["prefix_fill_flops"]
    assert 0 < cost["prefix_fill_flops"] < cost["train_flops"] < without["train_flops"]


@pytest.mark.usefixtures("in_tmp")
def test_halving_completes_one_job_and_eliminated_ones_can_be_resumed() -> None:
    overrides = toy_run("trainer.max_steps=8", "trainer.eval_every=2", "data.train_rows=80")
    ranks = ["adapter.rank=1,2,3,4"]
    answer = lora_bench("train", "-m", *overrides, SWEEP, RATE, *ranks, "pack.halving=true")
    assert (answer.code, answer.err) == (0, "")
    assert "are missing" not in answer.out
    records = [record(f"sweep/{k}") for k in range(4)]
    assert sorted((run["status"], run["cost"]["steps"]) for run in records) == [
        ("done", 8),
        ("eliminated", 2),
        ("eliminated", 2),
        ("eliminated", 4),
    ]
    winner = [run["status"] for run in records].index("done")
    eliminated, older = (
        k for k in range(4) if records[k]["status"] == "eliminated" and records[k]["cost"]["steps"] == 2
    )
    assert not records[eliminated]["metrics"]
    assert re.search(rf"job {eliminated}\b.* pack\.halving at step \d", answer.out)
    missing = summarise([Path("sweep")]).missing
    assert {(run.status, "pack.halving at step" in run.reason) for run in missing} == {("eliminated", True)}
    records[older]["status"] = "interrupted"  # as version 0.1 recorded it
    Path(f"sweep/{older}/run.json").write_text(json.dumps(records[older]))
    assert lora_bench("train", "-m", "resume=sweep").code == 0  # no job is left to run
    assert [record(f"sweep/{k}")["status"] for k in (eliminated, older)] == ["eliminated", "interrupted"]
    for k in (eliminated, older):
        assert lora_bench("train", f"resume=sweep/{k}").code == 0
    assert lora_bench("train", "-m", *overrides, "hydra.sweep.dir=whole", RATE, *ranks).code == 0
    for k in (winner, eliminated, older):
        assert_equal_runs(f"sweep/{k}", f"whole/{k}", 1e-4)


@pytest.mark.usefixtures("in_tmp")
def test_halving_notes_the_jobs_that_it_cannot_eliminate() -> None:
    halving = "pack.halving=true"
    answer = lora_bench("train", "-m", *OVERRIDES, SWEEP, halving, "pack.size=2", "adapter=lora,full", "seed=0,1,2")
    assert answer.code == 0, answer
    assert re.search(r"job 3\b.* full\b.* pack\.halving\b", answer.out)
    assert re.search(r"note: pack\.halving\b.* 2\b", answer.out)
    statuses = [record(f"sweep/{k}")["status"] for k in range(6)]
    assert sorted(statuses[:2]) == ["done", "eliminated"]
    assert statuses[2:] == ["done"] * 4
    error = refused("train", "-m", *toy_run(SWEEP, halving, "pack.size=1"), "seed=0,1")
    assert (error.code, error.key, error.value) == (Code.CONFLICT, "pack.halving", "true")
    assert "pack.size=1" in str(error)


@pytest.mark.usefixtures("in_tmp")
def test_unfinished_jobs_are_one_pack_also_if_they_are_not_consecutive() -> None:
    assert lora_bench("train", "-m", *OVERRIDES, SWEEP, "seed=range(5)").code == 0
    for k in (0, 2, 4):
        shutil.rmtree(f"sweep/{k}")
    assert lora_bench("train", "-m", "resume=sweep").code == 0
    records = [record(f"sweep/{k}") for k in range(5)]
    assert [run["cost"]["pack_size"] for run in records] == [3, 5, 3, 5, 3]
    assert [run["config"]["seed"] for run in records] == [0, 1, 2, 3, 4]


@pytest.mark.usefixtures("in_tmp")
def test_jobs_with_different_last_checkpoints_are_resumed_as_one_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    save, calls = Checkpoints.save, iter(range(9))

    def interrupted(*arguments: Any) -> None:
        if next(calls) == 4:
            raise KeyboardInterrupt
        save(*arguments)

    monkeypatch.setattr(Checkpoints, "save", interrupted)
    overrides = toy_run("trainer.max_steps=6", "trainer.checkpoint_every=2", "data.train_rows=80")
    assert lora_bench("train", "-m", *overrides, SWEEP, "seed=0,1,2").code == 130
    monkeypatch.setattr(Checkpoints, "save", save)
    steps = [max(path.name[-1] for path in Path(f"sweep/{k}/checkpoints").iterdir()) for k in range(3)]
    assert steps == ["4", "2", "2"]
    answer = lora_bench("train", "-m", "resume=sweep")
    assert answer.code == 0, answer
    assert "3 jobs on one tiny_bert" in answer.out
    assert "resumed from step 2\n" in answer.out
    assert [record(f"sweep/{k}")["cost"]["steps"] for k in range(3)] == [6, 6, 6]


@pytest.mark.usefixtures("in_tmp")
def test_packs_have_the_configured_size() -> None:
    assert lora_bench("train", "-m", *OVERRIDES, SWEEP, "seed=0,1,2", "pack.size=2").code == 0
    assert [record(f"sweep/{k}")["cost"]["pack_size"] for k in range(3)] == [2, 2, 1]


@pytest.mark.usefixtures("in_tmp")
def test_a_memory_limit_too_small_for_one_job_is_refused() -> None:
    answer = lora_bench("train", "-m", *OVERRIDES, SWEEP, "seed=0,1", "pack.memory_bytes=1000")
    assert answer.code == 2
    assert answer.error is not None
    assert answer.error.code == Code.OUT_OF_MEMORY
    assert re.search(r"job 0\b.* pack\.memory_bytes=1000\b.* \d+ MB", answer.out)


@pytest.mark.usefixtures("in_tmp")
def test_equal_jobs_are_refused() -> None:
    error = refused("train", "-m", *OVERRIDES, SWEEP, "adapter.rank=2,2")
    assert (error.code, error.key) == (Code.CONFLICT, "sweep")
    assert "adapter.rank=2" in str(error)
