"""T5 in both forms: cut anywhere, it computes what Hugging Face computes, and it is asked as in its pretraining."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_bench.backbones import tiny_tokenizers
from lora_bench.errors import Code
from tests.backbones.tools import cut_logits, enliven, make, own_logits, random_batch, save, spread
from tests.command_line import refuses

if TYPE_CHECKING:
    from pathlib import Path

FORMS = ("text_to_text", "encoder")
VARIANTS: dict[str, tuple[str, ...]] = {
    "t5": (),
    "t5_v1_1": (
        "+model.random.feed_forward_proj=gated-gelu",
        "+model.random.tie_word_embeddings=false",
        "+model.random.scale_decoder_outputs=false",
    ),
}


def make_t5(form: str = "text_to_text", *overrides: str) -> Any:
    return make("tiny_t5", f"model.form={form}", *overrides)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("depth", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_text_to_text_makes_the_scores_of_the_label_words(variant: str, depth: int, padded: bool) -> None:
    backbone = make_t5("text_to_text", *VARIANTS[variant])
    batch = random_batch(backbone, padded=padded)
    expected = own_logits(backbone, batch)
    assert spread(expected) > 0.01
    torch.testing.assert_close(cut_logits(backbone, batch, depth), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("depth", [0, 1, 2])
@torch.no_grad()
def test_encoder_form_makes_the_mean_of_the_token_logits(depth: int, padded: bool) -> None:
    backbone = make_t5("encoder")
    batch = random_batch(backbone, padded=padded)
    expected = own_logits(backbone, batch)
    assert spread(expected) > 0.01
    torch.testing.assert_close(cut_logits(backbone, batch, depth), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", ["text_to_text", "encoder", "whole words"])
@torch.no_grad()
def test_mt5_makes_what_its_own_classes_make(form: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizers.tokenizer("t5")
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2}
    config = transformers.MT5Config(vocab_size=len(tokenizer), **sizes)
    folder = save(tmp_path, enliven(transformers.MT5ForConditionalGeneration(config)), tokenizer)
    words = ["model.label_words=[yes,yell]"] if form == "whole words" else []
    form = "encoder" if form == "encoder" else "text_to_text"
    backbone = make("mt5", f"model.path={folder}", f"model.form={form}", *words)
    enliven(backbone.network)  # the encoder's head is new
    batch = random_batch(backbone)
    for depth in range(len(backbone.layers) + 1):
        logits = cut_logits(backbone, batch, depth)
        if words:
            torch.testing.assert_close(logits, _word_scores(backbone, batch, ["yes", "yell"]), atol=1e-5, rtol=0)
        else:
            torch.testing.assert_close(logits, own_logits(backbone, batch), atol=1e-5, rtol=0)


def _word_scores(backbone: Any, batch: Any, words: list[str]) -> torch.Tensor:
    """The log-probability of each word and the end token among the words, by the network's own forward pass."""
    rows = [[0, *backbone.tokenizer(word, add_special_tokens=False).input_ids, 1] for word in words]
    shared = next(i for i, tokens in enumerate(zip(*rows, strict=False)) if len(set(tokens)) > 1)
    scores = []
    for row in rows:
        ids = torch.tensor([row[:-1]]).expand(len(batch.input_ids), -1)
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "decoder_input_ids": ids}
        scores.append(backbone.network(**inputs).logits[:, shared - 1, [r[shared] for r in rows]].log_softmax(-1))
    return torch.stack([score[:, i] for i, score in enumerate(scores)], 1)


def test_label_words_are_scored_by_their_first_tokens_in_the_order_given() -> None:
    tokenizer = make_t5().tokenizer
    assert make_t5().label_tokens == tokenizer.convert_tokens_to_ids(["▁n", "▁d"])  # not_duplicate, duplicate
    assert make_t5("text_to_text", "model.label_words=[yes,no]").label_tokens == tokenizer.convert_tokens_to_ids(
        ["▁y", "▁n"]
    )


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_words_that_begin_alike_are_scored_token_by_token(variant: str, padded: bool) -> None:
    """log p(word) is the sum over its tokens of log p(token | those before), given that a word of the list follows."""
    words = ["no", "none", "not one", "yes", "not two"]
    backbone = make("tiny_t5", *VARIANTS[variant])
    backbone.name_labels([words])
    batch = random_batch(backbone, padded=padded)
    network, tokenizer = backbone.network, backbone.tokenizer
    end, start = tokenizer.eos_token_id, network.config.decoder_start_token_id
    paths = [(*tokenizer(word, add_special_tokens=False)["input_ids"], end) for word in words]
    expected = torch.zeros(len(batch.input_ids), len(words))
    for c, path in enumerate(paths):
        for i, token in enumerate(path):
            decoded = torch.tensor([[start, *path[:i]]]).expand(len(batch.input_ids), -1)
            inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
            logits = network(**inputs, decoder_input_ids=decoded).logits[:, -1]
            possible = sorted({other[i] for other in paths if other[:i] == path[:i]})
            expected[:, c] += logits[:, possible].log_softmax(-1)[:, possible.index(token)]
    torch.testing.assert_close(expected.exp().sum(1), torch.ones(len(expected)))
    assert spread(expected) > 0.01
    for depth in (0, 1, 2):
        torch.testing.assert_close(cut_logits(backbone, batch, depth), expected, atol=1e-5, rtol=0)
    assert "decoder.block.0.layer.0.SelfAttention.q" in backbone.linears()  # its queries count from the second step on


