"""Metrics from scores: of two classes torchmetrics' where they suit, otherwise our own.

Metrics of more classes and of numbers are those that the tests of a comparison use (`confusion`, `regression`).

Three of torchmetrics' conventions do not suit: its Matthews correlation of a constant predictor is not 0, its binary
calibration error bins P(label 1) instead of the confidence in the predicted label, and it accepts NaN scores. Those
two metrics are computed here, and scores are checked first. torchmetrics also predicts label 1 above its threshold,
where we predict it from the threshold on: a score of exactly 0.5 must not count as 1 in one metric and as 0 in another.
"""

from __future__ import annotations

import math
import warnings
from functools import cache
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_bench.config.metric_names import DEFAULT_THRESHOLD
from lora_bench.config.schema import Metric
from lora_bench.errors import Code, DivergedError, UserError, nearest
from lora_bench.evaluation import regression
from lora_bench.evaluation.confusion import (
    class_totals,
    compute_class_metric,
    compute_metric,
    confusion_counts,
    ratio,
)
from lora_bench.evaluation.scores import form_of, predict_labels
from lora_bench.extensions.entry_points import METRICS, load_registered, registered_names, unusable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch
    import torchmetrics
    from numpy.typing import NDArray

    from lora_bench.evaluation.scores import Labels

CALIBRATION_BINS = 15
"""Bins of the expected calibration error."""
SMALLEST = 1e-15  # a score of exactly 0 or 1 costs 34.5 nats, not infinity
_BINARY = {
    "accuracy": Metric(torchmetric="Accuracy"),
    "f1": Metric(torchmetric="F1Score"),
    "precision": Metric(torchmetric="Precision"),
    "recall": Metric(torchmetric="Recall"),
    "auroc": Metric(torchmetric="AUROC"),
}
_OF_CLASSES = ("accuracy", "macro_f1", "weighted_f1", "mcc")
"""Metrics of more than two classes that depend on the predicted classes alone."""
_OF_NUMBERS = ("pearson", "spearman", "mse", "mae", "r2")


def score(scores: NDArray[np.float64], labels: Labels, extra: Mapping[str, Metric]) -> dict[str, float | None]:
    """Return all metrics of one split.

    Args:
        scores: for two classes (N,) P(label 1); for more (N, C), a probability of each; in regression (N,) numbers.
        labels: (N,) class numbers from 0; in regression numbers.
        extra: metrics to add to the standard ones, by the name to report.

    Returns:
        For two classes accuracy, f1, mcc, precision, recall, auroc, nll, ece, brier; label 1 is predicted from a score
        of `DEFAULT_THRESHOLD` on. For more classes accuracy, macro_f1, weighted_f1, mcc, auroc, nll, ece, brier; the
        most probable class is predicted. For numbers pearson, spearman, mse, mae, r2. Then the extra ones. auroc is
        None if only one class occurs, and an extra metric is None without a value.

    Raises:
        DivergedError: a score is not a finite number.
        UserError: an installed metric fails.
    """
    require_finite(scores)
    form = form_of(scores, labels)
    if form == "regression":
        values: dict[str, float | None] = {
            name: float(regression.compute_metric(labels, scores, name)) for name in _OF_NUMBERS
        }
    else:
        values = _binary_metrics(scores, labels) if form == "binary" else _multiclass_metrics(scores, labels)
    for name, metric in extra.items():
        values[name] = compute_extra_metric(metric, f"metric.{name}", scores, labels)
    return values


def _binary_metrics(scores: NDArray[np.float64], labels: Labels) -> dict[str, float | None]:
    """Return the standard metrics of two classes."""
    import torch  # late: a bad record is refused without it

    p, y = torch.from_numpy(scores), torch.from_numpy(labels)
    values = {name: _value(_make_metric(metric, "binary"), p, y) for name, metric in _BINARY.items()}
    if labels.min() == labels.max():
        values["auroc"] = None
    values["mcc"] = float(compute_metric(confusion_counts(labels, scores >= DEFAULT_THRESHOLD)))
    likelihood = np.where(labels == 1, scores, 1 - scores)
    values["nll"] = float(-np.log(np.clip(likelihood, SMALLEST, 1.0)).mean()) + 0.0  # not -0.0
    values["brier"] = float(((scores - labels) ** 2).mean())
    values["ece"] = expected_calibration_error(scores, labels)
    return values


