"""The low-rank work of all members at a linear in a few products, however many they are.

    h_k = W x_k + s_k · B_k A_k x_k        one product with W for all rows, batched ones with A and B

The members' own tensors stay what is trained, saved and loaded. Before a pass all of them are copied into stacks
by one call; after a backward pass the stacks' gradients are copied back by another. A stack has the largest rank
among members of like rank: those of very unlike rank stand in stacks of their own, because padding costs arithmetic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_bench.adapters.lowrank.linear import LowRank, keep_mask

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_bench.adapters.base import Update

LIKE_RANKS = 8
"""The largest rank of a stack over its smallest: ranks 1 to 128 stand in two."""


def batching_key(update: Update | None) -> tuple[bool, ...] | None:
    """Members whose updates are of one kind compute together; None: this one computes by itself."""
    if type(update) is not LowRank or update.quantized is not None:
        return None
    frozen = not isinstance(update.lora_A, nn.Parameter)
    return (update.magnitude is not None, update.start_A is not None, frozen, update.dropout > 0)


class BatchedLoRA:
    """Members of one kind at one linear.

    Args:
        updates: one per member, in the order of their rows; ranks ascend.
    """

    def __init__(self, updates: Sequence[LowRank]) -> None:
        self.updates = list(updates)
        self.stacks = [Stack(part) for part in _of_like_rank(updates)]
        self.sizes = [len(stack.updates) for stack in self.stacks]

    def __call__(self, x: Tensor) -> Tensor:
        """(K·B, …, in) to (K·B, …, out)."""
        first = self.updates[0]
        W, bias = first.frozen_weight(), first.base[0].bias
        rows = x.reshape(len(self.updates), -1, x.shape[-1])  # (K, N, in)
        dropped = rows
        if first.dropout and first.training:
            masks = [
                keep_mask(own, update.dropout, update.generator) for own, update in zip(rows, self.updates, strict=True)
            ]
            dropped = rows * torch.stack(masks)
        factors = [stack.factors() for stack in self.stacks]
        cast = [factor.to(x.dtype) for pair in factors for factor in pair]
        scaled = first.magnitude is not None
        y = _Products.apply(rows, dropped, W, None if scaled else bias, self.sizes, *cast)  # type: ignore[no-untyped-call]
        if scaled:
            ratios = [stack.ratio(*pair) for stack, pair in zip(self.stacks, factors, strict=True)]
            # 1 taken away: in bf16 the numbers around it lie far apart.
            y = torch.addcmul(y, y, (torch.cat(ratios) - 1).to(y.dtype)[:, None])
            y = y if bias is None else y + bias
        return y.view(*x.shape[:-1], -1)  # type: ignore[no-any-return]


class Stack:
    """Factors of members of like rank, filled up with zeros: A (K, R, in) and B (K, out, R)."""

    def __init__(self, updates: Sequence[LowRank]) -> None:
        self.updates = updates
        self.places: list[tuple[Tensor, Tensor]] = []
        """Places in the stacks, and the members' tensors that belong there."""
        self.gradients: list[tuple[Tensor, nn.Parameter]] = []
        """Places in the stacks' gradients, and whose they are."""
        self.leaves: list[Tensor] = []
        self.A, self.B = self._stack("lora_A"), self._stack("lora_B")
        self.start = None if updates[0].start_A is None else (self._stack("start_A"), self._stack("start_B"))
        self.magnitude = None if updates[0].magnitude is None else self._stack("magnitude")
        self.scaling = self.A.new_tensor([update.scaling for update in updates])[:, None, None]

    def _stack(self, name: str) -> Tensor:
        own: list[Tensor] = [getattr(update, name) for update in self.updates]
        shape = [max(sizes) for sizes in zip(*(tensor.shape for tensor in own), strict=True)]
        stack = own[0].detach().new_zeros(len(own), *shape)
        self.places += _slices(stack, own)
        if own[0].requires_grad:
            stack.grad = torch.zeros_like(stack)
            self.gradients += _slices(stack.grad, own)
            self.leaves.append(stack.requires_grad_())
        return stack

    def factors(self) -> tuple[Tensor, Tensor]:
        """As `LowRank.factors`, (K, R, in) and (K, out, R), with the scaling in the second."""
        A, B = self.A, self.B
        if self.start:
            A, B = torch.cat([A, A - self.start[0]], 1), torch.cat([B - self.start[1], self.start[1]], 2)
        return A, B * self.scaling

    def ratio(self, A: Tensor, B: Tensor) -> Tensor:
        """magnitude / ‖W + s B A‖ of every output row, (K, out); the norm is a constant, as in `LowRank`."""
        assert self.magnitude is not None
        with torch.no_grad():
            W = self.updates[0].frozen_weight()
            cross = F.linear((2 * A).to(W.dtype), W).to(B.dtype).transpose(1, 2)  # (K, out, R)
            cross = torch.baddbmm(cross, B, torch.bmm(A, A.transpose(1, 2)))
            norm = (self.updates[0].squared_norm + (cross * B).sum(2)).clamp_min(1e-12).sqrt()  # type: ignore[operator]
        return self.magnitude / norm


