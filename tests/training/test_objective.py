"""Losses are those of their formulas, and consistency compares pairs that truly come twice, however they travel."""

from __future__ import annotations

import io
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from scipy.special import softmax
from scipy.stats import entropy

from lora_bench import train as story
from lora_bench.data import sources
from lora_bench.data.batching import Batch, BatchPlan, collate, join_orders, micro_batches, training_batches
from lora_bench.data.examples import Examples
from lora_bench.data.tokenization import TokenTable, tokenize
from lora_bench.errors import Code
from lora_bench.evaluation.cost import FlopModel
from lora_bench.head.loss import cross_entropy
from lora_bench.records import run_folder
from lora_bench.records.job import Job
from lora_bench.run.settings import Experiment
from lora_bench.training.objective import check_objective, consistency, make_objective, order_note
from lora_bench.training.prediction import predict
from tests.adapters.tools import adapter, assert_close, experiment, optimizer, pack, trainer
from tests.command_line import refuses
from tests.helpers import SMALL_TOY, TINY, composed
from tests.training.tools import fit

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from lora_bench.adapters.pack.pack import Pack
    from lora_bench.backbones.base import Backbone
    from lora_bench.config.schema import Optimizer, Trainer
    from lora_bench.training.member_run import MemberProgress

COLUMNS = ["question1", "question2"]


def written_out(p: NDArray[np.float64], q: NDArray[np.float64], label: int, weight: float) -> float:
    """The loss of one pair by its formula, from the logits of its two orders."""
    p, q = softmax(p), softmax(q)
    likelihood = -(np.log(p[label]) + np.log(q[label])) / 2
    return float(likelihood + weight * (entropy(p, q) + entropy(q, p)) / 2)


def both(**changes: Any) -> Trainer:
    return trainer(**{"objective": "order_consistency", "consistency_weight": 0.7, **changes})


