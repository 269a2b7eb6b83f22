"""The FLOPs of a training step are, within 2 %, those of a closed formula, for every adapter on every family.

By hand, for N rows of T tokens. A linear (in a, out b) costs 2ab per token that goes through it: forward, once more for
the gradient of its input where something below is trained, and once more where its weight is trained. Attention over T
tokens costs 4T²D forward and twice that backward. BERT's last layer, unless it belongs to the frozen prefix, asks with
the first token alone: there only keys and values are made of all. An adapter of rank r adds 2r(a + b) per token
forward, as much for gradients of what it trains and for its input; what is formed of weights alone does not go with
tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from torch import nn

from lora_bench.adapters.lowrank.linear import LowRank
from lora_bench.adapters.methods.lora_xs import LoRAXSUpdate
from lora_bench.backbones.bert import Bert
from lora_bench.evaluation.cost import FlopModel
from lora_bench.training.dummy_step import dummy_step
from tests.adapters.tools import OWN_METHODS, adapter, in_turn, make, pack, tables, trainer
from tests.backbones.tools import FORMS
from tests.training.tools import prepare

if TYPE_CHECKING:
    from lora_bench.adapters.base import Adapter, Update
    from lora_bench.adapters.pack.pack import Pack

SMALL = {"vera": ("rank=16",), "lora_xs": ("rank=4",)}
UNFIT = {("bitfit", "t5"), ("bitfit", "t5_encoder"), ("head_only", "t5")}  # no biases; no head
D, INNER = 32, 32  # of the tiny backbones: width of the layers and of attention
N, T = 5, 33  # none of the shapes that the model is fitted on


@dataclass(frozen=True)
class Linear:
    """One of the layers' frozen linears."""

    name: str
    module: nn.Linear
    tokens: int
    below: bool
    """Whether something trained lies before its input, so that the gradient goes through."""

    @property
    def product(self) -> int:
        return 2 * self.module.in_features * self.module.out_features * self.tokens


def linears(packed: Pack, method: Adapter) -> list[Linear]:
    linears_of_pack, decoder = [], 0
    for path, layer in packed.backbone.layers:
        decoder += path.startswith("decoder")
        first = path.endswith(".0")
        for name, module in layer.named_modules():
            base = getattr(module, "base", module)
            if not isinstance(base, nn.Linear) or (base is module and name.endswith("base")):
                continue
            full = f"{path}.{name}"
            cross = "EncDecAttention" in full and full.endswith((".k", ".v"))
            seen = T if cross or not path.startswith("decoder") else 1
            seen = 1 if asks_once(packed, path) and not name.endswith((".key", ".value")) else seen
            reads = name.endswith((".query", ".key", ".value", ".q", ".k", ".v")) and "EncDec" not in name
            linears_of_pack.append(Linear(full, base, seen, not (first and reads)))
    if method.trains_backbone:  # the embeddings too
        return [Linear(linear.name, linear.module, linear.tokens, True) for linear in linears_of_pack]
    return linears_of_pack


def asks_once(packed: Pack, path: str) -> bool:
    """Return whether the head reads one position of this layer, and the others are not computed."""
    layers = packed.backbone.layers
    return isinstance(packed.backbone, Bert) and path == layers[-1][0] and packed.depth < len(layers)


def attention(packed: Pack) -> int:
    """Scores and sums of values of one row, forward."""
    total = 0
    for path, _ in packed.backbone.layers:
        seen = 1 if asks_once(packed, path) else T
        total += 4 * INNER * (1 + T) if path.startswith("decoder") else 4 * seen * T * INNER
    return total


def head(form: str) -> tuple[int, int]:
    """The head of one row: forward, and backward with its weights' gradients."""
    if form == "t5":  # two rows of the frozen vocabulary matrix
        return 2 * D * 2, 2 * D * 2
    if form == "t5_encoder":
        return 2 * D * 2, 2 * 2 * D * 2
    dense, out = 2 * D * D, 2 * D * 2
    return dense + out, 2 * (dense + out)


def added(update: Update, linear: Linear) -> tuple[float, float]:
    """Return what an adapter adds per row, and per step whatever the rows."""
    a, b, t = linear.module.in_features, linear.module.out_features, linear.tokens
    if isinstance(update, LowRank):
        r = update.factors()[0].shape[0]
        forward, to_low, to_input = 2 * r * (a + b) * t, 2 * r * b * t, 2 * r * a * t * linear.below
        of_A = 0 if not update.lora_A.requires_grad else 2 * r * a * t
        once = 2 * a * b * r + 2 * r * r * a + 2 * r * r * b if update.magnitude is not None else 0
        return forward + to_low + to_input + of_A + 2 * r * b * t, once
    if isinstance(update, LoRAXSUpdate):
        r = update.rank
        return 2 * r * (a + b + r) * t + 2 * r * b * t + 2 * r * r * t + (2 * r * r + 2 * r * a) * t * linear.below, 0
    if type(update).__name__ == "AdaLoRAUpdate":
        r = len(update.lora_A)  # type: ignore[arg-type]
        return 2 * r * (a + b) * t + 2 * r * b * t * 2 + 2 * r * a * t * (1 + linear.below), 0
    if type(update).__name__ == "VeRAUpdate":
        r = update.rank
        return 2 * r * (a + b) * t + 2 * r * b * t + 2 * r * a * t * linear.below, 0
    if type(update).__name__ == "HiRAUpdate":  # a product as large as the frozen one, with its weight's gradient
        return 2 * a * b * t * (2 + linear.below), 3 * 2 * a * b * update.rank
    if type(update).__name__ == "MiSSUpdate":
        return 2 * update.rank * b * t * (2 + linear.below), 0
    return 0, 0  # BitFit: a sum


def by_formula(packed: Pack, method: Adapter, form: str) -> float:
    every, updates = linears(packed, method), packed.updates[0]
    ahead, back = head(form)
    trains_layers = bool(updates) or method.trains_backbone
    row = sum(linear.product for linear in every) + attention(packed) + ahead + back
    once = 0.0
    if trains_layers:
        row += sum(linear.product * linear.below for linear in every) + 2 * attention(packed)
    else:
        row -= ahead if form == "t5_encoder" else 2 * D * D  # nothing below the head's first product asks
    if method.trains_backbone:
        row += sum(linear.product for linear in every)
        row += 2 * D * 2 if form == "t5" else 0
    for linear in every:
        if linear.name in updates:
            per_row, per_step = added(updates[linear.name], linear)
            row, once = row + per_row, once + per_step
    return N * row + once


@pytest.mark.parametrize(
    ("method", "form"),
    in_turn([(method, form) for method in OWN_METHODS for form in FORMS if (method, form) not in UNFIT]),
)
def test_the_flops_of_a_step_are_those_of_the_formula(method: str, form: str) -> None:
    settings = adapter(method, *SMALL.get(method, ()))
    packed: Any = pack(form, (settings, 0), backbone=make(*FORMS[form]))
    learned, _ = tables(packed.backbone)
    prepare(packed, trainer(), learned)
    measured = FlopModel.measure(lambda rows, length: dummy_step(packed, rows, length))(N, T)
    assert measured == pytest.approx(by_formula(packed, settings, form), rel=0.02)
