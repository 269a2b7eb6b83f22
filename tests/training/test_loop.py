"""The loop learns, keeps the best it saw, calls a method's hooks when it says so, and lets no member hurt another."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lora_bench.adapters.methods.full import Full
from lora_bench.adapters.methods.lora import LoRA
from lora_bench.adapters.pack.member import Member
from lora_bench.adapters.pack.pack import Pack
from lora_bench.backbones.base import Backbone
from lora_bench.config.build import build
from lora_bench.config.schema import Optimizer, Trainer
from lora_bench.data.batching import Batch, evaluation_batches
from lora_bench.data.examples import Examples
from lora_bench.data.tokenization import TokenTable, tokenize
from lora_bench.evaluation.cost import FlopModel
from lora_bench.evaluation.metrics import score
from lora_bench.training import cuda_graphs, loop, model_selection
from lora_bench.training.loop import total_steps
from lora_bench.training.prediction import predict
from lora_bench.training.task_mixture import TaskData, TaskMixture
from tests.helpers import composed
from tests.training.tools import fit, prepare

if TYPE_CHECKING:
    from lora_bench.adapters.base import Adapter, Update
    from lora_bench.training.member_run import MemberRun

Make = Callable[..., Backbone]


@dataclass(frozen=True, kw_only=True)
class Spy(LoRA):
    """LoRA with hooks that a test may fill in, and a list of what was called."""

    calls: list[tuple[str, Any]] = field(default_factory=list)
    penalise: Callable[[dict[str, Update]], Tensor] | None = None
    before: Callable[[dict[str, Update], int], None] = lambda updates, step: None
    after: Callable[[dict[str, Update], int], None] = lambda updates, step: None
    unsettled: int = 0
    """Steps during which it is not settled."""

    def prepare(self, pack: Pack, member: int, batches: Iterable[Any]) -> None:
        self.calls.append(("prepare", next(iter(batches))))

    def penalty(self, updates: dict[str, Update]) -> Tensor | None:
        self.calls.append(("penalty", None))
        return self.penalise(updates) if self.penalise else None

    def before_step(self, updates: dict[str, Update], step: int, steps: int) -> None:
        self.calls.append(("before_step", (step, steps)))
        self.before(updates, step)

    def after_step(self, updates: dict[str, Update], step: int, steps: int) -> None:
        self.calls.append(("after_step", (step, steps)))
        self.after(updates, step)

    def ranks_final(self, step: int, steps: int) -> bool:
        return step > self.unsettled

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


class Recorder:
    """A watcher that remembers what it was told."""

    def __init__(self) -> None:
        self.losses: list[list[float]] = []
        self.pairs: list[int] = []
        self.lines: list[tuple[int, dict[str, Any]]] = []

    def stepped(self, step: int, losses: Any, pairs: int) -> None:
        assert step == len(self.losses) + 1
        self.losses.append(list(losses.values()))
        self.pairs.append(pairs)

    def evaluated(self, member: int, line: dict[str, Any]) -> None:
        self.lines.append((member, line))


@cache
def lora() -> LoRA:
    return build(LoRA, composed("adapter=lora", "adapter.rank=4", "adapter.alpha=8").adapter, "adapter")


def spy(**changed: Any) -> Spy:
    return Spy(**{**vars(lora()), **changed})


def optimizer(**changed: Any) -> Optimizer:
    settings = build(Optimizer, composed().optimizer, "optimizer")
    return replace(settings, **{"lr": 1e-2, "warmup": 0.0, "schedule": "constant", **changed})


def trainer(**changed: Any) -> Trainer:
    settings = build(Trainer, composed().trainer, "trainer")
    return replace(settings, **{"batch_size": 8, "epochs": 1, "precision": "fp32", **changed})


def task(backbone: Backbone, rows: int = 24) -> TokenTable:
    """A pair is a duplicate if its second text is of the letter a."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, rows)
    first = ["cd" * int(n) for n in rng.integers(1, 4, rows)]
    second = [("a" if label else "b") * int(n) for label, n in zip(labels, rng.integers(2, 6, rows), strict=True)]
    return tokenize(Examples(np.arange(rows), (first, second), labels), ["q1", "q2"], backbone, 32, cached=False)


