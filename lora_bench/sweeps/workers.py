"""A sweep's packs on several devices, each trained by a worker process.

A worker trains its share of the jobs with `packing`, on its GPU if there is one, and sends messages and progress to the
main process. Ctrl-C does not reach it: the main process stops it with SIGTERM, after the current step and its
checkpoints. A worker ends when the main process does.
"""

from __future__ import annotations

import io
import math
import multiprocessing
import os
import signal
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from multiprocessing.connection import wait
from typing import IO, TYPE_CHECKING, Any, cast

import torch
from rich.console import Console

from lora_bench.console import streams, sweep_progress
from lora_bench.console.redaction import remember, remember_config
from lora_bench.console.signals import terminate
from lora_bench.console.stages import Screen, show_progress
from lora_bench.errors import Code, DivergedError, RunFailedError, UserError
from lora_bench.records.run_folder import Run
from lora_bench.run import callbacks
from lora_bench.sweeps import packing
from lora_bench.sweeps.remote_display import ReceivedDisplay, SentDisplay

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

    from lora_bench.records.job import Job
    from lora_bench.sweeps.packing import Group


@dataclass(frozen=True)
class Workers:
    """The number of worker processes, and their GPUs."""

    count: int
    gpus: list[str]
    """Names as in CUDA_VISIBLE_DEVICES, assigned to the workers in turn; empty: the workers use the CPU."""

    @classmethod
    def of(cls, jobs: Sequence[Job]) -> Workers:
        """Return `pack.workers` workers, or by default one for each GPU, or one on the CPU.

        The settings are those of the first job; without jobs it is one worker on the CPU. Callbacks are called in this
        process only, so with them there is one worker.
        """
        if not jobs or callbacks.current():
            return cls(1, [])
        settings = jobs[0].settings
        count = 0 if settings.trainer.device == "cpu" else torch.cuda.device_count()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",")[:count] if visible else [str(i) for i in range(count)]
        return cls(settings.pack.workers or max(1, len(gpus)), gpus)

    @property
    def sharing(self) -> int:
        """Number of workers on one device, rounded up."""
        return math.ceil(self.count / max(1, len(self.gpus)))

    @property
    def devices(self) -> int:
        """Number of devices in use; the workers on a CPU share its cores, so they count as one."""
        return min(self.count, max(1, len(self.gpus)))

    def gpu_of(self, worker: int) -> str | None:
        """Return the name of a worker's GPU; None on the CPU."""
        return self.gpus[worker % len(self.gpus)] if self.gpus else None

    def name_of(self, worker: int) -> str:
        """Return the prefix of a worker's messages."""
        return f"worker {worker}" if self.sharing > 1 else f"gpu {self.gpu_of(worker)}"


