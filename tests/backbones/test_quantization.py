"""Quantised weights are what their papers say, in the bytes promised."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_bench.backbones import bitsandbytes_kernels, quantization
from lora_bench.backbones.quantization import Quantized, quantize
from lora_bench.config.schema import QUANT_BITS

BITS = {"nf4": 4, "int8": 8, "int4": 4, "int2": 2}
# Appendix E of the QLoRA paper (arXiv 2305.14314).
NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def levels(kind: str) -> Tensor:
    """What the kind makes of a fine grid over [-1, 1]."""
    grid = torch.linspace(-1, 1, 62 * 400)
    blocks = torch.cat([torch.tensor([[-1.0, 1.0]]).expand(400, 2), grid.view(400, 62)], 1)
    return quantize(blocks, kind).dequantize().unique()


def loss(weight: Tensor, quantized: Quantized) -> float:
    """The Frobenius norm of what is not reproduced, relative to the weight's."""
    return ((weight.double() - quantized.dequantize().double()).norm() / weight.double().norm()).item()


# -- levels --


def test_there_are_the_four_kinds() -> None:
    assert set(QUANT_BITS) == set(BITS)


def test_nf4_has_the_published_levels() -> None:
    torch.testing.assert_close(levels("nf4"), torch.tensor(NF4), atol=0, rtol=0)


def test_nf4s_levels_are_quantiles_of_the_normal_distribution() -> None:
    """Evenly spaced probabilities from 0.9677083 to a half: seven steps below zero, eight above, scaled to 1."""

    def quantiles(steps: int) -> list[float]:
        return [NormalDist().inv_cdf(p) for p in np.linspace(0.9677083, 0.5, steps + 1)]

    expected = [-q for q in quantiles(7)] + quantiles(8)[-2::-1]
    largest = expected[-1]
    assert levels("nf4").tolist() == pytest.approx([q / largest for q in expected], abs=2e-7)


@pytest.mark.parametrize("kind", ["int2", "int4", "int8"])
def test_uniform_levels_are_two_to_the_bits_at_equal_distances_both_ends_included(kind: str) -> None:
    expected = torch.linspace(-1, 1, 2 ** BITS[kind], dtype=torch.float64).float()
    torch.testing.assert_close(levels(kind), expected, atol=1e-7, rtol=0)


# -- by hand --


def test_int2_by_hand() -> None:
    """A scale of 3: levels -3, -1, 1, 3, borders -2, 0, 2; a value on a border goes to the lower level."""
    weight = torch.tensor([[-3.0, -2.01, -2.0, -1.99, -0.5, 0.0], [0.01, 0.7, 1.99, 2.0, 2.01, 2.9]])
    made = quantize(weight, "int2")
    assert made.dequantize().tolist() == [[-3, -3, -3, -1, -1, -1], [1, 1, 1, 1, 3, 3]]
    assert made.scales.tolist() == [3]
    assert made.codes[0, :3].tolist() == [0b00_00_00_01, 0b01_01_10_10, 0b10_10_11_11]


def test_int4_by_hand() -> None:
    """A scale of 15: the levels are the odd numbers from -15 to 15."""
    weight = torch.tensor([[15.0, 13.9, 0.1, -0.1, -15.0, -7.2, 5.99, 6.01]])
    made = quantize(weight, "int4")
    torch.testing.assert_close(made.dequantize(), torch.tensor([[15.0, 13, 1, -1, -15, -7, 5, 7]]))
    assert made.codes[0, :4].tolist() == [0xFE, 0x87, 0x04, 0xAB]


def test_each_block_of_64_has_a_scale_of_its_own() -> None:
    weight = torch.cat([draw(1, 64), draw(1, 64) * 1000, draw(1, 64) / 1000]).view(2, 96)
    made = quantize(weight, "nf4")
    torch.testing.assert_close(made.scales, weight.view(3, 64).abs().amax(1), atol=0, rtol=0)
    alone = [quantize(block[None], "nf4").dequantize() for block in weight.view(3, 64)]
    torch.testing.assert_close(made.dequantize(), torch.cat(alone).view(2, 96), atol=0, rtol=0)


@pytest.mark.parametrize("index", [slice(2, 5), torch.tensor([4, 1, 1])])
def test_rows_are_those_of_the_whole_weight(index: object) -> None:
    made = quantize(draw(6, 128), "nf4")
    rows = made.rows(index)
    assert rows is not None
    assert torch.equal(rows.dequantize(), made.dequantize()[index])
    assert quantize(draw(6, 100), "nf4").rows(index) is None  # a block reaches from one row into the next


def test_a_weight_larger_than_what_is_quantised_at_a_time_has_the_codes_of_its_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = draw(10, 100)
    whole = quantize(weight, "int4")
    monkeypatch.setattr(quantization, "QUANTIZED_BLOCKS", 3)
    in_parts = quantize(weight, "int4")
    assert torch.equal(in_parts.codes, whole.codes)
    assert torch.equal(in_parts.scales, whole.scales)


# -- what holds for every kind --


@pytest.mark.parametrize("kind", QUANT_BITS)
def test_each_value_becomes_its_nearest_level(kind: str) -> None:
    weight = draw(48, 64)
    scales = weight.abs().amax(1, keepdim=True).double()
    candidates = scales[:, :, None] * levels(kind).double()  # (rows, 1, levels)
    nearest = (weight.double()[:, :, None] - candidates).abs().amin(2)
    off = (weight.double() - quantize(weight, kind).dequantize().double()).abs()
    torch.testing.assert_close(off, nearest, atol=1e-7, rtol=0)


