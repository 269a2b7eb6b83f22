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
not trained again. --table prints the results with verdicts against LoRA and full fine-tuning, each adjusted by Holm
over all methods.

One stage takes one to two hours on two cores that multiply bf16 fast (estimated, not measured).
`benchmarks/step_time.py lora peft_lora` measures the step time of our LoRA and of PEFT's.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kept_sweep import is_kept, run_kept
from pandas import isna
from result_tables import difference_cells

from lora_bench.api import compare
from lora_bench.records.run_folder import find_runs

if TYPE_CHECKING:
    from pandas import Series

RECORDS = Path(__file__).parent / "records" / "peft_methods"
BASELINES = ("lora", "full")
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
        "pissa": [],
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


def sweep_arguments(method: str, settings: list[str], data: Path) -> list[str]:
    """Return the arguments of a method's sweep, without its folder."""
    grid = ["sweep=methods", f"adapter={method}", f"optimizer.lr={LEARNING_RATES}"]
    grid += ["trainer.precision=bf16", *settings]  # on every machine, but for methods that need fp32
    task = ["model=minilm", "data=pairs", f"data.path={data}", "data.selection_size=2000", "data.train_size=8000"]
    return [*grid, *task, "trainer.epochs=2", "pack.size=1"]  # seconds are each run's own


def format_table(records: Path) -> str:
    """Return the kept methods as a table in Markdown, with the verdicts of the baselines among them."""
    baselines = [method for method in BASELINES if is_kept(records / method, SEEDS)]
    compared = {baseline: compare(records, baseline=baseline).set_index("adapter") for baseline in baselines}
    methods = next(iter(compared.values())) if compared else compare(records).set_index("adapter")
    rates = {record["choices"]["adapter"]: record["config"]["optimizer"]["lr"] for _, record in find_runs([records])[0]}
    against = " | ".join(f"against {baseline} | p | verdict" for baseline in baselines)
    lines = [f"| adapter | learning rate | parameters | TFLOP | MCC | {against} |"]
    lines.append("| --- | ---: | ---: | ---: | ---: |" + " ---: | ---: | --- |" * len(baselines))
    for method, row in methods.sort_values("mcc", ascending=False).iterrows():
        cells = [f"`{method}`", f"{rates[method]:g}", f"{row['params.adapter']:,}"]
        cells += [f"{row['cost.train_flops'] / 1e12:.1f}", f"{row['mcc']:.3f} ± {row['mcc_std']:.3f}"]
        for frame in compared.values():
            cells += _verdict(frame.loc[method])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _verdict(row: Series) -> list[str]:
    """Return the cells of a row against its baseline: the difference with its interval, p, and the verdict."""
    if isna(row["tests.p_holm"]):  # the baseline itself, or methods that cannot be tested
        return ["", "", str(row["tests.verdict"])]
    return [*difference_cells(row), str(row["tests.verdict"])]


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
            records = options.records / method
            if is_kept(records, SEEDS) or (options.methods and method not in options.methods):
                continue
            print(f"\n{stage}: {method}", flush=True)
            arguments = [*sweep_arguments(method, settings, options.data), *overrides]
            code = run_kept(arguments, options.output / method, records, SEEDS)
            if code in (130, 143):  # interrupted: the same command resumes it
                return code
            worst = max(worst, code)
    if options.table:
        print(format_table(options.records))
    return worst


if __name__ == "__main__":
    sys.exit(main())
