"""Adapter methods, one file each: every module here is a method, looked up by its name."""

from __future__ import annotations

from lora_bench.adapters.base import Adapter
from lora_bench.errors import Code, UserError, nearest
from lora_bench.files.discovery import class_of_module, module_names

__all__ = ["method_class", "method_names"]


def method_names() -> list[str]:
    """Return the names of the methods: of the modules in this folder."""
    return module_names(__path__)


def method_class(name: str) -> type[Adapter]:
    """Return the dataclass of a method: the one subclass of `Adapter` that its module defines.

    Raises:
        UserError: no module has this name.
    """
    names = method_names()
    if name not in names:
        hint = nearest(name, names)
        raise UserError(
            f"is not one of {', '.join(names)}",
            key="adapter.method",
            value=name,
            remedy=hint if hint.startswith("Did") else "",  # else it would name the choices once more
            code=Code.UNKNOWN_CHOICE,
        )
    return class_of_module(__name__, name, Adapter)
