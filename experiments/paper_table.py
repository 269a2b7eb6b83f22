#!/usr/bin/env python3
"""Print the README's table on QQP: fine-tuned encoders, a decoder prompted and fine-tuned, LoRA, the enhanced method.

    experiments/paper_table.py

It reads the kept records of `experiments/reproduce_enhanced.py` (stage backbones) and `experiments/decoders.py`. All
models are scored on the same pairs: the first 1,000 of validation, or the first 300, where the prompted model was
scored. Values are means over the seeds. The interval (95 %) comes from resampling the pairs, the same for all seeds.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
from result_tables import runs_of

from lora_bench.evaluation.confusion import compute_metric
from lora_bench.records import predictions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

RECORDS = Path(__file__).parent / "records"
MEASURES = ("accuracy", "f1", "mcc")
RESAMPLES = 5000


@dataclass(frozen=True)
class Row:
    """A row of the table: the runs of one model and method."""

    model: str
    method: str
    folder: str
    """Of the runs, below the records."""
    choices: str = ""
    """Overrides of `experiment` and `adapter` that the runs have in common; empty: all runs of the folder."""
    pairs: int = 1000

    def read(self, records: Path) -> tuple[list[predictions.Predictions], list[dict[str, Any]]]:
        """Return the predictions on the first pairs, and the record, of each run."""
        runs = runs_of(self.choices, records / self.folder)
        return [_first(predictions.read(run, "validation"), self.pairs) for run, _ in runs], [r for _, r in runs]


MINILM, ROBERTA, T5 = (f"enhanced/backbones/{name}" for name in ("minilm", "roberta_mini", "t5_mini"))
ROWS = (
    Row("MiniLM, a BERT", "full fine-tuning", MINILM, "adapter=full"),
    Row("a small RoBERTa", "full fine-tuning", ROBERTA, "adapter=full"),
    Row("a small T5", "full fine-tuning", T5, "adapter=full"),
    Row("Gemma 3 270M", "prompt with 4 examples", "decoders/prompted/few_shot", pairs=300),
    Row("Gemma 3 270M", "full fine-tuning", "decoders/full/text_to_text"),
    Row("Gemma 3 270M", "LoRA", "decoders/text_to_text/lora"),
    Row("Gemma 3 270M", "enhanced, with the recipe", "decoders/text_to_text/enhanced"),
    Row("MiniLM", "LoRA", MINILM, "adapter=lora"),
    Row("MiniLM", "LoRA, with the recipe", MINILM, "experiment=recipe adapter=lora"),
    Row("MiniLM", "full, with the recipe", MINILM, "experiment=recipe adapter=full"),
    Row("MiniLM", "enhanced, with the recipe", MINILM, "experiment=enhanced"),
)


def _first(whole: predictions.Predictions, pairs: int) -> predictions.Predictions:
    chosen = whole.ids < pairs
    return predictions.Predictions(whole.ids[chosen], whole.labels[chosen], whole.scores[chosen])


def intervals(of_seeds: Sequence[predictions.Predictions]) -> list[tuple[float, float]]:
    """Return the bounds of the 95 % interval of each of `MEASURES`, a mean over seeds, over resamples of the pairs.

    Args:
        of_seeds: predictions of the same pairs.
    """
    draws = _draws(len(of_seeds[0].ids))
    counts = np.stack([draws @ _cells(run) for run in of_seeds])  # (S, R, 4)
    values = [compute_metric(counts, measure).mean(axis=0) for measure in MEASURES]  # (R,) each
    return [tuple(np.quantile(of_measure, [0.025, 0.975]).tolist()) for of_measure in values]


@cache
def _draws(pairs: int) -> NDArray[np.int64]:
    """Return how often each pair is drawn in each resample: (R, N)."""
    return np.random.default_rng(0).multinomial(pairs, np.full(pairs, 1 / pairs), size=RESAMPLES)


def _cells(run: predictions.Predictions) -> NDArray[np.int64]:
    """Return for each pair which cell it is counted in, of true and false positives, false and true negatives: (N, 4).

    The order is that of `compute_metric`.
    """
    label, predicted = run.labels.astype(bool), run.predicted.astype(bool)
    cells = [label & predicted, ~label & predicted, label & ~predicted, ~label & ~predicted]
    return np.stack(cells, -1).astype(np.int64)


def format_table(records: Path, rows: Sequence[Row] = ROWS) -> str:
    """Return the table in Markdown; rows without kept records are left out."""
    lines = ["| model | method | accuracy | F1 | MCC | TFLOP |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: |")
    for row in rows:
        runs, read = row.read(records)
        if not runs:
            continue
        cells = [row.model, row.method]
        for measure, (low, high) in zip(MEASURES, intervals(runs), strict=True):
            cells.append(f"{fmean(run.value(measure) for run in runs):.3f} ({low:.2f} to {high:.2f})")
        is_trained = read[0]["params"]["trainable"] is not None
        cells.append(f"{fmean(record['cost']['train_flops'] for record in read) / 1e12:.0f}" if is_trained else "—")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder of the kept records")
    print(format_table(parser.parse_args().records))


if __name__ == "__main__":
    main()
