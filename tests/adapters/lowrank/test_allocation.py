"""Ranks by module: exact totals within the caps, the papers' formulas by hand, the optimum where one is promised."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_bench.adapters.lowrank.allocation import (
    cubic_budget,
    explained_variance,
    gradient,
    keep_top,
    largest_remainder,
    pattern,
    sensitivity,
)
from lora_bench.errors import Code
from tests.command_line import refuses

NAMES = ["layer.0.query", "layer.0.value", "layer.1.query", "layer.1.value"]


def caps(*largest: int) -> dict[str, int]:
    return dict(zip("abcdefgh", largest, strict=False))


def named(*values: float) -> dict[str, float]:
    return dict(zip("abcdefgh", values, strict=False))


def tensors(*rows: list[float]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(row, dtype=torch.float64) for name, row in zip("abcdefgh", rows, strict=False)}


def compositions(total: int, limits: list[int]) -> list[tuple[int, ...]]:
    """Every way to give out so many ranks within the limits."""
    return [c for c in itertools.product(*[range(limit + 1) for limit in limits]) if sum(c) == total]


# -- proportional shares --


def test_largest_remainders_by_hand() -> None:
    # Quotas of 10: 5.26, 3.16, 1.58. Whole parts 5, 3, 1; the one left goes to the remainder .58.
    assert largest_remainder(named(10, 6, 3), 10, caps(9, 9, 9)) == {"a": 5, "b": 3, "c": 2}


def test_equal_shares_are_given_out_from_the_first_on() -> None:
    assert list(largest_remainder(named(1, 1, 1, 1), 6, caps(9, 9, 9, 9)).values()) == [2, 2, 1, 1]


def test_what_a_cap_cuts_off_goes_to_the_others_in_proportion() -> None:
    # a would get 8 of 12 and takes 3; the other 9 are shared 2 to 1.
    assert list(largest_remainder(named(6, 2, 1), 12, caps(3, 9, 9)).values()) == [3, 6, 3]
    # That in turn is more than b takes.
    assert list(largest_remainder(named(6, 2, 1), 12, caps(3, 4, 9)).values()) == [3, 4, 5]


def test_modules_without_a_share_get_ranks_only_when_nobody_else_has_room() -> None:
    assert list(largest_remainder(named(1, 0, 0), 4, caps(4, 4, 4)).values()) == [4, 0, 0]
    assert list(largest_remainder(named(1, 0, 0), 7, caps(4, 4, 4)).values()) == [4, 2, 1]


@st.composite
def apportionments(draw: st.DrawFn) -> tuple[dict[str, float], int, dict[str, int]]:
    limits = draw(st.lists(st.integers(0, 9), min_size=1, max_size=8))
    share = st.one_of(st.sampled_from([0.0, 0.1, 0.2, 0.3, 1.0]), st.floats(0, 1e300))
    shares = draw(st.lists(share, min_size=len(limits), max_size=len(limits)).filter(any))
    return named(*shares), draw(st.integers(0, sum(limits))), caps(*limits)


@given(apportionments())
def test_the_total_is_exact_and_no_cap_is_exceeded(case: tuple[dict[str, float], int, dict[str, int]]) -> None:
    shares, total, limits = case
    ranks = largest_remainder(*case)
    assert list(ranks) == list(shares)
    assert sum(ranks.values()) == total
    assert all(0 <= ranks[name] <= limits[name] for name in shares)
    for one, other in itertools.permutations(shares, 2):
        if shares[one] > shares[other] and limits[one] >= limits[other]:
            assert ranks[one] >= ranks[other]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.integers(1, 8))
def test_no_apportionment_is_nearer_to_the_quotas(shares: list[int], total: int) -> None:
    quotas = np.array(shares) / sum(shares) * total
    ranks = largest_remainder(named(*shares), total, dict.fromkeys("abcd", 99))
    nearest = min(np.abs(quotas - c).sum() for c in compositions(total, [total] * len(shares)))
    assert np.abs(quotas - list(ranks.values())).sum() == pytest.approx(nearest)


@pytest.mark.parametrize(
    ("shares", "total", "named_in_error"),
    [
        ((1, 1, 1), 7, ["7", "0", "6"]),
        ((1, 1, 1), -1, ["-1"]),
        ((0, 0, 0), 3, ["every module", "0"]),
        ((1, -1, 3), 3, ["b"]),
        ((1, 2, math.nan), 3, ["c"]),
        ((math.inf, 2, 1), 3, ["a"]),
    ],
)
def test_shares_that_cannot_be_given_out_are_refused(
    shares: tuple[float, ...], total: int, named_in_error: list[str]
) -> None:
    with refuses(Code.INVALID_VALUE, key="allocation") as caught:
        largest_remainder(named(*shares), total, caps(2, 2, 2))
    for name in named_in_error:
        assert f" {name} " in f" {caught.value.reason} ".replace(",", " ")


# -- explicit patterns --


def assigned_ranks(*rules: str, default: int = 4, cap: int = 16) -> list[int]:
    return list(pattern(NAMES, list(rules), default, dict.fromkeys(NAMES, cap)).values())


def test_the_first_rule_that_matches_a_whole_name_holds() -> None:
    assert assigned_ranks() == [4, 4, 4, 4]
    assert assigned_ranks(".*query=16", ".*value=0") == [16, 0, 16, 0]
    assert assigned_ranks(r"layer\.1.*=2") == [4, 4, 2, 2]
    assert assigned_ranks(r"layer\.1\.query=3", ".*query=7") == [7, 4, 3, 4]
    assert assigned_ranks("(?=.*1)(?!.*key).*=5") == [4, 4, 5, 5]  # the last = parts expression and rank


@pytest.mark.parametrize("rule", ["", "query", "=8", ".*query=", ".*=-1", ".*query=2.5", ".*=x", ".*= 8", ".*=٣"])
def test_a_malformed_rule_is_refused(rule: str) -> None:
    with refuses(Code.INVALID_SYNTAX, key="allocation") as caught:
        assigned_ranks(rule)
    assert caught.value.value == rule
    assert "EXPRESSION=RANK" in str(caught.value)


@pytest.mark.parametrize(
    ("rules", "code", "value", "named_in_error"),
    [
        (("(=8",), Code.INVALID_SYNTAX, "(=8", []),
        (("query=8",), Code.NO_MATCH, "query=8", ["layer.0.query"]),
        ((".*key=8",), Code.NO_MATCH, ".*key=8", ["layer.*.query", "layer.*.value"]),
        ((".*=3", ".*query=8"), Code.NO_MATCH, ".*query=8", ["layer.0.query"]),
        ((".*1.value=17",), Code.INVALID_VALUE, None, ["17", "16", "layer.1.value"]),
        ((".*=0",), Code.NO_MATCH, None, ["rank 0"]),
    ],
)
def test_rules_that_cannot_be_followed_are_refused(
    rules: tuple[str, ...], code: Code, value: str | None, named_in_error: list[str]
) -> None:
    with refuses(code, key="allocation") as caught:
        assigned_ranks(*rules)
    assert caught.value.value == value
    for name in named_in_error:
        assert name in str(caught.value)


def test_the_rule_that_is_suggested_works() -> None:
    with refuses(Code.NO_MATCH, key="allocation") as caught:
        assigned_ranks("query=8")
    (suggestion,) = re.findall("'(.*)'", str(caught.value))
    assert assigned_ranks(suggestion) == [8, 4, 8, 4]


def test_a_default_above_a_cap_is_the_ranks_fault() -> None:
    with refuses(Code.INVALID_VALUE, key="rank") as caught:
        assigned_ranks(".*query=8", default=40)
    for name in ("40", "16", "layer.0.value"):
        assert name in str(caught.value)


# -- Sensitivity-LoRA --


def test_sensitivity_by_hand() -> None:
    # N = 4, k = 2.      S_g   TopK   ER (85 %)
    # a = 8, 1, 1, 0      10    4.5    2        8 + 1 of 10 >= 8.5
    # b = 2, 2, 2, 2       8    2      4        6 of 8 < 6.8
    # mean                 9    3.25   3
    # sigma                1    1.25   1
    # w = sigma / mean^2  1/81  20/169 1/9
    # S_l: a  4.5 * 20/169 + 2/9 = 0.754767;  b  2 * 20/169 + 4/9 = 0.681131
    #      mean 0.717949, sigma 0.036818, w 0.0714286
    # theta: a  10/81 + 0.0539119 = 0.177369;  b  8/81 + 0.0486522 = 0.147417
    # shares: 0.546109, 0.453891
    diagonals = tensors([1, 8, 0, 1], [2, 2, 2, 2])
    assert sensitivity(diagonals, 1000, caps(1000, 1000)) == {"a": 546, "b": 454}
    assert sensitivity(diagonals, 10, caps(8, 8)) == {"a": 5, "b": 5}
    assert sensitivity(diagonals, 10, caps(3, 8)) == {"a": 3, "b": 7}


def reference_shares(diagonals: list[np.ndarray], energy: float, top_share: float) -> np.ndarray:
    """The paper's equations, element by element."""
    falling = [sorted(h.tolist(), reverse=True) for h in diagonals]
    trace = np.array([sum(h) for h in falling])
    top = np.array([np.mean(h[: int(len(h) * top_share)]) for h in falling])
    effective = np.array(
        [next(k for k in range(1, len(h) + 1) if sum(h[:k]) / sum(h) >= energy) for h in falling], dtype=float
    )

    def weight(values: np.ndarray) -> float:
        return float(np.std(values) / np.mean(values) ** 2)

    local = weight(top) * top + weight(effective) * effective
    theta = weight(trace) * trace + weight(local) * local
    return np.asarray(theta / theta.sum())


