"""The environment of a run: versions, commit, device. It is part of every record; `lora-bench doctor` prints it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

PACKAGES = (
    "lora-bench",
    "torch",
    "transformers",
    "datasets",
    "tokenizers",
    "torchmetrics",
    "hydra-core",
    "omegaconf",
    "numpy",
    "pyarrow",
    "scipy",
    "safetensors",
)
"""The packages that results depend on."""


def describe() -> dict[str, Any]:
    """Return platform, CPU, versions of Python and packages, and commit and `dirty` flag of lora-bench's checkout.

    Commit and flag are None outside of git.
    """
    commit, dirty = _commit(Path(__file__).resolve().parent)
    return {
        "commit": commit,
        "dirty": dirty,
        "versions": {"python": platform.python_version(), **versions()},
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cpu_count": os.cpu_count(),
    }


def versions() -> dict[str, str | None]:
    """Return the installed version of every package of `PACKAGES`; None where it is not installed."""
    return {name: _version(name) for name in PACKAGES}


@cache
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def _commit(folder: Path) -> tuple[str | None, bool | None]:
    """Return commit and dirty flag of the checkout that a package belongs to; both None if git does not track it.

    Untracked files do not make a checkout dirty. The answer is that of the first call: this process runs the code that
    it has imported, whatever happens to the files afterwards.

    Args:
        folder: of the package.
    """
    commit = _git(folder, "rev-parse", "HEAD")
    tracked = _git(folder, "ls-files", "--error-unmatch", Path(__file__).name)
    if commit is None or tracked is None:
        return None, None
    return commit, bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))


def _git(folder: Path, *arguments: str) -> str | None:
    """Return the stripped output of a git command in a folder; None if it fails or takes 10 seconds, or without git."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu() -> str | None:
    """Return the model name of the CPU, on Linux from /proc/cpuinfo, else as Python names it; None if it is unknown."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or None


COMPARED = ("commit", "versions", "device", "precision", "threads", "processes", "cpu")
"""Keys of an environment that can change the numbers of a training step."""


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the differences between two recorded environments as text: `torch 2.9.0 (before: 2.8.0)`.

    Only the keys of `COMPARED` are compared, versions package by package; a missing value is None.
    """
    differences = []
    for key in COMPARED:
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            names = [name for name in old | new if old.get(name) != new.get(name)]
            differences += [f"{name} {new.get(name)} (before: {old.get(name)})" for name in names]
        elif old != new:
            differences.append(f"{key} {new} (before: {old})")
    return differences


def history(before: Mapping[str, Any], now: Mapping[str, Any], step: int) -> list[dict[str, Any]]:
    """Return the environments of a resumed run's earlier steps, the oldest first; empty while it has not changed.

    Entries that begin after `step` are dropped, and later ends become `step`. Damaged entries are dropped.

    Args:
        before: the recorded environment, with its `history`.
        now: the environment of the coming steps.
        step: the step that the run is resumed from.

    Returns:
        Entries with `first_step`, `last_step` and the keys of `COMPARED`.
    """
    entries = before.get("history") if isinstance(before.get("history"), list) else []
    earlier = []
    for entry in entries or []:
        if isinstance(entry, dict) and isinstance(entry.get("first_step"), int) and entry["first_step"] <= step:
            earlier.append(entry | {"last_step": min(step, int(entry.get("last_step") or step))})
    first = earlier[-1]["last_step"] + 1 if earlier else 1
    if first <= step and changes(before, now):
        earlier.append({"first_step": first, "last_step": step} | {key: before.get(key) for key in COMPARED})
    return earlier
