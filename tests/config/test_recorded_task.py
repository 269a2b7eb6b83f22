"""The task that a record is about, in records of every age and state."""

from __future__ import annotations

from typing import Any

import pytest

from lora_bench.config.recorded_task import (
    count_classes,
    form_of_metrics,
    label_names,
    main_metric,
    positive_label,
    recorded_form,
)

THREE = {"type": "classification", "label_names": ["a", "b", "c"]}


@pytest.mark.parametrize(
    ("record", "form", "classes", "metric"),
    [
        ({}, "binary", 2, "mcc"),
        ({"data": {"positives": {"train": 3}}, "selection": {"metric": "mcc"}}, "binary", 2, "mcc"),
        ({"data": THREE}, "multiclass", 3, "mcc"),
        ({"data": THREE, "selection": {"metric": "macro_f1"}}, "multiclass", 3, "macro_f1"),
        (
            {"data": {"label_names": None, "label_counts": {"train": [1, 2, 3, 4], "test": None}}},
            "multiclass",
            4,
            "mcc",
        ),
        ({"data": {"type": "regression", "label_names": None}}, "regression", 2, "spearman"),
        ({"config": {"data": {"type": "regression"}, "trainer": {"main_metric": "r2"}}}, "regression", 2, "r2"),
        ({"config": {"data": THREE, "trainer": {"main_metric": None}}}, "multiclass", 3, "mcc"),
        ({"data": [], "config": 3, "selection": {"metric": "nonsense"}}, "binary", 2, "mcc"),
        ({"data": {"label_names": "abc", "label_counts": 3, "type": 7}}, "binary", 2, "mcc"),
        ({"data": {"label_names": ["only"]}, "selection": {"metric": ["mcc"]}}, "binary", 2, "mcc"),
    ],
)
def test_form_classes_and_main_metric(record: dict[str, Any], form: str, classes: int, metric: str) -> None:
    assert (recorded_form(record), count_classes(record), main_metric(record)) == (form, classes, metric)


def test_the_names_of_classes_and_the_positive_one() -> None:
    assert label_names({}) is None
    assert label_names({"data": {"label_names": None}, "config": {"data": {"label_names": ["no", "yes"]}}}) == [
        "no",
        "yes",
    ]
    record = {"data": {"label_names": ["no", "yes"]}, "config": {"data": {"positive_label": "no"}}}
    assert positive_label(record) == 0
    assert positive_label({"data": {"label_names": ["no", "yes"]}}) == 1


def test_the_form_of_metrics() -> None:
    assert form_of_metrics({"accuracy", "f1", "mcc"}) == "binary"
    assert form_of_metrics({"accuracy", "macro_f1", "mcc"}) == "multiclass"
    assert form_of_metrics({"pearson", "spearman", "mse"}) == "regression"
