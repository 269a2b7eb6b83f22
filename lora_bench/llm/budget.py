"""Limits on the requests of a run, on their cost, and on their rate."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_bench.llm.settings import LLM
    from lora_bench.llm.template import Messages

_PER_MESSAGE = 16  # tokens that a server may put around a message


class BudgetReachedError(Exception):
    """A limit forbids a further request.

    Args:
        key: the configuration key of the limit.
        value: the limit.
    """

    def __init__(self, key: str, value: float) -> None:
        super().__init__(key, value)
        self.key, self.value = key, value


class Budget:
    """Requests and money spent by a run.

    The maximal cost of a request is reserved before it is sent, and replaced by the actual cost afterwards. So the
    limits hold at any concurrency. A request without an answer counts with its maximal cost.
    """

    def __init__(self, llm: LLM) -> None:
        """Start with nothing spent; the settings give limits and prices."""
        self.llm = llm
        self.requests = 0
        self.spent = 0.0
        self.reserved = 0.0
        self.under_way = 0
        self._settled = asyncio.Condition()

    def max_cost_of(self, messages: Messages) -> float:
        """Return the maximal cost of one request, from one token for each byte; 0 without prices."""
        tokens = sum(len(message["content"].encode()) + _PER_MESSAGE for message in messages)
        return self.llm.cost(tokens, self.llm.max_answer_tokens or 0) or 0.0

    async def reserve(self, messages: Messages) -> float:
        """Wait until a request fits the budget, count it, and return the cost that was reserved for it.

        Each call that returns needs one call of `settle`.

        Raises:
            BudgetReachedError: `llm.max_requests` are counted already; or the request does not fit `llm.max_cost`, and
                no pending request can free the money for it.
        """
        max_cost = self.max_cost_of(messages)
        cap = self.llm.max_cost
        async with self._settled:
            while True:
                if self.llm.max_requests is not None and self.requests >= self.llm.max_requests:
                    raise BudgetReachedError("llm.max_requests", self.llm.max_requests)
                if cap is None or self.spent + self.reserved + max_cost <= cap:
                    break
                if not self.under_way:
                    raise BudgetReachedError("llm.max_cost", cap)
                await self._settled.wait()
            self.requests += 1
            self.under_way += 1
            self.reserved += max_cost
        return max_cost

    async def settle(self, reserved: float, cost: float) -> None:
        """End a pending request: replace its reserved cost by its actual cost, and wake the requests that wait."""
        async with self._settled:
            self.under_way -= 1
            self.reserved = self.reserved - reserved if self.under_way else 0.0  # without rounding errors
            self.spent += cost
            self._settled.notify_all()


class Pace:
    """The rate of requests: at most `requests_per_minute`, evenly spaced; none before the time a server asked for."""

    def __init__(self, requests_per_minute: float | None) -> None:
        self.interval = 60 / requests_per_minute if requests_per_minute else 0.0
        self.next = 0.0

    async def wait(self) -> None:
        """Wait for the turn of the next request, which is fixed now: a later `hold` does not delay it."""
        now = time.monotonic()
        turn = max(now, self.next)
        self.next = turn + self.interval
        if turn > now:
            await asyncio.sleep(turn - now)

    def hold(self, seconds: float) -> None:
        """Send no request for the next `seconds`."""
        self.next = max(self.next, time.monotonic() + seconds)
