"""Attention: torch's own, in values and gradients, whatever is kept for the backward pass."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lora_bench.backbones import attention
from lora_bench.backbones.attention import attend

HEADS = 4


def inputs(asking: int, tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values in double precision, and a mask that hides the second row's last tokens."""
    generator = torch.Generator().manual_seed(asking + tokens)
    q, k, v = (
        torch.randn(2, n, 8 * HEADS, dtype=torch.double, generator=generator).requires_grad_()
        for n in (asking, tokens, tokens)
    )
    mask = torch.zeros(2, 1, 1, tokens, dtype=torch.double)
    mask[1, ..., -tokens // 3 :] = torch.finfo(torch.double).min
    return q, k, v, mask


def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    split = [t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v)]
    return F.scaled_dot_product_attention(*split, attn_mask=mask).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("asking", [1, 9], ids=["first", "all"])
@pytest.mark.parametrize("kept_length", [0, 64], ids=["computed again", "kept"])
def test_values_and_gradients_are_those_of_torch(
    monkeypatch: pytest.MonkeyPatch, kept_length: int, asking: int, masked: bool
) -> None:
    monkeypatch.setattr(attention, "KEPT_LENGTH", kept_length)
    q, k, v, mask = inputs(asking, 9)
    given = mask if masked else None
    weights = torch.randn(2, asking, 8 * HEADS, dtype=torch.double)
    results = []
    for way in (lambda: attend(q, k, v, given, HEADS), lambda: fused(q, k, v, given)):
        y = way()
        results.append([y, *torch.autograd.grad((y * weights).sum(), (q, k, v))])
    for ours, theirs in zip(*results, strict=True):
        assert theirs.abs().max() > 1e-3
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_dropped_probabilities_keep_their_mean() -> None:
    q, k, v, mask = inputs(9, 9)
    torch.manual_seed(0)
    with torch.no_grad():
        mean = torch.stack([attend(q, k, v, mask, HEADS, 0.3) for _ in range(2000)]).mean(0)
        torch.testing.assert_close(mean, attend(q, k, v, mask, HEADS), atol=0.1, rtol=0)
