"""Perturbed training pairs: another share in each epoch, the same for every seed, and all other rows as they were."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from lora_bench.config.build import build_data
from lora_bench.data import toy
from lora_bench.data.augmentation import Augmentation, training_tables
from lora_bench.data.batching import BatchPlan, training_batches
from lora_bench.data.perturb import choose_transforms
from lora_bench.data.tokenization import TokenTable, tokenize
from lora_bench.errors import Code
from lora_bench.run.settings import Experiment
from lora_bench.training.prefix_cache import PrefixCache
from tests.command_line import refuses
from tests.helpers import SMALL_TOY, composed

if TYPE_CHECKING:
    from collections.abc import Callable

COLUMNS = ("question1", "question2")
EXAMPLES = toy.generate(60, 0, "train")


@pytest.fixture
def encode(backbone: Callable[..., Any], request: pytest.FixtureRequest) -> Callable[..., TokenTable]:
    made = backbone(getattr(request, "param", "tiny_bert"))
    return partial(tokenize, columns=COLUMNS, backbone=made, max_length=128, cached=False)


def augmented(
    encode: Callable[..., TokenTable], asked: Any = "all", share: float = 0.5, *, reverse: bool = False
) -> TokenTable:
    chosen = choose_transforms(asked, "qqp", 2, "data.augment")
    how = partial(encode, reverse=reverse)
    return replace(how(EXAMPLES), augmentation=Augmentation(EXAMPLES, chosen, share, 0.3, 0, how))


def row(table: TokenTable, i: int) -> tuple[list[int], list[int] | None]:
    span = slice(table.offsets[i], table.offsets[i] + table.lengths[i])
    return table.values[span].tolist(), None if table.types is None else table.types[span].tolist()


@pytest.mark.parametrize("encode", ["tiny_bert", "tiny_roberta", "tiny_t5"], indirect=True)
def test_an_epochs_table_is_that_of_its_texts(encode: Callable[..., TokenTable]) -> None:
    table = augmented(encode)
    assert table.augmentation is not None
    found, now = table.augmentation.perturb(3), table.in_epoch(3)
    assert 25 <= len(found.rows) <= 30
    texts = [list(column) for column in EXAMPLES.texts]
    assert EXAMPLES.labels is not None
    assert found.examples.labels is not None
    labels = EXAMPLES.labels.copy()
    labels[found.rows] = found.examples.labels
    for place, i in enumerate(found.rows.tolist()):
        for column, new in zip(texts, found.examples.texts, strict=True):
            column[i] = new[place]
    expected = encode(replace(EXAMPLES, texts=tuple(texts)))
    assert [row(now, i) for i in range(60)] == [row(expected, i) for i in range(60)]
    assert now.labels is not None
    assert now.labels.tolist() == labels.tolist()
    assert now.ids.tolist() == table.ids.tolist()
    assert now.augmentation is None
    assert [row(table, i) for i in range(60)] == [row(encode(EXAMPLES), i) for i in range(60)]  # as it was


def test_epochs_differ_and_repeat_themselves(encode: Callable[..., TokenTable]) -> None:
    table = augmented(encode, ["typo", "order"])
    assert table.augmentation is not None
    one, again, other = (table.augmentation.perturb(epoch) for epoch in (0, 0, 1))
    assert one.examples.fingerprint() == again.examples.fingerprint()
    assert one.rows.tolist() == again.rows.tolist() != other.rows.tolist()
    assert len(one.rows) == len(other.rows) == 30
    everything = augmented(encode, "typo", 1.0)
    assert everything.augmentation is not None
    assert everything.augmentation.perturb(0).rows.tolist() == list(range(60))


def test_labels_follow_and_a_plain_table_stays_itself(encode: Callable[..., TokenTable]) -> None:
    table = augmented(encode, "entity", 1.0)
    now = table.in_epoch(0)
    assert EXAMPLES.labels is not None
    assert now.labels is not None
    changed = np.flatnonzero(now.labels != EXAMPLES.labels)
    assert len(changed) == 0 or set(EXAMPLES.labels[changed].tolist()) == {1}
    plain = encode(EXAMPLES)
    assert plain.in_epoch(5) is plain


def test_members_of_a_pack_see_the_same_texts(encode: Callable[..., TokenTable]) -> None:
    """And batches hold the rows that they would hold without."""
    plain, table = encode(EXAMPLES), augmented(encode)
    plan = BatchPlan(plain.lengths, 8)
    for epoch in range(2):
        now = table.in_epoch(epoch)
        held: dict[int, list[list[int]]] = {}
        for seed in (1, 2):
            batches = list(training_batches(table, plan, [seed], epoch, 0))
            rows = [mine for (mine,), _ in plan.epoch(epoch, [seed])]
            seen = {}
            for batch, mine in zip(batches, rows, strict=True):
                kept = [ids[: int(mask.sum())] for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
                assert [ids.tolist() for ids in kept] == [row(now, i)[0] for i in mine.tolist()]
                assert batch.labels is not None
                assert now.labels is not None
                assert batch.labels.tolist() == now.labels[mine].tolist()
                seen |= dict(zip(mine.tolist(), (ids.tolist() for ids in kept), strict=True))
            held[seed] = [seen[i] for i in range(60)]
        assert held[1] == held[2]
        (together, *_) = training_batches(table, plan, [1, 2], epoch, 0)
        assert together.members == 2


def test_both_orders_are_of_one_perturbed_pair(encode: Callable[..., TokenTable]) -> None:
    table, second_view = augmented(encode, "typo", 1.0), augmented(encode, "typo", 1.0, reverse=True)
    plan = BatchPlan(np.maximum(table.lengths, second_view.lengths), 8)
    (batch, *_) = training_batches(table, plan, [0], 0, 0, second_view)
    for one, other in zip(*batch.input_ids.chunk(2), strict=True):
        assert sorted(one.tolist()) == sorted(other.tolist())
        assert one.tolist() != other.tolist()


def test_each_objective_has_its_views(backbone: Callable[..., Any]) -> None:
    made = backbone("tiny_bert")

    def views(objective: str, *overrides: str) -> tuple[TokenTable, TokenTable | None]:
        data = build_data(composed(*SMALL_TOY, *overrides).data)
        return training_tables(data, EXAMPLES, made, objective)

    table, other = views("cross_entropy")
    assert (table.augmentation, other) == (None, None)
    table, other = views("cross_entropy", "data.augment=typo")
    assert table.augmentation is not None
    assert other is None
    table, other = views("order_consistency")
    assert other is not None
    assert table.augmentation is other.augmentation is None
    table, other = views("order_consistency", "data.augment=all", "data.augment_share=0.25")
    assert other is not None
    assert table.augmentation is not None
    assert other.augmentation is not None
    assert table.augmentation.perturb(1).examples.fingerprint() == other.augmentation.perturb(1).examples.fingerprint()
    assert row(table.in_epoch(1), 0) != row(other.in_epoch(1), 0)
    assert len(table.augmentation.perturb(1).rows) <= 15
    table, other = views("alternate_order", "data.augment=typo")
    assert other is None
    assert table.reversed_view is not None
    assert table.augmentation is not None
    assert table.reversed_view.augmentation is not None
    table, other = views("perturb_consistency", "data.augment=word")
    assert table.augmentation is None
    assert other is not None
    assert other.augmentation is not None
    assert all(transform.keeps_label for transform in other.augmentation.transforms)
    assert other.in_epoch(0).labels is not None
    assert other.in_epoch(0).labels.tolist() == table.labels.tolist()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("overrides", "code", "key", "value", "datum"),
    [
        (["data.augment=typ"], Code.UNKNOWN_CHOICE, "data.augment", "typ", "typo"),
        (["data.augment=number", "data.task=rte"], Code.UNSUPPORTED, "data.augment", "number", "rte"),
        (
            ["trainer.objective=perturb_consistency"],
            Code.CONFLICT,
            "trainer.objective",
            "perturb_consistency",
            "data.augment=all",
        ),
        (
            ["trainer.objective=perturb_consistency", "data.augment=[typo,number]"],
            Code.CONFLICT,
            "data.augment",
            "number",
            "",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(
    overrides: list[str], code: Code, key: str, value: str, datum: str
) -> None:
    with refuses(code, key=key) as caught:
        Experiment.build(composed(*SMALL_TOY, *overrides))
    assert caught.value.value == value
    assert datum in f"{caught.value.reason} {caught.value.remedy}"


def test_a_prefix_is_not_kept_of_what_changes(encode: Callable[..., TokenTable], tmp_path: Any) -> None:
    class Cut:
        depth = 1

        class backbone:  # noqa: N801
            has_prefix = True

    table = augmented(encode)
    served = PrefixCache("hash", 1e9).with_cached_hidden_states(Cut(), {"train": table})  # type: ignore[arg-type]
    assert served["train"] is table
