"""An adapter that peft made, on one of our backbones.

LORA, ADALORA and VERA all add a low-rank product to a frozen weight, so each linear's tensors are folded into one
`LowRank`:

    LORA       s B A,  s = alpha / r or alpha / √r;  with DoRA's magnitude around it
    ADALORA    s P diag(E) Q,  s = alpha / (init_r + 1e-5)
    VERA       diag(b) B diag(d) A,  with A and B shared by all linears

What neither the folder nor the backbone's checkpoint holds would be random, so it is refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_bench.adapters.base import Adapter, Update
from lora_bench.adapters.lowrank import init
from lora_bench.adapters.lowrank.linear import LowRank
from lora_bench.adapters.pack.member import Member
from lora_bench.adapters.pack.pack import Pack
from lora_bench.adapters.patterns import limited_matching
from lora_bench.adapters.peft import files
from lora_bench.adapters.peft.config import FILE as CONFIG_FILE
from lora_bench.adapters.peft.config import SUBTRACTED_STARTS, PeftConfig, is_rank
from lora_bench.backbones.fused_linear import LinearRows
from lora_bench.errors import Code, UserError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lora_bench.backbones.base import Backbone

    Linears = dict[str, nn.Linear]
    Tensors = dict[str, Tensor]
    Shapes = dict[str, tuple[int, ...]]

PREFIX = files.PREFIX
MODEL = f"{PREFIX}model."
"""What stands before the name that a module has in the Hugging Face model."""


def attach(config: PeftConfig, backbone: Backbone) -> Pack:
    """Build a pack of one that computes what PEFT's model computes; it is attached to the backbone's network.

    The saved head is copied into the member's head. Updates of linears in the head are merged into it.

    Args:
        config: with the folder that holds the tensors.
        backbone: where it is to run, in fp32.

    Raises:
        UserError: the adapter is not one of this backbone, or its file is absent, damaged or does not fit.
    """
    task = config.values.get("task_type")
    if task not in (None, backbone.peft_task):
        network = type(backbone.network).__name__
        raise config.refusal("task_type", task, f"is not {backbone.peft_task}, as which a {network} is used here")
    with limited_matching("adapter", file=config.folder / CONFIG_FILE):
        linears = _linears(config, backbone)
        whole = _saved_head(config, backbone)
        method = _METHODS[config.peft_type](config, linears)
    path = config.folder / files.TENSORS
    tensors = files.read(path)
    files.refuse_misfits(path, tensors, {name: tuple(p.shape) for name, p in whole.items()} | method.shapes())
    tensors = {name: tensor.float() for name, tensor in tensors.items()}

    start = config.values.get("init_lora_weights")
    updates = {name: _low_rank(linear, method.product(name, tensors), start) for name, linear in linears.items()}
    in_layers = {name: update for name, update in updates.items() if backbone.layer_of(name) is not None}
    pack = Pack(backbone, [Member(_Imported(prebuilt=in_layers), seed=0)])
    head = pack.head_parameters(0)
    with torch.no_grad():
        for name in whole:
            head[name.removeprefix(MODEL)].copy_(tensors[name])
        for name in updates.keys() - in_layers.keys():  # linears of the head: it belongs to this member alone
            weight = head[f"{name}.weight"]
            weight.copy_(updates[name].merge(weight, None)[0])
    return pack


@dataclass(frozen=True, kw_only=True)
class _Imported(Adapter):
    """The method of a member whose updates are built already."""

    method: str = "peft"
    default_lr: float = 1.0
    init_from: str | None = None
    prebuilt: dict[str, LowRank]

    def targets(self, backbone: Backbone) -> list[str]:
        return list(self.prebuilt)

    def updates(self, *_: Any) -> dict[str, Update]:
        return dict(self.prebuilt)


# -- which modules --


def _linears(config: PeftConfig, backbone: Backbone) -> Linears:
    """Return the linears that the adapter changes, by full name.

    Raises:
        UserError: it adapts nothing, or a module that is not a linear of the layers or the head.
    """
    targets = config.values["target_modules"]
    linears: Linears = {}
    for name, module in backbone.network.named_modules():
        if isinstance(module, LinearRows) or not config.adapts(name):  # PEFT knows the fused linear only
            continue
        placed = backbone.layer_of(name) is not None or _within(name, backbone.head_modules)
        if not (isinstance(module, nn.Linear) and placed):
            raise config.refusal("target_modules", targets, f"takes in {name}, no linear of the layers or the head")
        linears[name] = module
    if not linears:
        raise config.refusal("target_modules", targets, "fits no module of the backbone", code=Code.NO_MATCH)
    return linears


def _saved_head(config: PeftConfig, backbone: Backbone) -> Tensors:
    """Return the head's parameters that the file holds, by their names in it, as the backbone has them.

    Raises:
        UserError: modules outside the head are saved whole, or a parameter of the head is neither saved nor in the
            backbone's checkpoint.
    """
    modules = [name for name, _ in backbone.network.named_modules() if name.endswith(tuple(config.saved_modules))]
    for name in modules:
        if not _within(name, backbone.head_modules):
            requested = config.values.get("modules_to_save")
            raise config.refusal("modules_to_save", requested, f"takes in {name}, which is no part of the head")
    saved = {name: p for name, p in backbone.network.named_parameters() if _within(name, modules)}
    missing = sorted(name for name in backbone.new_parameters - saved.keys() if _within(name, backbone.head_modules))
    if missing:
        raise UserError(
            f"neither this adapter nor the backbone's checkpoint holds {missing[0]}",
            file=config.folder,
            remedy="With peft, name the head in modules_to_save before training.",
            code=Code.MISSING,
        )
    return {f"{MODEL}{name}": p for name, p in saved.items()}


def _within(name: str, modules: Iterable[str]) -> bool:
    """Return whether `name` is one of the modules, or lies in one."""
    return f"{name}.".startswith(tuple(f"{module}." for module in modules))


# -- what it computes --


class Product(NamedTuple):
    """scaling · B A, and the norms of the adapted weight's rows where they are trained apart."""

    A: Tensor
    """(rank, in)."""
    B: Tensor
    """(out, rank)."""
    scaling: float
    magnitude: Tensor | None = None
    """(out,)."""


