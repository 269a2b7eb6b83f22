"""Sweeps: what fails, is killed or interrupted is told, and a resumed sweep runs only what it lacks."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from lora_bench import train
from lora_bench.errors import Code
from lora_bench.run import packed_run
from lora_bench.sweeps import packing
from lora_bench.training.checkpoint import Checkpoints
from tests import forked
from tests.command_line import lora_bench, refused, toy_run

SWEEP = toy_run("hydra.sweep.dir=sweep", "pack.size=1")


def statuses(folder: str = "sweep") -> dict[str, str]:
    return {
        path.parent.name: json.loads(path.read_text())["status"] for path in sorted(Path(folder).glob("*/run.json"))
    }


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that a training really began in."""
    original, folders = train.train_pack, []

    def noting(jobs: Any, **keywords: Any) -> Any:
        folders.extend(job.folder.name for job in jobs)
        return original(jobs, **keywords)

    monkeypatch.setattr(packing, "train_pack", noting)
    return folders


@pytest.mark.reliability(29)
@pytest.mark.parametrize("size", ["8", "1"])
def test_29_one_job_raises_and_the_others_run(in_tmp: Path, monkeypatch: pytest.MonkeyPatch, size: str) -> None:
    prepare = packed_run.prepare

    def sometimes(pack: Any, trainer: Any, table: Any, members: list[int], **options: Any) -> list[str]:
        seed = pack.members[members[0]].seed
        if seed in (1, 3):
            raise RuntimeError(f"cable {seed}")
        return prepare(pack, trainer, table, members, **options)

    monkeypatch.setattr(packed_run, "prepare", sometimes)
    answer = lora_bench("train", "-m", *toy_run("hydra.sweep.dir=sweep", f"pack.size={size}"), "seed=range(5)")
    assert answer.code == 1
    assert answer.err.startswith("lora-bench: 2 of 5 jobs ")
    assert answer.err.count("\n") == 1
    assert statuses() == {"0": "done", "1": "failed", "2": "done", "3": "failed", "4": "done"}
    for number in (1, 3):
        log = Path(f"sweep/{number}/run.log").read_text()
        assert "Traceback" in log
        assert f"RuntimeError: cable {number}" in log
        assert f"failed: sweep/{number}" in Path("sweep/table.md").read_text()
        assert f"cable {number}" in answer.out


def killed(*arguments: str) -> None:
    """Run a command that is killed outright after its first checkpoint, in a process of its own."""
    save = Checkpoints.save

    def save_and_die(*state: Any) -> None:
        save(*state)
        os.kill(os.getpid(), signal.SIGKILL)

    Checkpoints.save = save_and_die  # type: ignore[method-assign]
    forked.run_command(*arguments)


@pytest.mark.reliability(30)
@pytest.mark.parametrize("size", ["8", "1"])
def test_30_a_killed_sweep_says_which_jobs_were_killed_and_runs_the_rest(in_tmp: Path, size: str) -> None:
    arguments = ["hydra.sweep.dir=sweep", "trainer.max_steps=4", "trainer.checkpoint_every=2", "seed=0,1,2"]
    arguments = toy_run(*arguments, f"pack.size={size}")
    assert forked.Forked(killed, "train", "-m", *arguments).wait() == -signal.SIGKILL
    started = ["0"] if size == "1" else ["0", "1", "2"]
    assert statuses() == dict.fromkeys(started, "running")
    assert "killed: sweep/0" in lora_bench("compare", "sweep").out
    answer = lora_bench("train", "-m", "resume=sweep")
    assert answer.code == 0, answer
    assert "resumed from step 2" in answer.out
    assert statuses() == {"0": "done", "1": "done", "2": "done"}


@pytest.mark.reliability(30)
def test_30_a_sweep_killed_at_a_random_moment_ends_as_an_undisturbed_one(in_tmp: Path) -> None:
    """`scripts/torture.py` kills larger ones, many times."""
    arguments = toy_run("trainer.max_steps=4", "trainer.epochs=20", "trainer.eval_every=2", "data.train_rows=80")
    arguments += ["adapter.rank=2,8", "optimizer.lr=1e-3,1e-2", "seed=0,1"]
    assert lora_bench("train", "-m", *arguments, "hydra.sweep.dir=whole").code == 0
    process = forked.command("train", "-m", *arguments, "hydra.sweep.dir=sweep")
    deadline = time.monotonic() + 120
    while len(statuses()) < 8 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(random.random() / 4)
    process.signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert lora_bench("train", "-m", "resume=sweep").code == 0
    assert statuses() == dict.fromkeys(map(str, range(8)), "done")
    for number in range(8):
        one, other = (json.loads(Path(folder, str(number), "run.json").read_text()) for folder in ("sweep", "whole"))
        for key in ("config", "overrides", "data", "params", "targets"):
            assert one[key] == other[key], key
        for key in ("metrics", "selection"):
            assert one[key] == pytest.approx(other[key], abs=1e-5), key
        assert one["cost"]["train_flops"] == other["cost"]["train_flops"]
    assert (in_tmp / "sweep/table.csv").read_text().count("\n") == (in_tmp / "whole/table.csv").read_text().count("\n")


