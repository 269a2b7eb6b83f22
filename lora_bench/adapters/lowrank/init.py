"""Initialise A and B: pure functions of a shape, the frozen weight, or statistics of calibration_batches.py.

    h = W x + s · B A x        A: (rank, in), B: (out, rank), W: (out, in), s the scaling

Initialisations with B A ≠ 0 are of two sorts. Those in `SUBTRACTED` are published with W − s B A in the frozen weight's
place, so that the function is the backbone's own at step 0; `lora_one` is a first step away from it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

LOFTQ_ITERATIONS = 5
"""Rounds of quantising and decomposing in LoftQ (Li et al. 2023, arXiv 2310.08659, algorithm 1), as in its code."""
EVA_RHO = 2
"""With EVA's allocation no rank is above this many times the mean (Paischer et al. 2024, arXiv 2410.07170)."""


def random_A(name: str, rank: int, in_features: int, generator: torch.Generator) -> Tensor:  # noqa: N802
    """Return the random A, (rank, in), of a B of zeros; a data-driven initialisation replaces it later.

    `gaussian` draws with standard deviation 1/rank, as peft does. All other names draw as microsoft/LoRA's
    `loralib/layers.py`: Kaiming-uniform with a = √5. A is in fp32 on the CPU.
    """
    A = torch.empty(rank, in_features)
    if name == "gaussian":
        return nn.init.normal_(A, std=1 / rank, generator=generator)
    return nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)


# -- from the frozen weight --


