"""LoRA is the paper's: equal to peft's with equal tensors, begun as loralib begins, dropping what its seed says."""

from __future__ import annotations

import copy
import math
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_bench.adapters.lowrank.linear import LowRank
from lora_bench.adapters.pack.member import stream
from lora_bench.backbones.dropout import keep_mask
from lora_bench.errors import Code
from tests.adapters.tools import adapter, assert_close, assert_out_of_range, doubled, pack, stir, tables, trainer
from tests.adapters.tools import train as fit
from tests.backbones.tools import FORMS, enliven, random_batch, reference
from tests.command_line import refuses
from tests.training.tools import prepare

BASE = enliven(nn.Linear(48, 32))


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def update(*overrides: str, seed: int = 0, base: nn.Linear = BASE) -> LowRank:
    made = adapter("lora", *overrides).update("some.linear", base, stream(seed, "adapter"), stream(seed, "dropout"))
    assert isinstance(made, LowRank)
    return made


def delta_weight(made: LowRank) -> Tensor:
    return made.scaling * made.lora_B @ made.lora_A


# Settings of ours with those of peft that mean the same.
IN_PEFT: list[tuple[tuple[str, ...], dict[str, Any]]] = [
    (("rank=3", "alpha=7"), {}),
    (("rank=8", "alpha=2", "target_modules=qv", "layers=[1]"), {}),
    (("rank=3", "alpha=7", "scaling=rank_stable"), {"use_rslora": True}),
    (("rank=3", "alpha=7", "magnitude=true"), {"use_dora": True}),
    (("rank=3", "alpha=7", "init=pissa"), {"init_lora_weights": "pissa"}),
    (("rank=3", "alpha=7", "init=olora"), {"init_lora_weights": "olora"}),
    (
        ("rank=3", "alpha=7", "init=olora", "scaling=rank_stable", "magnitude=true"),
        {"use_rslora": True, "use_dora": True, "init_lora_weights": "olora"},
    ),
]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers for it
@pytest.mark.parametrize(("settings", "theirs_too"), IN_PEFT, ids=lambda value: "-".join(map(str, value)) or "plain")
@pytest.mark.parametrize("form", FORMS)
def test_logits_and_gradients_are_those_of_peft(form: str, settings: tuple[str, ...], theirs_too: Any) -> None:
    chosen: Any = adapter("lora", *settings)
    ours = stir(pack(form, (chosen, 0))).eval()
    twin = pack(form, (chosen, 0))
    twin.detach()
    theirs = copy.deepcopy(twin.network)
    shape = {"r": chosen.rank, "lora_alpha": chosen.alpha, "target_modules": ours.targets[0], "lora_dropout": 0.0}
    peft.get_peft_model(theirs, peft.LoraConfig(**shape, **theirs_too))  # in place
    names = dict(theirs.named_parameters())

    def of_peft(name: str) -> Tensor:
        module, _, tensor = name.rpartition(".")
        return names[f"{module}.{'lora_magnitude_vector' if tensor == 'magnitude' else tensor}.default.weight"]

    with torch.no_grad():
        for name, p in ours.adapter_parameters(0).items():
            of_peft(name).copy_(p)
        for name, p in ours.head_parameters(0).items():
            names[name].copy_(p)
    doubled(ours)  # a gradient of T5 in fp32 is a matter of luck in its last digits
    theirs.double()
    subtract_exactly(ours, theirs)
    batch = random_batch(ours.backbone)
    assert batch.labels is not None
    (logits,) = ours(batch)
    expected = reference(theirs.eval(), batch, getattr(ours.backbone, "label_tokens", None))
    torch.testing.assert_close(logits.double(), expected, atol=1e-5, rtol=0)
    F.cross_entropy(logits, batch.labels).backward()
    F.cross_entropy(expected, batch.labels).backward()
    compared = 0
    for name, p in ours.adapter_parameters(0).items():
        expected_gradient = of_peft(name).grad
        assert expected_gradient is not None
        torch.testing.assert_close(p.grad, expected_gradient, atol=1e-5, rtol=1e-4, check_dtype=False)
        compared += bool(expected_gradient.abs().max() > 1e-4)
    assert compared > len(ours.targets[0])  # more than half of the gradients are far above the tolerance


