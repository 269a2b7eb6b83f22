"""Two processes learn from the same global batches what one process learns."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from lora_bench.data.batching import BatchPlan, training_batches
from lora_bench.errors import Code
from lora_bench.head.loss import cross_entropy
from lora_bench.training.distributed import Processes, processes_of_torchrun
from lora_bench.training.optim import make_optimizer
from tests import forked
from tests.adapters.tools import adapter, assert_close, optimizer, pack, tables
from tests.command_line import lora_bench, refused, toy_run

if TYPE_CHECKING:
    from collections.abc import Callable

STEPS = 10


def learn(processes: Processes) -> tuple[dict[str, torch.Tensor], list[float]]:
    """A few steps of LoRA, in batches of 7 pairs that two processes cannot halve and a last one of 2."""
    a_pack = pack("bert", (adapter("lora", "rank=4"), 0))
    if not processes.is_leader:  # as a process that began otherwise would be: it takes the leader's start
        with torch.no_grad():
            for p in a_pack.trainable(0).values():
                p.add_(1.0)
    processes.broadcast(a_pack.trainable(0).values())
    table, _ = tables(a_pack.backbone)
    adamw = make_optimizer(optimizer(), a_pack, 0)
    losses = []
    batches = list(training_batches(table, BatchPlan(table.lengths, 7), [0], 0, a_pack.backbone.tokenizer.pad_token_id))
    for batch in batches[:STEPS]:
        shard, loss = processes.shard(batch), 0.0
        if shard is not None:
            assert shard.labels is not None
            shared = cross_entropy(a_pack(shard), shard.labels[None]).mean() * shard.pairs / batch.pairs
            shared.backward()
            loss = float(shared.detach())
        losses.append(processes.all_reduce(a_pack.trainable(0).values(), {0: loss})[0])
        adamw.step()
        adamw.zero_grad()
    return a_pack.state(0), losses


def start_two(function: Callable[..., object], *arguments: str) -> list[forked.Forked]:
    """Start a function in two processes, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [forked.Forked(function, *arguments, **variables, RANK=rank) for rank in ("0", "1")]


def work(folder: str) -> None:
    """One of two processes."""
    rank = os.environ["RANK"]
    torch.set_num_threads(1)
    with processes_of_torchrun() as processes:
        assert (processes.rank, processes.size, processes.is_leader) == (int(rank), 2, rank == "0")
        assert processes.any_signal(15 if rank == "1" else None) == 15
        assert processes.any_signal(None) is None
        state, losses = learn(processes)
    from safetensors.torch import save_file

    save_file({**state, "losses": torch.tensor(losses)}, f"{folder}/{rank}.safetensors")


def test_two_processes_equal_one(tmp_path: Path) -> None:
    alone, losses = learn(Processes())
    started = start_two(work, str(tmp_path))
    assert [process.wait() for process in started] == [0, 0], started[0].err + started[1].err
    states = [load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1)]
    for state in states:
        torch.testing.assert_close(state.pop("losses"), torch.tensor(losses), atol=1e-5, rtol=0)
        assert_close(alone, state, atol=5e-5)  # AdamW makes steps of what rounding leaves of a gradient
    assert_close(states[0], states[1], atol=0.0)


@pytest.mark.parametrize("size", [1, 2, 3, 40])
def test_every_pair_is_in_one_share(size: int) -> None:
    a_pack = pack("bert", (adapter("lora", "rank=4"), 0))
    table, _ = tables(a_pack.backbone)
    plan = BatchPlan(table.lengths, 7)
    batch = next(training_batches(table, plan, [0, 1], 0, a_pack.backbone.tokenizer.pad_token_id))
    shares = [share for rank in range(size) if (share := Processes(rank, size).shard(batch))]
    assert sum(share.pairs for share in shares) == 7
    for member in range(2):  # each member's rows, in their order
        rows = torch.cat([share.input_ids.chunk(2)[member] for share in shares])
        assert rows.equal(batch.input_ids.chunk(2)[member])


def test_alone_there_is_nothing_to_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with processes_of_torchrun() as processes:
        assert processes == Processes()
        assert processes.any_signal(2) == 2
        assert processes.all_reduce([], {0: 0.5}) == {0: 0.5}


RUN = toy_run("trainer.max_steps=9", "trainer.eval_every=4", "data.train_rows=80", "trainer.precision=fp32")


STOPPED = """
import os, signal, sys, time
from lora_bench.cli import main
from lora_bench.run.recorder import Recorder

stepped = Recorder.stepped

def stepped_and_stopped(recorder, number, *rest):
    stepped(recorder, number, *rest)
    if number == 4 and os.environ["RANK"] == "0":
        os.kill(os.getppid(), signal.SIGTERM)
    if number >= 4:
        time.sleep(1)

Recorder.stepped = stepped_and_stopped
sys.exit(main(sys.argv[1:]))
"""
"""A command that ends the torchrun above it in its fourth step, and then waits for what torchrun does."""


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.mark.slow
def test_a_run_of_torchrun_is_that_of_one_process_also_when_it_is_interrupted_and_resumed(in_tmp: Path) -> None:
    overrides = ["train", *RUN, "adapter=adalora", "trainer.average=0.5"]
    assert lora_bench(*overrides, "hydra.run.dir=one").code == 0
    Path("stopped.py").write_text(STOPPED)
    stopped = subprocess.run(
        [*TORCHRUN, "stopped.py", *overrides, "hydra.run.dir=two"], capture_output=True, timeout=240
    )
    assert stopped.returncode != 0
    assert json.loads(Path("two/run.json").read_text())["status"] == "interrupted"
    (reached,) = (int(path.name[-8:]) for path in Path("two/checkpoints").glob("step-*"))
    assert 4 <= reached < 9
    started = start_two(forked.run_command, "train", "resume=two")
    assert [process.wait() for process in started] == [0, 0], started[0].err + started[1].err
    assert f"resumed from step {reached}" in started[0].out
    assert [process.out.count("record: ") for process in started] == [1, 0]  # one of the two tells
    one, two = (json.loads(Path(name, "run.json").read_text()) for name in ("one", "two"))
    assert (one["environment"]["processes"], two["environment"]["processes"]) == (1, 2)
    assert two["metrics"] == pytest.approx(one["metrics"], abs=1e-4)
    assert two["cost"]["train_flops"] == one["cost"]["train_flops"]
    states = [load_file(Path(name, "adapter/adapter_model.safetensors")) for name in ("one", "two")]
    assert_close(*states, atol=1e-4)
    assert {path.name for path in in_tmp.iterdir()} == {"one", "two", "stopped.py"}


def test_a_sweep_under_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch, in_tmp: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    error = refused("train", "-m", *RUN, "seed=0,1")
    assert (error.code, error.key) == (Code.CONFLICT, "-m")
    assert not list(in_tmp.iterdir())