class Losses:
    """A watcher that remembers each step's losses and pairs."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []
        self.pairs: list[int] = []

    def stepped(self, step: int, losses: Any, pairs: int) -> None:
        self.seen.append(list(losses.values()))
        self.pairs.append(pairs)

    def evaluated(self, member: int, line: dict[str, Any]) -> None: ...


@cache
def examples(size: int) -> Examples:
    data = experiment(f"data.train_size={size}").data
    train, _ = sources.split_selection(sources.load(data)[1]["train"], data)
    return train


def tables_of(backbone: Backbone, size: int = 40) -> tuple[TokenTable, TokenTable]:
    """Toy pairs of unlike lengths, some of them truncated, as they are and exchanged."""
    as_is, second_view = (tokenize(examples(size), COLUMNS, backbone, 40, reverse=way) for way in (False, True))
    return as_is, second_view


def learn(
    a_pack: Pack,
    settings: Trainer,
    rates: list[Optimizer] | None = None,
    *,
    exchanged: bool = False,
    size: int = 40,
) -> tuple[list[MemberProgress], Losses]:
    """Fit on the toy pairs, which are their own selection split; with `exchanged` on data whose columns are."""
    as_is, swapped = tables_of(a_pack.backbone, size)
    train, other = (swapped, as_is) if exchanged else (as_is, swapped)
    if settings.objective == "alternate_order":
        train = replace(train, reversed_view=other)
    watcher = Losses()
    one_a_step_ten_a_row = FlopModel((1.0, 10.0, 0.0, 0.0))
    rates = rates or [optimizer(eps=1e-3)] * a_pack.size
    outcomes = fit(
        a_pack,
        rates,
        settings,
        train,
        as_is,
        second_view=other if settings.objective == "order_consistency" else None,
        flop_models=[one_a_step_ten_a_row] * a_pack.size,
        watcher=watcher,
    )
    return outcomes, watcher


# -- the loss --


def test_the_loss_of_a_row_is_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 7, 2, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 2, (2, 7), generator=generator)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(2, 7)
    torch.testing.assert_close(cross_entropy(logits, labels), expected)


def test_the_loss_of_sure_answers_is_finite_and_so_are_its_gradients() -> None:
    logits = torch.tensor([[[3e3, -3e3], [-3e3, 3e3]]], requires_grad=True)
    cross_entropy(logits, torch.zeros(1, 2).long()).sum().backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("weight", [0.0, 0.3, 5.0])
def test_the_loss_is_its_formula(weight: float) -> None:
    rng = np.random.default_rng(0)
    p, q = rng.normal(0, 3, (2, 3, 5, 2))  # 3 members, 5 pairs
    labels = rng.integers(0, 2, (3, 5))
    logits = torch.from_numpy(np.concatenate([p, q], 1))
    losses = consistency(logits, torch.from_numpy(np.concatenate([labels, labels], 1)), weight=weight)
    expected = [np.mean([written_out(p[k, i], q[k, i], labels[k, i], weight) for i in range(5)]) for k in range(3)]
    np.testing.assert_allclose(losses, expected, rtol=1e-12)


def test_gradients_are_those_of_the_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 6, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[0, 1, 1, 0, 1, 1], [1, 0, 0, 1, 0, 0]])
    assert torch.autograd.gradcheck(lambda x: consistency(x, labels, weight=1.3), logits)
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, labels), logits)


def test_neither_order_comes_first() -> None:
    logits, labels = torch.randn(2, 8, 2, generator=torch.Generator().manual_seed(1)), torch.ones(2, 8).long()
    turned = torch.cat([logits[:, 4:], logits[:, :4]], 1)
    torch.testing.assert_close(consistency(logits, labels, weight=2), consistency(turned, labels, weight=2))


def test_equal_answers_cost_nothing_and_opposite_ones_stay_finite() -> None:
    logits, labels = torch.tensor([[[3.0, -1.0]]]).repeat(1, 2, 1), torch.zeros(1, 2).long()
    assert torch.equal(consistency(logits, labels, weight=9), cross_entropy(logits, labels).mean(1))
    sure = torch.tensor([[[3e3, -3e3], [-3e3, 3e3]]], requires_grad=True)
    loss = consistency(sure, labels, weight=1)
    assert loss.item() == pytest.approx(3000 + 6000)
    loss.backward()
    assert torch.isfinite(sure.grad).all()


def test_settings_choose_the_loss() -> None:
    logits, labels = torch.randn(1, 4, 2, generator=torch.Generator().manual_seed(2)), torch.zeros(1, 4).long()
    plain, consistent = (make_objective(chosen) for chosen in (trainer(), both(consistency_weight=3.0)))
    assert (plain.orders, consistent.orders) == (1, 2)
    assert torch.equal(plain.loss(logits, labels), cross_entropy(logits, labels).mean(1))
    assert torch.equal(consistent.loss(logits, labels), consistency(logits, labels, weight=3.0))


# -- the rows --


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("family", TINY)
def test_exchanged_rows_are_pairs_in_their_own_right(
    backbone: Callable[..., Backbone], family: str, cached: bool
) -> None:
    reader = backbone(family)
    first, second = ["How do I learn Go?", "a"], ["What is the best way?", "b " * 40]
    given = Examples(np.array([7, 3]), (first, second), np.array([1, 0]))
    table = tokenize(given, COLUMNS, reader, 64, reverse=True, cached=cached)
    if family == "tiny_t5":
        texts = ([f"qqp question1: {b} question2: {a}" for a, b in zip(first, second, strict=True)],)
    else:
        texts = (second, first)
    expected = reader.tokenizer(*texts, truncation="longest_first", max_length=64)
    ends = table.offsets + table.lengths
    assert [table.values[i:j].tolist() for i, j in zip(table.offsets, ends, strict=True)] == expected["input_ids"]
    if family == "tiny_bert":
        assert table.types is not None
        assert table.types.tolist() == [t for types in expected["token_type_ids"] for t in types]
    assert (table.ids.tolist(), table.labels.tolist()) == ([7, 3], [1, 0])


def simple_table(lengths: list[int], start: int, *, types: bool = True) -> TokenTable:
    """Row i begins with the number start + i."""
    sizes = np.array(lengths)
    offsets = np.cumsum(sizes) - sizes
    values = np.full(sizes.sum(), 5, np.int32)
    values[offsets] = start + np.arange(len(sizes))
    marks = np.arange(sizes.sum()).astype(np.int8) % 2 if types else None
    return TokenTable(values, offsets, sizes, marks, np.arange(len(sizes)) % 2, np.arange(len(sizes)), 0)


def firsts(batch: Batch) -> list[int]:
    return batch.input_ids[:, 0].tolist()


@pytest.mark.parametrize("types", [True, False])
def test_a_batch_goes_member_by_member_and_then_order_by_order(types: bool) -> None:
    as_is, second_view = simple_table([3, 4, 4], 100, types=types), simple_table([3, 6, 4], 200, types=types)
    rows = np.array([0, 1, 2, 0])  # two members, two pairs each
    one, other = (collate(table, rows, 6, 0, members=2) for table in (as_is, second_view))
    batch = join_orders(one, other)
    assert (batch.members, batch.orders, batch.pairs) == (2, 2, 2)
    assert firsts(batch) == [100, 101, 200, 201, 102, 100, 202, 200]
    assert batch.labels.tolist() == [0, 1, 0, 1, 0, 0, 0, 0]
    assert batch.attention_mask.sum(1).tolist() == [3, 4, 3, 6, 4, 3, 4, 3]
    for view, places in ((one, [0, 1, 4, 5]), (other, [2, 3, 6, 7])):
        assert torch.equal(batch.input_ids[places], view.input_ids)
        assert (batch.token_type_ids is None) == (not types)
        if types:
            assert torch.equal(batch.token_type_ids[places], view.token_type_ids)
    halves = list(micro_batches(batch, 1))
    assert [firsts(half) for half in halves] == [[100, 200, 102, 202], [101, 201, 100, 200]]
    assert all((half.members, half.orders, half.pairs) == (2, 2, 1) for half in halves)


def test_shared_rows_are_repeated_with_both_orders() -> None:
    one, other = (collate(simple_table([3, 3], start), np.arange(2), 3, 0) for start in (100, 200))
    batch = join_orders(one, other)
    assert batch.full
    assert not join_orders(one, collate(simple_table([3, 2], 200), np.arange(2), 3, 0)).full
    assert not join_orders(collate(simple_table([3, 2], 100), np.arange(2), 3, 0), other).full
    repeated = batch.repeat(3)
    assert firsts(repeated) == [100, 101, 200, 201] * 3
    assert (repeated.members, repeated.orders, repeated.pairs) == (3, 2, 2)


@pytest.mark.parametrize("seeds", [[4, 4], [4, 5]])
def test_an_epoch_brings_every_pair_in_both_orders(seeds: list[int]) -> None:
    lengths = np.random.default_rng(0).integers(3, 12, 23).tolist()
    as_is, second_view = simple_table(lengths, 100), simple_table(lengths, 200)
    plan = BatchPlan(as_is.lengths, 4)
    plain = list(training_batches(as_is, plan, seeds, 0, 0))
    doubled = list(training_batches(as_is, plan, seeds, 0, 0, second_view))
    assert len(plain) == len(doubled) == 6
    for one, two in zip(plain, doubled, strict=True):
        assert two.members == one.members == len(set(seeds))
        assert two.pairs == one.pairs
        places = np.array(firsts(two)).reshape(two.members, 2, -1)
        assert places[:, 0].flatten().tolist() == firsts(one)
        assert (places[:, 1] - places[:, 0] == 100).all()


# -- the step --


def reference_losses(
    a_pack: Pack, tables: tuple[TokenTable, TokenTable], size: int, weight: float
) -> list[list[float]]:
    """Each step's loss of every member over the first epoch, each row run by itself and without padding."""
    logits = []
    for table in tables:
        rows = [collate(table, np.array([i]), int(table.lengths[i]), 0) for i in range(len(table))]
        with torch.no_grad():
            logits.append(torch.cat([a_pack(row) for row in rows], 1).double().numpy())  # (K, N, 2)
    labels = tables[0].labels
    assert labels is not None
    lengths = np.maximum(tables[0].lengths, tables[1].lengths)
    losses = []
    p, q = logits
    for chosen, _ in BatchPlan(lengths, size).epoch(0, [member.seed for member in a_pack.members]):
        pair_losses = [
            [written_out(p[k, i], q[k, i], labels[i], weight) for i in rows] for k, rows in enumerate(chosen)
        ]
        losses.append([float(np.mean(of_member)) for of_member in pair_losses])
    return losses


