"""Attach members to a backbone's network, and detach them again.

    an adapted module (a linear)   ->  AdaptedLinear    the frozen module, and each member's update
    a module of the head           ->  MemberHeads      copies for each member, in fp32

Detaching puts the very same modules back.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lora_bench.adapters.pack.member import stream
from lora_bench.adapters.pack.member_modules import AdaptedLinear, MemberHeads
from lora_bench.backbones.quantized_modules import QuantizedWeight

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_bench.adapters.base import Update
    from lora_bench.adapters.pack.member import Member
    from lora_bench.adapters.pack.member_modules import ActiveMembers
    from lora_bench.backbones.base import Backbone


def attach_updates(network: nn.Module, updates: Sequence[dict[str, Update]], active: ActiveMembers) -> None:
    """Put every member's updates beside the modules that they adapt.

    Args:
        network: of the backbone; no update is attached to it.
        updates: by module name, one mapping per member.
        active: the members that a forward pass computes.
    """
    for name in dict.fromkeys(name for of_member in updates for name in of_member):
        base = network.get_submodule(name)
        _share_quantized([of_member[name] for of_member in updates if name in of_member])
        _replace(network, name, AdaptedLinear(base, [of_member.get(name) for of_member in updates], active))


def _share_quantized(updates: Sequence[Update]) -> None:
    """Let members whose quantised weights of one linear are equal hold them once."""
    quantized = [module for update in updates for module in update.modules() if isinstance(module, QuantizedWeight)]
    for i, weight in enumerate(quantized):
        weight.share(quantized[:i])


def attach_heads(backbone: Backbone, members: Sequence[Member], active: ActiveMembers) -> None:
    """Give every member its own copies of the head, one for each of its tasks, which all start alike.

    They replace the network's modules, which `detach` puts back.
    """
    for name in backbone.head_modules:
        original = backbone.network.get_submodule(name)
        copies = [
            [_new_head(backbone, name, original, member, outputs) for outputs in head_outputs(member, backbone)]
            for member in members
        ]
        _replace(backbone.network, name, MemberHeads(original, copies, active))


def detach(network: nn.Module, *classes: type[AdaptedLinear | MemberHeads]) -> None:
    """Put back the network's modules that instances of these classes have replaced; without any, nothing happens."""
    for name, module in list(network.named_modules()):
        if isinstance(module, classes):
            _replace(network, name, module.base if isinstance(module, AdaptedLinear) else module.original[0])


def head_outputs(member: Member, backbone: Backbone) -> list[int]:
    """Return the number of logits of each of a member's heads."""
    return list(member.outputs) or [backbone.outputs()]


def _new_head(backbone: Backbone, name: str, original: nn.Module, member: Member, outputs: int) -> nn.Module:
    """Return a trainable fp32 copy of a head module with this number of logits.

    Parameters that the checkpoint did not hold are drawn from the member's seed, as transformers draws a new
    classifier: normal weights; zero biases and unit norms stay as they are.
    """
    head = copy.deepcopy(original).float()
    head, resized = _resize(head, backbone.outputs(), outputs)
    head.requires_grad_(True)
    generator = stream(member.seed_of("init"), f"head/{name}")
    for key, p in head.named_parameters():
        is_new = f"{name}.{key}" in backbone.new_parameters or key.rpartition(".")[0] == resized
        if is_new and p.ndim > 1:
            drawn = torch.empty(p.shape).normal_(0.0, backbone.initializer_range, generator=generator)
            p.data.copy_(drawn)
    return head


def _resize(head: nn.Module, present: int, outputs: int) -> tuple[nn.Module, str | None]:
    """Give the last linear of a head module that has the present number of outputs another one; its bias becomes zero.

    Returns:
        The module, and the name of its linear that was replaced, empty if it is the module itself; None if the module
        gives no logits, or has the number already.
    """
    name = output_linear(head, present)
    if present == outputs or name is None:
        return head, None
    linear: Any = head.get_submodule(name)
    has_bias = linear.bias is not None
    new = nn.Linear(linear.in_features, outputs, bias=has_bias, device=linear.weight.device)
    if has_bias:
        nn.init.zeros_(new.bias)
    if not name:
        return new, ""
    _replace(head, name, new)
    return head, name


def output_linear(head: nn.Module, outputs: int) -> str | None:
    """Return the name of the last linear of a head module with this many outputs, empty for the module itself."""
    linears = [name for name, m in head.named_modules() if isinstance(m, nn.Linear) and m.out_features == outputs]
    return linears[-1] if linears else None


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, module)
