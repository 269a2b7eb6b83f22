"""Sources of labelled texts (hub, local files, generator), and the split of train into train and selection."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import chain, combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_bench.config.schema import SPLITS, Data, FileData, HubData, ToyData
from lora_bench.data import readers, toy
from lora_bench.data.labels import (
    ClassLabels,
    DeclaredLabels,
    LabelFormat,
    NumberLabels,
    ThresholdLabels,
    class_text,
    excerpt,
    similar_names,
)
from lora_bench.data.readers import Table
from lora_bench.errors import Code, UserError, require_one_of
from lora_bench.files import hub

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from lora_bench.data.examples import Examples

_NULLS = frozenset({"NA", "N/A", "NaN", "nan", "null", "NULL", "None", "none"})


def load(data: Data) -> tuple[Data, dict[str, Examples]]:
    """Load those of the splits train, validation and test that the source has.

    A single local file is the test split; generated data have no test split. `labels` is None where the source hides
    them, which local files may do in the test split only.

    Returns:
        The settings with the names of the classes, and the splits. The names are `data.label_names`, or those that the
        source declares, or the distinct labels of train (of the first split, if there is no train). The class of
        `data.positive_label` is the second of two.

    Raises:
        UserError: the source cannot be reached, is absent, or holds something other than texts and labels of the task.
    """
    if isinstance(data, ToyData):
        sizes = {"train": data.train_rows, "validation": data.validation_rows}
        splits = {split: toy.generate(rows, data.generator_seed, split) for split, rows in sizes.items()}
        return _with_positive_last(data, data.label_names or ["0", "1"], splits)
    return _read_tables(data, _tables(data))


def _tables(data: Data) -> dict[str, Table]:
    """Return the files or the hub's splits, by split; nothing is checked. Generated data have none."""
    match data:
        case HubData():
            return _hub_tables(data)
        case FileData():
            return _file_tables(data)
        case ToyData():
            return {}
    raise TypeError(type(data).__name__)


def _read_tables(data: Data, tables: dict[str, Table]) -> tuple[Data, dict[str, Examples]]:
    """Return settings and splits as `load` does, from the tables of the source."""
    from_hub = isinstance(data, HubData)
    first = _first_table(tables)
    names = data.label_names
    if data.type == "classification" and names is None:
        names = ["0", "1"] if data.label_threshold is not None else first.class_names(data.label_column)
    splits = {
        split: table.examples(
            data.text_columns,
            data.label_column,
            _label_format(data, names, table, first),
            labels_may_hide=from_hub or split == "test",
        )
        for split, table in tables.items()
    }
    return _with_positive_last(data, names, splits)


def _first_table(tables: dict[str, Table]) -> Table:
    """Return the table that names the classes: train, or the first one if there is no train."""
    return tables.get("train") or next(iter(tables.values()))


def _label_format(data: Data, names: Sequence[str] | None, table: Table, first: Table) -> LabelFormat:
    """Return the format of the label column of a table.

    Args:
        data: the settings.
        names: of the classes; None for regression.
        table: to read; if it declares no names of classes, numbers follow those of `first`.
        first: the table that names the classes.
    """
    if data.type == "regression":
        return NumberLabels()
    if data.label_threshold is not None:
        return ThresholdLabels(data.label_threshold)
    assert names is not None
    has_numbers = data.label_column in table.declared_names
    declared = (table if has_numbers else first).declared_names.get(data.label_column, ())
    if set(declared) == set(names):
        return DeclaredLabels(tuple(names), tuple(declared), has_numbers)
    return ClassLabels(tuple(names))


def _with_positive_last(
    data: Data, names: list[str] | None, splits: dict[str, Examples]
) -> tuple[Data, dict[str, Examples]]:
    """Return settings and splits with these names, the class of `data.positive_label` as the second of two.

    Raises:
        UserError: there is no such class, or there are more than two.
    """
    positive = data.positive_label
    if positive is not None and names is not None:
        require_one_of("data.positive_label", positive, tuple(names))
        if len(names) > 2:
            reason = f"says which class of two binary F1 is about, and there are {len(names)}"
            remedy = "Leave it out: F1 is then the mean over the classes."
            raise UserError(reason, key="data.positive_label", value=positive, remedy=remedy, code=Code.CONFLICT)
        if positive == names[0]:
            names = names[::-1]
            splits = {
                name: split if split.labels is None else replace(split, labels=1 - split.labels)
                for name, split in splits.items()
            }
    return replace(data, label_names=names), splits


