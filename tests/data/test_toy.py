"""The generator's labels agree with the meaning read back from the texts, and a bag of words cannot predict them."""

from __future__ import annotations

import re
from random import Random
from typing import TYPE_CHECKING

import numpy as np
import pytest
from scipy import sparse
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import matthews_corrcoef, roc_auc_score

from lora_bench.data import toy
from lora_bench.errors import Code
from tests.command_line import refuses

if TYPE_CHECKING:
    from lora_bench.data.examples import Examples


@pytest.fixture(scope="module")
def splits() -> dict[str, Examples]:
    return {"train": toy.generate(3000, 0, "train"), "validation": toy.generate(1000, 0, "validation")}


def labelled(examples: Examples) -> list[tuple[str, str, int]]:
    assert examples.labels is not None
    return list(zip(*examples.texts, examples.labels.tolist(), strict=True))


def test_pairs_depend_on_the_arguments_only() -> None:
    examples = toy.generate(50, 7, "train")
    assert examples.fingerprint() == toy.generate(50, 7, "train").fingerprint()
    others = [toy.generate(50, 8, "train"), toy.generate(50, 7, "validation"), toy.generate(49, 7, "train")]
    assert len({examples.fingerprint(), *(other.fingerprint() for other in others)}) == 4
    assert examples.ids.tolist() == list(range(50))
    # results on this data set are compared across machines
    assert toy.generate(500, 0, "train").fingerprint().startswith("9de74a57d97b63df")


def test_pairs_are_unique_within_and_across_splits(splits: dict[str, Examples]) -> None:
    # a validation split of another seed shares no pair with the train split either
    examples_by_split = [*splits.values(), toy.generate(1000, 1, "validation")]
    keys = [[frozenset(pair) for pair in zip(*examples.texts, strict=True)] for examples in examples_by_split]
    for examples, distinct in zip(examples_by_split, map(set, keys), strict=True):
        assert len(distinct) == len(examples)
        assert all(len(pair) == 2 for pair in distinct)
    assert not set(keys[0]) & set(keys[1])
    assert not set(keys[0]) & set(keys[2])


def test_questions_are_sentences_of_8_to_15_words(splits: dict[str, Examples]) -> None:
    for examples in splits.values():
        questions = [question for column in examples.texts for question in column]
        assert all(re.fullmatch(r"[A-Z][\w' é,-]+\?", question) for question in questions)
        lengths = [len(question.split()) for question in questions]
        assert min(lengths) >= 8
        assert max(lengths) <= 15
        assert examples.labels is not None
        assert 0.36 < examples.labels.mean() < 0.44


