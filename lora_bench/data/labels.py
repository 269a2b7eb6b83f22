"""Labels: the values of a label column as class numbers, or as numbers to predict.

A column's format (`LabelFormat`) follows from the settings: classes by name or number, scores with a threshold, or
numbers. Names that the settings do not give are the distinct values of the train split (`infer_names`).
"""

from __future__ import annotations

import math
import re
import reprlib
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

MAX_CLASSES = 1000
"""Largest number of classes that is inferred from a column."""
MIN_ROWS_PER_CLASS = 2
"""Smallest mean number of rows per class that is inferred from a column of more than `FEW_CLASSES` values."""
FEW_CLASSES = 20
MAX_NUMBER = 1e18
"""Largest magnitude of a number to predict, with which squared errors are within the range of float32."""

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 60
_repr.maxlist = 20
_WHOLE_NUMBER = re.compile(r"0|-?[1-9][0-9]{0,17}")
_DECIMAL_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)")
_HIDDEN = (-1, "-1")


class LabelError(Exception):
    """A value of a label column that cannot be read.

    Args:
        reason: what is wrong, as a clause.
        position: of the value in the column; None: the column as a whole.
        remedy: sentences on what to do.
        earlier: position of another value that it contradicts, which the reason ends with.
    """

    def __init__(self, reason: str, position: int | None, remedy: str = "", earlier: int | None = None) -> None:
        super().__init__(reason)
        self.reason, self.position, self.remedy, self.earlier = reason, position, remedy, earlier


def excerpt(value: Any) -> str:
    """Return a value of the user's data as messages print it: escaped and shortened."""
    return _repr.repr(value)


class LabelFormat(ABC):
    """The format of a label column."""

    @abstractmethod
    def read(self, values: Sequence[Any], column: str) -> NDArray[np.int64] | NDArray[np.float64]:
        """Return the labels of the rows: (N,) class numbers from 0, or numbers to predict.

        Args:
            values: N values of the column, as the file's format gives them.
            column: its name, for messages.

        Raises:
            LabelError: a value is not in this format.
        """

    def is_hidden(self, values: Sequence[Any]) -> bool:
        """Return whether all labels are hidden: -1 in every row."""
        return all(type(value) in (str, int) and value in _HIDDEN for value in values)


class _NumericLabels(LabelFormat):
    """A column of numbers."""

    def is_hidden(self, values: Sequence[Any]) -> bool:
        """Return whether all labels are hidden: -1, in any spelling, in every row."""
        return all(to_number(value) == -1 for value in values)


@dataclass(frozen=True)
class ClassLabels(LabelFormat):
    """Classes by name, or by their number from 0; a column holds either names only or numbers only."""

    names: Sequence[str]

    def read(self, values: Sequence[Any], column: str) -> NDArray[np.int64]:
        """Return the class numbers (N,).

        Values are numbers of classes unless all are names, or one is the name of a class that has another number.
        """
        texts = [class_text(value) for value in values]
        distinct = set(texts)
        numbers = {name: number for number, name in enumerate(self.names)}
        by_number = self._by_number()
        is_named = distinct <= numbers.keys() or any(
            number != by_number.get(name) for name, number in numbers.items() if name in distinct
        )
        return self._look_up(values, texts, column, numbers if is_named else by_number)

    def read_numbers(self, values: Sequence[Any], column: str) -> NDArray[np.int64]:
        """Return the class numbers (N,) of a column that is known to hold numbers; arguments and errors as `read`."""
        return self._look_up(values, [class_text(value) for value in values], column, self._by_number())

    def _by_number(self) -> dict[str, int]:
        return {str(number): number for number in range(len(self.names))}

    def _look_up(
        self, values: Sequence[Any], texts: Sequence[str | None], column: str, numbers: dict[str, int]
    ) -> NDArray[np.int64]:
        """Return the class numbers (N,) of the values, given by their texts.

        Raises:
            LabelError: for the first value whose text has none.
        """
        labels = [-1 if text is None else numbers.get(text, -1) for text in texts]
        if -1 in labels:
            self._refuse(values, labels.index(-1), column)
        return np.array(labels, dtype=np.int64)

    def _refuse(self, values: Sequence[Any], bad: int, column: str) -> NoReturn:
        """Raise a `LabelError` for the value at a position, which is none of the classes."""
        two = len(self.names) == 2
        classes = " and ".join(map(excerpt, self.names)) if two else excerpt(list(self.names))
        reason = f"label {excerpt(values[bad])} is none of the {len(self.names)} classes {classes}"
        required = "them" if self._by_number().keys() & {*self.names} else "them, or their numbers from 0,"
        remedy = f"The column that data.label_column={column} names must hold {required} in every row."
        numbers = _distinct_numbers(values)
        if numbers and len(numbers) > 2 and two:
            remedy += (
                " Numbers of more than two values become two classes by data.label_threshold, the least that counts "
                "as the second; data.type=regression predicts the numbers."
            )
        else:
            remedy += " data.label_names gives the names; null takes them from the train split."
        raise LabelError(reason, bad, remedy)


