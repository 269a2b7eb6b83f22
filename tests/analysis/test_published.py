"""Published figures: each is possible on the set it claims, MCC follows from the other two, and splits never mix."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from lora_bench.analysis.formats import to_json, to_markdown
from lora_bench.analysis.published import derived_mcc, is_possible, load, possible, with_anchors
from lora_bench.analysis.summary import summarise
from lora_bench.compare import main
from lora_bench.errors import Code
from tests.command_line import refuses
from tests.test_compare import make

if TYPE_CHECKING:
    from pathlib import Path

# Of huggingface.co/JeremiahZ/bert-base-uncased-qqp, where accuracy, precision and recall give whole counts.
TP, FP, FN, TN = 13_196, 1950, 1689, 23_595
DEV = {"fingerprint": "dev", "source": "hub", "rows": {"validation": 40_430}, "positives": {"validation": 14_885}}


def test_known_counts_are_found_again() -> None:
    y = np.repeat([1, 0, 1, 0], [TP, FP, FN, TN])
    p = np.repeat([1, 1, 0, 0], [TP, FP, FN, TN])
    accuracy, f1, mcc = accuracy_score(y, p), f1_score(y, p), matthews_corrcoef(y, p)
    exact = possible(accuracy, f1, digits=9)
    assert exact is not None
    assert (exact.low, exact.high) == pytest.approx((mcc, mcc))
    rounded = possible(round(accuracy, 4), round(f1, 4), digits=4)
    assert rounded is not None
    assert rounded.low <= mcc <= rounded.high
    assert rounded.high - rounded.low < 0.001
    assert is_possible(round(accuracy, 4), round(f1, 4), round(mcc, 4), digits=4)
    assert not is_possible(round(accuracy, 4), round(f1, 4), round(mcc, 4) + 0.01, digits=4)


def test_every_triple_of_a_small_set_is_possible_and_others_are_not() -> None:
    sizes = {"examples": 30, "positives": 11}
    for tp in range(12):
        for fp in range(20):
            y = np.repeat([1, 1, 0, 0], [tp, 11 - tp, fp, 19 - fp])
            p = np.repeat([1, 0, 1, 0], [tp, 11 - tp, fp, 19 - fp])
            f1, mcc = f1_score(y, p, zero_division=0), matthews_corrcoef(y, p)
            assert is_possible(accuracy_score(y, p), f1, mcc, digits=9, **sizes), (tp, fp)
    assert possible(0.99, 0.5, digits=3, **sizes) is None


@pytest.mark.parametrize("figure", load()["figures"], ids=lambda figure: f"{figure['model']} {figure['method']}")
def test_every_figure_has_a_source_and_is_possible(figure: dict[str, Any]) -> None:
    assert set(figure) <= {"model", "method", "accuracy", "f1", "split", "source"}
    assert figure["source"]
    if figure["split"] == "dev" and "f1" in figure:
        found = derived_mcc(figure)
        assert found is not None
        assert 0.7 < found.low <= found.high < 0.9


def test_the_derived_mcc_is_that_of_known_counts_and_of_adaloras_table() -> None:
    figures = {(each["model"], each["method"]): each for each in load()["figures"]}
    bert = derived_mcc(figures["BERT-base-uncased", "full"])
    assert bert is not None
    assert (bert.low + bert.high) / 2 == pytest.approx(0.8073, abs=1e-4)  # of the known counts
    for method, mcc in (("full", 0.838), ("BitFit", 0.758), ("LoRA r8 all linears", 0.830)):
        found = derived_mcc(figures["DeBERTaV3-base", method])
        assert found is not None
        assert (found.low + found.high) / 2 == pytest.approx(mcc, abs=0.001)


def test_figures_are_shown_beside_runs_on_that_set_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "dev/a", data=DEV, metrics={"validation/accuracy": 0.9, "validation/f1": 0.1})
    make(tmp_path / "other/a")
    table = to_markdown(with_anchors(summarise([tmp_path / "dev"])))
    assert "| DeBERTaV3-base, full | 92.40 | 89.80 | 0.838 | Zhang et al. 2023" in table
    assert "71.2" not in table  # of the test set
    assert "ChatGPT" not in table  # of fifty examples
    assert "impossible on that set" in table
    other = with_anchors(summarise([tmp_path / "other"]))
    assert other.anchors is None
    assert any("no published figures" in line and "40,430" in line for line in other.below)
    assert "1 rows are of other data" in to_markdown(with_anchors(summarise([tmp_path])))
    assert main([str(tmp_path / "dev"), "--anchors"]) == 0
    assert "JeremiahZ" in capsys.readouterr().out
    with refuses(Code.CONFLICT, key="--anchors"):
        main([str(tmp_path / "dev"), "--anchors", "--format", "csv"])
    assert len(json.loads(to_json(with_anchors(summarise([tmp_path]))))) == 2  # our rows alone
