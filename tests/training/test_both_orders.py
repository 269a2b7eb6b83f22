"""With `trainer.score_both_orders` a pair's score is the mean of both orders of its texts, wherever scores are made."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import lora_bench
from lora_bench.data.examples import Examples
from lora_bench.data.tokenization import scoring_table, tokenize
from lora_bench.records.predictions import read
from lora_bench.run.loaded_data import LoadedData
from lora_bench.training.prediction import predict
from tests import command_line
from tests.adapters.tools import adapter, experiment, pack, stir
from tests.command_line import toy_run

PAIRS = [("How do I learn Go?", "What is the best way to learn Go?"), ("a b c", "d"), ("x " * 30, "y")]
BOTH = "trainer.score_both_orders=true"


@pytest.mark.parametrize("form", ["bert", "t5"])
def test_scores_are_the_mean_of_both_orders(form: str) -> None:
    data = experiment().data
    a_pack = stir(pack(form, (adapter("lora"), 0), (adapter("lora", "rank=2"), 1)))
    texts = tuple(list(column) for column in zip(*PAIRS, strict=True))
    of = partial(Examples, np.arange(3), labels=np.array([1, 0, 1]))
    one, other = (
        predict(a_pack, tokenize(of(t), data.text_columns, a_pack.backbone, 128, cached=False), 2)
        for t in (texts, texts[::-1])
    )
    assert np.abs(one - other).max() > 1e-3
    table, exchanged = (
        scoring_table(of(t), data, a_pack.backbone, both_orders=True, cached=False) for t in (texts, texts[::-1])
    )
    np.testing.assert_allclose(predict(a_pack, table, 2), (one + other) / 2, atol=1e-6)
    np.testing.assert_allclose(predict(a_pack, exchanged, 3), predict(a_pack, table, 2), atol=1e-6)
    two_rows = table.take(np.array([2, 0]))
    np.testing.assert_allclose(predict(a_pack, two_rows, 2), predict(a_pack, table, 2)[:, [2, 0]], atol=1e-6)
    alone = scoring_table(of(texts), data, a_pack.backbone, both_orders=False, cached=False)
    assert alone.reversed_view is None


@pytest.mark.usefixtures("in_tmp")
@pytest.mark.parametrize("objective", ["order_consistency", "alternate_order"])
@pytest.mark.parametrize("kept", [False, True])
def test_a_run_chooses_reports_and_predicts_so(kept: bool, objective: str) -> None:
    """Also where the frozen layers' output is kept: of the selection split in both orders."""
    overrides = toy_run(
        BOTH, "trainer.max_steps=6", "trainer.eval_every=3", "adapter.layers=top:1", "data.perturb=[order]"
    )
    overrides += [f"trainer.prefix_cache_bytes={4e9 if kept else 0}", "optimizer.lr=1e-2"]
    overrides += [f"trainer.objective={objective}", "hydra.run.dir=run"]
    answer = command_line.lora_bench("train", *overrides)
    assert (answer.code, answer.err) == (0, "")
    record = json.loads(Path("run/run.json").read_text(encoding="utf-8"))
    assert (record["cost"]["prefix_fill_flops"] is not None) == kept
    run = lora_bench.load("run")
    assert run.predict(PAIRS) == pytest.approx(run.predict([pair[::-1] for pair in PAIRS]), abs=1e-6)
    splits = LoadedData.load(run.experiment.data).splits
    for name in ("validation", "selection"):
        scores_again = run.score(splits[name])
        plain, swapped = (
            predict(run.pack, tokenize(splits[name], ["question1", "question2"], run.pack.backbone, 128, reverse=s), 32)
            for s in (False, True)
        )
        np.testing.assert_allclose(scores_again, (plain + swapped)[0] / 2, atol=1e-6)
        labels = splits[name].labels
        assert labels is not None
        nll = -np.log(np.where(labels == 1, scores_again, 1 - scores_again)).mean()
        assert record["metrics"][f"{name}/nll"] == pytest.approx(nll, abs=1e-5)
    written = read(Path("run"), "validation")
    assert written is not None
    np.testing.assert_allclose(written.scores, run.score(splits["validation"]), atol=1e-6)
    assert record["metrics"]["validation/perturbed/order_consistency"] == 1.0


@pytest.mark.usefixtures("in_tmp")
@pytest.mark.parametrize(
    ("relation", "reverses"),
    [
        ("paraphrase", True),
        ("entailment", False),
        pytest.param("similarity", True, marks=pytest.mark.matrix),
        pytest.param("null", False, marks=pytest.mark.matrix),
    ],
)
def test_the_recipe_reverses_pairs_whose_label_does_not_depend_on_the_order(relation: str, reverses: bool) -> None:
    overrides = toy_run("experiment=enhanced", f"data.relation={relation}", "data.report=false", "trainer.max_steps=2")
    answer = command_line.lora_bench("train", *overrides, "hydra.run.dir=run")
    assert (answer.code, answer.err) == (0, "")
    run = lora_bench.load("run")
    trainer, settings = run.experiment.trainer, run.experiment.data
    assert trainer.objective_of(settings) == ("alternate_order" if reverses else "cross_entropy")
    agrees = run.predict(PAIRS) == pytest.approx(run.predict([pair[::-1] for pair in PAIRS]), abs=1e-6)
    assert agrees == reverses


@pytest.mark.usefixtures("in_tmp")
def test_the_recipe_serves_single_texts() -> None:
    Path("train.tsv").write_text("text\tlabel\n" + "a b\t0\nc d e\t1\n" * 20, encoding="utf-8")
    data = ["data=files", "data.path=.", "data.text_columns=[text]", "data.report=false", "data.selection_size=8"]
    toy = [text for text in toy_run("experiment=enhanced", "trainer.max_steps=2") if not text.startswith("data")]
    answer = command_line.lora_bench("train", *toy, *data, "hydra.run.dir=run")
    assert (answer.code, answer.err) == (0, "")
    assert len(lora_bench.load("run").predict(["a b c", "d"])) == 2
