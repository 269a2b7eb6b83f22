"""Settings of what shares one backbone: the jobs of a sweep, and the members of an ensemble."""

from __future__ import annotations

from dataclasses import dataclass

from lora_bench.checks import need, need_number
from lora_bench.errors import Code


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How jobs of a sweep share one backbone; what a job learns it learns in any pack."""

    size: int | None
    """Jobs trained together; null: as many as memory takes, 1: one after another."""
    memory_bytes: int | None
    """What a pack may take; null: a share of what is free when it starts."""
    workers: int | None
    """Processes that a sweep's packs are spread over; null: one for each GPU, and without any one in all."""
    halving: bool
    """Stop the worse half of a pack's jobs, by selection MCC, after an eighth, a quarter and the half of the steps."""

    def __post_init__(self) -> None:
        for name in (name for name in ("size", "memory_bytes", "workers") if getattr(self, name) is not None):
            need_number(name, getattr(self, name), 1)
        need(
            self.size != 1 or not self.halving,
            "halving",
            "true",
            "compares jobs of a pack; pack.size=1 makes it one",
            code=Code.CONFLICT,
        )


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """Members that one run trains together, and whose probabilities are averaged (Wang, Aitchison and Rudolph 2023)."""

    members: int | None
    """How many; null: no ensemble."""
    vary: list[str]
    """In what they differ: `init` (random starts of adapter and head), `order` (of the pairs), `dropout`."""

    def __post_init__(self) -> None:
        if self.members is not None:
            remedy = "null trains one adapter as usual."
            need(self.members >= 2, "members", self.members, "is no ensemble: it takes at least 2 members", remedy)
            need_number("members", self.members, 2, 100)
        need(bool(self.vary), "vary", self.vary, "is empty: the members would all be the same", code=Code.INVALID_VALUE)
        need(set(self.vary) <= set(VARIED), "vary", self.vary, f"holds something else than {', '.join(VARIED)}")

    @property
    def size(self) -> int:
        return self.members or 1  # without an ensemble, one


VARIED = ("init", "order", "dropout")  # in what the members of an ensemble can differ
