"""A run goes to the hub and comes back with its scores; what a machine keeps to itself stays there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import numpy as np
import pytest
import yaml
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import lora_bench
from lora_bench.errors import Code
from lora_bench.files import hub
from lora_bench.records import hub_run
from lora_bench.records.run_folder import with_checksum
from tests.command_line import lora_bench as run
from tests.command_line import refused, refuses, toy_run
from tests.hub_server import HubServer, serving_hub

if TYPE_CHECKING:
    from collections.abc import Iterator

PAIRS = [("how do i cook rice", "best way to cook rice"), ("a", "b")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of toy pairs."""
    folder = tmp_path_factory.mktemp("runs") / "done"
    assert run("train", *toy_run(), f"hydra.run.dir={folder}").code == 0
    return folder


@pytest.fixture
def server(
    monkeypatch: pytest.MonkeyPatch, in_tmp: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[HubServer]:
    """A hub without repositories; the current folder is empty."""
    with serving_hub(monkeypatch, tmp_path_factory.mktemp("hub")) as hub_server:
        yield hub_server


def card(files: dict[str, bytes]) -> tuple[dict[str, Any], str]:
    _, header, body = files["README.md"].decode().split("---\n", 2)
    return yaml.safe_load(header), body


def test_a_run_on_the_hub_initialises_another(
    finished: Path, server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("push", str(finished), "me/qqp").code == 0
    commit = server.repositories["me/qqp"].newest
    still = toy_run("optimizer.lr=1e-30", "seed=5")
    answer = run("train", *still, "adapter.init_from=hf://me/qqp", "hydra.run.dir=second")
    assert answer.code == 0, answer
    assert f"initialised from hf://me/qqp@{commit}" in answer.out
    record = json.loads(Path("second/run.json").read_text())
    assert record["config"]["adapter"]["init_from"] == f"hf://me/qqp@{commit}"
    ours, source = lora_bench.load("second").predict(PAIRS), lora_bench.load(finished).predict(PAIRS)
    np.testing.assert_allclose(ours, source, atol=1e-6)
    error = refused("train", *still, "adapter.init_from=hf://me/unknown")
    assert (error.code, error.key) == (Code.NOT_FOUND, "adapter.init_from")


def test_a_run_comes_back_with_its_scores(finished: Path, server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed = run("push", str(finished), "me/qqp")
    assert pushed.code == 0, pushed
    repository = server.repositories["me/qqp"]
    assert repository.private
    files = repository.commits[repository.newest]
    expected = {"run.json", "metrics.jsonl", "README.md"}
    expected |= {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    assert files.keys() == {".gitattributes", *expected}
    assert len(repository.commits) == 2  # one for .gitattributes
    there, here = lora_bench.load("hf://me/qqp"), lora_bench.load(finished)
    np.testing.assert_array_equal(there.predict(PAIRS), here.predict(PAIRS))
    assert there.record["metrics"] == here.record["metrics"]
    assert there.notes == here.notes  # not "edited": the checksum is that of the published record

    old = repository.newest
    again = run("push", str(finished), "hf://me/qqp", "overwrite=true", "predictions=true")
    assert again.code == 0, again
    assert "predictions/validation.parquet" in repository.commits[repository.newest]
    reference = f"run=hf://me/qqp@{old}"
    scored = run("eval", reference, "data=toy", "data.train_rows=40", "data.validation_rows=16", "output=results")
    assert scored.code == 0, scored
    content = json.loads(Path("results/evaluations/toy.json").read_text())
    assert content["run"] == f"hf://me/qqp@{old}"
    key = "validation/accuracy"
    assert content["metrics"][key] == pytest.approx(here.record["metrics"][key])
    exported = run("export", reference, "format=merged", "output=model")
    assert exported.code == 0, exported

    downloaded = hub_run.fetch("hf://me/qqp", "run")
    hub_run._fetch.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.is_reachable.cache_clear()
    assert hub_run.fetch("hf://me/qqp", "run") == downloaded
    assert refused("predict", "run=hf://me/other", "input=-").code == Code.SERVER
    assert refused("push", str(finished), "me/other").code == Code.SERVER


def test_the_card_has_results_with_intervals_and_how_to_load(of_classes: Path, in_tmp: Path) -> None:
    answer = run("push", str(of_classes), "me/three", "dry_run=true", "license=mit")
    assert answer.code == 0, answer
    text = (in_tmp / "three" / "README.md").read_text()
    assert text in answer.out
    header, body = card({"README.md": text.encode()})
    assert header["license"] == "mit"
    assert header["pipeline_tag"] == "text-classification"
    (entry,) = header["model-index"][0]["results"]
    record = json.loads((of_classes / "run.json").read_text())
    values = {metric["name"]: metric["value"] for metric in entry["metrics"]}
    assert values["accuracy"] == pytest.approx(record["metrics"][f"{entry['dataset']['split']}/accuracy"], abs=1e-6)
    (row,) = [line for line in body.splitlines() if "| accuracy |" in line]
    low, high = map(float, row.rstrip(" |").rpartition("| ")[2].split(" to "))
    assert low <= values["accuracy"] <= high
    assert "run=hf://me/three" in body
    assert huggingface_hub.ModelCard(text).data.eval_results


def test_local_paths_and_trackers_stay_here(finished: Path, in_tmp: Path) -> None:
    source = in_tmp / "run"
    shutil.copytree(finished, source)
    record = json.loads((source / "run.json").read_text())
    config = record["config"]
    config["model"] |= {"path": "/home/me/my models/bert", "tokenizer": "/home/me/tok", "random": None}
    config["tracking"] = {"wandb": {"entity": "my-team"}}
    record["choices"]["tracking"] = "wandb"
    record["overrides"] += ["data.path=/home/me/secret/qqp", "tracking=wandb", "tracking.wandb.entity=my-team"]
    config["data"]["label_names"] = record["data"]["label_names"] = ["/music/artist", "/music/album"]
    (source / "run.json").write_text(json.dumps(with_checksum(record)))
    shutil.rmtree(source / ".hydra")
    adapter_config = json.loads((source / "adapter/adapter_config.json").read_text())
    adapter_config["base_model_name_or_path"] = "/home/me/my models/bert"
    (source / "adapter/adapter_config.json").write_text(json.dumps(adapter_config))
    answer = run("push", "run", "me/private", "dry_run=true", "output=out")
    assert answer.code == 0, answer
    published = {str(path.relative_to("out")): path.read_bytes() for path in Path("out").rglob("*.*")}
    assert not [name for name, content in published.items() if b"/home" in content or b"my-team" in content]
    public = json.loads(published["run.json"])
    assert (public["config"]["model"]["path"], public["config"]["model"]["tokenizer"]) == ("bert", "./tok")
    assert public["data"]["label_names"] == ["/music/artist", "/music/album"]
    assert json.loads(published["adapter/adapter_config.json"])["base_model_name_or_path"] == "./bert"
    assert "base_model" not in card(published)[0]
    assert "model.path=DIR" in card(published)[1]
    with refuses(Code.NOT_FOUND, key="model.path"):
        lora_bench.load("out")


def test_what_the_hub_refuses(finished: Path, server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.refusals["/commit/main"] = 403, "You are not allowed to write here"
    assert refused("push", str(finished), "me/qqp").code == Code.FORBIDDEN
    server.refusals.clear()
    assert run("push", str(finished), "me/qqp", "private=false").code == 0  # into the empty repository of before
    repository = server.repositories["me/qqp"]
    assert refused("push", str(finished), "me/qqp").code == Code.EXISTS
    repository.private = False
    assert refused("push", str(finished), "me/qqp", "overwrite=true").code == Code.CONFLICT  # everybody can read it
    assert len(repository.commits) == 2
    assert refused("predict", "run=hf://me/unknown", "input=-").code == Code.NOT_FOUND
    assert refused("predict", "run=hf://me/qqp@v9", "input=-").code == Code.NOT_FOUND
    assert refused("export", "run=hf://not/a/run", "format=peft", "output=o").code == Code.INVALID_VALUE
    monkeypatch.setenv("HF_TOKEN", "hf_" + "another" * 4)
    assert refused("push", str(finished), "me/new").code == Code.FORBIDDEN
    monkeypatch.delenv("HF_TOKEN")
    assert refused("push", str(finished), "me/new").code == Code.FORBIDDEN
    assert list(server.repositories) == ["me/qqp"]


def test_a_downloaded_run_is_not_trusted(finished: Path, server: HubServer) -> None:
    assert run("push", str(finished), "me/qqp").code == 0
    repository = server.repositories["me/qqp"]
    files = repository.commits[repository.newest]
    repository.commit({name: content for name, content in files.items() if name != "run.json"})
    assert refused("predict", "run=hf://me/qqp", "input=-").code == Code.NOT_FOUND
    weights = load_file(finished / "adapter/adapter_model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, "changed.safetensors")
    changed = {"adapter/adapter_model.safetensors": Path("changed.safetensors").read_bytes()}
    repository.commit({**files, **changed, "adapter/../../escaped.json": b"{}"})
    with refuses(Code.DAMAGED):
        lora_bench.load("hf://me/qqp")
    assert not [request for request in server.requests if "escaped" in request]


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["run", "me/../qqp"], "repo"),
        (["run", "me/qqp", "private=maybe"], "private"),
        (["run", "me/qqp", "output=DIR"], "output"),
        (["run", "me/qqp", "license=Do what you want"], "license"),
        (["hf://me/qqp", "me/other"], "run"),
        (["run"], "repo"),
    ],
)
def test_wrong_requests(arguments: list[str], key: str, in_tmp: Path) -> None:
    assert refused("push", *arguments).key == key


def test_a_run_that_is_no_finished_model_is_not_published(finished: Path, in_tmp: Path) -> None:
    assert refused("push", "nowhere", "me/qqp").code == Code.NOT_FOUND
    shutil.copytree(finished, "run")
    record = json.loads((in_tmp / "run/run.json").read_text())
    record["metrics"]["validation/accuracy"] = 1.0
    (in_tmp / "run/run.json").write_text(json.dumps(record))
    assert refused("push", "run", "me/qqp").code == Code.DAMAGED
    (in_tmp / "run/run.json").write_text(json.dumps(with_checksum(record)))
    (in_tmp / "run/adapter/notes.txt").symlink_to("/etc/hostname")
    assert refused("push", "run", "me/qqp", "dry_run=true").code == Code.NOT_A_FILE
    (in_tmp / "run/adapter/adapter_model.safetensors").unlink()
    assert refused("push", "run", "me/qqp").code == Code.NOT_FOUND