def packed(backbone: Backbone, *members: Adapter, seeds: Iterable[int] = (0, 1, 2)) -> Pack:
    return Pack(backbone, [Member(adapter, seed) for adapter, seed in zip(members, seeds, strict=False)])


def run(pack: Pack, *, chosen: Trainer | None = None, learn: Any = None, rows: int = 24, **options: Any) -> Any:
    """Prepare and fit on the little task, which is its own selection split."""
    table, chosen = task(pack.backbone, rows), chosen or trainer()
    settings = learn if isinstance(learn, list) else [learn or optimizer()] * pack.size
    prepare(pack, chosen, table)
    return fit(pack, settings, chosen, table, table, **options)


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", ["tiny_bert", "tiny_roberta", "tiny_t5"])
def test_it_learns(backbone: Make, family: str) -> None:
    watcher = Recorder()
    pack = packed(backbone(family), spy())
    (outcome,) = run(pack, chosen=trainer(epochs=20), watcher=watcher)
    first, last = np.mean(watcher.losses[:3]), np.mean(watcher.losses[-3:])
    assert last < 0.25 * first
    assert outcome.status == "done"
    assert outcome.error is None
    assert outcome.best["metrics"]["mcc"] == 1.0
    assert not pack.training


def test_full_learns_too(backbone: Make) -> None:
    watcher = Recorder()
    full = Full(method="full", default_lr=1e-4, init_from=None)
    torch.manual_seed(0)  # of the network's own dropout
    (outcome,) = run(packed(backbone(), full), chosen=trainer(epochs=20), learn=optimizer(lr=3e-3), watcher=watcher)
    assert np.mean(watcher.losses[-3:]) < 0.5 * np.mean(watcher.losses[:3])
    assert outcome.best["metrics"]["mcc"] > 0.9


def test_the_reported_loss_is_the_mean_over_the_batch(backbone: Make) -> None:
    watcher, seen = Recorder(), []
    pack = packed(backbone(), spy(penalise=lambda updates: torch.tensor(100.0)))
    table = task(pack.backbone)
    with torch.no_grad():
        pack.eval()
        for batch in TaskMixture([0], {"": TaskData(table, table)}).batches(pack, 8):
            seen.append(float(torch.nn.functional.cross_entropy(pack(batch)[0], batch.labels)))
            if len(seen) == 3:
                break
    run(pack, learn=optimizer(lr=1e-12), chosen=trainer(micro_batch_size=3), watcher=watcher)
    assert [losses[0] for losses in watcher.losses] == pytest.approx(seen, abs=1e-5)  # the penalty is not in it


@pytest.mark.parametrize("micro", [1, 3, 8])
def test_micro_batches_change_nothing(backbone: Make, micro: int) -> None:
    """Gradients add up to the whole batch's; so do weights, after an epoch with a short last batch."""
    gradients: list[dict[str, Tensor]] = []
    states = []
    for size in (None, micro):

        def note(updates: dict[str, Update], step: int) -> None:
            if step == 1:
                gradients.append({n: u.lora_B.grad.clone() for n, u in updates.items()})

        pack = packed(backbone(), spy(before=note, penalise=pull))
        run(pack, chosen=trainer(micro_batch_size=size), learn=optimizer(eps=1e-3), rows=21)
        states.append(pack.state(0))
    assert_close(gradients[0], gradients[1], 1e-7)
    assert_close(states[0], states[1], 1e-6)


def pull(updates: dict[str, Update]) -> Tensor:
    """A penalty whose gradient is one in every entry of every lora_A."""
    return torch.stack([update.lora_A.sum() for update in updates.values()]).sum()


