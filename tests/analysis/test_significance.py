"""Verdicts about the rows of a table: which runs are paired, what is tested, and what is said where nothing can be."""

from __future__ import annotations

import csv
import io
import json
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from lora_bench.analysis import statistics
from lora_bench.analysis.formats import to_csv, to_json, to_latex, to_markdown
from lora_bench.analysis.summary import summarise
from lora_bench.compare import main
from lora_bench.errors import Code
from lora_bench.evaluation import confusion
from lora_bench.records.run_folder import Run
from tests.command_line import refuses

if TYPE_CHECKING:
    from pathlib import Path

    from lora_bench.analysis.table import Table

N = 1500
LABELS = (np.random.default_rng(0).random(N) < 0.4).astype(int)
EASE = np.random.default_rng(1).normal(3.0, 2.3, N)


def predicted(quality: float, seed: int) -> np.ndarray:
    """Return the labels that a model of some quality predicts; difficult examples are difficult for all models."""
    right = EASE + quality + 0.5 * np.random.default_rng(100 + seed).normal(size=N) > 0
    return np.where(right, LABELS == 1, LABELS == 0)


def make(folder: Path, adapter: str, seed: int | None, answers: np.ndarray, **sections: Any) -> Path:
    """A finished run with these predictions; `seed` None has no such key, as what was not trained."""
    config = {"adapter": {"method": adapter, "rank": 8}} | ({} if seed is None else {"seed": seed})
    config |= sections.pop("config", {})
    choices = {"model": "bert", "adapter": adapter, "data": "qqp"}
    run = Run.claim(folder, choices=choices, config=config, overrides=[f"adapter={adapter}", f"seed={seed}"])
    mcc = float(confusion.compute_metric(confusion.confusion_counts(LABELS, answers)))
    run.write_predictions("validation", np.arange(N), LABELS, np.where(answers, 0.8, 0.3))
    run.update(metrics={"validation/mcc": mcc, "selection/mcc": mcc}, data={"fingerprint": "one"})
    run.update(**sections)
    run.finish("done")
    return folder


def sweep(folder: Path, qualities: dict[str, float], seeds: int = 3) -> Path:
    for i, (adapter, quality) in enumerate(qualities.items()):
        for seed in range(seeds):
            make(folder / f"{adapter}-{seed}", adapter, seed, predicted(quality, 10 * i + seed))
    return folder


def on_splits(
    folder: Path,
    adapter: str,
    seed: int,
    answers: np.ndarray,
    splits: dict[str, str],
    data: str = "qqp",
    labels: np.ndarray = LABELS,
) -> None:
    """A finished run that gives the same answers on each of these splits, which have a fingerprint each."""
    mcc = float(confusion.compute_metric(confusion.confusion_counts(labels, answers)))
    choices = {"model": "bert", "adapter": adapter, "data": data}
    config = {"adapter": {"method": adapter}, "seed": seed}
    run = Run.claim(folder, choices=choices, config=config, overrides=[])
    for split in splits:
        run.write_predictions(split, np.arange(len(labels)), labels, np.where(answers, 0.8, 0.3))
    metrics = {f"{split}/mcc": mcc for split in (*splits, "selection")}
    run.update(metrics=metrics, data={"fingerprint": splits, "rows": dict.fromkeys(splits, len(labels))})
    run.finish("done")


def verdicts(table: Table) -> dict[str, str]:
    return {row.keys["adapter"]: row.finding.verdict for row in table.rows if row.finding}


def finding(table: Table, adapter: str) -> Any:
    return next(row.finding for row in table.rows if row.keys["adapter"] == adapter)


# -- what is tested --


def test_a_row_is_better_worse_or_inconclusive_against_full_fine_tuning(tmp_path: Path) -> None:
    table = summarise([sweep(tmp_path, {"full": 0.0, "dora": 2.0, "vera": -2.0, "lora": 0.02})])
    assert verdicts(table) == {"full": "baseline", "dora": "better", "vera": "worse", "lora": "inconclusive"}
    assert "against adapter=full" in table.notes[0]
    assert "--baseline" in table.notes[0]
    assert "3 paired seeds and 1,500 examples" in table.notes[0]
    assert "Holm over 3 rivals" in table.notes[0]