@pytest.mark.parametrize(
    ("form", "seeds", "micro"),
    [("bert", (0,), None), ("bert", (0, 0), 2), ("bert", (0, 1), 7), ("t5", (0,), 2), ("t5", (0, 1), None)],
    ids=str,
)
def test_the_reported_loss_is_that_of_each_pair_by_itself(form: str, seeds: tuple[int, ...], micro: int | None) -> None:
    members = [(adapter("lora", f"rank={k + 2}"), seed) for k, seed in enumerate(seeds)]
    a_pack = pack(form, *members).eval()
    expected = reference_losses(a_pack, tables_of(a_pack.backbone), 8, 0.7)
    _, watcher = learn(a_pack, both(steps=5, micro_batch_size=micro), [optimizer(1e-12)] * len(seeds))
    np.testing.assert_allclose(watcher.seen, expected, atol=2e-5)
    assert np.ptp(expected, axis=0).min() > 1e-3
    assert watcher.pairs == [8] * 5


@pytest.mark.parametrize("form", ["bert", "t5"])
def test_micro_batches_change_nothing(form: str) -> None:
    states = []
    for micro in (None, 3):
        a_pack = pack(form, (adapter("lora"), 0))
        learn(a_pack, both(steps=6, micro_batch_size=micro))
        states.append(a_pack.state(0))
    assert_close(states[0], states[1], 1e-5)


