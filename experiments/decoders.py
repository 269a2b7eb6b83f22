#!/usr/bin/env python3
"""Compare a fine-tuned decoder, as a classifier and text-to-text, with an encoder and the prompted decoder, on QQP.

    experiments/decoders.py DATA MODEL OUTPUT STAGE … [--url URL] [KEY=VALUE …]
    experiments/decoders.py DATA MODEL OUTPUT --table

DATA has QQP's train.tsv and validation.tsv, MODEL is a folder with a decoder language model (Gemma 3 270M). Every run
learns from the same 4,000 pairs for one epoch, rank 8, seeds 0 to 2, at the default rates, and is scored on the first
1,000 pairs of validation.

The stages: minilm (LoRA and the enhanced method, 6 runs), classifier (the same with MODEL and a head), text_to_text
(the same with its language-model head), full (MiniLM, and text-to-text MODEL, fully fine-tuned), nf4 (LoRA as a
classifier on NF4 and on bf16 weights), prompted (zero- and four-shot on the first 300 pairs, by an OpenAI-compatible
server at URL). Finished runs are not repeated. With Gemma, classifier and text_to_text take about 100 minutes each on
two cores that multiply bf16 fast.

--table prints, for each method, the results on the first 300 pairs too, where the prompted model is scored.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from lora_bench.cli import main as lora_bench
from lora_bench.records import predictions, run_folder

PAIRS, PROMPTED_PAIRS, SEEDS = 1000, 300, (0, 1, 2)
RANK = "adapter.rank=8"
METHODS = {"lora": ["adapter=lora", RANK], "enhanced": ["experiment=enhanced", RANK]}
TEXT_TO_TEXT = ["model.form=text_to_text", "model.label_words=[no,yes]"]
STAGES = ("minilm", "classifier", "text_to_text", "full", "nf4", "prompted")


def write_split(data: Path, folder: Path, pairs: int) -> Path:
    """Write QQP with the first pairs of validation only, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train.tsv", None), ("validation.tsv", pairs + 1)):
        lines = (data / name).read_text(encoding="utf-8").split("\n")
        (folder / name).write_text("\n".join(lines[:rows]).rstrip("\n") + "\n", encoding="utf-8")
    return folder


def train(folder: Path, settings: list[str]) -> None:
    """Train a run in the folder; one that was interrupted is resumed, one that is done is left alone."""
    if (folder / run_folder.RECORD_FILE).exists():
        if run_folder.read(folder)["status"] == "done":
            return
        code = lora_bench(["train", f"resume={folder}"])
    else:
        code = lora_bench(["train", *settings, f"hydra.run.dir={folder}"])
    if code:
        sys.exit(code)


def run_stage(stage: str, options: argparse.Namespace, overrides: list[str]) -> None:
    """Make the runs of a stage that are not finished."""
    output = options.output
    data = ["data=pairs", f"data.path={write_split(options.data, output / 'data', PAIRS)}"]
    decoder = ["model=gemma", f"model.path={options.model}"]
    if stage == "prompted":
        few = write_split(options.data, output / "data_prompted", PROMPTED_PAIRS)
        for name, shots in (("zero_shot", []), ("few_shot", ["prompt.shots=4"])):
            folder = output / stage / name
            if not (folder / run_folder.RECORD_FILE).exists():
                task = ["data=pairs", f"data.path={few}", f"prompt={name}", *shots]
                server = [f"llm.model={options.model.name}", f"llm.base_url={options.url}", "llm.concurrency=1"]
                lora_bench(["prompt", *server, *task, f"hydra.run.dir={folder}", *overrides])
        return
    common = [*data, "data.train_size=4000", "data.selection_size=500", "trainer.epochs=1"]
    common.append("trainer.precision=bf16")  # on every machine
    models = {"minilm": ["model=minilm"], "classifier": decoder, "text_to_text": [*decoder, *TEXT_TO_TEXT]}
    if stage == "nf4":
        runs = {"bf16": [*decoder, "adapter=lora", RANK], "nf4": [*decoder, "adapter=qlora", RANK]}
    elif stage == "full":
        runs = {name: [*models[name], "adapter=full"] for name in ("minilm", "text_to_text")}
    else:
        runs = {name: [*models[stage], *method] for name, method in METHODS.items()}
    for seed in SEEDS:
        for name, settings in runs.items():
            print(f"\n{stage}, {name}, seed {seed}", flush=True)
            train(output / stage / name / str(seed), [*settings, *common, f"seed={seed}", *overrides])


def print_table(output: Path) -> None:
    """Print a Markdown table: of each method mean and standard deviation over the seeds, on all and on 300 pairs."""
    print("| method | seeds | accuracy | F1 | MCC | MCC, 300 pairs | train FLOPs | peak memory |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for folder in sorted(path for stage in STAGES for path in (output / stage).glob("*")):
        runs = [(run, record) for run, record in run_folder.find_runs([folder])[0] if record["status"] == "done"]
        if not runs:
            continue
        records = [record for _, record in runs]
        short = [_mcc(run, PROMPTED_PAIRS) for run, _ in runs]
        whole = folder.parent.name != "prompted"
        values = {name: [r["metrics"][f"validation/{name}"] for r in records] for name in ("accuracy", "f1", "mcc")}
        cells = [_mean(values[name]) if whole else "—" for name in ("accuracy", "f1", "mcc")]
        costs = ["—", "—"]
        if whole:
            flops, memory = ([r["cost"][key] for r in records] for key in ("train_flops", "peak_memory_bytes"))
            costs = [f"{statistics.mean(flops):.2e}", f"{max(memory) / 1e9:.1f} GB"]
        print(f"| {folder.parent.name}, {folder.name} | {len(runs)} | {' | '.join([*cells, _mean(short), *costs])} |")


def _mcc(run: Path, pairs: int) -> float:
    """Return the MCC of a run on the first pairs of validation."""
    scored = predictions.read(run, "validation")
    first = scored.ids < pairs
    return predictions.Predictions(scored.ids[first], scored.labels[first], scored.scores[first]).value("mcc")


def _mean(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("output", type=Path, metavar="OUTPUT")
    parser.add_argument("rest", nargs="*", metavar="STAGE or KEY=VALUE")
    parser.add_argument("--url", help="address of the server, for the stage prompted")
    parser.add_argument("--table", action="store_true", help="print the table of the finished runs")
    options = parser.parse_args()
    overrides = [text for text in options.rest if "=" in text]
    stages = [text for text in options.rest if "=" not in text]
    if unknown := [stage for stage in stages if stage not in STAGES]:
        sys.exit(f"{unknown[0]} is none of the stages {', '.join(STAGES)}")
    for stage in stages:
        run_stage(stage, options, overrides)
    print_table(options.output)


if __name__ == "__main__":
    main()
