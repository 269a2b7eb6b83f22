"""`lora-bench predict`: label new examples with a finished run."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_bench.config.metric_names import DEFAULT_THRESHOLD
from lora_bench.data.labelled import probability_columns
from lora_bench.evaluation.calibration import apply_temperature
from lora_bench.evaluation.ensemble import member_spread
from lora_bench.evaluation.scores import predict_labels
from lora_bench.run.finished_run import FinishedRun

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from lora_bench.run.prediction_request import PredictionRequest


def run_predict(request: PredictionRequest) -> None:
    """Score the request's examples with its run, and write the predictions beside the input's columns.

    Of classes they are the columns `label` (its number), `label_name` (without names that are only the numbers 0 and 1)
    and `score`: P(label 1) of two classes, the probability of the predicted one of more. Labels follow from the
    uncalibrated scores. With `probabilities` there is a column for each class; with `uncertainty` there are columns
    `calibrated` and, for an ensemble, `spread`. A regression has the column `prediction`. Notes about the run go to
    stderr, since the output may be stdout.

    Args:
        request: of `lora-bench predict run=DIR input=pairs.tsv output=labelled.tsv`.

    Raises:
        UserError: the run cannot be loaded, a score is not finite, or the output cannot be written.
    """
    run = FinishedRun.load(request.run, device=request.device, **request.model_places)
    for note in run.notes:
        print(f"note: {note}", file=sys.stderr)
    scores_by_member = run.member_scores(request.examples)
    scores = scores_by_member.mean(axis=0)  # (N,) or (N, C)
    columns = {"prediction": scores.tolist()} if run.label_names is None else _columns(request, run, scores)
    if request.uncertainty and len(scores_by_member) > 1:
        columns["spread"] = member_spread(scores_by_member).tolist()
    request.write(columns)


def _columns(request: PredictionRequest, run: FinishedRun, scores: NDArray[np.float64]) -> dict[str, Sequence[Any]]:
    """Return the columns of predicted classes, in their order.

    Args:
        request: gives the threshold of two classes, and says which columns there are.
        run: gives the calibration and the names of the classes.
        scores: (N,) P(label 1), or (N, C), not calibrated.
    """
    names = run.label_names or []
    calibrated_scores = scores if run.calibration is None else apply_temperature(scores, run.calibration.temperature)
    labels = predict_labels(scores, DEFAULT_THRESHOLD if request.threshold is None else request.threshold)  # (N,)

    def score_column(values: NDArray[np.float64]) -> list[float]:
        """Return what `score` is of these scores: P(label 1), or the probability of the predicted class."""
        of_label = values if values.ndim == 1 else np.take_along_axis(values, labels[:, None], axis=1)[:, 0]
        return of_label.tolist()  # type: ignore[no-any-return]

    written = calibrated_scores if request.calibrated else scores
    columns: dict[str, Sequence[Any]] = {"label": labels.tolist()}
    if names != ["0", "1"]:
        columns["label_name"] = [names[label] for label in labels.tolist()]
    columns["score"] = score_column(written)
    if request.probabilities:
        by_class = written if written.ndim > 1 else np.stack([1 - written, written], -1)  # (N, C)
        columns |= {name: by_class[:, label].tolist() for label, name in enumerate(probability_columns(names))}
    if request.uncertainty:
        columns["calibrated"] = score_column(calibrated_scores)
    return columns
