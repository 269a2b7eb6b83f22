"""Costs to target and what was saved: closed forms on made-up records, and silence where nothing can be said."""

from __future__ import annotations

import csv
import io
import json
from typing import TYPE_CHECKING, Any

import pytest

from lora_bench.analysis.formats import to_csv, to_json, to_markdown
from lora_bench.analysis.summary import summarise
from lora_bench.compare import main
from lora_bench.errors import Code
from lora_bench.records.run_folder import Run
from tests.command_line import refuses

if TYPE_CHECKING:
    from pathlib import Path

    from lora_bench.analysis.table import Table

LAYERS = 6


def make(
    folder: Path, adapter: str, seed: int, curve: list[float], flops: float, first: int = 0, **sections: Any
) -> Run:
    """A finished run of 100 steps for each look at the selection split, adapted from layer `first` on."""
    choices = {"model": "bert", "adapter": adapter, "data": "qqp"}
    run = Run.claim(folder, choices=choices, config={"seed": seed}, overrides=[])
    steps = 100 * len(curve)
    for i, mcc in enumerate(curve):
        run.log({"step": 100 * (i + 1), "split": "selection", "metrics": {"mcc": mcc}})
    run.log({"step": steps, "split": "validation", "metrics": {"mcc": 0.99}})
    targets = {f"bert.encoder.layer.{i}.attention.self.query": 8 for i in range(first, LAYERS)}
    run.update(metrics={"validation/mcc": curve[-1], "selection/mcc": max(curve)}, targets=targets)
    run.update(cost={"steps": steps, "train_flops": flops * steps}, data={"fingerprint": {"validation": "v"}})
    run.update(**sections)
    (folder / "adapter").mkdir()
    (folder / "adapter/adapter_model.safetensors").write_bytes(bytes(1000 + seed))
    run.finish("done")
    return run


def row(table: Table, adapter: str) -> Any:
    return next(candidate for candidate in table.rows if candidate.keys["adapter"] == adapter)


def test_steps_and_flops_to_what_full_fine_tuning_ends_with_in_its_worst_seed(tmp_path: Path) -> None:
    make(tmp_path / "f0", "full", 0, [0.4, 0.6, 0.58], 3e9)
    make(tmp_path / "f1", "full", 1, [0.3, 0.5, 0.62], 3e9)
    make(tmp_path / "l0", "lora", 0, [0.5, 0.58, 0.7], 2.1e9)
    make(tmp_path / "l1", "lora", 1, [0.6, 0.6, 0.6], 2.1e9)
    table = summarise([tmp_path])
    stats = row(table, "lora").stats
    assert stats["steps_to_target"].mean == 150  # 200 and 100
    assert stats["flops_to_target"].mean == pytest.approx(150 * 2.1e9)
    assert row(table, "full").stats["steps_to_target"].mean == 250
    assert any("target: selection MCC 0.5800" in line for line in table.footnotes)
    assert row(table, "lora").stats["adapter_bytes"].mean == 1000.5


def test_a_lucky_evaluation_does_not_count(tmp_path: Path) -> None:
    make(tmp_path / "f", "full", 0, [0.5, 0.6], 3e9)
    make(tmp_path / "l", "lora", 0, [0.7, 0.5, 0.6, 0.6, 0.65, 0.5], 2e9)  # 0.7 is followed by 0.5
    table = summarise([tmp_path])
    assert row(table, "lora").stats["steps_to_target"].mean == 300
    assert row(table, "full").stats["steps_to_target"].mean == 200  # at the end of a run the last one counts


def test_an_evaluation_whose_state_the_run_may_not_keep_does_not_count(tmp_path: Path) -> None:
    make(tmp_path / "f", "full", 0, [0.5, 0.6], 3e9)
    run = make(tmp_path / "a", "adalora", 0, [0.6, 0.6, 0.6], 2e9)
    log = run.folder / "metrics.jsonl"
    first, *rest = log.read_text().splitlines()
    log.write_text("\n".join([json.dumps(json.loads(first) | {"may_choose": False}), *rest]))
    assert row(summarise([tmp_path]), "adalora").stats["steps_to_target"].mean == 200


