"""Redaction of secrets: keys and passwords must not reach a file, a log, a report or the screen.

A text is redacted by four rules:

    remembered values  of the command line and the environment (`remember`), of a composed config (`remember_config`:
                       keys with a secret name, `${oc.env:NAME}`), and given to `hide`; hidden wherever they appear
    names              the value of a key with a secret name         llm.api_key=***, {"password": "***"}
    URLs               user and password                             https://***@host
    token formats      keys of well-known services, by their alphabets and lengths     sk-…, hf_…, ghp_…, AKIA…

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
"""Minimum characters of a remembered value; a shorter one would hide innocent text everywhere."""

# -- remembered values --

_hidden_forms: dict[str, None] = {}
"""All forms of the remembered values, the longest first."""
_values: dict[str, None] = {}
"""The remembered values."""
_variables = re.compile(r"\$\{\s*oc\.env\s*:\s*['\"]?([^},'\"\s]++)['\"]?\s*(?:,([^}]*+))?")


def remember(arguments: Iterable[str]) -> None:
    """Remember the secrets in `key=value` arguments and in the environment, and forget all earlier ones.

    Texts of fewer than `SHORTEST` characters and existing paths are not remembered.

    Args:
        arguments: as typed; the environment variables that they interpolate are secrets too.
    """
    _values.clear()
    _hidden_forms.clear()
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
    _build_forms()


def remember_config(config: Any) -> None:
    """Remember the secrets in a composed config in addition to the earlier ones.

    They are the values of keys with a secret name, users in URLs, and values of interpolated environment variables.

    Args:
        config: nested dicts and lists; interpolations are not resolved.
    """
    for name, value in leaves(config):
        if holds_secret(name, value):
            _add(str(value))
        if isinstance(value, str):
            _add(*users(value))
            _add_variables(value, name)
    _build_forms()


def hide(value: str) -> None:
    """Remember one more secret, such as a key that was read from a file; one that is too short is not remembered."""
    _add(value, exists=False)
    _build_forms()


def _add_variables(text: str, key: str) -> None:
    """Add the values of the environment variables that a config value interpolates, and defaults of secret ones.

    The name of the variable need not be that of a secret, and numbers, truth values and null are none then. For an
    identifier that loads a run, or a setting of Hydra (the name of a folder), it has to be.

    Args:
        text: the config value: `${oc.env:NAME}`.
        key: the dotted key that holds it; may be empty.
    """
    for hit in _variables.finditer(text):
        has_secret_name = is_secret_variable(hit[1])
        value = os.environ.get(hit[1], "")
        if has_secret_name:
            _add(value, hit[2] or "")
        elif not is_identifier(key) and not key.startswith("hydra.") and not _is_number(value):
            _add(value)


def is_identifier(key: str) -> bool:
    """Return whether the value of this config key is needed to load a run again."""
    return _IDENTIFIERS.match(key.lstrip("+~")) is not None


_IDENTIFIERS = re.compile(r"(?:model|adapter)\.|(?:data|tasks\.[^.]+)\.(?:path|hub_\w+|revision|text_columns)\b")


def _is_number(text: str) -> bool:
    """Return whether a text is a number (`nan` too), a truth value or null."""
    try:
        float(text)
    except ValueError:
        return text.lower() in ("true", "false", "null", "none")
    return True


def leaves(node: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of nested dicts and lists; items of a list have the key of the list.

    A `node` that is neither is yielded with `name`.
    """
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from leaves(value, f"{name}.{key}" if name else str(key))
    elif isinstance(node, list | tuple):
        for value in node:
            yield from leaves(value, name)
    else:
        yield name, node


def _add(*values: str, exists: bool = True) -> None:
    """Add secrets to the remembered values, without quotation marks and a scheme such as `Bearer`.

    Too short ones and interpolations are left out. `_build_forms` has to be called afterwards.

    Args:
        values: the secrets.
        exists: leave out those that are existing paths.
    """
    for value in values:
        text = value.strip("\"'\\ \t\r\n")
        text = text.split(None, 1)[1] if re.match(r"(?i)(?:bearer|basic|token) +\S", text) else text
        if len(text) >= SHORTEST and not text.startswith("${") and not (exists and _exists(text)):
            _values[text] = None


def _build_forms() -> None:
    """Build the forms of all remembered values, the longest first, and clear the cache of texts without secrets."""
    forms = {form for value in _values for form in _forms(value) if len(form) >= SHORTEST}
    _hidden_forms.clear()
    _hidden_forms.update(dict.fromkeys(sorted(forms, key=lambda form: (-len(form), form))))
    _without_secret.clear()


