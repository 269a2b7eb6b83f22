"""Where labelled texts come from (hub, local files, generator), and how train is cut into train and selection."""

from __future__ import annotations

import os
from itertools import chain, combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_bench.config.schema import Data, FileData, HubData, ToyData
from lora_bench.data import readers, toy
from lora_bench.data.readers import Table
from lora_bench.errors import Code, UserError
from lora_bench.files import hub

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from lora_bench.data.examples import Examples

SPLITS = ("train", "validation", "test")
_NULLS = frozenset({"NA", "N/A", "NaN", "nan", "null", "NULL", "None", "none"})


def load(data: Data) -> dict[str, Examples]:
    """The splits that the source has, among train, validation and test.

    Raises:
        UserError: the source cannot be reached, is absent, or holds something other than texts and labels 0 and 1.
    """
    match data:
        case HubData():
            return _from_hub(data)
        case FileData():
            return _from_files(data)
        case ToyData():
            sizes = {"train": data.train_rows, "validation": data.validation_rows}
            return {split: toy.generate(rows, data.generator_seed, split) for split, rows in sizes.items()}
    raise TypeError(type(data).__name__)


def _from_files(data: FileData) -> dict[str, Examples]:
    if os.path.isdir(data.path):
        paths = readers.split_files(data.path)
    elif os.path.isfile(data.path):
        paths = {"test": data.path}
    else:
        is_odd = os.path.lexists(data.path)
        reason = "is neither a folder nor a file" if is_odd else "does not exist"
        code = Code.NOT_A_FILE if is_odd else Code.NOT_FOUND
        remedy = "Give a folder with train, validation and test files, or one file."
        raise UserError(reason, key="data.path", value=data.path, remedy=remedy, code=code)
    return {
        split: readers.read_table(path).examples(
            data.text_columns,
            data.label_column,
            labels_may_hide=split == "test",
            threshold=data.label_threshold,
            label_names=data.label_names,
        )
        for split, path in paths.items()
    }


def _from_hub(data: HubData) -> dict[str, Examples]:
    import datasets  # late: seconds
    import huggingface_hub

    datasets.disable_progress_bars()
    huggingface_hub.utils.disable_progress_bars()  # type: ignore[attr-defined]
    if not hub.is_reachable():
        datasets.config.HF_HUB_OFFLINE = True
    name = data.hub_id if data.hub_config is None else f"{data.hub_id}/{data.hub_config}"
    try:
        splits = datasets.load_dataset(data.hub_id, data.hub_config, revision=data.revision)
    except Exception as error:  # a dozen unrelated types
        reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
        remedy = (
            "Without network use local files (data=pairs data.path=DIR) or the generator (data=toy); "
            "with network check the name and the revision."
        )
        reason = f"{name} cannot be loaded from the hub: {reason}"
        raise UserError(reason, key="data.hub_id", value=data.hub_id, remedy=remedy, code=Code.NOT_FOUND) from None
    found = {split: splits[split] for split in SPLITS if split in splits}
    if not found:
        raise UserError(
            f"{name} has none of the splits {', '.join(SPLITS)}",
            key="data.hub_id",
            value=data.hub_id,
            code=Code.NOT_FOUND,
        )
    return {
        split: Table(
            source=f"{name} {split}",
            names=rows.column_names,
            column=lambda column, rows=rows: rows[column][:],  # type: ignore[misc]
            rows=range(1, len(rows) + 1),
        ).examples(
            data.text_columns,
            data.label_column,
            labels_may_hide=True,
            threshold=data.label_threshold,
            label_names=data.label_names,
        )
        for split, rows in found.items()
    }


def reported(splits: dict[str, Examples]) -> dict[str, Examples]:
    """The splits that figures are reported on: every labelled one but train."""
    return {name: split for name, split in splits.items() if name != "train" and split.labels is not None}