def test_micro_batches_count_the_pairs_of_each_member(backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    ask = cuda_graphs.micro_batches

    def noting(batch: Batch, rows: int) -> Any:
        if torch.is_grad_enabled():  # not those of the evaluation
            sizes.append(rows)
        return ask(batch, rows)

    monkeypatch.setattr(cuda_graphs, "micro_batches", noting)
    pack = packed(backbone(), spy(), spy())
    run(pack, chosen=trainer(micro_batch_size=6, max_steps=1))
    run(pack, chosen=trainer(micro_batch_size=1, max_steps=1))
    assert sizes == [6, 1]


def test_durations() -> None:
    assert total_steps(trainer(epochs=3), 24) == 9
    assert total_steps(trainer(epochs=3), 25) == 12  # the last batch of an epoch may be short
    assert total_steps(trainer(epochs=0.5), 24) == 2
    assert total_steps(trainer(epochs=1.1), 80) == 11
    assert total_steps(trainer(epochs=1e-9), 24) == 1
    assert total_steps(trainer(epochs=3, max_steps=4), 24) == 4
    assert total_steps(trainer(epochs=1, max_steps=100), 24) == 100


def test_max_steps_stops_and_the_last_step_is_scored(backbone: Make) -> None:
    watcher = Recorder()
    (outcome,) = run(packed(backbone(), spy()), chosen=trainer(epochs=9, max_steps=5, eval_every=3), watcher=watcher)
    assert outcome.steps == len(watcher.losses) == 5
    assert [line["step"] for _, line in watcher.lines] == [3, 5]
    assert [line["epoch"] for _, line in watcher.lines] == [1.0, round(5 / 3, 4)]
    assert all(line["split"] == "selection" for _, line in watcher.lines)


def test_it_looks_once_an_epoch_unless_told_otherwise(backbone: Make) -> None:
    watcher = Recorder()
    (outcome,) = run(packed(backbone(), spy()), chosen=trainer(epochs=2), rows=20, watcher=watcher)
    assert [line["step"] for _, line in watcher.lines] == [3, 6]
    assert watcher.pairs == [8, 8, 8, 8, 8, 8] or sorted(watcher.pairs) == [4, 4, 8, 8, 8, 8]
    assert outcome.pairs == sum(watcher.pairs) == 40
    assert outcome.seconds > 0


def test_flops_are_summed_over_the_batches_that_were_run(backbone: Make) -> None:
    model = FlopModel((1.0, 10.0, 0.0, 0.0))  # one a step and ten a pair
    (outcome,) = run(packed(backbone(), spy()), chosen=trainer(epochs=2), rows=20, flop_models=[model])
    assert outcome.flops == 6 + 10 * 40


def test_early_stopping_waits_for_patience(backbone: Make) -> None:
    watcher = Recorder()
    chosen = trainer(epochs=20, eval_every=2, early_stopping_patience=2)
    (outcome,) = run(packed(backbone(), spy()), chosen=chosen, learn=optimizer(lr=1e-12), watcher=watcher)
    assert outcome.steps == 6  # the first look is the best, two more bring nothing
    assert [line["step"] for _, line in watcher.lines] == [2, 4, 6]
    assert (outcome.status, outcome.best["step"]) == ("done", 2)


def test_what_is_not_settled_is_logged_and_never_kept(backbone: Make) -> None:
    """A member that keeps still is best at its first look; here that is the first settled one."""
    watcher = Recorder()
    chosen = trainer(epochs=20, eval_every=1, early_stopping_patience=2)
    pack = packed(backbone(), spy(unsettled=3), spy())
    late, soon = run(pack, chosen=chosen, learn=optimizer(lr=1e-12), watcher=watcher)
    assert [line["step"] for member, line in watcher.lines if member == 0] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for member, line in watcher.lines if member == 1] == [1, 2, 3]
    assert [line["step"] for member, line in watcher.lines if line.get("may_choose") is False] == [1, 2, 3]
    assert "may_choose" not in late.best
    assert (late.best["step"], late.steps, late.without_gain) == (4, 6, 2)
    assert (soon.best["step"], soon.steps, soon.without_gain) == (1, 3, 2)


