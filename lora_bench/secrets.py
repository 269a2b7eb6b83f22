"""Secrets: what is a key, or looks like one, never reaches a file, a log or a report.

`redact` hides them in a text. `disk.plain`, through which every record goes, does so in whatever JSON can hold. The
running process keeps the true values. Hidden is

    what a key named like `*key`, `*token`, `*secret` or `*password` holds     llm.api_key=***
    what looks like a key of a known kind, wherever it stands                  sk-…, hf_…, ghp_…, AKIA…, Bearer …
    what `remember` found on the command line or in the environment
"""

from __future__ import annotations

import os
import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

HIDDEN = "***"

_NAME = r"[\w.-]*(?:key|token|secret|password|passwd|credential)"
_IS_NAME = re.compile(_NAME, re.IGNORECASE)
# `name=value`, or `name: value` where the name is no plain word of a sentence ("is not a known key: …").
_ASSIGNED = re.compile(
    rf"""(?P<start>(?P<name>{_NAME})["']?(?:\s*=\s*|(?<!\bkey)(?<!\btoken)(?<!\bsecret)\s*:\s*))"""
    r"""(?P<value>"[^"]*"|'[^']*'|(?:(?:bearer|basic)\s+)?\S+?(?=[:;.,]?(?:\s|$)))""",
    re.IGNORECASE,
)
_LOOKS = re.compile(
    "|".join(
        [
            r"\b(?:sk|pk|rk)-[A-Za-z0-9_-]{8,}",  # OpenAI, Anthropic and their like
            r"\bsk_(?:live|test)_\w{8,}",  # Stripe
            r"\bhf_(?:(?=[A-Za-z]*\d)[A-Za-z0-9]{8,}|[A-Za-z]{16,})",  # Hugging Face
            r"\bgh[opsru]_[A-Za-z0-9]{8,}|\bgithub_pat_\w{8,}|\bglpat-[\w-]{8,}",  # GitHub, GitLab
            r"\b(?:AKIA|ASIA)[A-Z0-9]{8,}",  # AWS
            r"\bAIza[\w-]{20,}",  # Google
            r"\bxox[abeoprs]-[\w-]{8,}",  # Slack
            r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*",  # JSON web tokens
            r"(?<=\bBearer )[^\s,;}\]'\"]{8,}|(?<=\bbearer )[^\s,;}\]'\"]{8,}",
            r"(?<=://)[^/\s@:]*:[^/\s@]+(?=@)",  # https://user:password@host
            r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
        ]
    ),
    re.DOTALL,
)
_SHORTEST = 6
"""A remembered value of fewer characters would hide innocent text everywhere."""
_remembered: list[str] = []  # the longest first


def remember(arguments: Iterable[str]) -> None:
    """Note the values of keys so named among `key=value` arguments and in the environment, to hide them anywhere."""
    named = [*(argument.partition("=")[::2] for argument in arguments), *os.environ.items()]
    found = {
        part.strip("\"' ")
        for name, value in named
        if _is_secret(name.lstrip("+~"), value) and not os.path.exists(value)
        for part in (value, *value.split(","))
    }
    redact.cache_clear()
    _remembered.clear()
    _remembered.extend(sorted((value for value in found if len(value) >= _SHORTEST), key=len, reverse=True))


def hide(value: str) -> None:
    """Note one more value to hide anywhere: a key that was found where no name gives it away."""
    if len(value) >= _SHORTEST and value not in _remembered:
        _remembered.append(value)
        _remembered.sort(key=len, reverse=True)
        redact.cache_clear()


@lru_cache(maxsize=10_000)  # the records of a thousand runs say much the same
def redact(text: str) -> str:
    """`text` with every secret in it hidden."""
    for value in _remembered:
        text = text.replace(value, HIDDEN)
    text = _ASSIGNED.sub(lambda hit: hit["start"] + HIDDEN if _is_secret(hit["name"], hit["value"]) else hit[0], text)
    return _LOOKS.sub(HIDDEN, text)


def redacted(value: Any, name: str) -> Any:
    """A text, a number, true, false or None as it may be written; `name` is the key that holds it."""
    if _secret_name(name) and value is not None and not isinstance(value, bool) and _is_secret(name, str(value)):
        return HIDDEN
    return redact(value) if isinstance(value, str) else value


def hides_secret(value: Any) -> bool:
    """Whether something in `value` was hidden, so that it is not what it was made from."""
    if isinstance(value, dict):
        return any(map(hides_secret, value.values()))
    if isinstance(value, list):
        return any(map(hides_secret, value))
    return isinstance(value, str) and HIDDEN in value


def _is_secret(name: str, value: str) -> bool:
    """A number below the bare name `key` is the rank of an attention's linear; null, an interpolation and the word in
    `key=value` are none."""
    last = _secret_name(name)
    if last is None or value.lower() in ("", "null", "none", "value", HIDDEN) or value.startswith("${"):
        return False
    return last != "key" or not re.match(r"[\d.]+(?!\w)", value)


@lru_cache(maxsize=10_000)
def _secret_name(name: str) -> str | None:
    """The last part of a name that is one of a secret."""
    last = re.split(r"[./]", name)[-1]
    return last if _IS_NAME.fullmatch(last) else None
