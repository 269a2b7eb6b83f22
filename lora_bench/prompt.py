"""`lora-bench prompt`, top to bottom: configs -> data -> template -> answers -> scores -> record."""

from __future__ import annotations

import asyncio
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from lora_bench.config import build, schema
from lora_bench.console.progress import metric_table
from lora_bench.console.text import sanitise
from lora_bench.data import sources
from lora_bench.errors import Code, RunFailedError, UserError, require
from lora_bench.files.cache import cache_folder
from lora_bench.llm.budget import BudgetReachedError
from lora_bench.llm.cache import Cache
from lora_bench.llm.client import Client, ask_all
from lora_bench.llm.display import Display, announce, show_cost, show_request
from lora_bench.llm.external_predictions import read_predictions, wrong_where_absent
from lora_bench.llm.parsing import KINDS, Answer, read_label
from lora_bench.llm.settings import LLM, Prompt
from lora_bench.llm.template import Messages, Template
from lora_bench.records import environment
from lora_bench.records.run_folder import Run, refuse_taken
from lora_bench.tracking.base import follow
from lora_bench.tracking.choices import build_trackers

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from rich.console import Console

    from lora_bench.data.examples import Examples
    from lora_bench.tracking.base import Tracker

_KEYS = ("llm", "prompt", "data", "metric", "tracking", "predictions", "split", "seed", "dry_run")


@dataclass(frozen=True)
class Request:
    """All settings of one run, typed and checked."""

    llm: LLM
    prompt: Prompt
    data: schema.Data
    metrics: dict[str, schema.Metric]
    trackers: dict[str, Tracker]
    predictions: str | None
    split: str | None
    seed: int

    @classmethod
    def build(cls, cfg: DictConfig) -> Request:
        """From the composed config; refuses what is out of range, naming the key."""
        build.check_top(cfg, _KEYS)
        made = cls(
            llm=build.build(LLM, cfg.llm, "llm"),
            prompt=build.build(Prompt, cfg.prompt, "prompt"),
            data=build.build_data(cfg.data),
            metrics=build.build_metrics(cfg.metric),
            trackers=build_trackers(cfg.tracking),
            predictions=None if cfg.predictions is None else str(cfg.predictions),
            split=None if cfg.split is None else str(cfg.split),
            seed=cfg.seed,
        )
        reason = "goes with lora-bench train: a model is asked about one data set at a time"
        require(made.data.tasks is None, "data.tasks", made.data.tasks, reason)
        if made.predictions is None:
            remedy = "Give llm.model=ID and llm.base_url=URL, or predictions=FILE with answers."
            require(bool(made.llm.model), "llm.model", None, "is needed", remedy, code=Code.MISSING)
            require(bool(made.llm.base_url), "llm.base_url", None, "is needed", remedy, code=Code.MISSING)
        if made.metrics:
            from lora_bench.evaluation.metrics import check_metrics  # late: it imports torch

            check_metrics(made.metrics)
        for tracker in made.trackers.values():
            tracker.check()
        return made


def run_prompt(
    cfg: DictConfig, folder: Path, *, choices: dict[str, str], overrides: list[str], console: Console
) -> None:
    """Ask a model about every example of the reported splits, or read its answers from a file, and record the scores.

    Args:
        cfg: the composed config.
        folder: the run's folder; made once nothing more can be refused.
        choices: the option chosen of each group, for the record.
        overrides: what was asked for on the command line, for the record.
        console: where to tell how it goes.

    Raises:
        UserError: the request cannot be met; nothing is left behind.
        RunFailedError: the server or the budget ended the run; its answers are in the cache.
    """
    request = Request.build(cfg)
    splits, described = _load(request)
    resolved: Any = OmegaConf.to_container(cfg, resolve=True)
    resolved = {key: value for key, value in resolved.items() if key != "predictions" or value is not None}
    begin = _Begin(folder, choices, resolved, overrides, described, request.trackers, console)
    if request.predictions is None:
        run = _ask(request, splits, begin, console, dry_run=cfg.dry_run)
    else:
        run = _read(request, request.predictions, splits, begin, console, dry_run=cfg.dry_run)
    if run is not None:
        _show(console, run)


@dataclass(frozen=True)
class _Begin:
    """A run's folder, to be claimed once nothing more can be refused."""

    folder: Path
    choices: dict[str, str]
    config: dict[str, Any]
    overrides: list[str]
    data: dict[str, Any]
    trackers: dict[str, Tracker]
    console: Console

    def claim(self) -> Run:
        run = Run.claim(self.folder, choices=self.choices, config=self.config, overrides=self.overrides)
        nothing = dict.fromkeys(("adapter", "head", "trainable", "total"))
        run.update(data=self.data, params=nothing, environment=environment.describe())
        return follow(run, self.trackers, self.console)