@pytest.mark.parametrize(("energy", "top_share"), [(0.85, 0.5), (0.8, 1 / 3)])
def test_sensitivity_is_the_papers_equations(energy: float, top_share: float) -> None:
    rng = np.random.default_rng(0)
    diagonals = [rng.gamma(0.5, 10.0 ** rng.integers(0, 3), size) for size in (48, 48, 48, 192, 48, 96)]
    names = dict(zip("abcdef", map(torch.from_numpy, diagonals), strict=True))
    ranks = sensitivity(names, 1_000_000, dict.fromkeys("abcdef", 10**6), energy=energy, top_share=top_share)
    shares = reference_shares(diagonals, energy, top_share)
    assert list(ranks.values()) == pytest.approx(shares * 1e6, abs=1)
    assert np.ptp(shares) > 0.1


@pytest.mark.parametrize("energy", [0.8, 0.85, 0.9])
def test_the_scale_of_the_diagonals_does_not_matter(energy: float) -> None:
    diagonals = {name: torch.rand(20, generator=torch.Generator().manual_seed(i)) ** 4 for i, name in enumerate("abc")}
    diagonals["d"] = torch.ones(20)  # `energy` of it is a whole number of elements, which rounding may miss
    limits = dict.fromkeys(diagonals, 10_000)
    expected = sensitivity(diagonals, 10_000, limits, energy=energy)
    for scale in (1e-6, 0.1, 0.3, 0.7, 1e6):
        scaled = {name: h.double() * scale for name, h in diagonals.items()}
        assert sensitivity(scaled, 10_000, limits, energy=energy) == expected


