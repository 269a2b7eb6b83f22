"""Modules of a frozen network whose weights are held as codes and scales, and dequantised whenever they are used.

    QuantizedWeight       the codes and scales of a linear's weight       dequantised as a whole, for each product
    QuantizedLinear       takes the place of a linear
    QuantizedTable        the codes and scales of an embedding            dequantised row by row, as they are looked up
    QuantizedEmbedding    takes the place of an embedding
    QuantizedHead         takes the place of a language-model head

The module whose place is taken is kept without its weight, and `restore` gives it back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_bench.backbones.conv1d import Conv1DLinear
from lora_bench.backbones.page_out import page_out
from lora_bench.backbones.quantization import Quantized, quantize

if TYPE_CHECKING:
    from collections.abc import Iterable

TABLE_ROWS = 4096
"""Number of rows of an embedding that are quantised at a time."""

LARGEST_CODE = 127
"""The code of the largest magnitude of an embedding's row."""


class QuantizedWeight(nn.Module):
    """The codes and scales that are held in place of a frozen weight, and dequantised whenever it is computed with.

    Args:
        quantized: codes and scales.
        like: a tensor of the precision of the products, on the device; not held.
    """

    codes: Tensor
    scales: Tensor
    like: Tensor

    def __init__(self, quantized: Quantized, like: Tensor) -> None:
        super().__init__()
        self.shape, self.quant_type = quantized.shape, quantized.quant_type
        self.register_buffer("codes", quantized.codes.to(like.device))
        self.register_buffer("scales", quantized.scales.to(like.device))
        self.register_buffer("like", like.detach().new_empty(0), persistent=False)  # holds the precision

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the products."""
        return self.like.dtype

    @property
    def quantized(self) -> Quantized:
        """The codes and scales."""
        return Quantized(self.codes, self.scales, self.shape, self.quant_type)

    @torch.no_grad()
    def dequantize(self) -> Tensor:
        """Return the weight (out, in) in the precision of the products."""
        return self.quantized.dequantize(self.dtype)

    def load(self, codes: Tensor, scales: Tensor) -> None:
        """Replace codes and scales by those of an adapter file, of the same shapes; equal ones stay shared."""
        device = self.codes.device
        codes, scales = codes.to(device), scales.to(device)
        if not (torch.equal(self.codes, codes) and torch.equal(self.scales, scales)):
            self.codes, self.scales = codes, scales

    def share(self, others: Iterable[QuantizedWeight]) -> None:
        """Hold the tensors of one of these that has equal codes and scales in place of its own, if there is one."""
        for other in others:
            if torch.equal(self.codes, other.codes) and torch.equal(self.scales, other.scales):
                self.codes, self.scales = other.codes, other.scales
                return


@dataclass(frozen=True, eq=False)
class QuantizedRows:
    """Some rows of a quantised weight.

    Args:
        weight: the whole weight.
        index: a slice, or the numbers of the rows.
    """

    weight: QuantizedWeight
    index: Any

    @torch.no_grad()
    def dequantize(self) -> Tensor:
        """Return the rows (rows, in) in the precision of the products; others are dequantised if blocks span rows."""
        rows = self.weight.quantized.rows(self.index)
        return self.weight.dequantize()[self.index] if rows is None else rows.dequantize(self.weight.dtype)


class _Product(torch.autograd.Function):
    """W x + bias for a frozen W that is dequantised in the forward pass, and again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QuantizedWeight | QuantizedRows, bias: Tensor | None) -> Tensor:
        """Return y (…, out) for x (…, in)."""
        ctx.weight = weight
        return F.linear(x, weight.dequantize(), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        """Return the gradient of x from that of y."""
        return (grad @ ctx.weight.dequantize() if ctx.needs_input_grad[0] else None), None, None


def quantized_linear(x: Tensor, weight: QuantizedWeight | QuantizedRows, bias: Tensor | None) -> Tensor:
    """Return the product (…, out) of a frozen quantised weight (out, in) and x (…, in), plus the bias."""
    return _Product.apply(x, weight, bias)  # type: ignore[no-any-return, no-untyped-call]


def quantized_weight(linear: nn.Module) -> QuantizedWeight | QuantizedRows | None:
    """Return what a linear, or a part of a fused one, holds in place of its weight; None if it holds the weight."""
    return getattr(linear, "quantized", None)


class QuantizedLinear(nn.Linear):
    """A linear with the bias of another one, and its weight quantised.

    Args:
        linear: whose place it takes; it loses its weight.
        quantized: the weight (out, in).
        like: a tensor of the precision of the products, on the device.
    """

    def __init__(self, linear: nn.Linear, quantized: Quantized, like: Tensor) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.original = (linear,)  # in a tuple: no submodule
        self._parameters = {"bias": linear._parameters["bias"]}
        self.quantized = QuantizedWeight(quantized, like)
        linear._parameters["weight"] = None

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight (out, in), dequantised at each access."""
        return self.quantized.dequantize()

    def forward(self, x: Tensor) -> Tensor:
        return quantized_linear(x, self.quantized, self.bias)

    def restore(self) -> nn.Linear:
        """Return the linear whose place it took, with the dequantised weight."""
        linear = self.original[0]
        set_weight(linear, self.weight)
        return linear


@torch.no_grad()
def quantize_linear(linear: nn.Linear, quant_type: str, like: Tensor) -> QuantizedLinear:
    """Return a linear that takes the place of another one, which loses its weight.

    Args:
        linear: with its weight as it is stored, on any device.
        quant_type: a key of `QUANT_BITS`.
        like: a tensor of the precision of the products, on the device.
    """
    stored = linear.weight.detach()
    quantized = QuantizedLinear(linear, quantize(stored.to(like.device), quant_type), like)
    page_out(stored)
    return quantized


def set_weight(linear: nn.Linear, weight: Tensor) -> None:
    """Give a linear a frozen weight (out, in); a `Conv1D` stores it transposed."""
    stored = weight.T.contiguous() if isinstance(linear, Conv1DLinear) else weight
    linear._parameters["weight"] = nn.Parameter(stored, requires_grad=False)


class QuantizedTable(nn.Module):
    """An embedding (V, D) in int8: row i is scales[i] · codes[i], its scale the largest magnitude of the row over 127.

    A zero stays zero. Indexing it, `table[ids]`, gives dequantised rows.

    Args:
        weight: (V, D), in any floating type; not held.
        like: a tensor of the precision of the rows, on the device.
    """

    codes: Tensor
    scales: Tensor
    like: Tensor

    @torch.no_grad()
    def __init__(self, weight: Tensor, like: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", torch.empty(weight.shape, dtype=torch.int8, device=like.device))
        self.register_buffer("scales", torch.empty(len(weight), device=like.device))
        self.register_buffer("like", like.detach().new_empty(0), persistent=False)  # holds the precision
        parts = (torch.split(tensor, TABLE_ROWS) for tensor in (weight.detach(), self.codes, self.scales))
        for rows, codes, scales in zip(*parts, strict=True):
            values = rows.to(like.device, torch.float32)  # (rows, D)
            scales.copy_(values.abs().amax(1) / LARGEST_CODE)
            smallest = torch.finfo(torch.float32).tiny
            codes.copy_((values / scales.clamp(min=smallest)[:, None]).round())

    @torch.no_grad()
    def __getitem__(self, index: Any) -> Tensor:
        """Return the rows of these numbers, (…, D) for an index of shape (…), in the precision of the network."""
        return (self.codes[index].float() * self.scales[index][..., None]).to(self.like.dtype)

    def dequantize(self) -> Tensor:
        """Return all rows, (V, D)."""
        return self[:]


class QuantizedEmbedding(nn.Embedding):
    """An embedding that looks up rows of a quantised table; what a subclass does to the rows (scaling) is kept.

    Args:
        embedding: whose place it takes; it loses its weight.
        table: its rows.
    """

    def __init__(self, embedding: nn.Embedding, table: QuantizedTable) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx = embedding.padding_idx
        self.original = embedding
        self.table = table
        embedding.padding_idx = None  # it concerns gradients only, and may exceed the rows of a batch
        embedding._parameters["weight"] = None

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The embedding (V, D), dequantised at each access."""
        return self.table.dequantize()

    def forward(self, ids: Tensor) -> Tensor:
        """Return the vectors (…, D) of token ids (…)."""
        rows = self.table[ids]  # (…, D)
        if type(self.original) is nn.Embedding:
            return rows
        parameters: dict[str, Any] = self.original._parameters
        parameters["weight"] = rows.flatten(0, -2)
        try:
            return self.original(torch.arange(ids.numel(), device=ids.device).view(ids.shape))  # type: ignore[no-any-return]
        finally:
            parameters["weight"] = None

    def restore(self, weight: nn.Parameter) -> nn.Embedding:
        """Return the embedding whose place it took, with this weight (V, D)."""
        self.original.padding_idx = self.padding_idx
        self.original._parameters["weight"] = weight
        return self.original


class QuantizedHead(nn.Linear):
    """A language-model head whose weight is a quantised table: that of the token embeddings where the two are tied.

    Args:
        linear: whose place it takes; it loses its weight.
        table: its rows.
    """

    def __init__(self, linear: nn.Linear, table: QuantizedTable) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.original = (linear,)
        self._parameters = {"bias": linear._parameters["bias"]}
        self.table = table
        linear._parameters["weight"] = None

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight (V, D), dequantised at each access."""
        return self.table.dequantize()

    def restore(self, weight: nn.Parameter) -> nn.Linear:
        """Return the head whose place it took, with this weight (V, D)."""
        self.original[0]._parameters["weight"] = weight
        return self.original[0]


def head_rows(head: nn.Linear) -> Tensor | QuantizedTable:
    """Return the rows of a language-model head, (V, D), to be indexed by tokens: then no others are dequantised."""
    return head.table if isinstance(head, QuantizedHead) else head.weight