def test_the_numbers_are_those_of_the_crossed_test_and_holm(tmp_path: Path) -> None:
    table = summarise([sweep(tmp_path, {"full": 0.0, "dora": 0.5, "lora": 0.3})])
    sides = {
        adapter: np.stack([predicted(quality, 10 * i + seed) for seed in range(3)])
        for i, (adapter, quality) in enumerate({"full": 0.0, "dora": 0.5, "lora": 0.3}.items())
    }
    values = [confusion.compute_metric(confusion.confusion_counts(LABELS, side)) for side in sides.values()]
    pool = statistics.pool_seed_variance([{str(i): float(x) for i, x in enumerate(row)} for row in values])
    assert pool is not None
    assert pool.degrees == 4
    tests = {
        adapter: statistics.crossed_test(LABELS, sides[adapter], sides["full"]).with_pooled_seeds(pool)
        for adapter in ("dora", "lora")
    }
    adjusted = dict(zip(tests, statistics.holm([test.p for test in tests.values()]), strict=True))
    for adapter, test in tests.items():
        result = finding(table, adapter)
        assert result.difference == pytest.approx(test.difference)
        assert (result.difference_low, result.difference_high) == pytest.approx(test.interval())
        assert (result.p, result.p_holm) == pytest.approx((test.p, adjusted[adapter]))
        assert result.power == pytest.approx(test.power(0.01, 0.025))
        means = {row.keys["adapter"]: row.stats["mcc"].mean for row in table.rows}
        assert result.difference == pytest.approx(means[adapter] - means["full"])
        assert len(result.p_mcnemar) == len(result.p_bootstrap) == 3


def test_the_spread_of_methods_that_learned_nothing_or_were_not_trained_is_not_pooled(tmp_path: Path) -> None:
    sweep(tmp_path, {"full": 0.0, "dora": 0.5})
    alone = finding(summarise([tmp_path]), "dora")
    for seed in range(3):
        guesses = np.random.default_rng(seed).permutation(LABELS)
        make(tmp_path / f"vera-{seed}", "vera", seed, guesses)
    make(tmp_path / "llm", "prompted", None, predicted(0.2, 77), config={"llm": {"model": "m"}})
    table = summarise([tmp_path], baseline="full")
    with_others = finding(table, "dora")
    assert with_others.p == alone.p
    assert {row.finding.verdict for row in table.rows if row.finding} >= {"baseline", "worse"}


@pytest.mark.parametrize("measure", ["f1", "accuracy"])
def test_another_measure_is_tested_where_it_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], measure: str
) -> None:
    sweep(tmp_path, {"full": 0.0, "dora": 0.5})
    result = finding(summarise([tmp_path], measure=measure), "dora")
    ours, theirs = (np.stack([predicted(q, i + seed) for seed in range(3)]) for q, i in ((0.5, 10), (0.0, 0)))
    test = statistics.crossed_test(LABELS, ours, theirs, measure)
    assert (result.measure, result.difference, result.p) == (
        measure,
        pytest.approx(test.difference),
        pytest.approx(test.p),
    )
    values = [
        [confusion.compute_metric(confusion.confusion_counts(LABELS, one), measure) for one in side]
        for side in (ours, theirs)
    ]
    assert result.p_seeds == pytest.approx(statistics.seeds_test(*values).p)
    assert result.difference == pytest.approx(np.mean(values[0]) - np.mean(values[1]))
    assert main([str(tmp_path), "--measure", measure, "--format", "md"]) == 0
    output = capsys.readouterr().out
    assert f"| {measure} difference |" in output
    assert f"validation {'F1' if measure == 'f1' else measure} against adapter=full" in output


