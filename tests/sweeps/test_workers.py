"""Packs in processes of their own: each run is what it would be, and what becomes of a process is told.

Every test here starts two processes that load torch: that is what they are about, and what they take.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_bench.records import folder_lock
from lora_bench.records.settings import Settings
from lora_bench.run.settings import Experiment
from lora_bench.sweeps import packing, workers
from lora_bench.sweeps.packing import Group
from lora_bench.sweeps.workers import Workers
from tests.command_line import lora_bench, toy_run
from tests.helpers import composed

SWEEP = toy_run("trainer.max_steps=4", "trainer.checkpoint_every=2", "hydra.sweep.dir=sweep", "pack.workers=2")
LONG = toy_run("trainer.max_steps=1000", "trainer.epochs=1000", "trainer.eval_every=1000", *SWEEP[-2:])
"""It tells of every hundredth step."""


def record(folder: str) -> dict[str, Any]:
    return json.loads(Path(folder, "run.json").read_text())  # type: ignore[no-any-return]


def statuses() -> dict[str, str]:
    return {path.parent.name: record(str(path.parent))["status"] for path in sorted(Path("sweep").glob("*/run.json"))}


def at_first_step(monkeypatch: pytest.MonkeyPatch, worker: int, action: Any) -> None:
    """Do something when this worker first tells of a step."""
    say = workers._Worker._say

    def saying(self: workers._Worker, text: str) -> None:
        say(self, text)
        if self.number == worker and text.startswith("step "):
            action(self)

    monkeypatch.setattr(workers._Worker, "_say", saying)


@pytest.mark.usefixtures("in_tmp")
def test_runs_are_what_they_are_in_one_process() -> None:
    asked = [*SWEEP, "optimizer.warmup=0", "optimizer.lr=1e-3,1e30,2e-3"]
    answer = lora_bench("train", "-m", *asked)
    assert answer.code == 1, answer
    assert "1 of 3 jobs" in answer.err
    assert "worker 0: 2 jobs on one tiny_bert" in answer.out
    assert "worker 1: lora on tiny_bert" in answer.out
    assert answer.out.count("job 1 failed: step") == 1
    assert lora_bench("train", "-m", *asked, "hydra.sweep.dir=whole", "pack.workers=1").code == 1
    assert statuses() == {"0": "done", "1": "diverged", "2": "done"}
    for k in range(3):
        one, other = record(f"sweep/{k}"), record(f"whole/{k}")
        assert one["metrics"] == pytest.approx(other["metrics"], abs=1e-5)
        assert one["error"] == other["error"]
        assert one["cost"]["train_flops"] == other["cost"]["train_flops"]
        assert (one["cost"]["pack_size"], other["cost"]["pack_size"]) == ((2, 1)[k == 0], 3)
        assert one["environment"]["threads"] == max(1, torch.get_num_threads() // 2)
        assert one["cost"]["train_seconds"] is None  # the other process was on the same device
    assert Path("sweep/table.md").exists()


@pytest.mark.usefixtures("in_tmp")
def test_a_killed_process_is_told_and_its_jobs_go_on_with_the_sweep() -> None:
    with pytest.MonkeyPatch.context() as patch:
        at_first_step(patch, 0, lambda worker: worker.process.kill())
        answer = lora_bench("train", "-m", *SWEEP, "seed=0,1,2")
    assert answer.code == 1, answer
    assert "2 of 3 jobs" in answer.err
    assert [number for number in range(3) if re.search(f"job {number} failed: .* -9", answer.out)] == [1, 2]
    assert "2 of 3 jobs" in answer.out
    assert statuses() == {"0": "done", "1": "running", "2": "running"}
    assert lora_bench("train", "-m", "resume=sweep").code == 0
    assert statuses() == {"0": "done", "1": "done", "2": "done"}


@pytest.mark.usefixtures("in_tmp")
def test_ctrl_c_lets_each_leave_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(worker: workers._Worker) -> None:
        raise KeyboardInterrupt

    at_first_step(monkeypatch, 0, interrupt)
    answer = lora_bench("train", "-m", *LONG, "seed=0,1,2,3")
    assert (answer.code, answer.err.count("\n")) == (130, 1), answer
    begun = statuses()
    assert set(begun.values()) == {"interrupted"}
    assert begun.keys() >= {"0", "1"}
    assert any(Path("sweep/0/checkpoints").iterdir())
    assert "lora-bench train -m resume=sweep" in answer.out


KILLED = """
import os, signal, sys
from lora_bench.sweeps import workers
from lora_bench.cli import main

def say(self, text):
    if text.startswith("step "):
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    workers._Worker._say = say
    main(sys.argv[1:])
"""
"""A command that is killed outright when one of its workers first tells of a step."""


@pytest.mark.usefixtures("in_tmp")
def test_no_process_outlives_a_killed_sweep() -> None:
    Path("killed.py").write_text(KILLED)
    command = [sys.executable, "killed.py", "train", "-m", *LONG, "seed=0,1"]
    killed = subprocess.run(command, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while any(folder_lock.is_locked(folder) for folder in Path("sweep").iterdir()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(folder_lock.is_locked(folder) for folder in Path("sweep").iterdir())
    assert set(statuses().values()) == {"running"}  # killed, that is


@pytest.mark.parametrize(
    ("asked", "visible", "found", "expected"),
    [
        ([], None, 0, (1, [None], 1)),
        (["pack.workers=3"], None, 0, (3, [None, None, None], 3)),
        ([], None, 2, (2, ["0", "1"], 1)),
        ([], "3,5", 2, (2, ["3", "5"], 1)),
        (["pack.workers=3"], "3,5", 2, (3, ["3", "5", "3"], 2)),
        (["trainer.device=cpu"], None, 2, (1, [None], 1)),
    ],
)
def test_each_worker_has_a_gpu_while_there_are_any(
    monkeypatch: pytest.MonkeyPatch,
    asked: list[str],
    visible: str | None,
    found: int,
    expected: tuple[int, list[str | None], int],
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    job: Any = SimpleNamespace(settings=Settings.build(composed("data=toy", *asked)))
    made = Workers.of([job])
    assert (made.count, [made.gpu_of(i) for i in range(made.count)], made.sharing) == expected


def test_a_group_is_cut_evenly_but_not_where_its_jobs_are_compared() -> None:
    jobs: list[Any] = list(range(10))
    for halving, most, sizes in (("false", 4, [3, 3, 4]), ("false", 10, [10]), ("true", 4, [10])):
        experiments = [Experiment.build(composed("data=toy", f"pack.halving={halving}"))] * 10
        cut = workers.split_group(Group(jobs, experiments), most)
        assert [len(part.jobs) for part in cut] == [len(part.experiments) for part in cut] == sizes
        assert [job for part in cut for job in part.jobs] == jobs


def test_several_on_one_device_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        packing,
        "memory_demand",
        lambda common, experiment: packing.MemoryDemand(persistent_bytes=10.0, step_bytes=0.0, depth=0),
    )
    monkeypatch.setattr(packing, "free_bytes", lambda device: 80.0 / packing.SHARE_OF_FREE)
    on_cpu: Any = SimpleNamespace(backbone=SimpleNamespace(device=torch.device("cpu")))
    jobs: list[Any] = list(range(8))
    group = Group(jobs, [Experiment.build(composed("data=toy", "pack.size=8"))] * 8)
    for sharing, sizes in ((1, [8]), (2, [4, 4])):
        assert [len(pack) for pack in packing.split_into_packs(group, on_cpu, print, sharing)] == sizes
