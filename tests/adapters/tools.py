"""Shared by the tests of adapters: settings, packs, toy tables, and the merged model that a member must equal."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from lora_bench.adapters.methods import method_class
from lora_bench.adapters.pack.member import Member
from lora_bench.adapters.pack.member_modules import MemberHeads
from lora_bench.adapters.pack.pack import Pack
from lora_bench.config.build import build
from lora_bench.config.groups import choices
from lora_bench.config.keys import with_open_groups
from lora_bench.data import sources
from lora_bench.data.batching import Batch
from lora_bench.data.tokenization import TokenTable, tokenize
from lora_bench.errors import Code
from lora_bench.run.settings import Experiment
from tests.backbones.tools import FORMS, make, reference
from tests.command_line import refuses
from tests.helpers import SMALL_TOY, composed
from tests.training.tools import fit, prepare

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lora_bench.adapters.base import Adapter
    from lora_bench.backbones.base import Backbone
    from lora_bench.config.schema import Optimizer, Trainer
    from lora_bench.data.examples import Examples
    from lora_bench.training.loop import Observer
    from lora_bench.training.member_run import MemberProgress

State = dict[str, "Tensor"]
OWN_METHODS = tuple(choice for choice in choices("adapter") if choice.partition("_")[0] != "peft")
"""The choices of the group `adapter` that PEFT does not compute; `peft/test_injection.py` tests those that it does."""
COLUMNS = ["question1", "question2"]


@cache
def adapter(method: str, *overrides: str) -> Adapter:
    """`adapter("lora", "rank=4")` is what `adapter=lora adapter.rank=4` gives."""
    cfg = composed(f"adapter={method}", *(with_open_groups(f"adapter.{override}") for override in overrides))
    return build(method_class(cfg.adapter.method), cfg.adapter, "adapter")


def joined(parts: Sequence[Batch]) -> Batch:
    """Return one batch that holds each member's own rows."""
    types = [part.token_type_ids for part in parts]
    return Batch(
        torch.cat([part.input_ids for part in parts]),
        torch.cat([part.attention_mask for part in parts]),
        None if types[0] is None else torch.cat(types),  # type: ignore[arg-type]
        torch.cat([part.labels for part in parts]),  # type: ignore[misc]
        full=False,
        members=len(parts),
    )


def in_turn(combinations: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return those of (method, form) that the suite can afford where methods behave alike on all forms.

    Each method has one of its forms, in turn; LoRA, the enhanced method and full fine-tuning have all.
    """
    forms: dict[str, list[str]] = {}
    for method, form in combinations:
        forms.setdefault(method, []).append(form)
    return [
        (method, form)
        for i, (method, possible) in enumerate(forms.items())
        for form in (possible if method in ("lora", "enhanced", "full") else [possible[i % len(possible)]])
    ]


def assert_out_of_range(method: str, setting: str) -> None:
    """Assert that `rank=0`, the value written as Python prints it, is refused as a value of a wrong type or range."""
    key, _, value = setting.partition("=")
    with refuses(Code.INVALID_VALUE, key=f"adapter.{key}") as caught:
        adapter(method, setting)
    assert str(caught.value.value) == value


@cache
def experiment(*overrides: str) -> Experiment:
    return Experiment.build(composed(*SMALL_TOY, *overrides))


def optimizer(lr: float = 1e-2, **changes: Any) -> Optimizer:
    return replace(experiment().optimizer, lr=lr, **changes)


def trainer(steps: int = 6, **changes: Any) -> Trainer:
    """Settings for so many updates of 8 pairs, looked at only at the end."""
    settings = {"batch_size": 8, "epochs": 1000.0, "max_steps": steps, "eval_every": 10_000, "eval_batch_size": 32}
    return replace(experiment().trainer, **{**settings, **changes})


def tables(backbone: Backbone) -> tuple[TokenTable, TokenTable]:
    """Token tables of the toy data: 72 training pairs and 12 to select on."""
    train, selection = (tokenize(split, COLUMNS, backbone, 64) for split in examples())
    return train, selection


@cache
def examples() -> tuple[Examples, Examples]:
    """Return the pairs of `tables`."""
    data = experiment("data.train_size=72", "data.selection_size=12").data
    return sources.split_selection(sources.load(data)[1]["train"], data)


def pack(form: str, *members: tuple[Adapter, int], backbone: Any = None) -> Pack:
    """A pack of (adapter, seed) on a fresh backbone of a form of `FORMS`."""
    return Pack(backbone or make(*FORMS[form]), [Member(settings, seed) for settings, seed in members])


def train(
    made: Pack,
    optimizers: Sequence[Optimizer] | None = None,
    settings: Trainer | None = None,
    watcher: Observer | None = None,
) -> tuple[list[MemberProgress], list[State]]:
    """Prepare and fit a pack on the toy data; what became of its members, and the tensors they are left with.

    With the settings above these are the tensors of the last update: `fit` looks at the selection split only then.
    """
    optimizers, settings = optimizers or [optimizer()] * made.size, settings or trainer()
    learned, selection = tables(made.backbone)
    prepare(made, settings, learned)
    outcomes = fit(made, optimizers, settings, learned, selection, watcher=watcher)
    return outcomes, [made.state(k) for k in range(made.size)]


@torch.no_grad()
def stir(made: Pack, scale: float = 0.3, seed: int = 0) -> Pack:
    """Move every trained tensor away from its start, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for k in range(made.size):
        for p in made.trainable(k).values():
            p.add_(torch.randn(p.shape, generator=generator) * scale * p.shape[-1] ** -0.5)
    return made


def doubled(made: Pack) -> Pack:
    """The pack in double precision, but for its heads, which are fp32 on any backbone."""
    made.network.double()
    for module in made.modules():
        if isinstance(module, MemberHeads):
            module.copies.float()
    return made


def merged_logits(made: Pack, member: int, batch: Batch) -> Tensor:
    """What the Hugging Face model says with the member's updates added to its weights and its head put in; detaches."""
    merged = made.merged(member)
    head = made.head_parameters(member)
    made.detach()
    network: Any = copy.deepcopy(made.network)
    with torch.no_grad():
        for name, tensor in {**merged, **head}.items():
            network.get_parameter(name).copy_(tensor)
        return reference(network, batch, getattr(made.backbone, "label_tokens", None))


def assert_close(one: State, other: State, atol: float) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(
            tensor, other[name], atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )
