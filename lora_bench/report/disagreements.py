"""Disagreements: single examples that one of two runs predicts correctly and the other does not."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_bench.console.format import to_single_line
from lora_bench.records import predictions
from lora_bench.report.content import DataTable, Widget

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_bench.records.predictions import Predictions
    from lora_bench.report.blocks import Block, Entry
    from lora_bench.report.content import Cell, Content

RUNS = 12
"""Runs that can be chosen."""
SHOWN = 50
"""Disagreements shown for each pair of runs: those whose scores are farthest apart."""


@dataclass(frozen=True)
class _Candidate:
    name: str
    setting: str
    """Name of its setting."""
    folder: str
    predictions: Predictions


def disagreements(block: Block) -> list[Content]:
    """Return the examples that one of two runs gets right and the other wrong; empty with fewer than two runs.

    A regression has none. The two runs are chosen on the page; at first they are the first runs of the two best rows.
    """
    if block.form == "regression":
        return []
    ordered = [*block.chosen, *(entry for entry in block.entries if entry not in block.chosen)]
    runs = _candidates(ordered, block.split)
    if len(runs) < 2:
        return []
    pairs = {
        (a, b): _compare_pair(runs[a].predictions, runs[b].predictions) for a, b in combinations(range(len(runs)), 2)
    }
    only_a, only_b, both_wrong, shown_rows = pairs[0, 1]
    first, second = runs[0], runs[1]
    rows: list[list[Cell]] = [
        [
            str(int(first.predictions.ids[i])),
            _name(block, int(first.predictions.labels[i])),
            _answer(block, first.predictions, i),
            _answer(block, second.predictions, i),
            first.name if first.predictions.correct[i] else second.name,
        ]
        for i in shown_rows
    ]
    n = len(first.predictions.ids)
    noun = "score" if block.form == "binary" else "prediction"
    names = ["id", "label", f"{noun} of {first.name}", f"{noun} of {second.name}", "right"]
    values = {
        "sentence": describe_pair(first.name, second.name, only_a, only_b, both_wrong, n, len(rows)),
        "runs": [(run.name, run.folder) for run in runs],
        "table": DataTable("Examples that one of two runs gets right", names, rows),
        "data": _data(block, runs, pairs, noun),
    }
    return [Widget("disagreements.html", values)]


def _name(block: Block, label: int) -> str:
    """Return the name of a class; its number where the names are not recorded."""
    names = block.label_names or []
    return to_single_line(names[label]) if label < len(names) else str(label)


def _answer(block: Block, run: Predictions, i: int) -> str:
    """Return a prediction: P(label 1), or of more classes the most probable one with its probability."""
    if run.form == "binary":
        return f"{run.scores[i]:.4f}"
    label = int(run.predicted[i])
    return f"{_name(block, label)} {run.scores[i, label]:.2f}"


def _data(
    block: Block,
    runs: Sequence[_Candidate],
    pairs: dict[tuple[int, int], tuple[int, int, int, list[int]]],
    noun: str,
) -> dict[str, Any]:
    """Return the numbers of all pairs of runs for the page's script."""
    row_numbers = sorted({int(i) for _, _, _, shown_rows in pairs.values() for i in shown_rows})
    index_by_row = {i: n for n, i in enumerate(row_numbers)}
    reference = runs[0].predictions
    return {
        "runs": [run.name for run in runs],
        "settings": [run.setting for run in runs],
        "noun": noun,
        "rows": [[int(reference.ids[i]), _name(block, int(reference.labels[i]))] for i in row_numbers],
        "answers": [[_answer(block, run.predictions, i) for i in row_numbers] for run in runs],
        "correct": [[int(run.predictions.correct[i]) for i in row_numbers] for run in runs],
        "pairs": {
            f"{a},{b}": [only_a, only_b, both_wrong, [index_by_row[int(i)] for i in shown_rows]]
            for (a, b), (only_a, only_b, both_wrong, shown_rows) in pairs.items()
        },
        "examples": len(reference.ids),
    }


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
    """Return the first run of each setting, if its predictions are of the same examples as those of the first one."""
    candidates: list[_Candidate] = []
    for entry in entries[: 4 * RUNS]:
        if len(candidates) == RUNS:
            break
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
                        entry.name,
                        str(folder),
                        predictions_of_run,
                    )
                )
    return candidates


def _compare_pair(one: Predictions, other: Predictions) -> tuple[int, int, int, list[int]]:
    """Return how many examples only `one`, only `other` and neither predicts correctly, and which to show.

    The examples to show are at most `SHOWN` of the first two groups, with the largest difference of scores first. With
    more than two classes, the score is the probability of the example's label.
    """
    only_one, only_other = one.correct & ~other.correct, other.correct & ~one.correct
    differing = np.flatnonzero(only_one | only_other)
    of_label = (differing, one.labels[differing]) if one.form == "multiclass" else differing
    farthest = np.argsort(-np.abs(one.scores[of_label] - other.scores[of_label]), kind="stable")[:SHOWN]
    neither = int((~one.correct & ~other.correct).sum())
    return int(only_one.sum()), int(only_other.sum()), neither, differing[farthest].tolist()
