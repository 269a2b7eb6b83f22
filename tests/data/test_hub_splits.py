"""Splits of the hub under other names, and rows without a label: `data.splits` and classes of -1."""

from __future__ import annotations

from typing import TYPE_CHECKING

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from lora_bench.config.build import build_data
from lora_bench.data.sources import load, reported_splits
from lora_bench.errors import Code
from tests.command_line import refuses
from tests.helpers import composed

if TYPE_CHECKING:
    from lora_bench.config.schema import Data

TEXTS = ["data=hub", "data.hub_id=x/y", "data.text_columns=[text]"]


def hub_data(*overrides: str) -> Data:
    return build_data(composed(*TEXTS, *overrides).data)


def rows(labels: list[int]) -> Dataset:
    content = {"text": [f"text {i}" for i in range(len(labels))], "label": labels}
    return Dataset.from_dict(content, Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])}))


def serve(monkeypatch: pytest.MonkeyPatch, **splits: Dataset) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **options: DatasetDict(splits))


def test_splits_of_other_names_stand_for_those_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, train=rows([0, 1]), validation_matched=rows([1]), test_matched=rows([-1]))
    splits = load(hub_data("data.splits={train: train, validation: validation_matched}"))[1]
    assert {name: len(split) for name, split in splits.items()} == {"train": 2, "validation": 1}
    assert [*reported_splits(splits)] == ["validation"]


def test_data_without_a_validation_split_is_reported_on_test(monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, train=rows([0, 1]), test=rows([1, 0]), unsupervised=rows([-1]))
    assert [*reported_splits(load(hub_data())[1])] == ["test"]


@pytest.mark.parametrize(
    ("splits", "key", "details"),
    [
        ("null", "data.hub_id", ["train, validation, test", "dev_r1"]),
        ("{train: train_r1, test: test_r1}", "data.splits", ["test_r1, train_r1", "dev_r1"]),
    ],
)
def test_splits_that_the_hub_lacks_are_refused(
    monkeypatch: pytest.MonkeyPatch, splits: str, key: str, details: list[str]
) -> None:
    serve(monkeypatch, dev_r1=rows([0, 1]))
    with refuses(Code.NOT_FOUND, key=key) as caught:
        load(hub_data(f"data.splits={splits}"))
    assert all(detail in f"{caught.value.reason} {caught.value.remedy}" for detail in details)


def test_an_unknown_split_of_a_run_is_refused() -> None:
    with refuses(Code.INVALID_VALUE, key="data.splits") as caught:
        hub_data("data.splits={dev: validation}")
    assert "dev" in caught.value.reason


def test_rows_that_the_hub_marks_as_unlabelled_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, train=rows([0, -1, 1, -1]), test=rows([-1, -1]))
    splits = load(hub_data())[1]
    assert splits["train"].labels is not None
    assert (splits["train"].labels.tolist(), splits["train"].texts) == ([0, 1], (["text 0", "text 2"],))
    assert splits["test"].labels is None
    assert len(splits["test"]) == 2
