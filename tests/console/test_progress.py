"""Progress is a few plain lines without a terminal, and one live line that fits into a terminal."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lora_bench.console.progress import Display, metric_table, show_result

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def line(epoch: float, mcc: float = -0.1234) -> dict[str, Any]:
    return {
        "step": 10,
        "epoch": epoch,
        "split": "selection",
        "metrics": {"accuracy": 0.6667, "f1": 0.5, "mcc": mcc, "auroc": None},
        "seconds": 0.1,
    }


def show_training(console: Console, steps: int, evaluations: int, start: int = 0) -> None:
    """Show a training of this many steps and evaluations on the selection split."""
    with Display(console, start + steps) as display:
        for step in range(start + 1, start + steps + 1):
            display.stepped(step, {0: 0.7 - step / (2 * (start + steps))}, 32)
            if (step - start) % (steps // evaluations) == 0:
                display.evaluated(0, line(12.3333), "mcc")


@pytest.fixture
def a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "COLUMNS", "LINES", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("steps", [1, 4, 10, 11, 19, 25, 99, 1000])
def test_without_a_terminal_there_are_few_and_plain_lines(steps: int) -> None:
    file = io.StringIO()
    show_training(Console(file=file, force_terminal=False), steps, evaluations=1)
    text = file.getvalue()
    lines = text.splitlines()
    stepped = [one for one in lines if one.startswith("step ")]
    assert 1 <= len(stepped) <= 10
    assert len(lines) == len(stepped) + 1
    assert text.isprintable() or set(text) - set("\n") <= set(map(chr, range(32, 127)))
    assert "\x1b" not in text
    assert "\r" not in text
    assert lines[-1] == "epoch 12.33  selection  accuracy 0.667  f1 0.500  mcc -0.123"


def test_a_line_says_step_loss_and_rate_and_the_best_known_mcc() -> None:
    file = io.StringIO()
    show_training(Console(file=file), 10, evaluations=2)
    first, *_, last = [one for one in file.getvalue().splitlines() if one.startswith("step ")]
    assert re.fullmatch(r"step 1/10  loss 0\.650  \d+ pairs/s", first)
    assert re.fullmatch(r"step 10/10  loss 0\.\d{3}  mcc -0\.123  \d+ pairs/s", last)


@pytest.mark.parametrize(
    ("metrics", "evaluation", "state"),
    [
        (
            {"accuracy": 0.5, "macro_f1": 0.25, "weighted_f1": 0.3, "mcc": 0.1},
            "accuracy 0.500  macro_f1 0.250  mcc 0.100",
            "mcc 0.100",
        ),
        (
            {"accuracy": 0.5, "macro_f1": 0.25, "weighted_f1": 0.3, "mcc": 0.1},
            "weighted_f1 0.300  accuracy 0.500  macro_f1 0.250",
            "weighted_f1 0.300",
        ),
        (
            {"pearson": 0.5, "spearman": 0.25, "mse": 2.0, "mae": 1.0, "r2": None},
            "pearson 0.500  spearman 0.250  mse 2.000",
            "spearman 0.250",
        ),
    ],
)
def test_the_metrics_of_the_form_and_the_main_metric_are_shown(
    metrics: dict[str, Any], evaluation: str, state: str
) -> None:
    file = io.StringIO()
    with Display(Console(file=file), 2) as display:
        display.evaluated(0, {**line(1.0), "metrics": metrics}, state.partition(" ")[0])
        display.stepped(1, {0: 0.5}, 8)
    shown, step = file.getvalue().splitlines()
    assert shown == f"epoch 1  selection  {evaluation}"
    assert step.startswith(f"step 1/2  loss 0.500  {state}  ")


def test_the_end_of_a_run_shows_the_metrics_of_its_form() -> None:
    file = io.StringIO()
    cost = {"steps": 1, "train_seconds": None, "pairs_per_second": None, "train_flops": 1.0, "peak_memory_bytes": None}
    metrics = {f"validation/one/{name}": 0.5 for name in ("pearson", "spearman", "mse", "mae")}
    config = {"tasks": {"one": {}}}
    show_result(Console(file=file), Path("run"), {"cost": cost, "metrics": metrics, "config": config})
    assert file.getvalue().startswith("validation/one  pearson 0.5000  spearman 0.5000  mse 0.5000\n")


def test_the_loss_is_smoothed_and_the_mean_over_members() -> None:
    file = io.StringIO()
    display = Display(Console(file=file), 2)
    display.stepped(1, {0: 0.5, 1: 1.5}, 8)
    display.stepped(2, {0: 2.0, 1: 2.0}, 8)
    assert [re.search(r"loss (\S+)", one).group(1) for one in file.getvalue().splitlines()] == ["1.000", "1.100"]


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.usefixtures("a_terminal")
def test_a_terminal_is_never_overrun(width: int) -> None:
    file = io.StringIO()
    show_training(Console(file=file, force_terminal=True, width=width), 60, evaluations=3, start=34_047)
    assert "\x1b[" in file.getvalue()
    seen = ESCAPE.sub("", file.getvalue()).replace("\r", "\n").splitlines()
    assert max(map(len, seen)) <= width
    evaluations = [one for one in seen if "selection" in one]
    assert [one.rstrip() for one in evaluations] == ["epoch 12.33  selection  accuracy 0.667  f1 0.500  mcc -0.123"] * 3
    bars = [one for one in seen if "34107/34107" in one]
    assert bars
    assert all("loss 0.2" in one for one in bars)
    assert "step " not in file.getvalue()
    assert set("".join(seen)) & set("━╸")


@pytest.mark.usefixtures("a_terminal")
def test_an_interrupt_leaves_the_cursor_as_it_was() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80)

    def stopped() -> None:
        with Display(console, 5) as display:
            display.stepped(1, {0: 0.7}, 32)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    text = file.getvalue()
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # shown again after it was hidden


def test_the_table_has_a_row_per_metric_and_a_column_per_split() -> None:
    file = io.StringIO()
    metrics = {"selection/mcc": 0.5, "selection/auroc": None, "validation/mcc": -0.25, "validation/[bold]": 1.0}
    Console(file=file, width=60).print(metric_table(metrics))
    rows = [one.split() for one in file.getvalue().splitlines() if one.strip()]
    assert rows[0] == ["metric", "selection", "validation"]
    assert rows[2:] == [["mcc", "0.5000", "-0.2500"], ["auroc"], ["[bold]", "1.0000"]]


NAMES = [
    f"job {k}: adapter=lora adapter.rank={2**k} optimizer.lr=0.001 seed={k} data.path=/a/long/way/down"
    for k in range(3)
]


def told_of_a_pack(console: Console) -> None:
    with Display(console, 4, NAMES) as display:
        for step in range(1, 5):
            display.stepped(step, {k: 0.6 + k / 10 for k in range(3) if k != 1 or step < 3}, 32)
            if step == 2:
                for k in range(3):
                    display.evaluated(k, line(1.0, mcc=k / 10), "mcc")
        display.progress.refresh()


def test_lines_of_a_pack_say_whose_they_are() -> None:
    file = io.StringIO()
    told_of_a_pack(Console(file=file))
    evaluations = [one for one in file.getvalue().splitlines() if "selection" in one]
    assert [one.split("  ")[0] for one in evaluations] == ["job 0", "job 1", "job 2"]
    assert evaluations[2].endswith("mcc 0.200")


@pytest.mark.usefixtures("a_terminal")
@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_terminal_shows_a_row_per_member_that_fits(width: int) -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=width, height=24)
    told_of_a_pack(console)
    drawn = [one for one in ESCAPE.sub("", file.getvalue()).replace("\r", "\n").splitlines() if one.strip()]
    assert max(map(len, drawn)) <= width
    rows = [next(one for one in reversed(drawn) if one.startswith(f"{k}: adapter")) for k in range(3)]
    assert [row.split()[-2:] for row in rows] == [["0.600", "0.000"], ["0.100", "ended"], ["0.800", "0.200"]]
    assert not any("selection" in one for one in drawn)
