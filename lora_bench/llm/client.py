"""The client of an OpenAI-compatible server: cached answers, a budget, and repeated requests after errors that pass."""

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
"""Wait before the first repetition; each further repetition doubles it."""
LONGEST_WAIT_SECONDS = 60.0
LONGEST_RETRY_AFTER_SECONDS = 300.0
"""A longer `Retry-After` ends the run; its answers are cached."""
_POLL_SECONDS = 0.1
"""Interval of the checks for Ctrl-C."""
_RETRIED_STATUSES = (408, 409, 425, 429)  # and 5xx


class Client:
    """A connection to a server; `open` it before the first request, `close` it after the last.

    Args:
        llm: server, model, limits and timeouts.
        cache: answers of earlier requests, of any run.
        seed: part of the cache key unless the temperature is 0, so that another seed gets other answers.

    Raises:
        UserError: the API key holds a character that is not printable ASCII.
    """

    def __init__(self, llm: LLM, cache: Cache, seed: int) -> None:
        """Read the API key from the environment and hide it in all output; nothing is sent.

        White space around the key is removed. A missing key is an empty one, which is accepted.
        """
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
        """No further request is sent; pending ones are waited for."""
        self.under_way: set[asyncio.Task[Any] | None] = set()
        self._random = Random()
        self._has_answered = False  # whether the server has answered at all

    async def open(self) -> None:
        """Create the HTTP client; nothing is sent.

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
                timeout=self.llm.timeout, max_redirects=3, event_hooks={"response": [reply.check_reply]}
            ),
            base_url=self.llm.base_url,
            timeout=self.llm.timeout,
            max_retries=0,
        )

    async def close(self) -> None:
        """Close the HTTP client, which `open` has created."""
        await self._server.close()

    def cached_answer(self, key: str) -> Answer | None:
        """Return the cached answer; None if there is none, or if the entry is not an answer and counts as damaged."""
        entry = self.cache.get(key)
        try:
            return None if entry is None else Answer.from_json(entry)
        except BrokenAnswerError:  # of another version, or damaged: it is requested again
            self.cache.damaged += 1
            return None

    async def ask(self, messages: Messages) -> Answer:
        """Request an answer, repeatedly if necessary, cache it and return it; the cache is not read.

        Every request counts in the budget, also a repeated one. If the server refuses log-probabilities, this and all
        later requests are sent without them, which is no repetition.

        Raises:
            BudgetReachedError: the budget allows no further request.
            UserError: no repetition can succeed: a wrong address, key, model or field.
            RunFailedError: the server did not answer within `llm.retries` repetitions, or asks to wait too long.
            CancelledError: the client was stopped.
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
                cost = answer.cost(self.llm, reserved)
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
                if not self._has_answered and "Connect" in type(error.__cause__).__name__:  # no server is there
                    raise UserError(
                        reason, key="llm.base_url", value=self.llm.base_url, remedy=_URL, code=Code.SERVER
                    ) from None
            except BrokenAnswerError as error:
                reason = str(error)
            finally:
                await self.budget.settle(reserved, cost)
                self.under_way.discard(asyncio.current_task())
            if repetition == self.llm.retries:
                remedy = f"The request was sent {repetition + 1} times. {_AGAIN_LATER if self._has_answered else _URL}"
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
        """Send one request, and return its answer without secrets.

        Raises:
            BrokenAnswerError: the reply is not a chat completion.
            TimeoutError: there is no whole answer within `llm.timeout` seconds.
            openai.APIError: the server refused the request (`APIStatusError`), or the connection failed.
        """
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
        self._has_answered = True
        return self._without_key(answer)

    def _without_key(self, answer: Answer) -> Answer:
        """Return the answer without secrets: one that repeats the API key loses its text, model and tokens."""
        from lora_bench.llm.reply import contains_key

        tokens = "".join(token for candidates in answer.tokens for token, _ in candidates[:1])
        if any(contains_key(text, self.key) for text in (answer.text or "", answer.model or "", tokens)):
            return replace(answer, text=HIDDEN, model=None, tokens=[])
        return Answer.from_json(to_json(asdict(answer)))  # other secrets

    def _fields(self) -> dict[str, Any]:
        """Return the request's fields without messages and log-probabilities; `extra` holds further ones."""
        optional = {"temperature": self.llm.temperature, "max_tokens": self.llm.max_tokens}
        sent = {name: value for name, value in optional.items() if value is not None}
        return {"model": self.llm.model, **sent, "extra": self.llm.extra}

    def cache_key(self, messages: Messages) -> str:
        """Return the cache key of a request; the API key is not part of it.

        Server, model, messages, all fields and, unless the temperature is 0, the seed are part of it. So are
        log-probabilities as they are set, even if the server refuses them.
        """
        top_logprobs = self.llm.top_logprobs if self.llm.logprobs else None
        server = str(self.llm.base_url).rstrip("/")
        request = {"messages": messages, "logprobs": top_logprobs, "seed": self.seed, "base_url": server}
        return cache.key(self._fields() | request)

    def _refused(self, error: Any) -> tuple[str, float | None]:
        """Return the reason of a refusal and the seconds that the server asks to wait (None: it names none).

        Raises:
            UserError: no repetition can change the refusal.
            RunFailedError: the server asks to wait too long.
        """
        status, reason = error.status_code, self._short(error)
        code = error.body.get("code") if isinstance(error.body, dict) else None
        self._has_answered = self._has_answered or status < 500
        if status in (401, 403):
            refused_key = f"The server refused the key in {self.llm.api_key_env}."
            missing_key = f"Put the API key into the environment variable {self.llm.api_key_env}, which is empty."
            raise UserError(
                reason,
                key="llm.api_key_env",
                remedy=refused_key if self.key else missing_key,
                code=Code.SERVER if self.key else Code.MISSING,
            )
        if status == 404:
            remedy = "Check that the server has this model, and that the address is right: it often ends in /v1."
            value = f"{self.llm.model} at {self.llm.base_url}"
            raise UserError(reason, key="llm.model", value=value, remedy=remedy, code=Code.SERVER)
        if code == "insufficient_quota" or not (status in _RETRIED_STATUSES or status >= 500):
            raise UserError(
                reason,
                key="llm",
                remedy="The server does not accept these settings.",
                code=Code.SERVER,
            )
        wait = _retry_after(error.response.headers)
        if wait is not None and wait > LONGEST_RETRY_AFTER_SECONDS:
            reason = f"the server allows the next request only in {wait:.0f} seconds: {reason}"
            raise RunFailedError(
                reason, key="llm.base_url", value=self.llm.base_url, remedy=_AGAIN_LATER, code=Code.SERVER
            )
        return reason, wait

    def _short(self, error: object) -> str:
        """Return an error or the server's message as one line of at most 300 characters.

        If it repeats the API key, it is a fixed text with the status.
        """
        from lora_bench.llm.reply import WITHHELD, contains_key

        status = getattr(error, "status_code", None)
        text = str(error)[:100_000]
        if contains_key(text, self.key):
            return f"{f'error {status}: ' if status else ''}{WITHHELD}"
        return _one_line(text or type(error).__name__)

    def _back_off(self, repetition: int) -> float:
        """Return the seconds to wait after a failed attempt, with 25 % jitter; they double from attempt to attempt.

        Args:
            repetition: number of the attempt, from 0.
        """
        wait: float = min(FIRST_WAIT_SECONDS * 2**repetition, LONGEST_WAIT_SECONDS)
        return wait * self._random.uniform(0.75, 1.25)


