"""HiRA (Huang et al., ICLR 2025, openreview.net/forum?id=TwJrTz9cRS): W times a low-rank product, element by element.

    h = W x + (W ∘ B A) x        with A: (rank, in), B: (out, rank), W frozen

The element-wise product with W may have full rank, whatever the rank of B A. A is drawn as LoRA's and B begins at zero;
there is no scaling. Parameters are LoRA's, but the update is a product as large as the frozen one, and its gradient is
that of a whole weight: a step costs about as much as in full fine-tuning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_bench.adapters.base import Update
from lora_bench.adapters.lowrank.init import random_A
from lora_bench.adapters.targets import LinearAdapter, require_rank
from lora_bench.backbones.dropout import keep_mask
from lora_bench.backbones.quantized_modules import quantized_weight
from lora_bench.config.adapter_values import check_values


@dataclass(frozen=True, kw_only=True)
class HiRA(LinearAdapter):
    """Settings of HiRA."""

    rank: int
    """Rank of B A."""
    dropout: float
    """Probability with which an input feature of the update is dropped in training."""

    def __post_init__(self) -> None:
        """Refuse a rank below 1, and a dropout outside [0, 1)."""
        super().__post_init__()
        check_values(vars(self))

    def update(self, name: str, base: nn.Module, init: torch.Generator | None, dropout: torch.Generator) -> HiRAUpdate:
        """Return the update of a linear, with a random A, and B at zero; without `init` A is zero, too.

        A rank above the linear's smaller side is a `UserError`.
        """
        assert isinstance(base, nn.Linear)
        require_rank("rank", self.rank, name, base)
        A = torch.zeros(self.rank, base.in_features)
        if init is not None:
            A = random_A("kaiming", self.rank, base.in_features, init)
        return HiRAUpdate(base, A, self.dropout, dropout)

    def peft_settings(self, updates: dict[str, Update]) -> dict[str, Any]:
        return {"peft_type": "HIRA", "r": self.rank, "hira_dropout": self.dropout}


class HiRAUpdate(Update):
    """W ∘ B A, with A and B in fp32 whatever the backbone's precision.

    Args:
        base: the frozen linear beside it; never written to.
        hira_A: A, (rank, in); B starts at zero.
        dropout: probability with which an input feature is dropped in training.
        generator: the member's random stream of dropout.
    """

    def __init__(self, base: nn.Linear, hira_A: Tensor, dropout: float, generator: torch.Generator) -> None:
        super().__init__()
        device = base.weight.device
        self.base = (base,)  # in a tuple: not a submodule, never trained or saved
        self.hira_A = nn.Parameter(hira_A.to(device))  # (rank, in)
        self.hira_B = nn.Parameter(torch.zeros(base.out_features, len(hira_A), device=device))  # (out, rank)
        self.rank = len(hira_A)
        self.dropout = dropout
        self.generator = generator

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y + (W ∘ B A) x, (B, T, out), with x dropped out in training."""
        if self.dropout and self.training:
            x = x * keep_mask(x, self.dropout, self.generator)
        quantized = quantized_weight(self.base[0])
        W = self.base[0].weight if quantized is None else quantized.dequantize()
        return y + F.linear(x, W * (self.hira_B @ self.hira_A).to(W.dtype))

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + weight * (self.hira_B @ self.hira_A), bias  # (out, in)
