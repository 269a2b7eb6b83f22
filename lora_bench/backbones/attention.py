"""Exact attention, as fast as the device allows: batched products on a CPU, torch's fused kernels elsewhere.

At the lengths of sentence pairs torch's fused attention for CPUs spends more time than all linears together; a few
batched products cost a tenth of it. They are one function, so that each head is laid out once, and nothing is kept for
the backward pass but queries, keys, values and, where they are short, the probabilities.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_bench.backbones.dropout import drop_out

if TYPE_CHECKING:
    from collections.abc import Iterator

KEPT_LENGTH = 64
"""Up to this many tokens, attention probabilities are saved for the backward pass; beyond, they are recomputed."""

_recomputations: list[list[int]] = []
"""The lists to which backward passes add the FLOPs of a recomputation."""


@contextmanager
def counting_recomputation() -> Iterator[list[int]]:
    """Count what backward passes within the context would compute again if they were beyond `KEPT_LENGTH`.

    Returns:
        A list that gets the FLOPs of each attention, whatever its length.
    """
    flops: list[int] = []
    _recomputations.append(flops)
    try:
        yield flops
    finally:
        _recomputations.pop()


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, heads: int, dropout: float = 0.0) -> Tensor:
    """Return multi-head attention, softmax(q kᵀ / √d + mask) v, with the heads concatenated.

    Args:
        query: (N, S, D).
        key, value: (N, T, D).
        mask: (N, 1, 1, T), added to the scores; None: no position is masked.
        heads: number of heads; d = D / heads.
        dropout: dropout probability of the attention probabilities, in evaluation mode too: the caller gives 0 there.

    Returns:
        (N, S, D).
    """
    if query.device.type == "cpu" and not dropout:
        return _Attention.apply(query, key, value, mask, heads)  # type: ignore[no-any-return, no-untyped-call]
    q, k, v = (t.view(*t.shape[:2], heads, -1).transpose(1, 2) for t in (query, key, value))  # (N, heads, ·, d)
    if query.device.type == "cpu":
        scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
        probabilities = drop_out((scores if mask is None else scores + mask).softmax(-1), dropout)
        attended = probabilities @ v
    else:
        attended = F.scaled_dot_product_attention(q, k, v, mask, dropout)
    return attended.transpose(1, 2).flatten(2)  # (N, S, D)


class _Attention(torch.autograd.Function):
    """Multi-head attention on a CPU, without dropout, with its own backward pass."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, heads: int) -> Tensor:
        """Return the attended values (N, S, D) for the arguments of `attend`."""
        q, k, v = (_split(t, heads) for t in (query, key, value))  # (N·heads, ·, d)
        if mask is not None:
            mask = mask.expand(-1, heads, query.shape[1], -1).flatten(0, 1)  # (N·heads, S, T)
        p = _probabilities(q, k, mask)
        ctx.heads = heads
        # Without gradients nothing depends on the length: `torch.export` traces one graph for all lengths.
        is_saved = any(ctx.needs_input_grad) and key.shape[1] <= KEPT_LENGTH
        ctx.save_for_backward(q, k, v, *((p, None) if is_saved else (None, mask)))
        return _join(torch.bmm(p, v), heads)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of query, key and value for that of the output (N, S, D); none for mask and heads."""
        q, k, v, p, mask = ctx.saved_tensors
        for flops in _recomputations:
            flops.append(2 * q.numel() * k.shape[1])
        if p is None:
            p = _probabilities(q, k, mask)
        rows = _split(grad, ctx.heads)  # (N·heads, S, d)
        v_grad = torch.bmm(p.transpose(1, 2), rows)
        p_grad = torch.bmm(rows, v.transpose(1, 2))  # (N·heads, S, T)
        scores_grad = torch._softmax_backward_data(p_grad, p, -1, p.dtype).mul_(q.shape[-1] ** -0.5)
        q_grad = torch.bmm(scores_grad, k)
        k_grad = torch.bmm(scores_grad.transpose(1, 2), q)
        return (*(_join(t, ctx.heads) for t in (q_grad, k_grad, v_grad)), None, None)


def _probabilities(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Return the attention probabilities (N·heads, S, T).

    Args:
        q: (N·heads, S, d).
        k: (N·heads, T, d).
        mask: (N·heads, S, T), added to the scores; None: no position is masked.
    """
    scale = q.shape[-1] ** -0.5
    added = q.new_zeros(1, 1, 1) if mask is None else mask
    return torch.baddbmm(added, q, k.transpose(1, 2), beta=float(mask is not None), alpha=scale).softmax(-1)


def _split(x: Tensor, heads: int) -> Tensor:
    """Reshape (N, T, D) to (N·heads, T, d)."""
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2).flatten(0, 1)


def _join(x: Tensor, heads: int) -> Tensor:
    """Reshape (N·heads, T, d) to (N, T, D)."""
    return x.view(-1, heads, *x.shape[1:]).transpose(1, 2).flatten(2)
