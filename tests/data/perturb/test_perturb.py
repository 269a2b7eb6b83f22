"""Every transform of the library, whatever its name: pure, seeded, safe for any text, true to its label rule."""

from __future__ import annotations

import unicodedata
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_bench.data.examples import Examples
from lora_bench.data.perturb import LEVELS, TRANSFORMS, choose_transforms, perturb
from lora_bench.data.perturb.characters import NEIGHBOURS
from lora_bench.data.perturb.transform import BREAKS, KEEPS, Transform, share
from lora_bench.errors import Code
from tests.command_line import refuses

ALL = sorted(TRANSFORMS.values(), key=lambda transform: transform.name)
NAMES = [transform.name for transform in ALL]
every = pytest.mark.parametrize("transform", ALL, ids=NAMES)

# Words that the transforms look for, so that random texts hold places to change.
PLACES = (
    "What is the best way to learn Java in 2016 ? How do I lose weight What's don't cannot a an I'm movie India 7 "
    "the few vitamin not India's China différence Straße вопрос ερώτηση 機械学習 नमस्ते שלום مرحبا 👩‍👩‍👧 e\u0301tude "
    "ﬁnd İstanbul"
)
WORDS = st.sampled_from(PLACES.split(" "))
TEXT = st.one_of(st.text(max_size=60), st.lists(st.one_of(WORDS, st.text(max_size=4)), max_size=12).map(" ".join))
PAIR = st.tuples(TEXT, TEXT)
INTENSITY = st.floats(0.01, 1)


def test_the_library_holds_what_it_should() -> None:
    assert len(TRANSFORMS) == 15
    levels = {level: [each.name for each in ALL if each.level == level] for level in LEVELS}
    assert levels == {
        "character": ["case", "keyboard", "punctuation", "swap", "typo"],
        "word": ["contraction", "entity", "entity_alike", "number", "number_alike", "stop_word", "synonym"],
        "sentence": ["order", "paraphrase", "polite"],
    }
    assert [each.name for each in ALL if not each.keeps_label] == ["entity", "number"]
    assert {each.labels for each in ALL} == {KEEPS, BREAKS}


@every
@settings(max_examples=150, deadline=None)
@given(texts=PAIR, seed=st.integers(0, 2**32), intensity=INTENSITY)
def test_any_text_survives(transform: Transform, texts: tuple[str, str], seed: int, intensity: float) -> None:
    changed = transform.change(texts, Random(seed), intensity)
    assert changed == transform.change(texts, Random(seed), intensity)  # pure: all it draws comes from the stream
    assert isinstance(changed, tuple)
    assert len(changed) == 2
    for before, after in zip(texts if transform.name != "order" else texts[::-1], changed, strict=True):
        after.encode()
        assert bool(after.strip()) == bool(before.strip())


@every
def test_scripts_without_capitals_are_left_alone(transform: Transform) -> None:
    texts = ("機械学習とは何ですか？", "नमस्ते दुनिया שלום עולם مرحبا بالعالم ภาษาไทย 👩‍👩‍👧")
    assert transform.change(texts, Random(0), 1.0) == (texts[::-1] if transform.name == "order" else texts)


@every
@settings(max_examples=60, deadline=None)
@given(texts=PAIR, intensity=INTENSITY)
def test_combining_marks_stay_on_their_letters(transform: Transform, texts: tuple[str, str], intensity: float) -> None:
    def marked(pair: tuple[str, ...]) -> list[str]:
        text = " ".join(pair)
        places = [i for i, sign in enumerate(text) if i and unicodedata.combining(sign)]
        return sorted(text[i - 1 : i + 1].casefold() for i in places if "a" <= text[i - 1].lower() <= "z")

    assert marked(transform.change(texts, Random(0), intensity)) == marked(texts)


@every
@settings(max_examples=60, deadline=None)
@given(texts=PAIR, seed=st.integers(0, 99), again=st.integers(0, 99))
def test_what_settles_changes_nothing_more(transform: Transform, texts: tuple[str, str], seed: int, again: int) -> None:
    once = transform.change(texts, Random(seed), 1.0)
    if transform.is_idempotent:
        assert transform.change(once, Random(again), 1.0) == once
    if not transform.is_random:
        assert transform.change(texts, Random(again), 1.0) == once


@every
@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.tuples(TEXT, TEXT, st.integers(0, 1)), min_size=1, max_size=6), seed=st.integers(0, 9))
def test_rows_keep_their_place_and_labels_follow_the_rule(
    transform: Transform, rows: list[tuple[str, str, int]], seed: int
) -> None:
    first, second, labels = map(list, zip(*rows, strict=True))
    examples = Examples(np.arange(len(rows)) + 10, (first, second), np.array(labels))
    found = perturb(examples, transform, seed=seed, intensity=0.5)
    assert examples.texts == (first, second)
    assert found.examples.ids.tolist() == (found.rows + 10).tolist()
    assert found.examples.labels is not None
    for place, row in enumerate(found.rows.tolist()):
        texts = tuple(column[place] for column in found.examples.texts)
        assert texts != rows[row][:2]
        assert found.examples.labels[place] == transform.labels[rows[row][2]]
    # A row's perturbation does not depend on the rows around it.
    alone = perturb(examples.take(np.array([len(rows) - 1])), transform, seed=seed, intensity=0.5)
    assert tuple(column[:1] for column in alone.examples.texts) == tuple(
        [column[place] for place in np.flatnonzero(found.rows == len(rows) - 1).tolist()]
        for column in found.examples.texts
    )