def test_a_quarter_of_the_words_occurs_in_validation_only(splits: dict[str, Examples]) -> None:
    train, validation = (" ".join(examples.texts[0] + examples.texts[1]) for examples in splits.values())
    for pool in (toy.PEOPLE, toy.CITIES, toy.TOPICS, toy.GUESTS):
        held_out = pool[len(pool) * 3 // 4 :]
        assert not any(re.search(rf"\b{word}\b", train) for word in held_out)
        assert all(word in validation for word in pool)


# --- the meaning of a question, read back from its words ---


def comparison(question: str) -> tuple[str, str, int] | None:
    """Return (who has more, who has less, index of the dimension); None if the question compares nobody."""
    match = re.search(
        r"that (\w+) is (?:\w+ ){1,2}?(\w+er) than (\w+)\?|whether (\w+) is really (\w+) than (\w+)\?", question
    )
    if not match:
        return None
    a, word, b = (group for group in match.groups() if group)
    dimension = next(i for i, pair in enumerate(toy.COMPARISONS) if word in pair)
    return (a, b, dimension) if word == toy.COMPARISONS[dimension][0] else (b, a, dimension)


def route(question: str) -> tuple[str, str, str] | None:
    match = re.search(rf"(?:from|leave) ({'|'.join(toy.CITIES)}).* to ({'|'.join(toy.CITIES)})\b", question)
    return match and (*match.groups(), re.search("|".join(toy.VEHICLES), question)[0])  # type: ignore[return-value,index]


def permission(question: str) -> tuple[bool, ...] | None:
    match = re.search("allow|permit|forbid|ban", question)
    if not match:
        return None
    allows = (match[0] in ("allow", "permit")) != ("do not" in question)
    return (allows, *(word in question for word in (*toy.PLACES, *toy.CITIES, *toy.GUESTS)))


def bond(question: str) -> tuple[frozenset[str], int] | None:
    meanings = [words for square in toy.BONDS for words in square]
    indices = [i for i, words in enumerate(meanings) if any(f" {word} " in question for word in words)]
    return (frozenset(re.findall("|".join(toy.PEOPLE), question)), indices[0]) if indices else None


@pytest.mark.parametrize("meaning", [comparison, route, permission, bond])
def test_labels_agree_with_the_meaning_of_the_questions(meaning: object, splits: dict[str, Examples]) -> None:
    assert callable(meaning)
    read_back = [
        (meaning(first) == meaning(second), bool(label))
        for examples in splits.values()
        for first, second, label in labelled(examples)
        if meaning(first) is not None
    ]
    assert len(read_back) > 500
    assert all(equal == label for equal, label in read_back)


@pytest.mark.parametrize(
    ("write", "first", "second", "label"),
    [
        (toy.comparison, r"(\w+) is .*taller than (\w+)\?", r"{1} is .*shorter than {0}\?", 1),
        (toy.comparison, r"(\w+) is .*taller than (\w+)\?", r"{1} is .*taller than {0}\?", 0),
        (toy.bond, r"(\w+) is .*the spouse of (\w+)", r"{1} is .*married to {0}", 1),
        (toy.route, r"from (\w+) .* to (\w+)\?", r"{1} .* to {0}", 0),
        (toy.permission, r"(\w+) do not forbid (\w+)", r"{0} allow {1}", 1),
        (toy.permission, r"(\w+) do not forbid (\w+)", r"{0} do not allow {1}", 0),
    ],
)
def test_every_construction_is_generated(write: object, first: str, second: str, label: int) -> None:
    assert callable(write)
    draw = toy.Draw(Random(0), unseen=False)
    for _ in range(2000):
        question, other = write(draw, bool(label))
        match = re.search(first, question)
        if match and re.search(second.format(*match.groups()), other):
            return
    pytest.fail(f"no {first} with {second} and label {label}")


# --- baselines without word order ---


def bag_of_words_mcc(train: Examples, validation: Examples) -> float:
    """Return the validation MCC of logistic regression on counts of shared, differing and all words."""
    vectorizer = CountVectorizer(token_pattern=r"\w+").fit(train.texts[0] + train.texts[1])

    def features(examples: Examples) -> sparse.csr_matrix:
        one, other = (vectorizer.transform(column) for column in examples.texts)
        shared, differ, both = one.minimum(other), abs(one - other), one + other
        return sparse.csr_matrix(sparse.hstack([shared, differ, both, shared.sum(1), differ.sum(1), both.sum(1)]))

    model = LogisticRegression(max_iter=5000).fit(features(train), train.labels)
    return float(matthews_corrcoef(validation.labels, model.predict(features(validation))))


def test_a_bag_of_words_has_an_mcc_below_0_4(splits: dict[str, Examples]) -> None:
    assert bag_of_words_mcc(splits["train"], splits["validation"]) < 0.4


@pytest.mark.parametrize("write", toy.FAMILIES, ids=lambda write: write.__name__)
def test_word_overlap_hardly_predicts_the_label(write: object) -> None:
    assert callable(write)
    draw = toy.Draw(Random(0), unseen=True)
    labels = np.arange(1000) % 2
    pairs = [[set(re.findall(r"\w+", question)) for question in write(draw, bool(label))] for label in labels]
    overlap = [len(one & other) / len(one | other) for one, other in pairs]
    assert 0.25 < roc_auc_score(labels, overlap) < 0.75


def test_more_rows_than_distinct_pairs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy, "FAMILIES", (toy.comparison,))
    monkeypatch.setattr(toy, "PEOPLE", ("Anna", "Ben", "Clara", "David"))
    monkeypatch.setattr(toy, "COMPARISONS", toy.COMPARISONS[:1])
    with refuses(Code.INVALID_VALUE, key="data.train_rows") as caught:
        toy.generate(1000, 0, "train")
    assert caught.value.value == 1000
