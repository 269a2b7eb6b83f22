"""What a run would cost, from a rehearsal of a few of its steps.

The steps are the loop's own, on batches of the run, at a rate of 0. They are spread over the shapes that its batches
have; what lies between is interpolated over FLOPs. Everything that a run holds is held once: moments, best weights and
mean, the copies that a checkpoint takes.

On a CPU each shape of a batch costs memory and time of its own, for the libraries below torch make code for it and keep
it: what the rehearsed shapes added is taken for the others too.
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

from lora_bench.data.batching import Batch, collate, evaluation_rows, training_batches
from lora_bench.evaluation.cost import FlopModel, held_memory_bytes, peak_memory_bytes
from lora_bench.training.dummy_step import probe_step
from lora_bench.training.member_run import MemberRun, clip_gradients
from lora_bench.training.micro_batching import in_portions
from lora_bench.training.prediction import predict
from lora_bench.training.prefix_cache import ROWS
from lora_bench.training.task_mixture import TaskData, TaskMixture
from lora_bench.training.training_state import gather

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lora_bench.adapters.pack.pack import Pack
    from lora_bench.config.schema import Optimizer, Trainer
    from lora_bench.data.batching import BatchPlan
    from lora_bench.data.tokenization import TokenTable
    from lora_bench.training.cuda_graphs import Backward

T = TypeVar("T")

SHAPES = 5
"""So many of a run's shapes are rehearsed, for training and for evaluation."""
ROUNDS = 2
"""Timed steps of each shape, after one that is not; the quicker counts."""


@dataclass(frozen=True)
class Estimate:
    """What a run is expected to cost."""

    adapter: int
    head: int
    total: int
    steps: int
    train_flops: float
    train_seconds: float
    evaluation_seconds: float
    """All looks at the selection split, and the reported splits."""
    peak_memory_bytes: float
    looks: int = 1
    """At the selection split, while it trains; at its end there is another."""
    look_seconds: float = 0.0
    """Of one of them."""
    filling_flops: float = 0.0
    """Of those for training, what making the kept prefix takes; runs of a sweep can share it."""
    filling_seconds: float = 0.0


