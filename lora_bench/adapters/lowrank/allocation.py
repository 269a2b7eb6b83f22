"""Distribute ranks over modules, from numbers alone; nothing here depends on a model.

Every function returns the rank by module name, in the order of the given modules. A module of rank 0 is not
adapted. `caps` is the largest rank that each module can take. Ties go to the earlier module, never to chance.

The last two functions are AdaLoRA's, which prunes single ranks during training.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import TYPE_CHECKING

import torch

from lora_bench.adapters.patterns import limited_matching
from lora_bench.errors import Code, UserError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor


def largest_remainder(shares: dict[str, float], total: int, caps: dict[str, int]) -> dict[str, int]:
    """Return whole ranks in proportion to the shares, exactly `total` of them (Hamilton's method).

    A module whose part exceeds its cap gets its cap; what it cannot take goes to the others in proportion to their
    shares, and evenly to those with share 0 once nobody else has room. Each of the others gets its part rounded down,
    and the largest remainders get one more. The arithmetic is exact.

    Raises:
        UserError: a share is negative or not finite, all are 0, or the caps leave no room for so many.
    """
    _require_non_negative(shares.items(), "share")
    if not any(shares.values()):
        raise UserError("the share of every module is 0", key="allocation", code=Code.INVALID_VALUE)
    _require_capacity(total, caps)
    remaining_shares = {name: Fraction(share) for name, share in shares.items()}
    ranks: dict[str, int] = {}
    unassigned = total
    while True:
        if not any(remaining_shares.values()):
            remaining_shares = dict.fromkeys(remaining_shares, Fraction(1))
        whole = sum(remaining_shares.values())
        quotas = {name: unassigned * share / whole for name, share in remaining_shares.items()}
        full = [name for name, quota in quotas.items() if quota >= caps[name]]
        if not full:
            break
        for name in full:
            ranks[name] = caps[name]
            unassigned -= caps[name]
            del remaining_shares[name]
    # A quota below its cap, rounded down, has room for one more: the caps are whole.
    ranks |= {name: math.floor(quota) for name, quota in quotas.items()}
    remainders = sorted(quotas, key=lambda name: quotas[name] - ranks[name], reverse=True)
    for name in remainders[: unassigned - sum(ranks[name] for name in quotas)]:
        ranks[name] += 1
    return {name: ranks[name] for name in shares}


def pattern(names: Iterable[str], rules: list[str], default: int, caps: dict[str, int]) -> dict[str, int]:
    """Return ranks by explicit rules: `.*query=16` gives rank 16 to every module whose whole name matches `.*query`.

    The first rule that matches a name applies; a name without a rule gets `default`.

    Raises:
        UserError: a rule is not of that form, takes too long, matches no name, or decides nothing because earlier rules
            match all of its names; a rank is above its module's cap; or every rank is 0.
    """
    names = list(names)
    ranks: dict[str, int] = {}
    for rule in rules:
        with limited_matching("allocation", rule):
            expression, rank = _parse(rule)
            matched = [name for name in names if expression.fullmatch(name)]
            if not matched:
                hint = _hint(expression, rank, names)
                raise UserError("matches no module", key="allocation", value=rule, remedy=hint, code=Code.NO_MATCH)
        free = [name for name in matched if name not in ranks]
        if not free:
            raise UserError(
                f"decides nothing: earlier rules match all that it matches, as {matched[0]}",
                key="allocation",
                value=rule,
                remedy="The first rule that matches a name holds, so put the narrow ones first.",
                code=Code.NO_MATCH,
            )
        ranks |= dict.fromkeys(free, rank)
    by_rule = set(ranks)
    ranks = {name: ranks.get(name, default) for name in names}
    for name, rank in ranks.items():
        if rank > caps[name]:
            key = "allocation" if name in by_rule else "rank"
            raise UserError(
                f"rank {rank} is above {caps[name]}, the most that {name} takes", key=key, code=Code.INVALID_VALUE
            )
    if not any(ranks.values()):
        raise UserError("leaves rank 0 to every module, so nothing is adapted", key="allocation", code=Code.NO_MATCH)
    return ranks


def sensitivity(
    diagonals: dict[str, Tensor], total: int, caps: dict[str, int], *, energy: float = 0.85, top_share: float = 0.5
) -> dict[str, int]:
    """Return ranks in proportion to each module's sensitivity: Sensitivity-LoRA (Zhang et al. 2025, arXiv 2509.09119).

    With h the diagonal of X Xᵀ, the surrogate of the Hessian's diagonal, and N = len(h), each module has

        S_g  = Σ h                                       global sensitivity: the trace
        TopK = mean of the k largest h,  k = ⌊N · top_share⌋, at least 1
        ER   = min{k : Σ_{j≤k} λ_j ≥ energy · Σ λ}       effective rank; λ is h in non-increasing order (eq. 9, 10)

    Two numbers of a module are fused by weights that say how much each varies over all modules, relative to its size:

        w(Z) = σ(Z) / μ(Z)²                              σ: population standard deviation, μ: mean over the modules
        S_l  = w(TopK) · TopK + w(ER) · ER               β₁, β₂ of the paper: local sensitivity
        θ    = w(S_g) · S_g + w(S_l) · S_l               γ₁, γ₂ of the paper
        r    = θ / Σ θ · total                           in whole ranks by `largest_remainder`

    1/μ takes off the unit and σ/μ weighs, so neither the scale of h nor a common factor of two weights matters. A
    number that is the same for all modules has weight 0; if all are, the ranks are uniform.

    Args:
        diagonals: h (in,) by module, up to a common factor.
        total: ranks to give out.
        energy: share of Σ λ that the effective rank holds.
        top_share: share of the diagonal that TopK averages.

    Raises:
        UserError: an element is negative or not finite, or the caps leave no room for so many.
    """
    _require_non_negative(diagonals.items(), "diagonal of X Xᵀ")
    ordered = [h.double().cpu().sort(descending=True).values for h in diagonals.values()]  # M of (in,)
    trace = torch.stack([h.sum() for h in ordered])  # (M,)
    top = torch.stack([h[: max(1, int(len(h) * top_share))].mean() for h in ordered])  # (M,)
    # The tolerance keeps the rounding of a sum from asking for one element more.
    below = [(h.cumsum(0) < (1 - 1e-9) * energy * h.sum()).sum() for h in ordered]
    effective = torch.stack(below).double() + 1  # (M,)
    local = _weight(top) * top + _weight(effective) * effective
    theta = _weight(trace) * trace + _weight(local) * local
    if not theta.any():
        theta = torch.ones_like(theta)
    return largest_remainder(dict(zip(diagonals, theta.tolist(), strict=True)), total, caps)


def explained_variance(ratios: dict[str, Tensor], total: int, caps: dict[str, int]) -> dict[str, int]:
    """Give one rank to each of the `total` largest ratios of all modules: EVA (Paischer et al. 2024, arXiv 2410.07170).

    A module gets at most as many ranks as its cap and its components allow, and may get 0.

    Args:
        ratios: share of the variance of its inputs that each component of a module explains, (components,).
        total: ranks to give out.
        caps: EVA's is ρ times the average rank.

    Raises:
        UserError: a ratio is negative or not finite, or caps and components leave no room for so many.
    """
    _require_non_negative(ratios.items(), "explained variance")
    room = {name: min(caps[name], len(ratio)) for name, ratio in ratios.items()}
    _require_capacity(total, room)
    ranks = dict.fromkeys(ratios, 0)
    for _, name in _best_first(ratios, room)[:total]:
        ranks[name] += 1
    return ranks


def gradient(
    singular_values: dict[str, Tensor], costs: dict[str, float], budget: float, caps: dict[str, int]
) -> dict[str, int]:
    """Give ranks where a unit of cost promises the largest decrease of the loss.

    With G = Σ σ_i u_i v_iᵀ the averaged gradient of the task's loss for a module's weight, the step -η σ_i u_i v_iᵀ
    changes the loss by -η σ_i² to first order, and the steps of several i and modules add up. So rank i of module m
    promises σ_{m,i}² and costs `costs[m]`, whatever i. The ranks are taken in the order of σ²/cost, best first; one
    that the rest of the budget does not pay for is passed over, and the search ends when nothing more fits. Since
    σ_{m,1} ≥ σ_{m,2} ≥ …, a module's ranks are taken in their own order. A rank that promises nothing is not taken.

    With equal costs no allocation within budget and caps promises more. With unequal ones this is the greedy rule of
    the knapsack problem: it promises less than the best by no more than what the first rank that did not fit would.

    Args:
        singular_values: σ (up to the smaller side,) of G by module.
        costs: cost of one rank by module: its parameters, or these times a factor for its depth.
        budget: what may be spent, in the unit of `costs`.

    Raises:
        UserError: a singular value is negative or not finite, all are 0, or the budget does not pay for one rank.
    """
    _require_non_negative(singular_values.items(), "singular values of the gradient")
    promised = {name: sigma.double() ** 2 / costs[name] for name, sigma in singular_values.items()}
    units = [name for promise, name in _best_first(promised, caps) if promise > 0]
    if not units:
        raise UserError(
            "the gradient of every module is 0, so no rank promises anything", key="allocation", code=Code.INVALID_VALUE
        )
    ranks = dict.fromkeys(singular_values, 0)
    spent = 0.0
    for name in units:
        if spent + costs[name] <= budget * (1 + 1e-9):  # the tolerance is for the rounding of the sum
            ranks[name] += 1
            spent += costs[name]
    if not spent:
        cheapest = min(costs[name] for name in units)
        raise UserError(
            f"a budget of {budget:g} does not pay for one rank of cost {cheapest:g}",
            key="allocation",
            code=Code.INVALID_VALUE,
        )
    return ranks


def cubic_budget(step: int, steps: int, initial: int, target: int, warmup: int, final: int) -> int:
    """Return how many ranks AdaLoRA keeps at a step: the schedule of Zhang et al. 2023 (arXiv 2303.10512), eq. 12.

        b₀                                                     for t ≤ t_i
        b_T + (b₀ - b_T) · (1 - (t - t_i) / (T - t_i - t_f))³    between, rounded down
        b_T                                                    for t ≥ T - t_f

    The last line holds where two apply.

    Args:
        step: t, from 1.
        steps: T.
        initial: b₀, ranks of all modules at the start.
        target: b_T, ranks of all modules at the end.
        warmup: t_i, steps before pruning begins.
        final: t_f, steps after pruning has ended.
    """
    if step >= steps - final:
        return target
    if step <= warmup:
        return initial
    span = steps - warmup - final
    remaining = steps - final - step
    return target + (initial - target) * remaining**3 // span**3


def keep_top(scores: dict[str, Tensor], budget: int) -> dict[str, Tensor]:
    """Return masks (rank,) that keep the `budget` largest scores (rank,) of all modules together: exactly so many.

    Among equal scores the earlier is kept. With a budget above the number of scores all are kept.
    """
    flat = torch.cat(list(scores.values()))
    best = flat.sort(descending=True, stable=True).indices[:budget]
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[best] = True
    return dict(zip(scores, torch.split(mask, [len(score) for score in scores.values()]), strict=True))


def _require_non_negative(numbers: Iterable[tuple[str, Tensor | float]], quantity: str) -> None:
    """Raise a `UserError` for the first module with a negative number or one that is not finite.

    Args:
        numbers: (module, its number or its tensor of numbers).
        quantity: the name of the numbers, for the message.
    """
    for name, number in numbers:
        values = torch.as_tensor(number, dtype=torch.float64)
        if not (torch.isfinite(values) & (values >= 0)).all():
            raise UserError(
                f"the {quantity} of {name} is negative or not a finite number",
                key="allocation",
                code=Code.INVALID_VALUE,
            )


def _require_capacity(total: int, caps: Mapping[str, int]) -> None:
    """Raise a `UserError` unless `total` is from 0 to the sum of the caps."""
    room = sum(caps.values())
    if not 0 <= total <= room:
        raise UserError(
            f"{total} ranks in all are not within 0 and {room}, the room there is",
            key="allocation",
            code=Code.INVALID_VALUE,
        )


def _weight(values: Tensor) -> Tensor:
    """Return σ / μ² of (M,) non-negative values; 0 where they are all the same."""
    if values.max() == values.min():
        return values.new_zeros(())
    return values.std(correction=0) / values.mean() ** 2


def _best_first(values: Mapping[str, Tensor], room: Mapping[str, int]) -> list[tuple[float, str]]:
    """Return (value, module) of each module's largest `room` values, in falling order; of equals the earlier first."""
    units = [
        (value, name)
        for name, of_module in values.items()
        for value in sorted(of_module.tolist(), reverse=True)[: room[name]]
    ]
    return sorted(units, key=lambda unit: unit[0], reverse=True)


def _parse(rule: str) -> tuple[re.Pattern[str], int]:
    """Return expression and rank of a rule `EXPRESSION=RANK`; a `UserError` if it is not of that form."""
    expression, equals, rank = rule.rpartition("=")
    if not (equals and expression and re.fullmatch(r"[0-9]{1,9}", rank)):
        raise UserError(
            "is not of the form EXPRESSION=RANK",
            key="allocation",
            value=rule,
            remedy="For example '.*query=16'.",
            code=Code.INVALID_SYNTAX,
        )
    try:
        return re.compile(expression), int(rank)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(
            f"is not a regular expression: {error}", key="allocation", value=rule, code=Code.INVALID_SYNTAX
        ) from None


def _hint(expression: re.Pattern[str], rank: int, names: list[str]) -> str:
    """Return a remedy for an expression that matches no name.

    If it matches a part of a name, that is a rule `.*(expression).*=rank`; else a list of the names, layer numbers as
    `*`.
    """
    near = next((name for name in names if expression.search(name)), None)
    if near:
        return f"It matches a part of {near}: the whole name must match, so try '.*({expression.pattern}).*={rank}'."
    patterns = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names)
    return f"Names there are: {', '.join(patterns)}."
