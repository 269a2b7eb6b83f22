"""The training state of a member: gathered for a checkpoint, and restored so that training resumes bit for bit.

    weights/<name>    trained tensors                  adamw/<i>/<key>   moments of the optimizer
    buffers/<name>    fixed tensors of its updates     mean/<i>          averaged weights
    running/<name>    statistics of its method         best/<name>       trained tensors at the best evaluation
    scores/<task>     scores at the best evaluation    rng/<device>      torch's global random stream
    dropout           random stream of its dropout

Batches are a function of seed and step, and learning rates of the step, so neither is saved. Each member of a pack has
a state of its own, so that it can be resumed in a single run or in another pack.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from lora_bench.backbones.sharding import full_tensor, gather_part, local_tensor, part_of
from lora_bench.errors import Code, UserError
from lora_bench.training.member_run import MemberProgress

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from lora_bench.adapters.pack.pack import Pack
    from lora_bench.training.checkpoint import Checkpoint
    from lora_bench.training.member_run import MemberRun


_TYPES: dict[str, Any] = {"status": str, "best": dict | None, "without_gain": int, "at_target": int}
_TYPES |= {"steps": int, "pairs": int, "tokens": int, "padding": int, "seconds": int | float, "flops": int | float}


def gather(member: MemberRun, *, keep: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the training state of a member: copies of its tensors on the CPU, and the rest as JSON.

    Every process of a sharded pack must call this; those that do not need the copies set `keep` to False.

    Returns:
        Tensors by `<section>/<name>`, and metadata: `outcome` (its progress), `averaged` (steps in the mean), `ranks`
        and `room` (micro-batches that fit into memory).
    """
    pack, k, progress, average = member.pack, member.index, member.progress, member.average
    trained = pack.trainable(k)
    sections: dict[str, dict[str, Tensor]] = {
        "rng": _torch_streams(pack),
        "weights": dict(trained),
        "buffers": _buffers(pack, k),
        "running": _running_statistics(pack, k),
        "adamw": {
            f"{i}/{key}": value
            for i, moments in member.optimizer.state_dict()["state"].items()
            for key, value in moments.items()
        },
        "mean": {str(i): average.means[p] for i, p in enumerate(average.parameters) if p in average.means},
        "scores": {task: torch.from_numpy(scores) for task, scores in progress.scores.items()},
    }
    tensors = {"dropout": pack.dropout[k].get_state()}
    tensors |= {f"{section}/{name}": tensor for section, named in sections.items() for name, tensor in named.items()}
    full = ((name, full_tensor(tensor)) for name, tensor in tensors.items())
    best = ((f"best/{name}", gather_part(part, trained[name])) for name, part in progress.state.items())
    copies = {}
    for name, tensor in chain(full, best):  # one after another: a device need not hold all of them
        if keep:
            copies[name] = tensor.cpu().clone()
    metadata = {
        "outcome": {name: getattr(progress, name) for name in _TYPES},
        "averaged": average.steps,
        "ranks": pack.assigned_ranks[k],
        "room": pack.max_micro_batch,
    }
    return copies, metadata


@torch.no_grad()
def restore(member: MemberRun, checkpoint: Checkpoint) -> None:
    """Restore the state of a checkpoint into a member, whose settings and ranks are already those of the checkpoint.

    Torch's global random streams are set too, and the pack learns which micro-batches fit into memory.

    Raises:
        UserError: the tensors or metadata are not those of this member's training; it may be restored in part.
    """
    with reject_foreign_checkpoint():
        tensors = dict(checkpoint.tensors)
        max_pairs = dict(checkpoint.metadata.get("room", {}))
        _require(all(type(pairs) is int and pairs >= 1 for pairs in max_pairs.values()), "room")
        member.pack.max_micro_batch |= max_pairs
        _restore_weights(member, tensors)
        _restore_optimizer(member, tensors)
        _restore_average(member, tensors, checkpoint.metadata["averaged"])
        _restore_progress(member, tensors, checkpoint.metadata["outcome"])
        _restore_streams(member, tensors)
        if tensors:
            raise UserError(
                f"the checkpoint has tensors that this run does not have, for example {next(iter(tensors))}",
                code=Code.MISMATCH,
            )


def _restore_weights(member: MemberRun, tensors: dict[str, Tensor]) -> None:
    """Move trained tensors, the method's statistics and buffers from `tensors` into the member.

    Raises:
        UserError: a trained tensor or buffer is missing, superfluous or of another shape.
    """
    pack, k = member.pack, member.index
    _copy(tensors, "weights/", dict(pack.trainable(k)))
    for name, update in pack.updates[k].items():
        update.load_training_statistics(_take(tensors, f"running/{name}/"))
    _copy(tensors, "buffers/", _buffers(pack, k))


def _restore_optimizer(member: MemberRun, tensors: dict[str, Tensor]) -> None:
    """Move the moments of AdamW from `tensors` into the optimizer, whose settings stay.

    Raises:
        UserError: moments of a parameter are incomplete or of another shape. Parameters without moments are accepted.
    """
    moments: dict[int, dict[str, Tensor]] = {}
    for key, tensor in _take(tensors, "adamw/").items():
        i, _, name = key.partition("/")
        moments.setdefault(int(i), {})[name] = tensor
    parameters = [p for group in member.optimizer.param_groups for p in group["params"]]
    for number, of_parameter in moments.items():
        shape = parameters[number].shape
        shapes = {name: tensor.shape for name, tensor in of_parameter.items()}
        _require(shapes == {"step": (), "exp_avg": shape, "exp_avg_sq": shape}, f"adamw/{number}")
        for name in ("exp_avg", "exp_avg_sq"):
            of_parameter[name] = part_of(of_parameter[name], parameters[number].detach())
    member.optimizer.load_state_dict({**member.optimizer.state_dict(), "state": moments})


