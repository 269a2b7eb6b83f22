"""The training loop: a pack of K members, trained together, each as in a single run.

for every step:   forward once, one loss per member, backward; then per member clip, hooks, AdamW, weight average
                  (members that learn different tasks have batches of their own, one after the other in each step)
when due:         score the selection split, keep each member's best state, stop early; halve; save checkpoints

A failure of one member ends that member alone. Members that have ended are not computed any more.
"""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

from lora_bench.config.metric_names import EVALUATIONS_AT_TARGET
from lora_bench.errors import LostFolderError, RunFailedError
from lora_bench.training import head_initialisation
from lora_bench.training.distributed import SINGLE_PROCESS, Processes
from lora_bench.training.member_run import MemberRun, isolate_failure
from lora_bench.training.memory import trim_freed_memory
from lora_bench.training.micro_batching import in_micro_batches
from lora_bench.training.model_selection import evaluate_members, update_best
from lora_bench.training.successive_halving import eliminated, rank_by, survivors
from lora_bench.training.task_mixture import TaskData, TaskMixture, optimizer_steps
from lora_bench.training.training_state import gather
from lora_bench.training.weight_averaging import averaged_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from lora_bench.adapters.pack.pack import Pack
    from lora_bench.config.schema import Metric, Optimizer, Trainer
    from lora_bench.data.batching import Batch
    from lora_bench.data.tokenization import TokenTable
    from lora_bench.training.member_run import MemberProgress
    from lora_bench.training.signals import Interruption


class Observer(Protocol):
    """Follows the training; implemented by the recorder."""

    def stepped(self, step: int, losses: Mapping[int, float], pairs: int) -> None:
        """Note an optimizer step: the loss of each active member, and the pairs of the step's batches."""

    def evaluated(self, member: int, line: dict[str, Any]) -> None:
        """Note a member's evaluation on the selection split; `line` is for its log."""

    def ended(self, members: Sequence[int]) -> None:
        """Handle members that have just ended; those that did not fail are at their best state."""


def total_steps(trainer: Trainer, pairs: int) -> int:
    """Return the optimizer updates that the settings ask for, on so many training pairs of one task."""
    return optimizer_steps(trainer, math.ceil(pairs / trainer.batch_size))


def prepare(
    pack: Pack,
    trainer: Trainer,
    mixtures: Sequence[TaskMixture],
    members: Iterable[int] | None = None,
    *,
    heads_only: bool = False,
) -> list[str]:
    """Initialise adapters, ranks and heads from training batches, if a member's settings ask for it.

    Args:
        pack: before its first step.
        trainer: gives the batch size.
        mixtures: the tasks that the members learn.
        members: to prepare; None: all.
        heads_only: leave the adapters and their ranks as they are.

    Returns:
        Notes for the record on initialisations that had too few pairs.

    Raises:
        UserError: the ranks of a member cannot be allocated; further members are not prepared.
    """
    chosen = range(pack.size) if members is None else list(members)
    notes: list[str | None] = []
    for mixture in mixtures:
        for k in (k for k in mixture.members if k in chosen):
            with pack.only([k]):
                single = mixture.for_initialisation(k)
                head_initialisation.centre_numbers(pack, k, single.tasks.values())
                by_task = (task.batches(pack, trainer.batch_size) for task in single.by_task())
                fitted = head_initialisation.fit(pack, k, by_task)
                notes += fitted.notes
                if not heads_only:
                    notes.append(pack.members[k].adapter.prepare(pack, k, single.batches(pack, trainer.batch_size)))
                if not fitted.pair_features:
                    notes.append(head_initialisation.initialise(pack, k, single.batches(pack, trainer.batch_size)))
    return [note for note in notes if note]


