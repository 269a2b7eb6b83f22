"""Asking an OpenAI-compatible server: through the cache, within the budget, again where it is worth it."""

from __future__ import annotations

import asyncio
import json
import os
import time
from dataclasses import asdict, replace
from email.utils import parsedate_to_datetime
from random import Random
from typing import TYPE_CHECKING, Any, cast

from lora_bench.console.redaction import hide
from lora_bench.console.secret_patterns import HIDDEN
from lora_bench.errors import Code, RunFailedError, UserError
from lora_bench.files.atomic_io import to_json
from lora_bench.llm import cache
from lora_bench.llm.budget import Budget, Pace
from lora_bench.llm.parsing import Answer, BrokenAnswerError, read_reply
from lora_bench.training.signals import Interruption

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lora_bench.llm.cache import Cache
    from lora_bench.llm.settings import LLM
    from lora_bench.llm.template import Messages

FIRST_WAIT_SECONDS = 0.5
"""Before the first repetition; doubled with each further one."""
LONGEST_WAIT_SECONDS = 60.0
LONGEST_RETRY_AFTER_SECONDS = 300.0
"""A server that wants to be left alone for longer ends the run: its answers are kept."""
_LOOK_SECONDS = 0.1
"""How soon Ctrl-C is noticed."""
_AGAIN = (408, 409, 425, 429)  # and 5xx


