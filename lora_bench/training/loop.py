"""The training loop: a pack of K members, trained together, each as it would be alone.

for every batch:  forward once, one loss per member, backward; then per member clip, hooks, step
                  (members that learn tasks of their own have batches of their own, one after the other in each step)
when due:         score the selection split, keep each member's best state, stop whom it no longer helps; checkpoint

What goes wrong with one member is its own end, and nobody else's; who has ended is computed no more.
"""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from lora_bench.data.batching import evaluation_batches, micro_batches
from lora_bench.errors import LostFolderError, RunFailedError
from lora_bench.training import head_initialisation
from lora_bench.training.distributed import ALONE, Processes
from lora_bench.training.micro_batching import in_portions
from lora_bench.training.model_selection import Look, judge
from lora_bench.training.optim import make_optimizer, set_rate
from lora_bench.training.successive_halving import losers, places
from lora_bench.training.task_mixture import Course, Pairs, steps_asked
from lora_bench.training.training_state import Outcome, TrainingState, contained, diverge
from lora_bench.training.weight_averaging import Average, averaged

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from lora_bench.adapters.pack.pack import Pack
    from lora_bench.config.schema import Metric, Optimizer, Trainer
    from lora_bench.data.batching import Batch
    from lora_bench.data.tokenization import TokenTable
    from lora_bench.evaluation.cost import FlopModel
    from lora_bench.training.checkpoint import Checkpoint, Checkpoints
    from lora_bench.training.signals import Interruption


class Watcher(Protocol):
    """Who is told how training goes: the progress display and the record."""

    def stepped(self, step: int, losses: Mapping[int, float], pairs: int) -> None: ...

    def evaluated(self, member: int, line: dict[str, Any]) -> None: ...


def total_steps(trainer: Trainer, pairs: int) -> int:
    """Optimizer updates that the settings ask for, on so many training pairs of one task."""
    return steps_asked(trainer, math.ceil(pairs / trainer.batch_size))


def prepare(pack: Pack, trainer: Trainer, train: TokenTable, members: Sequence[int] | None = None) -> list[str]:
    """Let the methods of members (null: of all) look at training batches before the first step: starts and ranks.

    Returns:
        What the record should say of those that the batches told too little.
    """
    return prepare_courses(pack, trainer, [Course(range(pack.size), {"": Pairs(train, train)})], members)


def prepare_courses(
    pack: Pack, trainer: Trainer, courses: Sequence[Course], members: Sequence[int] | None = None
) -> list[str]:
    """The same where members learn tasks of their own, or several."""
    told: list[str | None] = []
    for course in courses:
        for k in course.members:
            if members is None or k in members:
                with pack.only([k]):
                    own = course.before(k)
                    told.append(pack.members[k].adapter.prepare(pack, k, own.batches(pack, trainer.batch_size)))
                    told.append(head_initialisation.begin(pack, k, own.batches(pack, trainer.batch_size)))
    return [each for each in told if each]


def fit(
    pack: Pack,
    optimizers: Sequence[Optimizer],
    trainer: Trainer,
    train: TokenTable,
    selection: TokenTable,
    *,
    swapped: TokenTable | None = None,
    **more: Any,
) -> list[Outcome]:
    """`fit_courses` where all members learn one task: its pairs, what choices are made on, and pairs exchanged."""
    return fit_courses(
        pack, optimizers, trainer, [Course(range(pack.size), {"": Pairs(train, selection, swapped)})], **more
    )


