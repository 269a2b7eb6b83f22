"""Runs of an older version: keys that have come since have their defaults, wherever a recorded config is read."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

import lora_bench as package
from lora_bench.analysis.summary import summarise
from lora_bench.config.keys import with_present_keys
from lora_bench.config.schema import DATA
from lora_bench.errors import Code
from lora_bench.records import run_folder
from lora_bench.records.backfill import OPTIONS, TYPE_KEYS, fill_defaults
from lora_bench.training.checkpoint import _describe
from tests.command_line import at_step, lora_bench, refused, signalled, toy_run
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


def test_a_generic_model_of_an_older_run_keeps_its_input_and_its_head() -> None:
    """Then the tokenizer joined the texts of a pair, and `head.pair_features=null` gave such a model none."""
    record = record_of("model=gemma", "head.pair_features=null", model="gemma")
    for key in ("form", "template", "chat_template", "label_words"):
        del record["config"]["model"][key]
    config = fill_defaults(record)
    assert (config["model"]["form"], config["model"]["template"]) == ("classifier", None)
    assert config["head"]["pair_features"] is False
    newer = fill_defaults(record_of("model=gemma", "head.pair_features=null", model="gemma"))
    assert newer["model"]["template"] == "{fields}\nanswer:"
    assert newer["head"]["pair_features"] is None


def test_an_older_t5_has_no_pair_features() -> None:
    """Then `head.pair_features=null` gave it none; a head without `fit_batches` is that old."""
    record = record_of("model=tiny_t5", "head.pair_features=null", model="tiny_t5")
    assert fill_defaults(record)["head"]["pair_features"] is None
    del record["config"]["head"]["fit_batches"]
    assert fill_defaults(record)["head"]["pair_features"] is False


@pytest.mark.parametrize(("data", "differences"), [("mnli", "absolute"), ("qqp", None)])
def test_differences_of_an_older_run_are_absolute(data: str, differences: str | None) -> None:
    record = record_of(f"data={data}", "head.pair_features=true", data=data)
    assert fill_defaults(record)["head"]["differences"] is None
    del record["config"]["head"]["differences"]
    assert fill_defaults(record)["head"]["differences"] == differences


def test_a_choice_of_the_user_s_has_the_defaults_of_its_kind() -> None:
    record = record_of("adapter=adalora", adapter="mine", model="mine", data="mine")
    del record["config"]["adapter"]["beta1"], record["config"]["model"]["revision"], record["config"]["data"]["unseen"]
    config = fill_defaults(record)
    assert (config["adapter"]["beta1"], config["model"]["revision"], config["data"]["unseen"]) == (0.85, None, False)
    every = {"init_from": None}
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


# -- renamed keys and choices --

RENAMED = toy_run("head.pair_features=true", "trainer.objective=alternate_order", "trainer.max_steps=4")


def with_old_names(override: str) -> str:
    return override.replace("head.pair_features", "adapter.matching").replace("alternate_order", "either_order")


def in_old_form(folder: Path) -> None:
    """Rewrite a run's record, its copy of the config and its checkpoints as version 0.1 wrote them."""
    for path in [folder / "run.json", *folder.glob("checkpoints/*/state.json")]:
        content = json.loads(path.read_text())
        content["config"] = old_config(content["config"])
        if path.name == "run.json":
            content["overrides"] = [with_old_names(override) for override in content["overrides"]]
            content = run_folder.with_checksum(content)
        path.write_text(json.dumps(content))
    for checkpoint in folder.glob("checkpoints/*"):
        manifest = {name: _describe(checkpoint / name) for name in ("tensors.safetensors", "state.json")}
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    copy = folder / ".hydra/config.yaml"
    copy.write_text(yaml.safe_dump(old_config(yaml.safe_load(copy.read_text()))))


