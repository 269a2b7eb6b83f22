"""Sharded weights: two processes learn what one learns, gradients are those of whole weights, and refusals."""

from __future__ import annotations

import json
import signal
import socket
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from lora_bench import train as entry_point
from lora_bench.adapters.pack.member import Member
from lora_bench.adapters.pack.pack import Pack
from lora_bench.backbones.load import load, load_tokenizer
from lora_bench.backbones.sharding import full_tensor, is_sharded, local_tensor
from lora_bench.data.batching import BatchPlan, training_batches
from lora_bench.errors import Code
from lora_bench.training.distributed import Processes
from lora_bench.training.sharding import shard
from tests import forked
from tests.adapters.tools import adapter, assert_close, pack, stir, tables
from tests.backbones.architectures import ARCHITECTURES, Architecture
from tests.backbones.tools import QQP_LABELS, make, model_settings, random_batch
from tests.command_line import at_step, lora_bench, refused, refuses, signalled, toy_run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CPU = torch.device("cpu")
STEPS = ("trainer.max_steps=6", "trainer.eval_every=3", "trainer.batch_size=7", "trainer.micro_batch_size=2")
LORA = toy_run(*STEPS, "adapter=lora", "adapter.dropout=0.0")
FULL = toy_run(*STEPS, "model=llama", "model.path=llama", "adapter=full", "trainer.average=0.5")


def saved_model(name: str, folder: Path) -> Path:
    """Save a tiny random model of an architecture."""
    return next(one for one in ARCHITECTURES if one.name == name).save(folder)


def train_sharded(rank: str, *ports: str) -> None:
    """Train as one of two processes of torchrun: a run of LoRA, and a full one, interrupted and resumed."""
    free_ports = list(ports)
    torch.set_num_threads(1)
    shares: list[float] = []

    def noting_share(a_pack: Pack) -> None:
        shard(a_pack)
        sharded = [p for p in a_pack.network.parameters() if is_sharded(p)]
        assert all(p.requires_grad == a_pack.trains_backbone for p in sharded)
        shares.append(sum(local_tensor(p).numel() for p in sharded) / sum(p.numel() for p in sharded))

    with pytest.MonkeyPatch.context() as patch:

        def command(*arguments: str) -> Any:
            variables = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_ports.pop()}
            for name, value in variables.items():
                patch.setenv(name, str(value))
            return lora_bench("train", *arguments)

        patch.setattr(entry_point, "shard", noting_share)
        answer = command(*LORA, "trainer.sharding=fsdp", "hydra.run.dir=sharded_lora")
        assert answer.code == 0, answer
        with pytest.MonkeyPatch.context() as signals:
            if rank == "1":  # the signal of one process stops both
                at_step(signals, 4, signalled(signal.SIGTERM))
            answer = command(*FULL, "trainer.sharding=fsdp", "hydra.run.dir=sharded_full")
            assert answer.code == 128 + signal.SIGTERM, answer
        answer = command("resume=sharded_full")
        assert answer.code == 0, answer
        assert rank == "1" or "resumed from step 4" in answer.out
    assert shares == pytest.approx([0.5] * 3, abs=0.01)