def split_group(group: Group, max_jobs: int) -> list[Group]:
    """Split a group evenly into groups of at most `max_jobs`; a group with successive halving is not split."""
    size = len(group.jobs)
    count = 1 if group.experiments[0].pack.halving else math.ceil(size / max_jobs)
    ends = [size * i // count for i in range(count + 1)]
    return [
        replace(group, jobs=group.jobs[start:end], experiments=group.experiments[start:end])
        for start, end in pairwise(ends)
    ]


def split_jobs(jobs: Sequence[Job], workers: int) -> list[list[Job]]:
    """Split the jobs into shares for the workers, the largest first; the jobs of a share may share a backbone.

    No share has more than an equal part of all jobs, unless it has successive halving. There may be more or fewer
    shares than workers.
    """
    max_jobs = math.ceil(len(jobs) / workers)
    shares = [share.jobs for group in packing.group_jobs(jobs) for share in split_group(group, max_jobs)]
    return sorted(shares, key=len, reverse=True)


def train_jobs(jobs: Sequence[Job], console: Console, ended: Callable[[Job, Exception | None], None]) -> None:
    """Train the jobs of a sweep on the workers that its settings ask for; a single worker is this process itself.

    An exception here, such as Ctrl-C, stops the workers after their current steps and checkpoints, and is raised.

    Args:
        jobs: of one sweep, checked.
        console: receives messages and progress.
        ended: called with each job when it has ended, and the error that ended it early or None.
    """
    workers = Workers.of(jobs)
    waiting = split_jobs(jobs, workers.count) if workers.count > 1 else []
    if len(waiting) < 2:
        packing.train_jobs(jobs, console, ended)
        return
    free = list(range(min(workers.count, len(waiting))))
    threads = max(1, torch.get_num_threads() // len(free))
    running: dict[Connection, _Worker] = {}
    with show_progress(console) as screen:
        try:
            while waiting or running:
                while waiting and free:
                    worker = _Worker(free.pop(0), waiting.pop(0), workers, threads, screen, ended)
                    running[worker.connection] = worker
                for connection in wait(list(running)):
                    worker = running[connection]  # type: ignore[index]
                    if not worker.hear():
                        del running[worker.connection]
                        free.append(worker.number)
        except BaseException:
            _stop(list(running.values()))
            raise


def hand_over(jobs: Sequence[Job]) -> list[Job]:
    """Release the folders of the jobs, and return the jobs for another process, which claims the folders itself."""
    for job in jobs:
        if job.resumed:
            job.resumed.release()
    return [replace(job, resumed=job.resumed and Run(job.resumed.folder, job.resumed.record)) for job in jobs]


class _Worker:
    """A worker process, which starts at once, and the jobs that it has not ended; the main process calls `hear`.

    Args:
        number: of the worker.
        jobs: its share of the sweep; folders of resumed runs are released for it.
        workers: the number of workers, and their GPUs.
        threads: CPU threads of the process.
        screen: shows its messages and progress.
        ended: called by `hear` with each job that has ended, and the error that ended it early or None.
    """

    def __init__(
        self,
        number: int,
        jobs: Sequence[Job],
        workers: Workers,
        threads: int,
        screen: Screen,
        ended: Callable[[Job, Exception | None], None],
    ) -> None:
        self.number = number
        self.name = workers.name_of(number)
        self.pending = {job.title: job for job in jobs}
        """Jobs that have not ended, by title."""
        self.screen = screen
        self.display = ReceivedDisplay(screen)
        """The progress of its training."""
        self.ended = ended
        sent = hand_over(jobs)
        context = _context()
        self.connection, its_end = context.Pipe(duplex=False)
        settings = (os.getcwd(), dict(os.environ), workers.gpu_of(number), threads, workers.sharing)
        self.process: BaseProcess = context.Process(target=_work, args=(sent, its_end, *settings))
        with _blocked_terminal_signals():
            self.process.start()
        its_end.close()

    def hear(self) -> bool:
        """Wait for the next message of the process and handle it; return False if the process has ended.

        Jobs that are then still pending end with a `RunFailedError`.
        """
        try:
            message, *arguments = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            self.display.hide()
            for job in self.pending.values():
                reason = f"its worker process ended with exit code {self.process.exitcode}"
                self.ended(
                    job,
                    RunFailedError(reason, remedy="Run the missing jobs with resume=DIR.", code=Code.PROCESS_ENDED),
                )
            return False
        self._handle(message, *arguments)
        return True

    def _handle(self, message: str, *arguments: Any) -> None:
        """Print a text, report a job that has ended, or show progress."""
        if message == "say":
            (text,) = arguments
            sweep_progress.print_once(self.screen.console, filter(str.strip, text.splitlines()), f"{self.name}: ")
        elif message == "end":
            title, error = arguments
            self.ended(self.pending.pop(title), error)
        else:
            self.display.receive(message, *arguments)


def _stop(workers: Sequence[_Worker]) -> None:
    """Stop the workers after their current steps and checkpoints, and wait for that; a second Ctrl-C kills them.

    Their last messages are discarded.
    """
    try:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            with suppress(EOFError, OSError):
                while True:
                    worker.connection.recv()
            worker.process.join()
    except BaseException:
        for worker in workers:
            worker.process.kill()
        raise


def _context() -> Any:
    """Return the context of worker processes: forks of a process that has imported torch, new ones on Windows.

    The fork server is a new process, in which CUDA is not initialised; it starts with the first worker.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _block_terminal_signals() -> set[Any]:
    """Block the terminal's signals for this process and those that it starts; return the mask before."""
    return signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGHUP])


