"""What an adapter method is: settings, the update it puts beside a frozen linear, and the hooks that the loop calls.

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

from lora_bench.config import need_number

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lora_bench.adapters.pack import Pack
    from lora_bench.backbones.base import Backbone

    ParamGroup = dict[str, Any]


class Update(nn.Module, ABC):
    """One member's trainable change to one frozen linear."""

    rank: int

    @abstractmethod
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The adapted output, from the input x (B, T, in) and the frozen linear's output y (B, T, out).

        Methods that change the weight also say by how much: `delta_weight()`, (out, in), in fp32.
        """


@dataclass(frozen=True, kw_only=True)
class Adapter(ABC):
    """A method and its settings. One object serves one member of a pack."""

    method: str
    """The name of the module in `lora_bench/adapters/` that defines the method."""
    default_lr: float
    """The learning rate to start from where none is given."""

    trains_backbone = False
    """Whether the backbone's own weights are trained: such a method has no frozen backbone to share."""

    def __post_init__(self) -> None:
        need_number("default_lr", self.default_lr, 0, open_low=True)

    def targets(self, backbone: Backbone) -> list[str]:
        """Full names of the linears to adapt, in the order of computation."""
        return []

    def update(self, name: str, base: nn.Linear, init: torch.Generator, dropout: torch.Generator) -> Update:
        """The update for one target.

        Args:
            name: the linear's full name, for error messages.
            base: the frozen linear; never written to.
            init: random stream of the member's initialisation (on the CPU, so that devices agree).
            dropout: random stream of the member's dropout, on the base's device.
        """
        raise TypeError(f"{self.method} names targets and makes no update for them")

    def peft_settings(self) -> dict[str, Any]:
        """The method in peft's words (`peft_type`, `r`, …); empty where peft cannot express it."""
        return {}

    def prepare(self, pack: Pack, member: int, batches: Iterable[Any]) -> None:
        """Called once before the first step, with training batches to look at: for data-driven initialisation."""

    def param_groups(self, parameters: dict[str, nn.Parameter], lr: float, weight_decay: float) -> list[ParamGroup]:
        """Optimizer groups of the adapter's (not the head's) parameters; matrices decay, vectors don't."""
        matrices = [p for p in parameters.values() if p.ndim > 1]
        vectors = [p for p in parameters.values() if p.ndim <= 1]
        groups = [(matrices, weight_decay), (vectors, 0.0)]
        return [{"params": params, "lr": lr, "weight_decay": decay} for params, decay in groups if params]

    def penalty(self, updates: dict[str, Update]) -> Tensor | None:
        """A term to add to this member's loss, or None."""
        return None

    def before_step(self, updates: dict[str, Update], step: int, steps: int) -> None:
        """Called with fresh, clipped gradients, before the optimizer's update number `step` (from 1) of `steps`."""

    def after_step(self, updates: dict[str, Update], step: int, steps: int) -> None:
        """Called after the optimizer's update, before gradients are cleared."""
