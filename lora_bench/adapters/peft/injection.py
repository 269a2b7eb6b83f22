"""PEFT's own layers beside frozen modules: PEFT makes them in the network, and a pack computes with them.

    network --PEFT--> tuner layers in place of the targets --taken out again--> one `InjectedUpdate` for each target

The network is as before at the end. The layers stay in a frame, a network with nothing but these layers under the same
names, so that PEFT itself writes, reads and updates them: also tensors that several layers share.
"""

from __future__ import annotations

import copy
import re
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_bench.adapters.base import Update
from lora_bench.adapters.peft.catalogue import FROM_WEIGHT, SHARE_BY_SUFFIX
from lora_bench.backbones.fused_linear import is_transposed
from lora_bench.backbones.quantized_modules import quantized_weight
from lora_bench.errors import Code, UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lora_bench.backbones.base import Backbone

NAME = "default"
"""PEFT's name of the adapter in its layers, which its files leave out."""
_SUMS = {
    "exp_avg_ipt_A": "adamss_A",
    "exp_avg_unc_A": "adamss_A",
    "exp_avg_ipt_B": "adamss_B",
    "exp_avg_unc_B": "adamss_B",
}
"""AdaMSS's running sums of importance and uncertainty in its layers, and the parameters whose shapes they have."""


