"""Predictions of another program, `predictions=FILE`: P(label 1) of each example of a split."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_bench.data.readers import read_table
from lora_bench.errors import Code, UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora_bench.data.examples import Examples


def read_predictions(path: str, examples: Examples) -> list[float | None]:
    """Return the score of each example in their order; None where the file has an empty cell or null.

    Args:
        path: .tsv, .csv, .jsonl or .parquet, its rows in any order, with a column `id`, the row in the split from 0,
            and a column `score`, P(label 1), or, without it, `label`, the predicted label.
        examples: the split that was predicted.

    Raises:
        UserError: the file cannot be read, a column or an id is missing, an id is repeated or unknown, or a value is
            not a score; it names file and row.
    """
    table = read_table(path)
    value = next((name for name in ("score", "label") if name in table.names), None)
    if "id" not in table.names or value is None:
        remedy = "It needs id (the row in the split, from 0) and score (P(label 1)) or label (the predicted one)."
        raise UserError(
            f"has the columns {', '.join(map(str, table.names))[:200]}",
            file=path,
            remedy=remedy,
            code=Code.INVALID_DATA,
        )
    index_of = {int(identifier): index for index, identifier in enumerate(examples.ids)}
    scores: dict[int, float | None] = {}
    for row, identifier, answer in zip(table.rows, table.column("id"), table.column(value), strict=True):
        number = _number(identifier)
        index = index_of.get(int(number)) if number is not None and number.is_integer() else None
        if index is None:
            remedy = f"Ids are the rows of the split, {min(index_of)} to {max(index_of)}."
            raise UserError(
                f"id {str(identifier)[:60]!r} is not in the split",
                file=path,
                row=row,
                remedy=remedy,
                code=Code.INVALID_DATA,
            )
        if index in scores:
            raise UserError(f"id {int(number or 0)} is there twice", file=path, row=row, code=Code.INVALID_DATA)
        scores[index] = None if answer is None or answer == "" else _score(answer, value, path, row)
    missing = [int(examples.ids[index]) for index in range(len(examples)) if index not in scores]
    if missing:
        first_ids = ", ".join(map(str, missing[:5])) + (", …" if len(missing) > 5 else "")
        remedy = "Give a row for each; an empty cell counts as a wrong answer."
        raise UserError(
            f"{len(missing)} of {len(examples)} ids are missing: {first_ids}",
            file=path,
            remedy=remedy,
            code=Code.INVALID_DATA,
        )
    return [scores[index] for index in range(len(examples))]


def _score(answer: Any, column: str, path: str, row: int) -> float:
    """Return an answer as P(label 1): a number from 0 to 1, or, in the column `label`, 0 or 1.

    Raises:
        UserError: it is something else; file and row are named.
    """
    number = _number(answer)
    if number is None or not 0 <= number <= 1 or (column == "label" and number not in (0, 1)):
        allowed = "a number from 0 to 1" if column == "score" else "0 or 1"
        raise UserError(f"{column} {str(answer)[:60]!r} is not {allowed}", file=path, row=row, code=Code.INVALID_DATA)
    return number


def _number(value: Any) -> float | None:
    """Return a number, or a text that is one, as a float; None for truth values, NaN, infinity and anything else."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def fill_missing(scores: list[float | None], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return (N,) scores with each missing one replaced by 1 - label, the score of the wrong label with certainty."""
    filled = [1.0 - label if score is None else score for score, label in zip(scores, labels.tolist(), strict=True)]
    return np.array(filled, dtype=np.float64)
