"""Packs as Slurm jobs, with submitit's local executor. Every job imports torch, which takes seconds."""

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
from lora_bench.sweeps import packing, slurm
from lora_bench.sweeps.slurm import Slurm
from tests.command_line import lora_bench, refused, refuses, toy_run
from tests.sweeps.test_workers import record, statuses
from tests.test_conf import CONF

if TYPE_CHECKING:
    from collections.abc import Callable

OVERRIDES = toy_run("hydra/launcher=slurm", "hydra.sweep.dir=sweep", "seed=0,1")
LOCAL_LAUNCHER = [
    "hydra/launcher=slurm",
    "hydra.launcher.cluster=local",
    "hydra.launcher.gpus=0",
    "hydra.sweep.dir=sweep",
]
SWEEP = toy_run("trainer.max_steps=4", "trainer.checkpoint_every=2", *LOCAL_LAUNCHER)
LONG = toy_run(
    "trainer.max_steps=100",
    "trainer.epochs=100",
    "trainer.checkpoint_every=5",
    "trainer.eval_every=100",
    *LOCAL_LAUNCHER,
)
"""Overrides of a training that reports every tenth step."""


@pytest.fixture(autouse=True)
def _quick(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(SubmititJob, "_results_timeout_s", 0)  # the wait for slow file systems


def at_first_step(monkeypatch: pytest.MonkeyPatch, action: Callable[[Any], object]) -> None:
    """Call `action` once with each Slurm job, when it reports a step after its first checkpoint."""
    handle, acted = slurm._Submitted._handle, set()

    def handle_and_act(self: slurm._Submitted, message: str, *arguments: Any) -> None:
        handle(self, message, *arguments)
        if message == "stepped" and arguments[0] > 5 and self.handle.job_id not in acted:
            acted.add(self.handle.job_id)
            action(self.handle)

    monkeypatch.setattr(slurm._Submitted, "_handle", handle_and_act)


def pickle_files() -> list[Path]:
    return list(Path("sweep").rglob("*.pkl"))


def test_runs_equal_those_of_one_process() -> None:
    overrides = [*SWEEP, "optimizer.warmup=0", "optimizer.lr=1e-3,1e30,2e-3"]
    answer = lora_bench("train", "-m", *overrides)
    assert answer.code == 1, answer
    assert "1 of 3 jobs" in answer.err
    assert ": 3 jobs on one tiny_bert" in answer.out
    assert answer.out.count("job 1 failed: step") == 1
    one_process = [text for text in overrides if "launcher" not in text]
    assert lora_bench("train", "-m", *one_process, "hydra.sweep.dir=one_process").code == 1
    assert statuses() == {"0": "done", "1": "diverged", "2": "done"}
    for k in range(3):
        run, expected = record(f"sweep/{k}"), record(f"one_process/{k}")
        assert run["metrics"] == pytest.approx(expected["metrics"], abs=1e-5)
        assert (run["error"], run["config"]) == (expected["error"], expected["config"])
    assert Path("sweep/table.md").exists()
    assert pickle_files() == []
    assert Path("sweep/.slurm").stat().st_mode & 0o077 == 0


def test_jobs_that_slurm_ends_are_resumed_with_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL is the end of a job that exceeds its memory, SIGUSR2 the warning before its time limit."""
    ends = iter([signal.SIGKILL, signal.SIGUSR2])
    with monkeypatch.context() as patch:
        at_first_step(patch, lambda job: os.kill(training_process(job), next(ends)))
        answer = lora_bench("train", "-m", *LONG, "seed=0,1", "pack.workers=2")
    assert answer.code == 1, answer
    assert "2 of 2 jobs" in answer.err
    assert answer.out.count(": 1 job\n") == 2  # a Slurm job for each
    assert [number for number in range(2) if f"job {number} failed: Slurm job " in answer.out] == [0, 1]
    assert sorted(statuses().values()) == ["interrupted", "running"]
    assert all(any(Path(f"sweep/{number}/checkpoints").iterdir()) for number in range(2))
    assert pickle_files() == []
    monkeypatch.setattr(slurm, "train_jobs", lambda *jobs, **_: packing.train_jobs(*jobs))  # faster
    assert lora_bench("train", "-m", "resume=sweep").code == 0
    assert statuses() == {"0": "done", "1": "done"}


def training_process(job: LocalJob[Any]) -> int:
    """Return the id of the training process, a child of submitit's."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        if path.read_text().rpartition(") ")[2].split()[1] == job.job_id:
            return int(path.parent.name)
    raise AssertionError("there is no training process")


def test_ctrl_c_cancels_the_jobs_which_write_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(job: LocalJob[Any]) -> None:
        raise KeyboardInterrupt

    def cancel(self: LocalJob[Any], check: bool = True) -> None:
        """End the process as scancel does; submitit's local executor kills it after a second."""
        assert self._process is not None
        self._process.terminate()

    monkeypatch.setattr(LocalJob, "cancel", cancel)
    at_first_step(monkeypatch, interrupt)
    answer = lora_bench("train", "-m", *LONG, "seed=0,1")
    assert (answer.code, answer.err.count("\n")) == (130, 1), answer
    assert "0 of 2 jobs are done and 2 continue from the last checkpoint" in answer.err
    assert "lora-bench train -m resume=sweep" in answer.err
    assert statuses() == {"0": "interrupted", "1": "interrupted"}
    assert any(Path("sweep/0/checkpoints").iterdir())
    assert pickle_files() == []


def test_options_of_sbatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm's commands are replaced by scripts; `sbatch` copies its script and fails."""
    commands = Path("bin").absolute()
    commands.mkdir()
    for name, text in (
        ("srun", ""),
        ("sbatch", 'cat "$@" > "$0.script"; echo "sbatch: error: no such partition" >&2; exit 1'),
    ):
        (commands / name).write_text(f"#!/bin/sh\n{text}\n")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    settings = ["partition=gpu", "timeout_minutes=30", "memory_gb=null", "setup=[module load cuda]"]
    answer = lora_bench("train", "-m", *OVERRIDES, *(f"hydra.launcher.{setting}" for setting in settings))
    assert answer.code == 2, answer
    assert answer.error is not None
    assert (answer.error.code, answer.error.key) == (Code.SERVER, "hydra.launcher")
    assert "sbatch: error: no such partition" in answer.err
    lines = (commands / "sbatch.script").read_text().splitlines()
    options = ["partition=gpu", "time=30", "gpus-per-node=1", "cpus-per-task=4", "no-requeue"]
    assert [line for line in options if f"#SBATCH --{line}" not in lines] == []
    assert "module load cuda" in lines
    assert not any("--mem" in line for line in lines)
    assert pickle_files() == []


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
def test_invalid_settings_are_refused_without_files(setting: str, expected: tuple[Code, str, object]) -> None:
    error = refused("train", "-m", *OVERRIDES, f"hydra.launcher.{setting}")
    assert (error.code, error.key, error.value) == expected


def test_missing_programs_are_refused_without_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    error = refused("train", "-m", *OVERRIDES)
    assert (error.code, error.key, error.value) == (Code.MISSING_PACKAGE, "hydra/launcher", "slurm")
    assert "srun and sbatch" in str(error)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    error = refused("train", "-m", *OVERRIDES)
    assert (error.code, error.key, error.value) == (Code.MISSING_PACKAGE, "hydra/launcher", "slurm")
    assert "pip install 'lora-bench[slurm]'" in str(error)


def test_the_yaml_has_every_setting() -> None:
    register_with_hydra()
    node = compose(CONF, "config", ["hydra/launcher=slurm"]).hydra.launcher
    settings = OmegaConf.masked_copy(node, [key for key in node if key != "_target_"])
    assert build(Slurm, settings, "hydra.launcher").cluster == "slurm"


def test_files_for_submitit_are_in_a_new_private_folder(tmp_path: Path) -> None:
    """submitit unpickles results, so the folder must not hold files of other users."""
    first, second = (slurm._private_folder(tmp_path / "files", "now") for _ in range(2))
    assert first != second
    assert [folder.stat().st_mode & 0o077 for folder in (first, second)] == [0, 0]
    (tmp_path / "link").symlink_to(tmp_path)
    with refuses(Code.NOT_A_FILE) as caught:
        slurm._private_folder(tmp_path / "link", "now")
    assert caught.value.file == tmp_path / "link"


@pytest.mark.parametrize("name", ["gpu\n#SBATCH --wrap=id", "a b", "$(id)", "`id`", "a;b"])
def test_names_with_shell_syntax_are_refused(name: str) -> None:
    settings = dict.fromkeys(("account", "qos", "constraint"), None) | {"partition": name}
    with refuses(Code.INVALID_VALUE, key="partition"):
        Slurm(cluster="slurm", timeout_minutes=9, gpus=0, cpus=1, memory_gb=1, setup=[], **settings)  # type: ignore[arg-type]
