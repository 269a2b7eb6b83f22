"""Statistics of training batches before the first step: inputs and weight gradients of the adapted linears."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_bench.head.loss import label_loss

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from lora_bench.adapters.pack.pack import Pack
    from lora_bench.data.batching import Batch

    Hook = Callable[[str, Tensor, Tensor], Tensor | None]


MIN_PAIRS = 8
"""Different training pairs below which an initialisation or allocation would fit chance."""


def explain_insufficient_data(batches: Sequence[Batch], member: int, *, reads_labels: bool) -> str | None:
    """Return why these training batches are too few for a data-driven initialisation, as a clause; None: they suffice.

    They need `MIN_PAIRS` (8) pairs that differ in a token.

    Args:
        batches: of an endless sequence, so that pairs may repeat.
        member: the member whose rows count, where members do not share them.
        reads_labels: True if the initialisation depends on labels; then both must occur.
    """
    own_rows = [batch.select_members([member]) for batch in batches]
    rows = [zip(batch.input_ids.tolist(), batch.attention_mask.sum(1).tolist(), strict=True) for batch in own_rows]
    pairs = len({tuple(ids[:length]) for of_batch in rows for ids, length in of_batch})
    labels = {label for batch in own_rows if batch.labels is not None for label in batch.labels.tolist()}
    if pairs < MIN_PAIRS:
        return f"{pairs} different training pairs are too few for the initialisation (fewer than {MIN_PAIRS})"
    if reads_labels and len(labels) < 2:
        return f"the {pairs} training pairs of the initialisation all have label {min(labels)}"
    return None


@torch.no_grad()
def input_moments(pack: Pack, member: int, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Return the mean of x xᵀ over the tokens that each adapted linear sees, excluding padding: (in, in), in fp32.

    A linear that sees other rows than the batch's tokens (T5's decoder, at its one position) is measured on all of
    them. Without batches the moments are zero.

    Args:
        pack: not changed.
        member: the member whose linears are measured, without dropout, on its own rows where members do not share them.
        batches: training batches.
    """
    moments = {
        name: torch.zeros(columns, columns, device=pack.backbone.device) for name, (_, columns) in _shapes(pack, member)
    }
    counts = dict.fromkeys(moments, 0)
    mask = torch.empty(0)
    last_input, product, count = torch.empty(0), torch.empty(0), 0

    def observe(name: str, x: Tensor, y: Tensor) -> None:
        """Add the sum of x xᵀ over tokens to the linear's moment, computed once for linears with the same input."""
        nonlocal last_input, product, count
        if x is not last_input:  # query, key and value see one tensor
            rows = x[mask] if x.shape[:-1] == mask.shape else x.flatten(0, -2)  # (tokens, in)
            rows = rows.float()
            last_input, product, count = x, rows.T @ rows, len(rows)  # (in, in)
        moments[name] += product
        counts[name] += count

    with _observed(pack, member, observe):
        for batch in batches:
            on_device = batch.select_members([member]).to(pack.backbone.device)
            mask = on_device.attention_mask.bool()  # (B, T)
            pack(on_device)
    return {name: moment / max(1, counts[name]) for name, moment in moments.items()}


class LossGradients(NamedTuple):
    """A loss L and its gradients with respect to weights, both averaged over batches."""

    loss: float
    by_linear: dict[str, Tensor]
    """∂L/∂W of each linear's weight W, (out, in), in fp32."""


@torch.enable_grad()
def weight_gradients(pack: Pack, member: int, batches: Iterable[Batch]) -> LossGradients:
    """Return the loss L and ∂L/∂W of each frozen weight W that the member adapts, averaged over the batches.

    L is the mean loss (`label_loss`) of the member's pairs, without dropout. No weight requires a gradient for it:
    while the update beside W changes nothing, y = W x + bias, and ∂L/∂W is the sum of ∂L/∂y xᵀ over tokens. Without
    batches L and the gradients are zero.

    Args:
        pack: not changed; no parameter's `.grad` is written. The member's updates must still compute zero.
        member: the member whose linears and rows count.
        batches: training batches, with labels.
    """
    device = pack.backbone.device
    gradients = {name: torch.zeros(shape, device=device) for name, shape in _shapes(pack, member)}
    zero = torch.zeros((), device=device, requires_grad=True)

    def observe(name: str, x: Tensor, y: Tensor) -> Tensor:
        """Return the output with a hook that adds ∂L/∂y xᵀ to the weight's gradient in the backward pass."""
        rows = x.detach().flatten(0, -2)  # (B·T, in)

        def add(dy: Tensor) -> None:
            gradients[name] += dy.flatten(0, -2).float().T @ rows.float()  # (out, in)

        y = y + zero  # so that y has a gradient even where nothing below it is trained
        y.register_hook(add)  # type: ignore[no-untyped-call]
        return y

    count, total = 0, torch.zeros((), device=device)
    with _observed(pack, member, observe):
        for batch in batches:
            on_device = batch.select_members([member]).to(device)
            assert on_device.labels is not None
            loss = label_loss(pack(on_device), on_device.labels[None]).mean()
            torch.autograd.grad(loss, zero)
            total += loss.detach()
            count += 1
    means = {name: gradient / max(1, count) for name, gradient in gradients.items()}
    return LossGradients(float(total) / max(1, count), means)


@torch.no_grad()
def mean_loss(pack: Pack, member: int, batches: Sequence[Batch]) -> float:
    """Return the mean loss (`label_loss`) of the member's pairs, without dropout, averaged over the batches.

    Args:
        pack: not changed.
        member: the member whose loss and rows count.
        batches: training batches, with labels; not empty.
    """
    losses = []
    with evaluation_of(pack, member):
        for batch in batches:
            on_device = batch.select_members([member]).to(pack.backbone.device)
            assert on_device.labels is not None
            losses.append(label_loss(pack(on_device), on_device.labels[None]).mean())
    return float(torch.stack(losses).mean())


@contextmanager
def evaluation_of(pack: Pack, member: int) -> Iterator[None]:
    """Compute this member only, in evaluation mode, within the context; mode and active members are restored."""
    mode = pack.training
    try:
        pack.eval()
        with pack.only([member]):
            yield
    finally:
        pack.train(mode)


@contextmanager
def _observed(pack: Pack, member: int, observe: Hook) -> Iterator[None]:
    """Compute this member only, without dropout, and call `observe` with name, input and output of its linears.

    A tensor that it returns replaces the output. Meanwhile the last layer computes every position. At the end the hooks
    are removed, also after an exception.
    """
    handles = []
    try:
        pack.backbone.all_positions = True
        for name in pack.updates[member]:
            handles.append(pack.network.get_submodule(name).register_forward_hook(_hook(name, observe)))
        with evaluation_of(pack, member):
            yield
    finally:
        for handle in handles:
            handle.remove()
        pack.backbone.all_positions = False


def _hook(name: str, observe: Hook) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
    """Return a forward hook that calls `observe` with this name, the module's first argument and its output."""

    def hook(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return observe(name, arguments[0], output)

    return hook


def _shapes(pack: Pack, member: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield the name and the shape (out, in) of each linear that the member adapts."""
    for name in pack.updates[member]:
        base: Any = pack.network.get_submodule(f"{name}.base")
        yield name, (base.out_features, base.in_features)