def test_the_top_of_a_single_element_is_that_element() -> None:
    assert sensitivity(tensors([4], [2]), 6, caps(6, 6)) == {"a": 4, "b": 2}


@pytest.mark.parametrize("row", [[0.1, 0.2, 0.7], [0.0, 0.0, 0.0]])
def test_modules_that_are_all_alike_get_equal_ranks(row: list[float]) -> None:
    assert list(sensitivity(tensors(row, row, row), 12, caps(9, 9, 9)).values()) == [4, 4, 4]


def test_one_number_that_is_the_same_for_all_has_no_say() -> None:
    # TopK is 3 for both and ER 2 for both: the trace alone decides, 8 to 6.
    diagonals = tensors([3, 3, 1, 1], [3, 3, 0, 0])
    assert sensitivity(diagonals, 14, caps(14, 14), energy=0.7) == {"a": 8, "b": 6}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_a_diagonal_that_is_none_is_refused(bad: float) -> None:
    with refuses(Code.INVALID_VALUE, key="allocation") as caught:
        sensitivity(tensors([1, 2], [1, bad]), 2, caps(2, 2))
    assert " of b " in str(caught.value)


# -- EVA --


def test_the_largest_ratios_of_all_modules_win() -> None:
    ratios = tensors([0.5, 0.2, 0.1], [0.3, 0.25, 0.24], [0.9, 0.01, 0.0])
    assert list(explained_variance(ratios, 5, caps(3, 3, 3)).values()) == [1, 3, 1]
    assert list(explained_variance(ratios, 5, caps(3, 2, 3)).values()) == [2, 2, 1]
    assert list(explained_variance(ratios, 9, caps(3, 3, 3)).values()) == [3, 3, 3]


