"""The low-rank products of all members at a linear in a few batched products.

    h_k = W x_k + s_k · B_k A_k x_k        one product with W for all rows, batched ones with A and B

Each member's own tensors stay what is trained, saved and loaded. Before a pass one call copies all of them into stacks;
after a backward pass another call copies the stacks' gradients back. A stack is padded to the largest rank among
members of similar rank; very different ranks get stacks of their own, because padding costs arithmetic.
"""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lora_bench.adapters.lowrank.linear import LowRank
from lora_bench.backbones.dropout import keep_mask

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from lora_bench.adapters.base import Update

MAX_RANK_RATIO = 8
"""Largest rank of a stack over its smallest: ranks 1 to 128 need two stacks."""


def batching_key(update: Update | None) -> Hashable:
    """Return a key that is equal for updates which one `BatchedLoRA` can compute; None: this one is computed alone.

    Only `LowRank` updates can be batched, and not beside a quantised weight; magnitude, subtracted product, frozen A
    and dropout must be there in all or in none. Members of a LoRA variant (a subclass of `LowRank`) are batched where
    their ranks are equal, so that no variant need cope with padding.
    """
    if not isinstance(update, LowRank) or not update.is_product or update.quantized_weight is not None:
        return None
    variant = (
        "" if type(update) is LowRank else f"{type(update).__module__}.{type(update).__qualname__}, rank {update.rank}"
    )
    frozen = not isinstance(update.lora_A, nn.Parameter)
    return (variant, update.magnitude is not None, update.start_A is not None, frozen, update.dropout > 0)


class BatchedLoRA:
    """The updates of several members at one linear, computed together.

    Args:
        updates: one per member, of one batching key, in the order of their rows; ranks ascend.
    """

    def __init__(self, updates: Sequence[LowRank]) -> None:
        self.updates = list(updates)
        self.stacks = [Stack(group) for group in _of_similar_rank(updates)]
        self.sizes = [len(stack.updates) for stack in self.stacks]

    def __call__(self, x: Tensor) -> Tensor:
        """Map the linear's input (K·B, …, in) to the adapted output (K·B, …, out), frozen product and bias included.

        The members' tensors are read from the stacks, as they were last filled.
        """
        first = self.updates[0]
        W, bias = first.frozen_weight(), first.base[0].bias
        rows = x.reshape(len(self.updates), -1, x.shape[-1])  # (K, N, in)
        dropped = rows
        if first.dropout and first.training:
            masks = [
                keep_mask(of_member, update.dropout, update.generator)
                for of_member, update in zip(rows, self.updates, strict=True)
            ]
            dropped = rows * torch.stack(masks)  # (K, N, in)
        factors = [stack.factors() for stack in self.stacks]
        cast = [factor.to(x.dtype) for pair in factors for factor in pair]
        scaled = first.magnitude is not None
        y = _Products.apply(rows, dropped, W, None if scaled else bias, self.sizes, *cast)  # type: ignore[no-untyped-call]
        if scaled:
            ratios = [stack.ratio(*pair) for stack, pair in zip(self.stacks, factors, strict=True)]
            # y + y (ratio − 1): in bf16 the numbers around 1 lie far apart.
            y = torch.addcmul(y, y, (torch.cat(ratios) - 1).to(y.dtype)[:, None])  # (K, N, out)
            y = y if bias is None else y + bias
        return y.view(*x.shape[:-1], -1)  # type: ignore[no-any-return]  # (K·B, …, out)


