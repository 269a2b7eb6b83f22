#!/usr/bin/env python3
"""Make the table of PEFT's methods and ours on QQP (docs/results/peft-methods.md), in stages of at most two hours.

    experiments/peft_methods.py DATA OUTPUT STAGE … [KEY=VALUE …]
    experiments/peft_methods.py DATA OUTPUT --table

DATA is a folder with QQP's train.tsv and validation.tsv. Every method runs on MiniLM in a `sweep=methods` of its own.
Its learning rate is chosen from the same five values on the selection split, with 2,000 pairs and seed 0. Then it is
trained on 8,000 pairs for 2 epochs with seeds 0, 1 and 2, and scored on the reported split. Adapters have about as many
parameters as LoRA of rank 8 (331,776), if the method allows it.

The stages: ours, products, spectra, rotations, vectors. After each method the reported runs are kept, without weights
and texts, in experiments/records/peft_methods (--records names another folder). A method whose three runs are there is
not trained again. --table prints the results with verdicts against LoRA, then against full fine-tuning.

One stage takes one to two hours on two cores that multiply bf16 fast (estimated, not measured).
`benchmarks/step_time.py lora peft_lora` measures the step time of our LoRA and of PEFT's.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from lora_bench.cli import main as lora_bench
from lora_bench.records import run_folder, sweep_folder

ROOT = Path(__file__).parent
RECORDS = ROOT / "records" / "peft_methods"
SEEDS = 3
LEARNING_RATES = "1e-4,4e-4,1.5e-3,6e-3,2.5e-2"
"""Those of `sweep=methods`, and a higher one, for methods that train vectors."""
# 36 linears with inputs of 20,736 features in all and as many outputs: LoRA of rank 8 has 331,776 parameters.
STAGES: dict[str, dict[str, list[str]]] = {
    "ours": {
        "full": [],
        "lora": [],
        "dora": [],
        "enhanced": [],
        "hira": ["adapter.rank=8"],
        "miss": ["adapter.rank=16"],
        "bitfit": [],
        "vera": [],
        "peft_lora": [],
    },
    "products": {
        "peft_loha": ["adapter.rank=4"],
        "peft_lokr": [],
        "peft_gralora": ["adapter.rank=8", "adapter.alpha=16"],
        "peft_delora": [],
        "peft_deft": [],
        "peft_peanut": ["adapter.rank=8"],
        "peft_glora": ["adapter.rank=3"],
        "peft_lily": ["adapter.rank=12"],
    },
    "spectra": {
        "peft_fourierft": ["adapter.settings.n_frequency=9216"],
        "peft_waveft": ["adapter.settings.n_frequency=9216"],
        "peft_c3a": ["adapter.settings.block_size=32"],
        "peft_psoft": ["adapter.rank=134", "adapter.alpha=134", "trainer.precision=fp32"],
        "peft_osf": ["adapter.settings.effective_rank=376"],
        "peft_shira": ["adapter.rank=8"],
        "peft_supertuning": ["adapter.settings.sparsity=0.96875"],
    },
    "rotations": {
        "peft_oft": [],
        "peft_boft": ["adapter.settings.boft_block_size=16"],
        "peft_hra": ["adapter.rank=16"],
        "peft_road": ["adapter.settings.variant=road_4"],
        "peft_randlora": [],
    },
    "vectors": {
        "peft_ia3": [],
        "peft_ln_tuning": [],
        "peft_beft": [],
        "peft_vblora": [],
        "peft_unilora": ["adapter.settings.theta_d_length=23040"],
        "peft_tinylora": [],
        "peft_pvera": [],
        "peft_adamss": ["trainer.precision=fp32"],
    },
}
"""By stage the methods, each with what makes it comparable."""


def is_kept(method: str, records: Path) -> bool:
    """Return whether the records hold all reported runs of a method."""
    folder = records / method
    runs = run_folder.find_runs([folder])[0] if folder.is_dir() else []
    return len([record for _, record in runs if record["status"] == "done"]) >= SEEDS


def run_method(method: str, settings: list[str], options: argparse.Namespace, overrides: list[str]) -> int:
    """Start or resume the sweep of one method, keep the records of its reported runs, and return the exit code."""
    folder = options.output / method
    if sweep_folder.is_sweep(folder):
        code = lora_bench(["train", "-m", f"resume={folder}"])
    else:
        task = ["model=minilm", "data=pairs", f"data.path={options.data}", "data.selection_size=2000"]
        task += ["data.train_size=8000", "trainer.epochs=2", "pack.size=1"]  # seconds are each run's own
        grid = ["sweep=methods", f"adapter={method}", f"optimizer.lr={LEARNING_RATES}", *settings]
        code = lora_bench(["train", *grid, *task, f"hydra.sweep.dir={folder}", *overrides])
    if code == 0:
        command = [sys.executable, str(ROOT / "keep_records.py"), str(folder / "report"), str(options.records / method)]
        subprocess.run(command, check=True)
    return code


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("output", type=Path, metavar="OUTPUT")
    parser.add_argument("rest", nargs="*", metavar="STAGE or KEY=VALUE")
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder of the records that are kept")
    parser.add_argument("--methods", nargs="*", help="only these methods of the stages")
    parser.add_argument("--table", action="store_true", help="print the tables of the kept records")
    options = parser.parse_args()
    overrides = [text for text in options.rest if "=" in text]
    stages = [text for text in options.rest if "=" not in text]
    if unknown := [stage for stage in stages if stage not in STAGES]:
        parser.error(f"{unknown[0]} is none of the stages {', '.join(STAGES)}")
    worst = 0
    for stage in stages:
        for method, settings in STAGES[stage].items():
            if is_kept(method, options.records) or (options.methods and method not in options.methods):
                continue
            print(f"\n{stage}: {method}", flush=True)
            code = run_method(method, settings, options, overrides)
            if code in (130, 143):  # interrupted: the same command resumes it
                return code
            worst = max(worst, code)
    if options.table:
        for baseline in (method for method in ("lora", "full") if is_kept(method, options.records)):
            worst = max(worst, lora_bench(["compare", str(options.records), "--baseline", baseline, "--format", "md"]))
    return worst


if __name__ == "__main__":
    sys.exit(main())