def test_a_target_that_is_asked_for_and_rows_that_do_not_reach_it(tmp_path: Path) -> None:
    make(tmp_path / "l0", "lora", 0, [0.5, 0.7], 2e9)
    make(tmp_path / "l1", "lora", 1, [0.5, 0.65], 2e9)
    make(tmp_path / "d0", "dora", 0, [0.7, 0.7], 2e9)
    table = summarise([tmp_path], target=0.68)
    assert "steps_to_target" not in row(table, "lora").stats
    assert row(table, "dora").stats["steps_to_target"].mean == 100
    assert any("target: selection MCC 0.6800" in line and "1 of 2 rows" in line for line in table.footnotes)
    assert "steps_to_target" in to_markdown(table)
    assert "steps_to_target" not in to_markdown(summarise([tmp_path]))
    with refuses(Code.INVALID_SYNTAX, key="compare") as caught:
        main([str(tmp_path), "--target", "70"])
    assert "--target" in str(caught.value)


def test_of_several_rows_of_full_fine_tuning_costs_are_against_the_baseline_or_the_best(tmp_path: Path) -> None:
    for name, objective, curve in (("plain", "cross_entropy", [0.4, 0.5]), ("both", "order_consistency", [0.5, 0.7])):
        config = {"seed": 0, "trainer": {"objective": objective}}
        make(tmp_path / name, "full", 0, curve, 3e9, config=config)
    config = {"seed": 0, "trainer": {"objective": "cross_entropy"}}
    make(tmp_path / "l", "lora", 0, [0.6, 0.7], 2e9, config=config)
    assert any("target: selection MCC 0.7000" in line for line in summarise([tmp_path]).footnotes)
    table = summarise([tmp_path], baseline="adapter=full,trainer.objective=cross_entropy")
    assert any("target: selection MCC 0.5000" in line for line in table.footnotes)
    assert row(table, "lora").saved["FLOPs saved"] == pytest.approx(1 - 1 / 2 * 2 / 3)
    with_both = summarise([tmp_path], baseline=str(tmp_path / "both"))
    assert row(with_both, "lora").saved["FLOPs saved"] == pytest.approx(1 - 2 / 3)


def test_savings_are_against_a_named_baseline_that_does_not_stand_for_its_method(tmp_path: Path) -> None:
    for name, adapter, rate, mcc, flops in (
        *(("plain", "full", 0.1, 0.5, 1e9), ("slow", "full", 0.2, 0.6, 4e9)),
        ("l", "lora", 0.1, 0.5, 5e8),
    ):
        make(tmp_path / name, adapter, 0, [mcc], flops, config={"seed": 0, "optimizer": {"lr": rate}})
    table = summarise([tmp_path], baseline=str(tmp_path / "plain"))
    assert row(table, "lora").saved["FLOPs saved"] == pytest.approx(0.5)


