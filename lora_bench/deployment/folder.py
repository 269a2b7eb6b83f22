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
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lora_bench.backbones.identity import PAIRS
from lora_bench.backbones.tokenizer import first_line
from lora_bench.data.truncation import kept_positions
from lora_bench.deployment import score
from lora_bench.deployment.graph import ScoringGraph, trace
from lora_bench.errors import Code, UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from rich.console import Console
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


def _write_onnx(program: ExportedProgram, path: Path, outputs: Sequence[str]) -> None:
    """Write a traced program as an ONNX graph with the axes `batch` and `length`."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it lists absent packages that are not needed
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
GRAPH_FORMATS = {
    "onnx": GraphFormat(
        "graph.onnx",
        "A text classifier as an ONNX graph",
        "numpy tokenizers onnxruntime",
        _write_onnx,
        f"format=torch writes the graph for torch; {_PLAIN_MODEL}",
    ),
    "torch": GraphFormat(
        "graph.pt2", "A text classifier as a torch.export program", "numpy tokenizers torch", _write_torch, _PLAIN_MODEL
    ),
}
"""The formats, by `format` of `lora-bench export`."""


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
    run.pack.backbone.tokenizer.save_pretrained(folder)
    (folder / "score.py").write_text(_standalone_script(), encoding="utf-8")
    (folder / "README.md").write_text(_readme(settings, graph_format, notes), encoding="utf-8")
    (folder / "scoring.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    console.print(f"tracing {type(run.pack.network).__name__} and writing {graph_format.file}")
    model = score.Model(folder)
    inputs = {name: torch.from_numpy(array) for name, array in model.inputs(rows[:TRACED_ROWS]).items()}
    graph = ScoringGraph(run.pack, threshold if run.form == "binary" else None, is_regression=run.form == "regression")
    _write_graph(folder / graph_format.file, graph.eval(), inputs, settings, graph_format, format_name)
    scores = np.concatenate([model.predict(rows)["scores"], model.predict(rows[:1])["scores"]])
    difference = float(np.abs(scores - np.concatenate([expected, expected[:1]])).max())
    if not difference <= TOLERANCE * max(1.0, float(np.abs(expected).max())):
        raise UserError(
            f"the graph's scores differ from those of the run by up to {difference:.2g}",
            key="format",
            value=format_name,
            remedy=graph_format.remedy,
            code=Code.UNSUPPORTED,
        )
    console.print(f"checked: scores of {len(rows)} probe texts differ from lora-bench predict by {difference:.1e}")


def _write_graph(
    path: Path,
    graph: ScoringGraph,
    inputs: Mapping[str, Any],
    settings: Mapping[str, Any],
    graph_format: GraphFormat,
    format_name: str,
) -> None:
    """Trace a graph and write it to a file.

    Raises:
        UserError: torch cannot trace it, or the format has no counterpart of one of its operators.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the inner workings of torch, transformers and onnxscript
            program = trace(graph, inputs, settings["max_length"])
            graph_format.write(program, path, settings["outputs"])
    except OSError:
        raise
    except Exception as error:  # of any kind, from an unknown model
        cause: BaseException = error
        while cause.__cause__ is not None:  # torch wraps the reason in general advice
            cause = cause.__cause__
        name = type(graph.pack.network).__name__
        raise UserError(
            f"{name} cannot be written as a graph ({type(cause).__name__}: {first_line(cause)})",
            key="format",
            value=format_name,
            remedy=graph_format.remedy,
            code=Code.UNSUPPORTED,
        ) from error


def _settings(run: FinishedRun, graph_format: GraphFormat, threshold: float) -> dict[str, Any]:
    """Return the content of scoring.json; threshold and names of classes are null where they do not apply."""
    data, backbone = run.experiment.data, run.pack.backbone
    both_orders = run.experiment.trainer.score_both_orders and len(data.text_columns) > 1
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if _has_token_types(run) else [])]
    return {
        "lora_bench": version("lora-bench"),
        "graph": graph_format.file,
        "form": run.form,
        "label_names": run.label_names,
        "threshold": threshold if run.form == "binary" else None,
        "text_columns": list(data.text_columns),
        "template": _template(run),
        "max_length": data.max_length,
        "truncation": data.truncation,
        "both_orders": both_orders,
        "members": run.pack.size,
        "pad_token_id": backbone.tokenizer.pad_token_id,
        "split_special_tokens": bool(backbone.tokenizer.backend_tokenizer.encode_special_tokens),
        "inputs": [f"{prefix}{name}" for prefix in ("", "reversed_")[: 1 + both_orders] for name in names],
        "outputs": ["scores"] if run.form == "regression" else ["scores", "labels"],
    }


