"""`lora-bench prompt`, top to bottom: configuration -> data -> template -> answers -> scores -> record."""

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
from lora_bench.llm.external_predictions import fill_missing, read_predictions
from lora_bench.llm.parsing import READINGS, Answer, read_label, read_number
from lora_bench.llm.settings import LLM, Prompt
from lora_bench.llm.template import Messages, Template
from lora_bench.records import environment
from lora_bench.records.run_folder import Run, refuse_existing_run
from lora_bench.tracking.base import track_run
from lora_bench.tracking.choices import build_trackers

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from rich.console import Console

    from lora_bench.config.schema import Data
    from lora_bench.data.examples import Examples
    from lora_bench.llm.external_predictions import Scores
    from lora_bench.tracking.base import Tracker

_KEYS = (
    *("llm", "prompt", "data", "metric", "tracking", "predictions", "split"),
    *("name", "tags", "notes", "seed", "dry_run"),
)


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
        """Build and check the settings of a composed configuration.

        Raises:
            UserError: a value is wrong or missing, or a tracker's package is; it names the key. Without `predictions`,
                `llm.model` and `llm.base_url` are needed.
        """
        build.check_top(cfg, _KEYS)
        build.build_annotations(cfg)  # only the record has them
        request = cls(
            llm=build.build(LLM, cfg.llm, "llm"),
            prompt=build.build(Prompt, cfg.prompt, "prompt"),
            data=build.build_data(cfg.data),
            metrics=build.build_metrics(cfg.metric),
            trackers=build_trackers(cfg.tracking),
            predictions=None if cfg.predictions is None else str(cfg.predictions),
            split=None if cfg.split is None else str(cfg.split),
            seed=cfg.seed,
        )
        reason = "is for lora-bench train: a model is prompted on one data set at a time"
        require(request.data.tasks is None, "data.tasks", request.data.tasks, reason)
        if request.predictions is None:
            remedy = "Give llm.model=ID and llm.base_url=URL, or predictions=FILE with its answers."
            require(bool(request.llm.model), "llm.model", None, "is needed", remedy, code=Code.MISSING)
            require(bool(request.llm.base_url), "llm.base_url", None, "is needed", remedy, code=Code.MISSING)
        for tracker in request.trackers.values():
            tracker.check()
        return request


def run_prompt(
    cfg: DictConfig, folder: Path, *, choices: dict[str, str], overrides: list[str], console: Console
) -> None:
    """Prompt a model with every example of the reported splits, or read its answers from a file; record the scores.

    The results are printed. A dry run prints what would be requested, or the number of answers in the file, and writes
    nothing.

    Args:
        cfg: the composed configuration.
        folder: the run's folder; created after all checks.
        choices: the choice of each group, for the record.
        overrides: those of the command line, for the record.
        console: receives progress and results.

    Raises:
        UserError: the request cannot be met; nothing is left behind.
        RunFailedError: the server or the budget ended the run; its answers are cached.
    """
    request = Request.build(cfg)
    data, splits, described = _load(request)
    request = replace(request, data=data)
    resolved: Any = OmegaConf.to_container(cfg, resolve=True)
    resolved = {key: value for key, value in resolved.items() if key != "predictions" or value is not None}
    new_run = _NewRun(folder, choices, resolved, overrides, described, request.trackers, console)
    if request.predictions is None:
        run = _ask(request, splits, new_run, console, dry_run=cfg.dry_run)
    else:
        run = _read(request, request.predictions, splits, new_run, console, dry_run=cfg.dry_run)
    if run is not None:
        _show(console, run)


@dataclass(frozen=True)
class _NewRun:
    """The folder and record of a new run, which `claim` creates after all checks."""

    folder: Path
    choices: dict[str, str]
    config: dict[str, Any]
    overrides: list[str]
    data: dict[str, Any]
    trackers: dict[str, Tracker]
    console: Console

    def claim(self) -> Run:
        """Claim the folder for the run, write its record, and start the trackers.

        The folder is created if it does not exist. A tracker that fails to start is left out with a note.

        Raises:
            UserError: the folder holds a run, is claimed by another process, or cannot be written.
        """
        run = Run.claim(self.folder, choices=self.choices, config=self.config, overrides=self.overrides)
        no_params = dict.fromkeys(("adapter", "head", "trainable", "total"))
        run.update(data=self.data, params=no_params, environment=environment.describe())
        return track_run(run, self.trackers, self.console)


