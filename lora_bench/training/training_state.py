"""What a training step changes: gathered for a checkpoint, and put back so that training goes on bit for bit.

    weights/<name>    what the member trains           adamw/<i>/<key>   its optimizer's moments
    buffers/<name>    what it keeps beside that        mean/<i>          its averaged weights
    running/<name>    statistics of its method         best/<name>       its best weights so far
    dropout           its stream of dropout            rng/<device>      torch's own stream

Batches are a function of seed and step, and rates of the step, so neither is kept. Each member of a pack has a state of
its own, so that it can go on alone or in another pack.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from lora_bench.errors import Code, DivergedError, UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from lora_bench.adapters.pack.pack import Pack
    from lora_bench.training.checkpoint import Checkpoint
    from lora_bench.training.weight_averaging import Average


@dataclass
class Outcome:
    """What became of one member."""

    status: str = "running"
    """`done`, `diverged` when its loss, gradient or scores ceased to be finite, `failed`, or `stopped` by halving."""
    error: Exception | None = None
    """Why it diverged or failed."""
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
    tokens: int = 0
    """Tokens that its steps went through, in all orders."""
    padding: int = 0
    """Those of them that only fill up a batch."""
    flops: float = 0.0
    """Arithmetic of its training steps: forward, backward."""
    without_gain: int = 0
    """Evaluations in a row that brought no better selection MCC, those of unsettled weights not counted."""


_KINDS: dict[str, Any] = {"status": str, "error": str | None, "best": dict | None, "without_gain": int}
_KINDS |= {"steps": int, "pairs": int, "tokens": int, "padding": int, "seconds": int | float, "flops": int | float}


@dataclass
class TrainingState:
    """All that changes from step to step, of every member of a pack."""

    pack: Pack
    outcomes: list[Outcome]
    adamw: Sequence[torch.optim.AdamW]
    averages: Sequence[Average]

    def gather(self, k: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Copies of all tensors of member `k` on the CPU, and what JSON can say."""
        pack, outcome, adamw, average = self.pack, self.outcomes[k], self.adamw[k], self.averages[k]
        parts: dict[str, dict[str, Tensor]] = {
            "rng": _torch_streams(pack),
            "weights": dict(pack.trainable(k)),
            "buffers": _buffers(pack, k),
            "running": _running(pack, k),
            "adamw": {
                f"{i}/{key}": value
                for i, moments in adamw.state_dict()["state"].items()
                for key, value in moments.items()
            },
            "mean": {str(i): average.means[p] for i, p in enumerate(average.parameters) if p in average.means},
            "best": outcome.state,
        }
        tensors = {"dropout": pack.dropout[k].get_state()}
        tensors |= {f"{part}/{name}": tensor for part, found in parts.items() for name, tensor in found.items()}
        copies = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
        facts = {
            "outcome": {key: value for key, value in vars(outcome).items() if key not in ("state", "error")},
            "averaged": average.steps,
            "ranks": pack.given_ranks[k],
            "room": pack.room,
        }
        return copies, facts

    @torch.no_grad()
    def put_back(self, k: int, checkpoint: Checkpoint) -> None:
        """Let member `k` go on from a checkpoint: it has its settings and given ranks, all else comes from there.

        Raises:
            UserError: the tensors are not those of this training.
        """
        with refusing_strangers():
            self._put_back(k, checkpoint)

    def _put_back(self, k: int, checkpoint: Checkpoint) -> None:
        pack, tensors = self.pack, dict(checkpoint.tensors)
        device = pack.backbone.device
        room = dict(checkpoint.facts.get("room", {}))
        _need(all(type(pairs) is int and pairs >= 1 for pairs in room.values()), "room")
        pack.room |= room
        parameters = dict(pack.trainable(k))
        _copy(tensors, "weights/", parameters)
        for name, update in pack.updates[k].items():
            update.put_back_running(_taken(tensors, f"running/{name}/"))
        _copy(tensors, "buffers/", _buffers(pack, k))
        moments: dict[int, dict[str, Tensor]] = {}
        for key, tensor in _taken(tensors, "adamw/").items():
            i, _, name = key.partition("/")
            moments.setdefault(int(i), {})[name] = tensor
        optimized = [p for group in self.adamw[k].param_groups for p in group["params"]]
        for number, found in moments.items():
            shape = optimized[number].shape
            shapes = {name: tensor.shape for name, tensor in found.items()}
            _need(shapes == {"step": (), "exp_avg": shape, "exp_avg_sq": shape}, f"adamw/{number}")
        self.adamw[k].load_state_dict({**self.adamw[k].state_dict(), "state": moments})
        average, means = self.averages[k], _taken(tensors, "mean/")
        average.steps = checkpoint.facts["averaged"]
        _need(len(means) == (len(parameters) if average.steps > 0 else 0), "mean")
        average.means = {average.parameters[int(i)]: mean.to(device) for i, mean in means.items()}
        _need(all(m.shape == p.shape and m.dtype == torch.float32 for p, m in average.means.items()), "mean")
        best = _taken(tensors, "best/")
        own = {name: p.shape for name, p in parameters.items()} if best else {}
        _need({name: tensor.shape for name, tensor in best.items()} == own, "best")
        self.outcomes[k] = outcome = Outcome(**checkpoint.facts["outcome"], state=best)
        for name, kinds in _KINDS.items():
            _need(isinstance(getattr(outcome, name), kinds), f"the outcome's {name}")
        if outcome.best is not None:
            _need(math.isfinite(outcome.best["metrics"]["mcc"]), "the best evaluation")
        pack.dropout[k].set_state(tensors.pop("dropout"))
        torch.set_rng_state(tensors.pop("rng/cpu"))
        cuda_stream = tensors.pop("rng/cuda", None)
        if cuda_stream is not None and device.type == "cuda":  # else it goes on elsewhere than it began
            torch.cuda.set_rng_state(cuda_stream, device)
        if tensors:
            raise UserError(
                f"the checkpoint holds tensors of another training, for example {next(iter(tensors))}",
                code=Code.MISMATCH,
            )


@contextmanager
def refusing_strangers() -> Iterator[None]:
    """Refuse a checkpoint in which something is missing or of another kind than this training would have written."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        raise UserError(
            f"the checkpoint is of another training ({type(error).__name__}: {first})", code=Code.MISMATCH
        ) from None


def _need(holds: bool, what: str) -> None:
    if not holds:
        raise UserError(f"the checkpoint is of another training: {what} does not fit", code=Code.MISMATCH)


@contextmanager
def contained(outcome: Outcome) -> Iterator[None]:
    """What goes wrong within is the end of this member, and of nobody else."""
    try:
        yield
    except Exception as error:
        outcome.status = "diverged" if isinstance(error, DivergedError) else "failed"
        outcome.error = error


def diverge(outcome: Outcome, step: int, what: str) -> None:
    """The member's numbers ceased to be finite at this step."""
    outcome.status = "diverged"
    outcome.error = DivergedError(f"step {step}: {what}; the learning rate may be too high (optimizer.lr)")


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
