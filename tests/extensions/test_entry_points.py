"""Methods, model families, metrics and choices of installed distributions."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest

from lora_bench.adapters.methods import method_class, method_names
from lora_bench.adapters.methods.lora import LoRA
from lora_bench.backbones.families import family_class, family_names, family_of_type
from lora_bench.config.groups import all_choices
from lora_bench.config.schema import Metric
from lora_bench.errors import Code
from lora_bench.evaluation.metrics import score
from lora_bench.extensions import entry_points
from lora_bench.extensions.entry_points import METHODS, conf_folders, package_folder, registered_names
from lora_bench.records import run_folder
from lora_bench.run.finished_run import FinishedRun
from tests.command_line import lora_bench, refused, refuses, toy_run
from tests.extensions.tools import install, on_path

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

METHOD = '''
from dataclasses import dataclass

from lora_bench.adapters.methods.lora import LoRA


@dataclass(frozen=True, kw_only=True)
class Louder(LoRA):
    """LoRA, so many times as loud."""

    times: float

    def update(self, name, base, init, dropout):
        update = super().update(name, base, init, dropout)
        update.scaling *= self.times
        return update
'''
FAMILY = '''
from dataclasses import dataclass

from lora_bench.backbones.families.bert import BertFamily


@dataclass(frozen=True, kw_only=True)
class Renamed(BertFamily):
    """BERT by another name."""
'''
METRICS = """
import numpy as np


def cost(labels, scores, *, false_negative=5.0):
    predicted = scores >= 0.5
    return ((labels == 0) & predicted).mean() + false_negative * ((labels == 1) & ~predicted).mean()
"""
GROUPS = {
    "lora_bench.methods": {"louder": "louder_pkg.method:Louder"},
    "lora_bench.backbones": {"renamed": "louder_pkg.family:Renamed"},
    "lora_bench.metrics": {"cost": "louder_pkg.metrics:cost"},
    "lora_bench.conf": {"louder": "louder_pkg.conf"},
}
FILES = {
    "louder_pkg/__init__.py": "",
    "louder_pkg/method.py": METHOD,
    "louder_pkg/family.py": FAMILY,
    "louder_pkg/metrics.py": METRICS,
    "louder_pkg/conf/adapter/louder.yaml": "defaults: [lora, _self_]\nmethod: louder\ntimes: 3.0\n",
    "louder_pkg/conf/model/renamed.yaml": "defaults: [tiny_bert, _self_]\nfamily: renamed\n",
    "louder_pkg/conf/metric/cost.yaml": "cost: {function: cost, args: {false_negative: 2}, direction: down}\n",
}
CHOICES = ["adapter=louder", "model=renamed", "metric=[cost]"]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of installed distributions, on `sys.path`; the current folder is another one."""
    (tmp_path / "site").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with on_path(tmp_path / "site", monkeypatch):
        yield tmp_path / "site"


@pytest.fixture
def louder(site: Path) -> Path:
    install(site, "louder", GROUPS, FILES)
    return site


def train(*overrides: str) -> None:
    answer = lora_bench("train", *toy_run("trainer.max_steps=2", "hydra.run.dir=run", *overrides))
    assert answer.code == 0, answer.err


def test_nothing_is_registered_without_a_distribution() -> None:
    assert registered_names(METHODS) == []
    assert conf_folders() == []


def test_a_run_with_an_installed_method_family_and_metric(louder: Path) -> None:
    train(*CHOICES)
    record = run_folder.read(louder.parent / "work/run")
    assert record["config"]["adapter"]["times"] == 3.0
    assert record["choices"]["model"] == "renamed"
    assert record["environment"]["versions"]["louder"] == "0.1"
    errors = 16 * record["metrics"]["validation/cost"]  # of 16 rows; a false negative counts as two
    assert 0 <= errors <= 32
    assert errors == pytest.approx(round(errors))
    answer = lora_bench("compare", "run", "--format", "latex")
    assert "cost $\\downarrow$" in answer.out or "cost ↓" in answer.out
    for arguments in (["eval", "run=run", "data=toy", "data.validation_rows=16", "metric=[cost]"],
                      ["export", "run=run", "format=merged", "output=merged"]):  # fmt: skip
        answer = lora_bench(*arguments)
        assert answer.code == 0, answer.err


def test_an_installed_method_works_in_a_sweep(louder: Path) -> None:
    sweep = ["-m", *toy_run("trainer.max_steps=1"), "adapter=lora,louder", "hydra.sweep.dir=sweep"]
    answer = lora_bench("train", *sweep)
    assert answer.code == 0, answer.err
    assert run_folder.read(louder.parent / "work/sweep/1")["choices"]["adapter"] == "louder"


