"""Classes that are found by the name of their module: adapter methods and model families."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable

T = TypeVar("T")


def module_names(path: Iterable[str]) -> list[str]:
    """Return the names of the modules and packages in the folders of a package; none of them is imported.

    Args:
        path: the package's `__path__`, as it is now.
    """
    return [module.name for module in pkgutil.iter_modules(path)]


def class_of_module(package: str, name: str, base: type[T]) -> type[T]:
    """Import a module of a package, and return the one subclass of `base` that it defines; imported ones do not count.

    Args:
        package: its dotted name.
        name: of the module, one of `module_names`.
        base: the class that it extends.

    Raises:
        ValueError: it defines none or several.
    """
    module = importlib.import_module(f"{package}.{name}")
    (cls,) = (
        member
        for _, member in inspect.getmembers(module, inspect.isclass)
        if issubclass(member, base) and member.__module__ == module.__name__
    )
    return cls