@pytest.mark.parametrize("words", [["no", "no"], ["yes", ""]])
def test_label_words_with_the_same_tokens_or_none_are_refused(words: list[str]) -> None:
    with refuses(Code.INVALID_VALUE, key="model.label_words"):
        make("tiny_t5").name_labels([words])


def test_words_must_be_as_many_as_classes_and_numbers_have_none() -> None:
    with refuses(Code.MISMATCH, key="model.label_words"):
        make("tiny_t5", "model.label_words=[yes,no,maybe]")
    with refuses(Code.CONFLICT, key="model.form"):
        make("tiny_t5").name_labels([None])


def test_label_words_of_the_encoder_form_do_not_matter() -> None:
    make_t5("encoder", "model.label_words=[no,none]")


@pytest.mark.parametrize("form", FORMS)
def test_the_template_names_task_and_columns(form: str) -> None:
    columns = [("question1", ["Why?", "{fields}"]), ("question2", ["How?", "{0} {task} {"])]
    texts = ["qqp question1: Why? question2: How?", "qqp question1: {fields} question2: {0} {task} {"]
    assert make_t5(form).render(columns) == (texts, None)


def test_the_template_is_the_users_to_change() -> None:
    backbone = make_t5("text_to_text", "model.template='{task}: {fields} same?'")
    assert backbone.render([("a", ["x"]), ("b", ["y"])]) == (["qqp: a: x b: y same?"], None)
    assert backbone.render([("sentence", ["x"])]) == (["qqp: sentence: x same?"], None)


BACKBONE = make_t5()


@settings(deadline=None)
@given(st.text(), st.text())
def test_any_text_stays_as_it_is(one: str, other: str) -> None:
    rendered, nothing = BACKBONE.render([("question1", [one]), ("question2", [other])])
    assert (rendered, nothing) == ([f"qqp question1: {one} question2: {other}"], None)


ATTENTION = ("q", "k", "v", "o")
ENCODER = [*(f"layer.0.SelfAttention.{p}" for p in ATTENTION), "layer.1.DenseReluDense.wi", "layer.1.DenseReluDense.wo"]
DECODER = [  # its one step attends to itself alone: query and key of the self-attention could learn nothing
    *(f"layer.0.SelfAttention.{p}" for p in ATTENTION if p in "vo"),
    *(f"layer.1.EncDecAttention.{p}" for p in ATTENTION),
    "layer.2.DenseReluDense.wi",
    "layer.2.DenseReluDense.wo",
]


def test_linears_go_through_the_encoder_then_the_decoder() -> None:
    encoder = [f"encoder.block.{i}.{name}" for i in range(2) for name in ENCODER]
    decoder = [f"decoder.block.{i}.{name}" for i in range(2) for name in DECODER]
    backbone = make_t5("text_to_text")
    assert list(backbone.linears()) == [*encoder, *decoder]
    assert [backbone.layer_of(name) for name in (encoder[0], encoder[-1], decoder[0], decoder[-1])] == [0, 1, 2, 3]
    assert list(make_t5("encoder").linears()) == [f"transformer.{name}" for name in encoder]


def test_the_language_model_head_is_neither_adapted_nor_a_head() -> None:
    backbone = make_t5("text_to_text")
    assert backbone.network.lm_head is not None
    assert "lm_head" not in backbone.linears()
    assert backbone.layer_of("lm_head") is None
    assert list(backbone.head_modules) == []
    assert list(make_t5("encoder").head_modules) == ["classifier"]


def test_qv_means_query_and_value_of_every_attention() -> None:
    backbone = make_t5("text_to_text")
    chosen = [name for name in backbone.linears() if re.fullmatch(backbone.query_value, name)]
    assert {name.rpartition(".")[2] for name in chosen} == {"q", "v"}
    # Two in each encoder block; in each decoder block two of the cross-attention, and the self-attention's value: its
    # query has only one position to choose from.
    assert len(chosen) == 2 * (2 + 3)


@pytest.mark.parametrize("form", FORMS)
def test_hash_is_that_of_the_weights_outside_the_head(form: str) -> None:
    backbone, again = make_t5(form), make_t5(form)
    assert backbone.hash() == again.hash()
    for name, p in backbone.network.named_parameters():
        before = backbone.hash()
        p.data.view(-1)[0] += 1.0
        assert (backbone.hash() == before) == name.startswith("classifier.")


def test_hidden_size_is_the_width_of_the_model() -> None:
    assert make_t5().hidden_size == 32
