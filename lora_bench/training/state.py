"""What a training step changes: gathered for a checkpoint, and put back so that training goes on bit for bit.

    0/weights/<name>    what member 0 trains           0/adamw/<i>/<key>   its optimizer's moments
    0/buffers/<name>    what it keeps beside that       0/mean/<i>          its averaged weights
    0/running/<name>    statistics of its method        0/best/<name>       its best weights so far
    0/dropout           its stream of dropout           rng/<device>        torch's own stream

Batches are a function of seed and step, and rates of the step, so neither is kept.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from lora_bench.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

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


_KINDS: dict[str, Any] = {"status": str, "error": str | None, "best": dict | None, "without_gain": int}
_KINDS |= {"steps": int, "pairs": int, "seconds": int | float, "flops": int | float}


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
        with refusing_strangers():
            self._put_back(checkpoint)

    def _put_back(self, checkpoint: Checkpoint) -> None:
        tensors = dict(checkpoint.tensors)
        self.pack.room = dict(checkpoint.facts.get("room", {}))
        _need(all(type(pairs) is int and pairs >= 1 for pairs in self.pack.room.values()), "room")
        device = self.pack.backbone.device
        for k in range(self.pack.size):
            parameters = dict(self.pack.trainable(k))
            _copy(tensors, f"{k}/weights/", parameters)
            for name, update in self.pack.updates[k].items():
                update.put_back_running(_taken(tensors, f"{k}/running/{name}/"))
            _copy(tensors, f"{k}/buffers/", _buffers(self.pack, k))
            moments: dict[int, dict[str, Tensor]] = {}
            for key, tensor in _taken(tensors, f"{k}/adamw/").items():
                i, _, name = key.partition("/")
                moments.setdefault(int(i), {})[name] = tensor
            optimized = [p for group in self.adamw[k].param_groups for p in group["params"]]
            for number, found in moments.items():
                shape = optimized[number].shape
                shapes = {name: tensor.shape for name, tensor in found.items()}
                _need(shapes == {"step": (), "exp_avg": shape, "exp_avg_sq": shape}, f"{k}/adamw/{number}")
            self.adamw[k].load_state_dict({**self.adamw[k].state_dict(), "state": moments})
            average, means = self.averages[k], _taken(tensors, f"{k}/mean/")
            average.steps = checkpoint.facts["averaged"][k]
            _need(len(means) == (len(parameters) if average.steps > 0 else 0), f"{k}/mean")
            average.means = {average.parameters[int(i)]: mean.to(device) for i, mean in means.items()}
            _need(all(m.shape == p.shape and m.dtype == torch.float32 for p, m in average.means.items()), f"{k}/mean")
            best = _taken(tensors, f"{k}/best/")
            own = {name: p.shape for name, p in parameters.items()} if best else {}
            _need({name: tensor.shape for name, tensor in best.items()} == own, f"{k}/best")
            self.outcomes[k] = outcome = Outcome(**checkpoint.facts["outcomes"][k], state=best)
            for name, kinds in _KINDS.items():
                _need(isinstance(getattr(outcome, name), kinds), f"the outcome's {name}")
            if outcome.best is not None:
                _need(math.isfinite(outcome.best["metrics"]["mcc"]), "the best evaluation")
            self.pack.dropout[k].set_state(tensors.pop(f"{k}/dropout"))
        torch.set_rng_state(tensors.pop("rng/cpu"))
        if "rng/cuda" in tensors:
            torch.cuda.set_rng_state(tensors.pop("rng/cuda"), device)
        if tensors:
            raise UserError(f"the checkpoint holds tensors of another training, for example {next(iter(tensors))}")


@contextmanager
def refusing_strangers() -> Iterator[None]:
    """Refuse a checkpoint in which something is missing or of another kind than this training would have written."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        raise UserError(f"the checkpoint is of another training ({type(error).__name__}: {first})") from None


def _need(holds: bool, what: str) -> None:
    if not holds:
        raise UserError(f"the checkpoint is of another training: {what} does not fit")


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
    _need(not wrong, ", ".join(wrong[:1]))
    for name, p in own.items():
        p.copy_(found[name])
