"""Typed settings of `lora-bench prompt`: the server, its model, and the prompt."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from lora_bench.errors import Code, UserError, require, require_number


@dataclass(frozen=True, kw_only=True)
class LLM:
    """A model behind an OpenAI-compatible server, with limits of rate, time and cost."""

    model: str | None
    """The server's id of the model. There is no default, because models come and go."""
    base_url: str | None
    """The server's address: `https://api.openai.com/v1`, `http://localhost:8000/v1`."""
    api_key_env: str
    """The environment variable with the API key; unset where the server needs none."""
    temperature: float | None
    """null: not sent, so that the server's own default counts."""
    max_tokens: int | None
    """Tokens that an answer may have; null: not sent."""
    logprobs: bool
    """Ask for log-probabilities; where the server gives none, the text of the answer is read."""
    top_logprobs: int
    """Number of tokens at each place whose probabilities are requested."""
    extra: dict[str, Any]
    """Further fields of each request: `llm.extra.reasoning_effort=low`."""
    concurrency: int
    """Requests under way at a time."""
    requests_per_minute: float | None
    """At most so many are begun; null: no limit but the server's."""
    timeout: float
    """Seconds for a whole answer, however slowly it comes."""
    retries: int
    """Times that a request is sent again after a refusal for the moment (429, 5xx), a timeout or a broken answer."""
    max_requests: int | None
    """Stop before more requests than this are sent, repeated ones included; null: no limit."""
    max_cost: float | None
    """Stop before this much money is spent, in the currency of the prices; null: no limit."""
    input_price: float | None
    """Money per million tokens read."""
    output_price: float | None
    """Money per million tokens written."""

    def __post_init__(self) -> None:
        """Check the ranges and the address, and that `max_cost` has prices and a limit on the tokens of an answer.

        Neither `model` nor `base_url` is required. `extra` must not hold a field that has a setting of its own.

        Raises:
            UserError: naming the key. A value of `api_key_env` that is no name in capitals may be the key itself, and
                is not repeated.
        """
        if self.base_url is not None:
            _check_url(self.base_url)
        if not re.fullmatch("[A-Z][A-Z0-9_]*", self.api_key_env):  # perhaps the key itself: not repeated
            reason = "must be the name of an environment variable, in capitals"
            raise UserError(
                reason, key="api_key_env", remedy="The key itself goes into that variable.", code=Code.INVALID_VALUE
            )
        if self.temperature is not None:
            require_number("temperature", self.temperature, 0)
        if self.max_tokens is not None:
            require_number("max_tokens", self.max_tokens, 1)
        require_number("top_logprobs", self.top_logprobs, 2, 20)
        reserved = sorted(self.extra.keys() & _RESERVED_FIELDS)
        require(
            not reserved,
            "extra",
            None,
            f"holds {', '.join(reserved)}",
            "Use the setting of that name.",
        )
        require_number("concurrency", self.concurrency, 1, 1000)
        require_number("timeout", self.timeout, 0, open_low=True)
        require_number("retries", self.retries, 0, 100)
        for name in ("requests_per_minute", "max_requests", "max_cost"):
            if getattr(self, name) is not None:
                require_number(name, getattr(self, name), 0, open_low=True)
        for name in ("input_price", "output_price"):
            if getattr(self, name) is not None:
                require_number(name, getattr(self, name), 0)
        priced = self.input_price is not None and self.output_price is not None
        require(
            self.max_cost is None or priced,
            "max_cost",
            self.max_cost,
            "needs prices",
            "Give llm.input_price and llm.output_price, per million tokens.",
            code=Code.CONFLICT,
        )
        require(
            self.max_cost is None or self.max_answer_tokens is not None,
            "max_cost",
            self.max_cost,
            "needs a bound on the length of an answer",
            "Give llm.max_tokens, or +llm.extra.max_completion_tokens.",
            code=Code.CONFLICT,
        )

    @property
    def max_answer_tokens(self) -> int | None:
        """The maximal number of tokens of an answer, from `max_tokens` or `extra`; None: no limit."""
        limit = self.extra.get("max_completion_tokens")
        return limit if self.max_tokens is None and isinstance(limit, int) else self.max_tokens

    def cost(self, prompt_tokens: float, completion_tokens: float) -> float | None:
        """Return the cost of these numbers of tokens; None unless both prices are set."""
        if self.input_price is None or self.output_price is None:
            return None
        return (self.input_price * prompt_tokens + self.output_price * completion_tokens) / 1e6


_RESERVED_FIELDS = {
    "model",
    "messages",
    "temperature",
    "max_tokens",
    "logprobs",
    "top_logprobs",
    "n",
    "stream",
    "api_key",
}


def _check_url(url: str) -> None:
    """Refuse an address that is not `http` or `https` with a host, or that holds a user, a password or a query.

    Raises:
        UserError: an address that may hold a secret is not repeated. The server is not contacted.
    """
    try:
        address = urlsplit(url)
        good = address.scheme in ("http", "https") and bool(address.hostname) and (address.port or 1) > 0
    except ValueError:
        good = False
    else:
        if address.username or address.password or address.query:  # not repeated: it may be secret
            reason = "holds a user, a password or a query"
            raise UserError(
                reason,
                key="base_url",
                remedy="A key goes into the variable that llm.api_key_env names.",
                code=Code.FORBIDDEN,
            )
    require(
        good,
        "base_url",
        url,
        "is not the address of a server",
        "Give one such as http://localhost:8000/v1.",
        code=Code.INVALID_VALUE,
    )


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """The question about an example, and the words that answer it."""

    system: str | None
    """The system message; null: none."""
    template: str
    """The question. Filled in: {fields} (a line `name: text` for each text), a text by the name of its column, {labels}
    (the answers, as `a, b or c`) and {label_0}, {label_1}, … (one of them); for regression {min} and {max} (the least
    and the greatest number in train)."""
    answers: list[str] | None
    """The words for the classes 0, 1, …; null: `data.label_names`."""
    shots: int
    """Examples from train before the question, chosen by the seed: as many of each class as of another, to within one.
    For regression they are spread over the range of the numbers."""

    def __post_init__(self) -> None:
        require(self.answers is None or len(self.answers) >= 2, "answers", self.answers, "must be two or more words")
        require_number("shots", self.shots, 0)
