"""Checkpoints: a training state on disk that is either whole or not there.

    checkpoints/step-00000120/tensors.safetensors    every tensor of the state
                              state.json              everything else
                              manifest.json           sizes and sha256 of the two, written last

A checkpoint is written into a temporary folder beside its destination, flushed to the disk and renamed, so that a kill
at any moment leaves the older checkpoints intact. The newest checkpoint that agrees with its manifest is used. Nothing
is pickled.
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
"""Checkpoints that a run keeps: the newest, and its predecessor in case the newest is damaged."""

_FILES = ("tensors.safetensors", "state.json")


@dataclass(frozen=True)
class Checkpoint:
    """A training state, as it was after an optimizer update."""

    step: int
    tensors: dict[str, Tensor]
    """On the CPU."""
    metadata: dict[str, Any]
    """Everything that is no tensor, as JSON."""


@dataclass
class Checkpoints:
    """The checkpoints of one run, or of one member of its ensemble.

    Args:
        folder: the run's `checkpoints/`; created with the first checkpoint.
        stem: prefix of the checkpoints' names.
    """

    folder: Path
    stem: str = "step"
    metadata: dict[str, Any] = field(default_factory=dict)
    """Written to every checkpoint beside the training state."""
    damaged: list[str] = field(default_factory=list)
    """Checkpoints that `newest` skipped, each with the reason."""
    check: Callable[[], None] = lambda: None
    """Called before anything is written or removed; raises if the folder belongs to another run by now."""

    @classmethod
    def of_members(cls, folder: Path, members: int) -> list[Checkpoints]:
        """Return the checkpoints of each member of a run, all in its `checkpoints/`."""
        return [cls(folder, f"member_{i}-step" if members > 1 else "step") for i in range(members)]

    def save(self, step: int, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        """Write a checkpoint and remove all but the newest `MAX_CHECKPOINTS` of this stem.

        One of the same step is replaced.

        Raises:
            RunFailedError: it cannot be written, or the run's folder is gone; the older checkpoints are unchanged.
        """
        self.check()
        destination = self.folder / f"{self.stem}-{step:08d}"
        temporary = self.folder / f".{destination.name}.part"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            with writing(destination):
                self.folder.mkdir(exist_ok=True)  # without its parents: a deleted run's folder is not created again
                temporary.mkdir()
                contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
                save_file(contiguous, temporary / "tensors.safetensors")
                (temporary / "state.json").write_text(
                    json.dumps({"step": step, **self.metadata, **metadata}), encoding="utf-8"
                )
                manifest = {name: _describe(temporary / name) for name in _FILES}
                (temporary / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
                for name in (*_FILES, "manifest.json"):
                    _flush(temporary / name)
                _flush(temporary)
                shutil.rmtree(destination, ignore_errors=True)  # a damaged checkpoint of the same step
                os.replace(temporary, destination)
                _flush(self.folder)
        except SafetensorError as error:
            raise RunFailedError(
                f"cannot be written: {error}", file=destination, remedy=MAKE_ROOM, code=Code.UNWRITABLE
            ) from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        for old in self._newest_first()[MAX_CHECKPOINTS:]:
            shutil.rmtree(old, ignore_errors=True)

    def newest(self, step: int | None = None) -> Checkpoint | None:
        """Read the newest undamaged checkpoint, up to `step` if that is given; None if there is none.

        Damaged checkpoints that were skipped are added to `damaged`.
        """
        for folder in self._newest_first():
            if step is not None and self._step(folder) > step:
                continue
            try:
                return _read(folder)
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                self.damaged.append(f"{folder.name}: {error}")
        return None

    def newest_step(self) -> int | None:
        """Return the step of the newest checkpoint, which may be damaged; None if there is none."""
        return next(map(self._step, self._newest_first()), None)

    def clear(self) -> None:
        """Remove the folder, with the checkpoints of all members: a finished run is never resumed."""
        self.check()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _newest_first(self) -> list[Path]:
        """Return the folders of complete checkpoints of this stem, the newest first; damaged ones are among them."""
        if not self.folder.is_dir():
            return []
        name = re.compile(rf"{self.stem}-\d+")
        folders = [folder for folder in self.folder.iterdir() if name.fullmatch(folder.name)]
        return sorted(folders, key=self._step, reverse=True)

    def _step(self, folder: Path) -> int:
        return int(folder.name.removeprefix(f"{self.stem}-"))


def _read(folder: Path) -> Checkpoint:
    """Read a checkpoint; raises an error of the file system or of a format if it does not agree with its manifest."""
    manifest = untrusted.read_json(folder / "manifest.json")
    for name in _FILES:
        if manifest[name] != _describe(folder / name):
            raise ValueError(f"{name} has another size or SHA-256 than manifest.json says")
    metadata = untrusted.read_json(folder / "state.json")
    return Checkpoint(metadata.pop("step"), load_file(folder / "tensors.safetensors"), metadata)


def _describe(path: Path) -> dict[str, Any]:
    """Return `bytes` and `sha256` of a file, as the manifest has them; an OSError if it cannot be read."""
    with untrusted.open_file(path, max_bytes=2**63) as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": file_digest(file, "sha256").hexdigest()}


def _flush(path: Path) -> None:
    """Flush a file, or a folder's list of files, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
