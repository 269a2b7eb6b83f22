"""Parsing of a server's reply, and of a model's answer into the probability of each class, or a number."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lora_bench.files import untrusted

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lora_bench.llm.settings import LLM

READINGS = ("probabilities", "text", "refused", "unparsable")
"""Sources of a label: probabilities (of tokens, or in JSON), the text, or none (a refusal or another text)."""
_AROUND = re.compile(r"^[\W_]+|[\W_]+$")
_SEPARATORS = re.compile(r"[\s_-]+")
_NUMBER = re.compile(r"(?<![\w.])[+-]?(?:\d++(?:\.\d*+)?|\.\d++)(?:[eE][+-]?\d++)?(?!\.?\w)")
_MAX_CHARACTERS = 20_000
"""Of an answer, what is parsed."""
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


def read_label(answer: Answer, words: Sequence[str]) -> tuple[list[float] | None, str]:
    """Return the probability of each class by an answer, (C,), and the source of it (`READINGS`).

    A JSON object gives the probability of every word, divided by their sum, or in its only member one of the words.
    From log-probabilities the probability of a class is the share of the tokens with which only its word can begin. The
    classes without a listed token get their upper bound: the smallest listed probability, or an equal part of 1 minus
    their sum. Without usable log-probabilities it is 1 for the word that is the text, apart from case, punctuation
    around it and the separators in it. None if the model refused, or the answer is no class.

    Args:
        answer: of the model.
        words: for the classes 0, 1, …, as `normalise` tells them apart.
    """
    if answer.refused:
        return None, "refused"
    normalised = [normalise(word) for word in words]
    text = (answer.text or "")[:_MAX_CHARACTERS]
    members = _json_members(text)
    if members is not None:
        probabilities = _from_members(members, normalised)
        if probabilities is not None:
            return probabilities, "probabilities"
        text = str(next(iter(members.values()))) if len(members) == 1 else ""
    else:
        probabilities = _from_tokens(answer.tokens, normalised)
        if probabilities is not None:
            return probabilities, "probabilities"
    text = normalise(text)
    if text not in normalised:
        return None, "unparsable"
    return [float(word == text) for word in normalised], "text"


def read_number(answer: Answer) -> tuple[float | None, str]:
    """Return the number in an answer, and the source of it (`READINGS`).

    It is the only number in the text, whatever its size. None if the model refused, or there is not exactly one.
    """
    if answer.refused:
        return None, "refused"
    numbers = _NUMBER.findall((answer.text or "")[:_MAX_CHARACTERS])
    if len(numbers) != 1 or not math.isfinite(float(numbers[0])):
        return None, "unparsable"
    return float(numbers[0]), "text"


def normalise(text: str) -> str:
    """Return a text in lower case, without punctuation and white space around it, and with one space for `_` or `-`."""
    return _SEPARATORS.sub(" ", _AROUND.sub("", text)).casefold()


def _json_members(text: str) -> dict[str, Any] | None:
    """Return the members of the JSON object that is the text, also in a code block; None if it is something else."""
    text = text.strip().removeprefix("```json").removeprefix("```").removesuffix("```").strip()
    if not text.startswith("{"):
        return None
    try:
        members = untrusted.parse_json(text)
    except ValueError:
        return None
    return members if isinstance(members, dict) else None


def _from_members(members: Mapping[str, Any], words: Sequence[str]) -> list[float] | None:
    """Return the probability of each word from a JSON object that gives all of them; None if it is another object."""
    values = {normalise(name): value for name, value in members.items()}
    if len(values) != len(members) or values.keys() != set(words):
        return None
    numbers = [value for value in values.values() if type(value) in (int, float) and 0 <= value < math.inf]
    total = sum(numbers)
    if len(numbers) < len(words) or not 0 < total < math.inf:
        return None
    return [values[word] / total for word in words]


def _from_tokens(positions: Sequence[Sequence[tuple[str, float]]], words: Sequence[str]) -> list[float] | None:
    """Return the probability of each word from log-probabilities, as `read_label` defines it.

    It is read at the first position whose likeliest token is more than punctuation or white space. None if there is no
    such position, it has fewer than two tokens, none of them begins exactly one of the words, or the likeliest one
    begins several.

    Args:
        positions: tokens with log-probabilities.
        words: normalised.
    """
    for candidates in positions:
        if len(candidates) < 2:
            return None
        first = normalise(max(candidates, key=lambda candidate: candidate[1])[0])
        if not first:
            continue
        masses = [0.0] * len(words)
        for token, logprob in candidates:
            classes = _classes_beginning_with(normalise(token), words)
            if len(classes) == 1:
                masses[classes[0]] += math.exp(min(logprob, 0.0))
        if not any(masses) or len(_classes_beginning_with(first, words)) > 1:
            return None
        probabilities = [math.exp(min(logprob, 0.0)) for _, logprob in candidates]
        upper_bound = min(*probabilities, max(0.0, 1 - sum(probabilities)) / max(1, masses.count(0.0)))
        masses = [mass or upper_bound for mass in masses]
        total = sum(masses)
        return [mass / total for mass in masses]
    return None


def _classes_beginning_with(token: str, words: Sequence[str]) -> list[int]:
    """Return the classes whose words can begin with this token."""
    return [label for label, word in enumerate(words) if token and word.startswith(token)]
