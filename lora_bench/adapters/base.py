"""The interface of adapter methods: settings, the update beside a frozen linear, and the hooks that the loop calls.

The training loop calls every hook of every member unconditionally and never asks which method it has. A method whose
mathematics is LoRA's with another initialisation or scaling needs only a YAML; one with new mathematics needs a file
with one dataclass derived from `Adapter`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_bench.errors import require_number

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lora_bench.adapters.pack.pack import Pack
    from lora_bench.backbones.base import Backbone
    from lora_bench.data.batching import Batch

    ParamGroup = dict[str, Any]


class Update(nn.Module, ABC):
    """One member's trainable change to one frozen module, nearly always a linear.

    What is trained is a parameter, in fp32; what is frozen and belongs to the adapter (a start that is subtracted,
    random projections) is a persistent buffer and is saved with it.
    """

    rank: int = 0
    """Its rank; 0 where the method has none."""
    takes_output: bool = True
    """Whether `forward` takes the frozen module's output; else it makes its own from x (a quantised weight) and y is x.
    """

    @property
    def needs_weight(self) -> bool:
        """True if it computes with the frozen module's weight; False if it holds that weight in another form."""
        return True

    @abstractmethod
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the adapted output (B, T, out) from the input x (B, T, in) and the frozen output y (B, T, out)."""

    @abstractmethod
    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return weight (out, in) and bias (out,) of an equivalent plain linear, from the frozen ones, in fp32."""

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of an adapter file, with PEFT's names and meanings where PEFT has the method."""
        return self.state_dict()

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Load tensors that `to_tensors` returned."""
        self.load_state_dict(tensors)

    def training_statistics(self) -> dict[str, Tensor]:
        """Return statistics that a resumed training needs and an adapter file does not: saved in checkpoints only."""
        return {}

    def load_training_statistics(self, tensors: dict[str, Tensor]) -> None:
        """Load tensors that `training_statistics` returned."""


@dataclass(frozen=True, kw_only=True)
class Adapter(ABC):
    """A method and its settings. One object serves one member of a pack."""

    method: str
    """Its name: a module in `lora_bench/adapters/methods/`, or an entry point of an installed package."""
    default_lr: float
    """The learning rate to start from where none is given."""
    init_from: str | None
    """A finished run whose adapter initialises this one, of the same backbone, method and ranks.

    Its folder, name or id, or `hf://OWNER/NAME`, with or without `@REVISION`.
    """

    training_settings = frozenset({"default_lr", "init_from", "dropout"})
    """Settings that affect training only, not the meaning of saved tensors."""
    trains_backbone = False
    """Whether the backbone's own weights are trained: such a method has no frozen backbone to share."""
    is_external = False
    """True if layers of another library compute it: a sweep trains such runs one by one, without CUDA graphs."""
    mixes_positions = False
    """True if it averages over positions: the last layer then computes all of them."""
    is_in_peft_format = False
    """True if PEFT reads every tensor of its adapter file."""

    def __post_init__(self) -> None:
        require_number("default_lr", self.default_lr, 0, open_low=True)

    def targets(self, backbone: Backbone) -> list[str]:
        """Return the full names of the linears to adapt, in the order of computation."""
        return []

    def replaced_weights(self, backbone: Backbone) -> list[str]:
        """Return the names of linears whose weights the method holds in another form; the device needs no copy of them.

        `updates` reads such a weight within `backbone.loaded_weight`.
        """
        return []

    def update(self, name: str, base: nn.Module, init: torch.Generator | None, dropout: torch.Generator) -> Update:
        """Return the update for one target; a method with targets overrides this function or `updates`.

        Args:
            name: the module's full name, for error messages.
            base: the frozen module; never written to.
            init: random stream of the member's initialisation (on the CPU, so that devices agree); None where saved
                tensors are about to be put in, so that a costly start need not be computed.
            dropout: random stream of the member's dropout, on the base's device.

        Raises:
            UserError: the settings do not fit the module, for example a rank above its smaller side.
            TypeError: the method overrides neither.
        """
        raise TypeError(f"{self.method} names targets and makes no update for them")

    def updates(
        self,
        backbone: Backbone,
        init: torch.Generator | None,
        dropout: torch.Generator,
        ranks: dict[str, int] | None = None,
    ) -> dict[str, Update]:
        """Return the updates of all targets by module name; by default what `update` returns, whatever the ranks.

        Args:
            backbone: with its own modules in place.
            init, dropout: as for `update`.
            ranks: rank of each target where it is known already (an allocation, a saved adapter); a method whose ranks
                are all its own ignores it.
        """
        updates: dict[str, Update] = {}
        for name in self.targets(backbone):
            with backbone.loaded_weight(name):
                updates[name] = self.update(name, backbone.network.get_submodule(name), init, dropout)
        return updates

    def peft_settings(self, updates: dict[str, Update]) -> dict[str, Any]:
        """Return PEFT's settings of the trained method (`peft_type`, `r`, …); empty where PEFT has no such method."""
        return {}

    def to_tensors(self, updates: dict[str, Update]) -> dict[str, Tensor]:
        """Return the tensors of an adapter file for all updates, named `model.<module>.<tensor>`.

        A method whose updates share tensors overrides it and adds them, each once.
        """
        return {
            f"model.{name}.{key}": tensor
            for name, update in updates.items()
            for key, tensor in update.to_tensors().items()
        }

    def load_tensors(self, updates: dict[str, Update], tensors: dict[str, Tensor]) -> None:
        """Load tensors that `to_tensors` returned; names, shapes and finiteness are already checked."""
        for name, update in updates.items():
            prefix = f"model.{name}."
            update.load_tensors(
                {k.removeprefix(prefix): tensor for k, tensor in tensors.items() if k.startswith(prefix)}
            )

    def prepare(self, pack: Pack, member: int, batches: Iterator[Batch]) -> str | None:
        """Initialise from training batches and allocate ranks, once before the first step; by default do nothing.

        Returns:
            A sentence for the record where the batches are insufficient: why, and what was done instead; else None.
        """
        return None

    def param_groups(self, parameters: dict[str, nn.Parameter], lr: float, weight_decay: float) -> list[ParamGroup]:
        """Return optimizer groups of the adapter's (not the head's) parameters; matrices decay, vectors don't.

        A group without parameters is left out.
        """
        matrices = [p for p in parameters.values() if p.ndim > 1]
        vectors = [p for p in parameters.values() if p.ndim <= 1]
        groups = [(matrices, weight_decay), (vectors, 0.0)]
        return [{"params": params, "lr": lr, "weight_decay": decay} for params, decay in groups if params]

    def penalty(self, updates: dict[str, Update]) -> Tensor | None:
        """Return a term to add to this member's loss, or None."""
        return None

    def before_step(self, updates: dict[str, Update], step: int, steps: int) -> None:
        """Run with fresh, clipped gradients, before the optimizer's update number `step` (from 1) of `steps`."""

    def after_step(self, updates: dict[str, Update], step: int, steps: int) -> None:
        """Run after the optimizer's update, before gradients are cleared."""

    def ranks_final(self, step: int, steps: int) -> bool:
        """Return whether the tensors after update `step` may be kept as the best: not while ranks are being pruned.
        True at the last update."""
        return True