def _low_rank(linear: nn.Linear, product: Product, start: object) -> LowRank:
    """Return the update of a linear that computes this product.

    Args:
        linear: the frozen linear.
        product: from the tensors of the file.
        start: PEFT's `init_lora_weights`; if it names an initialisation that PEFT subtracts from the frozen weight, the
            update subtracts it.
    """
    A, B, scaling, magnitude = product
    update = LowRank(linear, torch.zeros_like(A), torch.zeros_like(B), scaling, 0.0, torch.Generator())
    if start in SUBTRACTED_STARTS:
        update.initialise(*init.FROM_WEIGHT[start](linear.weight.detach().float(), update.rank, scaling), subtract=True)
    with torch.no_grad():
        update.lora_A.copy_(A)
        update.lora_B.copy_(B)
        if magnitude is not None:
            update.add_magnitude()
            update.magnitude.copy_(magnitude)  # type: ignore[union-attr]
    return update


class _Lora:
    """The tensors of a LoRA in PEFT's file: with rank and alpha by module, rsLoRA's scaling and DoRA's magnitude.

    Raises:
        UserError: a rank is not a valid one, or a pattern of ranks or alphas fits no adapted module.
    """

    def __init__(self, config: PeftConfig, linears: Linears) -> None:
        self.linears = linears
        self.ranks = config.by_module("rank_pattern", config.values["r"], linears)
        alphas = config.by_module("alpha_pattern", config.values["lora_alpha"], linears)
        for name, rank in self.ranks.items():
            if not is_rank(rank):
                raise config.refusal("rank_pattern", None, f"gives {name} the rank {rank}", code=Code.INVALID_VALUE)
        divisor = math.sqrt if config.values.get("use_rslora") else float
        self.scalings = {name: alpha / divisor(self.ranks[name]) for name, alpha in alphas.items()}
        self.has_magnitude = bool(config.values.get("use_dora"))

    def shapes(self) -> Shapes:
        """Return the shape of each tensor that the file must hold, by its name there."""
        shapes: Shapes = {}
        for name, linear in self.linears.items():
            shapes[f"{MODEL}{name}.lora_A.weight"] = (self.ranks[name], linear.in_features)
            shapes[f"{MODEL}{name}.lora_B.weight"] = (linear.out_features, self.ranks[name])
            if self.has_magnitude:
                shapes[f"{MODEL}{name}.lora_magnitude_vector"] = (linear.out_features,)
        return shapes

    def product(self, name: str, tensors: Tensors) -> Product:
        """Return the product of the linear of this name from the tensors of the file."""
        A, B = (tensors[f"{MODEL}{name}.{key}.weight"] for key in ("lora_A", "lora_B"))
        return Product(A, B, self.scalings[name], tensors.get(f"{MODEL}{name}.lora_magnitude_vector"))


