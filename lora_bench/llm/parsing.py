"""Parsing of a server's reply, and of a model's answer into P(label 1)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_bench.llm.settings import LLM

READINGS = ("probabilities", "text", "refused", "unparsable")
"""Sources of a label: log-probabilities, the text, or none (a refusal or another text)."""
_AROUND = re.compile(r"^[\W_]+|[\W_]+$")
_MAX_POSITIONS = 4  # tokens: white space or a quotation mark may come before the answer


@dataclass(frozen=True)
class Answer:
    """The answer to one request, as the cache stores it."""

    text: str | None
    refused: bool
    """The model, or a filter before it, declined."""
    tokens: list[list[tuple[str, float]]]
    """The likeliest tokens at each of the first positions, with log-probabilities; empty if the server gives none."""
    prompt_tokens: int | None
    completion_tokens: int | None
    """None: the server does not report it."""
    model: str | None
    """The server's name of the model that answered."""

    @classmethod
    def from_json(cls, entry: Any) -> Answer:
        """Return the answer that an entry of the cache holds.

        Raises:
            BrokenAnswerError: the entry is not an answer: a field is missing, unknown or of another type.
        """
        try:
            answer = cls(**entry)
            tokens = [[(str(token), float(logprob)) for token, logprob in candidates] for candidates in answer.tokens]
            _count(entry, "prompt_tokens")
            _count(entry, "completion_tokens")
        except (KeyError, OverflowError, TypeError, ValueError):
            raise BrokenAnswerError("the entry is not an answer") from None
        texts = isinstance(answer.text, str | None) and isinstance(answer.model, str | None)
        finite = all(math.isfinite(logprob) for candidates in tokens for _, logprob in candidates)
        if not (texts and isinstance(answer.refused, bool) and finite):
            raise BrokenAnswerError("the entry is not an answer")
        return replace(answer, tokens=tokens)

    def cost(self, llm: LLM, max_cost: float) -> float:
        """Return its cost; `max_cost` if the server does not report both numbers of tokens, 0 without prices."""
        if self.prompt_tokens is None or self.completion_tokens is None:
            return max_cost
        return llm.cost(self.prompt_tokens, self.completion_tokens) or 0.0


class BrokenAnswerError(ValueError):
    """A reply that is not a chat completion."""


def read_reply(reply: Any) -> Answer:
    """Return the answer in a server's reply, decoded from JSON; of several choices it is the first one.

    What the server leaves out is None, log-probabilities are an empty list.

    Raises:
        BrokenAnswerError: the reply is not a chat completion; the message names its fault.
    """
    choices = _field(reply, "choices", list)
    if not choices:
        raise BrokenAnswerError("the reply is not a chat completion: choices is missing or empty")
    message = _field(choices[0], "message", dict)
    if message is None:
        raise BrokenAnswerError("the reply is not a chat completion: message is missing")
    usage = _field(reply, "usage", dict) or {}
    return Answer(
        text=_field(message, "content", str),
        refused=bool(message.get("refusal")) or choices[0].get("finish_reason") == "content_filter",
        tokens=_tokens(_field(choices[0], "logprobs", dict)),
        prompt_tokens=_count(usage, "prompt_tokens"),
        completion_tokens=_count(usage, "completion_tokens"),
        model=_field(reply, "model", str) or None,
    )


_TYPES: dict[type, str] = {list: "a list", dict: "an object", str: "text"}


def _field(node: Any, name: str, expected: type[Any]) -> Any:
    """Return a field of an object of the reply; None if it is missing or null.

    Raises:
        BrokenAnswerError: the node is not an object, or the field is of another type.
    """
    if not isinstance(node, dict):
        raise BrokenAnswerError(f"the reply is not a chat completion: the parent of {name} is not an object")
    value = node.get(name)
    if value is not None and not isinstance(value, expected):
        raise BrokenAnswerError(f"the reply is not a chat completion: {name} is not {_TYPES[expected]}")
    return value


MAX_TOKENS = 10_000_000
"""More tokens than one request or answer can have."""