@pytest.mark.parametrize("form", ["bert", "t5"])
def test_data_with_its_columns_exchanged_teaches_the_same(form: str) -> None:
    states, losses = [], []
    for exchanged in (False, True):
        a_pack = pack(form, (adapter("lora"), 0))
        _, watcher = learn(a_pack, both(steps=6), exchanged=exchanged)
        states.append(a_pack.state(0))
        losses.append(watcher.seen)
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-5)
    assert_close(states[0], states[1], 1e-5)


@pytest.mark.parametrize("micro", [None, 6])
@pytest.mark.parametrize("seeds", [(0, 0, 0), (0, 1, 2)], ids=str)
def test_a_member_learns_what_it_would_alone(seeds: tuple[int, ...], micro: int | None) -> None:
    settings = both(steps=8, micro_batch_size=micro, average=0.5)
    lora = [adapter("lora", "rank=2"), adapter("lora", "rank=4", "dropout=0.2"), adapter("head_only")]
    members = list(zip(lora, seeds, strict=True))
    if micro:
        members[1] = members[0]  # where dropout falls depends on how a batch is cut
    rates = [optimizer(rate, eps=1e-3) for rate in (1e-2, 3e-3, 2e-2)]
    together = pack("bert", *members)
    learn(together, settings, rates)
    for k, member in enumerate(members):
        alone = pack("bert", member)
        learn(alone, settings, [rates[k]])
        assert_close(together.state(k), alone.state(0), 1e-4)


