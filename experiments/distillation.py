"""Small RoBERTa-type and T5-type backbones that learn the sentence vectors of a small BERT, the teacher."""

from __future__ import annotations

import csv
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

HELD_OUT = 256
"""Texts on which the similarity to the teacher is measured."""
MAX_LENGTH = 64
MASKED_SHARE, SPAN_LENGTH = 0.15, 3
"""Share of the tokens in masked spans, and the length of a span."""
TEACHER_TOKENS = {"bos": "cls", "cls": "cls", "eos": "sep", "sep": "sep", "pad": "pad", "mask": "mask", "unk": "unk"}
"""The teacher's special token for each special token of a backbone."""


def read_texts(files: Sequence[Path]) -> list[str]:
    """Return the distinct texts in the order of the files.

    A .tsv file has a header; its texts are in the columns whose name begins with `question`, `sentence` or `text`. Any
    other file has one text per line.
    """
    unique: dict[str, None] = {}
    for path in files:
        with path.open(encoding="utf-8", newline="") as file:
            if path.suffix != ".tsv":
                unique.update(dict.fromkeys(filter(None, map(str.strip, file))))
                continue
            for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
                unique.update((text, None) for name, text in row.items() if text and is_text_column(name))
    return list(unique)


def is_text_column(name: str) -> bool:
    return name.startswith(("question", "sentence", "text"))


