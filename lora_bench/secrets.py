"""Secrets: keys and passwords that must not reach a file, a log, a report or the screen.

Text is redacted by where a value comes from:

    known values       `remember` takes them from the command line and the environment, `remember_config` from a composed
                       config (keys so named, `${oc.env:NAME}`), `hide` takes one more; hidden wherever they appear
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
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, lru_cache
from string import ascii_letters, digits
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, quote_plus, unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterable

HIDDEN = "***"

SHORTEST = 6
"""A known value of fewer characters would hide innocent text everywhere."""

# -- names --

_STRONG = {"token", "secret", "password", "passwd", "passphrase", "credential", "authorization"}
_WEAK = {"key", "pwd", "pass", "auth", "pat"}  # also plain words: alone, before a colon or with a number no secret
_PLURALS = {"secrets", "passwords", "credentials", "apikeys"}
_SPECIAL_TOKENS = {"bos", "eos", "unk", "sep", "pad", "cls", "mask", "special", "image", "audio", "start", "end"}
_NO_SECRET = {"file", "path", "dir", "folder", "name", "env", "sock", "socket", "type", "length"}
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_LONGEST_NAME = 100


@lru_cache(maxsize=10_000)
def _secret_word(name: str) -> str | None:
    """Return the word in the last part of a dotted name that makes it a secret's name, or None."""
    last = re.split(r"[./@]", name[-_LONGEST_NAME:])[-1]
    words = [word for word in re.split(r"[\W_]+", _CAMEL.sub("_", last).lower()) if word and not word.isdigit()]
    if not words:
        return None
    word, before = words[-1], words[-2] if len(words) > 1 else ""
    if word in ("token", "tokens") and before in _SPECIAL_TOKENS:
        return None
    if word in _STRONG or word in _PLURALS or word in _WEAK:
        return word
    if word == "keys" and before in ("api", "access", "secret"):
        return "apikeys"
    return next((ending for ending in (*sorted(_STRONG), "apikey") if word.endswith(ending)), None)


def _holds_secret(name: str, value: object) -> bool:
    """Return whether `value` below this name is a secret; placeholders, interpolations and sizes are none."""
    word = _secret_word(name)
    if word is None or value is None or isinstance(value, bool):
        return False
    text = str(value).strip("\"'\\")
    if text.lower() in _PLACEHOLDERS or text.startswith("${") or (text.isupper() and text in _EXAMPLES):
        return False
    return word not in _WEAK or not re.match(r"[\d.]+(?!\w)", text)


_PLACEHOLDERS = {"", "null", "none", "true", "false", "value", "...", "…", HIDDEN}
_EXAMPLES = {"VALUE", "NAME", "KEY", "TOKEN", "DIR", "FILE"}


def _is_secret_variable(name: str) -> bool:
    """Return whether an environment variable's name says that it holds a secret: `DB_PASS`, `TOKEN_1`, `MY_PAT_PROD`."""
    if name in ("PWD", "OLDPWD"):
        return False
    words = [word for word in re.split(r"[\W_]+", name.lower()) if word and not word.isdigit()]
    if not words or words[-1] in _NO_SECRET:
        return False
    return _secret_word(name) is not None or any(word in _STRONG | _PLURALS | _WEAK - {"key"} for word in words)


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
        if equals and _holds_secret(name, value):
            _add(value, *value.split(","), *re.split(r"[\[\]{},]", value))
        _add(*(argument[start:end] for start, end in _assigned(argument)))
        _add(*_users(value if equals else argument))
        _add_variables(argument, name if equals else "")
    for name, value in os.environ.items():
        if _is_secret_variable(name):
            _add(value)
        elif "://" in value:
            _add(*_users(value))
    _sort()


def remember_config(config: Any) -> None:
    """Take further secrets from a composed config, interpolations as they are written.

    Args:
        config: a `DictConfig`, or nested dicts and lists.
    """
    if not isinstance(config, dict):
        from omegaconf import OmegaConf  # late: compare composes nothing

        config = OmegaConf.to_container(config, resolve=False)
    for name, value in leaves(config):
        if _holds_secret(name, value):
            _add(str(value))
        if isinstance(value, str):
            _add(*_users(value))
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
        named = _is_secret_variable(hit[1])
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
        cut = _NO_PATH.search(after)
        after = after[: cut.start()] if cut else after
        ends = sorted({0, len(after), len(after.rstrip(":;,.")), *(m.start() for m in re.finditer("[/:,;]", after))})
        starts = [m.end() for m in re.finditer(r"[\s'\"<>|*?`()\[\]{}=:,;]", before)]
        starts = sorted({0, *starts, *_absolute(before)}, reverse=True)[:12]
        hit = self.text[start:end]
        return any(
            _exists(before[first:] + hit + after[:last])
            for first in starts
            for last in ends[:8]
            if (before[first:] or hit) and (first or len(before) < 1000)
        )


def _absolute(before: str) -> Iterator[int]:
    """Yield where in a text an absolute path may begin whose folders have spaces or brackets in their names."""
    return (hit.start() for hit in re.finditer(r"(?<![\w./~-])[~.]{0,2}/", before))


