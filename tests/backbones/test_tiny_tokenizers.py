"""Random backbones for tests: tokenizers of the three kinds, and one network whatever the global random state."""

from __future__ import annotations

import pytest
import torch

from lora_bench.backbones import tiny_tokenizers
from lora_bench.backbones.families import build_model
from lora_bench.backbones.load import load, load_tokenizer
from lora_bench.errors import Code
from tests.command_line import refuses
from tests.helpers import TINY, composed


@pytest.mark.parametrize(
    ("model_type", "tokens", "types"),
    [
        ("bert", ["[CLS]", "a", "##b", "[SEP]", "c", "?", "[SEP]"], [0, 0, 0, 0, 1, 1, 1]),
        ("roberta", ["<s>", "a", "b", "</s>", "</s>", "c", "?", "</s>"], [0] * 8),
    ],
)
def test_pairs_get_the_special_tokens_of_their_family(model_type: str, tokens: list[str], types: list[int]) -> None:
    tokenizer = tiny_tokenizers.tokenizer(model_type)
    encoded = tokenizer.backend_tokenizer.encode("ab", "c?")
    assert encoded.tokens == tokens
    assert encoded.type_ids == types


def test_t5_reads_one_text_with_its_end() -> None:
    encoded = tiny_tokenizers.tokenizer("t5").backend_tokenizer.encode("ab c?")
    assert encoded.tokens == ["▁a", "b", "▁c", "?", "</s>"]


@pytest.mark.parametrize("model_type", ["bert", "roberta", "t5"])
def test_every_tokenizer_is_fast_pads_and_reads_any_text(model_type: str) -> None:
    tokenizer = tiny_tokenizers.tokenizer(model_type)
    assert tokenizer.is_fast
    assert tokenizer.pad_token_id is not None
    ids = tokenizer.backend_tokenizer.encode("漢 \x00 {é}").ids
    assert ids
    assert max(ids) < len(tokenizer)


def test_an_unknown_kind_is_refused() -> None:
    with refuses(Code.UNKNOWN_CHOICE, key="model.random.model_type") as caught:
        tiny_tokenizers.tokenizer("gpt2")
    assert caught.value.value == "gpt2"
    assert all(choice in caught.value.reason for choice in ("bert", "roberta", "t5"))


@pytest.mark.parametrize("model", TINY)
def test_the_network_is_the_same_in_every_run_and_draws_from_no_global_stream(model: str) -> None:
    settings = build_model(composed(f"model={model}").model)
    tokenizer = load_tokenizer(settings)
    hashes = set()
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        hashes.add(load(settings, tokenizer, task="qqp").hash())
        assert torch.equal(torch.get_rng_state(), before)
    assert len(hashes) == 1


@pytest.mark.parametrize("model", TINY)
def test_the_network_is_ready_for_use(model: str) -> None:
    settings = build_model(composed(f"model={model}").model)
    backbone = load(settings, load_tokenizer(settings), task="qqp")
    assert not any(module.training for module in backbone.network.modules())
    assert {p.dtype for p in backbone.network.parameters()} == {torch.float32}
    assert backbone.network.get_input_embeddings().num_embeddings == len(backbone.tokenizer)
