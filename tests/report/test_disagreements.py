"""The sentence and the table about single examples that one of two runs gets right."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import numpy as np

from lora_bench.analysis.summary import summarise
from lora_bench.records.run_folder import Run
from lora_bench.report import page
from lora_bench.report.disagreements import describe_pair
from tests.report.runs import make

if TYPE_CHECKING:
    from pathlib import Path


def test_the_sentence_names_run_a_then_run_b() -> None:
    sentence = describe_pair("first", "second", 31, 17, 5, 1234, 48)
    numbers = re.findall(r"first|second|neither|[\d,]*\d", sentence)
    assert numbers == ["1,234", "first", "31", "second", "17", "neither", "5"]
    assert "48" in describe_pair("first", "second", 31, 18, 5, 1234, 48)


def test_the_page_has_the_counts_of_its_first_two_runs(tmp_path: Path) -> None:
    """Lora is right on 6 examples that dora gets wrong, dora on 4; both are wrong on 1."""
    labels = np.arange(40) % 2
    for adapter, mcc, wrong in (("lora", 0.8, [0, 1, 2, 3, 10]), ("dora", 0.6, [4, 5, 6, 7, 8, 9, 10])):
        make(folder := tmp_path / adapter, adapter, 0, mcc)
        predicted = np.where(np.isin(np.arange(40), wrong), 1 - labels, labels)
        run = Run(folder, json.loads((folder / "run.json").read_text()))
        run.write_predictions("validation", np.arange(40), labels, 0.25 + 0.5 * predicted)
    html = page(summarise([tmp_path]))
    match = re.search(r'<p class="said" role="status">(.*?)</p>', html)
    assert match
    assert match[1] == describe_pair("lora, seed 0", "dora, seed 0", 6, 4, 1, 40, 10)
    section = html[html.index('<details id="disagreements"') :].partition("</table>")[0]
    right = re.findall(r"<td>((?:lora|dora), seed 0)</td></tr>", section)
    assert (right.count("lora, seed 0"), right.count("dora, seed 0")) == (6, 4)