def carve(train: Examples, data: Data) -> tuple[Examples, Examples]:
    """Set a selection split aside; then cut train to size, each with the share of each label that all rows have.

    Both depend on `split_seed` alone: the selection split is the same for every `train_size`, and a smaller train is a
    prefix of a larger one.

    Returns:
        (train, selection): `train_size` rows (null: all that are left), and `selection_size` rows; of each label as
        many as its share, to within one.

    Raises:
        UserError: train has no labels, or too few rows for the sizes asked for.
    """
    if train.labels is None:
        raise UserError("train has no labels", key="data.label_column", value=data.label_column, code=Code.INVALID_DATA)
    size = round(data.selection_size * len(train)) if data.selection_size < 1 else int(data.selection_size)
    if not 0 < size < len(train):
        raise UserError(
            f"sets {size} of {len(train)} rows aside",
            key="data.selection_size",
            value=data.selection_size,
            remedy="Selection and train need at least one row each.",
            code=Code.INVALID_VALUE,
        )
    # numpy promises the raw stream of PCG64 for ever, but not that of `permutation`.
    order = np.argsort(np.random.PCG64(data.split_seed).random_raw(len(train)), kind="stable")
    order = order[np.argsort(_depths(train.labels[order]), kind="stable")]
    chosen, left = order[:size], order[size:]
    wanted = len(left) if data.train_size is None else data.train_size
    if wanted > len(left):
        raise UserError(
            f"is more than the {len(left)} rows that the selection split leaves",
            key="data.train_size",
            value=wanted,
            remedy=f"Give at most {len(left)}, or a smaller data.selection_size.",
            code=Code.INVALID_VALUE,
        )
    return train.take(left[:wanted]), train.take(chosen)


def _depths(labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """(N,) how far down its label's rows each row stands: in this order every stretch has each label's share."""
    depths = np.empty(len(labels))
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        depths[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
    return depths


def examine(splits: dict[str, Examples]) -> dict[str, Any]:
    """What the run's record says about its data.

    Returns:
        `rows`, `positives` (None without labels), `empty_texts` (nothing but white space), `null_texts` (`NA`, `null`,
        … kept as text) and `repeated` (rows whose texts stood in an earlier row), each by split; `shared` by pair of
        splits (`train/validation`: rows of the second whose texts are in the first); and `warnings`, sentences.
        Texts of a pair count as the same in either order.
    """
    pairs = {split: _unordered(examples.texts) for split, examples in splits.items()}
    distinct = {split: set(keys) for split, keys in pairs.items()}
    found: dict[str, dict[str, Any]] = {
        "rows": {split: len(examples) for split, examples in splits.items()},
        "positives": {
            split: None if examples.labels is None else int(examples.labels.sum()) for split, examples in splits.items()
        },
        "empty_texts": {split: _count(examples, lambda text: not text.strip()) for split, examples in splits.items()},
        "null_texts": {split: _count(examples, _NULLS.__contains__) for split, examples in splits.items()},
        "repeated": {split: len(keys) - len(distinct[split]) for split, keys in pairs.items()},
        "shared": {
            f"{one}/{other}": sum(key in distinct[one] for key in pairs[other]) for one, other in combinations(pairs, 2)
        },
    }
    warnings = [
        f"{split}: all {found['rows'][split]} rows have label {int(positives > 0)}."
        for split, positives in found["positives"].items()
        if positives in (0, found["rows"][split])
    ]
    says = {
        "empty_texts": "empty texts",
        "null_texts": "texts such as NA or null, kept as text",
        "repeated": "rows repeat another (in either order of the texts)",
        "shared": "rows of the second are in the first too (in either order of the texts)",
    }
    warnings += [
        f"{place}: {count} {what}." for kind, what in says.items() for place, count in found[kind].items() if count
    ]
    return {**found, "warnings": warnings}


def describe(data: Data, splits: dict[str, Examples]) -> dict[str, Any]:
    """What every record says of its data: where they are from, what they are, and what is notable of them."""
    fingerprint = {name: split.fingerprint() for name, split in splits.items()}
    return {"source": data.source, "fingerprint": fingerprint, **examine(splits)}


def unseen(examples: Examples, *seen: Examples) -> NDArray[np.bool_]:
    """(N,) whether none of a row's texts stands in any column of the examples that were seen."""
    known = {text for each in seen for column in each.texts for text in column}
    rows = [not known.intersection(texts) for texts in zip(*examples.texts, strict=True)]
    return np.array(rows, dtype=np.bool_)


def _unordered(texts: tuple[list[str], ...]) -> list[int]:
    """A hash for each row that does not depend on the order of its texts."""
    if len(texts) == 1:
        return [hash(text) for text in texts[0]]
    return [hash((one, other) if one <= other else (other, one)) for one, other in zip(*texts, strict=True)]


def _count(examples: Examples, is_such: Callable[[str], bool]) -> int:
    return sum(map(is_such, chain.from_iterable(examples.texts)))