def test_flops_count_both_orders_and_pairs_count_once() -> None:
    (plain,), _ = learn(pack("bert", (adapter("lora"), 0)), trainer(steps=7), size=36)
    (twice,), watcher = learn(pack("bert", (adapter("lora"), 0)), both(steps=7), size=36)
    assert plain.pairs == twice.pairs == sum(watcher.pairs)
    assert 36 < twice.pairs < 7 * 8  # a batch was short
    assert plain.flops == 7 + 10 * plain.pairs
    assert twice.flops == 7 + 20 * plain.pairs


def test_the_shorter_order_is_padded_to_the_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    a_pack = pack("bert", (adapter("lora"), 0))
    as_is, swapped = simple_table([4] * 8, 5), simple_table([4] * 7 + [9], 5)
    shapes = []
    prefix = a_pack.prefix
    monkeypatch.setattr(a_pack, "prefix", lambda batch: shapes.append(tuple(batch.input_ids.shape)) or prefix(batch))
    fit(a_pack, [optimizer()], both(steps=2, batch_size=4), as_is, as_is, second_view=swapped)
    assert shapes[:2] == [(8, 9), (8, 9)]  # one bucket, and the longest row is in it


def test_answers_come_to_agree() -> None:
    gaps = []
    for settings in (trainer(steps=60), both(steps=60, consistency_weight=5.0)):
        a_pack = pack("bert", (adapter("lora"), 0))
        learn(a_pack, settings, [optimizer(3e-3)])
        one, other = (predict(a_pack, table, 32) for table in tables_of(a_pack.backbone))
        gaps.append(np.abs(one - other).mean())
    assert gaps[1] < 0.5 * gaps[0]


# -- one order, by turns --


def test_each_pair_comes_in_one_order_and_then_in_the_other() -> None:
    a_pack = pack("bert", (adapter("lora"), 0))
    as_is, swapped = tables_of(a_pack.backbone)
    table = replace(as_is, reversed_view=swapped)
    plan = BatchPlan(np.maximum(as_is.lengths, swapped.lengths), 8)
    seen: dict[int, list[int]] = {i: [] for i in range(40)}
    for epoch in range(3):
        for seeds in ([0], [0, 1]):
            batches = training_batches(table, plan, seeds, epoch, 0)
            for batch, (rows, length) in zip(batches, plan.epoch(epoch, seeds), strict=True):
                all_rows = np.concatenate(rows)
                one, other = (collate(view, all_rows, length, 0, len(seeds)) for view in (as_is, swapped))
                assert (batch.members, batch.orders) == (len(seeds), 1)
                assert batch.labels is not None
                assert batch.labels.tolist() == as_is.labels[all_rows].tolist()  # type: ignore[index]
                for position, row in enumerate(all_rows.tolist()):
                    orders = [torch.equal(batch.input_ids[position], view.input_ids[position]) for view in (one, other)]
                    assert sum(orders) == 1
                    assert batch.token_type_ids is not None
                    chosen = (one, other)[orders.index(True)]
                    assert torch.equal(batch.token_type_ids[position], chosen.token_type_ids[position])  # type: ignore[index]
                    if seeds == [0]:
                        seen[row].append(orders.index(True))
    turns = list(seen.values())
    assert all(first != second and first == third for first, second, third in turns)
    assert 10 <= sum(first for first, _, _ in turns) <= 30


def test_one_order_of_pairs_alike_in_both_is_cross_entropy() -> None:
    """Both orders of a pair are the same if its two texts are equal."""
    twice = Examples(np.arange(24), (["a b c d"] * 12 + ["e f"] * 12,) * 2, np.arange(24) % 2)
    losses = []
    for turns in (False, True):
        a_pack = pack("bert", (adapter("lora"), 0))
        table = tokenize(twice, COLUMNS, a_pack.backbone, 40, cached=False)
        watcher = Losses()
        table = replace(table, reversed_view=table) if turns else table
        chosen = trainer(steps=5, objective="alternate_order" if turns else "cross_entropy")
        fit(a_pack, [optimizer()], chosen, table, replace(table, reversed_view=None), watcher=watcher)
        losses.append(watcher.seen)
    assert losses[0] == losses[1]


