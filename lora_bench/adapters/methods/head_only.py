"""The head alone on the frozen backbone: what an adapter adds is measured against this.

Nothing below the head is trained, so the whole backbone is prefix: it runs without gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_bench.adapters.base import Adapter
from lora_bench.errors import Code, UserError

if TYPE_CHECKING:
    from lora_bench.backbones.base import Backbone


@dataclass(frozen=True, kw_only=True)
class HeadOnly(Adapter):
    """Settings of the linear probe: none but its default rate."""

    def targets(self, backbone: Backbone) -> list[str]:
        """Return an empty list; a backbone without a head (text-to-text) is a `UserError`."""
        if not backbone.head_modules:
            raise UserError(
                "a text-to-text model has no head to train",
                key="method",
                value="head_only",
                remedy="Take adapter=lora or adapter=full, or the other model.form, which has a head.",
                code=Code.UNSUPPORTED,
            )
        return []
