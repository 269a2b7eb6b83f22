"""LoRA-XS (Bałazy et al. 2024, arXiv 2405.17604): a small matrix is trained between frozen singular vectors of W.

    h = W x + s · B R A x        with W ≈ U_r Σ_r V_rᵀ, A = Σ_r V_rᵀ: (rank, in), B = U_r: (out, rank), R: (rank, rank)

Only R is trained; it begins as N(0, σ²), all but zero. The paper writes it for row vectors, x W + x A R B with
A = U_r Σ_r and B = V_rᵀ: there W is (in, out), so the singular values stand on the input's side, as they do here
(MohammadrezaBanaei/LoRA-XS, issue 1 and its code). s = alpha / rank, as in that code.

An adapter file holds R A, B and R: the first two are an ordinary LoRA for peft, and A = Bᵀ W comes back from B and the
frozen weight. It is as large as LoRA's at the same rank; what the paper stores is R alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_bench.adapters.base import Update
from lora_bench.adapters.lowrank.init import singular_triplets
from lora_bench.adapters.targets import LinearAdapter, require_rank
from lora_bench.backbones.dropout import keep_mask
from lora_bench.config.adapter_values import check_values

SIGMA = 1e-5
"""Standard deviation of the initial R, as in the paper."""


@dataclass(frozen=True, kw_only=True)
class LoRAXS(LinearAdapter):
    """Settings of LoRA-XS."""

    rank: int
    """Singular triplets of every adapted linear; its square is the number of trained parameters."""
    alpha: float
    """Numerator of the scaling alpha / rank."""
    dropout: float
    """Probability with which an input feature of A is dropped in training."""

    def __post_init__(self) -> None:
        """Refuse a rank below 1, an alpha that is not positive, and a dropout outside [0, 1)."""
        super().__post_init__()
        check_values(vars(self))

    def update(
        self, name: str, base: nn.Module, init: torch.Generator | None, dropout: torch.Generator
    ) -> LoRAXSUpdate:
        """Return the update of a linear, with A and B from its singular vectors and a random R.

        Without `init` it is all zeros, for saved tensors to be loaded. A rank above the linear's smaller side is a
        `UserError`.
        """
        assert isinstance(base, nn.Linear)
        require_rank("rank", self.rank, name, base)
        update = LoRAXSUpdate(base, self.rank, self.alpha / self.rank, self.dropout, dropout)
        if init is not None:
            update.initialise(torch.empty(self.rank, self.rank).normal_(0.0, SIGMA, generator=init))
        return update

    def peft_settings(self, updates: dict[str, Update]) -> dict[str, Any]:
        """Return the settings of an ordinary LoRA of the same rank and scaling: the saved R A and B are one."""
        return {
            "peft_type": "LORA",
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "bias": "none",
        }


class LoRAXSUpdate(Update):
    """scaling · B R A, held in fp32 whatever the backbone's precision; zeros until `initialise` or `load_tensors`.

    Args:
        base: the frozen linear beside it; never written to.
        rank: R's side.
        scaling: the factor s.
        dropout: probability with which an input feature of A is dropped in training.
        generator: the member's stream of dropout.
    """

    def __init__(self, base: nn.Linear, rank: int, scaling: float, dropout: float, generator: torch.Generator) -> None:
        super().__init__()
        device = base.weight.device
        self.base = (base,)  # in a tuple: not a submodule, never trained or saved
        self.lora_A = nn.Buffer(torch.zeros(rank, base.in_features, device=device))
        self.lora_B = nn.Buffer(torch.zeros(base.out_features, rank, device=device))
        self.latent = nn.Parameter(torch.zeros(rank, rank, device=device))  # R
        self.rank = rank
        self.scaling = scaling
        self.dropout = dropout
        self.generator = generator

    @torch.no_grad()
    def initialise(self, latent: Tensor) -> None:
        """Set A and B from the first singular triplets of the frozen weight, and `latent` (rank, rank) as R."""
        U, _, _ = singular_triplets(self.base[0].weight.detach(), 0, self.rank)  # (out, rank)
        self._set_factors(U)
        self.latent.copy_(latent)

    def _set_factors(self, U: Tensor) -> None:
        """Set B = U_r and A = U_rᵀ W = Σ_r V_rᵀ, computed in fp64: on another machine it rounds to the same A."""
        self.lora_B.copy_(U)
        self.lora_A.copy_(self.lora_B.double().T @ self.base[0].weight.double())

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y + s · B R A x, (B, T, out), with x dropped out in training."""
        if self.dropout and self.training:
            x = x * keep_mask(x, self.dropout, self.generator)
        low = F.linear(x, self.lora_A.to(x.dtype))  # (B, T, rank)
        low = F.linear(low, (self.scaling * self.latent).to(x.dtype))  # (B, T, rank)
        return y + F.linear(low, self.lora_B.to(x.dtype))  # (B, T, out)

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.scaling * self.lora_B @ self.latent @ self.lora_A, bias  # (out, in)

    def to_tensors(self) -> dict[str, Tensor]:
        latent = self.latent.detach()
        return {"lora_A.weight": latent @ self.lora_A, "lora_B.weight": self.lora_B, "latent": latent}

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self._set_factors(tensors["lora_B.weight"])
        self.latent.copy_(tensors["latent"])
