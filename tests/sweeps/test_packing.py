"""A sweep's jobs in packs: each as it would be alone, whatever becomes of the others."""

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
from lora_bench.training import prefix_cache
from lora_bench.training.checkpoint import Checkpoints
from tests.command_line import lora_bench, refused, toy_run

if TYPE_CHECKING:
    from lora_bench.adapters.base import Update

ASKED = toy_run("trainer.max_steps=6", "trainer.eval_every=3", "data.train_rows=80")
RATE, SWEEP = "optimizer.lr=1e-2", "hydra.sweep.dir=sweep"


def record(folder: str) -> dict[str, Any]:
    return json.loads(Path(folder, "run.json").read_text())  # type: ignore[no-any-return]


def scores(folder: str) -> list[float]:
    return pq.read_table(f"{folder}/predictions/validation.parquet")["score"].to_pylist()  # type: ignore[no-any-return]


def assert_same(one: str, other: str, tolerance: float) -> None:
    assert scores(one) == pytest.approx(scores(other), abs=tolerance)
    assert record(one)["metrics"] == pytest.approx(record(other)["metrics"], abs=tolerance)
    assert record(one)["selection"] == pytest.approx(record(other)["selection"], abs=tolerance)
    assert record(one)["params"] == record(other)["params"]
    assert record(one)["cost"]["train_flops"] == record(other)["cost"]["train_flops"]


@pytest.mark.usefixtures("in_tmp")
def test_members_of_unlike_method_rate_and_seed_are_what_they_would_be_alone() -> None:
    answer = lora_bench("train", "-m", *ASKED, SWEEP, "adapter=lora,dora,pissa", "seed=0,1", "optimizer.lr=1e-3,1e-2")
    assert answer.code == 0, answer
    assert "12 jobs on one tiny_bert" in answer.out
    for number, method, seed, rate in ((0, "lora", 0, "1e-3"), (7, "dora", 1, "1e-2"), (10, "pissa", 1, "1e-3")):
        chosen = [f"adapter={method}", f"seed={seed}", f"optimizer.lr={rate}"]
        assert lora_bench("train", *ASKED, *chosen, f"hydra.run.dir=lone{number}").code == 0
        assert record(f"sweep/{number}")["config"] == record(f"lone{number}")["config"]
        assert_same(f"sweep/{number}", f"lone{number}", 1e-4)
        cost = record(f"sweep/{number}")["cost"]
        assert (cost["pack_size"], cost["train_seconds"], cost["peak_memory_bytes"]) == (12, None, None)


@pytest.mark.usefixtures("in_tmp")
def test_one_that_raises_and_one_that_diverges_change_nothing_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lora_bench("train", "-m", *ASKED, RATE, "hydra.sweep.dir=whole", "adapter.rank=2,3,4,5").code == 0

    def break_some(self: LoRA, updates: dict[str, Update], step: int, steps: int) -> None:
        if self.rank == 3 and step == 2:
            raise RuntimeError("a cable")
        if self.rank == 4 and step == 2:
            next(iter(updates.values())).lora_B.data.fill_(math.nan)

    monkeypatch.setattr(LoRA, "after_step", break_some)
    answer = lora_bench("train", "-m", *ASKED, RATE, SWEEP, "adapter.rank=2,3,4,5")
    assert (answer.code, answer.error) == (1, None)
    assert "2 of 4" in answer.err
    assert [record(f"sweep/{k}")["status"] for k in range(4)] == ["done", "failed", "diverged", "done"]
    assert "a cable" in record("sweep/1")["error"]
    assert "a cable" in Path("sweep/1/run.log").read_text()
    assert re.search(r"job 1\b.* a cable", answer.out)
    assert re.search(r"job 2\b.* step 3\b.* nan\b", answer.out)
    for k in (0, 3):
        assert_same(f"sweep/{k}", f"whole/{k}", 1e-5)


@pytest.mark.usefixtures("in_tmp")
def test_one_whose_record_cannot_be_begun_has_failed_and_the_others_train(monkeypatch: pytest.MonkeyPatch) -> None:
    update = Run.update

    def unwritable(run: Run, **sections: Any) -> None:
        if run.record["config"]["seed"] == 1 and "environment" in sections:
            raise RuntimeError("a cable")
        update(run, **sections)

    monkeypatch.setattr(Run, "update", unwritable)
    assert lora_bench("train", "-m", *ASKED, SWEEP, "seed=0,1,2").code == 1
    assert [record(f"sweep/{k}")["status"] for k in range(3)] == ["done", "failed", "done"]
    assert "a cable" in record("sweep/1")["error"]


