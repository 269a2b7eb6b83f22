"""Any method of PEFT that changes single modules: PEFT's own layers, in the training loop of all other methods.

PEFT (https://github.com/huggingface/peft) makes a layer around each target, computes it, and writes and merges it. So
the mathematics is PEFT's; data, batches, optimizer, evaluation and record are those of every run. A method that is
written here as well has its plain name (`adapter=lora`) and is faster.

PEFT's initialisation and dropout draw from the member's own random streams. Its random projections and positions follow
from a seed in its settings, as PEFT has it. Its tensors are fp32 whatever the backbone's precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from lora_bench.adapters.peft import catalogue
from lora_bench.adapters.peft.injection import Frame, InjectedUpdate, inject
from lora_bench.adapters.targets import LinearAdapter, match_targets
from lora_bench.config.adapter_values import check_values
from lora_bench.errors import require

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lora_bench.adapters.base import Update
    from lora_bench.backbones.base import Backbone


@dataclass(frozen=True, kw_only=True)
class PEFT(LinearAdapter):
    """Settings of a method of PEFT. `target_modules` and `layers` mean the same as for every other method."""

    peft_type: str
    """PEFT's name of the method, such as `HIRA`; `lora-bench doctor` lists those of the installed version."""
    rank: int | None
    """The method's rank; null: PEFT's default. Refused if the method has none."""
    alpha: float | None
    """The method's alpha; null: PEFT's default. Refused if the method has none."""
    dropout: float | None
    """The method's dropout; null: PEFT's default. Refused if the method has none."""
    fields: dict[str, Any]
    """PEFT's names of `rank`, `alpha` and `dropout` where they are not the usual ones; null: the method has none."""
    settings: dict[str, Any]
    """Further settings of the method, by PEFT's names."""

    training_settings = LinearAdapter.training_settings | {"fields"}
    is_external = True
    is_in_peft_format = True

    def __post_init__(self) -> None:
        """Refuse an unknown method, settings that it does not have, and values out of range.

        Raises:
            UserError: naming the key; PEFT is imported for it, and may be missing.
        """
        super().__post_init__()
        check_values(vars(self))
        for key in self.fields:
            known = key in _MAPPED
            require(known, f"fields.{key}", self.fields[key], f"is none of {', '.join(_MAPPED)}")
        self.build_config()

    @property
    def mixes_positions(self) -> bool:  # type: ignore[override]
        return self.peft_type.upper() in catalogue.MIX_POSITIONS

    def build_config(self) -> Any:
        """Return PEFT's config of the method, without targets."""
        mapped = {key: getattr(self, key) for key in _MAPPED}
        settings = {str(name): value for name, value in self.settings.items() if value is not None}
        return catalogue.build_config(self.peft_type, mapped, self.fields, settings)

    def targets(self, backbone: Backbone) -> list[str]:
        """Return the names of the linears, or of the norms for a method that trains these."""
        if self.peft_type.upper() not in catalogue.ON_NORMS:
            return super().targets(backbone)
        return match_targets(backbone, self.target_modules, self.layers, catalogue.norms(backbone))

    def updates(
        self,
        backbone: Backbone,
        init: torch.Generator | None,
        dropout: torch.Generator,
        ranks: dict[str, int] | None = None,
    ) -> dict[str, Update]:
        """Return an update with PEFT's layer for every target; `ranks` is ignored.

        Raises:
            UserError: a target is quantised or a part of a fused linear, PEFT refuses it, or PEFT would write into a
                frozen weight.
        """
        config = self.build_config()
        frame = inject(backbone, config, self.targets(backbone), init)
        generator = dropout if catalogue.draws_in_training(config) else None
        seen: set[int] = set()
        return {
            name: InjectedUpdate(layer, frame, self.rank or 0, generator, seen) for name, layer in frame.layers.items()
        }

    def peft_settings(self, updates: dict[str, Update]) -> dict[str, Any]:
        """Return PEFT's config of the trained method, as it is written to `adapter_config.json`."""
        return catalogue.to_json(_frame(updates).peft_config["default"])

    def to_tensors(self, updates: dict[str, Update]) -> dict[str, Tensor]:
        return _frame(updates).to_tensors()

    def load_tensors(self, updates: dict[str, Update], tensors: dict[str, Tensor]) -> None:
        _frame(updates).load_tensors(tensors)

    def after_step(self, updates: dict[str, Update], step: int, steps: int) -> None:
        """Call PEFT's `update_and_allocate` of a method that chooses what it trains while it trains."""
        allocate = getattr(_frame(updates).base_model, "update_and_allocate", None)
        if allocate is not None:
            allocate(step)


_MAPPED = ("rank", "alpha", "dropout")
"""Settings that have one name for all methods here."""


def _frame(updates: dict[str, Update]) -> Frame:
    """Return the frame that all of a member's updates refer to."""
    return cast("InjectedUpdate", next(iter(updates.values()))).frame[0]
