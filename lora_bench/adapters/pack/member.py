"""A member of a pack, and the independent random streams of its seed."""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lora_bench.adapters.base import Adapter


@dataclass(frozen=True)
class Member:
    """The method, settings and seed that distinguish one member of a pack."""

    adapter: Adapter
    seed: int
    saved_ranks: dict[str, int] | None = None
    """Rank by module of a saved adapter whose tensors are about to be loaded; None: a member that is to be trained."""
    seeds: Mapping[str, int] = field(default_factory=dict)
    """Seeds of `init`, `order` and `dropout` that differ from `seed`."""
    outputs: Sequence[int] = ()
    """Number of logits of each head, one for each task that the member learns; `Batch.head` chooses among them. Empty:
    one head with the outputs of the backbone's own."""
    pair_features: bool | None = False
    """Add pair features to the logits; None: if the backbone can tell the two texts apart."""
    signed_differences: bool = False
    """The pair features' differences depend on the order of the texts."""
    fit_batches: int = 0
    """Training batches that the output layer is fitted to before the first step; 0: it starts at random."""

    def seed_of(self, purpose: str) -> int:
        """Return the seed of `init`, `order` (of the pairs) or `dropout`."""
        return self.seeds.get(purpose, self.seed)


def stream(seed: int, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return the random stream of one purpose (`adapter`, `head`, `dropout`) of a seed.

    Streams of different seeds or purposes are independent.
    """
    digest = sha256(f"{seed}/{purpose}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))
