#!/usr/bin/env python3
"""Copy the records of finished runs without weights, texts and local paths, so that they can be committed.

    experiments/keep_records.py RUNS RECORDS

Of every finished run below RUNS it copies run.json, metrics.jsonl and predictions/ (ids, labels and scores) to the same
place below RECORDS. Folders of the machine are cut from the paths in run.json: /home/me/data/qqp becomes qqp.
`lora-bench compare RECORDS` prints the tables again. A record that is there is replaced.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from lora_bench.records import run_folder
from lora_bench.records.local_paths import without_folders


def keep(runs: Path, records: Path) -> int:
    """Copy the records of the finished runs below a folder, and return how many there are."""
    found, _ = run_folder.find_runs([runs])
    done = [folder for folder, record in found if record["status"] == "done"]
    for folder in done:
        target = records / folder.resolve().relative_to(runs.resolve())
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        raw = json.loads((folder / run_folder.RECORD_FILE).read_text(encoding="utf-8"))
        text = json.dumps(run_folder.with_checksum(without_folders(raw)), ensure_ascii=False, indent=1)
        (target / run_folder.RECORD_FILE).write_text(text + "\n", encoding="utf-8")
        shutil.copy(folder / run_folder.METRICS_FILE, target)
        shutil.copytree(folder / run_folder.PREDICTIONS, target / run_folder.PREDICTIONS)
    return len(done)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, metavar="RUNS")
    parser.add_argument("records", type=Path, metavar="RECORDS")
    options = parser.parse_args()
    print(f"{keep(options.runs, options.records)} records in {options.records}")


if __name__ == "__main__":
    main()
