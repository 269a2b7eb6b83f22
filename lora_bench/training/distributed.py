"""Data-parallel training: each process takes its share of every global batch, and gradients are added up.

Started by `torchrun`, which tells each process its rank through the environment. Only what the adapters and heads
train is exchanged, as one flat tensor a step: the frozen backbone is the same everywhere, and is small enough for each
process to hold, so that there is nothing for FSDP to shard.
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

from lora_bench.config.launch import Launch
from lora_bench.console.text import sanitise
from lora_bench.data.batching import pick
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
    """The processes that `torchrun` started; alone where it did not start this one.

    Raises:
        UserError: they do not find one another.
    """
    launch = Launch.read()
    if launch.world_size == 1:
        yield ALONE
        return
    launch.check()
    gpus = torch.cuda.is_available()
    if gpus and launch.local_rank is not None:
        torch.cuda.set_device(resolve_device("cuda"))
    store = _Meeting(launch).join()
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.world_size)
    try:
        yield Processes(dist.get_rank(), launch.world_size)
    finally:
        dist.destroy_process_group()


JOIN_SECONDS = 45.0
"""How long processes wait for one another; `torchrun` starts them within seconds."""
NOTICE_SECONDS = 1.0
"""After so long it is said what is waited for."""


class _Meeting:
    """Where the processes of a training find one another: a store that process 0, or `torchrun` itself, serves."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.since = time.monotonic()
        self.noticed = False
        self.served_by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"

    def join(self) -> Any:
        """Return the store when all processes have joined.

        Raises:
            UserError: some have not in time, or the store cannot be reached or served.
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
        own = dist.PrefixStore(f"lora_bench/{attempt}", store)  # type: ignore[attr-defined]
        joined = own.add("joined", 1)
        while joined < self.launch.world_size:
            said = f"{joined} of {self.launch.world_size} have joined"
            self._wait(said, notice=self.launch.rank == 0)
            joined = own.add("joined", 0)
        own.set_timeout(dist.default_pg_timeout)  # from here on processes may be minutes apart
        return own

    def _reach(self) -> None:
        """Wait until somebody serves the store."""
        while True:
            try:
                with socket.create_connection((self.launch.address, self.launch.port), timeout=2):
                    return
            except OSError as error:
                self._wait(f"process 0 does not answer ({error.strerror or error})", notice=True)

    def _wait(self, what: str, *, notice: bool) -> None:
        waited = time.monotonic() - self.since
        if waited > JOIN_SECONDS:
            raise self._refusal(f"{what} after {JOIN_SECONDS:.0f} seconds")
        if notice and waited > NOTICE_SECONDS and not self.noticed:
            self.noticed = True
            place = f"{self.launch.address}:{self.launch.port}"
            text = f"process {self.launch.rank} is waiting for {self.launch.world_size} processes at {place}: {what}"
            Console(stderr=True, highlight=False, soft_wrap=True).print(sanitise(text))
        time.sleep(0.05)

    def _refusal(self, reason: str) -> UserError:
        remedy = (
            f"WORLD_SIZE={self.launch.world_size} says that so many processes train together: start them all, as "
            "torchrun does, or unset WORLD_SIZE to train in one process."
        )
        place = f"{self.launch.address}:{self.launch.port}"
        return UserError(reason, key="MASTER_ADDR:MASTER_PORT", value=place, remedy=remedy, code=Code.SERVER)
