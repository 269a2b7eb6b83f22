"""LoRA: Low-Rank Adaptation (Hu et al. 2021, arXiv 2106.09685).

    h = W x + (alpha / rank) · B A x        eq. 3, with A: (rank, in), B: (out, rank), W frozen

A starts as in microsoft/LoRA's `loralib/layers.py` (Kaiming-uniform with a = √5), B at zero, so that training starts
from the backbone's own function.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_bench.adapters.base import Adapter, Update
from lora_bench.adapters.targets import match_targets
from lora_bench.config import need, need_number

if TYPE_CHECKING:
    from lora_bench.backbones.base import Backbone


@dataclass(frozen=True, kw_only=True)
class LoRA(Adapter):
    """Settings of LoRA."""

    rank: int
    alpha: float
    """Numerator of the scaling alpha / rank."""
    dropout: float
    """Probability with which an input feature of A is dropped in training."""
    target_modules: str
    """`all`, `qv`, or a regular expression that a linear's full name must match from end to end."""
    layers: Any
    """`all`, `top:n`, or a list of layer numbers, counted from 0 in the order of computation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        need_number("rank", self.rank, 1)
        need_number("alpha", self.alpha, 0, open_low=True)
        need(0 <= self.dropout < 1, "dropout", self.dropout, "must be at least 0 and below 1")

    def targets(self, backbone: Backbone) -> list[str]:
        return match_targets(backbone, self.target_modules, self.layers)

    def update(self, name: str, base: nn.Linear, init: torch.Generator, dropout: torch.Generator) -> LoRAUpdate:
        largest = min(base.in_features, base.out_features)
        shape = f"{base.out_features} by {base.in_features}"
        need(self.rank <= largest, "rank", self.rank, f"is above {largest}, the smaller side of {name} ({shape})")
        lora_A = torch.empty(self.rank, base.in_features)
        nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5), generator=init)
        lora_B = torch.zeros(base.out_features, self.rank)
        device = base.weight.device
        return LoRAUpdate(lora_A.to(device), lora_B.to(device), self.alpha / self.rank, self.dropout, dropout)

    def peft_settings(self) -> dict[str, Any]:
        return {
            "peft_type": "LORA",
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "bias": "none",
        }


class LoRAUpdate(Update):
    """scaling · B A, held in fp32 whatever the backbone's precision."""

    def __init__(
        self, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(lora_A)  # (rank, in)
        self.lora_B = nn.Parameter(lora_B)  # (out, rank)
        self.rank = lora_A.shape[0]
        self.scaling = scaling
        self.dropout = dropout
        self.generator = generator

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.dropout and self.training:
            x = x * keep_mask(x, self.dropout, self.generator)
        low = F.linear(x, self.lora_A.to(x.dtype))  # (B, T, rank)
        return y + F.linear(low * self.scaling, self.lora_B.to(x.dtype))  # (B, T, out)

    def delta_weight(self) -> Tensor:
        """The change to the frozen weight, (out, in), in fp32."""
        return self.scaling * self.lora_B.detach() @ self.lora_A.detach()  # (out, in)


def keep_mask(x: Tensor, dropout: float, generator: torch.Generator) -> Tensor:
    """Inverted-dropout mask from the member's own stream, so that a member of a pack drops what it would drop alone."""
    keep = 1.0 - dropout
    return torch.empty_like(x).bernoulli_(keep, generator=generator).div_(keep)
