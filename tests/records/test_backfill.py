"""Runs of an older version: keys that have come since have their defaults, wherever a recorded config is read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

import lora_bench as package
from lora_bench.analysis.summary import summarise
from lora_bench.config.schema import DATA
from lora_bench.errors import Code
from lora_bench.records.backfill import OPTIONS, TYPE_KEYS, fill_defaults
from tests.command_line import lora_bench, refused, toy_run
from tests.helpers import composed

SINCE = ("data.perturb", "data.intensity", "trainer.average", "trainer.consistency_weight", "adapter.magnitude", "pack")


def aged(folder: str | Path, *changes: str, without: tuple[str, ...] = SINCE, **sections: Any) -> None:
    """Make the run's record one of before those keys."""
    path = Path(folder, "run.json")
    record = json.loads(path.read_text()) | sections
    for key in without:
        node = record["config"]
        *groups, name = key.split(".")
        for group in groups:
            node = node[group]
        del node[name]
    path.write_text(json.dumps(record))


def record_of(*overrides: str, **choices: str) -> dict[str, Any]:
    config = OmegaConf.to_container(composed(*overrides), resolve=True)
    return {"config": config, "choices": {"model": "tiny_bert", "adapter": "lora", "data": "qqp", **choices}}


def test_what_is_there_stays_and_what_is_not_has_its_default() -> None:
    record = record_of("adapter=dora", "adapter.rank=3", "trainer.average=0.25", "data.perturb=typo", adapter="dora")
    whole = json.loads(json.dumps(record["config"]))
    assert fill_defaults(record) == whole
    for group, key in (("adapter", "magnitude"), ("data", "augment"), ("trainer", "precision"), ("optimizer", "eps")):
        del record["config"][group][key]
    del record["config"]["pack"], record["config"]["tracking"]
    assert fill_defaults(record) == whole  # of dora, not of lora: magnitude is true
    assert "pack" not in record["config"]


def test_a_choice_of_the_user_s_has_the_defaults_of_its_kind() -> None:
    record = record_of("adapter=adalora", adapter="mine", model="mine", data="mine")
    del record["config"]["adapter"]["beta1"], record["config"]["model"]["revision"], record["config"]["data"]["unseen"]
    config = fill_defaults(record)
    assert (config["adapter"]["beta1"], config["model"]["revision"], config["data"]["unseen"]) == (0.85, None, False)
    every = {"init_from": None, "matching": False}
    strange = record_of(adapter="mine")
    strange["config"]["adapter"] = {"method": "bias", "default_lr": 1e-3}
    assert fill_defaults(strange)["adapter"] == {"method": "bias", "default_lr": 1e-3, **every}
    shadowed = record_of(adapter="lora")  # a file of the user's that is called like one of ours
    shadowed["config"]["adapter"] = {"method": "bias", "default_lr": 1e-3}
    assert fill_defaults(shadowed)["adapter"] == {"method": "bias", "default_lr": 1e-3, **every}


def test_every_kind_has_a_choice_that_is_one() -> None:
    from lora_bench.backbones.families import family_names

    for group, types in (
        ("model", family_names()),
        ("data", DATA),
        ("adapter", ["lora", "adalora", "bitfit", "vera", "full"]),
    ):
        for type_ in types:
            path = ["data.path=x"] if type_ == "files" else []
            node = composed(f"{group}={OPTIONS.get(type_, type_)}", *path)[group]
            assert node[TYPE_KEYS[group]] == type_


