"""The preset that `compare --best` writes is one that `train` accepts, and it sets what the recommended run had."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from omegaconf import OmegaConf

from lora_bench.compare import main
from lora_bench.config.compose import compose
from lora_bench.config.groups import conf_folder
from lora_bench.config.preset import SECTIONS
from lora_bench.errors import Code, UserError
from lora_bench.records.run_folder import Run
from tests.command_line import refuses

if TYPE_CHECKING:
    from pathlib import Path

CHOICES = {"model": "tiny_bert", "adapter": "lora", "data": "toy", "optimizer": "adamw", "trainer": "default"}


def make(folder: Path, overrides: list[str], mcc: float, config_dir: Path | None = None) -> dict[str, Any]:
    """Write a finished run with the composed config of some overrides, and return that config."""
    cfg = compose(conf_folder(), "config", overrides, None if config_dir is None else str(config_dir))
    choices = {group: cfg.hydra.runtime.choices[group] for group in CHOICES}
    OmegaConf.set_struct(cfg, False)
    del cfg["hydra"]
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    run = Run.claim(folder, choices=choices, config=config, overrides=overrides)
    run.update(metrics={"validation/mcc": mcc, "selection/mcc": mcc}, data={"fingerprint": "one"})
    run.finish("done")
    return config


def sections(config: Any) -> dict[str, Any]:
    node = OmegaConf.create({name: config[name] for name in ("seed", *SECTIONS)})
    container: Any = OmegaConf.to_container(node, resolve=True)
    return {name: container[name] for name in SECTIONS}


def test_train_composes_the_recommended_setting_from_it(tmp_path: Path) -> None:
    base = ["model=tiny_bert", "data=toy"]
    best = [
        *base,
        "adapter=dora",
        "adapter.rank=4",
        "optimizer.lr=0.003",
        "trainer.epochs=2",
        "head.pair_features=false",
    ]
    config = make(tmp_path / "runs/a", best, 0.7)
    make(tmp_path / "runs/b", [*base, "adapter=lora"], 0.5)
    assert main([str(tmp_path / "runs"), "--best", str(tmp_path / "mine")]) == 0
    file = tmp_path / "mine/experiment/best.yaml"
    text = file.read_text()
    assert "  - override /adapter: dora" in text
    assert "experiment=best" in text
    values = OmegaConf.to_container(OmegaConf.load(file))
    assert isinstance(values, dict)
    assert values["adapter"] == {"rank": 4}
    composed = compose(conf_folder(), "config", ["experiment=best"], str(tmp_path / "mine"))
    assert sections(composed) == sections(config)
    again = compose(conf_folder(), "config", ["experiment=best", "adapter.rank=2"], str(tmp_path / "mine"))
    assert again.adapter.rank == 2


def test_a_choice_of_the_users_own_has_to_lie_in_the_folder(tmp_path: Path) -> None:
    own = tmp_path / "own"
    (own / "adapter").mkdir(parents=True)
    (own / "adapter/mine.yaml").write_text("defaults: [lora]\nrank: 3\n")
    config = make(tmp_path / "runs/a", ["model=tiny_bert", "data=toy", "adapter=mine"], 0.7, own)
    with refuses(Code.UNKNOWN_CHOICE, key="adapter") as caught:
        main([str(tmp_path / "runs"), "--best", str(tmp_path / "elsewhere")])
    assert caught.value.value == "mine"
    assert main([str(tmp_path / "runs"), "--best", str(own)]) == 0
    assert sections(compose(conf_folder(), "config", ["experiment=best"], str(own))) == sections(config)


@pytest.mark.parametrize("value", ["${oc.env:HOME}", "x\n- y: z", "# no"])
def test_hostile_values_of_a_record_do_not_become_yaml(tmp_path: Path, value: str) -> None:
    make(tmp_path / "runs/a", ["model=tiny_bert", "data=toy"], 0.7)
    path = tmp_path / "runs/a/run.json"
    record = json.loads(path.read_text())
    record["config"]["model"]["path"] = value
    record["overrides"] = [value]
    path.write_text(json.dumps(record))
    if "$" in value:
        with pytest.raises(UserError) as caught:
            main([str(tmp_path / "runs"), "--best", str(tmp_path / "mine")])
        assert caught.value.key == "model.path"
        assert not (tmp_path / "mine").exists()
        return
    assert main([str(tmp_path / "runs"), "--best", str(tmp_path / "mine")]) == 0
    loaded = OmegaConf.load(tmp_path / "mine/experiment/best.yaml")
    assert loaded.model.path == value
    assert set(loaded) == {"defaults", "model"}


def test_nothing_is_written_without_one_recommendation(tmp_path: Path) -> None:
    run = Run.claim(tmp_path / "runs/a", choices=CHOICES, config={"seed": 0}, overrides=[])
    run.update(metrics={"validation/mcc": 0.0, "selection/mcc": 0.0}, data={"fingerprint": "one"})
    run.finish("done")
    with refuses(Code.UNSUPPORTED, key="--best"):
        main([str(tmp_path / "runs"), "--best", str(tmp_path / "mine")])
    make(tmp_path / "more/a", ["model=tiny_bert", "data=toy"], 0.7)
    make(tmp_path / "more/b", ["model=tiny_bert", "data=toy"], 0.7)
    path = tmp_path / "more/b/run.json"
    path.write_text(path.read_text().replace('"fingerprint": "one"', '"fingerprint": "two"'))
    with refuses(Code.CONFLICT, key="--best"):
        main([str(tmp_path / "more"), "--best", str(tmp_path / "mine")])
    assert not (tmp_path / "mine").exists()