@contextmanager
def _blocked_terminal_signals() -> Iterator[None]:
    """Block the terminal's signals for processes started within; this process receives them afterwards."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    mask = _block_terminal_signals()
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


# -- inside the worker process --


def _work(
    jobs: Sequence[Job],
    connection: Connection,
    folder: str,
    environment: Mapping[str, str],
    gpu: str | None,
    threads: int,
    sharing: int,
) -> None:
    """Train the jobs, and send messages and progress to the main process; this is all that a worker process does.

    Args:
        jobs: its share of the sweep.
        connection: to the main process.
        folder: the working folder.
        environment: variables of the main process; a fork server has those of its own start.
        gpu: name of its GPU; None: as in the main process.
        threads: CPU threads.
        sharing: workers on one device.
    """
    if hasattr(signal, "pthread_sigmask"):
        _block_terminal_signals()  # a fork server that was started elsewhere does not
    signal.signal(signal.SIGTERM, terminate)
    streams.protect()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # before torch counts the devices
    torch.set_num_threads(threads)

    lock = threading.Lock()

    def send(*message: Any) -> None:
        with lock:  # lines of progress come from a thread of their own
            connection.send(message)

    def ended(job: Job, error: Exception | None) -> None:
        send("end", job.title, error)

    console = Console(file=cast("IO[str]", _Lines(send)), highlight=False, soft_wrap=True)
    with show_progress(console):
        train_handed_over(jobs, console, ended, display=partial(SentDisplay, send), sharing=sharing)


def train_handed_over(
    jobs: Sequence[Job], console: Console, ended: Callable[[Job, Exception | None], None], **settings: Any
) -> None:
    """Train jobs that another process composed: claim the folders of started runs, and record failures.

    Errors are not raised but reported to `ended`, also those of a folder that cannot be claimed; a signal's exception
    passes. The folders are released at the end.

    Args:
        jobs, console, ended, settings: as for `packing.train_jobs`; each error can be pickled.
    """
    remember(override for job in jobs for override in job.overrides)
    for job in jobs:
        remember_config(job.config_as_written)
    pending = {job.title: job for job in jobs}

    def end(job: Job, error: Exception | None) -> None:
        """Record the failure of a job, and report the job with an error that can be pickled."""
        del pending[job.title]
        if error is not None:
            job.fail(error)
        if error is not None and not isinstance(error, UserError | DivergedError):
            error = RuntimeError(f"{type(error).__name__}: {error}")  # other ones may not unpickle
        ended(job, error)

    reopened = []
    try:
        for job in jobs:
            try:
                reopened.append(replace(job, resumed=job.resumed and Run.reopen(job.folder)))
            except UserError as error:
                end(job, error)
        packing.train_jobs(reopened, console, end, **settings)
    except Exception as error:
        for job in list(pending.values()):
            end(job, error)
    finally:
        for job in reopened:
            if job.resumed:
                job.resumed.release()


class _Lines(io.TextIOBase):
    """A text file that sends its lines to the main process."""

    def __init__(self, send: Callable[..., None]) -> None:
        self.send = send

    def write(self, text: str) -> int:
        self.send("say", text)
        return len(text)


def _end_with_parent() -> None:
    """Exit this worker, with code 1, when the main process ends; otherwise it would keep its runs locked."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