@dataclass(frozen=True)
class DeclaredLabels(ClassLabels):
    """Classes whose numbers in the column follow an order of the names that the source declares (`ClassLabel`)."""

    declared: Sequence[str] = ()
    has_numbers: bool = False
    """Whole numbers in the column are numbers of classes, never names: the column itself is a `ClassLabel`."""

    def read(self, values: Sequence[Any], column: str) -> NDArray[np.int64]:
        """Return the class numbers (N,) in the order of `names`."""
        numbers = np.array([self.names.index(name) for name in self.declared])
        classes = ClassLabels(self.declared)
        by_number = self.has_numbers and all(type(value) is int for value in values)
        return numbers[(classes.read_numbers if by_number else classes.read)(values, column)]


@dataclass(frozen=True)
class ThresholdLabels(_NumericLabels):
    """Scores, of which those from a threshold on are class 1 of two."""

    threshold: float

    def read(self, values: Sequence[Any], column: str) -> NDArray[np.int64]:
        """Return the class numbers (N,): 1 from the threshold on, else 0."""
        remedy = f"data.label_threshold makes classes of numbers, which {column} must hold in every row."
        return (read_numbers(values, remedy) >= self.threshold).astype(np.int64)


class NumberLabels(_NumericLabels):
    """Numbers to predict."""

    def read(self, values: Sequence[Any], column: str) -> NDArray[np.float64]:
        """Return the numbers (N,)."""
        required = f"which {column} must hold in every row; the decimal sign is a point."
        numbers = read_numbers(values, f"data.type=regression predicts numbers, {required}")
        too_large = np.flatnonzero(np.abs(numbers) > MAX_NUMBER)
        if len(too_large):
            position = int(too_large[0])
            reason = f"label {excerpt(values[position])} has a magnitude above {MAX_NUMBER:g}, the largest to predict"
            raise LabelError(reason, position, f"Correct the row, or give {column} in another unit.")
        return numbers


def to_number(value: Any) -> float:
    """Return a number, or a text that is one, as a float; NaN for anything else, booleans included."""
    # float() also reads 1_0, as 10, and the digits of every script.
    is_plain = type(value) is str and value.isascii() and "_" not in value
    if is_plain or type(value) in (int, float, Decimal):
        with suppress(ValueError, OverflowError):
            return float(value)
    return math.nan


def read_numbers(values: Sequence[Any], remedy: str) -> NDArray[np.float64]:
    """Return values as finite numbers, (N,); texts are converted, booleans are no numbers.

    Raises:
        LabelError: a value is not one, with this remedy.
    """
    numbers = np.array([to_number(value) for value in values], dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(numbers))
    if len(bad):
        raise LabelError(f"label {excerpt(values[bad[0]])} is not a finite number", int(bad[0]), remedy)
    return numbers


