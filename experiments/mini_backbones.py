#!/usr/bin/env python3
"""Make a small RoBERTa-type and a small T5-type backbone from a small BERT, for machines without a hub or a GPU.

    experiments/mini_backbones.py OUTPUT TEXT_FILE … [--only roberta_mini] [--steps 500] [--teacher DIR]
                                  [--roberta-tokenizer NAME] [--t5-tokenizer NAME]

OUTPUT gets roberta_mini/ and t5_mini/; set LORA_BENCH_BACKBONES to it. A TEXT_FILE has a text per line. Of a .tsv file
with a header, the columns are read whose name begins with `question`, `sentence` or `text`; labels are not. The teacher
is all-MiniLM-L6 (of the extra `minilm`), unless --teacher names the folder of another BERT. Tokenizers are folders or
names on the hub.

roberta_mini  The teacher's layers, positions and norms. The initial vector of a token is the mean of the teacher's word
              pieces of its text. It is trained to produce the teacher's mean vector and first vector (cosines).
t5_mini       4 encoder and 2 decoder layers, random; token vectors as above. The mean of its encoder is trained to
              produce the teacher's mean vector, and its decoder to fill masked spans (Raffel et al. 2020).

Weights are stored in half precision. They are not roberta-base and t5-base: report their results under their own names.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distillation import SentenceEncoder

BACKBONES = ("roberta_mini", "t5_mini")


def minilm_folder() -> str:
    """Return the folder of MiniLM's weights, which come with the extra `minilm`."""
    from lora_bench.backbones.families import build_model
    from lora_bench.backbones.locate import locate
    from lora_bench.config.compose import compose
    from lora_bench.config.groups import conf_folder

    return locate(build_model(compose(conf_folder(), "config", ["model=minilm", "data=toy"]).model))


def make_backbone(name: str, teacher: SentenceEncoder, texts: list[str], options: argparse.Namespace) -> None:
    """Build, train and save one backbone, and print its similarity to the teacher."""
    import torch
    from distillation import SentenceEncoder, build_roberta, build_t5, distil, similarity, split_texts
    from transformers import AutoTokenizer

    build, tokenizer_name, lr = {
        "roberta_mini": (build_roberta, options.roberta_tokenizer, 1e-4),
        "t5_mini": (build_t5, options.t5_tokenizer, 1e-3),
    }[name]
    train, held_out = split_texts(texts)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
    model = build(teacher, tokenizer)
    student = SentenceEncoder(model.get_encoder() if model.config.is_encoder_decoder else model, tokenizer)
    print(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {len(train)} texts")
    before = similarity(student, teacher, held_out)
    distil(model, student, teacher, train, options.steps, options.batch, lr)
    after = similarity(student, teacher, held_out)
    print(f"  cosine with the teacher on {len(held_out)} other texts: {after:.4f}, {before:.4f} before")
    model.half().save_pretrained(options.output / name)
    tokenizer.save_pretrained(options.output / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, metavar="OUTPUT")
    parser.add_argument("texts", type=Path, nargs="+", metavar="TEXT_FILE")
    parser.add_argument("--only", choices=BACKBONES)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=64, help="texts per step")
    parser.add_argument("--teacher", metavar="DIR")
    parser.add_argument("--roberta-tokenizer", default="FacebookAI/roberta-base", metavar="NAME")
    parser.add_argument("--t5-tokenizer", default="google-t5/t5-base", metavar="NAME")
    options = parser.parse_args()

    from distillation import SentenceEncoder, read_texts, split_texts

    texts = read_texts(options.texts)
    if not split_texts(texts)[0]:
        sys.exit("TEXT_FILE: at least two texts are needed")
    teacher = SentenceEncoder.load_bert(options.teacher or minilm_folder())
    for name in [options.only] if options.only else BACKBONES:
        make_backbone(name, teacher, texts, options)
    print(f"export LORA_BENCH_BACKBONES={options.output.absolute()}")


if __name__ == "__main__":
    main()