def test_of_equal_ratios_the_earlier_modules_win() -> None:
    ratios = tensors([0.4, 0.2, 0.2], [0.4, 0.2, 0.2], [0.4, 0.2, 0.2])
    assert list(explained_variance(ratios, 5, caps(3, 3, 3)).values()) == [3, 1, 1]


@given(
    st.lists(st.lists(st.integers(0, 20), min_size=1, max_size=3), min_size=1, max_size=4),
    st.lists(st.integers(0, 3), min_size=4, max_size=4),
    st.data(),
)
def test_no_allocation_explains_more(rows: list[list[float]], limits: list[int], data: st.DataObject) -> None:
    ratios = tensors(*[[value / 20 for value in sorted(row, reverse=True)] for row in rows])
    room = [min(limit, len(row)) for limit, row in zip(limits, rows, strict=False)]
    total = data.draw(st.integers(0, sum(room)))
    ranks = explained_variance(ratios, total, caps(*limits))

    def explained(chosen: tuple[int, ...]) -> float:
        return sum(float(r[:k].sum()) for r, k in zip(ratios.values(), chosen, strict=True))

    assert sum(ranks.values()) == total
    assert all(rank <= limit for rank, limit in zip(ranks.values(), room, strict=True))
    best = max(map(explained, compositions(total, room)))
    assert explained(tuple(ranks.values())) == pytest.approx(best)


def test_more_ranks_than_components_are_refused() -> None:
    with refuses(Code.INVALID_VALUE, key="allocation") as caught:
        explained_variance(tensors([0.5, 0.2, 0.1], [0.3]), 5, caps(9, 9))
    for number in ("5", "4"):
        assert number in str(caught.value)


# -- by the gradient --


def test_the_promise_for_the_cost_decides() -> None:
    sigma = tensors([3, 1], [4, 2])
    # Promises 9, 1 at cost 1 and 16, 4 at cost 4: by the cost 9, 1, 4, 1.
    costs = named(1, 4)
    assert gradient(sigma, costs, 1, caps(2, 2)) == {"a": 1, "b": 0}
    assert gradient(sigma, costs, 5, caps(2, 2)) == {"a": 1, "b": 1}
    assert gradient(sigma, costs, 6, caps(2, 2)) == {"a": 2, "b": 1}  # of equals the earlier
    assert gradient(sigma, costs, 1000, caps(2, 2)) == {"a": 2, "b": 2}
    assert gradient(sigma, costs, 1000, caps(2, 1)) == {"a": 2, "b": 1}


def test_what_does_not_fit_is_passed_over() -> None:
    # b's 100 for 4 comes first and does not fit into 3; then a's three ranks do.
    assert gradient(tensors([3, 2, 1], [10, 10]), named(1, 4), 3, caps(3, 2)) == {"a": 3, "b": 0}


def test_the_rounding_of_a_sum_keeps_nothing_out() -> None:
    assert 0.1 + 0.1 + 0.1 > 0.3
    assert gradient(tensors([3, 2, 1, 1]), named(0.1), 0.3, caps(4)) == {"a": 3}


def test_a_rank_that_promises_nothing_is_not_taken() -> None:
    assert gradient(tensors([3, 0, 0], [0, 0, 0]), named(1, 1), 5, caps(3, 3)) == {"a": 1, "b": 0}


falling = st.lists(st.integers(0, 9).map(float), min_size=1, max_size=3).map(lambda row: sorted(row, reverse=True))


def promise_and_optimum(
    sigma: dict[str, torch.Tensor], costs: dict[str, float], budget: float, limits: dict[str, int]
) -> tuple[float, float]:
    def promise(chosen: tuple[int, ...]) -> float:
        return sum(float((s[:k] ** 2).sum()) for s, k in zip(sigma.values(), chosen, strict=True))

    ranges = [range(min(limits[name], len(s)) + 1) for name, s in sigma.items()]
    affordable = [
        c
        for c in itertools.product(*ranges)
        if sum(k * cost for k, cost in zip(c, costs.values(), strict=True)) <= budget
    ]
    ranks = tuple(gradient(sigma, costs, budget, limits).values())
    assert ranks in affordable
    return promise(ranks), max(map(promise, affordable))