def test_a_better_look_before_it_is_settled_does_not_count(backbone: Make) -> None:
    """The head is wiped at step 30, from which on the method is settled."""

    def wipe(updates: dict[str, Update], step: int) -> None:
        if step == 30:
            for p in pack.head_parameters(0).values():
                p.data.zero_()

    watcher = Recorder()
    pack = packed(backbone(), spy(after=wipe, unsettled=29))
    (outcome,) = run(pack, chosen=trainer(epochs=10, eval_every=10), watcher=watcher)
    mcc = {line["step"]: line["metrics"]["mcc"] for _, line in watcher.lines}
    assert list(mcc) == [10, 20, 30]
    assert mcc[30] == 0 < mcc[20]
    assert outcome.best["step"] == 30
    assert_close(pack.state(0), outcome.state, 0.0)


def test_a_member_stops_at_the_target_and_the_other_goes_on(backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """MCC at the looks of steps 1, 2, …: the first reaches 0.6 by luck at step 2, the third time in a row at step 6;
    the second only if those before step 4 counted, where it is not settled."""
    looks = {0: iter([0.1, 0.9, 0.59, 0.6, 0.7, 0.6, 0.9, 0.9]), 1: iter([0.8, 0.8, 0.8, 0.8, 0.8, 0.5, 0.5, 0.5])}
    update_best, scored = loop.update_best, model_selection.score
    judged: list[int] = []

    def noted(member: MemberRun, *arguments: Any, **options: Any) -> Any:
        judged.append(member.index)
        return update_best(member, *arguments, **options)

    monkeypatch.setattr(loop, "update_best", noted)
    monkeypatch.setattr(model_selection, "score", lambda *given: {**scored(*given), "mcc": next(looks[judged[-1]])})
    chosen = trainer(epochs=20, max_steps=8, eval_every=1, stop_at=0.6)
    first, second = run(packed(backbone(), spy(), spy(unsettled=3)), chosen=chosen, learn=optimizer(lr=1e-12))
    assert (first.status, first.steps, first.best["step"]) == ("done", 6, 2)
    assert (second.status, second.steps, second.best["step"]) == ("done", 8, 4)


def test_one_member_stops_early_and_the_other_goes_on(backbone: Make) -> None:
    chosen = trainer(epochs=12, eval_every=6, early_stopping_patience=2)
    learn = [optimizer(lr=1e-12), optimizer(lr=1e-2)]
    still, moving = run(packed(backbone(), spy(), spy()), chosen=chosen, learn=learn)
    assert still.steps == 18
    assert moving.steps > still.steps
    assert still.status == moving.status == "done"


def test_the_best_state_is_the_one_that_is_left(backbone: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The method spoils its weights after step 9; what fit leaves behind predicts as at its best look."""
    seen: list[np.ndarray] = []
    ask = model_selection.predict
    monkeypatch.setattr(model_selection, "predict", lambda *arguments: seen.append(ask(*arguments)) or seen[-1])

    def spoil(updates: dict[str, Update], step: int) -> None:
        if step > 9:
            for update in updates.values():
                update.lora_B.data.neg_().mul_(3)

    watcher = Recorder()
    pack = packed(backbone(), spy(after=spoil))
    (outcome,) = run(pack, chosen=trainer(epochs=4, eval_every=1), watcher=watcher)
    looks = [line["metrics"]["mcc"] for _, line in watcher.lines]
    best = int(np.argmax(looks))  # the first of equals
    assert outcome.best == watcher.lines[best][1]
    assert len(looks) == 12
    assert looks[-1] < looks[best]
    table = task(pack.backbone)
    scores_after = ask(pack, table, 128)
    assert np.array_equal(scores_after, seen[best])
    assert score(scores_after[0], table.labels, {}) == outcome.best["metrics"]
    for name, tensor in pack.state(0).items():
        assert torch.equal(tensor, outcome.state[name])


def test_hooks_are_called_in_the_order_that_base_promises(backbone: Make) -> None:
    adapter = spy()
    run(packed(backbone(), adapter), chosen=trainer(micro_batch_size=4))
    a_step = ["penalty", "penalty", "before_step", "after_step"]
    assert adapter.names() == ["prepare", *a_step * 3]
    assert [what for name, what in adapter.calls if name == "before_step"] == [(1, 3), (2, 3), (3, 3)]
    assert [what for name, what in adapter.calls if name == "after_step"] == [(1, 3), (2, 3), (3, 3)]
    seen = adapter.calls[0][1]
    assert isinstance(seen, Batch)
    assert len(seen.input_ids) == 8


def test_hooks_see_clipped_gradients_before_and_the_same_after_the_update(backbone: Make) -> None:
    norms: list[float] = []
    held: list[dict[str, Tensor]] = []

    def before(updates: dict[str, Update], step: int) -> None:
        grads = [p.grad for p in pack.trainable(0).values()]
        norms.append(float(torch.cat([g.flatten() for g in grads]).norm()))
        held.append({n: u.lora_B.detach().clone() for n, u in updates.items()})
        held.append({n: u.lora_B.grad.clone() for n, u in updates.items()})

    def after(updates: dict[str, Update], step: int) -> None:
        values, grads = held[-2:]
        for n, update in updates.items():
            assert torch.equal(update.lora_B.grad, grads[n])
        assert any(not torch.equal(update.lora_B, values[n]) for n, update in updates.items())

    pack = packed(backbone(), spy(before=before, after=after))
    run(pack, learn=optimizer(grad_clip_norm=1e-3))
    assert norms == pytest.approx([1e-3] * 3, rel=1e-2)
    assert all(p.grad is None for p in pack.parameters())
    norms.clear()
    run(pack, learn=optimizer(grad_clip_norm=None))
    assert min(norms) > 1e-2


def test_clipping_is_each_members_own(backbone: Make) -> None:
    """A member with huge gradients does not shrink its neighbour's."""
    seen: dict[str, dict[str, Tensor]] = {}

    def note(key: str) -> Callable[[dict[str, Update], int], None]:
        def keep(updates: dict[str, Update], step: int) -> None:
            seen.setdefault(key, {n: u.lora_B.grad.clone() for n, u in updates.items()})

        return keep

    run(packed(backbone(), spy(before=note("alone"))), chosen=trainer(max_steps=1))
    loud = spy(penalise=lambda updates: 1e6 * pull(updates))
    run(packed(backbone(), spy(before=note("packed")), loud, seeds=(0, 0)), chosen=trainer(max_steps=1))
    assert_close(seen["packed"], seen["alone"], 1e-6)


@pytest.mark.parametrize("others", [0, 2])
def test_a_penalty_reaches_the_gradient(backbone: Make, others: int) -> None:
    seen: list[dict[str, Tensor]] = []
    for weight in (0.0, 0.5):

        def note(updates: dict[str, Update], step: int) -> None:
            if step == 1:
                seen.append({n: u.lora_A.grad.clone() for n, u in updates.items()})

        adapter = spy(before=note, penalise=lambda updates, w=weight: w * pull(updates))
        members = [adapter, *(spy() for _ in range(others))]  # whose parameters are stacks in a pass
        run(packed(backbone(), *members), learn=optimizer(grad_clip_norm=None), chosen=trainer(micro_batch_size=3))
    for name, plain in seen[0].items():
        torch.testing.assert_close(seen[1][name] - plain, torch.full_like(plain, 0.5), atol=1e-5, rtol=0)


def test_dropout_is_drawn_in_training_and_nowhere_else(backbone: Make) -> None:
    streams = []

    def note(updates: dict[str, Update], step: int) -> None:
        streams.append(next(iter(updates.values())).generator.get_state())

    pack = packed(backbone(), spy(dropout=0.5, before=note))
    run(pack, chosen=trainer(epochs=2, eval_every=1))
    assert len({tuple(state.tolist()) for state in streams}) == 6  # also after a look at the selection split
    table = task(pack.backbone)
    assert np.array_equal(predict(pack, table, 8), predict(pack, table, 8))
    assert next(iter(pack.updates[0].values())).generator.get_state().equal(streams[-1])


def test_dropout_changes_what_is_learned(backbone: Make) -> None:
    losses = []
    for dropout in (0.0, 0.5, 0.5):
        watcher = Recorder()
        run(packed(backbone(), spy(dropout=dropout)), watcher=watcher)
        losses.append(watcher.losses)
    assert losses[1] == losses[2] != losses[0]


def test_predict_keeps_order_and_mode(backbone: Make) -> None:
    pack = packed(backbone(), spy(dropout=0.5), spy())
    table = task(pack.backbone)
    pack.train()
    by_five, whole = predict(pack, table, 5), predict(pack, table, 100)
    assert pack.updates[0][pack.targets[0][0]].training
    pack.eval()
    predict(pack, table, 5)
    assert not pack.updates[0][pack.targets[0][0]].training
    np.testing.assert_allclose(by_five, whole, atol=1e-6)
    assert whole.shape == (2, 24)
    with torch.no_grad():
        for row in (0, 7, 23):
            alone = evaluation_batches(replace(table, **one_row(table, row)), 1, 0)
            ((_, batch),) = alone
            np.testing.assert_allclose(pack(batch).softmax(-1)[:, 0, 1], whole[:, row], atol=1e-6)


def one_row(table: TokenTable, row: int) -> dict[str, Any]:
    return {"offsets": table.offsets[[row]], "lengths": table.lengths[[row]], "labels": table.labels[[row]]}


def nan_at(step: int) -> Callable[[dict[str, Update], int], None]:
    def spoil(updates: dict[str, Update], now: int) -> None:
        if now == step:
            next(iter(updates.values())).lora_B.data.fill_(torch.nan)

    return spoil


def nan_gradient(updates: dict[str, Update]) -> Tensor:
    return next(iter(updates.values())).lora_A.sum() * torch.nan


@pytest.mark.parametrize(
    ("adapter", "words", "steps"),
    [
        (lambda: spy(after=nan_at(2)), "step 3: loss nan is not finite", 3),
        (lambda: spy(penalise=nan_gradient), "step 1: gradient norm nan is not finite", 1),
        (lambda: spy(after=nan_at(6)), "step 6: 24 of 24 scores are not finite numbers;", 6),
    ],
    ids=["loss", "gradient", "scores"],
)
def test_what_is_not_finite_stops_that_member_alone(
    backbone: Make, adapter: Callable[[], Spy], words: str, steps: int
) -> None:
    chosen = trainer(epochs=2)
    alone = packed(backbone(), spy())
    run(alone, chosen=chosen)
    pack = packed(backbone(), spy(), adapter())
    fine, broken = run(pack, chosen=chosen)
    assert (broken.status, broken.steps) == ("diverged", steps)
    assert str(broken.error).startswith(words)
    assert "optimizer.lr" in str(broken.error)
    assert (fine.status, fine.steps, fine.error) == ("done", 6, None)
    assert_close(pack.state(0), alone.state(0), 1e-4)
    assert all(torch.isfinite(tensor).all() for tensor in pack.state(0).values())


def test_a_lone_member_that_diverges_ends_the_run_at_once(backbone: Make) -> None:
    watcher = Recorder()
    (outcome,) = run(packed(backbone(), spy(penalise=nan_gradient)), chosen=trainer(epochs=5), watcher=watcher)
    assert len(watcher.losses) == 1
    assert (outcome.status, outcome.best, watcher.lines) == ("diverged", None, [])


def test_a_bad_gradient_never_reaches_the_weights(backbone: Make) -> None:
    pack = packed(backbone(), spy(penalise=nan_gradient))
    before = pack.state(0)
    run(pack)
    assert_close(pack.state(0), before, 0.0)