def _multiclass_metrics(scores: NDArray[np.float64], labels: Labels) -> dict[str, float | None]:
    """Return the standard metrics of more than two classes, with scores (N, C).

    MCC is Gorodkin's R_K (2004, eq. 8); the Brier score is Brier's own (1950), the sum over classes, up to 2.
    """
    N, C = scores.shape
    totals = class_totals(labels, predict_labels(scores), C)
    values: dict[str, float | None] = {name: float(compute_class_metric(totals, name)) for name in _OF_CLASSES}
    values["auroc"] = macro_auroc(scores, labels)
    likelihood = scores[np.arange(N), labels]
    values["nll"] = float(-np.log(np.clip(likelihood, SMALLEST, 1.0)).mean()) + 0.0  # not -0.0
    values["brier"] = float(((scores - np.eye(C)[labels]) ** 2).sum(1).mean())
    values["ece"] = expected_calibration_error(scores, labels)
    return values


def macro_auroc(scores: NDArray[np.float64], labels: Labels) -> float | None:
    """Return the mean area under the ROC curve of each class against the rest, over the classes that occur.

    Each area is the probability that a row of the class has a higher score than another row (Mann and Whitney 1947); of
    equal scores half counts.

    Args:
        scores: (N, C).
        labels: (N,).

    Returns:
        None if only one class occurs.
    """
    from scipy.stats import rankdata

    areas = []
    for c in np.unique(labels):
        of_class = labels == c
        n, rest = int(of_class.sum()), int((~of_class).sum())
        if n and rest:
            ranks = rankdata(scores[:, c])
            areas.append((ranks[of_class].sum() - n * (n + 1) / 2) / (n * rest))
    return float(np.mean(areas)) if areas else None


def class_metrics(scores: NDArray[np.float64], labels: Labels, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return precision, recall, F1 and number of rows (`support`) of each class by its name; 0 / 0 gives 0.

    Args:
        scores: (N,) of two classes, or (N, C).
        labels: (N,).
        names: of the C classes.
    """
    counts = class_totals(labels, predict_labels(scores), len(names))  # (3, C)
    return {
        name: {
            "precision": float(ratio(hits, predicted)),
            "recall": float(ratio(hits, labelled)),
            "f1": float(ratio(2 * hits, labelled + predicted)),
            "support": int(labelled),
        }
        for name, (hits, labelled, predicted) in zip(names, counts.T, strict=True)
    }


def mean_metrics(metric_sets: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Return the mean of each metric over several tasks, splits or members; None if it is None in one of them.

    All sets have the metrics of the first; others are left out. At least one set is given.
    """
    means: dict[str, float | None] = {}
    for name in metric_sets[0]:
        values = [metrics[name] for metrics in metric_sets]
        numbers = [value for value in values if value is not None]
        means[name] = float(np.mean(numbers)) if len(numbers) == len(values) else None
    return means


def require_finite(scores: NDArray[np.float64]) -> None:
    """Refuse scores that are not all finite numbers.

    Raises:
        DivergedError: a score is NaN or infinite.
    """
    if not np.isfinite(scores).all():
        raise DivergedError(f"{int((~np.isfinite(scores)).sum())} of {len(scores)} scores are not finite numbers")


def expected_calibration_error(scores: NDArray[np.float64], labels: Labels) -> float:
    """Return the ECE: over equal-width bins of the confidence in the predicted label (Guo et al. 2017, eq. 3).

    The CALIBRATION_BINS bins divide [0, 1]; of two classes confidences, at least 0.5, fall into the upper half of them.

    Args:
        scores: (N,) P(label 1), or (N, C).
        labels: (N,) class numbers.
    """
    confidence = scores.max(-1) if scores.ndim > 1 else np.maximum(scores, 1 - scores)
    correct = predict_labels(scores) == labels
    bins = np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)
    gaps = np.bincount(bins, weights=correct - confidence, minlength=CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(scores))


def check_metrics(extra: Mapping[str, Metric], form: str = "binary", classes: int = 2) -> None:
    """Refuse extra metrics that do not exist, or that are not a single number, before training begins.

    Args:
        extra: by name.
        form: of the task, a key of `SHOWN_METRICS`.
        classes: number of classes.

    Raises:
        UserError: a metric is neither one of torchmetrics for this form nor an installed function, or its arguments are
            wrong; its key is named.
    """
    for name, metric in extra.items():
        key = f"metric.{name}"
        if metric.torchmetric is not None:
            _check_torchmetric(metric, key, form, classes)
        else:
            _check_function(metric, key, form, classes)


