"""The training loop: a pack of K members, trained together, each as it would be alone.

for every batch:  forward once, one loss per member, backward; then per member clip, hooks, step
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

from lora_bench.data.batching import BatchPlan, evaluation_batches, micro_batches, training_batches
from lora_bench.errors import DivergedError
from lora_bench.evaluation.metrics import score
from lora_bench.training.average import Average, averaged, averaging_starts
from lora_bench.training.backward import Backward
from lora_bench.training.distributed import ALONE, Processes
from lora_bench.training.halving import losers, places
from lora_bench.training.objective import make_objective
from lora_bench.training.optim import make_optimizer, set_rate
from lora_bench.training.portions import in_portions
from lora_bench.training.state import Outcome, TrainingState, contained, diverge

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from lora_bench.adapters.pack import Pack
    from lora_bench.config import Metric, Optimizer, Trainer
    from lora_bench.data.batching import Batch
    from lora_bench.data.pairs import TokenTable
    from lora_bench.evaluation.cost import FlopModel
    from lora_bench.training.checkpoint import Checkpoint, Checkpoints
    from lora_bench.training.interrupt import Interruption


class Watcher(Protocol):
    """Who is told how training goes: the progress display and the record."""

    def stepped(self, step: int, losses: Mapping[int, float], pairs: int) -> None: ...

    def evaluated(self, member: int, line: dict[str, Any]) -> None: ...


def total_steps(trainer: Trainer, pairs: int) -> int:
    """Optimizer updates that the settings ask for, on so many training pairs."""
    exact = trainer.epochs * math.ceil(pairs / trainer.batch_size)
    steps = max(1, math.ceil(round(exact, 6)))  # 1.1 epochs of 10 steps are 11, not 11.000000000000002
    return steps if trainer.max_steps is None else min(steps, trainer.max_steps)


def prepare(pack: Pack, trainer: Trainer, train: TokenTable, members: Sequence[int] | None = None) -> None:
    """Let the methods of members (null: of all) look at training batches before the first step: starts and ranks."""
    plan = BatchPlan(train.lengths, trainer.batch_size)
    for k in range(pack.size) if members is None else members:
        with pack.only([k]):
            pack.members[k].adapter.prepare(pack, k, _endless_batches(pack, train, plan))


def fit(
    pack: Pack,
    optimizers: Sequence[Optimizer],
    trainer: Trainer,
    train: TokenTable,
    selection: TokenTable,
    *,
    outcomes: list[Outcome] | None = None,
    swapped: TokenTable | None = None,
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
    """Train every member of the pack and leave it at its best selection MCC.

    Args:
        pack: K members on one backbone, prepared.
        optimizers: one setting per member.
        trainer: durations, portions and objective; shared by all members.
        train: what is learned from.
        selection: what every choice is made on; never the reported split.
        outcomes: what has become of the members so far; only those that are running are trained.
        swapped: the second looks at pairs of `train` (exchanged, perturbed or themselves), if the objective has any.
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
    objective = make_objective(trainer, train.labels)
    assert objective.orders == (1 if swapped is None else 2)
    lengths = train.lengths if swapped is None else np.maximum(train.lengths, swapped.lengths)
    backward = Backward(pack, objective, graphs=trainer.cuda_graphs)
    plan = BatchPlan(lengths, trainer.batch_size, backward.multiple)
    steps = total_steps(trainer, len(train))
    eval_every = trainer.eval_every or plan.steps_per_epoch
    members = range(pack.size)
    outcomes = outcomes or [Outcome() for _ in members]
    adamw = [make_optimizer(settings, pack, k) for k, settings in enumerate(optimizers)]
    averages = [Average(pack.trainable(k).values()) for k in members]
    averaging_from = averaging_starts(trainer.average, steps)
    state = TrainingState(pack, outcomes, adamw, averages)
    for k, checkpoint in enumerate(begun or ()):
        if outcomes[k].status == "running":
            state.put_back(k, checkpoint)
    first = begun[0].step + 1 if begun else 1
    batches = islice(_endless_batches(pack, train, plan, swapped), first - 1, None)
    pack.train()

    def running() -> list[int]:
        return [k for k in members if outcomes[k].status == "running"]

    def end(left: Sequence[int]) -> None:
        for k in left:
            if outcomes[k].state:
                pack.load_state(k, outcomes[k].state)
        if left and ended:
            with interruption.lifted() if interruption else nullcontext():
                ended(left)

    for step in range(first, steps + 1):
        live = pack.live = running()
        if not live:
            break
        began = time.perf_counter()
        batch = next(batches).of(live)
        losses = dict.fromkeys(live, 0.0)
        if (own := processes.share(batch)) is not None:
            work = partial(backward, own, batch.pairs)
            losses = in_portions(pack, own, trainer.micro_batch_size, work)
        losses = processes.add_up((p for k in live for p in pack.trainable(k).values()), losses)
        for k in live:
            with contained(outcomes[k]):
                if not math.isfinite(losses[k]):
                    diverge(outcomes[k], step, f"loss {losses[k]} is not finite")
                    continue
                norm = clip(pack, k, optimizers[k])
                if not math.isfinite(norm):
                    diverge(outcomes[k], step, f"gradient norm {norm} is not finite")
                    continue
                adapter, updates = pack.members[k].adapter, pack.updates[k]
                set_rate(adamw[k], optimizers[k], step, steps)
                adapter.before_step(updates, step, steps)
                adamw[k].step()
                adapter.after_step(updates, step, steps)
                adamw[k].zero_grad(set_to_none=True)
                if step >= averaging_from and adapter.settled(step, steps):
                    averages[k].add()

        seconds = time.perf_counter() - began
        B, T = batch.pairs, batch.input_ids.shape[1]
        for k, padding in zip(live, batch.padding(len(live)), strict=True):
            outcomes[k].steps = step
            outcomes[k].seconds += seconds
            outcomes[k].pairs += B
            outcomes[k].tokens += batch.orders * B * T
            outcomes[k].padding += padding
            outcomes[k].flops += flop_models[k](batch.orders * B, T) if flop_models else 0.0
        if watcher:
            watcher.stepped(step, losses, B)

        pack.live = running()
        due = step % eval_every == 0 or step == steps
        crowded = halving and step < steps and len(pack.live) > places(step, steps)
        losing: list[int] = []
        if pack.live and (due or crowded):
            found: dict[int, tuple[float, float]] = {}
            with averaged(averages[k] for k in pack.live):
                began = time.perf_counter()
                scores = predict(pack, selection, trainer.eval_batch_size, processes)  # (K, N)
                seconds = time.perf_counter() - began
                for k, own in zip(pack.live, scores, strict=True):
                    with contained(outcomes[k]):
                        # A look that only halving asks for chooses no state: without it there would have been none.
                        settled = due and pack.members[k].adapter.settled(step, steps)
                        values = _judge(
                            pack, k, outcomes[k], own, selection, step, plan, seconds, settled, metrics, watcher
                        )
                        if values is not None:
                            found[k] = values
                        patience = trainer.early_stopping_patience
                        if patience is not None and outcomes[k].without_gain >= patience:
                            outcomes[k].status = "done"
                        best = outcomes[k].best
                        if trainer.stop_at is not None and best and best["metrics"]["mcc"] >= trainer.stop_at:
                            outcomes[k].status = "done"
            if crowded:
                losing = losers({k: found[k] for k in running()}, places(step, steps))
        # What all have heard of: a signal that comes from here on is acted on after the next step, by all of them.
        asked = processes.any_asked(interruption.asked) if interruption else None
        if checkpoints and (asked is not None or losing or step % (trainer.checkpoint_every or eval_every) == 0):
            for k in running():  # who loses too: it can be gone on with
                with contained(outcomes[k]):
                    checkpoints[k].save(step, *state.gather(k))
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


