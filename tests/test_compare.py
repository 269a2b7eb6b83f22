"""The comparison table: which runs share a row, what the columns are called, and that no form of it can be broken."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from lora_bench.analysis.formats import _no_formula, to_csv, to_json, to_latex, to_markdown
from lora_bench.analysis.summary import View, summarise, write_tables
from lora_bench.analysis.table import Column, Row, Stat, Table, format_value
from lora_bench.analysis.terminal import render
from lora_bench.compare import main
from lora_bench.console.format import format_number, to_single_line
from lora_bench.errors import Code
from lora_bench.records.run_folder import Run
from lora_bench.report.page import page
from tests.command_line import refuses

HOSTILE = "<script>|\x1b[31m*[red]x[/red](y)`\n\u202e$\\"


def make(
    folder: Path,
    mcc: float | None = 0.5,
    *,
    choices: dict[str, str] | None = None,
    config: dict[str, Any] | None = None,
    overrides: list[str] | None = None,
    status: str = "done",
    error: str | None = None,
    **sections: Any,
) -> Run:
    """A run folder; `config` has dotted keys."""
    nested: dict[str, Any] = {"seed": 0}
    for key, value in (config or {}).items():
        *groups, name = key.split(".")
        node = nested
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = value
    choices = {"model": "bert", "adapter": "lora", "data": "qqp"} | (choices or {})
    is_task = folder.parent.name == "tasks"
    run = Run.claim(folder, choices=choices, config=nested, overrides=overrides or [], is_task=is_task)
    run.update(data={"fingerprint": "one", "rows": {"train": 100}}, params={"adapter": 1_300_000, "head": 1538})
    run.update(cost={"train_seconds": 83.0, "train_flops": 1.2e12, "peak_memory_bytes": 540e6})
    if mcc is not None:
        run.update(
            metrics={"validation/accuracy": 0.9, "validation/f1": 0.8, "validation/mcc": mcc, "selection/mcc": mcc}
        )
    run.update(**sections)
    if status != "running":
        run.finish(status, error)
    return run


def keys(table: Table) -> list[str]:
    return [column.name for column in table.keys]


def values(table: Table) -> list[tuple[Any, ...]]:
    return [tuple(row.keys.get(key) for key in keys(table)) for row in table.rows]


# -- which runs share a row --


def test_seeds_share_a_row_with_mean_sample_std_and_n(tmp_path: Path) -> None:
    for seed, mcc in enumerate([0.5, 0.6, 0.8]):
        make(tmp_path / str(seed), mcc, config={"seed": seed, "adapter.rank": 8, "resume": f"x{seed}"})
    table = summarise([tmp_path])
    (row,) = table.rows
    assert row.n == 3
    assert row.stats["mcc"].mean == pytest.approx(statistics.mean([0.5, 0.6, 0.8]))
    assert row.stats["mcc"].std == pytest.approx(statistics.stdev([0.5, 0.6, 0.8]))
    assert keys(table) == ["model", "adapter", "data"]
    assert values(table) == [("bert", "lora", "qqp")]
    assert table.footnotes == []
    assert "0.6333 ± 0.1528" in to_markdown(table)
    # Student's t with two degrees of freedom: 4.3027 · 0.1528 / √3
    low, high = row.stats["mcc"].interval or (0, 0)
    assert (low, high) == pytest.approx((0.6333 - 0.3795, 0.6333 + 0.3795), abs=1e-4)
    assert "| 0.2539 to 1.0128 |" in to_markdown(table)


def test_later_evaluations_and_perturbed_figures_have_columns_only_where_there_are_some(tmp_path: Path) -> None:
    data = {"fingerprint": {"validation": "own"}, "rows": {"train": 100}}
    run, without = make(tmp_path / "a", data=data), make(tmp_path / "b", 0.4, config={"adapter.rank": 2}, data=data)
    assert not any("perturbed" in column.name for column in summarise([without.folder]).columns)
    perturbed = {"perturbed/f1": 0.7, "perturbed/f1_drop": 0.1, "typo/f1": 0.6, "perturbed/mcc": 0.3, "unseen/mcc": 0.2}
    metrics = {"validation/mcc": 0.123} | {f"validation/{name}": value for name, value in perturbed.items()}
    run.write_evaluation("anything", {"metrics": metrics, "data": {"fingerprint": {"validation": "own"}}})
    run.write_evaluation("paws", {"metrics": {"test/mcc": 0.05}, "data": {"fingerprint": {"test": "other"}}})
    (run.folder / "evaluations" / "bad.json").write_text("{")
    (run.folder / "evaluations" / "odd.json").write_text('{"metrics": 3}')
    table = summarise([tmp_path])
    names = [column.name for column in table.columns if column.format == "metric"]
    of_split = ["accuracy", "f1", "mcc", "perturbed/f1", "perturbed/f1_drop", "unseen/mcc"]
    assert names == [*of_split, "paws:test/mcc"]
    stats = table.rows[0].stats
    assert stats["mcc"].mean == 0.5  # the run's own, scored once
    assert stats["perturbed/f1"].mean == 0.7
    assert stats["paws:test/mcc"].mean == 0.05
    assert "perturbed/f1" not in table.rows[1].stats
    arrows = {column.name: column.arrow for column in table.columns}
    assert (arrows["perturbed/f1"], arrows["perturbed/f1_drop"]) == ("↑", "↓")


def test_evaluations_of_one_name_on_different_data_are_not_averaged(tmp_path: Path) -> None:
    for seed, (fingerprint, mcc) in enumerate([("a" * 64, 0.1), ("a" * 64, 0.3), ("b" * 64, 0.9)]):
        run = make(tmp_path / str(seed), config={"seed": seed}, data={"fingerprint": {"validation": "own"}})
        for name, data in (("paws", fingerprint), ("same", "c" * 64)):
            run.write_evaluation(name, {"metrics": {"test/mcc": mcc}, "data": {"fingerprint": {"test": data}}})
    (row,) = (table := summarise([tmp_path])).rows
    other = {name: (stat.mean, stat.n) for name, stat in row.stats.items() if ":" in name}
    assert other == {
        "paws (aaaaaaaa):test/mcc": (pytest.approx(0.2), 2),
        "paws (bbbbbbbb):test/mcc": (0.9, 1),
        "same:test/mcc": (pytest.approx(1.3 / 3), 3),
    }
    assert all(f"paws ({letter * 8}) (test)" in page(table) for letter in "ab")


def test_one_seed_shows_the_value_alone_and_says_so(tmp_path: Path) -> None:
    make(tmp_path / "a")
    table = summarise([tmp_path])
    assert "| 0.5000 |" in to_markdown(table)
    assert "| n |" not in to_markdown(table)
    assert "95 %" not in to_markdown(table)
    assert json.loads(to_json(table))[0]["mcc_low"] is None
    (note,) = table.footnotes
    assert "one seed" in note


def test_a_repeated_seed_counts_once_and_the_newest_wins(tmp_path: Path) -> None:
    make(tmp_path / "b", 0.7, created="2026-01-02T00:00:00+00:00")
    make(tmp_path / "a", 0.1, created="2026-01-01T00:00:00+00:00")
    table = summarise([tmp_path])
    assert [(row.n, row.stats["mcc"].mean) for row in table.rows] == [(1, 0.7)]
    assert any("repeat a setting" in line for line in table.footnotes)


def test_runs_that_differ_in_their_names_are_no_repetitions_by_name(tmp_path: Path) -> None:
    for name, mcc in (("before", 0.1), ("after", 0.7)):
        for seed in range(2):
            make(tmp_path / f"{name}{seed}", mcc, config={"seed": seed, "name": name})
    table = summarise([tmp_path], by="name")
    assert {row.keys["name"]: row.n for row in table.rows} == {"before": 2, "after": 2}
    assert not any("repeat a setting" in line for line in table.footnotes)


def test_equal_numbers_of_other_types_share_a_row(tmp_path: Path) -> None:
    for seed, alpha in enumerate([16, 16.0]):
        make(tmp_path / str(seed), config={"adapter.alpha": alpha, "seed": seed})
    assert [row.n for row in summarise([tmp_path]).rows] == [2]


@pytest.mark.parametrize(
    ("data", "column"),
    [
        ({"fingerprint": "two"}, "data.fingerprint"),
        ({"fingerprint": {"validation": "two", "test": "-"}}, "data.fingerprint"),
        ({"fingerprint": {"validation": "one", "train": "two"}}, "data.fingerprint.train"),
        ({"rows": {"train": 50}}, "data.rows.train"),
    ],
)
def test_other_data_is_another_row_though_the_config_is_the_same(tmp_path: Path, data: Any, column: str) -> None:
    make(tmp_path / "a", 0.6, config={"seed": 0})
    make(tmp_path / "b", 0.5, config={"seed": 1}, data=data)
    for table in (summarise([tmp_path]), summarise([tmp_path], by="adapter")):
        assert [row.n for row in table.rows] == [1, 1]
        assert column in keys(table)
    warned = any("not comparable" in line for line in summarise([tmp_path]).footnotes)
    assert warned == (column == "data.fingerprint")


def test_a_fingerprint_that_follows_from_a_data_key_has_no_column(tmp_path: Path) -> None:
    for size in (10, 20):
        make(
            tmp_path / str(size),
            config={"data.train_size": size},
            data={"fingerprint": str(size), "rows": {"train": size}},
        )
    assert keys(summarise([tmp_path])) == ["data.train_size"]


# -- the columns --


def test_columns_are_what_varies_named_as_in_the_config(tmp_path: Path) -> None:
    for rank in (8, 16):
        for lr in (1e-3, 1e-5):
            config = {"adapter.rank": rank, "optimizer.lr": lr, "adapter.default_lr": 1e-3, "trainer.epochs": 3}
            make(tmp_path / f"{rank}-{lr}", config=config)
    table = summarise([tmp_path])
    assert keys(table) == ["adapter.rank", "optimizer.lr"]
    assert sorted(values(table)) == [(8, 1e-5), (8, 1e-3), (16, 1e-5), (16, 1e-3)]
    assert "| 16 | 1e-05 |" in to_markdown(table)


def test_what_follows_from_a_choice_is_left_out(tmp_path: Path) -> None:
    for model in ("bert", "t5"):
        for adapter, lr in (("lora", 1e-3), ("full", 5e-5)):
            make(
                tmp_path / model / adapter,
                choices={"model": model, "adapter": adapter},
                config={"model.hub_id": f"x/{model}", "adapter.default_lr": lr, "optimizer.lr": lr}
                | ({"adapter.rank": 8} if adapter == "lora" else {}),
            )
    assert keys(summarise([tmp_path])) == ["model", "adapter"]


def test_a_rate_that_does_not_follow_the_adapter_is_shown(tmp_path: Path) -> None:
    for i, (adapter, lr) in enumerate([("lora", 1e-3), ("lora", 1e-4), ("full", 5e-5)]):
        config = {"optimizer.lr": lr, "adapter.default_lr": 5e-5 if adapter == "full" else 1e-3}
        make(tmp_path / str(i), choices={"adapter": adapter}, config=config)
    assert keys(summarise([tmp_path])) == ["adapter", "optimizer.lr"]
    # Tuned, one rate per method: it is a function of the method, yet not the method's default.
    for i, (adapter, lr) in enumerate([("lora", 3e-3), ("full", 1e-5)]):
        config = {"optimizer.lr": lr, "adapter.default_lr": 1e-4}
        make(tmp_path / "tuned" / str(i), choices={"adapter": adapter}, config=config)
    assert keys(summarise([tmp_path / "tuned"])) == ["adapter", "optimizer.lr"]


def test_a_key_of_one_method_only_is_blank_for_the_other(tmp_path: Path) -> None:
    for rank in (2, 8):
        make(tmp_path / str(rank), 0.5 + rank / 100, config={"adapter.rank": rank})
    make(tmp_path / "full", 0.1, choices={"adapter": "full"})
    table = summarise([tmp_path], view=View(all_settings=True))
    assert values(table) == [("lora", 8), ("lora", 2), ("full", None)]
    assert "| full |  |" in to_markdown(table)
    assert [line["adapter.rank"] for line in csv.DictReader(io.StringIO(to_csv(table)))] == ["8", "2", ""]


def test_a_hyperparameter_set_by_hand_for_one_choice_is_shown(tmp_path: Path) -> None:
    make(tmp_path / "a", config={"adapter.rank": 4}, overrides=["adapter.rank=4"])
    make(tmp_path / "b", choices={"adapter": "dora"}, config={"adapter.rank": 8})
    assert keys(summarise([tmp_path])) == ["adapter", "adapter.rank"]


def test_several_reported_splits_and_extra_metrics(tmp_path: Path) -> None:
    run = make(tmp_path / "a", config={"metric.specificity.direction": "up", "metric.fpr.direction": "down"})
    run.update(metrics={"validation/specificity": 0.7, "validation/fpr": 0.2, "test/mcc": 0.3})
    make(tmp_path / "b", 0.4, config={"seed": 1})
    table = summarise([tmp_path])
    headers = [column.header for column in table.columns if column.format == "metric"]
    assert headers[:5] == [
        "validation/accuracy ↑",
        "validation/f1 ↑",
        "validation/mcc ↑",
        "validation/fpr ↓",
        "validation/specificity ↑",
    ]
    assert headers[5:] == ["test/accuracy ↑", "test/f1 ↑", "test/mcc ↑"]
    assert len(table.rows) == 1  # a metric more is no other experiment


def test_a_metric_with_the_name_of_another_column_keeps_its_values(tmp_path: Path) -> None:
    """Names of findings, savings, row facts, costs, keys and spreads; the values differ from all of theirs."""
    taken = [
        "n",
        "chosen",
        "runs",
        "adapter_bytes",
        "steps_to_target",
        "cost.train_flops",
        "seed",
        "adapter",
        "mcc_std",
    ]
    names = ["rate", "power", "difference", "verdict", "baseline", "p", *taken]
    scores = {name: 0.25 + i / 100 for i, name in enumerate(names)}
    config = {f"metric.{name}.torchmetric": "BinaryPrecision" for name in names if "." not in name}
    for adapter in ("full", "lora"):
        cost = {"steps": 10, "train_flops": 1e12, "train_seconds": 10.0}
        run = make(tmp_path / adapter, choices={"adapter": adapter}, config=config, cost=cost)
        run.update(metrics=run.record["metrics"] | {f"validation/{name}": value for name, value in scores.items()})
    table = summarise([tmp_path])
    objects, lines = json.loads(to_json(table)), csv.DictReader(io.StringIO(to_csv(table)))
    for line, row in zip(objects, lines, strict=True):
        for name, value in scores.items():
            header = f"validation/{name}" if name in taken else name
            assert (line[header], float(row[header])) == (value, value)
        assert (line["n"], line["chosen"], line["adapter"]) == (1, True, row["adapter"])
        assert line["cost.train_flops"] == 1e12
        assert line["tests.verdict"] in ("baseline", "not tested")
    assert {"savings.precision", "savings.rate"} <= objects[0].keys()


def test_another_split_than_validation_is_named(tmp_path: Path) -> None:
    make(tmp_path / "t/a", None, metrics={"test/mcc": 0.3, "train/mcc": 1})
    assert any("test split" in line for line in summarise([tmp_path / "t"]).footnotes)
    make(tmp_path / "s/a", None, metrics={"selection/mcc": 0.3})
    assert "selection/mcc" in summarise([tmp_path / "s"]).rows[0].stats


# -- order, best, costs --


def test_the_recommended_row_is_first_then_best_first_with_the_best_in_bold(tmp_path: Path) -> None:
    for adapter, mcc in (("dora", 0.3), ("vera", 0.9), ("pissa", None), ("eva", 0.5)):
        make(tmp_path / adapter, mcc, choices={"adapter": adapter})
    table = summarise([tmp_path])
    assert values(table) == [("vera",), ("eva",), ("dora",), ("pissa",)]
    assert [row.recommended for row in table.rows] == [True, False, False, False]
    assert [row.best for row in table.rows] == [
        {"mcc", "accuracy", "f1"},
        {"accuracy", "f1"},
        {"accuracy", "f1"},
        frozenset(),
    ]
    assert "**0.9000**" in to_markdown(table)
    assert "**vera**" in to_markdown(table)
    assert r"\textbf{0.9000}" in to_latex(table)


def test_the_best_is_marked_for_each_data_set(tmp_path: Path) -> None:
    for data, mccs in (("qqp", (0.9, 0.8)), ("rte", (0.85, 0.15))):
        for adapter, mcc in zip(("lora", "dora"), mccs, strict=True):
            choices = {"data": data, "adapter": adapter}
            make(tmp_path / data / adapter, mcc, choices=choices, data={"fingerprint": data})
    table = summarise([tmp_path])
    assert values(table) == [("lora", "qqp"), ("dora", "qqp"), ("lora", "rte"), ("dora", "rte")]
    assert ["mcc" in row.best for row in table.rows] == [True, False, True, False]


def test_costs_have_units_for_people_and_are_raw_for_programs(tmp_path: Path) -> None:
    make(tmp_path / "a", cost={"peak_memory_bytes": None})
    table = summarise([tmp_path])
    assert "| 1.3 M | 1.5 k | 83 s | 1.2 TFLOP |\n" in to_markdown(table)  # a column without any value is left out
    (line,) = json.loads(to_json(table))
    assert (line["params.adapter"], line["cost.train_seconds"], line["cost.peak_memory_bytes"]) == (1300000, 83, None)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.9, "1.0 kB"),
        (9949, "9.9 kB"),
        (9990, "10 kB"),
        (540e6, "540 MB"),
        (2e18, "2000 PB"),
    ],
)
def test_human(value: float, text: str) -> None:
    assert format_number(value, "B") == text


def test_absurd_numbers_and_wrong_types_are_absent(tmp_path: Path) -> None:
    for seed in range(2):
        path = make(tmp_path / str(seed), 1e308, config={"seed": seed}).folder / "run.json"
        content = json.loads(path.read_text())
        content["metrics"] |= {"validation/f1": "high", "validation/accuracy": 10**400}
        content["params"] = {"adapter": True, "head": [1]}
        path.write_text(json.dumps(content))
    (row,) = summarise([tmp_path]).rows
    assert set(row.stats) == {"cost.train_seconds", "cost.train_flops", "cost.peak_memory_bytes"}


def test_a_metric_that_some_seeds_lack_tells_its_own_n(tmp_path: Path) -> None:
    for seed, mcc in enumerate([0.5, 0.7, None]):
        make(tmp_path / str(seed), mcc, config={"seed": seed})
    assert "0.6000 ± 0.1414 (n=2)" in to_markdown(summarise([tmp_path]))


# -- --by --


def test_by_a_key_a_row_is_the_setting_that_is_best_on_selection(tmp_path: Path) -> None:
    for rank, mccs in ((2, (0.2, 0.3)), (8, (0.5, 0.8))):
        for model, mcc in zip(("bert", "t5"), mccs, strict=True):
            make(tmp_path / f"{rank}{model}", mcc, choices={"model": model}, config={"adapter.rank": rank})
    make(tmp_path / "full", 0.4, choices={"adapter": "full"})
    table = summarise([tmp_path], by="adapter.rank")
    assert keys(table) == ["adapter.rank", "model", "adapter"]
    assert values(table) == [(8, "t5", "lora"), (None, "bert", "full"), (2, "t5", "lora")]
    assert [(row.n, row.stats["mcc"].mean) for row in table.rows] == [(1, 0.8), (1, 0.4), (1, 0.3)]
    both = summarise([tmp_path], by="adapter,adapter.rank")
    assert [value[:2] for value in values(both)] == [("lora", 8), ("full", None), ("lora", 2)]
    assert {value[0] for value in values(summarise([tmp_path], by="seed"))} == {0}


def test_an_unknown_key_is_refused_with_the_nearest(tmp_path: Path) -> None:
    make(tmp_path / "a", config={"adapter.rank": 8})
    make(tmp_path / "b", config={"adapter.rank": 9})
    for key in ("adapter.rnk", "zzzzzzzz"):
        with refuses(Code.UNKNOWN_KEY, key="--by") as caught:
            main([str(tmp_path), "--by", key])
        assert caught.value.value == key
        assert "adapter.rank" in str(caught.value)


# -- what is said below --


def test_runs_that_are_not_done_are_told_one_line_each(tmp_path: Path) -> None:
    make(tmp_path / "1", status="failed", error="out of\nmemory " + "x" * 400, overrides=["adapter=dora", "seed=1"])
    make(tmp_path / "2", status="diverged")
    run = make(tmp_path / "10", None, status="running", created="2026-01-02T03:04:05.678+00:00")
    run.log({"step": 120, "split": "selection", "metrics": {"mcc": 0.61234}})
    held = make(tmp_path / "11", None, status="running", created=None)
    make(tmp_path / "12", None, status="running", created=None).release()  # as the end of its process does
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/run.json").write_text("{")
    table = summarise([tmp_path])
    assert table.rows == []
    failed, *rest, skipped = table.footnotes[1:]
    assert table.footnotes[0] == "no finished run yet"
    assert to_single_line(failed).startswith(f"failed: {tmp_path}/1 (adapter=dora seed=1): out of memory xxx")
    assert failed.endswith("x…")
    expected = [
        (f"diverged: {tmp_path}/2: ",),
        (f"running: {tmp_path}/10: ", "2026-01-02 03:04 UTC", "step 120", "mcc 0.6123"),
        (f"running: {tmp_path}/11: ",),
        (f"killed: {tmp_path}/12: ", "resume="),
    ]
    for line, fragments in zip(rest, expected, strict=True):
        assert all(fragment in line for fragment in fragments), line
    assert held.lock is not None
    assert skipped.startswith(f"skipped: {tmp_path}/bad: run.json ")
    assert (to_csv(table), to_json(table)) == ("", "[]\n")
    assert to_markdown(table).startswith("- no finished run yet\n")
    assert main([str(tmp_path)]) == 0


def test_dirty_code_is_flagged(tmp_path: Path) -> None:
    for seed in range(5):
        make(tmp_path / str(seed), config={"seed": seed}, environment={"dirty": seed > 0})
    (line,) = summarise([tmp_path]).footnotes
    assert "uncommitted changes" in line
    assert "4 of 5 runs" in line
    assert line.endswith("/3 and 1 more")


def test_no_runs_is_a_wrong_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with refuses(Code.NOT_FOUND) as without_runs:
        main([str(tmp_path)])
    assert without_runs.value.file == str(tmp_path)
    assert "lora-bench train" in str(without_runs.value)
    monkeypatch.chdir(tmp_path)
    with refuses(Code.NOT_FOUND) as without_folder:
        main([])
    assert without_folder.value.file == Path("outputs")
    make(tmp_path / "outputs/a")
    assert main([]) == 0


@pytest.mark.parametrize("arguments", [["--frmat", "csv"], ["--format", "xml"], ["--by"]])
def test_wrong_arguments_are_refused(arguments: list[str]) -> None:
    with refuses(Code.INVALID_SYNTAX, key="compare") as caught:
        main(arguments)
    assert arguments[0] in str(caught.value)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["--help"])
    assert exit_info.value.code == 0
    assert "--by KEY" in capsys.readouterr().out


# -- forms --


def test_each_format_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "a")
    starts = {
        "csv": "model,adapter,data,n,",
        "md": "| model |",
        "latex": r"\begin{tabular}",
        "json": "[",
        "table": "model",
    }
    for form, start in starts.items():
        assert main([str(tmp_path), "--format", form]) == 0
        output = capsys.readouterr()
        assert output.out.startswith(start)
        assert ("no spread" in output.err) == (form in ("csv", "json"))


def test_a_sweep_leaves_its_tables(tmp_path: Path) -> None:
    write_tables(tmp_path)
    assert list(tmp_path.iterdir()) == []
    make(tmp_path / "0")
    write_tables(tmp_path)
    assert (tmp_path / "table.md").read_text().startswith("| model | adapter | data | accuracy ↑ |")
    assert (tmp_path / "table.csv").read_text().startswith("model,adapter,data,n,accuracy,accuracy_std,accuracy_low,")


def test_hostile_names_are_escaped_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "a", 0.6, choices={"model": HOSTILE}, config={f"adapter.{HOSTILE}": 1})
    make(tmp_path / "b", choices={"model": "=cmd()"}, config={f"adapter.{HOSTILE}": HOSTILE})
    make(tmp_path / "c", status="failed", error=HOSTILE)
    table = summarise([tmp_path])
    for form in ("csv", "md", "latex", "json", "table"):
        main([str(tmp_path), "--format", form])
        output = capsys.readouterr()
        assert not set(output.out + output.err) & {"\x1b", "\u202e"}
        assert "[red]" in output.out or form in ("md", "latex")
    markdown = to_markdown(table)
    assert "<script>" not in markdown
    assert "&lt;script&gt;\\|" in markdown
    assert "\n\n- " in markdown
    assert all(re.match(r"[|-] |\*\*Use |\*\*Run ", line) for line in markdown.splitlines() if line)
    assert "'=cmd()" in to_csv(table)


CELL = st.text(st.characters(categories=None)) | st.sampled_from([HOSTILE, "=1+1", "-", "[4,5]", "1e-3", "", "null"])
CELLS = (
    CELL
    | st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.lists(CELL)
)
NUMBER = st.floats(allow_nan=False, allow_infinity=False, width=32)


@st.composite
def tables(draw: st.DrawFn) -> Table:
    names = draw(st.lists(CELL, min_size=1, max_size=3, unique_by=to_single_line))
    names = [f"key.{name}" for name in names]
    columns = [*(Column(name, "key") for name in names), Column("mcc", "metric", "↑", 9), Column("cost.x", "bytes")]
    rows = []
    for n in draw(st.lists(st.integers(1, 3), max_size=3)):
        stats = {"mcc": Stat(draw(NUMBER), draw(NUMBER) if n > 1 else None, n)} if draw(st.booleans()) else {}
        stats |= {"cost.x": Stat(draw(NUMBER), None, n)} if draw(st.booleans()) else {}
        values = {name: draw(CELLS) for name in names if draw(st.booleans())}
        rows.append(Row(values, stats, n, [Path("a")], frozenset(stats) & {"mcc"}))
    return Table(columns, rows, draw(st.lists(CELL, max_size=2)))


@given(tables())
def test_csv_and_json_read_back(table: Table) -> None:
    lines = list(csv.DictReader(io.StringIO(to_csv(table)), strict=True))
    objects = json.loads(to_json(table))
    assert len(lines) == len(objects) == len(table.rows)
    for line, metrics, row in zip(lines, objects, table.rows, strict=True):
        stat = row.stats.get("mcc")
        assert (metrics["mcc"], metrics["mcc_std"], metrics["n"]) == (
            (stat.mean, stat.std, row.n) if stat else (None, None, row.n)
        )
        assert (float(line["mcc"]) if line["mcc"] else None) == metrics["mcc"]
        for column in table.keys:
            assert metrics[column.name] == row.keys.get(column.name)
            cell = format_value(row.keys[column.name]) if column.name in row.keys else ""
            assert line[to_single_line(column.name)].removeprefix("'") == cell.removeprefix("'")
        assert not any(cell.startswith(("=", "@")) for cell in line.values())
        assert line["chosen"] == "true"


@given(tables())
def test_markdown_and_latex_keep_their_shape(table: Table) -> None:
    grid, *_ = to_markdown(table).split("\n\n")
    bars = {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in grid.splitlines() if table.rows}
    assert len(bars) <= 1
    assert "<" not in to_markdown(table)
    latex = to_latex(table)
    body = latex.split(r"\midrule")[1].split(r"\bottomrule")[0].strip("\n").splitlines()
    assert len(body) == len(table.rows)
    assert len({len(re.findall(r"(?<!\\)&", line)) for line in body}) <= 1
    assert all(line.startswith("% ") for line in latex.split("\\end{tabular}\n")[1].splitlines())
    (to_markdown(table) + latex).encode()  # a lone surrogate would not be written


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(tables(), st.sampled_from([30, 80, 200]))
def test_the_terminal_shows_any_table_within_its_width(table: Table, width: int) -> None:
    output = printed(table, width)
    assert "\x1b" not in output
    if width >= 80:
        assert max((cell_len(line) for line in output.splitlines()), default=0) <= width


def printed(table: Table, width: int | None) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=width is not None, width=width, color_system=None, highlight=False)
    render(table, console)
    return out.getvalue()


def sweep(folder: Path, keys: int = 3) -> Table:
    for rank in (2, 8):
        for seed in (0, 1):
            config = {"adapter.rank": rank, "optimizer.lr": rank / 1000, "adapter.alpha": rank, "seed": seed}
            config |= {f"trainer.some_long_setting_{i}": rank for i in range(keys - 3)}
            make(folder / f"{rank}-{seed}", (rank + seed) / 10, config=config)
    return summarise([folder])


def test_a_narrow_terminal_loses_costs_first_and_says_so(tmp_path: Path) -> None:
    table = sweep(tmp_path)
    wide, normal, narrow = printed(table, 230), printed(table, 80), printed(table, 60)
    assert "540 MB" in wide
    assert "widen the terminal" not in wide
    head = normal.splitlines()[0].split()
    assert head == ["adapter.rank", "adapter.alpha", "optimizer.lr", "f1", "↑", "mcc", "↑", "n"]
    assert "md): accuracy, mcc 95 %, params.adapter," in " ".join(normal.split())
    assert narrow.splitlines()[0].split()[-3:] == ["mcc", "↑", "n"]
    assert "0.250 ± 0.071" in narrow
    assert "…" not in narrow


def test_keys_share_a_column_where_they_leave_no_room(tmp_path: Path) -> None:
    output = printed(sweep(tmp_path, keys=8), 80)
    assert "trainer.some_long_setting_4=8" in output
    assert "0.850 ± 0.071" in output
    assert "…" not in output


def test_a_pipe_gets_all_columns_without_colours_unless_its_width_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = sweep(tmp_path, keys=8)
    monkeypatch.delenv("COLUMNS", raising=False)
    lines = printed(table, None).splitlines()
    assert len({cell_len(line) for line in lines[:4]}) == 1
    assert cell_len(lines[0]) > 200
    assert lines[0].split()[-1] == "cost.peak_memory_bytes"
    assert "\x1b" not in "".join(lines)
    monkeypatch.setenv("COLUMNS", "90")
    assert 60 < max(cell_len(line) for line in printed(table, None).splitlines()) <= 90


def test_comparing_needs_neither_torch_nor_pyarrow() -> None:
    heavy = {"torch", "pyarrow", "numpy", "pandas"}
    program = f"import sys, lora_bench.compare; print(sorted({heavy} & {{*sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("first", ["=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20", " ="])
def test_no_cell_is_a_formula_to_a_spreadsheet(first: str) -> None:
    assert _no_formula(f"{first}SUM(A1)") == f"'{first}SUM(A1)"
    assert _no_formula("-1.5e-3") == "-1.5e-3"


# -- what is damaged is left out with the reason, and ends nothing --


def test_a_damaged_task_does_not_end_the_comparison(tmp_path: Path) -> None:
    make(tmp_path / "whole", 0.4)
    several = make(tmp_path / "several", 0.5, config={"tasks.one.x": 1, "tasks.two.x": 1})
    make(several.folder / "tasks/one", 0.6, choices={"data": "one"})
    make(several.folder / "tasks/two", 0.7, choices={"data": "two"}).folder.joinpath("run.json").write_text("{")
    table = summarise([tmp_path])
    assert sorted(row.stats["mcc"].mean for row in table.rows) == [0.4, 0.6]
    (skipped,) = table.missing
    assert (skipped.status, skipped.folder) == ("skipped", several.folder / "tasks/two")
    assert "run.json" in skipped.reason


def test_files_of_a_run_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    run = make(tmp_path / "a", 0.5)
    (run.folder / "evaluations").mkdir()
    os.mkfifo(run.folder / "evaluations/pipe.json")
    (run.folder / "evaluations/odd.json").write_text('{"metrics": {"validation/mcc": "x"}, "metrics": 1}')
    (run.folder / "evaluations/dir.json").mkdir()
    (run.folder / "metrics.jsonl").symlink_to("/dev/zero")
    notes = summarise([tmp_path]).notes
    for file in ("evaluations/pipe.json", "evaluations/odd.json", "evaluations/dir.json", "metrics.jsonl"):
        assert any(f"{file}: " in note for note in notes), notes


@pytest.mark.parametrize("seed", [[1], {"a": 1}, "x", None, 1.5])
def test_a_seed_of_any_type_is_compared(tmp_path: Path, seed: Any) -> None:
    for name, adapter in (("a", "lora"), ("b", "dora")):
        path = make(tmp_path / name, 0.5, choices={"adapter": adapter}).folder / "run.json"
        content = json.loads(path.read_text())
        content["config"]["seed"] = seed
        path.write_text(json.dumps(content))
    assert len(summarise([tmp_path]).rows) == 2


@pytest.mark.parametrize("form", ["table", "csv", "json", "md", "latex", "html"])
def test_lone_surrogates_are_written_in_every_form(
    tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        make(tmp_path / name, 0.5, choices={"adapter": f"{name}\ud800"}, config={"adapter.x\udfff": f"{name}\udc80"})
    arguments = ["--html", str(tmp_path / "page.html")] if form == "html" else ["--format", form]
    assert main([str(tmp_path), *arguments]) == 0
    capsys.readouterr().out.encode()


def test_an_eliminated_run_is_listed_with_its_reason(tmp_path: Path) -> None:
    make(tmp_path / "0")
    make(tmp_path / "1", None, status="eliminated", error="eliminated by pack.halving at step 2")
    (missing,) = summarise([tmp_path]).missing
    assert (missing.status, missing.folder) == ("eliminated", tmp_path / "1")
    assert missing.reason == "eliminated by pack.halving at step 2"
