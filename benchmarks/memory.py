#!/usr/bin/env python3
"""Measure the memory of loading a model, of a training step, and of quantised weights.

    benchmarks/memory.py [activations] [weights] [--rows 8] [--length 512] [--hidden-size 768]

The model is a random RoBERTa of the base size, written to a temporary folder in bf16. Each measurement runs in a
process of its own. The memory of a step is the peak during the step less the memory before it, so weights do not count.
The tables are printed in Markdown: those of docs/results/memory.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composition import build_experiment

if TYPE_CHECKING:
    from collections.abc import Mapping

STEPS = {
    "held": ["trainer.activation_checkpointing=false"],
    "recomputed": ["trainer.activation_checkpointing=true"],
}
"""Ways of holding activations, each with its overrides."""
WEIGHTS = {
    "bf16": [],
    "bf16, embeddings int8": ["model.quantize_embeddings=int8"],
    "int8": ["model.quantize=int8"],
    "int8, embeddings int8": ["model.quantize=int8", "model.quantize_embeddings=int8"],
    "nf4": ["model.quantize=nf4"],
    "nf4, embeddings int8": ["model.quantize=nf4", "model.quantize_embeddings=int8"],
}
"""Types of weights, each with its overrides."""
OVERRIDES = STEPS | WEIGHTS


def main() -> None:
    """Measure activations, weights or both, and print a table of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help="activations, weights; both by default")
    parser.add_argument("--rows", type=int, default=8, help="pairs of the step")
    parser.add_argument("--length", type=int, default=512, help="tokens of each pair")
    parser.add_argument("--hidden-size", type=int, default=768, help="width of the model")
    parser.add_argument("--measure", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        name, folder = options.measure
        print(json.dumps(measure(name, folder, options.rows, options.length)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), options.hidden_size)
        for table in options.tables or TABLES:
            names, print_table = TABLES[table]
            print_table({name: run_measurement(name, folder) for name in names})
            print()


def print_activations(results: Mapping[str, Mapping[str, float]]) -> None:
    """Print memory, processor seconds and FLOPs of a step, with held and with recomputed activations."""
    held = results["held"]
    print("| activations | step, MB | share | seconds | FLOPs |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, result in results.items():
        shares = (
            f"{result['step'] / held['step']:.2f} | {result['seconds']:.1f} | {result['flops'] / held['flops']:.2f}"
        )
        print(f"| {name} | {result['step'] / 1e6:,.0f} | {shares} |")


def print_weights(results: Mapping[str, Mapping[str, float]]) -> None:
    """Print the bytes of linears, embeddings and the whole backbone, and the processor seconds of a step."""
    bf16 = results["bf16"]
    print("| weights | linears, MB | share | embeddings, MB | share | whole model, MB | share | seconds |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, result in results.items():
        sizes = " | ".join(
            f"{result[key] / 1e6:,.1f} | {result[key] / bf16[key]:.3f}" for key in ("linears", "embeddings", "model")
        )
        print(f"| {name} | {sizes} | {result['seconds']:.1f} |")


TABLES = {"activations": (STEPS, print_activations), "weights": (WEIGHTS, print_weights)}


def run_measurement(name: str, folder: str) -> Mapping[str, float]:
    """Return the result of `measure`, in a process of its own."""
    command = [sys.executable, *sys.argv, "--measure", name, folder]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def write_model(folder: Path, hidden_size: int) -> None:
    """Write a random RoBERTa with a character tokenizer in bf16."""
    import torch
    import transformers

    from lora_bench.backbones import tiny_tokenizers

    config = transformers.RobertaConfig(
        vocab_size=50265,
        max_position_embeddings=514,
        type_vocab_size=1,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
    )
    transformers.RobertaForSequenceClassification(config).to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizers.tokenizer("roberta").save_pretrained(folder)


def measure(name: str, folder: str, rows: int, length: int) -> dict[str, float]:
    """Return bytes of loading (peak), of what is resident then, and of a step (peak less the memory before).

    Beside them stand the bytes of the weights of linears and of embeddings, and of the whole backbone (`model`), and
    processor seconds and FLOPs of the step.
    """
    import time

    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from lora_bench.adapters.pack.pack import Pack
    from lora_bench.adapters.pack.weight_bytes import frozen_bytes
    from lora_bench.data import sources
    from lora_bench.evaluation.cost import held_memory_bytes, peak_memory_bytes, reset_peak_memory
    from lora_bench.run.inputs import load_backbone
    from lora_bench.training.checkpointing import set_checkpointing
    from lora_bench.training.dummy_step import dummy_step

    overrides = [
        "model=roberta",
        f"model.path={folder}",
        "data=toy",
        "trainer.precision=bf16",
        "head.pair_features=false",
    ]
    experiment: Any = build_experiment([*overrides, *OVERRIDES[name]])
    experiment = experiment.with_data([sources.load(experiment.data)[0]])
    device = torch.device("cpu")
    reset_peak_memory(device)
    before = held_memory_bytes(device)
    backbone, _ = load_backbone(experiment, device, torch.bfloat16)
    loading = peak_memory_bytes(device) - before
    pack = Pack(backbone, experiment.members())
    set_checkpointing(pack, experiment.trainer, length, 1)
    with FlopCounterMode(display=False) as counter:
        dummy_step(pack, 1, 16)  # the libraries load their code
    reset_peak_memory(device)
    held = held_memory_bytes(device)
    began = time.process_time()
    dummy_step(pack, rows, length)
    seconds = time.process_time() - began
    sizes = frozen_bytes(pack, [0])
    return {
        "loading": loading,
        "resident": held - before,
        "step": peak_memory_bytes(device) - held,
        "seconds": seconds,
        "flops": counter.get_total_flops(),
        "linears": sizes["linears"],
        "embeddings": sizes["embeddings"],
        "model": sum(sizes.values()),
    }


if __name__ == "__main__":
    main()
