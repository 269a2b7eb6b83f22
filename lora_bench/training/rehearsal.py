"""Estimated cost of a run, from a rehearsal of a few of its steps.

The steps are those of the training loop, on batches of the run, with a learning rate of 0. They are spread over the
shapes of the run's batches; the seconds of other shapes are interpolated over FLOPs. Everything that a run holds in
memory is held once: moments, best weights, mean weights, the copies for a checkpoint.

On a CPU each batch shape costs additional memory and time, since the libraries below torch generate code for it and
keep it. The mean addition of the rehearsed shapes is assumed for the other shapes.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, count, islice
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from lora_bench.data.batching import Batch, BatchPlan, collate, evaluation_plan, training_batches
from lora_bench.evaluation.cost import held_memory_bytes, peak_memory_bytes
from lora_bench.training.dummy_step import StepFlops
from lora_bench.training.member_run import MemberRun, clip_gradients
from lora_bench.training.micro_batching import in_micro_batches
from lora_bench.training.prediction import predict
from lora_bench.training.prefix_cache import ROWS
from lora_bench.training.task_mixture import TaskData, TaskMixture
from lora_bench.training.training_state import gather

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from lora_bench.adapters.pack.pack import Pack
    from lora_bench.config.schema import Optimizer, Trainer
    from lora_bench.data.batching import Rows
    from lora_bench.data.tokenization import TokenTable
    from lora_bench.training.cuda_graphs import Backward

T = TypeVar("T")

SHAPES = 5
"""Batch shapes that are rehearsed, of training and of evaluation."""
ROUNDS = 2
"""Timed steps of each shape, after an untimed one; the fastest counts."""


@dataclass(frozen=True)
class Estimate:
    """The estimated cost of a run."""

    adapter: int
    """Parameters of the adapter."""
    head: int
    """Parameters of the head."""
    total: int
    """All parameters, frozen ones included."""
    steps: int
    train_flops: float
    train_seconds: float
    evaluation_seconds: float
    """Time of all evaluations of the selection split, and of the reported splits."""
    peak_memory_bytes: float
    evaluations: int = 1
    """Evaluations of the selection split during training; there is one more at the end."""
    seconds_per_evaluation: float = 0.0
    prefix_flops: float = 0.0
    """FLOPs of computing the cached prefix, included in `train_flops`; runs of a sweep can share it."""
    prefix_seconds: float = 0.0
    """Seconds of computing the cached prefix, included in `train_seconds`."""


def estimate(
    pack: Pack,
    optimizer: Optimizer,
    trainer: Trainer,
    tables: Mapping[str, TokenTable],
    second_view: TokenTable | None = None,
    cached: Sequence[str] = (),
    prefix_flops: float = 0.0,
) -> Estimate:
    """Estimate parameters, FLOPs, time and memory of training a pack of one member.

    The peak memory includes whatever the process held before. Weights are unchanged afterwards; running statistics of
    the method and random streams of dropout are not. The pack is left in training mode.

    Args:
        pack: one member, prepared.
        optimizer: settings of its optimizer.
        trainer: durations, micro-batches and objective.
        tables: `train`, `selection`, and every split to report.
        second_view: second views of the training pairs, if the objective has any.
        cached: names of the tables whose prefix is read from the cache instead of computed.
        prefix_flops: FLOPs of computing the cached prefix.

    Raises:
        RunFailedError: memory does not suffice for one pair.
    """
    train, device = tables["train"], pack.backbone.device
    task = TaskData(train, tables["selection"], second_view)
    mixture = TaskMixture([0], {"": task})
    steps, backward = mixture.steps(trainer), mixture.backward(pack, trainer)
    plan = task.plan(trainer.batch_size, backward.multiple)
    shapes = _count_shapes(plan, steps, pack.members[0].seed)
    flop_model = StepFlops.measure(pack)
    orders = 1 if second_view is None else 2
    flops = {(rows, length): flop_model(orders * rows, length) for rows, length in shapes}
    chosen = _spread(sorted(shapes, key=lambda shape: -flops[shape]), SHAPES)  # the largest first: it sets the peak
    batches = _batches_of_shapes(pack, plan, train, second_view, chosen)
    rehearsal = _Rehearsal(pack, optimizer, trainer, mixture, backward)
    cold_seconds, held = [], []
    for batch in batches:
        cold_seconds.append(rehearsal.step(batch))
        held.append(held_memory_bytes(device))
    rehearsal.hold_state()
    warm_seconds = [min(rehearsal.step(batch) for _ in range(ROUNDS)) for batch in batches]
    warm_up_seconds = max(0.0, float(np.mean(cold_seconds) - np.mean(warm_seconds))) * len(shapes)
    chosen_flops = [flops[shape] for shape in chosen]
    step_seconds = {shape: float(np.interp(flops[shape], chosen_flops[::-1], warm_seconds[::-1])) for shape in shapes}
    seconds = sum(n * step_seconds[shape] for shape, n in shapes.items())
    unrehearsed_bytes = _unrehearsed_bytes(held, len(shapes))
    evaluations = -(-steps // (trainer.eval_every or plan.steps_per_epoch))
    prefix_seconds = prefix_flops * _measure_prefix(pack, train).seconds_per_flop if prefix_flops else 0.0
    scored_tables = {name: table for name, table in tables.items() if name != "train"}
    evaluation = _rehearse_evaluation(pack, scored_tables, trainer, evaluations, cached)
    params = pack.count_parameters(0)
    return Estimate(
        adapter=params["adapter"],
        head=params["head"],
        total=params["total"],
        steps=steps,
        train_flops=sum(n * flops[shape] for shape, n in shapes.items()) + prefix_flops,
        train_seconds=seconds + warm_up_seconds + prefix_seconds,
        evaluation_seconds=evaluation.seconds,
        peak_memory_bytes=unrehearsed_bytes
        + max(peak_memory_bytes(device), held_memory_bytes(device) + evaluation.unrehearsed_bytes),
        evaluations=evaluations,
        seconds_per_evaluation=evaluation.seconds_per_evaluation,
        prefix_flops=prefix_flops,
        prefix_seconds=prefix_seconds,
    )


class _Rehearsal:
    """Training steps that change no weight, with everything that a run holds in memory between steps.

    The pack is set to training mode.
    """

    def __init__(
        self, pack: Pack, optimizer: Optimizer, trainer: Trainer, mixture: TaskMixture, backward: Backward
    ) -> None:
        self.pack, self.trainer, self.backward = pack, trainer, backward
        self.member = MemberRun.start(pack, 0, optimizer, mixture, trainer)
        for group in self.member.optimizer.param_groups:
            group["lr"] = 0.0
        pack.train()

    def step(self, batch: Batch) -> float:
        """Make one step, synchronised with the device, and return its seconds; gradients are cleared."""
        pack, adapter, optimizer = self.pack, self.pack.members[0].adapter, self.member.optimizer
        began = time.perf_counter()
        work = partial(self.backward, batch, batch.pairs)
        in_micro_batches(pack, batch, self.trainer.micro_batch_size, work)
        clip_gradients(pack, 0, self.member.settings)
        adapter.before_step(pack.updates[0], 1, 1000)
        optimizer.step()
        adapter.after_step(pack.updates[0], 1, 1000)
        optimizer.zero_grad(set_to_none=True)
        if pack.backbone.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def hold_state(self) -> None:
        """Allocate what a run holds after its first evaluation, and for a moment the copies for a checkpoint."""
        self.member.average.update()
        self.member.progress.state = self.pack.parts(0)
        gather(self.member)


def _count_shapes(plan: BatchPlan, steps: int, seed: int) -> Counter[tuple[int, int]]:
    """Count the steps of each batch shape (pairs, tokens)."""
    epochs = chain.from_iterable(plan.epoch(epoch, [seed]) for epoch in count())
    return Counter((len(rows), length) for (rows,), length in islice(epochs, steps))


@dataclass(frozen=True)
class _FirstOfEachShape(BatchPlan):
    """A plan whose epoch is the first batch of each chosen shape (pairs, tokens): the others are not collated."""

    chosen: Sequence[tuple[int, int]] = ()

    def epoch(self, epoch: int, seeds: Sequence[int]) -> Iterator[tuple[list[Rows], int]]:
        missing = set(self.chosen)
        for rows, length in super().epoch(epoch, seeds):
            if (len(rows[0]), length) in missing:
                missing.remove((len(rows[0]), length))
                yield rows, length


def _batches_of_shapes(
    pack: Pack, plan: BatchPlan, train: TokenTable, second_view: TokenTable | None, chosen: Sequence[tuple[int, int]]
) -> list[Batch]:
    """Return a batch of each chosen shape (pairs, tokens), in their order, from the first epoch.

    If the pack reads its prefix from the cache, they have hidden states of zeros.
    """
    seed, pad_id = pack.members[0].seed, pack.backbone.tokenizer.pad_token_id
    first = _FirstOfEachShape(plan.lengths, plan.batch_size, plan.multiple, chosen)
    shapes = [(len(rows), length) for (rows,), length in first.epoch(0, [seed])]
    batches = training_batches(train, first, [seed], 0, pad_id, second_view)
    by_shape = dict(zip(shapes, batches, strict=True))
    if pack.prefix_depth is not None:
        by_shape = {shape: _with_cached_prefix(pack, batch) for shape, batch in by_shape.items()}
    return [by_shape[shape] for shape in chosen]


def _with_cached_prefix(pack: Pack, batch: Batch) -> Batch:
    """Return the batch with hidden states of zeros, as if its prefix had been read from the cache."""
    shape, backbone = (*batch.input_ids.shape, pack.backbone.hidden_size), pack.backbone
    return replace(batch, hidden=torch.zeros(shape, dtype=backbone.compute_dtype))


@dataclass(frozen=True)
class _PrefixTime:
    """Time of the frozen prefix."""

    seconds_per_flop: float
    share: float
    """Share of the seconds of a forward pass."""


@torch.no_grad()
def _measure_prefix(pack: Pack, table: TokenTable) -> _PrefixTime:
    """Measure the time of the prefix and of a forward pass on a batch of median length, the fastest of `ROUNDS`."""
    batches = evaluation_plan(table, ROWS)
    rows, length = batches[len(batches) // 2]
    pad_id = pack.backbone.tokenizer.pad_token_id
    batch = collate(table, rows, length, pad_id).to(pack.backbone.device)
    with FlopCounterMode(display=False) as counter:
        pack.backbone.prefix(batch, pack.depth)
    calls = (partial(pack.backbone.prefix, batch, pack.depth), partial(pack, batch))
    prefix_seconds, forward_seconds = (min(_seconds(call) for _ in range(ROUNDS)) for call in calls)
    seconds_per_flop = prefix_seconds / max(1.0, float(counter.get_total_flops()))
    return _PrefixTime(seconds_per_flop, min(1.0, prefix_seconds / forward_seconds))


@dataclass(frozen=True)
class _EvaluationCost:
    """Cost of scoring the selection split during training, and all splits at the end."""

    seconds: float
    seconds_per_evaluation: float
    """Seconds of one evaluation of the selection split."""
    unrehearsed_bytes: float
    """Memory that the shapes add that are not rehearsed."""


def _rehearse_evaluation(
    pack: Pack, tables: Mapping[str, TokenTable], trainer: Trainer, evaluations: int, cached: Sequence[str]
) -> _EvaluationCost:
    """Measure the cost of so many evaluations of the selection split, and of one final prediction of every table.

    At most `SHAPES` batch shapes are scored. The time of tables in `cached` is reduced by that of the prefix.
    """
    batches = [
        (name, rows, length)
        for name, table in tables.items()
        for rows, length in evaluation_plan(table, trainer.eval_batch_size)
    ]
    by_shape = {(len(rows), length): (name, rows) for name, rows, length in batches}
    chosen = _spread(sorted(by_shape, key=lambda shape: -shape[0] * shape[1]), SHAPES)
    held, seconds = [held_memory_bytes(pack.backbone.device)], []
    for shape in chosen:
        name, rows = by_shape[shape]
        table = tables[name].take(rows)
        seconds.append(min(_seconds(partial(predict, pack, table, trainer.eval_batch_size)) for _ in range(ROUNDS)))
        held.append(held_memory_bytes(pack.backbone.device))
    tokens = [pairs * length for pairs, length in chosen]
    seconds_of = dict.fromkeys(tables, 0.0)
    computed = {name: 1 - _measure_prefix(pack, tables[name]).share if name in cached else 1.0 for name in tables}
    for name, rows, length in batches:
        seconds_of[name] += computed[name] * float(np.interp(len(rows) * length, tokens[::-1], seconds[::-1]))
    total = evaluations * seconds_of["selection"] + sum(seconds_of.values())  # all splits once more at the end
    return _EvaluationCost(total, seconds_of["selection"], _unrehearsed_bytes(held[1:], len(by_shape)))


def _seconds(call: Callable[[], object]) -> float:
    """Return the wall time of a call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _unrehearsed_bytes(held: Sequence[float], shapes: int) -> float:
    """Return the bytes that the unrehearsed shapes add, if each adds the mean of the rehearsed ones after the first.

    Args:
        held: bytes held by the process after each rehearsed shape, the largest shape first.
        shapes: number of all shapes.
    """
    return max(0.0, held[-1] - held[0]) / max(1, len(held) - 1) * (shapes - len(held))


def _spread(values: Sequence[T], most: int) -> list[T]:
    """Return at most `most` of the values, evenly spread, with the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[i] for i in np.linspace(0, len(values) - 1, most).round().astype(int)]