@pytest.mark.usefixtures("in_tmp")
def test_what_cannot_be_packed_runs_alone_and_says_why() -> None:
    answer = lora_bench("train", "-m", *ASKED, SWEEP, "adapter=lora,full,rslora,head_only")
    assert answer.code == 0, answer
    assert re.search(r"job 1\b.* full\b", answer.out)
    assert [record(f"sweep/{k}")["cost"]["pack_size"] for k in range(4)] == [2, 1, 2, 1]


@pytest.mark.usefixtures("in_tmp")
def test_on_a_cpu_jobs_go_together_where_they_share_layers_or_it_is_asked_for() -> None:
    unasked = [text for text in ASKED if not text.startswith("pack.")]
    answer = lora_bench("train", "-m", *unasked, SWEEP, "adapter.layers=all,top:1", "seed=0,1")
    assert answer.code == 0, answer
    costs = [record(f"sweep/{k}")["cost"] for k in range(4)]
    assert [cost["pack_size"] for cost in costs] == [1, 1, 2, 2]
    assert [cost["train_seconds"] is None for cost in costs] == [False, False, True, True]
    answer = lora_bench("train", "-m", *unasked, "hydra.sweep.dir=asked", "seed=0,1", "pack.size=3")
    assert answer.code == 0, answer
    assert [record(f"asked/{k}")["cost"]["pack_size"] for k in range(2)] == [2, 2]
    assert_same("asked/0", "sweep/0", 1e-4)
    answer = lora_bench("train", "-m", *unasked, "hydra.sweep.dir=halved", "seed=0,1", "pack.halving=true")
    assert answer.code == 0, answer
    assert sorted(record(f"halved/{k}")["status"] for k in range(2)) == ["done", "eliminated"]


@pytest.mark.usefixtures("in_tmp")
def test_what_lies_below_the_adapted_layers_is_made_once_for_the_whole_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_BENCH_CACHE", "cache")  # of its own: other tests leave the same prefix in the common one
    made = []
    fill = prefix_cache._fill
    monkeypatch.setattr(prefix_cache, "_fill", lambda *arguments: made.append(fill(*arguments)))
    top, never = "adapter.layers=top:1", "trainer.prefix_cache_bytes=0"
    answer = lora_bench("train", "-m", *ASKED, SWEEP, RATE, top, "adapter.rank=2,3", "pack.size=1")
    assert (answer.code, len(made)) == (0, 2)  # training and selection split
    assert lora_bench("train", *ASKED, RATE, top, never, "adapter.rank=3", "hydra.run.dir=lone").code == 0
    cost, without = record("sweep/1")["cost"], record("lone")["cost"]
    assert scores("sweep/1") == pytest.approx(scores("lone"), abs=1e-4)
    assert (without["prefix_fill_flops"], without["prefix_fill_seconds"]) == (None, None)
    assert cost["prefix_fill_flops"] == record("sweep/0")["cost"]["prefix_fill_flops"]
    assert 0 < cost["prefix_fill_flops"] < cost["train_flops"] < without["train_flops"]


