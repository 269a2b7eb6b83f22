"""From what a model answered to P(label 1)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_bench.prompt.settings import LLM

KINDS = ("probabilities", "text", "refused", "unparsable")
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

    def money(self, llm: LLM, most: float) -> float:
        """What it cost; `most` where the server does not say how long it was."""
        if self.prompt_tokens is None or self.completion_tokens is None:
            return most
        return llm.money(self.prompt_tokens, self.completion_tokens) or 0.0


class BrokenAnswerError(ValueError):
    """A reply that is no chat completion."""


def read_reply(reply: Any) -> Answer:
    """The answer in a server's reply, decoded from JSON.

    Raises:
        BrokenAnswerError: it is none.
    """
    try:
        choice = reply["choices"][0]
        message = choice["message"]
        text = message.get("content")
        usage = reply.get("usage") or {}
        answer = Answer(
            text=text,
            refused=bool(message.get("refusal")) or choice.get("finish_reason") == "content_filter",
            tokens=_tokens(choice.get("logprobs")),
            prompt_tokens=_count(usage.get("prompt_tokens")),
            completion_tokens=_count(usage.get("completion_tokens")),
            model=str(reply["model"]) if reply.get("model") else None,
        )
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError):
        raise BrokenAnswerError("the reply is no chat completion") from None
    if not isinstance(text, str | None):
        raise BrokenAnswerError("the reply holds no text")
    return answer


def _count(tokens: Any) -> int | None:
    return None if tokens is None else max(0, int(tokens))


def _tokens(logprobs: Any) -> list[list[tuple[str, float]]]:
    if not isinstance(logprobs, dict) or not isinstance(logprobs.get("content"), list):
        return []
    return [
        [
            (str(each["token"]), float(each["logprob"]))
            for each in place.get("top_logprobs") or []
            if math.isfinite(float(each["logprob"]))
        ]
        for place in logprobs["content"][:_LOOK_AT]
    ]


def read_label(answer: Answer, words: Sequence[str]) -> tuple[float | None, str]:
    """P(label 1) as the model answered, and which of `KINDS` it is.

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
