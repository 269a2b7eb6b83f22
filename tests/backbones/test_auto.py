"""The generic route: any Hugging Face classifier through its own forward pass, its layers and head found by shape."""

from __future__ import annotations

import re
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lora_bench.adapters.pack.member import Member
from lora_bench.adapters.pack.pack import Pack
from lora_bench.adapters.targets import match_targets
from lora_bench.backbones import tiny_tokenizers
from lora_bench.backbones.auto import Auto
from lora_bench.errors import Code
from lora_bench.evaluation.cost import FlopModel
from lora_bench.training.dummy_step import dummy_step, probe_batch
from lora_bench.training.padding import check_padding
from tests.adapters.tools import adapter
from tests.backbones.tools import cut_logits, enliven, make, own_logits, random_batch, save, spread
from tests.command_line import refuses

if TYPE_CHECKING:
    from pathlib import Path

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture(scope="module")
def deberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random DeBERTa without a classification head, as its checkpoints on the hub are."""
    tokenizer = tiny_tokenizers.tokenizer("bert")
    config = transformers.DebertaV2Config(
        vocab_size=len(tokenizer),
        **SIZES,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        share_att_key=True,
        position_buckets=16,
        norm_rel_ebd="layer_norm",
        type_vocab_size=0,
    )
    network = enliven(transformers.DebertaV2Model(config))
    return save(tmp_path_factory.mktemp("deberta"), network, tokenizer)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = tiny_tokenizers.tokenizer("bert")
    network = enliven(
        transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=len(tokenizer), **SIZES))
    )
    return save(tmp_path_factory.mktemp("bert"), network, tokenizer)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("kind", ["deberta", "bert"])
@torch.no_grad()
def test_prefix_and_suffix_make_the_logits_of_hugging_face(
    kind: str, depth: int, padded: bool, request: pytest.FixtureRequest
) -> None:
    backbone = make("auto", f"model.path={request.getfixturevalue(kind)}")
    for head in backbone.head_modules:
        enliven(backbone.network.get_submodule(head))  # a new one is next to constant
    batch = random_batch(backbone, padded=padded)
    expected = own_logits(backbone, batch)
    assert spread(expected) > 0.01
    torch.testing.assert_close(cut_logits(backbone, batch, depth), expected, atol=1e-5, rtol=0)


def test_bert_gives_the_same_logits_as_in_its_own_family(bert: Path) -> None:
    generic, own = make("auto", f"model.path={bert}"), make("bert", f"model.path={bert}")
    batch = random_batch(own)
    with torch.no_grad():
        torch.testing.assert_close(cut_logits(generic, batch, 0), cut_logits(own, batch, 1), atol=1e-5, rtol=0)


def test_layers_and_head_of_deberta_are_found(deberta: Path) -> None:
    backbone = make("auto", f"model.path={deberta}")
    names = list(backbone.linears())
    assert [path for path, _ in backbone.layers] == ["deberta.encoder.layer.0", "deberta.encoder.layer.1"]
    assert {backbone.layer_of(name) for name in names} == {0, 1}
    assert list(backbone.head_modules) == ["pooler", "classifier"]
    assert not [name for name in names if name.startswith(("pooler", "classifier"))]
    assert backbone.new_parameters == {
        "pooler.dense.weight",
        "pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    }


def test_qv_means_query_and_value(deberta: Path, bert: Path) -> None:
    for folder, kinds in ((deberta, {"query_proj", "value_proj"}), (bert, {"query", "value"})):
        backbone = make("auto", f"model.path={folder}")
        chosen = [name for name in backbone.linears() if re.fullmatch(backbone.query_value, name)]
        assert {name.rpartition(".")[2] for name in chosen} == kinds
        assert len(chosen) == 4


def test_a_head_by_another_name_may_be_new_too(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizers.tokenizer("bert")
    config = transformers.DistilBertConfig(vocab_size=len(tokenizer), dim=32, n_layers=2, n_heads=2, hidden_dim=64)
    folder = save(tmp_path, transformers.DistilBertModel(config), tokenizer)
    backbone = make("auto", f"model.path={folder}")
    assert list(backbone.head_modules) == ["pre_classifier", "classifier"]
    assert {name.partition(".")[0] for name in backbone.new_parameters} == {"pre_classifier", "classifier"}


def test_a_pooler_that_the_checkpoint_lacks_is_a_part_of_the_head(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizers.tokenizer("bert")
    config = transformers.AlbertConfig(vocab_size=len(tokenizer), embedding_size=16, **SIZES)
    folder = save(tmp_path, transformers.AlbertModel(config, add_pooling_layer=False), tokenizer)
    backbone = make("albert", f"model.path={folder}")
    assert list(backbone.head_modules) == ["albert.pooler", "classifier"]
    pack = Pack(backbone, [Member(adapter("lora"), seed) for seed in (0, 1)], batched=True)
    pack(random_batch(backbone)).square().sum().backward()
    assert all(p.grad is not None for k in (0, 1) for p in pack.head_parameters(k).values())


def test_a_missing_layer_is_refused(bert: Path, tmp_path: Path) -> None:
    shutil.copytree(bert, tmp_path, dirs_exist_ok=True)
    tensors = load_file(bert / "model.safetensors")
    save_file({name: t for name, t in tensors.items() if ".layer.1." not in name}, tmp_path / "model.safetensors")
    with refuses(Code.DAMAGED) as caught:
        make("auto", f"model.path={tmp_path}")
    assert caught.value.file == str(tmp_path)
    assert "bert.encoder.layer.1." in caught.value.reason


def test_a_network_without_a_base_model_is_refused() -> None:
    network = transformers.BertModel(transformers.BertConfig(vocab_size=20, **SIZES))
    with refuses(Code.UNSUPPORTED, key="model.family") as caught:
        Auto(network, tiny_tokenizers.tokenizer("bert"), set())
    assert caught.value.value == "auto"
    assert "BertModel" in caught.value.reason


# -- models of other shapes --


def random_folder(path: Path, config: Any, network_class: Any, kind: str = "roberta") -> Path:
    return save(path, enliven(network_class(config)), tiny_tokenizers.tokenizer(kind))


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder of one layer and a decoder of two; its classifier looks for the end token of every row."""
    size = len(tiny_tokenizers.tokenizer("roberta"))
    settings = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in PER_PART.items()}
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    layers = {"encoder_layers": 1, "decoder_layers": 2}
    config = transformers.BartConfig(
        vocab_size=size, d_model=32, max_position_embeddings=64, **settings, **layers, **ids
    )
    return random_folder(tmp_path_factory.mktemp("bart"), config, transformers.BartForSequenceClassification)