def test_a_measure_that_is_not_tested_is_refused(tmp_path: Path) -> None:
    with refuses(Code.INVALID_SYNTAX, key="compare") as caught:
        main([str(tmp_path), "--measure", "nll"])
    assert "--measure" in str(caught.value)
    assert "nll" in str(caught.value)


def test_a_wide_margin_makes_rows_equivalent(tmp_path: Path) -> None:
    sweep(tmp_path, {"full": 0.0, "lora": 0.02})
    assert verdicts(summarise([tmp_path], margin=0.2))["lora"] == "equivalent"


def test_equal_predictions_are_equivalent(tmp_path: Path) -> None:
    for adapter in ("full", "lora"):
        for seed in range(2):
            make(tmp_path / f"{adapter}{seed}", adapter, seed, predicted(0.0, seed))
    assert verdicts(summarise([tmp_path]))["lora"] == "equivalent"


def test_differences_that_are_equal_in_all_seeds_give_no_verdict_from_their_spread(tmp_path: Path) -> None:
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(N)
        for adapter, wrong in (("full", 30), ("lora", 25)):  # of each label, and others in every seed
            flipped = np.isin(np.arange(N), [i for y in (0, 1) for i in order[LABELS[order] == y][:wrong]])
            make(tmp_path / f"{adapter}{seed}", adapter, seed, np.where(flipped, 1 - LABELS, LABELS) == 1)
            order = order[::-1]
    result = finding(summarise([tmp_path]), "lora")
    assert (result.verdict, result.p_seeds, result.effect_size) == ("inconclusive", None, None)
    assert result.difference_low < 0 < result.difference < result.difference_high
    assert result.power < 0.5


# -- which row is the baseline --


def test_a_row_that_gives_every_example_the_same_answer_has_no_verdict(tmp_path: Path) -> None:
    sweep(tmp_path, {"full": 0.8})
    for seed in range(3):
        make(tmp_path / f"mute{seed}", "lora", seed, np.zeros_like(predicted(0.8, seed)))
    table = summarise([tmp_path])
    assert verdicts(table) == {"full": "baseline", "lora": "not tested"}
    assert "same label" in finding(table, "lora").why


@pytest.mark.parametrize("name", ["dora", "adapter=dora", "FOLDER/dora-1"])
def test_a_baseline_is_named_by_value_key_or_folder(tmp_path: Path, name: str) -> None:
    sweep(tmp_path, {"full": 0.0, "dora": 2.0})
    table = summarise([tmp_path], baseline=name.replace("FOLDER", str(tmp_path)))
    assert verdicts(table) == {"full": "worse", "dora": "baseline"}
    assert "against adapter=dora (named by --baseline)" in table.notes[0]


def test_without_full_the_baseline_is_plain_lora_then_the_best_on_selection(tmp_path: Path) -> None:
    assert verdicts(summarise([sweep(tmp_path / "a", {"lora": 0.0, "dora": 2.0})]))["lora"] == "baseline"
    assert verdicts(summarise([sweep(tmp_path / "b", {"vera": 0.0, "dora": 2.0})]))["dora"] == "baseline"


def test_a_baseline_may_be_a_setting_that_does_not_stand_for_its_method(tmp_path: Path) -> None:
    for rank, quality in ((2, 0.0), (4, 2.0), (8, 1.0)):
        config = {"adapter": {"method": "lora", "rank": rank}}
        for seed in range(3):
            make(tmp_path / f"{rank}{seed}", "lora", seed, predicted(quality, 10 * rank + seed), config=config)
    table = summarise([tmp_path], baseline="adapter.rank=2")
    assert {row.keys["adapter.rank"]: row.finding.verdict for row in table.rows if row.finding} == {
        2: "baseline",
        4: "better",
    }
    assert summarise([tmp_path], baseline="lora").tests is None  # the chosen setting has no rival


