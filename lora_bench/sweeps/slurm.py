"""A sweep's packs as Slurm jobs, handed over and waited for with submitit.

Each Slurm job trains its part of the jobs as `packing` would here, writes their records itself and tells how it goes in
a file that this process follows. Ctrl-C cancels the Slurm jobs: each stops after its step and its checkpoints, as it
does shortly before its time is over. If this process is lost, they go on.
"""

from __future__ import annotations

import importlib.util
import os
import re
import secrets
import shutil
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lora_bench.console.text import sanitise
from lora_bench.errors import Code, RunFailedError, UserError, require, require_number, require_one_of
from lora_bench.records.run_folder import read

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from lora_bench.records.job import Job

LOOK_SECONDS = 1.0
"""How often what Slurm jobs tell is looked at; submitit itself asks Slurm less often."""


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """What each Slurm job is given."""

    cluster: str
    """`slurm`, or `local`: processes of this machine in its place."""
    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    timeout_minutes: int
    """After so many a job is stopped; shortly before, it leaves checkpoints."""
    gpus: int
    """How many GPUs; a pack uses one."""
    cpus: int
    memory_gb: int | None
    """null: what the cluster gives unasked."""
    setup: list[str]
    """Lines of the shell that come before the job."""

    def __post_init__(self) -> None:
        require_one_of("cluster", self.cluster, ("slurm", "local"))
        for name, low in (("timeout_minutes", 2), ("cpus", 1), ("memory_gb", 1)):
            if getattr(self, name) is not None:
                require_number(name, getattr(self, name), low)
        require_number("gpus", self.gpus, 0, 1)
        for name in ("partition", "account", "qos", "constraint"):  # each becomes a line of a shell script
            value = getattr(self, name)
            is_word = value is None or re.fullmatch(r"[\w.,:+@&|()\[\]*!-]+", value)
            require(bool(is_word), name, value, "holds a character that Slurm's names do not have")

    def check(self) -> None:
        """Refuse what cannot be before anything is written."""
        remedy = "Install it: pip install 'lora-bench[slurm]'."
        there = importlib.util.find_spec("submitit") is not None
        require(there, "hydra/launcher", "slurm", "needs the package submitit", remedy, code=Code.MISSING_PACKAGE)
        if self.cluster == "slurm" and not (shutil.which("srun") and shutil.which("sbatch")):
            remedy = "Start the sweep where they are; hydra.launcher.cluster=local tries it out here."
            raise UserError(
                "needs Slurm's commands srun and sbatch",
                key="hydra/launcher",
                value="slurm",
                remedy=remedy,
                code=Code.MISSING_PACKAGE,
            )

    def executor(self, folder: Path) -> Any:
        """What takes Slurm jobs whose files are in `folder`."""
        from submitit import AutoExecutor

        executor = AutoExecutor(folder, cluster=self.cluster)
        own = {f"slurm_{name}": getattr(self, name) for name in ("partition", "account", "qos", "constraint")}
        executor.update_parameters(
            name="lora-bench",
            timeout_min=self.timeout_minutes,
            gpus_per_node=self.gpus,
            cpus_per_task=self.cpus,
            mem_gb=self.memory_gb,
            slurm_setup=self.setup,
            slurm_additional_parameters={"no-requeue": True},  # begun anew it would find its folders taken: resume= it
            **own,
        )
        return executor


