"""The frozen prefix's output, computed once and kept: over epochs, over runs, over the members of a sweep.

Layers below the first adapted one never change, so what they make of a pair is a constant. It is computed in one
canonical pass, whatever the run's batches, and stored under a key made of the backbone's hash, the number of layers,
the tokens and the precision: a run that finds it gets the same bits as the run that made it.
"""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from lora_bench.data.batching import evaluation_batches, evaluation_rows, places_of
from lora_bench.data.hidden import HiddenStates, HiddenStatesWriter
from lora_bench.data.pairs import cache_folder
from lora_bench.evaluation.cost import FlopModel
from lora_bench.training.probe import probe_batch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lora_bench.adapters.pack import Pack
    from lora_bench.data.pairs import TokenTable

ROWS = 64
"""Pairs per forward pass of the canonical pass; part of what fixes its bits."""


@dataclass
class PrefixCache:
    """The store of prefixes, below the cache folder, and what filling it cost this run.

    Args:
        backbone_sha256: the backbone's hash.
        limit_bytes: most bytes that the whole store may hold; the least recently used files make room. 0: off.
    """

    backbone_sha256: str
    limit_bytes: float
    seconds: float = 0.0
    """Spent here: next to nothing where an earlier run left the files."""
    flops: float = 0.0
    """Of making what is kept, whether this run made it or an earlier one: a run's cost does not hang on the store."""
    used_bytes: int = 0
    """Of the files that this run reads."""

    def keeps(self, pack: Pack, tables: dict[str, TokenTable]) -> list[str]:
        """The names of those tables whose hidden states are kept, as far as the limit allows, in the order given.

        The first and what travels in its batches (`swapped`) are kept together, and others only beside them. Nothing
        is for a pack that adapts the first layer, or whose backbone cannot be cut.
        """
        if not (self.limit_bytes and pack.depth and pack.backbone.can_be_cut):
            return []
        kept: list[str] = []
        used = 0
        first, *others = tables
        together = [first, *(name for name in others if name == "swapped")]
        for names in (together, *([name] for name in others if name not in together)):
            if any(tables[name].augmentation is not None for name in names):  # other pairs in each epoch
                break
            used += sum(self._size(pack, tables[name]) for name in names)
            if used > self.limit_bytes:
                break
            kept += names
        self.flops = _flops(pack, [tables[name] for name in kept]) if kept else 0.0
        return kept

    def serve(self, pack: Pack, tables: dict[str, TokenTable]) -> dict[str, TokenTable]:
        """The tables with their hidden states beside the tokens where they are kept; the pack is then cut there."""
        began = time.perf_counter()
        files: dict[Path, str] = {}
        for name in self.keeps(pack, tables):
            path = self._folder / f"{self._key(pack, tables[name])}.hidden"
            if not self._make(pack, tables[name], path, files):
                self.flops = 0.0
                return tables
            files[path] = name
        served = dict(tables)
        for path, name in files.items():
            hidden = HiddenStates(path, pack.backbone.hidden_size, pack.backbone.compute_dtype)
            served[name] = replace(tables[name], hidden=hidden)
            self.used_bytes += self._size(pack, tables[name])
        if files:
            pack.cut = pack.depth
        self.seconds = time.perf_counter() - began
        return served

    @staticmethod
    def _size(pack: Pack, table: TokenTable) -> int:
        return len(table.values) * pack.backbone.hidden_size * pack.backbone.compute_dtype.itemsize

    @property
    def _folder(self) -> Path:
        return cache_folder() / "prefix"

    def _key(self, pack: Pack, table: TokenTable) -> str:
        what = (self.backbone_sha256, pack.depth, pack.backbone.compute_dtype, pack.backbone.device.type, ROWS)
        where = (torch.__version__, torch.backends.cpu.get_cpu_capability())
        digest = sha256(f"{what} {where} {len(table)}\n".encode())
        for array in (table.values, table.lengths, table.types):
            digest.update(b"-" if array is None else np.ascontiguousarray(array).data)
        return digest.hexdigest()[:40]

    def _make(self, pack: Pack, table: TokenTable, path: Path, others: Iterable[Path]) -> bool:
        """See to it that the file is there; False where there is no room to write it."""
        with suppress(FileNotFoundError):
            os.utime(path)
            return True
        part: Path | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._make_room(self._size(pack, table), set(others))
            descriptor, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
            os.close(descriptor)
            part = Path(name)
            _fill(pack, table, part)
            os.replace(part, path)
        except OSError:  # a cache is a convenience: without room the prefix is computed at every step
            return False
        finally:
            if part is not None:
                part.unlink(missing_ok=True)
        return True

    def _make_room(self, size: int, kept: set[Path]) -> None:
        """Delete the least recently used files until another of `size` bytes fits the limit."""
        found = sorted((path.stat().st_mtime, path) for path in self._folder.glob("*.hidden"))
        total = sum(path.stat().st_size for _, path in found)
        for _, path in found:
            if total + size <= self.limit_bytes:
                return
            if path not in kept:
                total -= path.stat().st_size
                path.unlink(missing_ok=True)


@torch.no_grad()
def _fill(pack: Pack, table: TokenTable, path: Path) -> None:
    backbone = pack.backbone
    writer = HiddenStatesWriter(path, len(table.values), backbone.hidden_size, backbone.compute_dtype)
    mode = pack.training
    pack.eval()
    for rows, batch in evaluation_batches(table, ROWS, backbone.tokenizer.pad_token_id):
        hidden = backbone.prefix(batch.to(backbone.device), pack.depth)  # (N, T, D)
        writer.write(*places_of(table, rows, batch.input_ids.shape[1]), hidden.cpu())
    pack.train(mode)
    writer.flush()


@torch.no_grad()
def _flops(pack: Pack, tables: Iterable[TokenTable]) -> float:
    """Of the canonical pass over the tables."""

    def prefix(rows: int, length: int) -> None:
        pack.backbone.prefix(probe_batch(pack.backbone, rows, length), pack.depth)

    model = FlopModel.measure(prefix)
    return sum(
        model(len(rows), int(table.lengths[rows[0]])) for table in tables for rows in evaluation_rows(table, ROWS)
    )