def test_of_several_methods_that_fit_the_best_on_selection_is_the_baseline(tmp_path: Path) -> None:
    for init, quality in (("kaiming", 0.0), ("pissa", 2.0)):
        config = {"adapter": {"method": "lora", "init": init}}
        for seed in range(3):
            make(tmp_path / f"{init}{seed}", "lora", seed, predicted(quality, seed), config=config)
    table = summarise([tmp_path], baseline="lora")
    assert {row.keys["adapter.init"]: row.finding.verdict for row in table.rows if row.finding} == {
        "kaiming": "worse",
        "pissa": "baseline",
    }
    assert any("(named by --baseline, the best of them on selection)" in note for note in table.notes)


def test_of_several_names_the_chosen_setting_is_the_baseline(tmp_path: Path) -> None:
    """The first run named is of a learning rate that was not chosen."""
    for adapter, lr, quality in (("lora", 0.1, -2.0), ("lora", 0.01, 0.0), ("dora", 0.1, 2.0), ("dora", 0.01, 0.0)):
        for seed in range(3):
            config = {"adapter": {"method": adapter}, "optimizer": {"lr": lr}}
            make(tmp_path / f"{adapter}-{lr}-{seed}", adapter, seed, predicted(quality, seed), config=config)
    names = sorted(map(str, tmp_path.glob("lora-*")), reverse=True)
    table = summarise([tmp_path], baseline=[*names, "unknown"])
    assert {
        (row.keys["adapter"], row.keys["optimizer.lr"]): row.finding.verdict for row in table.rows if row.finding
    } == {
        ("lora", 0.01): "baseline",
        ("dora", 0.1): "better",
    }


def test_an_unknown_baseline_is_refused_with_the_nearest(tmp_path: Path) -> None:
    sweep(tmp_path, {"full": 0.0, "dora": 2.0}, seeds=2)
    with refuses(Code.UNKNOWN_CHOICE, key="--baseline") as caught:
        main([str(tmp_path), "--baseline", "dorra"])
    assert caught.value.value == "dorra"
    assert "dora" in str(caught.value)


@pytest.mark.parametrize("margin", ["0", "-1", "x", "nan", "1e9"])
def test_a_margin_outside_its_range_is_refused(tmp_path: Path, margin: str) -> None:
    with refuses(Code.INVALID_SYNTAX, key="compare") as caught:
        main([str(tmp_path), f"--margin={margin}"])
    assert "--margin" in str(caught.value)


def test_the_setting_that_is_best_on_selection_is_tested(tmp_path: Path) -> None:
    for adapter, rank, quality in (("full", 0, 0.0), ("lora", 2, -2.0), ("lora", 4, 2.0)):
        for seed in range(3):
            config = {"adapter": {"method": adapter, "rank": rank}}
            make(tmp_path / f"{adapter}{rank}{seed}", adapter, seed, predicted(quality, seed), config=config)
    for table in (summarise([tmp_path]), summarise([tmp_path], by="adapter")):
        assert verdicts(table)["lora"] == "better"
        assert [row.keys["adapter.rank"] for row in table.rows] == [4, 0]
        assert any("best on selection, of 2 settings" in line for line in table.notes)


# -- what cannot be tested says so --


def test_one_seed_has_numbers_of_the_examples_but_no_verdict(tmp_path: Path) -> None:
    table = summarise([sweep(tmp_path, {"full": 0.0, "lora": 2.0}, seeds=1)])
    result = finding(table, "lora")
    assert (result.verdict, result.p_holm, result.power) == ("no verdict", None, None)
    assert result.p < 0.001
    assert result.p_seeds is None
    assert any("1 of 1 rows" in line and "one seed" in line for line in table.notes)


def test_seeds_that_both_have_are_paired(tmp_path: Path) -> None:
    sweep(tmp_path, {"full": 0.0, "lora": 1.0})
    make(tmp_path / "more", "lora", 7, predicted(-9.0, 7))
    assert finding(summarise([tmp_path]), "lora").paired_seeds == 3
    make(tmp_path / "x", "dora", 8, predicted(0.0, 8))
    assert "seed" in finding(summarise([tmp_path]), "dora").why


