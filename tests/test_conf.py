"""Every YAML under conf/ composes, resolves and builds; its keys are its fields, and each is a valid override."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from omegaconf import DictConfig, OmegaConf

from lora_bench.adapters.methods import method_class, method_names
from lora_bench.backbones.families import build_model
from lora_bench.config import build, schema
from lora_bench.config.compose import compose, register_with_hydra
from lora_bench.config.groups import GROUPS, PROMPT_GROUPS, choices, conf_folder
from lora_bench.config.keys import flatten
from lora_bench.errors import Code
from lora_bench.prompt import Request
from lora_bench.run.settings import Experiment
from tests.command_line import refused
from tests.helpers import composed

CONF = conf_folder()
FILES = sorted(path.relative_to(CONF) for path in CONF.rglob("*.yaml"))
AT_LEAST = {
    ".": 5, "adapter": 21, "data": 25, "experiment": 2, "hydra": 1, "metric": 3, "model": 11, "optimizer": 1,
    "prompt": 3, "sweep": 2, "tracking": 2, "trainer": 1,
}  # fmt: skip
OPTIONS = [(file.parent.name, file.stem) for file in FILES if file.parent.name in GROUPS and file.stem[0] != "_"]
# The jobs of `sweep=search` are not known before: tests/hydra_plugins/test_search_sweeper.py.
SWEEPS = {"ablation": 260, "baselines": 11, "lr": 6, "methods": 204, "rank": 6, "seeds": 5, "transfer": 6}
PLAIN = [(group, option) for group, option in OPTIONS if group not in ("experiment", "sweep")]
DISTINCT = [(group, option) for group, option in PLAIN if option == "peft_ia3" or not option.startswith("peft_")]
"""The methods of PEFT have the same keys; those of (IA)³ hold a regular expression."""


def chosen(group: str, option: str) -> list[str]:
    """The overrides that choose an option, with what it leaves open."""
    columns = ["data.text_columns=[text]"] if option in ("files", "hub") and group == "data" else []
    path = ["data.path=pairs"] if option in ("files", "pairs", "paws_qqp") else []
    path += ["model.hub_id=x/y"] if (group, option) == ("model", "auto") else []
    return [f"{group}={option}", *columns, *path, *(["data.hub_id=x/y"] if option == "hub" else [])]


def container(cfg: DictConfig, *, resolve: bool = True) -> dict[str, Any]:
    return cast("dict[str, Any]", OmegaConf.to_container(cfg, resolve=resolve))


def written(value: Any) -> str:
    """A value as an override has it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(written, value))}]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def test_none_is_overlooked() -> None:
    counts = Counter(str(file.parent) for file in FILES)
    assert {group: count for group, count in AT_LEAST.items() if counts[group] < count} == {}
    assert set(counts) == {".", "hydra", "hydra/launcher", *GROUPS, *PROMPT_GROUPS}
    names = {path.name for path in CONF.rglob("*") if path.is_file() and path.suffix not in (".yaml", ".pyc")}
    assert names == {"__init__.py"}


@pytest.mark.usefixtures("in_tmp")
def test_a_shared_base_is_no_choice() -> None:
    assert Path("data/_base.yaml") in FILES
    assert "_base" not in choices("data")
    error = refused("train", "data=bas")
    assert (error.code, error.key) == (Code.UNKNOWN_CHOICE, "data")
    assert "_base" not in str(error)
    assert refused("train", "data=_base").key == "data.source"  # it is for each choice to give


@pytest.mark.parametrize("file", FILES, ids=str)
def test_opens_with_what_it_is_for(file: Any) -> None:
    text = (CONF / file).read_text(encoding="utf-8")
    assert isinstance(yaml.safe_load(text), dict)
    assert "_target_" not in text
    comments = [line for line in text.splitlines() if line.startswith("# ") and not line.startswith("# @package")]
    assert comments or file.parent.name == "trainer"
    assert max(map(len, text.splitlines())) <= 130


@pytest.mark.parametrize(("group", "option"), PLAIN, ids=lambda value: value)
def test_every_option_builds(group: str, option: str) -> None:
    cfg = composed(*chosen(group, option))
    experiment = Experiment.build(cfg)
    values = container(cfg)
    assert [key for key, value in flatten(values) if value == "???"] == []
    if group == "metric":
        assert option in experiment.metrics
        built = dataclasses.asdict(experiment.metrics[option])
        assert built == {"function": None, "args": {}} | values["metric"][option]
        return
    if group == "tracking":
        assert dataclasses.asdict(experiment.trackers[option]) == values["tracking"][option]
        return
    settings = getattr(experiment, group)
    assert dataclasses.asdict(settings) == values[group]
    assert set(values[group]) == {field.name for field in dataclasses.fields(settings)}


@pytest.mark.parametrize(("group", "option"), [pair for pair in OPTIONS if pair[0] == "experiment"])
def test_every_preset_builds(group: str, option: str) -> None:
    Experiment.build(composed(f"{group}={option}"))


@pytest.mark.parametrize(("group", "option"), [pair for pair in OPTIONS if pair[0] in ("experiment", "sweep")])
def test_a_preset_opens_with_its_command_its_score_and_its_cost(group: str, option: str) -> None:
    lines = (CONF / group / f"{option}.yaml").read_text(encoding="utf-8").splitlines()
    opening = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    assert any(line.startswith(f"#   lora-bench train {group}={option}") for line in opening)
    for fact in ("# Expected: ", "# Hardware and time: "):
        assert len([line for line in opening if line.startswith(fact)]) == 1