def _probe(form: str, classes: int) -> tuple[NDArray[np.float64], Labels]:
    """Return scores and labels of a task of this form, to try a metric on."""
    if form == "regression":
        return np.array([0.2, 0.8, 0.5]), np.array([0.1, 0.9, 0.3])
    if form == "binary":
        return np.array([0.2, 0.8]), np.array([0, 1])
    labels = np.arange(classes)
    return 0.5 * np.eye(classes) + 0.5 / classes, labels


def _check_torchmetric(metric: Metric, key: str, form: str, classes: int) -> None:
    """Refuse a class that torchmetrics does not have, wrong arguments, and a value that is not a single number."""
    import torch

    metric_class = _metric_class(str(metric.torchmetric), form)
    if metric_class is None:
        raise UserError(
            f"is no {form} metric of torchmetrics",
            key=f"{key}.torchmetric",
            value=metric.torchmetric,
            remedy=nearest(str(metric.torchmetric), _metric_classes(form)),
            code=Code.UNKNOWN_CHOICE,
        )
    needs_classes = form == "multiclass" and "num_classes" in signature(metric_class.__init__).parameters
    arguments = ({"num_classes": classes} if needs_classes else {}) | metric.args
    _check_arguments(metric_class.__init__, arguments, f"{metric_class.__name__} of torchmetrics", key)
    try:
        instance = _make_metric(metric, form, classes)
    except (TypeError, ValueError) as error:
        reason = f"are refused by {metric_class.__name__} of torchmetrics: {str(error).rstrip('.')}"
        raise UserError(reason, key=f"{key}.args", value=_listed(metric.args), code=Code.INVALID_VALUE) from None
    try:
        _value(instance, *map(torch.from_numpy, _probe(form, classes)))
    except (TypeError, ValueError, RuntimeError):
        reason = "is not a single number"
        remedy = f"Take one such as {_EXAMPLES[form]}."
        key = f"{key}.torchmetric"
        raise UserError(reason, key=key, value=metric.torchmetric, remedy=remedy, code=Code.UNSUPPORTED) from None


def _check_function(metric: Metric, key: str, form: str, classes: int) -> None:
    """Refuse a function that no distribution registers, wrong arguments, and a function that gives no number."""
    function, distribution = _registered_function(str(metric.function), f"{key}.function")
    try:
        signature(function)
    except (TypeError, ValueError):
        raise unusable(distribution, "has no signature", f"{key}.function", str(metric.function)) from None
    _check_arguments(function, metric.args, f"{metric.function} of {distribution}", key, given=2)
    _call(metric, key, *_probe(form, classes))


def _check_arguments(
    function: Callable[..., Any], arguments: Mapping[str, Any], owner: str, key: str, given: int = 1
) -> None:
    """Refuse arguments that a function does not name, and missing ones that have no default.

    Args:
        function: with further parameters after those that it is always given.
        arguments: by name.
        owner: of the parameters, for messages.
        key: of the metric.
        given: the number of parameters that it is always given: `self`, or labels and scores.

    Raises:
        UserError: naming the argument.
    """
    kinds = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    parameters = [p for p in list(signature(function).parameters.values())[given:] if p.kind in kinds]
    names = [parameter.name for parameter in parameters]
    unknown = next((name for name in arguments if name not in names), None)
    if unknown is not None:
        remedy = nearest(unknown, names) or "It has no arguments."
        raise UserError(
            f"is not an argument of {owner}", key=f"{key}.args.{unknown}", remedy=remedy, code=Code.UNKNOWN_KEY
        )
    missing = [p.name for p in parameters if p.default is Parameter.empty and p.name not in arguments]
    if missing:
        raise UserError(
            f"is missing: {owner} needs it",
            key=f"{key}.args.{missing[0]}",
            remedy=f"Add args: {{{missing[0]}: VALUE}} to the metric.",
            code=Code.MISSING,
        )


def _listed(arguments: Mapping[str, Any]) -> str:
    """Return arguments as in a YAML file: `{beta: 2.0}`."""
    return f"{{{', '.join(f'{name}: {value}' for name, value in arguments.items())}}}"


