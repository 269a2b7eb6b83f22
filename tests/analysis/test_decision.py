"""What to use: a row is one setting, and table, verdicts and advice name the same one in every format."""

from __future__ import annotations

import csv
import io
import json
import shutil
from html import unescape
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_bench.analysis import decision
from lora_bench.analysis.formats import to_csv, to_json, to_latex, to_markdown
from lora_bench.analysis.settings import OUTSIDE_THE_SETTING
from lora_bench.analysis.summary import View, summarise
from lora_bench.config.keys import flatten
from lora_bench.evaluation import confusion
from lora_bench.records.run_folder import Run

if TYPE_CHECKING:
    from pathlib import Path

    from lora_bench.analysis.decision import Decision
    from lora_bench.analysis.table import Table

N = 600
LABELS = (np.random.default_rng(0).random(N) < 0.4).astype(int)
EASE = np.random.default_rng(1).normal(2.0, 2.3, N)


def make(
    folder: Path,
    adapter: str,
    seed: int,
    quality: float,
    *,
    selection: float | None = None,
    flops: float | None = 1e12,
    **settings: Any,
) -> None:
    """Write a finished run whose predictions have some quality; `settings` are dotted keys with `__`."""
    right = EASE + quality + 0.3 * np.random.default_rng([seed, *adapter.encode()]).normal(size=N) > 0
    answers = np.where(right, LABELS, 1 - LABELS)
    write(folder, adapter, seed, answers, selection=selection, flops=flops, **settings)


def write(folder: Path, adapter: str, seed: int, answers: np.ndarray, **given: Any) -> None:
    selection, flops = given.pop("selection", None), given.pop("flops", 1e12)
    config: dict[str, Any] = {"seed": seed}
    for key, value in given.items():
        group, name = key.split("__")
        config.setdefault(group, {})[name] = value
    run = Run.claim(
        folder, choices={"model": "bert", "adapter": adapter, "data": "qqp"}, config=config, overrides=[f"seed={seed}"]
    )
    mcc = float(confusion.compute_metric(confusion.confusion_counts(LABELS, answers)))
    run.write_predictions("validation", np.arange(N), LABELS, np.where(answers, 0.8, 0.3))
    metrics = {"validation/mcc": mcc, "validation/accuracy": 0.8, "validation/f1": 0.7}
    run.update(metrics=metrics | {"selection/mcc": mcc if selection is None else selection})
    run.update(data={"fingerprint": "one", "rows": {"validation": N, "train": 100}}, cost={"train_flops": flops})
    run.finish("done")


def make_unscored(folder: Path, adapter: str, **settings: Any) -> None:
    """Write a finished run that was not scored on the selection split."""
    make(folder, adapter, 0, 1.0, **settings)
    record = json.loads((folder / "run.json").read_text())
    del record["metrics"]["selection/mcc"]
    (folder / "run.json").write_text(json.dumps(record))


def sweep(folder: Path, qualities: dict[str, float], seeds: int = 3, flops: dict[str, float] | None = None) -> Path:
    for adapter, quality in qualities.items():
        for seed in range(seeds):
            make(folder / f"{adapter}{seed}", adapter, seed, quality, flops=(flops or {}).get(adapter, 1e12))
    return folder


def decide(*arguments: Any, **keywords: Any) -> Decision:
    (one,) = summarise([sweep(*arguments, **keywords)]).decisions
    return one


def recommended(table: Table) -> list[str]:
    return [row.keys["adapter"] for row in table.rows if row.recommended]


# -- which setting --


def test_of_better_methods_the_best_on_selection_is_advised(tmp_path: Path) -> None:
    sweep(tmp_path, {"full": 0.0, "dora": 3.0})
    for seed in range(3):
        make(tmp_path / f"vera{seed}", "vera", seed, 2.5, selection=0.99)
    table = summarise([tmp_path])
    (one,) = table.decisions
    assert {row.keys["adapter"]: row.finding.verdict for row in table.rows if row.finding} == {
        "vera": "better",
        "dora": "better",
        "full": "baseline",
    }
    assert (one.reason, recommended(table)) == (decision.BETTER, ["vera"])
    assert "adapter=vera" in one.headline
    assert "adapter=full" in one.headline


