"""Folders and processes: whose a folder is, what a killed process leaves, and what cannot be written."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lora_bench import train
from lora_bench.record import Run
from tests.command_line import lora_bench, refused, toy_run


def status(folder: str) -> str:
    return str(json.loads((Path(folder) / "run.json").read_text())["status"])


@pytest.mark.reliability(18)
def test_18_the_claim_of_a_killed_process_is_recovered(in_tmp: Path) -> None:
    asked = toy_run("trainer.epochs=9999", "trainer.max_steps=9999", "trainer.checkpoint_every=5", "hydra.run.dir=run")
    command = [sys.executable, "-m", "lora_bench", "train", *asked]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        until = time.monotonic() + 120
        while not list(Path("run/checkpoints").glob("step-*")) and time.monotonic() < until:
            time.sleep(0.02)
        assert "another process is training this run" in lora_bench("train", "resume=run").err
        assert "already holds a run" in lora_bench("train", *asked).err
        assert "running: run" in lora_bench("compare", "run").out
        process.send_signal(signal.SIGKILL)
    assert status("run") == "running"
    assert "holds a run whose process was killed. Go on with it: lora-bench train resume=run" in refused(
        "train", *asked
    )
    assert "killed: run" in lora_bench("compare", "run").out
    record = json.loads(Path("run/run.json").read_text())
    record["config"]["trainer"]["max_steps"] = 8  # so that the test ends
    Path("run/run.json").write_text(json.dumps(record))
    for checkpoint in Path("run/checkpoints").iterdir():
        shutil.rmtree(checkpoint)
    assert lora_bench("train", "resume=run").code == 0
    assert status("run") == "done"


@pytest.mark.reliability(18)
def test_18_what_is_left_of_a_process_killed_as_it_started_is_no_claim(in_tmp: Path) -> None:
    Path("run").mkdir()
    for name in (".lock", "run.json", ".run.json.123.part"):
        Path("run", name).touch()
    assert lora_bench("train", *toy_run("hydra.run.dir=run")).code == 0
    assert status("run") == "done"


@pytest.mark.reliability(20)
@pytest.mark.parametrize("moment", ["evaluation", "checkpoint", "end"])
def test_20_a_folder_deleted_while_running_stops_the_run_cleanly(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def deleting(original: Any) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            shutil.rmtree("run", ignore_errors=True)
            return original(*arguments, **keywords)

        return call

    owner, name = {"evaluation": (Run, "log"), "checkpoint": (train.Checkpoints, "save"), "end": (Run, "finish")}[
        moment
    ]
    monkeypatch.setattr(owner, name, deleting(getattr(owner, name)))
    answer = lora_bench("train", *toy_run("hydra.run.dir=run", "trainer.checkpoint_every=1"))
    assert answer.code == 1, answer
    assert answer.err.count("\n") == 1
    assert "/run: was deleted or moved while the run trained" in answer.err
    assert not Path("run").exists()


@pytest.mark.reliability(20)
def test_20_the_other_jobs_of_a_sweep_go_on(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Run.log

    def deleting(run: Run, line: Any) -> None:
        if run.folder.name == "1":
            shutil.rmtree(run.folder, ignore_errors=True)
        log(run, line)

    monkeypatch.setattr(Run, "log", deleting)
    answer = lora_bench("train", "-m", *toy_run("hydra.sweep.dir=sweep"), "seed=0,1,2")
    assert answer.code == 1
    assert "/sweep/1: was deleted or moved" in answer.out
    assert [status(f"sweep/{number}") for number in (0, 2)] == ["done", "done"]
