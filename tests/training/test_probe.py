"""A dry run's estimate agrees with the run, and probing leaves no trace: weights, gradients, random streams."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import pytest
import torch
from rich.console import Console

from lora_bench.adapters.pack import Member, Pack
from lora_bench.data.pairs import TokenTable, tokenize
from lora_bench.evaluation.cost import FlopModel
from lora_bench.experiment import Experiment, load_splits, swapped_table
from lora_bench.training import probe
from lora_bench.training.loop import fit
from lora_bench.training.probe import Estimate, estimate, probe_step
from tests.helpers import SMALL_TOY, TINY, composed

if TYPE_CHECKING:
    from collections.abc import Callable

    from lora_bench.backbones.base import Backbone


def experiment_of(*overrides: str) -> Experiment:
    return Experiment.build(composed(*SMALL_TOY, "data.max_length=48", *overrides))


def tables_of(experiment: Experiment, pack: Pack) -> dict[str, TokenTable]:
    splits, _ = load_splits(experiment.data)
    columns, limit = experiment.data.text_columns, experiment.data.max_length
    return {name: tokenize(split, columns, pack.backbone, limit) for name, split in splits.items()}


@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize("family", TINY)
def test_a_probe_leaves_no_trace(backbone: Callable[..., Backbone], family: str, adapter: str) -> None:
    overrides = [f"model={family}", f"adapter={adapter}"] + (["adapter.dropout=0.5"] if adapter == "lora" else [])
    experiment = experiment_of(*overrides)
    pack = Pack(backbone(family), [Member(experiment.adapter, 0)])
    pack.train()
    weights = {name: tensor.clone() for name, tensor in pack.network.state_dict().items()}
    streams = [update.generator.get_state() for update in pack.updates[0].values()]
    torch.manual_seed(5)
    probe_step(pack, 3, 9)
    assert torch.rand(3).tolist() == torch.rand(3, generator=torch.Generator().manual_seed(5)).tolist()
    assert all(p.grad is None for p in pack.parameters())
    for name, tensor in pack.network.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    for update, before in zip(pack.updates[0].values(), streams, strict=True):
        assert torch.equal(update.generator.get_state(), before)


@pytest.mark.parametrize("objective", ["cross_entropy", "order_consistency"])
@pytest.mark.parametrize("epochs", ["2", "0.5"])
def test_the_estimate_is_what_the_run_then_does(backbone: Callable[..., Backbone], epochs: str, objective: str) -> None:
    chosen = (f"trainer.epochs={epochs}", f"trainer.objective={objective}")
    experiment = experiment_of(*chosen, "trainer.batch_size=9", "data.train_size=108")
    pack = Pack(backbone(), [Member(experiment.adapter, 0)])
    tables = tables_of(experiment, pack)
    swapped = swapped_table(experiment, load_splits(experiment.data)[0]["train"], pack.backbone)
    assert (swapped is None) == (objective == "cross_entropy")
    expected = estimate(pack, experiment.trainer, tables["train"])
    model = FlopModel.measure(lambda rows, length: probe_step(pack, rows, length))
    train, selection = tables["train"], tables["selection"]
    given = (pack, [experiment.optimizer], experiment.trainer, train, selection)
    (outcome,) = fit(*given, swapped=swapped, flop_models=[model])
    assert expected.steps == outcome.steps == {"2": 24, "0.5": 6}[epochs]
    assert expected.train_flops == pytest.approx(outcome.flops, rel=1e-6 if epochs == "2" else 0.1)
    params = pack.count_parameters(0)
    assert (expected.adapter, expected.head, expected.total) == (params["adapter"], params["head"], params["total"])
    assert expected.train_seconds > 0
    assert expected.peak_memory_bytes > 1_000_000


def test_the_estimate_leaves_the_run_as_it_would_have_been(backbone: Callable[..., Backbone]) -> None:
    experiment = experiment_of("trainer.max_steps=3", "adapter.dropout=0.3")
    states = []
    for probed in (False, True):
        pack = Pack(backbone(), [Member(experiment.adapter, 0)])
        tables = tables_of(experiment, pack)
        if probed:
            estimate(pack, experiment.trainer, tables["train"])
        fit(pack, [experiment.optimizer], experiment.trainer, tables["train"], tables["selection"])
        states.append(pack.state(0))
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def test_both_orders_of_a_pair_are_two_rows(backbone: Callable[..., Backbone]) -> None:
    flops = []
    for objective in ("cross_entropy", "order_consistency"):
        experiment = experiment_of(f"trainer.objective={objective}")
        pack = Pack(backbone(), [Member(experiment.adapter, 0)])
        flops.append(estimate(pack, experiment.trainer, tables_of(experiment, pack)["train"]).train_flops)
    assert flops[1] == pytest.approx(2 * flops[0], rel=0.01)


def test_averaged_weights_take_memory(backbone: Callable[..., Backbone], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "peak_memory_bytes", lambda device: 1_000_000)
    peaks = []
    for average in (0.0, 0.3):
        experiment = experiment_of(f"trainer.average={average}")
        pack = Pack(backbone(), [Member(experiment.adapter, 0)])
        peaks.append(estimate(pack, experiment.trainer, tables_of(experiment, pack)["train"]).peak_memory_bytes)
    trained = pack.count_parameters(0)["trainable"]
    assert peaks == [1_000_000 + 8 * trained, 1_000_000 + 12 * trained]


def test_the_table_says_it_in_units() -> None:
    shown = io.StringIO()
    made = Estimate(
        adapter=147_456,
        head=1538,
        total=22_700_000,
        steps=34_107,
        train_flops=3.2e15,
        train_seconds=5000.0,
        peak_memory_bytes=2_500_000_000,
    )
    Console(file=shown, width=80).print(made.table())
    text = shown.getvalue()
    for words in ("adapter", "34,107", "FLOP", "5000 s", "2.5 GB", "147 k", "23 M"):
        assert words in text
