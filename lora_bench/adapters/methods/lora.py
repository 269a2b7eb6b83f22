"""LoRA (Hu et al. 2021, arXiv 2106.09685) and the methods that differ from it in one choice.

    h = W x + s · B A x        eq. 3, with A: (rank, in), B: (out, rank), W frozen

Each choice is a setting of its own, and they combine: the initialisation of A and B (`init`, see lowrank/init.py), the
scaling s, the rank of each linear (`allocation`, see lowrank/allocation.py), a trained magnitude (DoRA), a learning
rate of its own for B (LoRA+), a frozen A (LoRA-FA), a quantised W (QLoRA, LoftQ). A published method that is one such
choice is one YAML under conf/adapter/.

A variant with another trained tensor is a subclass in a file of its own, which names the class of its layer:

    class GatedLowRank(LowRank):                      h = W x + s · B diag(g) A x
        def __init__(self, base, *arguments, **options):
            super().__init__(base, *arguments, **options)
            self.gate = nn.Parameter(torch.ones(self.rank, device=base.weight.device))

        def trained_factors(self):
            return self.lora_A, self.lora_B * self.gate

    @dataclass(frozen=True, kw_only=True)
    class GatedLoRA(LoRA):
        layer_class = GatedLowRank
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
from lora_bench.adapters.lowrank import init as inits
from lora_bench.adapters.lowrank.linear import LowRank
from lora_bench.adapters.lowrank.loftq import loftq
from lora_bench.adapters.targets import LinearAdapter, largest_rank, require_rank, require_ranks
from lora_bench.backbones.quantization import quantize
from lora_bench.config.adapter_values import check_values
from lora_bench.errors import UserError

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
    """Initialisation of A and B: `kaiming` or `gaussian` (B at zero), or a name in lowrank/init.py."""
    init_gamma: float | None
    """The damping γ of `lora_ga` and `lora_one`: the larger, the smaller the initial A and B."""
    allocation: Any
    """Distribution of ranks under the same total: `uniform`, `sensitivity`, `eva`, `gradient`, or a list of
    `expression=rank`, matched against full names; a linear of rank 0 is not adapted."""
    calibration_batches: int
    """Training batches that a data-driven initialisation or allocation reads."""
    magnitude: bool
    """Train the norms of the output rows apart from their directions (DoRA, Liu et al. 2024, arXiv 2402.09353)."""
    lr_ratio: float
    """Learning rate of B over that of A (LoRA+, Hayou et al. 2024, arXiv 2402.12354)."""
    weight_decay_B: float | None
    """Weight decay of B, in place of `optimizer.weight_decay`: a strong one keeps the members of an ensemble near the
    backbone (Wang et al. 2023, arXiv 2310.00035); null: `optimizer.weight_decay`."""
    freeze_A: bool
    """Train B alone, its gradient corrected by (A Aᵀ)⁻¹ (LoRA-FA, Zhang et al. 2023, arXiv 2308.03303)."""
    quantize: str | None
    """Hold the weights of the adapted linears quantised, with the adapter: `nf4`, `int8`, `int4`, `int2` (QLoRA,
    Dettmers et al. 2023, arXiv 2305.14314); null: as the backbone holds them (`model.quantize`)."""

    training_settings = LinearAdapter.training_settings | {"lr_ratio", "weight_decay_B", "calibration_batches"}
    layer_class = LowRank
    """The update of one linear; a variant names a subclass."""

    def __post_init__(self) -> None:
        """Refuse values out of range, unknown names and contradictory settings, with keys relative to `adapter`."""
        super().__post_init__()
        check_values(vars(self))

    @property
    def factor(self) -> float:
        """The scaling s of B A."""
        return self.alpha / _SCALINGS[self.scaling](self.rank)

    def at_rank(self, rank: int) -> LoRA:
        """Return the same settings with another rank and the same scaling s, so that a direction counts the same."""
        divisor = _SCALINGS[self.scaling]
        return dataclasses.replace(self, rank=rank, alpha=self.alpha * divisor(rank) / divisor(self.rank))

    # -- building updates --

    def replaced_weights(self, backbone: Backbone) -> list[str]:
        """Return the targets if they are quantised, else nothing."""
        return self.targets(backbone) if self.quantize else []

    def updates(
        self,
        backbone: Backbone,
        init: torch.Generator | None,
        dropout: torch.Generator,
        ranks: dict[str, int] | None = None,
    ) -> dict[str, Update]:
        """Return the update of every target whose rank is above 0, by module name.

        With a data-driven allocation and no `ranks`, every update has the rank `rank` and `init=kaiming`: `prepare`
        replaces them.

        Args:
            backbone, init, dropout: as in `Adapter.updates`.
            ranks: rank of each target; None: `rank` for all, or the rules of `allocation`.

        Raises:
            UserError: a rule is not valid, a rank is missing, or one exceeds the smaller side of its linear.
        """
        linears = backbone.linears()
        names = self.targets(backbone)
        settings = self
        if ranks is None and isinstance(self.allocation, str):
            ranks = dict.fromkeys(names, self.rank)
            if self.allocation != "uniform":  # they are rebuilt once the ranks are known
                settings = dataclasses.replace(self, init="kaiming", init_gamma=None)
        elif ranks is None:
            caps = {name: largest_rank(linears[name]) for name in names}
            ranks = allocation.pattern(names, list(self.allocation), self.rank, caps)
        require_ranks(ranks, names)
        updates: dict[str, Update] = {}
        for name in names:
            if ranks[name]:
                with backbone.loaded_weight(name):
                    updates[name] = settings.at_rank(ranks[name]).update(name, linears[name], init, dropout)
        return updates

    def update(self, name: str, base: nn.Module, init: torch.Generator | None, dropout: torch.Generator) -> LowRank:
        """Return the update of one linear at `rank`, initialised, and with a magnitude and a quantised base if set.

        With `init=None` A and B are zero. A rank above the linear's smaller side is a `UserError`.
        """
        assert isinstance(base, nn.Linear)
        require_rank("rank", self.rank, name, base)
        zero_A, zero_B = torch.zeros(self.rank, base.in_features), torch.zeros(base.out_features, self.rank)
        update = self.layer_class(base, zero_A, zero_B, self.factor, self.dropout, dropout, freeze_A=self.freeze_A)
        self._initialise(update, base, init)
        if self.magnitude:
            update.add_magnitude()
        return update

    def _initialise(self, update: LowRank, base: nn.Linear, generator: torch.Generator | None) -> None:
        """Quantise the frozen weight if set, and initialise A and B from it or at random.

        A data-driven initialisation follows in `prepare`; until then A is Kaiming-uniform and B zero. Without a
        generator A and B stay as they are (zero), for saved tensors to be loaded.
        """
        if self.quantize:
            weight = base.weight.detach().float()
            if self.init == "loftq" and generator is not None:
                quantized, A, B = loftq(weight, self.rank, self.quantize, inits.LOFTQ_ITERATIONS)
                update.quantize_base(quantized)
                root = math.sqrt(self.factor)
                update.initialise(A / root, B / root, subtract=False)
                return
            update.quantize_base(quantize(weight, self.quantize))
        if generator is None:
            A, B = update.lora_A, update.lora_B
        elif self.init in inits.FROM_WEIGHT:
            A, B = inits.FROM_WEIGHT[self.init](update.frozen_weight().float(), self.rank, self.factor)
        else:
            A, B = inits.random_A(self.init, self.rank, base.in_features, generator), update.lora_B
        update.initialise(A, B, subtract=self.init in inits.SUBTRACTED)

    # -- data-driven initialisation and allocation --

    def prepare(self, pack: Pack, member: int, batches: Iterator[Batch]) -> str | None:
        """Assign data-driven ranks, then initialise A and B from data; do nothing if neither setting is data-driven.

        Up to `calibration_batches` batches are read. New ranks replace the member's updates in the pack.

        Returns:
            None, or a sentence for the record: the batches are insufficient, and the updates keep their ranks, their
                random A and zero B; or the step of `lora_one` was shortened.

        Raises:
            UserError: ranks cannot be assigned, for example because all gradients are zero.
        """
        allocates = isinstance(self.allocation, str) and self.allocation != "uniform"
        if not allocates and self.init not in inits.FROM_DATA:
            return None
        calibration = list(islice(batches, self.calibration_batches))
        statistics = {inits.FROM_DATA.get(self.init), _DATA_DRIVEN.get(str(self.allocation))}
        reason = calibration_batches.explain_insufficient_data(
            calibration, member, reads_labels="gradients" in statistics
        )
        if reason:
            return f"adapter: {reason}, so it is initialised with init=kaiming and allocation=uniform."
        moments = calibration_batches.input_moments(pack, member, calibration) if "moments" in statistics else {}
        before, gradients = math.nan, dict[str, Tensor]()
        if "gradients" in statistics:
            before, gradients = calibration_batches.weight_gradients(pack, member, calibration)
        try:
            if allocates:
                pack.set_ranks(member, self._allocate(pack, member, moments, gradients))
        except UserError as error:
            raise error.under("adapter") from None
        if self.init not in inits.FROM_DATA:
            return None
        self._initialise_from_data(pack.updates[member], moments, gradients)
        return self._shorten_step(pack, member, calibration, before) if self.init == "lora_one" else None

    def _shorten_step(self, pack: Pack, member: int, calibration: list[Batch], before: float) -> str | None:
        """Take a quarter of the first step, B A of `lora_one`, until it does not raise the loss of these batches.

        One length cannot suit every model: a step that MiniLM takes well raises the loss of Gemma 3 270M from 0.7 to
        15 (LOG.md). After `SHORTENINGS` quarters it stays as it is.

        Returns:
            A sentence for the record; None if the whole step is taken.
        """
        after = first = calibration_batches.mean_loss(pack, member, calibration)
        quarters = 0
        while not after <= before and quarters < inits.SHORTENINGS:
            quarters += 1
            for update in pack.updates[member].values():
                assert isinstance(update, LowRank)
                update.initialise(update.lora_A / 2, update.lora_B / 2, subtract=False)
            after = calibration_batches.mean_loss(pack, member, calibration)
        if not quarters:
            return None
        raised = f"the whole first step of init={self.init} raises the loss from {before:.3g} to {first:.3g}"
        return f"adapter: {raised}, so it is 1/{4**quarters} as long."

    def _initialise_from_data(
        self, updates: dict[str, Update], moments: dict[str, Tensor], gradients: dict[str, Tensor]
    ) -> None:
        """Set A and B of each update: by `lora_ga` or `lora_one` from gradients, or A alone by `eva` from moments."""
        for name, update in updates.items():
            assert isinstance(update, LowRank)
            if self.init == "eva":
                update.initialise(inits.eva(moments[name], update.rank), update.lora_B, subtract=False)
            else:
                assert self.init_gamma is not None
                factors_of = {"lora_ga": inits.lora_ga, "lora_one": inits.lora_one}[self.init]
                A, B = factors_of(gradients[name], update.rank, self.factor, self.init_gamma)
                update.initialise(A, B, subtract=self.init in inits.SUBTRACTED)

    def _allocate(
        self, pack: Pack, member: int, moments: dict[str, Tensor], gradients: dict[str, Tensor]
    ) -> dict[str, int]:
        """Return the rank of each adapted linear by a data-driven `allocation`; 0 for one that is not to be adapted.

        `sensitivity` and `eva` read the moments and give out `rank` per linear on average, `eva` at most twice that to
        one. `gradient` reads the gradients and gives out at most as many parameters as rank `rank` for all has; its
        singular values count less the lower the layer, since the backward pass must reach it.

        Raises:
            UserError: the statistics are not finite, or no allocation is possible.
        """
        bases = {name: update.base[0] for name, update in pack.updates[member].items() if isinstance(update, LowRank)}
        caps = {name: largest_rank(base) for name, base in bases.items()}
        total = self.rank * len(bases)
        if self.allocation == "sensitivity":
            return allocation.sensitivity({name: m.diagonal() for name, m in moments.items()}, total, caps)
        if self.allocation == "eva":
            capped = {name: min(cap, inits.EVA_RHO * self.rank) for name, cap in caps.items()}
            return allocation.explained_variance(inits.explained_variance_ratios(moments), total, capped)
        # Each unit of rank in a low layer makes the backward pass run through all layers above it.
        depth = len(pack.backbone.layers)
        above = {name: depth - 1 - (pack.backbone.layer_of(name) or 0) for name in bases}
        costs = {name: float(base.in_features + base.out_features) for name, base in bases.items()}
        gains = {name: torch.linalg.svdvals(G) * (1 + above[name] / depth) ** -0.5 for name, G in gradients.items()}
        return allocation.gradient(gains, costs, self.rank * sum(costs.values()), caps)

    # -- training --

    def param_groups(self, parameters: dict[str, nn.Parameter], lr: float, weight_decay: float) -> list[ParamGroup]:
        """Return the groups of `Adapter.param_groups`; B has its own, first, if its learning rate or decay differs."""
        if self.lr_ratio == 1 and self.weight_decay_B is None:
            return super().param_groups(parameters, lr, weight_decay)
        of_B = {name: p for name, p in parameters.items() if name.endswith(".lora_B")}
        rest = {name: p for name, p in parameters.items() if name not in of_B}
        decay = weight_decay if self.weight_decay_B is None else self.weight_decay_B
        return super().param_groups(of_B, lr * self.lr_ratio, decay) + super().param_groups(rest, lr, weight_decay)

    def before_step(self, updates: dict[str, Update], step: int, steps: int) -> None:
        """Correct the gradient of B if `freeze_A` is set, so that B A moves as in full fine-tuning; else do nothing.

        It becomes (1/s²) ∂L/∂B (A Aᵀ)⁻¹ (LoRA-FA).
        """
        if not self.freeze_A:
            return
        for update in updates.values():
            assert isinstance(update, LowRank)
            if update.lora_B.grad is not None:
                A = update.lora_A
                gram = A @ A.T + 1e-8 * torch.eye(update.rank, device=A.device)  # (rank, rank)
                update.lora_B.grad = torch.linalg.solve(gram, update.lora_B.grad, left=False) / update.scaling**2

    # -- in PEFT's terms --

    def peft_settings(self, updates: dict[str, Update]) -> dict[str, Any]:
        """Return PEFT's settings of the LoRA that `to_tensors` writes.

        They are empty if PEFT cannot express it: with a quantised weight, or a variant with another forward pass. A
        subtracted initialisation has twice the rank, and an alpha for the same scaling. Ranks that differ are given by
        module, with an alpha for each.
        """
        products = all(isinstance(update, LowRank) and update.is_product for update in updates.values())
        if self.quantize or not products:
            return {}
        doubled = 2 if self.init in inits.SUBTRACTED else 1  # the subtracted A₀ and B₀ are saved as further ranks
        ranks = {name: doubled * update.rank for name, update in updates.items()}
        uniform = set(ranks.values()) <= {doubled * self.rank}
        standard = doubled == 1 and uniform
        settings: dict[str, Any] = {
            "peft_type": "LORA",
            "r": doubled * self.rank,
            "lora_alpha": self.alpha if standard else self.factor * doubled * self.rank,
            "lora_dropout": self.dropout,
            "bias": "none",
        }
        if standard and self.scaling == "rank_stable":
            settings["use_rslora"] = True
        if self.magnitude:
            settings["use_dora"] = True
        if not uniform:
            settings["rank_pattern"] = ranks
            settings["alpha_pattern"] = {name: self.factor * rank for name, rank in ranks.items()}
        return settings


_SCALINGS = {"standard": float, "rank_stable": math.sqrt}
# Data-driven allocations, with the statistics that they read.
_DATA_DRIVEN = {"sensitivity": "moments", "eva": "moments", "gradient": "gradients"}
