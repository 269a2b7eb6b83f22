"""Full fine-tuning: every weight of the backbone and the head is trained, the baseline of the papers.

The backbone keeps its own dropout. Its weights change, so a pack with this method has one member and shares nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from lora_bench.adapters.base import Adapter


@dataclass(frozen=True, kw_only=True)
class Full(Adapter):
    """Settings of full fine-tuning: none but its default rate."""

    trains_backbone = True