class Client:
    """A server and what was asked of it; to be opened before it is used, and closed after.

    Args:
        llm: which server and model, how often, how long.
        cache: answers that came before, of any run.
        seed: part of what is asked where the temperature is not 0, so that other seeds get other answers.

    Raises:
        UserError: the API key cannot be one.
    """

    def __init__(self, llm: LLM, cache: Cache, seed: int) -> None:
        self.llm = llm
        self.cache = cache
        self.seed = None if llm.temperature == 0 else seed
        self.logprobs = llm.logprobs  # until the server refuses
        self.budget = Budget(llm)
        self.pace = Pace(llm.requests_per_minute)
        self.key = os.environ.get(llm.api_key_env, "").strip()
        if not self.key.isascii() or not self.key.isprintable():
            raise UserError(
                f"the API key in {llm.api_key_env} has characters that no key has",
                key="llm.api_key_env",
                code=Code.INVALID_VALUE,
            )
        hide(self.key)
        self.stopped = False
        """Nothing more is asked; what is under way is waited for."""
        self.under_way: set[asyncio.Task[Any] | None] = set()
        self._random = Random()
        self._heard = False  # anything from the server

    async def open(self) -> None:
        """Make ready to ask; nothing is sent.

        Raises:
            UserError: the openai package is missing.
        """
        try:
            import openai  # late: a second
        except ImportError:
            remedy = "Install it: pip install 'lora-bench[llm]'."
            raise UserError(
                "needs the package openai", key="prompt", remedy=remedy, code=Code.MISSING_PACKAGE
            ) from None
        self._openai = openai
        from lora_bench.llm import reply

        self._server = openai.AsyncOpenAI(
            api_key=self.key or "none",  # servers without keys look at none
            default_headers={"Accept-Encoding": "gzip, deflate"},
            http_client=openai.DefaultAsyncHttpxClient(
                timeout=self.llm.timeout, max_redirects=3, event_hooks={"response": [reply.check]}
            ),
            base_url=self.llm.base_url,
            timeout=self.llm.timeout,
            max_retries=0,
        )

    async def close(self) -> None:
        await self._server.close()

    def cached(self, key: str) -> Answer | None:
        """Return the answer of an earlier time; None where there is none, or where the entry is no answer."""
        entry = self.cache.get(key)
        try:
            return None if entry is None else Answer.from_json(entry)
        except BrokenAnswerError:  # of another version, or damaged: it is asked for again
            self.cache.damaged += 1
            return None

    async def ask(self, messages: Messages) -> Answer:
        """The server's answer, which is then in the cache.

        Raises:
            BudgetReachedError: it may not be asked.
            UserError: it cannot be asked this way: wrong address, key, model or field.
            RunFailedError: it does not answer, however often it is asked.
        """
        repetition = 0
        while not self.stopped:
            await self.pace.wait()
            reserved = await self.budget.reserve(messages)
            cost, wait, logprobs = reserved, None, self.logprobs
            self.under_way.add(asyncio.current_task())
            try:
                answer = await self._send(messages, logprobs)
                self.cache.put(self.cache_key(messages), asdict(answer))  # before anything else: it is paid for
                cost = answer.money(self.llm, reserved)
                return answer
            except self._openai.APIStatusError as error:
                cost = 0.0  # a refused request is not billed
                if logprobs and error.status_code in (400, 422) and "logprob" in str(error)[:100_000]:
                    self.logprobs = False
                    continue
                reason, wait = self._refused(error)
            except (TimeoutError, self._openai.APITimeoutError):
                reason = f"no whole answer within llm.timeout={self.llm.timeout:g} seconds"
            except self._openai.APIConnectionError as error:
                reason = f"the connection failed: {self._short(error.__cause__ or error)}"
                if not self._heard and "Connect" in type(error.__cause__).__name__:  # nobody is there
                    raise UserError(
                        reason, key="llm.base_url", value=self.llm.base_url, remedy=_URL, code=Code.SERVER
                    ) from None
            except BrokenAnswerError as error:
                reason = str(error)
            finally:
                await self.budget.settle(reserved, cost)
                self.under_way.discard(asyncio.current_task())
            if repetition == self.llm.retries:
                remedy = f"It was asked {repetition + 1} times. {_AGAIN_LATER if self._heard else _URL}"
                raise RunFailedError(
                    reason, key="llm.base_url", value=self.llm.base_url, remedy=remedy, code=Code.SERVER
                )
            if wait is not None:
                self.pace.hold(wait)
            elif not self.stopped:
                await asyncio.sleep(self._back_off(repetition))
            repetition += 1
        raise asyncio.CancelledError

    async def _send(self, messages: Messages, logprobs: bool) -> Answer:
        fields = self._fields()
        if logprobs:
            fields |= {"logprobs": True, "top_logprobs": self.llm.top_logprobs}
        extra = fields.pop("extra")
        async with asyncio.timeout(self.llm.timeout):
            raw = await self._server.chat.completions.with_raw_response.create(
                messages=cast("Any", messages), extra_body=extra, **fields
            )
        try:
            answer = read_reply(json.loads(raw.content))
        except (BrokenAnswerError, ValueError, RecursionError) as error:
            reason = str(error) if isinstance(error, BrokenAnswerError) else "the reply is not JSON"
            raise BrokenAnswerError(f"{reason}: {self._short(raw.text)[:60]!r}") from None
        self._heard = True
        return self._without_key(answer)

    def _without_key(self, answer: Answer) -> Answer:
        """Return the answer as it may be kept: one that repeats the key says nothing else."""
        from lora_bench.llm.reply import repeats

        tokens = "".join(token for place in answer.tokens for token, _ in place[:1])
        if any(repeats(text, self.key) for text in (answer.text or "", answer.model or "", tokens)):
            return replace(answer, text=HIDDEN, model=None, tokens=[])
        return Answer.from_json(to_json(asdict(answer)))  # other secrets

    def _fields(self) -> dict[str, Any]:
        """What is sent beside the messages, whether the server gives log-probabilities or not."""
        chosen = {"temperature": self.llm.temperature, "max_tokens": self.llm.max_tokens}
        sent = {name: value for name, value in chosen.items() if value is not None}
        return {"model": self.llm.model, **sent, "extra": self.llm.extra}

    def cache_key(self, messages: Messages) -> str:
        """What an answer is kept under; the API key is no part of it."""
        wanted = self.llm.top_logprobs if self.llm.logprobs else None
        server = str(self.llm.base_url).rstrip("/")
        asked = {"messages": messages, "logprobs": wanted, "seed": self.seed, "base_url": server}
        return cache.key(self._fields() | asked)

    def _refused(self, error: Any) -> tuple[str, float | None]:
        """Why, and how many seconds the server wants to wait; raises what no repetition can change."""
        status, reason = error.status_code, self._short(error)
        code = error.body.get("code") if isinstance(error.body, dict) else None
        self._heard = self._heard or status < 500
        if status in (401, 403):
            given = f"The key in {self.llm.api_key_env} was not taken."
            missing = f"The environment variable {self.llm.api_key_env} holds no key: put it there."
            raise UserError(
                reason,
                key="llm.api_key_env",
                remedy=given if self.key else missing,
                code=Code.SERVER if self.key else Code.MISSING,
            )
        if status == 404:
            remedy = "Is the model one of the server's, and the address right? It often ends in /v1."
            value = f"{self.llm.model} at {self.llm.base_url}"
            raise UserError(reason, key="llm.model", value=value, remedy=remedy, code=Code.SERVER)
        if code == "insufficient_quota" or not (status in _AGAIN or status >= 500):
            raise UserError(
                reason, key="llm", remedy="The server will not answer this request as it is.", code=Code.SERVER
            )
        wait = _retry_after(error.response.headers)
        if wait is not None and wait > LONGEST_RETRY_AFTER_SECONDS:
            reason = f"the server wants to be asked again in {wait:.0f} seconds: {reason}"
            raise RunFailedError(
                reason, key="llm.base_url", value=self.llm.base_url, remedy=_AGAIN_LATER, code=Code.SERVER
            )
        return reason, wait

    def _short(self, error: object) -> str:
        """Return a foreign message in one short line, or that it repeats the key."""
        from lora_bench.llm.reply import WITHHELD, repeats

        status = getattr(error, "status_code", None)
        text = str(error)[:100_000]
        if repeats(text, self.key):
            return f"{f'error {status}: ' if status else ''}{WITHHELD}"
        return _one_line(text or type(error).__name__)

    def _back_off(self, repetition: int) -> float:
        wait: float = min(FIRST_WAIT_SECONDS * 2**repetition, LONGEST_WAIT_SECONDS)
        return wait * self._random.uniform(0.75, 1.25)


