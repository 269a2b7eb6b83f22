"""A sweep's packs as Slurm jobs, submitted and waited for with submitit.

Each Slurm job trains a share of the sweep's jobs with `packing`, writes their records, and writes two files that this
process follows: a log, and messages on its progress. Ctrl-C cancels the Slurm jobs: each stops after the current step
and saves checkpoints, as it does shortly before its time limit. If this process dies, they continue.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import secrets
import shutil
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lora_bench.console.stages import show_progress
from lora_bench.console.sweep_progress import job_name, print_once
from lora_bench.console.text import sanitise
from lora_bench.errors import Code, RunFailedError, UserError, require, require_number, require_one_of
from lora_bench.files.atomic_io import to_json
from lora_bench.records.run_folder import holds_run, read
from lora_bench.sweeps.remote_display import ReceivedDisplay, SentDisplay

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from lora_bench.console.stages import Screen
    from lora_bench.records.job import Job

POLL_SECONDS = 1.0
"""Interval at which the files of Slurm jobs are read, and written to; submitit queries Slurm less often."""


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """The resources and options of each Slurm job."""

    cluster: str
    """`slurm`, or `local`: processes on this machine instead, to try it out."""
    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    timeout_minutes: int
    """Time limit of a Slurm job; shortly before it, the job saves checkpoints."""
    gpus: int
    """Number of GPUs, 0 or 1; a pack uses one."""
    cpus: int
    memory_gb: int | None
    """null: the cluster's default."""
    setup: list[str]
    """Shell commands that run before the job."""

    def __post_init__(self) -> None:
        """Refuse values out of range, and names with characters that would change the script that submitit writes."""
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
        """Refuse the launcher if submitit, or with `cluster=slurm` a command of Slurm, is not installed."""
        remedy = "Install it: pip install 'lora-bench[slurm]'."
        there = importlib.util.find_spec("submitit") is not None
        require(there, "hydra/launcher", "slurm", "needs the package submitit", remedy, code=Code.MISSING_PACKAGE)
        if self.cluster == "slurm" and not (shutil.which("srun") and shutil.which("sbatch")):
            remedy = "Start the sweep on a machine with Slurm, or try it out here with hydra.launcher.cluster=local."
            raise UserError(
                "needs Slurm's commands srun and sbatch",
                key="hydra/launcher",
                value="slurm",
                remedy=remedy,
                code=Code.MISSING_PACKAGE,
            )

    def executor(self, folder: Path) -> Any:
        """Return the submitit executor that submits Slurm jobs and keeps their files in `folder`."""
        from submitit import AutoExecutor

        executor = AutoExecutor(folder, cluster=self.cluster)
        options = {f"slurm_{name}": getattr(self, name) for name in ("partition", "account", "qos", "constraint")}
        executor.update_parameters(
            name="lora-bench",
            timeout_min=self.timeout_minutes,
            gpus_per_node=self.gpus,
            cpus_per_task=self.cpus,
            mem_gb=self.memory_gb,
            slurm_setup=self.setup,
            slurm_additional_parameters={"no-requeue": True},  # its folders would be in use
            **options,
        )
        return executor


def train_jobs(
    jobs: Sequence[Job],
    console: Console,
    ended: Callable[[Job, Exception | None], None],
    *,
    settings: Slurm,
    folder: Path,
) -> None:
    """Train the jobs of a sweep in one Slurm job, or in `pack.workers` Slurm jobs, and wait for them.

    An exception here, such as Ctrl-C, cancels the Slurm jobs, waits for their ends and is raised. submitit's files of
    requests and results are removed at the end.

    Args:
        jobs: of one sweep, checked.
        console: receives the messages.
        ended: called with each job when its Slurm job has ended, and the error that ended it early or None.
        settings: resources and options of each Slurm job.
        folder: for submitit's files and the logs; visible to all nodes.

    Raises:
        UserError: Slurm refuses the submission.
    """
    if not jobs:
        return
    from lora_bench.run.settings import Experiment
    from lora_bench.sweeps.workers import hand_over, split_jobs

    timestamp = time.strftime("%Y-%m-%d-%H-%M-%S")
    folder = _private_folder(folder, timestamp)
    shares = split_jobs(jobs, Experiment.build(jobs[0].cfg).pack.workers or 1)
    logs = [folder / f"{timestamp}-{number}.log" for number in range(len(shares))]
    executor = settings.executor(folder)
    older_files = set(folder.glob("*.pkl"))
    try:
        submitted = executor.map_array(train_share, map(hand_over, shares), logs, [os.getcwd()] * len(shares))
    except Exception as error:
        for path in set(folder.glob("*.pkl")) - older_files:
            path.unlink()
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"Slurm refuses the jobs: {lines[-1]}", key="hydra.launcher", code=Code.SERVER) from None
    try:
        with show_progress(console) as screen:
            _follow(
                [
                    _Submitted(job, share, log, screen, ended)
                    for job, share, log in zip(submitted, shares, logs, strict=True)
                ]
            )
    finally:
        for job in submitted:
            for path in (job.paths.submitted_pickle, job.paths.result_pickle):
                path.unlink(missing_ok=True)