def test_without_labels_only_those_that_keep_them_change_anything() -> None:
    examples = Examples(np.arange(1), (["What is 7 in India?"], ["What is a 7 in India?"]), None)
    for transform in ALL:
        found = perturb(examples, transform, seed=0, intensity=1.0)
        assert found.examples.labels is None
        assert len(found.rows) <= transform.keeps_label


# -- by hand: what each may make of a pair, at full intensity, over twenty seeds --

RARE = ("Ruby", "Perl", "Fortran", "Haskell")
OTHERS = ("Microsoft", "Amazon", "Apple", "Samsung", "Facebook", "Twitter", "Instagram", "Uber", "Netflix")
BEGINNINGS = ("I would like to know", "Can anyone tell me", "A quick question", "Please help me with this")
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
            {(f"{a} or {b}?", f"{b} or {a}") for a in RARE for b in RARE if a != b},
        ),
        (("Is India big?", "Are Indians tall?"), {("Is India big?", "Are Indians tall?")}),
    ],
    "entity": [
        (
            ("Buy Google", "Sell Google"),
            {(f"Buy {a}", "Sell Google") for a in OTHERS} | {("Buy Google", f"Sell {a}") for a in OTHERS},
        ),
    ],
    "order": [(("a", "b"), {("b", "a")})],
    "polite": [
        (
            ("Why me?", "Because."),
            {(f"{a}: Why me?", "Because.") for a in BEGINNINGS},
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
        found = {TRANSFORMS[name].change(texts, Random(seed), 1.0) for seed in range(20)}
        assert found <= expected
        assert len(found) >= min(3, len(expected))


def test_every_transform_has_cases() -> None:
    assert set(CASES) | {"typo", "keyboard", "swap"} == set(TRANSFORMS)


@pytest.mark.parametrize("name", ["typo", "keyboard", "swap"])
def test_slips_of_the_pen_leave_first_and_last_letters_and_short_words(name: str) -> None:
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


def test_neighbours_on_the_keyboard() -> None:
    assert set(NEIGHBOURS["s"]) == set("adwezx")
    assert set(NEIGHBOURS["q"]) == set("wa")
    assert all(a in NEIGHBOURS[b] for a in NEIGHBOURS for b in NEIGHBOURS[a])


@pytest.mark.parametrize(("intensity", "count", "expected"), [(0.1, 30, 3), (0.2, 1, 1), (0.2, 0, 0), (1.0, 7, 7)])
def test_intensity_is_a_share_rounded_up(intensity: float, count: int, expected: int) -> None:
    assert share(intensity, count) == expected
    words = " ".join(["word"] * count)
    changed, _ = TRANSFORMS["typo"].change((words, ""), Random(0), intensity)
    assert sum(word != "word" for word in changed.split()) == expected


# -- asking for them --


def test_levels_and_all_take_what_suits_the_data() -> None:
    assert [each.name for each in choose_transforms("all", "qqp", 2, "k")] == list(TRANSFORMS)
    assert {each.name for each in choose_transforms("all", "rte", 2, "k")} == {*NAMES} - {
        "order", "number", "number_alike", "entity", "entity_alike",
    }  # fmt: skip
    assert len(choose_transforms("all", "sst2", 1, "k")) == 10
    assert [each.name for each in choose_transforms(["sentence", "polite", "typo"], "qqp", 2, "k")] == [
        "order", "polite", "paraphrase", "typo",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("names", "task", "texts", "code", "value", "data"),
    [
        ("tipo", "qqp", 2, Code.UNKNOWN_CHOICE, "tipo", ["typo"]),
        (["typo", "nothing"], "qqp", 2, Code.UNKNOWN_CHOICE, "nothing", ["all", "case", "character"]),
        ("number", "rte", 2, Code.UNSUPPORTED, "number", ["rte", "qqp", "mrpc"]),
        ("order", "qqp", 1, Code.CONFLICT, "order", []),
        ("typo", "cola", 1, Code.UNSUPPORTED, "typo", ["cola"]),
        ("all", "cola", 1, Code.UNSUPPORTED, "all", ["cola"]),
        ([], "qqp", 2, Code.INVALID_VALUE, "[]", ["all"]),
    ],
)
def test_what_cannot_be_is_refused(
    names: str | list[str], task: str, texts: int, code: Code, value: str, data: list[str]
) -> None:
    with refuses(code, key="data.perturb") as caught:
        choose_transforms(names, task, texts, "data.perturb")
    assert caught.value.value == value
    assert all(datum in f"{caught.value.reason} {caught.value.remedy}" for datum in data)