@given(st.lists(falling, min_size=1, max_size=4), st.integers(1, 12), st.integers(1, 3))
def test_with_equal_costs_nothing_promises_more(rows: list[list[float]], budget: int, cap: int) -> None:
    rows = [[9.0], *rows[1:]]  # something to take
    sigma = tensors(*rows)
    found, best = promise_and_optimum(sigma, dict.fromkeys(sigma, 1.0), budget, dict.fromkeys(sigma, cap))
    assert found == pytest.approx(best)


@given(
    st.lists(falling, min_size=4, max_size=4), st.lists(st.integers(1, 5), min_size=4, max_size=4), st.integers(5, 20)
)
def test_with_unequal_costs_it_is_short_by_less_than_one_rank(
    rows: list[list[float]], prices: list[int], budget: int
) -> None:
    rows = [[9.0], *rows[1:]]
    sigma = tensors(*rows)
    found, best = promise_and_optimum(sigma, named(*prices), budget, caps(3, 3, 3, 3))
    assert found >= best - max(row[0] for row in rows) ** 2
    if sum(len(row) * price for row, price in zip(rows, prices, strict=True)) <= budget:
        assert found == pytest.approx(best)


@pytest.mark.parametrize(
    ("sigma", "budget", "named_in_error"),
    [
        (([0.0, 0.0], [0.0]), 10, ["every module"]),
        (([1.0, 0.5], [1.0]), 2.5, ["2.5", "cost 3"]),
        (([1.0, 0.5], [math.nan]), 10, ["singular values", " of b "]),
    ],
)
def test_gradients_that_allocate_nothing_are_refused(
    sigma: tuple[list[float], ...], budget: float, named_in_error: list[str]
) -> None:
    with refuses(Code.INVALID_VALUE, key="allocation") as caught:
        gradient(tensors(*sigma), named(3, 4), budget, caps(2, 2))
    for name in named_in_error:
        assert name in str(caught.value)


# -- AdaLoRA's --


def test_the_cubic_schedule_by_hand() -> None:
    # T = 10, t_i = 2, t_f = 3, from 24 ranks to 16: 8 are to go over 5 steps.
    # t = 3: 16 + 8 (4/5)^3 = 20.096;  t = 4: 16 + 8 (3/5)^3 = 17.728;  t = 5: 16 + 8 (2/5)^3 = 16.512
    budgets = [cubic_budget(t, 10, 24, 16, warmup=2, final=3) for t in range(1, 11)]
    assert budgets == [24, 24, 20, 17, 16, 16, 16, 16, 16, 16]


@given(st.integers(1, 200), st.integers(0, 40), st.integers(0, 40), st.integers(0, 100), st.integers(0, 100))
def test_the_schedule_falls_from_the_initial_to_the_target_budget(
    steps: int, target: int, extra: int, warmup: int, final: int
) -> None:
    warmup, final = warmup * steps // 201, final * steps // 201  # fewer than all steps
    initial = target + extra
    budgets = [cubic_budget(t, steps, initial, target, warmup, final) for t in range(1, steps + 1)]
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[:warmup] == [initial] * warmup
    assert budgets[steps - final - 1 :] == [target] * (final + 1)
    for t in range(warmup + 1, steps - final):
        exact = target + extra * (1 - (t - warmup) / (steps - warmup - final)) ** 3
        assert exact - 1 - 1e-6 < budgets[t - 1] <= exact + 1e-6


def test_the_best_triplets_of_all_modules_are_kept() -> None:
    kept = keep_top(tensors([0.1, 0.9, 0.5], [0.4, 0.6], [0.0]), 3)
    assert {name: mask.tolist() for name, mask in kept.items()} == {
        "a": [False, True, True],
        "b": [False, True],
        "c": [False],
    }


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=4), st.integers(0, 25))
def test_exactly_so_many_are_kept_even_among_equals(rows: list[list[float]], budget: int) -> None:
    scores = tensors(*rows)
    kept = keep_top(scores, budget)
    flat, mask = torch.cat(list(scores.values())), torch.cat(list(kept.values()))
    assert [m.shape for m in kept.values()] == [s.shape for s in scores.values()]
    assert mask.sum() == min(budget, len(flat))
    if 0 < budget < len(flat):
        assert flat[mask].min() >= flat[~mask].max()
        threshold = flat[mask].min()
        ties = mask[flat == threshold].tolist()
        assert ties == sorted(ties, reverse=True)  # the earlier ones