def _follow(running: list[_Submitted]) -> None:
    """Show the progress of the Slurm jobs until each has ended; an exception cancels them and waits for their ends."""
    try:
        while running:
            for slurm_job in list(running):
                is_done = slurm_job.handle.done()  # before its last lines are read
                slurm_job.follow()
                if is_done:
                    running.remove(slurm_job)
                    slurm_job.end()
            time.sleep(POLL_SECONDS if running else 0)
    except BaseException:
        for slurm_job in running:
            slurm_job.handle.cancel(check=False)
        while running:
            running = [slurm_job for slurm_job in running if not slurm_job.handle.done()]
            time.sleep(POLL_SECONDS if running else 0)
        raise


def _private_folder(folder: Path, timestamp: str) -> Path:
    """Create a new folder in `folder` for submitit's files, and return it; only this user can read and write either.

    submitit unpickles results from file names that can be guessed, so no such file may exist before.

    Args:
        folder: is created where it does not exist, not its parents; a link or a file is a `UserError`.
        timestamp: the beginning of the new folder's name.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(
            "is a link or a file, but has to be a folder",
            file=folder,
            remedy="Remove it.",
            code=Code.NOT_A_FILE,
        )
    folder.mkdir(exist_ok=True)
    folder.chmod(0o700)  # the jobs lie there as typed, secrets included, until they are done
    private = folder / f"{timestamp}-{secrets.token_hex(8)}"
    private.mkdir(mode=0o700)
    return private


class _Submitted:
    """A submitted Slurm job, followed from this process; its number of jobs is printed at once.

    Args:
        handle: submitit's job.
        jobs: the sweep's jobs that it trains.
        log: the file that it logs to; its messages are beside it.
        screen: shows the log's lines and the progress.
        ended: called with each job that has ended, and the error that ended it early or None.
    """

    def __init__(
        self,
        handle: Any,
        jobs: Sequence[Job],
        log: Path,
        screen: Screen,
        ended: Callable[[Job, Exception | None], None],
    ) -> None:
        self.handle = handle
        self.pending = {job_name(job.title): job for job in jobs}
        """Jobs whose end was not reported, by name."""
        self.log, self.messages = _Tail(log), _Tail(_messages_beside(log))
        self.console = screen.console
        self.display = ReceivedDisplay(screen)
        self.ended = ended
        self.console.print(sanitise(f"slurm {handle.job_id}: {len(jobs)} {'job' if len(jobs) == 1 else 'jobs'}"))

    def follow(self) -> None:
        """Print the new lines of its log, show its progress, and report the jobs that have ended without an error."""
        print_once(self.console, filter(str.strip, self.log.new_lines()), f"slurm {self.handle.job_id}: ")
        for line in self.messages.new_lines():
            self._handle(*json.loads(line))

    def _handle(self, message: str, *arguments: Any) -> None:
        """Report a job that has ended without an error, or show progress."""
        if message == "end":
            self.ended(self.pending.pop(*arguments), None)
        else:
            self.display.receive(message, *arguments)

    def end(self) -> None:
        """Report how each of its other jobs ended: from its result, or else from the job's record.

        A job without a result whose record is not `done` has ended with a `RunFailedError`.
        """
        error = self.handle.exception()
        errors = {} if error else self.handle.result()
        reason = f"Slurm job {self.handle.job_id}, which trained it, ended early ({self.handle.state.lower()})"
        remedy = f"Run the missing jobs with resume=DIR. Slurm's error output: {self.handle.paths.stderr}"
        self.display.hide()
        for job in self.pending.values():
            done = holds_run(job.folder) and read(job.folder)["status"] == "done"
            self.ended(
                job,
                errors[job.title]
                if job.title in errors
                else None
                if done
                else RunFailedError(reason, remedy=remedy, code=Code.PROCESS_ENDED),
            )


class _Tail:
    """The new lines of a file that another process writes; it need not exist yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes_read = 0

    def new_lines(self) -> list[str]:
        """Return the whole lines since the last call."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self.bytes_read)
            lines = file.read().rpartition(b"\n")[0]
        self.bytes_read += len(lines) + bool(lines)
        return lines.decode(errors="replace").splitlines()


def _messages_beside(log: Path) -> Path:
    """Return the file of the messages that belong to a log."""
    return log.with_suffix(".jsonl")


# -- inside the Slurm job --


def train_share(jobs: Sequence[Job], log: Path, folder: str) -> dict[str, Exception | None]:
    """Train the jobs inside a Slurm job.

    A signal stops it after the current step and its checkpoints.

    Args:
        jobs: the share of this Slurm job.
        log: the file to log to; messages on the progress go to a file beside it.
        folder: the working folder of the submitting process.

    Returns:
        The error that ended each job early, or None, by title; jobs that a signal interrupted are missing.
    """
    from lora_bench.console.signals import terminate
    from lora_bench.sweeps.workers import train_handed_over

    signal.signal(signal.SIGTERM, terminate)  # submitit would ignore it
    signal.signal(signal.SIGUSR2, lambda *_: signal.raise_signal(signal.SIGTERM))  # the time limit is near
    os.chdir(folder)
    errors: dict[str, Exception | None] = {}
    files = [path.open("a", buffering=1, encoding="utf-8") for path in (log, _messages_beside(log))]

    def send(*message: Any) -> None:
        files[1].write(json.dumps(to_json(message)) + "\n")

    def ended(job: Job, error: Exception | None) -> None:
        errors[job.title] = error
        if error is None:
            send("end", job_name(job.title))

    with files[0], files[1], suppress(SystemExit, KeyboardInterrupt):
        console = Console(file=files[0], highlight=False, soft_wrap=True)
        train_handed_over(jobs, console, ended, display=partial(SentDisplay, send, every_seconds=POLL_SECONDS))
    return errors
