"""Linears that compute query, key and value at once, with the three as linears of their own inside.

`target_modules=qv` means the same for every model: the query's and the value's rows of such a linear are adapted, and
the key's are not. An adapter may also change the whole linear.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_bench.backbones.conv1d import Conv1DLinear
from lora_bench.backbones.quantization import quantize
from lora_bench.backbones.quantized_modules import (
    QuantizedLinear,
    QuantizedRows,
    QuantizedWeight,
    quantize_linear,
    quantized_linear,
    set_weight,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.nn import Parameter

LAYOUTS = {
    "BloomAttention.query_key_value": "by_head",
    "DisentangledSelfAttention.in_proj": "by_head",  # DeBERTa, version 1
    "FalconAttention.query_key_value": "by_head",
    "FalconFlashAttention2.query_key_value": "by_head",
    "GPT2Attention.c_attn": "in_blocks",
    "GPTBigCodeAttention.c_attn": "by_head",  # its one key-value head comes behind all queries
    "GPTNeoXAttention.query_key_value": "by_head",
    "ModernBertAttention.Wqkv": "in_blocks",
    "MptAttention.Wqkv": "in_blocks",
    "Attention.c_attn": "in_blocks",  # the first GPT
    "PersimmonAttention.query_key_value": "by_head",
    "Phi3Attention.qkv_proj": "in_blocks",
}
"""The order of the rows by class of the attention and name of the linear, as transformers' modeling files split it.

`in_blocks`: all of the query, then the key, then the value. `by_head`: for every key-value head its queries, its key
and its value.
"""


class FusedLinear(nn.Linear):
    """A linear with the parameters of another one, and its rows for query, key and value as the modules q, k and v.

    State dict, gradients and hash are those of the other linear. Where one of the three is replaced, or holds its rows
    itself, they are computed one by one and joined; otherwise the product is one.

    Args:
        linear: whose place it takes.
        rows: the numbers of the rows of q, k and v, which are all rows.
    """

    def __init__(self, linear: nn.Linear, rows: Mapping[str, Tensor]) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.linear = (linear,)  # in a tuple: no submodule
        self._parameters: dict[str, Parameter | None] = linear._parameters
        order = torch.cat(list(rows.values()))  # (out,)
        is_sorted = torch.equal(order, torch.arange(len(order)))
        self.register_buffer("_positions", None if is_sorted else order.argsort(), persistent=False)
        self.parts = {name: LinearRows(linear, of_part) for name, of_part in rows.items()}
        for name, part in self.parts.items():
            self.add_module(name, part)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight (out, in) of the linear, with the rows that parts hold themselves."""
        weight = self.linear[0].weight
        for part in self.parts.values():
            if part.is_held:
                rows = part.weight
                weight = weight.to(rows.device, rows.dtype, copy=True)
                weight[part.rows] = rows
        return weight

    def forward(self, x: Tensor) -> Tensor:
        modules: dict[str, Any] = {name: self._modules[name] for name in self.parts}
        if modules == self.parts and not any(part.is_held for part in self.parts.values()):
            return self.linear[0](x)  # type: ignore[no-any-return]
        y = torch.cat([module(x) for module in modules.values()], -1)  # (…, out)
        positions: Any = self._positions
        return y if positions is None else y.index_select(-1, positions)

    def quantize(self, quant_type: str, like: Tensor) -> None:
        """Hold the weight quantised, as `quantize_linear` does; the parts compute with their rows of it."""
        self._set_linear(quantize_linear(self.linear[0], quant_type, like))
        self.quantized = self.linear[0].quantized

    def restore(self) -> None:
        """Hold the weight as numbers again, if it or rows of it are quantised or apart."""
        linear = self.linear[0]
        if isinstance(linear, QuantizedLinear):
            del self.quantized
            self._set_linear(linear.restore())
        elif any(part.is_held for part in self.parts.values()):
            set_weight(linear, self.weight)
            for part in self.parts.values():
                part.release()

    def _set_linear(self, linear: nn.Linear) -> None:
        self.linear = (linear,)
        for part in self.parts.values():
            part.linear = (linear,)