def test_an_older_run_is_scored_labels_pairs_and_is_gone_on_with(in_tmp: Path) -> None:
    arguments = toy_run("trainer.max_steps=4", "trainer.eval_every=2", "hydra.run.dir=run")
    assert lora_bench("train", *arguments).code == 0
    before = package.load("run").predict([("a", "b"), ("c", "c")])
    aged("run")
    assert package.load("run").predict([("a", "b"), ("c", "c")]).tolist() == before.tolist()
    assert not GlobalHydra.instance().is_initialized()
    answer = lora_bench("eval", "run=run", "data=toy", "data.train_rows=40", "data.validation_rows=16")
    assert answer.code == 0, answer
    aged("run", without=(), status="interrupted")  # it has no checkpoint, so it begins anew
    error = refused("train", "resume=run", "adapter.rank=3")
    assert (error.code, error.key, error.value) == (Code.NOT_RESUMABLE, "adapter.rank", "3")
    assert "8" in str(error)
    assert lora_bench("train", "resume=run", "trainer.average=0.0").code == 0  # what it began with, though not recorded
    assert json.loads(Path("run/run.json").read_text())["status"] == "done"


@pytest.mark.usefixtures("in_tmp")
def test_older_and_newer_runs_are_one_experiment() -> None:
    for seed in (0, 1):
        assert lora_bench("train", *toy_run(f"seed={seed}", f"hydra.run.dir=runs/{seed}")).code == 0
    aged("runs/0")
    (row,) = summarise([Path("runs")]).rows
    assert row.n == 2


def test_older_newer_and_current_schemas_in_one_comparison(in_tmp: Path) -> None:
    """A record of another schema is listed and left out; the other runs are compared as usual."""
    for name in ("older", "newer", "nameless", "current", "sparse"):
        assert lora_bench("train", *toy_run(f"seed={len(name)}", f"hydra.run.dir=runs/{name}")).code == 0
    aged("runs/older", schema=0)
    aged("runs/newer", without=(), schema=2, metrics=[{"name": "mcc"}])
    record = json.loads(Path("runs/nameless/run.json").read_text())
    del record["schema"]
    Path("runs/nameless/run.json").write_text(json.dumps(record))
    aged("runs/sparse", evaluations={"of": "a later version"})
    table = summarise([Path("runs")])
    assert [row.n for row in table.rows] == [2]
    assert {folder.name for folder in table.rows[0].folders} == {"current", "sparse"}
    reasons = {missing.folder.name: missing.reason for missing in table.missing}
    assert reasons.keys() == {"older", "newer", "nameless"}
    for name, schema in (("older", "schema 0"), ("newer", "schema 2"), ("nameless", "no schema")):
        assert f"run.json has {schema}" in reasons[name]
    answer = lora_bench("compare", "runs", "--html", "page.html")
    assert answer.code == 0
    assert "has schema 2" in Path("page.html").read_text(encoding="utf-8")


def test_a_finished_run_whose_record_was_edited_is_refused(in_tmp: Path) -> None:
    assert lora_bench("train", *toy_run("hydra.run.dir=run")).code == 0
    Path("pairs.tsv").write_text("question1\tquestion2\na\tb\n")
    request = ("predict", "run=run", "input=pairs.tsv", "output=scores.tsv")
    copy = Path("run/.hydra/config.yaml")
    written = copy.read_text()
    copy.write_text(written.replace("alpha: 16", "alpha: 1"))
    assert copy.read_text() != written
    assert lora_bench(*request).code == 0  # the record's checksum tells that the copy is what was changed
    copy.write_text(written)
    record = json.loads(Path("run/run.json").read_text())
    record["config"]["adapter"]["alpha"] = 99.0
    Path("run/run.json").write_text(json.dumps(record))
    error = refused(*request)
    assert (error.code, error.file) == (Code.DAMAGED, Path("run/run.json"))
    assert "adapter.alpha" in str(error)
    assert "99.0" in str(error)
    for odd in (b"", b"\0", b"- [1", b"&a [*a]", "\u00fc".encode(), b"a: " + b"[" * 50_000, b"x" * 200_000):
        copy.write_bytes(odd)  # it cannot say what was there before
        assert lora_bench(*request).code == 0
    copy.unlink()
    os.mkfifo(copy)
    assert lora_bench(*request).code == 0