class Stack:
    """The tensors of members of similar rank, padded with zeros and stacked: A (K, R, in), B (K, out, R) and the rest.

    They are zero until `ParameterSync.copy_parameters` fills them; scalings are fixed.

    Args:
        updates: one per member, of one batching key.
    """

    def __init__(self, updates: Sequence[LowRank]) -> None:
        self.updates = updates
        self.slices: list[tuple[Tensor, Tensor]] = []
        """Slices of the stacks, each with the member's tensor that belongs there."""
        self.gradient_slices: list[tuple[Tensor, nn.Parameter]] = []
        """Slices of the stacks' gradients, each with the member's parameter."""
        self.trained: list[Tensor] = []
        """Stacks that get gradients."""
        first = updates[0]
        names = ["lora_A", "lora_B"] if type(first) is LowRank else list(first.variant_tensors())
        self.inputs = {name: self._stack(name) for name in names}
        """The tensors that `LowRank.trained_factors` reads, by name."""
        self.start = None if first.start_A is None else (self._stack("start_A"), self._stack("start_B"))
        self.magnitude = None if first.magnitude is None else self._stack("magnitude")
        self.scaling = self.inputs["lora_A"].new_tensor([update.scaling for update in updates])[:, None, None]

    def _stack(self, name: str) -> Tensor:
        """Return the members' tensors of this name, padded with zeros and stacked, (K, …), and note their slices.

        If they are parameters, the stack gets a gradient of zeros, and is one of `trained`.
        """
        tensors: list[Tensor] = [attrgetter(name)(update) for update in self.updates]
        shape = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)]
        stack = tensors[0].detach().new_zeros(len(tensors), *shape)
        self.slices += _slices(stack, tensors)
        if tensors[0].requires_grad:
            stack.grad = torch.zeros_like(stack)
            self.gradient_slices += _slices(stack.grad, tensors)
            self.trained.append(stack.requires_grad_())
        return stack

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return the factors of `LowRank.factors`, (K, R, in) and (K, out, R), with the scaling in the second."""
        A, B = self._trained_factors()
        if self.start:
            A, B = torch.cat([A, A - self.start[0]], 1), torch.cat([B - self.start[1], self.start[1]], 2)
        return A, B * self.scaling

    def _trained_factors(self) -> tuple[Tensor, Tensor]:
        """Return A (K, R, in) and B (K, out, R) of all members, each as its own `trained_factors` would give them."""
        first = self.updates[0]
        if type(first) is LowRank:
            return self.inputs["lora_A"], self.inputs["lora_B"]
        module = _TrainedFactors(first)
        of_member = torch.vmap(lambda tensors: functional_call(module, tensors, ()))
        A, B = of_member({f"update.{name}": stack for name, stack in self.inputs.items()})
        return A, B  # (K, R, in), (K, out, R)

    def ratio(self, A: Tensor, B: Tensor) -> Tensor:
        """Return magnitude / ‖W + s B A‖ of every output row, (K, out); the norm is a constant for gradients.

        Args:
            A: (K, R, in), of `factors`.
            B: (K, out, R), of `factors`, so with the scaling s in it.
        """
        assert self.magnitude is not None
        with torch.no_grad():
            W = self.updates[0].frozen_weight()
            cross = F.linear((2 * A).to(W.dtype), W).to(B.dtype).transpose(1, 2)  # (K, out, R)
            cross = torch.baddbmm(cross, B, torch.bmm(A, A.transpose(1, 2)))  # (K, out, R)
            norm = (self.updates[0].squared_norm + (cross * B).sum(2)).clamp_min(1e-12).sqrt()  # type: ignore[operator]
        return self.magnitude / norm


class _TrainedFactors(nn.Module):
    """Call an update's `trained_factors` as a forward pass, so that `functional_call` can replace its tensors."""

    def __init__(self, update: LowRank) -> None:
        super().__init__()
        self.update = update

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.update.trained_factors()


class ParameterSync:
    """Copier of all members' tensors into the stacks, and of the stacks' gradients to the members' parameters.

    Nothing is copied before a method is called.

    Args:
        stacks: of all linears of a pack.
    """

    def __init__(self, stacks: Sequence[Stack]) -> None:
        self.copies = _by_layout([pair for stack in stacks for pair in stack.slices])
        self.stack_gradients = [leaf.grad for stack in stacks for leaf in stack.trained if leaf.grad is not None]
        self.gradients = [(p, torch.empty_like(p)) for stack in stacks for _, p in stack.gradient_slices]
        """The members' parameters, each with the tensor that becomes its gradient."""
        sources = [gradient for stack in stacks for gradient, _ in stack.gradient_slices]
        self.gradient_copies = _by_layout(list(zip((grad for _, grad in self.gradients), sources, strict=True)))

    @torch.no_grad()
    def copy_parameters(self) -> None:
        """Copy the members' tensors, as they are now, into the stacks."""
        for targets, sources in self.copies:
            torch._foreach_copy_(targets, sources)

    @torch.no_grad()
    def zero_gradients(self) -> None:
        """Set the stacks' gradients to zero, before gradients accumulate."""
        if self.stack_gradients:
            torch._foreach_zero_(self.stack_gradients)

    @torch.no_grad()
    def copy_gradients(self) -> None:
        """Give the members' parameters the gradients that the stacks have accumulated.

        A gradient that a parameter got beside its stack, that of a method's penalty, is added; one of an earlier call
        is replaced.
        """
        for targets, sources in self.gradient_copies:
            torch._foreach_copy_(targets, sources)
        beside = [(grad, p.grad) for p, grad in self.gradients if p.grad is not None and p.grad is not grad]
        if beside:
            torch._foreach_add_(*map(list, zip(*beside, strict=True)))
        for p, grad in self.gradients:
            p.grad = grad


