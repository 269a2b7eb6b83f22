"""One member of a pack while it trains: settings, optimizer, weight average, schedule, progress and checkpoints."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from lora_bench.backbones.sharding import local_tensor, total_norm
from lora_bench.errors import DivergedError
from lora_bench.training.optim import make_optimizer, set_learning_rate
from lora_bench.training.weight_averaging import WeightAverage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from lora_bench.adapters.pack.pack import Pack
    from lora_bench.config.schema import Optimizer, Trainer
    from lora_bench.data.batching import Batch
    from lora_bench.training.checkpoint import Checkpoints
    from lora_bench.training.task_mixture import TaskMixture


@dataclass
class MemberProgress:
    """The progress of one member: its status, its best state and its costs so far."""

    status: str = "running"
    """`running`, `done`, `failed`, `eliminated` by halving, or `diverged`: a loss, gradient or score was not finite."""
    error: Exception | None = None
    """The reason why it diverged or failed."""
    best: dict[str, Any] | None = None
    """The log line of its best evaluation: step, epoch, metrics on the selection split."""
    state: dict[str, Tensor] = field(default_factory=dict)
    """Its trained tensors at that evaluation, of sharded ones the part of this process."""
    scores: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    """Scores of the selection split at that evaluation, by task: (N,) or (N, C) each, as `predict` returns them."""
    main_metric: str = "mcc"
    """The metric that chooses the best evaluation."""
    steps: int = 0
    """Optimizer updates made."""
    seconds: float = 0.0
    """Wall time of the training steps, without evaluations."""
    pairs: int = 0
    """Training pairs seen; a pair with two views in a step counts once."""
    tokens: int = 0
    """Tokens of the training steps, padding and both views included."""
    padding: int = 0
    """Padding tokens among them."""
    flops: float = 0.0
    """FLOPs of the training steps, forward and backward."""
    without_gain: int = 0
    """Consecutive evaluations without a better main metric; those before ranks are final do not count."""
    at_target: int = 0
    """Consecutive evaluations, the last included, whose main metric reached `stop_at`; counted like `without_gain`."""

    @property
    def is_running(self) -> bool:
        return self.status == "running"

    @property
    def best_value(self) -> float:
        """The main metric of the best evaluation; minus infinity before the first."""
        return -math.inf if self.best is None else float(self.best["metrics"][self.main_metric])


@dataclass(frozen=True)
class Schedule:
    """The steps of a member's evaluations and of its end, in optimizer updates."""

    steps_per_epoch: int
    last_step: int
    eval_every: int

    @classmethod
    def of(cls, mixture: TaskMixture, trainer: Trainer) -> Schedule:
        """Return the schedule that the settings ask for on these tasks."""
        per_epoch = mixture.steps_per_epoch(trainer.batch_size)
        return cls(per_epoch, mixture.steps(trainer), trainer.eval_every or per_epoch)

    def evaluation_due(self, step: int) -> bool:
        """Return whether the member is evaluated after this step; the last step always is."""
        return step % self.eval_every == 0 or step == self.last_step

    @property
    def evaluations(self) -> int:
        """The number of evaluations of a run that does not stop early."""
        return math.ceil(self.last_step / self.eval_every)


