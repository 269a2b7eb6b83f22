"""Budget, request rate and waiting times, without a server."""

from __future__ import annotations

import asyncio
import random
import time
from email.utils import formatdate
from typing import TYPE_CHECKING, Any

import pytest

from lora_bench.config.build import build
from lora_bench.errors import Code, RunFailedError
from lora_bench.llm.budget import Budget, BudgetReachedError, Pace
from lora_bench.llm.cache import Cache
from lora_bench.llm.client import Client, _retry_after
from lora_bench.llm.parsing import BrokenAnswerError
from lora_bench.llm.settings import LLM
from tests.helpers import composed

if TYPE_CHECKING:
    from pathlib import Path

QUESTION = [{"role": "user", "content": "x" * 84}]  # at most 100 tokens


def llm(*overrides: str) -> LLM:
    return build(LLM, composed("llm.input_price=1e6", "llm.output_price=1e6", *overrides, name="prompt").llm, "llm")


@pytest.mark.parametrize("seed", range(5))
def test_concurrent_requests_never_exceed_the_maximum_cost(seed: int) -> None:
    """With 40 workers and random costs, the total cost stays below the maximum and comes close to it."""
    random_numbers = random.Random(seed)
    budget = Budget(llm("llm.max_cost=2000", "llm.max_tokens=10"))
    highest = 0.0

    async def request_until_refused() -> None:
        nonlocal highest
        while True:
            reserved = await budget.reserve(QUESTION)
            assert reserved == 110
            highest = max(highest, budget.spent + budget.reserved)
            await asyncio.sleep(random_numbers.random() * 0.002)
            await budget.settle(reserved, random_numbers.uniform(20, 110))

    async def run_workers() -> list[Any]:
        return await asyncio.gather(*(request_until_refused() for _ in range(40)), return_exceptions=True)

    results = asyncio.run(run_workers())
    assert {type(result) for result in results} == {BudgetReachedError}
    assert highest <= 2000
    assert 2000 - 110 < budget.spent <= 2000
    assert budget.under_way == budget.reserved == 0


def test_the_maximum_number_of_requests_is_exact() -> None:
    budget = Budget(llm("llm.max_requests=7"))

    async def request() -> None:
        reserved = await budget.reserve(QUESTION)
        await asyncio.sleep(0)
        await budget.settle(reserved, 0.0)

    async def run_workers() -> list[Any]:
        return await asyncio.gather(*(request() for _ in range(20)), return_exceptions=True)

    results = asyncio.run(run_workers())
    assert sum(result is None for result in results) == budget.requests == 7


def test_pace_limits_the_requests_per_minute() -> None:
    async def start_times() -> list[float]:
        pace = Pace(6000)

        async def start_time() -> float:
            await pace.wait()
            return time.monotonic()

        return sorted(await asyncio.gather(*(start_time() for _ in range(10))))

    times = asyncio.run(start_times())
    assert times[-1] - times[0] >= 9 * 0.01 * 0.99


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "2.5"}, 2.5),
        ({"retry-after": "-1"}, 0.0),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "9"}, 9.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": formatdate(0, usegmt=True)}, 0.0),
    ],
)
def test_retry_after(headers: dict[str, str], seconds: float | None) -> None:
    assert _retry_after(headers) == seconds


def test_retry_after_a_date() -> None:
    assert _retry_after({"retry-after": formatdate(time.time() + 30, usegmt=True)}) == pytest.approx(30, abs=3)


def test_the_wait_before_a_retry_doubles_up_to_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openai")
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    async def fail(*_: object) -> None:
        raise BrokenAnswerError("the reply is not JSON")

    async def ask() -> None:
        with Cache(tmp_path) as cache:
            client = Client(llm("llm.model=m", "llm.base_url=http://localhost:1", "llm.retries=9"), cache, 0)
            await client.open()
            monkeypatch.setattr(client, "_send", fail)
            monkeypatch.setattr(asyncio, "sleep", sleep)
            try:
                await client.ask(QUESTION)
            finally:
                monkeypatch.undo()
                await client.close()

    with pytest.raises(RunFailedError) as caught:
        asyncio.run(ask())
    assert caught.value.code == Code.SERVER
    expected = [0.5, 1, 2, 4, 8, 16, 32, 60, 60]
    assert len(waits) == len(expected)
    assert all(0.75 * middle <= wait <= 1.25 * middle for wait, middle in zip(waits, expected, strict=True))
    assert len({wait / middle for wait, middle in zip(waits, expected, strict=True)}) > 1  # with random jitter
