"""Augmentation perturbs another share of the training pairs in each epoch, alike for all seeds, and no other row."""

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
    model = backbone(getattr(request, "param", "tiny_bert"))
    return partial(tokenize, columns=COLUMNS, backbone=model, max_length=128, cached=False)


def augmented(
    encode: Callable[..., TokenTable], names: Any = "all", share: float = 0.5, *, reverse: bool = False
) -> TokenTable:
    transforms = choose_transforms(names, "paraphrase", 2, "data.augment")
    encode_side = partial(encode, reverse=reverse)
    return replace(encode_side(EXAMPLES), augmentation=Augmentation(EXAMPLES, transforms, share, 0.3, 0, encode_side))


def row(table: TokenTable, i: int) -> tuple[list[int], list[int] | None]:
    span = slice(table.offsets[i], table.offsets[i] + table.lengths[i])
    return table.values[span].tolist(), None if table.types is None else table.types[span].tolist()


@pytest.mark.parametrize("encode", ["tiny_bert", "tiny_roberta", "tiny_t5"], indirect=True)
def test_table_of_an_epoch_equals_the_tokenized_perturbed_texts(encode: Callable[..., TokenTable]) -> None:
    table = augmented(encode)
    assert table.augmentation is not None
    perturbed, epoch_table = table.augmentation.perturb(3), table.in_epoch(3)
    assert 25 <= len(perturbed.rows) <= 30
    texts = [list(column) for column in EXAMPLES.texts]
    assert EXAMPLES.labels is not None
    assert perturbed.examples.labels is not None
    labels = EXAMPLES.labels.copy()
    labels[perturbed.rows] = perturbed.examples.labels
    for position, i in enumerate(perturbed.rows.tolist()):
        for column, new in zip(texts, perturbed.examples.texts, strict=True):
            column[i] = new[position]
    expected = encode(replace(EXAMPLES, texts=tuple(texts)))
    assert [row(epoch_table, i) for i in range(60)] == [row(expected, i) for i in range(60)]
    assert epoch_table.labels is not None
    assert epoch_table.labels.tolist() == labels.tolist()
    assert epoch_table.ids.tolist() == table.ids.tolist()
    assert epoch_table.augmentation is None
    assert [row(table, i) for i in range(60)] == [row(encode(EXAMPLES), i) for i in range(60)]  # unchanged


def test_perturbed_rows_differ_between_epochs_and_are_reproducible(encode: Callable[..., TokenTable]) -> None:
    table = augmented(encode, ["typo", "order"])
    assert table.augmentation is not None
    first, repeated, second = (table.augmentation.perturb(epoch) for epoch in (0, 0, 1))
    assert first.examples.fingerprint() == repeated.examples.fingerprint()
    assert first.rows.tolist() == repeated.rows.tolist() != second.rows.tolist()
    assert len(first.rows) == len(second.rows) == 30
    all_rows = augmented(encode, "typo", 1.0)
    assert all_rows.augmentation is not None
    assert all_rows.augmentation.perturb(0).rows.tolist() == list(range(60))


def test_labels_of_perturbed_pairs_change_and_tables_without_augmentation_are_returned_as_given(
    encode: Callable[..., TokenTable],
) -> None:
    table = augmented(encode, "entity", 1.0)
    epoch_table = table.in_epoch(0)
    assert EXAMPLES.labels is not None
    assert epoch_table.labels is not None
    changed = np.flatnonzero(epoch_table.labels != EXAMPLES.labels)
    assert len(changed) == 0 or set(EXAMPLES.labels[changed].tolist()) == {1}
    plain = encode(EXAMPLES)
    assert plain.in_epoch(5) is plain


