"""The space of a search: what can be written, what is refused, and how values reach the sampler and come back."""

from __future__ import annotations

from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from lora_bench.errors import Code
from lora_bench.sweeps.search_space import Dimension, Interval, SearchSpace, split_overrides, with_types
from tests.command_line import refuses


def split(*texts: str) -> tuple[list[str], dict[str, Dimension]]:
    return split_overrides(OverridesParser.create().parse_overrides(list(texts)))


def dimension(text: str, default: object = None) -> Dimension:
    ((_, only),) = split(text)[1].items()
    return with_types(only, default)


def test_keys_with_one_value_are_fixed_and_the_method_is_first() -> None:
    fixed, dimensions = split("seed=3", "adapter.rank=2,4", "adapter=lora,dora", "seed=4", "data.path='a b'")
    assert fixed == ["seed=4", "data.path='a b'"]
    assert list(dimensions) == ["adapter", "adapter.rank"]


@pytest.mark.parametrize(
    ("text", "default", "probes", "nearest"),
    [
        ("adapter.rank=64,2,8", 8, ("2", "8", "64"), {9: 1, 3: 0, 1000: 2, None: None}),
        ("adapter.rank=range(2,9,2)", 8, ("2", "4", "6", "8"), {8: 3}),
        ("adapter.init=kaiming,pissa", "kaiming", ("kaiming", "pissa"), {"pissa": "pissa", "eva": None}),
        ("adapter.rank=interval(2,64)", 8, ("2", "64"), {8: 8, 100: 64}),
        ("adapter.dropout=interval(0,1)", 0.0, ("0", "1"), {0.0: 0.0, 2: 1.0}),
        ("optimizer.lr=tag(log,interval(1e-4,1e-2))", 5e-4, ("0.0001", "0.01"), {5e-4: 5e-4, 1.0: 1e-2, "x": None}),
    ],
)
def test_values_and_the_ones_nearest_to_a_default(
    text: str, default: object, probes: tuple[str, ...], nearest: dict[Any, Any]
) -> None:
    read = dimension(text, default)
    assert read.probes == probes
    assert {value: read.nearest(value) for value in nearest} == nearest


def test_values_stay_in_their_interval_and_read_back() -> None:
    narrow = Interval("optimizer.lr", 0.00012345678, 0.00012345679, is_log=True)
    assert all(narrow.parameter(text) is not None for text in narrow.probes)
    assert dimension("adapter.rank=interval(2,64)", 8).parameter("2.5") is None
    assert dimension("adapter.rank=interval(2,64)", 8).parameter("65") is None


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("seed=0,1", Code.UNSUPPORTED),
        ("data.train_size=100,200", Code.UNSUPPORTED),
        ("trainer.main_metric=mcc,f1", Code.UNSUPPORTED),
        ("adapter.rank=range(4,4)", Code.EMPTY),
        ("optimizer.lr=interval(1e-2,1e-4)", Code.EMPTY),
        ("optimizer.lr=tag(log,interval(0,1e-2))", Code.INVALID_VALUE),
        ("optimizer.lr=tag(lgo,interval(1e-4,1e-2))", Code.INVALID_VALUE),
        ("optimizer.lr=interval(0,inf)", Code.INVALID_VALUE),
    ],
)
def test_empty_and_wrong_dimensions_are_refused(text: str, code: Code) -> None:
    with refuses(code, key=text.partition("=")[0]):
        split(text)


def test_a_key_that_a_method_lacks_is_left_out_for_it() -> None:
    _, dimensions = split("adapter=lora,bitfit", "adapter.rank=2,4,8", "optimizer.lr=tag(log,interval(1e-4,1e-2))")
    space = SearchSpace(
        tuple(dimensions.values()),
        {"lora": {"adapter": "lora", "adapter.rank": 8, "optimizer.lr": 5e-4}, "bitfit": {"optimizer.lr": 1e-3}},
    )
    assert space.grid_size == 3 * 4 + 4
    assert space.default_parameters("lora") == {"adapter": "lora", "adapter.rank": 2, "optimizer.lr": 5e-4}
    assert space.default_parameters("bitfit") == {"adapter": "bitfit", "optimizer.lr": 1e-3}
    of_bitfit = ["adapter=bitfit", "optimizer.lr=0.002"]
    assert space.parameters(of_bitfit) == {"adapter": "bitfit", "optimizer.lr": 0.002}
    assert space.parameters([*of_bitfit, "adapter.rank=2"]) is None
    assert space.parameters(["adapter=vera", "optimizer.lr=0.002"]) is None
