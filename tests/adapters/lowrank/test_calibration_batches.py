"""Input moments and weight gradients are the plain Hugging Face network's, for each member, and leave no trace."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F

from lora_bench.adapters.lowrank.calibration_batches import input_moments, mean_loss, weight_gradients
from lora_bench.data.batching import Batch
from tests.adapters.tools import adapter, assert_close, joined, pack
from tests.backbones.tools import FORMS, random_batch, reference

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import Tensor

    from lora_bench.adapters.pack.pack import Pack

LORA = adapter("lora")


def gradients_of(made: Pack, member: int, looked_at: Iterable[Batch]) -> dict[str, Tensor]:
    return weight_gradients(made, member, looked_at).by_linear


LOOKS = (input_moments, gradients_of)


def batches(made: Pack, seed: int = 0) -> list[Batch]:
    """Two padded batches of unlike length."""
    return [
        random_batch(made.backbone, seed=2 * seed),
        random_batch(made.backbone, rows=5, length=13, seed=2 * seed + 1),
    ]


def plain(form: str, seed: int = 0) -> tuple[Pack, Any]:
    """A detached pack and its Hugging Face network, with the head that a member of this seed has."""
    made = pack(form, (LORA, seed))
    head = made.head_parameters(0)
    made.detach()
    with torch.no_grad():
        for name, tensor in head.items():
            made.network.get_parameter(name).copy_(tensor)
    return made, made.network


def logits_of(made: Pack, batch: Batch) -> Tensor:
    return reference(made.network, batch, getattr(made.backbone, "label_tokens", None))


# -- against the plain network --


@pytest.mark.parametrize("form", FORMS)
def test_moments_are_the_mean_outer_products_of_what_each_linear_sees_without_padding(form: str) -> None:
    made, network = plain(form)
    seen: dict[str, list[Tensor]] = {name: [] for name in made.targets[0]}
    mask = torch.empty(0)

    def keep(name: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        # T5's decoder has one position, but for the keys and values that it takes from the encoder.
        single = "decoder" in name and not re.search(r"EncDecAttention\.[kv]$", name)
        return lambda _, arguments: seen[name].append(arguments[0].flatten(0, 1) if single else arguments[0][mask])

    for name in seen:
        network.get_submodule(name).register_forward_pre_hook(keep(name))
    twin = pack(form, (LORA, 0))
    for batch in batches(twin):
        mask = batch.attention_mask.bool()
        logits_of(made, batch)
    rows = {name: torch.cat(parts).detach() for name, parts in seen.items()}  # (tokens, in)
    expected = {name: x.T @ x / len(x) for name, x in rows.items()}
    moments = input_moments(twin, 0, batches(twin))
    assert_close(moments, expected, atol=1e-4)
    assert {len(x) for x in rows.values()} == ({77, 9} if form == "t5" else {77})  # 32 + 45 tokens in 4 + 5 rows


@pytest.mark.parametrize("form", FORMS)
def test_more_padding_changes_no_moment(form: str) -> None:
    made = pack(form, (LORA, 0))
    batch = random_batch(made.backbone)
    wide = Batch(
        F.pad(batch.input_ids, (0, 4), value=made.backbone.tokenizer.pad_token_id),
        F.pad(batch.attention_mask, (0, 4)),
        None if batch.token_type_ids is None else F.pad(batch.token_type_ids, (0, 4)),
        batch.labels,
        full=False,
    )
    assert_close(input_moments(made, 0, [wide]), input_moments(made, 0, [batch]), atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_the_plain_networks_weights(form: str) -> None:
    made, network = plain(form)
    weights = {name: network.get_submodule(name).weight.requires_grad_(True) for name in made.targets[0]}
    expected = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    looked_at, total = batches(made), 0.0
    for batch in looked_at:
        assert batch.labels is not None
        loss = F.cross_entropy(logits_of(made, batch), batch.labels)
        total += loss.item()
        for name, gradient in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
            expected[name] += gradient / len(looked_at)
    adapted = pack(form, (LORA, 0))
    mean, gradients = weight_gradients(adapted, 0, looked_at)
    assert mean == pytest.approx(total / len(looked_at), abs=1e-5)
    assert mean == pytest.approx(mean_loss(adapted, 0, looked_at), abs=1e-6)
    assert_close(gradients, expected, atol=1e-5)
    assert sum(gradient.abs().max() > 1e-3 for gradient in gradients.values()) > len(gradients) / 2


def test_the_first_adapted_linear_has_its_gradient_where_nothing_below_it_is_trained() -> None:
    made = pack("bert", (adapter("lora", "freeze_A=true", "layers=[1]", "target_modules=.*query"), 0))
    everywhere = pack("bert", (LORA, 0))
    gradients = gradients_of(made, 0, batches(made))
    (name,) = gradients
    torch.testing.assert_close(gradients[name], gradients_of(everywhere, 0, batches(made))[name])
    assert gradients[name].abs().max() > 1e-3


def test_a_magnitude_at_its_start_changes_no_gradient() -> None:
    made, other = pack("bert", (adapter("dora"), 0)), pack("bert", (LORA, 0))
    assert_close(gradients_of(made, 0, batches(made)), gradients_of(other, 0, batches(other)), atol=1e-6)


def test_a_bf16_backbone_gives_fp32_sums_near_those_of_fp32() -> None:
    made, exact = pack("bert", (LORA, 0)), pack("bert", (LORA, 0))
    made.backbone.to(torch.device("cpu"), torch.bfloat16, trained=False)
    for module in made.network.modules():
        if hasattr(module, "copies"):
            module.copies.float()
    for look in LOOKS:
        rough, sharp = look(made, 0, batches(made)), look(exact, 0, batches(exact))
        assert {tensor.dtype for tensor in rough.values()} == {torch.float32}
        for name, tensor in rough.items():
            assert (tensor - sharp[name]).norm() < 0.1 * sharp[name].norm(), name


# -- packs --


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("form", FORMS)
def test_each_member_of_a_pack_of_three_gets_what_it_gets_alone(form: str, look: Any) -> None:
    made = pack(form, *[(LORA, seed) for seed in (0, 1, 2)])
    own = [batches(made, seed) for seed in (0, 1, 2)]
    for k in range(3):
        alone = pack(form, (LORA, k))
        assert_close(look(made, k, map(joined, zip(*own, strict=True))), look(alone, 0, own[k]), atol=1e-4)
        assert_close(look(made, k, own[0]), look(alone, 0, own[0]), atol=1e-4)  # shared rows


@pytest.mark.parametrize("look", LOOKS)
def test_a_member_learns_about_its_own_linears_alone(look: Any) -> None:
    settings = [adapter("lora", "layers=[1]"), adapter("lora", "target_modules=qv")]
    made = pack("bert", (settings[0], 0), (settings[1], 0))
    for k in range(2):
        alone = pack("bert", (settings[k], 0))
        assert_close(look(made, k, batches(made)), look(alone, 0, batches(made)), atol=1e-5)
        assert list(look(made, k, batches(made))) == made.targets[k]


# -- traces --


def state_of(made: Pack) -> dict[str, Any]:
    generators = {id(u.generator): u.generator for updates in made.updates for u in updates.values()}  # type: ignore[attr-defined]
    return {
        "tensors": {name: tensor.clone() for name, tensor in made.state_dict().items()},
        "streams": [torch.get_rng_state(), *(generator.get_state() for generator in generators.values())],
        "modes": [module.training for module in made.modules()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in made.modules()],
        "gradients": [name for name, p in made.named_parameters() if p.grad is not None],
        "trained": [p.requires_grad for p in made.parameters()],
    }


def assert_unchanged(made: Pack, before: dict[str, Any]) -> None:
    after = state_of(made)
    assert_close(after.pop("tensors"), before["tensors"], atol=0)
    for one, other in zip(after.pop("streams"), before["streams"], strict=True):
        assert torch.equal(one, other)
    assert after == {name: before[name] for name in after}


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("look", LOOKS)
def test_it_leaves_the_pack_as_it_was(look: Any, mode: bool) -> None:
    made = pack("t5", *[(adapter("lora", "dropout=0.5"), seed) for seed in (0, 1)]).train(mode)
    before = state_of(made)
    assert not before["gradients"]
    one, other = look(made, 1, batches(made)), look(made, 1, batches(made))
    assert_unchanged(made, before)
    assert_close(one, other, atol=0)  # nothing is dropped out


@pytest.mark.parametrize("look", LOOKS)
def test_it_leaves_the_pack_as_it_was_when_it_is_interrupted(look: Any) -> None:
    made = pack("bert", (LORA, 0)).train()

    def broken() -> Iterator[Batch]:
        yield random_batch(made.backbone)
        raise KeyboardInterrupt

    before = state_of(made)
    with pytest.raises(KeyboardInterrupt):
        look(made, 0, broken())
    assert_unchanged(made, before)


def test_gradients_that_stand_already_stay() -> None:
    made = pack("bert", (LORA, 0))
    made(random_batch(made.backbone)).sum().backward()
    before = {name: p.grad.clone() for name, p in made.trainable(0).items() if p.grad is not None}
    gradients_of(made, 0, batches(made))
    assert_close({name: p.grad for name, p in made.trainable(0).items() if p.grad is not None}, before, atol=0)
