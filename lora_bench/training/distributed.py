"""Data-parallel training: each process computes its shard of every global batch, and gradients are all-reduced.

`torchrun` starts the processes and gives each its rank through the environment. Only the gradients of adapters and
heads are exchanged, as one flat tensor per step: the frozen backbone is the same in every process. With
`trainer.sharding=fsdp` each process holds a part of the backbone (`backbones.sharding`). Then all processes must make
equally many passes, because a layer's weights are gathered from all of them.
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from rich.console import Console

from lora_bench.backbones.sharding import is_sharded
from lora_bench.config.launch import Launch
from lora_bench.console.text import sanitise
from lora_bench.data.batching import slice_pairs
from lora_bench.errors import Code, UserError
from lora_bench.training.precision import resolve_device

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from lora_bench.data.batching import Batch

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The rank of this process, and the number of processes that train one run; by default a single process."""

    rank: int = 0
    size: int = 1
    """With 1, every collective returns its argument unchanged."""

    @property
    def is_leader(self) -> bool:
        """True in the one process that writes and prints."""
        return self.rank == 0

    def shard(self, batch: Batch) -> Batch | None:
        """Return this process's pairs of a global batch, a contiguous part; None if it gets none of a small batch."""
        start, end = (batch.pairs * rank // self.size for rank in (self.rank, self.rank + 1))
        if self.size == 1:
            return batch
        return slice_pairs(batch, start, end) if start < end else None

    def equal_shares(self, batch: Batch, pairs: int) -> Iterator[tuple[Batch, range]]:
        """Yield this process's micro-batches of a global batch, equally many in every process.

        Args:
            batch: of the same shape in every process.
            pairs: pairs of each member per micro-batch, at most.

        Yields:
            A micro-batch and the positions of its pairs in the batch. The range is empty if there is no pair left for
            this process: then it gets some pair, whose result does not count.
        """
        for start in range(0, batch.pairs, pairs * self.size):
            count = min(pairs * self.size, batch.pairs - start)
            first, last = (start + count * rank // self.size for rank in (self.rank, self.rank + 1))
            yield slice_pairs(batch, first, max(last, first + 1)), range(first, last)

    def all_reduce(self, parameters: Iterable[nn.Parameter], losses: dict[int, float]) -> dict[int, float]:
        """Sum gradients and losses over the processes; each process holds its share of the global mean.

        Each parameter that requires a gradient gets the sum as its `.grad`; those that are sharded have it already. A
        single process returns the losses unchanged.

        Args:
            parameters: the same in every process; one without a gradient counts as zero.
            losses: by member.

        Returns:
            The summed losses.
        """
        if self.size == 1:
            return losses
        every = list(parameters)
        trained = [p for p in every if p.requires_grad and not is_sharded(p)]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        flat_losses = torch.tensor(list(losses.values()), dtype=torch.float32, device=every[0].device)
        flat = torch.cat([*(gradient.flatten().float() for gradient in gradients), flat_losses])
        dist.all_reduce(flat)
        summed = torch.split(flat, [*(gradient.numel() for gradient in gradients), len(losses)])
        for p, gradient in zip(trained, summed[:-1], strict=True):
            p.grad = gradient.view_as(p).to(p.dtype)
        return dict(zip(losses, summed[-1].tolist(), strict=True))

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite the tensors with the leader's values, in place; those that are sharded stay."""
        if self.size > 1:
            with torch.no_grad():
                for tensor in tensors:
                    if not is_sharded(tensor):
                        dist.broadcast(tensor, 0)

    def shard_batches(self, batches: Iterable[T]) -> Iterator[T]:
        """Return this process's batches of an evaluation: every `size`-th, from number `rank` on."""
        return islice(batches, self.rank, None, self.size)

    def gather(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sum scores over the processes, in place; each process leaves the rows of the other processes at zero."""
        if self.size > 1:
            dist.all_reduce(torch.from_numpy(scores))
        return scores

    def any_signal(self, signal: int | None) -> int | None:
        """Return the signal that any process has received, so that all stop after the same step; None without one.

        Of several it is the one with the highest number.
        """
        if self.size == 1:
            return signal
        highest = torch.tensor(signal or 0)
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        return int(highest) or None


SINGLE_PROCESS = Processes()


@contextmanager
def processes_of_torchrun() -> Iterator[Processes]:
    """Join the processes that `torchrun` started, for the time of the context; a single process without `torchrun`.

    With GPUs, the process's own becomes the current CUDA device.

    Raises:
        UserError: an environment variable of `torchrun` is missing or wrong, the process has no GPU of its own, or the
            processes cannot reach one another in time.
    """
    launch = Launch.read()
    if launch.world_size == 1:
        yield SINGLE_PROCESS
        return
    launch.check()
    gpus = torch.cuda.is_available()
    if gpus and launch.local_rank is not None:
        torch.cuda.set_device(resolve_device("cuda"))
    store = _Rendezvous(launch).join()
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.world_size)
    try:
        yield Processes(dist.get_rank(), launch.world_size)
    finally:
        dist.destroy_process_group()


JOIN_SECONDS = 45.0
"""Longest wait for the other processes; `torchrun` starts them within seconds."""
NOTICE_SECONDS = 1.0
"""A process that waits longer than this prints a notice."""


class _Rendezvous:
    """The meeting of the processes in a store that process 0, or `torchrun` itself, serves.

    `JOIN_SECONDS` are counted from its creation.
    """

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.since = time.monotonic()
        self.noticed = False
        self.served_by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"

    def join(self) -> Any:
        """Wait until all processes have joined, and return the store.

        Process 0 serves it, unless `torchrun` does.

        Raises:
            UserError: a process has not joined within `JOIN_SECONDS`, or the store cannot be reached or served.
        """
        serves = self.launch.rank == 0 and not self.served_by_torchrun
        if not serves:
            self._reach()
        host, port = self.launch.address, self.launch.port
        assert host is not None
        assert port is not None
        try:
            store = dist.TCPStore(  # type: ignore[attr-defined]
                host, port, is_master=serves, timeout=timedelta(seconds=JOIN_SECONDS), wait_for_workers=False
            )
        except RuntimeError as error:
            first = str(error).strip().partition("\n")[0]
            raise self._refusal(f"cannot be used ({first})") from None
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store_of_attempt = dist.PrefixStore(f"lora_bench/{attempt}", store)  # type: ignore[attr-defined]
        joined = store_of_attempt.add("joined", 1)
        while joined < self.launch.world_size:
            self._wait(f"{joined} of {self.launch.world_size} have joined", notice=self.launch.rank == 0)
            joined = store_of_attempt.add("joined", 0)
        store_of_attempt.set_timeout(dist.default_pg_timeout)  # from here on processes may be minutes apart
        return store_of_attempt

    def _reach(self) -> None:
        """Wait until the store accepts connections; a `UserError` after `JOIN_SECONDS`."""
        while True:
            try:
                with socket.create_connection((self.launch.address, self.launch.port), timeout=2):
                    return
            except OSError as error:
                self._wait(f"process 0 does not answer ({error.strerror or error})", notice=True)

    @property
    def _address(self) -> str:
        return f"{self.launch.address}:{self.launch.port}"

    def _wait(self, state: str, *, notice: bool) -> None:
        """Sleep for a moment; refuse after `JOIN_SECONDS`, and print `state` once after `NOTICE_SECONDS`."""
        waited = time.monotonic() - self.since
        if waited > JOIN_SECONDS:
            raise self._refusal(f"{state} after {JOIN_SECONDS:.0f} seconds")
        if notice and waited > NOTICE_SECONDS and not self.noticed:
            self.noticed = True
            text = (
                f"process {self.launch.rank} is waiting for {self.launch.world_size} processes at {self._address}: "
                f"{state}"
            )
            Console(stderr=True, highlight=False, soft_wrap=True).print(sanitise(text))
        time.sleep(0.05)

    def _refusal(self, reason: str) -> UserError:
        """Return (not raise) the error for processes that do not meet."""
        remedy = (
            f"WORLD_SIZE={self.launch.world_size} asks for {self.launch.world_size} processes: start all of them, as "
            "torchrun does, or unset WORLD_SIZE to train in one process."
        )
        return UserError(reason, key="MASTER_ADDR:MASTER_PORT", value=self._address, remedy=remedy, code=Code.SERVER)
