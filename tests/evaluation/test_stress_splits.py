"""Reported splits on unseen rows and perturbed: which pairs are scored, and what the figures say."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from lora_bench.config.build import build_data
from lora_bench.data.examples import Examples
from lora_bench.errors import Code
from lora_bench.evaluation.metrics import score
from lora_bench.evaluation.stress_splits import describe_stress_splits, resolve_transforms, score_stress_splits
from tests.command_line import refuses
from tests.helpers import SMALL_TOY, composed

if TYPE_CHECKING:
    from lora_bench.config.schema import Data

FIRST = ["What is a dog?", "How many is 7?", "Is India big?", "機械学習?"]
SECOND = ["What's a dog?", "Is 7 many?", "Is India large?", "学習?"]
SPLIT = Examples(np.arange(4), (FIRST, SECOND), np.array([1, 1, 1, 0]))


def settings(*overrides: str) -> Data:
    return build_data(composed(*SMALL_TOY, *overrides).data)


class Scorer:
    """Answers 1 where the texts hold no typing error and no 'Please'; remembers what it was asked."""

    def __init__(self) -> None:
        self.requests: list[list[tuple[str, ...]]] = []

    def __call__(self, examples: Examples) -> Any:
        rows = list(zip(*examples.texts, strict=True))
        self.requests.append(rows)
        texts = {text for column in SPLIT.texts for text in column}
        return np.array([0.9 if set(row) <= texts else 0.2 for row in rows])


def figures(*overrides: str, seen: tuple[Examples, ...] = ()) -> tuple[dict[str, float | None], Scorer, list[str]]:
    scorer, lines = Scorer(), list[str]()
    data = settings(*overrides)
    scores = np.array([0.9, 0.9, 0.9, 0.9])
    metrics = score_stress_splits(data, SPLIT, scores, scorer, seen=seen, metrics={}, log=lines.append)
    return metrics, scorer, lines


def test_nothing_more_is_scored_unless_asked() -> None:
    assert figures()[0] == {}
    assert describe_stress_splits(settings(), {"validation": SPLIT}, ()) == {}


def test_only_what_a_transform_changed_is_scored_and_each_different_pair_once() -> None:
    metrics, scorer, lines = figures("data.perturb=[typo,order]", "data.perturb_seeds=5", "data.intensity=0.01")
    typos, orders = scorer.requests
    assert len(set(typos)) == len(typos) < 3 * 5  # the pair in Chinese has no word to mistype
    assert all("学習?" not in row for row in typos)
    assert orders == list(zip(SECOND, FIRST, strict=True))  # once: nothing is drawn
    assert metrics["typo/changed"] == pytest.approx(3 / 4)
    assert metrics["typo/accuracy"] == 0.0  # three duplicates are no more metrics, and the fourth was wrong before
    assert metrics["typo/attack_success"] == 1.0
    assert metrics["perturbed/order_consistency"] == 1.0
    assert [re.findall(r"typo|order|\d+", line) for line in lines] == [["typo", "3", "4"], ["order", "4", "4"]]


def test_a_changed_number_makes_a_duplicate_none() -> None:
    metrics, scorer, _ = figures("data.perturb=number", "data.perturb_seeds=1")
    assert len(scorer.requests[0]) == 1
    assert metrics["number/changed"] == 1 / 4
    assert metrics["number/accuracy"] == 1.0
    assert metrics["number/attack_success"] == 0.0


def test_unseen_rows_have_figures_of_their_own() -> None:
    seen = Examples(np.arange(1), (["Is 7 many?"], ["other"]), np.array([1]))
    metrics, scorer, _ = figures("data.unseen=true", seen=(seen, seen))
    rows = np.array([0, 2, 3])
    assert scorer.requests == []
    assert SPLIT.labels is not None
    expected = score(np.full(3, 0.9), SPLIT.labels[rows], {})
    assert metrics == {f"unseen/{name}": value for name, value in expected.items()}
    assert describe_stress_splits(settings("data.unseen=true"), {"validation": SPLIT}, (seen,)) == {
        "unseen": {"validation": 3}
    }


def test_no_unseen_row_leaves_no_figure() -> None:
    assert figures("data.unseen=true", seen=(SPLIT,))[0] == {}


def test_the_record_names_the_transforms() -> None:
    described = describe_stress_splits(
        settings("data.perturb=[order,word]", "data.perturb_seeds=2"), {"validation": SPLIT}, ()
    )
    words = ["contraction", "synonym", "stop_word", "number_alike", "entity_alike", "number", "entity", "exchange"]
    assert described == {"perturb": {"transforms": ["order", *words], "seeds": 2, "intensity": 0.2}}


def test_unknown_and_unsuited_transforms_are_refused() -> None:
    assert resolve_transforms(settings()) == []
    with refuses(Code.UNKNOWN_CHOICE, key="data.perturb") as caught:
        resolve_transforms(settings("data.perturb=tipo"))
    assert caught.value.value == "tipo"
    assert "typo" in str(caught.value.remedy)
    with refuses(Code.UNSUPPORTED, key="data.perturb") as caught:
        resolve_transforms(replace(settings("data.perturb=[entity]"), relation="entailment"))
    assert caught.value.value == "entity"
    assert "entailment" in caught.value.reason


def test_scores_of_several_classes_keep_their_columns() -> None:
    labels = np.array([2, 0, 1, 0])
    split = Examples(np.arange(4), (FIRST, SECOND), labels)
    data = replace(settings("data.perturb=[typo,number_alike]"), label_names=["a", "b", "c"])
    scores = np.eye(3)[labels]
    metrics = score_stress_splits(
        data, split, scores, lambda rows: np.eye(3)[[1] * len(rows)], seen=(), metrics={}, log=lambda line: None
    )
    assert metrics["typo/flip_rate"] == pytest.approx(2 / 3)  # of three rows that change, one is of class 1
    assert "typo/macro_f1" in metrics
