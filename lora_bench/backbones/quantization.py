"""Quantise a frozen weight to 2, 4 or 8 bits per value.

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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_bench.backbones import bitsandbytes_kernels
from lora_bench.config.schema import QUANT_BITS

BLOCK = 64
"""Number of values that share a scale."""

QUANTIZED_BLOCKS = 2**14
"""Number of blocks that are quantised at a time: each takes 2 KB for a moment."""

CACHED_BLOCKS = 4096
"""Number of blocks that are dequantised at a time on a CPU: 1 MB in fp32."""

# Quantiles of the standard normal distribution, scaled to reach -1 and 1; eight at and below zero, eight above.
_NORMAL_FLOAT = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def bytes_per_value(quant_type: str) -> float:
    """Return the bytes that a value of a quantised weight takes: its code, and its share of the block's scale."""
    return QUANT_BITS[quant_type] / 8 + 4 / BLOCK


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
    """A key of `QUANT_BITS`."""

    def rows(self, index: Any) -> Quantized | None:
        """Return some rows of the weight, quantised as they are; None where a block reaches from one row into the next.

        Args:
            index: a slice, or the numbers of the rows.
        """
        out, columns = self.shape
        if columns % BLOCK:
            return None
        codes, scales = self.codes.view(out, -1)[index], self.scales.view(out, -1)[index]
        return Quantized(codes.view(-1, self.codes.shape[1]), scales.flatten(), (len(codes), columns), self.quant_type)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight, (out, in), computed in fp32 and rounded to `dtype`, on the device of the codes.

        On a CPU it is computed in parts that its cache holds.
        """
        if bitsandbytes_kernels.can_dequantize(self.quant_type, self.shape):
            return bitsandbytes_kernels.dequantize(self.codes, self.scales, self.shape, dtype)
        device, count = self.codes.device, len(self.codes)
        at_once = CACHED_BLOCKS if device.type == "cpu" else max(1, count)
        blocks = torch.empty(count, BLOCK, dtype=dtype, device=device)
        parts = (torch.split(tensor, at_once) for tensor in (blocks, self.codes, self.scales))
        for part, codes, scales in zip(*parts, strict=True):
            part.copy_(_decode(codes, self.quant_type).mul_(scales[:, None]))
        return blocks.flatten()[: math.prod(self.shape)].view(self.shape)


@torch.no_grad()
def quantize(weight: Tensor, quant_type: str) -> Quantized:
    """Round each value of the weight to the nearest level of its block; halfway between two levels, to the lower.

    Quantising what `dequantize` returned gives the same codes and scales again.

    Args:
        weight: (out, in), in any floating type.
        quant_type: a key of `QUANT_BITS`.
    """
    values = weight.detach().flatten()
    parts = [_quantize_blocks(part, quant_type) for part in torch.split(values, QUANTIZED_BLOCKS * BLOCK)]
    codes, scales = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Quantized(codes, scales, tuple(weight.shape), quant_type)


def _quantize_blocks(values: Tensor, quant_type: str) -> tuple[Tensor, Tensor]:
    """Return codes (blocks, 8 · bits) and scales (blocks,) of values in a row; the last block may be short."""
    blocks = F.pad(values.float(), (0, -len(values) % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    levels = _levels(quant_type, values.device)
    # A product with the reciprocal rounds as bitsandbytes does. The bound keeps a block of zeros zero.
    shares = blocks * scales.clamp(min=torch.finfo(torch.float32).tiny).reciprocal()[:, None]
    codes = torch.bucketize(shares, (levels[1:] + levels[:-1]) / 2)  # (blocks, 64)
    bits = QUANT_BITS[quant_type]
    place_values = 2 ** torch.arange(8 - bits, -1, -bits, device=values.device)  # of the codes in a byte
    packed = (codes.view(len(codes), -1, 8 // bits) * place_values).sum(2)  # (blocks, 8 · bits)
    return packed.to(torch.uint8), scales


@cache
def _levels(quant_type: str, device: torch.device) -> Tensor:
    """Return the levels in ascending order, (2^bits,), in fp32."""
    if quant_type == "nf4":
        return torch.tensor(_NORMAL_FLOAT, dtype=torch.float32, device=device)
    last = 2 ** QUANT_BITS[quant_type] - 1
    numerators = range(-last, last + 1, 2)
    return torch.tensor([numerator / last for numerator in numerators], dtype=torch.float32, device=device)


def _decode(codes: Tensor, quant_type: str) -> Tensor:
    """Return the levels (blocks, 64), in fp32, that codes (blocks, 8 · bits) stand for."""
    if quant_type == "int8":  # arithmetic gives the levels of the table to the bit, in a fifth of the time
        return codes.float().mul_(2).sub_(255).div_(255)
    table = _values_of_byte(quant_type, codes.device)
    return F.embedding(codes.int(), table).view(-1, BLOCK)  # (blocks, bytes, 8 / bits) before


@cache
def _values_of_byte(quant_type: str, device: torch.device) -> Tensor:
    """Return the levels that each byte stands for, (256, 8 / bits): one look-up unpacks and decodes."""
    bits = QUANT_BITS[quant_type]
    shifts = torch.arange(8 - bits, -1, -bits, device=device)
    codes = torch.arange(256, device=device)[:, None] >> shifts & 2**bits - 1
    return _levels(quant_type, device)[codes]
