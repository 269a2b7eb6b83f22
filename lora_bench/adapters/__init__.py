"""Adapter methods, one file each, and what they share.

`base.py` says what a method is and which hooks the training loop calls, `targets.py` chooses the layers, `pack.py`
puts K members on one backbone, `peft_format.py` writes and reads adapter files, `peft_config.py` and `peft_import.py`
read those that peft made. `lora.py` has the axes that most published methods differ in: `layer.py` is its mathematics,
`init.py`, `allocation.py` and `quantize.py` are choices to make, `calibration.py` looks at data for them. A method is
looked up by its module's name.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil

from lora_bench.adapters.base import Adapter
from lora_bench.errors import Code, UserError, nearest

__all__ = ["Adapter", "method_class", "method_names"]

_SHARED = {
    "allocation",
    "base",
    "calibration",
    "init",
    "layer",
    "leaves",
    "matching",
    "pack",
    "patterns",
    "peft_config",
    "peft_format",
    "peft_import",
    "quantize",
    "targets",
    "together",
}


def method_names() -> list[str]:
    """The methods there are: the modules beside this file that are not shared machinery."""
    return [module.name for module in pkgutil.iter_modules(__path__) if module.name not in _SHARED]


def method_class(name: str) -> type[Adapter]:
    """The dataclass of method `name`: the one subclass of `Adapter` that its module defines."""
    known = method_names()
    if name not in known:
        close = nearest(name, known)
        remedy = close if close.startswith("Did") else ""  # else it would name the choices once more
        raise UserError(
            f"is not one of {', '.join(known)}",
            key="adapter.method",
            value=name,
            remedy=remedy,
            code=Code.UNKNOWN_CHOICE,
        )
    module = importlib.import_module(f"{__name__}.{name}")
    (found,) = (
        cls
        for _, cls in inspect.getmembers(module, inspect.isclass)
        if issubclass(cls, Adapter) and cls.__module__ == module.__name__
    )
    return found
