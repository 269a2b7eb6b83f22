"""An estimate agrees with the cost of the run, and a rehearsal changes no weight."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from rich.console import Console

from lora_bench.adapters.pack.member import Member
from lora_bench.adapters.pack.pack import Pack
from lora_bench.data.augmentation import training_tables
from lora_bench.data.batching import BatchPlan
from lora_bench.data.tokenization import TokenTable, tokenize
from lora_bench.records import run_folder
from lora_bench.records.job import Job
from lora_bench.run.loaded_data import LoadedData
from lora_bench.run.settings import Experiment
from lora_bench.sweeps.cost_estimate import estimate_run
from lora_bench.train import train
from lora_bench.training import rehearsal as module
from lora_bench.training.cuda_graphs import Backward
from lora_bench.training.dummy_step import StepFlops
from lora_bench.training.rehearsal import Estimate, estimate
from tests import forked
from tests.command_line import lora_bench
from tests.helpers import SMALL_TOY, composed
from tests.training.tools import fit

if TYPE_CHECKING:
    from collections.abc import Callable

    from lora_bench.backbones.base import Backbone


def experiment_of(*overrides: str) -> Experiment:
    return Experiment.build(composed(*SMALL_TOY, "data.max_length=48", *overrides))


def given(experiment: Experiment, pack: Pack) -> tuple[dict[str, TokenTable], TokenTable | None]:
    """The tables, and the training pairs once more where the objective asks for it."""
    splits = LoadedData.load(experiment.data).splits
    columns, limit = experiment.data.text_columns, experiment.data.max_length
    train, second_view = training_tables(experiment.data, splits["train"], pack.backbone, experiment.trainer.objective)
    others = {name: tokenize(split, columns, pack.backbone, limit) for name, split in splits.items() if name != "train"}
    return {"train": train, **others}, second_view


def estimated(experiment: Experiment, pack: Pack) -> Estimate:
    tables, second_view = given(experiment, pack)
    return estimate(pack, experiment.optimizer, experiment.trainer, tables, second_view)


@pytest.mark.parametrize("objective", ["cross_entropy", "order_consistency"])
@pytest.mark.parametrize("epochs", ["2", "0.5"])
def test_the_estimate_is_what_the_run_then_does(backbone: Callable[..., Backbone], epochs: str, objective: str) -> None:
    chosen = (f"trainer.epochs={epochs}", f"trainer.objective={objective}")
    experiment = experiment_of(*chosen, "trainer.batch_size=9", "data.train_size=108")
    pack = Pack(backbone(), [Member(experiment.adapter, 0)])
    expected = estimated(experiment, pack)
    model = StepFlops.measure(pack)
    tables, swapped = given(experiment, pack)
    assert (swapped is None) == (objective == "cross_entropy")
    learned = (pack, [experiment.optimizer], experiment.trainer, tables["train"], tables["selection"])
    (outcome,) = fit(*learned, second_view=swapped, flop_models=[model])
    assert expected.steps == outcome.steps == {"2": 24, "0.5": 6}[epochs]
    assert expected.train_flops == pytest.approx(outcome.flops, rel=1e-9)
    params = pack.count_parameters(0)
    assert (expected.adapter, expected.head, expected.total) == (params["adapter"], params["head"], params["total"])
    assert expected.train_seconds > 0
    assert expected.evaluation_seconds > 0
    assert expected.peak_memory_bytes > 1_000_000


def test_a_kept_prefix_is_made_once_and_computed_in_no_step(in_tmp: Path) -> None:
    estimates = []
    for kept in ("1e9", "0"):
        overrides = ("adapter.layers=top:1", f"trainer.prefix_cache_bytes={kept}", "trainer.epochs=3")
        estimates.append(estimate_run(experiment_of(*overrides)))
        command = ["model=tiny_bert", *SMALL_TOY, "data.max_length=48", *overrides, f"hydra.run.dir=run-{kept}"]
        assert lora_bench("train", *command).code == 0
        cost = json.loads((in_tmp / f"run-{kept}" / "run.json").read_text())["cost"]
        assert estimates[-1].train_flops == pytest.approx(cost["train_flops"], rel=1e-9)
        assert estimates[-1].prefix_flops == (cost["prefix_fill_flops"] or 0)
    assert estimates[0].prefix_seconds > 0
    assert estimates[0].train_flops < estimates[1].train_flops


@pytest.mark.parametrize("adapter", ["lora", "full", "adalora", "lora_fa"])
def test_a_rehearsal_changes_no_weight(backbone: Callable[..., Backbone], adapter: str) -> None:
    experiment = experiment_of(f"adapter={adapter}", "trainer.average=0.5", "optimizer.weight_decay=0.1")
    reader = backbone()
    before = reader.hash()
    pack = Pack(reader, [Member(experiment.adapter, 0)])
    trained = pack.state(0)
    estimated(experiment, pack)
    for name, tensor in pack.state(0).items():
        assert torch.equal(tensor, trained[name]), name
    assert all(p.grad is None for p in pack.parameters())
    pack.detach()
    assert reader.hash() == before


def test_seconds_are_those_of_each_shape_and_of_the_first_step_of_each(
    backbone: Callable[..., Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock that a step of n tokens moves on by n, and by 100 more where the shape is new."""
    seen, clock = set(), [0.0]

    def backward(self: Backward, batch: Any, of_pairs: int, pairs: int) -> dict[int, float]:
        clock[0] += batch.input_ids.numel() + 100 * (batch.input_ids.shape not in seen)
        seen.add(batch.input_ids.shape)
        return {0: 0.0}

    monkeypatch.setattr(Backward, "__call__", backward)
    monkeypatch.setattr(module, "in_micro_batches", lambda pack, batch, requested, work: work(batch.pairs))
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(module, "SHAPES", 100)
    experiment = experiment_of("trainer.epochs=3", "trainer.batch_size=4", "data.max_length=200")
    pack = Pack(backbone(), [Member(experiment.adapter, 0)])
    tables, _ = given(experiment, pack)
    plan = BatchPlan(tables["train"].lengths, 4)
    tokens = [len(rows) * length for epoch in range(3) for (rows,), length in plan.epoch(epoch, [0])]
    estimated = estimate(pack, experiment.optimizer, experiment.trainer, tables)
    assert len(seen) > 3
    assert estimated.train_seconds == pytest.approx(sum(tokens) + 100 * len(seen))
    monkeypatch.setattr(module, "SHAPES", 3)  # the others by interpolation; new shapes as before
    seen.clear()
    assert estimate(pack, experiment.optimizer, experiment.trainer, tables).train_seconds == pytest.approx(
        estimated.train_seconds, rel=0.1
    )