class Frame(nn.Module):
    """The layers of one adapter as PEFT sees them: `base_model` is its tuner, whose model has only these layers.

    Args:
        tuner: PEFT's tuner, whose model is replaced by the frame.
        layers: PEFT's layers by full name.
    """

    def __init__(self, tuner: Any, layers: Mapping[str, Any]) -> None:
        super().__init__()
        self.base_model = tuner
        tuner.model = nn.Module()
        for name, layer in layers.items():
            parent, _, child = name.rpartition(".")
            _submodule(tuner.model, parent).add_module(child, layer)
        self.peft_config = tuner.peft_config
        self.layers = dict(layers)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the tuner where the frame has none, as PEFT's models do."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_model"), name)

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of PEFT's file, without the `base_model.` before their names; shared ones are copied."""
        from peft import get_peft_model_state_dict

        tensors = get_peft_model_state_dict(self, adapter_name=NAME)
        return {name.removeprefix("base_model."): tensor.detach().clone() for name, tensor in tensors.items()}

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Load tensors that `to_tensors` returned.

        Raises:
            IndexError, RuntimeError: whole numbers among them, as positions, do not fit a layer.
        """
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(self, {f"base_model.{name}": tensor for name, tensor in tensors.items()})
        if not all(tensor.is_floating_point() for tensor in tensors.values()):
            with torch.sparse.check_sparse_tensor_invariants():  # type: ignore[no-untyped-call]
                for layer in self.layers.values():
                    weight = layer.get_base_layer().weight
                    layer(weight.new_zeros(1, weight.shape[-1]))


def _submodule(root: nn.Module, name: str) -> nn.Module:
    """Return the module of this dotted name below the root, made of empty modules where it is missing."""
    for part in name.split(".") if name else ():
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    return root


class InjectedUpdate(Update):
    """A layer of PEFT beside its frozen module.

    Only what is trained is a parameter of this module: under the name that it has in the layer, with `_` for dots and
    without the adapter's name. A tensor that layers share is a parameter of the first of them alone.

    Args:
        layer: PEFT's layer, with the frozen module in it.
        frame: of all layers of the member.
        rank: for the record; 0 where the method has none.
        generator: the member's random stream of dropout; None where the layer draws no random numbers.
        seen: the tensors of layers before; those of this one are added.
    """

    takes_output = False  # PEFT's layers call the frozen module themselves

    def __init__(self, layer: Any, frame: Frame, rank: int, generator: torch.Generator | None, seen: set[int]) -> None:
        super().__init__()
        self.layer = (layer,)  # in a tuple: the frozen module in it is no submodule
        self.frame = (frame,)
        self.rank = rank
        self.generator = generator
        base = {id(tensor) for tensor in layer.get_base_layer().state_dict(keep_vars=True).values()}
        for name, tensor in layer.state_dict(keep_vars=True).items():
            if id(tensor) in seen | base:
                continue
            seen.add(id(tensor))
            key = name.replace(f".{NAME}", "").replace(".", "_")
            if tensor.requires_grad:
                self.register_parameter(key, tensor)
            else:
                self.register_buffer(key, tensor)

    def train(self, mode: bool = True) -> InjectedUpdate:
        """Set the training mode of PEFT's layer too, but not of the frozen module in it."""
        super().train(mode)
        base = self.layer[0].get_base_layer()
        is_training = base.training
        self.layer[0].train(mode)
        base.train(is_training)
        return self

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the adapted output (B, T, out) from the input x (B, T, in) alone, in the type of x."""
        if self.generator is None or not self.training:
            return self.layer[0](x).to(x.dtype)  # type: ignore[no-any-return]
        with seeded(self.generator, x.device):
            return self.layer[0](x).to(x.dtype)  # type: ignore[no-any-return]

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias of the frozen module after PEFT's own merge into a copy of it.

        Raises:
            UserError: the method has no equivalent plain module.
        """
        layer = copy.deepcopy(self.layer[0])
        base = layer.get_base_layer()
        plain: Any = (
            copy.copy(base)
            if not isinstance(base, nn.Linear)
            else nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        )
        plain._parameters = {"weight": nn.Parameter(weight.clone(), requires_grad=False)}
        if bias is not None:
            plain._parameters["bias"] = nn.Parameter(bias.clone(), requires_grad=False)
        elif isinstance(base, nn.Linear):
            plain.bias = None
        layer.base_layer = plain
        try:
            layer.merge()
        except (NotImplementedError, ValueError) as error:
            method = type(layer).__module__.split(".")[-2]
            raise UserError(
                f"PEFT cannot merge {method} into a plain module: {str(error).rstrip('.')}",
                key="format",
                remedy="Use format=peft.",
                code=Code.UNSUPPORTED,
            ) from None
        merged = layer.get_base_layer()
        return merged.weight.detach(), None if bias is None else merged.bias.detach()

    def training_statistics(self) -> dict[str, Tensor]:
        """Return the sums by which AdaMSS chooses what it trains (`settings.use_asa`), and what it trains now.

        `is_trained` has a flag for each parameter. Other methods have none of it: all else that they learn is in their
        parameters and buffers.
        """
        layer = self.layer[0]
        if NAME not in getattr(layer, "exp_avg_ipt_A", {}):
            return {}
        sums = {
            f"{name}/{i}": tensor
            for name in _SUMS
            for i, tensor in enumerate(getattr(layer, name)[NAME])
            if tensor is not None  # it is None after a choice, until the next step
        }
        return {"is_trained": torch.tensor([p.requires_grad for p in self.parameters()]), **sums}

    def load_training_statistics(self, tensors: dict[str, Tensor]) -> None:
        """Load what `training_statistics` returned; after an error some of it may be loaded.

        Raises:
            ValueError: a tensor has another shape.
            KeyError: the flags are missing, or a sum is unknown.
        """
        layer, remaining = self.layer[0], dict(tensors)
        if not remaining and not self.training_statistics():
            return
        for p, is_trained in zip(self.parameters(), remaining.pop("is_trained").tolist(), strict=True):
            p.requires_grad_(bool(is_trained))
        for name, factor in _SUMS.items():
            sums = []
            for i, p in enumerate(getattr(layer, factor)[NAME]):
                tensor = remaining.pop(f"{name}/{i}", None)
                if tensor is not None and tensor.shape != p.shape:
                    raise ValueError(f"{name}/{i} has another shape than its parameter")
                sums.append(None if tensor is None else tensor.to(p.device))
            getattr(layer, name)[NAME] = sums
        if remaining:
            raise KeyError(next(iter(remaining)))

    def to_tensors(self) -> dict[str, Tensor]:
        raise TypeError("the tensors of all layers are written together, by the frame")

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        raise TypeError("the tensors of all layers are read together, by the frame")


@contextmanager
def seeded(generator: torch.Generator, device: torch.device) -> Iterator[None]:
    """Let torch's own random numbers within the context follow from a random stream, which moves on by one number.

    PEFT draws from torch's global generator, whose state is put back at the end.
    """
    seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@dataclass(frozen=True)
class Target:
    """A frozen module that is to be adapted."""

    parent: nn.Module
    child: str
    base: nn.Module
    weight: Tensor
    """A copy of its weight from before the injection."""


