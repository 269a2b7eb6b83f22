"""What a training step changes: gathered for a checkpoint, and put back so that training goes on bit for bit.

    weights/<name>    what the member trains           adamw/<i>/<key>   its optimizer's moments
    buffers/<name>    what it keeps beside that        mean/<i>          its averaged weights
    running/<name>    statistics of its method         best/<name>       its best weights so far
    scores/<task>     its scores at the best            rng/<device>      torch's own stream
    dropout           its stream of dropout

Batches are a function of seed and step, and rates of the step, so neither is kept. Each member of a pack has a state of
its own, so that it can go on alone or in another pack.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from lora_bench.errors import Code, UserError
from lora_bench.training.member_run import MemberProgress

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from lora_bench.adapters.pack.pack import Pack
    from lora_bench.training.checkpoint import Checkpoint
    from lora_bench.training.member_run import MemberRun


_TYPES: dict[str, Any] = {"status": str, "best": dict | None, "without_gain": int}
_TYPES |= {"steps": int, "pairs": int, "tokens": int, "padding": int, "seconds": int | float, "flops": int | float}


def gather(member: MemberRun) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return copies on the CPU of all tensors of a member's training, and the facts that JSON can hold."""
    pack, k, progress, average = member.pack, member.index, member.progress, member.average
    sections: dict[str, dict[str, Tensor]] = {
        "rng": _torch_streams(pack),
        "weights": dict(pack.trainable(k)),
        "buffers": _buffers(pack, k),
        "running": _running_statistics(pack, k),
        "adamw": {
            f"{i}/{key}": value
            for i, moments in member.optimizer.state_dict()["state"].items()
            for key, value in moments.items()
        },
        "mean": {str(i): average.means[p] for i, p in enumerate(average.parameters) if p in average.means},
        "best": progress.state,
        "scores": {task: torch.from_numpy(scores) for task, scores in progress.scores.items()},
    }
    tensors = {"dropout": pack.dropout[k].get_state()}
    tensors |= {f"{section}/{name}": tensor for section, named in sections.items() for name, tensor in named.items()}
    copies = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    facts = {
        "outcome": {name: getattr(progress, name) for name in _TYPES},
        "averaged": average.steps,
        "ranks": pack.assigned_ranks[k],
        "room": pack.max_micro_batch,
    }
    return copies, facts


@torch.no_grad()
def restore(member: MemberRun, checkpoint: Checkpoint) -> None:
    """Put a member into the state of a checkpoint; its settings and given ranks are those of the checkpoint already.

    Raises:
        UserError: the tensors are not those of this training.
    """
    with reject_foreign_checkpoint():
        tensors = dict(checkpoint.tensors)
        max_pairs = dict(checkpoint.facts.get("room", {}))
        _require(all(type(pairs) is int and pairs >= 1 for pairs in max_pairs.values()), "room")
        member.pack.max_micro_batch |= max_pairs
        _restore_weights(member, tensors)
        _restore_optimizer(member, tensors)
        _restore_average(member, tensors, checkpoint.facts["averaged"])
        _restore_progress(member, tensors, checkpoint.facts["outcome"])
        _restore_streams(member, tensors)
        if tensors:
            raise UserError(
                f"the checkpoint holds tensors of another training, for example {next(iter(tensors))}",
                code=Code.MISMATCH,
            )


def _restore_weights(member: MemberRun, tensors: dict[str, Tensor]) -> None:
    pack, k = member.pack, member.index
    _copy(tensors, "weights/", dict(pack.trainable(k)))
    for name, update in pack.updates[k].items():
        update.load_training_statistics(_take(tensors, f"running/{name}/"))
    _copy(tensors, "buffers/", _buffers(pack, k))


def _restore_optimizer(member: MemberRun, tensors: dict[str, Tensor]) -> None:
    moments: dict[int, dict[str, Tensor]] = {}
    for key, tensor in _take(tensors, "adamw/").items():
        i, _, name = key.partition("/")
        moments.setdefault(int(i), {})[name] = tensor
    parameters = [p for group in member.optimizer.param_groups for p in group["params"]]
    for number, of_parameter in moments.items():
        shape = parameters[number].shape
        shapes = {name: tensor.shape for name, tensor in of_parameter.items()}
        _require(shapes == {"step": (), "exp_avg": shape, "exp_avg_sq": shape}, f"adamw/{number}")
    member.optimizer.load_state_dict({**member.optimizer.state_dict(), "state": moments})


def _restore_average(member: MemberRun, tensors: dict[str, Tensor], steps: int) -> None:
    average, means = member.average, _take(tensors, "mean/")
    average.steps = steps
    _require(len(means) == (len(average.parameters) if steps > 0 else 0), "mean")
    device = member.pack.backbone.device
    average.means = {average.parameters[int(i)]: mean.to(device) for i, mean in means.items()}
    _require(all(m.shape == p.shape and m.dtype == torch.float32 for p, m in average.means.items()), "mean")


def _restore_progress(member: MemberRun, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    best, scores = _take(tensors, "best/"), _take(tensors, "scores/")
    shapes = {name: p.shape for name, p in member.pack.trainable(member.index).items()} if best else {}
    _require({name: tensor.shape for name, tensor in best.items()} == shapes, "best")
    _require(all(tensor.ndim == 1 and tensor.dtype == torch.float64 for tensor in scores.values()), "scores")
    _require(all(bool(torch.isfinite(tensor).all()) for tensor in scores.values()), "scores")
    _require(facts.keys() == _TYPES.keys(), "the progress")
    member.progress = MemberProgress(
        **facts, state=best, scores={task: tensor.numpy() for task, tensor in scores.items()}
    )
    for name, types in _TYPES.items():
        _require(isinstance(getattr(member.progress, name), types), f"the outcome's {name}")
    if member.progress.best is not None:
        _require(math.isfinite(member.progress.best["metrics"]["mcc"]), "the best evaluation")


def _restore_streams(member: MemberRun, tensors: dict[str, Tensor]) -> None:
    device = member.pack.backbone.device
    member.pack.dropout[member.index].set_state(tensors.pop("dropout"))
    torch.set_rng_state(tensors.pop("rng/cpu"))
    cuda_stream = tensors.pop("rng/cuda", None)
    if cuda_stream is not None and device.type == "cuda":  # else the run is resumed on another device
        torch.cuda.set_rng_state(cuda_stream, device)


@contextmanager
def reject_foreign_checkpoint() -> Iterator[None]:
    """Refuse a checkpoint in which something is missing or of another kind than this training would have written."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        raise UserError(
            f"the checkpoint is of another training ({type(error).__name__}: {first})", code=Code.MISMATCH
        ) from None


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise UserError(f"the checkpoint is of another training: {what} does not fit", code=Code.MISMATCH)


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


def _running_statistics(pack: Pack, member: int) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": tensor
        for name, update in pack.updates[member].items()
        for key, tensor in update.training_statistics().items()
    }


def _take(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Take the tensors whose names begin with `prefix` out of the whole."""
    names = [name for name in tensors if name.startswith(prefix)]
    return {name.removeprefix(prefix): tensors.pop(name) for name in names}


def _copy(tensors: dict[str, Tensor], prefix: str, own: Mapping[str, Tensor]) -> None:
    found = _take(tensors, prefix)
    wrong = sorted(found.keys() ^ own.keys()) or [n for n, p in own.items() if found[n].shape != p.shape]
    _require(not wrong, ", ".join(wrong[:1]))
    for name, p in own.items():
        p.copy_(found[name])