def pissa(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Return A and B from the largest singular triplets of W: s B A is its best approximation of that rank.

    PiSSA (Meng et al. 2024, arXiv 2404.02948, eq. 2 and 3), A = √(S_r/s) V_rᵀ and B = U_r √(S_r/s).

    Args:
        weight: (out, in).
        rank: at most the smaller side of W.

    Returns:
        A (rank, in) and B (out, rank), in fp32.
    """
    return _balanced(*singular_triplets(weight, 0, rank), scaling)


def milora(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Return A and B from the smallest singular triplets of W: training starts in its least important directions.

    MiLoRA (Wang et al. 2024, arXiv 2406.09044, section 3), shared out between A and B as in `pissa`.

    Args:
        weight: (out, in).
        rank: at most the smaller side of W.

    Returns:
        A (rank, in) and B (out, rank), in fp32.
    """
    return _balanced(*singular_triplets(weight, min(weight.shape) - rank, rank), scaling)


def olora(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Return the first rows of R as A and the first columns of Q as B, with W = Q R: B is orthonormal, A = Bᵀ W.

    OLoRA (Büyükakyüz 2024, arXiv 2406.01775, algorithm 1). The scaling has no part in it. R's diagonal is made
    positive, which makes the decomposition unique.

    Args:
        weight: (out, in).
        rank: at most the smaller side of W.

    Returns:
        A (rank, in) and B (out, rank), in fp32.
    """
    W = weight.double()
    Q, R = torch.linalg.qr(W[:, :rank])  # (out, rank): later columns of W do not change the first ones of Q
    B = Q * _signs(R.diagonal())
    return (B.T @ W).float(), B.float()


FROM_WEIGHT: dict[str, Callable[[Tensor, int, float], tuple[Tensor, Tensor]]] = {
    "pissa": pissa,
    "milora": milora,
    "olora": olora,
}


# -- from data --


def eva(moment: Tensor, rank: int) -> Tensor:
    """Return the directions in which the linear's inputs vary most, as orthonormal rows of A; B stays zero.

    EVA (Paischer et al. 2024, arXiv 2410.07170, section 3.2): the first right singular vectors of the inputs X (tokens,
    in), which are the first eigenvectors of Xᵀ X. Signs are fixed: the largest component of each row is positive.

    Args:
        moment: Xᵀ X / tokens, (in, in).

    Returns:
        A (rank, in), in fp32.
    """
    vectors: Tensor = torch.linalg.eigh(moment.double()).eigenvectors.flip(1)[:, :rank]  # (in, rank)
    return (vectors * _largest_positive(vectors)).T.float()


def explained_variance_ratios(moments: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the share of each linear's input variance that each singular direction holds, (in,), the largest first."""
    return {name: _ratios(moment) for name, moment in moments.items()}


def lora_ga(gradient: Tensor, rank: int, scaling: float, gamma: float) -> tuple[Tensor, Tensor]:
    """Return A and B whose first gradient step changes s B A as closely as the rank allows to how G would change W.

    LoRA-GA (Wang et al. 2024, arXiv 2407.05000, theorem 3.1 and algorithm 1): with G = U S Vᵀ, A = c V[:, :r]ᵀ and B =
    c U[:, r:2r], c = out^¼ / √γ for both. The scaling has no part in it; the paper takes alpha / √rank. Where G has
    fewer than 2r singular triplets, B takes the last r that there are.

    Args:
        gradient: G = ∂L/∂W, (out, in).
        gamma: the damping γ.

    Returns:
        A (rank, in) and B (out, rank), in fp32.
    """
    count = min(2 * rank, *gradient.shape)
    U, _, V = singular_triplets(gradient, 0, count)
    scale = gradient.shape[0] ** 0.25 / math.sqrt(gamma)
    return (scale * V[:, :rank].T).float(), (scale * U[:, count - rank :]).float()


def lora_one(gradient: Tensor, rank: int, scaling: float, gamma: float) -> tuple[Tensor, Tensor]:
    """Return A and B so that s B A is one gradient step of this rank: −(s / γ σ₁) G_r, G_r the best approximation.

    LoRA-One (Zhang et al. 2025, arXiv 2502.01235, algorithm 1): with −G = U S Vᵀ, A = √(S_r/σ₁γ) V_rᵀ and B = U_r
    √(S_r/σ₁γ). Dividing by the largest singular value σ₁ makes the step independent of the loss's scale. Where G is
    zero, B is zero and A has orthonormal rows.

    Args:
        gradient: G = ∂L/∂W, (out, in).
        scaling: has no part in A and B.
        gamma: the damping γ.

    Returns:
        A (rank, in) and B (out, rank), in fp32.
    """
    U, S, V = singular_triplets(-gradient, 0, rank)
    if S[0] == 0:
        return V.T.float(), torch.zeros_like(U, dtype=torch.float32)
    return _balanced(U, S, V, float(S[0]) * gamma)


FROM_DATA = {"eva": "moments", "lora_ga": "gradients", "lora_one": "gradients"}
"""The statistics of calibration_batches.py that a data-driven initialisation reads."""
SHORTENINGS = 6
"""How often the first step of `lora_one` is divided by 4 at most."""
SUBTRACTED = frozenset({"pissa", "milora", "olora", "lora_ga"})
"""Initialisations that are subtracted again, so that the function begins as the backbone's own."""


# -- linear algebra --

_NOISE = 1e-6
"""Singular values below this part of the largest are taken for zeros."""


def singular_triplets(matrix: Tensor, first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return singular triplets of a matrix, computed in fp64.

    They come from the eigenvectors of the smaller Gram matrix, which for a 768 by 3072 weight is five times as quick as
    a singular value decomposition in fp32; fp64 makes up for the squaring. Signs are fixed: the largest component of
    each left vector is positive. Singular values below 1e-6 of the largest become 0, with orthonormal vectors of their
    own.

    Args:
        matrix: (out, in).
        first: number of the first triplet; the largest is number 0.
        count: number of triplets; first + count is at most the smaller side.

    Returns:
        U (out, count), S (count,) in falling order, and V (in, count), in fp64.
    """
    M = matrix.double()
    if M.shape[0] < M.shape[1]:
        V, S, U = _of_tall(M.T, first, count)
    else:
        U, S, V = _of_tall(M, first, count)
    signs = _largest_positive(U)
    return U * signs, S, V * signs


def _of_tall(M: Tensor, first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return `singular_triplets` of a matrix (n, m), n ≥ m, without fixing signs: U (n, count), S, V (m, count)."""
    squares, vectors = (output.flip(-1) for output in torch.linalg.eigh(M.T @ M))
    last = first + count
    # What lies below is rounding in an fp32 matrix: its vectors would differ between a pack and a single run.
    significant = min(last, int((squares > _NOISE**2 * squares[0]).sum()))
    start = first if significant == last else 0
    V = _completed(vectors[:, start:significant], last - start)
    product = M @ V
    U = _completed(product[:, : significant - start], last - start)
    S = (U * product).sum(0)  # (last - start,)
    S[significant - start :] = 0
    return U[:, first - start :], S[first - start :], V[:, first - start :]


def _completed(columns: Tensor, count: int) -> Tensor:
    """Return these orthogonal columns normalised, (n, count); missing ones are axes made orthogonal to them."""
    n, given = columns.shape
    axes = torch.eye(n, count - given, dtype=columns.dtype, device=columns.device)
    Q, R = torch.linalg.qr(torch.cat([columns, axes], 1))
    completed: Tensor = Q * _signs(R.diagonal())
    return completed


def _balanced(U: Tensor, S: Tensor, V: Tensor, divisor: float) -> tuple[Tensor, Tensor]:
    """Return A (rank, in) and B (out, rank) with B A = U S Vᵀ / divisor, half of it in each."""
    root = (S / divisor).sqrt()  # (rank,)
    return (V * root).T.float(), (U * root).float()


def _signs(values: Tensor) -> Tensor:
    """Return 1 or −1 for each value, never 0."""
    return torch.where(values < 0, -1.0, 1.0).to(values)


def _largest_positive(vectors: Tensor) -> Tensor:
    """Return for each column the sign that makes its largest component positive."""
    return _signs(vectors.gather(0, vectors.abs().argmax(0, keepdim=True))[0])


def _ratios(moment: Tensor) -> Tensor:
    """Return the eigenvalues of a moment (in, in), in falling order, as shares of their sum: (in,).

    Negative ones count as 0; a moment of zeros gives zeros.
    """
    values: Tensor = torch.linalg.eigvalsh(moment.double()).flip(0).clamp_min(0)
    return (values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)).float()
