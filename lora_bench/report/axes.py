"""Axes of a chart: where a value lies between the ends, and which values have a tick."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

_ZERO_SHARE = 0.08  # share of a logarithmic axis that precedes its lowest value, if 0 has to be drawn


@dataclass(frozen=True)
class Axis:
    """An axis of a chart."""

    label: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    """Values and their labels."""
    log: bool = False
    zero: bool = False
    """For a logarithmic axis: 0 has a position before `low`."""

    def position(self, value: float) -> float:
        """Return the position of a value: 0 at the axis's low end, 1 at its high end; values outside are clamped."""
        if not self.log:
            position = (value - self.low) / (self.high - self.low)
        elif value <= 0:
            return 0.0
        else:
            position = math.log(value / self.low) / math.log(self.high / self.low)
        position = min(max(position, 0.0), 1.0)
        return _ZERO_SHARE + (1 - _ZERO_SHARE) * position if self.zero else position


def linear(values: Iterable[float], label: str, format_tick: Callable[[float], str] | None = None, n: int = 5) -> Axis:
    """Return an axis over `values` with about `n` ticks at round numbers."""
    numbers = list(values)
    low, high = min(numbers), max(numbers)
    padding = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - padding, high + padding
    step = _round_step((high - low) / n)
    first, last = math.ceil(low / step), math.floor(high / step)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    format_tick = format_tick or (lambda value: f"{value:.{digits}f}".replace("-", "−"))
    return Axis(label, low, high, [(i * step, format_tick(i * step)) for i in range(first, last + 1)])


def _round_step(raw: float) -> float:
    """Return the smallest of 1, 2, 5 times a power of ten that is not below `raw`."""
    size = 10.0 ** math.floor(math.log10(raw))
    return next(step * size for step in (1, 2, 5, 10) if step * size >= raw * 0.999)


def logarithmic(values: Iterable[float], label: str, format_tick: Callable[[float], str], n: int = 5) -> Axis:
    """Return a logarithmic axis over `values`, with about `n` ticks at 1, 2 and 5 times powers of ten at most.

    Values that are 0 have a position of their own before the others.
    """
    numbers = list(values)
    positive = [value for value in numbers if value > 0] or [1.0]
    zero = len(positive) < len(numbers)
    padding = max((max(positive) / min(positive)) ** 0.08, 1.15)
    low, high = min(positive) / padding, max(positive) * padding
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = max(1, math.ceil((math.log10(high / low)) / n))
    ticks: list[float] = []
    for digits in ((1,), (1, 3), (1, 2, 5)):
        chosen = [d * 10.0**e for e in exponents for d in digits if e % every == 0 and low <= d * 10.0**e <= high]
        if len(chosen) <= n + 1:
            ticks = chosen
    if len(ticks) < 2:
        ticks = sorted({min(positive), max(positive)})
    return Axis(
        label, low, high, [(0.0, "0")] * zero + [(tick, format_tick(tick)) for tick in ticks], log=True, zero=zero
    )


def logarithmic_at(values: Iterable[float], label: str, format_tick: Callable[[float], str]) -> Axis:
    """Return a logarithmic axis whose ticks are the values themselves, if there are at most 8."""
    distinct_values = sorted(set(values))
    axis = logarithmic(distinct_values, label, format_tick)
    if len(distinct_values) > 8:
        return axis
    return Axis(
        label, axis.low, axis.high, [(value, format_tick(value)) for value in distinct_values], log=True, zero=axis.zero
    )
