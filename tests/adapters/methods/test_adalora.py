"""AdaLoRA is the authors' as peft has it, its scores and schedule are those worked out by hand, its budget is met."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from peft.tuners.adalora.layer import RankAllocator, SVDLinear
from torch import Tensor, nn

from lora_bench.adapters.methods.adalora import AdaLoRA, AdaLoRAUpdate
from lora_bench.adapters.pack.member import Member, stream
from lora_bench.adapters.pack.pack import Pack
from lora_bench.adapters.peft import files
from lora_bench.backbones.dropout import keep_mask
from lora_bench.errors import Code
from tests.adapters.tools import adapter, assert_close, merged_logits, pack, stir, train, trainer
from tests.backbones.tools import enliven, make, random_batch, reference, save, spread
from tests.command_line import refuses

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

BASE = enliven(nn.Linear(48, 32))
# peft asks transformers for a property that is going away.
of_peft = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def settings(*overrides: str) -> AdaLoRA:
    made = adapter("adalora", *overrides)
    assert isinstance(made, AdaLoRA)
    return made


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def update(*overrides: str, seed: int = 0, base: nn.Linear = BASE) -> AdaLoRAUpdate:
    return settings(*overrides).update("some.linear", base, stream(seed, "adapter"), stream(seed, "dropout"))


def peft_config(**changes: Any) -> peft.AdaLoraConfig:
    return peft.AdaLoraConfig(**{"init_r": 6, "target_r": 4, "lora_alpha": 5, "total_step": 100, **changes})


# -- what it computes --


def test_output_and_gradients_are_those_of_peft() -> None:
    base = copy.deepcopy(BASE).double()
    ours = enliven(update("rank=4", "alpha=5")).double()
    theirs = SVDLinear(copy.deepcopy(base), "default", peft_config(), r=6, lora_alpha=5).double()
    twins = {name: getattr(theirs, name)["default"] for name in ("lora_A", "lora_E", "lora_B")}
    with torch.no_grad():
        for name, p in ours.named_parameters():
            twins[name].copy_(p)
    x, wanted = draw(2, 7, 48).double(), draw(2, 7, 32, seed=1).double()
    output, expected = ours(x, base(x)), theirs(x)
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=0)  # peft keeps its divisor in fp32
    assert (output - base(x)).abs().max() > 0.1
    for each in (output, expected):
        F.mse_loss(each, wanted, reduction="sum").backward()
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, twins[name].grad, atol=1e-5, rtol=0)
        assert p.grad.abs().max() > 0.1


@of_peft
def test_logits_and_penalty_of_a_whole_model_are_those_of_peft() -> None:
    chosen = settings("rank=4", "alpha=5", "orthogonality=0.3")
    ours = stir(pack("bert", (chosen, 0))).eval()
    twin = pack("bert", (chosen, 0))
    twin.detach()
    theirs = peft.get_peft_model(twin.network, peft_config(target_modules=ours.targets[0], orth_reg_weight=0.3))
    names = dict(theirs.base_model.model.named_parameters())
    with torch.no_grad():
        for name, p in ours.adapter_parameters(0).items():
            names[f"{name}.default"].copy_(p)
        for name, p in ours.head_parameters(0).items():
            names[name].copy_(p)
    batch = random_batch(ours.backbone)
    assert batch.labels is not None
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    expected = theirs.eval().base_model(**inputs, token_type_ids=batch.token_type_ids, labels=batch.labels)
    (logits,) = ours(batch)
    torch.testing.assert_close(logits, expected.logits, atol=1e-5, rtol=0)
    penalty = chosen.penalty(ours.updates[0])
    assert penalty is not None
    torch.testing.assert_close(F.cross_entropy(logits, batch.labels) + penalty, expected.loss, atol=1e-5, rtol=0)
    assert penalty > 0.1


def test_the_update_is_equation_3() -> None:
    made = enliven(update("rank=4", "alpha=6"))
    Q, E, P = made.lora_A, made.lora_E, made.lora_B
    assert (Q.shape, E.shape, P.shape, made.rank) == ((6, 48), (6, 1), (32, 6), 6)
    delta = 6 / (6 + 1e-5) * P @ torch.diag(E[:, 0]) @ Q
    x = draw(2, 5, 48)
    torch.testing.assert_close(made(x, BASE(x)), BASE(x) + x @ delta.T, atol=1e-5, rtol=0)
    weight, bias = made.merge(BASE.weight, BASE.bias)
    torch.testing.assert_close(weight, BASE.weight + delta)
    assert bias is BASE.bias


def test_it_begins_as_the_authors_begin() -> None:
    base = nn.Linear(400, 300)
    made = update("rank=64", base=base)
    assert not made.lora_E.any()
    for p in (made.lora_A, made.lora_B):
        assert abs(p.mean()) < 0.001
        assert p.std().item() == pytest.approx(0.02, rel=0.02)
    x = draw(3, 400)
    assert torch.equal(made(x, base(x)), base(x))


@pytest.mark.parametrize(("rank", "first"), [(1, 2), (2, 3), (3, 5), (8, 12)])
def test_training_begins_with_half_as_many_again(rank: int, first: int) -> None:
    assert settings(f"rank={rank}").first_rank == first
    assert settings(f"rank={rank}", f"init_rank={rank + 5}").first_rank == rank + 5


def test_the_penalty_is_zero_for_orthonormal_factors_and_counts_every_matrix_once() -> None:
    made, other = update("rank=2", "init_rank=3"), update("rank=2", "init_rank=3", seed=1)
    chosen = settings("rank=2", "init_rank=3", "orthogonality=0.5")
    with torch.no_grad():
        for each in (made, other):
            each.lora_A.copy_(torch.linalg.qr(draw(48, 3)).Q.T)
            each.lora_B.copy_(torch.linalg.qr(draw(32, 3)).Q)
        assert float(chosen.penalty({"one": made, "other": other})) == pytest.approx(0, abs=1e-5)
        made.lora_A[2] *= 2  # one entry of Q Qᵀ is 4: a distance of 3 among four matrices
        assert float(chosen.penalty({"one": made, "other": other})) == pytest.approx(0.5 * 3 / 4, abs=1e-5)
    assert settings("orthogonality=0").penalty({"one": made}) is None


def test_parameters_stay_fp32_beside_a_bf16_base() -> None:
    base = nn.Linear(48, 32, dtype=torch.bfloat16)
    made = enliven(update("rank=2", base=base))
    x = draw(3, 48).bfloat16()
    assert made(x, base(x)).dtype == torch.bfloat16
    assert {p.dtype for p in made.parameters()} == {torch.float32}


def test_dropout_falls_on_the_updates_input_alone_and_comes_from_the_members_seed() -> None:
    made, same = (enliven(update("rank=4", "dropout=0.5", seed=3)) for _ in range(2))
    x = draw(2, 5, 48)
    y = BASE(x)
    before = torch.get_rng_state()
    dropped = made(x, y)
    assert torch.equal(dropped, same(x, y))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(dropped, made(x, y))  # a new mask each time
    mask = keep_mask(x, 0.5, stream(3, "dropout"))
    made.eval()
    torch.testing.assert_close(dropped, made(x * mask, y))


# -- scores --


def test_scores_of_two_triplets_over_two_steps_by_hand() -> None:
    # beta1 = 1/2, beta2 = 3/4. I = |w g|; smooth = 1/2 smooth + 1/2 I; unsure = 3/4 unsure + 1/4 |I - smooth|.
    #   Q = 1 2   g = 1    0     I = 1   0    smooth = .5   0     unsure = .125  0
    #       3 4       .5  .25        1.5 1             .75  .5             .1875 .125
    #             g = 0    1     I = 0   2    smooth = .25  1     unsure = .15625  .25        product = .0390625  .25
    #                 .5   0         1.5 0             1.125 .25         .234375 .15625             .263671875 .0390625
    #       mean over a row:  .14453125,  .1513671875
    #   E = 2     g = .5         I = 1        smooth = .5          unsure = .125
    #      -1         1              1                 .5                   .125
    #             g = 0          I = 0        smooth = .25         unsure = .15625            product = .0390625
    #                -2              2                 1.25                 .28125                      .3515625
    #   P = 1 -2  g = 1 1        I = 1 2      smooth = .5 1        unsure = .125 .25
    #             g = 0 0        I = 0 0      smooth = .25 .5      unsure = .15625 .3125      product = .0390625 .15625
    made = AdaLoRAUpdate(torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([[1.0, -2]]), 1.0, 0.0, stream(0, "dropout"))
    with torch.no_grad():
        made.lora_E.copy_(torch.tensor([[2.0], [-1]]))
    gradients: list[dict[str, list[list[float]]]] = [
        {"lora_A": [[1, 0], [0.5, 0.25]], "lora_E": [[0.5], [1]], "lora_B": [[1, 1]]},
        {"lora_A": [[0, 1], [0.5, 0]], "lora_E": [[0], [-2]], "lora_B": [[0, 0]]},
    ]
    for gradient in gradients:
        for name, p in made.named_parameters():
            p.grad = torch.tensor(gradient[name], dtype=torch.float32)
        made.observe(0.5, 0.75)
    expected = [0.0390625 + 0.14453125 + 0.0390625, 0.3515625 + 0.1513671875 + 0.15625]
    assert made.scores().tolist() == pytest.approx(expected)


def feed(parameters: Iterable[nn.Parameter], step: int) -> None:
    """A made-up optimizer update: the tensors move, and have new gradients."""
    generator = torch.Generator().manual_seed(step)
    for p in parameters:
        p.data = p.data + 0.1 * torch.randn(p.shape, generator=generator)
        p.grad = torch.randn(p.shape, generator=generator)


def two(chosen: AdaLoRA) -> dict[str, AdaLoRAUpdate]:
    """Updates of two unlike linears."""
    bases = {"one": BASE, "other": enliven(nn.Linear(20, 40))}
    return {name: chosen.update(name, base, stream(0, name), stream(0, "dropout")) for name, base in bases.items()}


def walk(
    chosen: AdaLoRA, updates: dict[str, AdaLoRAUpdate], steps: int, look: Callable[[int], object] = lambda step: None
) -> None:
    """Call the hook for every step of a made-up run, and look after each."""
    for step in range(1, steps + 1):
        feed([p for made in updates.values() for p in made.parameters()], step)
        chosen.after_step(dict(updates), step, steps)
        look(step)


@of_peft
def test_triplets_are_pruned_as_peft_prunes_them() -> None:
    chosen = settings("rank=4", "alpha=5", "interval=3", "warmup=0.15", "final=0.35")
    config = peft_config(target_modules=["one", "other"], total_step=40, tinit=6, tfinal=14, deltaT=3)
    network = nn.ModuleDict({"one": nn.Linear(48, 32), "other": nn.Linear(20, 40)})
    for name in network:
        network[name] = SVDLinear(network[name], "default", config, r=6, lora_alpha=5)
    ours, theirs = two(chosen), RankAllocator(network, config, "default")
    twins = [getattr(network[name], key)["default"] for name in ours for key in ("lora_A", "lora_E", "lora_B")]
    with torch.no_grad():
        for twin, p in zip(twins, [p for made in ours.values() for p in made.parameters()], strict=True):
            twin.copy_(p)
    budgets: list[int] = []

    def compare(step: int) -> None:
        if step >= 26:  # peft leaves the gradients of the last allocation out, the paper (algorithm 1) does not
            return
        feed(twins, step)
        budget, marked = theirs.update_and_allocate(network, step)
        if marked:
            assert marked == {f"{name}.lora_E.default": made.kept.tolist() for name, made in ours.items()}
            assert budget == sum(made.rank for made in ours.values())
            budgets.append(budget)
        for name, made in ours.items():
            assert torch.equal(made.lora_E, network[name].lora_E["default"])

    walk(chosen, ours, 40, compare)
    assert budgets == [10, 9, 8, 8, 8, 8]  # at 9, 12, … 24


# -- when it prunes --


def test_the_schedule_by_hand() -> None:
    # 10 steps, 2 before pruning, 3 after: pruning at 4 and 6, and at 7 in any case. 16 triplets are to become 4.
    # t = 4: 4 + 12 (3/5)^3 = 6.592;  t = 6: 4 + 12 (1/5)^3 = 4.096
    chosen = settings("rank=2", "init_rank=8", "warmup=0.2", "final=0.3", "interval=2")
    updates = two(chosen)
    kept: list[int] = []
    walk(chosen, updates, 10, lambda step: kept.append(sum(made.rank for made in updates.values())))
    assert kept == [16, 16, 16, 6, 6, 4, 4, 4, 4, 4]
    assert [chosen.ranks_final(step, 10) for step in range(1, 11)] == [False] * 6 + [True] * 4


def test_a_pruned_triplet_may_come_back_until_the_choice_is_fixed() -> None:
    chosen = settings("rank=2", "init_rank=8", "warmup=0.2", "final=0.3", "interval=2")
    updates = two(chosen)
    masks: list[Tensor] = []
    alive: list[bool] = []

    def look(step: int) -> None:
        masks.append(torch.cat([made.kept for made in updates.values()]))
        E = torch.cat([made.lora_E[:, 0] for made in updates.values()])
        alive.append(bool(E[~masks[-1]].any()))

    walk(chosen, updates, 10, look)
    assert alive == [False, False, False, False, True, False, False, False, False, False]  # 5 is between allocations
    assert (masks[5] & ~masks[3]).any()  # kept at 6, pruned at 4
    assert all(torch.equal(masks[step], masks[6]) for step in (7, 8, 9))


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
@pytest.mark.parametrize("shares", [("warmup=0", "final=0"), ("warmup=0.5", "final=0.49"), ("warmup=0", "final=0.9")])
def test_however_short_the_run_the_budget_is_met_and_settled(steps: int, shares: tuple[str, str]) -> None:
    chosen = settings("rank=2", *shares)
    updates = two(chosen)
    walk(chosen, updates, steps)
    assert sum(made.rank for made in updates.values()) == 4
    assert chosen.ranks_final(steps, steps)


def test_nothing_is_pruned_where_the_initial_rank_is_the_target() -> None:
    chosen = settings("rank=4", "init_rank=4")
    updates = two(chosen)
    walk(chosen, updates, 10)
    assert [made.rank for made in updates.values()] == [4, 4]
    assert all(made.lora_E.all() for made in updates.values())


class Looking:
    """A watcher that keeps, after every step, which singular values are zero; and the steps evaluated."""

    def __init__(self, made: Pack) -> None:
        self.pack = made
        self.zeros: list[Tensor] = []

    def stepped(self, step: int, losses: list[float], pairs: int) -> None:
        E = [p for name, p in self.pack.adapter_parameters(0).items() if name.endswith("lora_E")]
        self.zeros.append(torch.cat([p.detach()[:, 0] == 0 for p in E]))

    def evaluated(self, member: int, line: dict[str, object]) -> None:
        pass


@pytest.mark.parametrize("form", ["bert", "t5"])
def test_a_run_ends_with_rank_times_modules_triplets(form: str) -> None:
    chosen = settings("rank=3", "interval=2")
    made = pack(form, (chosen, 0))
    watcher = Looking(made)
    (outcome,), (state,) = train(made, settings=trainer(20, eval_every=4), watcher=watcher)
    modules = len(made.targets[0])
    assert outcome.status == "done"
    assert sum(made.ranks(0).values()) == 3 * modules
    assert len(set(made.ranks(0).values())) > 1  # an allocation, not LoRA's
    assert outcome.best is not None
    assert outcome.best["step"] in (12, 16, 20)  # 45 % of the steps are final: pruning ends with step 11
    for name, rank in made.ranks(0).items():
        assert (state[f"{name}.lora_E"] != 0).sum() <= rank
    pruned = ~torch.cat([each.kept for each in made.updates[0].values()])  # of 5 triplets a module, 2 on average
    assert pruned.sum() == 2 * modules
    assert all(zeros[pruned].all() for zeros in watcher.zeros[10:])
    assert not watcher.zeros[8][pruned].all()  # between allocations they live
    assert not watcher.zeros[-1][~pruned].all()


def test_members_of_a_pack_prune_as_they_would_alone() -> None:
    members = [(settings("rank=2", "interval=2"), 0), (settings("rank=4", "interval=3", "dropout=0.1"), 1)]
    together = pack("bert", *members, (adapter("lora"), 2))
    _, states = train(together)
    for k, member in enumerate(members):
        alone = pack("bert", member)
        _, (state,) = train(alone)
        assert_close(states[k], state, atol=1e-4)
        assert together.ranks(k) == alone.ranks(0)


# -- what is kept of it --


def pruned(folder: Path) -> Pack:
    """A pack with unlike ranks on a saved body, one module left with nothing."""
    made = stir(pack("bert", (settings("rank=3", "alpha=7"), 0), backbone=make("bert", f"model.path={folder}"))).eval()
    for i, each in enumerate(made.updates[0].values()):
        assert isinstance(each, AdaLoRAUpdate)
        each.keep(torch.tensor([(i + j) % 5 < i % 4 for j in range(5)]))
    assert set(made.ranks(0).values()) == {0, 1, 2, 3}
    return made


@pytest.fixture(scope="module")
def body(tmp_path_factory: pytest.TempPathFactory) -> Path:
    backbone = make("tiny_bert")
    return save(tmp_path_factory.mktemp("body"), backbone.network.base_model, backbone.tokenizer)


@of_peft
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")  # so it warns of files of its own
@torch.no_grad()
def test_peft_loads_what_we_write_and_says_the_same(body: Path, tmp_path: Path) -> None:
    made = pruned(body)
    batch = random_batch(made.backbone)
    (logits,) = made(batch)
    assert spread(logits) > 1e-3
    files.save(tmp_path, made, 0, str(body))
    base = transformers.AutoModelForSequenceClassification.from_pretrained(body)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(logits, reference(theirs.get_base_model().eval(), batch, None), atol=1e-5, rtol=0)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    counts = {name.removesuffix(".lora_E"): sum(marked) for name, marked in config["rank_pattern"].items()}
    assert counts == made.ranks(0)


@torch.no_grad()
def test_a_saved_adapter_comes_back_with_its_kept_triplets_alone(body: Path, tmp_path: Path) -> None:
    made = pruned(body)
    batch = random_batch(made.backbone)
    files.save(tmp_path / "one", made, 0, str(body))
    member = Member(made.members[0].adapter, 0, saved_ranks=made.ranks(0))
    again = Pack(make("bert", f"model.path={body}"), [member]).eval()
    files.load(tmp_path / "one", again, 0)
    torch.testing.assert_close(again(batch), made(batch), atol=1e-6, rtol=0)
    assert again.ranks(0) == made.ranks(0)
    assert again.count_parameters(0)["adapter"] < made.count_parameters(0)["adapter"]
    files.save(tmp_path / "two", again, 0, str(body))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    files.load(tmp_path / "one", made, 0)  # into the pruned one itself
    torch.testing.assert_close(again(batch), made(batch), atol=1e-6, rtol=0)


@torch.no_grad()
def test_merged_weights_say_the_same(body: Path) -> None:
    made = pruned(body)
    batch = random_batch(made.backbone)
    (logits,) = made(batch)
    torch.testing.assert_close(logits, merged_logits(made, 0, batch), atol=1e-5, rtol=0)


# -- refusals --


@pytest.mark.parametrize(
    ("overrides", "code"),
    [
        (("rank=0",), Code.INVALID_VALUE),
        (("rank=8", "init_rank=7"), Code.CONFLICT),
        (("init_rank=0",), Code.INVALID_VALUE),
        (("alpha=0.0",), Code.INVALID_VALUE),
        (("dropout=1.0",), Code.INVALID_VALUE),
        (("orthogonality=-0.1",), Code.INVALID_VALUE),
        (("beta1=1.0",), Code.INVALID_VALUE),
        (("beta2=-0.1",), Code.INVALID_VALUE),
        (("warmup=-0.1",), Code.INVALID_VALUE),
        (("warmup=0.6", "final=0.4"), Code.CONFLICT),
        (("final=nan",), Code.INVALID_VALUE),
        (("interval=0",), Code.INVALID_VALUE),
    ],
)
def test_settings_that_mean_nothing_are_refused(overrides: tuple[str, ...], code: Code) -> None:
    """The last override is to blame."""
    key, _, value = overrides[-1].partition("=")
    with refuses(code, key=f"adapter.{key}") as caught:
        settings(*overrides)
    assert str(caught.value.value) == value
    for other in overrides[:-1]:
        assert other in str(caught.value)


@pytest.mark.parametrize("overrides", [("rank=8", "init_rank=33"), ("rank=22",)])
def test_an_initial_rank_above_the_smaller_side_is_refused(overrides: tuple[str, ...]) -> None:
    with refuses(Code.INVALID_VALUE, key="adapter.init_rank") as caught:
        pack("bert", (settings(*overrides), 0))
    assert caught.value.value == 33
    assert "32" in caught.value.reason
    assert "bert.encoder.layer.0." in caught.value.reason
    assert bool(caught.value.remedy) == (len(overrides) == 1)  # it tells where a rank that nobody gave comes from