class _AdaLora:
    """The tensors of an AdaLoRA in PEFT's file, with the ranks that pruning left of each module, `init_r` by default.

    Raises:
        UserError: the rank pattern names no adapted module, or is malformed.
    """

    def __init__(self, config: PeftConfig, linears: Linears) -> None:
        self.linears = linears
        first = config.values["init_r"]
        self.scaling = config.values["lora_alpha"] / (first + 1e-5)  # of the first rank, however much was pruned
        self.ranks = dict.fromkeys(linears, first)
        for key, kept in (config.values.get("rank_pattern") or {}).items():
            name = key.removesuffix(".lora_E")
            if name not in linears:
                raise config.refusal("rank_pattern", None, f"{key!r} fits no adapted module", code=Code.NO_MATCH)
            if not isinstance(kept, list) or len(kept) != first:
                reason = f"{key!r} does not say of each rank whether it is kept"
                raise config.refusal("rank_pattern", None, reason, code=Code.INVALID_VALUE)
            self.ranks[name] = sum(map(bool, kept))

    def shapes(self) -> Shapes:
        """Return the shape of each tensor that the file must hold, by its name there."""
        shapes: Shapes = {}
        for name, linear in self.linears.items():
            shapes[f"{MODEL}{name}.lora_A"] = (self.ranks[name], linear.in_features)
            shapes[f"{MODEL}{name}.lora_E"] = (self.ranks[name], 1)
            shapes[f"{MODEL}{name}.lora_B"] = (linear.out_features, self.ranks[name])
        return shapes

    def product(self, name: str, tensors: Tensors) -> Product:
        """Return the product of the linear of this name from the tensors of the file."""
        A, E, B = (tensors[f"{MODEL}{name}.{key}"] for key in ("lora_A", "lora_E", "lora_B"))
        return Product(E * A, B, self.scaling)


class _Vera:
    """The tensors of a VeRA in PEFT's file: projections that all linears share, and two vectors for each linear.

    Raises:
        UserError: the file was saved without the projections.
    """

    def __init__(self, config: PeftConfig, linears: Linears) -> None:
        if not config.values.get("save_projection", True):
            reason = "leaves A and B out of the file, and another machine may draw others"
            raise config.refusal("save_projection", False, reason, "Save it anew with save_projection=True.")
        self.linears = linears
        self.rank = config.values["r"]

    def shapes(self) -> Shapes:
        """Return the shape of each tensor that the file must hold, by its name there."""
        linears = self.linears.values()
        shapes: Shapes = {
            f"{PREFIX}vera_A": (self.rank, max(linear.in_features for linear in linears)),
            f"{PREFIX}vera_B": (max(linear.out_features for linear in linears), self.rank),
        }
        for name, linear in self.linears.items():
            shapes[f"{MODEL}{name}.vera_lambda_d"] = (self.rank,)
            shapes[f"{MODEL}{name}.vera_lambda_b"] = (linear.out_features,)
        return shapes

    def product(self, name: str, tensors: Tensors) -> Product:
        """Return the product of the linear of this name from the tensors of the file."""
        linear = self.linears[name]
        A = tensors[f"{PREFIX}vera_A"][:, : linear.in_features]
        B = tensors[f"{PREFIX}vera_B"][: linear.out_features]
        d, b = (tensors[f"{MODEL}{name}.vera_lambda_{key}"] for key in "db")
        return Product(d[:, None] * A, b[:, None] * B, 1.0)


_METHODS: dict[str, type[_Lora] | type[_AdaLora] | type[_Vera]] = {"LORA": _Lora, "ADALORA": _AdaLora, "VERA": _Vera}
