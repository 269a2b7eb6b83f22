"""What a reported split is scored on besides itself: the rows not seen in training, and its texts perturbed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lora_bench.data import sources
from lora_bench.data.examples import Examples
from lora_bench.data.perturb import choose, perturb
from lora_bench.evaluation.metrics import score
from lora_bench.evaluation.robustness import Trial, robustness

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from lora_bench.config.schema import Data, Metric
    from lora_bench.data.perturb import Perturbed
    from lora_bench.data.perturb.transform import Transform

    Scorer = Callable[[Examples], NDArray[np.float64]]


def resolve_transforms(data: Data) -> list[Transform]:
    """What `data.perturb` names; refuses transforms that there are not, or that do not suit the data."""
    if data.perturb is None:
        return []
    return choose(data.perturb, data.task, len(data.text_columns), "data.perturb")


def score_stress_splits(
    data: Data,
    split: Examples,
    scores: NDArray[np.float64],
    score_examples: Scorer,
    *,
    seen: Sequence[Examples],
    metrics: Mapping[str, Metric],
    log: Callable[[str], None],
) -> dict[str, float | None]:
    """The figures that the settings ask for besides those of the whole split.

    Args:
        data: the settings.
        split: N labelled examples.
        scores: (N,) P(label 1) of them.
        score_examples: gives those of other examples.
        seen: what was trained and chosen on, where `data.unseen` asks for it.
        metrics: extra metrics.
        log: is told what goes on, which may take minutes.

    Returns:
        `unseen/<metric>`, and what `robustness` returns.
    """
    assert split.labels is not None
    values: dict[str, float | None] = {}
    if data.unseen:
        rows = sources.unseen(split, *seen)
        if rows.any():
            found = score(scores[rows], split.labels[rows], metrics)
            values |= {f"unseen/{name}": value for name, value in found.items()}
    if transforms := resolve_transforms(data):
        values |= robustness(scores, split.labels, list(_trials(data, split, transforms, score_examples, log)))
    return values


def describe_stress_splits(data: Data, splits: Mapping[str, Examples], seen: Sequence[Examples]) -> dict[str, object]:
    """What a record says of it: `unseen` rows by split, and the names of the transforms."""
    said: dict[str, object] = {}
    if data.unseen:
        said["unseen"] = {name: int(sources.unseen(split, *seen).sum()) for name, split in splits.items()}
    if transforms := resolve_transforms(data):
        said["perturb"] = {
            "transforms": [transform.name for transform in transforms],
            "seeds": data.perturb_seeds,
            "intensity": data.intensity,
        }
    return said


def _trials(
    data: Data, split: Examples, transforms: Sequence[Transform], score_examples: Scorer, log: Callable[[str], None]
) -> Iterator[Trial]:
    """Every transform with the seeds 0, 1, …; with one where nothing is drawn."""
    for transform in transforms:
        seeds = range(data.perturb_seeds if transform.drawn else 1)
        found = [perturb(split, transform, seed=seed, intensity=data.intensity) for seed in seeds]
        log(f"{transform.name}: {len(found[0].rows):,} of {len(split):,} rows perturbed")
        for each, scores in zip(found, _scores(found, score_examples), strict=True):
            assert each.examples.labels is not None
            yield Trial(transform.name, transform.keeps_label, each.rows, each.examples.labels, scores)


def _scores(found: Sequence[Perturbed], score_examples: Scorer) -> list[NDArray[np.float64]]:
    """The scores of each, (M,); seeds often make the same of a row, which is then scored once."""
    texts = [list(zip(*each.examples.texts, strict=True)) for each in found]
    different = list(dict.fromkeys(row for rows in texts for row in rows))
    if not different:
        return [np.empty(0) for _ in found]
    columns = tuple(list(column) for column in zip(*different, strict=True))
    scores = dict(
        zip(different, score_examples(Examples(np.arange(len(different)), columns, None)).tolist(), strict=True)
    )
    return [np.array([score_by_row[row] for row in rows]) for rows in texts]