def load_for_run(data: Data, run: Data, note: Callable[[str], None]) -> dict[str, Examples]:
    """Load the splits of other data with the class numbers of a run that was trained on `run`.

    Args:
        data: settings of the data to evaluate. Without label names they are those that the source declares; without
            these its labels are the names or numbers of the run's.
        run: settings of the run's own data, with the names of its classes.
        note: receives a sentence if classes are matched by their number.

    Raises:
        UserError: as `load`, or the number of classes differs.
    """
    if run.type == "regression":
        return load(replace(data, type="regression", label_names=None, label_threshold=None, positive_label=None))[1]
    assert run.label_names is not None
    if data.type == "regression":
        reason = "has numbers to predict, and the run was trained on classes"
        raise UserError(reason, key="data", value=data.task, remedy="Evaluate it on classes.", code=Code.MISMATCH)
    run_names, names, tables = run.label_names, data.label_names, _tables(data)
    in_words = True
    if names is None and tables and data.label_threshold is None:
        first = _first_table(tables)
        names = list(first.declared_names.get(data.label_column, ())) or None
        labels = first.column(data.label_column) if data.label_column in first.names else []
        in_words = names is not None or {*map(class_text, labels)} <= {*run_names}
    if names is None and data.label_threshold is not None and len(run_names) > 2:
        names = ["0", "1"]
    data = replace(data, label_names=names or run_names, positive_label=None)
    resolved, splits = _read_tables(data, tables) if tables else load(data)
    if not in_words:
        note(f"the label numbers 0 to {len(run_names) - 1} count as the run's {_listed(run_names)}, in this order")
    names = resolved.label_names
    assert names is not None
    if set(names) <= set(run_names):
        numbers = np.array([run_names.index(name) for name in names])
    elif len(names) == len(run_names):
        note(f"the classes {_listed(names)} count as the run's {_listed(run_names)}, in this order")
        numbers = np.arange(len(run_names))
    else:
        trained = f"the run was trained on {len(run_names)} ({excerpt(run_names)})"
        reason = f"has {len(names)} classes ({excerpt(names)}), and {trained}"
        raise UserError(reason, key="data.label_names", remedy="Evaluate it on data of as many.", code=Code.MISMATCH)
    return {
        name: split if split.labels is None else replace(split, labels=numbers[split.labels])
        for name, split in splits.items()
    }


def _listed(names: Sequence[str]) -> str:
    """Return names separated by commas; of more than ten the first ten."""
    return ", ".join(names[:10]) + (", …" if len(names) > 10 else "")


def _file_tables(data: FileData) -> dict[str, Table]:
    """Return the files of a local folder by split, or a local file as the test split.

    Raises:
        UserError: the path does not exist or has no split, or a file cannot be read.
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
    return {split: readers.read_table(path) for split, path in paths.items()}


def _hub_tables(data: HubData) -> dict[str, Table]:
    """Return those of the three splits that a data set of the hub has, downloaded or from its local cache.

    `data.splits` may give them other names on the hub. Progress bars of the hub's libraries are off from then on, and
    so is the network if the hub does not answer.

    Raises:
        UserError: it cannot be loaded, or lacks the splits.
    """
    import datasets  # late: seconds
    import huggingface_hub

    datasets.disable_progress_bars()
    huggingface_hub.utils.disable_progress_bars()  # type: ignore[attr-defined]
    if not hub.is_reachable():
        datasets.config.HF_HUB_OFFLINE = True
    name = data.hub_id if data.hub_config is None else f"{data.hub_id}/{data.hub_config}"
    try:
        with hub.shown_progress():
            splits = datasets.load_dataset(data.hub_id, data.hub_config, revision=data.revision)
    except Exception as error:  # a dozen unrelated types
        if (known := hub.translate_error(error, "data.hub_id", data.hub_id, data.revision)) is not None:
            raise known from None
        reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
        remedy = (
            "Without network use local files (data=files data.path=DIR) or the generator (data=toy); "
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
        split: _labelled_table(splits[hub_split], f"{name} {hub_split}", data.label_column)
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
        source=source,
        names=rows.column_names,
        column=lambda column: rows[column][:],
        rows=[row + 1 for row in kept],
        declared_names={
            column: feature.names
            for column, feature in rows.features.items()
            if isinstance(feature, datasets.ClassLabel)
        },
    )


def reported_splits(splits: dict[str, Examples]) -> dict[str, Examples]:
    """Return the splits on which metrics are reported: every labelled split except train."""
    return {name: split for name, split in splits.items() if name != "train" and split.labels is not None}


def split_selection(train: Examples, data: Data) -> tuple[Examples, Examples]:
    """Split train into a smaller train and a selection split, both stratified by class (regression: by size of number).

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
    order = order[np.argsort(_depths(_strata(train.labels[order])), kind="stable")]
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