def _has_token_types(run: FinishedRun) -> bool:
    """Return whether the tokenizer gives a row of the run a token type other than 0."""
    columns = [(name, [text]) for name, text in zip(run.experiment.data.text_columns, PAIRS[0], strict=False)]
    first, second = run.pack.backbone.render(columns)
    encoding = run.pack.backbone.tokenizer.backend_tokenizer.encode(first[0], second[0] if second else None)
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
    """Return the source of score.py, with the function that it imports from lora-bench in place of the import."""
    line = f"from {kept_positions.__module__} import {kept_positions.__name__}\n"
    before, after = Path(score.__file__).read_text(encoding="utf-8").split(line)
    imports, main = after.split("\n\nHERE", 1)
    return f"{before.rstrip()}\n{imports}\n\n{inspect.getsource(kept_positions)}\n\nHERE{main}"


def _readme(settings: Mapping[str, Any], graph_format: GraphFormat, notes: Sequence[str]) -> str:
    """Return README.md: a complete example, the files, and the graph's inputs and outputs for other languages."""
    example = ["How do I learn Go?", "What is the best way to learn Go?"][: len(settings["text_columns"])]
    arguments = " ".join(f'"{text}"' for text in example)
    return README.format(
        title=graph_format.title,
        requirements=graph_format.requirements,
        arguments=arguments,
        row=repr(tuple(example)),
        file=graph_format.file,
        inputs=", ".join(f"`{name}`" for name in settings["inputs"]),
        facts="\n".join(f"- {fact[0].upper()}{fact[1:]}" for fact in [*_facts(settings), *notes]),
    )


def _facts(settings: Mapping[str, Any]) -> list[str]:
    """Return sentences on the inputs and outputs of a graph."""
    facts = [f"a row has the texts {', '.join(settings['text_columns'])}, in this order."]
    if settings["template"] is not None:
        facts.append("the texts stand between the parts of `template`, and the tokenizer reads them as one text.")
    facts.append(
        f"more than {settings['max_length']} tokens are truncated as `data.truncation={settings['truncation']}` says: "
        "see `kept_positions`."
    )
    if settings["both_orders"]:
        facts.append(
            "inputs with the prefix `reversed_` have the same rows with their texts in reversed order, padded to the "
            "same length. The score is the mean of both orders."
        )
    if settings["members"] > 1:
        facts.append(f"the score is the mean of {settings['members']} members, all of which are in the graph.")
    facts.append(f"`scores` {SCORES[settings['form']]}.")
    if settings["threshold"] is not None:
        facts.append(f"`labels` is 1 for scores of at least {settings['threshold']:.6g}, else 0. The graph has it.")
    if settings["label_names"]:
        classes = ", ".join(f"{label}: {name!r}" for label, name in enumerate(settings["label_names"]))
        facts.append(f"the classes are {{{classes}}}.")
    return facts


SCORES = {
    "binary": "is P(label 1) of each row, (N,)",
    "multiclass": "is the probability of each class, (N, C), and `labels` the most probable one",
    "regression": "is the predicted number, (N,)",
}
"""The meaning of the scores, by form of task."""

README = """\
# {title}

Written by `lora-bench export`. The scores are those of `lora-bench predict`.

```bash
pip install {requirements}
python score.py {arguments}
```

In Python, in this folder:

```python
from score import Model

model = Model()
print(model.predict([{row}]))
```

| file | contents |
| --- | --- |
| `{file}` | the graph, in fp32 |
| `scoring.json` | settings of the inputs, names of the classes |
| `tokenizer.json` | the tokenizer |
| `score.py` | the code above, without lora-bench and transformers |

## The graph

- The inputs are {inputs}: int64, one row per example, padded to a common length.
{facts}
"""
