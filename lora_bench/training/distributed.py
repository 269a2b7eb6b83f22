"""Data-parallel training: each process takes its share of every global batch, and gradients are added up.

Started by `torchrun`, which tells each process its rank through the environment. Only what the adapters and heads
train is exchanged, as one flat tensor a step: the frozen backbone is the same everywhere, and is small enough for each
process to hold, so that there is nothing for FSDP to shard.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist

from lora_bench.data.batching import pick

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from lora_bench.data.batching import Batch

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among those that train together; by default it is alone, and nothing is exchanged."""

    rank: int = 0
    size: int = 1

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

    def add_up(self, parameters: Iterable[nn.Parameter], losses: dict[int, float]) -> dict[int, float]:
        """Sum gradients over the processes, in place, and losses: each process's are shares of the global mean."""
        if self.size == 1:
            return losses
        trained = [p for p in parameters if p.requires_grad]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        told = torch.tensor(list(losses.values()), dtype=torch.float32, device=trained[0].device)
        flat = torch.cat([*(gradient.flatten().float() for gradient in gradients), told])
        dist.all_reduce(flat)
        summed = torch.split(flat, [*(gradient.numel() for gradient in gradients), len(losses)])
        for p, gradient in zip(trained, summed[:-1], strict=True):
            p.grad = gradient.view_as(p).to(p.dtype)
        return dict(zip(losses, summed[-1].tolist(), strict=True))

    def agree(self, tensors: Iterable[Tensor]) -> None:
        """Take the leader's values."""
        if self.size > 1:
            with torch.no_grad():
                for tensor in tensors:
                    dist.broadcast(tensor, 0)

    def shared_rows(self, batches: Iterable[T]) -> Iterator[T]:
        """Every so-manyth batch of an evaluation, beginning with its own."""
        return islice(batches, self.rank, None, self.size)

    def gather(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """Scores of all processes, each of which left those that are not its own at zero."""
        if self.size > 1:
            dist.all_reduce(torch.from_numpy(scores))
        return scores

    def any_asked(self, signal: int | None) -> int | None:
        """The signal that any process got, so that all stop after the same step."""
        if self.size == 1:
            return signal
        asked = torch.tensor(signal or 0)
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        return int(asked) or None


ALONE = Processes()


@contextmanager
def together() -> Iterator[Processes]:
    """The processes that `torchrun` started; alone where it did not start this one."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    gpus = torch.cuda.is_available()
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
    try:
        yield Processes(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()