@pytest.mark.usefixtures("in_tmp")
def test_halving_leaves_one_and_who_was_stopped_can_be_gone_on_with() -> None:
    asked = toy_run("trainer.max_steps=8", "trainer.eval_every=2", "data.train_rows=80")
    ranks = ["adapter.rank=1,2,3,4"]
    answer = lora_bench("train", "-m", *asked, SWEEP, RATE, *ranks, "pack.halving=true")
    assert (answer.code, answer.err) == (0, "")
    assert "are missing" not in answer.out
    found = [record(f"sweep/{k}") for k in range(4)]
    assert sorted((each["status"], each["cost"]["steps"]) for each in found) == [
        ("done", 8),
        ("eliminated", 2),
        ("eliminated", 2),
        ("eliminated", 4),
    ]
    winner = [each["status"] for each in found].index("done")
    loser, older = (k for k in range(4) if found[k]["status"] == "eliminated" and found[k]["cost"]["steps"] == 2)
    assert not found[loser]["metrics"]
    assert re.search(rf"job {loser}\b.* pack\.halving at step \d", answer.out)
    missing = summarise([Path("sweep")]).missing
    assert {(run.status, "pack.halving at step" in run.reason) for run in missing} == {("eliminated", True)}
    found[older]["status"] = "interrupted"  # as version 0.1 recorded it
    Path(f"sweep/{older}/run.json").write_text(json.dumps(found[older]))
    assert lora_bench("train", "-m", "resume=sweep").code == 0  # no job is left to run
    assert [record(f"sweep/{k}")["status"] for k in (loser, older)] == ["eliminated", "interrupted"]
    for k in (loser, older):
        assert lora_bench("train", f"resume=sweep/{k}").code == 0
    assert lora_bench("train", "-m", *asked, "hydra.sweep.dir=whole", RATE, *ranks).code == 0
    for k in (winner, loser, older):
        assert_same(f"sweep/{k}", f"whole/{k}", 1e-4)


@pytest.mark.usefixtures("in_tmp")
def test_halving_says_what_it_does_not_stop() -> None:
    halving = "pack.halving=true"
    answer = lora_bench("train", "-m", *ASKED, SWEEP, halving, "pack.size=2", "adapter=lora,full", "seed=0,1,2")
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
def test_what_a_sweep_lacks_is_one_pack_whatever_lies_between() -> None:
    assert lora_bench("train", "-m", *ASKED, SWEEP, "seed=range(5)").code == 0
    for k in (0, 2, 4):
        shutil.rmtree(f"sweep/{k}")
    assert lora_bench("train", "-m", "resume=sweep").code == 0
    found = [record(f"sweep/{k}") for k in range(5)]
    assert [each["cost"]["pack_size"] for each in found] == [3, 5, 3, 5, 3]
    assert [each["config"]["seed"] for each in found] == [0, 1, 2, 3, 4]


@pytest.mark.usefixtures("in_tmp")
def test_a_kill_between_two_checkpoints_leaves_one_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    save, calls = Checkpoints.save, iter(range(9))

    def killed(*arguments: Any) -> None:
        if next(calls) == 4:
            raise KeyboardInterrupt
        save(*arguments)

    monkeypatch.setattr(Checkpoints, "save", killed)
    asked = toy_run("trainer.max_steps=6", "trainer.checkpoint_every=2", "data.train_rows=80")
    assert lora_bench("train", "-m", *asked, SWEEP, "seed=0,1,2").code == 130
    monkeypatch.setattr(Checkpoints, "save", save)
    steps = [max(path.name[-1] for path in Path(f"sweep/{k}/checkpoints").iterdir()) for k in range(3)]
    assert steps == ["4", "2", "2"]
    answer = lora_bench("train", "-m", "resume=sweep")
    assert answer.code == 0, answer
    assert "3 jobs on one tiny_bert" in answer.out
    assert "resumed from step 2\n" in answer.out
    assert [record(f"sweep/{k}")["cost"]["steps"] for k in range(3)] == [6, 6, 6]


@pytest.mark.usefixtures("in_tmp")
def test_packs_are_as_large_as_asked_for() -> None:
    assert lora_bench("train", "-m", *ASKED, SWEEP, "seed=0,1,2", "pack.size=2").code == 0
    assert [record(f"sweep/{k}")["cost"]["pack_size"] for k in range(3)] == [2, 2, 1]


@pytest.mark.usefixtures("in_tmp")
def test_a_bound_too_small_for_one_job_is_refused() -> None:
    answer = lora_bench("train", "-m", *ASKED, SWEEP, "seed=0,1", "pack.memory_bytes=1000")
    assert answer.code == 2
    assert answer.error is not None
    assert answer.error.code == Code.OUT_OF_MEMORY
    assert re.search(r"job 0\b.* pack\.memory_bytes=1000\b.* \d+ MB", answer.out)


@pytest.mark.usefixtures("in_tmp")
def test_jobs_that_are_the_same_run_are_refused() -> None:
    error = refused("train", "-m", *ASKED, SWEEP, "adapter.rank=2,2")
    assert (error.code, error.key) == (Code.CONFLICT, "sweep")
    assert "adapter.rank=2" in str(error)
