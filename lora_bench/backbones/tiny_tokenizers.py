"""Character tokenizers for random backbones, built in memory: no file is needed."""

from __future__ import annotations

import string
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lora_bench.errors import Code, UserError

_CHARACTERS = string.ascii_lowercase + string.digits + string.punctuation


def tokenizer(model_type: str) -> Any:
    """Return a tokenizer for a random model of this `model_type`.

    Raises:
        UserError: there is none for this type.
    """
    makers = {"bert": _bert, "roberta": _roberta, "t5": _t5}
    if model_type not in makers:
        raise UserError(
            f"is not one of {', '.join(makers)}",
            key="model.random.model_type",
            value=model_type,
            code=Code.UNKNOWN_CHOICE,
        )
    return makers[model_type]()


def _bert() -> Any:
    """Return a tokenizer of lower-case characters with BERT's template `[CLS] a [SEP] b [SEP]` and token types."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_CHARACTERS, *(f"##{c}" for c in _CHARACTERS)]
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    return _wrap(backend, names, ["input_ids", "token_type_ids", "attention_mask"])


def _roberta() -> Any:
    """Return a tokenizer of single bytes with RoBERTa's template `<s> a </s> </s> b </s>`, without token types."""
    words = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "<mask>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", vocabulary["<s>"]), ("</s>", vocabulary["</s>"])],
    )
    names = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "cls": "<s>", "sep": "</s>", "mask": "<mask>"}
    return _wrap(backend, names, ["input_ids", "attention_mask"])


def _t5() -> Any:
    """Return a tokenizer of single characters with T5's template `a </s>`, for single texts."""
    letters = [*string.ascii_letters, *string.digits, *string.punctuation]
    # A letter that begins a word is a token of its own, so that label words that begin differently score differently.
    words = ["<pad>", "</s>", "<unk>", "▁", *letters, *(f"▁{c}" for c in string.ascii_letters)]
    backend = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=2))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return _wrap(backend, {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"}, ["input_ids", "attention_mask"])


def _wrap(backend: Tokenizer, names: dict[str, str], inputs: list[str]) -> Any:
    """Return the tokenizer of transformers around a backend.

    Args:
        backend: of the tokenizers library.
        names: special tokens by their name (`pad`).
        inputs: names of the model's inputs.
    """
    tokens = {f"{name}_token": token for name, token in names.items()}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=inputs, **tokens)