def test_what_was_saved_by_cause_adds_up(tmp_path: Path) -> None:
    make(tmp_path / "f", "full", 0, [0.4, 0.5, 0.6, 0.6], 3e9)
    make(tmp_path / "l", "lora", 0, [0.4, 0.6], 2.1e9)
    make(tmp_path / "t", "dora", 0, [0.4, 0.5, 0.6, 0.6], 1.6e9, first=3)
    make(tmp_path / "h", "head_only", 0, [0.1, 0.1, 0.1, 0.1], 1e9, first=LAYERS)
    table = summarise([tmp_path])
    half = row(table, "lora").saved  # 200 of 300 steps, each 0.7 of a full one
    assert half["fewer steps"] == pytest.approx(1 / 3)
    assert half["no weight gradients"] == pytest.approx(2 / 3 / 3)
    assert half["fewer layers"] == 0
    assert half["FLOPs saved"] == pytest.approx(1 - 2 / 3 * 0.7)
    assert half["the adapter itself"] == pytest.approx(-2 / 3 * (0.7 - 2 / 3))
    top = row(table, "dora").saved  # the upper half of the layers
    assert (top["fewer steps"], top["fewer layers"]) == pytest.approx((0, 1 / 6))
    head = row(table, "head_only").saved  # never at the target: whole runs are compared
    assert (head["fewer steps"], head["fewer layers"]) == pytest.approx((0, 1 / 3))
    assert head["FLOPs saved"] == pytest.approx(2 / 3)
    assert row(table, "full").saved is None
    for shares in (half, top, head):
        assert sum(shares.values()) == pytest.approx(2 * shares["FLOPs saved"])
        assert shares["cached prefix"] == shares["less padding"] == 0  # of which these runs tell nothing
        assert "time saved" not in shares
    text = to_markdown(table)
    assert "| adapter | fewer steps | no weight gradients | fewer layers | the adapter itself | FLOPs saved |" in text
    assert "| lora | +33% | +22% | +0% | -2% | +53% |" in text
    saved = {line["adapter"]: line["savings.FLOPs saved"] for line in json.loads(to_json(table))}
    csv_shares = {line["adapter"]: line["savings.FLOPs saved"] for line in csv.DictReader(io.StringIO(to_csv(table)))}
    assert saved["lora"] == float(csv_shares["lora"]) == half["FLOPs saved"]
    assert (saved["full"], csv_shares["full"]) == (None, "")


def test_a_cached_prefix_less_padding_and_precision_are_causes_of_their_own(tmp_path: Path) -> None:
    """100 steps each; full: 3 GFLOP and 2 s a step, of 1,000 tokens 200 padding, in fp32."""
    cost = {"train_tokens": 1000, "train_padding_tokens": 200, "train_seconds": 200.0, "prefix_fill_flops": None}
    full = {"cost": cost, "environment": {"precision": "float32"}}
    make(tmp_path / "f", "full", 0, [0.6], 3e9, **full)
    cached = cost | {"prefix_fill_flops": 2e10, "train_seconds": 50.0}
    half = {"cost": cached, "environment": {"precision": "float32"}}
    make(tmp_path / "l", "lora", 0, [0.6], 1.1e9, first=3, **half)  # 0.5 for the upper half and 0.4 for its gradients
    dense = {
        "cost": cost | {"train_padding_tokens": 0, "train_seconds": 60.0},
        "environment": {"precision": "bfloat16"},
    }
    make(tmp_path / "d", "dora", 0, [0.6], 1.6e9, **dense)
    table = summarise([tmp_path])
    saved = row(table, "lora").saved
    assert saved["fewer layers"] == pytest.approx(1 / 6)
    assert saved["cached prefix"] == pytest.approx(1 / 6 - 0.2 / 3)  # half of the forward third, less its making
    assert saved["less padding"] == 0
    assert saved["FLOPs saved"] == pytest.approx(1 - 1.1 / 3)
    assert saved["the adapter itself"] == pytest.approx(1 - 1.1 / 3 - (1 / 3 + 1 / 6 + 1 / 6 - 0.2 / 3))
    assert saved["time saved"] == pytest.approx(0.75)
    assert (saved["precision"], saved["rate"]) == pytest.approx((0, 0.75 - saved["FLOPs saved"]))
    saved = row(table, "dora").saved
    # With as much padding it would have had 1.25 times its tokens: 2 GFLOP a step, what lacks gradients of weights.
    assert saved["less padding"] == pytest.approx(0.4 / 3)
    assert saved["the adapter itself"] == pytest.approx(0, abs=1e-12)
    assert saved["time saved"] == pytest.approx(0.7)
    assert (saved["precision"], saved["rate"]) == pytest.approx((0.7 - saved["FLOPs saved"], 0))
    for shares in (row(table, "lora").saved, saved):
        causes = sum(share for name, share in shares.items() if name not in ("FLOPs saved", "time saved"))
        assert causes == pytest.approx(shares["time saved"])
    lines = {line["adapter"]: line for line in csv.DictReader(io.StringIO(to_csv(table)))}
    assert float(lines["lora"]["savings.cached prefix"]) == row(table, "lora").saved["cached prefix"]
    assert "| cached prefix | less padding | the adapter itself | FLOPs saved | precision | rate |" in to_markdown(
        table
    )


