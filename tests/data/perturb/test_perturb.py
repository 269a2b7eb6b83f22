"""Every transform is a pure function of its stream, accepts any text and follows its label rule."""

from __future__ import annotations

import unicodedata
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_bench.data.examples import Examples
from lora_bench.data.perturb import LEVELS, TRANSFORMS, choose_transforms, perturb
from lora_bench.data.perturb.characters import NEIGHBOURS
from lora_bench.data.perturb.transform import BREAKS, Transform, share
from lora_bench.errors import Code
from tests.command_line import refuses

ALL = sorted(TRANSFORMS.values(), key=lambda transform: transform.name)
NAMES = [transform.name for transform in ALL]
every_transform = pytest.mark.parametrize("transform", ALL, ids=NAMES)

# words that the transforms change, so that random texts hold some of them
EXAMPLE_WORDS = (
    "What is the best way to learn Java in 2016 ? How do I lose weight What's don't cannot a an I'm movie India 7 "
    "the few vitamin not India's China différence Straße вопрос ερώτηση 機械学習 नमस्ते שלום مرحبا 👩‍👩‍👧 e\u0301tude "
    "ﬁnd İstanbul"
)
WORDS = st.sampled_from(EXAMPLE_WORDS.split(" "))
TEXT = st.one_of(st.text(max_size=60), st.lists(st.one_of(WORDS, st.text(max_size=4)), max_size=12).map(" ".join))
PAIR = st.tuples(TEXT, TEXT)
INTENSITY = st.floats(0.01, 1)


def test_transforms_by_level_and_label_rule() -> None:
    assert len(TRANSFORMS) == 16
    levels = {level: [transform.name for transform in ALL if transform.level == level] for level in LEVELS}
    assert levels == {
        "character": ["case", "keyboard", "punctuation", "swap", "typo"],
        "word": ["contraction", "entity", "entity_alike", "exchange", "number", "number_alike", "stop_word", "synonym"],
        "sentence": ["order", "paraphrase", "polite"],
    }
    assert [transform.name for transform in ALL if not transform.keeps_label] == ["entity", "exchange", "number"]
    assert all(transform.labels in (None, BREAKS, {0: 0, 1: 0}) for transform in ALL)


@every_transform
@settings(max_examples=150, deadline=None)
@given(texts=PAIR, seed=st.integers(0, 2**32), intensity=INTENSITY)
def test_any_text_is_transformed_reproducibly_and_stays_non_empty(
    transform: Transform, texts: tuple[str, str], seed: int, intensity: float
) -> None:
    changed = transform.change(texts, Random(seed), intensity)
    assert changed == transform.change(texts, Random(seed), intensity)  # all randomness is from the stream
    assert isinstance(changed, tuple)
    assert len(changed) == 2
    for before, after in zip(texts if transform.name != "order" else texts[::-1], changed, strict=True):
        after.encode()
        assert bool(after.strip()) == bool(before.strip())


@every_transform
def test_scripts_without_capitals_are_unchanged(transform: Transform) -> None:
    texts = ("機械学習とは何ですか？", "नमस्ते दुनिया שלום עולם مرحبا بالعالم ภาษาไทย 👩‍👩‍👧")
    assert transform.change(texts, Random(0), 1.0) == (texts[::-1] if transform.name == "order" else texts)


@every_transform
@settings(max_examples=60, deadline=None)
@given(texts=PAIR, intensity=INTENSITY)
def test_combining_marks_stay_on_their_letters(transform: Transform, texts: tuple[str, str], intensity: float) -> None:
    def marked(pair: tuple[str, ...]) -> list[str]:
        text = " ".join(pair)
        positions = [i for i, character in enumerate(text) if i and unicodedata.combining(character)]
        return sorted(text[i - 1 : i + 1].casefold() for i in positions if "a" <= text[i - 1].lower() <= "z")

    changed = transform.change(texts, Random(0), intensity)
    if transform.name == "exchange" and changed != texts:  # one of the two texts, twice
        assert any(marked(changed) == marked((text, text)) for text in texts)
    else:
        assert marked(changed) == marked(texts)


