"""Arguments of the commands that take options in place of configuration keys: compare, ls, show, rm, watch."""

from __future__ import annotations

import argparse
from typing import NoReturn

from lora_bench.errors import Code, UserError


class CommandParser(argparse.ArgumentParser):
    """A parser of the options of one command, which reports errors as a `UserError`; options are not abbreviated.

    Args:
        command: its name, as in `lora-bench NAME`.
        description: printed by `--help`.
        epilog: printed at its end.
    """

    def __init__(self, command: str, description: str, epilog: str | None = None) -> None:
        super().__init__(prog=f"lora-bench {command}", description=description, epilog=epilog, allow_abbrev=False)
        self.command = command

    def error(self, message: str) -> NoReturn:
        """Raise a `UserError` in place of ending the process."""
        remedy = f"`lora-bench {self.command} --help` lists the arguments."
        raise UserError(message, key=self.command, remedy=remedy, code=Code.INVALID_SYNTAX)


def whole_number(text: str) -> int:
    """Return an argument as a whole number of 1 or more.

    Raises:
        argparse.ArgumentTypeError: it is not such a number.
    """
    if not text.isascii() or not text.isdecimal() or int(text[:9]) < 1:
        raise argparse.ArgumentTypeError("must be a whole number of 1 or more")
    return int(text[:9])
