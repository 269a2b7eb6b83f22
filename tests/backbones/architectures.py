"""Tiny random models of 27 architectures, as local folders: for tests and for `scripts/architectures.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import transformers

from lora_bench.backbones import tiny_tokenizers
from tests.backbones.tools import END, byte_tokenizer, enliven

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

LENGTH = 256
"""Tokens that every model takes: the texts of `data=toy` are shorter, in characters."""


@dataclass(frozen=True)
class Architecture:
    """A tiny random model of an architecture, and the options of the command line that load it."""

    name: str
    """As transformers writes it."""
    model_type: str
    sizes: Mapping[str, Any]
    """Settings of its config."""
    tokenizer: str = "bert"
    """The tokenizer that is written beside it: `bert`, `roberta`, `t5`, or `bytes` (of a decoder)."""
    choice: str = "auto"
    """The option of the group `model`."""
    overrides: tuple[str, ...] = ()
    """Further settings."""
    auto_class: str = "AutoModelForSequenceClassification"
    """The class of transformers whose checkpoint is written."""
    answers_in_words: bool = field(default=False)
    """Whether the logits are the scores of label words, and there is no head."""

    def save(self, folder: Path) -> Path:
        """Write the model, with lively weights, and its tokenizer to a folder, and return the folder."""
        of_decoder = self.tokenizer == "bytes"
        tokenizer = byte_tokenizer(eos_token=END) if of_decoder else tiny_tokenizers.tokenizer(self.tokenizer)
        ids = {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in ("pad", "bos", "eos")}
        if of_decoder:  # decoders are published without a padding token
            ids["bos_token_id"] = ids["eos_token_id"]
        settings = {"vocab_size": len(tokenizer), **ids, **self.sizes}
        config = transformers.AutoConfig.for_model(self.model_type, **settings)
        network = getattr(transformers, self.auto_class).from_config(config)
        enliven(network).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder


_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": LENGTH + 2,
}
_DECODER = {**_SIZES, "num_key_value_heads": 1, "head_dim": 16}
_DISTILBERT = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": LENGTH}
_DEBERTA = {
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "share_att_key": True,
    "position_buckets": 16,
    "norm_rel_ebd": "layer_norm",
    "type_vocab_size": 0,
}
_BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": LENGTH,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
    "num_labels": 2,
}
_T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
_GATED = {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": LENGTH}
_OPT = {**_SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32}
_MODERNBERT = {
    **_SIZES,
    "global_attn_every_n_layers": 2,
    "local_attention": 16,
    "reference_compile": False,
    "cls_token_id": 2,
    "sep_token_id": 3,
}
_FUNNEL = {"block_sizes": [1, 1], "d_model": 32, "n_head": 2, "d_head": 16, "d_inner": 64}

_CAUSAL = "AutoModelForCausalLM"
_SEQ2SEQ = "AutoModelForSeq2SeqLM"
# The template ends in a space, so that the words begin with different bytes.
_WORDS = ("model.form=text_to_text", 'model.template="{fields} answer: "')

ARCHITECTURES = [
    Architecture("BERT", "bert", _SIZES, choice="bert"),
    Architecture("RoBERTa", "roberta", _SIZES, "roberta", "roberta"),
    Architecture("XLM-RoBERTa", "xlm-roberta", _SIZES, "roberta", "xlm_roberta"),
    Architecture("DistilBERT", "distilbert", _DISTILBERT, choice="distilbert"),
    Architecture("ELECTRA", "electra", {**_SIZES, "embedding_size": 16}, choice="electra"),
    Architecture("ALBERT", "albert", {**_SIZES, "embedding_size": 16}, choice="albert"),
    Architecture("MPNet", "mpnet", _SIZES, "roberta", "mpnet"),
    Architecture("DeBERTa-v2", "deberta-v2", {**_SIZES, **_DEBERTA}, choice="deberta"),
    Architecture("ModernBERT", "modernbert", _MODERNBERT, choice="modernbert"),
    Architecture("BART", "bart", _BART, "roberta", "bart"),
    Architecture("Longformer", "longformer", {**_SIZES, "attention_window": 16}, "roberta"),
    Architecture("Funnel", "funnel", _FUNNEL),
    Architecture("RoFormer", "roformer", {**_SIZES, "embedding_size": 32}),
    Architecture("ERNIE", "ernie", _SIZES),
    Architecture("T5, text to text", "t5", _T5, "t5", "t5", (), _SEQ2SEQ, True),
    Architecture("T5, encoder", "t5", _T5, "t5", "t5", ("model.form=encoder",), _SEQ2SEQ),
    Architecture("T5 v1.1 (FLAN), text to text", "t5", _GATED, "t5", "flan_t5", (), _SEQ2SEQ, True),
    Architecture("mT5, text to text", "mt5", _GATED, "t5", "mt5", (), _SEQ2SEQ, True),
    Architecture("Llama", "llama", _DECODER, "bytes", "llama", (), _CAUSAL),
    Architecture("Llama, text to text", "llama", _DECODER, "bytes", "llama", _WORDS, _CAUSAL, True),
    Architecture("Qwen2", "qwen2", _DECODER, "bytes", "qwen", (), _CAUSAL),
    Architecture("Qwen3", "qwen3", _DECODER, "bytes", "qwen", (), _CAUSAL),
    Architecture("Gemma 3", "gemma3_text", _DECODER, "bytes", "gemma", (), _CAUSAL),
    Architecture("Gemma 3, text to text", "gemma3_text", _DECODER, "bytes", "gemma", _WORDS, _CAUSAL, True),
    Architecture("Mistral", "mistral", _DECODER, "bytes", "mistral", (), _CAUSAL),
    Architecture("Phi", "phi", _SIZES, "bytes", "phi", (), _CAUSAL),
    Architecture("GPT-2", "gpt2", _GPT2, "bytes", "gpt2", (), _CAUSAL),
    Architecture("GPT-2, text to text", "gpt2", _GPT2, "bytes", "gpt2", _WORDS, _CAUSAL, True),
    Architecture("OPT", "opt", _OPT, "bytes", "opt", (), _CAUSAL),
    Architecture("GPT-NeoX", "gpt_neox", _SIZES, "bytes", "auto", (), _CAUSAL),
    Architecture("SmolLM3", "smollm3", _DECODER, "bytes", "smollm", (), _CAUSAL),
]
"""Every architecture that `scripts/architectures.py` tries."""