@dataclass
class MemberRun:
    """One member of a pack while it trains.

    Args:
        index: its number in the pack.
        pack: the pack that holds its adapter and head.
        settings: of its optimizer.
        optimizer: AdamW over its trained tensors.
        average: the mean of its weights.
        schedule: steps of its evaluations and of its end.
        progress: its status, best state and costs so far.
        siblings: numbers of the members of the same run, itself included.
        flop_model: FLOPs of one of its training steps by rows and tokens; None: they are not counted.
        checkpoints: the store of its states; None: its state is not saved.
        stop_requested: it ends after this step, once its ranks are final.
    """

    index: int
    pack: Pack
    settings: Optimizer
    optimizer: torch.optim.AdamW
    average: WeightAverage
    schedule: Schedule
    progress: MemberProgress
    siblings: Sequence[int]
    flop_model: Callable[[int, int], float] | None = None
    checkpoints: Checkpoints | None = None
    stop_requested: bool = False

    @classmethod
    def start(
        cls,
        pack: Pack,
        index: int,
        settings: Optimizer,
        mixture: TaskMixture,
        trainer: Trainer,
        progress: MemberProgress | None = None,
    ) -> MemberRun:
        """Return a member before its first step, as the only member of its run, without FLOP model and checkpoints."""
        progress = progress or MemberProgress()
        progress.main_metric = mixture.main_metric
        return cls(
            index,
            pack,
            settings,
            make_optimizer(settings, pack, index),
            WeightAverage(pack.trainable(index).values(), trainer.average),
            Schedule.of(mixture, trainer),
            progress,
            [index],
        )

    @property
    def is_running(self) -> bool:
        return self.progress.is_running

    def optimizer_step(self, step: int, loss: float) -> None:
        """Clip the member's gradients, call its method's hooks, update its weights and their average.

        The weights are averaged only once the ranks are final. The gradients are cleared.

        Args:
            step: number of the update, from 1.
            loss: of the step; a loss or gradient norm that is not finite sets the status `diverged`, without an update.
        """
        if not math.isfinite(loss):
            diverge(self.progress, step, f"loss {loss} is not finite")
            return
        norm = clip_gradients(self.pack, self.index, self.settings)
        if not math.isfinite(norm):
            diverge(self.progress, step, f"gradient norm {norm} is not finite")
            return
        adapter, updates = self.pack.members[self.index].adapter, self.pack.updates[self.index]
        last_step = self.schedule.last_step
        set_learning_rate(self.optimizer, self.settings, step, last_step)
        adapter.before_step(updates, step, last_step)
        self.optimizer.step()
        adapter.after_step(updates, step, last_step)
        self.optimizer.zero_grad(set_to_none=True)
        if self.ranks_are_final(step):
            self.average.update()

    def count(self, step: int, batch: Batch, padding: int, seconds: float) -> None:
        """Add a training step to the member's costs, counted as in a single run.

        Args:
            step: number of the step, from 1.
            batch: of the step.
            padding: padding tokens among the member's rows of it.
            seconds: wall time of the step.
        """
        B, T = batch.pairs, batch.input_ids.shape[1]
        progress, rows = self.progress, batch.orders * B
        progress.steps = step
        progress.seconds += seconds
        progress.pairs += B
        progress.tokens += rows * T
        progress.padding += padding
        progress.flops += self.flop_model(rows, T) if self.flop_model else 0.0

    def ranks_are_final(self, step: int) -> bool:
        """Return whether the method changes no more ranks; only then weights are averaged and a state is chosen."""
        return self.pack.members[self.index].adapter.ranks_final(step, self.schedule.last_step)

    def stops_at(self, step: int) -> bool:
        """Return whether the member was asked to end, and may end after this step, as its state can be chosen."""
        return self.stop_requested and self.ranks_are_final(step)

    def load_best(self) -> None:
        """Load the state of the best evaluation into the pack, if there was an evaluation."""
        if self.progress.state:
            self.pack.load_parts(self.index, self.progress.state)


def clip_gradients(pack: Pack, member: int, settings: Optimizer) -> float:
    """Clip a member's gradients to a norm of `grad_clip_norm`, and return their norm before that; 0 without gradients.

    None does not clip. torch's `clip_grad_norm_` calls an operator for each parameter; this function calls one for all.
    """
    gradients = [p.grad for p in pack.trainable(member).values() if p.grad is not None]
    norm = total_norm(gradients)
    if settings.grad_clip_norm is not None and norm > settings.grad_clip_norm:
        torch._foreach_mul_([local_tensor(gradient) for gradient in gradients], settings.grad_clip_norm / (norm + 1e-6))
    return norm


@contextmanager
def isolate_failure(progress: MemberProgress) -> Iterator[None]:
    """Turn an exception into the end of this member, so that the other members train on.

    Its status becomes `diverged` for a `DivergedError`, else `failed`; the exception is kept in `error` and not raised.
    KeyboardInterrupt and SystemExit pass.
    """
    try:
        yield
    except Exception as error:
        progress.status = "diverged" if isinstance(error, DivergedError) else "failed"
        progress.error = error


def diverge(progress: MemberProgress, step: int, reason: str) -> None:
    """End a member whose loss, gradient or scores are not finite at this step."""
    progress.status = "diverged"
    progress.error = DivergedError(f"step {step}: {reason}; the learning rate optimizer.lr may be too high")
