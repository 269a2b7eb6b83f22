"""Data-parallel training: each process takes its share of every global batch, and gradients are added up.

Started by `torchrun`, which tells each process its rank through the environment. Only what the adapters and heads
train is exchanged, as one flat tensor a step: the frozen backbone is the same everywhere, and is small enough for each
process to hold, so that there is nothing for FSDP to shard.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from lora_bench.data.batching import pick

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor, nn

    from lora_bench.data.batching import Batch


_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Processes:
    """This process among those that train together; by default it is alone, and nothing is exchanged."""

    rank: int = 0
    size: int = 1
    device: torch.device = _CPU

    @property
    def leads(self) -> bool:
        """Whether it is the one that writes and prints."""
        return self.rank == 0

    def share(self, batch: Batch) -> Batch | None:
        """Its pairs of a global batch; None where there are fewer pairs than processes and none is left for it."""
        start, end = (batch.pairs * rank // self.size for rank in (self.rank, self.rank + 1))
        if self.size == 1:
            return batch
        return pick(batch, start, end) if start < end else None

    def add_up(self, parameters: Iterable[nn.Parameter], losses: Sequence[float]) -> list[float]:
        """Sum gradients over the processes, in place, and losses: each process's are shares of the global mean."""
        if self.size == 1:
            return list(losses)
        trained = [p for p in parameters if p.requires_grad]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        told = torch.tensor(losses, dtype=torch.float32, device=self.device)
        flat = torch.cat([*(gradient.flatten().float() for gradient in gradients), told])
        dist.all_reduce(flat)
        summed = torch.split(flat, [*(gradient.numel() for gradient in gradients), len(losses)])
        for p, gradient in zip(trained, summed[:-1], strict=True):
            p.grad = gradient.view_as(p).to(p.dtype)
        return [float(loss) for loss in summed[-1]]

    def agree(self, tensors: Iterable[Tensor]) -> None:
        """Take the leader's values."""
        if self.size > 1:
            with torch.no_grad():
                for tensor in tensors:
                    dist.broadcast(tensor, 0)

    def any_asked(self, signal: int | None) -> int | None:
        """The signal that any process got, so that all stop after the same step."""
        if self.size == 1:
            return signal
        asked = torch.tensor(signal or 0, device=self.device)
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        return int(asked) or None


@contextmanager
def together(device: torch.device) -> Iterator[Processes]:
    """The processes that `torchrun` started; alone where it did not start this one."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Processes()
        return
    rank = int(os.environ["RANK"])
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=size)
    try:
        yield Processes(rank, size, device)
    finally:
        dist.destroy_process_group()
