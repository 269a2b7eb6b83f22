"""Score texts with the model in this folder, as `lora-bench predict` does.

    python score.py "How do I learn Go?" "What is the best way to learn Go?"

It needs numpy, tokenizers, and onnxruntime for `graph.onnx` or torch for `graph.pt2`. The settings are in scoring.json.
"""

from __future__ import annotations

import json
import sys
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from lora_bench.data.special_tokens import break_tokens
from lora_bench.data.text_positions import assign_texts
from lora_bench.data.truncation import kept_positions

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    Arrays = dict[str, NDArray[Any]]


HERE = Path(__file__).parent


class Model:
    """A model with its tokenizer and settings.

    Args:
        folder: with scoring.json, tokenizer.json and the graph; by default that of this file.
    """

    def __init__(self, folder: str | Path = HERE) -> None:
        self.folder = folder = Path(folder)
        self.settings = json.loads((folder / "scoring.json").read_text(encoding="utf-8"))
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.tokenizer.encode_special_tokens = self.settings["split_special_tokens"]

    @cached_property
    def compute(self) -> Callable[[Mapping[str, Any]], Arrays]:
        """The function of the graph, from its inputs to its outputs by name."""
        return GRAPHS[self.settings["graph"]](self.folder / self.settings["graph"])

    def predict(self, rows: Sequence[tuple[str, ...]], batch_size: int = 32) -> Arrays:
        """Return `scores` and, unless numbers are predicted, `labels` of the rows.

        Scores are (N,) P(label 1) of two classes, (N, C) the probability of each class, or (N,) numbers. Labels are
        (N,) class numbers, in the order of `label_names` in scoring.json.

        Args:
            rows: N, each with a text for every one of the `text_columns`.
            batch_size: rows that are computed at once.
        """
        batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        outputs = [self.compute(self.inputs(batch)) for batch in batches]
        return {name: np.concatenate([output[name] for output in outputs]) for name in self.settings["outputs"]}

    def inputs(self, rows: Sequence[tuple[str, ...]]) -> Arrays:
        """Return the inputs of the graph by name, (N, T) each, padded on the right."""
        orders = {"": False, "reversed_": True} if self.settings["both_orders"] else {"": False}
        tokens = {
            f"{prefix}{name}": of_rows
            for prefix, reverse in orders.items()
            for name, of_rows in self._tokenize(rows, reverse=reverse).items()
        }
        length = max(self.settings["min_length"], *(len(row) for of_rows in tokens.values() for row in of_rows))
        padding = {f"{prefix}input_ids": self.settings["pad_token_id"] for prefix in orders}
        return {name: _padded(tokens[name], length, padding.get(name, 0)) for name in self.settings["inputs"]}

    def _tokenize(self, rows: Sequence[tuple[str, ...]], *, reverse: bool) -> dict[str, list[list[int]]]:
        """Return the inputs for rows with their texts in this order, by name: a list of each row's, not padded."""
        limit, truncation = self.settings["max_length"], self.settings["truncation"]
        if reverse:  # `first` and `second` are the texts as the columns have them
            truncation = {"first": "second", "second": "first"}.get(truncation, truncation)
        broken = self.settings["broken_tokens"]
        plain = [tuple(break_tokens(text, broken) for text in row) for row in rows]
        texts, spans = zip(*[self._render(row[::-1] if reverse else row) for row in plain], strict=True)
        inputs: dict[str, list[list[int]]] = {
            "input_ids": [],
            "attention_mask": [],
            "token_type_ids": [],
            "text_ids": [],
        }
        for encoding, of_row in zip(self.tokenizer.encode_batch(texts), spans, strict=True):
            if not len(encoding):  # an empty text without special tokens
                encoding.pad(1, pad_id=self.settings["pad_token_id"])
            text_ids = assign_texts(encoding, of_row)
            positions = list(range(len(encoding)))
            if len(encoding) > limit:
                is_kept = text_ids if self.settings["keeps_template"] else assign_texts(encoding, None)
                positions, _ = kept_positions(is_kept, limit, truncation)
            values: Any = encoding.ids, encoding.attention_mask, encoding.type_ids, text_ids
            for of_rows, of_tokens in zip(inputs.values(), values, strict=True):
                of_rows.append([int(of_tokens[i]) for i in positions])
        return inputs

    def _render(self, row: Sequence[str]) -> tuple[str | tuple[str, str], list[tuple[int, int]] | None]:
        """Return the tokenizer's input for a row: its texts, or one text with them between the parts of the template.

        Returns:
            The input, and with a template first character and end (exclusive) of each text in it.

        Raises:
            ValueError: the row has another number of texts than `text_columns`.
        """
        columns, template = self.settings["text_columns"], self.settings["template"]
        if len(row) != len(columns):
            raise ValueError(f"a row has {len(row)} texts, and the model reads {len(columns)}: {', '.join(columns)}")
        if template is None:
            return (row[0] if len(row) == 1 else (row[0], row[1])), None
        *before, after = template
        rendered, spans = "", []
        for part, text in zip(before, row, strict=True):
            start = len(rendered) + len(part)
            spans.append((start, start + len(text)))
            rendered += part + text
        return rendered + after, spans


def _padded(rows: Sequence[Sequence[int]], length: int, value: int) -> NDArray[np.int64]:
    """Return rows as one array (N, length), filled up with a value on the right."""
    return np.array([[*row, *[value] * (length - len(row))] for row in rows], dtype=np.int64)


def _load_onnx(path: Path) -> Callable[[Mapping[str, Any]], Arrays]:
    """Return the function of an ONNX graph, from inputs to outputs by name."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=onnxruntime.get_available_providers())
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(names, dict(inputs)), strict=True))


def _load_torch(path: Path) -> Callable[[Mapping[str, Any]], Arrays]:
    """Return the function of a `torch.export` program, from inputs to outputs by name."""
    import torch

    module = torch.export.load(path).module()

    def compute(inputs: Mapping[str, Any]) -> Arrays:
        with torch.no_grad():
            outputs = module(**{name: torch.from_numpy(array) for name, array in inputs.items()})
        return {name: tensor.numpy() for name, tensor in outputs.items()}

    return compute


GRAPHS = {"graph.onnx": _load_onnx, "graph.pt2": _load_torch}
"""The function that loads a graph, by the name of its file."""


def main() -> None:
    """Print score and label of the texts of the command line as a line of JSON."""
    model = Model()
    predictions = model.predict([tuple(sys.argv[1:])])
    line = {name.removesuffix("s"): values[0].tolist() for name, values in predictions.items()}
    if names := model.settings["label_names"]:
        line["label_name"] = names[line["label"]]
    print(json.dumps(line, ensure_ascii=False))


if __name__ == "__main__":
    main()
