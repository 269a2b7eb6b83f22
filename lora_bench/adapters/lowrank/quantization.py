"""Quantise a frozen weight to 2, 4 or 8 bits per value, and correct the error by a low-rank product (LoftQ).

A quantisation type is a table of levels in [-1, 1]. A weight's values, row after row, are cut into blocks of 64. A
block is stored as its largest magnitude (its scale, fp32, half a bit per value) and, for each value, the number of the
level nearest to value / scale:

    nf4                 the 16 levels of NormalFloat (QLoRA, Dettmers et al. 2023, arXiv 2305.14314, appendix E)
    int2, int4, int8    2^bits levels at equal distances from -1 to 1, both ends among them (the uniform quantisation
                        of LoftQ, Li et al. 2023, arXiv 2310.08659): int2 has -1, -1/3, 1/3, 1

The uniform tables are symmetric and have an even number of levels, so zero is none of them: a table of 2^bits - 1
levels with zero loses more (int2 on MiniLM: 72 % of a weight's Frobenius norm, not 58 %). A block of zeros stays zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64
"""Number of values that share a scale."""

CACHED_BLOCKS = 4096
"""Number of blocks that are dequantised at a time on a CPU: 1 MB in fp32."""

_BITS = {"nf4": 4, "int8": 8, "int4": 4, "int2": 2}

QUANT_TYPES: tuple[str, ...] = tuple(_BITS)
"""The quantisation types: values of `adapter.quantize`."""

# Quantiles of the standard normal distribution, scaled to reach -1 and 1; eight at and below zero, eight above.
_NORMAL_FLOAT = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def bytes_per_value(quant_type: str) -> float:
    """Return the bytes that a value of a quantised weight takes: its code, and its share of the block's scale."""
    return _BITS[quant_type] / 8 + 4 / BLOCK


@dataclass(frozen=True, eq=False)
class Quantized:
    """A quantised weight; its four fields rebuild it bit for bit."""

    codes: Tensor
    """(blocks, 8 · bits), uint8: numbers of levels, 8 / bits to a byte, the first in the highest bits (as
    bitsandbytes packs nf4). A last block that is not full is padded with codes of zeros."""
    scales: Tensor
    """(blocks,), fp32: the largest magnitude of each block."""
    shape: tuple[int, ...]
    """The shape of the weight, (out, in)."""
    quant_type: str
    """One of `QUANT_TYPES`."""

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight, (out, in), computed in fp32 and rounded to `dtype`, on the device of the codes.

        On a CPU it is computed in parts that its cache holds.
        """
        device, count = self.codes.device, len(self.codes)
        table = _values_of_byte(self.quant_type, device)
        at_once = CACHED_BLOCKS if device.type == "cpu" else max(1, count)
        blocks = torch.empty(count, BLOCK, dtype=dtype, device=device)
        parts = (torch.split(tensor, at_once) for tensor in (blocks, self.codes, self.scales))
        for part, codes, scales in zip(*parts, strict=True):
            values = F.embedding(codes.int(), table)  # (part, bytes, 8/bits)
            part.copy_(values.view(-1, BLOCK).mul_(scales[:, None]))
        return blocks.flatten()[: math.prod(self.shape)].view(self.shape)


@torch.no_grad()
def quantize(weight: Tensor, quant_type: str) -> Quantized:
    """Round each value of the weight to the nearest level of its block; halfway between two levels, to the lower.

    Quantising what `dequantize` returned gives the same codes and scales again.

    Args:
        weight: (out, in), in any floating type.
        quant_type: one of `QUANT_TYPES`.
    """
    values = weight.flatten().float()
    blocks = F.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    levels = _levels(quant_type, weight.device)
    # A product with the reciprocal rounds as bitsandbytes does. The bound keeps a block of zeros zero.
    shares = blocks * scales.clamp(min=torch.finfo(torch.float32).tiny).reciprocal()[:, None]
    codes = torch.bucketize(shares, (levels[1:] + levels[:-1]) / 2)  # (blocks, 64)
    bits = _BITS[quant_type]
    place_values = 2 ** torch.arange(8 - bits, -1, -bits, device=weight.device)  # of the codes in a byte
    packed = (codes.view(len(codes), -1, 8 // bits) * place_values).sum(2)  # (blocks, 8 · bits)
    return Quantized(packed.to(torch.uint8), scales, tuple(weight.shape), quant_type)


@torch.no_grad()
def loftq(weight: Tensor, rank: int, quant_type: str, iterations: int) -> tuple[Quantized, Tensor, Tensor]:
    """Return LoftQ's initialisation (algorithm 1): a quantised Q and low-rank B A whose sum approximates the weight.

        A, B = 0;  repeat:  Q = quantize(W - B A);  U S Vᵀ = SVD(W - Q);  B = U √S, A = √S Vᵀ, of the largest `rank`

    One iteration is the truncated SVD of what quantising loses. Further ones can make ‖W - Q - B A‖ larger again. The
    reference returns the last iterate; this function returns the one with the smallest Frobenius norm, so more
    iterations are never worse, and none is worse than quantising alone. The SVD is in fp64 and its signs are fixed (the
    largest component of each left vector is positive), so that machines agree except for values on the border of two
    levels.

    B A enters with factor 1: a caller that scales it by s divides it by s. Where quantising loses nothing, B and A are
    zero, and then neither has a gradient.

    Args:
        weight: (out, in), in any floating type.
        rank: from 1 to min(out, in).
        quant_type: one of `QUANT_TYPES`.
        iterations: at least 1.

    Returns:
        Q, lora_A (rank, in) and lora_B (out, rank), in fp32.
    """
    W = weight.double()
    product = torch.zeros_like(W)
    iterates: list[tuple[float, Quantized, Tensor, Tensor]] = []
    for _ in range(iterations):
        Q = quantize(W - product, quant_type)
        U, S, Vh = torch.linalg.svd(W - Q.dequantize(), full_matrices=False)
        largest = U[:, :rank].gather(0, U[:, :rank].abs().argmax(0, keepdim=True))  # (1, rank)
        root = S[:rank].sqrt()
        B = U[:, :rank] * (largest.sign() * root)  # (out, rank)
        A = (largest.sign() * root).T * Vh[:rank]  # (rank, in)
        product = B @ A
        iterates.append((S[rank:].square().sum().item(), Q, A, B))
    _, Q, A, B = min(iterates, key=lambda iterate: iterate[0])
    return Q, A.float().contiguous(), B.float().contiguous()


@cache
def _levels(quant_type: str, device: torch.device) -> Tensor:
    """Return the levels in ascending order, (2^bits,), in fp32."""
    if quant_type == "nf4":
        return torch.tensor(_NORMAL_FLOAT, dtype=torch.float32, device=device)
    last = 2 ** _BITS[quant_type] - 1
    numerators = range(-last, last + 1, 2)
    return torch.tensor([numerator / last for numerator in numerators], dtype=torch.float32, device=device)


@cache
def _values_of_byte(quant_type: str, device: torch.device) -> Tensor:
    """Return the levels that each byte stands for, (256, 8 / bits): one look-up unpacks and decodes."""
    bits = _BITS[quant_type]
    shifts = torch.arange(8 - bits, -1, -bits, device=device)
    codes = torch.arange(256, device=device)[:, None] >> shifts & 2**bits - 1
    return _levels(quant_type, device)[codes]