class ParameterSync:
    """All members' tensors to the stacks, and the stacks' gradients back: a call or two each."""

    def __init__(self, stacks: Sequence[Stack]) -> None:
        self.places = _by_layout([pair for stack in stacks for pair in stack.places])
        self.gathered = [leaf.grad for stack in stacks for leaf in stack.leaves if leaf.grad is not None]
        self.given = [(p, torch.empty_like(p)) for stack in stacks for _, p in stack.gradients]
        sources = [place for stack in stacks for place, _ in stack.gradients]
        self.returns = _by_layout(list(zip((own for _, own in self.given), sources, strict=True)))

    @torch.no_grad()
    def copy_parameters(self) -> None:
        """Copy the members' tensors as they are now."""
        for places, own in self.places:
            torch._foreach_copy_(places, own)

    @torch.no_grad()
    def zero_gradients(self) -> None:
        """Before gradients gather."""
        if self.gathered:
            torch._foreach_zero_(self.gathered)

    @torch.no_grad()
    def copy_gradients(self) -> None:
        """Give the members' parameters the gradients that have gathered."""
        for gradients, sources in self.returns:
            torch._foreach_copy_(gradients, sources)
        for p, own in self.given:
            p.grad = own


def _slices(stack: Tensor, own: Sequence[Any]) -> list[tuple[Tensor, Any]]:
    return [(whole[tuple(map(slice, t.shape))], t) for whole, t in zip(stack, own, strict=True)]


def _by_layout(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Those that are laid out alike, which a GPU copies in one kernel, apart from the rest."""
    alike = [pair for pair in pairs if pair[0].stride() == pair[1].stride()]
    others = [pair for pair in pairs if pair[0].stride() != pair[1].stride()]
    return [([to for to, _ in part], [of.detach() for _, of in part]) for part in (alike, others) if part]


def _of_like_rank(updates: Sequence[LowRank]) -> list[list[LowRank]]:
    """The members in turn, in parts whose ranks are not too unlike."""
    parts: list[list[LowRank]] = []
    for update in updates:
        ranks = [each.rank for each in [*(parts[-1] if parts else []), update]]
        if not parts or max(ranks) > LIKE_RANKS * min(ranks):
            parts.append([])
        parts[-1].append(update)
    return parts


class _Products(torch.autograd.Function):
    """W x + bias + (s B) A x′ with x, x′ (K, N, in), and A (k, R, in), s B (k, out, R) of every stack of k members.

    One function, so that products add up in place, as in the layer of one member.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor, weight: Tensor, bias: Tensor | None, sizes: list[int], *factors: Tensor
    ) -> Tensor:
        y = F.linear(x, weight, bias)  # (K, N, out)
        lows = []
        for rest, out, A, B in zip(
            torch.split(dropped, sizes), torch.split(y, sizes), factors[::2], factors[1::2], strict=True
        ):
            lows.append(torch.bmm(rest, A.transpose(1, 2)))  # (k, N, R)
            torch.baddbmm(out, lows[-1], B.transpose(1, 2), out=out)
        ctx.save_for_backward(dropped, weight, *lows, *factors)
        ctx.alone, ctx.sizes = dropped is x, sizes
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        sizes = ctx.sizes
        dropped, weight, *rest = ctx.saved_tensors
        lows, factors = rest[: len(sizes)], rest[len(sizes) :]
        x_grad = dropped_grad = into = None
        if ctx.needs_input_grad[0]:
            x_grad = into = grad @ weight  # (K, N, in)
            if not ctx.alone:
                into = dropped_grad = torch.zeros_like(x_grad)
        parts = [None] * len(sizes) if into is None else torch.split(into, sizes)
        found: list[Tensor | None] = []
        for k, (own, rows, part) in enumerate(
            zip(torch.split(dropped, sizes), torch.split(grad, sizes), parts, strict=True)
        ):
            A, B = factors[2 * k], factors[2 * k + 1]
            low_grad = torch.bmm(rows, B)  # (k, N, R)
            if part is not None:
                torch.baddbmm(part, low_grad, A, out=part)
            found.append(torch.bmm(low_grad.transpose(1, 2), own) if ctx.needs_input_grad[5 + 2 * k] else None)
            found.append(torch.bmm(rows.transpose(1, 2), lows[k]))
        return (x_grad, dropped_grad, None, None, None, *found)
