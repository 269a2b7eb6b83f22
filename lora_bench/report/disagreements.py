"""What happened to single examples: where one of two runs is right and the other wrong."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from lora_bench.records import predictions
from lora_bench.report.html import Content, Markup, el, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_bench.records.predictions import Predictions
    from lora_bench.report.series import Block, Entry

RUNS = 8
"""Runs to choose two from."""
SHOWN = 50
"""Disagreements kept of each pair: those whose scores are farthest apart."""


@dataclass(frozen=True)
class _Candidate:
    name: str
    folder: str
    seen: Predictions


def disagreements(block: Block, split: str) -> Markup | None:
    """Two runs, chosen on the page: where one is right and the other wrong. At first the best two rows' first runs."""
    runs = _candidates(block.chosen if len(block.chosen) > 1 else block.entries, split)
    if len(runs) < 2:
        return None
    pairs = {(a, b): _apart(runs[a].seen, runs[b].seen) for a, b in combinations(range(len(runs)), 2)}
    kept = sorted({int(i) for _, _, _, shown in pairs.values() for i in shown})
    at = {i: n for n, i in enumerate(kept)}
    first = runs[0].seen
    data = {
        "runs": [run.name for run in runs],
        "rows": [[int(first.ids[i]), int(first.labels[i])] for i in kept],
        "scores": [[round(float(run.seen.scores[i]), 4) for i in kept] for run in runs],
        "pairs": {
            f"{a},{b}": [only_a, only_b, both_wrong, [at[int(i)] for i in shown]]
            for (a, b), (only_a, only_b, both_wrong, shown) in pairs.items()
        },
        "examples": len(first.ids),
    }
    only_a, only_b, both_wrong, shown = pairs[0, 1]
    rows: list[list[Content]] = [
        [
            str(int(first.ids[i])),
            str(int(first.labels[i])),
            f"{runs[0].seen.scores[i]:.4f}",
            f"{runs[1].seen.scores[i]:.4f}",
            runs[0].name if runs[0].seen.correct[i] else runs[1].name,
        ]
        for i in shown
    ]
    n = len(first.ids)
    sentence = said(runs[0].name, runs[1].name, only_a, only_b, both_wrong, n, len(rows))
    names = ["id", "label", f"score of {runs[0].name}", f"score of {runs[1].name}", "right"]
    choose = el(
        "p",
        el("label", "Run A ", _select("run-a", runs, 0)),
        " ",
        el("label", "Run B ", _select("run-b", runs, 1)),
        class_="controls script",
    )
    # Inside a script element only "</" has a meaning; JSON may spell "<" otherwise.
    payload = Markup(json.dumps(data, separators=(",", ":"), ensure_ascii=True).replace("<", "\\u003c"))
    return el(
        "div",
        choose,
        el("p", sentence, class_="said", role="status"),
        table("Examples that one of two runs gets right", names, rows),
        el("script", payload, type="application/json"),
        class_="disagreements",
    )


def said(a: str, b: str, only_a: int, only_b: int, both_wrong: int, n: int, shown: int) -> str:
    """The four-fold table in words; the page's script says the same of the runs that are chosen there."""
    told = f"Of {n:,} examples, {only_a:,} only {a} gets right, {only_b:,} only {b}, and {both_wrong:,} neither."
    return f"{told} Shown: the {shown:,} whose scores are farthest apart." if shown < only_a + only_b else told


def _candidates(entries: Sequence[Entry], split: str) -> list[_Candidate]:
    """The first run of each row that has predictions of the same examples as the first of all."""
    found: list[_Candidate] = []
    for entry in entries[: 4 * RUNS]:
        for folder, record in entry.runs[:1]:
            seen = predictions.read_if_usable(folder, split)
            if seen is None:
                continue
            like = found[0].seen if found else seen
            if like.has_same_examples(seen):
                seed = record["config"].get("seed")
                found.append(
                    _Candidate(f"{entry.name}, seed {seed}" if seed is not None else entry.name, str(folder), seen)
                )
    return found[:RUNS]


def _apart(one: Predictions, other: Predictions) -> tuple[int, int, int, list[int]]:
    """How many only the one gets right, only the other, neither; and which of the first two to show."""
    only_one, only_other = one.correct & ~other.correct, other.correct & ~one.correct
    differ = np.flatnonzero(only_one | only_other)
    far = np.argsort(-np.abs(one.scores[differ] - other.scores[differ]), kind="stable")[:SHOWN]
    neither = int((~one.correct & ~other.correct).sum())
    return int(only_one.sum()), int(only_other.sum()), neither, differ[far].tolist()


def _select(name: str, runs: Sequence[_Candidate], chosen: int) -> Markup:
    options = [el("option", run.name, value=i, selected=i == chosen, title=run.folder) for i, run in enumerate(runs)]
    return el("select", *options, class_=name, autocomplete="off")
