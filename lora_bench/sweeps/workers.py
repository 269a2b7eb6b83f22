"""A sweep's packs on several devices: a process for each pack, as many at a time as there are workers.

A worker trains its part of the jobs as `packing` would here, on a GPU of its own, and tells this process what there is
to say and to show. Ctrl-C does not reach it: it stops, after its step and its checkpoints, when this process tells it
to (SIGTERM), and ends with it.
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

from lora_bench.console import streams
from lora_bench.console.progress import Display, RowDisplay, Screen
from lora_bench.console.redaction import remember, remember_config
from lora_bench.console.signals import terminate
from lora_bench.console.text import sanitise
from lora_bench.errors import Code, DivergedError, RunFailedError, UserError
from lora_bench.records.run_folder import Run
from lora_bench.sweeps import packing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess
    from types import TracebackType

    from lora_bench.records.job import Job
    from lora_bench.sweeps.packing import Group


@dataclass(frozen=True)
class Workers:
    """How many processes there are, and what each has of the machine."""

    count: int
    gpus: list[str]
    """The names of those that they take in turn, as CUDA_VISIBLE_DEVICES knows them; none: they are on the CPU."""

    @classmethod
    def of(cls, jobs: Sequence[Job]) -> Workers:
        """Those that the settings of a sweep's jobs ask for, or one for each GPU."""
        if not jobs:
            return cls(1, [])
        settings = jobs[0].settings
        found = 0 if settings.trainer.device == "cpu" else torch.cuda.device_count()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",")[:found] if visible else [str(i) for i in range(found)]
        return cls(settings.pack.workers or max(1, len(gpus)), gpus)

    @property
    def sharing(self) -> int:
        """How many of them are on one device."""
        return math.ceil(self.count / max(1, len(self.gpus)))

    @property
    def devices(self) -> int:
        """How many compute at the same time; the processes on a CPU share its cores."""
        return min(self.count, max(1, len(self.gpus)))

    def gpu_of(self, worker: int) -> str | None:
        return self.gpus[worker % len(self.gpus)] if self.gpus else None

    def name_of(self, worker: int) -> str:
        return f"worker {worker}" if self.sharing > 1 else f"gpu {self.gpu_of(worker)}"


