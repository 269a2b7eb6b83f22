"""Probing leaves no trace: weights, gradients, random streams."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from lora_bench.adapters.pack.member import Member
from lora_bench.adapters.pack.pack import Pack
from lora_bench.run.settings import Experiment
from lora_bench.training.dummy_step import dummy_step
from tests.helpers import TINY, composed

if TYPE_CHECKING:
    from collections.abc import Callable

    from lora_bench.backbones.base import Backbone


@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize("family", TINY)
def test_a_probe_leaves_no_trace(backbone: Callable[..., Backbone], family: str, adapter: str) -> None:
    overrides = [f"model={family}", "data=toy", f"adapter={adapter}"] + (
        ["adapter.dropout=0.5"] if adapter == "lora" else []
    )
    experiment = Experiment.build(composed(*overrides))
    pack = Pack(backbone(family), [Member(experiment.adapter, 0)])
    pack.train()
    weights = {name: tensor.clone() for name, tensor in pack.network.state_dict().items()}
    streams = [update.generator.get_state() for update in pack.updates[0].values()]
    torch.manual_seed(5)
    dummy_step(pack, 3, 9)
    assert torch.rand(3).tolist() == torch.rand(3, generator=torch.Generator().manual_seed(5)).tolist()
    assert all(p.grad is None for p in pack.parameters())
    for name, tensor in pack.network.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    for update, before in zip(pack.updates[0].values(), streams, strict=True):
        assert torch.equal(update.generator.get_state(), before)
