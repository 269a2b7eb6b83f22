"""Two processes learn from the same global batches what one process learns."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file

from lora_bench.data.batching import BatchPlan, training_batches
from lora_bench.errors import Code
from lora_bench.head.loss import cross_entropy
from lora_bench.training.distributed import Processes, processes_of_torchrun
from lora_bench.training.optim import make_optimizer
from tests.adapters.tools import adapter, assert_close, optimizer, pack, tables
from tests.command_line import lora_bench, refused, toy_run

if TYPE_CHECKING:
    from pathlib import Path

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


def work(rank: int, port: int, folder: str) -> None:
    """One of two processes, as torchrun would start it."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with processes_of_torchrun() as processes:
        assert (processes.rank, processes.size, processes.is_leader) == (rank, 2, rank == 0)
        assert processes.any_signal(15 if rank == 1 else None) == 15
        assert processes.any_signal(None) is None
        state, losses = learn(processes)
    from safetensors.torch import save_file

    save_file({**state, "losses": torch.tensor(losses)}, f"{folder}/{rank}.safetensors")


def test_two_processes_equal_one(tmp_path: Path) -> None:
    alone, losses = learn(Processes())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, str(tmp_path)), nprocs=2)  # type: ignore[no-untyped-call]
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


def torchrun(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """`lora-bench train` in two processes, as a user starts it."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "lora_bench", "train"]
    command = [sys.executable, *launch, *overrides]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=240)


def test_torchrun_makes_the_run_that_one_process_makes(in_tmp: Path) -> None:
    overrides = ["adapter=adalora", "trainer.average=0.5"]
    assert lora_bench("train", *RUN, *overrides, "hydra.run.dir=one").code == 0
    answer = torchrun(in_tmp, *RUN, *overrides, "hydra.run.dir=two")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.count("record: ") == 1  # one of the two tells
    one, two = (json.loads((in_tmp / name / "run.json").read_text()) for name in ("one", "two"))
    assert (one["environment"]["processes"], two["environment"]["processes"]) == (1, 2)
    assert two["metrics"] == pytest.approx(one["metrics"], abs=1e-4)
    assert two["cost"]["train_flops"] == one["cost"]["train_flops"]
    states = [load_file(in_tmp / name / "adapter/adapter_model.safetensors") for name in ("one", "two")]
    assert_close(*states, atol=1e-4)
    assert {path.name for path in in_tmp.iterdir()} == {"one", "two"}


def test_a_run_of_two_processes_is_interrupted_and_gone_on_with(in_tmp: Path) -> None:
    long = [*RUN, "trainer.epochs=1000", "trainer.max_steps=100", "trainer.checkpoint_every=1"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "lora_bench", "train"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, *launch, *long, "hydra.run.dir=run"], cwd=in_tmp, **quiet) as process:  # type: ignore[call-overload]
        deadline = time.monotonic() + 120
        while not list(in_tmp.glob("run/checkpoints/step-*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
    record = json.loads((in_tmp / "run/run.json").read_text())
    assert record["status"] == "interrupted"
    reached = max(int(path.name[-8:]) for path in (in_tmp / "run/checkpoints").glob("step-*"))
    answer = torchrun(in_tmp, "resume=run")
    assert answer.returncode == 0, answer.stderr
    assert f"resumed from step {reached}" in answer.stdout
    assert json.loads((in_tmp / "run/run.json").read_text())["status"] == "done"


def test_a_sweep_under_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch, in_tmp: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    error = refused("train", "-m", *RUN, "seed=0,1")
    assert (error.code, error.key) == (Code.CONFLICT, "-m")
    assert not list(in_tmp.iterdir())
