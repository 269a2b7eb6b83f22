"""Methods, model families, metrics and folders of choices that installed distributions register.

A distribution registers them in its entry points, which `pyproject.toml` declares:

    [project.entry-points."lora_bench.methods"]
    gated = "gated_lora.method:Gated"

    [project.entry-points."lora_bench.conf"]
    gated = "gated_lora.conf"

A configuration names an entry point, never code: a name that no installed distribution has registered is refused, and
nothing is imported before its name is asked for. The folder of choices is located without an import. A name of
lora-bench's own cannot be replaced, and a name that two distributions register belongs to neither.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lora_bench.errors import Code, UserError

if TYPE_CHECKING:
    from collections.abc import Collection

T = TypeVar("T")

METHODS = "lora_bench.methods"
"""Group of adapter methods: subclasses of `adapters.base.Adapter`."""
BACKBONES = "lora_bench.backbones"
"""Group of model families: subclasses of `backbones.family.Family`."""
METRICS = "lora_bench.metrics"
"""Group of metrics: functions of labels and scores."""
CONF = "lora_bench.conf"
"""Group of folders with further choices of the configuration groups: dotted names of packages."""
_PREFIX = "lora_bench."


@dataclass(frozen=True)
class Registration:
    """An entry point and the distribution that has it."""

    entry_point: metadata.EntryPoint
    name: str
    """The name of the distribution, as `gated-lora`."""
    version: str

    @property
    def distribution(self) -> str:
        """Name and version of the distribution."""
        return f"{self.name} {self.version}"


def registered(group: str) -> tuple[Registration, ...]:
    """Return the entry points of a group in the installed distributions; none of them is imported."""
    return tuple(registration for registration in _read_all(tuple(sys.path)) if registration.entry_point.group == group)


@cache
def _read_all(path: tuple[str, ...]) -> tuple[Registration, ...]:
    """Return all entry points of lora-bench's groups, read once for each state of `sys.path`.

    Of two distributions of one name the first on the path counts. One whose files cannot be read is left out: it may
    have nothing to do with lora-bench.
    """
    by_name: dict[str, list[Registration]] = {}
    for distribution in metadata.distributions():
        try:
            if f"[{_PREFIX}" not in (distribution.read_text("entry_points.txt") or ""):  # parsing all takes longer
                continue
            name, version = distribution.metadata["Name"], distribution.version
            points = [point for point in distribution.entry_points if point.group.startswith(_PREFIX)]
        except Exception:
            continue
        by_name.setdefault(name, [Registration(point, name, version) for point in points])
    return tuple(registration for name in sorted(by_name) for registration in by_name[name])


def registered_names(group: str) -> list[str]:
    """Return the sorted names that installed distributions register in a group."""
    return sorted({registration.entry_point.name for registration in registered(group)})


def refuse_replacement(group: str, name: str, key: str) -> None:
    """Refuse a name of lora-bench's own that an installed distribution registers too.

    Args:
        group: of the entry points.
        name: a method, family or metric that is part of lora-bench.
        key: the configuration key that names it.

    Raises:
        UserError: a distribution registers it; the distribution is named.
    """
    others = [registration.distribution for registration in registered(group) if registration.entry_point.name == name]
    if others:
        raise UserError(
            f"is part of lora-bench, and {others[0]} registers another one of this name",
            key=key,
            value=name,
            remedy=f"Rename the entry point in the group {group} of that distribution, or uninstall it.",
            code=Code.EXTENSION,
        )


def load_registered(group: str, name: str, key: str) -> tuple[object, str]:
    """Import what an installed distribution registers under a name, and return it with the distribution.

    Args:
        group: of the entry points.
        name: one of `registered_names`.
        key: the configuration key that names it.

    Raises:
        UserError: two distributions register the name, or it cannot be imported; they are named.
    """
    registrations = [registration for registration in registered(group) if registration.entry_point.name == name]
    if len(registrations) > 1:
        raise UserError(
            f"is registered by {' and by '.join(registration.distribution for registration in registrations)}",
            key=key,
            value=name,
            remedy=f"Uninstall one of them, or rename its entry point in the group {group}.",
            code=Code.EXTENSION,
        )
    point = registrations[0].entry_point
    try:
        return point.load(), registrations[0].distribution
    except Exception as error:
        reason = f"cannot be loaded from {point.value} ({type(error).__name__}: {str(error)[:200]})"
        raise unusable(registrations[0].distribution, reason, key, name) from None


def versions(names: Collection[tuple[str, str]]) -> dict[str, str]:
    """Return the version of each distribution that registers one of these entry points, by its name.

    Args:
        names: the group and the name of each; those that are not registered are left out.
    """
    return {
        registration.name: registration.version
        for group, name in names
        for registration in registered(group)
        if registration.entry_point.name == name
    }


def load_class(group: str, name: str, base: type[T], key: str) -> type[T]:
    """Import the class that an installed distribution registers under a name.

    Args:
        group: of the entry points.
        name: one of `registered_names`.
        base: the class that it extends.
        key: the configuration key that names it.

    Raises:
        UserError: as `load_registered`; or it is no subclass of `base`.
    """
    loaded, distribution = load_registered(group, name, key)
    if not (isinstance(loaded, type) and issubclass(loaded, base)):
        raise unusable(distribution, f"is not a subclass of {base.__module__}.{base.__name__}", key, name)
    return loaded


def unusable(distribution: str, reason: str, key: str, name: str) -> UserError:
    """Return the error for an entry point that cannot be used, with the distribution and the reason."""
    return UserError(
        f"is registered by {distribution}, and {reason}",
        key=key,
        value=name,
        remedy=f"Update or uninstall {distribution.split()[0]}.",
        code=Code.EXTENSION,
    )


@dataclass(frozen=True)
class ConfFolder:
    """A folder with further choices of the configuration groups, and the distribution that registers it."""

    path: Path
    distribution: str

    def has(self, group: str, choice: str) -> bool:
        """Return whether the folder has a choice of a group."""
        return (self.path / group / f"{choice}.yaml").is_file()


def conf_folders() -> list[ConfFolder]:
    """Return the folders of choices of the installed distributions, each once; one that does not exist is left out."""
    folders: dict[Path, ConfFolder] = {}
    for registration in registered(CONF):
        path = package_folder(registration.entry_point.value)
        if path is not None:
            folders.setdefault(path, ConfFolder(path, registration.distribution))
    return list(folders.values())


def package_folder(name: str) -> Path | None:
    """Return the folder of a package, located without an import; None if there is none.

    Only the top-level package is looked up; the other names are folders below it.

    Args:
        name: dotted.
    """
    top, *below = name.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    locations = spec.submodule_search_locations if spec else None
    paths = (Path(location, *below) for location in locations or ())
    return next((path for path in paths if path.is_dir()), None)


def choices_of(folders: Collection[ConfFolder], group: str) -> set[str]:
    """Return the choices of a group in folders of choices; a name that begins with `_` is no choice."""
    return {path.stem for folder in folders for path in (folder.path / group).glob("[!_]*.yaml")}