def subtract_exactly(ours: Any, theirs: Any) -> None:
    """Take the start that ours has off peft's base too, in double precision.

    peft's own comes from an SVD in fp32, which is good to 1e-5 or so where singular values lie close together (ours, in
    double precision, to 1e-7), and by how much depends on the processor.
    """
    for name, update in ours.updates[0].items():
        if update.start_A is not None:
            base = ours.network.get_submodule(name).base.weight
            exact = base - update.scaling * update.start_B @ update.start_A
            of_peft = theirs.get_submodule(name).base_layer.weight
            torch.testing.assert_close(of_peft.data, exact, atol=5e-5, rtol=0)
            of_peft.data.copy_(exact)


def test_the_update_is_equation_3() -> None:
    made = update("rank=4", "alpha=6")
    enliven(made)
    x = draw(2, 5, 48)
    y = BASE(x)
    expected = x @ (BASE.weight + 6 / 4 * made.lora_B @ made.lora_A).T + BASE.bias
    torch.testing.assert_close(made(x, y), expected, atol=1e-5, rtol=0)
    weight, bias = made.merge(BASE.weight, BASE.bias)
    torch.testing.assert_close(weight, BASE.weight + 6 / 4 * made.lora_B @ made.lora_A)
    assert bias is BASE.bias
    assert (made.lora_A.shape, made.lora_B.shape, made.rank) == ((4, 48), (32, 4), 4)


def test_it_begins_as_loralib_begins() -> None:
    base = nn.Linear(400, 300)
    made = update("rank=64", base=base)
    bound = 1 / math.sqrt(400)  # Kaiming uniform with a = sqrt(5)
    assert bound * 0.99 < made.lora_A.max() <= bound
    assert -bound <= made.lora_A.min() < -bound * 0.99
    assert abs(made.lora_A.mean()) < bound * 0.02
    assert made.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not made.lora_B.any()


def test_the_base_is_never_written_to() -> None:
    before = copy.deepcopy(BASE.state_dict())
    made = update()
    x = draw(3, 48)
    made(x, BASE(x)).sum().backward()
    assert_close(BASE.state_dict(), before, atol=0)
    assert not [p for p in made.parameters() if p is BASE.weight or p is BASE.bias]


def test_parameters_stay_fp32_beside_a_bf16_base() -> None:
    base = nn.Linear(48, 32, dtype=torch.bfloat16)
    made = update("rank=2", base=base)
    x = draw(3, 48).bfloat16()
    assert made(x, base(x)).dtype == torch.bfloat16
    assert {p.dtype for p in made.parameters()} == {torch.float32}


# -- dropout --


def test_dropout_keeps_the_share_it_says_and_the_mean() -> None:
    mask = keep_mask(torch.empty(400, 500), 0.3, stream(0, "dropout"))
    assert mask.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert (mask == 0).double().mean().item() == pytest.approx(0.3, abs=0.005)
    assert mask.mean().item() == pytest.approx(1.0, abs=0.01)


def test_dropout_falls_on_the_updates_input_alone_and_only_in_training() -> None:
    made = update("rank=4", "dropout=0.5", seed=3)
    enliven(made)
    x = draw(2, 5, 48)
    y = BASE(x)
    mask = keep_mask(x, 0.5, stream(3, "dropout"))
    torch.testing.assert_close(made(x, y), y + (x * mask) @ delta_weight(made).T, atol=1e-5, rtol=0)
    assert not torch.equal(made(x, y), made(x, y))  # a new mask each time
    made.eval()
    torch.testing.assert_close(made(x, y), y + x @ delta_weight(made).T, atol=1e-5, rtol=0)


def test_dropout_comes_from_the_members_seed_and_not_from_the_global_stream() -> None:
    x = draw(2, 5, 48)

    def outputs(seed: int) -> Tensor:
        made = update("dropout=0.5", seed=seed)
        enliven(made)
        return made(x, BASE(x))

    before = torch.get_rng_state()
    assert torch.equal(outputs(0), outputs(0))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(outputs(0), outputs(1))