def _load(request: Request) -> tuple[Data, dict[str, Examples], dict[str, Any]]:
    """Return the settings with the names of the classes, all splits, and their description for the record.

    They are the train and selection splits of `lora-bench train`, if there is a train split, and the reported ones:
    every labelled split except train, or the one that `split` names.

    Raises:
        UserError: there is no labelled split or not that one, or there are several and `predictions` is a file.
    """
    data, loaded = sources.load(request.data)
    if request.metrics:
        from lora_bench.evaluation.metrics import check_metrics  # late: it imports torch

        check_metrics(request.metrics, data.form, data.outputs)
    reported = sources.reported_splits(loaded)
    if request.split is not None:
        names = ", ".join(reported) or "none"
        reason = f"is not a labelled split to report (there are: {names})"
        require(request.split in reported, "split", request.split, reason, code=Code.UNKNOWN_CHOICE)
        reported = {request.split: reported[request.split]}
    if not reported:
        raise UserError(
            "there is no labelled split to report on", key="data", remedy="Add a validation file.", code=Code.EMPTY
        )
    if request.predictions is not None and len(reported) > 1:
        remedy = f"Add split=NAME: {', '.join(reported)}."
        raise UserError(
            "holds one split, and the data has several", key="predictions", remedy=remedy, code=Code.CONFLICT
        )
    splits = dict(reported)
    if "train" in loaded:
        train, selection = sources.split_selection(loaded["train"], request.data)
        splits = {"train": train, "selection": selection, **reported}
    return data, splits, sources.describe_data(data, splits)


def _reported(splits: dict[str, Examples]) -> dict[str, Examples]:
    """Return the splits that are scored."""
    return {name: split for name, split in splits.items() if name not in ("train", "selection")}


def _read(
    request: Request, path: str, splits: dict[str, Examples], new_run: _NewRun, console: Console, *, dry_run: bool
) -> Run | None:
    """Score the predictions of a file and return the run; None after a dry run, which prints the number of answers.

    A missing answer counts as wrong, a missing number as the mean of train. The record has no prompt.

    Args:
        request: the settings.
        path: the file, `request.predictions`.
        splits: with one reported split.
        new_run: claimed after the file is read.
        console: receives the number of answers.
        dry_run: read and check the file only.

    Raises:
        UserError: the file is wrong (`read_predictions`), or the folder cannot be claimed.
    """
    ((name, split),) = _reported(splits).items()
    scores = read_predictions(path, split, request.data)
    missing = scores.count(None)
    console.print(
        sanitise(f"{path}: {len(scores) - missing:,} answers for {name}, {missing:,} missing"), soft_wrap=True
    )
    if dry_run:
        return None
    used = {key: value for key, value in new_run.config.items() if key != "prompt"} | {
        "llm": {"model": request.llm.model}
    }
    choices = {group: choice for group, choice in new_run.choices.items() if group != "prompt"}
    run = replace(new_run, config=used, choices=choices).claim()
    with _recorded_end(run):
        counts = {"given": len(scores) - missing, "absent": missing}
        _score(run, request, splits, {name: scores}, {name: counts})
    return run


