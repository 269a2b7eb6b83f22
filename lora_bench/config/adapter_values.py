"""Values of the settings of adapter methods, checked by name, without the class of the method.

Every class needs torch, whose import takes seconds; a wrong value is refused before that. A name has one meaning in all
methods of this package. What depends on the model or on PEFT is checked by the class.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_bench.config.schema import QUANT_BITS
from lora_bench.errors import Code, UserError, require, require_number, require_one_of

if TYPE_CHECKING:
    from collections.abc import Mapping

SCALINGS = ("standard", "rank_stable")
"""Values of `scaling`."""
INITS = ("kaiming", "gaussian", "pissa", "milora", "olora", "loftq", "eva", "lora_ga", "lora_one")
"""Values of `init`."""
DAMPED_INITS = ("lora_ga", "lora_one")
"""The initialisations that need `init_gamma`."""
ALLOCATIONS = ("uniform", "sensitivity", "eva", "gradient")
"""Values of `allocation` that are names."""
QUANTIZATIONS = tuple(QUANT_BITS)
"""Values of `quantize`."""

LAYERS_REMEDY = "For example adapter.layers=top:2 or 'adapter.layers=[0,1]'."


@dataclass(frozen=True)
class Number:
    """Type and range of a number; with `open_low` it is above `low`."""

    kind: type[int] | type[float]
    low: float
    high: float = math.inf
    open_low: bool = False

    def check(self, key: str, value: Any) -> None:
        """Refuse a value of another type, or out of range."""
        require_number(key, _as_number(self.kind, key, value), self.low, self.high, open_low=self.open_low)


_POSITIVE = Number(float, 0, open_low=True)
_COUNT = Number(int, 1)
_SHARE = Number(float, 0, 1)
_DECAY = Number(float, 0, 0.999999)
NUMBERS = {
    "default_lr": _POSITIVE,
    "rank": _COUNT,
    "init_rank": _COUNT,
    "alpha": _POSITIVE,
    "init_gamma": _POSITIVE,
    "calibration_batches": _COUNT,
    "lr_ratio": _POSITIVE,
    "weight_decay_B": Number(float, 0),
    "d_initial": _POSITIVE,  # beside b = 0, d = 0 would never get a gradient (VeRA)
    "orthogonality": Number(float, 0),
    "beta1": _DECAY,
    "beta2": _DECAY,
    "warmup": _SHARE,
    "final": _SHARE,
    "interval": _COUNT,
}
CHOICES = {"scaling": SCALINGS, "init": INITS, "quantize": QUANTIZATIONS}


def check_values(settings: Mapping[str, Any]) -> None:
    """Refuse a value of a wrong type or out of range, and contradictions; a name that is not known here passes.

    Args:
        settings: of an adapter method, by name, as composed or as converted.

    Raises:
        UserError: for the first wrong value; its key is the name of the setting.
    """
    for key, value in settings.items():
        if key == "allocation":
            _check_allocation(value)
        elif key == "layers":
            _check_layers(value)
        elif value is None:  # whether the setting may be null, the class says
            continue
        elif key in NUMBERS:
            NUMBERS[key].check(key, value)
        elif key in CHOICES:
            require_one_of(key, value, CHOICES[key])
        elif key == "dropout":
            probability = _as_number(float, key, value)
            require(0 <= probability < 1, key, probability, "must be at least 0 and below 1")
    _check_combinations(settings)


def _check_combinations(settings: Mapping[str, Any]) -> None:
    """Refuse settings that contradict each other; each value is right by itself.

    `init_gamma` must be set exactly for `DAMPED_INITS`; `init=loftq` needs `quantize`; `freeze_A` excludes an
    `lr_ratio`; AdaLoRA's `init_rank` is at least `rank`, and its phases leave steps to prune in.
    """
    init = settings.get("init")
    if init is not None and "init_gamma" in settings:
        gamma, is_damped = settings["init_gamma"], init in DAMPED_INITS
        reason = f"{'must be a number' if is_damped else 'has no meaning'} with init={init}"
        remedy = "The papers take 16 for lora_ga and 128 for lora_one; with any other init it is null."
        require(is_damped == (gamma is not None), "init_gamma", gamma, reason, remedy, code=Code.CONFLICT)
    if init == "loftq" and "quantize" in settings:
        reason, remedy = "corrects the error of quantisation, and adapter.quantize is null", "Add adapter.quantize=nf4."
        require(settings["quantize"] is not None, "init", init, reason, remedy, code=Code.CONFLICT)
    if settings.get("freeze_A") is True and (ratio := settings.get("lr_ratio")) is not None:
        reason = "is a ratio to the learning rate of A, which freeze_A=true does not train"
        require(float(ratio) == 1, "lr_ratio", ratio, reason, "Set optimizer.lr instead.", code=Code.CONFLICT)
    first, rank = settings.get("init_rank"), settings.get("rank")
    if first is not None and rank is not None:
        reason = f"is below rank={rank}, the average that pruning is to end with"
        require(int(first) >= int(rank), "init_rank", first, reason, code=Code.CONFLICT)
    warmup, final = settings.get("warmup"), settings.get("final")
    if warmup is not None and final is not None:
        reason = f"leaves no steps to prune in after warmup={float(warmup):g}"
        remedy = "The two shares must add up to less than 1."
        require(float(warmup) + float(final) < 1, "final", final, reason, remedy, code=Code.CONFLICT)


def _as_number(kind: type[int] | type[float], key: str, value: Any) -> float:
    """Return a value as a number; a text is one if it can be read as one. Another value is a `UserError`."""
    is_whole = kind is int
    try:
        if type(value) in ((int, str) if is_whole else (int, float, str)):
            return kind(value)
    except (ValueError, OverflowError):
        pass
    raise UserError(
        "is not a whole number" if is_whole else "is not a number", key=key, value=value, code=Code.INVALID_VALUE
    )


def _check_allocation(value: Any) -> None:
    """Refuse an allocation that is neither a known name nor a list of texts; its rules are parsed with the backbone."""
    if not isinstance(value, str):
        is_list = isinstance(value, list | tuple) and all(isinstance(rule, str) for rule in value)
        require(is_list, "allocation", value, "is neither a name nor a list of expression=rank")
        return
    reason = "prunes ranks during training, which needs P diag(E) Q in place of B A"
    require(value != "adalora", "allocation", value, reason, "Take adapter=adalora.", code=Code.CONFLICT)
    require_one_of("allocation", value, ALLOCATIONS)


def _check_layers(value: Any) -> None:
    """Refuse layers of a wrong type; which layers there are, the backbone says later."""
    is_list = isinstance(value, list | tuple) and all(type(number) is int for number in value)
    reason = "is neither all, nor top:n, nor a list of layer numbers"
    require(isinstance(value, str) or is_list, "layers", value, reason, LAYERS_REMEDY)