def _forms(value: str) -> Iterator[str]:
    """Yield the forms in which a value may appear: as it is, escaped, in a URL, in base64 at any offset.

    Forms may repeat. Base64, in both alphabets, is left out for fewer than 12 bytes.
    """
    yield value
    yield json.dumps(value)[1:-1]
    yield repr(value)[1:-1]
    yield html.escape(value)
    yield from (quote(value), quote(value, safe=""), quote_plus(value))
    raw = value.encode(errors="surrogatepass")
    if len(raw) >= 12:
        for offset in range(3):
            # The first and the last group of base64 also encode bits of the neighbours, so they are cut off.
            coded = base64.b64encode(b"\0" * offset + raw)
            core = coded[4 * (offset > 0) :][: 4 * ((offset + len(raw)) // 3) - 4 * (offset > 0)].decode()
            yield core
            yield core.translate(_URL_SAFE)


_URL_SAFE = str.maketrans("+/", "-_")

# -- paths --


def _exists(text: str) -> bool:
    """Return whether a text is a path that exists; `~` is expanded, and a dangling link counts.

    False for a text that cannot be a path.
    """
    try:
        return len(text) < 4096 and os.path.lexists(os.path.expanduser(text))
    except (OSError, ValueError):
        return False


_PATH_CHECKS = 500
"""Maximum positions in one text for which the file system is queried."""
_NO_PATH = re.compile(r"[\s'\"<>|*?`()\[\]{}]")


class _Paths:
    """Existing paths in one text; hits within them are not hidden."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.checks_left = _PATH_CHECKS

    @cached_property
    def is_path(self) -> bool:
        """True if the text as a whole is a path that exists."""
        return _exists(self.text)

    def covers(self, start: int, end: int) -> bool:
        """Return whether `text[start:end]` is within a path that exists, or the text as a whole is one.

        Paths with spaces and quotation marks around them are recognised. The result is False once `_PATH_CHECKS` calls
        are used up.
        """
        if self.is_path:
            return True
        if self.checks_left <= 0:
            return False
        self.checks_left -= 1
        before = self.text[max(0, start - 1000) : start]
        after = self.text[end : end + 1000]
        word = _NO_PATH.search(after)
        length = word.start() if word else len(after)
        separators = islice(re.finditer("[/:,;'\"]", after), 6)  # also after white space, which a name may contain
        ends = sorted({0, length, len(after[:length].rstrip(":;,.")), *(m.start() for m in separators)})
        starts = [m.end() for m in re.finditer(r"[\s'\"<>|*?`()\[\]{}=:,;]", before)]
        starts = sorted({0, *starts, *_absolute(before)}, reverse=True)[:12]
        hit = self.text[start:end]
        quoted = hit.rstrip("\"'`)]}>,;.:")  # without closing quotation marks and brackets
        rests = [hit + after[:last] for last in ends] + [quoted] * (quoted != hit)
        return any(
            _exists(before[first:] + rest)
            for first in starts
            for rest in rests
            if before[first:] + rest and (first or len(before) < 1000)
        )


def _absolute(before: str) -> Iterator[int]:
    """Yield the offsets at which an absolute path with spaces or brackets in its names may start."""
    return (hit.start() for hit in re.finditer(r"(?<![\w./~-])[~.]{0,2}/", before))


# -- texts --

_without_secret: set[str] = set()
"""Cache of short texts without a secret, as the records of many runs repeat them."""


def redact_new_path(path: str) -> str:
    """Return the path of a new folder with the secrets in it hidden, whether it exists or not.

    The current folder is left as it is, and `=` in a name is not an assignment.
    """
    current = os.path.join(os.getcwd(), "")
    return current * path.startswith(current) + _redact(path.removeprefix(current), is_new_path=True)


def redact(text: str) -> str:
    """Return `text` with each secret in it replaced by `***`; what is within a path that exists stays."""
    if text in _without_secret:
        return text
    result = _redact(text)
    if result == text and len(text) < 500:
        if len(_without_secret) > 20_000:
            _without_secret.clear()
        _without_secret.add(text)
    return result


def _redact(text: str, *, is_new_path: bool = False) -> str:
    """Apply the rules to a text; a new path hides existing paths too, and has no assignments."""
    without = partial(_without, existing=not is_new_path)
    for value in _hidden_forms:
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
    """Return a text with these spans replaced by `***`.

    Args:
        text: the text.
        spans: in order, without overlaps.
        existing: leave spans within a path that exists.
    """
    paths = _Paths(text)
    pieces, done = [], 0
    for start, end in spans:
        if text[start:end] != HIDDEN and not (existing and paths.covers(start, end)):
            pieces += [text[done:start], HIDDEN]
            done = end
    return "".join([*pieces, text[done:]]) if pieces else text


def _occurrences(text: str, value: str) -> Iterator[Span]:
    """Yield the spans of a value in a text."""
    start = text.find(value)
    while start >= 0:
        end = start + len(value)
        yield start, end
        start = text.find(value, end)


# -- values of records and configs --


def redact_value(value: Any, name: str) -> Any:
    """Return a text, a number, true, false or None with its secrets hidden.

    Args:
        value: of a record or a config; a text may be an override `key=value`.
        name: the key that holds it; a secret name hides the whole value, unless it is an existing path, a placeholder,
            true, false or None.
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
    """Return the name that decides on the value of `key`: the outer key `name` if it names a secret, else `key`."""
    word = secret_word(name) if name else None
    return name if word is not None and word not in WEAK else key


def hides_secret(value: Any) -> bool:
    """Return whether nested dicts and lists hold a text with a hidden secret (`***`); keys do not count."""
    if isinstance(value, dict):
        return any(map(hides_secret, value.values()))
    if isinstance(value, list):
        return any(map(hides_secret, value))
    return isinstance(value, str) and HIDDEN in value