def _ask(
    request: Request, splits: dict[str, Examples], new_run: _NewRun, console: Console, *, dry_run: bool
) -> Run | None:
    """Prompt the model with every example of the reported splits, record the scores, and return the run.

    Answers in the cache are not requested again. A dry run prints the first prompt and the requests that would be sent,
    creates no folder and returns None. A first request is sent before the folder is claimed, so that its failure leaves
    nothing behind. Without all answers a run is not scored: its record says why it ended, and the error is raised.

    Raises:
        UserError: the folder holds a run, or the settings or the server do not allow any request.
        RunFailedError: the server or the budget ended the run; its answers are cached.
    """
    template = Template.build(request.prompt, request.data, splits.get("train"), request.seed)
    messages_by_split = {
        name: [template.messages(texts) for texts in zip(*split.texts, strict=True)]
        for name, split in _reported(splits).items()
    }
    with Cache(cache_folder() / "prompt") as cache, asyncio.Runner() as runner:
        client = Client(request.llm, cache, request.seed)
        keys = {name: [client.cache_key(messages) for messages in split] for name, split in messages_by_split.items()}
        questions = dict(zip(chain(*keys.values()), chain(*messages_by_split.values()), strict=True))
        cached = {key: answer for key in questions if (answer := client.cached_answer(key)) is not None}
        for note in cache.notes():
            console.print(sanitise(f"note: {note}"), soft_wrap=True)
        if dry_run:
            show_request(console, client, questions, cached)
            return None
        refuse_existing_run(new_run.folder)  # before any request is paid for
        runner.run(client.open())
        answers = _Answers(client, questions, cached)
        try:
            if first := answers.missing(1):
                runner.run(_ask_first(client, first, answers))
            run = new_run.claim()
            with _recorded_end(run, answers):
                announce(console, run.record, request.llm, len(cached))
                with Display(console, len(questions)) as answers.display:
                    runner.run(ask_all(client, answers.missing(), answers.take, request.llm.concurrency))
                read = {name: [_read_answer(answers.received[key], template) for key in keys[name]] for name in keys}
                counts = {
                    name: {source: sum(s == source for _, s in labels) for source in READINGS}
                    for name, labels in read.items()
                }
                scores = {name: [score for score, _ in labels] for name, labels in read.items()}
                run.update(environment={"llm": answers.models()})
                _score(run, request, splits, scores, counts)
                for note in [*template.notes, *answers.notes(keys, read, request.data.form)]:
                    console.print(sanitise(f"note: {note}"))
        finally:
            runner.run(client.close())
    return run


def _read_answer(answer: Answer, template: Template) -> tuple[Scores | None, str]:
    """Return P(label 1), the probability of each class (C,), or the number in an answer, and its source (`READINGS`).

    None if the answer is missing or cannot be read.
    """
    if not template.answers:
        return read_number(answer)
    probabilities, source = read_label(answer, template.answers)
    return (probabilities[1] if probabilities and len(probabilities) == 2 else probabilities), source


async def _ask_first(client: Client, question: dict[str, Messages], answers: _Answers) -> None:
    """Send a first request before anything is written: it shows a wrong address, key or field.

    Raises:
        UserError: the budget is too little for it, or as `ask_all`.
        RunFailedError: as `ask_all`.
    """
    try:
        await ask_all(client, question, answers.take, 1)
    except BudgetReachedError as error:
        raise UserError(
            "is too little for one request", key=error.key, value=error.value, code=Code.INVALID_VALUE
        ) from None


class _Answers:
    """The answers received so far, and their cost."""

    def __init__(self, client: Client, questions: dict[str, Messages], cached: dict[str, Answer]) -> None:
        """Begin with the cached answers; the time counts from now.

        Args:
            client: gives prices and the budget.
            questions: messages by key.
            cached: answers by key.
        """
        self.client = client
        self.questions = questions
        self.received = dict(cached)
        self.cached = len(cached)
        self.display: Display | None = None
        self.start_time = time.perf_counter()
        self.seconds = 0.0

    def take(self, key: str, answer: Answer) -> None:
        """Add the answer to a question, and show the number of answers if there is a display."""
        self.received[key] = answer
        self.seconds = time.perf_counter() - self.start_time
        if self.display is not None:
            self.display.update(len(self.received))

    def missing(self, limit: int | None = None) -> dict[str, Messages]:
        """Return the questions without an answer, at most `limit` of them."""
        missing = ((key, messages) for key, messages in self.questions.items() if key not in self.received)
        return dict(islice(missing, limit))

    def models(self) -> list[str]:
        """Return the server's names of the models that answered, sorted; empty if it gives none."""
        return sorted({answer.model for answer in self.received.values() if answer.model})

    def notes(
        self, keys: dict[str, list[str]], read: dict[str, list[tuple[Scores | None, str]]], form: str
    ) -> Iterator[str]:
        """Yield notes about answers that cannot be read, refusals, and missing log-probabilities.

        Args:
            keys: of each split's questions.
            read: score and source (`READINGS`) of each answer, by split.
            form: of the task, a key of `SHOWN_METRICS`.
        """
        description = {"binary": "neither label", "multiclass": "none of the labels", "regression": "no number"}[form]
        consequence = "count as the mean of train" if form == "regression" else "count as wrong"
        sources = [(key, source) for name in keys for key, (_, source) in zip(keys[name], read[name], strict=True)]
        texts = [self.received[key].text or "" for key, source in sources if source == "unparsable"]
        if texts:
            examples = ", ".join(repr(text[:40]) for text in dict.fromkeys(texts[:3]))
            yield f"{len(texts)} answers are {description} and {consequence}, for example {examples}"
        refused = sum(source == "refused" for _, source in sources)
        if refused:
            yield f"{refused} answers were refused and {consequence}"
        if form != "regression" and self.client.llm.logprobs and any(source == "text" for _, source in sources):
            yield "no log-probabilities for some answers: their text was read, so that a score is 0 or 1"

    def cost(self) -> dict[str, float | None]:
        """Return the `cost` of the record.

        Tokens and money are those of all answers, cached ones included; None if the server did not report all tokens.
        Requests, `money_spent` and seconds are those of this run; without a report the maximal cost counts as spent.
        """
        read = _total(answer.prompt_tokens for answer in self.received.values())
        written = _total(answer.completion_tokens for answer in self.received.values())
        priced = self.client.llm.cost(0, 0) is not None
        return {
            "requests": self.client.budget.requests,
            "cached": self.cached,
            "prompt_tokens": read,
            "completion_tokens": written,
            "money": None if read is None or written is None else self.client.llm.cost(read, written),
            "money_spent": self.client.budget.spent if priced else None,
            "seconds": self.seconds,
        }


