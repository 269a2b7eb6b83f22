"""Packs in worker processes: runs equal those of one process, and the end of a process is reported.

Most tests start two processes that import torch, which takes seconds.
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
"""Overrides of a training that reports every hundredth step."""


def record(folder: str) -> dict[str, Any]:
    return json.loads(Path(folder, "run.json").read_text())  # type: ignore[no-any-return]


def statuses() -> dict[str, str]:
    return {path.parent.name: record(str(path.parent))["status"] for path in sorted(Path("sweep").glob("*/run.json"))}


def at_first_step(monkeypatch: pytest.MonkeyPatch, worker: int, action: Any) -> None:
    """Call `action` with this worker when it first reports a step."""
    handle = workers._Worker._handle

    def handle_and_act(self: workers._Worker, message: str, *arguments: Any) -> None:
        handle(self, message, *arguments)
        if self.number == worker and message == "stepped":
            action(self)

    monkeypatch.setattr(workers._Worker, "_handle", handle_and_act)


@pytest.mark.usefixtures("in_tmp")
def test_runs_equal_those_of_one_process() -> None:
    overrides = [*SWEEP, "optimizer.warmup=0", "optimizer.lr=1e-3,1e30,2e-3"]
    answer = lora_bench("train", "-m", *overrides)
    assert answer.code == 1, answer
    assert "1 of 3 jobs" in answer.err
    assert "worker 0: 2 jobs on one tiny_bert" in answer.out
    assert re.search(r"^\d/3  job 2: optimizer\.lr=0\.002  mcc ", answer.out, re.MULTILINE)
    assert answer.out.count("job 1 failed: step") == 1
    assert lora_bench("train", "-m", *overrides, "hydra.sweep.dir=one_process", "pack.workers=1").code == 1
    assert statuses() == {"0": "done", "1": "diverged", "2": "done"}
    for k in range(3):
        run, expected = record(f"sweep/{k}"), record(f"one_process/{k}")
        assert run["metrics"] == pytest.approx(expected["metrics"], abs=1e-5)
        assert run["error"] == expected["error"]
        assert run["cost"]["train_flops"] == expected["cost"]["train_flops"]
        assert (run["cost"]["pack_size"], expected["cost"]["pack_size"]) == ((2, 1)[k == 0], 3)
        assert run["environment"]["threads"] == max(1, torch.get_num_threads() // 2)
        assert run["cost"]["train_seconds"] is None  # both processes used the same device
    assert Path("sweep/table.md").exists()


@pytest.mark.usefixtures("in_tmp")
def test_a_killed_worker_is_reported_and_its_jobs_are_resumed_with_the_sweep() -> None:
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
def test_ctrl_c_ends_the_workers_after_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(worker: workers._Worker) -> None:
        raise KeyboardInterrupt

    at_first_step(monkeypatch, 0, interrupt)
    answer = lora_bench("train", "-m", *LONG, "seed=0,1,2,3")
    assert (answer.code, answer.err.count("\n")) == (130, 1), answer
    status_by_job = statuses()
    assert set(status_by_job.values()) == {"interrupted"}
    assert status_by_job.keys() >= {"0", "1"}
    assert any(Path("sweep/0/checkpoints").iterdir())
    assert "lora-bench train -m resume=sweep" in answer.err


KILLED_SCRIPT = """
import os, signal, sys
from lora_bench.sweeps import workers
from lora_bench.cli import main

def handle(self, message, *arguments):
    if message == "stepped":
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    workers._Worker._handle = handle
    main(sys.argv[1:])
"""
"""A command that is killed with SIGKILL when one of its workers first reports a step."""


@pytest.mark.usefixtures("in_tmp")
def test_workers_end_with_a_killed_sweep() -> None:
    Path("killed.py").write_text(KILLED_SCRIPT)
    command = [sys.executable, "killed.py", "train", "-m", *LONG, "seed=0,1"]
    killed = subprocess.run(command, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while any(folder_lock.is_locked(folder) for folder in Path("sweep").iterdir()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(folder_lock.is_locked(folder) for folder in Path("sweep").iterdir())
    assert set(statuses().values()) == {"running"}  # the status of a killed run


@pytest.mark.parametrize(
    ("overrides", "visible", "device_count", "expected"),
    [
        ([], None, 0, (1, [None], 1)),
        (["pack.workers=3"], None, 0, (3, [None, None, None], 3)),
        ([], None, 2, (2, ["0", "1"], 1)),
        ([], "3,5", 2, (2, ["3", "5"], 1)),
        (["pack.workers=3"], "3,5", 2, (3, ["3", "5", "3"], 2)),
        (["trainer.device=cpu"], None, 2, (1, [None], 1)),
    ],
)
def test_number_of_workers_and_their_gpus(
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    visible: str | None,
    device_count: int,
    expected: tuple[int, list[str | None], int],
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: device_count)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    job: Any = SimpleNamespace(settings=Settings.build(composed("data=toy", *overrides)))
    assigned = Workers.of([job])
    assert (assigned.count, [assigned.gpu_of(i) for i in range(assigned.count)], assigned.sharing) == expected


def test_a_group_is_split_evenly_unless_halving_compares_its_jobs() -> None:
    jobs: list[Any] = list(range(10))
    for halving, maximum, sizes in (("false", 4, [3, 3, 4]), ("false", 10, [10]), ("true", 4, [10])):
        experiments = [Experiment.build(composed("data=toy", f"pack.halving={halving}"))] * 10
        groups = workers.split_group(Group(jobs, experiments), maximum)
        assert (
            [len(subgroup.jobs) for subgroup in groups] == [len(subgroup.experiments) for subgroup in groups] == sizes
        )
        assert [job for subgroup in groups for job in subgroup.jobs] == jobs


def test_workers_on_one_device_divide_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        packing,
        "memory_demand",
        lambda inputs, experiment: packing.MemoryDemand(persistent_bytes=10.0, step_bytes=0.0, depth=0),
    )
    monkeypatch.setattr(packing, "free_bytes", lambda device: 80.0 / packing.SHARE_OF_FREE)
    on_cpu: Any = SimpleNamespace(
        backbone=SimpleNamespace(device=torch.device("cpu"), hidden_size=384, can_be_batched=True)
    )
    jobs: list[Any] = list(range(8))
    group = Group(jobs, [Experiment.build(composed("data=toy", "pack.size=8"))] * 8)
    for sharing, sizes in ((1, [8]), (2, [4, 4])):
        assert [len(pack) for pack in packing.split_into_packs(group, on_cpu, print, sharing)] == sizes
