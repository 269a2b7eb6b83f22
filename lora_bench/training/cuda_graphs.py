"""Forward and backward pass of a batch, on a GPU as one CUDA graph per shape.

A step of a small encoder is a thousand small kernels; a GPU has done each before Python has launched the next. What a
graph has recorded is launched at once. It reads and writes the same memory each time, so batches are copied into its
inputs and gradients gather in tensors that it knows; everything around the two passes works as without it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lora_bench.data.batching import micro_batches
from lora_bench.training.micro_batching import is_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping, Sequence

    from torch import nn

    from lora_bench.adapters.pack.pack import Pack
    from lora_bench.data.batching import Batch
    from lora_bench.training.objective import Objective

MOST_GRAPHS = 64
"""Kept at a time; each holds its inputs, and all of them share the memory of what they compute."""
MULTIPLE = 8
"""Batches for graphs are padded to multiples of so many tokens: fewer shapes, and fused attention likes it."""


class Backward:
    """What a batch adds to each live member's mean loss, and its gradients.

    Args:
        pack: the members.
        objectives: what is minimised, by the head that answers.
        graphs: whether a GPU may replay what it has done before.
    """

    def __init__(self, pack: Pack, objectives: Mapping[int, Objective], *, graphs: bool) -> None:
        self.pack = pack
        self.objectives = objectives
        graphs = graphs and pack.backbone.device.type == "cuda"
        self._pass = Graphs(pack, self._add) if graphs else self._add_anew
        self.multiple = MULTIPLE if graphs else 1
        """Tokens that the length of a batch should be a multiple of."""

    def __call__(self, batch: Batch, of_pairs: int, pairs: int) -> dict[int, float]:
        """Add the gradients of a batch, `pairs` at a time; the losses are shares of means over `of_pairs` pairs.

        Members are independent: their losses add up.
        """
        losses = torch.zeros(len(self.pack.active), device=self.pack.backbone.device)
        with self.pack.accumulating_gradients():
            for micro in micro_batches(batch, pairs):
                losses += self._pass(micro, micro.pairs / of_pairs)
        return dict(zip(self.pack.active, losses.tolist(), strict=True))

    def _add_anew(self, batch: Batch, share: float) -> Tensor:
        return self._add(batch.to(self.pack.backbone.device), share)

    def _add(self, batch: Batch, share: float) -> Tensor:
        """Gradients of `share` times the mean loss of a batch on the device, and these losses, (K,)."""
        pack = self.pack
        assert batch.labels is not None
        labels = batch.labels.view(batch.members, -1).expand(len(pack.active), -1)  # (K, orders · B)
        hidden = pack.prefix(batch)
        losses: dict[int, Tensor] = {}
        for part in pack.member_groups():
            logits = pack.suffix(hidden, batch, part)  # (len(part), orders · B, 2)
            own = torch.stack([labels[pack.active.index(k)] for k in part])
            loss = self.objectives[batch.head].loss(logits, own) * share
            penalties = [pack.members[k].adapter.penalty(pack.updates[k]) for k in part]
            extra = [penalty * share for penalty in penalties if penalty is not None]
            torch.stack([loss.sum(), *extra]).sum().backward()  # type: ignore[no-untyped-call]
            losses |= zip(part, loss.detach(), strict=True)
        return torch.stack([losses[k] for k in pack.active])


@dataclass
class Graph:
    """A recorded pass."""

    recorded: Any
    batch: Batch
    losses: Tensor
    learning: Sequence[nn.Parameter]

    def __call__(self, batch: Batch) -> Tensor:
        for name, place in vars(self.batch).items():
            if isinstance(place, Tensor):
                place.copy_(getattr(batch, name).pin_memory(), non_blocking=True)
        self.recorded.replay()
        return self.losses


class Graphs:
    """A pass over batches of the CPU: done as it is the first time that a shape is seen, then recorded and replayed.

    Args:
        pack: the members, on a GPU.
        work: the pass over a batch on the device and its share of the step's pairs; gives the losses, (K,).
    """

    def __init__(self, pack: Pack, work: Callable[[Batch, float], Tensor]) -> None:
        self.pack = pack
        self.work = work
        self.pool = torch.cuda.graph_pool_handle()
        self.learning: dict[Hashable, list[nn.Parameter]] = {}
        """By shape, what the first pass gave gradients."""
        self.graphs: dict[Hashable, Graph | None] = {}
        """By shape; None: it cannot be recorded."""
        self.gradients: dict[nn.Parameter, Tensor] = {}
        """Where graphs gather them."""

    def __call__(self, batch: Batch, share: float) -> Tensor:
        pack, device = self.pack, self.pack.backbone.device
        batch = replace(batch, full=False)
        shape = (batch.members, batch.orders, *batch.input_ids.shape, batch.hidden is None)
        key = (*pack.active, pack.parameter_sync, batch.head, share, shape)
        if key not in self.learning:
            losses = self.work(batch.to(device), share)
            trainable = (p for k in pack.active for p in pack.trainable(k).values())
            self.learning[key] = [p for p in trainable if p.grad is not None]
            return losses
        self._gather(self.learning[key])
        if key not in self.graphs:
            if len(self.graphs) == MOST_GRAPHS:
                self.graphs.clear()
            self.graphs[key] = self._record(batch.to(device), share, self.learning[key])
        graph = self.graphs[key]
        return self.work(batch.to(device), share) if graph is None else graph(batch)

    def _gather(self, learning: Sequence[nn.Parameter]) -> None:
        """Let gradients gather in the tensors that graphs know, on top of what has gathered in this step."""
        fresh = []
        for p in learning:
            own = self.gradients.get(p)
            if own is None:
                own = self.gradients[p] = torch.zeros_like(p)
            if p.grad is None:
                fresh.append(own)
            elif p.grad is not own:
                own.copy_(p.grad)
            p.grad = own
        if fresh:
            torch._foreach_zero_(fresh)

    def _record(self, batch: Batch, share: float, learning: Sequence[nn.Parameter]) -> Graph | None:
        """The pass over batches of this shape; None where something in it cannot be recorded."""
        recorded = torch.cuda.CUDAGraph()
        for k in self.pack.active:
            recorded.register_generator_state(self.pack.dropout[k])
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(recorded, pool=self.pool):
                losses = self.work(batch, share)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            return None
        return Graph(recorded, batch, losses, learning)