def test_of_equivalent_methods_the_cheapest_is_advised(tmp_path: Path) -> None:
    flops = {"full": 3e12, "lora": 2e12, "dora": 2.2e12}
    sweep(tmp_path, {"full": 1.0, "lora": 1.0, "dora": 1.0}, flops=flops)
    table = summarise([tmp_path], margin=0.2)
    assert (table.decisions[0].reason, recommended(table)) == (decision.EQUIVALENT, ["lora"])
    assert "67% of its FLOPs" in table.advice[0]
    dearer = summarise([tmp_path], margin=0.2, baseline="lora")
    assert (dearer.decisions[0].reason, recommended(dearer)) == (decision.BEST_KNOWN, ["lora"])


def test_a_baseline_that_nobody_reaches_is_advised(tmp_path: Path) -> None:
    one = decide(tmp_path, {"full": 3.0, "lora": 0.0, "dora": 0.1})
    assert one.reason == decision.BEST_KNOWN
    assert one.recommended is not None
    assert one.recommended.keys["adapter"] == "full"


def test_an_inconclusive_comparison_says_how_much_more_to_run(tmp_path: Path) -> None:
    one = decide(tmp_path, {"full": 1.0, "lora": 1.1})
    assert one.reason == decision.INCONCLUSIVE
    assert len(one.sentences) == 2
    assert "With 3 seeds and 600 examples this comparison detects differences of" in one.sentences[1]
    assert "seed=range(" in one.sentences[1] or "examples" in one.sentences[1].split(";")[1]


def test_a_method_that_is_ahead_on_selection_but_worse_is_not_passed_over_in_silence(tmp_path: Path) -> None:
    for adapter, quality, selection in (("full", 1.0, 0.85), ("lora", 1.05, 0.9), ("dora", -1.5, 0.95)):
        for seed in range(3):
            make(tmp_path / f"{adapter}{seed}", adapter, seed, quality, selection=selection)
    (one,) = summarise([tmp_path]).decisions
    assert one.recommended is not None
    assert (one.reason, one.recommended.keys["adapter"]) == (decision.INCONCLUSIVE, "lora")
    assert "not ruled out" in one.headline
    assert "not ruled out" in one.sentences[0]


def test_one_seed_is_not_tested_and_more_are_asked_for(tmp_path: Path) -> None:
    one = decide(tmp_path, {"full": 1.0, "lora": 2.0}, seeds=1)
    assert (one.reason, one.recommended is not None and one.recommended.keys["adapter"]) == (decision.UNTESTED, "lora")
    assert "seed=range(3)" in one.sentences[1]


def test_what_learned_nothing_is_named_and_neither_advised_nor_a_baseline(tmp_path: Path) -> None:
    for seed in range(3):
        write(tmp_path / f"full{seed}", "full", seed, np.zeros(N, int), selection=0.9, flops=3e12)
    sweep(tmp_path, {"lora": 1.0, "dora": 1.0})
    table = summarise([tmp_path])
    rows = {row.keys["adapter"]: row for row in table.rows}
    assert (rows["full"].unlearned, rows["lora"].unlearned) == (3, 0)
    assert rows["lora"].finding is not None
    assert rows["lora"].finding.verdict == "baseline"
    assert recommended(table) != ["full"]
    assert all(row.saved is None for row in table.rows)
    assert any("3 runs learned nothing" in note and "adapter=full" in note for note in table.notes)
    assert {line["adapter"]: line["learned_nothing"] for line in json.loads(to_json(table))}["full"] == 3


