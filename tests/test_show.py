"""`lora-bench show`: what it tells of a run in each state."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_bench.errors import Code
from lora_bench.records.backfill import changed_settings
from lora_bench.records.run_folder import Run, read
from tests.command_line import lora_bench, refused
from tests.helpers import composed
from tests.stored_runs import ids, make_run, make_sweep


def test_settings_that_are_not_defaults_are_shown_with_the_defaults(in_tmp: Path) -> None:
    overrides = ["adapter=dora", "adapter.rank=3", "optimizer.lr=0.01", "name=first", "seed=4", "experiment=quickstart"]
    cfg = composed("model=minilm", "data=toy", *overrides[:5])
    from omegaconf import OmegaConf

    config = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(config, dict)
    choices = {"model": "minilm", "adapter": "dora", "data": "toy", "optimizer": "adamw", "trainer": "default"}
    run = Run.claim(Path("outputs/one"), choices=choices, config=config, overrides=overrides[:5])
    run.finish("done")
    changed = {key: (value, default) for key, value, default in changed_settings(read(run.folder))}
    assert changed == {"adapter.rank": (3, 8), "optimizer.lr": (0.01, 0.0005)}
    answer = lora_bench("show", "first")
    assert answer.code == 0
    rows = [line.split() for line in answer.out.splitlines()]
    assert ["adapter.rank", "3", "8"] in rows
    assert ["optimizer.lr", "0.01", "0.0005"] in rows


@pytest.mark.parametrize(
    ("status", "command"),
    [
        ("done", "lora-bench predict run={id} input=pairs.tsv output=labelled.tsv"),
        ("running", "lora-bench train resume={id}"),
        ("interrupted", "lora-bench train resume={id}"),
        ("failed", "lora-bench rm {id}"),
    ],
)
def test_the_next_commands_suit_the_state(status: str, command: str, in_tmp: Path) -> None:
    folder = make_run(Path("outputs/2026-01-01/00-00-00-000000-abc001"), status, notes="for later", tags=["a", "b"])
    answer = lora_bench("show")
    assert answer.code == 0
    assert f"  {command.format(id='abc001')}" in answer.out.splitlines()
    assert ("error: stopped" in answer.out) == (status in ("interrupted", "failed"))
    assert {"tags: a, b", "notes: for later"} <= set(answer.out.splitlines())
    assert str(folder) in answer.out


def test_json_is_the_record_with_id_and_folder(in_tmp: Path) -> None:
    folder = make_run(Path("outputs/one"), name="one")
    shown = json.loads(lora_bench("show", "one", "--json").out)
    assert (shown["id"], shown["folder"], shown["metrics"]["validation/mcc"]) == (*ids(folder), "outputs/one", 0.5)


def test_what_is_no_run_is_refused(in_tmp: Path) -> None:
    make_sweep(Path("outputs/sweep"), 1)
    assert refused("show", "outputs/sweep").code == Code.NOT_FOUND
    assert refused("show", "outputs").code == Code.NOT_FOUND
    assert refused("show", "nobody").code == Code.NOT_FOUND
    for command, argument in (("show", ""), ("rm", ""), ("show", "run=")):
        error = refused(command, argument)
        assert (error.code, error.key) == (Code.INVALID_VALUE, command)