@every_transform
@settings(max_examples=60, deadline=None)
@given(texts=PAIR, seed=st.integers(0, 99), other_seed=st.integers(0, 99))
def test_idempotent_and_deterministic_transforms(
    transform: Transform, texts: tuple[str, str], seed: int, other_seed: int
) -> None:
    once = transform.change(texts, Random(seed), 1.0)
    if transform.is_idempotent:
        assert transform.change(once, Random(other_seed), 1.0) == once
    if not transform.is_random:
        assert transform.change(texts, Random(other_seed), 1.0) == once


@every_transform
@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.tuples(TEXT, TEXT, st.integers(0, 1)), min_size=1, max_size=6), seed=st.integers(0, 9))
def test_perturbed_rows_keep_their_ids_and_labels_follow_the_rule(
    transform: Transform, rows: list[tuple[str, str, int]], seed: int
) -> None:
    first, second, labels = map(list, zip(*rows, strict=True))
    examples = Examples(np.arange(len(rows)) + 10, (first, second), np.array(labels))
    perturbed = perturb(examples, transform, seed=seed, intensity=0.5)
    assert examples.texts == (first, second)
    assert perturbed.examples.ids.tolist() == (perturbed.rows + 10).tolist()
    assert perturbed.examples.labels is not None
    for position, row in enumerate(perturbed.rows.tolist()):
        texts = tuple(column[position] for column in perturbed.examples.texts)
        assert texts != rows[row][:2]
        assert perturbed.examples.labels[position] == (rows[row][2] if transform.labels is None else 0)
        assert transform.labels is None or rows[row][2] in transform.labels
    # the perturbation of a row does not depend on other rows
    of_last_row = perturb(examples.take(np.array([len(rows) - 1])), transform, seed=seed, intensity=0.5)
    assert tuple(column[:1] for column in of_last_row.examples.texts) == tuple(
        [column[position] for position in np.flatnonzero(perturbed.rows == len(rows) - 1).tolist()]
        for column in perturbed.examples.texts
    )


def test_without_labels_only_label_preserving_transforms_apply() -> None:
    examples = Examples(np.arange(1), (["What is 7 in India?"], ["What is a 7 in India?"]), None)
    for transform in ALL:
        perturbed = perturb(examples, transform, seed=0, intensity=1.0)
        assert perturbed.examples.labels is None
        assert len(perturbed.rows) <= transform.keeps_label


# -- cases by hand: the allowed results for a pair at full intensity, over twenty seeds --

LANGUAGES = ("Ruby", "Perl", "Fortran", "Haskell")
COMPANIES = ("Microsoft", "Amazon", "Apple", "Samsung", "Facebook", "Twitter", "Instagram", "Uber", "Netflix")
POLITE_OPENINGS = ("I would like to know", "Can anyone tell me", "A quick question", "Please help me with this")


def either_order(first: str, second: str) -> set[tuple[str, str]]:
    return {(first, second), (second, first)}


