"""What a training step changes: gathered for a checkpoint, and put back so that training goes on bit for bit.

    0/weights/<name>    what member 0 trains           0/adamw/<i>/<key>   its optimizer's moments
    0/buffers/<name>    what it keeps beside that       0/mean/<i>          its averaged weights
    0/running/<name>    statistics of its method        0/best/<name>       its best weights so far
    0/dropout           its stream of dropout           rng/<device>        torch's own stream

Batches are a function of seed and step, and rates of the step, so neither is kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from lora_bench.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from lora_bench.adapters.pack import Pack
    from lora_bench.training.average import Average
    from lora_bench.training.checkpoint import Checkpoint


@dataclass
class Outcome:
    """What became of one member."""

    status: str = "running"
    """`done`, or `diverged` when its loss, gradient or scores ceased to be finite."""
    error: str | None = None
    best: dict[str, Any] | None = None
    """The line of its best evaluation: step, epoch, metrics on the selection split."""
    state: dict[str, Tensor] = field(default_factory=dict)
    """Its trained tensors at that evaluation."""
    steps: int = 0
    """Optimizer updates it made."""
    seconds: float = 0.0
    """Wall time of its training steps, evaluations not counted."""
    pairs: int = 0
    """Training pairs it saw; one that a step shows in both orders counts once."""
    flops: float = 0.0
    """Arithmetic of its training steps: forward, backward."""
    without_gain: int = 0
    """Evaluations in a row that brought no better selection MCC, those of unsettled weights not counted."""


@dataclass
class TrainingState:
    """All that changes from step to step, of every member of a pack."""

    pack: Pack
    outcomes: list[Outcome]
    adamw: Sequence[torch.optim.AdamW]
    averages: Sequence[Average]

    def gather(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Copies of all tensors on the CPU, and what JSON can say."""
        tensors: dict[str, Tensor] = {f"rng/{name}": state for name, state in _torch_streams(self.pack).items()}
        for k, (outcome, adamw, average) in enumerate(zip(self.outcomes, self.adamw, self.averages, strict=True)):
            parts: dict[str, dict[str, Tensor]] = {
                "weights": dict(self.pack.trainable(k)),
                "buffers": _buffers(self.pack, k),
                "running": _running(self.pack, k),
                "adamw": {
                    f"{i}/{key}": value
                    for i, moments in adamw.state_dict()["state"].items()
                    for key, value in moments.items()
                },
                "mean": {str(i): average.means[p] for i, p in enumerate(average.parameters) if p in average.means},
                "best": outcome.state,
            }
            tensors[f"{k}/dropout"] = self.pack.dropout[k].get_state()
            tensors |= {f"{k}/{part}/{name}": t for part, found in parts.items() for name, t in found.items()}
        copies = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
        facts = {
            "outcomes": [
                {key: value for key, value in vars(outcome).items() if key != "state"} for outcome in self.outcomes
            ],
            "averaged": [average.steps for average in self.averages],
            "ranks": self.pack.given_ranks,
            "room": self.pack.room,
        }
        return copies, facts

    @torch.no_grad()
    def put_back(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint: the pack has its settings and given ranks, everything else comes from it.

        Raises:
            UserError: the tensors are not those of this training.
        """
        tensors = dict(checkpoint.tensors)
        self.pack.room = dict(checkpoint.facts.get("room", {}))
        device = self.pack.backbone.device
        for k in range(self.pack.size):
            _copy(tensors, f"{k}/weights/", dict(self.pack.trainable(k)))
            for name, update in self.pack.updates[k].items():
                update.put_back_running(_taken(tensors, f"{k}/running/{name}/"))
            _copy(tensors, f"{k}/buffers/", _buffers(self.pack, k))
            moments: dict[int, dict[str, Tensor]] = {}
            for key, tensor in _taken(tensors, f"{k}/adamw/").items():
                i, _, name = key.partition("/")
                moments.setdefault(int(i), {})[name] = tensor
            self.adamw[k].load_state_dict({**self.adamw[k].state_dict(), "state": moments})
            average, means = self.averages[k], _taken(tensors, f"{k}/mean/")
            average.steps = checkpoint.facts["averaged"][k]
            average.means = {average.parameters[int(i)]: mean.to(device) for i, mean in means.items()}
            self.outcomes[k] = Outcome(**checkpoint.facts["outcomes"][k], state=_taken(tensors, f"{k}/best/"))
            self.pack.dropout[k].set_state(tensors.pop(f"{k}/dropout"))
        torch.set_rng_state(tensors.pop("rng/cpu"))
        if "rng/cuda" in tensors:
            torch.cuda.set_rng_state(tensors.pop("rng/cuda"), device)
        if tensors:
            raise UserError(f"the checkpoint holds tensors of another training, for example {next(iter(tensors))}")


def _torch_streams(pack: Pack) -> dict[str, Tensor]:
    """torch's own streams, which only full fine-tuning's dropout draws from."""
    streams = {"cpu": torch.get_rng_state()}
    if pack.backbone.device.type == "cuda":
        streams["cuda"] = torch.cuda.get_rng_state(pack.backbone.device)
    return streams


def _buffers(pack: Pack, member: int) -> dict[str, Tensor]:
    """What the member's updates keep beside their parameters: starts, projections, codes."""
    return {
        f"{name}/{key}": tensor
        for name, update in pack.updates[member].items()
        for key, tensor in update.state_dict().items()
        if key not in dict(update.named_parameters())
    }


def _running(pack: Pack, member: int) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": tensor
        for name, update in pack.updates[member].items()
        for key, tensor in update.running().items()
    }


def _taken(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Take the tensors whose names begin with `prefix` out of the whole."""
    names = [name for name in tensors if name.startswith(prefix)]
    return {name.removeprefix(prefix): tensors.pop(name) for name in names}


def _copy(tensors: dict[str, Tensor], prefix: str, own: Mapping[str, Tensor]) -> None:
    found = _taken(tensors, prefix)
    wrong = sorted(found.keys() ^ own.keys()) or [n for n, p in own.items() if found[n].shape != p.shape]
    if wrong:
        raise UserError(f"the checkpoint is of another training: {wrong[0]} does not fit")
    for name, p in own.items():
        p.copy_(found[name])