def _load(request: Request) -> tuple[dict[str, Examples], dict[str, Any]]:
    """Train and selection as `train` cuts them, where there is a train split; every split to ask about; and what the
    record says of them."""
    found = sources.load(request.data)
    reported = sources.reported(found)
    if request.split is not None:
        known = ", ".join(reported) or "none"
        reason = f"is no labelled split to report; there is {known}"
        require(request.split in reported, "split", request.split, reason, code=Code.UNKNOWN_CHOICE)
        reported = {request.split: reported[request.split]}
    if not reported:
        raise UserError(
            "there is no labelled split to report on", key="data", remedy="Add a validation file.", code=Code.EMPTY
        )
    if request.predictions is not None and len(reported) > 1:
        remedy = f"Add split=NAME: {', '.join(reported)}."
        raise UserError(
            "answers one split, and the data has several", key="predictions", remedy=remedy, code=Code.CONFLICT
        )
    splits = dict(reported)
    if "train" in found:
        train, selection = sources.carve(found["train"], request.data)
        splits = {"train": train, "selection": selection, **reported}
    return splits, sources.describe(request.data, splits)


def _reported(splits: dict[str, Examples]) -> dict[str, Examples]:
    return {name: split for name, split in splits.items() if name not in ("train", "selection")}


def _read(
    request: Request, path: str, splits: dict[str, Examples], begin: _Begin, console: Console, *, dry_run: bool
) -> Run | None:
    """Score answers that somebody else obtained; None after a dry run."""
    ((name, split),) = _reported(splits).items()
    scores = read_predictions(path, split)
    absent = scores.count(None)
    console.print(sanitise(f"{path}: {len(scores) - absent:,} answers for {name}, {absent:,} absent"), soft_wrap=True)
    if dry_run:
        return None
    used = {key: value for key, value in begin.config.items() if key != "prompt"} | {
        "llm": {"model": request.llm.model}
    }
    choices = {group: choice for group, choice in begin.choices.items() if group != "prompt"}
    run = replace(begin, config=used, choices=choices).claim()
    with _recorded_end(run):
        counts = {"given": len(scores) - absent, "absent": absent}
        _score(run, request, splits, {name: scores}, {name: counts})
    return run


def _ask(
    request: Request, splits: dict[str, Examples], begin: _Begin, console: Console, *, dry_run: bool
) -> Run | None:
    """Ask the model about every example; None after a dry run."""
    template = Template.build(request.prompt, request.data, splits.get("train"), request.seed)
    asked = {
        name: [template.messages(texts) for texts in zip(*split.texts, strict=True)]
        for name, split in _reported(splits).items()
    }
    with Cache(cache_folder() / "prompt") as cache, asyncio.Runner() as runner:
        client = Client(request.llm, cache, request.seed)
        keys = {name: [client.cache_key(messages) for messages in each] for name, each in asked.items()}
        questions = dict(zip(chain(*keys.values()), chain(*asked.values()), strict=True))
        known = {key: answer for key in questions if (answer := client.cached(key)) is not None}
        for note in cache.notes():
            console.print(sanitise(f"note: {note}"), soft_wrap=True)
        if dry_run:
            show_request(console, client, questions, known)
            return None
        refuse_taken(begin.folder)  # before anything is paid for
        runner.run(client.open())
        answers = _Answers(client, questions, known)
        try:
            if first := answers.missing(1):
                runner.run(_ask_first(client, first, answers))
            run = begin.claim()
            with _recorded_end(run, answers):
                announce(console, run.record, request.llm, len(known))
                with Display(console, len(questions)) as answers.display:
                    runner.run(ask_all(client, answers.missing(), answers.take, request.llm.concurrency))
                read = {name: [read_label(answers.found[key], template.answers) for key in keys[name]] for name in keys}
                counts = {
                    name: {kind: sum(k == kind for _, k in each) for kind in KINDS} for name, each in read.items()
                }
                scores = {name: [score for score, _ in each] for name, each in read.items()}
                run.update(environment={"llm": answers.models()})
                _score(run, request, splits, scores, counts)
                for note in answers.notes(keys, read):
                    console.print(sanitise(f"note: {note}"))
        finally:
            runner.run(client.close())
    return run


async def _ask_first(client: Client, question: dict[str, Messages], answers: _Answers) -> None:
    """One alone, before anything is written: what is wrong with the request as a whole shows at it."""
    try:
        await ask_all(client, question, answers.take, 1)
    except BudgetReachedError as error:
        raise UserError(
            "does not do for one request", key=error.key, value=error.value, code=Code.INVALID_VALUE
        ) from None


