"""What settings must be: refusals that name the key, the value and what is wrong with it."""

from __future__ import annotations

import math

from lora_bench.errors import Code, UserError


def need(
    holds: bool, key: str, value: object, reason: str, remedy: str = "", *, code: Code = Code.INVALID_VALUE
) -> None:
    """Refuse `value` for `key` unless the condition holds."""
    if not holds:
        raise UserError(reason, code=code, key=key, value=value, remedy=remedy)


def need_one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
    need(value in choices, key, value, f"is not one of {', '.join(choices)}", code=Code.UNKNOWN_CHOICE)


def need_number(key: str, value: float, low: float, high: float = math.inf, *, open_low: bool = False) -> None:
    """Refuse what is not a finite number in [low, high], or (low, high] with `open_low`."""
    need(type(value) is not int or value < 2**63, key, value, "is too large")
    inside = low <= value <= high and abs(value) < math.inf and not (open_low and value == low)
    if inside:
        return
    bound = f"above {low:g}" if open_low else f"of at least {low:g}"
    upper = f" and at most {high:g}" if math.isfinite(high) else ""
    raise UserError(f"must be a finite number {bound}{upper}", code=Code.INVALID_VALUE, key=key, value=value)
