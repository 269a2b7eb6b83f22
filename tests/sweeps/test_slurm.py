"""Packs as Slurm jobs, tried with submitit's local executor: each loads torch, and takes seconds."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from omegaconf import OmegaConf
from submitit.core.core import Job as SubmititJob
from submitit.local.local import LocalJob

from lora_bench.config.build import build
from lora_bench.config.compose import compose, register_with_hydra
from lora_bench.errors import Code
from lora_bench.sweeps import slurm
from lora_bench.sweeps.slurm import Slurm
from tests.command_line import lora_bench, refused, refuses, toy_run
from tests.sweeps.test_workers import record, statuses
from tests.test_conf import CONF

if TYPE_CHECKING:
    from collections.abc import Callable

ASKED = toy_run("hydra/launcher=slurm", "hydra.sweep.dir=sweep", "seed=0,1")
ON = ["hydra/launcher=slurm", "hydra.launcher.cluster=local", "hydra.launcher.gpus=0", "hydra.sweep.dir=sweep"]
SWEEP = toy_run("trainer.max_steps=4", "trainer.checkpoint_every=2", *ON)
LONG = toy_run(
    "trainer.max_steps=100", "trainer.epochs=100", "trainer.checkpoint_every=5", "trainer.eval_every=100", *ON
)
"""It tells of every tenth step."""


@pytest.fixture(autouse=True)
def _quick(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(SubmititJob, "_results_timeout_s", 0)  # how long a slow file system may take to show a result


def at_first_step(monkeypatch: pytest.MonkeyPatch, action: Callable[[Any], object]) -> None:
    """Do something when a Slurm job first tells of a step."""
    say = slurm._Submitted._say

    def saying(self: slurm._Submitted, text: str) -> None:
        say(self, text)
        if text.startswith("step "):
            action(self.handle)

    monkeypatch.setattr(slurm._Submitted, "_say", saying)


def left_of_pickles() -> list[Path]:
    return list(Path("sweep").rglob("*.pkl"))


def test_runs_are_what_they_are_in_one_process() -> None:
    asked = [*SWEEP, "pack.workers=2", "optimizer.warmup=0", "optimizer.lr=1e-3,1e30,2e-3"]
    answer = lora_bench("train", "-m", *asked)
    assert answer.code == 1, answer
    assert "1 of 3 jobs" in answer.err
    assert [line.partition(": ")[2] for line in answer.out.splitlines()[:2]] == ["2 jobs", "1 job"]
    assert ": 2 jobs on one tiny_bert" in answer.out
    assert answer.out.count("job 1 failed: step") == 1
    whole = [text for text in asked if "launcher" not in text]
    assert lora_bench("train", "-m", *whole, "hydra.sweep.dir=whole", "pack.workers=1").code == 1
    assert statuses() == {"0": "done", "1": "diverged", "2": "done"}
    for k in range(3):
        one, other = record(f"sweep/{k}"), record(f"whole/{k}")
        assert one["metrics"] == pytest.approx(other["metrics"], abs=1e-5)
        assert (one["error"], one["config"]) == (other["error"], other["config"] | {"pack": one["config"]["pack"]})
        assert (one["cost"]["pack_size"], other["cost"]["pack_size"]) == ((2, 1)[k == 0], 3)
    assert Path("sweep/table.md").exists()
    assert left_of_pickles() == []
    assert Path("sweep/.slurm").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(("number", "left"), [(signal.SIGKILL, "running"), (signal.SIGUSR2, "interrupted")])
def test_what_one_leaves_goes_on_with_the_sweep(monkeypatch: pytest.MonkeyPatch, number: int, left: str) -> None:
    """Killed as for too much memory; told, as Slurm does, that its time is nearly over."""
    with monkeypatch.context() as patch:
        at_first_step(patch, lambda given: os.kill(process_of(given), number))
        answer = lora_bench("train", "-m", *LONG, "seed=0,1")
    assert answer.code == 1, answer
    assert "2 of 2 jobs" in answer.err
    assert [number for number in range(2) if f"job {number} failed: Slurm job " in answer.out] == [0, 1]
    assert statuses() == {"0": left, "1": left}
    assert any(Path("sweep/0/checkpoints").iterdir())
    assert left_of_pickles() == []
    assert lora_bench("train", "-m", "resume=sweep").code == 0
    assert statuses() == {"0": "done", "1": "done"}


def process_of(given: LocalJob[Any]) -> int:
    """The process that trains: a child of submitit's own."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        if path.read_text().rpartition(") ")[2].split()[1] == given.job_id:
            return int(path.parent.name)
    raise AssertionError("there is none")


