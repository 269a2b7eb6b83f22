"""A pack: what a member learns equals what it would have learned alone, and the backbone is given back as it was."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lora_bench.adapters.methods.lora import LoRA
from lora_bench.adapters.pack.member import Member, stream
from lora_bench.adapters.pack.member_modules import MemberHeads
from lora_bench.adapters.pack.pack import Pack
from lora_bench.errors import Code
from lora_bench.training.prediction import predict
from tests.adapters.tools import adapter, assert_close, doubled, joined, optimizer, pack, stir, tables, train, trainer
from tests.backbones.tools import FORMS, make, random_batch, save
from tests.command_line import refuses

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from lora_bench.adapters.base import Adapter, Update
    from lora_bench.config.schema import Optimizer, Trainer
    from lora_bench.data.batching import Batch

Members = list[tuple["Adapter", int]]

UNLIKE: Members = [
    (adapter("lora", "rank=2", "alpha=4"), 0),
    (adapter("lora", "rank=5", "alpha=20"), 1),
    (adapter("lora", "rank=8", "alpha=16"), 2),
]
RATES = [optimizer(1e-2), optimizer(3e-3, schedule="cosine", grad_clip_norm=0.5), optimizer(2e-2, weight_decay=0.1)]


def assert_as_alone(
    form: str,
    members: Members,
    settings: Trainer | None = None,
    *,
    build: Callable[..., Pack] = lambda *arguments: doubled(pack(*arguments)),
    rates: Sequence[Optimizer] = RATES,
    atol: float = 1e-6,
) -> None:
    """Train the members together and each alone; their tensors agree, and they did move.

    In double precision, so that what is wrong and what is rounding differ by many orders: AdamW divides a gradient by
    its own size, and so makes steps of rounding where the gradient is next to nothing.
    """
    together = build(form, *members)
    starts = [together.state(k) for k in range(len(members))]
    _, ends = train(together, rates, settings)
    for member, rate, start, end in zip(members, rates, starts, ends, strict=True):
        alone = build(form, member)
        assert_close(alone.state(0), start, atol=0)
        _, (expected,) = train(alone, [rate], settings)
        assert_close(end, expected, atol=atol)
        assert max((end[name] - start[name]).abs().max() for name in end) > 20 * atol


@pytest.mark.parametrize("form", FORMS)
def test_members_of_unlike_rank_rate_and_seed_learn_what_they_would_alone(form: str) -> None:
    assert_as_alone(form, UNLIKE)


@pytest.mark.parametrize("form", FORMS)
def test_in_fp32_they_do_so_up_to_the_order_of_additions(form: str, backbone: Callable[..., Any]) -> None:
    def build(form: str, *members: tuple[Adapter, int]) -> Pack:
        return pack(form, *members, backbone=backbone(*FORMS[form]))

    assert_as_alone(form, UNLIKE, build=build, rates=[optimizer(3e-3)] * 3, atol=1e-4)


@pytest.mark.parametrize("form", ["bert", "t5"])
def test_with_dropout_they_drop_what_they_would_alone(form: str) -> None:
    assert_as_alone(form, [(replace(settings, dropout=0.3), seed) for settings, seed in UNLIKE])


def test_dropout_does_not_depend_on_a_neighbour_that_needs_every_position() -> None:
    members = [
        Member(adapter("lora", f"rank={rank}", "dropout=0.3"), seed, pair_features=seed == 1)
        for seed, rank in enumerate((2, 4, 8))
    ]
    _, together = train(doubled(Pack(make("tiny_bert"), members, batched=True)))
    for member, end in zip(members, together, strict=True):
        _, (alone,) = train(doubled(Pack(make("tiny_bert"), [member])))
        assert_close(end, alone, atol=1e-6)


@pytest.mark.parametrize("micro_batch_size", [1, 9, 1000])
def test_in_micro_batches(micro_batch_size: int) -> None:
    # Alone and together the portions differ, and the heads add them up in fp32.
    assert_as_alone("bert", UNLIKE, trainer(micro_batch_size=micro_batch_size), atol=1e-4)


@pytest.mark.parametrize("form", ["bert", "t5_encoder"])
def test_members_that_adapt_different_modules(form: str) -> None:
    members = [
        (adapter("lora", "target_modules=qv"), 0),
        (adapter("head_only"), 1),
        (adapter("lora", "target_modules=all", "layers=top:1"), 2),
    ]
    assert_as_alone(form, members)


def test_members_with_one_seed_that_share_their_batches() -> None:
    assert_as_alone("bert", [(settings, 7) for settings, _ in UNLIKE])


def test_micro_batches_change_nothing_but_memory() -> None:
    """8 pairs in portions of 3, 3 and 2 give the update of the whole batch."""
    _, (whole,) = train(pack("bert", UNLIKE[0]))
    _, (portions,) = train(pack("bert", UNLIKE[0]), settings=trainer(micro_batch_size=3))
    assert_close(portions, whole, atol=1e-4)


# -- which rows travel --


def seen_rows(made: Any, monkeypatch: pytest.MonkeyPatch, settings: Trainer) -> list[int]:
    """Rows of every training batch that reach the prefix."""
    rows: list[int] = []
    prefix = made.backbone.prefix

    def note(batch: Batch, depth: int) -> torch.Tensor:
        if torch.is_grad_enabled() or made.training:
            rows.append(len(batch.input_ids))
        return prefix(batch, depth)

    monkeypatch.setattr(made.backbone, "prefix", note)
    train(made, settings=settings)
    return rows


@pytest.mark.parametrize(
    ("seeds", "micro_batch_size", "expected"),
    [((4, 4), None, [8, 8]), ((4, 5), None, [16, 16]), ((4, 5), 4, [8, 8, 8, 8]), ((4, 4), 3, [3, 3, 2, 3, 3, 2])],
)
def test_members_with_one_seed_share_rows_and_a_micro_batch_counts_each_members(
    seeds: tuple[int, int], micro_batch_size: int | None, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = pack("bert", *[(adapter("lora"), seed) for seed in seeds])
    assert seen_rows(made, monkeypatch, trainer(2, micro_batch_size=micro_batch_size)) == expected


@pytest.mark.parametrize("form", FORMS)
def test_shared_rows_give_what_own_rows_would(form: str) -> None:
    made = stir(pack(form, *UNLIKE)).eval()
    batch = random_batch(made.backbone)
    with torch.no_grad():
        shared, own = made(batch), made(batch.repeat(3))
    assert shared.shape == (3, 4, 2)
    assert shared.dtype == torch.float32
    torch.testing.assert_close(shared, own, atol=1e-6, rtol=0)
    assert (shared[0] - shared[1]).abs().max() > 1e-3


def test_members_do_not_see_each_others_rows() -> None:
    made = stir(pack("bert", *UNLIKE)).eval()
    one, other = (random_batch(made.backbone, seed=seed) for seed in (0, 1))
    with torch.no_grad():
        before = made(one.repeat(3))
        mixed = replace(one.repeat(3), input_ids=torch.cat([one.input_ids, other.input_ids, one.input_ids]))
        after = made(mixed)
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.equal(before[1], after[1])


# -- depth --


@pytest.mark.parametrize(
    ("form", "layers", "depth"),
    [("bert", "all", 0), ("bert", "top:1", 1), ("t5", "[1]", 1), ("t5", "top:1", 3), ("t5_encoder", "top:1", 1)],
)
def test_what_lies_below_the_first_adapted_layer_runs_without_gradient(form: str, layers: str, depth: int) -> None:
    made = pack(form, (adapter("lora", f"layers={layers}"), 0))
    assert made.depth == depth
    hidden = []
    prefix = made.backbone.prefix

    def keep(batch: Batch, to: int) -> torch.Tensor:
        assert to == depth
        assert not torch.is_grad_enabled()
        hidden.append(prefix(batch, to))
        return hidden[-1]

    made.backbone.prefix = keep
    made.train()(random_batch(made.backbone)).sum().backward()
    assert not hidden[0].requires_grad
    assert hidden[0].grad_fn is None


def test_the_depth_of_a_pack_is_that_of_its_lowest_member() -> None:
    top, probe = (adapter("lora", "layers=top:1"), 0), (adapter("head_only"), 1)
    assert pack("bert", probe).depth == 2
    assert pack("bert", top, probe).depth == 1
    assert pack("bert", top, probe, UNLIKE[0]).depth == 0
    assert pack("bert", (adapter("full"), 0)).depth == 0


def test_with_full_fine_tuning_the_embeddings_get_gradients() -> None:
    made = pack("bert", (adapter("full"), 0)).train()
    made(random_batch(made.backbone))[0, :, 0].sum().backward()
    assert made.network.bert.embeddings.word_embeddings.weight.grad.any()


# -- divergence and early stopping --


@dataclass(frozen=True, kw_only=True)
class Fragile(LoRA):
    """LoRA that breaks after its third update."""

    def after_step(self, updates: dict[str, Update], step: int, steps: int) -> None:
        if step == 3:
            next(iter(updates.values())).lora_B.data.fill_(math.nan)


FRAGILE = Fragile(**vars(adapter("lora")))


@pytest.mark.parametrize("form", ["bert", "t5"])
def test_a_member_that_breaks_leaves_the_others_to_the_bit(form: str) -> None:
    first, _, last = UNLIKE
    outcomes, ends = train(pack(form, first, (FRAGILE, 1), last))
    _, unbroken = train(pack(form, first, (adapter("lora"), 1), last))
    assert [outcome.status for outcome in outcomes] == ["done", "diverged", "done"]
    assert outcomes[1].steps == 4
    assert "step 4: loss nan" in str(outcomes[1].error)
    for k in (0, 2):
        assert outcomes[k].steps == 6
        assert_close(ends[k], unbroken[k], atol=0)


def test_a_member_that_breaks_changes_no_more_for_the_others_than_its_absence() -> None:
    first, _, last = UNLIKE
    _, ends = train(pack("bert", first, (FRAGILE, 1), last))
    _, without = train(pack("bert", first, last))
    assert_close(ends[0], without[0], atol=1e-4)
    assert_close(ends[2], without[1], atol=1e-4)


@pytest.mark.parametrize(
    ("where", "value"),
    [("classifier.weight", math.nan), ("classifier.weight", math.inf)]
    + [("bert.encoder.layer.0.attention.self.value.lora_B", value) for value in (math.nan, math.inf, 1e38)],
)
def test_weights_that_overflow_are_a_divergence_of_their_member(where: str, value: float) -> None:
    made = pack("bert", *UNLIKE[:2])
    with torch.no_grad():
        made.trainable(0)[where].fill_(value)
    outcomes, ends = train(made, settings=trainer(4))
    _, alone = train(pack("bert", UNLIKE[1]), settings=trainer(4))
    assert outcomes[0].status == "diverged"
    assert "is not finite" in str(outcomes[0].error)
    assert outcomes[1].status == "done"
    assert_close(ends[1], alone[0], atol=1e-4)


def test_a_rate_that_is_far_too_high_harms_nobody_else() -> None:
    wild = replace(optimizer(1e18), grad_clip_norm=None)
    outcomes, ends = train(pack("bert", *UNLIKE[:2]), [wild, optimizer()])
    _, alone = train(pack("bert", UNLIKE[1]))
    assert [outcome.status for outcome in outcomes] == ["diverged", "done"]
    assert_close(ends[1], alone[0], atol=1e-4)


def test_a_pack_of_which_all_have_diverged_stops() -> None:
    outcomes, _ = train(pack("bert", (FRAGILE, 0), (FRAGILE, 1)))
    assert [(outcome.status, outcome.steps) for outcome in outcomes] == [("diverged", 4)] * 2


def novelty() -> Callable[..., dict[str, float]]:
    """A metric that grows whenever a member's scores are new: a few pairs' MCC would rise and fall by chance."""
    seen: list[Any] = []

    def score(scores: Any, *_: Any) -> dict[str, float]:
        known = [np.allclose(scores, other, atol=1e-5, rtol=0) for other in seen]
        seen.append(scores)
        return {"mcc": float([*known, True].index(True)), "auroc": 0.5}

    return score


def test_a_member_that_stops_early_leaves_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = trainer(12, eval_every=2, early_stopping_patience=2)
    idle, learns = optimizer(1e-30), optimizer(1e-2)
    monkeypatch.setattr("lora_bench.training.model_selection.score", novelty())
    outcomes, ends = train(pack("bert", *UNLIKE[:2]), [idle, learns], settings)
    monkeypatch.setattr("lora_bench.training.model_selection.score", novelty())
    ((alone,), (expected,)) = train(pack("bert", UNLIKE[1]), [learns], settings)
    assert (outcomes[0].status, outcomes[0].steps) == ("done", 6)  # one look to compare with, two without a gain
    assert outcomes[1].steps == alone.steps == 12
    assert outcomes[1].best is not None
    assert alone.best is not None
    assert outcomes[1].best["step"] == alone.best["step"]
    assert_close(ends[1], expected, atol=1e-4)


# -- attaching and detaching --


@pytest.mark.parametrize("method", ["lora", "head_only", "full"])
@pytest.mark.parametrize("form", ["bert", "roberta", "t5_encoder"])
def test_detaching_puts_the_very_same_modules_back(method: str, form: str) -> None:
    backbone = make(*FORMS[form])
    before, weights = dict(backbone.network.named_modules()), backbone.network.state_dict()
    made = pack(form, (adapter(method), 0), backbone=backbone)
    assert dict(backbone.network.named_modules()) != before
    made.detach()
    after = dict(backbone.network.named_modules())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert_close(backbone.network.state_dict(), weights, atol=0)


def test_a_backbone_serves_one_pack_after_another() -> None:
    first = pack("bert", *UNLIKE)
    train(first, RATES)
    first.detach()
    _, (again,) = train(pack("bert", UNLIKE[0], backbone=first.backbone))
    _, (fresh,) = train(pack("bert", UNLIKE[0]))
    assert_close(again, fresh, atol=0)


def test_full_fine_tuning_is_never_packed_with_another() -> None:
    for members in ([adapter("full"), adapter("lora")], [adapter("full"), adapter("full")]):
        with refuses(Code.UNSUPPORTED, key="adapter.method") as caught:
            pack("bert", *[(settings, 0) for settings in members])
        assert caught.value.value == "full"


def test_only_full_fine_tuning_turns_the_backbones_own_dropout_on() -> None:
    for method, drops in (("lora", False), ("head_only", False), ("full", True)):
        made = pack("bert", (adapter(method), 0)).train()
        inner = [module for module in made.network.modules() if isinstance(module, torch.nn.Dropout)]
        assert {module.training for module in inner} == {drops}
        made.eval()
        assert not any(module.training for module in made.modules())


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("mode", [True, False])
def test_predicting_leaves_the_mode_as_it_was(method: str, mode: bool) -> None:
    made = pack("bert", (adapter(method), 0)).train(mode)
    before = {name: module.training for name, module in made.named_modules()}
    _, selection = tables(made.backbone)
    scores = predict(made, selection, batch_size=5)
    assert scores.shape == (1, len(selection))
    assert {name: module.training for name, module in made.named_modules()} == before
    assert any(before.values()) == mode


# -- parameters and heads --


def test_parameters_are_counted_apart_by_member() -> None:
    made = pack("bert", (adapter("lora", "rank=2", "target_modules=qv"), 0), (adapter("head_only"), 1))
    assert sum(p.numel() for p in made.adapter_parameters(0).values()) == 4 * 2 * (32 + 32)
    assert made.adapter_parameters(1) == {}
    head = {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}
    for k in (0, 1):
        assert made.head_parameters(k).keys() == head
        assert sum(p.numel() for p in made.head_parameters(k).values()) == 32 * 32 + 32 + 2 * 32 + 2
    assert not {id(p) for p in made.trainable(0).values()} & {id(p) for p in made.trainable(1).values()}


@pytest.mark.parametrize("form", FORMS)
def test_full_fine_tuning_trains_every_weight_once_under_its_own_name(form: str) -> None:
    backbone = make(*FORMS[form])
    names = {name for name, _ in backbone.network.named_parameters()}
    made = pack(form, (adapter("full"), 0), backbone=backbone)
    assert made.trainable(0).keys() == names
    assert not made.adapter_parameters(0).keys() & made.head_parameters(0).keys()


def test_a_pretrained_pooler_is_kept_and_a_new_classifier_drawn(tmp_path: Path) -> None:
    folder = save(tmp_path, make("tiny_bert").network.bert, make("tiny_bert").tokenizer)
    backbone = make("bert", f"model.path={folder}")
    made = pack("bert", (adapter("lora"), 0), (adapter("lora"), 1), backbone=backbone)
    one, other = made.state(0), made.state(1)
    pooler = made.network.bert.pooler
    assert isinstance(pooler, MemberHeads)
    for name in ("dense.weight", "dense.bias"):
        held = pooler.original[0].get_parameter(name)
        assert torch.equal(one[f"bert.pooler.{name}"], held)
        assert torch.equal(other[f"bert.pooler.{name}"], held)
    assert not torch.equal(one["classifier.weight"], other["classifier.weight"])
    assert not one["classifier.bias"].any()
    assert 0.01 < one["classifier.weight"].std() < 0.03  # initializer_range is 0.02


def test_new_norms_of_a_head_start_at_one() -> None:
    """Some heads (ModernBERT's) hold a norm: drawn as a bias would be, at zero, it would let nothing pass."""
    backbone = make("tiny_bert")
    backbone.network.classifier = torch.nn.Sequential(torch.nn.LayerNorm(32), torch.nn.Linear(32, 2))
    backbone.new_parameters |= {f"classifier.{name}" for name, _ in backbone.network.classifier.named_parameters()}
    state = pack("bert", (adapter("lora"), 0), backbone=backbone).state(0)
    assert torch.equal(state["classifier.0.weight"], torch.ones(32))
    assert not state["classifier.0.bias"].any()
    assert state["classifier.1.weight"].any()


def test_heads_stay_fp32_on_a_bf16_backbone() -> None:
    backbone = make("tiny_bert")
    backbone.to(torch.device("cpu"), torch.bfloat16, trained=False)
    made = pack("bert", *UNLIKE, backbone=backbone)
    assert {p.dtype for k in range(3) for p in made.trainable(k).values()} == {torch.float32}
    logits = made(random_batch(backbone))
    assert logits.dtype == torch.float32
    F.cross_entropy(logits.flatten(0, 1), torch.zeros(12, dtype=torch.long)).backward()


def test_streams_of_one_seed_and_of_two_seeds_are_independent() -> None:
    draws = {
        (seed, purpose): torch.rand(4, generator=stream(seed, purpose)).tolist()
        for seed in (0, 1, 2**40)
        for purpose in ("adapter", "head", "dropout")
    }
    assert len({tuple(draw) for draw in draws.values()}) == len(draws)
    assert torch.rand(4, generator=stream(1, "head")).tolist() == draws[1, "head"]


@pytest.mark.parametrize("fault", ["lost", "left over", "misshapen", "nan"])
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(fault: str) -> None:
    made = pack("bert", *UNLIKE[:2])
    before = made.state(0)
    state = stir(pack("bert", UNLIKE[0])).state(0)
    name = "bert.encoder.layer.1.output.dense.lora_A"
    if fault == "lost":
        del state[name]
    elif fault == "left over":
        name = "no.such.lora_A"
        state[name] = torch.zeros(1)
    elif fault == "misshapen":
        state[name] = state[name].T
    else:
        state[name][0, 0] = math.nan
    with refuses(Code.DAMAGED) as caught:
        made.load_state(0, state)
    assert name in str(caught.value)
    assert_close(made.state(0), before, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_members_that_the_pack_computes_in_another_order_keep_their_own_rows_and_padding(form: str) -> None:
    members: Members = [(adapter("lora", f"rank={rank}"), seed) for seed, rank in enumerate((8, 4, 2))]
    made = pack(form, *members)
    own = [random_batch(made.backbone, seed=seed) for seed in range(3)]
    own[1] = own[1].map(lambda t: t.flip(0))  # its padding lies in other rows
    own[2] = random_batch(made.backbone, seed=2, padded=False)
    logits = made(joined(own))  # (3, B, 2)
    for k, (member, batch) in enumerate(zip(members, own, strict=True)):
        torch.testing.assert_close(logits[k], pack(form, member)(batch)[0], atol=1e-5, rtol=1e-5)
