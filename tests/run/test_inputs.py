"""What a run loads before it trains, and which combinations of tasks and model it refuses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.command_line import lora_bench, toy_run

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    "labels",
    [pytest.param(("[no, yes]", "[different, same]"), marks=pytest.mark.matrix), ("[no, yes]", "[no, same]")],
)
def test_a_text_to_text_model_answers_each_task_with_its_own_words(in_tmp: Path, labels: tuple[str, str]) -> None:
    (in_tmp / "conf/data").mkdir(parents=True)
    for name, label_names in zip(("one", "two"), labels, strict=True):
        quoted = label_names.replace("[", "['").replace(", ", "', '").replace("]", "']")
        text = f"defaults: [toy, _self_]\ntask: {name}\nlabel_names: {quoted}\n"
        (in_tmp / f"conf/data/{name}.yaml").write_text(text)
    settings = [text for text in toy_run() if not text.startswith(("model=", "data"))]
    answer = lora_bench("train", "--config-dir", "conf", *settings, "model=tiny_t5", "data.tasks=[one,two]")
    assert answer.code == 0, answer
