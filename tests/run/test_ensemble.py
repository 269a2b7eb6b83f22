"""An ensemble: what its members are, what its one record says, and how it is scored, exported and gone on with."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

import lora_bench
from lora_bench.adapters.methods.lora import LoRA
from lora_bench.analysis.summary import summarise
from lora_bench.data.toy import generate
from lora_bench.errors import Code
from lora_bench.evaluation.ensemble import disagreement
from lora_bench.evaluation.metrics import score
from lora_bench.run.settings import Experiment
from tests.command_line import at_step, refused, signalled, toy_run
from tests.command_line import lora_bench as command
from tests.helpers import composed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora_bench.adapters.base import Update

# The draws of dropout depend on the portions in which pairs pass, which a CPU fits to the size of the pack.
PORTIONS = "trainer.micro_batch_size=32"
ASKED = toy_run(PORTIONS, "trainer.max_steps=6", "trainer.eval_every=3", "data.train_rows=80", "optimizer.lr=1e-2")
THREE = "ensemble.members=3"
PAIRS = list(zip(*generate(16, 0, "validation").texts, strict=True))


def record(folder: Path | str) -> dict[str, Any]:
    return json.loads(Path(folder, "run.json").read_text())  # type: ignore[no-any-return]


def scores(folder: Path | str) -> NDArray[np.float64]:
    return pq.read_table(Path(folder, "predictions/validation.parquet"))["score"].to_numpy()  # type: ignore[no-any-return]


def train(folder: Path | str, *overrides: str) -> Path:
    answer = command("train", *ASKED, *overrides, f"hydra.run.dir={folder}")
    assert answer.code == 0, answer
    return Path(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`ensemble`, and its members as runs of their own, `0`, `1` and `2`: not to be changed."""
    top = tmp_path_factory.mktemp("runs")
    train(top / "ensemble", THREE, "adapter.dropout=0.1")
    for i in range(3):
        train(top / str(i), f"seed={i * 1_000_000}", "adapter.dropout=0.1")
    return top


def test_its_members_are_what_runs_of_their_seeds_learn(runs: Path) -> None:
    alone = [scores(runs / str(i)) for i in range(3)]
    assert scores(runs / "ensemble") == pytest.approx(np.mean(alone, axis=0), abs=1e-4)
    assert np.std(alone, axis=0).max() > 1e-3
    for i in range(3):
        weights = load_file(runs / f"ensemble/adapter/member_{i}/adapter_model.safetensors")
        expected = load_file(runs / f"{i}/adapter/adapter_model.safetensors")
        assert weights.keys() == expected.keys()
        assert all((weights[name] - tensor).abs().max() < 1e-4 for name, tensor in expected.items())


def test_its_record_has_its_own_figures_and_its_members(runs: Path) -> None:
    results = record(runs / "ensemble")
    metrics, labels = (
        results["metrics"],
        pq.read_table(runs / "ensemble/predictions/validation.parquet")["label"],
    )
    for name, value in score(scores(runs / "ensemble").copy(), labels.to_numpy().copy(), {}).items():
        assert metrics[f"validation/{name}"] == value
    for i in range(3):
        single = record(runs / str(i))
        for name in ("accuracy", "mcc", "nll", "ece", "brier", "calibrated/nll"):
            assert metrics[f"validation/member_{i}/{name}"] == pytest.approx(
                single["metrics"][f"validation/{name}"], abs=1e-3
            )
        member = results["selection"]["members"][i]
        assert {"step": member["step"], "epoch": member["epoch"]} == {
            key: single["selection"][key] for key in ("step", "epoch")
        }
        assert member["temperature"] == pytest.approx(single["selection"]["temperature"], rel=1e-2)
    of_members = np.stack([scores(runs / str(i)) for i in range(3)])
    assert metrics["validation/disagreement"] == pytest.approx(disagreement(of_members))
    assert {"validation/calibrated/nll", "validation/members/ece", "selection/mcc"} <= metrics.keys()
    one = record(runs / "0")
    assert results["params"]["adapter"] == 3 * one["params"]["adapter"]
    assert results["params"]["total"] == one["params"]["total"] + 2 * one["params"]["trainable"]
    assert results["cost"]["train_flops"] == 3 * one["cost"]["train_flops"]
    assert (results["cost"]["pack_size"], results["cost"]["steps"]) == (3, 6)
    assert results["cost"]["train_seconds"] > 0


