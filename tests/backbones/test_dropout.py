"""Dropout on a CPU: the share and the scale of torch's, from few random numbers, and only in training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_bench.backbones.dropout import Dropout, keep_mask, replace_dropout, restore_dropout


@pytest.mark.parametrize("probability", [0.0, 1e-3, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_elements_are_dropped_independently_with_the_probability(probability: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    masks = torch.stack([keep_mask(torch.empty(1001, dtype=dtype), probability, generator) for _ in range(200)])
    dropped = masks == 0
    assert masks.dtype == dtype
    torch.testing.assert_close(masks[~dropped], torch.full_like(masks[~dropped], 1 / (1 - probability)))
    spread = (probability * (1 - probability)) ** 0.5
    tolerance = 5 * spread / masks.numel() ** 0.5 + 2**-17
    assert dropped.double().mean().item() == pytest.approx(probability, abs=tolerance)
    for shift in (1, 2, 4):  # four neighbours come from one random number
        both = (dropped[:, shift:] & dropped[:, :-shift]).double().mean().item()
        assert both == pytest.approx(probability**2, abs=3 * tolerance)


def test_a_stream_repeats_its_masks() -> None:
    masks = [keep_mask(torch.empty(7, 3), 0.5, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_modules_are_replaced_and_drop_in_training_only() -> None:
    class Other(nn.Dropout):
        pass

    network = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.25)), Other(0.5))
    before = list(network.modules())
    replace_dropout(network.eval())
    assert [type(m) for m in network.modules() if isinstance(m, nn.Dropout)] == [Dropout, Dropout, Other]
    x = torch.ones(100, 4, requires_grad=True)
    assert network[0](x) is x
    torch.manual_seed(0)
    out = network.train()[0](x)
    out.sum().backward()
    assert torch.equal(x.grad, out)  # type: ignore[arg-type]
    assert set(out.unique().tolist()) == {0.0, 2.0}
    restore_dropout(network)
    assert all(one is other for one, other in zip(network.modules(), before, strict=True))