def test_where_nothing_was_learned_nothing_is_advised(tmp_path: Path) -> None:
    for adapter in ("full", "lora"):
        write(tmp_path / adapter, adapter, 0, np.ones(N, int))
    table = summarise([tmp_path])
    assert (table.decisions[0].reason, recommended(table)) == (decision.UNLEARNED, [])
    assert "optimizer.lr" in table.advice[1]
    assert [row.finding.verdict for row in table.rows if row.finding] == ["not tested", "not tested"]


def test_where_no_setting_is_chosen_the_advice_says_so(tmp_path: Path) -> None:
    for rank in (2, 8):
        make_unscored(tmp_path / f"lora{rank}", "lora", adapter__rank=rank)
    (one,) = summarise([tmp_path]).decisions
    assert (one.reason, one.recommended) == (decision.UNCHOSEN, None)
    assert "learned" not in " ".join([one.headline, *one.sentences])
    assert "--by" in one.sentences[1]
    make(tmp_path / "dora", "dora", 0, 1.0, adapter__rank=8)
    (one,) = summarise([tmp_path]).decisions
    assert one.reason == decision.ONLY
    assert "only chosen setting" in one.headline
    assert "1 other method" in one.sentences[0]
    write(tmp_path / "dora2", "dora", 0, np.zeros(N, int), selection=0.99, adapter__rank=2)
    (one,) = summarise([tmp_path]).decisions
    assert (one.reason, one.headline) == (decision.UNCHOSEN, "No chosen setting learned the task")


def test_a_rival_that_was_not_tested_is_not_said_to_be_no_better(tmp_path: Path) -> None:
    sweep(tmp_path, {"full": 3.0, "lora": 0.0})
    make(tmp_path / "other-seed", "dora", 7, 4.0, selection=0.1)
    one = summarise([tmp_path]).decisions[0]
    assert (one.reason, one.headline) == (decision.BEST_KNOWN, "No tested rival is better than adapter=full")
    assert "1 without a verdict" in one.sentences[0]


def test_without_selection_scores_nothing_is_ahead_on_that_split(tmp_path: Path) -> None:
    for adapter in ("lora", "dora"):
        make_unscored(tmp_path / adapter, adapter)
    (one,) = summarise([tmp_path]).decisions
    assert one.reason == decision.UNTESTED
    assert "selection" not in one.headline


# -- one row is one setting --


def test_a_setting_with_few_seeds_is_not_chosen_for_a_lucky_one(tmp_path: Path) -> None:
    for seed in range(4):
        make(tmp_path / f"a{seed}", "lora", seed, 1.0, selection=0.6, adapter__rank=8)
    make(tmp_path / "b0", "lora", 0, 1.0, selection=0.9, adapter__rank=16)
    make(tmp_path / "c", "dora", 0, 1.0, selection=0.5, adapter__rank=16)
    rows = {row.keys["adapter"]: row for row in summarise([tmp_path]).rows}
    assert rows["lora"].keys["adapter.rank"] == 8


def test_one_method_shows_all_its_settings_without_tests(tmp_path: Path) -> None:
    for rank in (2, 8, 16):
        for seed in range(2):
            make(tmp_path / f"{rank}-{seed}", "lora", seed, 1.0, selection=rank / (100 - rank), adapter__rank=rank)
    table = summarise([tmp_path])
    assert [row.chosen for row in table.rows] == [True, False, False]
    assert table.rows[0].keys == {"adapter.rank": 16}
    assert table.tests is None
    assert any("largest adapter.rank" in note for note in table.notes)
    assert "adapter.rank=16" in table.advice[0]
    tested = summarise([tmp_path], by="adapter.rank")
    assert tested.tests is not None
    assert all(row.chosen for row in tested.rows)


def test_settings_without_selection_scores_are_shown_but_not_chosen(tmp_path: Path) -> None:
    for rank in (2, 8):
        make_unscored(tmp_path / str(rank), "lora", adapter__rank=rank)
    make(tmp_path / "dora", "dora", 0, 1.0, adapter__rank=8)
    table = summarise([tmp_path])
    assert sorted((row.keys["adapter"], row.chosen) for row in table.rows) == [
        ("dora", True),
        ("lora", False),
        ("lora", False),
    ]
    assert any("no selection scores" in note for note in table.notes)