def compute_extra_metric(metric: Metric, key: str, scores: NDArray[np.float64], labels: Labels) -> float | None:
    """Return the value of an extra metric; None if it is not a finite number.

    Args:
        metric: its settings.
        key: of the metric, for messages.
        scores: (N,) or (N, C), see `score`.
        labels: (N,).

    Raises:
        UserError: an installed function fails or returns no number.
    """
    if metric.function is not None:
        return _call(metric, key, scores, labels)
    import torch

    form, classes = form_of(scores, labels), scores.shape[-1] if scores.ndim > 1 else 2
    return _value(_make_metric(metric, form, classes), torch.from_numpy(scores), torch.from_numpy(labels))


def _call(metric: Metric, key: str, scores: NDArray[np.float64], labels: Labels) -> float | None:
    """Return the value of an installed function; None if it is not finite.

    Raises:
        UserError: it fails or returns no number; the distribution is named.
    """
    key = f"{key}.function"
    function, distribution = _registered_function(str(metric.function), key)
    try:
        value = float(function(labels.copy(), scores.copy(), **metric.args))
    except Exception as error:
        reason = f"fails on {len(labels)} labels and scores ({type(error).__name__}: {str(error)[:200]})"
        raise unusable(distribution, reason, key, str(metric.function)) from None
    return value if math.isfinite(value) else None


def _registered_function(name: str, key: str) -> tuple[Callable[..., Any], str]:
    """Return the function of a metric that an installed distribution registers, and the distribution.

    Raises:
        UserError: none registers it, or it is not a function.
    """
    names = registered_names(METRICS)
    if name not in names:
        remedy = nearest(name, names) or f"Install the package that registers it in the entry point group {METRICS}."
        raise UserError(
            "is no metric of an installed package", key=key, value=name, remedy=remedy, code=Code.UNKNOWN_CHOICE
        )
    loaded, distribution = load_registered(METRICS, name, key)
    if not callable(loaded):
        raise unusable(distribution, "is not a function", key, name)
    return loaded, distribution


_PREFIXES = {"binary": "Binary", "multiclass": "Multiclass", "regression": ""}
"""Prefix of the names of torchmetrics' classes, by form of task."""
_EXAMPLES = {
    "binary": "Specificity or AveragePrecision",
    "multiclass": "Specificity or AveragePrecision",
    "regression": "MeanAbsolutePercentageError or KendallRankCorrCoef",
}


@cache
def _metric_classes(form: str) -> dict[str, type[torchmetrics.Metric]]:
    """Return the metrics of torchmetrics for a form of task by the names of their classes."""
    import torchmetrics

    module = torchmetrics.regression if form == "regression" else torchmetrics.classification
    prefix = _PREFIXES[form]
    return {
        name: cls
        for name, cls in vars(module).items()
        if name.startswith(prefix) and isinstance(cls, type) and issubclass(cls, torchmetrics.Metric)
    }


def _metric_class(name: str, form: str) -> type[torchmetrics.Metric] | None:
    """Return the class of this name for a form of task, with any or no prefix of a form; None if there is none."""
    stem = name.removeprefix("Binary").removeprefix("Multiclass")
    return _metric_classes(form).get(_PREFIXES[form] + stem)


def _make_metric(metric: Metric, form: str, classes: int = 2) -> torchmetrics.Metric:
    """Return a new object of the metric's class, which exists, with its arguments.

    An integer is converted where the class takes a float. A score that equals the threshold counts as label 1.
    """
    metric_class = _metric_class(str(metric.torchmetric), form)
    assert metric_class is not None
    parameters = signature(metric_class.__init__).parameters
    floats = {name for name, parameter in parameters.items() if parameter.annotation in (float, "float")}
    arguments = {name: float(x) if name in floats and type(x) is int else x for name, x in metric.args.items()}
    if form == "multiclass" and "num_classes" in parameters:
        arguments = {"num_classes": classes} | arguments
    instance = metric_class(**arguments)
    if form == "binary" and hasattr(instance, "threshold"):
        instance.threshold = math.nextafter(arguments.get("threshold", DEFAULT_THRESHOLD), 0.0)
    return instance


def _value(metric: torchmetrics.Metric, scores: torch.Tensor, labels: torch.Tensor) -> float | None:
    """Return the value of a new metric object; None if it is not a finite number. Its warnings are discarded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that only one label occurs: the data's own warnings say so
        metric.update(scores, labels)
        value = float(metric.compute())
    return value if math.isfinite(value) else None