def run(
    jobs: Sequence[Job],
    console: Console,
    ended: Callable[[Job, Exception | None], None],
    *,
    asked: Slurm,
    folder: Path,
) -> None:
    """Train the jobs, packed, on Slurm; where `pack.workers` is given, in so many Slurm jobs.

    Args:
        jobs: of one sweep, checked.
        console: where to tell how it goes.
        ended: called with each job when its Slurm job has ended, and what ended it before its time.
        asked: what each Slurm job is given.
        folder: for submitit's files and what the Slurm jobs tell; all nodes see it.

    Raises:
        UserError: Slurm refuses the Slurm jobs.
    """
    if not jobs:
        return
    from lora_bench.sweeps.workers import handed_over, parts

    begun = time.strftime("%Y-%m-%d-%H-%M-%S")
    folder = _private_folder(folder, begun)
    cut = parts(jobs, jobs[0].settings.pack.workers or 1)
    logs = [folder / f"{begun}-{number}.log" for number in range(len(cut))]
    executor = asked.executor(folder)
    before = set(folder.glob("*.pkl"))
    try:
        given = executor.map_array(work, map(handed_over, cut), logs, [os.getcwd()] * len(cut))
    except Exception as error:
        for path in set(folder.glob("*.pkl")) - before:
            path.unlink()
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"Slurm refuses the jobs: {said[-1]}", key="hydra.launcher", code=Code.SERVER) from None
    running = [_Submitted(job, part, log, console) for job, part, log in zip(given, cut, logs, strict=True)]
    try:
        while running:
            for each in list(running):
                is_done = each.given.done()  # before its last lines are read
                each.follow()
                if is_done:
                    running.remove(each)
                    each.end(ended)
            time.sleep(LOOK_SECONDS if running else 0)
    except BaseException:
        for each in running:
            each.given.cancel(check=False)
        while running:
            running = [each for each in running if not each.given.done()]
            time.sleep(LOOK_SECONDS if running else 0)
        raise
    finally:
        for job in given:
            for path in (job.paths.submitted_pickle, job.paths.result_pickle):
                path.unlink(missing_ok=True)


def _private_folder(folder: Path, begun: str) -> Path:
    """Make a new folder for what is handed over, which nobody else can read or has put a file into.

    submitit loads results with pickle from names that can be guessed, so none of them may be there beforehand.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(
            "is a link or a file, where Slurm's files would go", file=folder, remedy="Remove it.", code=Code.NOT_A_FILE
        )
    folder.mkdir(exist_ok=True)
    folder.chmod(0o700)  # what is handed over lies there as typed, keys included, until it is done
    own = folder / f"{begun}-{secrets.token_hex(8)}"
    own.mkdir(mode=0o700)
    return own


class _Submitted:
    """A Slurm job as this process sees it."""

    def __init__(self, given: Any, jobs: Sequence[Job], log: Path, console: Console) -> None:
        self.given = given
        self.jobs = jobs
        self.log = log
        self.console = console
        self.heard = 0
        """Bytes of its log."""
        self._say(f"{len(jobs)} {'job' if len(jobs) == 1 else 'jobs'}")

    def _say(self, text: str) -> None:
        self.console.print(sanitise(f"slurm {self.given.job_id}: {text}"))

    def follow(self) -> None:
        """Print what it has told since."""
        if not self.log.exists():
            return
        with self.log.open("rb") as file:
            file.seek(self.heard)
            whole = file.read().rpartition(b"\n")[0]
        self.heard += len(whole) + bool(whole)
        for line in filter(str.strip, whole.decode(errors="replace").splitlines()):
            self._say(line)

    def end(self, ended: Callable[[Job, Exception | None], None]) -> None:
        """Tell what became of its jobs; of those that it said nothing of, their records do."""
        error = self.given.exception()
        told = {} if error else self.given.result()
        reason = f"Slurm job {self.given.job_id}, which trained it, ended before it did ({self.given.state.lower()})"
        remedy = f"Run what the sweep lacks with resume=DIR. What Slurm says of it: {self.given.paths.stderr}"
        for job in self.jobs:
            done = (job.folder / "run.json").exists() and read(job.folder)["status"] == "done"
            ended(
                job,
                told[job.title]
                if job.title in told
                else None
                if done
                else RunFailedError(reason, remedy=remedy, code=Code.PROCESS_ENDED),
            )


# -- in the Slurm job --


def work(jobs: Sequence[Job], log: Path, folder: str) -> dict[str, Exception | None]:
    """Train the jobs, and give back how those that ended did; a signal lets the others leave their checkpoints."""
    from lora_bench.console.signals import terminate
    from lora_bench.sweeps.workers import train

    signal.signal(signal.SIGTERM, terminate)  # submitit would let it pass
    signal.signal(signal.SIGUSR2, lambda *_: signal.raise_signal(signal.SIGTERM))  # the time is nearly over
    os.chdir(folder)
    told: dict[str, Exception | None] = {}
    with log.open("a", buffering=1, encoding="utf-8") as file, suppress(SystemExit, KeyboardInterrupt):
        console = Console(file=file, highlight=False, soft_wrap=True)
        train(jobs, console, lambda job, error: told.update({job.title: error}))
    return told
