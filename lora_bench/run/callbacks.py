"""Callbacks of the Python interface: code of the user that follows the training of a run, and may stop it early.

    class StopAtLoss(Callback):
        def on_step(self, run, step, losses, pairs):
            run.should_stop = losses[0] < 0.1

    train(model="minilm", data="toy", callbacks=[StopAtLoss()])

The hooks are called in the process that trains, after the record is written. They get copies of the record's content,
so that nothing they do changes it.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from copy import deepcopy
from typing import TYPE_CHECKING, Any, TextIO

from lora_bench.config.launch import Launch
from lora_bench.errors import Code, UserError, require
from lora_bench.run.trained_run import TrainedRun

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from lora_bench.config.schema import Packing
    from lora_bench.records.run_folder import Run
    from lora_bench.run.packed_run import PackedRun


class ActiveRun:
    """A run in training, as its callbacks see it; each run of a sweep or search has its own.

    Args:
        run: the run's folder and record.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self.should_stop = False
        """Set to True to end the run after this step: it is evaluated, and becomes `done` with its best state.

        A method that chooses ranks during training, such as AdaLoRA, first trains on until its ranks are final.
        """

    @property
    def folder(self) -> Path:
        """The run's folder; in a search it ends with `trials/3` or `final/0`."""
        return self._run.folder

    @property
    def record(self) -> dict[str, Any]:
        """A copy of the content of `run.json` so far, with the run's `config`."""
        return deepcopy(self._run.record)


class Callback:
    """Hooks that are called while a run trains; a subclass overrides those it needs.

    An exception in a hook stops the training, as Ctrl-C does: runs that have not ended become `interrupted` and can be
    resumed from their last checkpoints. The exception is raised by `train`, `sweep` or `search`.
    """

    def on_step(self, run: ActiveRun, step: int, losses: Sequence[float], pairs: int) -> None:
        """Handle an optimizer step that was made.

        Args:
            run: that trains.
            step: its number, from 1.
            losses: the loss of the step, one for each member of the run that still trains; a run without an ensemble
                and without several tasks has one.
            pairs: training examples of the step's batch.
        """

    def on_evaluation(self, run: ActiveRun, member: str, line: Mapping[str, Any]) -> None:
        """Handle an evaluation on the selection split.

        Args:
            run: that trains.
            member: `member_0` of an ensemble, or the name of a task that has an adapter of its own; else empty.
            line: `step`, `epoch`, `split`, `metrics` by name, and `seconds`, as in `metrics.jsonl`.
        """

    def on_end(self, run: TrainedRun) -> None:
        """Handle a run that has ended; its record and its files are written.

        `run.record["status"]` is `done`, `eliminated`, `diverged` or `failed`. The hook is not called for a run that is
        interrupted, nor if an error ends all runs of a pack: then the exception is raised.
        """


class CallbackStop(SystemExit):
    """The exception of a callback on its way to the caller: it ends runs as a signal does, so they can be resumed."""

    def __init__(self, error: Exception) -> None:
        super().__init__(1)
        self.error = error


class CallbackCaller:
    """Calls the hooks of the present callbacks for the runs of a pack.

    Raises:
        CallbackStop: a hook has raised an exception.
    """

    def __init__(self) -> None:
        self.callbacks, self.stdout = current(), _stdout.get()
        self._active: dict[PackedRun, ActiveRun] = {}

    def stepped(self, run: PackedRun, step: int, losses: Sequence[float], pairs: int) -> None:
        """Call `on_step`."""
        for callback in self.callbacks:
            with self._guarded():
                callback.on_step(self._active_run(run), step, list(losses), pairs)
        self._pass_stop(run)

    def evaluated(self, run: PackedRun, member: str, line: Mapping[str, Any]) -> None:
        """Call `on_evaluation`."""
        for callback in self.callbacks:
            with self._guarded():
                callback.on_evaluation(self._active_run(run), member, deepcopy(dict(line)))
        self._pass_stop(run)

    def ended(self, run: Run) -> None:
        """Call `on_end`."""
        for callback in self.callbacks:
            with self._guarded():
                callback.on_end(TrainedRun(run.folder, deepcopy(run.record)))

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Turn an exception into a `CallbackStop`, which no handler for errors of a run takes for such an error."""
        try:
            with redirect_stdout(self.stdout or sys.stdout):
                yield
        except Exception as error:
            raise CallbackStop(error) from error

    def _active_run(self, run: PackedRun) -> ActiveRun:
        """Return the one object that stands for a run in all hooks."""
        if run not in self._active:
            assert run.record is not None
            self._active[run] = ActiveRun(run.record)
        return self._active[run]

    def _pass_stop(self, run: PackedRun) -> None:
        """Pass a request to stop to the members of a run."""
        if run in self._active and self._active[run].should_stop:
            for member in run.members:
                member.stop_requested = True


_current: ContextVar[tuple[Callback, ...]] = ContextVar("callbacks", default=())
_stdout: ContextVar[TextIO | None] = ContextVar("stdout", default=None)


def current() -> tuple[Callback, ...]:
    """Return the callbacks of the training that runs in this process; without a Python interface there are none."""
    return _current.get()


@contextmanager
def calling(callbacks: Sequence[Callback], stdout: TextIO | None = None) -> Iterator[None]:
    """Call these callbacks for all runs that train within the context.

    Args:
        callbacks: to call.
        stdout: receives what they print; None: standard output as it is then.

    Raises:
        UserError: one is not a `Callback`, or `torchrun` has started several processes.
        Exception: of a callback; its notes say what is kept and how to resume.
    """
    for callback in callbacks:
        _check_type(callback)
    if callbacks and Launch.read().world_size > 1:
        reason, remedy = "cannot be called in the processes of torchrun", "Start the script without torchrun."
        raise UserError(reason, key="callbacks", remedy=remedy, code=Code.UNSUPPORTED)
    tokens = _current.set(tuple(callbacks)), _stdout.set(stdout)
    try:
        yield
    except CallbackStop as stop:
        for note in getattr(stop, "__notes__", ()):
            stop.error.add_note(note)
        raise stop.error from None
    finally:
        _current.reset(tokens[0])
        _stdout.reset(tokens[1])


def _check_type(callback: object) -> None:
    """Refuse an object that is not a `Callback`, such as the class in place of an object of it."""
    value = getattr(callback, "__name__", type(callback).__name__)
    reason = "is a class, not an object of it" if isinstance(callback, type) else "is not a callback"
    remedy = "Give objects of subclasses of lora_bench.api.Callback."
    require(isinstance(callback, Callback), "callbacks", value, reason, remedy)


def check_callbacks(packing: Packing) -> None:
    """Refuse worker processes for training with callbacks, which are called in this process."""
    if current() and (packing.workers or 1) > 1:
        reason, remedy = "starts processes in which callbacks cannot be called", "Leave it out, or the callbacks."
        raise UserError(reason, key="pack.workers", value=packing.workers, remedy=remedy, code=Code.CONFLICT)
