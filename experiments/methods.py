#!/usr/bin/env python3
"""Make the table of methods on QQP (docs/results/methods.md).

    experiments/methods.py DATA OUTPUT [METHOD …]

DATA is a folder with QQP's train.tsv and validation.tsv. Every method of conf/adapter/ but PEFT's, unless some are
named, runs on MiniLM in a `sweep=methods` of its own. Its learning rate is chosen from the same four values on the
selection split, with 2,000 pairs and seed 0. Then it is trained on 8,000 pairs for 2 epochs with seeds 0, 1 and 2, and
scored on the reported split. Adapters have about as many parameters as LoRA of rank 8, if the method allows it.

All methods take about three hours on two cores that multiply bf16 fast. A finished sweep is not repeated: start the
script again to resume, or twice at once with different methods. `lora-bench compare OUTPUT` prints the table again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kept_sweep import start_or_resume

from lora_bench.cli import main as lora_bench
from lora_bench.config.groups import choices

RECIPE = "enhanced_recipe"
"""The enhanced adapter with its recipe, besides the choices of conf/adapter/."""
OVERRIDES = {
    # 36 linears with inputs of 20,736 features in all and as many outputs: rank 8 is 331,776 parameters.
    "lora_fa": ["adapter.rank=16"],
    "lora_xs": ["adapter.rank=96"],
    RECIPE: ["experiment=enhanced"],
}
"""Further overrides of single methods."""
INTERRUPTED = (130, 143)


def run_sweep(method: str, data: str, folder: Path) -> int:
    """Start or resume the sweep of one method, and return the exit code."""
    adapter = [f"adapter={'enhanced' if method == RECIPE else method}", *OVERRIDES.get(method, [])]
    task = ["model=minilm", "data=pairs", f"data.path={data}", "data.selection_size=2000", "data.train_size=8000"]
    task += ["trainer.epochs=2", "pack.size=1"]  # one after another, so that seconds are each run's own
    return start_or_resume(["train", "sweep=methods", *adapter, *task], folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="DATA")
    parser.add_argument("output", type=Path, metavar="OUTPUT")
    known = [*choices("adapter"), RECIPE]
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=", ".join(known))
    options = parser.parse_args()
    if unknown := set(options.methods) - set(known):
        parser.error(f"no such method: {', '.join(sorted(unknown))}")
    worst = 0
    native = [method for method in known if method.partition("_")[0] != "peft"]
    for method in options.methods or native:
        print(f"\n{method}", flush=True)
        code = run_sweep(method, options.data, options.output / method)
        if code in INTERRUPTED:
            return code
        worst = max(worst, code)
    return max(worst, lora_bench(["compare", str(options.output)]))


if __name__ == "__main__":
    sys.exit(main())
