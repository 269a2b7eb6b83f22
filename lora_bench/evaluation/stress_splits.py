"""Stress splits: further scores of a reported split, on rows that training has not seen and on perturbed texts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lora_bench.data import sources
from lora_bench.data.examples import Examples
from lora_bench.data.perturb import choose_transforms, may_be_binary, perturb
from lora_bench.evaluation.metrics import score
from lora_bench.evaluation.robustness import Trial, robustness

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from lora_bench.config.schema import Data, Metric
    from lora_bench.data.perturb import PerturbedRows
    from lora_bench.data.perturb.transform import Transform

    Scorer = Callable[[Examples], NDArray[np.float64]]


def resolve_transforms(data: Data) -> list[Transform]:
    """Return the transforms that `data.perturb` names; none if it is null.

    Raises:
        UserError: a name is unknown, or a transform does not suit the relation of the texts or their number.
    """
    if data.perturb is None:
        return []
    texts = len(data.text_columns)
    return choose_transforms(data.perturb, data.relation, texts, "data.perturb", binary=may_be_binary(data))


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
    """Return the metrics of a reported split on the stress splits that the settings request; empty if there are none.

    Args:
        data: the settings.
        split: N labelled examples.
        scores: of them: (N,) P(label 1) or predicted numbers, or (N, C) probabilities of more than two classes.
        score_examples: returns the scores of other examples.
        seen: the examples of training and selection, used if `data.unseen` is true.
        metrics: extra metrics, reported for the unseen rows only.
        log: receives a line per transform, since perturbing may take minutes.

    Returns:
        `unseen/<metric>`, absent if no row is unseen, and the metrics that `robustness` returns.

    Raises:
        UserError: as `resolve_transforms`.
        DivergedError: a score is not a finite number.
    """
    assert split.labels is not None
    values: dict[str, float | None] = {}
    if data.unseen:
        rows = sources.unseen_rows(split, *seen)
        if rows.any():
            metrics_of_unseen = score(scores[rows], split.labels[rows], metrics)
            values |= {f"unseen/{name}": value for name, value in metrics_of_unseen.items()}
    if transforms := resolve_transforms(data):
        trials = list(_trials(data, split, transforms, score_examples, log))
        values |= robustness(scores, split.labels, trials)
    return values


def describe_stress_splits(data: Data, splits: Mapping[str, Examples], seen: Sequence[Examples]) -> dict[str, object]:
    """Return the section of a record about stress splits: `unseen` rows by split, and the `perturb` settings.

    Each of the two keys is absent if the settings do not request it.

    Raises:
        UserError: as `resolve_transforms`.
    """
    description: dict[str, object] = {}
    if data.unseen:
        description["unseen"] = {name: int(sources.unseen_rows(split, *seen).sum()) for name, split in splits.items()}
    if transforms := resolve_transforms(data):
        description["perturb"] = {
            "transforms": [transform.name for transform in transforms],
            "seeds": data.perturb_seeds,
            "intensity": data.intensity,
        }
    return description


def _trials(
    data: Data, split: Examples, transforms: Sequence[Transform], score_examples: Scorer, log: Callable[[str], None]
) -> Iterator[Trial]:
    """Yield a trial for each transform and each of the seeds 0, 1, …; one trial if the transform is not random.

    A line with the rows that the first seed changes is logged before a transform's rows are scored.
    """
    for transform in transforms:
        seeds = range(data.perturb_seeds if transform.is_random else 1)
        perturbed_by_seed = [perturb(split, transform, seed=seed, intensity=data.intensity) for seed in seeds]
        log(f"{transform.name}: {len(perturbed_by_seed[0].rows):,} of {len(split):,} rows perturbed")
        for perturbed, scores in zip(perturbed_by_seed, _scores(perturbed_by_seed, score_examples), strict=True):
            assert perturbed.examples.labels is not None
            yield Trial(transform.name, transform.keeps_label, perturbed.rows, perturbed.examples.labels, scores)


def _scores(perturbed_by_seed: Sequence[PerturbedRows], score_examples: Scorer) -> list[NDArray[np.float64]]:
    """Return the scores, (M,) or (M, C), of each seed's perturbed rows. Texts that several seeds give are scored once.

    Args:
        perturbed_by_seed: M rows for each seed, M may differ and be 0.
        score_examples: called once with all different rows, without labels; not called if there are none.
    """
    texts = [list(zip(*perturbed.examples.texts, strict=True)) for perturbed in perturbed_by_seed]
    numbers = {row: number for number, row in enumerate(dict.fromkeys(row for rows in texts for row in rows))}
    if not numbers:
        return [np.empty(0) for _ in perturbed_by_seed]
    columns = tuple(list(column) for column in zip(*numbers, strict=True))
    scores = score_examples(Examples(np.arange(len(numbers)), columns, None))
    return [scores[np.array([numbers[row] for row in rows], np.int64)] for rows in texts]
