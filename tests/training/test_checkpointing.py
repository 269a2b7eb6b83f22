"""Recomputed activations: equal gradients, less memory, more FLOPs, and `auto` where memory asks for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from lora_bench.backbones.auto import Auto
from lora_bench.evaluation.cost import FlopModel
from lora_bench.training import checkpointing, cuda_graphs
from lora_bench.training.checkpointing import set_checkpointing
from lora_bench.training.dummy_step import dummy_step, saved_bytes
from tests.adapters.tools import adapter, pack, stir, trainer
from tests.backbones.tools import make, random_batch

if TYPE_CHECKING:
    from lora_bench.adapters.base import Adapter
    from lora_bench.adapters.pack.pack import Pack


def made_pack(form: str, *settings: Adapter) -> Pack:
    """A pack with lively weights; `auto` is a BERT through transformers' own forward pass."""
    own = make() if form == "auto" else None
    backbone = own and Auto(own.network, own.tokenizer, set())
    return stir(pack(form, *((one, seed) for seed, one in enumerate(settings)), backbone=backbone))


def gradients(made: Pack, *, recomputed: bool) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """The gradients of a step in training mode, the states of all random streams after it, and the logits."""
    made.checkpoint_activations(recomputed)
    made.train()
    torch.manual_seed(0)
    for k, stream in enumerate(made.dropout):
        stream.manual_seed(k)
    with made.accumulating_gradients():
        logits = made(random_batch(made.backbone))
        logits.square().sum().backward()
    trained = [p for k in range(made.size) for p in made.trainable(k).values()]
    taken = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    for p in trained:
        p.grad = None
    return taken, [stream.get_state() for stream in [*made.dropout, torch.default_generator]], logits.detach()


@pytest.mark.parametrize(
    ("form", "method"),
    [("bert", "lora"), ("bert", "full"), ("t5", "dora"), ("t5_encoder", "qlora"), ("auto", "lora")],
)
def test_gradients_and_dropout_are_those_of_held_activations(form: str, method: str) -> None:
    settings = [adapter("full")] if method == "full" else [adapter(method, "dropout=0.3")] * 2
    made = made_pack(form, *settings)
    held, streams, logits = gradients(made, recomputed=False)
    recomputed, same_streams, same_logits = gradients(made, recomputed=True)
    torch.testing.assert_close(same_logits, logits, rtol=0, atol=0)
    torch.testing.assert_close(recomputed, held, rtol=0, atol=0)
    torch.testing.assert_close(same_streams, streams, rtol=0, atol=0)
    assert any(gradient.any() for gradient in held)


@pytest.mark.parametrize("form", ["bert", "auto"])
def test_less_is_held_and_the_second_computation_counts_as_flops(form: str) -> None:
    made = made_pack(form, adapter("lora"))
    held, flops = saved_bytes(made, 2, 32), FlopModel.measure(lambda n, t: dummy_step(made, n, t))(2, 32)
    made.checkpoint_activations(True)
    assert saved_bytes(made, 2, 32) < held / 2
    assert FlopModel.measure(lambda n, t: dummy_step(made, n, t))(2, 32) > 1.2 * flops
    made.detach()
    assert not any("forward" in vars(module) for module in made.network.modules())


def test_auto_recomputes_where_a_single_pair_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    made = pack("bert", (adapter("lora"), 0))
    needed = saved_bytes(made, 1, 64)

    def decide(free: float, **changes: Any) -> bool:
        monkeypatch.setattr(checkpointing, "free_bytes", lambda device: free)
        set_checkpointing(made, trainer(**{"activation_checkpointing": "auto", **changes}), longest=64, orders=1)
        return made.recomputes_activations

    assert not decide(3 * needed)
    assert decide(1.5 * needed)
    assert decide(3 * needed, micro_batch_size=4)
    assert decide(3 * needed, activation_checkpointing=True)
    assert not decide(needed, activation_checkpointing=False)


def test_batches_on_a_gpu_are_padded_alike_whether_or_not_memory_suffices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else dropout would drop other features in a large pack than in a single run."""
    monkeypatch.setattr(cuda_graphs, "Graphs", lambda *arguments: None)
    made = pack("bert", (adapter("lora"), 0))
    made.backbone.device = torch.device("cuda")
    multiples = []
    for recomputed in (False, True):
        made.recomputes_activations = recomputed
        multiples.append(cuda_graphs.Backward(made, {}, graphs=True).multiple)
    assert multiples == [cuda_graphs.LENGTH_MULTIPLE] * 2