@pytest.mark.reliability(31)
def test_31_a_resumed_sweep_runs_only_what_is_missing_or_failed(
    in_tmp: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fit, calls = train.PackTraining.fit, iter(range(9))

    def sometimes(*arguments: Any, **keywords: Any) -> Any:
        number = next(calls)
        if number == 1:
            raise RuntimeError("a cable")
        if number == 3:
            raise KeyboardInterrupt
        return fit(*arguments, **keywords)

    monkeypatch.setattr(train.PackTraining, "fit", sometimes)
    answer = lora_bench("train", "-m", *SWEEP, "seed=range(6)")
    assert answer.code == 130
    assert re.fullmatch("lora-bench: interrupted. 2 of 6 jobs .*: lora-bench train -m resume=sweep\n", answer.err)
    assert "mcc ↑" not in answer.out  # no comparison is printed
    assert statuses() == {"0": "done", "1": "failed", "2": "done", "3": "interrupted"}
    before = {number: Path(f"sweep/{number}/run.json").read_bytes() for number in (0, 2)}

    monkeypatch.setattr(train.PackTraining, "fit", fit)
    trained.clear()
    assert lora_bench("train", "-m", "resume=sweep").code == 0
    assert trained == ["1", "3", "4", "5"]
    assert set(statuses().values()) == {"done"}
    assert {number: Path(f"sweep/{number}/run.json").read_bytes() for number in (0, 2)} == before
    seeds = [json.loads(Path(f"sweep/{number}/run.json").read_text())["config"]["seed"] for number in range(6)]
    assert seeds == list(range(6))

    trained.clear()
    assert lora_bench("train", "resume=sweep").code == 0  # -m may be left out; nothing is left to do
    assert trained == []


@pytest.mark.reliability(31)
def test_31_a_preset_with_further_choices_is_resumed_as_it_began(in_tmp: Path) -> None:
    Path("mine/adapter").mkdir(parents=True)
    Path("mine/adapter/small.yaml").write_text("defaults: [lora, _self_]\nrank: 2\n")
    arguments = [*SWEEP, "--config-dir", "mine", "sweep=rank", "adapter=small", "adapter.rank=1,3", "seed=0,1"]
    assert lora_bench("train", *arguments).code == 0
    Path("sweep/2/run.json").unlink()
    assert lora_bench("train", "-m", "resume=last").code == 2  # not below outputs
    assert lora_bench("train", "-m", "resume=sweep").code == 0
    run_records = [json.loads(Path(f"sweep/{number}/run.json").read_text()) for number in range(4)]
    assert [(run_record["config"]["adapter"]["rank"], run_record["config"]["seed"]) for run_record in run_records] == [
        (1, 0),
        (1, 1),
        (3, 0),
        (3, 1),
    ]
    assert all(run_record["choices"]["adapter"] == "small" for run_record in run_records)
    Path("mine/adapter/small.yaml").unlink()
    Path("sweep/2/run.json").unlink()
    error = refused("train", "-m", "resume=sweep")
    assert (error.code, error.key, error.value) == (Code.UNKNOWN_CHOICE, "adapter", "small")
    assert error.file == Path("sweep/sweep.json")


@pytest.mark.reliability(31)
def test_31_the_last_unfinished_sweep_is_found(in_tmp: Path, trained: list[str]) -> None:
    for sweep in ("one", "two"):
        arguments = toy_run(f"hydra.sweep.dir=outputs/sweeps/{sweep}", "seed=0,1")
        assert lora_bench("train", "-m", *arguments).code == 0
        Path(f"outputs/sweeps/{sweep}/1/run.json").unlink()
    trained.clear()
    assert lora_bench("train", "resume=last").code == 0
    assert trained == ["1"]
    assert statuses("outputs/sweeps/two") == {"0": "done", "1": "done"}
    assert statuses("outputs/sweeps/one") == {"0": "done"}


@pytest.mark.reliability(31)
def test_31_what_a_sweep_cannot_go_on_with_is_refused(in_tmp: Path) -> None:
    assert lora_bench("train", "-m", *SWEEP, "seed=0,1").code == 0
    error = refused("train", "-m", "resume=sweep", "seed=2,3")
    assert (error.code, error.key, error.value) == (Code.NOT_RESUMABLE, "resume", Path("sweep"))
    assert "'seed=2,3'" in str(error)
    error = refused("train", "-m", "resume=sweep/0")
    assert (error.code, error.key, error.value) == (Code.NOT_FOUND, "resume", Path("sweep/0"))
    error = refused("train", "resume=nowhere")
    assert (error.code, error.key, error.value) == (Code.NOT_FOUND, "resume", "nowhere")
    content = json.loads(Path("sweep/sweep.json").read_text())
    for damaged in ("", "[]", '{"schema": 1}', json.dumps({**content, "jobs": {"../x": []}})):
        Path("sweep/sweep.json").write_text(damaged)
        error = refused("train", "-m", "resume=sweep")
        assert (error.code, error.file) == (Code.DAMAGED, Path("sweep/sweep.json"))
    content["jobs"]["1"] = ["seed=7"]
    Path("sweep/sweep.json").write_text(json.dumps(content))
    error = refused("train", "-m", "resume=sweep")
    assert (error.code, error.key, error.value) == (Code.MISMATCH, "resume", Path("sweep"))


@pytest.mark.reliability(32)
def test_32_ctrl_c_in_mid_sweep_keeps_finished_jobs_and_their_table(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit, calls = train.PackTraining.fit, iter(range(9))

    def interrupted(*arguments: Any, **keywords: Any) -> Any:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return fit(*arguments, **keywords)

    monkeypatch.setattr(train.PackTraining, "fit", interrupted)
    answer = lora_bench("train", "-m", *SWEEP, "seed=range(4)")
    assert answer.code == 130
    assert statuses() == {"0": "done", "1": "done", "2": "interrupted"}
    assert "interrupted: sweep/2" in Path("sweep/table.md").read_text()
    assert "mcc" in answer.out


@pytest.mark.reliability(33)
def test_33_what_cannot_be_compared_is_skipped_with_the_reason(in_tmp: Path) -> None:
    assert lora_bench("train", *toy_run("hydra.run.dir=runs/good")).code == 0
    content = json.loads(Path("runs/good/run.json").read_text())
    bad = {
        "unfinished": json.dumps({**content, "status": "interrupted", "error": "stopped from outside"}),
        "cut": json.dumps(content)[:-20],
        "empty": "",
        "older": json.dumps({**content, "schema": 0}),
        "other": "[]",
        "misshapen": json.dumps({**content, "metrics": [1]}),
    }
    for name, text in bad.items():
        Path("runs", name).mkdir()
        Path("runs", name, "run.json").write_text(text)
    answer = lora_bench("compare", "runs")
    assert (answer.code, answer.err) == (0, "")
    assert "interrupted: runs/unfinished" in answer.out
    reasons = dict(re.findall(r"^skipped: runs/(\w+): run\.json (.+)$", answer.out, re.MULTILINE))
    assert set(reasons) == {"cut", "empty", "older", "other", "misshapen"}
    assert len(set(reasons.values())) == 5
    assert "schema 0" in reasons["older"]
    assert "metrics" in reasons["misshapen"]
    assert "runs/good" not in answer.out.partition("interrupted:")[2]


@pytest.mark.reliability(33)
def test_33_a_diverging_member_does_not_disturb_the_others(in_tmp: Path) -> None:
    arguments = toy_run("trainer.max_steps=8", "hydra.sweep.dir=sweep", "optimizer.warmup=0")
    assert lora_bench("train", "-m", *arguments, "optimizer.lr=1e-3,1e30,2e-3").code == 1
    assert statuses() == {"0": "done", "1": "diverged", "2": "done"}
    run_record = json.loads(Path("sweep/1/run.json").read_text())
    assert "not finite" in run_record["error"]
    assert not any(key.startswith("validation/") for key in run_record["metrics"])
    for number, lr in ((0, "1e-3"), (2, "2e-3")):
        alone = [override for override in arguments if not override.startswith("hydra.")]
        assert lora_bench("train", *alone, f"optimizer.lr={lr}", f"hydra.run.dir=alone{number}").code == 0
        records = [json.loads(Path(folder, "run.json").read_text()) for folder in (f"sweep/{number}", f"alone{number}")]
        assert records[0]["metrics"] == pytest.approx(records[1]["metrics"], abs=1e-4)
