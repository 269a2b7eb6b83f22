"""Train, reload, predict and export a tiny model of an architecture, and compare with transformers and PEFT."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import peft
import torch
import transformers

import lora_bench
from lora_bench.deployment.score import Model
from tests.backbones.tools import cut_logits, make, random_batch, spread
from tests.command_line import lora_bench as command_line

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from tests.backbones.architectures import Architecture

PAIRS = [
    ("Is it?", "Why not?"),
    ("a", "What is the best way?"),
    ("How do I learn to cook rice well?", "b"),
    ("", "a b"),
]
"""Pairs of unlike length, so that a batch of them is padded."""
TRAINING = [
    "data=toy",
    "data.train_rows=32",
    "data.validation_rows=8",
    "data.max_length=100",
    "trainer.precision=fp32",
    "trainer.device=cpu",
]


@dataclass(frozen=True)
class Result:
    """The outcome of the checks for an architecture and a method; a difference is None where nothing was compared."""

    architecture: str
    method: str
    adapted: str = ""
    """Number and names of the adapted linears."""
    refused: str = ""
    """Why the run is refused; empty if it trained."""
    reloaded: float | None = None
    """Largest difference between the scores of a batch and those of the pairs one by one, in a reloaded run."""
    merged: float | str | None = None
    """Largest difference between the scores of `predict` and of the merged export, or why there is none."""
    peft: float | str | None = None
    onnx: float | str | None = None
    torch: float | str | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def largest_cut_difference(architecture: Architecture, folder: Path) -> float | None:
    """Return the largest difference between the logits of prefix and suffix, cut anywhere, and of the whole model.

    None if the model cannot be cut.
    """
    backbone = make(architecture.choice, f"model.path={folder}", *architecture.overrides)
    depths = {backbone.cut_depth(depth) for depth in range(1, len(backbone.layers) + 1)} - {0}
    batch = random_batch(backbone)
    if backbone.tokenizer.eos_token_id is not None:  # BART reads the end token, and no other
        batch.input_ids[torch.arange(len(batch.input_ids)), batch.attention_mask.sum(1) - 1] = (
            backbone.tokenizer.eos_token_id
        )
    with torch.no_grad():
        whole, *cuts = [cut_logits(backbone, batch, depth) for depth in (0, *sorted(depths))]
    assert spread(whole) > 0
    return max((float((cut - whole).abs().max()) for cut in cuts), default=None)


def check(
    architecture: Architecture,
    model: Path,
    method: Sequence[str],
    work: Path,
    exports: Sequence[str],
    *,
    steps: int = 5,
) -> Result:
    """Train a few steps on toy pairs, reload, predict, export, and compare the scores.

    Args:
        architecture: of the model.
        model: its folder (`Architecture.save`).
        method: overrides that choose the method.
        work: a new folder for the run and its exports.
        exports: forms of `lora-bench export`.
        steps: of the training.
    """
    run_folder = work / "run"
    options = [f"model={architecture.choice}", f"model.path={model}", *architecture.overrides, *TRAINING]
    options.append(f"trainer.max_steps={steps}")
    answer = command_line("train", *options, *method, f"hydra.run.dir={run_folder}")
    result = {"architecture": architecture.name, "method": " ".join(method)}
    if answer.code == 2:
        return Result(**result, refused=answer.err.removeprefix("lora-bench: ").strip())
    assert answer.code == 0, answer
    run = lora_bench.load(run_folder)
    expected = run.predict(PAIRS)
    alone = np.concatenate([run.predict([pair]) for pair in PAIRS])
    assert np.ptp(expected) > 0
    differences: dict[str, Any] = {"reloaded": float(np.abs(alone - expected).max())}
    for form in exports:
        output = work / form
        answer = command_line("export", f"run={run_folder}", f"format={form}", f"output={output}")
        if answer.code == 2:
            differences[form] = answer.err.removeprefix("lora-bench: ").strip()
            continue
        assert answer.code == 0, answer
        scores = _SCORERS[form](architecture, run, model, output)
        differences[form] = float(np.abs(scores - expected).max())
    return Result(**result, adapted=_adapted(run), **differences)


def _adapted(run: Any) -> str:
    """Return the number of adapted modules and their last names."""
    names = list(run.pack.updates[0])
    return f"{len(names)}: {', '.join(dict.fromkeys(name.rpartition('.')[2] for name in names))}" if names else ""


def _auto_class(architecture: Architecture, run: Any) -> Any:
    if architecture.answers_in_words:
        return getattr(transformers, architecture.auto_class)
    if run.pack.backbone.peft_task == "TOKEN_CLS":
        return transformers.AutoModelForTokenClassification
    return transformers.AutoModelForSequenceClassification


def _score_merged(architecture: Architecture, run: Any, base: Path, folder: Path) -> NDArray[np.float64]:
    return _scores(architecture, run, _auto_class(architecture, run).from_pretrained(folder), folder)


def _score_peft(architecture: Architecture, run: Any, base: Path, folder: Path) -> NDArray[np.float64]:
    labels = {} if architecture.answers_in_words else {"num_labels": 2}  # BART has three by default
    network = peft.PeftModel.from_pretrained(_auto_class(architecture, run).from_pretrained(base, **labels), folder)
    return _scores(architecture, run, network, folder)


@torch.no_grad()
def _scores(architecture: Architecture, run: Any, network: Any, folder: Path) -> NDArray[np.float64]:
    """Return P(label 1) as a user of transformers computes it from an exported folder, one pair at a time."""
    tokenizer, backbone = transformers.AutoTokenizer.from_pretrained(folder), run.pack.backbone
    network.eval()
    scores = []
    for pair in PAIRS:
        columns = [(name, [text]) for name, text in zip(run.experiment.data.text_columns, pair, strict=True)]
        first, second = backbone.render(columns)
        inputs = tokenizer(first[0], second[0] if second else None, return_tensors="pt")
        if architecture.auto_class == "AutoModelForSeq2SeqLM" and architecture.answers_in_words:
            inputs["decoder_input_ids"] = torch.tensor([[network.config.decoder_start_token_id]])
        logits = network(**inputs).logits
        if architecture.answers_in_words:
            logits = logits[:, -1, backbone.words[0].first_tokens]
        elif logits.ndim == 3:
            logits = logits.mean(1)
        scores.append(float(logits.softmax(-1)[0, 1]))
    return np.array(scores)


def _score_graph(architecture: Architecture, run: Any, base: Path, folder: Path) -> NDArray[np.float64]:
    """Return P(label 1) by the script in the folder of an exported graph, in batches of five."""
    scores: NDArray[np.float64] = Model(folder).predict(PAIRS, batch_size=5)["scores"]
    return scores


_SCORERS = {"merged": _score_merged, "peft": _score_peft, "onnx": _score_graph, "torch": _score_graph}
"""Scores of an exported folder, by form."""
