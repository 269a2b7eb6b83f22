#!/usr/bin/env python3
"""Check every method of PEFT on tiny random models: gradients, the frozen backbone, files, PEFT's own model, merging.

    scripts/peft_checks.py OUTPUT [METHOD …]
    scripts/peft_checks.py OUTPUT --table

Each choice `peft_…` of the group `adapter` (or those that are named) is trained for two steps on BERT, RoBERTa, a T5
in words, the encoder of a T5 and a Llama of two layers; `tests/adapters/peft/injected_checks.py` has the checks. The
results are lines of OUTPUT/results.jsonl; what stands there is not repeated. --table prints the table of
docs/results/peft-methods.md from them. The exit code is 1 if a check fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.adapters.peft.injected_checks import METHODS, MODELS, Models, check, names

Results = dict[tuple[str, str], dict[str, Any]]


def results_of(output: Path) -> Results:
    """Return the recorded results by method and model."""
    file = output / "results.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return {(row["method"], row["model"]): row for row in map(json.loads, lines)}


def run_all(output: Path, methods: list[str]) -> None:
    """Check the methods on all models, and append the results to the file."""
    output.mkdir(parents=True, exist_ok=True)
    finished = results_of(output)
    with tempfile.TemporaryDirectory() as work:
        models = Models(Path(work) / "models")
        models.root.mkdir()
        for number, (method, model) in enumerate((method, model) for method in methods for model in MODELS):
            if (method, model) in finished:
                continue
            line = check(method, model, models, Path(work) / str(number)).to_json(method, model)
            with (output / "results.jsonl").open("a", encoding="utf-8") as lines:
                lines.write(line + "\n")
            print(line, flush=True)


def print_table(output: Path) -> bool:
    """Print a row for each method, with the largest difference over the models; return whether all checks passed."""
    results, passed = results_of(output), True
    print("| `adapter=` | initially the backbone | read by PEFT | merged | bf16 backbone | failed |")
    print("| --- | ---: | ---: | ---: | ---: | --- |")
    for method in METHODS:
        rows = [results[method, model] for model in MODELS if (method, model) in results]
        if not rows:
            continue
        failed = [f"{row['model']}: {', '.join(row['failed'])}" for row in rows if row["failed"]]
        passed = passed and not failed
        cells = [_largest(rows, key) for key in ("identity", "peft", "merged", "bf16")]
        print(f"| `{method}` | {' | '.join(cells)} | {'; '.join(failed) or 'nothing'} |")
    return passed


def _largest(rows: list[dict[str, Any]], key: str) -> str:
    """Return the largest difference in logits, how many models refuse it, or that all do."""
    values = [row[key] for row in rows if row[key] is not None]
    refused = len(rows) - len(values)
    note = f" (not on {refused} of {len(rows)})" if refused else ""
    return f"{max(values):.0e}{note}" if values else "refused"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("methods", nargs="*")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if not options.table:
        torch.set_num_threads(1)
        run_all(options.output, names(options.methods))
    return 0 if print_table(options.output) else 1


if __name__ == "__main__":
    sys.exit(main())