class MixtureSteps:
    """Training steps of the members that learn one task mixture, on its batches.

    Args:
        pack: the pack that trains.
        mixture: the tasks, and the numbers of its members.
        members: all of the pack.
        trainer: batch size, micro-batches and objective.
        first_step: number of the first step to make; the batches of earlier ones are skipped.
    """

    def __init__(
        self, pack: Pack, mixture: TaskMixture, members: Sequence[MemberRun], trainer: Trainer, first_step: int
    ) -> None:
        self.pack, self.mixture, self.trainer = pack, mixture, trainer
        self.members = [members[k] for k in mixture.members]
        self.backward = mixture.backward(pack, trainer)
        batches = mixture.batches(pack, trainer.batch_size, self.backward.multiple)
        self.batches = islice(batches, first_step - 1, None)
        self.largest = 0
        """Tokens of the largest batch so far, padding included."""

    def step(self, step: int, processes: Processes) -> tuple[dict[int, float], int]:
        """Make one update of every running member; a failure in its update ends that member alone.

        Returns:
            The loss by member, and the pairs of the batch; no losses and 0 if all members of the mixture have ended.
        """
        pack, learning = self.pack, [member for member in self.members if member.is_running]
        if not learning:
            return {}, 0
        numbers = [member.index for member in learning]
        began = time.perf_counter()
        with pack.only(numbers):
            batch = next(self.batches).select_members([self.mixture.members.index(k) for k in numbers])
            losses = dict.fromkeys(numbers, 0.0)
            if batch.input_ids.numel() > self.largest:
                self.largest = batch.input_ids.numel()
                trim_freed_memory()  # the blocks of smaller batches do not fit this one
            if pack.backbone.is_sharded:
                work = partial(self._backward_in_step, batch, processes)
                losses = in_micro_batches(pack, batch, self.trainer.micro_batch_size, work)
            elif (shard := processes.shard(batch)) is not None:
                work = partial(self.backward, shard, batch.pairs)
                losses = in_micro_batches(pack, shard, self.trainer.micro_batch_size, work)
            trained = (p for k in numbers for p in pack.trainable(k, batch.head).values())
            losses = processes.all_reduce(trained, losses)
        for member in learning:
            with isolate_failure(member.progress):
                member.optimizer_step(step, losses[member.index])
        seconds = time.perf_counter() - began
        for member, padding in zip(learning, batch.padding(len(learning)), strict=True):
            member.count(step, batch, padding, seconds)
        return losses, batch.pairs

    def _backward_in_step(self, batch: Batch, processes: Processes, pairs: int) -> dict[int, float]:
        """Accumulate the gradients of this process's share of a batch, in as many passes as every process makes.

        Args:
            batch: the global batch.
            processes: that share it.
            pairs: pairs of each member per micro-batch.

        Returns:
            By member, the share's contribution to its mean loss.
        """
        shares = processes.equal_shares(batch, pairs)
        return self.backward.accumulate((micro, len(positions) / batch.pairs) for micro, positions in shares)


