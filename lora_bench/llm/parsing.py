"""From what a model answered to P(label 1)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_bench.llm.settings import LLM

READINGS = ("probabilities", "text", "refused", "unparsable")
"""How a label was read: from log-probabilities, from the text, or not at all."""
_AROUND = re.compile(r"^[\W_]+|[\W_]+$")
_LOOK_AT = 4  # tokens: white space or a quotation mark may come before the answer


@dataclass(frozen=True)
class Answer:
    """What came back for one request, as it is kept in the cache."""

    text: str | None
    refused: bool
    """The model, or a filter before it, declined."""
    tokens: list[list[tuple[str, float]]]
    """For each of its first tokens the likeliest ones and their log-probabilities; empty where the server has none."""
    prompt_tokens: int | None
    completion_tokens: int | None
    """None where the server does not say."""
    model: str | None
    """What the server calls the model that answered."""

    @classmethod
    def from_json(cls, entry: Any) -> Answer:
        """Return the answer that an entry of the cache holds.

        Raises:
            BrokenAnswerError: it holds none.
        """
        try:
            answer = cls(**entry)
            tokens = [[(str(token), float(logprob)) for token, logprob in place] for place in answer.tokens]
            _count(entry, "prompt_tokens")
            _count(entry, "completion_tokens")
        except (KeyError, OverflowError, TypeError, ValueError):
            raise BrokenAnswerError("the entry is no answer") from None
        texts = isinstance(answer.text, str | None) and isinstance(answer.model, str | None)
        finite = all(math.isfinite(logprob) for place in tokens for _, logprob in place)
        if not (texts and isinstance(answer.refused, bool) and finite):
            raise BrokenAnswerError("the entry is no answer")
        return replace(answer, tokens=tokens)

    def cost(self, llm: LLM, most: float) -> float:
        """What it cost; `most` where the server does not say how long it was."""
        if self.prompt_tokens is None or self.completion_tokens is None:
            return most
        return llm.cost(self.prompt_tokens, self.completion_tokens) or 0.0


class BrokenAnswerError(ValueError):
    """A reply that is no chat completion."""


def read_reply(reply: Any) -> Answer:
    """Return the answer in a server's reply, decoded from JSON.

    Raises:
        BrokenAnswerError: the reply is no chat completion; what is wrong with it is named.
    """
    choices = _field(reply, "choices", list)
    if not choices:
        raise BrokenAnswerError("the reply is no chat completion: choices is missing or empty")
    message = _field(choices[0], "message", dict)
    if message is None:
        raise BrokenAnswerError("the reply is no chat completion: message is missing")
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


def _field(node: Any, name: str, kind: type[Any]) -> Any:
    """Return what an object of the reply has under this name; None where it has nothing or null."""
    if not isinstance(node, dict):
        raise BrokenAnswerError(f"the reply is no chat completion: what should hold {name} is not an object")
    value = node.get(name)
    if value is not None and not isinstance(value, kind):
        raise BrokenAnswerError(f"the reply is no chat completion: {name} is not {_TYPES[kind]}")
    return value


MAX_TOKENS = 10_000_000
"""More tokens than one request or answer can have."""


def _count(usage: dict[str, Any], name: str) -> int | None:
    tokens = usage.get(name)
    if tokens is None:
        return None
    if not isinstance(tokens, int) or isinstance(tokens, bool) or not 0 <= tokens <= MAX_TOKENS:
        raise BrokenAnswerError(f"the reply's {name} is not a number of tokens from 0 to {MAX_TOKENS:,}")
    return tokens


def _tokens(logprobs: dict[str, Any] | None) -> list[list[tuple[str, float]]]:
    places = [] if logprobs is None else _field(logprobs, "content", list) or []
    return [
        [
            (token, logprob)
            for each in _field(place, "top_logprobs", list) or []
            if math.isfinite(logprob := _logprob(each)) and (token := _field(each, "token", str))
        ]
        for place in places[:_LOOK_AT]
    ]


def _logprob(token: Any) -> float:
    """Return a token's log-probability; it may be minus infinity."""
    value = token.get("logprob") if isinstance(token, dict) else None
    if isinstance(value, str) and value.lower() in ("-inf", "-infinity"):
        return -math.inf
    if not isinstance(value, int | float) or isinstance(value, bool) or not -math.inf <= value <= 1:
        raise BrokenAnswerError("the reply's logprobs hold a token without a log-probability")
    return max(float(value), -1e30) if value != -math.inf else -math.inf


def read_label(answer: Answer, words: Sequence[str]) -> tuple[float | None, str]:
    """P(label 1) as the model answered, and which of `READINGS` it is.

    From log-probabilities it is p1 / (p0 + p1), with p the sum over the tokens with which an answer can begin. A label
    that is not among the listed tokens gets the most that it can have: the smallest probability listed, or what the
    listed ones leave. From the text it is 0 or 1, where the text is one of the two words and nothing else but
    punctuation. None where the answer is no label.

    Args:
        words: for label 0 and label 1.
    """
    if answer.refused:
        return None, "refused"
    score = _from_tokens(answer.tokens, words)
    if score is not None:
        return score, "probabilities"
    plain = _plain(answer.text or "")
    for label, word in enumerate(words):
        if plain == _plain(word):
            return float(label), "text"
    return None, "unparsable"


def _plain(text: str) -> str:
    return _AROUND.sub("", text).casefold()


def _from_tokens(places: Sequence[Sequence[tuple[str, float]]], words: Sequence[str]) -> float | None:
    zero, one = map(_plain, words)
    for place in places:
        if len(place) < 2:
            return None
        if not _plain(max(place, key=lambda each: each[1])[0]):
            continue
        masses = {0: 0.0, 1: 0.0}
        for token, logprob in place:
            begins = [_begins(_plain(token), word) for word in (zero, one)]
            if begins in ([True, False], [False, True]):
                masses[begins.index(True)] += math.exp(min(logprob, 0.0))
        if not any(masses.values()):
            return None
        probabilities = [math.exp(min(logprob, 0.0)) for _, logprob in place]
        most = min(*probabilities, max(0.0, 1 - sum(probabilities)))
        zero_mass, one_mass = (mass or most for mass in masses.values())
        return one_mass / (zero_mass + one_mass)
    return None


def _begins(token: str, word: str) -> bool:
    """Whether an answer that begins with this token can be the word."""
    return bool(token) and word.startswith(token)