def _endless_batches(
    pack: Pack, train: TokenTable, plan: BatchPlan, swapped: TokenTable | None = None
) -> Iterator[Batch]:
    seeds = [pack.members[k].seed_of("order") for k in pack.live]
    epoch = 0
    while True:
        yield from training_batches(train, plan, seeds, epoch, pack.backbone.tokenizer.pad_token_id, swapped)
        epoch += 1


def clip(pack: Pack, member: int, settings: Optimizer) -> float:
    """The member's gradient norm before clipping; torch's own `clip_grad_norm_` calls an operator per parameter."""
    gradients = [p.grad for p in pack.trainable(member).values() if p.grad is not None]
    norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))) if gradients else 0.0
    if settings.grad_clip_norm is not None and norm > settings.grad_clip_norm:
        torch._foreach_mul_(gradients, settings.grad_clip_norm / (norm + 1e-6))
    return norm


def _judge(
    pack: Pack,
    member: int,
    outcome: Outcome,
    scores: NDArray[np.float64],
    selection: TokenTable,
    step: int,
    plan: BatchPlan,
    seconds: float,
    settled: bool,
    metrics: Mapping[str, Metric] | None,
    watcher: Watcher | None,
) -> tuple[float, float] | None:
    """Score one member on the selection split; remember its state where it is settled and the best so far.

    Returns:
        Its MCC and AUROC; None where it has diverged.
    """
    assert selection.labels is not None
    try:
        values = score(scores, selection.labels, metrics or {})
    except DivergedError as error:
        diverge(outcome, step, str(error))
        return None
    epoch = round(step / plan.steps_per_epoch, 4)
    line = {"step": step, "epoch": epoch, "split": "selection", "metrics": values, "seconds": round(seconds, 3)}
    best = outcome.best["metrics"]["mcc"] if outcome.best else -math.inf
    assert values["mcc"] is not None
    if settled and values["mcc"] > best:
        outcome.best, outcome.state, outcome.without_gain = line, pack.state(member), 0
    elif settled:
        outcome.without_gain += 1
    if watcher:
        watcher.evaluated(member, line)
    return float(values["mcc"]), float(values["auroc"] or 0.0)
