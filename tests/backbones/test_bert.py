"""BERT and RoBERTa: cut anywhere, they compute what Hugging Face computes; adapters see the layers, never the head."""

from __future__ import annotations

import re

import pytest
import torch

from tests.backbones.tools import cut_logits, make, own_logits, random_batch, spread

FAMILIES = ("bert", "roberta")
LAYER = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_prefix_and_suffix_make_the_logits_of_hugging_face(family: str, depth: int, padded: bool) -> None:
    backbone = make(f"tiny_{family}")
    batch = random_batch(backbone, padded=padded)
    expected = own_logits(backbone, batch)
    assert spread(expected) > 0.01
    torch.testing.assert_close(cut_logits(backbone, batch, depth), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_token_types_reach_bert() -> None:
    backbone = make("tiny_bert")
    batch = random_batch(backbone)
    untyped = type(batch)(batch.input_ids, batch.attention_mask, None, None, batch.full)
    expected = own_logits(backbone, untyped)
    torch.testing.assert_close(cut_logits(backbone, untyped, 1), expected, atol=1e-5, rtol=0)
    assert (cut_logits(backbone, batch, 1) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_linears_are_those_of_the_layers_in_the_order_of_computation(family: str) -> None:
    backbone = make(f"tiny_{family}")
    expected = [f"{family}.encoder.layer.{i}.{name}" for i in range(2) for name in LAYER]
    assert list(backbone.linears()) == expected
    assert [backbone.layer_of(name) for name in expected] == [0] * 6 + [1] * 6
    assert all(backbone.network.get_submodule(name) is module for name, module in backbone.linears().items())


def test_head_is_the_pooler_and_the_classifier_of_bert_and_the_classifier_of_roberta() -> None:
    assert list(make("tiny_bert").head_modules) == ["bert.pooler", "classifier"]
    assert list(make("tiny_roberta").head_modules) == ["classifier"]


@pytest.mark.parametrize(("family", "outside"), [("bert", "bert.pooler.dense"), ("roberta", "classifier.dense")])
def test_what_lies_outside_the_layers_has_no_layer(family: str, outside: str) -> None:
    backbone = make(f"tiny_{family}")
    backbone.network.get_submodule(outside)  # it is there
    assert outside not in backbone.linears()
    assert backbone.layer_of(outside) is None


def test_layer_1_is_not_taken_for_layer_11() -> None:
    backbone = make("tiny_bert", "model.random.num_hidden_layers=12")
    assert backbone.layer_of("bert.encoder.layer.1.output.dense") == 1
    assert backbone.layer_of("bert.encoder.layer.11.output.dense") == 11


@pytest.mark.parametrize("family", FAMILIES)
def test_qv_means_query_and_value(family: str) -> None:
    backbone = make(f"tiny_{family}")
    chosen = [name for name in backbone.linears() if re.fullmatch(backbone.query_value, name)]
    types = ("attention.self.query", "attention.self.value")
    assert chosen == [f"{family}.encoder.layer.{i}.{name}" for i in range(2) for name in types]


@pytest.mark.parametrize("family", FAMILIES)
def test_hash_is_that_of_the_weights_outside_the_head(family: str) -> None:
    backbone, again = make(f"tiny_{family}"), make(f"tiny_{family}")
    assert backbone.hash() == again.hash()
    with torch.no_grad():
        for name in backbone.head_modules:
            for p in backbone.network.get_submodule(name).parameters():
                p.add_(1.0)
    assert backbone.hash() == again.hash()
    for name in ("embeddings.LayerNorm.bias", "encoder.layer.1.output.dense.weight"):
        before = backbone.hash()
        weight = backbone.network.get_parameter(f"{family}.{name}")
        weight.data.view(-1)[-1] = torch.nextafter(weight.data.view(-1)[-1], torch.tensor(torch.inf))
        assert backbone.hash() != before


def test_pairs_are_rendered_as_two_texts_and_single_sentences_as_one() -> None:
    backbone = make("tiny_bert")
    assert backbone.render([("question1", ["a"]), ("question2", ["b"])]) == (["a"], ["b"])
    assert backbone.render([("sentence", ["a"])]) == (["a"], None)


def test_sizes_that_others_rely_on() -> None:
    backbone = make("tiny_bert", "+model.random.initializer_range=0.5")
    assert (backbone.hidden_size, backbone.initializer_range) == (32, 0.5)
    assert backbone.device == torch.device("cpu")


def test_precision_is_that_of_the_frozen_weights_unless_they_are_trained() -> None:
    for trained, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        backbone = make("tiny_bert")
        backbone.to(torch.device("cpu"), torch.bfloat16, trained=trained)
        assert backbone.compute_dtype == torch.bfloat16
        assert {p.dtype for p in backbone.network.parameters()} == {dtype}
