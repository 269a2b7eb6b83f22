"""Local files of three classes in words, and of numbers; and tiny runs that were trained on them."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from lora_bench.records.job import Job
from lora_bench.train import train
from tests.helpers import composed

if TYPE_CHECKING:
    from pathlib import Path

NAMES = ["bird", "big cat", "fish"]
"""The classes, in the order that `data.label_names` gives them."""
CLASSES = ["data.text_columns=[text]", "data.label_names=[bird,big cat,fish]"]
NUMBERS = ["data.text_columns=[text]", "data.type=regression"]
QUICK = ["data.max_length=24", "trainer.precision=fp32", "trainer.device=cpu", "trainer.max_steps=3"]
ROWS = {"train": 48, "validation": 12}


def as_tsv(rows: list[dict[str, Any]]) -> bytes:
    return "".join("\t".join(row) + "\n" for row in [list(rows[0]), *(list(r.values()) for r in rows)]).encode()


def put(path: Path, rows: list[dict[str, Any]]) -> Path:
    """An input file in the format that its ending names."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        lines = [",".join(f'"{value}"' for value in row.values()) for row in rows]
        path.write_text("\n".join([",".join(rows[0]), *lines]) + "\n")
    else:
        path.write_bytes(as_tsv(rows))
    return path


def texts(rows: int, start: int = 0) -> list[str]:
    """Return texts, each with the word of its class: class i modulo 3 in row i."""
    return [f"{('robin', 'lion', 'trout')[i % 3]} number {i}" for i in range(start, start + rows)]


def write(folder: Path, *, numbers: bool = False, **rows: int) -> Path:
    """Write a TSV file for each split with columns text and label, and return the folder.

    Args:
        folder: is created.
        numbers: write numbers from -1 to 1 in place of the names of the classes.
        rows: of each split; None: `ROWS`.
    """
    folder.mkdir(exist_ok=True)
    for split, count in (rows or ROWS).items():
        of_split = texts(count, 100 if split == "validation" else 0)
        labels = [i % 3 - 0.5 * (i % 2) for i in range(count)] if numbers else [NAMES[i % 3] for i in range(count)]
        if split == "validation" and not numbers:
            labels = [NAMES[(i + 100) % 3] for i in range(count)]
        lines = [f"{text}\t{label}" for text, label in zip(of_split, labels, strict=True)]
        (folder / f"{split}.tsv").write_text("\n".join(["text\tlabel", *lines]) + "\n")
    return folder


def run_of(folder: Path, *overrides: str, numbers: bool = False) -> Path:
    """Train a tiny run on the files of `write`, in `folder`, and return the folder of the run."""
    data = write(folder / "data", numbers=numbers)
    settings = ["data=files", f"data.path={data}", *(NUMBERS if numbers else CLASSES), *QUICK, "optimizer.lr=0.02"]
    request = composed(*settings, *overrides)
    choices = {"model": "tiny_bert", "adapter": "lora", "data": "files"}
    train(Job(request, folder / "run", choices, []), console=Console(file=io.StringIO()))
    return folder / "run"