def test_members_of_a_pack_see_the_same_texts(encode: Callable[..., TokenTable]) -> None:
    """Batches have the same rows with and without augmentation."""
    plain, table = encode(EXAMPLES), augmented(encode)
    plan = BatchPlan(plain.lengths, 8)
    for epoch in range(2):
        epoch_table = table.in_epoch(epoch)
        ids_by_seed: dict[int, list[list[int]]] = {}
        for seed in (1, 2):
            batches = list(training_batches(table, plan, [seed], epoch, 0))
            rows_by_batch = [rows for (rows,), _ in plan.epoch(epoch, [seed])]
            ids_by_row = {}
            for batch, rows in zip(batches, rows_by_batch, strict=True):
                unpadded = [
                    ids[: int(mask.sum())] for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
                ]
                assert [ids.tolist() for ids in unpadded] == [row(epoch_table, i)[0] for i in rows.tolist()]
                assert batch.labels is not None
                assert epoch_table.labels is not None
                assert batch.labels.tolist() == epoch_table.labels[rows].tolist()
                ids_by_row |= dict(zip(rows.tolist(), (ids.tolist() for ids in unpadded), strict=True))
            ids_by_seed[seed] = [ids_by_row[i] for i in range(60)]
        assert ids_by_seed[1] == ids_by_seed[2]
        (batch_of_two, *_) = training_batches(table, plan, [1, 2], epoch, 0)
        assert batch_of_two.members == 2


def test_both_orders_have_the_same_perturbed_texts(encode: Callable[..., TokenTable]) -> None:
    table, second_view = augmented(encode, "typo", 1.0), augmented(encode, "typo", 1.0, reverse=True)
    plan = BatchPlan(np.maximum(table.lengths, second_view.lengths), 8)
    (batch, *_) = training_batches(table, plan, [0], 0, 0, second_view)
    for ids, reversed_ids in zip(*batch.input_ids.chunk(2), strict=True):
        assert sorted(ids.tolist()) == sorted(reversed_ids.tolist())
        assert ids.tolist() != reversed_ids.tolist()


def test_training_tables_of_each_objective(backbone: Callable[..., Any]) -> None:
    model = backbone("tiny_bert")

    def views(objective: str, *overrides: str) -> tuple[TokenTable, TokenTable | None]:
        data = build_data(composed(*SMALL_TOY, *overrides).data)
        return training_tables(data, EXAMPLES, model, objective)

    table, second_view = views("cross_entropy")
    assert (table.augmentation, second_view) == (None, None)
    table, second_view = views("cross_entropy", "data.augment=typo")
    assert table.augmentation is not None
    assert second_view is None
    table, second_view = views("order_consistency")
    assert second_view is not None
    assert table.augmentation is second_view.augmentation is None
    table, second_view = views("order_consistency", "data.augment=all", "data.augment_share=0.25")
    assert second_view is not None
    assert table.augmentation is not None
    assert second_view.augmentation is not None
    assert (
        table.augmentation.perturb(1).examples.fingerprint()
        == second_view.augmentation.perturb(1).examples.fingerprint()
    )
    assert row(table.in_epoch(1), 0) != row(second_view.in_epoch(1), 0)
    assert len(table.augmentation.perturb(1).rows) <= 15
    table, second_view = views("alternate_order", "data.augment=typo")
    assert second_view is None
    assert table.reversed_view is not None
    assert table.augmentation is not None
    assert table.reversed_view.augmentation is not None
    table, second_view = views("perturb_consistency", "data.augment=word")
    assert table.augmentation is None
    assert second_view is not None
    assert second_view.augmentation is not None
    assert all(transform.keeps_label for transform in second_view.augmentation.transforms)
    assert second_view.in_epoch(0).labels is not None
    assert second_view.in_epoch(0).labels.tolist() == table.labels.tolist()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("overrides", "code", "key", "value", "datum"),
    [
        (["data.augment=typ"], Code.UNKNOWN_CHOICE, "data.augment", "typ", "typo"),
        (["data.augment=number", "data.relation=entailment"], Code.UNSUPPORTED, "data.augment", "number", "entailment"),
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
def test_augmentation_that_does_not_fit_is_refused_before_data_is_loaded(
    overrides: list[str], code: Code, key: str, value: str, datum: str
) -> None:
    with refuses(code, key=key) as caught:
        Experiment.build(composed(*SMALL_TOY, *overrides))
    assert caught.value.value == value
    assert datum in f"{caught.value.reason} {caught.value.remedy}"


def test_prefix_of_an_augmented_table_is_not_cached(encode: Callable[..., TokenTable], tmp_path: Any) -> None:
    class Pack:
        depth = 1

        class backbone:  # noqa: N801
            cut_depth = int

    table = augmented(encode)
    tables = PrefixCache("hash", 1e9).with_cached_hidden_states(Pack(), {"train": table})  # type: ignore[arg-type]
    assert tables["train"] is table