def _strata(labels: NDArray[Any]) -> NDArray[np.int64]:
    """Return the stratum of each row, (N,): its class, or one of 20 equally large groups of neighbouring numbers."""
    if labels.dtype.kind != "f":
        return labels
    ranks = np.empty(len(labels), np.int64)
    ranks[np.argsort(labels, kind="stable")] = np.arange(len(labels))
    return ranks * min(20, len(labels)) // len(labels)


def _depths(labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return (N,) the relative rank in (0, 1) of each row among the rows of its label.

    Sorted by it, every stretch of rows has each label in proportion.
    """
    depths = np.empty(len(labels))
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        depths[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
    return depths


def inspect_splits(splits: dict[str, Examples], label_names: Sequence[str] | None = None) -> dict[str, Any]:
    """Return statistics of the splits, and warnings about them, for the run's record.

    Args:
        splits: by name.
        label_names: of the classes; None if the labels are numbers.

    Returns:
        `rows`, `positives` (of two classes), `label_counts` (by class) or `label_range` (least, mean, greatest number;
        each None without labels), `empty_texts` (nothing but white space), `null_texts` (`NA`, `null`, … kept as text)
        and `repeated` (rows whose texts stood in an earlier row), each by split; `shared` by pair of splits
        (`train/validation`: rows of the second whose texts are in the first); and `warnings`. Texts, not rows, are
        counted in `empty_texts` and `null_texts`. Texts of a pair count as the same in either order.
    """
    pairs = {split: _unordered(examples.texts) for split, examples in splits.items()}
    distinct = {split: set(keys) for split, keys in pairs.items()}
    statistics: dict[str, dict[str, Any]] = {
        "rows": {split: len(examples) for split, examples in splits.items()},
        **_label_statistics(splits, label_names),
        "empty_texts": {split: _count(examples, lambda text: not text.strip()) for split, examples in splits.items()},
        "null_texts": {split: _count(examples, _NULLS.__contains__) for split, examples in splits.items()},
        "repeated": {split: len(keys) - len(distinct[split]) for split, keys in pairs.items()},
        "shared": {
            f"{one}/{other}": sum(key in distinct[one] for key in pairs[other]) for one, other in combinations(pairs, 2)
        },
    }
    warnings = _label_warnings(statistics, label_names)
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


def _label_statistics(splits: dict[str, Examples], names: Sequence[str] | None) -> dict[str, dict[str, Any]]:
    """Return the entries of `inspect_splits` about labels."""
    labels = {split: examples.labels for split, examples in splits.items()}
    if names is None:
        return {
            "label_range": {
                split: None if y is None else [float(y.min()), float(y.mean()), float(y.max())]
                for split, y in labels.items()
            }
        }
    counts = {
        split: None if y is None else np.bincount(y.astype(np.int64), minlength=len(names)).tolist()
        for split, y in labels.items()
    }
    positives = {split: of_split and of_split[1] for split, of_split in counts.items()}
    return ({"positives": positives} if len(names) == 2 else {}) | {"label_counts": counts}


def _label_warnings(statistics: dict[str, dict[str, Any]], names: Sequence[str] | None) -> list[str]:
    """Return warnings about splits with one class or one number only, missing classes, and names that look alike."""
    rows = statistics["rows"]
    if names is None:
        ranges = statistics["label_range"].items()
        return [
            f"{split}: all {rows[split]} rows have the number {r[0]:g}." for split, r in ranges if r and r[0] == r[2]
        ]
    warnings = [
        f"the classes {excerpt(one)} and {excerpt(other)} differ in case or white space only."
        for one, other in similar_names(names)
    ]
    for split, counts in statistics["label_counts"].items():
        missing = [name for name, count in zip(names, counts or (), strict=False) if count == 0]
        if len(missing) == len(names) - 1:
            label = next(i for i, count in enumerate(counts) if count)
            warnings.append(f"{split}: all {rows[split]} rows have label {names[label] if len(names) > 2 else label}.")
        elif missing:
            listed = ", ".join(map(excerpt, missing[:3])) + (
                f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            )
            consequence = {
                "train": "The run cannot learn to predict them.",
                "selection": "They have too few examples to be set aside too; all are in train.",
            }.get(split, "Their metrics are not known.")
            warnings.append(f"{split}: no example of the classes {listed}. {consequence}")
    return warnings


def describe_data(data: Data, splits: dict[str, Examples]) -> dict[str, Any]:
    """Return the `data` entry of a run's record: source, type, SHA-256 of each split, and `inspect_splits`.

    Args:
        data: settings, with the names of the classes (`load`), which are `label_names` of the entry.
        splits: by name.
    """
    fingerprint = {name: split.fingerprint() for name, split in splits.items()}
    described = {"source": data.source, "type": data.type, "label_names": data.label_names}
    return {**described, "fingerprint": fingerprint, **inspect_splits(splits, data.label_names)}


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