def _restore_average(member: MemberRun, tensors: dict[str, Tensor], steps: int) -> None:
    """Move the means from `tensors` into the weight average: one for each tensor if `steps` is above 0, else none.

    Raises:
        UserError: a mean is missing, superfluous, of another shape, or not in fp32.
    """
    average, means = member.average, _take(tensors, "mean/")
    average.steps = steps
    _require(len(means) == (len(average.parameters) if steps > 0 else 0), "mean")
    parameters = {i: average.parameters[int(i)] for i in means}
    average.means = {p: part_of(means[i], p.detach()) for i, p in parameters.items()}
    _require(all(m.shape == p.shape and m.dtype == torch.float32 for p, m in average.means.items()), "mean")


def _restore_progress(member: MemberRun, tensors: dict[str, Tensor], outcome: dict[str, Any]) -> None:
    """Replace the member's progress by `outcome`, with best state and scores moved from `tensors`.

    Raises:
        UserError: a value is missing, unknown, of another type or shape, or not finite.
    """
    best, scores = _take(tensors, "best/"), _take(tensors, "scores/")
    trained = member.pack.trainable(member.index)
    shapes = {name: p.shape for name, p in trained.items()} if best else {}
    _require({name: tensor.shape for name, tensor in best.items()} == shapes, "best")
    _require(all(tensor.ndim in (1, 2) and tensor.dtype == torch.float64 for tensor in scores.values()), "scores")
    _require(all(bool(torch.isfinite(tensor).all()) for tensor in scores.values()), "scores")
    outcome = {"at_target": 0, **outcome}  # version 0.1 did not count it
    _require(outcome.keys() == _TYPES.keys(), "the progress")
    if outcome["status"] == "stopped":  # the name of `eliminated` in version 0.1
        outcome = {**outcome, "status": "eliminated"}
    member.progress = MemberProgress(
        **outcome,
        state={name: local_tensor(part_of(tensor, trained[name])).cpu().clone() for name, tensor in best.items()},
        scores={task: tensor.numpy() for task, tensor in scores.items()},
        main_metric=member.progress.main_metric,
    )
    for name, types in _TYPES.items():
        _require(isinstance(getattr(member.progress, name), types), f"the outcome's {name}")
    if member.progress.best is not None:
        _require(math.isfinite(member.progress.best_value), "the best evaluation")


def _restore_streams(member: MemberRun, tensors: dict[str, Tensor]) -> None:
    """Move the random states from `tensors` into the member's dropout and torch's global streams.

    A state of CUDA is dropped if the member is on a CPU.
    """
    device = member.pack.backbone.device
    member.pack.dropout[member.index].set_state(tensors.pop("dropout"))
    torch.set_rng_state(tensors.pop("rng/cpu"))
    cuda_stream = tensors.pop("rng/cuda", None)
    if cuda_stream is not None and device.type == "cuda":  # else the run is resumed on another device
        torch.cuda.set_rng_state(cuda_stream, device)


@contextmanager
def reject_foreign_checkpoint() -> Iterator[None]:
    """Turn the errors of reading a checkpoint that this run cannot have written into a UserError.

    They are errors of arithmetic, attributes, look-ups, types and values, and `RuntimeError`; others pass unchanged.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        raise UserError(
            f"the checkpoint does not belong to this run ({type(error).__name__}: {first})", code=Code.MISMATCH
        ) from None


def _require(holds: bool, name: str) -> None:
    """Refuse a checkpoint unless the condition on the entry of this name holds."""
    if not holds:
        raise UserError(f"the checkpoint does not belong to this run: {name} does not fit", code=Code.MISMATCH)


def _torch_streams(pack: Pack) -> dict[str, Tensor]:
    """Return the states of torch's global random streams, which only the dropout of full fine-tuning uses."""
    streams = {"cpu": torch.get_rng_state()}
    if pack.backbone.device.type == "cuda":
        streams["cuda"] = torch.cuda.get_rng_state(pack.backbone.device)
    return streams


def _buffers(pack: Pack, member: int) -> dict[str, Tensor]:
    """Return the fixed tensors of a member's updates: initial values, projections, quantisation codes."""
    return {
        f"{name}/{key}": tensor
        for name, update in pack.updates[member].items()
        for key, tensor in update.state_dict().items()
        if key not in dict(update.named_parameters())
    }


def _running_statistics(pack: Pack, member: int) -> dict[str, Tensor]:
    """Return the running statistics that a member's method keeps of each update."""
    return {
        f"{name}/{key}": tensor
        for name, update in pack.updates[member].items()
        for key, tensor in update.training_statistics().items()
    }


def _take(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Remove the tensors whose names begin with `prefix` from the dictionary, and return them without the prefix."""
    names = [name for name in tensors if name.startswith(prefix)]
    return {name.removeprefix(prefix): tensors.pop(name) for name in names}


def _copy(tensors: dict[str, Tensor], prefix: str, targets: Mapping[str, Tensor]) -> None:
    """Copy the tensors whose names begin with `prefix` into the targets, which have the names without it.

    They are removed from `tensors`. Names or shapes that differ are a `UserError`, and nothing is copied.
    """
    saved = _take(tensors, prefix)
    wrong = sorted(saved.keys() ^ targets.keys()) or [n for n, p in targets.items() if saved[n].shape != p.shape]
    _require(not wrong, ", ".join(wrong[:1]))
    for name, p in targets.items():
        p.copy_(part_of(saved[name], p))
