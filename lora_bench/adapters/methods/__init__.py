"""Adapter methods, one file each: every module here is a method, looked up by its name.

Installed distributions register further methods as entry points of the group `lora_bench.methods`.
"""

from __future__ import annotations

from lora_bench.adapters.base import Adapter
from lora_bench.errors import Code, UserError, nearest
from lora_bench.extensions.entry_points import METHODS, load_class, refuse_replacement, registered_names
from lora_bench.files.discovery import class_of_module, module_names

__all__ = ["method_class", "method_names"]


def method_names() -> list[str]:
    """Return the names of the methods: of the modules in this folder, then those of installed distributions."""
    own = module_names(__path__)
    return [*own, *(name for name in registered_names(METHODS) if name not in own)]


def method_class(name: str) -> type[Adapter]:
    """Return the dataclass of a method: the one subclass of `Adapter` that its module or entry point defines.

    Raises:
        UserError: there is no method of this name, or an installed distribution registers one that cannot be used.
    """
    if name in module_names(__path__):
        refuse_replacement(METHODS, name, _KEY)
        return class_of_module(__name__, name, Adapter)
    names = method_names()
    if name not in names:
        hint = nearest(name, names)
        raise UserError(
            f"is not one of {', '.join(names)}",
            key=_KEY,
            value=name,
            remedy=hint if hint.startswith("Did") else _REMEDY,  # else it would name the choices once more
            code=Code.UNKNOWN_CHOICE,
        )
    return load_class(METHODS, name, Adapter, _KEY)


_KEY = "adapter.method"
_REMEDY = f"A method of your own needs an installed package that registers it in the entry point group {METHODS}."
