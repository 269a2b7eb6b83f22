"""Overrides and YAML files, typed or from a record, run no code, read no secret and stay in their folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from lora_bench.config.overrides import (
    MAX_OVERRIDE_LENGTH,
    CheckedFileSource,
    check_overrides,
    check_yaml,
    parse_override,
    shipped_packages,
    typed_by,
)
from lora_bench.errors import Code, UserError, shell_argument
from tests.command_line import TOY_RUN, lora_bench, refused, refuses, toy_run

TARGET = "{_target_: os.mkdir, path: canary}"
LOGGING = "{version: 1, handlers: {x: {class: os.mkdir, path: canary}}, root: {handlers: [x]}}"


def record_sweep(overrides: list[str], /, **keys: Any) -> None:
    """Write the record of a sweep with one job."""
    record = {"schema": 1, "created": "2026-01-01T00:00:00+00:00", "overrides": overrides, "config_dir": None}
    Path("sweep").mkdir()
    Path("sweep/sweep.json").write_text(json.dumps(record | {"jobs": {"0": []}} | keys))


def refused_resume(*overrides: str) -> UserError:
    """Return the error of resuming the sweep; assert that no code was run."""
    error = refused("train", "-m", "resume=sweep", *overrides)
    assert not Path("canary").exists()
    return error


FORBIDDEN = [
    f"+hydra.callbacks.x={TARGET}",
    f"++hydra.callbacks.x={TARGET}",
    f"hydra.callbacks={{x: {TARGET}}}",
    f"+hydra={{callbacks: {{x: {TARGET}}}}}",
    "+hydra={callbacks: {x: {_target_ : os.mkdir}}}",
    "hydra/callbacks=x",
    "+hydra/callbacks=x",
    "+adapter@hydra.callbacks=x",
    "+adapter@hydra=x",
    "~hydra.callbacks",
    "~hydra",
    f"hydra.job_logging={LOGGING}",
    f"hydra.hydra_logging={LOGGING}",
    "hydra/job_logging=default",
    "hydra.searchpath=[pkg://this]",
    "+hydra.searchpath=['pkg://this']",
    "hydra.launcher._target_=os.mkdir",
    "hydra.sweeper._target_= os.mkdir",
    "+hydra.sweeper.params.x={_target_: os.mkdir}",
    "+hydra.sweeper._partial_=true",
    "hydra/sweeper=basic",
    "+hydra.job.env_set.PATH=x",
    "hydra.job.env_copy=[HOME]",
]
FORBIDDEN_OPTIONS = [
    f"+={{hydra: {{callbacks: {{x: {TARGET}}}}}}}",
    "--experimental-rerun=canary.pickle",
    "--config-path=x",
    "-cn=x",
    "--info",
]


@pytest.mark.parametrize(
    ("override", "code"),
    [
        *((override, Code.FORBIDDEN) for override in FORBIDDEN),
        *((override, Code.INVALID_SYNTAX) for override in FORBIDDEN_OPTIONS),
        ("hydra=x", Code.UNKNOWN_KEY),
        ("hydra.output_subdir=.hydra", Code.UNKNOWN_KEY),
        ("hydra/launcher=joblib", Code.UNKNOWN_CHOICE),
    ],
)
def test_code_in_a_sweeps_record_is_refused(in_tmp: Path, override: str, code: Code) -> None:
    record_sweep([*TOY_RUN, "seed=0", override])
    error = refused_resume()
    assert (error.code, str(error.file)) == (code, "sweep/sweep.json")
    name = override.lstrip("+~").partition("=")[0] or override
    assert name.replace("/", ".") in str(error).replace("/", ".")


@pytest.mark.parametrize(
    ("group", "text"),
    [
        ("experiment", f"# @package _global_\nhydra: {{callbacks: {{x: {TARGET}}}}}"),
        ("adapter", f"# @package hydra.callbacks\nx: {TARGET}"),
        ("adapter", "defaults: [lora, {override /hydra/job_logging: default}]"),
        ("hydra/launcher", "_target_: os.mkdir\npath: canary"),
        ("hydra/launcher", "defaults: [slurm]\nsetup: [touch canary]"),
        ("data", "defaults: [toy]\ntask: ${oc.env:SECRET}"),
        ("data", "defaults: [toy]\ntask: '${oc.decode:\"${oc.env:SECRET}\"}'"),
        ("model", "defaults: [tiny_bert]\npackage: canary.weights"),
    ],
)
@pytest.mark.parametrize("choices", ["bad", "bad,bad"])
def test_code_in_the_config_folder_of_a_sweeps_record_is_refused(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, group: str, text: str, choices: str
) -> None:
    """With two choices, the config file is composed for the jobs and not for the sweep."""
    monkeypatch.setenv("SECRET", "do-not-read-me")
    Path("mine", group).mkdir(parents=True)
    Path("mine", group, "bad.yaml").write_text(text)
    Path("canary").with_suffix(".py").write_text("open('canary', 'w')")
    record_sweep([*toy_run(f"{group}={choices}")], config_dir=str(in_tmp / "mine"))
    assert "do-not-read-me" not in str(refused_resume())


def test_environment_variables_in_a_record_are_refused_unless_typed(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TASK_OF_MINE", "a-task-name")
    override = "data.task=${oc.env:TASK_OF_MINE}"
    assert lora_bench("train", "-m", *TOY_RUN, override, "seed=0,1", "hydra.sweep.dir=sweep").code == 0
    shutil.rmtree("sweep/1")
    error = refused_resume()
    assert (error.code, error.key, str(error.file)) == (Code.FORBIDDEN, "data.task", "sweep/sweep.json")
    assert "'${oc.env:TASK_OF_MINE}'" in str(error)
    assert "a-task-name" not in str(error)
    assert lora_bench("train", "-m", "resume=sweep", override).code == 0
    assert json.loads(Path("sweep/1/run.json").read_text())["status"] == "done"


@pytest.mark.parametrize(
    "override",
    [
        "hydra.sweep.subdir=../canary",
        "hydra.sweep.dir=canary",
        "hydra.run.dir=canary",
        "++resume=elsewhere",
        f"+hydra.callbacks.x={TARGET}",
        "data.task=${oc.env:HOME}",
        "model.package=canary.weights",
    ],
)
def test_a_forbidden_job_added_to_a_record_is_refused(in_tmp: Path, override: str) -> None:
    first = [*TOY_RUN, "seed=0"]
    record_sweep(first, jobs={"0": first, "1": [*TOY_RUN, "seed=1", override]})
    error = refused_resume()
    assert error.code == Code.FORBIDDEN
    assert override.lstrip("+").partition("=")[0] in str(error)
    assert not Path("sweep/0").exists()


@pytest.mark.parametrize(
    ("name", "code"), [("../canary", Code.DAMAGED), ("/canary", Code.DAMAGED), ("link", Code.NOT_A_FILE)]
)
def test_a_job_folder_outside_its_sweep_is_refused(in_tmp: Path, name: str, code: Code) -> None:
    Path("elsewhere").mkdir()
    record_sweep(TOY_RUN, jobs={name: TOY_RUN})
    Path("sweep/link").symlink_to(in_tmp / "elsewhere")
    error = refused_resume()
    assert (error.code, str(error.file)) == (code, "sweep/sweep.json")
    assert repr(name) in str(error)
    assert list(Path("elsewhere").iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        ({"overrides": "seed=0"}, Code.DAMAGED),
        ({"overrides": [1]}, Code.DAMAGED),
        ({"overrides": None}, Code.DAMAGED),
        ({"jobs": []}, Code.DAMAGED),
        ({"jobs": {"0": "seed=0"}}, Code.DAMAGED),
        ({"config_dir": 3}, Code.NOT_FOUND),
        ({"config_dir": "nowhere"}, Code.NOT_FOUND),
        ({"created": None}, Code.DAMAGED),
        ({"overrides": ["seed=" + "9" * 5000]}, Code.INVALID_SYNTAX),
        ({"overrides": ["data.task=" + "[" * 500 + "]" * 500]}, Code.INVALID_SYNTAX),
        ({"overrides": ["data.task=" + "a" * 60_000]}, Code.TOO_LARGE),
        ({"overrides": ["data.task=\x00"]}, Code.INVALID_SYNTAX),
        ({"overrides": ["data.task=\ud800"]}, Code.INVALID_SYNTAX),
    ],
    ids=lambda value: None if isinstance(value, Code) else str(value)[:40],
)
def test_a_damaged_record_of_a_sweep_is_refused(in_tmp: Path, damage: dict[str, Any], code: Code) -> None:
    record_sweep(TOY_RUN, **damage)
    error = refused_resume()
    assert (error.code, str(error.file)) == (code, "sweep/sweep.json")


def test_shell_commands_in_a_record_are_refused_unless_typed(in_tmp: Path) -> None:
    record_sweep([*TOY_RUN, "hydra/launcher=slurm", "hydra.launcher.setup=['touch canary']"])
    error = refused_resume()
    assert (error.code, error.key) == (Code.FORBIDDEN, "hydra.launcher.setup")
    assert "'touch canary'" in str(error)
    overrides = [*TOY_RUN, "hydra/launcher=slurm", "hydra.launcher.partition='x\ntouch canary'"]
    Path("sweep/sweep.json").unlink()
    Path("sweep").rmdir()
    record_sweep(overrides)
    error = refused_resume()
    assert (error.code, error.key) == (Code.INVALID_VALUE, "hydra.launcher.partition")


def test_packages_are_refused_unless_typed_or_shipped() -> None:
    (shipped,) = shipped_packages()
    with typed_by(["model.package=mine"], None):
        check_overrides([f"model.package={shipped}", "model.package=mine", "data.task=other.package"])
        for override in ("model.package=a.b", "++model={package: a.b}", "model.package=mine,a.b"):
            with refuses(Code.FORBIDDEN, key="model.package"):
                check_overrides([override])


def test_allowed_overrides_are_unchanged() -> None:
    texts = [
        "adapter=lora,dora",
        "adapter.rank=2,4",
        "seed=range(5)",
        "hydra.sweep.subdir=${hydra.job.override_dirname}",
        "hydra.sweep.dir=sweeps/${now:%Y}",
        "hydra.sweeper.variants=['adapter=lora','adapter=dora']",
        "hydra/sweeper=tuned",
        "+metric.mine={torchmetric: BinaryF1, direction: up}",
        "~optimizer.lr",
    ]
    assert [override.input_line for override in check_overrides(texts)] == texts


# -- invalid syntax and limits --


@pytest.mark.parametrize(
    ("override", "code", "key"),
    [
        ("seed=" + "9" * 5000, Code.INVALID_SYNTAX, None),
        ("seed=1e" + "9" * 5000, Code.INVALID_VALUE, "seed"),
        ("seed=" + "[" * 300 + "]" * 300, Code.INVALID_SYNTAX, None),
        ("seed=" + "a" * 60_000, Code.TOO_LARGE, None),
        ("=1", Code.INVALID_SYNTAX, None),
        ("", Code.INVALID_SYNTAX, None),
    ],
    ids=["digits", "exponent", "nested", "long", "no key", "empty"],
)
def test_invalid_and_too_long_overrides_are_refused(in_tmp: Path, override: str, code: Code, key: str | None) -> None:
    error = refused("train", *TOY_RUN, override)
    assert (error.code, error.key) == (code, key)
    assert repr(override)[:20] in str(error) or key
    assert len(str(error)) < 1000


def test_an_override_of_the_maximum_length_is_read() -> None:
    assert len(parse_override("a=" + "b" * (MAX_OVERRIDE_LENGTH - 2)).value()) == MAX_OVERRIDE_LENGTH - 2  # type: ignore[arg-type]


BILLION_LAUGHS = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "code", "row"),
    [
        ("rank: &x [*x]", Code.INVALID_SYNTAX, 1),
        ("rank: &x {a: *x}", Code.INVALID_SYNTAX, 1),
        (BILLION_LAUGHS, Code.TOO_LARGE, 4),
        ("rank: " + "[" * 60 + "]" * 60, Code.TOO_LARGE, None),
        ("rank: " + "[" * 5000 + "]" * 5000, Code.TOO_LARGE, None),
        ("rank: " + "9" * 5000, Code.INVALID_SYNTAX, None),
        ("rank: \0", Code.INVALID_SYNTAX, None),
        ("rank: " + "x" * 600_000, Code.TOO_LARGE, None),
        (b"rank: \xff\xfe", Code.INVALID_SYNTAX, None),
    ],
    ids=["list", "dict", "laughs", "deep", "deeper", "digits", "nul", "large", "bytes"],
)
def test_yaml_files_beyond_the_limits_are_refused(in_tmp: Path, text: str | bytes, code: Code, row: int | None) -> None:
    Path("mine/adapter").mkdir(parents=True)
    Path("mine/adapter/bad.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    error = refused("train", *TOY_RUN, "--config-dir=mine", "adapter=bad")
    assert (error.code, error.file, error.row) == (code, str(in_tmp / "mine/adapter/bad.yaml"), row)


def test_aliases_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "fine.yaml"
    path.write_text("a: &a [1, 2]\nb: [*a, *a]\n")
    check_yaml(str(path))


def test_a_choice_outside_its_group_is_refused(in_tmp: Path) -> None:
    Path("mine/adapter").mkdir(parents=True)
    Path("other.yaml").write_text("method: lora\n")
    error = refused("train", *TOY_RUN, "--config-dir=mine", "adapter=../../other")
    assert error.code == Code.FORBIDDEN
    assert "'adapter/../../other'" in str(error)


# -- remedies --


@pytest.mark.parametrize(
    "value",
    [
        *(
            "données (1)",
            "a,b",
            "a=b",
            "[x]",
            "{x}",
            "it's",
            'say "x"',
            "both ' and \"",
            "$HOME",
            "${x}",
            "a b",
            "a  b",
        ),
        *(
            "tab\there",
            "line\nend\n",
            "back\\slash",
            "end\\",
            "null",
            "007",
            "1e3",
            "e\u0301",
            "100%",
            "#x",
            "~",
            "!x",
            "",
        ),
        *(os.fsdecode(b"\xff"), "`id`", "a;b", "outputs/2026-01-01/12-00-00"),
    ],
)
def test_suggested_arguments_can_be_pasted_into_a_shell(value: str) -> None:
    argument = shell_argument("data.path", value)
    assert " ".join(argument.split()) == argument  # messages are one line with single spaces
    printed = subprocess.run(["sh", "-c", f"printf '%s' {argument}"], capture_output=True, check=True).stdout
    override = OverridesParser.create().parse_override(os.fsdecode(printed))
    assert OmegaConf.create({"path": override.value()}).path == value


@pytest.mark.parametrize("folder", ["données (1)", "a,b", "it's [1]", "x=1 {y}"])
def test_the_suggested_path_argument_is_accepted(in_tmp: Path, folder: str) -> None:
    Path(folder).mkdir()
    rows = "".join(f"how {i}\twhy {i}\t{i % 2}\n" for i in range(16))
    for split in ("train", "validation"):
        Path(folder, f"{split}.tsv").write_text(f"question1\tquestion2\tlabel\n{rows}")
    overrides = [text for text in toy_run("data=pairs", "data.selection_size=4") if "_rows" not in text]
    message = str(refused("train", *overrides, f"data.path={folder}"))
    argument = message[message.rindex("'data.path=") :]
    typed = subprocess.run(["sh", "-c", f"printf '%s' {argument}"], capture_output=True, check=True, text=True).stdout
    answer = lora_bench("train", *overrides, typed, "hydra.run.dir=run")
    assert answer.code == 0, answer
    assert json.loads(Path("run/run.json").read_text())["config"]["data"]["path"] == str(in_tmp / folder)


def test_values_separated_by_commas_for_a_list_are_refused_with_a_suggestion(in_tmp: Path) -> None:
    error = refused("train", *TOY_RUN, "data.text_columns=question1,question2")
    assert (error.code, error.key) == (Code.INVALID_VALUE, "data.text_columns")
    assert "'data.text_columns=[question1,question2]'" in str(error)


def test_a_file_is_read_again_after_it_has_changed(tmp_path: Path) -> None:
    source, path = CheckedFileSource("test", f"file://{tmp_path}"), tmp_path / "lora.yaml"
    path.write_text("rank: 8\n")
    loaded = source.load_config("lora").config
    loaded.rank = 1
    assert source.load_config("lora").config.rank == 8  # what is loaded belongs to the caller
    path.write_text("rank: 4\n")
    assert source.load_config("lora").config.rank == 4
    path.write_text("rank: [\n")
    with pytest.raises(yaml.MarkedYAMLError):
        source.load_config("lora")
    path.unlink()
    with pytest.raises(UserError):
        source.load_config("lora")