CASES: dict[str, list[tuple[tuple[str, str], set[tuple[str, str]]]]] = {
    "punctuation": [
        (
            ("Why? Yes.", "No"),
            {(f"Why{a} Yes{b}", "No") for a in ("", "??", " ?") for b in ("", "..", "!")},
        ),
        (("?", "a ?b"), {("?", "a ?b")}),
    ],
    "case": [(("Is it ok?", "größe"), {("IS IT OK?", "GRÖSSE")})],
    "contraction": [
        (("What is the time?", "What's the time?"), {("What's the time?", "What is the time?")}),
        (("I know what it is.", "what's happened"), {("I know what it is.", "what's happened")}),
        (("Why don’t you go?", "Cannot we go?"), {("Why do not you go?", "Can't we go?")}),
        (("He isn't there, is not he?", "It's been long."), {("He is not there, isn't he?", "It's been long.")}),
    ],
    "synonym": [
        (("Where can I buy a movie?", "difficult?"), {("Where can I purchase a film?", "hard?")}),
        (("hard disk", "bigly buyer"), {("hard disk", "bigly buyer")}),
        (("the difference between a and b", "get rid of it"), {("the distinction between a and b", "eliminate it")}),
    ],
    "stop_word": [
        (("Is the cat a pet?", "Is the Who a band?"), {("Is cat pet?", "Is the Who band?")}),
        (("Only a few, not a lot", "vitamin a deficiency"), {("Only a few, not a lot", "vitamin a deficiency")}),
        (("I do not go", "never without you"), {("I do not go", "never without you")}),
    ],
    "number_alike": [
        (
            ("Is 5 more than 4?", "Is 4 less than 5?"),
            {(f"Is {a} more than {b}?", f"Is {b} less than {a}?") for a in range(15) for b in range(15) if a != b},
        ),
        (("At 10:30 pay 1.5 or 1,000 of 7", "8 iPhone7 7th"), {("At 10:30 pay 1.5 or 1,000 of 7", "8 iPhone7 7th")}),
    ],
    "number": [
        (
            ("top 10 films", "10 top films"),
            {(f"top {n} films", "10 top films") for n in range(1, 20) if n != 10}
            | {("top 10 films", f"{n} top films") for n in range(1, 20) if n != 10},
        ),
    ],
    "entity_alike": [
        (
            ("Java or Python?", "Python or Java"),
            {(f"{a} or {b}?", f"{b} or {a}") for a in LANGUAGES for b in LANGUAGES if a != b},
        ),
        (("Is India big?", "Are Indians tall?"), {("Is India big?", "Are Indians tall?")}),
    ],
    "entity": [
        (
            ("Buy Google", "Sell Google"),
            {(f"Buy {a}", "Sell Google") for a in COMPANIES} | {("Buy Google", f"Sell {a}") for a in COMPANIES},
        ),
    ],
    "exchange": [
        (
            ("How do I convert dollars to the rupees?", "A or B?"),
            either_order("How do I convert dollars to the rupees?", "How do I convert rupees to the dollars?"),
        ),
        (("Does Ann love Bo?", "Are you in the know?"), either_order("Does Ann love Bo?", "Does Bo love Ann?")),
        (("Is 3 of 4 more?", "Is it?"), either_order("Is 3 of 4 more?", "Is 4 of 3 more?")),
        (("Is Ann or Bo tall, 3 and 4?", "Can I see Rome?"), {("Is Ann or Bo tall, 3 and 4?", "Can I see Rome?")}),
    ],
    "order": [(("a", "b"), {("b", "a")})],
    "polite": [
        (
            ("Why me?", "Because."),
            {(f"{a}: Why me?", "Because.") for a in POLITE_OPENINGS},
        ),
        (("Warum ich?", "なぜ?"), {("Warum ich?", "なぜ?")}),
    ],
    "paraphrase": [
        (
            ("How do I learn Go?", "What is the difference between a cat and a dog?"),
            {(f"What {a} to learn Go?", "How do a cat and a dog differ?") for a in ("is the best way", "should I do")},
        ),
        (("How do you feel?", "How do we know that?"), {("How do you feel?", "How do we know that?")}),
        (("What does LOL mean?", "How old is Rome?"), {("What is the meaning of LOL?", "What is the age of Rome?")}),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_cases_by_hand(name: str) -> None:
    for texts, expected in CASES[name]:
        results = {TRANSFORMS[name].change(texts, Random(seed), 1.0) for seed in range(20)}
        assert results <= expected
        assert len(results) >= min(3, len(expected))


def test_every_transform_has_cases() -> None:
    assert set(CASES) | {"typo", "keyboard", "swap"} == set(TRANSFORMS)


@pytest.mark.parametrize("name", ["typo", "keyboard", "swap"])
def test_typing_errors_keep_first_and_last_letters_and_short_words(name: str) -> None:
    for seed in range(50):
        first, second = TRANSFORMS[name].change(("Not one WORD is Überall", "não, ещё вопрос"), Random(seed), 1.0)
        words = first.split()
        assert words[:2] + words[3:4] == ["Not", "one", "is"]
        assert (words[2][0], words[2][-1], words[4][0], words[4][-1]) == ("W", "D", "Ü", "l")
        assert words[2].isupper()
        assert words[2] != "WORD"
        assert second.startswith("não, ещё в")
        if name == "swap":
            assert words[2] == "WROD"
            assert sorted(words[4]) == sorted("Überall")
        elif name == "keyboard":
            (changed,) = [(a, b) for a, b in zip("WORD", words[2], strict=True) if a != b]
            assert changed[1].lower() in NEIGHBOURS[changed[0].lower()]
            assert second == "não, ещё вопрос"
        else:
            assert words[2] in ("WOORD", "WORRD", "WRD", "WOD")


def test_keyboard_neighbours_are_symmetric() -> None:
    assert set(NEIGHBOURS["s"]) == set("adwezx")
    assert set(NEIGHBOURS["q"]) == set("wa")
    assert all(a in NEIGHBOURS[b] for a in NEIGHBOURS for b in NEIGHBOURS[a])


@pytest.mark.parametrize(("intensity", "count", "expected"), [(0.1, 30, 3), (0.2, 1, 1), (0.2, 0, 0), (1.0, 7, 7)])
def test_intensity_is_a_share_rounded_up(intensity: float, count: int, expected: int) -> None:
    assert share(intensity, count) == expected
    words = " ".join(["word"] * count)
    changed, _ = TRANSFORMS["typo"].change((words, ""), Random(0), intensity)
    assert sum(word != "word" for word in changed.split()) == expected


# -- choice of transforms --


def test_levels_and_all_choose_the_transforms_that_fit_the_task() -> None:
    def chosen(names: str | list[str], relation: str | None, texts: int, binary: bool = True) -> set[str]:
        return {transform.name for transform in choose_transforms(names, relation, texts, "k", binary=binary)}

    assert [transform.name for transform in choose_transforms("all", "paraphrase", 2, "k")] == list(TRANSFORMS)
    alike = {"number_alike", "entity_alike"}
    assert chosen("all", "paraphrase", 2, binary=False) == {*NAMES} - {"number", "entity", "exchange"}
    assert chosen("all", "similarity", 2, binary=False) == {*NAMES} - {"number", "entity", "exchange", *alike}
    keep_any = {*NAMES} - {"order", "number", "entity", "exchange", *alike}
    assert chosen("all", "entailment", 2) == chosen("all", None, 2) == chosen("all", None, 1) == keep_any
    listed = choose_transforms(["sentence", "polite", "typo"], "paraphrase", 2, "k")
    assert [transform.name for transform in listed] == ["order", "polite", "paraphrase", "typo"]


@pytest.mark.parametrize(
    ("names", "relation", "texts", "binary", "code", "value", "data"),
    [
        ("tipo", "paraphrase", 2, True, Code.UNKNOWN_CHOICE, "tipo", ["typo"]),
        (["typo", "nothing"], "paraphrase", 2, True, Code.UNKNOWN_CHOICE, "nothing", ["all", "case", "character"]),
        ("number", "entailment", 2, True, Code.UNSUPPORTED, "number", ["entailment", "paraphrase"]),
        ("order", "entailment", 2, True, Code.UNSUPPORTED, "order", ["entailment", "paraphrase", "similarity"]),
        ("order", None, 2, True, Code.UNSUPPORTED, "order", ["null", "paraphrase", "similarity"]),
        ("number", "paraphrase", 2, False, Code.UNSUPPORTED, "number", ["two classes"]),
        ("order", "paraphrase", 1, True, Code.CONFLICT, "order", []),
        ("typo", "form", 1, True, Code.UNSUPPORTED, "typo", ["form"]),
        ("all", "form", 1, True, Code.UNSUPPORTED, "all", ["form"]),
        ([], "paraphrase", 2, True, Code.INVALID_VALUE, "[]", ["all"]),
    ],
)
def test_unknown_and_unsuitable_transforms_are_refused(
    names: str | list[str], relation: str | None, texts: int, binary: bool, code: Code, value: str, data: list[str]
) -> None:
    with refuses(code, key="data.perturb") as caught:
        choose_transforms(names, relation, texts, "data.perturb", binary=binary)
    assert caught.value.value == value
    assert all(datum in f"{caught.value.reason} {caught.value.remedy}" for datum in data)


# -- classes and numbers --


@pytest.mark.parametrize("labels", [np.array([2, 0, 76]), np.array([4.25, 0.0, 3.5])], ids=["classes", "numbers"])
def test_labels_of_any_type_are_kept(labels: Any) -> None:
    texts = ["What is a horse?", "Where is it?", "Whose horses?"]
    changed = perturb(Examples(np.arange(3), (texts,), labels), TRANSFORMS["typo"], seed=0, intensity=1.0)
    assert changed.examples.labels is not None
    assert changed.examples.labels.dtype == labels.dtype
    assert changed.examples.labels.tolist() == labels[changed.rows].tolist() != []