def fit_courses(
    pack: Pack,
    optimizers: Sequence[Optimizer],
    trainer: Trainer,
    courses: Sequence[Course],
    *,
    outcomes: list[Outcome] | None = None,
    runs: Sequence[Sequence[int]] | None = None,
    flop_models: Sequence[FlopModel] | None = None,
    metrics: Mapping[str, Metric] | None = None,
    watcher: Watcher | None = None,
    ended: Callable[[Sequence[int]], None] | None = None,
    checkpoints: Sequence[Checkpoints] | None = None,
    begun: Sequence[Checkpoint] | None = None,
    interruption: Interruption | None = None,
    processes: Processes = ALONE,
    halving: bool = False,
) -> list[Outcome]:
    """Train every member of the pack and leave it at its best selection MCC, of several tasks at the best mean.

    Args:
        pack: K members on one backbone, prepared.
        optimizers: one setting per member.
        trainer: durations, portions and objective; shared by all members.
        courses: what they learn, each member in one of them.
        outcomes: what has become of the members so far; only those that are running are trained.
        runs: members that make one run together; checkpoints are left for all while one of them trains. None: each
            member is a run.
        flop_models: FLOPs of one training step of each member, if they are to be counted.
        metrics: extra metrics to log.
        watcher: who is told.
        ended: called with members that have just ended; those that did not fail are at their best state.
        checkpoints: where to leave each member's state, as often as the settings say.
        begun: the states of one step to go on from, one per member; the pack has its ranks.
        interruption: whether someone asked to stop: the step is ended, the state left, and then it acts.
        processes: those that share each batch; all go through the same steps.
        halving: stop the worse half of the members at an eighth, a quarter and the half of the steps (halving.py).

    Returns:
        One outcome per member; those that diverged or failed are among them, and do not disturb the others.
    """
    members = range(pack.size)
    course_of = {k: course for course in courses for k in course.members}
    per_epoch = [course_of[k].steps_per_epoch(trainer.batch_size) for k in members]
    last_step = [course_of[k].steps(trainer) for k in members]
    look_every = [trainer.eval_every or of_epoch for of_epoch in per_epoch]
    steps = max(last_step)
    outcomes = outcomes or [Outcome() for _ in members]
    runs = runs or [[k] for k in members]
    adamw = [make_optimizer(settings, pack, k) for k, settings in enumerate(optimizers)]
    averages = [Average(pack.trainable(k).values(), trainer.average) for k in members]
    state = TrainingState(pack, outcomes, adamw, averages)
    for k, checkpoint in enumerate(begun or ()):
        if outcomes[k].status == "running":
            state.put_back(k, checkpoint)
            if outcomes[k].status == "done":  # before others of its run
                pack.load_state(k, outcomes[k].state)
    first = begun[0].step + 1 if begun else 1
    passes = [course.backward(pack, trainer) for course in courses]
    batches = [
        islice(course.batches(pack, trainer.batch_size, backward.multiple), first - 1, None)
        for course, backward in zip(courses, passes, strict=True)
    ]
    pack.train()

    def running() -> list[int]:
        return [k for k in members if outcomes[k].status == "running"]

    def end(left: Sequence[int]) -> None:
        for k in left:
            if outcomes[k].state:
                pack.load_state(k, outcomes[k].state)
        if left and ended:
            scored = any(outcomes[k].status == "done" for k in left)  # which takes time: a signal acts at once
            with interruption.lifted() if interruption and scored else nullcontext():
                ended(left)

    end([k for k in members if outcomes[k].status == "done"])  # resumed after their last step: only to be scored
    for step in range(first, steps + 1):
        live = pack.live = running()
        if not live:
            break
        told: dict[int, float] = {}
        pairs = 0
        for course, backward, stream in zip(courses, passes, batches, strict=True):
            learning = [k for k in course.members if k in live]
            if not learning:
                continue
            with pack.only(learning):
                began = time.perf_counter()
                batch = next(stream).of([course.members.index(k) for k in learning])
                losses = dict.fromkeys(learning, 0.0)
                if (own := processes.share(batch)) is not None:
                    work = partial(backward, own, batch.pairs)
                    losses = in_portions(pack, own, trainer.micro_batch_size, work)
                learned = (p for k in learning for p in pack.trainable(k, batch.head).values())
                losses = processes.add_up(learned, losses)
            for k in learning:
                with contained(outcomes[k]):
                    if not math.isfinite(losses[k]):
                        diverge(outcomes[k], step, f"loss {losses[k]} is not finite")
                        continue
                    norm = clip(pack, k, optimizers[k])
                    if not math.isfinite(norm):
                        diverge(outcomes[k], step, f"gradient norm {norm} is not finite")
                        continue
                    adapter, updates = pack.members[k].adapter, pack.updates[k]
                    set_rate(adamw[k], optimizers[k], step, last_step[k])
                    adapter.before_step(updates, step, last_step[k])
                    adamw[k].step()
                    adapter.after_step(updates, step, last_step[k])
                    adamw[k].zero_grad(set_to_none=True)
                    if adapter.settled(step, last_step[k]):
                        averages[k].add()
            seconds = time.perf_counter() - began
            B, T = batch.pairs, batch.input_ids.shape[1]
            for k, padding in zip(learning, batch.padding(len(learning)), strict=True):
                outcomes[k].steps = step
                outcomes[k].seconds += seconds
                outcomes[k].pairs += B
                outcomes[k].tokens += batch.orders * B * T
                outcomes[k].padding += padding
                outcomes[k].flops += flop_models[k](batch.orders * B, T) if flop_models else 0.0
            told |= losses
            pairs += B
        if watcher:
            watcher.stepped(step, told, pairs)

        pack.live = running()
        due = [k for k in pack.live if step % look_every[k] == 0 or step == last_step[k]]
        crowded = halving and step < steps and len(pack.live) > places(step, steps)
        losing: list[int] = []
        looking = pack.live if crowded else due
        if looking:
            found: dict[int, tuple[float, float]] = {}
            with averaged(averages[k] for k in looking):
                for k, look in _look(pack, courses, looking, trainer.eval_batch_size, processes).items():
                    with contained(outcomes[k]):
                        # A look that only halving asks for chooses no state: without it there would have been none.
                        settled = k in due and pack.members[k].adapter.settled(step, last_step[k])
                        at = {"step": step, "epoch": round(step / per_epoch[k], 4)}
                        line = judge(pack, k, outcomes[k], look, at, settled, metrics or {})
                        if line is not None:
                            found[k] = line["metrics"]["mcc"], line["metrics"]["auroc"] or 0.0
                            if watcher:
                                watcher.evaluated(k, line)
                        patience = trainer.early_stopping_patience
                        if patience is not None and outcomes[k].without_gain >= patience:
                            outcomes[k].status = "done"
                        best = outcomes[k].best
                        if trainer.stop_at is not None and best and best["metrics"]["mcc"] >= trainer.stop_at:
                            outcomes[k].status = "done"
            if crowded:
                losing = losers({k: found[k] for k in running()}, places(step, steps))
        for k in running():
            if step == last_step[k] < steps:  # others have more to learn
                outcomes[k].status = "done"
        # What all have heard of: a signal that comes from here on is acted on after the next step, by all of them.
        asked = processes.any_asked(interruption.asked) if interruption else None
        ending = [k for k in live if outcomes[k].status == "done"]
        needed = asked is not None or losing or step % (trainer.checkpoint_every or max(look_every)) == 0
        if checkpoints and (needed or ending or step == steps):
            # Who loses too: it can be gone on with; and who ends: what stops the scoring costs no step.
            going_on = {*running(), *ending}
            for k in (k for run in runs if not going_on.isdisjoint(run) for k in run):
                with contained(outcomes[k]):
                    try:
                        checkpoints[k].save(step, *state.gather(k))
                    except RunFailedError as error:
                        if needed or isinstance(error, LostFolderError):
                            raise  # else what was learned can be scored and saved, if nothing stops that
        for k in losing:
            if outcomes[k].status == "running":
                outcomes[k].status = "stopped"
        end([k for k in losing if outcomes[k].status == "stopped"])
        if interruption and asked is not None:
            interruption.act(asked)
        end([k for k in live if outcomes[k].status not in ("running", "stopped")])

    last = running()
    for k in last:
        outcomes[k].status = "done"
    end(last)
    pack.eval()
    return outcomes