def test_two_processes_with_sharded_weights_make_the_run_of_one(in_tmp: Path) -> None:
    """Batches of 7 pairs, and the last of an epoch, leave one process fewer pairs and passes than the other."""
    saved_model("Llama", in_tmp / "llama")
    ports = []
    for _ in range(3):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(str(free.getsockname()[1]))
    names = ("lora", "full")
    for name, overrides in zip(names, (LORA, FULL), strict=True):
        assert lora_bench("train", *overrides, f"hydra.run.dir={name}").code == 0
    other = forked.Forked(train_sharded, "1", *ports)
    train_sharded("0", *ports)
    assert other.wait() == 0, other.err
    for name in names:
        whole, sharded = (json.loads((in_tmp / run / "run.json").read_text()) for run in (name, f"sharded_{name}"))
        assert sharded["metrics"] == pytest.approx(whole["metrics"], abs=1e-5)
        assert sharded["params"] == whole["params"]
        assert sharded["environment"]["backbone_sha256"] == whole["environment"]["backbone_sha256"]
        (file,) = (path.name for path in (in_tmp / name / "adapter").glob("*.safetensors"))
        states = [load_file(in_tmp / run / "adapter" / file) for run in (name, f"sharded_{name}")]
        assert_close(*states, atol=1e-5)
    config = json.loads((in_tmp / "sharded_full/adapter/config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]


@pytest.mark.parametrize("size", [1, 2, 3, 40])
@pytest.mark.parametrize("pairs", [1, 2, 50])
def test_every_process_makes_as_many_passes_and_each_pair_is_in_one(size: int, pairs: int) -> None:
    a_pack = pack("bert", (adapter("lora", "rank=4"), 0))
    table, _ = tables(a_pack.backbone)
    batch = next(training_batches(table, BatchPlan(table.lengths, 7), [0], 0, a_pack.backbone.tokenizer.pad_token_id))
    shares = [list(Processes(rank, size).equal_shares(batch, pairs)) for rank in range(size)]
    assert len({len(of_process) for of_process in shares}) == 1
    assert sorted(position for of_process in shares for _, positions in of_process for position in positions) == [
        *range(7)
    ]
    for micro, positions in (share for of_process in shares for share in of_process):
        assert 1 <= micro.pairs <= max(1, pairs)
        assert micro.input_ids[: len(positions)].equal(batch.input_ids[list(positions)])


@pytest.fixture
def group() -> Iterator[None]:
    """Make this process a group of its own, in which weights are sharded as in a larger one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    yield
    dist.destroy_process_group()


def sharded_pack(model: str, method: str, *overrides: str) -> Pack:
    """Return a pack of one member on a backbone that is sharded over this process alone."""
    settings, member = model_settings(model, *overrides), Member(adapter(method), 0)
    trained = member.adapter.trains_backbone
    backbone = load(settings, load_tokenizer(settings), task="qqp", label_names=[QQP_LABELS], trained=trained)
    backbone.network.load_state_dict(make(model, *overrides).network.state_dict())
    backbone.to_shards(CPU, torch.float32, trained=trained)
    sharded = Pack(backbone, [member])
    shard(sharded)
    return sharded


@pytest.mark.parametrize(
    ("model", "method"), [("tiny_bert", "full"), ("tiny_t5", "full"), ("tiny_t5", "dora"), ("gpt2", "full")]
)
@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.usefixtures("group")
def test_gradients_are_those_of_whole_weights(model: str, method: str, recomputed: bool, tmp_path: Path) -> None:
    overrides = [] if model != "gpt2" else [f"model.path={saved_model('GPT-2', tmp_path / 'gpt2')}"]
    whole = Pack(make(model, *overrides), [Member(adapter(method), 0)])
    sharded = sharded_pack(model, method, *overrides)
    sharded.checkpoint_activations(recomputed)
    gradients = []
    for a_pack in (whole, sharded):
        if method != "full":
            stir(a_pack)
        a_pack(random_batch(a_pack.backbone)).square().sum().backward()
        gradients.append({name: full_tensor(p.grad) for name, p in a_pack.trainable(0).items() if p.grad is not None})
    assert_close(*gradients, atol=1e-5)
    assert sum(is_sharded(p) for p in sharded.network.parameters()) > 10


@pytest.mark.usefixtures("group")
def test_a_network_that_uses_weights_outside_of_a_layers_call_is_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    squeezebert = Architecture("SqueezeBERT", "squeezebert", {**sizes, "embedding_size": 32})
    folder = squeezebert.save(tmp_path / "squeezebert")
    with refuses(Code.UNSUPPORTED, key="trainer.sharding"):
        sharded_pack("auto", "full", f"model.path={folder}")


@pytest.mark.parametrize(
    "overrides",
    [(), ("ensemble.members=2",), ("data.tasks=[rte,mrpc]", "data.share=backbone"), ("adapter=qlora",)],
    ids=["one process", "ensemble", "adapter per task", "quantised"],
)
def test_what_cannot_be_sharded_is_refused(overrides: tuple[str, ...], in_tmp: Path) -> None:
    error = refused("train", "model=tiny_bert", *overrides, "trainer.sharding=fsdp")
    assert (error.code, error.key) == (Code.CONFLICT, "trainer.sharding")


def test_a_sweep_of_sharded_runs_is_refused(in_tmp: Path) -> None:
    error = refused("train", "-m", "model=tiny_bert", "seed=0,1", "trainer.sharding=fsdp")
    assert (error.code, error.key) == (Code.CONFLICT, "trainer.sharding")
