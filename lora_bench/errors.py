"""Errors that a user can correct, and the checks that raise them. A message is one paragraph.

    adapter.rank=0: must be at least 1. Give a whole number from 1 to the smallest side of the adapted layers.
    train.tsv, row 17: 2 columns where the header has 3. Every row needs one tab between columns.

The command line prints the message and exits with 2. Other exceptions are defects or failed runs.
"""

from __future__ import annotations

import math
import re
import shlex
import unicodedata
from difflib import get_close_matches
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


class Code(StrEnum):
    """The kind of a `UserError`: stable from version to version, whereas the wording of a message is not."""

    AMBIGUOUS = "ambiguous"
    """The value stands for several runs."""
    BUDGET_SPENT = "budget_spent"
    """A limit of requests or money is reached."""
    CONFLICT = "conflict"
    """The value excludes another setting, or needs one that is not set."""
    DAMAGED = "damaged"
    """A file that a program wrote is cut, altered or inconsistent."""
    EMPTY = "empty"
    """A file or split has no rows."""
    EXISTS = "exists"
    """Something older would be overwritten."""
    EXTENSION = "extension"
    """An entry point of an installed distribution cannot be used."""
    FORBIDDEN = "forbidden"
    """The request would run code, show a secret or leave its folder."""
    INVALID_DATA = "invalid_data"
    """A row or header of the user's data is wrong."""
    INVALID_SYNTAX = "invalid_syntax"
    """An override, a YAML file, a template or a regular expression cannot be parsed."""
    INVALID_VALUE = "invalid_value"
    """The value is of a wrong type or out of range."""
    IN_USE = "in_use"
    """Another process holds the folder."""
    LOST = "lost"
    """The folder of a run or sweep was moved or replaced while it was written."""
    MISMATCH = "mismatch"
    """The data, the backbone, the tokenizer or the device is not the one that a record names or the weights need."""
    MISSING = "missing"
    """A value that is needed was not given."""
    MISSING_PACKAGE = "missing_package"
    """A Python package or a program is not installed."""
    NOT_A_FILE = "not_a_file"
    """A path leads to a device, a link or a folder in place of a file, or to a file in place of a folder."""
    NOT_FOUND = "not_found"
    """There is no such file, folder, run or hub repository."""
    NOT_RESUMABLE = "not_resumable"
    """The run cannot be resumed, or not with these settings."""
    NO_DEVICE = "no_device"
    """The device or its precision is not available here."""
    NO_MATCH = "no_match"
    """A pattern or a selection matches nothing."""
    OUT_OF_MEMORY = "out_of_memory"
    """Memory does not suffice."""
    PROCESS_ENDED = "process_ended"
    """A process that trained some of the runs ended before they did."""
    SERVER = "server"
    """A server refused the request or cannot be reached."""
    TOO_LARGE = "too_large"
    """A file or value exceeds a fixed limit."""
    UNFINISHED = "unfinished"
    """The run is not done."""
    UNKNOWN_CHOICE = "unknown_choice"
    """The value is not one of the choices."""
    UNKNOWN_KEY = "unknown_key"
    """There is no such configuration key."""
    UNREADABLE = "unreadable"
    """The operating system refuses to read a file."""
    UNSUPPORTED = "unsupported"
    """This model, method or run cannot do what was requested."""
    UNWRITABLE = "unwritable"
    """The operating system refuses to write a file."""


class UserError(Exception):
    """A request that cannot be met; the message says what is wrong, where, and what to do.

    Args:
        reason: what is wrong, as a sentence without its full stop.
        code: the stable identifier of the error.
        key: the config key that is wrong (`adapter.rank`).
        value: the value given for that key.
        file: the file that is wrong.
        row: the row of that file, counted as an editor counts lines (from 1, header included).
        remedy: what to do instead, as whole sentences.
    """

    def __init__(
        self,
        reason: str,
        *,
        code: Code,
        key: str | None = None,
        value: object = None,
        file: str | Path | None = None,
        row: int | None = None,
        remedy: str | None = None,
    ) -> None:
        """Keep the arguments as attributes; `str()` puts the message together."""
        super().__init__(reason)
        self.reason = reason
        self.code = code
        self.key = key
        self.value = value
        self.file = file
        self.row = row
        self.remedy = remedy

    def __str__(self) -> str:
        """Return the message in one paragraph: `key=value: file, row 3: reason. remedy`; what is None is left out.

        White space, line breaks included, becomes single spaces.
        """
        locations = []
        if self.key is not None:
            locations.append(self.key if self.value is None else f"{self.key}={self.value}")
        if self.file is not None:
            locations.append(f"{self.file}" if self.row is None else f"{self.file}, row {self.row}")
        where = ": ".join(locations)
        text = f"{where}: {self.reason}" if where else self.reason
        return " ".join(f"{text}. {self.remedy or ''}".split())

    def under(self, prefix: str) -> UserError:
        """Prepend `prefix` to the key (`rank` becomes `adapter.rank`), and return this error, which is changed.

        Without a key, or with an empty prefix, nothing changes.
        """
        if self.key is not None and prefix:
            self.key = f"{prefix}.{self.key}"
        return self