def jobs(*overrides: str) -> list[list[str]]:
    """The overrides of each job of a sweep, as the sweeper splits them; none is checked or run."""
    register_with_hydra()
    sweeper_config = compose(CONF, "config", list(overrides)).hydra.sweeper
    # As Hydra loaded it: it loads its own plugins anew, so a class imported before has another base.
    grid_sweeper: Any = Plugins.instance().class_name_to_class["hydra_plugins.lora_bench_grid_sweeper.GridSweeper"]
    variants = list(sweeper_config.variants)
    sweeper = grid_sweeper(None, dict(sweeper_config.params or {}), list(sweeper_config.exclude), variants)
    parser, grid = OverridesParser.create(), [*sweeper._parse_config(), *overrides[1:]]
    overrides = [parser.parse_overrides([*grid, *variant]) for variant in sweeper.variants]
    return sweeper._combinations(overrides)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("group", "option"), [("sweep", option) for option in SWEEPS])
def test_every_job_of_every_sweep_builds(group: str, option: str) -> None:
    assert {name for sweep, name in OPTIONS if sweep == "sweep"} == {*SWEEPS, "search"}
    expanded = jobs(f"{group}={option}")
    assert len(expanded) == SWEEPS[option] > 1
    assert len({tuple(job) for job in expanded}) == len(expanded)
    step = {"methods": 12, "ablation": 20}.get(option, 1)  # each once, of its rates and seeds
    for job in expanded[::step]:
        Experiment.build(composed(f"sweep={option}", *(override.lstrip("+") for override in job)))


def test_the_ablation_leaves_out_every_part_one_by_one() -> None:
    """Each variant changes what it names, and no switch of the recipe or the module is missing."""
    whole, *variants = jobs("sweep=ablation", "seed=0", "optimizer.lr=1e-3")
    config = container(composed("sweep=ablation", *whole), resolve=False)
    values = dict(flatten(config))
    changed = []
    for job in variants:
        values_of_job = dict(flatten(container(composed("sweep=ablation", *job), resolve=False)))
        changed.append({key for key in values if values_of_job.get(key) != values[key]})
        assert {override.split("=")[0] for override in job} - {"seed", "adapter", "optimizer.lr"} <= changed[-1]
    for preset in ("experiment/recipe", "adapter/enhanced"):
        preset_values = yaml.safe_load((CONF / f"{preset}.yaml").read_text(encoding="utf-8"))
        groups = preset_values if preset.startswith("experiment") else {"adapter": preset_values}
        for group, values_of_group in groups.items():
            for key in values_of_group.keys() - {"defaults", "default_lr"}:
                assert any(f"{group}.{key}" in keys for keys in changed), key


def test_sweep_of_baselines_leaves_out_what_cannot_be() -> None:
    expanded = jobs("sweep=baselines", "model=tiny_bert,tiny_t5")
    assert ["adapter=head_only", "model=tiny_t5"] not in [sorted(job) for job in expanded]
    assert len(expanded) == 7


@pytest.mark.parametrize("option", [path.stem for path in sorted((CONF / "prompt").glob("*.yaml"))])
def test_every_prompt_builds(option: str) -> None:
    request = Request.build(composed(f"prompt={option}", "llm.model=x", "llm.base_url=http://x", name="prompt"))
    assert request.data.task == "qqp"
    assert "{" in request.prompt.template


@pytest.mark.parametrize("name", ["eval", "predict", "export"])
def test_the_other_commands_configs(name: str) -> None:
    values = dict(flatten(container(composed(name=name), resolve=False)))
    assert values["run"] == (None if name == "eval" else "???")
    assert name == "export" or values["device"] == "auto"
    if name == "eval":
        cfg = composed("run=x", "data.path=pairs", "metric=[specificity,cohen_kappa]", name=name)
        assert isinstance(build.build_data(cfg.data), schema.FileData)
        assert {build.build(schema.Metric, node, key).direction for key, node in cfg.metric.items()} == {"up"}
        for data in (option for group, option in OPTIONS if group == "data"):
            build.build_data(composed("run=x", *chosen("data", data), name=name).data)
        assert composed("peft=x", "model.path=y", "data.path=pairs", name=name).model == {
            "path": "y",
            "tokenizer": None,
        }
        for model in (option for group, option in OPTIONS if group == "model"):
            build_model(composed("peft=x", *chosen("model", model), *chosen("data", "pairs"), name=name).model)


@pytest.mark.parametrize(("group", "option"), DISTINCT, ids=lambda value: value)
def test_every_key_is_a_valid_override(group: str, option: str) -> None:
    """A header pasted back into the shell: each key with its own value gives the same config.

    Of other groups than the option's, the keys are those of the default config.
    """
    first = container(composed(*chosen(group, option)))
    leaves = [(key, value) for key, value in flatten(first) if not isinstance(value, dict)]
    assert len(leaves) > 40
    if option not in ("lora", "toy"):
        leaves = [(key, value) for key, value in leaves if key.startswith((f"{group}.", "optimizer."))]
    again = composed(*chosen(group, option), *(f"{key}={written(value)}" for key, value in leaves))
    assert container(again) == first


def test_every_method_has_a_yaml_and_every_yaml_a_method() -> None:
    methods = {composed(f"adapter={option}").adapter.method for group, option in OPTIONS if group == "adapter"}
    assert methods == set(method_names())
    for name in methods:
        assert method_class(name).__doc__


def test_the_learning_rate_follows_the_method() -> None:
    for group, option in OPTIONS:
        if group == "adapter":
            cfg = composed(f"adapter={option}")
            assert cfg.optimizer.lr == cfg.adapter.default_lr
    assert composed("adapter=full", "optimizer.lr=0.5").optimizer.lr == 0.5


def test_metrics_add_up() -> None:
    experiment = Experiment.build(composed("metric=[specificity,average_precision]"))
    assert list(experiment.metrics) == ["specificity", "average_precision"]
    assert Experiment.build(composed()).metrics == {}
