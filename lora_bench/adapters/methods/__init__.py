"""Adapter methods, one file each: every module here is a method, looked up by its name."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

from lora_bench.adapters.base import Adapter
from lora_bench.errors import Code, UserError, nearest

__all__ = ["method_class", "method_names"]


def method_names() -> list[str]:
    """Return the names of the methods: of the modules in this folder."""
    return [module.name for module in pkgutil.iter_modules(__path__)]


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
    module = importlib.import_module(f"{__name__}.{name}")
    (cls,) = (
        member
        for _, member in inspect.getmembers(module, inspect.isclass)
        if issubclass(member, Adapter) and member.__module__ == module.__name__
    )
    return cls