def _total(counts: Iterable[int | None]) -> int | None:
    """Return the sum of these counts; None if one of them is not known."""
    listed = list(counts)
    return None if None in listed else sum(filter(None, listed))


def _score(
    run: Run,
    request: Request,
    splits: dict[str, Examples],
    scores: dict[str, list[Scores | None]],
    counts: dict[str, dict[str, int]],
) -> None:
    """Record metrics and predictions of every reported split; a missing answer counts as wrong (`fill_missing`).

    Metrics go to `run.json` and the log, predictions to a file for each split.

    Args:
        run: claimed.
        request: gives the metrics.
        splits: by name; of train only the numbers of a regression are used, and selection is ignored.
        scores: of each example P(label 1), the probability of each class, or a number, by split.
        counts: number of answers of each source, by split.
    """
    from lora_bench.evaluation.metrics import class_metrics, score  # late: it imports torch

    data = request.data
    train = splits["train"].labels if "train" in splits else None
    metrics: dict[str, float | None] = {}
    per_class: dict[str, Any] = {}
    for name, split in _reported(splits).items():
        assert split.labels is not None
        filled = fill_missing(scores[name], split.labels, data.outputs, train)
        values = score(filled, split.labels, request.metrics)
        metrics |= {f"{name}/{key}": value for key, value in values.items()}
        if data.form == "multiclass":
            per_class[name] = class_metrics(filled, split.labels, data.label_names or [])
        run.log({"step": None, "epoch": None, "split": name, "metrics": values})
        run.write_predictions(name, split.ids, split.labels, filled)
    run.update(metrics=metrics, answers=counts, **({"per_class": per_class} if per_class else {}))


@contextmanager
def _recorded_end(run: Run, answers: _Answers | None = None) -> Iterator[None]:
    """Record how the run ends within the context, and its cost: `done`, `failed` or `interrupted`.

    An error is raised again, a spent budget as a `RunFailedError`.
    """
    try:
        yield
        run.update(cost=answers.cost() if answers else {})
        run.finish("done")
    except BudgetReachedError as error:
        assert answers is not None
        run.update(cost=answers.cost())
        reason = f"the budget is spent after {len(answers.received):,} of {len(answers.questions):,} answers"
        run.finish("interrupted", f"{error.key}={error.value:g}: {reason}")
        remedy = f"Run the same command again to request the missing answers, with {error.key} counted from 0."
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
            run.finish("interrupted", "stopped by a signal; run the same command again to request the missing answers")
        raise


def _show(console: Console, run: Run) -> None:
    """Print the metrics, the cost and the folder of a run."""
    console.print(metric_table(run.record["metrics"]))
    show_cost(console, run.record["cost"])
    console.print(sanitise(f"record: {run.folder}"), soft_wrap=True)
