"""A few probe steps before a run: what one step computes, and what the whole run would cost."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from rich import box
from rich.table import Table

from lora_bench.data.batching import Batch, BatchPlan
from lora_bench.evaluation.cost import FlopModel, peak_memory_bytes, reset_peak_memory
from lora_bench.tables import human
from lora_bench.training.loop import total_steps
from lora_bench.training.objective import make_objective

if TYPE_CHECKING:
    from lora_bench.adapters.pack import Pack
    from lora_bench.config import Trainer
    from lora_bench.data.pairs import TokenTable

_ROUNDS = 3


def probe_step(pack: Pack, rows: int, length: int) -> None:
    """Forward and backward of made-up tokens; leaves weights, gradients and random streams as they were."""
    ids = torch.ones(rows, length, dtype=torch.long, device=pack.backbone.device)
    backbone = pack.backbone
    hidden = None  # what is kept is read, at no arithmetic
    if pack.cut is not None:
        hidden = torch.zeros(rows, length, backbone.hidden_size, dtype=backbone.compute_dtype, device=backbone.device)
    batch = Batch(ids, torch.ones_like(ids), None, torch.zeros_like(ids[:, 0]), full=True, hidden=hidden)
    pack.eval()  # no dropout: it would draw from the members' streams
    logits = pack(batch)
    assert batch.labels is not None
    F.cross_entropy(logits.flatten(0, 1), batch.labels.repeat(len(pack.live))).backward()  # type: ignore[no-untyped-call]
    for p in pack.parameters():
        p.grad = None


def saved_bytes(pack: Pack, rows: int, length: int) -> int:
    """Bytes that a step of made-up tokens keeps for its backward pass, besides the weights."""
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        probe_step(pack, rows, length)
    weights = {tensor.untyped_storage().data_ptr() for tensor in [*pack.parameters(), *pack.buffers()]}
    return sum(size for pointer, size in kept.items() if pointer not in weights)


@dataclass(frozen=True)
class Estimate:
    """What a run is expected to cost."""

    adapter: int
    head: int
    total: int
    steps: int
    train_flops: float
    train_seconds: float
    peak_memory_bytes: int

    def table(self) -> Table:
        table = Table("to expect", "", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_row("parameters", f"{human(self.adapter)} adapter + {human(self.head)} head of {human(self.total)}")
        table.add_row("steps", f"{self.steps:,}")
        table.add_row("computation", human(self.train_flops, "FLOP"))
        table.add_row("training time", f"{self.train_seconds:.0f} s, evaluations not counted")
        table.add_row("peak memory", human(self.peak_memory_bytes, "B"))
        return table


def estimate(pack: Pack, trainer: Trainer, train: TokenTable, *, filling: float = 0) -> Estimate:
    """Parameters, FLOPs, time and memory of a run, from a few steps on its longest and on a middling batch.

    Time is taken to go with FLOPs between the two probed lengths, memory to be that of the longest batch. `filling` is
    the arithmetic of a prefix that is made once, before the first step.
    """
    plan = BatchPlan(train.lengths, trainer.batch_size)
    orders = make_objective(trainer).orders
    shapes = [(orders * len(rows), length) for (rows,), length in plan.epoch(0, [0])]
    flop_model = FlopModel.measure(lambda rows, length: probe_step(pack, rows, length))
    reset_peak_memory(pack.backbone.device)
    shapes.sort(key=lambda shape: flop_model(*shape))
    middle, longest = shapes[len(shapes) // 2], shapes[-1]
    _seconds(pack, *longest)  # warms caches up, and shows the peak
    rate = flop_model(*middle) / _seconds(pack, *middle)  # FLOP/s
    steps = total_steps(trainer, len(train))
    flops = sum(flop_model(*shape) for shape in shapes) * steps / plan.steps_per_epoch + filling
    params = pack.count_parameters(0)
    # AdamW's two moments and the mean of the weights, in fp32: not yet made by the probes
    kept = (3 if trainer.average else 2) * 4 * params["trainable"]
    return Estimate(
        adapter=params["adapter"],
        head=params["head"],
        total=params["total"],
        steps=steps,
        train_flops=flops,
        train_seconds=flops / rate,
        peak_memory_bytes=peak_memory_bytes(pack.backbone.device) + kept,
    )


def _seconds(pack: Pack, rows: int, length: int) -> float:
    """The shortest of a few probe steps."""
    times = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        probe_step(pack, rows, length)
        if pack.backbone.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times)
