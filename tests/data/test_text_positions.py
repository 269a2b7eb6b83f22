"""Tokens are assigned to the texts that they come from, whether the tokenizer or a template joins the texts."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import transformers

from lora_bench.data.augmentation import Augmentation
from lora_bench.data.batching import collate
from lora_bench.data.examples import Examples
from lora_bench.data.perturb import choose_transforms
from lora_bench.data.tokenization import tokenize
from tests.backbones.test_decoders import config_of
from tests.backbones.tools import END, byte_tokenizer, make, save, tiny_distilbert

if TYPE_CHECKING:
    from pathlib import Path

FIRST = ["how do i learn go", "", "question2: a"]
SECOND = ["is it so", "why not", "a"]
COLUMNS = ["question1", "question2"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORA_BENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


def backbone_of(kind: str, folder: Path) -> Any:
    """Return T5, a decoder with or without a template, or an encoder of the generic family."""
    if kind == "t5":
        return make("tiny_t5")
    if kind == "encoder":
        return make("deberta", f"model.path={tiny_distilbert(folder)}")
    tokenizer = byte_tokenizer(eos_token=END)
    network = transformers.AutoModelForCausalLM.from_config(config_of("gpt2", tokenizer))
    template = () if kind == "template" else ("model.template=null",)
    return make("gpt2", f"model.path={save(folder, network, tokenizer)}", *template)


@pytest.mark.parametrize("kind", ["t5", "encoder", "template", "joined"])
def test_each_text_has_its_own_tokens(cache: Path, tmp_path: Path, kind: str) -> None:
    backbone = backbone_of(kind, tmp_path / "model")
    examples = Examples(np.arange(3), (FIRST, SECOND), None)
    cold = tokenize(examples, COLUMNS, backbone, 128)
    for table in (cold, tokenize(examples, COLUMNS, backbone, 128)):  # the second is read from the cache
        batch = collate(table, np.arange(3), int(table.lengths.max()) + 1, backbone.tokenizer.pad_token_id)
        for texts, masks in zip((FIRST, SECOND), backbone.text_masks(batch), strict=True):
            tokens = [ids[mask] for ids, mask in zip(batch.input_ids, masks, strict=True)]
            names = ["".join(backbone.tokenizer.convert_ids_to_tokens(row)) for row in tokens]
            decoded = [re.sub("[▁Ġ]|##", "", name) for name in names]
            assert decoded == [text.replace(" ", "") for text in texts]
    assert len(list(cache.iterdir())) == 1
    assert backbone.separates_texts


def test_perturbed_rows_have_positions_of_their_own(cache: Path, tmp_path: Path) -> None:
    backbone = backbone_of("template", tmp_path / "model")
    rows = Examples(np.arange(4), (["a b"] * 4, ["c d e"] * 4), np.array([0, 1, 0, 1]))

    def tokens(examples: Examples) -> Any:
        return tokenize(examples, COLUMNS, backbone, 64, cached=False)

    transforms = choose_transforms("order", "paraphrase", 2, "data.augment", keep_label=True, binary=True)
    table = Augmentation(rows, transforms, 1.0, 1.0, 0, tokens).table(tokens(rows), 0)
    batch = collate(table, np.arange(4), int(table.lengths.max()), backbone.tokenizer.pad_token_id)
    first, second = backbone.text_masks(batch)
    assert first.sum(1).tolist() == [5] * 4 or second.sum(1).tolist() == [3] * 4
    assert (first.sum(1) + second.sum(1)).tolist() == [8] * 4
