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
from torch.utils.flop_counter import FlopCounterMode

from lora_bench.data.batching import evaluation_batches, places_of
from lora_bench.data.hidden import HiddenStates, HiddenStatesWriter
from lora_bench.data.pairs import cache_folder

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
    flops: float = 0.0
    used_bytes: int = 0
    """Of the files that this run reads."""

    def serve(self, pack: Pack, tables: dict[str, TokenTable]) -> dict[str, TokenTable]:
        """The tables with their hidden states beside the tokens, as far as the limit allows, in the order given.

        Nothing is stored for a pack that adapts the first layer, or whose backbone cannot be cut.
        """
        if not (self.limit_bytes and pack.depth and pack.backbone.can_be_cut):
            return tables
        served: dict[str, TokenTable] = {}
        files: dict[Path, int] = {}
        began = time.perf_counter()
        with FlopCounterMode(display=False) as counter:
            for name, table in tables.items():
                if table.augmentation is not None:  # other pairs in each epoch
                    served[name] = table
                    continue
                size = len(table.values) * pack.backbone.hidden_size * pack.backbone.compute_dtype.itemsize
                path = self._folder / f"{self._key(pack, table)}.hidden"
                served[name] = table
                if sum(files.values()) + size <= self.limit_bytes and self._make(pack, table, path, size, files):
                    files[path] = size
                    hidden = HiddenStates(path, pack.backbone.hidden_size, pack.backbone.compute_dtype)
                    served[name] = replace(table, hidden=hidden)
        self.used_bytes += sum(files.values())
        self.flops += counter.get_total_flops()
        self.seconds += time.perf_counter() - began
        return served

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

    def _make(self, pack: Pack, table: TokenTable, path: Path, size: int, others: Iterable[Path]) -> bool:
        """See to it that the file is there; False where there is no room to write it."""
        with suppress(FileNotFoundError):
            os.utime(path)
            return True
        part: Path | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._make_room(size, set(others))
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
