"""Budget, pace and waiting times, without a server."""

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

QUESTION = [{"role": "user", "content": "x" * 84}]  # 100 tokens at most


def llm(*overrides: str) -> LLM:
    return build(LLM, composed("llm.input_price=1e6", "llm.output_price=1e6", *overrides, name="prompt").llm, "llm")


@pytest.mark.parametrize("seed", range(5))
def test_the_cap_holds_whatever_is_under_way(seed: int) -> None:
    """Forty workers, answers that cost anything up to the most: never more than the cap, and no money lies idle."""
    draw = random.Random(seed)
    budget = Budget(llm("llm.max_cost=2000", "llm.max_tokens=10"))
    highest = 0.0

    async def work() -> None:
        nonlocal highest
        while True:
            reserved = await budget.reserve(QUESTION)
            assert reserved == 110
            highest = max(highest, budget.spent + budget.reserved)
            await asyncio.sleep(draw.random() * 0.002)
            await budget.settle(reserved, draw.uniform(20, 110))

    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*(work() for _ in range(40)), return_exceptions=True)

    ends = asyncio.run(all_of_them())
    assert {type(end) for end in ends} == {BudgetReachedError}
    assert highest <= 2000
    assert 2000 - 110 < budget.spent <= 2000
    assert budget.under_way == budget.reserved == 0


def test_the_cap_on_requests_is_exact() -> None:
    budget = Budget(llm("llm.max_requests=7"))

    async def work() -> None:
        reserved = await budget.reserve(QUESTION)
        await asyncio.sleep(0)
        await budget.settle(reserved, 0.0)

    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*(work() for _ in range(20)), return_exceptions=True)

    ends = asyncio.run(all_of_them())
    assert sum(end is None for end in ends) == budget.requests == 7


def test_pace_spaces_what_begins() -> None:
    async def begin() -> list[float]:
        pace = Pace(6000)

        async def one() -> float:
            await pace.wait()
            return time.monotonic()

        return sorted(await asyncio.gather(*(one() for _ in range(10))))

    times = asyncio.run(begin())
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


def test_the_wait_before_each_repetition_doubles_up_to_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openai")
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    async def no_answer(*_: object) -> None:
        raise BrokenAnswerError("the reply is not JSON")

    async def ask() -> None:
        with Cache(tmp_path) as cache:
            client = Client(llm("llm.model=m", "llm.base_url=http://localhost:1", "llm.retries=9"), cache, 0)
            await client.open()
            monkeypatch.setattr(client, "_send", no_answer)
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
    assert len({wait / middle for wait, middle in zip(waits, expected, strict=True)}) > 1  # clients spread out
