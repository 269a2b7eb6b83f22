#!/usr/bin/env python3
"""Copy the records of finished runs without weights, texts and local paths, so that they can be committed.

    experiments/keep_records.py RUNS RECORDS

Of every finished run below RUNS it copies run.json, metrics.jsonl, predictions/ (ids, labels and scores) and the
metrics of later evaluations to the same place below RECORDS. Folders of the machine are cut from the paths in them:
/home/me/data/qqp becomes qqp.
Probabilities of three or more classes are rounded to five decimals, since 77 of them for each of 3,000 examples would
take 2 MB; none is below 1e-6.
`lora-bench compare RECORDS` prints the tables again. A record that is there is replaced.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from lora_bench.records import predictions, run_folder
from lora_bench.records.local_paths import without_folders


def keep(runs: Path, records: Path) -> int:
    """Copy the records of the finished runs below a folder, and return how many there are."""
    found, _ = run_folder.find_runs([runs])
    done = [folder for folder, record in found if record["status"] == "done"]
    for folder in done:
        target = records / folder.resolve().relative_to(runs.resolve())
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        record = run_folder.with_checksum(_read(folder / run_folder.RECORD_FILE))
        _write(target / run_folder.RECORD_FILE, record)
        for path in sorted((folder / run_folder.EVALUATIONS).glob("*.json")):
            _write(target / run_folder.EVALUATIONS / path.name, _read(path))
        shutil.copy(folder / run_folder.METRICS_FILE, target)
        shutil.copytree(folder / run_folder.PREDICTIONS, target / run_folder.PREDICTIONS)
        for path in (target / run_folder.PREDICTIONS).glob("*.parquet"):
            _round_probabilities(target, path)
    return len(done)


def _round_probabilities(run: Path, path: Path) -> None:
    """Round the probabilities in a file of predictions, if it holds those of three or more classes."""
    content = predictions.read(run, path.stem)
    if content.scores.ndim == 2:
        scores = np.maximum(content.scores.round(5), 1e-6)  # (N, C); the logarithm of zero would be infinite
        path.write_bytes(predictions.encode(content.ids, content.labels, scores))


def _read(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file without folders of this machine."""
    content: dict[str, Any] = without_folders(json.loads(path.read_text(encoding="utf-8")))
    return content


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, metavar="RUNS")
    parser.add_argument("records", type=Path, metavar="RECORDS")
    options = parser.parse_args()
    print(f"{keep(options.runs, options.records)} records in {options.records}")


if __name__ == "__main__":
    main()
