"""`lora-bench predict`: label new pairs with a finished run."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from lora_bench.evaluation.calibration import apply_temperature
from lora_bench.evaluation.ensemble import member_spread
from lora_bench.run.finished_run import FinishedRun

if TYPE_CHECKING:
    from lora_bench.run.prediction_request import PredictionRequest


def run_predict(request: PredictionRequest) -> None:
    """Score the request's pairs with its run, and write labels and scores beside the input's columns.

    Labels follow from the uncalibrated scores and the threshold. With `uncertainty` there are columns `calibrated` and,
    for an ensemble, `spread`. Notes about the run go to stderr, since the output may be stdout.

    Args:
        request: of `lora-bench predict run=DIR input=pairs.tsv output=labelled.tsv`.

    Raises:
        UserError: the run cannot be loaded, a score is not finite, or the output cannot be written.
    """
    run = FinishedRun.load(request.run, device=request.device, **request.model_places)
    for note in run.notes:
        print(f"note: {note}", file=sys.stderr)
    scores_by_member = run.member_scores(request.examples)
    scores = scores_by_member.mean(axis=0)
    calibrated_scores = scores if run.calibration is None else apply_temperature(scores, run.calibration.temperature)
    columns = {
        "label": (scores >= request.threshold).astype(int).tolist(),
        "score": (calibrated_scores if request.calibrated else scores).tolist(),
    }
    if request.uncertainty:
        columns["calibrated"] = calibrated_scores.tolist()
        if len(scores_by_member) > 1:
            columns["spread"] = member_spread(scores_by_member).tolist()
    request.write(columns)