class PackTraining:
    """A pack in training: K members, the task mixtures that they learn, and the observer.

    Args:
        pack: K members on one backbone, prepared.
        members: one per member of the pack, at the same step; only running ones are trained.
        mixtures: the tasks that they learn; each member is in one mixture.
        trainer: durations, micro-batches and objective, shared by all members.
        metrics: further metrics to log.
        observer: hears of steps, evaluations and ends.
        interruption: defers signals: the step is completed and the state saved before a signal takes effect.
        processes: the processes that share each batch; all make the same steps.
    """

    def __init__(
        self,
        pack: Pack,
        members: Sequence[MemberRun],
        mixtures: Sequence[TaskMixture],
        trainer: Trainer,
        *,
        metrics: Mapping[str, Metric] | None = None,
        observer: Observer | None = None,
        interruption: Interruption | None = None,
        processes: Processes = SINGLE_PROCESS,
    ) -> None:
        self.pack, self.members, self.mixtures, self.trainer = pack, members, mixtures, trainer
        self.metrics, self.observer = metrics or {}, observer
        self.interruption, self.processes = interruption, processes
        self.last_step = max(member.schedule.last_step for member in members)

    def fit(self, *, halving: bool = False) -> None:
        """Train every running member, and leave it at its best main metric; of several tasks at the best mean.

        Members that are `done` already are reported to the observer first. The pack is left in evaluation mode.

        Args:
            halving: stop the worse members early, until one is left (`successive_halving.survivors`).

        Raises:
            KeyboardInterrupt: Ctrl-C was noted; checkpoints of its step are saved.
            SystemExit: another signal was noted; the same.
        """
        pack, first_step = self.pack, 1 + max(member.progress.steps for member in self.members)
        steps_of = [MixtureSteps(pack, mixture, self.members, self.trainer, first_step) for mixture in self.mixtures]
        pack.train()
        self.end(member for member in self.members if member.progress.status == "done")  # before the interruption
        for step in range(first_step, self.last_step + 1):
            active = self.running()
            if not active:
                break
            losses: dict[int, float] = {}
            pairs = 0
            for mixture_steps in steps_of:
                mixture_losses, mixture_pairs = mixture_steps.step(step, self.processes)
                losses |= mixture_losses
                pairs += mixture_pairs
            if self.observer:
                self.observer.stepped(step, losses, pairs)
            eliminated = self.evaluate(step, halving)
            for member in self.running():
                if step == member.schedule.last_step < self.last_step:  # others have more to learn
                    member.progress.status = "done"
            # From here on all processes agree on the signal; one that arrives later takes effect after the next step.
            signal = self.processes.any_signal(self.interruption.requested_signal) if self.interruption else None
            self.save(step, active, needed=signal is not None or bool(eliminated))
            eliminated = [member for member in eliminated if member.is_running]
            for member in eliminated:
                member.progress.status = "eliminated"
            self.end(eliminated)
            if self.interruption and signal is not None:
                self.interruption.raise_signal(signal)
            self.end(member for member in active if member.progress.status not in ("running", "eliminated"))
        remaining = self.running()
        for member in remaining:
            member.progress.status = "done"
        self.end(remaining)
        pack.eval()

    def running(self) -> list[MemberRun]:
        """Return the members that still train, and make them the active members of the pack."""
        running = [member for member in self.members if member.is_running]
        self.pack.active = [member.index for member in running]
        return running

    def evaluate(self, step: int, halving: bool) -> list[MemberRun]:
        """Evaluate the members whose evaluation is due, keep their best states, and stop those that improve no more.

        Members that are asked to stop are evaluated too, and then `done`.

        They are evaluated with their averaged weights. When halving has to eliminate, all running members are
        evaluated.

        Returns:
            The members that halving eliminates; the caller changes their status.
        """
        running = self.running()
        limit = survivors(step, self.last_step)
        is_crowded = halving and step < self.last_step and len(running) > limit
        due = [member for member in running if member.schedule.evaluation_due(step) or member.stops_at(step)]
        evaluated = running if is_crowded else due
        if not evaluated:
            return []
        ranking: dict[int, tuple[float, float]] = {}
        numbers = [member.index for member in evaluated]
        with averaged_weights(member.average for member in evaluated):
            results = evaluate_members(self.pack, self.mixtures, numbers, self.trainer.eval_batch_size, self.processes)
            for member in evaluated:
                with isolate_failure(member.progress):
                    # An evaluation that only halving needs chooses no state: without halving it would not take place.
                    may_choose = member in due and member.ranks_are_final(step)
                    line = update_best(
                        member, step, results[member.index], self.metrics, self.trainer.stop_at, may_choose=may_choose
                    )
                    if line is not None:
                        ranking[member.index] = rank_by(line["metrics"], member.progress.main_metric)
                        if self.observer:
                            self.observer.evaluated(member.index, line)
                    self.stop_early(member)
        for member in due:  # after all evaluations: the members of a run end together
            if member.is_running and member.stops_at(step):
                member.progress.status = "done"
        if not is_crowded:
            return []
        still_running = {member.index: ranking[member.index] for member in self.running()}
        return [self.members[k] for k in eliminated(still_running, limit)]

    def stop_early(self, member: MemberRun) -> None:
        """Set a member's status to `done` if its settings for stopping early say so; the caller scores and closes it.

        They are `early_stopping_patience` evaluations in a row without improvement, and `EVALUATIONS_AT_TARGET` in a
        row that reach `stop_at`. One that is None does not stop it.
        """
        progress, patience = member.progress, self.trainer.early_stopping_patience
        if patience is not None and progress.without_gain >= patience:
            progress.status = "done"
        if progress.at_target >= EVALUATIONS_AT_TARGET:
            progress.status = "done"

    def save(self, step: int, active: Sequence[MemberRun], *, needed: bool) -> None:
        """Save checkpoints if they are due, or if a member ends at this step, because its scoring may be interrupted.

        They are due every `checkpoint_every` steps, by default as often as evaluations, and at the last step. All
        members of a run are saved if one of them trains or has become done at this step. If writing fails, the member
        ends only if checkpoints are due or needed, or the run's folder is lost.

        Args:
            step: the update that was just made.
            active: the members that made it.
            needed: a signal or an elimination requires checkpoints.
        """
        every = self.trainer.checkpoint_every or max(member.schedule.eval_every for member in self.members)
        needed = needed or step % every == 0
        ending = [member for member in active if member.progress.status == "done"]
        if needed or ending or step == self.last_step:
            alive = {member.index for member in [*self.running(), *ending]}
            for member in self.members:
                if member.checkpoints and not alive.isdisjoint(member.siblings):
                    with isolate_failure(member.progress):
                        try:
                            state = gather(member, keep=self.processes.is_leader)
                            if self.processes.is_leader:
                                member.checkpoints.save(step, *state)
                        except RunFailedError as error:
                            if needed or isinstance(error, LostFolderError):
                                raise  # otherwise training goes on, and its result can still be scored and saved

    def end(self, members: Iterable[MemberRun]) -> None:
        """Load the best states of members that have ended, and report these members to the observer together.

        A member without an evaluation keeps its weights; without members nothing happens. Signals take effect at once
        while the observer scores members that are done.
        """
        ended = list(members)
        for member in ended:
            member.load_best()
        if ended and self.observer:
            is_scored = any(member.progress.status == "done" for member in ended)  # takes time, so signals act at once
            with self.interruption.signals_act_at_once() if self.interruption and is_scored else nullcontext():
                self.observer.ended([member.index for member in ended])