def cut(group: Group, most: int) -> list[Group]:
    """The group in even parts of at most so many jobs; jobs that halving compares stay together."""
    size = len(group.jobs)
    count = 1 if group.experiments[0].pack.halving else math.ceil(size / most)
    ends = [size * i // count for i in range(count + 1)]
    return [
        replace(group, jobs=group.jobs[start:end], experiments=group.experiments[start:end])
        for start, end in pairwise(ends)
    ]


def parts(jobs: Sequence[Job], workers: int) -> list[list[Job]]:
    """The jobs, cut so that all workers have some, the largest part first; those of a part may share a backbone."""
    most = math.ceil(len(jobs) / workers)
    found = [part.jobs for group in packing.grouped(jobs) for part in cut(group, most)]
    return sorted(found, key=len, reverse=True)


def run(jobs: Sequence[Job], console: Console, ended: Callable[[Job, Exception | None], None]) -> None:
    """Train the jobs, packed, on as many workers as there are; one alone is this process itself.

    Args:
        jobs: of one sweep, checked.
        console: where to tell how it goes.
        ended: called with each job when it has ended, and what ended it before its time.
    """
    workers = Workers.of(jobs)
    waiting = parts(jobs, workers.count) if workers.count > 1 else []
    if len(waiting) < 2:
        packing.run(jobs, console, ended)
        return
    free = list(range(min(workers.count, len(waiting))))
    threads = max(1, torch.get_num_threads() // len(free))
    running: dict[Connection, _Worker] = {}
    with Screen(console) as screen:
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


def handed_over(jobs: Sequence[Job]) -> list[Job]:
    """The jobs for another process to train, which takes their folders itself: this one gives up those that it has."""
    for job in jobs:
        if job.begun:
            job.begun.release()
    return [replace(job, begun=job.begun and Run(job.begun.folder, job.begun.record)) for job in jobs]


class _Worker:
    """A process as this one sees it, from its start on."""

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
        self.left = {job.title: job for job in jobs}
        """Jobs of which it has not said that they ended."""
        self.screen = screen
        self.ended = ended
        sent = handed_over(jobs)
        context = multiprocessing.get_context("spawn")
        self.connection, its_end = context.Pipe(duplex=False)
        settings = (os.getcwd(), workers.gpu_of(number), threads, workers.sharing, screen.console.is_terminal)
        self.process: SpawnProcess = context.Process(target=_work, args=(sent, its_end, *settings))
        with _out_of_the_terminal_s_reach():
            self.process.start()
        its_end.close()

    def hear(self) -> bool:
        """Do what the process asks for next; False where it has ended, and with it the jobs that it had left."""
        try:
            what, *told = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            self.screen.displays.pop(self.number, None)
            for job in self.left.values():
                reason = f"the process that trained it ended with {self.process.exitcode}"
                self.ended(
                    job,
                    RunFailedError(reason, remedy="Run what the sweep lacks with resume=DIR.", code=Code.PROCESS_ENDED),
                )
            return False
        getattr(self, f"_{what}")(*told)
        return True

    def _say(self, text: str) -> None:
        for line in filter(str.strip, text.splitlines()):
            self.screen.console.print(sanitise(f"{self.name}: {line}"))

    def _show(self, steps: int, names: Sequence[str]) -> None:
        self.screen.displays[self.number] = RowDisplay(self.screen.console, steps, names)

    def _stepped(self, *told: Any) -> None:
        self.screen.displays[self.number].stepped(*told)

    def _evaluated(self, *told: Any) -> None:
        self.screen.displays[self.number].evaluated(*told)

    def _hide(self) -> None:
        del self.screen.displays[self.number]

    def _end(self, title: str, error: Exception | None) -> None:
        self.ended(self.left.pop(title), error)


def _stop(workers: Sequence[_Worker]) -> None:
    """Let them end their steps and leave their checkpoints; whoever cannot wait asks again, and they are killed."""
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


@contextmanager
def _out_of_the_terminal_s_reach() -> Iterator[None]:
    """Processes that are started within it never get what a terminal sends; this one gets it afterwards."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGHUP])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# -- in the worker's own process --


def _work(
    jobs: Sequence[Job],
    connection: Connection,
    folder: str,
    gpu: str | None,
    threads: int,
    sharing: int,
    live: bool,
) -> None:
    """Train the jobs and tell the process that has the screen of it."""
    signal.signal(signal.SIGTERM, terminate)
    streams.protect()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.chdir(folder)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # before anything here looks at the devices
    torch.set_num_threads(threads)

    def send(*message: Any) -> None:
        connection.send(message)

    def ended(job: Job, error: Exception | None) -> None:
        send("end", job.title, error)

    console = Console(file=cast("IO[str]", _Lines(send)), highlight=False, soft_wrap=True)
    train(jobs, console, ended, display=partial(_Told, send) if live else Display, sharing=sharing)


def train(
    jobs: Sequence[Job], console: Console, ended: Callable[[Job, Exception | None], None], **settings: Any
) -> None:
    """Train jobs that another process has composed: take the folders of those that have begun, and record failures.

    Args:
        jobs, console, ended, settings: as for `packing.run`; what ends jobs before their time can be sent.
    """
    remember(override for job in jobs for override in job.overrides)
    for job in jobs:
        remember_config(job.config_as_written)
    left = {job.title: job for job in jobs}

    def end(job: Job, error: Exception | None) -> None:
        del left[job.title]
        if error is not None:
            job.fail(error)
        if error is not None and not isinstance(error, UserError | DivergedError):
            error = RuntimeError(f"{type(error).__name__}: {error}")  # another's may not be made again elsewhere
        ended(job, error)

    taken = []
    try:
        for job in jobs:
            try:
                taken.append(replace(job, begun=job.begun and Run.reopen(job.folder)))
            except UserError as error:
                end(job, error)
        packing.run(taken, console, end, **settings)
    except Exception as error:
        for job in list(left.values()):
            end(job, error)
    finally:
        for job in taken:
            if job.begun:
                job.begun.release()


class _Lines(io.TextIOBase):
    """A file for a console whose lines are sent."""

    def __init__(self, send: Callable[..., None]) -> None:
        self.send = send

    def write(self, text: str) -> int:
        self.send("say", text)
        return len(text)


class _Told(Display):
    """Shows nothing: what it is told is told to the process that has the screen."""

    def __init__(self, send: Callable[..., None], console: Console, steps: int, names: Sequence[str]) -> None:
        super().__init__(console, steps, names)
        self.send = send
        send("show", steps, list(names))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.send("hide")

    def stepped(self, step: int, losses: Mapping[int, float], pairs: int) -> None:
        self.send("stepped", step, dict(losses), pairs)

    def evaluated(self, member: int, line: dict[str, Any]) -> None:
        self.send("evaluated", member, line)


def _end_with_parent() -> None:
    """A worker that nobody hears would keep its runs from whoever goes on with them."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