def test_its_selection_lines_tell_members_apart_and_its_reported_split_is_scored_once(runs: Path) -> None:
    lines = [json.loads(line) for line in (runs / "ensemble/metrics.jsonl").read_text().splitlines()]
    looks = [f"selection/member_{i}" for i in range(3)]
    assert [line["split"] for line in lines] == [*looks, *looks, "validation"]


@pytest.mark.parametrize("vary", [["init"], ["order"], ["dropout"], ["init", "order", "dropout"]])
def test_members_differ_in_what_varies_and_in_nothing_else(vary: list[str]) -> None:
    experiment = Experiment.build(composed(THREE, f"ensemble.vary=[{','.join(vary)}]", "adapter.dropout=0.1", "seed=7"))
    for i, member in enumerate(experiment.members()):
        for purpose in ("init", "order", "dropout"):
            assert member.seed_of(purpose) == 7 + 1_000_000 * i * (purpose in vary)


def test_with_one_order_members_see_the_same_batches_and_start_apart(in_tmp: Path) -> None:
    train("run", "ensemble.members=2", "ensemble.vary=[init]", "trainer.max_steps=1", "trainer.eval_every=1")
    train("0", "trainer.max_steps=1", "trainer.eval_every=1")
    tensors = [load_file(f"run/adapter/member_{i}/adapter_model.safetensors") for i in range(2)]
    heads = [next(t for n, t in named.items() if n.endswith("classifier.weight")) for named in tensors]
    assert (heads[0] - heads[1]).abs().max() > 1e-3
    one, both = record("0")["cost"], record("run")["cost"]
    assert both["train_padding_tokens"] == 2 * one["train_padding_tokens"]


def test_a_finished_ensemble_predicts_and_is_scored_again_as_in_its_record(runs: Path, in_tmp: Path) -> None:
    run = Path(shutil.copytree(runs / "ensemble", "run"))
    assert lora_bench.load(run).predict(PAIRS) == pytest.approx(scores(run), abs=1e-6)
    request = [f"run={run}", "data=toy", "data.train_rows=80", "data.validation_rows=16"]
    assert command("eval", *request).code == 0
    metrics = {k: v for k, v in record(run)["metrics"].items() if k.startswith("validation/")}
    assert json.loads((run / "evaluations/toy.json").read_text())["metrics"] == pytest.approx(metrics, abs=1e-6)


def test_predict_writes_calibrated_probability_and_spread(runs: Path, in_tmp: Path) -> None:
    Path("pairs.tsv").write_text("question1\tquestion2\n" + "".join(f"{one}\t{two}\n" for one, two in PAIRS))
    request = ["input=pairs.tsv", "output=out.parquet", "uncertainty=true"]
    assert command("predict", f"run={runs / 'ensemble'}", *request).code == 0
    labelled = pq.read_table("out.parquet")
    assert labelled.column_names == [
        *("question1", "question2", "label", "label_name", "score", "calibrated", "spread")
    ]
    of_members = np.stack([scores(runs / str(i)) for i in range(3)])
    assert labelled["score"].to_numpy() == pytest.approx(of_members.mean(axis=0), abs=1e-4)
    assert labelled["spread"].to_numpy() == pytest.approx(of_members.std(axis=0), abs=1e-4)
    logits = np.log(scores(runs / "ensemble")) - np.log1p(-scores(runs / "ensemble"))
    temperature = record(runs / "ensemble")["selection"]["temperature"]
    assert labelled["calibrated"].to_numpy() == pytest.approx(1 / (1 + np.exp(-logits / temperature)), abs=1e-5)
    assert command("predict", f"run={runs / '0'}", *request).code == 0
    assert pq.read_table("out.parquet").column_names[2:] == ["label", "label_name", "score", "calibrated"]


@pytest.mark.parametrize("form", ["peft", "merged"])
def test_export_writes_every_member(runs: Path, in_tmp: Path, form: str) -> None:
    answer = command("export", f"run={runs / 'ensemble'}", f"format={form}", "output=out")
    assert answer.code == 0, answer
    assert "ensemble of 3" in answer.out
    for i in range(3):
        if form == "peft":
            weights = load_file(f"out/member_{i}/adapter_model.safetensors")
            expected = load_file(runs / f"ensemble/adapter/member_{i}/adapter_model.safetensors")
            assert weights.keys() == expected.keys()
            assert all(weights[name].equal(tensor) for name, tensor in expected.items())
            continue
        assert command("export", f"run={runs / str(i)}", "format=merged", f"output=alone{i}").code == 0
        merged, alone = (load_file(f"{folder}/model.safetensors") for folder in (f"out/member_{i}", f"alone{i}"))
        assert all((merged[name] - tensor).abs().max() < 1e-4 for name, tensor in alone.items())


