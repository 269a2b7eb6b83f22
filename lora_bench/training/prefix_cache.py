"""The frozen prefix's output, computed once and kept: over epochs, over runs, over the members of a sweep.

Layers below the first adapted one never change, so what they make of a pair is a constant. It is computed in one
canonical pass, whatever the run's batches, and stored under a key made of the backbone's hash, the number of layers,
the tokens and the precision: a run that finds it gets the same bits as the run that made it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np
import torch

from lora_bench.data.batching import evaluation_batches, evaluation_rows, places_of
from lora_bench.data.hidden_states import HiddenStates, HiddenStatesWriter
from lora_bench.evaluation.cost import FlopModel
from lora_bench.files.cache import TRAILER_BYTES, CacheFiles
from lora_bench.training.dummy_step import probe_batch

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from typing import BinaryIO

    from lora_bench.adapters.pack.pack import Pack
    from lora_bench.data.tokenization import TokenTable

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
        served, keys = dict(tables), list[str]()
        for name in self.keeps(pack, tables):
            keys.append(self._key(pack, tables[name]))
            hidden = self._load_or_fill(pack, tables[name], keys)
            if hidden is None:
                self.flops = 0.0
                return tables
            served[name] = replace(tables[name], hidden=hidden)
        if keys:
            pack.prefix_depth = pack.depth
        self.used_bytes = sum(self._size(pack, tables[name]) for name in tables if served[name] is not tables[name])
        self.seconds = time.perf_counter() - began
        return served

    @staticmethod
    def _size(pack: Pack, table: TokenTable) -> int:
        """Bytes of a table's file."""
        return len(table.values) * pack.backbone.hidden_size * pack.backbone.compute_dtype.itemsize + TRAILER_BYTES

    def _key(self, pack: Pack, table: TokenTable) -> str:
        """Return a hash of all that fixes the bits: what is computed, of which tokens, by which programs, where."""
        backbone = pack.backbone
        attention = getattr(backbone.network.config, "_attn_implementation", None)
        what = (self.backbone_sha256, type(backbone).__name__, attention, pack.depth, backbone.compute_dtype)
        layout = (ROWS, len(table), backbone.tokenizer.pad_token_id)
        programs = [torch.__version__, *map(version, ("transformers", "lora-bench"))]
        digest = sha256(f"{what} {layout} {programs} {_processor(backbone.device)}\n".encode())
        for array in (table.values, table.offsets, table.lengths, table.types):
            digest.update(b"-" if array is None else np.ascontiguousarray(array).data)
        return digest.hexdigest()[:40]

    def _load_or_fill(self, pack: Pack, table: TokenTable, keys: Collection[str]) -> HiddenStates | None:
        """Open the file of the last of these keys, filled if it was not there; None where there is no room for it."""
        *_, key = keys
        files, size_bytes = CacheFiles("prefix", self.limit_bytes), self._size(pack, table) - TRAILER_BYTES
        file = files.open(key, size_bytes=size_bytes)
        if file is None:
            file = files.write(key, lambda part: _fill(pack, table, part), size_bytes=size_bytes, keep=keys)
        if file is None:
            return None
        return HiddenStates(files.path(key), file, pack.backbone.hidden_size, pack.backbone.compute_dtype)


def _processor(device: torch.device) -> tuple[str, str]:
    """Return what tells processors apart that may round otherwise."""
    if device.type == "cuda":
        return device.type, torch.cuda.get_device_name(device)
    return device.type, torch.backends.cpu.get_cpu_capability()


@torch.no_grad()
def _fill(pack: Pack, table: TokenTable, file: BinaryIO) -> None:
    backbone = pack.backbone
    writer = HiddenStatesWriter(file, len(table.values), backbone.hidden_size, backbone.compute_dtype)
    mode = pack.training
    pack.eval()
    try:
        for rows, batch in evaluation_batches(table, ROWS, backbone.tokenizer.pad_token_id):
            hidden = backbone.prefix(batch.to(backbone.device), pack.depth)  # (N, T, D)
            writer.write(*places_of(table, rows, batch.input_ids.shape[1]), hidden.cpu())
    finally:
        pack.train(mode)


@torch.no_grad()
def _flops(pack: Pack, tables: Iterable[TokenTable]) -> float:
    """Of the canonical pass over the tables."""

    def prefix(rows: int, length: int) -> None:
        pack.backbone.prefix(probe_batch(pack.backbone, rows, length), pack.depth)

    model = FlopModel.measure(prefix)
    return sum(
        model(len(rows), int(table.lengths[rows[0]])) for table in tables for rows in evaluation_rows(table, ROWS)
    )
