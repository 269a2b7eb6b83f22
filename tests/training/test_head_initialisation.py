"""A head that is fitted before the first step predicts the batches it saw, and nothing else of the member changes."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from lora_bench.adapters.lowrank.calibration_batches import mean_loss
from lora_bench.adapters.pack.member import Member
from lora_bench.adapters.pack.pack import Pack
from lora_bench.data.batching import collate
from lora_bench.training import loop
from lora_bench.training.head_initialisation import fit
from lora_bench.training.task_mixture import TaskData, TaskMixture
from tests.adapters.tools import adapter, tables, trainer
from tests.backbones.tools import FORMS, make
from tests.command_line import refused, toy_run
from tests.training.tools import prepare

if TYPE_CHECKING:
    from lora_bench.data.batching import Batch

CLASSIFIERS = ["bert", "roberta", "t5_encoder"]


def made(form: str, batches: int, *, pair_features: bool = False, seeds: tuple[int, ...] = (0,), **head: Any) -> Pack:
    options = {"pair_features": pair_features, "fit_batches": batches, **head}
    return Pack(make(*FORMS[form]), [Member(adapter("lora"), seed, **options) for seed in seeds])


def batches_of(pack: Pack, count: int, labels: torch.Tensor | None = None) -> list[Batch]:
    """Batches of the toy data that members share."""
    train, _ = tables(pack.backbone)
    length, pad_id = int(train.lengths.max()), pack.backbone.tokenizer.pad_token_id
    rows = torch.arange(8 * count).view(count, 8).numpy()
    found = [collate(train, of_batch, length, pad_id) for of_batch in rows]
    return found if labels is None else [replace(batch, labels=labels[: len(batch.labels)]) for batch in found]


@pytest.mark.parametrize("pair_features", [False, True])
@pytest.mark.parametrize("form", CLASSIFIERS)
def test_the_fitted_head_predicts_and_the_adapter_is_untouched(form: str, pair_features: bool) -> None:
    other = made(form, 0, seeds=(5,))  # its random head gives labels that features predict
    with torch.no_grad():
        odds = [other(batch)[0].diff(dim=1)[:, 0] for batch in batches_of(other, 9)]
    middle = torch.cat(odds).median()
    pack = made(form, 9, pair_features=pair_features)
    batches = [replace(b, labels=(of_b > middle).long()) for b, of_b in zip(batches_of(pack, 9), odds, strict=True)]
    before, updates = mean_loss(pack, 0, batches), {k: v.clone() for k, v in pack.state(0).items() if "lora" in k}
    fitted = fit(pack, 0, [batches])
    assert (fitted.notes, fitted.pair_features) == ([], pair_features)
    assert mean_loss(pack, 0, batches) < min(before, 0.6)
    assert all(torch.equal(pack.state(0)[name], tensor) for name, tensor in updates.items())


@pytest.mark.parametrize("outputs", [1, 3])
def test_numbers_and_more_classes(outputs: int) -> None:
    pack = made("bert", 6, pair_features=True, outputs=[outputs])
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(8) % 3 if outputs == 3 else torch.randn(8, generator=generator)
    batches = [replace(batch, labels=labels) for batch in batches_of(pack, 1)] * 6
    before = mean_loss(pack, 0, batches)
    fit(pack, 0, [batches])
    assert mean_loss(pack, 0, batches) < before / 2


def test_without_a_request_nothing_is_read() -> None:
    pack = made("bert", 0)
    fitted = fit(pack, 0, iter(lambda: pytest.fail("a batch was read"), []))
    assert (fitted.notes, fitted.pair_features) == ([], False)


@pytest.mark.parametrize(
    ("form", "labels", "words"),
    [("t5", None, "text-to-text"), ("bert", torch.zeros(8, dtype=torch.int64), "label 0")],
)
def test_what_cannot_be_fitted_starts_as_without_and_is_said(
    form: str, labels: torch.Tensor | None, words: str
) -> None:
    pack = made(form, 4)
    before = {name: tensor.clone() for name, tensor in pack.state(0).items()}
    (note,) = fit(pack, 0, [batches_of(pack, 4, labels)]).notes
    assert note.startswith("head.fit_batches: ")
    assert words in note
    assert all(torch.equal(pack.state(0)[name], tensor) for name, tensor in before.items())


def test_every_task_has_its_own_batches_however_small_it_is() -> None:
    pack = made("bert", 2, outputs=(2, 2))
    train, selection = tables(pack.backbone)
    small, large = train.take(np.arange(12)), replace(train.take(np.arange(12, 72)), head=1)
    before = {name: tensor.clone() for name, tensor in pack.state(0).items()}
    mixture = TaskMixture([0], {"small": TaskData(small, selection), "large": TaskData(large, selection)})
    assert {batch.head for batch in islice(mixture.batches(pack, 8), 2)} == {1}
    loop.prepare(pack, trainer(), [mixture])
    for head in ("", "head_1."):
        assert not torch.equal(pack.state(0)[f"{head}classifier.weight"], before[f"{head}classifier.weight"])


def test_each_member_of_a_pack_begins_as_alone() -> None:
    both = made("bert", 4, pair_features=True, seeds=(0, 1))
    prepare(both, trainer(), tables(both.backbone)[0])
    for k in range(2):
        alone = made("bert", 4, pair_features=True, seeds=(k,))
        prepare(alone, trainer(), tables(alone.backbone)[0])
        for name, tensor in both.state(k).items():
            torch.testing.assert_close(tensor, alone.state(0)[name], atol=1e-4, rtol=1e-3)


def test_a_negative_number_is_refused() -> None:
    assert refused("train", *toy_run("head.fit_batches=-1")).key == "head.fit_batches"
