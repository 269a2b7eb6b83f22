"""Cached outputs of the frozen prefix, shared by the epochs of a run, by runs, and by the members of a sweep.

Layers below the first adapted one never change, so their output for a pair is a constant. It is computed in one
canonical pass that does not depend on the run's batches, and stored under a key made of the backbone's hash, the number
of layers, the tokens and the precision. A run that reads it gets the same bits as the run that wrote it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np
import torch

from lora_bench.console.stages import stage
from lora_bench.data.batching import evaluation_batches, evaluation_plan, token_positions
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
"""Pairs per forward pass of the canonical pass; the bits of its output depend on it."""


@dataclass
class PrefixCache:
    """The cache of prefix outputs on disk, below the cache folder, and its cost for one run.

    Args:
        backbone_sha256: the backbone's hash.
        limit_bytes: largest size of the whole cache; the least recently used files are removed first. 0: no caching.
    """

    backbone_sha256: str
    limit_bytes: float
    seconds: float = 0.0
    """Time that this run spent on the cache: little if an earlier run wrote the files."""
    flops: float = 0.0
    """FLOPs of computing the cached outputs, by whichever run: a run's cost does not depend on the cache."""
    used_bytes: int = 0
    """Size of the files that this run reads."""

    def cached_tables(self, pack: Pack, tables: dict[str, TokenTable]) -> list[str]:
        """Return the names of the tables whose hidden states are cached, in the order of `tables`, and set `flops`.

        The first table and its `second_view` are used in the same batches, so both are cached or neither is. Further
        tables follow up to the first that exceeds the limit or is perturbed anew in each epoch. The list is empty if
        there is no limit, the pack adapts the first layer, or its backbone cannot be cut below its first adapted layer.
        """
        if not (self.limit_bytes and pack.backbone.cut_depth(pack.depth)):
            return []
        cached: list[str] = []
        used = 0
        first, *further = tables
        training = [first, *(name for name in further if name == "second_view")]
        for names in (training, *([name] for name in further if name not in training)):
            if any(tables[name].augmentation is not None for name in names):  # the inputs differ in each epoch
                break
            used += sum(self._size(pack, tables[name]) for name in names)
            if used > self.limit_bytes:
                break
            cached += names
        self.flops = _flops(pack, [tables[name] for name in cached]) if cached else 0.0
        return cached

    def with_cached_hidden_states(self, pack: Pack, tables: dict[str, TokenTable]) -> dict[str, TokenTable]:
        """Return the tables with hidden states beside the tokens of those that are cached, and cut the pack there.

        Missing files are computed and written. `seconds`, `flops` and `used_bytes` are set, and the pack's
        `prefix_depth` if any table is cached. If a file cannot be written, for example for lack of room, the tables are
        returned unchanged.
        """
        began = time.perf_counter()
        extended, keys = dict(tables), list[str]()
        for name in self.cached_tables(pack, tables):
            keys.append(self._key(pack, tables[name]))
            hidden = self._load_or_fill(pack, tables[name], keys)
            if hidden is None:
                self.flops = 0.0
                return tables
            extended[name] = replace(tables[name], hidden=hidden)
        if keys:
            pack.prefix_depth = pack.depth
        self.used_bytes = sum(self._size(pack, tables[name]) for name in tables if extended[name] is not tables[name])
        self.seconds = time.perf_counter() - began
        return extended

    @staticmethod
    def _size(pack: Pack, table: TokenTable) -> int:
        """Return the bytes of a table's file."""
        return len(table.values) * pack.backbone.hidden_size * pack.backbone.compute_dtype.itemsize + TRAILER_BYTES

    def _key(self, pack: Pack, table: TokenTable) -> str:
        """Return a hash, as 40 digits, of all that the bits depend on: network, tokens, layout, versions, processor."""
        backbone = pack.backbone
        attention = getattr(backbone.network.config, "_attn_implementation", None)
        precision = (backbone.compute_dtype, backbone.quantization)
        network = (self.backbone_sha256, type(backbone).__name__, attention, pack.depth, *precision)
        layout = (ROWS, len(table), backbone.tokenizer.pad_token_id)
        programs = [torch.__version__, *map(version, ("transformers", "lora-bench"))]
        digest = sha256(f"{network} {layout} {programs} {_processor(backbone.device)}\n".encode())
        for array in (table.values, table.offsets, table.lengths, table.types):
            digest.update(b"-" if array is None else np.ascontiguousarray(array).data)
        return digest.hexdigest()[:40]

    def _load_or_fill(self, pack: Pack, table: TokenTable, keys: Collection[str]) -> HiddenStates | None:
        """Open the file of the last of these keys, written first if it is missing; None if it cannot be written.

        Args:
            pack: computes a missing file.
            table: of the last key.
            keys: of this run; their files are not removed to make room.
        """
        *_, key = keys
        files, size_bytes = CacheFiles("prefix", self.limit_bytes), self._size(pack, table) - TRAILER_BYTES
        file = files.open(key, size_bytes=size_bytes)
        if file is None:
            file = files.write(key, lambda output: _fill(pack, table, output), size_bytes=size_bytes, keep=keys)
        if file is None:
            return None
        return HiddenStates(files.path(key), file, pack.backbone.hidden_size, pack.backbone.compute_dtype)


def _processor(device: torch.device) -> tuple[str, str]:
    """Return the type and model of the processor, since processors may round differently."""
    if device.type == "cuda":
        return device.type, torch.cuda.get_device_name(device)
    return device.type, torch.backends.cpu.get_cpu_capability()


@torch.no_grad()
def _fill(pack: Pack, table: TokenTable, file: BinaryIO) -> None:
    """Write the hidden states of a table, computed in the canonical pass, to an empty file; no other trailer or key."""
    backbone = pack.backbone
    writer = HiddenStatesWriter(file, len(table.values), backbone.hidden_size, backbone.compute_dtype)
    mode = pack.training
    pack.eval()
    try:
        with stage("filling the prefix cache", total=len(table), unit="pairs") as progress:
            for rows, batch in evaluation_batches(table, ROWS, backbone.tokenizer.pad_token_id):
                hidden = backbone.prefix(batch.to(backbone.device), pack.depth)  # (N, T, D)
                writer.write(*token_positions(table, rows, batch.input_ids.shape[1]), hidden.cpu())
                progress.advance(len(rows))
    finally:
        pack.train(mode)


@torch.no_grad()
def _flops(pack: Pack, tables: Iterable[TokenTable]) -> float:
    """Return the FLOPs of the canonical pass over the tables."""

    def prefix(rows: int, length: int) -> None:
        pack.backbone.prefix(probe_batch(pack.backbone, rows, length), pack.depth)

    model = FlopModel.measure(prefix)
    return sum(model(len(rows), length) for table in tables for rows, length in evaluation_plan(table, ROWS))