def _slices(stack: Tensor, tensors: Sequence[Any]) -> list[tuple[Tensor, Any]]:
    """Return the slice of a stack that each tensor fills, with the tensor."""
    return [(padded[tuple(map(slice, t.shape))], t) for padded, t in zip(stack, tensors, strict=True)]


def _by_layout(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Return targets and sources of copies in up to two groups: pairs of equal strides, and the others.

    A GPU copies the first in one kernel. An empty group is left out.
    """
    equal = [pair for pair in pairs if pair[0].stride() == pair[1].stride()]
    unequal = [pair for pair in pairs if pair[0].stride() != pair[1].stride()]
    return [
        ([target for target, _ in group], [source.detach() for _, source in group])
        for group in (equal, unequal)
        if group
    ]


def _of_similar_rank(updates: Sequence[LowRank]) -> list[list[LowRank]]:
    """Split the members, in their order, into groups; no rank is over `MAX_RANK_RATIO` times another in its group."""
    groups: list[list[LowRank]] = []
    for update in updates:
        ranks = [member.rank for member in [*(groups[-1] if groups else []), update]]
        if not groups or max(ranks) > MAX_RANK_RATIO * min(ranks):
            groups.append([])
        groups[-1].append(update)
    return groups


class _Products(torch.autograd.Function):
    """Compute W x + bias + (s B) A x′ for all members, in one function, so that products add up in place.

    x, x′ (K, N, in), with x′ the x that dropout left; A (k, R, in) and s B (k, out, R) of every stack of k members.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor, weight: Tensor, bias: Tensor | None, sizes: list[int], *factors: Tensor
    ) -> Tensor:
        """Return y (K, N, out).

        Args:
            ctx, x, weight, bias: as in the class.
            dropped: x′; x itself without dropout.
            sizes: the number of members k of each stack.
            factors: A and s B of each stack in turn.
        """
        y = F.linear(x, weight, bias)  # (K, N, out)
        lows = []
        for rows, out, A, B in zip(
            torch.split(dropped, sizes), torch.split(y, sizes), factors[::2], factors[1::2], strict=True
        ):
            lows.append(torch.bmm(rows, A.transpose(1, 2)))  # (k, N, R)
            torch.baddbmm(out, lows[-1], B.transpose(1, 2), out=out)  # (k, N, out)
        ctx.save_for_backward(dropped, weight, *lows, *factors)
        ctx.without_dropout, ctx.sizes = dropped is x, sizes
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, x′ and the factors from that of y (K, N, out); None for the other inputs.

        They are None, too, for a frozen A, and for x and x′ if x needs none. Without dropout the gradient of x′ is in
        that of x.
        """
        sizes = ctx.sizes
        dropped, weight, *saved = ctx.saved_tensors
        lows, factors = saved[: len(sizes)], saved[len(sizes) :]
        x_grad = dropped_grad = low_rank_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = low_rank_grad = grad @ weight  # (K, N, in)
            if not ctx.without_dropout:
                low_rank_grad = dropped_grad = torch.zeros_like(x_grad)
        input_grads = [None] * len(sizes) if low_rank_grad is None else torch.split(low_rank_grad, sizes)
        factor_grads: list[Tensor | None] = []
        for i, (rows, row_grads, input_grad) in enumerate(
            zip(torch.split(dropped, sizes), torch.split(grad, sizes), input_grads, strict=True)
        ):
            A, B = factors[2 * i], factors[2 * i + 1]
            low_grad = torch.bmm(row_grads, B)  # (k, N, R)
            if input_grad is not None:
                torch.baddbmm(input_grad, low_grad, A, out=input_grad)  # (k, N, in)
            needs_A = ctx.needs_input_grad[5 + 2 * i]
            factor_grads.append(torch.bmm(low_grad.transpose(1, 2), rows) if needs_A else None)  # (k, R, in)
            factor_grads.append(torch.bmm(row_grads.transpose(1, 2), lows[i]))  # (k, out, R)
        return (x_grad, dropped_grad, None, None, None, *factor_grads)