_URL = "Does the server run there? The address often ends in /v1."
_AGAIN_LATER = "Answers so far are kept: run the same command again, which asks only for the rest."


def _one_line(text: str) -> str:
    text = " ".join(text.split())
    return "".join(char if char.isprintable() else "?" for char in text)[:300].rstrip(".")


def _retry_after(headers: Any) -> float | None:
    """The seconds that a `Retry-After` header asks for: a number, or a date."""
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            return max(0.0, float(value) / unit)
        except ValueError:
            pass
        try:
            return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
        except ValueError:
            continue
    return None


async def ask_all(
    client: Client, questions: Mapping[str, Messages], answered: Callable[[str, Answer], None], concurrency: int
) -> None:
    """Ask all questions, `concurrency` at a time, and tell each answer as it comes, with its question's key.

    The first error, the end of the budget, Ctrl-C or SIGTERM ends it: nothing new is asked, and what is under way is
    waited for, since it is paid for. A second Ctrl-C ends it at once.
    """
    left = iter(questions.items())
    errors: list[Exception] = []

    async def work() -> None:
        for key, messages in left:
            if client.stopped:
                return
            try:
                answered(key, await client.ask(messages))
            except Exception as error:
                errors.append(error)
                stop()

    def stop() -> None:
        client.stopped = True
        for worker in workers:
            if worker not in client.under_way and worker is not asyncio.current_task():
                worker.cancel()  # it only waits for its turn

    with Interruption() as interruption:
        workers = [asyncio.create_task(work()) for _ in range(min(concurrency, len(questions)))]
        while workers and (await asyncio.wait(workers, timeout=_LOOK_SECONDS))[1]:
            if interruption.asked is not None and not client.stopped:
                stop()
        if interruption.asked is not None:
            interruption.act(interruption.asked)
    if errors:
        raise errors[0]
