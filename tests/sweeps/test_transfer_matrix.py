"""The transfer matrix of tasks with different main metrics."""

from __future__ import annotations

from lora_bench.sweeps.transfer_matrix import TransferScore, _csv, _markdown


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
