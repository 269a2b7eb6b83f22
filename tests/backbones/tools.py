"""Shared by the tests of backbones and adapters: lively random weights, batches, and what Hugging Face computes."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from lora_bench.backbones import tiny_tokenizers
from lora_bench.backbones.families import build_model
from lora_bench.backbones.load import load, load_tokenizer
from lora_bench.data.batching import Batch
from tests.helpers import QQP_LABELS, composed

if TYPE_CHECKING:
    from pathlib import Path

    from lora_bench.backbones.base import Backbone
    from lora_bench.backbones.family import Family

FORMS = {
    "bert": ("tiny_bert",),
    "roberta": ("tiny_roberta",),
    "t5": ("tiny_t5",),
    "t5_encoder": ("tiny_t5", "model.form=encoder"),
}


END = "<|endoftext|>"


def byte_tokenizer(**special_tokens: str) -> Any:
    """Return a byte tokenizer without a template, as GPT-2's is, with these special tokens."""
    words = [*special_tokens.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inputs = ["input_ids", "attention_mask"]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=inputs, **special_tokens)


def make(model: str = "tiny_bert", *overrides: str) -> Any:
    """A backbone as the command line would load it, with weights large enough for a mistake to show."""
    settings = model_settings(model, *overrides)
    backbone = load(settings, load_tokenizer(settings), task="qqp", label_names=[QQP_LABELS])
    if settings.random is not None and not settings.path:
        enliven(backbone.network)
    return backbone


@cache
def model_settings(model: str, *overrides: str) -> Family:
    """What the command line makes of `model=… model.key=…`."""
    return build_model(composed(f"model={model}", *overrides).model)


@torch.no_grad()
def enliven(network: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Redraw the weights: as they are made, a random BERT's logits hardly depend on its input."""
    generator = torch.Generator().manual_seed(seed)
    for _, p in sorted(network.named_parameters()):
        noise = torch.randn(p.shape, generator=generator)
        if p.ndim > 1:
            p.copy_(noise * p.shape[-1] ** -0.5)
        else:
            p.add_(noise * 0.1)
    return network


def random_batch(backbone: Backbone, *, padded: bool = True, rows: int = 4, length: int = 11, seed: int = 0) -> Batch:
    """Rows of random tokens; with padding, rows of unlike length of which the first fills the batch."""
    generator = torch.Generator().manual_seed(seed)
    size = len(backbone.tokenizer)
    ids = torch.randint(5, size, (rows, length), generator=generator)
    lengths = torch.full((rows,), length) - (torch.arange(rows) * 2 if padded else 0)
    mask = (torch.arange(length) < lengths[:, None]).long()
    ids = ids.where(mask.bool(), torch.tensor(backbone.tokenizer.pad_token_id))
    types = None
    if "token_type_ids" in backbone.tokenizer.model_input_names:
        types = (torch.arange(length) >= 4).long() * mask
    labels = torch.randint(0, 2, (rows,), generator=generator)
    return Batch(ids, mask, types, labels, full=not padded)


def reference(network: Any, batch: Batch, label_tokens: list[int] | None = None) -> Tensor:
    """The logits (N, 2) of the Hugging Face model itself, through its own forward pass."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if isinstance(network, transformers.T5ForConditionalGeneration | transformers.MT5ForConditionalGeneration):
        start = torch.full((len(batch.input_ids), 1), network.config.decoder_start_token_id)
        return network(**inputs, decoder_input_ids=start).logits[:, 0, label_tokens]
    if isinstance(network, transformers.T5ForTokenClassification | transformers.MT5ForTokenClassification):
        kept = batch.attention_mask[:, :, None]
        return (network(**inputs).logits * kept).sum(1) / kept.sum(1)
    if batch.token_type_ids is not None:
        inputs["token_type_ids"] = batch.token_type_ids
    return network(**inputs).logits


def own_logits(backbone: Any, batch: Batch) -> Tensor:
    """`reference` for a backbone that nothing is attached to."""
    return reference(backbone.network, batch, getattr(backbone, "label_tokens", None))


def cut_logits(backbone: Backbone, batch: Batch, depth: int) -> Tensor:
    """The logits (N, 2) by prefix and suffix."""
    return backbone.suffix(backbone.prefix(batch, depth), batch, depth)


def spread(logits: Tensor) -> float:
    """How much the logits differ from row to row: a comparison of constants would prove nothing."""
    return float(logits.std(0).min())


def held(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, in memory of their own: the file may then be written over."""
    return {name: tensor.clone() for name, tensor in load_file(file).items()}


def save(folder: Path, network: Any, tokenizer: Any) -> Path:
    """A local Hugging Face folder, with the tokenizer's files."""
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_distilbert(folder: Path) -> Path:
    """Save a tiny random DistilBERT, an encoder of the generic family, and return its folder."""
    tokenizer = tiny_tokenizers.tokenizer("bert")
    config = transformers.DistilBertConfig(
        vocab_size=len(tokenizer), dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=160
    )
    return save(folder, enliven(transformers.DistilBertForSequenceClassification(config)), tokenizer)
