"""The space of a search: the keys that vary, written as Hydra's sweeps are.

    adapter=lora,dora                               choices
    adapter.rank=2,4,8,16                           numbers: neighbours are taken to be similar
    adapter.dropout=interval(0,0.3)                 any number from 0 to 0.3
    optimizer.lr=tag(log,interval(1e-4,1e-2))       any number, each order of magnitude as often as any other

A key that only some of the methods in `adapter=…` have is left out for the other methods.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lora_bench.config.keys import split_override
from lora_bench.errors import Code, UserError, require

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hydra.core.override_parser.types import Override
    from optuna.trial import Trial as OptunaTrial

METHOD_KEY = "adapter"
"""The key that decides which other keys a job has."""
SEARCHED_GROUPS = ("adapter", "optimizer", "trainer", "head", "model", "ensemble")
SEARCHED_DATA = tuple(f"data.{name}" for name in ("max_length", "truncation", "augment", "augment_share", "intensity"))
"""Groups and keys that a search may vary. The other keys decide what is measured, or are chance, as the seed is."""
NOT_SEARCHED = ("trainer.main_metric",)
SHARED_GROUPS = ("model", "data", "trainer")
SHARED_KEYS = ("adapter.layers",)
"""Groups and keys that are equal for all trials of a pack, since they train on one backbone with one prefix."""
GRID_VALUES = 4
"""Number of values that a grid would have in place of an interval."""


@dataclass(frozen=True)
class Choices:
    """A key with a list of values, as the texts of overrides; numbers are in ascending order."""

    key: str
    texts: tuple[str, ...]
    numbers: tuple[float, ...] = ()
    """The values as numbers; empty if they are not all numbers."""

    @property
    def probes(self) -> tuple[str, ...]:
        """Values that have to be valid for the whole dimension to be so."""
        return self.texts

    @property
    def grid_values(self) -> int:
        """Number of values that a grid has for this key."""
        return len(self.texts)

    @property
    def distribution(self) -> Any:
        """The distribution for Optuna: over positions in the list if they are numbers, else over the texts."""
        from optuna.distributions import CategoricalDistribution, IntDistribution

        return IntDistribution(0, len(self.texts) - 1) if self.numbers else CategoricalDistribution(self.texts)

    def suggest(self, trial: OptunaTrial) -> str:
        """Return the value that Optuna suggests."""
        if not self.numbers:
            return str(trial.suggest_categorical(self.key, self.texts))
        return self.texts[trial.suggest_int(self.key, 0, len(self.texts) - 1)]

    def parameter(self, text: str) -> str | int | None:
        """Return Optuna's parameter for a value; None if it is not one of the values."""
        if text not in self.texts:
            return None
        return self.texts.index(text) if self.numbers else text

    def nearest(self, value: object) -> str | int | None:
        """Return Optuna's parameter for the value that is nearest to this one; None without a similar one."""
        if not self.numbers:
            return self.parameter(str(value))
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        return min(range(len(self.numbers)), key=lambda i: _distance(self.numbers[i], value))


