"""Secrets: keys and passwords that must not reach a file, a log, a report or the screen.

Text is redacted by where a value comes from:

    known values       of the command line and the environment (`remember`), of a composed config (`remember_config`:
                       keys so named, `${oc.env:NAME}`), and given to `hide`; hidden wherever they appear
    names              what a key with a secret name holds           llm.api_key=***, {"password": "***"}
    URLs               user and password                             https://***@host
    token formats      keys of well-known services, by their true alphabets and lengths     sk-…, hf_…, ghp_…, AKIA…

A path that exists is never hidden, nor are placeholders and advice (`key=value`). The running process keeps the true
values. Every step takes time linear in the length of the text.
"""

from __future__ import annotations

import base64
import html
import json
import os
import re
from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from itertools import islice
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, quote_plus

from lora_bench.console.secret_patterns import (
    FORMATS,
    HIDDEN,
    LONGEST_NAME,
    WEAK,
    Span,
    assigned,
    bearers,
    holds_secret,
    is_secret_variable,
    secret_word,
    users,
    users_in,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

SHORTEST = 6
"""A known value of fewer characters would hide innocent text everywhere."""

# -- known values --

_known: dict[str, None] = {}
"""Values and the forms in which they may come back, the longest first."""
_values: dict[str, None] = {}
"""The values themselves."""
_variables = re.compile(r"\$\{\s*oc\.env\s*:\s*['\"]?([^},'\"\s]++)['\"]?\s*(?:,([^}]*+))?")


def remember(arguments: Iterable[str]) -> None:
    """Take secrets from `key=value` arguments and from the environment, in place of those that were known.

    Args:
        arguments: as typed; whatever variables they interpolate are secrets too.
    """
    _values.clear()
    _known.clear()
    for argument in arguments:
        name, equals, value = argument.partition("=")
        name = name.lstrip("+~-")
        if equals and holds_secret(name, value):
            _add(value, *value.split(","), *re.split(r"[\[\]{},]", value))
        _add(*(argument[start:end] for start, end in assigned(argument)))
        _add(*users(value if equals else argument))
        _add_variables(argument, name if equals else "")
    for name, value in os.environ.items():
        if is_secret_variable(name):
            _add(value)
        elif "://" in value:
            _add(*users(value))
    _sort()


def remember_config(config: Any) -> None:
    """Take further secrets from a composed config, interpolations as they are written.

    Args:
        config: nested dicts and lists.
    """
    for name, value in leaves(config):
        if holds_secret(name, value):
            _add(str(value))
        if isinstance(value, str):
            _add(*users(value))
            _add_variables(value, name)
    _sort()


def hide(value: str) -> None:
    """Take one more secret: a key that was read where no name tells of it."""
    _add(value, exists=False)
    _sort()


def _add_variables(text: str, key: str) -> None:
    """Take the values of the variables that a config's value interpolates.

    An identifier that a run is loaded by, or a part of Hydra's own settings (the name of a folder), is a secret only if
    its variable's name says so.
    """
    for hit in _variables.finditer(text):
        named = is_secret_variable(hit[1])
        value = os.environ.get(hit[1], "")
        if named:
            _add(value, hit[2] or "")
        elif not is_identifier(key) and not key.startswith("hydra.") and not _is_number(value):
            _add(value)


def is_identifier(key: str) -> bool:
    """Return whether a run cannot be loaded again without the value of this config key."""
    return _IDENTIFIERS.match(key.lstrip("+~")) is not None


_IDENTIFIERS = re.compile(r"(?:model|adapter)\.|(?:data|tasks\.[^.]+)\.(?:path|hub_\w+|revision|text_columns)\b")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text.lower() in ("true", "false", "null", "none")
    return True


def leaves(node: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what is no dict or list in `node`, with its dotted key."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from leaves(value, f"{name}.{key}" if name else str(key))
    elif isinstance(node, list | tuple):
        for value in node:
            yield from leaves(value, name)
    else:
        yield name, node


def _add(*values: str, exists: bool = True) -> None:
    for value in values:
        text = value.strip("\"'\\ \t\r\n")
        text = text.split(None, 1)[1] if re.match(r"(?i)(?:bearer|basic|token) +\S", text) else text
        if len(text) >= SHORTEST and not text.startswith("${") and not (exists and _exists(text)):
            _values[text] = None


def _sort() -> None:
    forms = {form for value in _values for form in _forms(value) if len(form) >= SHORTEST}
    _known.clear()
    _known.update(dict.fromkeys(sorted(forms, key=lambda form: (-len(form), form))))
    _without_secret.clear()


def _forms(value: str) -> Iterator[str]:
    """Yield the forms in which a value may come back: escaped, in a URL, in base64 (at any offset)."""
    yield value
    yield json.dumps(value)[1:-1]
    yield repr(value)[1:-1]
    yield html.escape(value)
    yield from (quote(value), quote(value, safe=""), quote_plus(value))
    raw = value.encode(errors="surrogatepass")
    if len(raw) >= 12:
        for offset in range(3):
            # Of the first and the last group the neighbours' bits are a part.
            coded = base64.b64encode(b"\0" * offset + raw)
            core = coded[4 * (offset > 0) :][: 4 * ((offset + len(raw)) // 3) - 4 * (offset > 0)].decode()
            yield core
            yield core.translate(_URL_SAFE)


_URL_SAFE = str.maketrans("+/", "-_")

# -- paths --


def _exists(text: str) -> bool:
    try:
        return len(text) < 4096 and os.path.lexists(os.path.expanduser(text))
    except (OSError, ValueError):
        return False


_PATH_CHECKS = 500
"""Places in one text at most where the file system is asked; a text with more hits than that is no report of ours."""
_NO_PATH = re.compile(r"[\s'\"<>|*?`()\[\]{}]")


class _Paths:
    """Tells which hits in one text are in a path that exists."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.left = _PATH_CHECKS

    @cached_property
    def whole(self) -> bool:
        return _exists(self.text)

    def covers(self, start: int, end: int) -> bool:
        """Return whether `text[start:end]` is part of a path that exists."""
        if self.whole:
            return True
        if self.left <= 0:
            return False
        self.left -= 1
        before = self.text[max(0, start - 1000) : start]
        after = self.text[end : end + 1000]
        word = _NO_PATH.search(after)
        length = word.start() if word else len(after)
        further = islice(re.finditer("[/:,;'\"]", after), 6)  # also behind white space: a name may have some
        ends = sorted({0, length, len(after[:length].rstrip(":;,.")), *(m.start() for m in further)})
        starts = [m.end() for m in re.finditer(r"[\s'\"<>|*?`()\[\]{}=:,;]", before)]
        starts = sorted({0, *starts, *_absolute(before)}, reverse=True)[:12]
        hit = self.text[start:end]
        quoted = hit.rstrip("\"'`)]}>,;.:")  # what closes a quotation is no part of the path in it
        rests = [hit + after[:last] for last in ends] + [quoted] * (quoted != hit)
        return any(
            _exists(before[first:] + rest)
            for first in starts
            for rest in rests
            if before[first:] + rest and (first or len(before) < 1000)
        )


def _absolute(before: str) -> Iterator[int]:
    """Yield where in a text an absolute path may begin whose folders have spaces or brackets in their names."""
    return (hit.start() for hit in re.finditer(r"(?<![\w./~-])[~.]{0,2}/", before))


# -- texts --

_without_secret: set[str] = set()
"""Short texts in which nothing was found: the records of a thousand runs have much the same."""


def redact_new_path(path: str) -> str:
    """Return the path of a folder of ours with the secrets in it hidden, whether it is there yet or not.

    What the current folder is called is not ours to choose, and `=` in a name makes no assignment.
    """
    here = os.path.join(os.getcwd(), "")
    return here * path.startswith(here) + _redact(path.removeprefix(here), is_new_path=True)


def redact(text: str) -> str:
    """Return `text` with every secret in it hidden."""
    if text in _without_secret:
        return text
    result = _redact(text)
    if result == text and len(text) < 500:
        if len(_without_secret) > 20_000:
            _without_secret.clear()
        _without_secret.add(text)
    return result


def _redact(text: str, *, is_new_path: bool = False) -> str:
    without = partial(_without, existing=not is_new_path)
    for value in _known:
        if value in text:
            text = without(text, _occurrences(text, value))
    if "://" in text:
        text = without(text, users_in(text))
    if not is_new_path and ("=" in text or ":" in text):
        text = without(text, assigned(text))
    for prefix, pattern, is_key in FORMATS:
        if prefix in text:
            text = without(text, (hit.span() for hit in pattern.finditer(text) if is_key(hit[0])))
    if "earer " in text:
        text = without(text, bearers(text))
    return text


def _without(text: str, spans: Iterable[Span], *, existing: bool) -> str:
    """Hide these spans, in order; with `existing`, not those in a path that exists."""
    paths = _Paths(text)
    parts, done = [], 0
    for start, end in spans:
        if text[start:end] != HIDDEN and not (existing and paths.covers(start, end)):
            parts += [text[done:start], HIDDEN]
            done = end
    return "".join([*parts, text[done:]]) if parts else text


def _occurrences(text: str, value: str) -> Iterator[Span]:
    place = text.find(value)
    while place >= 0:
        yield place, place + len(value)
        place = text.find(value, place + len(value))


# -- values of records and configs --


def redact_value(value: Any, name: str) -> Any:
    """Return a text, a number, true, false or None as it may be written.

    Args:
        name: the key that holds it.
    """
    if name and holds_secret(name, value) and not (isinstance(value, str) and _exists(value)):
        return HIDDEN
    if not isinstance(value, str):
        return value
    key, equals, held = value.partition("=")
    if equals and len(key) <= LONGEST_NAME and _OVERRIDDEN.fullmatch(key) and not _exists(value):
        word = secret_word(key.lstrip("+~"))
        if word and key.lower() not in WEAK and holds_secret(key.lstrip("+~"), held) and not _exists(held):
            return f"{key}={HIDDEN}"
    return redact(value)


_OVERRIDDEN = re.compile(r"[+~]{0,2}[\w.@/-]+")


def name_below(name: str, key: str) -> str:
    """Return the name that decides on what `key` holds: that of the outer key, if all below it is a secret."""
    word = secret_word(name) if name else None
    return name if word is not None and word not in WEAK else key


def hides_secret(value: Any) -> bool:
    """Return whether something in `value` was hidden, so that it is not what it was made from."""
    if isinstance(value, dict):
        return any(map(hides_secret, value.values()))
    if isinstance(value, list):
        return any(map(hides_secret, value))
    return isinstance(value, str) and HIDDEN in value