# -- texts --

Span = tuple[int, int]

_ENDS = (*sorted(_STRONG | _WEAK), "secrets", "passwords")
_SIGN = re.compile(r"""(\\{0,3}["'])?\s{0,8}([=:])\s{0,8}""")
_QUOTE = re.compile(r"""\\{0,3}["']""")
_SCHEME = re.compile(r"(?:bearer|basic|token)\s{1,8}", re.IGNORECASE)
_WORD = re.compile(r"\S++")
_IN_NAMES = f"{ascii_letters}{digits}_.-"
_ASCII_LOWER = {code: code + 32 for code in range(ord("A"), ord("Z") + 1)}


def _assigned(text: str) -> Iterator[Span]:
    """Yield where the values stand of `name=value` and `name: value` with a secret's name."""
    lower = text.lower() if text.isascii() else text.translate(_ASCII_LOWER)
    ends = sorted({end for word in _ENDS if word in lower for end in _ends_of(word, lower)})
    unclosed: set[str] = set()
    done = 0
    for end in ends:
        if end < done or not (sign := _SIGN.match(text, end)) or not _is_assigned_name(text, end, sign):
            continue
        scheme = _SCHEME.match(text, sign.end())
        start = scheme.end() if scheme else sign.end()
        quote = _QUOTE.match(text, start)
        close = -1
        if quote and quote[0] not in unclosed:
            close = text.find(quote[0], quote.end())
            if close < 0:
                unclosed.add(quote[0])
        if quote and close >= 0:
            done = close + len(quote[0])
        elif word := _WORD.match(text, start):
            done = word.end() - (word.end() - start > 1 and text[word.end() - 1] in ":;.,")
        else:
            continue
        yield start, done


def _ends_of(word: str, text: str) -> Iterator[int]:
    """Yield the places behind a word that a sign follows, or white space or a quotation mark before one."""
    place = text.find(word)
    while place >= 0:
        place += len(word)
        if text[place : place + 1] in _BEFORE_SIGN:
            yield place
        place = text.find(word, place)


_BEFORE_SIGN = frozenset("=: \t\r\n\\\"'")


def _is_assigned_name(text: str, end: int, sign: re.Match[str]) -> bool:
    """Return whether the name that ends here, and how its value begins, are a secret's."""
    before = text[max(0, end - _LONGEST_NAME) : end]
    rest = before.rstrip(_IN_NAMES)
    name, colon = before[len(rest) :], sign[2] == ":"
    if rest.endswith("/") and not sign[1]:
        return False  # a folder's name
    value = text[sign.end() : sign.end() + 40]
    if colon and value.startswith("//"):
        return False
    if name.lower() in _WEAK or (colon and not sign[1] and name.lower() in ("token", "secret")):
        return False  # prose and advice: "key=value", "auth: failed", "not a known token: x"
    first = re.match(r"""[\\"']*([^\s"',;}\])]*)""", value)
    assert first is not None
    return _holds_secret(name, first[1].rstrip(":."))


_URL = re.compile(r"://([^\s\"'<>`]++)")


def _users_in(text: str) -> Iterator[Span]:
    """Yield where the user information (`user:password`) of the URLs in a text stands."""
    for hit in _URL.finditer(text):
        if length := _user_length(hit[1]):
            yield hit.start(1), hit.start(1) + length


def _users(value: str) -> Iterator[str]:
    """Yield the user information and the password of a value that is a URL, spaces and quotes included."""
    _, mark, rest = value.strip("\"' ").partition("://")
    if mark and (length := _user_length(rest)):
        user = rest[:length]
        password = user.partition(":")[2]
        yield from (user, password, unquote(password)) if password else (user,)


def _user_length(rest: str) -> int:
    """Return how many characters behind `://` are user information, whatever a password has in it.

    A password may hold `@`, `/`, `?` or `#` as they are: then it ends at the last `@`.
    """
    last = rest.rfind("@")
    if last < 0:
        return 0
    try:
        parts = urlsplit(f"x://{rest}")
        host = parts.netloc
        if "@" in host:
            return last
        port: int | None = parts.port
    except ValueError:  # a port that is no number: it is a password
        return last
    name = parts.hostname or ""
    is_host = ":" not in host or (port is not None and ("." in name or ":" in name or name == "localhost"))
    return 0 if is_host else last


def _has_digit_and_letter(text: str) -> bool:
    return re.search(r"\d", text) is not None and re.search(r"[A-Za-z]", text) is not None


def _is_mixed(text: str) -> bool:
    return _has_digit_and_letter(text) and text.lower() != text and text.upper() != text


def _is_sk(token: str) -> bool:
    body = token[3:]
    if re.fullmatch(r"(?:proj|svcacct|admin|ant|or|None)-[\w-]{16,}", body) or len(body) >= 40:
        return _is_mixed(body) or (len(body) >= 40 and _has_digit_and_letter(body))
    if body.startswith(("proj-", "ant-", "or-")):
        return len(body) >= 16 and _is_mixed(body)
    return re.fullmatch(r"[A-Za-z0-9]{16,}", body) is not None and _has_digit_and_letter(body)


