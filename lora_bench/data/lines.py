"""Lines of a UTF-8 file with line feeds; files in other encodings or with other line ends are refused."""

from __future__ import annotations

import codecs
import re

from lora_bench.errors import Code, UserError

_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # begins with UTF-16's mark
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def split_lines(source: str, raw: bytes, separator: str | None = None) -> list[str]:
    """Return UTF-8 lines without their line feeds, and without blank ones at the end.

    A carriage return before the line feed is still there; a byte order mark is not. CSV alone may hold NUL, between
    quotes. A line of spaces is blank, except in TSV and CSV of one column.

    Args:
        source: the name of the file in error messages.
        raw: the file's content.
        separator: of columns; None: lines are JSON.

    Raises:
        UserError: it is not UTF-8, holds NUL, has carriage returns and no line feed, or has blank lines only.
    """
    for mark, encoding in _ENCODINGS.items():
        if raw.startswith(mark):
            remedy = f"Save it as UTF-8: iconv -f {encoding} -t UTF-8 OLD > NEW."
            raise UserError(
                f"is in {encoding}, not in UTF-8", file=source, row=1, remedy=remedy, code=Code.INVALID_DATA
            )
    try:
        text = raw.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        row = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            "is not UTF-8", file=source, row=row, remedy="Save it as UTF-8.", code=Code.INVALID_DATA
        ) from None
    if "\0" in text:
        outside = re.sub('"[^"]*"', _line_feeds, text) if separator == "," else text
        nul = outside.find("\0")
        if nul >= 0:
            row = outside.count("\n", 0, nul) + 1
            raise UserError(
                "holds a NUL byte", file=source, row=row, remedy="Save it as UTF-8.", code=Code.INVALID_DATA
            )
    if "\n" not in text and "\r" in text.rstrip("\r"):
        remedy = "Give them line feeds: tr '\\r' '\\n' < OLD > NEW."
        raise UserError(
            "has lines that end in carriage returns alone, as on old Macs",
            file=source,
            remedy=remedy,
            code=Code.INVALID_DATA,
        )
    lines = text.split("\n")
    blank = " \t\r" if separator is None else " \r" if separator in lines[0] else "\r"
    while lines and not lines[-1].strip(blank):
        lines.pop()
    if not lines:
        raise UserError(
            "is empty", file=source, remedy="Give a header row and at least one row of data.", code=Code.EMPTY
        )
    return lines


def _line_feeds(text: re.Match[str]) -> str:
    """Return the line feeds of a match alone, so that lines can still be counted."""
    return "\n" * text[0].count("\n")