class RunFailedError(UserError):
    """A run that had started cannot continue, as the disk is full or its folder is gone. The exit code is 1."""


class LostFolderError(RunFailedError):
    """The folder of a run or sweep was removed or replaced, so nothing is written there any more."""


class DivergedError(Exception):
    """A loss, gradient or score is not a finite number; the run ends with status `diverged`."""


class SweepFailedError(Exception):
    """Some jobs of a sweep failed; the message of each was printed when it failed."""


def require(
    condition: bool, key: str, value: object, reason: str, remedy: str = "", *, code: Code = Code.INVALID_VALUE
) -> None:
    """Raise a `UserError` for `value` of `key` unless the condition is true."""
    if not condition:
        raise UserError(reason, code=code, key=key, value=value, remedy=remedy)


def require_one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise a `UserError` if the value is not among the choices."""
    require(value in choices, key, value, f"is not one of {', '.join(choices)}", code=Code.UNKNOWN_CHOICE)


def require_number(key: str, value: float, low: float, high: float = math.inf, *, open_low: bool = False) -> None:
    """Raise a `UserError` if the value is not finite and in [low, high], or in (low, high] with `open_low`.

    NaN is refused, and so is an integer from 2**63 on.
    """
    require(type(value) is not int or value < 2**63, key, value, "is too large")
    inside = low <= value <= high and abs(value) < math.inf and not (open_low and value == low)
    if inside:
        return
    bound = f"above {low:g}" if open_low else f"of at least {low:g}"
    upper = f" and at most {high:,.12g}" if math.isfinite(high) else ""
    raise UserError(f"must be a finite number {bound}{upper}", code=Code.INVALID_VALUE, key=key, value=value)


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return the remedy for a mistyped word: `Did you mean …?` with the nearest choice, else a list of all choices.

    A dotted key may be near in its last part alone. The remedy is empty if there are no choices.
    """
    names = sorted(set(choices))
    close = get_close_matches(word, names, n=1, cutoff=0.6)
    if not close:
        tails = {name.rsplit(".", 1)[-1]: name for name in names}
        close = [tails[tail] for tail in get_close_matches(word.rsplit(".", 1)[-1], tails, n=1, cutoff=0.6)]
    if close:
        return f"Did you mean {close[0]}?"
    return f"Choices: {', '.join(names)}." if names else ""


def quoted(value: object, mark: str = "'") -> str:
    """Return a value in quotation marks, so that Hydra and OmegaConf read it back unchanged."""
    text = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", str(value))
    text = re.sub(rf"(\\+)({mark}|$)", lambda match: match[1] * 2 + match[2], text).replace(mark, f"\\{mark}")
    return f"{mark}{text}{mark}"


def shell_argument(key: str, value: object) -> str:
    """Return `key=value` quoted for a POSIX shell, so that the shell and Hydra read the value back unchanged.

    A plain name or path is not quoted. A text that a terminal could change (line breaks, characters that cannot be
    printed) is written as `"$(printf …)"`.
    """
    text = str(value)
    simple = re.fullmatch(r"(\.{0,2}/)?[A-Za-z_][\w./-]*", text, re.ASCII)
    if simple and text.lower() not in ("null", "true", "false", "nan", "inf"):
        return f"{key}={text}"
    mark = "'" if '"' in text else '"'
    override = f"{key}={quoted(text, mark)}"
    is_plain = override.isprintable() and " ".join(override.split()) == override
    if is_plain and unicodedata.is_normalized("NFC", override):
        return shlex.quote(override)
    escaped = {"\\": r"\\", "%": "%%", "'": r"\047"}
    format_string = "".join(escaped.get(char) or _octal(char) for char in _units(override))
    return f"\"$(printf '{format_string}')\""


def _units(text: str) -> list[str]:
    """Return the characters of a text; a letter and the combining accents after it are one."""
    units: list[str] = []
    for char in text:
        if units and unicodedata.combining(char):
            units[-1] += char
        else:
            units.append(char)
    return units


def _octal(char: str) -> str:
    """Return a character as printf takes it: as octal bytes if a terminal or a message could change it."""
    if char.isprintable() and char != " " and unicodedata.is_normalized("NFC", char):
        return char
    return "".join(f"\\{byte:03o}" for byte in char.encode(errors="surrogateescape"))
