"""Two processes learn from the same global batches what one process learns."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest
import torch
import torch.multiprocessing as mp

from lora_bench.data.batching import BatchPlan, training_batches
from lora_bench.training.distributed import Processes, together
from lora_bench.training.objective import cross_entropy
from lora_bench.training.optim import make_optimizer
from tests.adapters.tools import adapter, assert_close, optimizer, pack, tables

if TYPE_CHECKING:
    from pathlib import Path

STEPS = 10
CPU = torch.device("cpu")


def learn(processes: Processes) -> tuple[dict[str, torch.Tensor], list[float]]:
    """A few steps of LoRA, in batches of 7 pairs that two processes cannot halve and a last one of 2."""
    made = pack("bert", (adapter("lora", "rank=4"), 0))
    if not processes.leads:  # as a process that began otherwise would be: it takes the leader's start
        with torch.no_grad():
            for p in made.trainable(0).values():
                p.add_(1.0)
    processes.agree(made.trainable(0).values())
    table, _ = tables(made.backbone)
    adamw = make_optimizer(optimizer(), made, 0)
    losses = []
    batches = list(training_batches(table, BatchPlan(table.lengths, 7), [0], 0, made.backbone.tokenizer.pad_token_id))
    for batch in batches[:STEPS]:
        own, loss = processes.share(batch), 0.0
        if own is not None:
            assert own.labels is not None
            shared = cross_entropy(made(own), own.labels[None])[0] * own.pairs / batch.pairs
            shared.backward()
            loss = float(shared.detach())
        losses += processes.add_up(made.trainable(0).values(), [loss])
        adamw.step()
        adamw.zero_grad()
    return made.state(0), losses


def work(rank: int, port: int, folder: str) -> None:
    """One of two processes, as torchrun would start it."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with together(CPU) as processes:
        assert (processes.rank, processes.size, processes.leads) == (rank, 2, rank == 0)
        assert processes.any_asked(15 if rank == 1 else None) == 15
        assert processes.any_asked(None) is None
        state, losses = learn(processes)
    from safetensors.torch import save_file

    save_file({**state, "losses": torch.tensor(losses)}, f"{folder}/{rank}.safetensors")


def test_two_processes_equal_one(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    alone, losses = learn(Processes())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, str(tmp_path)), nprocs=2)  # type: ignore[no-untyped-call]
    found = [load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1)]
    for state in found:
        torch.testing.assert_close(state.pop("losses"), torch.tensor(losses), atol=1e-5, rtol=0)
        assert_close(alone, state, atol=1e-5)
    assert_close(found[0], found[1], atol=0.0)


@pytest.mark.parametrize("size", [1, 2, 3, 40])
def test_every_pair_is_in_one_share(size: int) -> None:
    made = pack("bert", (adapter("lora", "rank=4"), 0))
    table, _ = tables(made.backbone)
    plan = BatchPlan(table.lengths, 7)
    batch = next(training_batches(table, plan, [0, 1], 0, made.backbone.tokenizer.pad_token_id))
    shares = [share for rank in range(size) if (share := Processes(rank, size).share(batch))]
    assert sum(share.pairs for share in shares) == 7
    for member in range(2):  # each member's rows, in their order
        rows = torch.cat([share.input_ids.chunk(2)[member] for share in shares])
        assert rows.equal(batch.input_ids.chunk(2)[member])


def test_alone_there_is_nothing_to_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with together(CPU) as processes:
        assert processes == Processes()
        assert processes.any_asked(2) == 2
        assert processes.add_up([], [0.5]) == [0.5]