def test_what_was_not_trained_stands_beside_every_seed(tmp_path: Path) -> None:
    sweep(tmp_path, {"lora": 2.0})
    make(tmp_path / "gpt", "none", 0, predicted(0.0, 50), config={"llm": {"model": "x"}, "adapter": {}})
    table = summarise([tmp_path], baseline=str(tmp_path / "gpt"))
    assert (finding(table, "lora").verdict, finding(table, "lora").paired_seeds) == ("better", 3)


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        ("missing", "cannot be used"),
        ("damaged", "cannot be used"),
        ("other", "other examples"),
        ("altered", "disagree about MCC"),
    ],
)
def test_predictions_that_cannot_be_used_are_told_and_left_out(tmp_path: Path, harm: str, why: str) -> None:
    sweep(tmp_path, {"full": 0.0, "lora": 2.0})
    for seed in (1, 2):
        folder = tmp_path / f"lora-{seed}"
        run = Run(folder, json.loads((folder / "run.json").read_text()))
        file = folder / "predictions/validation.parquet"
        answers = predicted(2.0, 10 + seed)
        if harm == "missing":
            file.unlink()
        elif harm == "damaged":
            file.write_bytes(file.read_bytes()[:-100])
        elif harm == "other":
            run.write_predictions("validation", np.arange(N) + 1, LABELS, np.where(answers, 0.8, 0.3))
        else:
            run.write_predictions("validation", np.arange(N), LABELS, np.where(answers, 0.3, 0.8))
        table = summarise([tmp_path])
        result = finding(table, "lora")
        assert result.paired_seeds == 3 - seed
        assert any("1 of 1 rows" in line and (why in line or seed == 2) for line in table.notes)
    assert result.verdict == "no verdict"


def test_few_examples_without_any_difference_show_no_equivalence(tmp_path: Path) -> None:
    """Eight equal answers leave room for a difference of 3 / 8."""
    for adapter in ("full", "lora"):
        for seed in range(3):
            labels = np.arange(8) % 2
            on_splits(tmp_path / f"{adapter}{seed}", adapter, seed, labels, {"validation": "one"}, labels=labels)
    result = finding(summarise([tmp_path]), "lora")
    assert (result.verdict, result.difference) == ("no verdict", 0.0)
    assert (result.p, result.difference_low, result.detectable) == (None, None, None)
    assert "8 examples" in result.why


def test_equal_labels_have_no_mcc_to_test_but_an_accuracy(tmp_path: Path) -> None:
    labels = np.ones(N, int)
    for adapter, share in (("full", 0.3), ("lora", 0.9)):
        for seed in range(3):
            answers = (np.random.default_rng(seed).random(N) < share).astype(int)
            on_splits(tmp_path / f"{adapter}{seed}", adapter, seed, answers, {"validation": "one"}, labels=labels)
    result = finding(summarise([tmp_path], baseline="full"), "lora")
    assert result.verdict == "not tested"
    assert "same label" in result.why
    assert finding(summarise([tmp_path], baseline="full", measure="accuracy"), "lora").verdict == "better"


def test_prompts_with_several_seeds_are_tested_over_all_of_them(tmp_path: Path) -> None:
    """The seed chooses the examples in the prompt: one seed is ahead, two are behind."""
    for seed, quality in enumerate((2.0, -3.0, -3.0)):
        make(tmp_path / f"big{seed}", "big", seed, predicted(quality, seed), config={"llm": {"model": "m"}})
        make(tmp_path / f"small{seed}", "small", seed, predicted(0.0, 10 + seed), config={"llm": {"model": "m"}})
    result = finding(summarise([tmp_path], baseline="small"), "big")
    means = [fmean(_mcc(tmp_path / f"{name}{seed}") for seed in range(3)) for name in ("big", "small")]
    assert result.paired_seeds == 3
    assert result.difference == pytest.approx(means[0] - means[1])
    assert result.verdict == "inconclusive"


def _mcc(folder: Path) -> float:
    return float(json.loads((folder / "run.json").read_text())["metrics"]["validation/mcc"])


