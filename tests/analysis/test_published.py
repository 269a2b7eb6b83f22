"""Published results: each is possible on its set, MCC follows from the other two, and splits never mix."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from lora_bench.analysis.formats import to_json, to_markdown
from lora_bench.analysis.published import (
    add_published_results,
    confusion_from,
    derived_mcc,
    is_possible,
    load_published,
)
from lora_bench.analysis.summary import summarise
from lora_bench.compare import main
from lora_bench.errors import Code
from tests.command_line import refuses
from tests.test_compare import make

if TYPE_CHECKING:
    from pathlib import Path

# Of huggingface.co/JeremiahZ/bert-base-uncased-qqp, where accuracy, precision and recall give whole counts.
TP, FP, FN, TN = 13_196, 1950, 1689, 23_595
QQP_DEV = (40_430, 14_885)
DEV = {"fingerprint": "dev", "source": "hub", "rows": {"validation": 40_430}, "positives": {"validation": 14_885}}


def test_known_counts_follow_from_accuracy_and_f1() -> None:
    y = np.repeat([1, 0, 1, 0], [TP, FP, FN, TN])
    p = np.repeat([1, 1, 0, 0], [TP, FP, FN, TN])
    accuracy, f1, mcc = accuracy_score(y, p), f1_score(y, p), matthews_corrcoef(y, p)
    assert confusion_from(accuracy, f1, *QQP_DEV) == pytest.approx([TP, FP, FN, TN])
    rounded = {"accuracy": round(100 * accuracy, 2), "f1": round(100 * f1, 2)}
    assert derived_mcc(rounded, *QQP_DEV) == pytest.approx(mcc, abs=5e-4)
    assert is_possible([accuracy, f1, mcc], *QQP_DEV)
    assert not is_possible([accuracy, f1, mcc + 1e-4], *QQP_DEV)
    assert not is_possible([accuracy + 1e-5, f1, mcc], *QQP_DEV)
    assert not is_possible([accuracy, f1 + 1e-5, mcc], *QQP_DEV)


def test_every_triple_of_a_small_set_is_possible_and_others_are_not() -> None:
    for tp in range(12):
        for fp in range(20):
            y = np.repeat([1, 1, 0, 0], [tp, 11 - tp, fp, 19 - fp])
            p = np.repeat([1, 0, 1, 0], [tp, 11 - tp, fp, 19 - fp])
            triple = [accuracy_score(y, p), f1_score(y, p, zero_division=0), matthews_corrcoef(y, p)]
            assert is_possible(triple, 30, 11), (tp, fp)
            assert not is_possible([triple[0], triple[1], triple[2] + 0.01], 30, 11), (tp, fp)
    assert confusion_from(0.99, 0.5, 30, 11) is None


@pytest.mark.parametrize(
    "result", load_published()["results"], ids=lambda result: f"{result['model']} {result['method']}"
)
def test_every_result_has_a_source_and_is_possible(result: dict[str, Any]) -> None:
    assert set(result) <= {"model", "method", "accuracy", "f1", "split", "source"}
    assert result["source"]
    if result["split"] == "dev" and "f1" in result:
        mcc = derived_mcc(result, *QQP_DEV)
        assert mcc is not None
        assert 0.7 < mcc < 0.9


def test_the_derived_mcc_is_that_of_known_counts_and_of_adaloras_table() -> None:
    content = load_published()
    assert (content["examples"], content["positives"]) == QQP_DEV
    results = {(result["model"], result["method"]): result for result in content["results"]}
    assert derived_mcc(results["BERT-base-uncased", "full"], *QQP_DEV) == pytest.approx(0.8073, abs=1e-4)
    for method, mcc in (("full", 0.838), ("BitFit", 0.758), ("LoRA r8 all linears", 0.830)):
        assert derived_mcc(results["DeBERTaV3-base", method], *QQP_DEV) == pytest.approx(mcc, abs=0.001)


def test_results_are_shown_beside_runs_on_that_set_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "dev/a", data=DEV, metrics={"validation/accuracy": 0.9, "validation/f1": 0.1})
    make(tmp_path / "other/a")
    table = to_markdown(add_published_results(summarise([tmp_path / "dev"])))
    assert "| DeBERTaV3-base, full | 92.40 | 89.80 | 0.838 | Zhang et al. 2023" in table
    assert "71.2" not in table  # of the test set
    assert "ChatGPT" not in table  # of fifty examples
    assert "impossible on that set" in table
    other = add_published_results(summarise([tmp_path / "other"]))
    assert other.published is None
    assert any("no published results" in line and "40,430" in line for line in other.footnotes)
    assert "1 rows are of other data" in to_markdown(add_published_results(summarise([tmp_path])))
    assert main([str(tmp_path / "dev"), "--anchors"]) == 0
    assert "JeremiahZ" in capsys.readouterr().out
    with refuses(Code.CONFLICT, key="--anchors"):
        main([str(tmp_path / "dev"), "--anchors", "--format", "csv"])
    assert len(json.loads(to_json(add_published_results(summarise([tmp_path]))))) == 2  # our rows alone