def _is_hf(token: str) -> bool:
    """34 letters and digits; somewhat fewer letters alone are no word either."""
    return len(token) >= 37 or (len(token) >= 23 and token[3:].isalpha())


# What a key begins with (the literal that is searched for), what follows, what may not stand before it, and whether
# the whole is a key. Each text is scanned once for each: no key begins within another.
_FORMATS: list[tuple[str, re.Pattern[str], Callable[[str], bool]]] = [
    (prefix, re.compile(rf"{prefix}(?<!{before}{prefix}){rest}", re.DOTALL), check)
    for prefixes, before, rest, check in [
        ("sk- pk- rk-", r"[\w-]", r"[\w-]++", _is_sk),  # OpenAI, Anthropic and others
        ("sk_live_ sk_test_ pk_live_ rk_live_ rk_test_", r"[\w-]", r"\w{8,}+", _has_digit_and_letter),  # Stripe
        ("hf_", r"[\w-]", r"[A-Za-z0-9]++(?![\w-])", _is_hf),  # Hugging Face
        ("ghp_ gho_ ghs_ ghr_ ghu_ github_pat_ glpat-", r"[\w-]", r"[\w-]{20,}+|", _has_digit_and_letter),
        ("AKIA ASIA", r"[A-Za-z0-9]", r"[A-Z0-9]{16}(?![A-Za-z0-9])", bool),  # AWS
        ("AIza", r"[\w-]", r"[\w-]{30,}+", bool),  # Google
        ("xoxa- xoxb- xoxe- xoxo- xoxp- xoxr- xoxs-", r"[\w-]", r"\d{6,}+[\w-]{4,}+", bool),  # Slack
        ("eyJ", r"[\w-]", r"[\w-]{8,}+\.[\w-]{8,}+\.[\w-]*+", bool),  # JSON web tokens
    ]
    for prefix in prefixes.split()
] + [
    (
        "-----BEGIN ",
        re.compile(r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----.*?(?:-----END [A-Z ]{0,40}PRIVATE KEY-----|\Z)", re.DOTALL),
        bool,
    ),
]
_BEARER = re.compile(r"""earer ([^\s,;}\]'"]{8,}+)""")


def _bearers(text: str) -> Iterator[Span]:
    return (hit.span(1) for hit in _BEARER.finditer(text) if not hit[1].isalpha() or len(hit[1]) >= 20)


_without_secret: set[str] = set()
"""Short texts in which nothing was found: the records of a thousand runs have much the same."""


def redact_path(path: str) -> str:
    """Return `path` with the secrets in it hidden; `=` in a folder's name makes no assignment."""
    return _redact(path, assigned=False)


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


def _redact(text: str, *, assigned: bool = True) -> str:
    for value in _known:
        if value in text:
            text = _without(text, _occurrences(text, value))
    if "://" in text:
        text = _without(text, _users_in(text))
    if assigned and ("=" in text or ":" in text):
        text = _without(text, _assigned(text))
    for prefix, pattern, is_key in _FORMATS:
        if prefix in text:
            text = _without(text, (hit.span() for hit in pattern.finditer(text) if is_key(hit[0])))
    if "earer " in text:
        text = _without(text, _bearers(text))
    return text


def _without(text: str, spans: Iterable[Span]) -> str:
    """Hide these spans, in order, but for those in a path that exists."""
    paths = _Paths(text)
    parts, done = [], 0
    for start, end in spans:
        if text[start:end] != HIDDEN and not paths.covers(start, end):
            parts += [text[done:start], HIDDEN]
            done = end
    return "".join([*parts, text[done:]]) if parts else text


def _occurrences(text: str, value: str) -> Iterator[Span]:
    place = text.find(value)
    while place >= 0:
        yield place, place + len(value)
        place = text.find(value, place + len(value))


# -- values of records and configs --


def redacted(value: Any, name: str) -> Any:
    """Return a text, a number, true, false or None as it may be written.

    Args:
        name: the key that holds it.
    """
    if name and _holds_secret(name, value) and not (isinstance(value, str) and _exists(value)):
        return HIDDEN
    if not isinstance(value, str):
        return value
    key, equals, held = value.partition("=")
    if equals and len(key) <= _LONGEST_NAME and _OVERRIDDEN.fullmatch(key) and not _exists(value):
        word = _secret_word(key.lstrip("+~"))
        if word and key.lower() not in _WEAK and _holds_secret(key.lstrip("+~"), held) and not _exists(held):
            return f"{key}={HIDDEN}"
    return redact(value)


_OVERRIDDEN = re.compile(r"[+~]{0,2}[\w.@/-]+")


def name_below(name: str, key: str) -> str:
    """Return the name that decides on what `key` holds: that of the outer key, if all below it is a secret."""
    word = _secret_word(name) if name else None
    return name if word is not None and word not in _WEAK else key


def hides_secret(value: Any) -> bool:
    """Return whether something in `value` was hidden, so that it is not what it was made from."""
    if isinstance(value, dict):
        return any(map(hides_secret, value.values()))
    if isinstance(value, list):
        return any(map(hides_secret, value))
    return isinstance(value, str) and HIDDEN in value
