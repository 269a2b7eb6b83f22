"""Shard the backbone of a pack, and check that its network can be computed so."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_bench.errors import Code, UserError
from lora_bench.training.dummy_step import dummy_step

if TYPE_CHECKING:
    from lora_bench.adapters.pack.pack import Pack

CHECK_TOKENS = 8


def shard(pack: Pack) -> None:
    """Shard the backbone of a pack over the processes of torchrun, before its members are prepared.

    A step on a dummy pair shows whether each layer is called as a module, whose weights are then gathered for it.

    Raises:
        UserError: the network computes with a layer's weights outside of that layer's call.
    """
    name = type(pack.network).__name__
    pack.shard()
    try:
        dummy_step(pack, 2, CHECK_TOKENS)
    except RuntimeError as error:
        if "DTensor" not in str(error):
            raise
        raise UserError(
            f"{name} computes with a layer's weights outside of that layer's call, where only a part of them is there",
            key="trainer.sharding",
            value="fsdp",
            remedy="Set trainer.sharding=none.",
            code=Code.UNSUPPORTED,
        ) from None
