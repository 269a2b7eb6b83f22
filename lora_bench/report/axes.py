"""Axes of a chart: where a value lies between its ends, and which values get a tick."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

_ZERO_ROOM = 0.08  # of a logarithmic axis, at its beginning, where there are zeros to show


@dataclass(frozen=True)
class Axis:
    label: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    log: bool = False
    zero: bool = False
    """Of a logarithmic axis: whether it has a place for 0, before `low`."""

    def at(self, value: float) -> float:
        """0 at the axis's beginning, 1 at its end; values outside are moved to the nearer end."""
        if not self.log:
            where = (value - self.low) / (self.high - self.low)
        elif value <= 0:
            return 0.0
        else:
            where = math.log(value / self.low) / math.log(self.high / self.low)
        where = min(max(where, 0.0), 1.0)
        return _ZERO_ROOM + (1 - _ZERO_ROOM) * where if self.zero else where


def linear(values: Iterable[float], label: str, show: Callable[[float], str] | None = None, n: int = 5) -> Axis:
    """An axis over `values` with about `n` ticks at round numbers."""
    numbers = list(values)
    low, high = min(numbers), max(numbers)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - room, high + room
    step = _round_step((high - low) / n)
    first, last = math.ceil(low / step), math.floor(high / step)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    show = show or (lambda value: f"{value:.{digits}f}".replace("-", "−"))
    return Axis(label, low, high, [(i * step, show(i * step)) for i in range(first, last + 1)])


def _round_step(raw: float) -> float:
    size = 10.0 ** math.floor(math.log10(raw))
    return next(step * size for step in (1, 2, 5, 10) if step * size >= raw * 0.999)


def logarithmic(values: Iterable[float], label: str, show: Callable[[float], str], n: int = 5) -> Axis:
    """An axis over positive `values`, ticks at 1, 2 and 5 times powers of ten, about `n` at most; 0 has a place."""
    numbers = list(values)
    positive = [value for value in numbers if value > 0] or [1.0]
    zero = len(positive) < len(numbers)
    room = max((max(positive) / min(positive)) ** 0.08, 1.15)
    low, high = min(positive) / room, max(positive) * room
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = max(1, math.ceil((math.log10(high / low)) / n))
    ticks: list[float] = []
    for digits in ((1,), (1, 3), (1, 2, 5)):
        chosen = [d * 10.0**e for e in exponents for d in digits if e % every == 0 and low <= d * 10.0**e <= high]
        if len(chosen) <= n + 1:
            ticks = chosen
    if len(ticks) < 2:
        ticks = sorted({min(positive), max(positive)})
    return Axis(label, low, high, [(0.0, "0")] * zero + [(tick, show(tick)) for tick in ticks], log=True, zero=zero)


def at_values(values: Iterable[float], label: str, show: Callable[[float], str]) -> Axis:
    """A logarithmic axis whose ticks are the few values that were tried."""
    tried = sorted(set(values))
    axis = logarithmic(tried, label, show)
    if len(tried) > 8:
        return axis
    return Axis(label, axis.low, axis.high, [(value, show(value)) for value in tried], log=True, zero=axis.zero)