QUALITY = st.floats(-3, 3, width=32)


@st.composite
def grids(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Draw the runs of a sweep: methods, ranks, learning rates and seeds of any quality."""
    runs = []
    for adapter in draw(
        st.lists(st.sampled_from(["full", "lora", "dora", "vera"]), min_size=1, max_size=3, unique=True)
    ):
        for rank in draw(st.sampled_from([[8], [2, 8]])):
            for lr in draw(st.sampled_from([[1e-3], [1e-3, 1e-2]])):
                quality = draw(QUALITY)
                runs += [
                    {"adapter": adapter, "adapter__rank": rank, "optimizer__lr": lr, "seed": seed}
                    | {"quality": quality + draw(QUALITY) / 5, "flops": draw(st.sampled_from([1e12, 2e12]))}
                    for seed in range(draw(st.sampled_from([1, 2, 3])))
                ]
    return runs


@settings(max_examples=25, deadline=None, suppress_health_check=[*HealthCheck])
@given(runs=grids())
def test_every_format_shows_one_setting_per_row_and_names_the_same_winner(
    tmp_path_factory: pytest.TempPathFactory, runs: list[dict[str, Any]]
) -> None:
    top = tmp_path_factory.mktemp("grid")
    try:
        for i, run in enumerate(runs):
            make(top / str(i), **run)
        table = summarise([top])
        check_rows(table, len({run["adapter"] for run in runs}))
        check_rows(summarise([top], view=View(all_settings=True)), None)
        check_winner(table)
    finally:
        shutil.rmtree(top)


def check_rows(table: Table, methods: int | None) -> None:
    """Assert that each row has the runs of one setting, and their numbers."""
    if methods is not None and methods > 1:
        assert len(table.rows) == methods
        assert all(row.chosen for row in table.rows)
    for row in table.rows:
        records = [table.records[folder] for folder in row.folders]
        configs = [
            {key: value for key, value in flatten(record["config"]) if key.split(".")[0] not in OUTSIDE_THE_SETTING}
            | record["choices"]
            for record in records
        ]
        assert all(config == configs[0] for config in configs)
        assert len({record["config"]["seed"] for record in records}) == row.n
        assert row.stats["mcc"].mean == pytest.approx(fmean(record["metrics"]["validation/mcc"] for record in records))
        if row.finding is not None and row.finding.difference is not None and row.finding.paired_seeds == row.n:
            base = next(other for other in table.rows if other.finding and other.finding.verdict == "baseline")
            if base.n == row.n:
                assert row.finding.difference == pytest.approx(row.stats["mcc"].mean - base.stats["mcc"].mean)


def check_winner(table: Table) -> None:
    """Assert that headline, advice and every format name the row that the table recommends."""
    (one,) = table.decisions
    rows = [row for row in table.rows if row.recommended]
    flags = [line["recommended"] == "true" for line in csv.DictReader(io.StringIO(to_csv(table)))]
    assert flags == [line["recommended"] for line in json.loads(to_json(table))] == [r.recommended for r in table.rows]
    if one.recommended is None:
        assert not rows
        return
    (winner,) = rows
    assert table.rows[0] is winner
    assert winner.folders == one.recommended.folders
    name = table.label(winner)
    assert name in one.headline
    assert table.advice[0].startswith(f"Use {name}: ")
    assert f"**{table.advice[0]}**" in unescape(to_markdown(table)).replace("\\", "")
    assert f"% {table.advice[0]}" in to_latex(table)
    first = next(iter(winner.keys.values()))
    assert to_markdown(table).splitlines()[2].startswith(f"| **{first}**")
    better = [row for row in table.rows if row.finding and row.finding.verdict == "better"]
    if better:
        assert winner in better
    if winner.finding is not None:
        assert winner.finding.verdict != "worse"
