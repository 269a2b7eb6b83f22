"""Updates of the query, key and value of a fused linear, as one LoRA of the whole linear: PEFT knows no parts of it.

A = the A of all parts, one below the other        (ranks, in), ranks their sum
B = the B of each part in its rows and columns     (out, ranks), zero elsewhere
m = DoRA's magnitudes in the rows of the parts     (out,), elsewhere the norms of the frozen rows
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from lora_bench.backbones.fused_linear import FusedLinear, fused_owner

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor, nn


def has_parts(network: nn.Module, targets: Iterable[str]) -> bool:
    """Return whether any of these modules is the query, key or value of a fused linear."""
    return any(fused_owner(network, name) is not None for name in targets)


def can_be_joined(settings: Mapping[str, Any]) -> bool:
    """Return whether PEFT's settings of a method are those of a LoRA, the only one that can be joined."""
    return settings.get("peft_type") == "LORA"


def join_parts(
    network: nn.Module, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], targets: Iterable[str], prefix: str
) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """Join the updates of the parts of each fused linear.

    Args:
        network: of the backbone.
        tensors: of the adapter file.
        settings: of PEFT, for a LoRA.
        targets: names of the adapted modules.
        prefix: what stands before a module's name in the file.

    Returns:
        Tensors, settings and targets, in which fused linears take the place of their parts. What concerns other modules
        is unchanged.
    """
    joined, changed = dict(tensors), dict(settings)
    ranks, alphas = dict(settings.get("rank_pattern") or {}), dict(settings.get("alpha_pattern") or {})
    divisor = math.sqrt if settings.get("use_rslora") else float
    parts_by_owner: dict[str, list[str]] = {}
    for name in targets:
        owner = fused_owner(network, name)
        parts_by_owner.setdefault(owner[0] if owner else name, []).append(name)
    for owner_name, names in parts_by_owner.items():
        if names == [owner_name]:
            continue
        fused: Any = network.get_submodule(owner_name)
        of_parts = {
            name.rpartition(".")[2]: {
                key.removeprefix(f"{prefix}{name}."): joined.pop(key)
                for key in tensors
                if key.startswith(f"{prefix}{name}.")
            }
            for name in names
        }
        first = names[0]
        scaling = alphas.get(first, settings["lora_alpha"]) / divisor(ranks.get(first, settings["r"]))
        for name in names:
            ranks.pop(name, None)
            alphas.pop(name, None)
        of_owner = _joined(fused, of_parts)
        ranks[owner_name] = rank = len(of_owner["lora_A.weight"])
        alphas[owner_name] = scaling * divisor(rank)
        joined |= {f"{prefix}{owner_name}.{key}": tensor for key, tensor in of_owner.items()}
    return joined, changed | {"rank_pattern": ranks, "alpha_pattern": alphas}, list(parts_by_owner)


@torch.no_grad()
def _joined(fused: FusedLinear, of_parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of a LoRA of the whole linear from those of its parts, each by its name in the file."""
    B = torch.zeros(fused.out_features, sum(len(tensors["lora_A.weight"]) for tensors in of_parts.values()))
    norms = fused.weight.detach().float().cpu().norm(dim=1)  # (out,)
    column = 0
    for part, tensors in of_parts.items():
        rows, rank = fused.parts[part].row_numbers(), len(tensors["lora_A.weight"])
        B[rows, column : column + rank] = tensors["lora_B.weight"].float()
        column += rank
        if "lora_magnitude_vector" in tensors:
            norms[rows] = tensors["lora_magnitude_vector"].float()
    joined = {
        "lora_A.weight": torch.cat([tensors["lora_A.weight"] for tensors in of_parts.values()]),
        "lora_B.weight": B,
    }
    has_magnitude = all("lora_magnitude_vector" in tensors for tensors in of_parts.values())
    return joined | ({"lora_magnitude_vector": norms} if has_magnitude else {})
