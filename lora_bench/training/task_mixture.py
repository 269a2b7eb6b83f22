"""Task mixtures: the training pairs of one task, or of several tasks in turn, each with a head of its own.

A batch holds pairs of one task. An epoch has as many batches as all tasks together; each task's share of them is
proportional to its size, in batches, to the power 1 / temperature (Raffel et al. 2020, section 3.5.2). At temperature 1
each pair comes once in an epoch; far above 1 all tasks get equally many batches, so pairs of small tasks are repeated.
The sequence of tasks depends on nothing else: members with different seeds have steps of the same tasks and shapes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING

import numpy as np

from lora_bench.data.batching import BatchPlan, training_batches
from lora_bench.training.cuda_graphs import Backward
from lora_bench.training.objective import balanced_weights, make_objective

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from lora_bench.adapters.pack.pack import Pack
    from lora_bench.config.schema import Trainer
    from lora_bench.data.batching import Batch
    from lora_bench.data.tokenization import TokenTable


MEAN_OF_MAIN_METRICS = "main"
"""Name of the mean over tasks whose main metrics differ."""


@dataclass(frozen=True)
class TaskData:
    """The splits of one task that training uses."""

    train: TokenTable
    """The training pairs."""
    selection: TokenTable
    """The pairs on which every choice is made; never the reported split."""
    second_view: TokenTable | None = None
    """Second views of the pairs of `train` (in reversed order, or perturbed), if the objective has any."""
    main_metric: str = "mcc"
    """The metric that chooses on the selection split."""

    def plan(self, batch_size: int, multiple: int = 1) -> BatchPlan:
        """Return the rows and the length of each batch; lengths are multiples of `multiple` tokens."""
        lengths = self.train.lengths
        for view in (self.train.reversed_view, self.second_view):
            if view is not None:
                lengths = np.maximum(lengths, view.lengths)
        return BatchPlan(lengths, batch_size, multiple)


@dataclass(frozen=True)
class TaskMixture:
    """The tasks that some members of a pack learn.

    Args:
        members: numbers of these members in the pack.
        tasks: by name; each table names the head of its task.
        temperature: of at least 1; above 1 small tasks get more than their share of the batches.
    """

    members: Sequence[int]
    tasks: Mapping[str, TaskData]
    temperature: float = 1.0

    @property
    def main_metric(self) -> str:
        """The main metric of all tasks; `MEAN_OF_MAIN_METRICS` if they differ."""
        names = {task.main_metric for task in self.tasks.values()}
        return names.pop() if len(names) == 1 else MEAN_OF_MAIN_METRICS

    def for_initialisation(self, member: int) -> TaskMixture:
        """Return the mixture for one of its members, with its tasks but without second views."""
        tasks = {name: replace(task, second_view=None) for name, task in self.tasks.items()}
        return replace(self, members=[member], tasks=tasks)

    def by_task(self) -> list[TaskMixture]:
        """Return a mixture of each task alone, for the same members."""
        return [replace(self, tasks={name: task}) for name, task in self.tasks.items()]

    def steps_per_epoch(self, batch_size: int) -> int:
        """Return the batches of an epoch over all tasks."""
        return sum(task.plan(batch_size).steps_per_epoch for task in self.tasks.values())

    def steps(self, trainer: Trainer) -> int:
        """Return the number of optimizer updates that the settings ask for."""
        return optimizer_steps(trainer, self.steps_per_epoch(trainer.batch_size))

    def backward(self, pack: Pack, trainer: Trainer) -> Backward:
        """Return the backward pass for batches of these tasks, with the objective that the settings name.

        Tasks must have second views if the objective needs them, and only then.
        """
        objectives = {}
        for task in self.tasks.values():
            weights = None
            outputs = pack.outputs(self.members[0], task.train.head)
            if trainer.class_weights == "balanced" and outputs > 1 and task.train.labels is not None:
                weights = balanced_weights(task.train.labels.astype(np.int64), outputs)
            objective = make_objective(trainer, weights)
            assert objective.orders == (1 if task.second_view is None else 2)
            objectives[task.train.head] = objective
        return Backward(pack, objectives, graphs=trainer.cuda_graphs)

    def batches(self, pack: Pack, batch_size: int, multiple: int = 1) -> Iterator[Batch]:
        """Yield training batches for these members without end, each of one task, on the CPU.

        A batch holds B pairs that all members share if their seeds of `order` are equal, else B pairs of each.

        Args:
            pack: gives the members' seeds and the padding token.
            batch_size: pairs of each member per batch.
            multiple: lengths of batches are multiples of this many tokens.
        """
        seeds = [pack.members[k].seed_of("order") for k in self.members]
        pad_id = pack.backbone.tokenizer.pad_token_id
        plans = [task.plan(batch_size, multiple) for task in self.tasks.values()]
        streams = [_endless(task, plan, seeds, pad_id) for task, plan in zip(self.tasks.values(), plans, strict=True)]
        shares = batches_per_task([plan.steps_per_epoch for plan in plans], self.temperature)
        for epoch in count():
            for number in np.random.default_rng(epoch).permutation(np.repeat(np.arange(len(plans)), shares)):
                yield next(streams[number])


def optimizer_steps(trainer: Trainer, steps_per_epoch: int) -> int:
    """Return the optimizer updates: `max_steps`, or without it those of `epochs`, rounded up and at least 1."""
    if trainer.max_steps is not None:
        return trainer.max_steps
    exact = trainer.epochs * steps_per_epoch
    return max(1, math.ceil(round(exact, 6)))  # 1.1 epochs of 10 steps are 11, not 11.000000000000002


def batches_per_task(sizes: Sequence[int], temperature: float) -> NDArray[np.int64]:
    """Divide the sum of the sizes in proportion to size ** (1 / temperature), by the largest-remainder method.

    Args:
        sizes: batches of an epoch of each task.
        temperature: of at least 1.

    Returns:
        Batches of each task in an epoch of the mixture, with the sum of `sizes`.
    """
    weights = np.array(sizes, np.float64) ** (1 / temperature)
    exact = sum(sizes) * weights / weights.sum()
    shares: NDArray[np.int64] = np.floor(exact + 1e-9).astype(np.int64)
    shares[np.argsort(shares - exact, kind="stable")[: sum(sizes) - int(shares.sum())]] += 1
    return shares


def _endless(task: TaskData, plan: BatchPlan, seeds: Sequence[int], pad_id: int) -> Iterator[Batch]:
    """Yield the batches of a task epoch by epoch, without end."""
    for epoch in count():
        yield from training_batches(task.train, plan, seeds, epoch, pad_id, task.second_view)
