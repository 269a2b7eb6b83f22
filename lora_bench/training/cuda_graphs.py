"""Forward and backward pass of a batch, on a GPU as one CUDA graph per batch shape.

A step of a small encoder is a thousand small kernels; a GPU finishes each of them before Python has launched the next.
A CUDA graph launches all kernels that it has recorded at once. It reads and writes the same memory each time, so
batches are copied into its inputs, and gradients accumulate in tensors that the graph knows. Everything around the two
passes works as without graphs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lora_bench.data.batching import micro_batches
from lora_bench.training.micro_batching import is_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

    from torch import nn

    from lora_bench.adapters.pack.pack import Pack
    from lora_bench.data.batching import Batch
    from lora_bench.training.objective import Objective

MAX_GRAPHS = 64
"""Graphs held at a time. Each holds its inputs; all share the memory of intermediate results."""
LENGTH_MULTIPLE = 8
"""Batches for graphs are padded to a multiple of this many tokens: fewer shapes, and faster fused attention."""


class Backward:
    """The forward and backward pass of a batch: adds the gradients to the active members, and returns their losses.

    Args:
        pack: the members.
        objectives: by number of the head that they are computed with.
        graphs: replay CUDA graphs, if the pack is on a GPU, and neither recomputes activations nor is sharded: a
            recomputed pass restores random streams, and gathered weights lie elsewhere in each pass. Layers of another
            library may wait for the GPU, which a graph cannot record.
    """

    def __init__(self, pack: Pack, objectives: Mapping[int, Objective], *, graphs: bool) -> None:
        self.pack = pack
        self.objectives = objectives
        is_external = any(member.adapter.is_external for member in pack.members)
        graphs = graphs and pack.backbone.device.type == "cuda" and not (pack.backbone.is_sharded or is_external)
        self._pass = Graphs(pack, self._add) if graphs and not pack.recomputes_activations else self._add_from_cpu
        self.multiple = LENGTH_MULTIPLE if graphs else 1
        """The length of a batch, in tokens, should be a multiple of this.

        It does not depend on the free memory, which may let a pack recompute activations and not a single run: padding
        changes which features dropout drops.
        """

    def __call__(self, batch: Batch, of_pairs: int, pairs: int) -> dict[int, float]:
        """Accumulate the gradients of a batch in micro-batches.

        Members are independent, so one backward pass of the sum of their losses gives each its own gradients. Penalties
        of their methods are in the gradients, but not in the losses.

        Args:
            batch: of all active members, or one that they share.
            of_pairs: pairs of the whole step, over which the loss is a mean; the batch may be a share of it.
            pairs: pairs of each member per micro-batch.

        Returns:
            By member, the batch's contribution to its mean loss.
        """
        return self.accumulate((micro, micro.pairs / of_pairs) for micro in micro_batches(batch, pairs))

    def accumulate(self, shares: Iterable[tuple[Batch, float]]) -> dict[int, float]:
        """Accumulate the gradients of micro-batches, each with its weight in the mean; return the members' losses."""
        losses = torch.zeros(len(self.pack.active), device=self.pack.backbone.device)
        with self.pack.accumulating_gradients():
            for micro, share in shares:
                losses += self._pass(micro, share)
        return dict(zip(self.pack.active, losses.tolist(), strict=True))

    def _add_from_cpu(self, batch: Batch, share: float) -> Tensor:
        return self._add(batch.to(self.pack.backbone.device), share)

    def _add(self, batch: Batch, share: float) -> Tensor:
        """Accumulate the gradients of `share` times the mean losses of a batch on the device; return these (K,).

        Gradients of `share` times the methods' penalties are accumulated too; the losses are without them.
        """
        pack = self.pack
        assert batch.labels is not None
        labels = batch.labels.view(batch.members, -1).expand(len(pack.active), -1)  # (K, orders · B)
        hidden = pack.prefix(batch)
        losses: dict[int, Tensor] = {}
        for members in pack.member_groups():
            logits = pack.suffix(hidden, batch, members)  # (M, orders · B, 2) of M members
            member_labels = torch.stack([labels[pack.active.index(k)] for k in members])  # (M, orders · B)
            loss = self.objectives[batch.head].loss(logits, member_labels) * share  # (M,)
            penalties = [pack.members[k].adapter.penalty(pack.updates[k]) for k in members]
            extra = [penalty * share for penalty in penalties if penalty is not None]
            torch.stack([loss.sum(), *extra]).sum().backward()  # type: ignore[no-untyped-call]
            losses |= zip(members, loss.detach(), strict=True)
        return torch.stack([losses[k] for k in pack.active])


