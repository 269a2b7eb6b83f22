"""The folder of an export for deployment: the graph of a run, its tokenizer and settings, a script and a README.

graph.onnx or graph.pt2    the graph, from token ids to scores and labels
scoring.json               what turns texts into its inputs, and its outputs into the names of classes
tokenizer.json, …          the tokenizer
score.py                   reads texts and computes the graph; needs neither lora-bench nor transformers
README.md                  how to use them
"""

from __future__ import annotations

import inspect
import json
import logging
import re
import warnings
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lora_bench.backbones.identity import PAIRS
from lora_bench.backbones.tokenizer import first_line
from lora_bench.data.special_tokens import break_tokens
from lora_bench.data.text_positions import assign_texts
from lora_bench.data.truncation import kept_positions
from lora_bench.deployment import score
from lora_bench.deployment.graph import MIN_LENGTH, ScoringGraph, trace
from lora_bench.deployment.readme import render_readme
from lora_bench.errors import Code, UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from rich.console import Console
    from torch import Tensor
    from torch.export import ExportedProgram

    from lora_bench.run.finished_run import FinishedRun

TOLERANCE = 1e-4
"""Largest difference between the scores of a graph and those of `lora-bench predict`."""
TRACED_ROWS = 3
"""Probe rows that the graph is traced with; it is checked with all of them, and with one alone."""
MAX_FILE_BYTES = 2**31 - 2**20
"""Weights beyond this size are a second file, `graph.onnx.data`: an ONNX file has at most 2 GiB."""


@dataclass(frozen=True)
class GraphFormat:
    """A format of graphs."""

    name: str
    """The value of `format` of `lora-bench export`."""
    file: str
    """The name of the file."""
    title: str
    """The title of the README."""
    requirements: str
    """The packages that `score.py` needs, as arguments of pip."""
    write: Callable[[ExportedProgram, Path, Sequence[str]], None]
    """Writes a traced program to a file; the last argument names its outputs."""
    remedy: str
    """The advice if a graph cannot be written."""

    def refusal(self, reason: str) -> UserError:
        """Return the error for a run that cannot be exported in this format, for this reason."""
        return UserError(reason, key="format", value=self.name, remedy=self.remedy, code=Code.UNSUPPORTED)


def _write_onnx(program: ExportedProgram, path: Path, outputs: Sequence[str]) -> None:
    """Write a traced program as an ONNX graph with the axes `batch` and `length`."""
    converted = torch.onnx.export(program, (), dynamo=True, verbose=False, output_names=list(outputs))
    assert converted is not None
    shape = next(node for node in program.graph.nodes if node.op == "placeholder" and node.name == "input_ids")
    converted.rename_axes(dict(zip(map(str, shape.meta["val"].shape), ("batch", "length"), strict=True)))
    size = sum(tensor.nbytes for tensor in program.state_dict.values())
    converted.save(path, external_data=size > MAX_FILE_BYTES)


def _write_torch(program: ExportedProgram, path: Path, outputs: Sequence[str]) -> None:
    """Write a traced program as `torch.export.save` does; its outputs are named already."""
    torch.export.save(program, path)


_PLAIN_MODEL = "format=merged writes a plain Hugging Face model of a run without pair features."
_FORMATS = (
    GraphFormat(
        "onnx",
        "graph.onnx",
        "A text classifier as an ONNX graph",
        "numpy tokenizers onnxruntime",
        _write_onnx,
        f"format=torch writes the graph for torch; {_PLAIN_MODEL}",
    ),
    GraphFormat(
        "torch",
        "graph.pt2",
        "A text classifier as a torch.export program",
        "numpy tokenizers torch",
        _write_torch,
        f"format=onnx writes the graph for onnxruntime; {_PLAIN_MODEL}",
    ),
)
GRAPH_FORMATS = {graph_format.name: graph_format for graph_format in _FORMATS}
"""The formats of graphs, by `format` of `lora-bench export`."""