class LinearRows(nn.Linear):
    """Some rows of a linear, without parameters of its own; but it may hold its rows of the weight itself.

    Args:
        linear: holds the parameters.
        rows: numbers of its rows, in ascending order.
    """

    held: Tensor | None
    """Its rows of the weight, (rows, in), if it holds them as numbers."""
    held_quantized: QuantizedWeight | None
    """Its rows of the weight, if it holds them quantised."""

    def __init__(self, linear: nn.Linear, rows: Tensor) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, len(rows)
        self.linear = (linear,)
        first, last = int(rows[0]), int(rows[-1]) + 1
        are_neighbours = last - first == len(rows)
        self._slice = slice(first, last) if are_neighbours else None
        self.register_buffer("_numbers", None if are_neighbours else rows, persistent=False)
        self.register_buffer("held", None, persistent=False)
        self.register_module("held_quantized", None)

    @property
    def rows(self) -> Any:
        """The index of the rows: a slice where they are neighbours, else their numbers."""
        return self._slice or self._numbers

    def row_numbers(self) -> Tensor:
        """Return the numbers of the rows, on the CPU."""
        return torch.arange(self.linear[0].out_features)[self.rows if self._slice else self.rows.cpu()]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The rows of the weight (rows, in): a view where they are neighbours, else a copy; or dequantised."""
        if self.held is not None:
            return self.held
        return self.linear[0].weight[self.rows] if self.quantized is None else self.quantized.dequantize()

    @property
    def quantized(self) -> QuantizedWeight | QuantizedRows | None:
        """The quantised rows that its products use; None if the rows are not quantised."""
        linear = self.linear[0]
        if self.held_quantized is None and isinstance(linear, QuantizedLinear):
            return QuantizedRows(linear.quantized, self.rows)
        return self.held_quantized

    @property
    def is_held(self) -> bool:
        """True if it holds its rows itself, so that it does not need the weight of the linear."""
        return self.held is not None or self.held_quantized is not None

    @torch.no_grad()
    def hold(self, quant_type: str | None, like: Tensor) -> None:
        """Hold its rows of the weight itself from now on.

        Args:
            quant_type: a key of `QUANT_BITS`; None: as numbers.
            like: a tensor of the precision of the products, on the device.
        """
        rows = self.weight.detach().to(like.device)
        if quant_type is None:
            self.held = rows.to(like.dtype, copy=True)
        else:
            self.held_quantized = QuantizedWeight(quantize(rows, quant_type), like)

    def release(self) -> None:
        """Compute with the weight of the linear again."""
        self.held = self.held_quantized = None

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """The rows of the bias (out,); None if the linear has none."""
        bias = self.linear[0].bias
        return None if bias is None else bias[self.rows]

    def forward(self, x: Tensor) -> Tensor:
        quantized = self.quantized
        return F.linear(x, self.weight, self.bias) if quantized is None else quantized_linear(x, quantized, self.bias)


def is_transposed(linear: nn.Module) -> bool:
    """Return whether a linear, or the one of which it is a part, stores its weight as (in, out)."""
    stored = linear.linear[0] if isinstance(linear, FusedLinear | LinearRows) else linear
    stored = stored.original[0] if isinstance(stored, QuantizedLinear) else stored
    return isinstance(stored, Conv1DLinear)


def replace_fused_linears(network: nn.Module) -> None:
    """Replace every linear of a known layout by a `FusedLinear` with the same parameters."""
    config = network.config.get_text_config()  # type: ignore[union-attr, operator]
    for name, module in list(network.named_modules()):
        for child, linear in list(module.named_children()):
            layout = LAYOUTS.get(f"{type(module).__name__}.{child}")
            if layout and isinstance(linear, nn.Linear):
                heads = config.num_attention_heads
                width = getattr(config, "head_dim", None) or config.hidden_size // heads
                rows = _rows(layout, linear.out_features, heads, width)
                setattr(network.get_submodule(name), child, FusedLinear(linear, rows))


def fused_owner(network: nn.Module, name: str) -> tuple[str, FusedLinear] | None:
    """Return the fused linear, with its name, of which a module is the q, k or v; None for any other module."""
    owner, _, part = name.rpartition(".")
    module = network.get_submodule(owner)
    return (owner, module) if isinstance(module, FusedLinear) and part in module.parts else None


def join_rows(network: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights and biases with those of a q, k or v put into the rows of their fused linear's.

    Args:
        network: has the modules.
        tensors: by full name, in fp32.
    """
    joined: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module, _, key = name.rpartition(".")
        owner = fused_owner(network, module)
        if owner is None:
            joined[name] = tensor
            continue
        fused_name, fused = owner
        whole = getattr(fused, key).detach()
        rows = fused.parts[module.rpartition(".")[2]].rows
        joined.setdefault(f"{fused_name}.{key}", whole.float().clone())[rows] = tensor
    return joined


def _rows(layout: str, outputs: int, heads: int, width: int) -> dict[str, Tensor]:
    """Return the row numbers of q, k and v.

    Args:
        layout: a value of `LAYOUTS`.
        outputs: number of rows; those of k and v may have fewer heads than those of q.
        heads: number of heads of the query.
        width: number of rows of a head.
    """
    key_heads = (outputs // width - heads) // 2
    rows = torch.arange(outputs)
    if layout == "in_blocks":
        sizes = [heads * width, key_heads * width, key_heads * width]
        return dict(zip("qkv", torch.split(rows, sizes), strict=True))
    by_head = rows.view(key_heads, heads // key_heads + 2, width)
    return {
        "q": by_head[:, :-2].flatten(),
        "k": by_head[:, -2].flatten(),
        "v": by_head[:, -1].flatten(),
    }
