"""Adapter methods, one file each: every module here is a method, looked up by its name.

Installed distributions register further methods as entry points of the group `lora_bench.methods`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_bench.adapters.peft.catalogue import require_installed
from lora_bench.config.adapter_values import check_values
from lora_bench.errors import Code, UserError, nearest
from lora_bench.extensions.entry_points import METHODS, load_class, refuse_replacement, registered_names
from lora_bench.files.discovery import class_of_module, module_names

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_bench.adapters.base import Adapter

__all__ = ["check_settings", "method_class", "method_names"]


def method_names() -> list[str]:
    """Return the names of the methods: of the modules in this folder, then those of installed distributions."""
    built_in = module_names(__path__)
    return [*built_in, *(name for name in registered_names(METHODS) if name not in built_in)]


def method_class(name: str) -> type[Adapter]:
    """Return the dataclass of a method: the one subclass of `Adapter` that its module or entry point defines.

    Raises:
        UserError: there is no method of this name, or an installed distribution registers one that cannot be used.
    """
    from lora_bench.adapters.base import Adapter

    if name in module_names(__path__):
        refuse_replacement(METHODS, name, _KEY)
        return class_of_module(__name__, name, Adapter)
    _require_known(name)
    return load_class(METHODS, name, Adapter, _KEY)


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse an unknown method, a wrong value, and a method of PEFT without PEFT, before a class is imported.

    The class checks its settings again, with the combinations of them. A method of another distribution has its own
    values, and only the class knows them.

    Args:
        settings: of the group `adapter`, as composed.

    Raises:
        UserError: for the first such value; its key begins with `adapter`.
    """
    name = str(settings.get("method"))
    _require_known(name)
    if name not in module_names(__path__):
        return
    try:
        check_values(settings)
        if name == "peft":
            require_installed(str(settings.get("peft_type")))
    except UserError as error:
        raise error.under("adapter") from None


def _require_known(name: str) -> None:
    """Refuse a name that no method has."""
    names = method_names()
    if name in names:
        return
    hint = nearest(name, names)
    raise UserError(
        f"is not one of {', '.join(names)}",
        key=_KEY,
        value=name,
        remedy=hint if hint.startswith("Did") else _REMEDY,  # else it would name the choices once more
        code=Code.UNKNOWN_CHOICE,
    )


_KEY = "adapter.method"
_REMEDY = f"A method of your own needs an installed package that registers it in the entry point group {METHODS}."