def split_texts(texts: list[str]) -> tuple[list[str], list[str]]:
    """Return the texts for training and those on which the result is measured."""
    held_out = texts[:: max(2, len(texts) // HELD_OUT)]
    return sorted(set(texts) - set(held_out)), held_out


@dataclass
class SentenceEncoder:
    """A network's encoder with its tokenizer."""

    encoder: Any
    tokenizer: Any

    @classmethod
    def load_bert(cls, folder: str) -> SentenceEncoder:
        bert = transformers.BertModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False).eval()
        return cls(bert, transformers.AutoTokenizer.from_pretrained(folder))

    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Return the mean over the tokens and the vector of the first token, (B, D) each."""
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
        ids, mask = tokens["input_ids"], tokens["attention_mask"]  # (B, T) each
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state  # (B, T, D)
        mask = mask[:, :, None]
        return (hidden * mask).sum(1) / mask.sum(1), hidden[:, 0]


def token_vectors(teacher: SentenceEncoder, tokenizer: Any) -> Tensor:
    """Return the initial vector of each token (V, D): the mean of the teacher's word pieces of its text."""
    vectors = teacher.encoder.get_input_embeddings().weight.detach()
    unknown = teacher.tokenizer.unk_token_id
    pieces = teacher.tokenizer([tokenizer.decode([i]).strip() for i in range(len(tokenizer))], add_special_tokens=False)
    ids = [token_ids or [unknown] for token_ids in pieces["input_ids"]]
    for name, teacher_name in TEACHER_TOKENS.items():
        if (token := getattr(tokenizer, f"{name}_token_id", None)) is not None:
            ids[token] = [getattr(teacher.tokenizer, f"{teacher_name}_token_id")]
    offsets = torch.tensor([0, *map(len, ids[:-1])]).cumsum(0)
    return F.embedding_bag(torch.tensor([i for tokens in ids for i in tokens]), vectors, offsets, mode="mean")


def build_roberta(teacher: SentenceEncoder, tokenizer: Any) -> Any:
    """Return a RoBERTa with the teacher's layers, positions and norms, and token vectors made from the teacher's."""
    bert = teacher.encoder
    shared = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act")
    first_position = tokenizer.pad_token_id + 1  # RoBERTa counts positions from here
    config = transformers.RobertaConfig(
        **{name: getattr(bert.config, name) for name in shared},
        layer_norm_eps=bert.config.layer_norm_eps,
        vocab_size=len(tokenizer),
        max_position_embeddings=bert.config.max_position_embeddings + first_position,
        type_vocab_size=1,
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")},
    )
    model = transformers.RobertaModel(config, add_pooling_layer=False)
    model.encoder.load_state_dict(bert.encoder.state_dict())
    embeddings = model.embeddings
    embeddings.LayerNorm.load_state_dict(bert.embeddings.LayerNorm.state_dict())
    with torch.no_grad():
        embeddings.word_embeddings.weight.copy_(token_vectors(teacher, tokenizer))
        embeddings.position_embeddings.weight[first_position:] = bert.embeddings.position_embeddings.weight
        embeddings.token_type_embeddings.weight.copy_(bert.embeddings.token_type_embeddings.weight[:1])
    return model


def build_t5(teacher: SentenceEncoder, tokenizer: Any) -> Any:
    """Return a random T5 of 4 encoder and 2 decoder layers, with token vectors made from the teacher's."""
    if tokenizer.convert_tokens_to_ids("<extra_id_0>") in (None, tokenizer.unk_token_id):
        sys.exit("--t5-tokenizer: the tokenizer has no <extra_id_0>, which stands for a masked span")
    width = teacher.encoder.config.hidden_size
    config = transformers.T5Config(
        vocab_size=-(-len(tokenizer) // 128) * 128,
        d_model=width,
        d_ff=4 * width,
        num_layers=4,
        num_decoder_layers=2,
        num_heads=max(1, width // 64),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    model = transformers.T5ForConditionalGeneration(config)
    vectors = token_vectors(teacher, tokenizer)
    with torch.no_grad():
        model.shared.weight[: len(vectors)] = vectors / vectors.std()  # T5 initialises its own with a deviation of 1
    return model


def mask_spans(ids: list[int], sentinels: list[int], generator: torch.Generator) -> tuple[list[int], list[int]]:
    """Return the tokens with a sentinel in place of each masked span, and the target: each sentinel and its span."""
    count = max(1, round(len(ids) * MASKED_SHARE / SPAN_LENGTH))
    stride = SPAN_LENGTH + 1  # at least one token between two spans
    starts = torch.randperm(max(1, len(ids) // stride), generator=generator)
    starts = starts[: min(count, len(sentinels))].sort().values
    masked, target, end = [], [], 0
    for sentinel, start in zip(sentinels, (starts * stride).tolist(), strict=False):
        masked += [*ids[end:start], sentinel]
        target += [sentinel, *ids[start : start + SPAN_LENGTH]]
        end = start + SPAN_LENGTH
    return masked + ids[end:], target


def span_loss(model: Any, tokenizer: Any, texts: list[str], generator: torch.Generator) -> Tensor:
    """Return the loss of filling masked spans (Raffel et al. 2020)."""
    sentinels = [tokenizer.convert_tokens_to_ids(f"<extra_id_{i}>") for i in range(10)]
    sentinels = [sentinel for sentinel in sentinels if sentinel not in (None, tokenizer.unk_token_id)]
    tokens = tokenizer(texts, add_special_tokens=False, truncation=True, max_length=MAX_LENGTH)["input_ids"]
    pairs = [mask_spans(ids, sentinels, generator) for ids in tokens]
    inputs, targets = (
        [torch.tensor([*ids, tokenizer.eos_token_id]) for ids in side] for side in zip(*pairs, strict=True)
    )
    padding = tokenizer.pad_token_id
    input_ids = nn.utils.rnn.pad_sequence(inputs, batch_first=True, padding_value=padding)
    labels = nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-100)
    loss: Tensor = model(input_ids=input_ids, attention_mask=(input_ids != padding).long(), labels=labels).loss
    return loss


def similarity(student: SentenceEncoder, teacher: SentenceEncoder, texts: list[str]) -> float:
    """Return the mean cosine of the mean vectors of student and teacher."""
    student.encoder.eval()
    with torch.no_grad():
        cosines = [F.cosine_similarity(student.encode([text])[0], teacher.encode([text])[0]) for text in texts]
    return torch.cat(cosines).mean().item()


def distil(
    model: Any, student: SentenceEncoder, teacher: SentenceEncoder, texts: list[str], steps: int, batch: int, lr: float
) -> None:
    """Train the student to produce the teacher's vectors; a model with a decoder also learns to fill spans.

    Args:
        model: the network of the student, decoder included.
        student: its encoder.
        teacher: of the same width.
        texts: from which each step draws a batch.
        steps: optimizer steps.
        batch: texts per step.
        lr: the largest learning rate, after a warm-up over 5 % of the steps.
    """
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, steps // 20, steps)
    has_decoder = model.config.is_encoder_decoder
    model.train()
    for step in range(1, steps + 1):
        drawn = [texts[i] for i in torch.randint(len(texts), (batch,), generator=generator).tolist()]
        with torch.no_grad():
            targets = teacher.encode(drawn)
        pairs = list(zip(student.encode(drawn), targets, strict=True))
        if has_decoder:
            pairs = pairs[:1]  # T5 has no token for the whole text
        loss = torch.stack([(1 - F.cosine_similarity(vector, target)).mean() for vector, target in pairs]).sum()
        if has_decoder:
            loss = loss + span_loss(model, student.tokenizer, drawn, generator)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 10) == 0:
            print(f"  step {step}/{steps}  loss {loss.item():.4f}", flush=True)