@dataclass
class Graph:
    """A recorded forward and backward pass."""

    recorded: Any
    batch: Batch
    """Inputs of the graph, on the device."""
    losses: Tensor
    """Output of the graph: (K,)."""
    parameters: Sequence[nn.Parameter]
    """Parameters whose gradients the graph writes."""

    def __call__(self, batch: Batch) -> Tensor:
        """Copy a batch in CPU memory into the graph's inputs, and replay it.

        Returns:
            `losses`, which the next replay overwrites.
        """
        for name, graph_input in vars(self.batch).items():
            if isinstance(graph_input, Tensor):
                graph_input.copy_(getattr(batch, name).pin_memory(), non_blocking=True)
        self.recorded.replay()
        return self.losses


class Graphs:
    """A pass over batches in CPU memory: the first batch of a shape is computed eagerly, later ones replay a graph.

    Args:
        pack: the members, on a GPU.
        work: the pass; takes a batch on the device and its share of the step's pairs, and returns the losses (K,).
    """

    def __init__(self, pack: Pack, work: Callable[[Batch, float], Tensor]) -> None:
        self.pack = pack
        self.work = work
        self.pool = torch.cuda.graph_pool_handle()
        self.trained: dict[Hashable, list[nn.Parameter]] = {}
        """By shape, the parameters that the first pass gave gradients."""
        self.graphs: dict[Hashable, Graph | None] = {}
        """By shape; None if it cannot be recorded."""
        self.gradients: dict[nn.Parameter, Tensor] = {}
        """The tensors in which graphs accumulate gradients."""

    def __call__(self, batch: Batch, share: float) -> Tensor:
        """Accumulate the gradients of a batch, and return its losses (K,), which the next call may overwrite.

        The first call of a shape computes eagerly and the second records a graph, unless the pass cannot be recorded:
        then all are computed eagerly. A shape also stands for the active members, their stacked parameters, the head
        and the share. When `MAX_GRAPHS` shapes have graphs, all graphs are discarded.
        """
        pack, device = self.pack, self.pack.backbone.device
        batch = replace(batch, full=False)
        shape = (batch.members, batch.orders, *batch.input_ids.shape, batch.hidden is None)
        key = (*pack.active, pack.parameter_syncs, batch.head, share, shape)
        if key not in self.trained:
            losses = self.work(batch.to(device), share)
            trainable = (p for k in pack.active for p in pack.trainable(k).values())
            self.trained[key] = [p for p in trainable if p.grad is not None]
            return losses
        self._use_graph_gradients(self.trained[key])
        if key not in self.graphs:
            if len(self.graphs) == MAX_GRAPHS:
                self.graphs.clear()
            self.graphs[key] = self._record(batch.to(device), share, self.trained[key])
        graph = self.graphs[key]
        return self.work(batch.to(device), share) if graph is None else graph(batch)

    def _use_graph_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Move the gradients of this step so far into the tensors that graphs know; missing ones become zero."""
        without_gradient = []
        for p in parameters:
            gradient = self.gradients.get(p)
            if gradient is None:
                gradient = self.gradients[p] = torch.zeros_like(p)
            if p.grad is None:
                without_gradient.append(gradient)
            elif p.grad is not gradient:
                gradient.copy_(p.grad)
            p.grad = gradient
        if without_gradient:
            torch._foreach_zero_(without_gradient)

    def _record(self, batch: Batch, share: float, parameters: Sequence[nn.Parameter]) -> Graph | None:
        """Record the pass over batches of this shape, without computing it; None if it cannot be recorded.

        An error for lack of memory is raised.
        """
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
        return Graph(recorded, batch, losses, parameters)
