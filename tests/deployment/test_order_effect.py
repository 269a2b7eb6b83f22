"""An export of one order says by how much its scores differ from those of both orders."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lora_bench.deployment.order_effect import OrderEffect
from tests import three_classes
from tests.command_line import lora_bench, toy_run


def test_the_differences_of_probabilities_and_numbers() -> None:
    first, both = np.array([0.2, 0.6, 0.9]), np.array([0.3, 0.4, 0.9])
    effect = OrderEffect.of_scores(first, both, is_regression=False)
    assert (effect.rows, effect.changed_labels) == (3, 1)
    assert (round(effect.max_difference, 9), round(effect.mean_difference, 9)) == (0.2, 0.1)
    assert OrderEffect.of_scores(first, both, is_regression=True).changed_labels is None
    first, both = np.array([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]]), np.array([[0.3, 0.5, 0.2], [0.2, 0.2, 0.6]])
    assert OrderEffect.of_scores(first, both, is_regression=False).changed_labels == 1


def test_it_is_measured_on_the_selection_split_while_its_data_are_there(in_tmp: Path) -> None:
    lines = [f"{a} one\t{b} two\t{i % 2}" for i, (a, b) in enumerate(zip(*[three_classes.texts(40)] * 2, strict=True))]
    for split in ("train", "validation"):
        Path(f"{split}.tsv").write_text("question1\tquestion2\tlabel\n" + "\n".join(lines) + "\n")
    arguments = toy_run("data=pairs", "data.path=.", "trainer.score_both_orders=true", "data.selection_size=12")
    arguments = [argument for argument in arguments if "_rows" not in argument]
    assert lora_bench("train", *arguments, "hydra.run.dir=run").code == 0
    answer = lora_bench("export", "run=run", "format=merged", "output=measured")
    assert answer.code == 0, answer
    for text in (answer.out, Path("measured/README.md").read_text(encoding="utf-8")):
        assert "n 12 rows of the selection split, scores of one order differ" in text
        assert "predicted labels differ" in text
    Path("train.tsv").write_text("question1\tquestion2\tlabel\n" + "\n".join(lines[::-1]) + "\n")
    answer = lora_bench("export", "run=run", "format=merged", "output=unmeasured")
    assert (answer.code, answer.err) == (0, "")
    assert "the difference was not measured: the train split of the run's data has changed" in answer.out
