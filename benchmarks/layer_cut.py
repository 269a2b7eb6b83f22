#!/usr/bin/env python3
"""Measure what the cached prefix of the generic family saves: a step with it against one without.

    benchmarks/layer_cut.py distilbert modernbert
    benchmarks/layer_cut.py modernbert --rounds 9 --rows 16 --tokens 64

The networks have the published shapes and random weights, without a download. Steps of LoRA on `top:3` alternate: with
the prefix given, and with the prefix computed. Filling the cache is not counted. Times are of the processor, so that
other programs matter less; set OMP_NUM_THREADS=1, since waiting threads count too. The bound is (prefix + suffix) /
suffix in FLOPs, where a suffix is a step without its prefix.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING, Any

from composition import build_experiment

if TYPE_CHECKING:
    from lora_bench.adapters.pack.pack import Pack
    from lora_bench.data.batching import Batch

SHAPES: dict[str, dict[str, Any]] = {
    "distilbert": {},
    "modernbert": {"vocab_size": 50368},
    "bert": {},
    "gpt2": {},
}
"""What differs from the defaults of transformers, which are the shapes of the published base models."""
FIRST_TOKEN = 1000


def make_pack(model_type: str, layers: str) -> Pack:
    """Return a pack of one LoRA of rank 8 on a random network of this type."""
    import torch
    import transformers

    from lora_bench.adapters.pack.member import Member
    from lora_bench.adapters.pack.pack import Pack
    from lora_bench.backbones import tiny_tokenizers
    from lora_bench.backbones.auto import Auto

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **SHAPES[model_type])
    config.pad_token_id = 0
    network = transformers.AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
    backbone = Auto(network.eval(), tiny_tokenizers.tokenizer("bert"), set())
    adapter = build_experiment(["adapter=lora", f"adapter.layers={layers}", "data=toy"]).adapter
    return Pack(backbone, [Member(adapter, 0)])


def step_seconds(pack: Pack, batch: Batch) -> float:
    """Return the processor's seconds for a forward and backward pass."""
    began = time.process_time()
    pack(batch).square().sum().backward()
    for p in pack.parameters():
        p.grad = None
    return time.process_time() - began


def measure(model_type: str, layers: str, rows: int, tokens: int, rounds: int) -> None:
    """Print the bound, the ratio that was reached and the share of the bound, with the median seconds."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from lora_bench.data.batching import Batch

    pack = make_pack(model_type, layers)
    ids = torch.randint(FIRST_TOKEN, 2 * FIRST_TOKEN, (rows, tokens))
    batch = Batch(ids, torch.ones_like(ids), None, None, full=True)
    with torch.no_grad():
        cached = replace(batch, hidden=pack.prefix(batch))

    flops = []
    for of in (batch, cached):
        with FlopCounterMode(display=False) as counter:
            step_seconds(pack, of)
        flops.append(counter.get_total_flops())
    bound = flops[0] / flops[1]
    seconds = [(step_seconds(pack, batch), step_seconds(pack, cached)) for _ in range(rounds)]
    without, with_cache = (median(times) for times in zip(*seconds, strict=True))
    ratio = median(one / other for one, other in seconds)
    print(
        f"{model_type}: {len(pack.backbone.layers)} layers, {layers}; {without:.3f} s computed, {with_cache:.3f} s "
        f"cached, {ratio:.2f} times as fast; bound {bound:.2f}, reached {ratio / bound:.2f} of it"
    )


def main() -> None:
    """Read the arguments and measure each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=sorted(SHAPES))
    parser.add_argument("--layers", default="top:3")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    for model_type in arguments.models:
        measure(model_type, arguments.layers, arguments.rows, arguments.tokens, arguments.rounds)


if __name__ == "__main__":
    main()
