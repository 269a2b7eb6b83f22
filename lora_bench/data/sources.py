"""Sources of labelled texts (hub, local files, generator), and the split of train into train and selection."""

from __future__ import annotations

import os
from itertools import chain, combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_bench.config.schema import SPLITS, Data, FileData, HubData, ToyData
from lora_bench.data import readers, toy
from lora_bench.data.readers import Table
from lora_bench.errors import Code, UserError
from lora_bench.files import hub

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from lora_bench.data.examples import Examples

_NULLS = frozenset({"NA", "N/A", "NaN", "nan", "null", "NULL", "None", "none"})


def load(data: Data) -> dict[str, Examples]:
    """Load those of the splits train, validation and test that the source has.

    A single local file is the test split; generated data have no test split. `labels` is None where the source hides
    them, which local files may do in the test split only.

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
    """Return the splits of a local folder, or a local file as the test split; in the test split, labels may be hidden.

    Raises:
        UserError: the path does not exist or has no split, or a file is not exactly in its format.
    """
    if os.path.isdir(data.path):
        paths = readers.find_split_files(data.path)
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
    """Return those of the three splits that a data set of the hub has, downloaded or from its local cache.

    `data.splits` may give them other names on the hub. In each split, labels may be hidden. Progress bars of the hub's
    libraries are off from then on, and so is the network if the hub does not answer.

    Raises:
        UserError: it cannot be loaded, lacks the splits, or a value is neither a text nor a label 0 or 1.
    """
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
    names = data.splits or {split: split for split in SPLITS if split in splits}
    missing = sorted(set(names.values()) - set(splits))
    if missing or not names:
        raise UserError(
            f"{name} has no split {', '.join(missing)}"
            if missing
            else f"{name} has none of the splits {', '.join(SPLITS)}",
            key="data.splits" if data.splits else "data.hub_id",
            value=data.splits or data.hub_id,
            remedy=f"It has {', '.join(splits)}. Name those to use, as data.splits={{train: NAME, validation: NAME}}.",
            code=Code.NOT_FOUND,
        )
    return {
        split: _labelled_table(splits[hub_split], f"{name} {hub_split}", data.label_column).examples(
            data.text_columns,
            data.label_column,
            labels_may_hide=True,
            threshold=data.label_threshold,
            label_names=data.label_names,
        )
        for split, hub_split in names.items()
    }


def _labelled_table(rows: Any, source: str, label_column: str) -> Table:
    """Return the rows of a split of the hub, without those that the hub marks as unlabelled in a column of classes.

    Their label is -1, as in SNLI where the annotators have no majority. If every label is -1, the labels are hidden,
    and all rows stay.

    Args:
        rows: a `datasets.Dataset`.
        source: its name in messages.
        label_column: the column of the labels; it may be missing.
    """
    import datasets

    kept = list(range(len(rows)))
    if isinstance(rows.features.get(label_column), datasets.ClassLabel):
        labelled = np.flatnonzero(np.array(rows[label_column][:]) != -1)
        if 0 < len(labelled) < len(rows):
            rows, kept = rows.select(labelled), labelled.tolist()
    return Table(
        source=source, names=rows.column_names, column=lambda column: rows[column][:], rows=[row + 1 for row in kept]
    )


def reported_splits(splits: dict[str, Examples]) -> dict[str, Examples]:
    """Return the splits on which metrics are reported: every labelled split except train."""
    return {name: split for name, split in splits.items() if name != "train" and split.labels is not None}


def split_selection(train: Examples, data: Data) -> tuple[Examples, Examples]:
    """Split train into a smaller train and a selection split, both stratified by label.

    Both depend on `split_seed` alone: the selection split is the same for every `train_size`, and a smaller train is a
    prefix of a larger one.

    Returns:
        (train, selection): `train_size` rows (null: all remaining ones) and `selection_size` rows (below 1: that share
        of all rows). The number of rows of each label is its share, to within one. Rows are shuffled, their ids kept.

    Raises:
        UserError: train has no labels, or too few rows for the requested sizes.
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
    chosen, remaining = order[:size], order[size:]
    train_size = len(remaining) if data.train_size is None else data.train_size
    if train_size > len(remaining):
        raise UserError(
            f"is more than the {len(remaining)} rows that the selection split leaves",
            key="data.train_size",
            value=train_size,
            remedy=f"Give at most {len(remaining)}, or a smaller data.selection_size.",
            code=Code.INVALID_VALUE,
        )
    return train.take(remaining[:train_size]), train.take(chosen)


def _depths(labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return (N,) the relative rank in (0, 1) of each row among the rows of its label.

    Sorted by it, every stretch of rows has each label in proportion.
    """
    depths = np.empty(len(labels))
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        depths[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
    return depths


def inspect_splits(splits: dict[str, Examples]) -> dict[str, Any]:
    """Return statistics of the splits, and warnings about them, for the run's record.

    Returns:
        `rows`, `positives` (None without labels), `empty_texts` (nothing but white space), `null_texts` (`NA`, `null`,
        … kept as text) and `repeated` (rows whose texts stood in an earlier row), each by split; `shared` by pair of
        splits (`train/validation`: rows of the second whose texts are in the first); and `warnings`: a sentence for
        each split whose labels are all equal, and for each of the last four numbers that is not 0. Texts, not rows, are
        counted in `empty_texts` and `null_texts`. Texts of a pair count as the same in either order.
    """
    pairs = {split: _unordered(examples.texts) for split, examples in splits.items()}
    distinct = {split: set(keys) for split, keys in pairs.items()}
    statistics: dict[str, dict[str, Any]] = {
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
        f"{split}: all {statistics['rows'][split]} rows have label {int(positives > 0)}."
        for split, positives in statistics["positives"].items()
        if positives in (0, statistics["rows"][split])
    ]
    descriptions = {
        "empty_texts": "empty texts",
        "null_texts": "texts such as NA or null, kept as text",
        "repeated": "rows repeat another (in either order of the texts)",
        "shared": "rows of the second are in the first too (in either order of the texts)",
    }
    warnings += [
        f"{split}: {count} {description}."
        for name, description in descriptions.items()
        for split, count in statistics[name].items()
        if count
    ]
    return {**statistics, "warnings": warnings}


def describe_data(data: Data, splits: dict[str, Examples]) -> dict[str, Any]:
    """Return the `data` entry of a run's record: source, SHA-256 of each split, and the keys of `inspect_splits`."""
    fingerprint = {name: split.fingerprint() for name, split in splits.items()}
    return {"source": data.source, "fingerprint": fingerprint, **inspect_splits(splits)}


def unseen_rows(examples: Examples, *seen: Examples) -> NDArray[np.bool_]:
    """Return (N,) True for rows none of whose texts occurs in any column of the examples `seen`."""
    seen_texts = {text for split in seen for column in split.texts for text in column}
    rows = [not seen_texts.intersection(texts) for texts in zip(*examples.texts, strict=True)]
    return np.array(rows, dtype=np.bool_)


def _unordered(texts: tuple[list[str], ...]) -> list[int]:
    """Return a hash of each row, of one or two texts, that does not depend on their order.

    Another process gives other hashes.
    """
    if len(texts) == 1:
        return [hash(text) for text in texts[0]]
    return [hash((one, other) if one <= other else (other, one)) for one, other in zip(*texts, strict=True)]


def _count(examples: Examples, is_such: Callable[[str], bool]) -> int:
    return sum(map(is_such, chain.from_iterable(examples.texts)))
