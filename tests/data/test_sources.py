"""Loading of splits from hub, files and generator, the split of train, and the statistics of splits."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_bench.config.schema import Data, FileData, HubData, ToyData
from lora_bench.data.examples import Examples
from lora_bench.data.sources import inspect_splits, load, load_for_run, split_selection, unseen_rows
from lora_bench.errors import Code
from tests.command_line import refuses

if TYPE_CHECKING:
    from pathlib import Path

COMMON: dict[str, Any] = {
    "type": "classification",
    "task": "qqp",
    "text_columns": ["question1", "question2"],
    "label_column": "label",
    "label_threshold": None,
    "label_names": ["not_duplicate", "duplicate"],
    "positive_label": None,
    "relation": "paraphrase",
    "max_length": 128,
    "truncation": "longest_first",
    "train_size": None,
    "selection_size": 0.1,
    "split_seed": 0,
    "perturb": None,
    "perturb_seeds": 3,
    "augment": None,
    "augment_share": 0.5,
    "intensity": 0.2,
    "unseen": False,
    "report": True,
    "tasks": None,
    "share": "adapter",
    "temperature": 1.0,
}
HUB = HubData(source="hub", hub_id="nyu-mll/glue", hub_config="qqp", revision=None, splits=None, **COMMON)
HEADER = "question1\tquestion2\tlabel\n"


def file_data(path: Path) -> FileData:
    return FileData(source="files", path=str(path), **COMMON)


def toy_data(**settings: Any) -> Data:
    return ToyData(source="toy", train_rows=8, validation_rows=8, generator_seed=0, **{**COMMON, **settings})


def numbered(labels: list[int]) -> Examples:
    texts = [f"text {row}" for row in range(len(labels))]
    return Examples(np.arange(len(labels)), (texts, texts), np.array(labels, dtype=np.int64))


def pairs(*rows: tuple[str, str, int]) -> Examples:
    first, second, labels = zip(*rows, strict=True)
    return Examples(np.arange(len(rows)), (list(first), list(second)), np.array(labels))


# --- Examples ---


def test_take_selects_ids_texts_and_labels_of_the_same_rows() -> None:
    taken = numbered([0, 1, 1]).take(np.array([2, 0]))
    assert taken.labels is not None
    assert (taken.ids.tolist(), taken.texts[1], taken.labels.tolist()) == ([2, 0], ["text 2", "text 0"], [1, 0])
    assert Examples(np.arange(2), (["a", "b"],), None).take(np.array([1])).labels is None


def test_fingerprint_differs_between_contents() -> None:
    def digest(*columns: list[str], labels: list[int] | None = None) -> str:
        label_array = None if labels is None else np.array(labels, dtype=np.int64)
        return Examples(np.arange(len(columns[0])), columns, label_array).fingerprint()

    digests = [
        digest(["a", "b"]), digest(["b", "a"]), digest(["ab", ""]), digest(["", "ab"]), digest(["a"], ["b"]),
        digest(["a", "b"], labels=[0, 1]), digest(["a", "b"], labels=[1, 0]), digest(["a", "c"]), digest(["ab"]),
        digest(["a", "b"], ["", ""]),
    ]  # fmt: skip
    assert len(set(digests)) == len(digests)
    assert digest(["ä", "b"], labels=[0, 1]) == digest(["ä", "b"], labels=[0, 1])
    assert len(digests[0]) == 64


# --- files ---


def test_split_files_of_a_folder_are_loaded(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text(HEADER + "a\tb\t1\n")
    (tmp_path / "validation.csv").write_text("question1,question2,label\nc,d,0\n")
    (tmp_path / "test.jsonl").write_text('{"question1": "e", "question2": "f"}\n')
    _, splits = load(file_data(tmp_path))
    assert [*splits] == ["train", "validation", "test"]
    assert splits["validation"].texts == (["c"], ["d"])
    assert splits["test"].labels is None
    (tmp_path / "validation.csv").write_text("question1,question2\nc,d\n")
    with refuses(Code.INVALID_DATA) as caught:
        load(file_data(tmp_path))
    assert caught.value.file == str(tmp_path / "validation.csv")
    assert "data.label_column" in str(caught.value)


def test_numbers_become_labels_at_a_threshold(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text(HEADER + "a\tb\t3.99\nc\td\t4\ne\tf\t5.0\n")
    (tmp_path / "validation.jsonl").write_text('{"question1": "e", "question2": "f", "label": 4.5}\n')
    (tmp_path / "test.tsv").write_text(HEADER + "a\tb\t-1.0\n")
    _, splits = load(replace(file_data(tmp_path), label_threshold=4.0))
    assert splits["train"].labels is not None
    assert splits["validation"].labels is not None
    assert (splits["train"].labels.tolist(), splits["validation"].labels.tolist()) == ([0, 1, 1], [1])
    assert splits["test"].labels is None
    (tmp_path / "train.tsv").write_text(HEADER + "a\tb\t3.99\nc\td\thigh\n")
    with refuses(Code.INVALID_DATA) as caught:
        load(replace(file_data(tmp_path), label_threshold=4.0))
    assert (caught.value.file, caught.value.row) == (str(tmp_path / "train.tsv"), 3)
    assert "'high'" in caught.value.reason


def test_a_single_file_is_loaded_as_the_test_split(tmp_path: Path) -> None:
    (tmp_path / "any.tsv").write_text(HEADER + "a\tb\t1\n")
    assert [*load(file_data(tmp_path / "any.tsv"))[1]] == ["test"]


def test_missing_and_ambiguous_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to("circle")
    for name, code in (("absent", Code.NOT_FOUND), ("long" * 100, Code.NOT_FOUND), ("circle", Code.NOT_A_FILE)):
        with refuses(code, key="data.path") as caught:
            load(file_data(tmp_path / name))
        assert caught.value.value == str(tmp_path / name)
    (tmp_path / "dev.tsv").write_text(HEADER + "a\tb\t1\n")
    with refuses(Code.NOT_FOUND, key="data.path") as caught:
        load(file_data(tmp_path))
    assert caught.value.value == str(tmp_path)
    assert "dev" in str(caught.value.remedy)
    for name in ("train.tsv", "train.csv"):
        (tmp_path / name).write_text(HEADER + "a\tb\t1\n")
    with refuses(Code.CONFLICT, key="data.path") as caught:
        load(file_data(tmp_path))
    assert caught.value.value == str(tmp_path)
    assert all(name in caught.value.reason for name in ("train.tsv", "train.csv"))


# --- hub ---


def patch_hub(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[tuple[Any, ...]]:
    """Let `datasets.load_dataset` return or raise `answer`; return a list that receives the arguments of every call."""
    import datasets

    calls: list[tuple[Any, ...]] = []

    def load_dataset(*args: Any, **options: Any) -> Any:
        calls.append((*args, *options.values()))
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_hub_splits_are_checked_like_files(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset, DatasetDict

    def rows(labels: list[int]) -> Dataset:
        texts = [f"t{label}" for label in labels]
        return Dataset.from_dict({"question1": texts, "question2": texts[::-1], "label": labels, "idx": labels})

    calls = patch_hub(
        monkeypatch, DatasetDict(test=rows([-1, -1]), train=rows([0, 1, 1]), validation=rows([1]), other=rows([7]))
    )
    _, splits = load(replace(HUB, revision="v1"))
    assert calls == [("nyu-mll/glue", "qqp", "v1")]
    assert [*splits] == ["train", "validation", "test"]
    assert splits["train"].texts == (["t0", "t1", "t1"], ["t1", "t1", "t0"])
    assert splits["train"].labels is not None
    assert splits["train"].labels.tolist() == [0, 1, 1]
    assert splits["test"].labels is None
    patch_hub(monkeypatch, DatasetDict(train=rows([0, 2])))
    with refuses(Code.INVALID_DATA) as caught:
        load(HUB)
    assert (caught.value.file, caught.value.row) == ("nyu-mll/glue/qqp train", 2)
    assert "label 2" in caught.value.reason
    patch_hub(monkeypatch, DatasetDict(other=rows([0])))
    with refuses(Code.NOT_FOUND, key="data.hub_id") as caught:
        load(HUB)
    assert caught.value.value == HUB.hub_id
    assert all(split in caught.value.reason for split in ("train", "validation", "test"))


def test_an_unreachable_hub_is_refused_with_data_that_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import OfflineModeIsEnabled

    for error in (ConnectionError("no route\nto host"), OfflineModeIsEnabled(""), FileNotFoundError("no such")):
        patch_hub(monkeypatch, error)
        with refuses(Code.NOT_FOUND, key="data.hub_id") as caught:
            load(HUB)
        assert caught.value.value == HUB.hub_id
        assert "\n" not in str(caught.value)
        assert "data=files data.path=DIR" in str(caught.value)
        assert "data=toy" in str(caught.value)


def test_missing_hub_data_is_refused_within_seconds_offline() -> None:
    import datasets  # its import is not timed

    assert datasets.config.HF_HUB_OFFLINE, "conftest.py sets it"
    start = time.perf_counter()
    with refuses(Code.NOT_FOUND, key="data.hub_id") as caught:
        load(replace(HUB, hub_id="nobody/holds-this"))
    assert caught.value.value == "nobody/holds-this"
    assert time.perf_counter() - start < 5


# --- split_selection ---

label_lists = st.lists(st.sampled_from([0, 1]), min_size=2, max_size=60)


@given(label_lists, st.integers(0, 2**32), st.data())
@settings(deadline=None)
def test_selection_split_is_exact_stratified_and_disjoint(labels: list[int], seed: int, data: st.DataObject) -> None:
    n = len(labels)
    size = data.draw(st.integers(2, n - 1) if n > 2 else st.just(0.5))
    source = numbered(labels)
    train, selection = split_selection(source, toy_data(selection_size=size, split_seed=seed))
    expected_size = 1 if size == 0.5 else size
    assert len(selection) == expected_size
    assert sorted([*train.ids, *selection.ids]) == list(range(n))
    for split in (train, selection):
        assert split.labels is not None
        assert split.labels.tolist() == [labels[row] for row in split.ids]
        assert split.texts[0] == [f"text {row}" for row in split.ids]
    assert selection.labels is not None
    assert abs(selection.labels.sum() - expected_size * sum(labels) / n) < 1


@given(label_lists, st.integers(0, 9), st.data())
@settings(deadline=None)
def test_a_smaller_train_size_takes_a_prefix_and_keeps_the_selection_split(
    labels: list[int], seed: int, data: st.DataObject
) -> None:
    whole, selection = split_selection(numbered(labels), toy_data(selection_size=0.5, split_seed=seed))
    size = data.draw(st.integers(1, len(whole)))
    train, same = split_selection(numbered(labels), toy_data(selection_size=0.5, split_seed=seed, train_size=size))
    assert train.ids.tolist() == whole.ids[:size].tolist()
    assert same.ids.tolist() == selection.ids.tolist()
    assert train.labels is not None
    assert abs(train.labels.sum() - size * sum(labels) / len(labels)) <= 1


def test_a_small_train_split_has_the_label_shares_of_the_data() -> None:
    source = numbered([0, 0, 1] * 1000)
    for seed in range(20):
        train, _ = split_selection(source, toy_data(selection_size=200, train_size=15, split_seed=seed))
        assert train.labels is not None
        assert train.labels.sum() in (4, 5, 6)


def test_selection_split_depends_on_the_split_seed_only() -> None:
    source = numbered([0, 1] * 10)
    train, selection = split_selection(source, toy_data(selection_size=4, train_size=3))
    assert (train.ids.tolist(), selection.ids.tolist()) == ([13, 8, 15], [11, 2, 3, 18])
    selections = {
        tuple(split_selection(source, toy_data(selection_size=4, split_seed=seed))[1].ids) for seed in range(10)
    }
    assert len(selections) == 10


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"selection_size": 10}, "data.selection_size"),
        ({"selection_size": 0.01}, "data.selection_size"),
        ({"selection_size": 0.99}, "data.selection_size"),
        ({"selection_size": 4, "train_size": 7}, "data.train_size"),
    ],
)
def test_sizes_beyond_the_data_are_refused(settings: dict[str, Any], key: str) -> None:
    with refuses(Code.INVALID_VALUE, key=key) as caught:
        split_selection(numbered([0, 1] * 5), toy_data(**settings))
    assert caught.value.value == settings[key.removeprefix("data.")]
    assert key == "data.selection_size" or "6" in str(caught.value.remedy)


def test_a_train_split_without_labels_is_refused() -> None:
    with refuses(Code.INVALID_DATA, key="data.label_column"):
        split_selection(Examples(np.arange(9), (["a"] * 9,), None), toy_data())


# --- inspect_splits ---


def test_inspect_splits_counts_labels_empty_repeated_and_shared_rows() -> None:
    statistics = inspect_splits(
        {
            "train": pairs(("a", "b", 1), ("b", "a", 1), ("NA", "c", 0), ("", " ", 0), ("x", "y", 0)),
            "validation": pairs(("y", "x", 0), ("b", "a", 0), ("new", "pair", 0)),
            "test": Examples(np.arange(1), (["q"], ["r"]), None),
        },
        ["no", "yes"],
    )
    assert statistics["rows"] == {"train": 5, "validation": 3, "test": 1}
    assert statistics["positives"] == {"train": 2, "validation": 0, "test": None}
    assert statistics["label_counts"] == {"train": [3, 2], "validation": [3, 0], "test": None}
    assert statistics["empty_texts"] == {"train": 2, "validation": 0, "test": 0}
    assert statistics["null_texts"] == {"train": 1, "validation": 0, "test": 0}
    assert statistics["repeated"] == {"train": 1, "validation": 0, "test": 0}
    assert statistics["shared"] == {"train/validation": 2, "train/test": 0, "validation/test": 0}
    assert [warning.split(":")[0] for warning in statistics["warnings"]] == [
        *("validation", "train", "train", "train", "train/validation")
    ]
    assert "label 0" in statistics["warnings"][0]


def test_inspect_splits_warns_of_nothing_in_clean_data() -> None:
    single = {"train": Examples(np.arange(2), (["a", "b"],), np.array([0, 1]))}
    assert inspect_splits(single, ["no", "yes"])["warnings"] == []


def test_generated_splits_have_the_requested_sizes_and_share_no_row() -> None:
    _, splits = load(toy_data())
    assert {split: len(examples) for split, examples in splits.items()} == {"train": 8, "validation": 8}
    assert inspect_splits(splits, ["no", "yes"])["shared"] == {"train/validation": 0}


def test_unseen_rows_share_no_text_with_seen_examples() -> None:
    def unlabelled(first: list[str], second: list[str]) -> Examples:
        return Examples(np.arange(len(first)), (first, second), None)

    split = unlabelled(["a", "b", "c", "d"], ["x", "y", "a", "e"])
    assert unseen_rows(split).tolist() == [True] * 4
    assert unseen_rows(split, unlabelled(["y"], ["q"]), unlabelled(["q"], ["a"])).tolist() == [
        False,
        False,
        False,
        True,
    ]


# --- classes and numbers ---


def write_splits(folder: Path, train: list[Any], validation: list[Any]) -> FileData:
    """Write two JSONL files with these labels, and return the settings of a task with one text column."""
    for split, labels in (("train", train), ("validation", validation)):
        lines = [json.dumps({"text": f"{split} {i}", "label": label}) for i, label in enumerate(labels)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return replace(file_data(folder), text_columns=["text"], label_names=None)


def labels_of(splits: dict[str, Examples]) -> list[list[float] | None]:
    return [None if split.labels is None else split.labels.tolist() for split in splits.values()]


def test_names_are_inferred_from_train_and_hold_for_every_split(tmp_path: Path) -> None:
    data, splits = load(write_splits(tmp_path, ["b", "c", "a", "b"], ["c", "c"]))
    assert data.label_names == ["a", "b", "c"]
    assert labels_of(splits) == [[1, 2, 0, 1], [2, 2]]
    with refuses(Code.INVALID_DATA) as caught:
        load(write_splits(tmp_path, ["b", "a"], ["a", "d"]))
    assert (caught.value.file, caught.value.row) == (str(tmp_path / "validation.jsonl"), 2)
    assert "'d'" in caught.value.reason


def test_names_that_are_numbers_are_not_read_as_numbers_of_classes(tmp_path: Path) -> None:
    with refuses(Code.INVALID_DATA) as caught:
        load(write_splits(tmp_path, [1, 2, 3], [2, 1, 0]))
    assert (caught.value.file, caught.value.row) == (str(tmp_path / "validation.jsonl"), 3)


def test_a_number_in_two_spellings_is_refused_with_both_rows(tmp_path: Path) -> None:
    data = write_splits(tmp_path, [2, 1, "1.0"], [1])
    with refuses(Code.INVALID_DATA) as caught:
        load(data)
    assert (caught.value.file, caught.value.row) == (str(tmp_path / "train.jsonl"), 3)
    assert "row 2" in caught.value.reason
    _, splits = load(replace(data, label_names=["1", "1.0", "2"]))
    assert labels_of(splits) == [[2, 0, 1], [0]]


def test_numbers_of_a_declared_column_are_numbers_of_classes(tmp_path: Path) -> None:
    import datasets

    data = write_splits(tmp_path, ["1", "2"], [2, 1])
    (tmp_path / "train.jsonl").unlink()
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["1", "2"])})
    datasets.Dataset.from_dict({"text": ["x", "y"], "label": [1, 0]}, features).to_parquet(tmp_path / "train.parquet")
    resolved, splits = load(data)
    assert (resolved.label_names, labels_of(splits)) == (["1", "2"], [[1, 0], [1, 0]])


def test_the_positive_label_becomes_the_second_of_two_classes(tmp_path: Path) -> None:
    data = write_splits(tmp_path, ["spam", "ham"], ["ham"])
    resolved, splits = load(data)
    assert (resolved.label_names, labels_of(splits)) == (["ham", "spam"], [[1, 0], [0]])
    resolved, splits = load(replace(data, positive_label="ham"))
    assert (resolved.label_names, labels_of(splits)) == (["spam", "ham"], [[0, 1], [1]])
    with refuses(Code.UNKNOWN_CHOICE, key="data.positive_label"):
        load(replace(data, positive_label="eggs"))
    with refuses(Code.CONFLICT, key="data.positive_label"):
        load(replace(write_splits(tmp_path, ["a", "b", "c"], ["a"]), positive_label="a"))


def test_numbers_are_loaded_for_regression(tmp_path: Path) -> None:
    data = replace(write_splits(tmp_path, [0.5, 5, "2"], [1.25]), type="regression")
    resolved, splits = load(data)
    assert (resolved.label_names, labels_of(splits)) == (None, [[0.5, 5.0, 2.0], [1.25]])
    assert inspect_splits(splits)["label_range"] == {"train": [0.5, 2.5, 5.0], "validation": [1.25, 1.25, 1.25]}
    assert splits["train"].fingerprint() != replace(splits["train"], labels=np.array([0.5, 5.0, 2.5])).fingerprint()


def test_a_number_that_is_too_large_to_predict_is_refused(tmp_path: Path) -> None:
    with refuses(Code.INVALID_DATA) as caught:
        load(replace(write_splits(tmp_path, [1, 2.5], [2, 1e300]), type="regression"))
    assert (caught.value.file, caught.value.row) == (str(tmp_path / "validation.jsonl"), 2)


def test_a_selection_split_of_numbers_has_small_and_large_ones() -> None:
    values = np.linspace(0, 5, 400)
    examples = Examples(np.arange(400), ([f"t{i}" for i in range(400)],), values)
    data = replace(toy_data(), type="regression", label_names=None)
    train, selection = split_selection(examples, data)
    assert train.labels is not None
    assert selection.labels is not None
    assert len(selection) == 40
    assert np.histogram(selection.labels, 4, (0, 5))[0].tolist() == [10, 10, 10, 10]


def test_other_data_are_read_with_the_classes_of_a_run(tmp_path: Path) -> None:
    run = replace(toy_data(), label_names=["entailment", "neutral", "contradiction"])
    notes: list[str] = []

    def read(labels: list[Any], names: list[str] | None) -> list[float] | None:
        return labels_of(
            load_for_run(replace(write_splits(tmp_path, labels, labels), label_names=names), run, notes.append)
        )[1]

    assert read([0, 2, 1], None) == [0, 2, 1]
    assert len(notes) == 1  # numbers are noted
    notes.clear()
    assert read(["neutral", "entailment"], None) == [1, 0]
    assert read([0, 1, 2], ["contradiction", "entailment", "neutral"]) == [2, 0, 1]
    assert notes == []
    assert read(["c", "a"], ["a", "b", "c"]) == [2, 0]
    assert len(notes) == 1
    with refuses(Code.MISMATCH, key="data.label_names"):
        read(["a", "b"], ["a", "b"])
    with refuses(Code.INVALID_DATA):
        read(["yes", "no"], None)


def test_classes_that_look_alike_or_have_no_examples_are_warned_of() -> None:
    splits = {
        "train": Examples(np.arange(3), (["a", "b", "c"],), np.array([0, 1, 1])),
        "selection": Examples(np.arange(1), (["d"],), np.array([1])),
    }
    warnings = inspect_splits(splits, ["No", "no", "yes"])["warnings"]
    assert [[word for word in ("'No'", "'yes'", "train", "selection") if word in text] for text in warnings] == [
        ["'No'"],
        ["'yes'", "train"],
        ["selection"],
    ]
