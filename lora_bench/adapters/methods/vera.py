"""VeRA (Kopiczko et al. 2023, arXiv 2310.11454): vectors are trained on random projections that all modules share.

    h = W x + Λ_b B Λ_d A x        eq. 2, with A: (rank, in), B: (out, rank), Λ_b = diag(b), Λ_d = diag(d), W frozen

A and B are random and frozen; a module's own are b (out,) and d (rank,). One pair serves all modules of a member: it is
drawn at the largest in and out among them, and each takes the first columns of A and rows of B that fit it, as in
peft. There is no scaling: d begins at `d_initial`, b at zero.

The rank may exceed the sides of a weight, as it does in the paper (1024 for RoBERTa's 768): A and B are not trained, so
each further rank is one more fixed direction B_i A_i with a trained weight, and up to in · out of them are independent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_bench.adapters.base import Update
from lora_bench.adapters.targets import LinearAdapter
from lora_bench.backbones.dropout import keep_mask
from lora_bench.config.adapter_values import check_values

if TYPE_CHECKING:
    from lora_bench.backbones.base import Backbone


@dataclass(frozen=True, kw_only=True)
class VeRA(LinearAdapter):
    """Settings of VeRA."""

    rank: int
    """Rank of the shared projections, the length of d."""
    d_initial: float
    """Initial value of every element of d."""
    dropout: float
    """Probability with which an input feature of A is dropped in training."""

    def __post_init__(self) -> None:
        """Refuse a rank below 1, a `d_initial` that is not positive, and a dropout outside [0, 1)."""
        super().__post_init__()
        check_values(vars(self))

    def updates(
        self,
        backbone: Backbone,
        init: torch.Generator | None,
        dropout: torch.Generator,
        ranks: dict[str, int] | None = None,
    ) -> dict[str, Update]:
        """Return the update of every target; all share one random A and B, as large as the largest target needs.

        Without `init` A and B are zero. `ranks` is ignored: the rank is always `rank`.
        """
        every = backbone.linears()
        linears = {name: every[name] for name in self.targets(backbone)}
        A = torch.zeros(self.rank, max(linear.in_features for linear in linears.values()))
        B = torch.zeros(max(linear.out_features for linear in linears.values()), self.rank)
        if init is not None:
            for projection in (A, B):
                nn.init.kaiming_uniform_(projection, generator=init)  # within ±√(6 / columns), as in the paper
        shared = A.to(backbone.device), B.to(backbone.device)
        return {
            name: VeRAUpdate(shared, linear.out_features, self.d_initial, self.dropout, dropout)
            for name, linear in linears.items()
        }

    def peft_settings(self, updates: dict[str, Update]) -> dict[str, Any]:
        """Return PEFT's settings, with `save_projection`: the adapter file holds A and B."""
        return {
            "peft_type": "VERA",
            "r": self.rank,
            "d_initial": self.d_initial,
            "vera_dropout": self.dropout,
            "save_projection": True,
            "bias": "none",
        }

    def to_tensors(self, updates: dict[str, Update]) -> dict[str, Tensor]:
        A, B = _shared(updates)
        return {"vera_A": A, "vera_B": B, **super().to_tensors(updates)}

    def load_tensors(self, updates: dict[str, Update], tensors: dict[str, Tensor]) -> None:
        """Copy the saved A and B into the shared projections, and load each update's vectors."""
        A, B = _shared(updates)
        A.copy_(tensors["vera_A"])
        B.copy_(tensors["vera_B"])
        super().load_tensors(updates, tensors)


class VeRAUpdate(Update):
    """Λ_b B Λ_d A, with b and d in fp32 whatever the backbone's precision; b starts at zero.

    Args:
        shared: A (rank, in or more) and B (out or more, rank), the same two tensors for all modules of a member.
        out_features: the length of b.
        d_initial: initial value of d.
        dropout: probability with which an input feature of A is dropped in training.
        generator: the member's stream of dropout.
    """

    def __init__(
        self,
        shared: tuple[Tensor, Tensor],
        out_features: int,
        d_initial: float,
        dropout: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        A, _ = self.shared = shared  # in a tuple: no state of this module, so that it is held and saved once
        self.vera_lambda_b = nn.Parameter(A.new_zeros(out_features))  # (out,)
        self.vera_lambda_d = nn.Parameter(A.new_full((len(A),), d_initial))  # (rank,)
        self.rank = len(A)
        self.dropout = dropout
        self.generator = generator

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y + Λ_b B Λ_d A x, (B, T, out), with x dropped out in training."""
        A, B = self._fitting(x.shape[-1], y.shape[-1])
        if self.dropout and self.training:
            x = x * keep_mask(x, self.dropout, self.generator)
        low = F.linear(x, A.to(x.dtype)) * self.vera_lambda_d.to(x.dtype)  # (B, T, rank)
        return y + F.linear(low, B.to(x.dtype)) * self.vera_lambda_b.to(x.dtype)  # (B, T, out)

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        A, B = self._fitting(weight.shape[1], weight.shape[0])
        return weight + self.vera_lambda_b[:, None] * B @ (self.vera_lambda_d[:, None] * A), bias  # (out, in)

    def _fitting(self, in_features: int, out_features: int) -> tuple[Tensor, Tensor]:
        """Return the projections' columns and rows for one module: (rank, in) and (out, rank)."""
        A, B = self.shared
        return A[:, :in_features], B[:out_features]


def _shared(updates: dict[str, Update]) -> tuple[Tensor, Tensor]:
    """Return the projections that all of a member's updates refer to."""
    return cast("VeRAUpdate", next(iter(updates.values()))).shared