class _Answers:
    """The answers there are, and what they cost."""

    def __init__(self, client: Client, questions: dict[str, Messages], known: dict[str, Answer]) -> None:
        self.client = client
        self.questions = questions
        self.found = dict(known)
        self.cached = len(known)
        self.display: Display | None = None
        self.began = time.perf_counter()
        self.seconds = 0.0

    def take(self, key: str, answer: Answer) -> None:
        self.found[key] = answer
        self.seconds = time.perf_counter() - self.began
        if self.display is not None:
            self.display.answered(len(self.found))

    def missing(self, most: int | None = None) -> dict[str, Messages]:
        left = ((key, messages) for key, messages in self.questions.items() if key not in self.found)
        return dict(islice(left, most))

    def models(self) -> list[str]:
        """What the server calls the models that answered."""
        return sorted({answer.model for answer in self.found.values() if answer.model})

    def notes(self, keys: dict[str, list[str]], read: dict[str, list[tuple[float | None, str]]]) -> Iterator[str]:
        """What a person should know of the answers."""
        kinds = [(key, kind) for name in keys for key, (_, kind) in zip(keys[name], read[name], strict=True)]
        texts = [self.found[key].text or "" for key, kind in kinds if kind == "unparsable"]
        if texts:
            such = ", ".join(repr(text[:40]) for text in dict.fromkeys(texts[:3]))
            yield f"{len(texts)} answers are neither label and count as wrong, such as {such}"
        refused = sum(kind == "refused" for _, kind in kinds)
        if refused:
            yield f"{refused} answers were refused and count as wrong"
        if self.client.llm.logprobs and any(kind == "text" for _, kind in kinds):
            yield "no log-probabilities for some answers: their text was read, so that a score is 0 or 1"

    def cost(self) -> dict[str, float | None]:
        """Tokens and money of all answers, also of those from the cache; `spent` and the rest of this run alone.

        None where the server does not say how long some answers were; then the most counts as spent.
        """
        read = _total(answer.prompt_tokens for answer in self.found.values())
        written = _total(answer.completion_tokens for answer in self.found.values())
        priced = self.client.llm.money(0, 0) is not None
        return {
            "requests": self.client.budget.requests,
            "cached": self.cached,
            "prompt_tokens": read,
            "completion_tokens": written,
            "money": None if read is None or written is None else self.client.llm.money(read, written),
            "money_spent": self.client.budget.spent if priced else None,
            "seconds": self.seconds,
        }


def _total(counts: Iterable[int | None]) -> int | None:
    listed = list(counts)
    return None if None in listed else sum(filter(None, listed))


def _score(
    run: Run,
    request: Request,
    splits: dict[str, Examples],
    scores: dict[str, list[float | None]],
    counts: dict[str, dict[str, int]],
) -> None:
    """Metrics and predictions of every reported split; what is no answer counts as a wrong one."""
    from lora_bench.evaluation.metrics import score  # late: it imports torch

    metrics: dict[str, float | None] = {}
    for name, split in _reported(splits).items():
        assert split.labels is not None
        filled = wrong_where_absent(scores[name], split.labels)
        values = score(filled, split.labels, request.metrics)
        metrics |= {f"{name}/{key}": value for key, value in values.items()}
        run.log({"step": None, "epoch": None, "split": name, "metrics": values})
        run.write_predictions(name, split.ids, split.labels, filled)
    run.update(metrics=metrics, answers=counts)


@contextmanager
def _recorded_end(run: Run, answers: _Answers | None = None) -> Iterator[None]:
    """However the run ends, its record says so, and what it cost."""
    try:
        yield
        run.update(cost=answers.cost() if answers else {})
        run.finish("done")
    except BudgetReachedError as error:
        assert answers is not None
        run.update(cost=answers.cost())
        reason = f"the budget is spent: {len(answers.found):,} of {len(answers.questions):,} questions are answered"
        run.finish("interrupted", f"{error.key}={error.value:g}: {reason}")
        remedy = f"Run the same command again: it asks only for the rest, with {error.key} counted anew."
        raise RunFailedError(
            reason, key=error.key, value=f"{error.value:g}", remedy=remedy, code=Code.BUDGET_SPENT
        ) from None
    except Exception as error:
        if answers:
            with suppress(RunFailedError):
                run.update(cost=answers.cost())
        run.fail(error)
        raise
    except BaseException:  # Ctrl-C, or a signal that became SystemExit
        with suppress(RunFailedError):
            run.update(cost=answers.cost() if answers else {})
            run.finish("interrupted", "stopped from outside; run the same command again, which asks only for the rest")
        raise


def _show(console: Console, run: Run) -> None:
    console.print(metric_table(run.record["metrics"]))
    show_cost(console, run.record["cost"])
    console.print(sanitise(f"record: {run.folder}"), soft_wrap=True)