def estimate(
    pack: Pack,
    optimizer: Optimizer,
    trainer: Trainer,
    tables: Mapping[str, TokenTable],
    swapped: TokenTable | None = None,
    kept: Sequence[str] = (),
    filling: float = 0.0,
) -> Estimate:
    """Parameters, FLOPs, time and memory of training a pack of one, what was before counted in its memory.

    Weights are left as they were; a method's running statistics and the streams of dropout are not.

    Args:
        pack: prepared.
        tables: `train`, `selection`, and every split to report.
        swapped: as in `fit`.
        kept: names of tables of which the prefix below the pack's cut is read and not computed.
        filling: FLOPs of making it.
    """
    train, device = tables["train"], pack.backbone.device
    pairs = TaskData(train, tables["selection"], swapped)
    mixture = TaskMixture([0], {"": pairs})
    steps, backward = mixture.steps(trainer), mixture.backward(pack, trainer)
    plan = pairs.plan(trainer.batch_size, backward.multiple)
    shapes = _shapes(plan, steps, pack.members[0].seed)
    flop_model = FlopModel.measure(partial(probe_step, pack))
    orders = 1 if swapped is None else 2
    flops = {(rows, length): flop_model(orders * rows, length) for rows, length in shapes}
    chosen = _spread(sorted(shapes, key=lambda shape: -flops[shape]), SHAPES)  # the largest first: it sets the peak
    batches = _batches(pack, plan, train, swapped, chosen)
    rehearsal = _Rehearsal(pack, optimizer, trainer, mixture, backward)
    first, held = [], []
    for batch in batches:
        first.append(rehearsal.step(batch))
        held.append(held_memory_bytes(device))
    rehearsal.keep()
    again = [min(rehearsal.step(batch) for _ in range(ROUNDS)) for batch in batches]
    warming = max(0.0, float(np.mean(first) - np.mean(again))) * len(shapes)
    of_chosen = [flops[shape] for shape in chosen]
    seconds = sum(n * float(np.interp(flops[shape], of_chosen[::-1], again[::-1])) for shape, n in shapes.items())
    grown = _for_all(held, len(shapes))
    looks = -(-steps // (trainer.eval_every or plan.steps_per_epoch))
    filling_seconds = filling * _of_prefix(pack, train).seconds_per_flop if filling else 0.0
    scored, look, grown_scoring = _scoring(
        pack, {k: t for k, t in tables.items() if k != "train"}, trainer, looks, kept
    )
    params = pack.count_parameters(0)
    return Estimate(
        adapter=params["adapter"],
        head=params["head"],
        total=params["total"],
        steps=steps,
        train_flops=sum(n * flops[shape] for shape, n in shapes.items()) + filling,
        train_seconds=seconds + warming + filling_seconds,
        evaluation_seconds=scored,
        peak_memory_bytes=grown + max(peak_memory_bytes(device), held_memory_bytes(device) + grown_scoring),
        looks=looks,
        look_seconds=look,
        filling_flops=filling,
        filling_seconds=filling_seconds,
    )


class _Rehearsal:
    """Steps of the loop that change no weight, and what is held between them."""

    def __init__(
        self, pack: Pack, optimizer: Optimizer, trainer: Trainer, mixture: TaskMixture, backward: Backward
    ) -> None:
        self.pack, self.trainer, self.backward = pack, trainer, backward
        self.member = MemberRun.start(pack, 0, optimizer, mixture, trainer)
        for group in self.member.optimizer.param_groups:
            group["lr"] = 0.0
        pack.train()

    def step(self, batch: Batch) -> float:
        """Make one step and return its seconds."""
        pack, adapter, optimizer = self.pack, self.pack.members[0].adapter, self.member.optimizer
        began = time.perf_counter()
        work = partial(self.backward, batch, batch.pairs)
        in_portions(pack, batch, self.trainer.micro_batch_size, work)
        clip_gradients(pack, 0, self.member.settings)
        adapter.before_step(pack.updates[0], 1, 1000)
        optimizer.step()
        adapter.after_step(pack.updates[0], 1, 1000)
        optimizer.zero_grad(set_to_none=True)
        if pack.backbone.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def keep(self) -> None:
        """Hold what the loop holds after its first evaluation, and for a moment a checkpoint."""
        self.member.average.add()
        self.member.progress.state = self.pack.state(0)
        gather(self.member)


def _shapes(plan: BatchPlan, steps: int, seed: int) -> Counter[tuple[int, int]]:
    """How many of the steps have so many pairs of so many tokens."""
    epochs = chain.from_iterable(plan.epoch(epoch, [seed]) for epoch in count())
    return Counter((len(rows), length) for (rows,), length in islice(epochs, steps))


def _batches(
    pack: Pack, plan: BatchPlan, train: TokenTable, swapped: TokenTable | None, chosen: Sequence[tuple[int, int]]
) -> list[Batch]:
    """A batch of each chosen shape, from the first epoch."""
    seed, pad_id = pack.members[0].seed, pack.backbone.tokenizer.pad_token_id
    found: dict[tuple[int, int], Batch] = {}
    made = training_batches(train, plan, [seed], 0, pad_id, swapped)
    for ((rows,), length), batch in zip(plan.epoch(0, [seed]), made, strict=True):
        if (len(rows), length) in chosen:
            found.setdefault((len(rows), length), batch if pack.prefix_depth is None else _above_prefix(pack, batch))
        if len(found) == len(chosen):
            break
    return [found[shape] for shape in chosen]


def _above_prefix(pack: Pack, batch: Batch) -> Batch:
    """The batch as if what the prefix makes of it had been read."""
    shape, backbone = (*batch.input_ids.shape, pack.backbone.hidden_size), pack.backbone
    return replace(batch, hidden=torch.zeros(shape, dtype=backbone.compute_dtype))


@dataclass(frozen=True)
class _Prefix:
    seconds_per_flop: float
    share: float
    """Of the seconds of a forward pass."""


@torch.no_grad()
def _of_prefix(pack: Pack, table: TokenTable) -> _Prefix:
    """What the prefix takes, on a middling batch."""
    batches = evaluation_rows(table, ROWS)
    rows = batches[len(batches) // 2]
    pad_id = pack.backbone.tokenizer.pad_token_id
    batch = collate(table, rows, int(table.lengths[rows[0]]), pad_id).to(pack.backbone.device)
    with FlopCounterMode(display=False) as counter:
        pack.backbone.prefix(batch, pack.depth)
    calls = (partial(pack.backbone.prefix, batch, pack.depth), partial(pack, batch))
    below, whole = (min(_seconds(call) for _ in range(ROUNDS)) for call in calls)
    return _Prefix(below / max(1.0, float(counter.get_total_flops())), min(1.0, below / whole))


def _scoring(
    pack: Pack, tables: Mapping[str, TokenTable], trainer: Trainer, looks: int, kept: Sequence[str]
) -> tuple[float, float, float]:
    """Seconds of all evaluations and of one look, and bytes that shapes of theirs add which are not rehearsed."""
    batches = [
        (name, rows) for name, table in tables.items() for rows in evaluation_rows(table, trainer.eval_batch_size)
    ]
    by_shape = {(len(rows), int(tables[name].lengths[rows[0]])): (name, rows) for name, rows in batches}
    chosen = _spread(sorted(by_shape, key=lambda shape: -shape[0] * shape[1]), SHAPES)
    held, seconds = [held_memory_bytes(pack.backbone.device)], []
    for shape in chosen:
        name, rows = by_shape[shape]
        part = tables[name].take(rows)
        seconds.append(min(_seconds(partial(predict, pack, part, trainer.eval_batch_size)) for _ in range(ROUNDS)))
        held.append(held_memory_bytes(pack.backbone.device))
    tokens = [pairs * length for pairs, length in chosen]
    once = dict.fromkeys(tables, 0.0)
    computed = {name: 1 - _of_prefix(pack, tables[name]).share if name in kept else 1.0 for name in tables}
    for name, rows in batches:
        size = len(rows) * int(tables[name].lengths[rows[0]])
        once[name] += computed[name] * float(np.interp(size, tokens[::-1], seconds[::-1]))
    look = once["selection"]
    total = looks * look + sum(once.values())  # once more at its best weights, with the reported splits
    return total, look, _for_all(held[1:], len(by_shape))


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _for_all(held: Sequence[float], shapes: int) -> float:
    """Bytes that the shapes which were not rehearsed add, if each adds what one did after the first and largest."""
    return max(0.0, held[-1] - held[0]) / max(1, len(held) - 1) * (shapes - len(held))


def _spread(values: Sequence[T], most: int) -> list[T]:
    """At most so many of the values, evenly spread, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[i] for i in np.linspace(0, len(values) - 1, most).round().astype(int)]
