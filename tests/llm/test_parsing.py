"""Parsing of replies: P(label 1) from probabilities or text, and the refusal of invalid replies."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lora_bench.llm.parsing import Answer, BrokenAnswerError, read_label, read_number, read_reply

NO_YES = ("no", "yes")


def answer(text: str | None = "no", *positions: dict[str, float], refused: bool = False) -> Answer:
    """Return an answer with these probabilities by token at its first positions."""
    tokens = [[(token, math.log(p)) for token, p in probabilities.items()] for probabilities in positions]
    return Answer(text, refused, tokens, 10, 1, "served")


@pytest.mark.parametrize(
    ("probabilities", "expected"),
    [
        ({"yes": 0.6, "no": 0.2}, 0.6 / 0.8),
        ({" Yes": 0.3, "YES": 0.3, "no": 0.2}, 0.6 / 0.8),  # all tokens that begin the word count
        ({"y": 0.5, "n": 0.5}, 0.5),
        (
            {"yes": 0.9, "the": 0.05},
            0.9 / 0.95,
        ),  # a word that is not listed has at most the smallest listed probability
        ({"yes": 0.999, "the": 0.0005}, 0.999 / 0.9995),
        ({"no": 0.98, "nope": 0.01}, 0.01 / 0.99),
    ],
)
def test_score_from_probabilities(probabilities: dict[str, float], expected: float) -> None:
    read, source = read_label(answer("whatever", probabilities), NO_YES)
    assert source == "probabilities"
    assert read == pytest.approx([1 - expected, expected])


def test_white_space_and_quotes_before_the_answer_are_skipped() -> None:
    positions = ({"\n": 0.9, "x": 0.1}, {'"': 0.9, "no": 0.1}, {"yes": 0.75, "no": 0.25})
    assert read_label(answer("yes", *positions), NO_YES) == (pytest.approx([0.25, 0.75]), "probabilities")


def test_tokens_that_begin_both_words_are_ignored() -> None:
    words = ("equivalent", "equivalent_not")
    assert read_label(answer("Equivalent.", {"equi": 0.9, "the": 0.1}), words) == ([1.0, 0.0], "text")
    words = ("card arrival", "card_linking", "top_up")
    positions = {"card": 0.9, "top": 0.05}
    assert read_label(answer("card_arrival", positions), words) == ([1.0, 0.0, 0.0], "text")
    assert read_label(answer("Card-Linking.", positions), words) == ([0.0, 1.0, 0.0], "text")
    assert read_label(answer("card", positions), words) == (None, "unparsable")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("yes", ([0.0, 1.0], "text")),
        (" Yes.", ([0.0, 1.0], "text")),
        ("**NO**\n", ([1.0, 0.0], "text")),
        ('{"answer": "Yes"}', ([0.0, 1.0], "text")),
        ('```json\n{"yes": 3, "no": 1}\n```', ([0.25, 0.75], "probabilities")),
        ('{"yes": 0, "no": 0}', (None, "unparsable")),
        ('{"yes": NaN, "no": 1}', (None, "unparsable")),
        ('{"yes": "no", "no": "yes"}', (None, "unparsable")),
        ('{"yes": 1}', (None, "unparsable")),
        ('{"yes": 1', (None, "unparsable")),
        ("yes, they are", (None, "unparsable")),
        ("no yes", (None, "unparsable")),
        ("yesterday", (None, "unparsable")),
        ("", (None, "unparsable")),
        (None, (None, "unparsable")),
    ],
)
def test_the_text_must_be_one_of_the_two_words(text: str | None, expected: tuple[list[float] | None, str]) -> None:
    assert read_label(answer(text), NO_YES) == expected


@pytest.mark.parametrize(
    ("probabilities", "expected"),
    [
        ({"en": 0.6, "neut": 0.2, "Contra": 0.2}, [0.6, 0.2, 0.2]),
        ({"en": 0.9, "maybe": 0.04}, [0.9 / 0.96, 0.03 / 0.96, 0.03 / 0.96]),  # 0.06 is left for two words
        ({"en": 0.7, "neut": 0.2}, [0.7, 0.2, 0.1]),
    ],
)
def test_probabilities_of_three_classes(probabilities: dict[str, float], expected: list[float]) -> None:
    words = ("entailment", "neutral", "contradiction")
    assert read_label(answer("?", probabilities), words) == (pytest.approx(expected), "probabilities")


def test_probabilities_in_json_take_precedence_over_tokens() -> None:
    words = ("entailment", "neutral", "contradiction")
    positions = ({'{"': 1.0, "x": 0.0001}, {"neutral": 0.9, "en": 0.1})
    text = '{"neutral": 0.1, "Entailment": 0.7, "contradiction": 0.2}'
    assert read_label(answer(text, *positions), words) == (pytest.approx([0.7, 0.1, 0.2]), "probabilities")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4.5", 4.5),
        ("**-1e-3**.", -1e-3),
        ("The score is 7.", 7.0),
        ('{"score": .25}', 0.25),
        ("1e9", 1e9),
        ("4/5", None),
        ("3,5", None),
        ("4.5x", None),
        ("v2", None),
        ("1e999", None),
        ("", None),
        (None, None),
    ],
)
def test_a_number_must_be_the_only_one_in_the_text(text: str | None, expected: float | None) -> None:
    assert read_number(answer(text)) == (expected, "unparsable" if expected is None else "text")
    assert read_number(answer(text, refused=True)) == (None, "refused")


def test_a_refusal_takes_precedence_over_probabilities() -> None:
    assert read_label(answer("yes", {"yes": 0.9, "no": 0.1}, refused=True), NO_YES) == (None, "refused")


def reply(message: dict[str, Any], **choice: Any) -> dict[str, Any]:
    return {"choices": [{"message": message, "finish_reason": "stop", **choice}]}


def test_valid_replies() -> None:
    assert read_reply(reply({"content": "no"})) == Answer("no", False, [], None, None, None)
    assert read_reply(reply({"content": None, "refusal": "I will not"})).refused
    assert read_reply(reply({"content": ""}, finish_reason="content_filter")).refused
    usage = {"prompt_tokens": 7, "completion_tokens": 0}
    assert read_reply(reply({"content": "no"}) | {"usage": usage}).prompt_tokens == 7
    listed = [{"token": "no", "logprob": -0.5}, {"token": "yes", "logprob": -9999.0}, {"token": "?", "logprob": "-inf"}]
    logprobs = {"content": [{"token": "no", "logprob": -0.5, "top_logprobs": listed}]}
    assert read_reply(reply({"content": "no"}, logprobs=logprobs)).tokens == [[("no", -0.5), ("yes", -9999.0)]]


@pytest.mark.parametrize("tokens", [-1, 1.5, True, math.nan, math.inf, "7", [7], 10**9, int("9" * 400)])
def test_invalid_token_counts_are_refused_and_named(tokens: Any) -> None:
    for name in ("prompt_tokens", "completion_tokens"):
        with pytest.raises(BrokenAnswerError, match=name):
            read_reply(reply({"content": "no"}) | {"usage": {name: tokens}})


ENTRY = {"text": "no", "refused": False, "tokens": [[["no", -0.5]]], "prompt_tokens": 7, "completion_tokens": 1}
ENTRY |= {"model": "served"}


def test_a_cached_entry_is_read_as_an_answer() -> None:
    assert Answer.from_json(ENTRY) == Answer("no", False, [[("no", -0.5)]], 7, 1, "served")


@pytest.mark.parametrize(
    "damage",
    [
        {"text": 3},
        {"refused": "yes"},
        {"tokens": None},
        {"tokens": [["no"]]},
        {"tokens": [[["no", math.nan]]]},
        {"tokens": [[["no", 10**400]]]},
        {"prompt_tokens": -1},
        {"completion_tokens": True},
        {"model": ["served"]},
        {"other": 1},
    ],
)
def test_a_damaged_cached_entry_is_refused(damage: dict[str, Any]) -> None:
    with pytest.raises(BrokenAnswerError):
        Answer.from_json(ENTRY | damage)


@pytest.mark.parametrize(
    "broken",
    [
        None,
        [],
        "no",
        {},
        {"choices": []},
        {"choices": [None]},
        {"choices": None},
        {"choices": {}},
        {"choices": [{"message": None}]},
        reply({"content": ["no"]}),
        reply({"content": "no"}) | {"model": {"name": "x"}},
        reply({"content": "no"}) | {"usage": [7]},
        reply({"content": "no"}, logprobs=[1]),
        reply({"content": "no"}, logprobs={"content": "no"}),
        reply({"content": "no"}, logprobs={"content": [{"top_logprobs": [{"token": "no", "logprob": math.nan}]}]}),
        reply({"content": "no"}, logprobs={"content": [{"top_logprobs": [{"token": "no", "logprob": "low"}]}]}),
        reply({"content": "no"}, logprobs={"content": [{"top_logprobs": [{"token": 1, "logprob": -1}]}]}),
        {"choices": [{"message": "no"}]},
        reply({"content": 3}),
        reply({"content": "no"}) | {"usage": {"prompt_tokens": "many"}},
        reply({"content": "no"}) | {"usage": {"prompt_tokens": math.inf}},
        reply({"content": "no"}, logprobs={"content": [3]}),
        reply({"content": "no"}, logprobs={"content": [{"top_logprobs": [{"token": "no"}]}]}),
    ],
)
def test_invalid_replies_are_refused(broken: Any) -> None:
    with pytest.raises(BrokenAnswerError):
        read_reply(broken)
