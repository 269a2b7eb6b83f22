"""Model families, one file each: every module here is a family, looked up by its name.

Installed distributions register further families as entry points of the group `lora_bench.backbones`.

A configuration is checked before torch is imported, because that takes seconds. So a family's module imports torch and
its network (`backbones/bert.py`, `backbones/t5.py`, …) only inside the methods that need them. A family that has its
network in the same file works as well; mistakes in its keys are then reported only after torch was imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_bench.backbones.family import Family
from lora_bench.config.build import build_variant
from lora_bench.errors import Code, UserError, nearest
from lora_bench.extensions.entry_points import BACKBONES, load_class, refuse_replacement, registered_names
from lora_bench.files.discovery import class_of_module, module_names

if TYPE_CHECKING:
    from omegaconf import DictConfig

__all__ = ["build_model", "family_class", "family_names", "family_of_type"]


def family_names() -> list[str]:
    """Return the names of the families: of the modules in this folder, then those of installed distributions."""
    built_in = module_names(__path__)
    return [*built_in, *(name for name in registered_names(BACKBONES) if name not in built_in)]


def family_class(name: str) -> type[Family]:
    """Return the dataclass of a family: the one subclass of `Family` that its module or entry point defines.

    Raises:
        UserError: there is no family of this name, or an installed distribution registers one that cannot be used.
    """
    if name in module_names(__path__):
        refuse_replacement(BACKBONES, name, _KEY)
        return class_of_module(__name__, name, Family)  # type: ignore[type-abstract]
    names = family_names()
    if name not in names:
        raise UserError(
            f"is not one of {', '.join(names)}",
            key=_KEY,
            value=name,
            remedy=nearest(name, names),
            code=Code.UNKNOWN_CHOICE,
        )
    return load_class(BACKBONES, name, Family, _KEY)  # type: ignore[type-abstract]


_KEY = "model.family"


def family_of_type(model_type: str | None) -> str:
    """Return the name of the family that lists a model type; of one that serves every type if none lists it.

    None, the type of weights without one, is listed by no family. Families of installed distributions do not count, as
    they are loaded only if `model.family` names them.
    """
    classes = {name: family_class(name) for name in module_names(__path__)}
    serving = [name for name, cls in classes.items() if model_type in cls.model_types]
    return next(iter([*serving, *(name for name, cls in classes.items() if not cls.model_types)]))


def build_model(node: DictConfig) -> Family:
    """Return the settings of the family that `model.family` names.

    Raises:
        UserError: there is no such family, or a key is unknown, missing or out of range.
    """
    return build_variant(family_class, node, "model", "family")
