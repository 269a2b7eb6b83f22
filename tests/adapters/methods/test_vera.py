"""VeRA is the paper's: equal to peft's with equal tensors, one pair of projections for all modules of a member."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers

from lora_bench.adapters.pack.member import Member, stream
from lora_bench.adapters.pack.pack import Pack
from lora_bench.adapters.peft import files
from lora_bench.backbones.dropout import keep_mask
from tests.adapters.tools import (
    adapter,
    assert_close,
    assert_out_of_range,
    doubled,
    merged_logits,
    pack,
    stir,
    train,
    trainer,
)
from tests.backbones.tools import FORMS, held, make, random_batch, reference, save, spread

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from lora_bench.adapters.methods.vera import VeRAUpdate

# peft asks transformers for a property that is going away.
of_peft = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
every_form = pytest.mark.parametrize("form", FORMS)


def vera(form: str, *overrides: str, seed: int = 0) -> Pack:
    return pack(form, (adapter("vera", *overrides), seed))


def scaled(made: Pack, member: int = 0) -> dict[str, VeRAUpdate]:
    return made.updates[member]  # type: ignore[return-value]


def projections(made: Pack, member: int = 0) -> tuple[Tensor, Tensor]:
    return next(iter(scaled(made, member).values())).shared


@of_peft
@pytest.mark.parametrize("settings", [("rank=5",), ("rank=70", "target_modules=qv", "layers=[1]", "d_initial=0.3")])
@every_form
def test_logits_and_gradients_are_those_of_peft(form: str, settings: tuple[str, ...]) -> None:
    ours = stir(vera(form, *settings)).eval()
    twin = vera(form, *settings)
    twin.detach()
    theirs = copy.deepcopy(twin.network)
    chosen: Any = ours.members[0].adapter
    config = peft.VeraConfig(r=chosen.rank, d_initial=chosen.d_initial, target_modules=ours.targets[0])
    wrapped = peft.get_peft_model(theirs, config)
    names = dict(theirs.named_parameters())
    for name, p in twin.adapter_parameters(0).items():
        assert torch.equal(p, names[f"{name}.default"])  # both begin alike
    with torch.no_grad():
        for theirs_shared, own in zip((wrapped.vera_A, wrapped.vera_B), projections(ours), strict=True):
            assert theirs_shared["default"].shape == own.shape
            theirs_shared["default"].copy_(own)
        for name, p in ours.adapter_parameters(0).items():
            names[f"{name}.default"].copy_(p)
        for name, p in ours.head_parameters(0).items():
            names[name].copy_(p)
    doubled(ours)
    theirs.double()
    batch = random_batch(ours.backbone)
    assert batch.labels is not None
    (logits,) = ours(batch)
    expected = reference(theirs.eval(), batch, getattr(ours.backbone, "label_tokens", None))
    torch.testing.assert_close(logits.double(), expected, atol=1e-6, rtol=0)
    F.cross_entropy(logits, batch.labels).backward()
    F.cross_entropy(expected, batch.labels).backward()
    compared = 0
    for name, p in ours.adapter_parameters(0).items():
        expected_gradient = names[f"{name}.default"].grad
        torch.testing.assert_close(p.grad, expected_gradient, atol=1e-5, rtol=1e-4)
        compared += bool(expected_gradient.abs().max() > 1e-4)
    assert compared > len(ours.targets[0])  # more than half of the gradients are far above the tolerance


@of_peft
@pytest.mark.parametrize(("form", "kind"), [("bert", "SequenceClassification"), ("t5", "Seq2SeqLM")])
@torch.no_grad()
def test_peft_loads_what_we_write_and_says_the_same(form: str, kind: str, tmp_path: Path) -> None:
    backbone = make(*FORMS[form])
    body = backbone.network if form == "t5" else backbone.network.base_model
    folder = save(tmp_path / "body", body, backbone.tokenizer)
    members = (adapter("vera"), 0), (adapter("vera", "rank=40", "dropout=0.1", "target_modules=qv"), 1)
    made = stir(pack(form, *members, backbone=make(form, f"model.path={folder}"))).eval()
    files.save(tmp_path / "adapter", made, 1, str(folder))  # the second member of two: the files are its alone
    base = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(folder)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert type(theirs.base_model).__name__ == "VeraModel"
    batch = random_batch(made.backbone)
    logits = made(batch)[1]
    assert spread(logits) > 1e-3
    expected = reference(theirs.get_base_model().eval(), batch, getattr(made.backbone, "label_tokens", None))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


# -- projections --


@every_form
def test_one_pair_of_projections_serves_all_modules_and_is_no_parameter(form: str) -> None:
    made = vera(form, "rank=6")
    linears = make(*FORMS[form]).linears()
    A, B = projections(made)
    assert A.shape == (6, max(linears[name].in_features for name in made.targets[0]))
    assert B.shape == (max(linears[name].out_features for name in made.targets[0]), 6)
    assert len({(u.shared[0].data_ptr(), u.shared[1].data_ptr()) for u in scaled(made).values()}) == 1
    for update in made.updates[0].values():
        assert set(update.state_dict()) == {"vera_lambda_b", "vera_lambda_d"}
    # Section 3.3 of the paper: out + rank trained parameters for each module.
    expected = sum(linears[name].out_features + 6 for name in made.targets[0])
    assert made.count_parameters(0)["adapter"] == expected


def test_projections_are_as_wide_as_the_adapted_modules_and_no_wider() -> None:
    A, B = projections(vera("bert", "rank=6", "target_modules=qv"))
    assert (A.shape, B.shape) == ((6, 32), (32, 6))


def test_projections_are_kaiming_uniform() -> None:
    for projection in projections(vera("bert", "rank=900")):
        bound = math.sqrt(6 / projection.shape[1])
        assert bound * 0.99 < projection.max() <= bound
        assert -bound <= projection.min() < -bound * 0.99
        assert abs(projection.mean()) < bound * 0.02
        assert projection.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_runs_of_one_seed_share_the_projections_and_other_seeds_have_others() -> None:
    one, same, other = (projections(vera("bert", "rank=6", seed=seed)) for seed in (5, 5, 6))
    for A, again, unlike in zip(one, same, other, strict=True):
        assert torch.equal(A, again)
        assert not torch.equal(A, unlike)


def test_the_start_is_the_backbones_own_function() -> None:
    made = vera("roberta", "d_initial=0.25")
    for update in scaled(made).values():
        assert not update.vera_lambda_b.any()
        assert set(update.vera_lambda_d.tolist()) == {0.25}
        x, y = torch.randn(2, 3, 32), torch.randn(2, 3, len(update.vera_lambda_b))
        assert torch.equal(update(x, y), y)


# -- training --


def test_training_leaves_the_projections_as_they_were() -> None:
    made = vera("bert", "rank=6")
    before = [tensor.clone() for tensor in projections(made)]
    start = made.state(0)
    _, (end,) = train(made, settings=trainer(3))
    assert all(torch.equal(old, new) for old, new in zip(before, projections(made), strict=True))
    assert all(not torch.equal(tensor, end[name]) for name, tensor in start.items())


def test_two_seeds_in_a_pack_learn_what_they_learn_alone() -> None:
    alone = [train(vera("bert", "dropout=0.2", seed=seed), settings=trainer(4))[1][0] for seed in (0, 1)]
    both = pack("bert", *((adapter("vera", "dropout=0.2"), seed) for seed in (0, 1)))
    assert projections(both, 0)[0].data_ptr() != projections(both, 1)[0].data_ptr()
    _, together = train(both, settings=trainer(4))
    for lone, member in zip(alone, together, strict=True):
        assert_close(lone, member, atol=1e-5)


def test_dropout_falls_on_the_updates_input_alone_and_only_in_training() -> None:
    made = stir(vera("bert", "rank=6", "dropout=0.5", seed=3))
    name, update = next(iter(scaled(made).items()))
    base: Any = made.network.get_submodule(name).base
    delta = update.merge(torch.zeros_like(base.weight), None)[0].detach()
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    y = base(x)
    mask = keep_mask(x, 0.5, stream(3, "dropout"))
    torch.testing.assert_close(update.train()(x, y), y + (x * mask) @ delta.T, atol=1e-5, rtol=0)
    torch.testing.assert_close(update.eval()(x, y), y + x @ delta.T, atol=1e-5, rtol=0)


def test_vectors_stay_fp32_beside_a_bf16_backbone() -> None:
    backbone = make(*FORMS["bert"])
    backbone.to(torch.device("cpu"), torch.bfloat16, trained=False)
    made = stir(pack("bert", (adapter("vera"), 0), backbone=backbone))
    assert {p.dtype for p in made.adapter_parameters(0).values()} == {torch.float32}
    logits = made(random_batch(backbone))
    assert logits.isfinite().all()


@every_form
def test_merged_weights_say_what_the_vectors_say(form: str) -> None:
    made = stir(vera(form)).eval()
    batch = random_batch(made.backbone)
    with torch.no_grad():
        (logits,) = made(batch)
    torch.testing.assert_close(merged_logits(made, 0, batch), logits, atol=1e-5, rtol=0)


# -- files --


def test_the_file_holds_the_projections_once_and_gives_them_back(tmp_path: Path) -> None:
    made = stir(vera("bert", "rank=6", "target_modules=qv")).eval()
    files.save(tmp_path, made, 0, "")
    names = held(tmp_path / "adapter_model.safetensors")
    vectors = [name for name in names if "vera_lambda" in name]
    assert sorted(name for name in names if "vera" in name and name not in vectors) == [
        "base_model.vera_A",
        "base_model.vera_B",
    ]
    assert len(vectors) == 2 * len(made.targets[0])
    member = Member(made.members[0].adapter, seed=1, saved_ranks=made.ranks(0))
    other = Pack(make(*FORMS["bert"]), [member]).eval()
    assert not any(tensor.any() for tensor in projections(other))  # not drawn: the file has them
    files.load(tmp_path, other, 0)
    batch = random_batch(made.backbone)
    with torch.no_grad():
        assert torch.equal(other(batch), made(batch))


# -- settings --


@pytest.mark.parametrize("setting", ["rank=0", "rank=2.5", "d_initial=0.0", "d_initial=nan", "dropout=1.0"])
def test_settings_out_of_range_are_refused(setting: str) -> None:
    assert_out_of_range("vera", setting)
