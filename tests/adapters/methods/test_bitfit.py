"""BitFit trains the plain network's own biases: the same logits and gradients, the paper's count, nothing else."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_bench.adapters.pack.member import Member
from lora_bench.adapters.pack.pack import Pack
from lora_bench.adapters.peft import files
from lora_bench.errors import Code
from tests.adapters.tools import adapter, assert_close, merged_logits, optimizer, pack, stir, train, trainer
from tests.backbones.tools import FORMS, held, make, random_batch, reference
from tests.command_line import refuses

if TYPE_CHECKING:
    from pathlib import Path

every_form = pytest.mark.parametrize("form", ["bert", "roberta"])
LAYER = [
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "attention.output.LayerNorm",
    "intermediate.dense",
    "output.dense",
    "output.LayerNorm",
]


def bitfit(form: str, *overrides: str, seed: int = 0) -> Pack:
    return pack(form, (adapter("bitfit", *overrides), seed))


def targets(form: str, *overrides: str) -> list[str]:
    return adapter("bitfit", *overrides).targets(make(*FORMS[form]))


@pytest.mark.parametrize("settings", [(), ("layers=[1]",), ("target_modules=qv",)])
@every_form
def test_logits_and_gradients_are_those_of_a_network_with_trainable_biases(form: str, settings: tuple[str]) -> None:
    ours = stir(bitfit(form, *settings)).eval()
    twin = bitfit(form, *settings)
    twin.detach()
    plain: Any = copy.deepcopy(twin.network)
    shifts = {name.removesuffix(".shift"): p for name, p in ours.adapter_parameters(0).items()}
    biases = {name: plain.get_submodule(name).bias.requires_grad_() for name in shifts}
    with torch.no_grad():
        for name, bias in biases.items():
            bias.add_(shifts[name])
        for name, p in ours.head_parameters(0).items():
            plain.get_parameter(name).copy_(p)
    batch = random_batch(ours.backbone)
    assert batch.labels is not None
    (logits,) = ours(batch)
    expected = reference(plain.eval(), batch)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    F.cross_entropy(logits, batch.labels).backward()
    F.cross_entropy(expected, batch.labels).backward()
    compared = 0
    for name, bias in biases.items():
        torch.testing.assert_close(shifts[name].grad, bias.grad, atol=1e-5, rtol=1e-4)
        compared += bool(bias.grad.abs().max() > 1e-3)
    assert compared > len(biases) / 3


@every_form
def test_what_is_trained_are_the_biases_of_linears_and_norms_in_the_order_of_computation(form: str) -> None:
    prefix = f"{form}.encoder.layer"
    assert targets(form) == [f"{prefix}.{i}.{module}" for i in (0, 1) for module in LAYER]
    assert targets(form, "layers=top:1") == [f"{prefix}.1.{module}" for module in LAYER]
    assert targets(form, "target_modules=qv") == [
        f"{prefix}.{i}.attention.self.{module}" for i in (0, 1) for module in ("query", "value")
    ]


def test_an_expression_chooses_among_linears_and_norms() -> None:
    found = targets("bert", r"target_modules='.*(LayerNorm|intermediate\.dense)'", "layers=[0]")
    assert [name.removeprefix("bert.encoder.layer.0.") for name in found] == [LAYER[4], LAYER[5], LAYER[7]]
    assert len(targets("bert", "target_modules='.*LayerNorm'")) == 4
    for expression, code in (("LayerNorm", Code.NO_MATCH), ("*", Code.INVALID_SYNTAX)):
        with refuses(code, key="target_modules") as caught:
            targets("bert", f"target_modules='{expression}'")
        assert caught.value.value == expression


@every_form
def test_the_count_is_the_papers(form: str) -> None:
    def count(layers: int, hidden: int, intermediate: int) -> int:
        # Query, key, value, attention output, output and two norms are as wide as the hidden states.
        return layers * (7 * hidden + intermediate)

    assert count(12, 768, 3072) == 12 * 8448  # RoBERTa-base
    assert bitfit(form).count_parameters(0)["adapter"] == count(2, 32, 64)


@pytest.mark.parametrize("form", ["t5", "t5_encoder"])
def test_t5_has_no_biases_and_is_refused(form: str) -> None:
    with refuses(Code.UNSUPPORTED, key="adapter.method") as caught:
        bitfit(form)
    assert caught.value.value == "bitfit"


def test_a_linear_without_a_bias_is_left_out() -> None:
    backbone = make("tiny_bert")
    query = backbone.network.get_submodule("bert.encoder.layer.0.attention.self.query")
    query.bias = None
    norm: nn.LayerNorm = backbone.network.get_submodule("bert.encoder.layer.1.output.LayerNorm")
    norm.bias = None
    assert "bert.encoder.layer.1.output.LayerNorm" not in backbone.norms()
    found = adapter("bitfit").targets(backbone)
    assert len(found) == 2 * len(LAYER) - 2
    assert not {"bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.output.LayerNorm"} & set(found)


@every_form
def test_training_starts_from_the_backbones_own_function_and_moves_every_bias(form: str) -> None:
    made = bitfit(form)
    start = made.state(0)
    assert not any(tensor.any() for name, tensor in start.items() if name.endswith(".shift"))
    _, (end,) = train(made, settings=trainer(3))
    # A key's bias changes no attention, so its gradient is zero but for rounding.
    assert all(tensor.any() for name, tensor in end.items() if name.endswith(".shift") and "key" not in name)


def test_weight_decay_never_touches_a_bias() -> None:
    # One step: later ones see a head that did decay.
    ends = [train(bitfit("bert"), [optimizer(weight_decay=decay)], trainer(1))[1][0] for decay in (0.5, 0.0)]
    shifts, undecayed = ({name: p for name, p in end.items() if name.endswith(".shift")} for end in ends)
    assert_close(shifts, undecayed, atol=0)
    assert not torch.equal(ends[0]["classifier.weight"], ends[1]["classifier.weight"])


def test_two_seeds_in_a_pack_learn_what_they_learn_alone() -> None:
    alone = [train(bitfit("bert", seed=seed), settings=trainer(4))[1][0] for seed in (0, 1)]
    _, together = train(pack("bert", (adapter("bitfit"), 0), (adapter("bitfit"), 1)), settings=trainer(4))
    for lone, member in zip(alone, together, strict=True):
        assert_close(
            {name: p for name, p in lone.items() if "key" not in name},  # its gradient is rounding, which Adam enlarges
            {name: p for name, p in member.items() if "key" not in name},
            atol=1e-5,
        )


def test_it_packs_with_a_method_that_adapts_other_modules() -> None:
    both = stir(pack("bert", (adapter("bitfit"), 0), (adapter("lora", "target_modules=qv"), 0))).eval()
    batch = random_batch(both.backbone)
    state = both.state(0)
    with torch.no_grad():
        logits = both(batch)[0]
        alone = bitfit("bert").eval()
        alone.load_state(0, state)
        torch.testing.assert_close(alone(batch)[0], logits, atol=1e-6, rtol=0)


@every_form
def test_merged_biases_say_what_the_shifts_say(form: str) -> None:
    made = stir(bitfit(form)).eval()
    batch = random_batch(made.backbone)
    with torch.no_grad():
        (logits,) = made(batch)
    torch.testing.assert_close(merged_logits(made, 0, batch), logits, atol=1e-5, rtol=0)


def test_shifts_stay_fp32_beside_a_bf16_backbone() -> None:
    backbone = make("tiny_bert")
    backbone.to(torch.device("cpu"), torch.bfloat16, trained=False)
    made = stir(pack("bert", (adapter("bitfit"), 0), backbone=backbone))
    assert {p.dtype for p in made.adapter_parameters(0).values()} == {torch.float32}
    assert made(random_batch(backbone)).isfinite().all()


def test_saved_and_loaded_gives_identical_logits(tmp_path: Path) -> None:
    made = stir(bitfit("bert")).eval()
    files.save(tmp_path, made, 0, "")
    assert len([name for name in held(tmp_path / "adapter_model.safetensors") if name.endswith(".shift")]) == 16
    member = Member(made.members[0].adapter, seed=1, saved_ranks=made.ranks(0))
    other = Pack(make(*FORMS["bert"]), [member]).eval()
    files.load(tmp_path, other, 0)
    batch = random_batch(made.backbone)
    with torch.no_grad():
        assert torch.equal(other(batch), made(batch))
