"""Quantise the linears and embeddings of a whole network, and put plain ones back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_bench.backbones.fused_linear import FusedLinear
from lora_bench.backbones.page_out import page_out
from lora_bench.backbones.quantized_modules import (
    QuantizedEmbedding,
    QuantizedHead,
    QuantizedLinear,
    QuantizedTable,
    quantize_linear,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


@dataclass(frozen=True)
class Quantization:
    """The types in which a frozen network's weights are held; None: as numbers."""

    linears: str | None = None
    """Of the linears of the layers: a key of `QUANT_BITS`."""
    embeddings: str | None = None
    """Of token embeddings and the language-model head: `int8`."""


def quantize_linears(network: nn.Module, linears: Iterable[nn.Linear], quant_type: str, like: Tensor) -> None:
    """Quantise the weights of linears of a network, one after another; they lose their own.

    Args:
        network: has the linears.
        linears: with their weights as they are stored, on any device; no part of a fused one.
        quant_type: a key of `QUANT_BITS`.
        like: a tensor of the precision of the products, on the device.
    """
    replaced: dict[nn.Module, nn.Module] = {}
    for linear in linears:
        if isinstance(linear, FusedLinear):
            linear.quantize(quant_type, like)
        else:
            replaced[linear] = quantize_linear(linear, quant_type, like)
    _replace(network, replaced)


@torch.no_grad()
def quantize_embeddings(network: nn.Module, head_modules: Iterable[str], like: Tensor) -> None:
    """Quantise the token embeddings of a network, and the language-model head where it has one, to int8.

    Modules that share a weight share its codes. Embeddings of positions and types stay as they are.

    Args:
        network: a Hugging Face model.
        head_modules: names of trained modules, which are no language-model head.
        like: a tensor of the precision of the network, on the device.
    """
    any_network: Any = network
    output = any_network.get_output_embeddings()
    trained = {module for name in head_modules for module in network.get_submodule(name).modules()}
    owners = [any_network.get_input_embeddings(), *([output] if isinstance(output, nn.Linear) else [])]
    weights = {id(owner.weight): owner.weight for owner in owners if owner not in trained}
    tables: dict[int, QuantizedTable] = {}
    replaced: dict[nn.Module, nn.Module] = {}
    for module in network.modules():
        key = id(module._parameters.get("weight"))
        if key in weights and isinstance(module, nn.Embedding | nn.Linear):
            if key not in tables:
                tables[key] = QuantizedTable(weights[key], like)
                page_out(weights[key])
            is_head = isinstance(module, nn.Linear)
            replaced[module] = (QuantizedHead if is_head else QuantizedEmbedding)(module, tables[key])  # type: ignore[arg-type]
    _replace(network, replaced)


@torch.no_grad()
def dequantize_network(network: nn.Module) -> None:
    """Put back every linear and embedding whose place a quantised one took, with dequantised weights."""
    replaced: dict[nn.Module, nn.Module] = {}
    weights: dict[QuantizedTable, nn.Parameter] = {}
    for module in list(network.modules()):
        if isinstance(module, FusedLinear):
            module.restore()
        elif isinstance(module, QuantizedLinear):
            replaced[module] = module.restore()
        elif isinstance(module, QuantizedEmbedding | QuantizedHead):
            if module.table not in weights:
                weights[module.table] = nn.Parameter(module.weight, requires_grad=False)
            replaced[module] = module.restore(weights[module.table])
    _replace(network, replaced)


def _replace(network: nn.Module, replaced: Mapping[nn.Module, nn.Module]) -> None:
    """Put modules in the place of others, under every name that these have in a network."""
    for parent in list(network.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in replaced:
                setattr(parent, name, replaced[child])