def test_what_came_before_the_first_step_counts_whole_and_a_second_look_is_a_cause_of_its_own(tmp_path: Path) -> None:
    """Full: 200 steps of 3 GFLOP, 2 s; the other reaches its 0.6 after 100 of 400 steps of twice 2 GFLOP, 1 s each."""
    make(tmp_path / "f", "full", 0, [0.5, 0.6], 3e9, cost={"train_seconds": 400.0})
    before = {"prepare_flops": 3e10, "prefix_fill_flops": 1e10, "prepare_seconds": 8.0, "prefix_fill_seconds": 2.0}
    run = make(tmp_path / "l", "lora", 0, [0.6, 0.6, 0.6, 0.6], 0.0, cost=before)
    run.update(cost={"train_flops": 400 * 4e9 + 4e10, "train_seconds": 400.0 + 10})
    run.update(config={"seed": 0, "trainer": {"objective": "order_consistency", "batch_size": 1}})
    stats, saved = row(summarise([tmp_path]), "lora").stats, row(summarise([tmp_path]), "lora").saved
    assert stats["steps_to_target"].mean == 100
    assert stats["flops_to_target"].mean == pytest.approx(100 * 4e9 + 4e10)
    assert stats["seconds_to_target"].mean == pytest.approx(100 + 10)
    assert saved["FLOPs saved"] == pytest.approx(1 - 4.4e11 / 6e11)
    assert saved["time saved"] == pytest.approx(1 - 110 / 400)
    assert (saved["fewer steps"], saved["pairs a step"]) == pytest.approx((0.5, -0.5))
    assert saved["no weight gradients"] == pytest.approx(1 / 3)
    assert saved["cached prefix"] == pytest.approx(-1 / 60)  # filled, and of no use: all layers are adapted
    assert saved["the adapter itself"] == pytest.approx(1 - 4.4 / 6 - 1 / 3 + 1 / 60)


def test_packed_runs_whose_seconds_are_no_run_s_own_tell_of_flops_alone(tmp_path: Path) -> None:
    make(tmp_path / "f", "full", 0, [0.6], 3e9, cost={"train_seconds": 200.0})
    make(tmp_path / "l", "lora", 0, [0.6], 2e9, cost={"train_seconds": None})
    make(tmp_path / "d", "dora", 0, [0.6], 2e9, cost={"train_seconds": 100.0})
    table = summarise([tmp_path])
    assert "time saved" not in row(table, "lora").saved
    time_saved = {line["adapter"]: line["savings.time saved"] for line in json.loads(to_json(table))}
    assert time_saved == {"full": None, "lora": None, "dora": 0.5}


@pytest.mark.parametrize("split", ["selection", "train"])
def test_other_training_or_selection_data_have_a_target_of_their_own_or_none(tmp_path: Path, split: str) -> None:
    make(tmp_path / "f", "full", 0, [0.4, 0.6], 3e9)
    make(tmp_path / "l", "lora", 0, [0.6, 0.7], 2e9, data={"fingerprint": {"validation": "v", split: "another"}})
    table = summarise([tmp_path])
    assert row(table, "lora").saved is None
    assert "steps_to_target" not in row(table, "lora").stats


def test_damaged_logs_and_absurd_costs_are_silent(tmp_path: Path) -> None:
    make(tmp_path / "f", "full", 0, [0.4, 0.6], 3e9)
    run = make(tmp_path / "l", "lora", 0, [0.6, 0.7], 2e9, cost={"steps": "many", "train_flops": -1})
    (run.folder / "metrics.jsonl").write_text('{"step": 1}\n[]\nnull\n{"split": "selection", "step"')
    table = summarise([tmp_path])
    assert row(table, "lora").saved is None
    assert main([str(tmp_path)]) == 0
