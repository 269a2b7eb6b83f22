"""Values of adapter settings are refused by name, before a method's class is imported."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import pytest

from lora_bench.adapters.methods import check_settings, method_class, method_names
from lora_bench.config.adapter_values import CHOICES, NUMBERS, check_values
from lora_bench.errors import Code, UserError

OTHERS = {"dropout", "allocation", "layers"}


def test_every_checked_name_is_a_setting_of_a_method() -> None:
    settings = {field.name for name in method_names() for field in dataclasses.fields(method_class(name))}
    assert settings >= {*NUMBERS, *CHOICES, *OTHERS}


@pytest.mark.parametrize("key", NUMBERS)
def test_numbers(key: str) -> None:
    number = NUMBERS[key]
    accepted = [number.low + 1e-6 if number.kind is float else number.low, "1", None]
    refused: list[Any] = [number.low - 1, float("nan"), "x", True, [1], -1e-9]
    refused += [number.low] if number.open_low else []
    refused += [2.5] if number.kind is int else [float("inf")]
    for value in accepted if number.high >= 1 else accepted[:1]:
        check_values({key: value})
    for value in refused:
        with pytest.raises(UserError) as caught:
            check_values({key: value})
        assert (caught.value.key, caught.value.code) == (key, Code.INVALID_VALUE), value


@pytest.mark.parametrize(
    ("key", "value", "code"),
    [
        *((key, "standart", Code.UNKNOWN_CHOICE) for key in (*CHOICES, "allocation")),
        *(("dropout", value, Code.INVALID_VALUE) for value in (1, -0.1, float("nan"), "x", True)),
        *((key, {"a": 1}, Code.INVALID_VALUE) for key in ("allocation", "layers")),
        ("allocation", "adalora", Code.CONFLICT),
        ("layers", 2, Code.INVALID_VALUE),
        ("layers", [True], Code.INVALID_VALUE),
    ],
)
def test_other_values(key: str, value: object, code: Code) -> None:
    with pytest.raises(UserError) as caught:
        check_values({key: value})
    assert (caught.value.key, caught.value.code) == (key, code)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"init": "lora_ga", "init_gamma": None}, "init_gamma"),
        ({"init": "kaiming", "init_gamma": 16}, "init_gamma"),
        ({"init": "loftq", "quantize": None}, "init"),
        ({"freeze_A": True, "lr_ratio": "4"}, "lr_ratio"),
        ({"rank": 8, "init_rank": "6"}, "init_rank"),
        ({"warmup": "0.5", "final": 0.5}, "final"),
    ],
)
def test_contradictions(settings: dict[str, object], key: str) -> None:
    with pytest.raises(UserError) as caught:
        check_values(settings)
    assert (caught.value.key, caught.value.code) == (key, Code.CONFLICT)


def test_settings_that_may_be_null() -> None:
    check_values({"init": "eva", "init_gamma": None, "quantize": None, "freeze_A": True, "lr_ratio": 1})
    check_values({"rank": 8, "init_rank": None, "warmup": None, "final": 0.5})


def test_right_values() -> None:
    check_values({"layers": "top:2", "allocation": ["query=4"], "dropout": "0.1", "init": "eva", "quantize": "nf4"})
    check_values({"layers": [0, 1], "allocation": "gradient", "dropout": 0, "gain": "of another method"})


def test_settings_of_a_method(monkeypatch: pytest.MonkeyPatch) -> None:
    check_settings({"method": "lora", "rank": 8})
    with pytest.raises(UserError) as caught:
        check_settings({"method": "lora", "rank": 0})
    assert caught.value.key == "adapter.rank"
    with pytest.raises(UserError) as caught:
        check_settings({"method": "lorra"})
    assert (caught.value.key, caught.value.code) == ("adapter.method", Code.UNKNOWN_CHOICE)
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        check_settings({"method": "peft", "peft_type": "HIRA"})
    assert (caught.value.key, caught.value.code) == ("adapter.peft_type", Code.MISSING_PACKAGE)
