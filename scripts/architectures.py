#!/usr/bin/env python3
"""Try every method on tiny random models of many architectures: train, reload, predict, export, cut.

    scripts/architectures.py OUTPUT [NAME …]
    scripts/architectures.py OUTPUT --table

For each architecture of `tests/backbones/architectures.py` (or those whose name contains a NAME) and each method of
`METHODS`, a model of two layers is trained for five steps and reloaded. Its scores one by one, in a batch, and those of
every export are compared. The results are lines of OUTPUT/results.jsonl; what stands there is not repeated. --table
prints the table of docs/results/architectures.md from them. The exit code is 1 if a difference is above its limit.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.backbones.architecture_checks import check, largest_cut_difference
from tests.backbones.architectures import ARCHITECTURES, Architecture

METHODS = (
    "adapter=lora",
    "adapter=dora",
    "adapter=full",
    "adapter=head_only",
    "adapter=enhanced",
    "experiment=enhanced",
)
PLAIN = ("merged", "peft")
EXPORTS = {"experiment=enhanced": ("onnx", "torch")}
"""Forms of export by method, `PLAIN` for the others. A plain model scores one order of the texts."""
LIMITS = {"cut": 1e-5, "reloaded": 1e-6, "merged": 1e-5, "peft": 1e-5, "onnx": 1e-4, "torch": 1e-4}
"""The largest difference allowed, in logits for a cut, else in probabilities."""


def results_of(output: Path) -> dict[tuple[str, str], dict[str, object]]:
    """Return the recorded results by architecture and method."""
    lines = (output / "results.jsonl").read_text(encoding="utf-8").splitlines()
    return {(row["architecture"], row["method"]): row for row in map(json.loads, lines)}


def run_all(output: Path, architectures: list[Architecture]) -> None:
    """Check each architecture with each method, and append the results to the file."""
    output.mkdir(parents=True, exist_ok=True)
    file = output / "results.jsonl"
    file.touch()
    finished = results_of(output)
    for architecture in architectures:
        missing = [method for method in ("cut", *METHODS) if (architecture.name, method) not in finished]
        if not missing:
            continue
        with tempfile.TemporaryDirectory() as work:
            model = architecture.save(Path(work) / "model")
            for i, method in enumerate(missing):
                line = _line(architecture, model, method, Path(work) / str(i))
                with file.open("a", encoding="utf-8") as lines:
                    lines.write(line + "\n")
                print(line, flush=True)


def _line(architecture: Architecture, model: Path, method: str, work: Path) -> str:
    if method == "cut":
        difference = largest_cut_difference(architecture, model)
        return json.dumps({"architecture": architecture.name, "method": "cut", "cut": difference})
    try:
        return check(architecture, model, [method], work, EXPORTS.get(method, PLAIN)).to_json()
    except Exception as error:  # one failure does not end the others
        failure = f"{type(error).__name__}: {str(error)[:300]}"
        return json.dumps({"architecture": architecture.name, "method": method, "failed": failure})


def print_table(output: Path) -> bool:
    """Print one row per architecture, and return whether every difference is within its limit."""
    results, good = results_of(output), True
    print("| architecture | adapted by LoRA | cut | lora | dora | full | head_only | enhanced | recipe | graphs |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for architecture in ARCHITECTURES:
        rows = {method: results.get((architecture.name, method)) for method in ("cut", *METHODS)}
        lora, recipe = rows["adapter=lora"] or {}, rows["experiment=enhanced"] or {}
        cut = rows["cut"]
        cells = [architecture.name, str(lora.get("adapted", "")), "—" if cut is None else _verdict(cut, ("cut",))]
        cells += [_verdict(rows[method] or {}, ("reloaded", *EXPORTS.get(method, PLAIN))) for method in METHODS[:-1]]
        cells.append(_verdict(recipe, ("reloaded",)))
        cells.append(_graphs(recipe))
        good = good and not any("above" in cell or "failed" in cell for cell in cells)
        print(f"| {' | '.join(cells)} |")
    return good


def _verdict(row: dict[str, object], keys: tuple[str, ...]) -> str:
    """Return "yes", or what is wrong or refused, for the compared quantities of a row."""
    if not row:
        return "not run"
    if row.get("failed"):
        return "failed"
    if row.get("refused"):
        return "refused"
    compared, above = _compared(row, keys)
    return above or ("yes" if compared else "no")


def _graphs(row: dict[str, object]) -> str:
    """Return the forms of graphs that give the scores of `predict`; a form that is refused is left out."""
    forms, above = _compared(row, ("onnx", "torch"))
    return above or ", ".join(forms) or "no"


def _compared(row: dict[str, object], keys: tuple[str, ...]) -> tuple[list[str], str]:
    """Return those of the quantities that were compared, and what to say of those above their limits, if any are."""
    differences = {key: value for key in keys if isinstance(value := row.get(key), float)}
    above = [key for key, value in differences.items() if not value <= LIMITS[key]]
    return list(differences), f"{', '.join(above)} above limit" if above else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        sys.exit(not print_table(arguments.output))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    names = [name.lower() for name in arguments.names]
    chosen = [a for a in ARCHITECTURES if not names or any(name in a.name.lower() for name in names)]
    run_all(arguments.output, chosen)


if __name__ == "__main__":
    main()
