#!/usr/bin/env python3
"""Makes the README's table of methods on QQP.

    experiments/methods.py DATA OUTPUT [METHOD …]      DATA: a folder with QQP's train.tsv and validation.tsv

Every method of conf/adapter/ (or those named) on MiniLM, each in a `sweep=methods` of its own: its learning rate is
chosen from the same four values on the selection split, with 2,000 pairs and seed 0, and the reported split out of
sight; then it is trained on 8,000 pairs for 2 epochs with seeds 0, 1 and 2. `lora-bench compare OUTPUT` has the table.
Adapters have about as many parameters as LoRA of rank 8 where the method lets them. About three hours on two cores that
multiply bf16 fast. What is done is not run again: start it again to go on, or twice at once with other methods.
"""

from __future__ import annotations

import sys
from pathlib import Path

from lora_bench.cli import main
from lora_bench.config.groups import choices

RECIPE = "enhanced_recipe"  # the enhanced adapter with averaged weights and consistency under exchanged questions
DATA, OUTPUT = sys.argv[1:3] if len(sys.argv) > 2 else sys.exit(__doc__)
# 36 linears with inputs of 20,736 features in all and as many outputs: rank 8 is 331,776 parameters.
OWN = {"lora_fa": ["adapter.rank=16"], "lora_xs": ["adapter.rank=96"], RECIPE: ["experiment=enhanced"]}
WORK = ["model=minilm", "data=pairs", f"data.path={DATA}", "data.selection_size=2000", "data.train_size=8000"]
WORK += ["trainer.epochs=2", "pack.size=1"]  # one after another: times are each run's own

for method in sys.argv[3:] or [*choices("adapter"), RECIPE]:
    folder = Path(OUTPUT, method)
    begun = (folder / "sweep.json").exists()
    chosen = [f"adapter={'enhanced' if method == RECIPE else method}", *OWN.get(method, [])]
    asked = ["-m", f"resume={folder}"] if begun else ["sweep=methods", *chosen, *WORK, f"hydra.sweep.dir={folder}"]
    print(f"\n{method}", flush=True)
    if (code := main(["train", *asked])) in (130, 143):  # stopped from outside
        sys.exit(code)
main(["compare", OUTPUT])
