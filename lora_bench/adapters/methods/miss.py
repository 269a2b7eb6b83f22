"""MiSS (Kang and Yin 2024, arXiv 2409.15371): inputs are summed in groups, and one trained matrix maps the sums.

    h = W x + D^T s,   s_i = x_i + x_{i + rank} + x_{i + 2 rank} + …        with D: (rank, out), W frozen

It is LoRA with a frozen A of ones and zeros, so that no product with A is needed: at the same number of parameters the
rank may be twice LoRA's or more. D begins at zero; there is no scaling. This is the paper's efficient form, PEFT's
default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_bench.adapters.base import Update
from lora_bench.adapters.targets import LinearAdapter
from lora_bench.backbones.dropout import keep_mask
from lora_bench.backbones.fused_linear import is_transposed
from lora_bench.config.adapter_values import check_values
from lora_bench.errors import require


@dataclass(frozen=True, kw_only=True)
class MiSS(LinearAdapter):
    """Settings of MiSS."""

    rank: int
    """Number of sums: the rows of the trained matrix."""
    dropout: float
    """Probability with which an input feature of the update is dropped in training."""

    def __post_init__(self) -> None:
        """Refuse a rank below 1, and a dropout outside [0, 1)."""
        super().__post_init__()
        check_values(vars(self))

    def update(self, name: str, base: nn.Module, init: torch.Generator | None, dropout: torch.Generator) -> MiSSUpdate:
        """Return the update of a linear, which is zero; a rank above its inputs is a `UserError`."""
        assert isinstance(base, nn.Linear)
        reason = f"is above {base.in_features}, the inputs of {name}"
        require(self.rank <= base.in_features, "rank", self.rank, reason)
        return MiSSUpdate(base, self.rank, self.dropout, dropout)

    def peft_settings(self, updates: dict[str, Update]) -> dict[str, Any]:
        """Return PEFT's settings; empty beside a weight that is stored as (in, out), which PEFT's MiSS refuses."""
        if any(isinstance(update, MiSSUpdate) and update.is_beside_transposed for update in updates.values()):
            return {}
        return {"peft_type": "MISS", "r": self.rank, "miss_dropout": self.dropout, "bias": "none"}


class MiSSUpdate(Update):
    """D^T of the sums, with D in fp32 whatever the backbone's precision.

    Args:
        base: the frozen linear beside it.
        rank: the number of sums.
        dropout: probability with which an input feature is dropped in training.
        generator: the member's random stream of dropout.
    """

    def __init__(self, base: nn.Linear, rank: int, dropout: float, generator: torch.Generator) -> None:
        super().__init__()
        self.miss_block = nn.Parameter(torch.zeros(rank, base.out_features, device=base.weight.device))  # D
        self.is_beside_transposed = is_transposed(base)
        self.rank = rank
        self.dropout = dropout
        self.generator = generator

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y + D^T s, (B, T, out), with x dropped out in training."""
        if self.dropout and self.training:
            x = x * keep_mask(x, self.dropout, self.generator)
        x = F.pad(x, (0, -x.shape[-1] % self.rank))
        sums: Tensor = x.reshape(*x.shape[:-1], -1, self.rank).sum(-2)  # (B, T, rank)
        return y + sums @ self.miss_block.to(x.dtype)

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        repeats = -(-weight.shape[1] // self.rank)
        return weight + self.miss_block.T.repeat(1, repeats)[:, : weight.shape[1]], bias  # (out, in)
