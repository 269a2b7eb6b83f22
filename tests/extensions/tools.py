"""Installs fake distributions: a package and its `dist-info` in a temporary folder on `sys.path`."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import pytest

Groups = dict[str, dict[str, str]]
"""Entry points by group and name."""


def install(folder: Path, name: str, groups: Mapping[str, Mapping[str, str]], files: Mapping[str, str]) -> None:
    """Write a distribution of version 0.1 into a folder, as pip unpacks a wheel.

    Args:
        folder: has to be on `sys.path` before lora-bench reads the entry points.
        name: of the distribution.
        groups: its entry points.
        files: texts by path below the folder.
    """
    info = folder / f"{name.replace('-', '_')}-0.1.dist-info"
    lines = [
        f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in points.items())
        for group, points in groups.items()
    ]
    texts = {
        f"{info.name}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n",
        f"{info.name}/entry_points.txt": "\n".join(lines),
        **files,
    }
    for path, text in texts.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")


@contextmanager
def on_path(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put a folder on `sys.path` within the context; modules that were imported from it are forgotten afterwards."""
    patch.syspath_prepend(folder)
    before = set(sys.modules)
    try:
        yield
    finally:
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(folder)):
                del sys.modules[name]
