"""LoftQ's correction is its algorithm 1."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from lora_bench.adapters.lowrank.loftq import loftq
from lora_bench.backbones.quantization import Quantized, quantize
from lora_bench.config.schema import QUANT_BITS


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def loss(weight: Tensor, quantized: Quantized, lora_A: Tensor | None = None, lora_B: Tensor | None = None) -> float:
    """The Frobenius norm of what is not reproduced, relative to the weight's."""
    left = weight.double() - quantized.dequantize().double()
    if lora_A is not None and lora_B is not None:
        left = left - lora_B.double() @ lora_A.double()
    return (left.norm() / weight.double().norm()).item()


def numpy_loftq(weight: Tensor, rank: int, kind: str, iterations: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Algorithm 1 of arXiv 2310.08659 as it stands: (Q, B A) after each iteration."""
    W = weight.double().numpy()
    low = np.zeros_like(W)
    iterates = []
    for _ in range(iterations):
        Q = quantize(torch.from_numpy(W - low), kind).dequantize().double().numpy()
        U, S, Vh = np.linalg.svd(W - Q, full_matrices=False)
        low = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        iterates.append((Q, low))
    return iterates


@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize("kind", QUANT_BITS)
def test_loftq_is_the_best_iterate_of_algorithm_1(kind: str, rank: int) -> None:
    weight = draw(48, 80)
    Q, lora_A, lora_B = loftq(weight, rank, kind, 5)
    best = min(numpy_loftq(weight, rank, kind, 5), key=lambda each: np.linalg.norm(weight.numpy() - each[0] - each[1]))
    assert np.array_equal(Q.dequantize().numpy(), best[0])
    np.testing.assert_allclose((lora_B.double() @ lora_A.double()).numpy(), best[1], atol=1e-7)
    assert (lora_A.shape, lora_B.shape) == ((rank, 80), (48, rank))
    assert (lora_A.dtype, lora_B.dtype, Q.quant_type) == (torch.float32, torch.float32, kind)


@pytest.mark.parametrize("rank", [1, 8, 32])
@pytest.mark.parametrize("kind", QUANT_BITS)
def test_loftq_is_closer_than_quantising_alone_and_more_iterations_are_never_worse(kind: str, rank: int) -> None:
    weight = draw(80, 48, seed=1)
    alone = loss(weight, quantize(weight, kind))
    lost = [loss(weight, *loftq(weight, rank, kind, iterations)) for iterations in range(1, 9)]
    assert lost[0] < alone
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in pairwise(lost))


def test_later_iterations_help_and_where_they_harm_they_are_not_returned() -> None:
    weight = draw(48, 80)
    once, often = (loss(weight, *loftq(weight, 8, "nf4", iterations)) for iterations in (1, 5))
    assert often < 0.9 * once
    first, last = (np.linalg.norm(weight.numpy() - Q - low) for Q, low in numpy_loftq(weight, 32, "int2", 5)[::4])
    assert last > 1.2 * first
    once, often = (loss(weight, *loftq(weight, 32, "int2", iterations)) for iterations in (1, 5))
    assert often == once


def test_one_iteration_keeps_the_largest_singular_values_of_what_is_lost_halved_between_the_factors() -> None:
    weight = draw(40, 64)
    Q, lora_A, lora_B = loftq(weight, 6, "int4", 1)
    assert torch.equal(Q.dequantize(), quantize(weight, "int4").dequantize())
    expected = torch.linalg.svdvals(weight - Q.dequantize())
    torch.testing.assert_close(lora_B.T @ lora_B, torch.diag(expected[:6]), atol=1e-6, rtol=0)
    torch.testing.assert_close(lora_A @ lora_A.T, torch.diag(expected[:6]), atol=1e-6, rtol=0)
    left = (weight - Q.dequantize() - lora_B @ lora_A).norm().item()
    assert left == pytest.approx(expected[6:].norm().item(), rel=1e-5)


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (24, 24)])
@pytest.mark.parametrize("kind", QUANT_BITS)
def test_full_rank_leaves_nothing(kind: str, shape: tuple[int, int]) -> None:
    weight = draw(*shape)
    assert loss(weight, *loftq(weight, 24, kind, 2)) < 1e-6


def test_signs_are_fixed_and_the_result_repeats() -> None:
    weight = draw(48, 64)
    Q, lora_A, lora_B = loftq(weight, 8, "nf4", 3)
    assert (lora_B.gather(0, lora_B.abs().argmax(0, keepdim=True)) > 0).all()
    again, A, B = loftq(weight.clone(), 8, "nf4", 3)
    assert torch.equal(again.codes, Q.codes)
    assert torch.equal(A, lora_A)
    assert torch.equal(B, lora_B)


@pytest.mark.parametrize("kind", QUANT_BITS)
def test_a_weight_that_loses_nothing_needs_no_correction(kind: str) -> None:
    for weight in (torch.zeros(16, 24), quantize(draw(16, 24), kind).dequantize()):
        Q, lora_A, lora_B = loftq(weight, 4, kind, 3)
        assert torch.equal(Q.dequantize(), weight)
        assert not lora_A.any()
        assert not lora_B.any()