def fit(
    pack: Pack,
    optimizers: Sequence[Optimizer],
    trainer: Trainer,
    train: TokenTable,
    selection: TokenTable,
    *,
    second_view: TokenTable | None = None,
    flop_models: Sequence[Callable[[int, int], float]] = (),
    observer: Observer | None = None,
) -> list[MemberProgress]:
    """Train a pack on one task without records, as benchmarks do, and leave each member at its best state.

    Args:
        pack: K members on one backbone, prepared.
        optimizers: settings of each member's optimizer.
        trainer: durations, micro-batches and objective.
        train: the training pairs.
        selection: the pairs on which the best state is chosen.
        second_view: second views of the training pairs, if the objective has any.
        flop_models: FLOPs of a training step of each member by rows and tokens, if they are to be counted.
        observer: hears of steps, evaluations and ends.

    Returns:
        The progress of every member, also of those that diverged or failed.
    """
    mixture = TaskMixture(range(pack.size), {"": TaskData(train, selection, second_view)})
    members = [MemberRun.start(pack, k, settings, mixture, trainer) for k, settings in enumerate(optimizers)]
    for member, model in zip(members, flop_models, strict=False):
        member.flop_model = model
    PackTraining(pack, members, [mixture], trainer, observer=observer).fit()
    return [member.progress for member in members]


def prepare_task(pack: Pack, trainer: Trainer, train: TokenTable) -> list[str]:
    """Initialise all members from the training pairs of one task, if their settings ask for it: see `prepare`."""
    return prepare(pack, trainer, [TaskMixture(range(pack.size), {"": TaskData(train, train)})])
