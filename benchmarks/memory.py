#!/usr/bin/env python3
"""Measure the memory of loading a model, of a training step, and of quantised weights.

    benchmarks/memory.py [--rows 8] [--length 512] [--hidden-size 768]

The model is a random RoBERTa of the base size, written to a temporary folder in bf16. Each measurement runs in a
process of its own. The memory of a step is the peak during the step less the memory before it, so weights do not count.
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
    "held": "trainer.activation_checkpointing=false",
    "recomputed": "trainer.activation_checkpointing=true",
    "qlora": "adapter=qlora",
}
"""Measured steps, each with its override."""


def main() -> None:
    """Measure every step, and print the results as a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8, help="pairs of the step")
    parser.add_argument("--length", type=int, default=512, help="tokens of each pair")
    parser.add_argument("--hidden-size", type=int, default=768, help="width of the model")
    parser.add_argument("--measure", nargs=2, metavar=("STEP", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        step, folder = options.measure
        print(json.dumps(measure(step, folder, options.rows, options.length)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), options.hidden_size)
        results = {step: run_measurement(step, folder) for step in STEPS}
    held, recomputed, quantised = (results[step] for step in STEPS)
    print(f"{'step':<12}{'loading':>12}{'weights':>12}{'step':>12}{'seconds':>10}")
    for step, result in results.items():
        sizes = "".join(f"{result[key] / 1e6:>9.0f} MB" for key in ("loading", "weights", "step"))
        print(f"{step:<12}{sizes}{result['seconds']:>10.1f}")
    print(f"recomputed activations take {recomputed['step'] / held['step']:.2f} of the memory of held ones,")
    print(f"and {recomputed['flops'] / held['flops']:.2f} times the FLOPs.")
    codes, scales, bf16 = (quantised[f"quantized_{name}_bytes"] for name in ("codes", "scales", "bf16"))
    print(f"quantised linears hold {codes / 1e6:.1f} MB of codes and {scales / 1e6:.1f} MB of scales,")
    print(f"{(codes + scales) / bf16:.3f} of their {bf16 / 1e6:.1f} MB in bf16.")


def run_measurement(step: str, folder: str) -> Mapping[str, float]:
    """Return the result of `measure`, in a process of its own."""
    command = [sys.executable, *sys.argv, "--measure", step, folder]
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


def measure(step: str, folder: str, rows: int, length: int) -> dict[str, float]:
    """Return bytes of loading (peak), weights and a step (peak less the memory before), seconds and FLOPs of the step.

    The bytes of quantised weights are included where there are any.
    """
    import time

    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from lora_bench.adapters.pack.pack import Pack
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
    experiment: Any = build_experiment([*overrides, STEPS[step]])
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
    began = time.perf_counter()
    dummy_step(pack, rows, length)
    return {
        "loading": loading,
        "weights": held - before,
        "step": peak_memory_bytes(device) - held,
        "seconds": time.perf_counter() - began,
        "flops": counter.get_total_flops(),
        **pack.quantized_bytes([0]),
    }


if __name__ == "__main__":
    main()