def inject(backbone: Backbone, config: Any, names: list[str], init: torch.Generator | None) -> Frame:
    """Let PEFT make its layers for these modules, and return them; the network is unchanged.

    Args:
        backbone: with its own modules in place.
        config: PEFT's config, without targets.
        names: full names of the modules, in the order of computation.
        init: random stream of the initialisation; None: whatever, since saved tensors are about to be loaded.

    Raises:
        UserError: PEFT refuses the settings for these modules, adapts other ones, or writes into a frozen weight.
    """
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    network, peft_type = backbone.network, config.peft_type.value
    if peft_type in FROM_WEIGHT and backbone.compute_dtype != torch.float32:
        raise UserError(
            "computes frozen tensors from the weights whenever it is loaded, so these must not be rounded",
            key="peft_type",
            value=peft_type,
            remedy="Set trainer.precision=fp32.",
            code=Code.UNSUPPORTED,
        )
    targets = {name: _target(network, name) for name in names}
    _name_targets(network, config, names)
    generator = torch.Generator().manual_seed(0) if init is None else init
    try:
        with seeded(generator, backbone.device), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice on deployment, and on types of modules that are checked here
            tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](network, config, NAME)
        layers = {name: network.get_submodule(name) for name in names}
    except UserError:
        raise
    except Exception as error:  # whatever PEFT's code does with settings that it does not check
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise UserError(
            f"PEFT cannot adapt these modules with {peft_type}: {reason}",
            key="peft_type",
            value=peft_type,
            remedy="Change adapter.settings or adapter.target_modules.",
            code=Code.INVALID_VALUE,
        ) from None
    finally:
        written = _restore(network, targets)
    if written:
        raise UserError(
            f"writes into the frozen weight of {written[0]} with these settings",
            key="peft_type",
            value=peft_type,
            remedy="Choose another initialisation in adapter.settings.",
            code=Code.UNSUPPORTED,
        )
    for name, layer in layers.items():
        _to_fp32(layer, targets[name].weight.device)
    return Frame(tuner, layers)


def _name_targets(network: nn.Module, config: Any, names: list[str]) -> None:
    """Name the targets in PEFT's config: in full, or by endings for a method that shares by these.

    Modules that only the endings take in, as those of layers that are not adapted, are excluded.
    """
    config.target_modules = list(names)
    if config.peft_type.value in SHARE_BY_SUFFIX:
        endings = list(dict.fromkeys(re.split(r"\.\d+\.", name)[-1] for name in names))
        suffixes = tuple(f".{ending}" for ending in endings)
        config.target_modules = endings
        config.exclude_modules = [n for n, _ in network.named_modules() if n.endswith(suffixes) and n not in names]


def _target(network: nn.Module, name: str) -> Target:
    """Return a module that PEFT's layers can stand beside.

    Raises:
        UserError: it is quantised, a part of a fused linear, or stores its weight as (in, out).
    """
    module: Any = network.get_submodule(name)
    parent, _, child = name.rpartition(".")
    reason = None
    if quantized_weight(module) is not None:
        reason, remedy = "is quantised", "Set model.quantize=null, or use adapter=lora."
    elif type(module).__name__ == "LinearRows":
        reason, remedy = "is a part of a fused linear, which PEFT adapts as a whole only", "Use target_modules=all."
    elif is_transposed(module):
        reason, remedy = "stores its weight as (in, out), as GPT-2 does", "Use a method of lora-bench: adapter=lora."
    if reason is not None:
        raise UserError(f"{name} {reason}", key="method", value="peft", remedy=remedy, code=Code.UNSUPPORTED)
    return Target(network.get_submodule(parent), child, module, module.weight.detach().clone())


@torch.no_grad()
def _restore(network: nn.Module, targets: Mapping[str, Target]) -> list[str]:
    """Put the frozen modules back into the network, and return the names of those whose weight has changed.

    A changed weight is put back as well.
    """
    written = []
    for name, target in targets.items():
        setattr(target.parent, target.child, target.base)
        weight: Any = target.base.weight
        if not torch.equal(weight, target.weight):
            weight.data.copy_(target.weight)
            written.append(name)
    if hasattr(network, "peft_config"):
        del network.peft_config
    return written


def _to_fp32(layer: Any, device: torch.device) -> None:
    """Move the adapter's own tensors in a layer to a device, floating-point ones in fp32; the frozen module stays."""
    base = layer.get_base_layer()
    frozen = {id(module) for module in base.modules()}
    for module in layer.modules():
        if id(module) in frozen:
            continue
        for p in module.parameters(recurse=False):
            p.data = p.data.to(device, torch.float32 if p.is_floating_point() else None)
        for key, buffer in module.named_buffers(recurse=False):
            module._buffers[key] = buffer.to(device, torch.float32 if buffer.is_floating_point() else None)