@dataclass(frozen=True)
class Interval:
    """A key with all numbers from `low` to `high`."""

    key: str
    low: float
    high: float
    is_log: bool
    """Orders of magnitude are sampled uniformly, not numbers."""
    is_integer: bool = False

    @property
    def probes(self) -> tuple[str, ...]:
        """The values at the ends."""
        return self._text(self.low), self._text(self.high)

    @property
    def grid_values(self) -> int:
        """Number of values that a grid would have for this key: at most `GRID_VALUES`."""
        return min(GRID_VALUES, int(self.high - self.low) + 1) if self.is_integer else GRID_VALUES

    @property
    def distribution(self) -> Any:
        """The distribution for Optuna."""
        from optuna.distributions import FloatDistribution, IntDistribution

        if self.is_integer:
            return IntDistribution(int(self.low), int(self.high), log=self.is_log)
        return FloatDistribution(self.low, self.high, log=self.is_log)

    def suggest(self, trial: OptunaTrial) -> str:
        """Return the value that Optuna suggests, with four significant digits."""
        if self.is_integer:
            return self._text(trial.suggest_int(self.key, int(self.low), int(self.high), log=self.is_log))
        return self._text(trial.suggest_float(self.key, self.low, self.high, log=self.is_log))

    def parameter(self, text: str) -> float | int | None:
        """Return Optuna's parameter for a value; None if it is not in the interval."""
        try:
            value = int(text) if self.is_integer else float(text)
        except ValueError:
            return None
        return value if self.low <= value <= self.high else None

    def nearest(self, value: object) -> float | int | None:
        """Return the number of the interval that is nearest to this value; None if it is not a number."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        inside = min(max(value, self.low), self.high)
        return round(inside) if self.is_integer else float(inside)

    def _text(self, value: float) -> str:
        if self.is_integer:
            return str(int(value))
        rounded = f"{value:.4g}"
        return rounded if self.low <= float(rounded) <= self.high else repr(float(value))


Dimension = Choices | Interval


@dataclass(frozen=True)
class SearchSpace:
    """The keys of a search with their values, and the defaults of each method."""

    dimensions: tuple[Dimension, ...]
    """The method, if it varies, is the first one."""
    defaults: Mapping[str, Mapping[str, Any]]
    """By method the configured values of the keys that it has; one method "" if the method does not vary."""

    @property
    def shared_keys(self) -> list[str]:
        """The keys whose values are equal for all trials of a pack."""
        keys = [dimension.key for dimension in self.dimensions]
        return [key for key in keys if key in SHARED_KEYS or key.split(".")[0] in SHARED_GROUPS]

    @property
    def grid_size(self) -> int:
        """The number of settings of a grid over the space."""
        return sum(
            math.prod(d.grid_values for d in self.of_method(method) if d.key != METHOD_KEY) for method in self.defaults
        )

    def of_method(self, method: str) -> list[Dimension]:
        """Return the dimensions that a method has."""
        return [d for d in self.dimensions if d.key == METHOD_KEY or d.key in self.defaults[method]]

    def suggest(self, trial: OptunaTrial) -> list[str]:
        """Return the overrides of the setting that Optuna suggests."""
        method, overrides = "", []
        for dimension in self.dimensions:
            if dimension.key == METHOD_KEY or dimension.key in self.defaults[method]:
                text = dimension.suggest(trial)
                method = text if dimension.key == METHOD_KEY else method
                overrides.append(f"{dimension.key}={text}")
        return overrides

    def parameters(self, setting: Sequence[str]) -> dict[str, Any] | None:
        """Return Optuna's parameters of a setting; None if it is not in the space."""
        values = dict(map(split_override, setting))
        method = values.get(METHOD_KEY, "") if METHOD_KEY in (d.key for d in self.dimensions) else ""
        if method not in self.defaults or set(values) != {d.key for d in self.of_method(method)}:
            return None
        parameters = {d.key: d.parameter(values[d.key]) for d in self.of_method(method)}
        return None if None in parameters.values() else parameters

    def distributions(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Return the distribution of each parameter."""
        return {d.key: d.distribution for d in self.dimensions if d.key in parameters}

    def default_parameters(self, method: str) -> dict[str, Any]:
        """Return Optuna's parameters of the setting nearest to a method's defaults, without keys that have none."""
        nearest = {d.key: d.nearest(self.defaults[method].get(d.key)) for d in self.of_method(method)}
        chosen = {METHOD_KEY: method} if method else {}
        return {key: value for key, value in (nearest | chosen).items() if value is not None}


def split_overrides(overrides: Sequence[Override]) -> tuple[list[str], dict[str, Dimension]]:
    """Return the overrides with one value, as they are typed, and the dimensions of the other ones by key.

    Of several overrides of one key the last counts.

    Raises:
        UserError: a key with several values is one that a search may not vary, or its values are empty or no numbers.
    """
    last = {override.key_or_group: override for override in overrides}
    fixed, dimensions = [], {}
    for key, override in last.items():
        if override.is_sweep_override():
            _check_key(key)
            dimensions[key] = _read_dimension(override)
        elif override.is_delete():
            fixed.append(override.get_key_element())
        else:
            fixed.append(f"{override.get_key_element()}={override.get_value_element_as_str()}")
    return fixed, {key: dimensions[key] for key in sorted(dimensions, key=lambda key: key != METHOD_KEY)}


def with_types(dimension: Dimension, default: object) -> Dimension:
    """Return an interval as one of integers if the default of its key is an integer; choices are unchanged.

    Without a default it is one of integers if both ends are.
    """
    if isinstance(dimension, Choices):
        return dimension
    ends = (dimension.low, dimension.high)
    is_whole = all(isinstance(end, int) if default is None else end == int(end) for end in ends)
    return replace(dimension, is_integer=is_whole and (default is None or type(default) is int))


def _check_key(key: str) -> None:
    """Refuse a key that a search may not vary.

    Raises:
        UserError: naming the key.
    """
    if (key.split(".")[0] in SEARCHED_GROUPS or key in SEARCHED_DATA) and key not in NOT_SEARCHED:
        return
    reason = "has several values, and a search compares settings on one task, one metric and one seed"
    remedy = "Give it one value, or sweep over it with lora-bench train -m."
    raise UserError(reason, key=key, remedy=remedy, code=Code.UNSUPPORTED)


def _read_dimension(override: Override) -> Dimension:
    """Return the dimension that an override with several values describes.

    Raises:
        UserError: it has no values, or is an interval with a wrong tag or ends.
    """
    key = override.key_or_group
    if override.is_interval_sweep():
        return _read_interval(key, override)
    elements = dict(zip(override.sweep_string_iterator(), override.sweep_iterator(), strict=True))
    require(bool(elements), key, override.get_value_string(), "has no values", "Give two or more.", code=Code.EMPTY)
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in elements.values()):
        ascending = sorted(elements, key=lambda text: float(elements[text]))
        return Choices(key, tuple(ascending), tuple(float(elements[text]) for text in ascending))
    return Choices(key, tuple(elements))


def _read_interval(key: str, override: Override) -> Interval:
    """Return the interval that an override describes; raises like `_read_dimension`."""
    sweep, text = override.value(), override.get_value_string()
    low, high, tags = sweep.start, sweep.end, sweep.tags
    unknown = sorted(tags - {"log"})
    require(not unknown, key, text, f"has the tag {', '.join(unknown)}", "The only tag is log.")
    is_finite = all(isinstance(end, int | float) and math.isfinite(end) for end in (low, high))
    require(is_finite, key, text, "has an end that is not a finite number")
    remedy = "Give the lower end first: interval(LOW,HIGH)."
    require(low < high, key, text, "is an empty interval", remedy, code=Code.EMPTY)
    reason = "samples orders of magnitude, and its lower end is not above 0"
    require("log" not in tags or low > 0, key, text, reason, "Give a lower end above 0.")
    return Interval(key, low, high, "log" in tags)


def _distance(one: float, other: float) -> float:
    """Return the distance of two numbers, as a ratio if both are positive."""
    return abs(math.log(one / other)) if one > 0 and other > 0 else abs(one - other)