@pytest.mark.parametrize("where", [None, "data=imdb"])
def test_data_with_a_test_split_only_is_tested_beside_data_with_validation(tmp_path: Path, where: str | None) -> None:
    for i, (adapter, quality) in enumerate({"full": 0.0, "dora": 1.5}.items()):
        for seed in range(3):
            answers = predicted(quality, 10 * i + seed)
            on_splits(tmp_path / f"qqp-{adapter}{seed}", adapter, seed, answers, {"validation": "one"}, "qqp")
            on_splits(tmp_path / f"imdb-{adapter}{seed}", adapter, seed, answers, {"test": "two"}, "imdb")
    for seed in range(3):
        guesses = np.random.default_rng(seed).permutation(LABELS)
        on_splits(tmp_path / f"imdb-vera{seed}", "vera", seed, guesses, {"test": "two"}, "imdb")
    rows = [row for row in summarise([tmp_path], where=where).rows if row.split == "test"]
    found = {row.keys["adapter"]: row.finding.verdict for row in rows if row.finding}
    assert found == {"full": "baseline", "dora": "better", "vera": "worse"}
    assert {row.keys["adapter"]: row.unlearned for row in rows} == {"full": 0, "dora": 0, "vera": 3}
    assert [row.keys["adapter"] for row in rows if row.recommended] == ["dora"]


def test_a_run_that_lacks_the_test_split_is_compared_on_validation(tmp_path: Path) -> None:
    for seed in range(3):
        splits = {"validation": "one", "test": "tt"}
        on_splits(tmp_path / f"lora{seed}", "lora", seed, predicted(0.0, seed), splits, "snli")
        on_splits(tmp_path / f"dora{seed}", "dora", seed, predicted(1.5, 10 + seed), {"validation": "one"}, "snli")
    assert verdicts(summarise([tmp_path])) == {"lora": "baseline", "dora": "better"}


def test_rows_on_other_data_are_not_tested_together(tmp_path: Path) -> None:
    sweep(tmp_path, {"full": 0.0, "lora": 2.0})
    for seed in range(3):
        make(tmp_path / f"other{seed}", "dora", seed, predicted(0.0, seed), data={"fingerprint": "two"})
    table = summarise([tmp_path])
    assert verdicts(table) == {"full": "baseline", "lora": "better", "dora": "not tested"}
    assert "same data" in finding(table, "dora").why


def test_many_runs_are_tested_only_against_a_named_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_bench.analysis.baseline.FEW_RUNS", 5)
    sweep(tmp_path, {"full": 0.0, "lora": 2.0})
    table = summarise([tmp_path])
    assert table.tests is None
    assert any("6 runs" in line and "--baseline NAME" in line for line in table.footnotes)
    assert verdicts(summarise([tmp_path], baseline="full"))["lora"] == "better"


# -- the forms --


def test_every_form_has_the_same_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = summarise([sweep(tmp_path, {"full": 0.0, "lora": 2.0})])
    result = finding(table, "lora")
    lines = {line["adapter"]: line for line in csv.DictReader(io.StringIO(to_csv(table)))}
    objects = {line["adapter"]: line for line in json.loads(to_json(table))}
    assert float(lines["lora"]["tests.difference"]) == objects["lora"]["tests.difference"] == result.difference
    assert float(lines["lora"]["tests.p_holm"]) == objects["lora"]["tests.p_holm"] == result.p_holm
    assert len(objects["lora"]["tests.p_mcnemar"]) == 3
    assert not {"tests.p_mcnemar", "tests.p_bootstrap", "runs"} & lines["lora"].keys()
    assert (lines["full"]["tests.verdict"], objects["full"]["tests.p"]) == ("baseline", None)
    difference = f"{result.difference:+.4f}"
    assert f"| **lora** | {difference} |" in to_markdown(table)
    assert rf"\textbf{{lora}} & {difference} & " in to_latex(table)
    assert to_latex(table).count(r"\begin{tabular}") == 2
    assert main([str(tmp_path)]) == 0
    assert difference in capsys.readouterr().out