def test_both_orders_of_a_pair_are_two_rows(backbone: Callable[..., Backbone]) -> None:
    flops = []
    for objective in ("cross_entropy", "order_consistency"):
        experiment = experiment_of(f"trainer.objective={objective}")
        flops.append(estimated(experiment, Pack(backbone(), [Member(experiment.adapter, 0)])).train_flops)
    assert flops[1] == pytest.approx(2 * flops[0], rel=0.01)


def test_shapes_that_were_not_rehearsed_add_memory_as_the_others_did(
    backbone: Callable[..., Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHAPES", 2)
    held = iter(range(100, 10_000, 7))  # 7 more at each look
    monkeypatch.setattr(module, "held_memory_bytes", lambda device: next(held))
    monkeypatch.setattr(module, "peak_memory_bytes", lambda device: 5000)
    experiment = experiment_of("trainer.batch_size=4", "data.max_length=200")
    pack = Pack(backbone(), [Member(experiment.adapter, 0)])
    tables, _ = given(experiment, pack)
    lengths = tables["train"].lengths
    shapes = {(len(rows), length) for (rows,), length in BatchPlan(lengths, 4).epoch(0, [0])}
    assert len(shapes) > module.SHAPES
    estimated = estimate(pack, experiment.optimizer, experiment.trainer, tables)
    assert estimated.peak_memory_bytes == 5000 + 7 * (len(shapes) - module.SHAPES)


def print_memory(what: str, folder: str, *overrides: str) -> None:
    """Print the peak memory of a run, `estimated` or as it is recorded."""
    cfg = composed("model=tiny_bert", *overrides)
    if what == "estimated":
        print(estimate_run(Experiment.build(cfg)).peak_memory_bytes, flush=True)
    else:
        choices = {"model": "tiny_bert", "adapter": "full", "data": "toy"}
        train(Job(cfg, Path(folder), choices, []), console=Console(quiet=True))
        print(run_folder.read(Path(folder))["cost"]["peak_memory_bytes"], flush=True)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system does not let us reset the peak")
def test_memory_is_within_15_percent_of_the_run_s(tmp_path: Path) -> None:
    """In processes of their own, hence the seconds it takes: their memory is theirs alone.

    The backbone has 13 M weights of positions, which cost no arithmetic. What full fine-tuning holds of them, nine
    times with a checkpoint's copies and the mean, is about half of the whole.
    """
    overrides = [
        "adapter=full",
        "trainer.average=0.5",
        "trainer.max_steps=4",
        "trainer.eval_every=2",
        "data.max_length=16",
    ]
    overrides += ["model.random.max_position_embeddings=100000", "model.random.hidden_size=128", *SMALL_TOY]
    processes = [forked.Forked(print_memory, what, str(tmp_path / "run"), *overrides) for what in ("estimated", "ran")]
    assert [process.wait() for process in processes] == [0, 0], processes[0].err + processes[1].err
    estimated, ran = (float(process.out) for process in processes)
    assert estimated == pytest.approx(ran, rel=0.15)
