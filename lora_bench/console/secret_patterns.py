"""Patterns of secrets: positions of secrets in a text, by their context or format.

Every function takes time linear in the length of the text.
"""

from __future__ import annotations

import re
from functools import lru_cache
from string import ascii_letters, digits
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HIDDEN = "***"
"""Replacement of a secret."""
LONGEST_NAME = 100
"""Maximum characters of a key or variable; of a longer one the last are looked at."""

# -- names --

_STRONG = {"token", "secret", "password", "passwd", "passphrase", "credential", "authorization"}
WEAK = {"key", "pwd", "pass", "auth", "pat"}
"""Words that are also used in prose: alone, before a colon or with a number they name no secret."""
_PLURALS = {"secrets", "passwords", "credentials", "apikeys"}
_SPECIAL_TOKENS = {"bos", "eos", "unk", "sep", "pad", "cls", "mask", "special", "image", "audio", "start", "end"}
_NO_SECRET = {"file", "path", "dir", "folder", "name", "env", "sock", "socket", "type", "length"}
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


@lru_cache(maxsize=10_000)
def secret_word(name: str) -> str | None:
    """Return the word in the last part of a dotted name that makes it the name of a secret, or None.

    `llm.api_key` gives `key`, `hubToken` gives `token`. Numbers of tokens (`max_tokens`) and special tokens of a
    tokenizer (`bos_token`) give None.
    """
    last = re.split(r"[./@]", name[-LONGEST_NAME:])[-1]
    words = [word for word in re.split(r"[\W_]+", _CAMEL.sub("_", last).lower()) if word and not word.isdigit()]
    if not words:
        return None
    word, before = words[-1], words[-2] if len(words) > 1 else ""
    if word in ("token", "tokens") and before in _SPECIAL_TOKENS:
        return None
    if word in _STRONG or word in _PLURALS or word in WEAK:
        return word
    if word == "keys" and before in ("api", "access", "secret"):
        return "apikeys"
    return next((ending for ending in (*sorted(_STRONG), "apikey") if word.endswith(ending)), None)


def holds_secret(name: str, value: object) -> bool:
    """Return whether the value of this name is a secret; null, truth values, placeholders and interpolations are not.

    A value that begins with a number is none for a name in `WEAK` (`key=5`), but is one for another
    (`password=123456`).
    """
    word = secret_word(name)
    if word is None or value is None or isinstance(value, bool):
        return False
    text = str(value).strip("\"'\\")
    if text.lower() in _PLACEHOLDERS or text.startswith("${") or (text.isupper() and text in _EXAMPLES):
        return False
    return word not in WEAK or not re.match(r"[\d.]+(?!\w)", text)


_PLACEHOLDERS = {"", "null", "none", "true", "false", "value", "...", "…", HIDDEN}
_EXAMPLES = {"VALUE", "NAME", "KEY", "TOKEN", "DIR", "FILE"}


def is_secret_variable(name: str) -> bool:
    """Return whether an environment variable has the name of a secret: `DB_PASS`, `MY_PAT_PROD`.

    Any of its words may be that of a secret, `key` only the last. `PWD` and names that end in a word of `_NO_SECRET`
    (`TOKEN_FILE`) are none.
    """
    if name in ("PWD", "OLDPWD"):
        return False
    words = [word for word in re.split(r"[\W_]+", name.lower()) if word and not word.isdigit()]
    if not words or words[-1] in _NO_SECRET:
        return False
    return secret_word(name) is not None or any(word in _STRONG | _PLURALS | WEAK - {"key"} for word in words)


Span = tuple[int, int]
"""Start and end of a part of a text."""

_ENDS = (*sorted(_STRONG | WEAK), "secrets", "passwords")
_SIGN = re.compile(r"""(\\{0,3}["'])?\s{0,8}([=:])\s{0,8}""")
_QUOTE = re.compile(r"""\\{0,3}["']""")
_SCHEME = re.compile(r"(?:bearer|basic|token)\s{1,8}", re.IGNORECASE)
_WORD = re.compile(r"\S++")
_IN_NAMES = f"{ascii_letters}{digits}_.-"
_ASCII_LOWER = {code: code + 32 for code in range(ord("A"), ord("Z") + 1)}


def assigned(text: str) -> Iterator[Span]:
    """Yield the spans of the values in `name=value` and `name: value` with the name of a secret, in order.

    A quoted value is yielded with its quotation marks, another one up to white space, and one with a scheme (`Bearer
    …`) without that.
    """
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
    """Yield the ends of a word in a text where `=` or `:` may follow, after white space or a quotation mark."""
    end = text.find(word)
    while end >= 0:
        end += len(word)
        if text[end : end + 1] in _BEFORE_SIGN:
            yield end
        end = text.find(word, end)


