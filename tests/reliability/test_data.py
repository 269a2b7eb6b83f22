"""Bad rows: what is not plainly right is refused with file and row before anything is written, the odd is counted."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lora_bench.errors import Code, UserError
from tests.command_line import lora_bench, refused

HEADER = "question1\tquestion2\tlabel\n"
GOOD = HEADER + "".join(f"how do i {i}?\twhat is {i}?\t{i % 2}\n" for i in range(24))
RUN = ["model=tiny_bert", "data=pairs", "data.path=pairs", "data.selection_size=8", "trainer.precision=fp32"]
RUN += ["trainer.device=cpu", "trainer.max_steps=1", "hydra.run.dir=run", "data.label_names=[not_duplicate,duplicate]"]


@pytest.fixture(autouse=True)
def _pairs(in_tmp: Path) -> None:
    Path("pairs").mkdir()
    Path("pairs/train.tsv").write_text(GOOD)
    Path("pairs/validation.tsv").write_text(GOOD)


def refusal(content: str | bytes, ending: str = "tsv") -> UserError:
    """Return the error that refuses a training with such a train file."""
    Path("pairs/train.tsv").unlink()
    Path(f"pairs/train.{ending}").write_bytes(content if isinstance(content, bytes) else content.encode())
    return refused("train", *RUN)


def identity(error: UserError) -> tuple[Code, str, int | None]:
    """Return the code of an error, the file it blames relative to the current folder, and the row."""
    return error.code, str(Path(str(error.file)).relative_to(Path.cwd())), error.row


def trained(*overrides: str) -> tuple[dict[str, Any], str]:
    """The record of a training, and what the screen showed."""
    answer = lora_bench("train", *RUN, *overrides)
    assert answer.code == 0, answer
    return json.loads(Path("run/run.json").read_text()), answer.out


@pytest.mark.reliability(34)
def test_34_bytes_that_are_not_utf8() -> None:
    error = refusal(GOOD.encode() + b"caf\xe9\tx\t0\n")
    assert identity(error) == (Code.INVALID_DATA, "pairs/train.tsv", 26)
    assert "UTF-8" in str(error)


@pytest.mark.reliability(35)
def test_35_a_short_row() -> None:
    error = refusal(GOOD + "no label\tx\n")
    assert identity(error) == (Code.INVALID_DATA, "pairs/train.tsv", 26)
    assert "2 columns" in str(error)


@pytest.mark.reliability(36)
def test_36_extra_columns_in_a_row() -> None:
    error = refusal(GOOD + "a\tb\t0\tmore\n")
    assert identity(error) == (Code.INVALID_DATA, "pairs/train.tsv", 26)
    assert "4 columns" in str(error)


@pytest.mark.reliability(36)
def test_36_extra_columns_of_the_whole_file_are_not_read() -> None:
    lines = [f"{i}\t{line}\tx" for i, line in enumerate(GOOD.splitlines())]
    Path("pairs/train.tsv").write_text("\n".join(lines) + "\n")
    assert trained()[0]["data"]["rows"]["train"] == 16


@pytest.mark.reliability(37)
def test_37_unbalanced_quotes() -> None:
    content = 'question1,question2,label\na,b,0\n"c,d,1\ne,f,0\n'
    error = refusal(content, "csv")
    assert identity(error) == (Code.INVALID_DATA, "pairs/train.csv", 3)
    assert "quote" in str(error)


@pytest.mark.reliability(37)
def test_37_in_a_tsv_quotes_mean_nothing() -> None:
    Path("pairs/train.tsv").write_text(GOOD + 'what is "?\t"open\t0\n')
    assert trained()[0]["data"]["rows"] == {"train": 17, "selection": 8, "validation": 24}


@pytest.mark.reliability(38)
def test_38_null_na_and_empty_texts_are_kept_and_counted() -> None:
    Path("pairs/validation.tsv").write_text(GOOD + "null\tNA\t1\n\tnan\t0\n")
    record, screen = trained()
    assert record["data"]["rows"]["validation"] == 26
    assert record["data"]["null_texts"]["validation"] == 3
    assert record["data"]["empty_texts"]["validation"] == 1
    assert "note: validation: 3 texts" in screen


@pytest.mark.reliability(39)
@pytest.mark.parametrize("label", ["2", "-1", "1.0", "", "yes", "nan"])
def test_39_a_label_outside_0_and_1(label: str) -> None:
    error = refusal(GOOD + f"a\tb\t{label}\n")
    assert identity(error) == (Code.INVALID_DATA, "pairs/train.tsv", 26)
    assert f"label {label!r}" in str(error)


@pytest.mark.reliability(40)
@pytest.mark.parametrize(
    ("content", "code", "row", "names"),
    [
        ("", Code.EMPTY, None, []),
        (HEADER, Code.EMPTY, None, []),
        (GOOD.replace("what is 3", "wh\0t is 3"), Code.INVALID_DATA, 5, ["NUL"]),
        (GOOD.replace("question2", "question_2"), Code.INVALID_DATA, None, ["'question2'", "'question_2'"]),
        (GOOD.replace("question2", "question1"), Code.INVALID_DATA, 1, ["'question1'"]),
        (GOOD.encode("utf-16"), Code.INVALID_DATA, 1, ["UTF-16"]),
    ],
    ids=["empty", "header", "nul", "wrong", "twice", "utf16"],
)
def test_40_files_that_hold_no_pairs(content: str | bytes, code: Code, row: int | None, names: list[str]) -> None:
    error = refusal(content)
    assert identity(error) == (code, "pairs/train.tsv", row)
    assert all(name in str(error) for name in names)


@pytest.mark.reliability(40)
def test_40_a_byte_order_mark_is_no_part_of_the_header() -> None:
    Path("pairs/train.tsv").write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert trained()[0]["data"]["rows"]["train"] == 16


@pytest.mark.reliability(41)
def test_41_what_is_odd_about_the_splits_is_warned_of_and_counted() -> None:
    swapped = "what is 3?\thow do i 3?\t1\n"
    Path("pairs/train.tsv").write_text(GOOD + swapped)
    ones = "".join(f"only {i}\tone label {i}\t1\n" for i in range(9))
    Path("pairs/validation.tsv").write_text(HEADER + ones + swapped + "long " * 600 + "\tx\t1\n")
    record, screen = trained("data.max_length=16")
    data = record["data"]
    assert data["positives"]["validation"] == data["rows"]["validation"] == 11
    assert data["repeated"]["train"] + data["repeated"]["selection"] + data["shared"]["train/selection"] == 1
    assert data["shared"]["train/validation"] + data["shared"]["selection/validation"] >= 1
    assert data["truncated"]["validation"] >= 1
    assert record["metrics"]["validation/auroc"] is None
    assert record["metrics"]["validation/mcc"] == 0
    assert re.search(r"note: validation: .*\b11\b.*\b1\b", screen)
    assert re.search(r"note: \w+/\w+: 1 rows", screen)
    assert re.search(r"note: .* of 11 examples of validation .*data\.max_length=16", screen)