@torch.no_grad()
def predict(pack: Pack, table: TokenTable, batch_size: int, processes: Processes = ALONE) -> NDArray[np.float64]:
    """P(label 1) of every row for every live member: (K, N), in the table's order. Leaves the pack's mode as it was.

    Of a table with its pairs exchanged, the mean of both orders.
    """
    if table.exchanged is not None:
        one, other = replace(table, exchanged=None), table.exchanged
        return (predict(pack, one, batch_size, processes) + predict(pack, other, batch_size, processes)) / 2
    scores = np.zeros((len(pack.live), len(table)))
    mode = pack.training
    pack.eval()
    batches = evaluation_batches(table, batch_size, pack.backbone.tokenizer.pad_token_id)
    for rows, batch in processes.shared_rows(batches):
        logits = in_portions(pack, batch, None, partial(_logits, pack, batch)).double()  # (K, B, 2)
        scores[:, rows] = torch.sigmoid(logits[..., 1] - logits[..., 0]).cpu().numpy()
    pack.train(mode)
    return processes.gather(scores)


def _logits(pack: Pack, batch: Batch, pairs: int) -> Tensor:
    """(K, B, 2), `pairs` of the B pairs at a time."""
    return torch.cat([pack(micro.to(pack.backbone.device)) for micro in micro_batches(batch, pairs)], dim=1)


def clip(pack: Pack, member: int, settings: Optimizer) -> float:
    """The member's gradient norm before clipping; torch's own `clip_grad_norm_` calls an operator per parameter."""
    gradients = [p.grad for p in pack.trainable(member).values() if p.grad is not None]
    norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))) if gradients else 0.0
    if settings.grad_clip_norm is not None and norm > settings.grad_clip_norm:
        torch._foreach_mul_(gradients, settings.grad_clip_norm / (norm + 1e-6))
    return norm


def _look(
    pack: Pack, courses: Sequence[Course], members: Sequence[int], batch_size: int, processes: Processes
) -> dict[int, Look]:
    found = {}
    for course in courses:
        looking = [k for k in course.members if k in members]
        if not looking:
            continue
        began = time.perf_counter()
        with pack.only(looking):
            scores = {
                name: predict(pack, pairs.selection, batch_size, processes) for name, pairs in course.tasks.items()
            }
        seconds = time.perf_counter() - began
        labels = {name: p.selection.labels for name, p in course.tasks.items() if p.selection.labels is not None}
        for i, k in enumerate(looking):
            found[k] = Look({name: of_all[i] for name, of_all in scores.items()}, labels, seconds)
    return {k: found[k] for k in members}
