"""PEFT's own layers in our loop: what every method of theirs promises, and what is refused before they are made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_bench.adapters.pack.member import Member
from lora_bench.adapters.pack.pack import Pack
from lora_bench.adapters.peft import catalogue, files
from lora_bench.adapters.peft.injection import inject
from lora_bench.errors import Code, UserError
from tests.adapters.peft.injected_checks import METHODS, MODELS, Models, check, settings_of
from tests.adapters.tools import adapter, assert_close, doubled, pack, stir, train, trainer
from tests.backbones.tools import make, random_batch
from tests.command_line import refuses

if TYPE_CHECKING:
    from pathlib import Path


# Advice of PEFT's methods on deployment, and what they do inside to get their results.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize(("method", "model"), [(m, MODELS[i % len(MODELS)]) for i, m in enumerate(METHODS)])
def test_every_method_keeps_its_promises(method: str, model: str, models: Models, tmp_path: Path) -> None:
    result = check(method, model, models, tmp_path / "adapter")
    assert result.failures(method, model) == [], result


def test_every_trainable_method_of_the_installed_peft_has_a_choice() -> None:
    trainable, refused = catalogue.method_types()
    assert {adapter(method).peft_type for method in METHODS} == set(trainable) - {"VERA"}  # type: ignore[attr-defined]
    assert {"PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "XLORA"} <= set(refused)


# -- the same loop --


def losses(made: Pack, steps: int) -> list[float]:
    """Train a pack of one, and return the loss of every step."""

    class Watcher:
        seen: list[float] = []  # noqa: RUF012 (one watcher for one call)

        def stepped(self, step: int, losses: dict[int, float], pairs: int) -> None:
            self.seen.append(losses[0])

        def evaluated(self, member: int, line: dict[str, Any]) -> None: ...

    watcher = Watcher()
    watcher.seen = []
    train(made, settings=trainer(steps), watcher=watcher)  # type: ignore[arg-type]
    return watcher.seen


@pytest.mark.parametrize(
    ("native", "in_peft"),
    [
        (("lora", "rank=4"), ("peft_lora", "rank=4")),
        (("dora", "rank=4"), ("peft_lora", "rank=4", "settings.use_dora=true")),
        (("vera", "rank=16"), ("peft", "peft_type=VERA", "rank=16")),
        (("hira", "rank=4"), ("peft_hira", "rank=4")),
        (("miss", "rank=8"), ("peft_miss", "rank=8")),
    ],
    ids=lambda settings: settings[0],
)
def test_a_native_method_and_pefts_learn_the_same(
    native: tuple[str, ...], in_peft: tuple[str, ...], tmp_path: Path
) -> None:
    ours, theirs = pack("bert", (adapter(*native), 0)), pack("bert", (adapter(*in_peft), 0))
    files.save(tmp_path / "adapter", ours, 0, "")  # PEFT's names: its layers read what ours have written
    files.load(tmp_path / "adapter", theirs, 0)
    batch = random_batch(ours.backbone)
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(batch), ours.eval()(batch), atol=1e-6, rtol=0)
    of_ours, of_theirs = losses(ours, 50), losses(theirs, 50)
    assert len(of_ours) == 50
    assert of_ours[0] - of_ours[-1] > 0.03
    assert of_theirs == pytest.approx(of_ours, abs=1e-4)
    torch.testing.assert_close(theirs.eval()(batch), ours.eval()(batch), atol=1e-3, rtol=0)


def test_members_of_a_pack_learn_what_they_learn_alone() -> None:
    settings = [adapter("lora", "rank=4"), settings_of("peft_vblora"), adapter("peft_lora", "rank=4", "dropout=0.3")]
    alone = [train(doubled(pack("bert", (each, k))), settings=trainer(3))[1][0] for k, each in enumerate(settings)]
    _, together = train(doubled(pack("bert", *((each, k) for k, each in enumerate(settings)))), settings=trainer(3))
    for single, member in zip(alone, together, strict=True):
        assert_close(single, member, atol=1e-6)


def test_random_numbers_of_peft_come_from_the_members_own_streams() -> None:
    states = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        _, (state,) = train(pack("bert", (adapter("peft_loha", "dropout=0.5"), 7)), settings=trainer(2))
        assert torch.equal(torch.get_rng_state(), before)
        states.append(state)
    assert_close(*states, atol=0)


def test_a_shared_tensor_is_trained_and_counted_once() -> None:
    made = pack("bert", (settings_of("peft_unilora"), 0))
    assert made.count_parameters(0)["adapter"] == 256
    parameters = list(made.adapter_parameters(0).values())
    assert len({id(p) for p in parameters}) == len(parameters) == 1
    config = peft.UniLoraConfig(r=4, theta_d_length=256, target_modules=made.targets[0])
    theirs = peft.get_peft_model(make("tiny_bert").network, config)
    assert theirs.get_nb_trainable_parameters()[0] == 256


def test_a_method_that_chooses_what_it_trains_is_called_after_every_step() -> None:
    overrides = ["use_asa=true", "asa_target_subspaces=10", "init_warmup=1", "final_warmup=3", "mask_interval=1"]
    settings = adapter("peft_adamss", "rank=16", *(f"settings.{override}" for override in overrides))
    made = pack("bert", (settings, 0))
    before = sum(p.requires_grad for p in made.adapter_parameters(0).values())
    train(made, settings=trainer(5))
    assert sum(p.requires_grad for p in made.adapter_parameters(0).values()) < before


# -- settings --


@pytest.mark.parametrize(
    ("overrides", "code", "key", "part"),
    [
        (["peft", "peft_type=HIRAA"], Code.UNKNOWN_CHOICE, "peft_type", "Did you mean HIRA?"),
        (["peft", "peft_type=EWORA"], Code.UNKNOWN_CHOICE, "peft_type", "pip install --upgrade peft"),
        (["peft", "peft_type=null"], Code.MISSING, "peft_type", ""),
        (["peft", "peft_type=PREFIX_TUNING"], Code.UNSUPPORTED, "peft_type", "virtual tokens"),
        (["peft", "peft_type=ADAPTION_PROMPT"], Code.UNSUPPORTED, "peft_type", "LLaMA"),
        (["peft", "peft_type=ADALORA"], Code.UNSUPPORTED, "peft_type", "adapter=adalora"),
        (["peft_loha", "settings.rank_dropuot=0.1"], Code.UNKNOWN_KEY, "settings.rank_dropuot", "rank_dropout?"),
        (["peft_loha", "settings.r=4"], Code.CONFLICT, "settings.r", "adapter.rank=4"),
        (["peft_loha", "settings.target_modules=q"], Code.CONFLICT, "settings.target_modules", "target_modules"),
        (["peft_loha", "settings.init_weights=3.5"], Code.INVALID_VALUE, "settings.init_weights", "True"),
        (["peft_road", "rank=4"], Code.CONFLICT, "rank", "group_size"),
        (["peft_oft", "rank=4"], Code.CONFLICT, "rank", "oft_block_size"),
        (["peft_ia3", "dropout=0.1"], Code.CONFLICT, "dropout", "feedforward_modules"),
        (["peft_loha", "rank=0"], Code.INVALID_VALUE, "rank", ""),
        (["peft_loha", "fields={rnak: r}"], Code.INVALID_VALUE, "fields.rnak", "alpha"),
        (["peft_loha", "fields={rank: rr}"], Code.UNKNOWN_KEY, "fields.rank", "Did you mean r?"),
        (
            ["peft_lora", "settings.init_lora_weights=pissa_niter_4"],
            Code.UNSUPPORTED,
            "settings.init_lora_weights",
            "adapter=pissa",
        ),
        (["peft_lora", "settings.megatron_core=os"], Code.UNSUPPORTED, "settings.megatron_core", "Leave it out"),
        (["peft_gralora", "rank=3"], Code.INVALID_VALUE, "settings", "PEFT refuses"),
    ],
)
def test_a_wrong_setting_is_refused(overrides: list[str], code: Code, key: str, part: str) -> None:
    with refuses(code, key=f"adapter.{key}") as caught:
        made = adapter(*overrides)
        pack("bert", (made, 0))
    assert part in str(caught.value)


def test_without_peft_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue.importlib.util, "find_spec", lambda name: None)
    with refuses(Code.MISSING_PACKAGE, key="adapter.peft_type") as caught:
        adapter.__wrapped__("peft_hira")  # type: ignore[attr-defined]
    assert "lora-bench[peft]" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "model", "part"),
    [
        (("peft_hira",), ("tiny_bert", "model.quantize=nf4"), "model.quantize=null"),
        (("peft_c3a", "settings.block_size=24"), ("tiny_bert",), "block"),
    ],
)
def test_modules_that_peft_cannot_adapt_are_refused(
    settings: tuple[str, ...], model: tuple[str, ...], part: str
) -> None:
    backbone = make(*model)
    if "nf4" in model[-1]:
        from lora_bench.backbones.quantized_network import Quantization

        quantization = Quantization(linears="nf4")
        backbone.to(torch.device("cpu"), torch.float32, trained=False, quantization=quantization)
    modules = dict(backbone.network.named_modules())
    with pytest.raises(UserError) as caught:
        Pack(backbone, [Member(adapter(*settings), 0)])
    assert part in str(caught.value)
    assert dict(backbone.network.named_modules()) == modules


def test_an_initialisation_that_writes_into_the_frozen_weight_is_refused_and_undone() -> None:
    backbone = make("tiny_bert")
    before = backbone.hash()
    config = peft.LoraConfig(init_lora_weights="olora")
    with refuses(Code.UNSUPPORTED, key="peft_type"):
        inject(backbone, config, list(backbone.linears()), None)
    assert backbone.hash() == before
    assert not hasattr(backbone.network, "peft_config")


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    made = stir(pack("bert", (settings_of("peft_shira"), 0)))
    files.save(tmp_path, made, 0, "")
    path = tmp_path / files.TENSORS
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("shira_indices"))
    save_file({**tensors, name: tensors[name] * 1000}, path)
    with pytest.raises(UserError) as caught:
        files.load(tmp_path, made, 0)
    assert caught.value.code == Code.DAMAGED
