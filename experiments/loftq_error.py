#!/usr/bin/env python3
"""Prints a table of what quantising a backbone's frozen linears loses, alone and with LoftQ's correction.

    experiments/loftq_error.py [model=minilm] [model.path=DIR …]

‖W - Q - B A‖ / ‖W‖ in Frobenius norms, over all linears of the layers together. One iteration of LoftQ is the
truncated SVD of what quantising loses. MiniLM takes about two and a half minutes on one core.
"""

from __future__ import annotations

import sys

from hydra import compose, initialize_config_dir

from lora_bench.adapters.lowrank.quantization import loftq, quantize
from lora_bench.backbones.families import build_model
from lora_bench.backbones.load import load, load_tokenizer
from lora_bench.config.compose import register_with_hydra
from lora_bench.config.groups import conf_folder

register_with_hydra()
with initialize_config_dir(str(conf_folder()), version_base="1.3"):
    model = build_model(compose("config", ["model=minilm", *sys.argv[1:]]).model)
linears = load(model, load_tokenizer(model), task="qqp").linears().values()
weights = [linear.weight.detach().double() for linear in linears]
whole = sum(W.square().sum() for W in weights)

print("| kind | rank | quantised alone | LoftQ, 1 iteration | LoftQ, 5 iterations |")
print("| --- | ---: | ---: | ---: | ---: |")
for code in ("int2", "int4", "nf4", "int8"):
    alone = sum((W - quantize(W, code).dequantize()).square().sum() for W in weights)
    for rank in (8, 16, 32):
        lost = [alone]
        for iterations in (1, 5):
            starts = [loftq(W, rank, code, iterations) for W in weights]
            pairs = zip(weights, starts, strict=True)
            lost.append(sum((W - Q.dequantize() - (B @ A).double()).square().sum() for W, (Q, A, B) in pairs))
        print(
            f"| {code} | {rank} | " + " | ".join(f"{(error / whole).sqrt():.4f}" for error in lost) + " |", flush=True
        )
