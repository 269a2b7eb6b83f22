"""AdaLoRA (Zhang et al. 2023, arXiv 2303.10512): ranks are pruned while training goes on, worst first over all modules.

    h = W x + s · P diag(E) Q x        eq. 3, with Q: (rank, in), E: (rank, 1), P: (out, rank), W frozen

Q, E and P are called `lora_A`, `lora_E` and `lora_B` in code and files, as in the authors' library and in peft. A
triplet is E_i with row i of Q and column i of P. Training begins with more triplets than are wanted (E = 0, so from
the backbone's own function), scores each by how much the loss leans on it, and sets E_i = 0 for all but the best as
many as `cubic_budget` allows; between two allocations a pruned triplet may come back. In the final phase the choice is
fixed. What is left is `rank` triplets per module on average: the budget of LoRA at the same rank.

The scaling s = alpha / (initial rank + 1e-5) never changes, as in the authors' library: following the pruned rank
hurts (QingruZhang/AdaLoRA, issue 12).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_bench.adapters.base import Update
from lora_bench.adapters.lowrank.allocation import cubic_budget, keep_top
from lora_bench.adapters.targets import LinearAdapter, require_rank, require_ranks
from lora_bench.backbones.dropout import keep_mask
from lora_bench.config.adapter_values import check_values

if TYPE_CHECKING:
    from lora_bench.backbones.base import Backbone


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(LinearAdapter):
    """Settings of AdaLoRA."""

    rank: int
    """Triplets per module at the end, on average over the modules."""
    init_rank: int | None
    """Triplets per module at the start; null: one and a half times `rank`, rounded up."""
    alpha: float
    """Numerator of the scaling alpha / (initial rank + 1e-5)."""
    dropout: float
    """Probability with which an input feature of Q is dropped in training."""
    orthogonality: float
    """γ, the weight of the penalty that keeps the columns of P and the rows of Q orthonormal."""
    beta1: float
    """Decay of the smoothed sensitivity."""
    beta2: float
    """Decay of its uncertainty."""
    warmup: float
    """Share of all steps before pruning begins."""
    final: float
    """Share of all steps, at the end, in which the choice of triplets is fixed."""
    interval: int
    """ΔT: steps from one allocation to the next."""

    def __post_init__(self) -> None:
        """Refuse values out of range, an `init_rank` below `rank`, and phases that leave no steps to prune in."""
        super().__post_init__()
        check_values(vars(self))

    @property
    def first_rank(self) -> int:
        """Triplets per module at the start."""
        return (3 * self.rank + 1) // 2 if self.init_rank is None else self.init_rank

    # -- making updates --

    def updates(
        self,
        backbone: Backbone,
        init: torch.Generator | None,
        dropout: torch.Generator,
        ranks: dict[str, int] | None = None,
    ) -> dict[str, Update]:
        """Return an update for every target, with the triplets that `ranks` gives it, by default `first_rank`."""
        linears = backbone.linears()
        names = self.targets(backbone)
        ranks = ranks or dict.fromkeys(names, self.first_rank)
        require_ranks(ranks, names)
        return {name: self._update(name, linears[name], init, dropout, ranks[name]) for name in names}

    def update(
        self, name: str, base: nn.Module, init: torch.Generator | None, dropout: torch.Generator
    ) -> AdaLoRAUpdate:
        return self._update(name, base, init, dropout, self.first_rank)

    def _update(
        self, name: str, base: nn.Module, init: torch.Generator | None, dropout: torch.Generator, rank: int
    ) -> AdaLoRAUpdate:
        """Return the update of one linear with `rank` triplets: E is zero, Q and P have standard deviation 0.02.

        Without `init` Q and P are zero. The scaling follows `first_rank`, whatever the rank; if `first_rank` is above
        the linear's smaller side, a `UserError` is raised.
        """
        assert isinstance(base, nn.Linear)
        remedy = "It is one and a half times adapter.rank where it is not given." if self.init_rank is None else ""
        require_rank("init_rank", self.first_rank, name, base, remedy)
        lora_A, lora_B = torch.zeros(rank, base.in_features), torch.zeros(base.out_features, rank)
        if init is not None:
            lora_A.normal_(0.0, 0.02, generator=init)
            lora_B.normal_(0.0, 0.02, generator=init)
        scaling = self.alpha / (self.first_rank + 1e-5)
        device = base.weight.device
        return AdaLoRAUpdate(lora_A.to(device), lora_B.to(device), scaling, self.dropout, dropout)

    def peft_settings(self, updates: dict[str, Update]) -> dict[str, Any]:
        """Return PEFT's settings.

        `rank_pattern` marks as many of the `init_r` triplets of each module as pruning left, always the first ones.
        """
        return {
            "peft_type": "ADALORA",
            "init_r": self.first_rank,
            "target_r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "orth_reg_weight": self.orthogonality,
            "beta1": self.beta1,
            "beta2": self.beta2,
            "deltaT": self.interval,
            "total_step": 1,  # peft refuses a config without; no step is to come
            # peft makes `init_r` triplets, cuts them down to those marked and keeps the scaling of `init_r`.
            "rank_pattern": {
                f"{name}.lora_E": [i < update.rank for i in range(self.first_rank)] for name, update in updates.items()
            },
            "bias": "none",
        }

    # -- hooks --

    def penalty(self, updates: dict[str, Update]) -> Tensor | None:
        """Return γ · mean of ‖PᵀP − I‖_F and ‖QQᵀ − I‖_F over all modules' P and Q; None if γ (`orthogonality`) is 0.

        The norms are averaged and not squared, as in the authors' library and in peft; eq. 4 of the paper has the sum
        of their squares.
        """
        if not self.orthogonality:
            return None
        norms = [norm for update in _triplets(updates).values() for norm in update.distances_from_orthonormal()]
        return self.orthogonality * torch.stack(norms).mean()

    @torch.no_grad()
    def after_step(self, updates: dict[str, Update], step: int, steps: int) -> None:
        """Score the triplets with the gradients of this step, and prune at every `interval`-th step.

        The last allocation is at the last step before the final phase, whatever the interval. In the final phase
        nothing is scored, and E of the pruned triplets is set back to zero after every step.
        """
        triplets = _triplets(updates)
        warmup, last = self._phases(steps)
        if step > last:
            for update in triplets.values():
                update.mask()
            return
        for update in triplets.values():
            update.observe(self.beta1, self.beta2)
        if step == last or step % self.interval == 0:
            initial, target = self.first_rank * len(triplets), self.rank * len(triplets)
            budget = cubic_budget(step, steps, initial, target, warmup, steps - last)
            kept = keep_top({name: update.scores() for name, update in triplets.items()}, budget)
            for name, update in triplets.items():
                update.keep(kept[name])

    def ranks_final(self, step: int, steps: int) -> bool:
        return step >= self._phases(steps)[1]

    def _phases(self, steps: int) -> tuple[int, int]:
        """Return the last step before pruning and the step of the last allocation."""
        warmup, final = (int(round(share * steps, 6)) for share in (self.warmup, self.final))
        return warmup, steps - final


class AdaLoRAUpdate(Update):
    """scaling · P diag(E) Q, held in fp32 whatever the backbone's precision; E starts at zero.

    Args:
        lora_A: Q, (rank, in).
        lora_B: P, (out, rank).
        scaling: the factor s.
        dropout: probability with which an input feature of Q is dropped in training.
        generator: the member's random stream of dropout.
    """

    def __init__(
        self, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(lora_A)  # Q, (rank, in)
        self.lora_E = nn.Parameter(lora_A.new_zeros(len(lora_A), 1))  # E, (rank, 1)
        self.lora_B = nn.Parameter(lora_B)  # P, (out, rank)
        self.scaling = scaling
        self.dropout = dropout
        self.generator = generator
        self.rank = len(lora_A)
        self.kept = torch.ones(self.rank, dtype=torch.bool, device=lora_A.device)
        """Mask of the triplets that the last allocation kept, (rank,)."""
        self.sensitivity: dict[str, Tensor] = {}
        """Ī of every element, by parameter; empty before the first step."""
        self.uncertainty: dict[str, Tensor] = {}
        """Ū of every element, by parameter."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y + s · P diag(E) Q x, (B, T, out), with x dropped out in training."""
        if self.dropout and self.training:
            x = x * keep_mask(x, self.dropout, self.generator)
        low = F.linear(x, self.lora_A.to(x.dtype))  # (B, T, rank)
        low = low * (self.scaling * self.lora_E[:, 0]).to(x.dtype)
        return y + F.linear(low, self.lora_B.to(x.dtype))  # (B, T, out)

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.scaling * self.lora_B @ (self.lora_E * self.lora_A), bias  # (out, in)

    def distances_from_orthonormal(self) -> list[Tensor]:
        """Return ‖QQᵀ − I‖_F and ‖PᵀP − I‖_F."""
        eye = torch.eye(len(self.lora_A), dtype=self.lora_A.dtype, device=self.lora_A.device)  # (rank, rank)
        return [(self.lora_A @ self.lora_A.T - eye).norm(), (self.lora_B.T @ self.lora_B - eye).norm()]

    # -- scoring and pruning --

    @torch.no_grad()
    def observe(self, beta1: float, beta2: float) -> None:
        """Smooth the sensitivity of every element and its uncertainty with this step's gradients.

        I = |w ∂L/∂w|,  Ī ← β₁ Ī + (1 − β₁) I,  Ū ← β₂ Ū + (1 − β₂) |I − Ī|        eq. 8 to 10, from Ī = Ū = 0

        A parameter without a gradient has I = 0.
        """
        for name, p in self.named_parameters():
            now = torch.zeros_like(p) if p.grad is None else (p * p.grad).abs()
            smooth = self.sensitivity.setdefault(name, torch.zeros_like(p)).lerp_(now, 1 - beta1)
            self.uncertainty.setdefault(name, torch.zeros_like(p)).lerp_((now - smooth).abs(), 1 - beta2)

    def scores(self) -> Tensor:
        """Return each triplet's importance, (rank,): s(E_i) + mean of s over row i of Q + mean over column i of P.

        Eq. 7, with s = Ī Ū of each element, eq. 11. `observe` must have run before; pruned triplets are scored too.
        """
        s = {name: self.sensitivity[name] * self.uncertainty[name] for name in self.sensitivity}
        return s["lora_E"][:, 0] + s["lora_A"].mean(1) + s["lora_B"].mean(0)  # (rank,)

    def keep(self, kept: Tensor) -> None:
        """Set E of all triplets but those marked in `kept` (rank,) to zero, and `rank` to the number of those kept.

        A pruned triplet is still trained, and a later call may keep it.
        """
        self.kept = kept
        self.rank = int(kept.sum())
        self.mask()

    @torch.no_grad()
    def mask(self) -> None:
        """Set E to zero for the triplets that are pruned."""
        self.lora_E.masked_fill_(~self.kept[:, None], 0.0)

    # -- what is kept of it --

    def training_statistics(self) -> dict[str, Tensor]:
        sums = {f"sensitivity/{name}": tensor for name, tensor in self.sensitivity.items()}
        return {"kept": self.kept, **sums, **{f"uncertainty/{name}": t for name, t in self.uncertainty.items()}}

    def load_training_statistics(self, tensors: dict[str, Tensor]) -> None:
        """Load what `training_statistics` returned: the mask of kept triplets, which sets `rank`, and the statistics.

        Statistics that are not given stay as they are. After an error the mask and some statistics may be loaded.

        Raises:
            ValueError: a tensor has another shape, or the mask another type.
            KeyError: the mask is missing, or a statistic or parameter is unknown.
        """
        moved = {name: tensor.to(self.lora_A.device) for name, tensor in tensors.items()}
        kept, parameters = moved.pop("kept"), dict(self.named_parameters())
        if kept.shape != self.kept.shape or kept.dtype != torch.bool:
            raise ValueError("kept does not mark the triplets")
        self.kept = kept
        self.rank = int(self.kept.sum())
        for name, tensor in moved.items():
            statistic, _, parameter = name.partition("/")
            if tensor.shape != parameters[parameter].shape:
                raise ValueError(f"{name} has another shape")
            {"sensitivity": self.sensitivity, "uncertainty": self.uncertainty}[statistic][parameter] = tensor

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the kept triplets only, as peft saves them."""
        A, E, B = self.lora_A.detach(), self.lora_E.detach(), self.lora_B.detach()
        return {"lora_A": A[self.kept], "lora_E": E[self.kept], "lora_B": B[:, self.kept]}

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.lora_A[self.kept] = tensors["lora_A"].to(self.lora_A)
        self.lora_E[self.kept] = tensors["lora_E"].to(self.lora_E)
        self.lora_B[:, self.kept] = tensors["lora_B"].to(self.lora_B)


def _triplets(updates: dict[str, Update]) -> dict[str, AdaLoRAUpdate]:
    return cast("dict[str, AdaLoRAUpdate]", updates)
