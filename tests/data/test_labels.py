"""Labels of a column: classes by name or number, scores with a threshold, numbers; names inferred from train."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_bench.data.labels import (
    MAX_CLASSES,
    ClassLabels,
    DeclaredLabels,
    LabelError,
    LabelFormat,
    NumberLabels,
    ThresholdLabels,
    infer_names,
    similar_names,
)


def test_classes_are_read_by_name_or_by_number() -> None:
    nli = ClassLabels(["entailment", "neutral", "contradiction"])
    assert nli.read(["neutral", "entailment", "contradiction"], "label").tolist() == [1, 0, 2]
    assert nli.read(["2", "0"], "label").tolist() == nli.read([2, 0], "label").tolist() == [2, 0]
    assert ClassLabels(["1", "2", "5"]).read([5, "1", 2], "label").tolist() == [2, 0, 1]  # names, not numbers
    assert ClassLabels(["1", "0"]).read([0, 1], "label").tolist() == [1, 0]
    assert ClassLabels(["0", "1", "5"]).read([2, 1], "label").tolist() == [2, 1]  # "1" is the name of class 1
    assert ClassLabels(["false", "true"]).read([True, False], "label").tolist() == [1, 0]


@pytest.mark.parametrize(
    "values", [["no", "maybe"], ["no", "1"], [0, 2], ["no", ""], ["no", None], [0, 1.0], ["0", "1 "]]
)
def test_a_label_that_is_no_class_is_refused(values: list[Any]) -> None:
    with pytest.raises(LabelError) as caught:
        ClassLabels(["no", "yes"]).read(values, "answer")
    assert caught.value.position == 1
    assert repr(values[1]) in caught.value.reason
    assert all(name in caught.value.reason for name in ("'no'", "'yes'"))
    assert "data.label_column=answer" in caught.value.remedy


@pytest.mark.parametrize(
    ("names", "values", "position"),
    [(["1", "2"], ["1", "0", "0"], 1), (["1", "2", "3"], [2, 0, 1], 1), (["1", "2", "5"], [0, 5], 0)],
)
def test_names_of_classes_are_never_read_as_other_numbers(names: list[str], values: list[Any], position: int) -> None:
    with pytest.raises(LabelError) as caught:
        ClassLabels(names).read(values, "stars")
    assert caught.value.position == position


def test_numbers_of_many_values_for_two_classes_suggest_a_threshold_and_regression() -> None:
    with pytest.raises(LabelError) as caught:
        ClassLabels(["low", "high"]).read(["0", "1", "4.5"], "score")
    assert all(key in caught.value.remedy for key in ("data.label_threshold", "data.type=regression"))


def test_numbers_follow_the_names_that_the_source_declares() -> None:
    declared = DeclaredLabels(("b", "c", "a"), ("a", "b", "c"))
    assert declared.read([0, 1, 2], "label").tolist() == [2, 0, 1]
    stars = DeclaredLabels(("1", "2", "3"), ("1", "2", "3"), has_numbers=True)
    assert stars.read([1, 2], "label").tolist() == [1, 2]
    assert stars.read(["1", "2"], "label").tolist() == [0, 1]  # texts are names
    with pytest.raises(LabelError):
        stars.read([0, 3], "label")


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["yes", "no", "yes"], ["no", "yes"]),
        ([10, 9, 1, 9], ["1", "9", "10"]),
        (["10", "-1", "2"], ["-1", "2", "10"]),
        ([True, False], ["false", "true"]),
        (["b", 1, "a"], ["1", "a", "b"]),
        (["1", "١", "1_0", "10"], ["1", "10", "1_0", "١"]),
        (["1" * 30 + "1", "1" * 30 + "2"], ["1" * 30 + "1", "1" * 30 + "2"]),
        (["yes ", "yes"], ["yes", "yes "]),
        (["1_1", "2_1", "1_2"], ["1_1", "1_2", "2_1"]),
        ([f"c{i % 40}" for i in range(80)], sorted(f"c{i}" for i in range(40))),
    ],
)
def test_names_are_the_sorted_values_of_train(values: list[Any], names: list[str]) -> None:
    assert infer_names(values, "label") == names


# No number in two spellings: neither leading nor trailing zeros, and no signs.
class_names = st.text(st.characters(exclude_characters="0.+-", exclude_categories=("Cs",)), min_size=1)


@given(st.lists(class_names, min_size=2, max_size=20, unique=True), st.randoms())
def test_inferred_names_read_their_own_column(names: list[str], random: Any) -> None:
    column = [random.choice(names) for _ in range(50)] + names
    inferred = infer_names(column, "label")
    labels = ClassLabels(inferred).read(column, "label")
    assert [inferred[label] for label in labels] == column


@pytest.mark.parametrize(
    ("values", "position", "parts"),
    [
        (["a", ""], 1, ["''"]),
        (["a", None], 1, ["None"]),
        ([1, 2.5], 1, ["2.5", "data.type=regression"]),
        (["1.5", "2.5", "3"], None, ["data.type=regression", "data.label_threshold=3"]),
        (["a"] * 9, None, ["9", "'a'", "data.label_column=label"]),
        ([f"text {i}" for i in range(10_000)], None, ["10,000", "'text 0'", "data.label_names"]),
        ([f"{i % (MAX_CLASSES + 1)}" for i in range(9000)], None, ["1,001", "9,000", "data.type=regression"]),
    ],
)
def test_a_column_that_holds_no_classes_is_refused(values: list[Any], position: int | None, parts: list[str]) -> None:
    with pytest.raises(LabelError) as caught:
        infer_names(values, "label")
    assert caught.value.position == position
    assert all(part in f"{caught.value.reason} {caught.value.remedy}" for part in parts)


@pytest.mark.parametrize(
    ("values", "position", "earlier"),
    [
        (["2", "1", "2", "1.0"], 3, 1),
        (["01", "x", "1"], 2, 0),
        ([1, "1", "+1"], 2, 0),
        (["0", "-0"], 1, 0),
        (["3.8", "5", "3.800"], 2, 0),
    ],
)
def test_a_number_in_two_spellings_is_refused(values: list[Any], position: int, earlier: int) -> None:
    with pytest.raises(LabelError) as caught:
        infer_names(values, "label")
    assert (caught.value.position, caught.value.earlier) == (position, earlier)
    assert all(repr(str(values[i])) in caught.value.reason for i in (position, earlier))
    assert ("data.type=regression" in caught.value.remedy) == ("x" not in values)
    names = list(dict.fromkeys(map(str, values)))
    assert ClassLabels(names).read(values, "label").tolist() == [names.index(str(value)) for value in values]


def test_similar_names_differ_in_case_or_white_space_only() -> None:
    assert similar_names(["No", "yes", "no", "no way", "no  way "]) == [("No", "no"), ("no way", "no  way ")]


@pytest.mark.parametrize(
    ("label_format", "read"), [(NumberLabels(), [0.5, 4.0, -1.0]), (ThresholdLabels(4.0), [0, 1, 0])]
)
def test_numbers_are_read_from_texts_and_numbers(label_format: LabelFormat, read: list[float]) -> None:
    for values in (["0.5", "4", "-1"], [0.5, 4, -1], [Decimal("0.5"), 4, Decimal("-1")]):
        assert label_format.read(values, "score").tolist() == read
    for bad in ("five", "", "nan", "4,5", None, True, float("inf"), "1e999", 10**400, "1_0", "١", "٣.٥"):
        with pytest.raises(LabelError) as caught:
            label_format.read(["1.0", bad], "score")
        assert caught.value.position == 1
    is_number = isinstance(label_format, NumberLabels)
    assert label_format.read(["1"], "score").dtype == (np.float64 if is_number else np.int64)
    assert label_format.is_hidden(["-1", -1, "-1.0"])
    assert not label_format.is_hidden(["-1", "-١"])


@pytest.mark.parametrize("bad", [1e300, "-1e19", 10**19])
def test_a_number_to_predict_has_a_largest_magnitude(bad: Any) -> None:
    assert NumberLabels().read([1e18, "-1e18"], "price").tolist() == [1e18, -1e18]
    with pytest.raises(LabelError) as caught:
        NumberLabels().read([1, bad], "price")
    assert caught.value.position == 1
    assert all(word in caught.value.reason for word in (repr(bad), "1e+18"))
    assert ThresholdLabels(4.0).read([bad, 1], "price").tolist() == [int(float(bad) > 4), 0]
