"""The generic route: any Hugging Face classifier through its own forward pass, its layers and head found by shape."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
import torch
import transformers

from lora_bench.backbones import tiny
from lora_bench.backbones.auto import Auto
from lora_bench.errors import UserError
from tests.backbones.tools import cut_logits, enliven, make, own_logits, random_batch, save, spread

if TYPE_CHECKING:
    from pathlib import Path

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture(scope="module")
def deberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random DeBERTa without a classification head, as its checkpoints on the hub are."""
    tokenizer = tiny.tokenizer("bert")
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
    tokenizer = tiny.tokenizer("bert")
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
    backbone = make("deberta", f"model.path={request.getfixturevalue(kind)}")
    for head in backbone.head_modules:
        enliven(backbone.network.get_submodule(head))  # a new one is next to constant
    batch = random_batch(backbone, padded=padded)
    expected = own_logits(backbone, batch)
    assert spread(expected) > 0.01
    torch.testing.assert_close(cut_logits(backbone, batch, depth), expected, atol=1e-5, rtol=0)


def test_bert_gives_the_same_logits_as_in_its_own_family(bert: Path) -> None:
    generic, own = make("deberta", f"model.path={bert}"), make("bert", f"model.path={bert}")
    batch = random_batch(own)
    with torch.no_grad():
        torch.testing.assert_close(cut_logits(generic, batch, 0), cut_logits(own, batch, 1), atol=1e-5, rtol=0)


def test_layers_and_head_of_deberta_are_found(deberta: Path) -> None:
    backbone = make("deberta", f"model.path={deberta}")
    names = list(backbone.linears())
    assert [path for path, _ in backbone.layers] == ["deberta.encoder.layer.0", "deberta.encoder.layer.1"]
    assert {backbone.layer_of(name) for name in names} == {0, 1}
    assert list(backbone.head_modules) == ["pooler", "classifier"]
    assert not [name for name in names if name.startswith(("pooler", "classifier"))]
    assert backbone.fresh == {"pooler.dense.weight", "pooler.dense.bias", "classifier.weight", "classifier.bias"}


def test_qv_means_query_and_value(deberta: Path, bert: Path) -> None:
    for folder, kinds in ((deberta, {"query_proj", "value_proj"}), (bert, {"query", "value"})):
        backbone = make("deberta", f"model.path={folder}")
        chosen = [name for name in backbone.linears() if re.fullmatch(backbone.query_value, name)]
        assert {name.rpartition(".")[2] for name in chosen} == kinds
        assert len(chosen) == 4


def test_a_head_by_another_name_may_be_new_too(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer("bert")
    config = transformers.DistilBertConfig(vocab_size=len(tokenizer), dim=32, n_layers=2, n_heads=2, hidden_dim=64)
    folder = save(tmp_path, transformers.DistilBertModel(config), tokenizer)
    backbone = make("deberta", f"model.path={folder}")
    assert list(backbone.head_modules) == ["pre_classifier", "classifier"]
    assert {name.partition(".")[0] for name in backbone.fresh} == {"pre_classifier", "classifier"}


def test_a_pooler_that_would_stay_random_and_frozen_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer("bert")
    network = transformers.BertModel(
        transformers.BertConfig(vocab_size=len(tokenizer), **SIZES), add_pooling_layer=False
    )
    folder = save(tmp_path, network, tokenizer)
    assert make("bert", f"model.path={folder}").fresh >= {"bert.pooler.dense.weight"}  # there it is trained
    with pytest.raises(UserError, match=r"lacks 2 of .* in their shape, for example bert\.pooler\.dense\.bias"):
        make("deberta", f"model.path={folder}")


def test_a_network_without_a_base_model_is_refused() -> None:
    network = transformers.BertModel(transformers.BertConfig(vocab_size=20, **SIZES))
    with pytest.raises(UserError, match=r"^model\.family=auto: BertModel does not show its layers and its head"):
        Auto(network, tiny.tokenizer("bert"), set())