class Losses:
    """A watcher that keeps the training losses."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def stepped(self, step: int, losses: dict[int, float], pairs: int) -> None:
        self.seen.append(list(losses.values()))

    def evaluated(self, member: int, line: dict[str, object]) -> None:
        pass


def losses(dropout: float, eval_every: int) -> list[list[float]]:
    made = pack("bert", (adapter("lora", f"dropout={dropout}"), 0))
    watcher = Losses()
    fit(made, settings=trainer(6, eval_every=eval_every), watcher=watcher)
    return watcher.seen


def test_looking_at_the_selection_split_changes_nothing_of_training_with_dropout() -> None:
    seldom, often = losses(0.5, 10_000), losses(0.5, 1)
    assert often == seldom
    assert seldom[1:] != losses(0.0, 10_000)[1:]


# -- seeds --


@pytest.mark.parametrize("form", FORMS)
def test_the_seed_reaches_adapter_and_head(form: str) -> None:
    one, same, other = (pack(form, (adapter("lora"), seed)) for seed in (5, 5, 6))
    assert_close(one.state(0), same.state(0), atol=0)
    state, unlike = one.state(0), other.state(0)
    assert all(not torch.equal(p, unlike[name]) for name, p in state.items() if name.endswith("lora_A"))
    drawn = [n for n, p in one.head_parameters(0).items() if p.ndim > 1]
    assert all(not torch.equal(state[name], unlike[name]) for name in drawn)
    assert bool(drawn) == (form != "t5")


def test_the_rank_does_not_reach_the_head() -> None:
    one, other = (pack("bert", (adapter("lora", f"rank={rank}"), 0)) for rank in (1, 8))
    assert_close(dict(one.head_parameters(0)), dict(other.head_parameters(0)), atol=0)


# -- settings --


def test_a_rank_with_the_same_scaling_counts_a_direction_the_same() -> None:
    for scaling, factor in (("standard", 16 / 8), ("rank_stable", 16 / math.sqrt(8))):
        chosen: Any = adapter("lora", f"scaling={scaling}")
        assert chosen.factor == pytest.approx(factor)
        assert chosen.at_rank(3).factor == pytest.approx(factor)
        assert chosen.at_rank(3).rank == 3


@pytest.mark.parametrize("form", FORMS)
def test_ranks_follow_an_explicit_pattern_and_zero_leaves_a_linear_alone(form: str) -> None:
    value = {"bert": "value", "roberta": "value"}.get(form, "v")
    rules = f"allocation=['.*\\.{value}=5','.*\\.0\\..*=0']"
    made = pack(form, (adapter("lora", "target_modules=qv", "rank=2", rules), 0))
    for name, rank in made.ranks(0).items():
        first_layer = ".0." in name
        assert rank == (5 if name.endswith(f".{value}") else 0 if first_layer else 2), name
    assert set(made.updates[0]) == {name for name, rank in made.ranks(0).items() if rank}


@pytest.mark.parametrize("allocation", ["sensitivity", "eva", "gradient"])
@pytest.mark.parametrize("form", FORMS)
def test_an_allocation_keeps_the_budget_and_the_scaling(form: str, allocation: str) -> None:
    made = pack(form, (adapter("lora", "rank=4", f"allocation={allocation}"), 0))
    uniform = made.count_parameters(0)["adapter"]
    prepare(made, trainer(), tables(made.backbone)[0])
    ranks = made.ranks(0)
    assert len(set(ranks.values())) > 1
    assert list(ranks) == made.targets[0]
    if allocation == "gradient":  # the same parameters
        assert 0.97 * uniform < made.count_parameters(0)["adapter"] <= uniform
    else:  # the same total rank
        assert sum(ranks.values()) == 4 * len(ranks)
    for name, update in made.updates[0].items():
        assert isinstance(update, LowRank)
        assert (update.rank, update.scaling) == (ranks[name], 16 / 4)


def test_layers_without_ranks_join_the_prefix() -> None:
    made = pack("bert", (adapter("lora", "allocation=['.*layer\\.0\\..*=0']"), 0))
    assert made.depth == 1
    made.set_ranks(0, dict.fromkeys(made.targets[0], 2))
    assert made.depth == 0
    assert set(made.ranks(0).values()) == {2}


def test_lora_fa_trains_one_factor_alone_along_full_fine_tunings_direction() -> None:
    chosen: Any = adapter("lora_fa", "rank=3")
    made = chosen.update("some.linear", BASE, stream(0, "adapter"), stream(0, "dropout"))
    x, weights = draw(6, 48), torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    (made(x, BASE(x)) * weights).sum().backward()
    G = weights.T @ x  # the gradient of the frozen weight, (out, in)
    chosen.before_step({"some.linear": made}, 1, 10)
    # A step along -grad changes B A by what is closest to a step of full fine-tuning: G projected on the rows of A.
    change = made.scaling * made.lora_B.grad @ made.lora_A
    onto_rows = torch.linalg.pinv(made.lora_A) @ made.lora_A
    torch.testing.assert_close(change, G @ onto_rows, atol=1e-3, rtol=1e-4)
    assert set(dict(made.named_parameters())) == {"lora_B"}


@pytest.mark.parametrize(
    ("settings", "code", "key", "value", "named_in_error"),
    [
        (["init=pisa"], Code.UNKNOWN_CHOICE, "init", "pisa", "pissa"),
        (["scaling=alpha"], Code.UNKNOWN_CHOICE, "scaling", "alpha", "rank_stable"),
        (["quantize=int3"], Code.UNKNOWN_CHOICE, "quantize", "int3", "nf4"),
        (["allocation=even"], Code.UNKNOWN_CHOICE, "allocation", "even", "sensitivity"),
        (["allocation=adalora"], Code.CONFLICT, "allocation", "adalora", "adapter=adalora"),
        (["allocation={query: 3}"], Code.INVALID_VALUE, "allocation", {"query": 3}, "expression=rank"),
        (["lr_ratio=0"], Code.INVALID_VALUE, "lr_ratio", 0, ""),
        (["freeze_A=true", "lr_ratio=16"], Code.CONFLICT, "lr_ratio", 16, "freeze_A=true"),
        (["init=loftq"], Code.CONFLICT, "init", "loftq", "adapter.quantize"),
        (["init=lora_ga"], Code.CONFLICT, "init_gamma", None, "init=lora_ga"),
        (["init_gamma=16"], Code.CONFLICT, "init_gamma", 16, "init=kaiming"),
        (["calibration_batches=0"], Code.INVALID_VALUE, "calibration_batches", 0, ""),
    ],
)
def test_what_does_not_combine_is_refused_with_what_it_conflicts_with(
    settings: list[str], code: Code, key: str, value: object, named_in_error: str
) -> None:
    with refuses(code, key=f"adapter.{key}") as caught:
        adapter("lora", *settings)
    assert caught.value.value == value
    assert named_in_error in str(caught.value)


@pytest.mark.parametrize(
    ("rule", "code", "value", "named_in_error"),
    [
        (".*qurey=4", Code.NO_MATCH, ".*qurey=4", "query"),
        (".*query", Code.INVALID_SYNTAX, ".*query", "EXPRESSION=RANK"),
        (".*query=40", Code.INVALID_VALUE, None, "32"),
        (".*=0", Code.NO_MATCH, None, "rank 0"),
    ],
)
def test_an_allocation_that_cannot_be_is_refused_by_name(
    rule: str, code: Code, value: str | None, named_in_error: str
) -> None:
    with refuses(code, key="adapter.allocation") as caught:
        pack("bert", (adapter("lora", f"allocation=['{rule}']"), 0))
    assert caught.value.value == value
    assert named_in_error in str(caught.value)


@pytest.mark.parametrize(
    "setting",
    [
        *("rank=0", "rank=-3", "rank=2.5", "alpha=0.0", "alpha=nan", "alpha=inf"),
        *("dropout=1.0", "dropout=-0.1", "dropout=nan"),
    ],
)
def test_settings_out_of_range_are_refused(setting: str) -> None:
    assert_out_of_range("lora", setting)


def test_a_rank_above_the_smaller_side_is_refused_and_leaves_the_backbone_as_it_was() -> None:
    assert update("rank=32").rank == 32
    with refuses(Code.INVALID_VALUE, key="rank") as caught:
        update("rank=33")
    assert caught.value.value == 33
    assert "some.linear (32 by 48)" in str(caught.value)
    fine = pack("bert", (adapter("lora", "rank=32"), 0))
    fine.detach()
    before = dict(fine.network.named_modules())
    with refuses(Code.INVALID_VALUE, key="adapter.rank") as caught:
        pack("bert", (adapter("lora"), 0), (adapter("lora", "rank=33"), 0), backbone=fine.backbone)
    assert caught.value.value == 33
    assert "bert.encoder.layer.0." in str(caught.value)
    assert dict(fine.network.named_modules()) == before


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_ranks_of_a_record_that_lack_a_target_are_refused(method: str) -> None:
    a_pack = pack("bert", (adapter(method, "rank=2"), 0))
    ranks = dict.fromkeys(list(a_pack.updates[0])[1:], 2)
    with refuses(Code.MISMATCH, key="targets"):
        adapter(method, "rank=2").updates(a_pack.backbone, None, torch.Generator(), ranks)