def _count(usage: dict[str, Any], name: str) -> int | None:
    """Return a number of tokens that the server reports; None if it reports none.

    Raises:
        BrokenAnswerError: it is not an integer from 0 to `MAX_TOKENS`.
    """
    tokens = usage.get(name)
    if tokens is None:
        return None
    if not isinstance(tokens, int) or isinstance(tokens, bool) or not 0 <= tokens <= MAX_TOKENS:
        raise BrokenAnswerError(f"the reply's {name} is not a number of tokens from 0 to {MAX_TOKENS:,}")
    return tokens


def _tokens(logprobs: dict[str, Any] | None) -> list[list[tuple[str, float]]]:
    """Return the likeliest tokens at each of the answer's first `_MAX_POSITIONS` positions: (token, log-probability).

    They are the server's `top_logprobs`, in its order, without empty tokens and those of probability 0.

    Args:
        logprobs: of the reply; None if the server gives none, for which the result is empty.

    Raises:
        BrokenAnswerError: a field is of another type, or a token has no log-probability.
    """
    positions = [] if logprobs is None else _field(logprobs, "content", list) or []
    return [
        [
            (token, logprob)
            for candidate in _field(position, "top_logprobs", list) or []
            if math.isfinite(logprob := _logprob(candidate)) and (token := _field(candidate, "token", str))
        ]
        for position in positions[:_MAX_POSITIONS]
    ]


def _logprob(token: Any) -> float:
    """Return a token's log-probability: minus infinity, or at least -1e30.

    Raises:
        BrokenAnswerError: it is missing, not a number, or above 1.
    """
    value = token.get("logprob") if isinstance(token, dict) else None
    if isinstance(value, str) and value.lower() in ("-inf", "-infinity"):
        return -math.inf
    if not isinstance(value, int | float) or isinstance(value, bool) or not -math.inf <= value <= 1:
        raise BrokenAnswerError("the reply's logprobs hold a token without a log-probability")
    return max(float(value), -1e30) if value != -math.inf else -math.inf


def read_label(answer: Answer, words: Sequence[str]) -> tuple[float | None, str]:
    """Return P(label 1) of an answer, and the source of it (`READINGS`).

    From log-probabilities it is p1 / (p0 + p1), with p the sum over the tokens with which a word can begin. A label
    without a listed token gets its upper bound: the smallest listed probability, or 1 minus their sum. Without usable
    log-probabilities it is 0 or 1 from the text, if that is one of the two words apart from case and punctuation around
    it. None if the model refused, or the answer is not a label.

    Args:
        answer: of the model.
        words: for label 0 and label 1.
    """
    if answer.refused:
        return None, "refused"
    score = _from_tokens(answer.tokens, words)
    if score is not None:
        return score, "probabilities"
    text = _normalise(answer.text or "")
    for label, word in enumerate(words):
        if text == _normalise(word):
            return float(label), "text"
    return None, "unparsable"


def _normalise(text: str) -> str:
    """Return a text in lower case, without the punctuation and white space around it."""
    return _AROUND.sub("", text).casefold()


def _from_tokens(positions: Sequence[Sequence[tuple[str, float]]], words: Sequence[str]) -> float | None:
    """Return P(label 1) from log-probabilities, as `read_label` defines it.

    It is read at the first position whose likeliest token is more than punctuation or white space. None if there is no
    such position, it has fewer than two tokens, or none of them begins exactly one of the words.
    """
    zero, one = map(_normalise, words)
    for candidates in positions:
        if len(candidates) < 2:
            return None
        if not _normalise(max(candidates, key=lambda candidate: candidate[1])[0]):
            continue
        masses = {0: 0.0, 1: 0.0}
        for token, logprob in candidates:
            begins = [_begins(_normalise(token), word) for word in (zero, one)]
            if begins in ([True, False], [False, True]):
                masses[begins.index(True)] += math.exp(min(logprob, 0.0))
        if not any(masses.values()):
            return None
        probabilities = [math.exp(min(logprob, 0.0)) for _, logprob in candidates]
        upper_bound = min(*probabilities, max(0.0, 1 - sum(probabilities)))
        zero_mass, one_mass = (mass or upper_bound for mass in masses.values())
        return one_mass / (zero_mass + one_mass)
    return None


def _begins(token: str, word: str) -> bool:
    """Return whether an answer that begins with this token can be the word."""
    return bool(token) and word.startswith(token)
