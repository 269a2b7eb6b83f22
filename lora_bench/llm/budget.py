"""What a run may spend, in requests and in money, and how fast it may ask."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_bench.llm.settings import LLM
    from lora_bench.llm.template import Messages

_PER_MESSAGE = 16  # tokens that a server may put around a message


class BudgetReachedError(Exception):
    """No further request may be sent. Args: the key that says so, and its value."""

    def __init__(self, key: str, value: float) -> None:
        super().__init__(key, value)
        self.key, self.value = key, value


class Budget:
    """Counts requests and money; a request is paid with the most it can cost before it is sent, and settled after.

    So the caps hold whatever is under way. An answer that never came counts with the most that it can have cost.
    """

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.requests = 0
        self.spent = 0.0
        self.reserved = 0.0
        self.under_way = 0
        self._settled = asyncio.Condition()

    def max_cost_of(self, messages: Messages) -> float:
        """The most that one request can cost; a token is at least a byte."""
        tokens = sum(len(message["content"].encode()) + _PER_MESSAGE for message in messages)
        return self.llm.cost(tokens, self.llm.max_answer_tokens or 0) or 0.0

    async def reserve(self, messages: Messages) -> float:
        """Wait until a request may be sent, and count it.

        Raises:
            BudgetReachedError: it may not.
        """
        most = self.max_cost_of(messages)
        cap = self.llm.max_cost
        async with self._settled:
            while True:
                if self.llm.max_requests is not None and self.requests >= self.llm.max_requests:
                    raise BudgetReachedError("llm.max_requests", self.llm.max_requests)
                if cap is None or self.spent + self.reserved + most <= cap:
                    break
                if not self.under_way:
                    raise BudgetReachedError("llm.max_cost", cap)
                await self._settled.wait()
            self.requests += 1
            self.under_way += 1
            self.reserved += most
        return most

    async def settle(self, reserved: float, cost: float) -> None:
        """What a request did cost, in place of what was reserved for it."""
        async with self._settled:
            self.under_way -= 1
            self.reserved = self.reserved - reserved if self.under_way else 0.0  # without what rounding leaves
            self.spent += cost
            self._settled.notify_all()


class Pace:
    """When the next request may begin: so many a minute, and none before the server wants to be asked again."""

    def __init__(self, requests_per_minute: float | None) -> None:
        self.interval = 60 / requests_per_minute if requests_per_minute else 0.0
        self.next = 0.0

    async def wait(self) -> None:
        now = time.monotonic()
        turn = max(now, self.next)
        self.next = turn + self.interval
        if turn > now:
            await asyncio.sleep(turn - now)

    def hold(self, seconds: float) -> None:
        """No request begins for so long."""
        self.next = max(self.next, time.monotonic() + seconds)
