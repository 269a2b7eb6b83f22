"""`predictions=FILE`: answers that somebody else obtained, as P(label 1) for each example of a split."""

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
    """The score of each example, in their order; None where the file has no answer (an empty cell, null).

    Args:
        path: .tsv, .csv, .jsonl or .parquet with a column `id`, the row in the split from 0, and a column `score`,
            P(label 1), or, without it, `label`, the label that was predicted.
        examples: what the answers are about.

    Raises:
        UserError: an id is missing, given twice or unknown, or a value is none; file and row are named.
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
    known = {int(each): place for place, each in enumerate(examples.ids)}
    scores: dict[int, float | None] = {}
    for row, given, said in zip(table.rows, table.column("id"), table.column(value), strict=True):
        number = _number(given)
        place = known.get(int(number)) if number is not None and number.is_integer() else None
        if place is None:
            remedy = f"Ids are the rows of the split, {min(known)} to {max(known)}."
            raise UserError(
                f"id {str(given)[:60]!r} is none of the split's",
                file=path,
                row=row,
                remedy=remedy,
                code=Code.INVALID_DATA,
            )
        if place in scores:
            raise UserError(f"id {int(number or 0)} is given twice", file=path, row=row, code=Code.INVALID_DATA)
        scores[place] = None if said is None or said == "" else _score(said, value, path, row)
    missing = [int(examples.ids[place]) for place in range(len(examples)) if place not in scores]
    if missing:
        shown = ", ".join(map(str, missing[:5])) + (", …" if len(missing) > 5 else "")
        remedy = "Give a row for each; an empty cell counts as a wrong answer."
        raise UserError(
            f"lacks {len(missing)} of {len(examples)} ids: {shown}", file=path, remedy=remedy, code=Code.INVALID_DATA
        )
    return [scores[place] for place in range(len(examples))]


def _score(said: Any, column: str, path: str, row: int) -> float:
    number = _number(said)
    if number is None or not 0 <= number <= 1 or (column == "label" and number not in (0, 1)):
        allowed = "a number from 0 to 1" if column == "score" else "0 or 1"
        raise UserError(f"{column} {str(said)[:60]!r} is not {allowed}", file=path, row=row, code=Code.INVALID_DATA)
    return number


def _number(value: Any) -> float | None:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def fill_missing(scores: list[float | None], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Scores as they are recorded, (N,): where there is no answer, certainty of the label that it is not."""
    filled = [1.0 - label if score is None else score for score, label in zip(scores, labels.tolist(), strict=True)]
    return np.array(filled, dtype=np.float64)