_URL = "Check that the server runs at this address, which often ends in /v1."
_AGAIN_LATER = "All answers so far are cached: run the same command again to request only the missing ones."


def _one_line(text: str) -> str:
    """Return a text on one line of at most 300 characters, without a full stop; `?` replaces what cannot be printed."""
    text = " ".join(text.split())
    return "".join(char if char.isprintable() else "?" for char in text)[:300].rstrip(".")


def _retry_after(headers: Any) -> float | None:
    """Return the seconds of a `Retry-After` header, which holds a number or a date; None without a valid one.

    `retry-after-ms` takes precedence. A date in the past gives 0.
    """
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
    """Request the answers of all questions, `concurrency` at a time; the cache is not read.

    The first error, the end of the budget, Ctrl-C or SIGTERM stops it: no new request is sent, and pending ones are
    waited for, since they are paid for. A second Ctrl-C ends it at once. A client that was stopped cannot be used
    again.

    Args:
        client: opened.
        questions: messages by key.
        answered: called on each answer, with the key of its question.
        concurrency: maximal number of pending requests.

    Raises:
        Exception: the first error of `Client.ask`, after the pending requests.
        KeyboardInterrupt, SystemExit: a signal stopped it; this takes precedence.
    """
    pending = iter(questions.items())
    errors: list[Exception] = []

    async def work() -> None:
        """Answer questions until none is left or the client is stopped; an error is kept and stops the others."""
        for key, messages in pending:
            if client.stopped:
                return
            try:
                answered(key, await client.ask(messages))
            except Exception as error:
                errors.append(error)
                stop()

    def stop() -> None:
        """Stop the client, and cancel the other workers that have no pending request."""
        client.stopped = True
        for worker in workers:
            if worker not in client.under_way and worker is not asyncio.current_task():
                worker.cancel()  # it has no pending request

    with Interruption() as interruption:
        workers = [asyncio.create_task(work()) for _ in range(min(concurrency, len(questions)))]
        while workers and (await asyncio.wait(workers, timeout=_POLL_SECONDS))[1]:
            if interruption.requested_signal is not None and not client.stopped:
                stop()
        if interruption.requested_signal is not None:
            interruption.raise_signal(interruption.requested_signal)
    if errors:
        raise errors[0]
