"""What members of a pack learn: the pairs of one task, or of several in turn, each answered by a head of its own.

A batch holds pairs of one task. An epoch has as many batches as the tasks have together; each task's share of them goes
with its size, in batches, to the power 1 / temperature (Raffel et al. 2020, section 3.5.2, who mix so): at 1 each pair
comes once in an epoch, far above 1 all tasks come alike, the small ones several times over. Which task a step is of
depends on nothing else: members of other seeds have steps of the same tasks and shapes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING

import numpy as np

from lora_bench.data.batching import BatchPlan, training_batches
from lora_bench.training.cuda_graphs import Backward
from lora_bench.training.objective import make_objective

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from lora_bench.adapters.pack.pack import Pack
    from lora_bench.config.schema import Trainer
    from lora_bench.data.batching import Batch
    from lora_bench.data.tokenization import TokenTable


@dataclass(frozen=True)
class TaskData:
    """What training looks at of one task."""

    train: TokenTable
    """What is learned from."""
    selection: TokenTable
    """What every choice is made on; never the reported split."""
    second_view: TokenTable | None = None
    """The second looks at pairs of `train` (exchanged, perturbed or themselves), if the objective has any."""

    def plan(self, batch_size: int, multiple: int = 1) -> BatchPlan:
        """Which rows each batch holds, and how long it is: see `BatchPlan`."""
        lengths = self.train.lengths
        for other in (self.train.reversed_view, self.second_view):
            if other is not None:
                lengths = np.maximum(lengths, other.lengths)
        return BatchPlan(lengths, batch_size, multiple)


@dataclass(frozen=True)
class TaskMixture:
    """What some members of a pack learn together.

    Args:
        members: their numbers in the pack.
        tasks: by name; their tables say which head answers them.
        temperature: from 1 on.
    """

    members: Sequence[int]
    tasks: Mapping[str, TaskData]
    temperature: float = 1.0

    def before(self, member: int) -> TaskMixture:
        """What one of its members looks at before the first step: each pair once."""
        return replace(self, members=[member], tasks={n: replace(p, second_view=None) for n, p in self.tasks.items()})

    def steps_per_epoch(self, batch_size: int) -> int:
        return sum(pairs.plan(batch_size).steps_per_epoch for pairs in self.tasks.values())

    def steps(self, trainer: Trainer) -> int:
        """Optimizer updates that the settings ask for."""
        return steps_asked(trainer, self.steps_per_epoch(trainer.batch_size))

    def backward(self, pack: Pack, trainer: Trainer) -> Backward:
        """What the batches add to gradients, by the objective that the settings name."""
        objectives = {}
        for pairs in self.tasks.values():
            objectives[pairs.train.head] = objective = make_objective(trainer, pairs.train.labels)
            assert objective.orders == (1 if pairs.second_view is None else 2)
        return Backward(pack, objectives, graphs=trainer.cuda_graphs)

    def batches(self, pack: Pack, batch_size: int, multiple: int = 1) -> Iterator[Batch]:
        """Those of its members, without end; a batch's length is a multiple of so many tokens, see `BatchPlan`."""
        seeds = [pack.members[k].seed_of("order") for k in self.members]
        pad_id = pack.backbone.tokenizer.pad_token_id
        plans = [pairs.plan(batch_size, multiple) for pairs in self.tasks.values()]
        streams = [_endless(pairs, plan, seeds, pad_id) for pairs, plan in zip(self.tasks.values(), plans, strict=True)]
        shares = allotted([plan.steps_per_epoch for plan in plans], self.temperature)
        for epoch in count():
            for task in np.random.default_rng(epoch).permutation(np.repeat(np.arange(len(plans)), shares)):
                yield next(streams[task])


def steps_asked(trainer: Trainer, steps_per_epoch: int) -> int:
    """Optimizer updates that the settings ask for, where an epoch has so many."""
    exact = trainer.epochs * steps_per_epoch
    steps = max(1, math.ceil(round(exact, 6)))  # 1.1 epochs of 10 steps are 11, not 11.000000000000002
    return steps if trainer.max_steps is None else min(steps, trainer.max_steps)


def allotted(sizes: Sequence[int], temperature: float) -> NDArray[np.int64]:
    """The sum of the sizes, shared out in proportion to size ** (1 / temperature), by largest remainder."""
    weights = np.array(sizes, np.float64) ** (1 / temperature)
    exact = sum(sizes) * weights / weights.sum()
    shares: NDArray[np.int64] = np.floor(exact + 1e-9).astype(np.int64)
    shares[np.argsort(shares - exact, kind="stable")[: sum(sizes) - int(shares.sum())]] += 1
    return shares


def _endless(pairs: TaskData, plan: BatchPlan, seeds: Sequence[int], pad_id: int) -> Iterator[Batch]:
    for epoch in count():
        yield from training_batches(pairs.train, plan, seeds, epoch, pad_id, pairs.second_view)
