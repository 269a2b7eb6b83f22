"""Count the numbers and the bytes of a pack's frozen network, where weights are quantised or stay in their file."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lora_bench.adapters.pack.member_modules import MemberHeads
from lora_bench.backbones.fused_linear import LinearRows
from lora_bench.backbones.quantized_modules import QuantizedTable, QuantizedWeight

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from lora_bench.adapters.pack.state import PackState

BF16_BYTES = 2


def weight_bytes(pack: PackState, members: Iterable[int]) -> dict[str, int]:
    """Return the bytes of a pack's frozen weights, as the record has them; empty if none is quantised.

    `quantized_codes_bytes` and `quantized_scales_bytes` are those of quantised linears, `quantized_bf16_bytes` what
    their weights would take in bf16. `backbone_bytes` is what the whole frozen network takes, `backbone_linears_bytes`
    and `backbone_embeddings_bytes` the parts of it that weights of linears and embeddings take, and
    `backbone_bf16_bytes` what the network would take in bf16. Tensors that members share count once. Weights that stay
    in their file take nothing; heads and adapters do not count.

    Args:
        pack: attached to its network.
        members: whose quantised weights count, beside those of the backbone.
    """
    members = list(members)
    frozen = list(_frozen_modules(pack))
    linears = [*_weights_of_updates(pack, members), *(m for m in frozen if isinstance(m, QuantizedWeight))]
    if not linears and not any(isinstance(module, QuantizedTable) for module in frozen):
        return {}
    sizes = frozen_bytes(pack, members)
    quantized = {
        "quantized_codes_bytes": sum(weight.codes.nbytes for weight in linears),
        "quantized_scales_bytes": sum(weight.scales.nbytes for weight in linears),
        "quantized_bf16_bytes": sum(BF16_BYTES * math.prod(weight.shape) for weight in linears),
    }
    return (quantized if linears else {}) | {
        "backbone_linears_bytes": sizes["linears"],
        "backbone_embeddings_bytes": sizes["embeddings"],
        "backbone_bytes": sizes.total(),
        "backbone_bf16_bytes": BF16_BYTES * (_count_parameters(frozen) + count_quantized_numbers(pack)),
    }


def count_quantized_numbers(pack: PackState) -> int:
    """Return the number of parameters that the backbone holds as codes only."""
    modules = list(_frozen_modules(pack))
    held = {module.held_quantized for module in modules if isinstance(module, LinearRows)}  # also in the linear's file
    weights = sum(math.prod(m.shape) for m in modules if isinstance(m, QuantizedWeight) and m not in held)
    return weights + sum(m.codes.numel() for m in modules if isinstance(m, QuantizedTable))


def _count_parameters(modules: Iterable[nn.Module]) -> int:
    """Return the number of the modules' own parameters that are held as numbers, or stay in their file."""
    return sum(tensor.numel() for _, _, tensor in _tensors(modules) if isinstance(tensor, nn.Parameter))


def frozen_bytes(pack: PackState, members: Iterable[int]) -> Counter[str]:
    """Return the bytes of a pack's frozen weights: those of `linears` and of `embeddings`, and `others`.

    Args:
        pack, members: as for `weight_bytes`.
    """
    network: Any = pack.network
    output = network.get_output_embeddings()
    offloaded = {id(p) for p in pack.backbone.offloaded.values()}
    sizes: Counter[str] = Counter(linears=0, embeddings=0, others=0)
    for module, name, tensor in _tensors(_frozen_modules(pack)):
        weight_group = "others"
        if isinstance(module, nn.Embedding | QuantizedTable) or module is output:
            weight_group = "embeddings"
        elif isinstance(module, QuantizedWeight) or (isinstance(module, nn.Linear) and name in ("weight", "held")):
            weight_group = "linears"
        sizes[weight_group] += 0 if id(tensor) in offloaded else tensor.nbytes
    weights = _weights_of_updates(pack, members)
    sizes["linears"] += sum(weight.codes.nbytes + weight.scales.nbytes for weight in weights)
    return sizes


def unquantised_bytes(pack: PackState) -> int:
    """Return the bytes that weights of linears of the layers take which are held as numbers."""
    offloaded = {id(p) for p in pack.backbone.offloaded.values()}
    tensors = _tensors(pack.backbone.linears().values())
    return sum(t.nbytes for _, name, t in tensors if name in ("weight", "held") and id(t) not in offloaded)


def _weights_of_updates(pack: PackState, members: Iterable[int]) -> list[QuantizedWeight]:
    """Return the quantised weights that members' updates hold, of those with the same tensors one."""
    modules = (module for k in members for update in pack.updates[k].values() for module in update.modules())
    return list({id(m.codes): m for m in modules if isinstance(m, QuantizedWeight)}.values())


def _frozen_modules(pack: PackState) -> Iterator[nn.Module]:
    """Yield the modules of the network, without the members' updates and heads."""
    foreign = {module for of_member in pack.updates for update in of_member.values() for module in update.modules()}
    for module in pack.network.modules():
        if isinstance(module, MemberHeads):
            foreign |= set(module.modules())
    return (module for module in pack.network.modules() if module not in foreign)


def _tensors(modules: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Yield the modules' own parameters and buffers with module and name, each tensor once."""
    seen: set[int] = set()
    for module in modules:
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield module, name, tensor