def old_config(config: dict[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in config.items() if key != "head"}
    return rest | {
        "adapter": config["adapter"] | {"matching": config["head"]["pair_features"]},
        "trainer": config["trainer"] | {"objective": with_old_names(config["trainer"]["objective"])},
    }


def test_a_run_of_an_older_version_is_read_with_the_present_names(in_tmp: Path) -> None:
    settings = [*RENAMED, "adapter.target_modules=qv"]
    for seed in (0, 1):
        assert lora_bench("train", *settings, f"seed={seed}", f"hydra.run.dir=run{seed}").code == 0
    in_old_form(Path("run0"))
    old = Path("run0/run.json").read_text()
    assert "matching" in old
    assert "either_order" in old
    record = run_folder.read(Path("run0"))
    assert record["checksum"] != run_folder.ALTERED
    assert record["config"]["head"] == {"pair_features": True}
    assert record["config"]["trainer"]["objective"] == "alternate_order"
    assert {"head.pair_features=true", "trainer.objective=alternate_order"} <= set(record["overrides"])
    assert "matching" not in record["config"]["adapter"]
    assert lora_bench("eval", "run=run0", "data=toy", "data.validation_rows=16").code == 0
    assert lora_bench("train", *settings, "adapter.init_from=run0", "hydra.run.dir=second").code == 0
    compared = json.loads(lora_bench("compare", "run0", "run1", "--format", "json").out)
    assert "matching" not in json.dumps(compared)
    assert "either_order" not in json.dumps(compared)
    (row,) = summarise([Path("run0"), Path("run1")]).rows
    assert row.n == 2
    refused_export = refused("export", "run=run0", "format=merged", "output=x")
    assert refused_export.key == "head.pair_features"


def test_a_run_of_an_older_version_is_resumed_to_the_same_end(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [*RENAMED, "trainer.checkpoint_every=1"]
    assert lora_bench("train", *settings, "hydra.run.dir=whole").code == 0
    with monkeypatch.context() as patch:
        at_step(patch, 2, signalled(signal.SIGTERM))
        assert lora_bench("train", *settings, "hydra.run.dir=run").code == 143
    in_old_form(Path("run"))
    assert list(Path("run/checkpoints").glob("*/state.json"))
    answer = lora_bench("train", "resume=run")
    assert answer.code == 0, answer.err
    assert "damaged" not in answer.out + answer.err
    one, other = (json.loads(Path(f"{name}/run.json").read_text()) for name in ("run", "whole"))
    assert one["metrics"] == other["metrics"]
    assert one["config"]["head"] == {"pair_features": True}
    assert one["config"]["trainer"]["objective"] == "alternate_order"


def test_a_record_of_an_older_version_that_was_edited_is_refused(in_tmp: Path) -> None:
    assert lora_bench("train", *toy_run("hydra.run.dir=run")).code == 0
    in_old_form(Path("run"))
    record = json.loads(Path("run/run.json").read_text())
    record["config"]["adapter"]["matching"] = True
    Path("run/run.json").write_text(json.dumps(record))
    error = refused("eval", "run=run", "data=toy")
    assert error.code == Code.DAMAGED
    assert "head.pair_features" in str(error)


def test_a_sweep_of_an_older_version_runs_what_it_lacks(in_tmp: Path) -> None:
    keys = ["head.pair_features=true,false", "trainer.objective=cross_entropy,alternate_order"]
    assert lora_bench("train", "-m", *toy_run(*keys, "hydra.sweep.dir=sweep")).code == 0
    path = Path("sweep/sweep.json")
    sweep = json.loads(with_old_names(path.read_text()))
    for overrides in (sweep["overrides"], *sweep["jobs"].values()):
        overrides.append("pack=default")  # a group that was removed
    path.write_text(json.dumps(sweep))
    in_old_form(Path("sweep/0"))
    for job in (1, 2, 3):
        shutil.rmtree(f"sweep/{job}")
    answer = lora_bench("train", "-m", "resume=sweep")
    assert answer.code == 0, answer.err
    configs = [run_folder.read(Path(f"sweep/{job}"))["config"] for job in range(4)]
    assert [(config["head"]["pair_features"], config["trainer"]["objective"]) for config in configs] == [
        (True, "cross_entropy"),
        (True, "alternate_order"),
        (False, "cross_entropy"),
        (False, "alternate_order"),
    ]


@pytest.mark.parametrize(
    ("override", "present"),
    [
        ("adapter.matching=true", "head.pair_features=true"),
        ("trainer.objective=either_order", "trainer.objective=alternate_order"),
        ("+trainer.objective='either_order'", "+trainer.objective='alternate_order'"),
        (
            "trainer.objective=choice(cross_entropy, either_order)",
            "trainer.objective=choice(cross_entropy, alternate_order)",
        ),
        (
            "hydra.sweeper.variants=['adapter.matching=false','trainer.objective=either_order seed=1']",
            "hydra.sweeper.variants=['head.pair_features=false','trainer.objective=alternate_order seed=1']",
        ),
        ("hydra.run.dir=either_order", "hydra.run.dir=either_order"),
        ("trainer.objective=not_either_order", "trainer.objective=not_either_order"),
    ],
)
def test_old_names_in_overrides_of_a_record_are_replaced(override: str, present: str) -> None:
    assert with_present_keys(override) == present


@pytest.mark.parametrize("arguments", [["adapter.matching=true"], ["-m", "adapter.matching=true,false"]])
def test_an_old_name_is_refused_with_the_present_one(arguments: list[str], in_tmp: Path) -> None:
    error = refused("train", *arguments[:-1], *toy_run(arguments[-1]))
    assert (error.code, error.key) == (Code.UNKNOWN_KEY, "adapter.matching")
    assert "head.pair_features" in str(error.remedy)


@pytest.mark.parametrize("arguments", [["trainer.objective=either_order"], ["-m", "trainer.objective=either_order,x"]])
def test_an_old_choice_is_refused_with_the_present_one(arguments: list[str], in_tmp: Path) -> None:
    error = refused("train", *arguments[:-1], *toy_run(arguments[-1]))
    assert (error.code, error.key, error.value) == (Code.UNKNOWN_CHOICE, "trainer.objective", "either_order")
    assert "It is called alternate_order now." in str(error.remedy)


def test_an_old_name_in_a_file_of_the_user_s_is_refused_with_the_present_one(in_tmp: Path) -> None:
    Path("conf/adapter").mkdir(parents=True)
    Path("conf/adapter/mine.yaml").write_text("defaults: [lora, _self_]\nmatching: true\n")
    error = refused("train", "--config-dir", "conf", *toy_run("adapter=mine"))
    assert (error.code, error.key) == (Code.UNKNOWN_KEY, "adapter.matching")
    assert "head.pair_features" in str(error.remedy)


# -- records without the type, the relation and the truncation of data --

NEWER_DATA = ("type", "positive_label", "relation", "truncation", "splits")


def older_data(*overrides: str) -> dict[str, Any]:
    """Return the node `data` that a record of version 0.1 has."""
    data: Any = OmegaConf.to_container(composed(*overrides), resolve=True)["data"]  # type: ignore[call-overload, index]
    return {key: value for key, value in data.items() if key not in NEWER_DATA}


def test_the_older_stsb_has_two_classes(in_tmp: Path) -> None:
    assert lora_bench("train", *toy_run("hydra.run.dir=run")).code == 0
    record = json.loads(Path("run/run.json").read_text())
    record["config"]["data"] = older_data("data=stsb_binary")
    record["choices"]["data"] = "stsb"
    Path("run/run.json").write_text(json.dumps(record))
    present = run_folder.read(Path("run"))
    assert present["choices"]["data"] == "stsb_binary"
    data = fill_defaults(present)["data"]
    assert (data["type"], data["label_threshold"], data["relation"]) == ("classification", 4.0, "similarity")
    record["config"]["data"] |= {"type": "classification"}  # a newer run that chose stsb and made classes of it
    Path("run/run.json").write_text(json.dumps(record))
    assert run_folder.read(Path("run"))["choices"]["data"] == "stsb"


@pytest.mark.parametrize(
    ("choice", "overrides", "relation"),
    [
        ("qqp", ["data=qqp"], "paraphrase"),
        ("pairs", ["data=pairs", "data.path=x"], "paraphrase"),
        ("pairs", ["data=pairs", "data.path=x", "data.task=rte"], "entailment"),
        ("cola", ["data=cola"], "form"),
        ("sst2", ["data=sst2"], None),
        ("mine", ["data=pairs", "data.path=x", "data.task=mine"], None),
    ],
)
def test_the_task_tells_the_relation_of_an_older_run(choice: str, overrides: list[str], relation: str | None) -> None:
    record = record_of(data=choice)
    record["config"]["data"] = older_data(*overrides)
    data = fill_defaults(record)["data"]
    assert data["relation"] == relation
    assert (data["type"], data["truncation"], data["positive_label"]) == ("classification", "longest_first", None)
    assert "splits" in data or data["source"] == "files"


def test_each_of_several_older_tasks_is_completed() -> None:
    record = record_of(data="qqp")
    record["config"]["tasks"] = {
        "rte": older_data("data=rte"),
        "mrpc": older_data("data=pairs", "data.path=x", "data.task=mrpc"),  # local files under the name of an option
    }
    tasks = fill_defaults(record)["tasks"]
    assert (tasks["rte"]["relation"], tasks["rte"]["splits"]) == ("entailment", None)
    assert (tasks["mrpc"]["relation"], tasks["mrpc"]["source"], tasks["mrpc"]["path"]) == ("paraphrase", "files", "x")
    assert tasks["mrpc"]["truncation"] == "longest_first"
    assert "hub_id" not in tasks["mrpc"]