@pytest.mark.parametrize(("kind", "bound"), [("int8", 1 / 255), ("int4", 1 / 15), ("int2", 1 / 3), ("nf4", 0.1520)])
def test_no_value_is_off_by_more_than_half_the_widest_gap(kind: str, bound: float) -> None:
    weight = draw(96, 128)
    off = (weight - quantize(weight, kind).dequantize()).abs().view(-1, 64)
    share = off / weight.view(-1, 64).abs().amax(1, keepdim=True)
    assert bound * 0.5 < share.max() < bound * 1.0001


def test_on_normal_weights_nf4_beats_int4_and_more_bits_beat_fewer() -> None:
    weight = draw(256, 256)
    lost = {kind: loss(weight, quantize(weight, kind)) for kind in QUANT_BITS}
    assert lost["int8"] < lost["nf4"] < lost["int4"] < lost["int2"]
    assert lost["nf4"] < 0.1 < lost["int4"] < 0.12


@pytest.mark.parametrize(("kind", "stored"), [("nf4", 4.5), ("int4", 4.5), ("int2", 2.5), ("int8", 8.5)])
def test_a_value_costs_its_bits_and_half_a_bit_of_scale(kind: str, stored: float) -> None:
    made = quantize(draw(96, 64), kind)
    assert (made.codes.dtype, made.scales.dtype) == (torch.uint8, torch.float32)
    assert made.codes.nbytes == 96 * 64 * BITS[kind] // 8
    assert (made.codes.nbytes + made.scales.nbytes) * 8 == 96 * 64 * stored


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 70),
    kind=st.sampled_from(list(QUANT_BITS)),
    power=st.integers(-12, 12),
    seed=st.integers(0, 99),
)
def test_any_size_keeps_its_shape_and_is_quantised_once_and_for_all(
    rows: int, columns: int, kind: str, power: int, seed: int
) -> None:
    weight = draw(rows, columns, seed=seed) * 10.0**power
    made = quantize(weight, kind)
    left = made.dequantize()
    assert (made.shape, left.shape, left.dtype) == ((rows, columns), (rows, columns), torch.float32)
    blocks = math.ceil(rows * columns / 64)
    assert (made.codes.shape, made.scales.shape) == ((blocks, 8 * BITS[kind]), (blocks,))
    assert (weight - left).abs().max() <= weight.abs().max() / (2 if kind == "int2" else 6)
    again = quantize(left, kind)
    assert torch.equal(again.dequantize(), left)
    assert torch.equal(again.codes, made.codes)
    assert torch.equal(again.scales, made.scales)
    stored = (made.codes.clone(), made.scales.clone(), tuple(made.shape), made.quant_type)
    assert torch.equal(Quantized(*stored).dequantize(), left)


@pytest.mark.parametrize("kind", QUANT_BITS)
def test_zeros_stay_zero_beside_other_blocks(kind: str) -> None:
    weight = torch.cat([torch.zeros(2, 64), draw(1, 64)])
    left = quantize(weight, kind).dequantize()
    assert not left[:2].any()
    assert left[2].all() or kind == "nf4"
    assert not quantize(torch.zeros(3, 5), kind).dequantize().any()
    assert (quantize(torch.zeros(2, 64), "nf4").codes == 0x77).all()  # the number of its level 0, twice


@pytest.mark.parametrize("kind", QUANT_BITS)
def test_a_value_that_is_no_finite_number_is_not_hidden(kind: str) -> None:
    for wrong in (math.nan, math.inf, -math.inf):
        weight = draw(2, 64)
        weight[0, 3] = wrong
        left = quantize(weight, kind).dequantize()
        assert not left[0].isfinite().any()
        assert left[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_weight_of_any_floating_type_is_quantised_as_in_fp32_and_left_alone(dtype: torch.dtype) -> None:
    weight = torch.nn.Parameter(draw(8, 48).to(dtype).T)  # not contiguous
    before = weight.detach().clone()
    made = quantize(weight, "nf4")
    assert torch.equal(made.dequantize(), quantize(weight.detach().float().contiguous(), "nf4").dequantize())
    assert torch.equal(weight, before)
    assert not made.dequantize().requires_grad


@pytest.mark.parametrize("shape", [(64, 128), (384, 384), (100, 36), (7, 11)])
def test_nf4_is_bitsandbytes_to_the_bit(shape: tuple[int, int]) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = draw(*shape)
    weight.view(-1)[:64] = 0
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    made = quantize(weight, "nf4")
    assert torch.equal(made.codes.flatten()[: codes.numel()], codes.flatten())
    assert torch.equal(made.scales, state.absmax)
    if shape[1] % 2 == 0:  # its own route for odd widths is compiled on the spot
        assert torch.equal(made.dequantize(), functional.dequantize_4bit(codes, state))


@pytest.mark.parametrize("shape", [(48, 64), (10, 36), (7, 11)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitsandbytes_dequantises_to_the_same_bits(shape: tuple[int, int], dtype: torch.dtype) -> None:
    pytest.importorskip("bitsandbytes")
    made = quantize(draw(*shape), "nf4")
    expected = made.dequantize(dtype)
    try:
        bitsandbytes_kernels.choose_kernels("bitsandbytes", torch.device("cpu"))
        assert bitsandbytes_kernels.can_dequantize("nf4", shape) == (shape != (7, 11))
        assert torch.equal(made.dequantize(dtype), expected)
    finally:
        bitsandbytes_kernels.choose_kernels("auto", torch.device("cpu"))
    assert not bitsandbytes_kernels.can_dequantize("nf4", shape)
