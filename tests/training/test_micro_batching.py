"""Out of memory: a step is done again in smaller portions, and ends where a run with that micro-batch would."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from lora_bench.errors import Code, RunFailedError
from lora_bench.training import micro_batching
from lora_bench.training.micro_batching import in_micro_batches, is_out_of_memory
from lora_bench.training.prediction import predict
from tests.backbones.tools import random_batch
from tests.command_line import refuses
from tests.training.test_loop import Make, assert_close, packed, run, spy, task, trainer

if TYPE_CHECKING:
    from collections.abc import Callable

OUT_OF_MEMORY = (torch.OutOfMemoryError("CUDA out of memory."), MemoryError(), RuntimeError("not enough memory: you …"))


def short_of_memory(pack: Any, pairs: int, error: Exception, *, halfway: bool = False) -> Callable[[], int]:
    """Let every pass of more pairs of a member through the adapted layers fail, at its end; returns how many did."""
    suffix, failed = pack.suffix, 0

    def limited(hidden: Any, batch: Any, members: list[int]) -> torch.Tensor:
        nonlocal failed
        logits = suffix(hidden, batch, members)  # dropout has been drawn
        if batch.pairs > pairs:
            failed += 1
            raise error
        return logits  # type: ignore[no-any-return]

    pack.suffix = limited
    return lambda: failed


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_a_step_short_of_memory_is_done_again_from_where_it_began(backbone: Make, error: Exception) -> None:
    small_batches = packed(backbone(), spy(dropout=0.5))
    run(small_batches, chosen=trainer(micro_batch_size=2, epochs=2))
    halved = packed(backbone(), spy(dropout=0.5))
    failures = short_of_memory(halved, 2, error)
    (outcome,) = run(halved, chosen=trainer(micro_batch_size=None, epochs=2, eval_batch_size=2))
    assert failures() == 2  # 8, 4, and then 2 for good
    assert halved.max_micro_batch == {"training": 2}
    assert outcome.steps == 6
    assert_close(halved.state(0), small_batches.state(0), 0.0)


def test_members_that_pass_one_after_another_have_portions_as_if_alone(
    backbone: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a member's dropout draws the same in any pack."""
    for size in (1, 3):
        pack = packed(backbone(), *[spy()] * size)
        batch, requests = random_batch(pack.backbone), []
        monkeypatch.setitem(micro_batching.QUICK_TOKENS, "training", 2 * batch.input_ids.shape[1])
        in_micro_batches(pack, batch, None, requests.append)
        assert requests == [2]


def test_what_a_portion_left_behind_is_cleared(backbone: Make) -> None:
    """The first portions of the step fit and leave gradients, a later one does not."""
    small_batches = packed(backbone(), spy(dropout=0.5))
    run(small_batches, chosen=trainer(micro_batch_size=2, max_steps=1))
    halved = packed(backbone(), spy(dropout=0.5))
    suffix, calls = halved.suffix, iter(range(99))

    def limited(hidden: Any, batch: Any, members: list[int]) -> torch.Tensor:
        if next(calls) == 1:
            raise OUT_OF_MEMORY[0]
        return suffix(hidden, batch, members)  # type: ignore[no-any-return]

    halved.suffix = limited  # type: ignore[method-assign]
    run(halved, chosen=trainer(micro_batch_size=4, max_steps=1))
    assert halved.max_micro_batch == {"training": 2}
    assert_close(halved.state(0), small_batches.state(0), 0.0)


def test_full_fine_tuning_draws_its_dropout_again(backbone: Make) -> None:
    from lora_bench.adapters.methods.full import Full

    states = []
    for micro, limit in ((2, 99), (None, 2)):
        pack = packed(
            backbone("tiny_bert", "+model.random.hidden_dropout_prob=0.5"),
            Full(method="full", default_lr=1e-4, init_from=None),
        )
        short_of_memory(pack, limit, OUT_OF_MEMORY[0])
        torch.manual_seed(0)
        run(pack, chosen=trainer(micro_batch_size=micro, max_steps=2, eval_batch_size=2))
        states.append(pack.state(0))
    assert_close(*states, 0.0)


def test_members_have_the_room_of_one(backbone: Make) -> None:
    """On a CPU they pass the adapted layers one after another."""
    pack = packed(backbone(), spy(), spy())
    short_of_memory(pack, 4, OUT_OF_MEMORY[0])
    run(pack, chosen=trainer(max_steps=2))
    assert pack.max_micro_batch == {"training": 4, "evaluation": 3}


def test_at_one_pair_it_gives_up_and_says_what_to_do(backbone: Make) -> None:
    pack = packed(backbone(), spy())
    short_of_memory(pack, 0, OUT_OF_MEMORY[0])
    with refuses(Code.OUT_OF_MEMORY) as caught:
        run(pack)
    assert isinstance(caught.value, RunFailedError)
    for name in ("training", "data.max_length"):
        assert name in str(caught.value)


def test_scores_are_the_same_from_smaller_portions(backbone: Make) -> None:
    pack = packed(backbone(), spy())
    table = task(pack.backbone)
    whole = predict(pack, table, 24)
    failures = short_of_memory(pack, 5, OUT_OF_MEMORY[0])
    np.testing.assert_allclose(predict(pack, table, 24), whole, atol=1e-6)
    assert pack.max_micro_batch == {"evaluation": 3}
    assert failures() == 3  # 24, 12, 6
    predict(pack, table, 24)
    assert failures() == 3  # it is remembered


def test_other_errors_pass(backbone: Make) -> None:
    pack = packed(backbone(), spy())
    short_of_memory(pack, 0, RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"):
        run(pack)


def test_torchs_own_refusal_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(ValueError("not enough memory"))
