"""Invalid requests: a message that names key, file or row, exit code 2, no new files and no code executed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
import yaml

from lora_bench.config.compose import Arguments
from lora_bench.errors import Code
from tests.command_line import TOY_RUN, files_below, lora_bench, refused, refuses, toy_run

if TYPE_CHECKING:
    from pathlib import Path

INVALID_VALUES = [
    ("adapter.rank=abc", "abc"),
    ("adapter.rank=0", 0),
    ("adapter.rank=-3", -3),
    ("adapter.rank=2.5", 2.5),
    ("adapter.rank=1e3", 1000.0),
    ("adapter.rank=true", True),
    ("adapter.rank=[1]", [1]),
    ("adapter.rank=", ""),
    ("adapter.rank=99999999999999999999", 99999999999999999999),
    ("adapter.dropout=1", 1.0),
    ("adapter.dropout=nan", math.nan),
    ("adapter.dropout=-0.1", -0.1),
    ("adapter.alpha=0", 0.0),
    ("optimizer.lr=nan", math.nan),
    ("optimizer.lr=inf", math.inf),
    ("optimizer.lr=1e400", math.inf),
    ("optimizer.lr=0", 0.0),
    ("optimizer.lr=-1", -1.0),
    ("optimizer.lr=abc", "abc"),
    ("trainer.epochs=inf", math.inf),
    ("trainer.batch_size=0", 0),
    ("trainer.max_steps=0.5", 0.5),
    ("seed=-1", -1),
    ("seed=abc", "abc"),
    ("dry_run=maybe", "maybe"),
    ("data.text_columns=abc", "abc"),
    ("data.text_columns=[question1]", ["question1"]),
    ("data.selection_size=abc", "abc"),
    ("+metric.mine=3", 3),
    ("adapter.layers=top:9", "top:9"),
    ("adapter.layers=[2]", [2]),
]
"""Values of a wrong type or out of range, each with the value in the error."""

UNKNOWN_CHOICES = [
    ("optimizer.schedule=step", "linear, cosine, constant"),
    ("trainer.precision=fp8", "auto, fp32, bf16"),
    ("trainer.device=tpu", "auto, cpu, cuda"),
    ("model=robrta", "Did you mean roberta?"),
    ("metric=nonsense", "average_precision, cohen_kappa"),
    ("experiment=nonsense", "enhanced, quickstart"),
    ("sweep=nonsense", "ablation, baselines, lr, methods, rank, search, seeds, transfer"),
    # a method is one of those in the package; nothing is imported by name
    *((f"adapter.method={name}", "adalora, bitfit, full") for name in ("os", "../x", "__init__", "base", "pack")),
]
"""Values that are not one of the choices, each with choices that the message lists."""

UNKNOWN_KEYS = [
    ("adapter.rnak=8", "Did you mean adapter.rank?"),
    ("modle=bert", "Did you mean model?"),
    ("optimiser.lr=1", "Did you mean optimizer.lr?"),
    ("+foo=1", "adapter, data"),
    ("+adapter.rnak=8", "Did you mean rank?"),
]
"""Unknown keys, each with keys that the message names."""

INVALID_REQUESTS = [
    ("adapter.rank=null", (Code.MISSING, "adapter.rank", None), ""),
    ("~adapter.rank", (Code.MISSING, "adapter.rank", None), ""),
    ("~adapter", (Code.MISSING, "adapter", None), ""),
    ("~seed", (Code.MISSING, "seed", None), ""),
    ("model.random=null", (Code.MISSING, "model.path", None), "model.path=DIR"),
    ("adapter.rank=${nope}", (Code.INVALID_VALUE, "adapter.rank", None), "'nope'"),
    ("adapter.rank=2,4", (Code.INVALID_VALUE, "adapter.rank", "2,4"), "-m "),
    ("metric=[nonsense]", (Code.UNKNOWN_CHOICE, "metric", "nonsense"), "average_precision, cohen_kappa"),
    (
        "+metric.mine={torchmetric: BinaryF1, direction: up}",
        (Code.UNKNOWN_CHOICE, "metric.mine.torchmetric", "BinaryF1"),
        "BinaryF1Score",
    ),
    ("adapter=null", (Code.UNKNOWN_CHOICE, None, None), "'adapter=null'"),
    ("adapter=3", (Code.UNKNOWN_CHOICE, None, None), "'adapter=3'"),
    # syntax
    ("foo", (Code.INVALID_SYNTAX, None, None), "'foo'"),
    ("adapter.target_modules=(", (Code.INVALID_SYNTAX, None, None), "'adapter.target_modules=('"),
    ("adapter.target_modules='('", (Code.INVALID_SYNTAX, "adapter.target_modules", "("), ""),
    ("--nope", (Code.INVALID_SYNTAX, None, None), "--nope"),
    ("--cfg=nope", (Code.INVALID_SYNTAX, None, None), "'nope'"),
    ("--resolve", (Code.CONFLICT, None, None), "--cfg job"),
    ("--config-dir=nowhere", (Code.NOT_FOUND, "--config-dir", "nowhere"), ""),
    ("hydra.run.dir=null", (Code.INVALID_SYNTAX, None, None), "hydra.run.dir=null"),
    # limits of the backbone and the data
    ("adapter.rank=33", (Code.INVALID_VALUE, "adapter.rank", 33), "32"),
    ("data.train_size=1000", (Code.INVALID_VALUE, "data.train_size", 1000), "36 rows"),
    (
        "adapter.target_modules=.*foo",
        (Code.NO_MATCH, "adapter.target_modules", ".*foo"),
        "bert.encoder.layer.*.attention.self.query",
    ),
    (
        "adapter.target_modules=query",
        (Code.NO_MATCH, "adapter.target_modules", "query"),
        "bert.encoder.layer.0.attention.self.query",
    ),
]
"""Other invalid requests, each with the code, key and value of the error and another text of its message."""


@pytest.mark.parametrize(("override", "value"), INVALID_VALUES, ids=[override for override, _ in INVALID_VALUES])
def test_invalid_value(in_tmp: Path, override: str, value: object) -> None:
    error = refused("train", *toy_run(override))
    key = override.removeprefix("+").partition("=")[0]
    assert (error.code, error.key, repr(error.value)) == (Code.INVALID_VALUE, key, repr(value))


@pytest.mark.parametrize(("override", "choices"), UNKNOWN_CHOICES)
def test_unknown_choice(in_tmp: Path, override: str, choices: str) -> None:
    error = refused("train", *toy_run(override))
    key, _, value = override.partition("=")
    assert (error.code, error.key, error.value) == (Code.UNKNOWN_CHOICE, key, value)
    assert choices in str(error)


@pytest.mark.parametrize(("override", "keys"), UNKNOWN_KEYS)
def test_unknown_key(in_tmp: Path, override: str, keys: str) -> None:
    error = refused("train", *toy_run(override))
    assert (error.code, error.key) == (Code.UNKNOWN_KEY, override.removeprefix("+").partition("=")[0])
    assert keys in str(error)


@pytest.mark.parametrize(
    ("override", "expected", "detail"), INVALID_REQUESTS, ids=[override for override, _, _ in INVALID_REQUESTS]
)
def test_invalid_request(in_tmp: Path, override: str, expected: tuple[Code, str | None, object], detail: str) -> None:
    error = refused("train", *toy_run(override))
    assert (error.code, error.key, error.value) == expected
    assert detail in str(error)


def test_a_missing_model_folder_is_refused(in_tmp: Path) -> None:
    error = refused("train", *toy_run("model.path=nowhere"))
    assert (error.code, error.key, error.value) == (Code.NOT_FOUND, "model.path", str(in_tmp / "nowhere"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is available")
def test_cuda_without_a_device_is_refused(in_tmp: Path) -> None:
    error = refused("train", *toy_run("trainer.device=cuda"))
    assert (error.code, error.key, error.value) == (Code.NO_DEVICE, "trainer.device", "cuda")


@pytest.mark.parametrize("model", ["bert", "roberta", "t5"])
def test_a_missing_hub_model_is_refused_offline_with_a_remedy(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: str
) -> None:
    error = refused("train", *TOY_RUN[1:], f"model={model}", "model.hub_id=nobody/has-this-one")
    assert (error.code, error.key, error.value) == (Code.NOT_FOUND, "model.hub_id", "nobody/has-this-one")
    assert "model.path=DIR" in str(error)


ROWS = [("how do I cook rice", "what is the way to cook rice", "1"), ("what is a verb", "who wrote this", "0")] * 8


def write_pairs(path: Path, *, header: str = "question1\tquestion2\tlabel", rows: int = 16, row_7: str = "") -> None:
    path.parent.mkdir(exist_ok=True)
    lines = [header, *("\t".join(row) for row in ROWS[:rows])]
    if row_7:
        lines[6] = row_7  # line 7 in an editor
    path.write_text("\n".join(lines) + "\n")


VALID_SPLIT: dict[str, object] = {}

INVALID_DATA = [
    ({}, [], (Code.MISSING, "data.path", None), None, ""),
    ({}, ["data.path=nowhere"], (Code.NOT_FOUND, "data.path", None), "nowhere", ""),
    ({}, ["data.path=pairs"], (Code.NOT_FOUND, "data.path", None), "pairs", "train, validation or test"),
    ({"train": VALID_SPLIT}, ["data.path=pairs"], (Code.EMPTY, "data", None), None, "validation file"),
    ({"validation": VALID_SPLIT}, ["data.path=pairs"], (Code.EMPTY, "data", None), None, "train file"),
    (
        {"train": VALID_SPLIT, "validation": {"rows": 0}},
        ["data.path=pairs"],
        (Code.EMPTY, None, None),
        "pairs/validation.tsv",
        "",
    ),
    (
        {"train": {"header": "question1\tquestion_2\tlabel"}, "validation": VALID_SPLIT},
        ["data.path=pairs"],
        (Code.INVALID_DATA, None, None),
        "pairs/train.tsv",
        "'question2'",
    ),
    (
        {"train": VALID_SPLIT, "validation": {"row_7": "a\tb\t2"}},
        ["data.path=pairs"],
        (Code.INVALID_DATA, None, 7),
        "pairs/validation.tsv",
        "'2'",
    ),
    (
        {"train": {"row_7": "a\t1"}, "validation": VALID_SPLIT},
        ["data.path=pairs"],
        (Code.INVALID_DATA, None, 7),
        "pairs/train.tsv",
        "2 columns",
    ),
]
"""Splits, overrides; code, key and row of the error; the path in its value or file; another text of its message."""


@pytest.mark.parametrize(
    ("data", "overrides", "expected", "path", "detail"),
    INVALID_DATA,
    ids=["no path", "no folder", "no file", "train only", "validation only", "no rows", "header", "label", "columns"],
)
def test_invalid_data(
    in_tmp: Path,
    data: dict[str, dict[str, object]],
    overrides: list[str],
    expected: tuple[Code, str | None, int | None],
    path: str | None,
    detail: str,
) -> None:
    (in_tmp / "pairs").mkdir()
    for split, settings in data.items():
        write_pairs(in_tmp / "pairs" / f"{split}.tsv", **settings)  # type: ignore[arg-type]
    error = refused("train", "model=tiny_bert", "data=pairs", "trainer.device=cpu", *overrides)
    assert (error.code, error.key, error.row) == expected
    assert (error.value or error.file) == (None if path is None else str(in_tmp / path))
    assert detail in str(error)


def test_missing_hub_data_is_refused_offline_with_a_remedy(in_tmp: Path) -> None:
    error = refused("train", "model=tiny_bert", "data=qqp", "data.hub_id=nobody/has-this-one")
    assert (error.code, error.key, error.value) == (Code.NOT_FOUND, "data.hub_id", "nobody/has-this-one")
    assert "data=toy" in str(error)


@pytest.mark.parametrize(
    ("text", "row"),
    [
        ("method: lora\nrank:\t8\n\talpha: 1\n", 2),
        ("rank: [1\nalpha: 2\n", 2),
        ("rank: 8\nrank: 4\n", 2),
        ("a: b: c\n", 1),
        ("- 'x\n", 2),
    ],
    ids=["tab", "bracket", "key given twice", "colons", "quote"],
)
def test_invalid_yaml_is_refused_with_file_and_row(in_tmp: Path, text: str, row: int) -> None:
    write(in_tmp / "mine" / "adapter" / "broken.yaml", text)
    error = refused("train", *TOY_RUN, "--config-dir", "mine", "adapter=broken")
    path = str(in_tmp / "mine/adapter/broken.yaml")
    assert (error.code, error.file, error.row) == (Code.INVALID_SYNTAX, path, row)


def test_a_file_with_the_suffix_yml_is_refused(in_tmp: Path) -> None:
    write(in_tmp / "mine" / "adapter" / "other.yml", "method: lora\n")
    error = refused("train", *TOY_RUN, "--config-dir=mine", "adapter=other")
    assert (error.code, str(error.file)) == (Code.UNKNOWN_CHOICE, "mine/adapter/other.yml")
    assert ".yaml" in str(error)


def test_choices_of_the_users_folder_are_suggested(in_tmp: Path) -> None:
    write(in_tmp / "mine" / "adapter" / "my_lora.yaml", "defaults: [lora]\n")
    error = refused("train", *TOY_RUN, "--config-dir=mine", "adapter=my_loar")
    assert (error.code, error.key, error.value) == (Code.UNKNOWN_CHOICE, "adapter", "my_loar")
    assert "Did you mean my_lora?" in str(error)


def test_keys_of_the_chosen_options_are_suggested(in_tmp: Path) -> None:
    """`data.train_rows` is a key of `toy` only; `data.path` is one of `pairs`."""
    error = refused("train", *TOY_RUN, "data.train_row=9")
    assert (error.code, error.key) == (Code.UNKNOWN_KEY, "data.train_row")
    assert "Did you mean data.train_rows?" in str(error)
    error = refused("train", "model=tiny_bert", "data=pairs", "data.paht=x")
    assert (error.code, error.key) == (Code.UNKNOWN_KEY, "data.paht")
    assert "Did you mean data.path?" in str(error)


# -- code in configs --


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


TARGET = "{_target_: os.mkdir, path: EVIL}"
LOGGING = "{version: 1, handlers: {x: {class: os.mkdir, path: EVIL}}, root: {handlers: [x]}}"

FORBIDDEN = [
    "hydra.callbacks.x._target_=os.mkdir",
    f"+hydra.callbacks.x={TARGET}",
    f"++hydra.callbacks.x={TARGET}",
    f"+hydra={{callbacks: {{x: {TARGET}}}}}",
    "hydra/callbacks=x",
    f"hydra.job_logging={LOGGING}",
    f"hydra.hydra_logging={LOGGING}",
    f"+hydra={{job_logging: {LOGGING}}}",
    f"+hydra={{hydra_logging: {LOGGING}}}",
    "hydra/job_logging=default",
    "hydra.launcher._target_=os.mkdir",
    "hydra.sweeper._target_=os.mkdir",
    "hydra.searchpath=[pkg://this]",
    "+hydra.job.env_set.PATH=EVIL",
    "+hydra={job: {env_set: {PATH: EVIL}}}",
    "adapter._target_=os.mkdir",
    f"+adapter.x={TARGET}",
]
FORBIDDEN_OPTIONS = [
    "--experimental-rerun=config.pickle",
    "--experimental-re=config.pickle",
    "--config-path=mine",
    "--config-name=mine",
    "-cn=mine",
]
IN_ARGUMENTS = [
    *((argument, Code.FORBIDDEN, argument.lstrip("+").partition("=")[0]) for argument in FORBIDDEN),
    *((argument, Code.INVALID_SYNTAX, argument.partition("=")[2]) for argument in FORBIDDEN_OPTIONS),
    (f"hydra.sweeper={TARGET}", Code.UNKNOWN_KEY, "hydra.sweeper"),
]
"""Arguments, the code of the error, and the part of the argument in its message."""


@pytest.mark.parametrize("mode", [[], ["-m"], ["--cfg=job"]], ids=["run", "sweep", "cfg"])
@pytest.mark.parametrize(("argument", "code", "detail"), IN_ARGUMENTS)
def test_code_in_arguments_is_refused(in_tmp: Path, argument: str, code: Code, detail: str, mode: list[str]) -> None:
    evil = in_tmp / "evil"
    error = refused("train", *TOY_RUN, *mode, argument.replace("EVIL", str(evil)))
    assert not evil.exists()
    assert error.code == code
    assert detail in str(error)


PRESET = "# @package _global_\n"
IN_FILES = {
    "callbacks": ("experiment", f"{PRESET}hydra: {{callbacks: {{x: {TARGET}}}}}"),
    "callbacks by interpolation": ("experiment", f"{PRESET}x: {{y: {TARGET}}}\nhydra: {{callbacks: '${{x}}'}}"),
    "callbacks as a group": ("+hydra/callbacks", f"# @package hydra.callbacks\nx: {TARGET}"),
    "callbacks beside hydra's settings": ("hydra", f"defaults: [quiet]\ncallbacks: {{x: {TARGET}}}"),
    "a package directive": ("adapter", f"# @package hydra.callbacks\nx: {TARGET}"),
    "job logging": ("experiment", f"{PRESET}hydra: {{job_logging: {LOGGING}}}"),
    "hydra's logging": ("experiment", f"{PRESET}hydra: {{hydra_logging: {LOGGING}}}"),
    "a parameter of the sweeper": ("experiment", f"{PRESET}hydra: {{sweeper: {{params: {TARGET}}}}}"),
    "a launcher": ("hydra/launcher", "_target_: os.mkdir\npath: EVIL"),
    "the environment": ("experiment", f"{PRESET}hydra: {{job: {{env_set: {{PATH: EVIL}}}}}}"),
    "an adapter": ("adapter", f"defaults: [lora]\nlayers: {TARGET}"),
    "a data set": ("data", "defaults: [toy]\n_target_: os.mkdir\npath: EVIL"),
}


@pytest.mark.parametrize("mode", [[], ["-m"]], ids=["run", "sweep"])
@pytest.mark.parametrize("case", IN_FILES)
def test_code_in_a_users_folder_is_not_run(in_tmp: Path, case: str, mode: list[str]) -> None:
    evil = in_tmp / "evil"
    group, text = IN_FILES[case]
    choice = f"{group}=bad"
    write(in_tmp / "mine" / group.lstrip("+") / "bad.yaml", text.replace("EVIL", str(evil)))
    before = files_below(in_tmp)
    answer = lora_bench("train", *mode, "--config-dir=mine", *toy_run(choice))
    assert not evil.exists()
    assert answer.code == 2, answer
    assert answer.err.count("\n") == 1, answer
    assert "Traceback" not in answer.out + answer.err
    if not any(in_tmp.rglob("run.json")):  # a job fails if the error is found after loading the backbone
        assert files_below(in_tmp) == before


def test_a_forbidden_choice_of_a_sweep_is_refused_before_the_first_job(in_tmp: Path) -> None:
    evil = in_tmp / "evil"
    write(in_tmp / "mine" / "adapter" / "bad.yaml", f"# @package hydra.job_logging\nx: {evil}\nroot: {{level: INFO}}")
    error = refused("train", "-m", "--config-dir=mine", *TOY_RUN, "adapter=lora,bad")
    assert error.code == Code.FORBIDDEN
    assert "'hydra.job_logging'" in str(error)


# -- existing folders --


def test_an_existing_run_folder_is_refused_and_unchanged(in_tmp: Path) -> None:
    write(in_tmp / "run" / "run.json", "{}")
    write(in_tmp / "run" / "notes.txt", "mine")
    error = refused("train", *TOY_RUN, "hydra.run.dir=run")
    assert (error.code, error.key, error.value) == (Code.EXISTS, "hydra.run.dir", in_tmp / "run")


def test_a_folder_below_a_file_is_refused(in_tmp: Path) -> None:
    write(in_tmp / "a_file", "")
    error = refused("train", *TOY_RUN, "hydra.run.dir=a_file/run")
    assert (error.code, error.key, str(error.value)) == (Code.UNWRITABLE, "hydra.run.dir", "a_file/run")
    error = refused("train", "-m", *TOY_RUN, "adapter.rank=1,2", "hydra.sweep.dir=a_file/sweep")
    assert (error.code, error.key, str(error.value)) == (Code.UNWRITABLE, "hydra.sweep.dir", "a_file/sweep")


# -- arguments --


def test_options_between_overrides_are_read() -> None:
    arguments = Arguments.read(["a=1", "--cfg", "job", "b=2", "-p", "adapter", "c=3", "--resolve"])
    assert arguments.overrides == ["a=1", "b=2", "c=3"]
    assert (arguments.cfg, arguments.package, arguments.resolve, arguments.multirun) == ("job", "adapter", True, False)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["resume=a"], "a"),
        (["resume=a", "+resume='b c'"], "b c"),
        (["resume=null"], None),
        (["resume=${oc.env:RUN}"], None),
        (["resume=a,b"], None),
        (["seed=1"], None),
    ],
)
def test_resume_is_read_without_composing(overrides: list[str], expected: str | None) -> None:
    assert Arguments.read(overrides).resume() == expected


@pytest.mark.parametrize("key", ["resume", "adapter.init_from", "model.path", "model.tokenizer"])
@pytest.mark.parametrize("value", ["", "''", '""'])
def test_an_empty_value_that_would_count_as_none_is_refused(key: str, value: str) -> None:
    with refuses(Code.INVALID_VALUE, key=key):
        Arguments.read([f"{key}={value}"])
    assert Arguments.read([f"{key}=null", "name="]).overrides == [f"{key}=null", "name="]


def test_repeated_overrides_are_listed() -> None:
    arguments = Arguments.read(["a=1", "b=2", "+a=2", "b=2", "a=3"])
    assert arguments.repeated() == ["a=1", "+a=2"]


@pytest.mark.parametrize("arguments", [["-m", "--cfg=job"], ["--cfg"], ["-cd"], ["--multi"], ["--info"], ["--version"]])
def test_unknown_and_conflicting_options_are_refused(arguments: list[str]) -> None:
    with refuses(Code.INVALID_SYNTAX):
        Arguments.read(arguments)


def test_hydra_alone_runs_the_code(in_tmp: Path) -> None:
    """A control for the tests above: without `refuse_code`, Hydra executes the code."""
    from hydra._internal.callbacks import Callbacks
    from omegaconf import OmegaConf

    evil = in_tmp / "evil"
    callbacks = yaml.safe_load(TARGET.replace("EVIL", str(evil)))
    Callbacks(OmegaConf.create({"hydra": {"callbacks": {"x": callbacks}}}))
    assert evil.is_dir()
