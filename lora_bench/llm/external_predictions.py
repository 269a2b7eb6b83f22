"""Predictions of another program, `predictions=FILE`: a score, probabilities or a class of each example of a split."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from lora_bench.config.metric_names import SUM_TOLERANCE
from lora_bench.data.labelled import probability_columns
from lora_bench.data.labels import ClassLabels, LabelError, to_number
from lora_bench.data.readers import read_table
from lora_bench.errors import Code, UserError
from lora_bench.files import untrusted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from lora_bench.config.schema import Data
    from lora_bench.data.examples import Examples
    from lora_bench.data.readers import Table

    Scores: TypeAlias = float | Sequence[float]
    """P(label 1) or a number; of three or more classes a probability of each, (C,)."""


def read_predictions(path: str, examples: Examples, data: Data) -> list[Scores | None]:
    """Return the score or probabilities of each example in their order; None where the file has an empty cell or null.

    Args:
        path: .tsv, .csv, .jsonl or .parquet, its rows in any order, with a column `id`, the row in the split from 0. Of
            two classes it has a column `score`, P(label 1); of more a column `probabilities`, a list of one for each
            class, or the columns of `lora-bench predict probabilities=true`. Without them a column `label` has the name
            or the number of the predicted class. A regression has a column `score` or `prediction`.
        examples: the split that was predicted.
        data: the settings, with the names of the classes.

    Raises:
        UserError: the file cannot be read, a column or an id is missing, an id is repeated or unknown, or a value is
            not a score; it names file and row.
    """
    table = read_table(path)
    answers = _answers(table, data)
    index_of = {int(identifier): index for index, identifier in enumerate(examples.ids)}
    scores: dict[int, Scores | None] = {}
    for row, identifier, answer in zip(table.rows, table.column("id"), answers, strict=True):
        number = _number(identifier)
        index = index_of.get(int(number)) if number is not None and number.is_integer() else None
        if index is None:
            remedy = f"Ids are the rows of the split, {min(index_of)} to {max(index_of)}."
            raise _error(f"id {str(identifier)[:60]!r} is not in the split", table, row, remedy)
        if index in scores:
            raise _error(f"id {int(number or 0)} is there twice", table, row)
        scores[index] = answer
    missing = [int(examples.ids[index]) for index in range(len(examples)) if index not in scores]
    if missing:
        first_ids = ", ".join(map(str, missing[:5])) + (", …" if len(missing) > 5 else "")
        remedy = "Give a row for each; an empty cell counts as a wrong answer."
        raise _error(f"{len(missing)} of {len(examples)} ids are missing: {first_ids}", table, None, remedy)
    return [scores[index] for index in range(len(examples))]


def _answers(table: Table, data: Data) -> list[Scores | None]:
    """Return the answer of each row; None where it is missing.

    Raises:
        UserError: `id`, or every column that could hold the answers, is missing, or a value is not an answer.
    """
    form, names = data.form, data.label_names or []
    by_class = probability_columns(names)
    column = next((name for name in _COLUMNS[form] if name in table.names), None)
    has_each = form == "multiclass" and "probabilities" not in table.names and set(by_class) <= {*table.names}
    if "id" not in table.names or (column is None and not has_each):
        remedy = f"It needs id (the row in the split, from 0) and {_NEEDED[form].format(len(names))}."
        raise _error(f"has the columns {', '.join(map(str, table.names))[:200]}", table, None, remedy)
    if has_each:
        rows = zip(*(table.column(name) for name in by_class), strict=True)
        return [_probabilities(values, len(names), table, row) for row, values in zip(table.rows, rows, strict=True)]
    assert column is not None
    values = table.column(column)
    if column == "probabilities":
        lists = map(_parse_list, values)
        return [_probabilities(each, len(names), table, row) for row, each in zip(table.rows, lists, strict=True)]
    if column in ("label", "predicted_label"):
        return _classes(values, names, table, column)
    return [_score(value, column, form, table, row) for row, value in zip(table.rows, values, strict=True)]


_COLUMNS = {
    "binary": ("score", "label"),
    "multiclass": ("probabilities", "predicted_label", "label"),
    "regression": ("prediction", "score"),
}
"""Columns that hold the answers, by form of task; the first one that there is counts."""
_NEEDED = {
    "binary": "score (P(label 1)) or label (the predicted one)",
    "multiclass": "label (the predicted class) or probabilities (a list of {})",
    "regression": "score (the predicted number)",
}


def _score(value: Any, column: str, form: str, table: Table, row: int) -> float | None:
    """Return an answer as P(label 1), a number from 0 to 1, or, for regression, as any number; None if it is missing.

    Raises:
        UserError: it is something else; file and row are named.
    """
    if _is_missing(value):
        return None
    number = _number(value)
    if number is None or not (form == "regression" or 0 <= number <= 1):
        allowed = "a finite number" if form == "regression" else "a number from 0 to 1"
        raise _error(f"{column} {str(value)[:60]!r} is not {allowed}", table, row)
    return number


def _classes(values: Sequence[Any], names: Sequence[str], table: Table, column: str) -> list[Scores | None]:
    """Return answers that are names or numbers of classes as probabilities of 0 and 1; None where one is missing.

    Raises:
        UserError: a value is no class; file and row are named.
    """
    positions = [i for i, value in enumerate(values) if not _is_missing(value)]
    try:
        labels = ClassLabels(names).read([_whole(values[i]) for i in positions], column)
    except LabelError as error:
        row = table.rows[positions[error.position or 0]]
        remedy = f"{column} has the name of a class, or its number from 0 to {len(names) - 1}."
        raise _error(error.reason, table, row, remedy) from None
    answers: list[Scores | None] = [None] * len(values)
    for i, label in zip(positions, labels.tolist(), strict=True):
        answers[i] = float(label) if len(names) == 2 else np.eye(len(names))[label].tolist()
    return answers


def _probabilities(values: Any, classes: int, table: Table, row: int) -> list[float] | None:
    """Return an answer as a probability for each class; None if it is missing.

    Raises:
        UserError: it is not a list of as many numbers from 0 to 1 whose sum is 1; file and row are named.
    """
    if _is_missing(values) or (isinstance(values, tuple) and all(map(_is_missing, values))):
        return None
    numbers = [_number(value) for value in values] if isinstance(values, list | tuple) else []
    known = [number for number in numbers if number is not None and 0 <= number <= 1]
    if len(numbers) != classes or len(known) != classes or abs(sum(known) - 1) > SUM_TOLERANCE:
        reason = f"probabilities {str(values)[:60]!r} are not {classes} numbers from 0 to 1 whose sum is 1"
        raise _error(reason, table, row)
    return known


def _parse_list(value: Any) -> Any:
    """Return the value of a JSON text, as TSV and CSV hold a list; other values, and texts that are none, unchanged."""
    if isinstance(value, str):
        with suppress(ValueError):
            return untrusted.parse_json(value)
    return value


def _whole(value: Any) -> Any:
    """Return a whole number with a decimal point, such as 1.0, as an integer; other values unchanged."""
    is_decimal = isinstance(value, float) or (isinstance(value, str) and "." in value)
    number = _number(value) if is_decimal else None
    return int(number) if number is not None and number.is_integer() else value


def _is_missing(value: Any) -> bool:
    return value is None or value == ""


def _number(value: Any) -> float | None:
    """Return a number, or a text that is one, as a float; None for truth values, NaN, infinity and anything else."""
    number = to_number(value)
    return number if math.isfinite(number) else None


def _error(reason: str, table: Table, row: int | None, remedy: str = "") -> UserError:
    return UserError(reason, file=table.source, row=row, remedy=remedy, code=Code.INVALID_DATA)


def fill_missing(
    scores: Sequence[Scores | None], labels: NDArray[Any], classes: int, train: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """Return scores with each missing one replaced, as `evaluation.metrics.score` takes them: (N,) or (N, C).

    Of classes it is replaced by a wrong one with certainty: the next one, after the last the first. A missing number is
    replaced by the mean of train; without train by the mean of the numbers that are there, or 0.

    Args:
        scores: N of them.
        labels: (N,) class numbers, or numbers.
        classes: number of classes C; 1 for regression.
        train: numbers of the train split, for regression.
    """
    if classes == 1:
        known = np.array([score for score in scores if score is not None], dtype=np.float64)
        numbers = known if train is None else train
        mean = float(numbers.mean()) if len(numbers) else 0.0
        return np.array([mean if score is None else score for score in scores], dtype=np.float64)
    if classes == 2:
        filled: list[Any] = [
            1.0 - y if score is None else score for score, y in zip(scores, labels.tolist(), strict=True)
        ]
    else:
        wrong = np.eye(classes)[(labels + 1) % classes]
        filled = [wrong[i] if score is None else score for i, score in enumerate(scores)]
    return np.array(filled, dtype=np.float64)