def infer_names(values: Sequence[Any], column: str) -> list[str]:
    """Return the classes of a column: its distinct values, whole numbers by size and texts alphabetically.

    Args:
        values: the column of the train split.
        column: its name, for messages.

    Raises:
        LabelError: a value is no class (a null, an empty text, a number with a decimal point), a number is spelled in
            two ways, there is one class only, or there are so many that the column is probably another one.
    """
    first_position: dict[str, int] = {}
    for i, value in enumerate(values):
        text = class_text(value)
        if text is None or not text:
            raise LabelError(f"label {excerpt(value)} is no class", i, _no_class_remedy(value, column))
        first_position.setdefault(text, i)
    _check_spellings(first_position)
    names = sorted(first_position)
    if all(map(_WHOLE_NUMBER.fullmatch, names)):
        names.sort(key=int)
    elif (numbers := _distinct_numbers(names)) and len(numbers) == len(names):
        reason = f"label {excerpt(names[0])} is a number with a decimal point, and so are others"
        remedy = f"data.type=regression predicts numbers; data.label_threshold={numbers[-1]:g} makes two classes."
        raise LabelError(reason, None, remedy)
    if len(names) == 1:
        reason = f"all {len(values):,} labels of train are {excerpt(names[0])}, and a task has at least two classes"
        raise LabelError(reason, None, f"data.label_column={column} must name the column of the classes.")
    few_rows = len(names) > FEW_CLASSES and len(values) < MIN_ROWS_PER_CLASS * len(names)
    if few_rows or len(names) > MAX_CLASSES:
        examples = ", ".join(excerpt(name) for name in names[:3])
        reason = f"holds {len(names):,} different values in {len(values):,} rows ({examples}, …), too many for classes"
        remedy = (
            "Name the column of the classes; if it is this one, list the classes in data.label_names, "
            "and if its numbers are to be predicted, give data.type=regression."
        )
        raise LabelError(reason, None, remedy)
    return names


def _check_spellings(first_position: Mapping[str, int]) -> None:
    """Raise a `LabelError` if two names are one number, such as 1 and 1.0.

    Args:
        first_position: of each name in the column, ascending.
    """
    names: dict[Decimal, str] = {}
    for name, position in first_position.items():
        if not _DECIMAL_NUMBER.fullmatch(name):
            continue
        number = Decimal(name)  # exact, where a float would take long identifiers for the same number
        if number in names:
            remedy = "Write the number alike in every row, or list all classes in data.label_names if the two differ."
            if _distinct_numbers([*first_position]):
                remedy += " If the numbers are to be predicted, give data.type=regression."
            earlier = names[number]
            reason = f"label {excerpt(name)} is the same number as label {excerpt(earlier)}"
            raise LabelError(reason, position, remedy, first_position[earlier])
        names[number] = name


def similar_names(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return pairs of class names that differ in case or white space only."""
    first: dict[str, str] = {}
    pairs = []
    for name in names:
        key = " ".join(name.casefold().split())
        if key in first:
            pairs.append((first[key], name))
        first.setdefault(key, name)
    return pairs


def class_text(value: Any) -> str | None:
    """Return a value of a label column as the name of a class; None for what is no class.

    Texts stay, whole numbers become their digits, and booleans `true` or `false`.
    """
    if type(value) is str:
        return value
    if type(value) is bool:
        return "true" if value else "false"
    return str(value) if type(value) is int and abs(value) < 10**18 else None


def _no_class_remedy(value: Any, column: str) -> str:
    if type(value) is float and math.isfinite(value):
        return f"data.type=regression predicts numbers; classes in {column} are texts, whole numbers, true or false."
    return f"{column} must hold a text, a whole number, true or false in every row."


def _distinct_numbers(values: Sequence[Any]) -> list[float]:
    """Return the distinct numbers of a column of numbers, ascending; empty if one of its values is no number."""
    numbers = {to_number(value) for value in values[:10_000] if type(value) in (str, int, float, bool)}
    if any(map(math.isnan, numbers)):
        return []
    return sorted(number for number in numbers if math.isfinite(number) and number != -1)
