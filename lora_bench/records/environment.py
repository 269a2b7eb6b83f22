"""Where a run ran: versions, commit, device. Part of every record, and what `lora-bench doctor` prints."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
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


def describe() -> dict[str, Any]:
    """Python, platform, package versions, and the commit of lora-bench's own source; None where it is not in git."""
    commit, dirty = _commit()
    return {
        "commit": commit,
        "dirty": dirty,
        "versions": {"python": platform.python_version(), **versions()},
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cpu_count": os.cpu_count(),
    }


def versions() -> dict[str, str | None]:
    """Installed version of every package that results depend on."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _commit() -> tuple[str | None, bool | None]:
    """Commit and dirty flag of the checkout that this package lies in, if it lies in its own."""
    folder = Path(__file__).resolve().parent
    commit = _git(folder, "rev-parse", "HEAD")
    tracked = _git(folder, "ls-files", "--error-unmatch", Path(__file__).name)
    if commit is None or tracked is None:
        return None, None
    return commit, bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu() -> str | None:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or None


COMPARED = ("commit", "versions", "device", "precision", "threads", "processes", "cpu")
"""What may make steps come out otherwise."""


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what differs between two recorded environments: `torch 2.9.0 (before: 2.8.0)`."""
    found = []
    for key in COMPARED:
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            names = [name for name in old | new if old.get(name) != new.get(name)]
            found += [f"{name} {new.get(name)} (before: {old.get(name)})" for name in names]
        elif old != new:
            found.append(f"{key} {new} (before: {old})")
    return found


def history(before: Mapping[str, Any], now: Mapping[str, Any], step: int) -> list[dict[str, Any]]:
    """Return the environments of a resumed run's earlier steps, the oldest first; empty while all had the same.

    Args:
        before: as the run's record has it, with its history.
        now: of the steps to come.
        step: the last of the earlier steps.
    """
    entries = before.get("history") if isinstance(before.get("history"), list) else []
    found = []
    for entry in entries or []:
        if isinstance(entry, dict) and isinstance(entry.get("first_step"), int) and entry["first_step"] <= step:
            found.append(entry | {"last_step": min(step, int(entry.get("last_step") or step))})
    first = found[-1]["last_step"] + 1 if found else 1
    if first <= step and changes(before, now):
        found.append({"first_step": first, "last_step": step} | {key: before.get(key) for key in COMPARED})
    return found
