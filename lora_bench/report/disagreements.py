"""Disagreements: single examples that one of two runs predicts correctly and the other does not."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from lora_bench.config.metric_names import DEFAULT_THRESHOLD
from lora_bench.records import predictions
from lora_bench.report.html import Content, Markup, element, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_bench.records.predictions import Predictions
    from lora_bench.report.series import Block, Entry

RUNS = 8
"""Runs that can be chosen."""
SHOWN = 50
"""Disagreements shown for each pair of runs: those whose scores are farthest apart."""


@dataclass(frozen=True)
class _Candidate:
    name: str
    folder: str
    predictions: Predictions


def disagreements(block: Block, split: str) -> Markup | None:
    """Return the section with the examples that one of two runs gets right and the other wrong.

    The two runs are chosen on the page; at first they are the first runs of the two best rows.
    """
    runs = _candidates(block.chosen if len(block.chosen) > 1 else block.entries, split)
    if len(runs) < 2:
        return None
    pairs = {
        (a, b): _compare_pair(runs[a].predictions, runs[b].predictions) for a, b in combinations(range(len(runs)), 2)
    }
    row_numbers = sorted({int(i) for _, _, _, shown_rows in pairs.values() for i in shown_rows})
    index_by_row = {i: n for n, i in enumerate(row_numbers)}
    reference = runs[0].predictions
    data = {
        "runs": [run.name for run in runs],
        "rows": [[int(reference.ids[i]), int(reference.labels[i])] for i in row_numbers],
        "scores": [[round(float(run.predictions.scores[i]), 4) for i in row_numbers] for run in runs],
        "pairs": {
            f"{a},{b}": [only_a, only_b, both_wrong, [index_by_row[int(i)] for i in shown_rows]]
            for (a, b), (only_a, only_b, both_wrong, shown_rows) in pairs.items()
        },
        "examples": len(reference.ids),
        "threshold": DEFAULT_THRESHOLD,
    }
    only_a, only_b, both_wrong, shown_rows = pairs[0, 1]
    rows: list[list[Content]] = [
        [
            str(int(reference.ids[i])),
            str(int(reference.labels[i])),
            f"{runs[0].predictions.scores[i]:.4f}",
            f"{runs[1].predictions.scores[i]:.4f}",
            runs[0].name if runs[0].predictions.correct[i] else runs[1].name,
        ]
        for i in shown_rows
    ]
    n = len(reference.ids)
    sentence = describe_pair(runs[0].name, runs[1].name, only_a, only_b, both_wrong, n, len(rows))
    names = ["id", "label", f"score of {runs[0].name}", f"score of {runs[1].name}", "right"]
    controls = element(
        "p",
        element("label", "Run A ", _select("run-a", runs, 0)),
        " ",
        element("label", "Run B ", _select("run-b", runs, 1)),
        class_="controls script",
    )
    # Inside a script element only "</" has a meaning; JSON may spell "<" otherwise.
    payload = Markup(json.dumps(data, separators=(",", ":"), ensure_ascii=True).replace("<", "\\u003c"))
    return element(
        "div",
        controls,
        element("p", sentence, class_="said", role="status"),
        table("Examples that one of two runs gets right", names, rows),
        element("script", payload, type="application/json"),
        class_="disagreements",
    )


def describe_pair(a: str, b: str, only_a: int, only_b: int, both_wrong: int, n: int, n_shown: int) -> str:
    """Return a sentence about the number of examples that only one of two runs, or neither, predicts correctly.

    The page's script writes the same sentence for the runs that are chosen there.

    Args:
        a: name of run A.
        b: name of run B.
        only_a: examples that only run A predicts correctly.
        only_b: examples that only run B predicts correctly.
        both_wrong: examples that neither does.
        n: all examples.
        n_shown: disagreements in the table below.
    """
    sentence = (
        f"Of {n:,} examples, only {a} predicts {only_a:,} correctly, only {b} {only_b:,}, neither {both_wrong:,}."
    )
    if n_shown == only_a + only_b:
        return sentence
    return f"{sentence} The {n_shown:,} with the largest difference of scores are shown."


def _candidates(entries: Sequence[Entry], split: str) -> list[_Candidate]:
    """Return the first run of each row, if its predictions are of the same examples as those of the first row."""
    candidates: list[_Candidate] = []
    for entry in entries[: 4 * RUNS]:
        for folder, record in entry.runs[:1]:
            predictions_of_run = predictions.read_if_usable(folder, split)
            if predictions_of_run is None:
                continue
            reference = candidates[0].predictions if candidates else predictions_of_run
            if reference.has_same_examples(predictions_of_run):
                seed = record["config"].get("seed")
                candidates.append(
                    _Candidate(
                        f"{entry.name}, seed {seed}" if seed is not None else entry.name,
                        str(folder),
                        predictions_of_run,
                    )
                )
    return candidates[:RUNS]


def _compare_pair(one: Predictions, other: Predictions) -> tuple[int, int, int, list[int]]:
    """Return how many examples only `one`, only `other` and neither predicts correctly, and which to show.

    The examples to show are at most `SHOWN` of the first two groups, with the largest difference of scores first.
    """
    only_one, only_other = one.correct & ~other.correct, other.correct & ~one.correct
    differing = np.flatnonzero(only_one | only_other)
    farthest = np.argsort(-np.abs(one.scores[differing] - other.scores[differing]), kind="stable")[:SHOWN]
    neither = int((~one.correct & ~other.correct).sum())
    return int(only_one.sum()), int(only_other.sum()), neither, differing[farthest].tolist()


def _select(name: str, runs: Sequence[_Candidate], chosen: int) -> Markup:
    """Return a menu of the runs."""
    options = [
        element("option", run.name, value=i, selected=i == chosen, title=run.folder) for i, run in enumerate(runs)
    ]
    return element("select", *options, class_=name, autocomplete="off")
