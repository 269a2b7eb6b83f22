#!/usr/bin/env python3
"""Print a table of what quantising a backbone's frozen linears loses, with and without LoftQ's correction.

    experiments/loftq_error.py [model=minilm] [model.path=DIR …]

The error is ‖W - Q - B A‖ / ‖W‖ in Frobenius norms, over all linears of the layers together. One iteration of LoftQ is
the truncated SVD of the quantisation error. MiniLM takes about two and a half minutes on one core.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

QUANT_TYPES = ("int2", "int4", "nf4", "int8")
RANKS = (8, 16, 32)
ITERATIONS = (1, 5)


def load_weights(overrides: list[str]) -> list[Tensor]:
    """Return the weight of every linear of the chosen backbone's layers, (out, in) in fp64."""
    from lora_bench.backbones.families import build_model
    from lora_bench.backbones.load import load, load_tokenizer
    from lora_bench.config.compose import compose
    from lora_bench.config.groups import conf_folder

    chosen = overrides if any(text.startswith("model=") for text in overrides) else ["model=minilm", *overrides]
    model = build_model(compose(conf_folder(), "config", [*chosen, "data=toy"]).model)
    linears = load(model, load_tokenizer(model), task="qqp").linears().values()
    return [linear.weight.detach().double() for linear in linears]


def quantisation_error(weights: list[Tensor], quant_type: str) -> float:
    """Return the squared error of quantising alone, over all weights."""
    from lora_bench.backbones.quantization import quantize

    return sum(float((W - quantize(W, quant_type).dequantize()).square().sum()) for W in weights)


def loftq_error(weights: list[Tensor], quant_type: str, rank: int, iterations: int) -> float:
    """Return the squared error of Q + B A after LoftQ's iterations, over all weights."""
    from lora_bench.adapters.lowrank.loftq import loftq

    error = 0.0
    for W in weights:
        Q, A, B = loftq(W, rank, quant_type, iterations)
        error += float((W - Q.dequantize() - (B @ A).double()).square().sum())
    return error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="the model; model=minilm by default")
    options = parser.parse_args()
    weights = load_weights(options.overrides)
    norm = sum(float(W.square().sum()) for W in weights)
    print("| type | rank | quantised alone | LoftQ, 1 iteration | LoftQ, 5 iterations |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for quant_type in QUANT_TYPES:
        without = quantisation_error(weights, quant_type)
        for rank in RANKS:
            errors = [without, *(loftq_error(weights, quant_type, rank, iterations) for iterations in ITERATIONS)]
            cells = [f"{(error / norm) ** 0.5:.4f}" for error in errors]
            print(f"| {quant_type} | {rank} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