PER_PART = {"attention_heads": 2, "ffn_dim": 64}


@pytest.fixture(scope="module")
def xlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Attentions and feed-forward networks in lists of their own."""
    config = transformers.XLMConfig(
        vocab_size=len(tiny_tokenizers.tokenizer("roberta")), emb_dim=32, n_layers=2, n_heads=2, pad_token_id=1,
        max_position_embeddings=64,
    )  # fmt: skip
    return random_folder(tmp_path_factory.mktemp("xlm"), config, transformers.XLMForSequenceClassification)


def test_all_takes_every_linear_of_every_outermost_list(xlm: Path, bart: Path) -> None:
    for folder, layers in ((xlm, 2), (bart, 3)):
        backbone = make("auto", f"model.path={folder}")
        base = backbone.network.base_model
        linears = {name for name, module in backbone.network.named_modules() if isinstance(module, torch.nn.Linear)}
        inside = {name for name in linears if not name.startswith(tuple(backbone.head_modules))}
        assert set(match_targets(backbone, "all", "all")) == inside
        assert len(backbone.layers) == layers
        assert base is not backbone.network


def test_top_layers_are_those_computed_last(xlm: Path, bart: Path) -> None:
    of_xlm = match_targets(make("auto", f"model.path={xlm}"), "all", "top:1")
    assert {re.sub(r"\.\w+$", "", name) for name in of_xlm} == {"transformer.attentions.1", "transformer.ffns.1"}
    of_bart = match_targets(make("auto", f"model.path={bart}"), "all", "top:2")
    assert {".".join(name.split(".")[:4]) for name in of_bart} == {"model.decoder.layers.0", "model.decoder.layers.1"}


def test_a_probe_has_what_a_classifier_looks_for(bart: Path) -> None:
    pack = Pack(make("auto", f"model.path={bart}"), [Member(adapter("lora"), 0)])
    flops = FlopModel.measure(lambda rows, length: dummy_step(pack, rows, length))
    assert flops(1, 32) > flops(1, 16) > 0


POSITIONS = {
    "mpnet": (transformers.MPNetConfig, transformers.MPNetForSequenceClassification, 62),
    "roberta": (transformers.RobertaConfig, transformers.RobertaForSequenceClassification, 62),
    "electra": (transformers.ElectraConfig, transformers.ElectraForSequenceClassification, 64),
    "opt": (transformers.OPTConfig, transformers.OPTForSequenceClassification, 64),
}


@pytest.mark.parametrize("kind", POSITIONS)
def test_the_longest_pair_is_what_the_position_table_has_rows_for(kind: str) -> None:
    config_class, network_class, limit = POSITIONS[kind]
    tokenizer = tiny_tokenizers.tokenizer("roberta")
    names = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "embedding_size": 32}
    names |= {"word_embed_proj_dim": 32, "ffn_dim": 64} if kind == "opt" else {"intermediate_size": 64}
    config = config_class(vocab_size=len(tokenizer), pad_token_id=1, max_position_embeddings=64, **names)
    backbone = Auto(network_class(config).eval(), tokenizer, set())
    assert backbone.max_tokens == limit
    backbone.require_length(limit)
    batch = probe_batch(backbone, 1, limit)
    assert backbone.suffix(batch.input_ids, batch, 0).isfinite().all()
    with refuses(Code.INVALID_VALUE, key="data.max_length") as caught:
        backbone.require_length(limit + 1)
    assert caught.value.value == limit + 1
    assert f" {limit} " in caught.value.reason


def test_a_model_without_positions_takes_any_length() -> None:
    tokenizer = tiny_tokenizers.tokenizer("roberta")
    config = transformers.XLNetConfig(vocab_size=len(tokenizer), d_model=32, n_layer=1, n_head=2, d_inner=64)
    backbone = Auto(transformers.XLNetForSequenceClassification(config).eval(), tokenizer, set())
    assert backbone.max_tokens is None
    check_padding(backbone)
    assert len(backbone.notes) == 2  # it cannot be cut; it answers by the last position, padding or not


def test_padding_that_changes_no_score_needs_no_note(bert: Path, bart: Path) -> None:
    backbones = [make("auto", f"model.path={folder}") for folder in (bert, bart)]
    for backbone in backbones:
        check_padding(backbone)
    assert [backbone.notes for backbone in backbones] == [[], []]


@pytest.mark.parametrize("option", ["lora", "dora", "adalora", "vera", "lora_xs", "bitfit"])
def test_a_model_that_changes_outputs_in_place_learns(option: str) -> None:
    tokenizer = tiny_tokenizers.tokenizer("bert")
    config = transformers.DebertaConfig(
        vocab_size=len(tokenizer), **SIZES, relative_attention=True, pos_att_type=["c2p", "p2c"], type_vocab_size=0
    )
    network = enliven(transformers.DebertaForSequenceClassification(config)).eval()
    members = [Member(adapter(option), seed) for seed in (0, 1)]
    pack = Pack(Auto(network, tokenizer, set()), members, batched=True)
    with pack.accumulating_gradients():
        pack(random_batch(pack.backbone)).square().sum().backward()
    assert all(p.grad is not None for k in (0, 1) for p in pack.adapter_parameters(k).values())
    assert pack.group_size == 1  # all rows share what its linears make of relative positions


def test_a_pack_is_computed_at_once_where_every_linear_takes_the_rows(bert: Path, bart: Path) -> None:
    for folder in (bert, bart):
        members = [Member(adapter("lora"), seed) for seed in (0, 1)]
        assert Pack(make("auto", f"model.path={folder}"), members, batched=True).group_size == 2
