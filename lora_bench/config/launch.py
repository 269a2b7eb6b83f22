"""Rank and world size of this process, which `torchrun` passes through environment variables.

    WORLD_SIZE    number of processes; the other variables count only if it is more than 1
    RANK          number of this process, from 0
    LOCAL_RANK    number of this process on its machine, and of its GPU
    MASTER_ADDR   host of process 0
    MASTER_PORT   port where process 0 waits for the others

No other variables are read: a scheduler sets its own (SLURM_PROCID) for single-process jobs, too.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from lora_bench.errors import Code, UserError

_LIMIT = 2**31 - 1
_SINGLE = "Start the command with torchrun, or unset WORLD_SIZE to train in one process."


@dataclass(frozen=True)
class Launch:
    """The launch of a process: rank, world size and address of process 0. A single process has rank 0 of 1."""

    rank: int = 0
    world_size: int = 1
    local_rank: int | None = None
    address: str | None = None
    port: int | None = None

    @classmethod
    def read(cls) -> Launch:
        """Read the environment variables; without WORLD_SIZE, or with 1, return the launch of a single process.

        With several processes RANK is 0 and the others are None where a variable is not set; `check` refuses that.

        Raises:
            UserError: a variable is not a number in its range (for a single process RANK and LOCAL_RANK too), or
                MASTER_ADDR is blank.
        """
        world_size = _number("WORLD_SIZE", 1, _LIMIT)
        if world_size is None or world_size == 1:
            for name in ("RANK", "LOCAL_RANK"):
                _number(name, 0, _LIMIT)
            return cls()
        rank = _number("RANK", 0, world_size - 1)
        local_rank = _number("LOCAL_RANK", 0, world_size - 1)
        address, port = os.environ.get("MASTER_ADDR"), _number("MASTER_PORT", 1, 65535)
        if address is not None and not address.strip():
            raise UserError("is empty", key="MASTER_ADDR", remedy=_SINGLE, code=Code.INVALID_VALUE)
        return cls(rank or 0, world_size, local_rank, address, port)

    def check(self) -> None:
        """Check that the variables that several processes need are set; a single process needs none. Nothing is sent.

        Raises:
            UserError: there are several processes, and RANK, MASTER_ADDR or MASTER_PORT is not set.
        """
        if self.world_size == 1:
            return
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                raise UserError(
                    f"is not set, and WORLD_SIZE={self.world_size}", key=name, remedy=_SINGLE, code=Code.MISSING
                )


def _number(name: str, low: int, high: int) -> int | None:
    """Return the number in an environment variable; None if it is not set.

    Raises:
        UserError: it is not an integer in [low, high], written in digits only; an empty variable is none.
    """
    text = os.environ.get(name)
    if text is None:
        return None
    number = int(text) if text.isascii() and text.isdecimal() and len(text) <= 10 else -1
    if not low <= number <= high:
        bound = f"from {low} to {high}" if high < _LIMIT else f"of at least {low}"
        start = text if len(text) <= 20 else f"{text[:20]}…"
        remedy = f"{_SINGLE if name != 'WORLD_SIZE' else 'Start the command with torchrun, or unset it.'}"
        raise UserError(
            f"must be a whole number {bound}", key=name, value=start or "''", remedy=remedy, code=Code.INVALID_VALUE
        )
    return number
