"""Conditions on configuration keys, as `compare --where` takes them: `adapter=lora and adapter.rank<=16`.

expression: term or term ...
term:       factor and factor ...
factor:     not factor | ( expression ) | key operator value
operator:   = == != < <= > >=
"""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_bench.analysis.settings import check_key
from lora_bench.analysis.table import format_value
from lora_bench.config.keys import RENAMED
from lora_bench.config.metric_names import ALL_MAIN_METRICS, SHOWN_METRICS
from lora_bench.errors import Code, UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Condition = Callable[[Mapping[str, Any]], bool]

OPTION = "--where"
MAX_DEPTH = 50
"""Parentheses and `not`s inside each other."""
_TOKEN = re.compile(
    r"""\s*(?:
        (?P<parenthesis>[()])
      | (?P<operator><=|>=|!=|==|=|<|>)
      | (?P<quoted>"[^"]*"|'[^']*')
      | (?P<word>(?:\[[^\]]*\]|[^\s()=<>!"'])+)
    )""",
    re.VERBOSE,
)
_RESULTS = {*ALL_MAIN_METRICS, *(name for names in SHOWN_METRICS.values() for name in names)}
"""Metrics that are refused as conditions, with the reason."""
_ORDERS: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def parse(text: str, keys: Sequence[str], varying: Sequence[str]) -> Condition:
    """Return a function that tells from a run's keys whether it meets the conditions of an expression.

    Values are compared as numbers if both are numbers, otherwise as the text that an override has. A run without the
    key meets only `!=`.

    Args:
        text: the expression.
        keys: the keys that runs have.
        varying: the keys that vary, for the message about an unknown one.

    Raises:
        UserError: the expression is malformed, or names a key that no run has. Results are no keys: to choose runs by
            their results would bias the comparison.
    """
    parser = _Parser(text, _tokens(text), keys, varying)
    condition = parser.expression()
    if parser.next is not None:
        raise _malformed(text, f"{parser.next!r} is not expected here")
    return condition


def _tokens(text: str) -> list[str]:
    tokens, position = [], 0
    while position < len(text.rstrip()):
        match = _TOKEN.match(text, position)
        if match is None:
            raise _malformed(text, f"{text[position:].strip()[:20]!r} cannot be read")
        tokens.append(match[0].strip())
        position = match.end()
    return tokens


def _malformed(text: str, reason: str) -> UserError:
    remedy = "An example: --where 'adapter=lora and adapter.rank<=16'."
    text = text if len(text) <= 200 else f"{text[:199]}…"
    return UserError(reason, key=OPTION, value=text, remedy=remedy, code=Code.INVALID_SYNTAX)


@dataclass
class _Parser:
    """A recursive-descent parser of the expression's tokens."""

    text: str
    tokens: list[str]
    keys: Sequence[str]
    varying: Sequence[str]
    position: int = 0
    depth: int = 0

    @property
    def next(self) -> str | None:
        """The token to read next; None at the end."""
        return self.tokens[self.position] if self.position < len(self.tokens) else None

    def take(self) -> str:
        """Return the next token and go past it."""
        if (token := self.next) is None:
            raise _malformed(self.text, "a condition is missing at the end")
        self.position += 1
        return token

    def expression(self) -> Condition:
        """Read terms joined by `or`."""
        terms = [self.term()]
        while self.next == "or":
            self.take()
            terms.append(self.term())
        return terms[0] if len(terms) == 1 else lambda run: any(term(run) for term in terms)

    def term(self) -> Condition:
        """Read factors joined by `and`."""
        factors = [self.factor()]
        while self.next == "and":
            self.take()
            factors.append(self.factor())
        return factors[0] if len(factors) == 1 else lambda run: all(factor(run) for factor in factors)

    def factor(self) -> Condition:
        """Read `not` and a factor, an expression in parentheses, or one comparison."""
        if self.next not in ("not", "("):
            return self.comparison()
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _malformed(self.text, f"has more than {MAX_DEPTH} conditions inside each other")
        if self.take() == "not":
            negated = self.factor()
            condition: Condition = lambda run: not negated(run)  # noqa: E731
        else:
            condition = self.expression()
            if self.next != ")":
                raise _malformed(self.text, "a parenthesis is not closed")
            self.take()
        self.depth -= 1
        return condition

    def comparison(self) -> Condition:
        """Read a key, an operator and a value."""
        key, sign, expected = self.take(), self.next, None
        key = RENAMED.get(key, key)
        if not re.match(r"[\w]", key):
            raise _malformed(self.text, f"{key!r} is no key")
        if sign is None or not re.fullmatch("[<>=!]+", sign):
            raise _malformed(self.text, f"{key!r} is not followed by one of = != < <= > >=")
        self.take()
        if re.fullmatch("[<>=!()]+", self.next or ""):
            raise _malformed(self.text, f"{key}{sign} is not followed by a value")
        expected = self.take()
        self._check(key)
        if expected[0] in "\"'":
            expected = expected[1:-1]
        return _comparison(key, sign, expected)

    def _check(self, key: str) -> None:
        """Refuse a key that no run has; a result is refused with the reason."""
        name = key.rsplit("/", 1)[-1]
        if key not in self.keys and (key.startswith(("cost.", "params.")) or name in _RESULTS):
            remedy = "To choose runs by their results biases a comparison. --sort and --top choose among finished rows."
            raise UserError(
                "is a result, not a config key", key=OPTION, value=key, remedy=remedy, code=Code.UNSUPPORTED
            )
        check_key(OPTION, key, self.keys, self.varying)


def _comparison(key: str, sign: str, expected: str) -> Condition:
    number = _number(expected)

    def compare(run: Mapping[str, Any]) -> bool:
        if key not in run:
            return sign == "!="
        value = run[key]
        text = format_value(value)
        both = (_number(text), number) if not isinstance(value, bool) else (None, None)
        if None not in both:
            if sign in _ORDERS:
                return _ORDERS[sign](*both)
            return (both[0] == both[1]) == (sign != "!=")
        if sign in _ORDERS:
            return False
        return (text == expected) == (sign != "!=")

    return compare


def _number(text: str) -> float | None:
    """Return a text as a number, or None."""
    try:
        return float(text)
    except ValueError:
        return None