_BEFORE_SIGN = frozenset("=: \t\r\n\\\"'")


def _is_assigned_name(text: str, end: int, sign: re.Match[str]) -> bool:
    """Return whether the name before `end`, with the start of its value, is an assignment of a secret.

    Folders (`/key=1`), URLs and prose (`auth: failed`) are none.

    Args:
        text: the text.
        end: the end of the name.
        sign: the match of `_SIGN` there.
    """
    before = text[max(0, end - LONGEST_NAME) : end]
    rest = before.rstrip(_IN_NAMES)
    name, colon = before[len(rest) :], sign[2] == ":"
    if rest.endswith("/") and not sign[1]:
        return False  # a folder's name
    value = text[sign.end() : sign.end() + 40]
    if colon and value.startswith("//"):
        return False
    if name.lower() in WEAK or (colon and not sign[1] and name.lower() in ("token", "secret")):
        return False  # prose and advice: "key=value", "auth: failed", "not a known token: x"
    first = re.match(r"""[\\"']*([^\s"',;}\])]*)""", value)
    assert first is not None
    return holds_secret(name, first[1].rstrip(":."))


_URL = re.compile(r"://([^\s\"'<>`]++)")


def users_in(text: str) -> Iterator[Span]:
    """Yield the spans of the user information (`user:password`, without `@`) of URLs in a text."""
    for hit in _URL.finditer(text):
        if length := _user_length(hit[1]):
            yield hit.start(1), hit.start(1) + length


def users(value: str) -> Iterator[str]:
    """Yield `user:password`, the password and the decoded password of a value that is a URL; `user` alone without one.

    The value is one URL, so that spaces and quotes belong to the password. Without user information nothing is yielded.
    """
    _, mark, rest = value.strip("\"' ").partition("://")
    if mark and (length := _user_length(rest)):
        user = rest[:length]
        password = user.partition(":")[2]
        yield from (user, password, unquote(password)) if password else (user,)


def _user_length(rest: str) -> int:
    """Return the number of characters after `://` that are user information; 0 if there is none.

    A password that holds `@`, `/`, `?` or `#` unescaped ends at the last `@`.
    """
    last = rest.rfind("@")
    if last < 0:
        return 0
    try:
        url = urlsplit(f"x://{rest}")
        host = url.netloc
        if "@" in host:
            return last
        port: int | None = url.port
    except ValueError:  # the port is not a number: it is a password
        return last
    name = url.hostname or ""
    is_host = ":" not in host or (port is not None and ("." in name or ":" in name or name == "localhost"))
    return 0 if is_host else last


def _has_digit_and_letter(text: str) -> bool:
    """Return whether a text has a digit and a letter."""
    return re.search(r"\d", text) is not None and re.search(r"[A-Za-z]", text) is not None


def _is_mixed(text: str) -> bool:
    """Return whether a text has a digit, a lower-case and an upper-case letter."""
    return _has_digit_and_letter(text) and text.lower() != text and text.upper() != text


def _is_sk(token: str) -> bool:
    """Return whether a token that begins with `sk-`, `pk-` or `rk-` has the form of a key.

    It has at least 16 characters after that, letters and digits among them.
    """
    body = token[3:]
    if re.fullmatch(r"(?:proj|svcacct|admin|ant|or|None)-[\w-]{16,}", body) or len(body) >= 40:
        return _is_mixed(body) or (len(body) >= 40 and _has_digit_and_letter(body))
    if body.startswith(("proj-", "ant-", "or-")):
        return len(body) >= 16 and _is_mixed(body)
    return re.fullmatch(r"[A-Za-z0-9]{16,}", body) is not None and _has_digit_and_letter(body)


def _is_hf(token: str) -> bool:
    """Return whether a token after `hf_` is a key: 34 letters and digits, or 20 and more letters."""
    return len(token) >= 37 or (len(token) >= 23 and token[3:].isalpha())


# Formats of keys: the literal prefix that is searched for, the pattern of the whole key, and a check of the match. Each
# text is scanned once for each prefix.
FORMATS: list[tuple[str, re.Pattern[str], Callable[[str], bool]]] = [
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
        re.compile(
            r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----.*?(?:-----END [A-Z ]{0,40}PRIVATE KEY-----|\Z)", re.DOTALL
        ),
        bool,
    ),
]
_BEARER = re.compile(r"""earer ([^\s,;}\]'"]{8,}+)""")


def bearers(text: str) -> Iterator[Span]:
    """Yield the spans of tokens after `Bearer`."""
    return (hit.span(1) for hit in _BEARER.finditer(text) if not hit[1].isalpha() or len(hit[1]) >= 20)
