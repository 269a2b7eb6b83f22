#!/usr/bin/env python3
"""Measure training on a GPU: lora-bench in packs beside PEFT and the Hugging Face Trainer, plain and compiled.

    benchmarks/gpu.py [SIZE …] [--pairs 4096] [--members 1,8,32] [--limit 60] [--json FILE]

The sizes are those of `SIZES` below; weights are random, so nothing is downloaded. LoRA of rank 8 adapts all linears,
in bf16, on the same toy pairs in batches of 32 grouped by length. Every part runs in a process of its own and ends
after --limit seconds. The table, in Markdown, has pairs per second (of all members together), peak memory, and the
share of the GPU's measured rate of matrix products. Without a GPU it runs on the CPU, to try it out. Needs the extra
`dev`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from composition import build_experiment
from machine import describe_machine, measure_gemm
from peft_trainer import BATCH_SIZE, Workload, encode_split, training_arguments

MAX_LENGTH = 48
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("bert", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}),
    "minilm": (
        "bert",
        {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    ),
    "roberta_base": (
        "roberta",
        {
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "max_position_embeddings": 514,
            "type_vocab_size": 1,
        },
    ),
    "decoder_270m": (
        "llama",
        {
            "hidden_size": 640,
            "num_hidden_layers": 18,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "intermediate_size": 2048,
        },
    ),
}
"""By name, transformers' type of the model and the settings of its config that differ from the defaults."""

Measurements = dict[str, float]


def write_model(size: str, folder: Path) -> None:
    """Write a model of this size with random weights, and a byte tokenizer, in transformers' form."""
    import torch
    import transformers

    from lora_bench.backbones import tiny_tokenizers

    model_type, settings = SIZES[size]
    tokenizer = tiny_tokenizers.tokenizer("bert" if model_type == "bert" else "roberta")
    config = transformers.AutoConfig.for_model(
        model_type, **settings, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, num_labels=2
    )
    torch.manual_seed(0)
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def overrides(size: str, folder: str, pairs: int) -> list[str]:
    """Return what both sides share."""
    family = SIZES[size][0]
    return [
        f"model={family}",
        f"model.path={folder}",
        "data=toy",
        f"data.train_rows={pairs + 64}",
        "data.selection_size=64",
        f"data.max_length={MAX_LENGTH}",
        f"trainer.batch_size={BATCH_SIZE}",
        "trainer.epochs=1",
        "trainer.precision=bf16",
        "optimizer.lr=1e-4",
    ]


def run_lora_bench(size: str, folder: str, pairs: int, members: int) -> Measurements:
    """Train one epoch with a pack of so many members, each with its own seed."""
    from lora_bench.adapters.pack.member import Member
    from lora_bench.adapters.pack.pack import Pack
    from lora_bench.evaluation.cost import peak_memory_bytes, reset_peak_memory
    from lora_bench.run.inputs import SharedInputs
    from lora_bench.training.dummy_step import StepFlops
    from lora_bench.training.loop import fit

    experiment = build_experiment(overrides(size, folder, pairs))
    inputs = SharedInputs.load(experiment)
    experiment = inputs.with_classes(experiment)
    device, tables = inputs.backbone.device, inputs.tasks[""].tables
    pack = Pack(inputs.backbone, [Member(experiment.adapter, seed) for seed in range(members)])
    with pack.only([0]):
        flop_model = StepFlops.measure(pack)
    peak = measure_gemm(pack.backbone.compute_dtype, device)
    reset_peak_memory(device)
    progress, *_ = fit(
        pack,
        [experiment.optimizer] * members,
        experiment.trainer,
        tables["train"],
        tables["selection"],
        flop_models=[flop_model] * members,
    )
    return {
        "pairs_per_second": members * progress.pairs / progress.seconds,
        "gemm_share": members * progress.flops / progress.seconds / peak,
        "peak_bytes": peak_memory_bytes(device),
    }


def run_trainer(size: str, folder: str, pairs: int, *, compiled: bool) -> Measurements:
    """Train two epochs with PEFT and the Trainer, and measure the second: the first one compiles."""
    import dataclasses

    import peft
    import torch
    import transformers

    from lora_bench.evaluation.cost import peak_memory_bytes, reset_peak_memory
    from lora_bench.run.loaded_data import LoadedData

    transformers.logging.set_verbosity_error()
    splits = LoadedData.load(build_experiment(overrides(size, folder, pairs)).data).splits
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules="all-linear")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as output:
        arguments = training_arguments(Workload(precision="bf16"), output)
        arguments = dataclasses.replace(arguments, torch_compile=compiled)
        trainer = transformers.Trainer(
            model=peft.get_peft_model(model, config),
            args=arguments,
            train_dataset=encode_split(tokenizer, splits["train"], MAX_LENGTH),
            data_collator=transformers.DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if compiled else None),
        )
        trainer.train()
        reset_peak_memory(device)
        seconds = trainer.train().metrics["train_runtime"]
    return {"pairs_per_second": pairs / seconds, "peak_bytes": peak_memory_bytes(device)}


def run_part(part: str, size: str, folder: str, pairs: int) -> Measurements:
    """Measure `pack=K`, `trainer` or `compiled` in this process."""
    name, _, members = part.partition("=")
    if name == "pack":
        return run_lora_bench(size, folder, pairs, int(members))
    return run_trainer(size, folder, pairs, compiled=name == "compiled")


def start_part(part: str, size: str, folder: str, pairs: int, limit: float) -> Measurements | str:
    """Run a part in a process of its own; return its measurements, or why there are none."""
    command = [sys.executable, __file__, size, "--pairs", str(pairs), "--worker", part, folder]
    try:
        process = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"over {limit:.0f} s"
    if process.returncode:
        print(process.stderr, file=sys.stderr)
        return "failed"
    measured: Measurements = json.loads(process.stdout.splitlines()[-1])
    print(f"{size} {part}: {measured}", file=sys.stderr)
    return measured


def format_table(results: dict[str, dict[str, Measurements | str]]) -> str:
    """Return the table in Markdown."""
    lines = ["| model | side | pairs/s | peak memory, MB | share of products |", "| --- | --- | ---: | ---: | ---: |"]
    for size, parts in results.items():
        for part, measured in parts.items():
            if isinstance(measured, str):
                cells = [measured, "", ""]
            else:
                share = f"{measured['gemm_share']:.2f}" if "gemm_share" in measured else ""
                cells = [f"{measured['pairs_per_second']:,.0f}", f"{measured['peak_bytes'] / 1e6:,.0f}", share]
            lines.append(f"| {size} | {part} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", metavar="SIZE", help=", ".join(SIZES))
    parser.add_argument("--pairs", type=int, default=4096)
    parser.add_argument("--members", default="1,8,32", help="sizes of packs")
    parser.add_argument("--limit", type=float, default=60, help="seconds of a part")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all measurements to this file")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.sizes) - set(SIZES):
        parser.error(f"no such size: {', '.join(sorted(unknown))}")
    if options.worker:
        part, folder = options.worker
        print(json.dumps(run_part(part, options.sizes[0], folder, options.pairs)))
        return
    parts = [*(f"pack={members}" for members in options.members.split(",")), "trainer", "compiled"]
    results: dict[str, dict[str, Measurements | str]] = {}
    for size in options.sizes or [name for name in SIZES if name != "tiny"]:
        with tempfile.TemporaryDirectory() as folder:
            write_model(size, Path(folder))
            results[size] = {part: start_part(part, size, folder, options.pairs, options.limit) for part in parts}
    print(f"{describe_machine()}\n\n{format_table(results)}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
