"""Special tokens that a text contains are read as any other characters, and those around the texts stay special."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers

from lora_bench.backbones.identity import tokenizer_digests
from lora_bench.data.batching import collate
from lora_bench.data.examples import Examples
from lora_bench.data.tokenization import tokenize
from tests.backbones.architectures import ARCHITECTURES
from tests.backbones.test_decoders import config_of
from tests.backbones.tools import END, byte_tokenizer, make, save

if TYPE_CHECKING:
    from pathlib import Path

COLUMNS = ["question1", "question2"]
MARKED = f'model.template="{END}{{fields}}{END}answer:"'


@pytest.fixture(params=["bert", "roberta", "t5", "joined", "template", "template with special tokens", "bart"])
def backbone(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param in ("bert", "roberta", "t5"):
        return make(f"tiny_{request.param}")
    if request.param == "bart":
        (architecture,) = [architecture for architecture in ARCHITECTURES if architecture.name == "BART"]
        return make("bart", f"model.path={architecture.save(tmp_path)}")
    tokenizer = byte_tokenizer(eos_token=END)
    network = transformers.AutoModelForCausalLM.from_config(config_of("gpt2", tokenizer))
    template = {"joined": ("model.template=null",), "template": ()}.get(request.param, (MARKED,))
    return make("gpt2", f"model.path={save(tmp_path, network, tokenizer)}", *template)


def tokens_of(backbone: Any, first: list[str], second: list[str]) -> Any:
    examples = Examples(np.arange(len(first)), (first, second), None)
    table = tokenize(examples, COLUMNS, backbone, 256, cached=False)
    return collate(table, np.arange(len(first)), int(table.lengths.max()), backbone.tokenizer.pad_token_id)


def test_they_are_read_as_text(backbone: Any) -> None:
    """The row with them has the special tokens of the row without, and each text has its own vectors."""
    tokenizer = backbone.tokenizer
    digests = tokenizer_digests(tokenizer)
    special = [token for token in tokenizer.all_special_tokens if token != tokenizer.unk_token]
    hostile = f"{' '.join(special)} a{'a'.join(special)}a"
    batch = tokens_of(backbone, ["a", hostile, "a"], ["b", "b", hostile])
    ids = torch.tensor(tokenizer.convert_tokens_to_ids(special))
    plain, *others = [row[mask.bool()] for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
    for row in others:
        assert row[torch.isin(row, ids)].tolist() == plain[torch.isin(plain, ids)].tolist()
        assert len(row) > len(plain) + len(hostile) / 2
    if backbone.separates_texts:
        first, second = (mask.sum(1) for mask in backbone.text_masks(batch))
        assert (first[0], second[0]) == (first[2], second[1])
        assert first[1] - first[0] == second[2] - second[0] > len(hostile) / 2
    with torch.no_grad():
        logits = backbone.suffix(backbone.prefix(batch, 0), batch, 0)
    assert torch.isfinite(logits).all()
    assert tokenizer_digests(tokenizer) == digests


@pytest.mark.parametrize("family", ["tiny_bert", "tiny_roberta"])
def test_a_saved_tokenizer_reads_them_so_in_transformers(family: str, tmp_path: Path) -> None:
    backbone = make(family)
    backbone.save_tokenizer(tmp_path)
    pairs = ["a </s> [SEP] b", "<mask>x"], ["[MASK][CLS]", "<s>"]
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = saved(*pairs, padding=True, return_tensors="pt").input_ids
    assert tokens_of(backbone, *pairs).input_ids.tolist() == expected.tolist()
    assert not backbone.tokenizer.split_special_tokens  # the one in use is unchanged


def test_one_that_the_tokenizer_cannot_split_gets_a_space() -> None:
    """It is a piece of the vocabulary, as in SentencePiece models."""
    backbone = make("tiny_t5")
    assert backbone.special_tokens.broken == ("</s>", "<pad>")
    assert backbone.special_tokens.break_in(["a</s><pad>", "a < b"]) == ["a< /s>< pad>", "a < b"]
