"""The transfer matrix: tasks with different main metrics, and a matrix for each setting."""

from __future__ import annotations

import csv
import io
import json
from typing import TYPE_CHECKING

from lora_bench.records import sweep_folder
from lora_bench.sweeps import transfer_matrix
from lora_bench.sweeps.transfer_matrix import TransferScore, _csv, _markdown
from tests.stored_runs import make_run

if TYPE_CHECKING:
    from pathlib import Path


def test_each_task_has_its_own_metric() -> None:
    scores = [
        TransferScore("mnli", "mnli", None, {"mcc": 0.7, "accuracy": 0.8, "macro_f1": 0.8}, "mcc"),
        TransferScore("stsb", "stsb", None, {"spearman": 0.9, "pearson": 0.88}, "spearman"),
        TransferScore("mnli", "stsb", 8, {"spearman": 0.5, "pearson": 0.4}, "spearman"),
        TransferScore("mnli", "stsb", 8, {"spearman": 0.7, "pearson": 0.6}, "spearman"),
    ]
    text = _markdown(scores)
    assert "| main metric, after 8 examples of it: trained on | mnli (mcc) | stsb (spearman) |" in text
    assert "| mnli | 0.700 | 0.600 ± 0.141 |" in text
    assert "| stsb |  | 0.900 |" in text
    header, *rows = _csv(scores).splitlines()
    assert header.startswith("trained_on,tested_on,examples,mcc,mcc_std,accuracy,accuracy_std,macro_f1,")
    assert len(rows) == 3


def test_one_metric_is_in_the_header() -> None:
    scores = [
        TransferScore("a", "a", None, {"macro_f1": 0.7}, "macro_f1"),
        TransferScore("a", "a", 0, {"macro_f1": 0.7}, "macro_f1"),
    ]
    assert "| macro_f1, zero-shot: trained on | a |" in _markdown(scores)


def test_each_setting_has_its_own_cells(tmp_path: Path) -> None:
    """Two methods, two seeds and two tasks, of which one needs an override of its own."""
    folder, jobs = tmp_path / "sweep", {}
    for data in ("data=one", "data=two data.label_names=[a,b]"):
        for adapter in ("lora", "dora"):
            for seed in (0, 1):
                jobs[f"train/{len(jobs)}"] = [*data.split(), f"adapter={adapter}", f"seed={seed}"]
    jobs["few/0"] = ["data=two", "adapter=dora", "seed=0", "trainer.max_steps=5", "data.train_size=4"]
    sweep_folder.create(folder, [], None, jobs).release()
    mcc = {"lora": 0.2, "dora": 0.6}
    for name, job in jobs.items():
        adapter, seed = job[-2].partition("=")[2], int(job[-1][-1])
        if name == "few/0":
            config = {"adapter": "dora", "data": {"train_size": 4}}
            run = make_run(folder / name, mcc=0.5, **config)
            record = json.loads((run / "run.json").read_text())
            record["config"]["adapter"]["init_from"] = str(folder / "train/2")
            (run / "run.json").write_text(json.dumps(record))
            continue
        make_run(folder / name, adapter=adapter, mcc=mcc[adapter] + seed / 10)
    text = transfer_matrix.write(folder)
    rows = list(csv.DictReader(io.StringIO((folder / "transfer.csv").read_text(encoding="utf-8"))))
    cells = {(row["adapter"], row["trained_on"], row["tested_on"], row["examples"]): row for row in rows}
    own = {(adapter, task, task, "all") for adapter in mcc for task in ("one", "two")}
    assert cells.keys() == own | {("dora", "one", "two", "4")}
    assert {key[0]: round(float(cells[key]["mcc"]), 9) for key in own} == {"lora": 0.25, "dora": 0.65}
    assert {row["n"] for row in rows} == {"2", "1"}
    assert "adapter=lora:" in text
    assert "| one | 0.650 ± 0.071 | 0.500 |" in text.partition("adapter=dora:")[2]