def write_deployment(
    folder: Path, run: FinishedRun, format_name: str, threshold: float, notes: Sequence[str], console: Console
) -> None:
    """Write a run as a graph with all that its scores need, and compare them with those of `lora-bench predict`.

    The run cannot predict any more afterwards.

    Args:
        folder: an empty one.
        run: loaded in fp32 on the CPU.
        format_name: a key of `GRAPH_FORMATS`.
        threshold: the score from which on label 1 of two classes is predicted.
        notes: sentences for the README.
        console: shows the progress.

    Raises:
        UserError: the model cannot be traced or written in this format, or gives other scores.
    """
    graph_format = GRAPH_FORMATS[format_name]
    rows = _probe_rows(run)
    expected = run.predict(rows)
    settings = _settings(run, graph_format, threshold)
    readme = render_readme(settings, graph_format.title, graph_format.requirements, notes)
    run.pack.backbone.save_tokenizer(folder)
    (folder / "score.py").write_text(_standalone_script(), encoding="utf-8")
    (folder / "README.md").write_text(readme, encoding="utf-8")
    (folder / "scoring.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    console.print(f"tracing {type(run.pack.network).__name__} and writing {graph_format.file}")
    model = score.Model(folder)
    inputs = {name: torch.from_numpy(array) for name, array in model.inputs(rows[:TRACED_ROWS]).items()}
    graph = ScoringGraph(run.pack, threshold if run.form == "binary" else None, is_regression=run.form == "regression")
    with _refusing_faults(type(run.pack.network).__name__, graph_format):
        _write_graph(folder / graph_format.file, graph.eval(), inputs, settings, graph_format)
        scores = np.concatenate([model.predict(rows)["scores"], model.predict(rows[:1])["scores"]])
    difference = float(np.abs(scores - np.concatenate([expected, expected[:1]])).max())
    if not difference <= TOLERANCE * max(1.0, float(np.abs(expected).max())):
        raise graph_format.refusal(f"the graph's scores differ from those of the run by up to {difference:.2g}")
    console.print(f"checked: scores of {len(rows)} probe texts differ from lora-bench predict by {difference:.1e}")


def _write_graph(
    path: Path,
    graph: ScoringGraph,
    inputs: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    graph_format: GraphFormat,
) -> None:
    """Trace a graph and write it to a file.

    Args:
        path: of the file.
        graph: the module.
        inputs: an example of its arguments, by name.
        settings: the content of scoring.json.
        graph_format: of the file.

    Raises:
        Exception: torch cannot trace it, or the format has no counterpart of one of its operators.
    """
    program = trace(graph, inputs, settings["max_length"])
    graph_format.write(program, path, settings["outputs"])


@contextmanager
def _refusing_faults(network: str, graph_format: GraphFormat) -> Iterator[None]:
    """Turn exceptions of tracing, writing, loading and computing a graph into the refusal of this network's name.

    Raises:
        UserError: for every exception except those of files.
    """
    logging.getLogger("torch").setLevel(logging.ERROR)  # it lists absent packages that are not needed
    try:
        with warnings.catch_warnings(), redirect_stderr(StringIO()):  # where torch prints a graph that it cannot trace
            warnings.simplefilter("ignore")  # about the inner workings of torch, transformers and onnxscript
            yield
    except OSError:
        raise
    except Exception as error:  # of any kind, from an unknown model
        cause: BaseException = error
        while cause.__cause__ is not None:  # torch wraps the reason in general advice
            cause = cause.__cause__
        reason = f"{type(cause).__name__}: {first_line(cause)}"
        raise graph_format.refusal(f"{network} cannot be written as a graph ({reason})") from error


def _settings(run: FinishedRun, graph_format: GraphFormat, threshold: float) -> dict[str, Any]:
    """Return the content of scoring.json; threshold and names of classes are null where they do not apply."""
    data, backbone = run.experiment.data, run.pack.backbone
    both_orders = run.experiment.trainer.scores_both_orders_of(data) and len(data.text_columns) > 1
    positions = backbone.text_positions([(name, [""]) for name in data.text_columns])
    names = ["input_ids", "attention_mask"]
    names += ["token_type_ids"] if _has_token_types(run) else []
    names += ["text_ids"] if run.pack.pair_features and positions is not None else []
    return {
        "versions": {name: version(name) for name in ("lora-bench", "torch", "tokenizers")},
        "graph": graph_format.file,
        "form": run.form,
        "label_names": run.label_names,
        "threshold": threshold if run.form == "binary" else None,
        "text_columns": list(data.text_columns),
        "template": _template(run),
        "keeps_template": positions is not None and positions.keeps_template,
        "min_length": MIN_LENGTH,
        "max_length": data.max_length,
        "truncation": data.truncation,
        "both_orders": both_orders,
        "members": run.pack.size,
        "pad_token_id": backbone.tokenizer.pad_token_id,
        "split_special_tokens": backbone.special_tokens.are_split,
        "broken_tokens": list(backbone.special_tokens.broken),
        "inputs": [f"{prefix}{name}" for prefix in ("", "reversed_")[: 1 + both_orders] for name in names],
        "outputs": ["scores"] if run.form == "regression" else ["scores", "labels"],
    }


def _has_token_types(run: FinishedRun) -> bool:
    """Return whether the tokenizer gives a row of the run a token type other than 0."""
    columns = [(name, [text]) for name, text in zip(run.experiment.data.text_columns, PAIRS[0], strict=False)]
    backbone = run.pack.backbone
    first, second = backbone.render(columns)
    backend = backbone.tokenizer.backend_tokenizer
    backbone.special_tokens.configure(backend)
    encoding = backend.encode(first[0], second[0] if second else None)
    return any(encoding.type_ids)


def _template(run: FinishedRun) -> list[str] | None:
    """Return the parts of the input before, between and after the texts; None if the tokenizer gets the texts."""
    mark = "\0"
    first, second = run.pack.backbone.render([(name, [mark]) for name in run.experiment.data.text_columns])
    parts = first[0].split(mark)
    return None if second is not None or parts == ["", ""] else parts


def _probe_rows(run: FinishedRun) -> list[tuple[str, ...]]:
    """Return texts to check a graph with, for each column of the run; the last row is longer than `max_length`."""
    columns, words = len(run.experiment.data.text_columns), run.experiment.data.max_length
    return [pair[:columns] for pair in (*PAIRS, ("word " * words, "another word " * words))]


def _standalone_script() -> str:
    """Return the source of score.py, with the functions that it imports from lora-bench in place of the imports."""
    source = Path(score.__file__).read_text(encoding="utf-8")
    imports, main = re.sub(r"(from lora_bench.*\n)+\n", "", source).split("\n\nHERE", 1)
    functions = "\n\n".join(inspect.getsource(function) for function in (assign_texts, kept_positions, break_tokens))
    return f"{imports}\n\n{functions}\n\nHERE{main}"