def test_names_are_listed_and_nothing_is_imported(louder: Path) -> None:
    assert "louder" in method_names()
    assert "renamed" in family_names()
    assert "louder" in all_choices("adapter")
    assert " louder |" in lora_bench("train", "--help").out
    assert family_of_type("bert") == "bert"
    assert method_class("lora") is LoRA
    assert lora_bench("train", "--cfg", "job", *CHOICES).code == 0
    assert not {name for name in sys.modules if name.startswith("louder_pkg")}
    assert issubclass(method_class("louder"), LoRA)


def test_misspelt_names_of_an_installed_distribution_are_refused_with_the_one_meant(louder: Path) -> None:
    assert "Did you mean louder?" in str(refused("train", "adapter=luoder"))
    assert "Did you mean louder?" in str(refused("train", *toy_run("adapter.method=loudr")))
    assert "Did you mean cost?" in str(refused("train", *toy_run("+metric.mine={function: costs}")))


def test_help_lists_the_choices_of_a_folder(louder: Path) -> None:
    folder = str(louder / "louder_pkg/conf")
    for option in (["--config-dir", folder], [f"--config-dir={folder}"], ["-cd", folder]):
        assert " louder |" in lora_bench("train", *option, "--help").out
    assert lora_bench("train", "--help", "--config-dir").code == 0


@pytest.mark.parametrize(
    ("group", "key", "name"),
    [
        ("lora_bench.methods", "adapter.method", "lora"),
        ("lora_bench.backbones", "model.family", "bert"),
    ],
)
def test_a_name_of_lora_bench_cannot_be_replaced(site: Path, group: str, key: str, name: str) -> None:
    install(site, "thief", {group: {name: "thief_pkg:Anything"}}, {"thief_pkg.py": "raise SystemExit\n"})
    error = refused("train", *toy_run())
    assert (error.code, error.key, error.value) == (Code.EXTENSION, key, name)
    assert "thief 0.1" in str(error)
    assert "thief_pkg" not in sys.modules


def test_a_choice_of_lora_bench_cannot_be_replaced(site: Path) -> None:
    install(site, "thief", {"lora_bench.conf": {"x": "thief_pkg"}}, {"thief_pkg/adapter/lora.yaml": "method: full\n"})
    error = refused("train", *toy_run())
    assert (error.code, error.key, error.value) == (Code.EXTENSION, "adapter", "lora")
    assert "thief 0.1" in str(error)
    assert lora_bench("train", "--cfg", "job", *toy_run("adapter=dora")).code == 0
    error = refused("train", "-m", *toy_run(), "adapter=lora,dora")
    assert error.code == Code.EXTENSION


def test_a_name_of_two_distributions_is_refused(louder: Path) -> None:
    files = {"twin_pkg/__init__.py": "", "twin_pkg/conf/adapter/louder.yaml": "method: louder\n"}
    install(louder, "twin", {"lora_bench.methods": {"louder": "twin_pkg:X"}}, files)
    error = refused("train", *toy_run("adapter=louder"))
    assert error.code == Code.EXTENSION
    assert {"louder 0.1", "twin 0.1"} <= set(
        str(error).replace(" and by ", ",").replace("by ", ",").replace(".", ".").split(",")
    ) or ("louder 0.1" in str(error) and "twin 0.1" in str(error))


def test_a_choice_of_two_distributions_is_refused(louder: Path) -> None:
    files = {"twin_pkg/__init__.py": "", "twin_pkg/conf/adapter/louder.yaml": "method: louder\n"}
    install(louder, "twin", {"lora_bench.conf": {"twin": "twin_pkg.conf"}}, files)
    error = refused("train", *toy_run("adapter=louder"))
    assert (error.code, error.key, error.value) == (Code.EXTENSION, "adapter", "louder")
    assert "twin 0.1" in str(error)


BROKEN = {
    "it imports nothing": ("nowhere.method:X", ""),
    "it has no such class": ("odd_pkg:Missing", ""),
    "it is not a class": ("odd_pkg:value", "value = 1\n"),
    "it is another class": ("odd_pkg:Other", "class Other:\n    pass\n"),
    "it raises": ("odd_pkg:Other", "raise RuntimeError('no GPU')\n"),
}


@pytest.mark.parametrize("group", ["lora_bench.methods", "lora_bench.backbones"])
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_one_is_refused_with_its_distribution(site: Path, group: str, case: str) -> None:
    value, text = BROKEN[case]
    install(site, "odd", {group: {"odd": value}}, {"odd_pkg.py": text})
    key, find = ("adapter.method", method_class) if group == METHODS else ("model.family", family_class)
    with refuses(Code.EXTENSION, key=key) as caught:
        find("odd")  # type: ignore[operator]
    assert "odd 0.1" in str(caught.value)
    sys.modules.pop("odd_pkg", None)


