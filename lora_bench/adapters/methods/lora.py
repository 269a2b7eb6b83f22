"""LoRA (Hu et al. 2021, arXiv 2106.09685) and what differs from it in one choice.

    h = W x + s · B A x        eq. 3, with A: (rank, in), B: (out, rank), W frozen

Each choice is an axis of its own, and they combine: how A and B begin (`init`, see init.py), the scaling s, where ranks
go (`allocation`, see allocation.py), a trained magnitude (DoRA), a rate of its own for B (LoRA+), a frozen A (LoRA-FA),
a quantised W (QLoRA, LoftQ). A published method that is one such choice is one YAML under conf/adapter/.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_bench.adapters.lowrank import allocation, calibration_batches
from lora_bench.adapters.lowrank import init as starts
from lora_bench.adapters.lowrank.linear import LowRank
from lora_bench.adapters.lowrank.quantization import KINDS, loftq, quantize
from lora_bench.adapters.targets import LinearAdapter, largest_rank, require_rank
from lora_bench.errors import Code, UserError, require, require_number, require_one_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lora_bench.adapters.base import ParamGroup, Update
    from lora_bench.adapters.pack.pack import Pack
    from lora_bench.backbones.base import Backbone
    from lora_bench.data.batching import Batch


@dataclass(frozen=True, kw_only=True)
class LoRA(LinearAdapter):
    """Settings of LoRA."""

    rank: int
    """Rank of every adapted linear; with an allocation, the mean over them."""
    alpha: float
    """Numerator of the scaling."""
    dropout: float
    """Probability with which an input feature of A is dropped in training."""
    scaling: str
    """`standard`: alpha / rank. `rank_stable`: alpha / √rank (rsLoRA, Kalajdzievski 2023, arXiv 2312.03732, eq. 5)."""
    init: str
    """How A and B begin: `kaiming`, `gaussian` (B at zero), or a name in init.py."""
    init_gamma: float | None
    """The damping γ of `lora_ga` and `lora_one`: the larger, the smaller the start."""
    allocation: Any
    """Where ranks go under the same total: `uniform`, `sensitivity`, `eva`, `gradient`, or a list of
    `expression=rank`, matched against full names; 0 leaves a linear as it is."""
    calibration_batches: int
    """Training batches that a data-driven start or allocation looks at."""
    magnitude: bool
    """Train the norms of the output rows apart from their directions (DoRA, Liu et al. 2024, arXiv 2402.09353)."""
    lr_ratio: float
    """Learning rate of B over that of A (LoRA+, Hayou et al. 2024, arXiv 2402.12354)."""
    weight_decay_B: float | None
    """Weight decay of B, which then does without `optimizer.weight_decay`: strong, it keeps the members of an ensemble
    near the backbone (Wang et al. 2023, arXiv 2310.00035); null: as of all else."""
    freeze_A: bool
    """Train B alone, its gradient corrected by (A Aᵀ)⁻¹ (LoRA-FA, Zhang et al. 2023, arXiv 2308.03303)."""
    quantize: str | None
    """Take the frozen weights quantised: `nf4`, `int8`, `int4`, `int2` (QLoRA, Dettmers et al. 2023, arXiv 2305.14314);
    null: as they are."""

    training_settings = LinearAdapter.training_settings | {"lr_ratio", "weight_decay_B", "calibration_batches"}

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("rank", self.rank, 1)
        require_number("alpha", self.alpha, 0, open_low=True)
        require(0 <= self.dropout < 1, "dropout", self.dropout, "must be at least 0 and below 1")
        require_one_of("scaling", self.scaling, tuple(_SCALINGS))
        require_one_of("init", self.init, starts.NAMES)
        require_number("calibration_batches", self.calibration_batches, 1)
        require_number("lr_ratio", self.lr_ratio, 0, open_low=True)
        if self.weight_decay_B is not None:
            require_number("weight_decay_B", self.weight_decay_B, 0)
        if self.quantize is not None:
            require_one_of("quantize", self.quantize, KINDS)
        if self.init_gamma is not None:
            require_number("init_gamma", self.init_gamma, 0, open_low=True)
        self._refuse_what_does_not_combine()

    def _refuse_what_does_not_combine(self) -> None:
        if isinstance(self.allocation, str):
            require(
                self.allocation != "adalora",
                "allocation",
                self.allocation,
                "prunes while it trains, which takes P diag(E) Q in the place of B A",
                "Take adapter=adalora.",
                code=Code.CONFLICT,
            )
            require_one_of("allocation", self.allocation, ("uniform", *_DATA_DRIVEN))
        else:
            listed = isinstance(self.allocation, list | tuple) and all(isinstance(r, str) for r in self.allocation)
            require(listed, "allocation", self.allocation, "is neither a name nor a list of expression=rank")
        damped = self.init in starts.DAMPED
        require(
            damped == (self.init_gamma is not None),
            "init_gamma",
            self.init_gamma,
            f"{'must be a number' if damped else 'means nothing'} with init={self.init}",
            "The papers' are 16 for lora_ga and 128 for lora_one; elsewhere it is null.",
            code=Code.CONFLICT,
        )
        require(
            self.init != "loftq" or self.quantize is not None,
            "init",
            self.init,
            "makes up for what quantisation takes away, and nothing is quantised",
            "Add adapter.quantize=nf4.",
            code=Code.CONFLICT,
        )
        require(
            not self.freeze_A or self.lr_ratio == 1,
            "lr_ratio",
            self.lr_ratio,
            "is a ratio to the rate of A, which freeze_A=true keeps from learning",
            "Set optimizer.lr instead.",
            code=Code.CONFLICT,
        )

    @property
    def factor(self) -> float:
        """s, the factor of B A."""
        return self.alpha / _SCALINGS[self.scaling](self.rank)

    def at_rank(self, rank: int) -> LoRA:
        """The same settings with another rank in one module; the scaling stays, so that a direction counts the same."""
        factor = _SCALINGS[self.scaling]
        return dataclasses.replace(self, rank=rank, alpha=self.alpha * factor(rank) / factor(self.rank))

    # -- making updates --

    def updates(
        self,
        backbone: Backbone,
        init: torch.Generator | None,
        dropout: torch.Generator,
        ranks: dict[str, int] | None = None,
    ) -> dict[str, Update]:
        linears = backbone.linears()
        names = self.targets(backbone)
        settings = self
        if ranks is None and isinstance(self.allocation, str):
            ranks = dict.fromkeys(names, self.rank)
            if self.allocation != "uniform":
                settings = dataclasses.replace(self, init="kaiming", init_gamma=None)  # made anew once ranks are known
        elif ranks is None:
            ranks = allocation.pattern(
                names, list(self.allocation), self.rank, {n: largest_rank(linears[n]) for n in names}
            )
        return {n: settings.at_rank(ranks[n]).update(n, linears[n], init, dropout) for n in names if ranks[n]}

    def update(self, name: str, base: nn.Module, init: torch.Generator | None, dropout: torch.Generator) -> LowRank:
        assert isinstance(base, nn.Linear)
        require_rank("rank", self.rank, name, base)
        zero_A, zero_B = torch.zeros(self.rank, base.in_features), torch.zeros(base.out_features, self.rank)
        made = LowRank(base, zero_A, zero_B, self.factor, self.dropout, dropout, freeze_A=self.freeze_A)
        self._begin(made, base, init)
        if self.magnitude:
            made.add_magnitude()
        return made

    def _begin(self, made: LowRank, base: nn.Linear, generator: torch.Generator | None) -> None:
        """The start that the frozen weight alone decides; data-driven ones come in `prepare`, on a Kaiming one."""
        if self.quantize:
            weight = base.weight.detach().float()
            if self.init == "loftq" and generator is not None:
                quantized, A, B = loftq(weight, self.rank, self.quantize, starts.LOFTQ_ITERATIONS)
                made.quantize_base(quantized)
                root = math.sqrt(self.factor)
                made.initialise(A / root, B / root, subtract=False)
                return
            made.quantize_base(quantize(weight, self.quantize))
        if generator is None:
            A, B = made.lora_A, made.lora_B
        elif self.init in starts.FROM_WEIGHT:
            A, B = starts.FROM_WEIGHT[self.init](made.frozen_weight().float(), self.rank, self.factor)
        else:
            A, B = starts.random_A(self.init, self.rank, base.in_features, generator), made.lora_B
        made.initialise(A, B, subtract=self.init in starts.SUBTRACTED)

    # -- looking at data before the first step --

    def prepare(self, pack: Pack, member: int, batches: Iterator[Batch]) -> str | None:
        allocates = isinstance(self.allocation, str) and self.allocation != "uniform"
        if not allocates and self.init not in starts.FROM_DATA:
            return None
        look = list(islice(batches, self.calibration_batches))
        needs = {starts.FROM_DATA.get(self.init), _DATA_DRIVEN.get(str(self.allocation))}
        if lacking := calibration_batches.explain_insufficient_data(look, member, of_labels="gradients" in needs):
            return f"adapter: {lacking}, so it begins with init=kaiming and allocation=uniform."
        moments = calibration_batches.input_moments(pack, member, look) if "moments" in needs else {}
        gradients = calibration_batches.weight_gradients(pack, member, look) if "gradients" in needs else {}
        try:
            if allocates:
                pack.set_ranks(member, self._allocate(pack, member, moments, gradients))
        except UserError as error:
            raise error.under("adapter") from None
        if self.init not in starts.FROM_DATA:
            return None
        for name, update in pack.updates[member].items():
            assert isinstance(update, LowRank)
            if self.init == "eva":
                update.initialise(starts.eva(moments[name], update.rank), update.lora_B, subtract=False)
            else:
                assert self.init_gamma is not None
                start = {"lora_ga": starts.lora_ga, "lora_one": starts.lora_one}[self.init]
                A, B = start(gradients[name], update.rank, self.factor, self.init_gamma)
                update.initialise(A, B, subtract=self.init in starts.SUBTRACTED)
        return None

    def _allocate(
        self, pack: Pack, member: int, moments: dict[str, Tensor], gradients: dict[str, Tensor]
    ) -> dict[str, int]:
        bases = {name: update.base[0] for name, update in pack.updates[member].items() if isinstance(update, LowRank)}
        caps = {name: largest_rank(base) for name, base in bases.items()}
        total = self.rank * len(bases)
        if self.allocation == "sensitivity":
            return allocation.sensitivity({name: m.diagonal() for name, m in moments.items()}, total, caps)
        if self.allocation == "eva":
            capped = {name: min(cap, starts.EVA_RHO * self.rank) for name, cap in caps.items()}
            return allocation.explained_variance(starts.explained_variance_ratios(moments), total, capped)
        # Each unit of rank in a low layer makes the backward pass run through all layers above it.
        depth = len(pack.backbone.layers)
        above = {name: depth - 1 - (pack.backbone.layer_of(name) or 0) for name in bases}
        costs = {name: float(base.in_features + base.out_features) for name, base in bases.items()}
        promised = {name: torch.linalg.svdvals(G) * (1 + above[name] / depth) ** -0.5 for name, G in gradients.items()}
        return allocation.gradient(promised, costs, self.rank * sum(costs.values()), caps)

    # -- in training --

    def param_groups(self, parameters: dict[str, nn.Parameter], lr: float, weight_decay: float) -> list[ParamGroup]:
        if self.lr_ratio == 1 and self.weight_decay_B is None:
            return super().param_groups(parameters, lr, weight_decay)
        of_B = {name: p for name, p in parameters.items() if name.endswith(".lora_B")}
        rest = {name: p for name, p in parameters.items() if name not in of_B}
        decay = weight_decay if self.weight_decay_B is None else self.weight_decay_B
        return super().param_groups(of_B, lr * self.lr_ratio, decay) + super().param_groups(rest, lr, weight_decay)

    def before_step(self, updates: dict[str, Update], step: int, steps: int) -> None:
        """With A frozen, the gradient of B that moves B A as full fine-tuning would: (1/s²) ∂L/∂B (A Aᵀ)⁻¹."""
        if not self.freeze_A:
            return
        for update in updates.values():
            assert isinstance(update, LowRank)
            if update.lora_B.grad is not None:
                A = update.lora_A
                gram = A @ A.T + 1e-8 * torch.eye(update.rank, device=A.device)  # (rank, rank)
                update.lora_B.grad = torch.linalg.solve(gram, update.lora_B.grad, left=False) / update.scaling**2

    # -- in peft's words --

    def peft_settings(self, updates: dict[str, Update]) -> dict[str, Any]:
        if self.quantize:
            return {}
        doubled = 2 if self.init in starts.SUBTRACTED else 1  # the start goes along as ranks of its own
        ranks = {name: doubled * update.rank for name, update in updates.items()}
        uniform = set(ranks.values()) <= {doubled * self.rank}
        plain = doubled == 1 and uniform
        settings: dict[str, Any] = {
            "peft_type": "LORA",
            "r": doubled * self.rank,
            "lora_alpha": self.alpha if plain else self.factor * doubled * self.rank,
            "lora_dropout": self.dropout,
            "bias": "none",
        }
        if plain and self.scaling == "rank_stable":
            settings["use_rslora"] = True
        if self.magnitude:
            settings["use_dora"] = True
        if not uniform:
            settings["rank_pattern"] = ranks
            settings["alpha_pattern"] = {name: self.factor * rank for name, rank in ranks.items()}
        return settings


_SCALINGS = {"standard": float, "rank_stable": math.sqrt}
# Allocations that look at data, and at what.
_DATA_DRIVEN = {"sensitivity": "moments", "eva": "moments", "gradient": "gradients"}