# -- the request --


def test_it_builds_and_what_is_out_of_range_does_not() -> None:
    settings = Experiment.build(composed("trainer.objective=order_consistency", "trainer.consistency_weight=0.5"))
    assert (settings.trainer.objective, settings.trainer.consistency_weight) == ("order_consistency", 0.5)
    assert Experiment.build(composed()).trainer.objective == "cross_entropy"
    for code, key, value in (
        (Code.UNKNOWN_CHOICE, "trainer.objective", "margin"),
        (Code.INVALID_VALUE, "trainer.consistency_weight", "-1.0"),
    ):
        with refuses(code, key=key) as caught:
            Experiment.build(composed(f"{key}={value}"))
        assert str(caught.value.value) == value


def test_single_sentences_are_refused() -> None:
    for chosen, key, value in (
        (both(), "trainer.objective", "order_consistency"),
        (trainer(score_both_orders=True), "trainer.score_both_orders", "true"),
        (trainer(objective="alternate_order"), "trainer.objective", "alternate_order"),
    ):
        with refuses(Code.CONFLICT, key=key) as caught:
            check_objective(chosen, ["sentence"])
        assert caught.value.value == value
        assert "'sentence'" in str(caught.value)
    check_objective(both(score_both_orders=True), COLUMNS)
    check_objective(trainer(), ["sentence"])


def test_reversed_orders_of_entailment_are_noted() -> None:
    reversing = trainer(objective="alternate_order", score_both_orders=True)
    assert order_note(trainer(), "entailment") is None
    assert [order_note(reversing, relation) for relation in ("paraphrase", "similarity", None)] == [None] * 3
    note = str(order_note(reversing, "entailment"))
    assert "trainer.objective=alternate_order and trainer.score_both_orders=true" in note


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    console, cfg = Console(file=io.StringIO()), composed(*overrides)
    story.train(Job(cfg, folder, {"model": "m", "adapter": "a", "data": "d"}, []), console=console)
    return run_folder.read(folder)


def test_a_run_on_single_sentences_is_refused_and_leaves_no_folder(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "validation"):
        rows = "".join(f"sentence {i}\t{i % 2}\n" for i in range(12))
        (data / f"{split}.tsv").write_text(f"sentence\tlabel\n{rows}")
    options = ["data=pairs", f"data.path={data}", "data.text_columns=[sentence]", "data.selection_size=4"]
    with refuses(Code.CONFLICT, key="trainer.objective") as caught:
        run(tmp_path / "run", *options, "trainer.objective=order_consistency")
    assert "'sentence'" in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("family", ["tiny_bert", "tiny_t5"])
def test_a_whole_run(tmp_path: Path, family: str) -> None:
    quick = [*SMALL_TOY, f"model={family}", "data.max_length=48", "trainer.epochs=1", "trainer.average=0.5"]
    plain = run(tmp_path / "plain", *quick)
    twice = run(tmp_path / "twice", *quick, "trainer.objective=order_consistency")
    by_turns = run(tmp_path / "by_turns", *quick, "trainer.objective=alternate_order")
    assert by_turns["cost"]["train_flops"] == pytest.approx(plain["cost"]["train_flops"], rel=0.02)
    assert by_turns["metrics"]["selection/nll"] != plain["metrics"]["selection/nll"]
    assert twice["status"] == "done"
    assert twice["cost"]["steps"] == plain["cost"]["steps"]
    assert twice["cost"]["train_flops"] == pytest.approx(2 * plain["cost"]["train_flops"], rel=0.02)
    assert twice["metrics"]["selection/nll"] != plain["metrics"]["selection/nll"]