def test_other_methods_work_beside_a_broken_distribution(site: Path) -> None:
    install(site, "odd", {"lora_bench.methods": {"odd": "::"}, "lora_bench.conf": {"odd": "no/folder"}}, {})
    (site / "empty-0.1.dist-info").mkdir()
    (site / "unreadable-0.1.dist-info").mkdir()
    (site / "unreadable-0.1.dist-info/entry_points.txt").write_bytes(b"\xff[x\n=\n")
    assert lora_bench("train", "--cfg", "job", *toy_run()).code == 0
    assert method_class("lora") is LoRA


def test_an_installed_yaml_is_checked_like_one_of_the_user(site: Path) -> None:
    yamls = {
        "code": "# @package _global_\nhydra: {callbacks: {x: {_target_: os.system}}}\n",
        "unknown": "# @package _global_\nadapter: {rnk: 3}\n",
    }
    files = {f"evil_pkg/conf/experiment/{name}.yaml": text for name, text in yamls.items()}
    install(site, "evil", {"lora_bench.conf": {"evil": "evil_pkg.conf"}}, {"evil_pkg/__init__.py": "", **files})
    (site / "evil_pkg/conf/experiment/out.yaml").symlink_to(site / "evil_pkg/conf/experiment/code.yaml")
    assert refused("train", *toy_run("experiment=code")).code == Code.FORBIDDEN
    assert refused("train", *toy_run("experiment=unknown")).code == Code.UNKNOWN_KEY
    assert refused("train", *toy_run("experiment=../conf/experiment/code")).code == Code.FORBIDDEN


def test_a_package_is_located_without_an_import(site: Path) -> None:
    files = {"boom/__init__.py": "raise SystemExit\n", "boom/conf/adapter/x.yaml": "", "single.py": ""}
    install(site, "boom", {}, files)
    assert package_folder("boom.conf") == site / "boom/conf"
    assert package_folder("boom") == site / "boom"
    for name in ("boom.nothing", "single", "single.conf", "nowhere.conf", "", ".", "a/b", "boom.__init__"):
        assert package_folder(name) is None, name


def test_a_run_whose_method_is_gone_is_not_called_damaged(louder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train("adapter=louder", "metric=[cost]")
    (louder.parent / "work/pairs.tsv").write_text("question1\tquestion2\na b\tc d\n")
    predict = ["predict", "run=run", "input=pairs.tsv", "output=labelled.tsv"]
    monkeypatch.setattr(entry_points, "registered", lambda group: ())
    with refuses(Code.MISSING_PACKAGE, key="adapter.method"):
        FinishedRun.load("run")
    monkeypatch.setattr(FinishedRun, "load", None)  # commands refuse the run before anything is loaded
    for arguments in (predict, ["eval", "run=run", "data=toy"], ["export", "run=run", "output=out", "format=merged"]):
        error = refused(*arguments)
        assert (error.code, error.key, error.value) == (Code.MISSING_PACKAGE, "adapter.method", "louder")
        assert "damaged" not in str(error)
        assert "louder 0.1" in str(error)


def test_a_run_whose_metric_is_gone_predicts(louder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train("metric=[cost]")
    (louder.parent / "work/pairs.tsv").write_text("question1\tquestion2\na b\tc d\n")
    monkeypatch.setattr(entry_points, "registered", lambda group: ())
    answer = lora_bench("predict", "run=run", "input=pairs.tsv", "output=labelled.tsv")
    assert answer.code == 0, answer.err


FUNCTIONS = {
    "it raises": ("def odd(labels, scores):\n    raise ValueError('one label')\n", ["function=odd"]),
    "it returns a list": ("def odd(labels, scores):\n    return [1, 2]\n", ["function=odd"]),
    "it is no function": ("odd = 1\n", ["function=odd"]),
    "it needs an argument": ("def odd(labels, scores, weight):\n    return weight\n", ["function=odd"]),
    "it has no argument": ("def odd(labels, scores):\n    return 1\n", ["function=odd", "args={weight: 1}"]),
}


@pytest.mark.parametrize("case", FUNCTIONS)
def test_a_metric_that_cannot_be_used_is_refused_before_training(site: Path, case: str) -> None:
    text, settings = FUNCTIONS[case]
    install(site, "odd", {"lora_bench.metrics": {"odd": "odd_pkg:odd"}}, {"odd_pkg.py": text})
    node = "{" + ", ".join(setting.replace("=", ": ", 1) for setting in settings) + "}"
    error = refused("train", *toy_run(f"+metric.mine={node}"))
    assert str(error.key).startswith("metric.mine.")
    assert "odd 0.1" in str(error)


def test_a_metric_that_is_not_finite_is_null(site: Path) -> None:
    text = "def odd(labels, scores):\n    labels[:] = 0\n    return float('nan')\n"
    install(site, "odd", {"lora_bench.metrics": {"odd": "odd_pkg:odd"}}, {"odd_pkg.py": text})
    labels = np.array([0, 1])
    values = score(np.array([0.2, 0.7]), labels, {"odd": Metric(function="odd")})
    assert values["odd"] is None
    assert labels.tolist() == [0, 1]