def test_it_goes_on_where_it_was_stopped(runs: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        at_step(patch, 4, signalled(signal.SIGTERM))
        answer = command("train", *ASKED, THREE, "adapter.dropout=0.1", "hydra.run.dir=run")
    assert answer.code == 143
    assert record("run")["status"] == "interrupted"
    answer = command("train", "resume=run")
    assert answer.code == 0, answer
    assert "resumed from step 4" in answer.out
    assert record("run")["metrics"] == record(runs / "ensemble")["metrics"]
    assert not Path("run/checkpoints").exists()


def test_a_member_that_diverges_ends_its_ensemble_and_no_other_run(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = scores(train("lone", "ensemble.members=2", "seed=1"))
    updates_by_member: list[dict[str, Update]] = []

    def break_second(self: LoRA, updates: dict[str, Update], step: int, steps: int) -> None:
        if all(updates is not other for other in updates_by_member):
            updates_by_member.append(updates)
        if step == 2 and updates is updates_by_member[1]:
            next(iter(updates.values())).lora_B.data.fill_(math.nan)

    monkeypatch.setattr(LoRA, "after_step", break_second)
    answer = command("train", "-m", *ASKED, "ensemble.members=2", "seed=0,1", "hydra.sweep.dir=sweep")
    assert answer.code == 1
    assert [record(f"sweep/{k}")["status"] for k in range(2)] == ["diverged", "done"]
    assert "step 3" in record("sweep/0")["error"]
    assert not Path("sweep/0/adapter").exists()
    assert scores("sweep/1") == pytest.approx(expected, abs=1e-4)
    cost = record("sweep/1")["cost"]
    assert (cost["pack_size"], cost["train_seconds"]) == (4, None)


def test_members_whose_ranks_differ_are_put_together_again(in_tmp: Path) -> None:
    run = train("run", "ensemble.members=2", "adapter=adalora", "trainer.max_steps=12", "adapter.rank=2")
    ranks = record(run)["targets"].values()
    assert any(isinstance(rank, list) for rank in ranks)
    assert lora_bench.load(run).predict(PAIRS) == pytest.approx(scores(run), abs=1e-6)


def test_what_it_would_cost_is_that_of_all_members(in_tmp: Path) -> None:
    answers = [command("train", *ASKED, "dry_run=true", *options) for options in ([], ["ensemble.members=2"])]
    sizes = [re.search(r"([\d.]+) k adapter \+ ([\d.]+) k head", answer.out) for answer in answers]
    assert sizes[0] is not None, answers[0]
    assert sizes[1] is not None, answers[1]
    assert [float(n) for n in sizes[1].groups()] == pytest.approx([2 * float(n) for n in sizes[0].groups()], rel=0.05)


@pytest.mark.usefixtures("in_tmp")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["ensemble.members=1"], (Code.INVALID_VALUE, "ensemble.members", 1)),
        ([THREE, "ensemble.vary=[]"], (Code.INVALID_VALUE, "ensemble.vary", [])),
        ([THREE, "ensemble.vary=[luck]"], (Code.INVALID_VALUE, "ensemble.vary", ["luck"])),
        ([THREE, "ensemble.vary=[dropout]"], (Code.CONFLICT, "ensemble.vary", ["dropout"])),
        (["-m", THREE, "seed=0,1", "pack.halving=true"], (Code.CONFLICT, "pack.halving", "true")),
        ([THREE, "adapter=full"], (Code.UNSUPPORTED, "ensemble.members", 3)),
    ],
)
def test_what_is_no_ensemble_is_refused(arguments: list[str], expected: tuple[Code, str, object]) -> None:
    error = refused("train", *arguments, *ASKED)
    assert (error.code, error.key, error.value) == expected


def test_compare_counts_the_bytes_of_all_members(runs: Path) -> None:
    (row,) = summarise([runs / "ensemble"]).rows
    files = [path.stat().st_size for path in (runs / "ensemble/adapter").rglob("*.*")]
    assert row.stats["adapter_bytes"].mean == sum(files) > 3 * max(files)
    assert "members/mcc" in row.stats
