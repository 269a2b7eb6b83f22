"""What every method promises, whichever YAMLs lie in `conf/adapter/`: a new one is tested by being there."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

import lora_bench.adapters.methods
from lora_bench.adapters.base import Adapter
from lora_bench.adapters.methods import method_class, method_names
from lora_bench.adapters.pack.pack import Pack
from lora_bench.adapters.peft import files
from lora_bench.config.build import build
from lora_bench.config.groups import conf_folder
from lora_bench.errors import Code
from tests.adapters.tools import (
    OWN_METHODS,
    adapter,
    assert_close,
    assert_out_of_range,
    doubled,
    in_turn,
    merged_logits,
    pack,
    stir,
    tables,
    train,
    trainer,
)
from tests.backbones.tools import FORMS, make, random_batch, spread
from tests.command_line import refuses
from tests.helpers import composed
from tests.training.tools import prepare

if TYPE_CHECKING:
    from pathlib import Path

OPTIONS = OWN_METHODS
# The linear probe needs a head, which T5 as a text-to-text model has not; no module of T5 has a bias.
IMPOSSIBLE = {("head_only", "t5"), ("bitfit", "t5"), ("bitfit", "t5_encoder")}
COMBINATIONS = [(method, form) for method in OPTIONS for form in FORMS if (method, form) not in IMPOSSIBLE]
every_method = pytest.mark.parametrize(("method", "form"), COMBINATIONS)
every_method_in_turn = pytest.mark.parametrize(("method", "form"), in_turn(COMBINATIONS))

# How far the logits may be from the backbone's own before the first step; the others keep them to rounding.
STARTS_ELSEWHERE = {
    "lora_xs": 1e-3,  # R is drawn with a deviation of 1e-5
    "lora_one": None,  # one step along the gradient
    "enhanced": None,  # as lora_one
    "qlora": None,  # the frozen weights are other ones
    "loftq": None,
}


def one(method: str, form: str, seed: int = 0) -> Pack:
    """A pack of one that has looked at its data."""
    made = pack(form, (adapter(method), seed))
    prepare(made, trainer(), tables(made.backbone)[0])
    return made


def loaded_into(made: Pack, form: str, folder: Path) -> Pack:
    """A pack with the settings and ranks of another one, and the tensors of its adapter file."""
    (member,) = made.members
    fresh = Pack(make(*FORMS[form]), [replace(member, seed=1, saved_ranks=made.ranks(0))])
    files.load(folder, fresh, 0)
    return fresh


@every_method
def test_training_starts_from_the_backbones_own_function(method: str, form: str) -> None:
    made = one(method, form)
    batch = random_batch(made.backbone)
    with torch.no_grad():
        (logits,) = made.eval()(batch)
        head = made.head_parameters(0)
        made.detach()
        for name, tensor in head.items():
            made.network.get_parameter(name).copy_(tensor)
        expected = made.backbone.suffix(made.backbone.prefix(batch, made.depth), batch, made.depth)
    allowed = STARTS_ELSEWHERE.get(method, 1e-6)
    if allowed is None:
        assert not torch.equal(logits, expected)
    else:
        torch.testing.assert_close(logits, expected, atol=allowed, rtol=0)


@every_method_in_turn
def test_only_full_fine_tuning_changes_the_backbone(method: str, form: str) -> None:
    made = pack(form, (adapter(method), 0))
    made.detach()
    before = made.backbone.hash()
    made = pack(form, (adapter(method), 0), backbone=made.backbone)
    start = made.state(0)
    outcomes, (end,) = train(made, settings=trainer(2))
    assert [outcome.steps for outcome in outcomes] == [2]
    assert any(name not in start or not torch.equal(start[name], end[name]) for name in end)
    made.detach()
    assert (made.backbone.hash() == before) != made.trains_backbone


@every_method_in_turn
def test_a_member_learns_what_it_learns_alone(method: str, form: str) -> None:
    if method == "full":
        return  # its packs have one member
    alone = [train(doubled(pack(form, (adapter(method), seed))), settings=trainer(3))[1][0] for seed in (0, 1)]
    _, together = train(doubled(pack(form, (adapter(method), 0), (adapter(method), 1))), settings=trainer(3))
    for lone, member in zip(alone, together, strict=True):
        free = [name for name in lone if cannot_matter(name)]  # led by rounding alone
        assert_close(lone | {name: member[name] for name in free}, member, atol=1e-6)


def cannot_matter(name: str) -> bool:
    """Whether a tensor moves no logit of a transformer, so that its gradient is zero but for rounding.

    A key's bias shifts all attention scores of a query alike; T5's decoder, at its one step, attends to itself alone.
    """
    alone = name.startswith("decoder.") and ".SelfAttention." in name
    idle = alone and any(f".{p}." in name for p in ("q", "k", "relative_attention_bias"))
    return name.endswith(("key.bias", "key.shift")) or idle


@every_method_in_turn
def test_every_trained_tensor_gets_a_gradient_and_no_other(method: str, form: str) -> None:
    made = stir(one(method, form)).train()
    batch = random_batch(made.backbone)
    assert batch.labels is not None
    torch.nn.functional.cross_entropy(made(batch)[0], batch.labels).backward()
    trained = made.trainable(0)
    for name, p in trained.items():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.any() or cannot_matter(name), name
    ours = {id(p) for p in trained.values()}
    assert all(p.grad is None and not p.requires_grad for p in made.parameters() if id(p) not in ours)


@every_method
def test_merged_weights_say_what_the_adapter_says(method: str, form: str) -> None:
    made = stir(one(method, form)).eval()
    batch = random_batch(made.backbone)
    with torch.no_grad():
        (logits,) = made(batch)
    assert spread(logits) > 1e-3
    torch.testing.assert_close(merged_logits(made, 0, batch), logits, atol=1e-5, rtol=0)


@every_method_in_turn
def test_a_state_put_back_gives_identical_logits(method: str, form: str) -> None:
    made, other = stir(one(method, form)).eval(), one(method, form).eval()
    batch = random_batch(made.backbone)
    with torch.no_grad():
        assert not torch.equal(made(batch), other(batch))
        state = made.state(0)
        other.load_state(0, state)
        assert torch.equal(made(batch), other(batch))
        for p in made.trainable(0).values():
            p.zero_()
    assert any(tensor.any() for tensor in state.values())  # a copy, not a view
    assert torch.equal(other.state(0)[next(iter(state))], next(iter(state.values())))


@every_method_in_turn
def test_saved_and_loaded_gives_identical_logits(method: str, form: str, tmp_path: Path) -> None:
    made = stir(one(method, form)).eval()
    batch = random_batch(made.backbone)
    files.save(tmp_path / "adapter", made, 0, "")
    other = loaded_into(made, form, tmp_path / "adapter").eval()
    assert_close(other.state(0), made.state(0), atol=0)
    with torch.no_grad():
        assert torch.equal(made(batch), other(batch))


def test_the_probe_is_refused_where_there_is_no_head() -> None:
    with refuses(Code.UNSUPPORTED, key="adapter.method") as caught:
        pack("t5", (adapter("head_only"), 0))
    assert caught.value.value == "head_only"
    assert "model.form" in str(caught.value.remedy)


@pytest.mark.parametrize("method", OPTIONS)
def test_a_default_rate_that_is_none_is_refused(method: str) -> None:
    for rate in ("0.0", "-1.0", "nan", "inf") if method == "lora" else ("0.0",):
        assert_out_of_range(method, f"default_lr={rate}")


def test_shared_machinery_is_no_method() -> None:
    assert {"full", "head_only", "lora"} <= set(method_names())
    assert {method for method, _ in COMBINATIONS} == set(OPTIONS)
    assert {adapter(option).method for option in OPTIONS} == set(method_names()) - {"peft"}
    assert len(OPTIONS) >= 21
    for name in method_names():
        assert issubclass(method_class(name), Adapter)
        assert (conf_folder() / "adapter" / f"{name}.yaml").is_file()


def test_an_unknown_method_is_refused_with_the_one_meant() -> None:
    for name in ("lroa", "base", "pack", "os", "../lora", "lora.LoRA", ""):
        with refuses(Code.UNKNOWN_CHOICE, key="adapter.method") as caught:
            method_class(name)
        assert caught.value.value == name
        assert name != "lroa" or "lora?" in str(caught.value)


MODULE = '''
from __future__ import annotations

from dataclasses import dataclass

from lora_bench.adapters.methods.lora import LoRA


@dataclass(frozen=True, kw_only=True)
class Louder(LoRA):
    """LoRA, so many times as loud."""

    times: float

    def update(self, name, base, init, dropout):
        update = super().update(name, base, init, dropout)
        update.scaling *= self.times
        return update
'''


def test_a_new_method_is_one_file_and_one_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "louder.py").write_text(MODULE)
    (tmp_path / "conf/adapter").mkdir(parents=True)
    (tmp_path / "conf/adapter/louder.yaml").write_text("defaults: [lora, _self_]\nmethod: louder\ntimes: 3.0\n")
    monkeypatch.setattr(lora_bench.adapters.methods, "__path__", [*lora_bench.adapters.methods.__path__, str(tmp_path)])
    try:
        assert "louder" in method_names()
        cfg = composed(f"hydra.searchpath=[file://{tmp_path}/conf]", "adapter=louder", "adapter.alpha=4")
        louder = build(method_class("louder"), cfg.adapter, "adapter")
        quiet = adapter("lora", "alpha=12")
        made, same = (pack("bert", (settings, 0)) for settings in (louder, quiet))
        batch = random_batch(made.backbone)
        with torch.no_grad():
            torch.testing.assert_close(stir(made).eval()(batch), stir(same).eval()(batch))
        with refuses(Code.UNKNOWN_KEY, key="adapter.tmies") as caught:
            build(method_class("louder"), composed("+adapter.tmies=2").adapter, "adapter")
        assert "times?" in str(caught.value)
    finally:
        sys.modules.pop("lora_bench.adapters.methods.louder", None)
