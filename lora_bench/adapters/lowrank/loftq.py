"""LoftQ: a quantised weight, and a low-rank product that corrects its error (Li et al. 2023, arXiv 2310.08659)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lora_bench.backbones.quantization import quantize

if TYPE_CHECKING:
    from torch import Tensor

    from lora_bench.backbones.quantization import Quantized


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
        quant_type: a key of `QUANT_BITS`.
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
