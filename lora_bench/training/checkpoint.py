"""Checkpoints: a training state on disk that is either whole or not there.

    checkpoints/step-00000120/tensors.safetensors    every tensor of the state
                              state.json              everything else
                              manifest.json           sizes and sha256 of the two, written last

Each is built beside its place, flushed to the disk and renamed into it, so that a kill at any moment leaves the older
ones as they are. The newest that agrees with its manifest is used. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass, field
from hashlib import file_digest
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lora_bench.errors import Code, RunFailedError
from lora_bench.files import untrusted
from lora_bench.files.atomic_io import MAKE_ROOM, writing

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

MAX_CHECKPOINTS = 2
"""Checkpoints that a run keeps: the newest, and the one before in case the newest is damaged."""

_FILES = ("tensors.safetensors", "state.json")


@dataclass(frozen=True)
class Checkpoint:
    """A state as it was after an update."""

    step: int
    tensors: dict[str, Tensor]
    """On the CPU."""
    metadata: dict[str, Any]
    """What JSON can say."""


@dataclass
class Checkpoints:
    """The checkpoints of one run, or of one member of its ensemble.

    Args:
        folder: the run's `checkpoints/`; made with the first one.
        stem: what their names begin with.
    """

    folder: Path
    stem: str = "step"
    metadata: dict[str, Any] = field(default_factory=dict)
    """What every checkpoint says besides the training's own state."""
    damaged: list[str] = field(default_factory=list)
    """What `newest` passed over, and why."""
    check: Callable[[], None] = lambda: None
    """Called before anything is written or removed; raises where the folder is another run's by now."""

    @classmethod
    def of_members(cls, folder: Path, members: int) -> list[Checkpoints]:
        """Those of each member of a run, in its `checkpoints/`."""
        return [cls(folder, f"member_{i}-step" if members > 1 else "step") for i in range(members)]

    def save(self, step: int, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        """Write a checkpoint and drop all but the newest few.

        Raises:
            RunFailedError: it cannot be written, or the run's folder is gone; the older ones are as they were.
        """
        self.check()
        place = self.folder / f"{self.stem}-{step:08d}"
        part = self.folder / f".{place.name}.part"
        shutil.rmtree(part, ignore_errors=True)
        try:
            with writing(place):
                self.folder.mkdir(exist_ok=True)  # not the run's: one that was deleted must not bring itself back
                part.mkdir()
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part / "tensors.safetensors")
                (part / "state.json").write_text(
                    json.dumps({"step": step, **self.metadata, **metadata}), encoding="utf-8"
                )
                manifest = {name: _described(part / name) for name in _FILES}
                (part / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
                for name in (*_FILES, "manifest.json"):
                    _flush(part / name)
                _flush(part)
                shutil.rmtree(place, ignore_errors=True)  # a damaged one of the same step
                os.replace(part, place)
                _flush(self.folder)
        except SafetensorError as error:
            raise RunFailedError(
                f"cannot be written: {error}", file=place, remedy=MAKE_ROOM, code=Code.UNWRITABLE
            ) from None
        finally:
            shutil.rmtree(part, ignore_errors=True)
        for old in self._places()[MAX_CHECKPOINTS:]:
            shutil.rmtree(old, ignore_errors=True)

    def newest(self, step: int | None = None) -> Checkpoint | None:
        """The newest checkpoint (up to `step`) that is whole; None without any. `damaged` says what was passed over."""
        for place in self._places():
            if step is not None and self._step(place) > step:
                continue
            try:
                return _read(place)
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                self.damaged.append(f"{place.name}: {error}")
        return None

    def clear(self) -> None:
        """Remove all: a finished run has nothing to go on with."""
        self.check()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _places(self) -> list[Path]:
        """The folders of finished checkpoints, the newest first."""
        if not self.folder.is_dir():
            return []
        name = re.compile(rf"{self.stem}-\d+")
        found = [place for place in self.folder.iterdir() if name.fullmatch(place.name)]
        return sorted(found, key=self._step, reverse=True)

    def _step(self, place: Path) -> int:
        return int(place.name.removeprefix(f"{self.stem}-"))


def _read(place: Path) -> Checkpoint:
    manifest = untrusted.read_json(place / "manifest.json")
    for name in _FILES:
        if manifest[name] != _described(place / name):
            raise ValueError(f"{name} is not what was written")
    facts = untrusted.read_json(place / "state.json")
    return Checkpoint(facts.pop("step"), load_file(place / "tensors.safetensors"), facts)


def _described(path: Path) -> dict[str, Any]:
    with untrusted.open_file(path, max_bytes=2**63) as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": file_digest(file, "sha256").hexdigest()}


def _flush(path: Path) -> None:
    """See to it that a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