def test_ctrl_c_cancels_and_lets_each_leave_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(given: LocalJob[Any]) -> None:
        raise KeyboardInterrupt

    def cancel(self: LocalJob[Any], check: bool = True) -> None:
        """As scancel does; submitit's local executor kills after a second."""
        assert self._process is not None
        self._process.terminate()

    monkeypatch.setattr(LocalJob, "cancel", cancel)
    at_first_step(monkeypatch, interrupt)
    answer = lora_bench("train", "-m", *LONG, "seed=0,1")
    assert (answer.code, answer.err.count("\n")) == (130, 1), answer
    assert "2 of 2 jobs" in answer.out
    assert "lora-bench train -m resume=sweep" in answer.out
    assert statuses() == {"0": "interrupted", "1": "interrupted"}
    assert any(Path("sweep/0/checkpoints").iterdir())
    assert left_of_pickles() == []


def test_what_slurm_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm's commands are stand-ins: the second keeps what it is given, and refuses it."""
    commands = Path("bin").absolute()
    commands.mkdir()
    for name, text in (
        ("srun", ""),
        ("sbatch", 'cat "$@" > "$0.given"; echo "sbatch: error: no such partition" >&2; exit 1'),
    ):
        (commands / name).write_text(f"#!/bin/sh\n{text}\n")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    asked = ["partition=gpu", "timeout_minutes=30", "memory_gb=null", "setup=[module load cuda]"]
    answer = lora_bench("train", "-m", *ASKED, *(f"hydra.launcher.{setting}" for setting in asked))
    assert answer.code == 2, answer
    assert answer.error is not None
    assert (answer.error.code, answer.error.key) == (Code.SERVER, "hydra.launcher")
    assert "sbatch: error: no such partition" in answer.err
    lines = (commands / "sbatch.given").read_text().splitlines()
    wanted = ["partition=gpu", "time=30", "gpus-per-node=1", "cpus-per-task=4", "no-requeue"]
    assert [line for line in wanted if f"#SBATCH --{line}" not in lines] == []
    assert "module load cuda" in lines
    assert not any("--mem" in line for line in lines)
    assert left_of_pickles() == []


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("cluster=pbs", (Code.UNKNOWN_CHOICE, "hydra.launcher.cluster", "pbs")),
        ("timeout_minutes=1", (Code.INVALID_VALUE, "hydra.launcher.timeout_minutes", 1)),
        ("gpus=2", (Code.INVALID_VALUE, "hydra.launcher.gpus", 2)),
        ("cpus=many", (Code.INVALID_VALUE, "hydra.launcher.cpus", "many")),
        ("nodes=2", (Code.UNKNOWN_KEY, "hydra.launcher.nodes", None)),
    ],
)
def test_wrong_settings_leave_nothing(setting: str, expected: tuple[Code, str, object]) -> None:
    error = refused("train", "-m", *ASKED, f"hydra.launcher.{setting}")
    assert (error.code, error.key, error.value) == expected


def test_missing_programs_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    error = refused("train", "-m", *ASKED)
    assert (error.code, error.key, error.value) == (Code.MISSING_PACKAGE, "hydra/launcher", "slurm")
    assert "srun and sbatch" in str(error)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    error = refused("train", "-m", *ASKED)
    assert (error.code, error.key, error.value) == (Code.MISSING_PACKAGE, "hydra/launcher", "slurm")
    assert "pip install 'lora-bench[slurm]'" in str(error)


def test_the_yaml_has_every_setting() -> None:
    register_with_hydra()
    node = compose(CONF, "config", ["hydra/launcher=slurm"]).hydra.launcher
    settings = OmegaConf.masked_copy(node, [key for key in node if key != "_target_"])
    assert build(Slurm, settings, "hydra.launcher").cluster == "slurm"


def test_what_is_handed_over_lies_in_a_new_folder(tmp_path: Path) -> None:
    """submitit unpickles results, so no file may be there that somebody else put there."""
    first, second = (slurm._private_folder(tmp_path / "files", "now") for _ in range(2))
    assert first != second
    assert [folder.stat().st_mode & 0o077 for folder in (first, second)] == [0, 0]
    (tmp_path / "link").symlink_to(tmp_path)
    with refuses(Code.NOT_A_FILE) as caught:
        slurm._private_folder(tmp_path / "link", "now")
    assert caught.value.file == tmp_path / "link"


@pytest.mark.parametrize("name", ["gpu\n#SBATCH --wrap=id", "a b", "$(id)", "`id`", "a;b"])
def test_a_name_for_slurm_is_no_script(name: str) -> None:
    settings = dict.fromkeys(("account", "qos", "constraint"), None) | {"partition": name}
    with refuses(Code.INVALID_VALUE, key="partition"):
        Slurm(cluster="slurm", timeout_minutes=9, gpus=0, cpus=1, memory_gb=1, setup=[], **settings)  # type: ignore[arg-type]
