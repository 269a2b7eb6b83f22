#!/usr/bin/env python3
"""Makes a small RoBERTa-type and a small T5-type backbone from a small BERT, for machines without a hub or a GPU.

    experiments/mini_backbones.py OUTPUT TEXT_FILE … [--only roberta_mini] [--steps 500] [--teacher DIR]
                           [--roberta-tokenizer PLACE] [--t5-tokenizer PLACE]

OUTPUT is what LORA_BENCH_BACKBONES then names: it gets roberta_mini/ and t5_mini/. A TEXT_FILE has a text a line; of a
.tsv file with a header, all columns are read whose name begins with `question`, `sentence` or `text`. No label is. The
teacher is all-MiniLM-L6 (of the extra `minilm`), unless --teacher names the folder of another BERT. Tokenizers are
folders or names on the hub.

roberta_mini  The teacher's layers, positions and norms; each token begins as the mean of the teacher's word pieces of
              its text. Then trained to give the teacher's mean vector and its first one (cosines).
t5_mini       4 encoder and 2 decoder layers, random; tokens as before. Then trained to give the teacher's mean vector
              from the mean of the encoder, and with the decoder to fill spans left out (Raffel et al. 2020).

Stored in half precision. They are not roberta-base and t5-base: report what they do under their own names.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

HELD_OUT = 256  # texts that show how near the teacher a backbone is
LENGTH, LEFT_OUT, SPAN = 64, 0.15, 3  # tokens at most; share of them in spans left out, and a span's mean length
TEACHERS_NAMES = {"bos": "cls", "cls": "cls", "eos": "sep", "sep": "sep", "pad": "pad", "mask": "mask", "unk": "unk"}


def read_texts(files: list[Path]) -> list[str]:
    """Each once, in the order of the files."""
    unique: dict[str, None] = {}
    for path in files:
        with path.open(encoding="utf-8", newline="") as file:
            if path.suffix != ".tsv":
                unique.update(dict.fromkeys(filter(None, map(str.strip, file))))
                continue
            for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
                unique.update((text, None) for name, text in row.items() if text and _is_text(name))
    return list(unique)


def _is_text(column: str) -> bool:
    return column.startswith(("question", "sentence", "text"))


class Reader:
    """A network's encoder with its tokenizer."""

    def __init__(self, encoder: nn.Module, tokenizer: Any) -> None:
        self.encoder, self.tokenizer = encoder, tokenizer

    def tokens(self, texts: list[str]) -> dict[str, Tensor]:
        read = self.tokenizer(texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
        return {"input_ids": read["input_ids"], "attention_mask": read["attention_mask"]}  # (B, T) each

    def vectors(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """The mean over tokens, and the first token's: (B, D) each."""
        tokens = self.tokens(texts)
        hidden = self.encoder(**tokens).last_hidden_state  # (B, T, D)
        mask = tokens["attention_mask"][:, :, None]
        return (hidden * mask).sum(1) / mask.sum(1), hidden[:, 0]


def token_vectors(teacher: Reader, tokenizer: Any) -> Tensor:
    """Return the initial vector of each token (V, D): the mean of the teacher's word pieces of its text."""
    known = teacher.encoder.get_input_embeddings().weight.detach()
    unknown = teacher.tokenizer.unk_token_id
    pieces = teacher.tokenizer([tokenizer.decode([i]).strip() for i in range(len(tokenizer))], add_special_tokens=False)
    ids = [token_ids or [unknown] for token_ids in pieces["input_ids"]]
    for name, teachers in TEACHERS_NAMES.items():
        if (token := getattr(tokenizer, f"{name}_token_id", None)) is not None:
            ids[token] = [getattr(teacher.tokenizer, f"{teachers}_token_id")]
    offsets = torch.tensor([0, *map(len, ids[:-1])]).cumsum(0)
    return F.embedding_bag(torch.tensor([i for tokens in ids for i in tokens]), known, offsets, mode="mean")


def make_roberta(teacher: Reader, tokenizer: Any) -> Any:
    its = teacher.encoder.config
    shared = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act")
    config = transformers.RobertaConfig(
        **{name: getattr(its, name) for name in shared},
        layer_norm_eps=its.layer_norm_eps,
        vocab_size=len(tokenizer),
        max_position_embeddings=its.max_position_embeddings + tokenizer.pad_token_id + 1,  # where RoBERTa counts from
        type_vocab_size=1,
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")},
    )
    model = transformers.RobertaModel(config, add_pooling_layer=False)
    model.encoder.load_state_dict(teacher.encoder.encoder.state_dict())
    embeddings, theirs = model.embeddings, teacher.encoder.embeddings
    embeddings.LayerNorm.load_state_dict(theirs.LayerNorm.state_dict())
    with torch.no_grad():
        embeddings.word_embeddings.weight.copy_(token_vectors(teacher, tokenizer))
        embeddings.position_embeddings.weight[tokenizer.pad_token_id + 1 :] = theirs.position_embeddings.weight
        embeddings.token_type_embeddings.weight.copy_(theirs.token_type_embeddings.weight[:1])
    return model


def make_t5(teacher: Reader, tokenizer: Any) -> Any:
    if tokenizer.convert_tokens_to_ids("<extra_id_0>") in (None, tokenizer.unk_token_id):
        sys.exit("the tokenizer of T5 has no <extra_id_0>, which stands for a span left out")
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
        model.shared.weight[: len(vectors)] = vectors / vectors.std()  # T5's own begin with a deviation of 1
    return model


def with_spans_left_out(ids: list[int], marks: list[int], draw: torch.Generator) -> tuple[list[int], list[int]]:
    """The tokens with a mark in place of each span, and what is to be answered: each mark and its span."""
    count = max(1, round(len(ids) * LEFT_OUT / SPAN))
    starts = torch.randperm(max(1, len(ids) // (SPAN + 1)), generator=draw)[: min(count, len(marks))].sort().values
    shortened, answer, end = [], [], 0
    for mark, start in zip(marks, (starts * (SPAN + 1)).tolist(), strict=False):  # a token at least between two spans
        shortened += [*ids[end:start], mark]
        answer += [mark, *ids[start : start + SPAN]]
        end = start + SPAN
    return shortened + ids[end:], answer


def filling_loss(model: Any, tokenizer: Any, texts: list[str], draw: torch.Generator) -> Tensor:
    marks = [tokenizer.convert_tokens_to_ids(f"<extra_id_{i}>") for i in range(10)]
    marks = [mark for mark in marks if mark not in (None, tokenizer.unk_token_id)]
    read = tokenizer(texts, add_special_tokens=False, truncation=True, max_length=LENGTH)["input_ids"]
    pairs = [with_spans_left_out(ids, marks, draw) for ids in read]
    rows = [[torch.tensor([*ids, tokenizer.eos_token_id]) for ids in side] for side in zip(*pairs, strict=True)]
    seen = nn.utils.rnn.pad_sequence(rows[0], batch_first=True, padding_value=tokenizer.pad_token_id)
    answers = nn.utils.rnn.pad_sequence(rows[1], batch_first=True, padding_value=-100)
    return model(input_ids=seen, attention_mask=(seen != tokenizer.pad_token_id).long(), labels=answers).loss


def nearness(student: Reader, teacher: Reader, texts: list[str]) -> float:
    """Mean cosine of their mean vectors."""
    student.encoder.eval()
    with torch.no_grad():
        cosines = [F.cosine_similarity(student.vectors([t])[0], teacher.vectors([t])[0]) for t in texts]
    return torch.cat(cosines).mean().item()


def train(model: Any, student: Reader, teacher: Reader, texts: list[str], steps: int, batch: int, lr: float) -> None:
    """Towards the teacher's vectors; where there is a decoder, also to fill spans."""
    draw = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, steps // 20, steps)
    model.train()
    for step in range(1, steps + 1):
        chosen = [texts[i] for i in torch.randint(len(texts), (batch,), generator=draw).tolist()]
        with torch.no_grad():
            targets = teacher.vectors(chosen)
        vectors = student.vectors(chosen)
        fills = model.config.is_encoder_decoder
        pairs = list(zip(vectors, targets, strict=True))[: 1 if fills else 2]  # T5 has no token for the whole text
        loss = sum((1 - F.cosine_similarity(vector, target)).mean() for vector, target in pairs)
        if fills:
            loss = loss + filling_loss(model, student.tokenizer, chosen, draw)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 10) == 0:
            print(f"  step {step}/{steps}  loss {loss.item():.4f}", flush=True)


def minilm() -> str:
    from lora_bench.backbones.families import build_model
    from lora_bench.backbones.locate import locate
    from lora_bench.config.compose import compose
    from lora_bench.config.groups import conf_folder

    return locate(build_model(compose(conf_folder(), "config", ["model=minilm", "data=toy"]).model))


BACKBONES = {"roberta_mini": (make_roberta, "roberta_tokenizer", 1e-4), "t5_mini": (make_t5, "t5_tokenizer", 1e-3)}
"""By name: the function that builds it, the option that names its tokenizer, and the learning rate."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--only", choices=BACKBONES)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--teacher")
    parser.add_argument("--roberta-tokenizer", default="FacebookAI/roberta-base")
    parser.add_argument("--t5-tokenizer", default="google-t5/t5-base")
    options = parser.parse_args()
    texts = read_texts(options.texts)
    held_out = texts[:: max(2, len(texts) // HELD_OUT)]
    seen = sorted(set(texts) - set(held_out))
    if not seen:
        sys.exit("two texts at least are needed")
    folder = options.teacher or minilm()
    bert = transformers.BertModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False).eval()
    teacher = Reader(bert, transformers.AutoTokenizer.from_pretrained(folder))
    for name in [options.only] if options.only else BACKBONES:
        make, whose, lr = BACKBONES[name]
        torch.manual_seed(0)
        tokenizer = transformers.AutoTokenizer.from_pretrained(getattr(options, whose))
        model = make(teacher, tokenizer)
        student = Reader(model.get_encoder() if model.config.is_encoder_decoder else model, tokenizer)
        print(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {len(seen)} texts")
        before = nearness(student, teacher, held_out)
        train(model, student, teacher, seen, options.steps, options.batch, lr)
        after = nearness(student, teacher, held_out)
        print(f"  cosine with the teacher on {len(held_out)} other texts: {after:.4f}, {before:.4f} before")
        model.half().save_pretrained(options.output / name)
        tokenizer.save_pretrained(options.output / name)
    print(f"export LORA_BENCH_BACKBONES={options.output.absolute()}")


if __name__ == "__main__":
    main()
