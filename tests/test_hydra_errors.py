"""Wrong requests: one paragraph that names key, file or row, exit code 2, nothing left behind, nothing executed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import yaml

from lora_bench.errors import UserError
from lora_bench.hydra_errors import Arguments
from tests.command_line import TOY_RUN, files_below, lora_bench, refused, toy_run

if TYPE_CHECKING:
    from pathlib import Path

WRONG = [
    # types and ranges
    ("adapter.rank=abc", "adapter.rank=abc: is not a whole number"),
    ("adapter.rank=0", "adapter.rank=0: must be a finite number of at least 1"),
    ("adapter.rank=-3", "adapter.rank=-3: must be"),
    ("adapter.rank=2.5", "adapter.rank=2.5: is not a whole number"),
    ("adapter.rank=1e3", "adapter.rank=1000.0: is not a whole number"),
    ("adapter.rank=null", "adapter.rank: must have a value, not null"),
    ("adapter.rank=true", "adapter.rank=True: is not a whole number"),
    ("adapter.rank=[1]", "adapter.rank=[1]: is not a whole number"),
    ("adapter.rank=", "adapter.rank=: is not a whole number"),
    ("adapter.rank=33", "adapter.rank=33: is above 32"),
    ("adapter.rank=99999999999999999999", "adapter.rank=99999999999999999999: is too large"),
    ("adapter.rank=${nope}", "adapter.rank: Interpolation key 'nope' not found"),
    ("adapter.dropout=1", "adapter.dropout=1.0: must be at least 0 and below 1"),
    ("adapter.dropout=nan", "adapter.dropout=nan"),
    ("adapter.dropout=-0.1", "adapter.dropout=-0.1"),
    ("adapter.alpha=0", "adapter.alpha=0.0: must be a finite number above 0"),
    ("optimizer.lr=nan", "optimizer.lr=nan: must be a finite number above 0"),
    ("optimizer.lr=inf", "optimizer.lr=inf"),
    ("optimizer.lr=1e400", "optimizer.lr=inf"),
    ("optimizer.lr=0", "optimizer.lr=0.0"),
    ("optimizer.lr=-1", "optimizer.lr=-1.0"),
    ("optimizer.lr=abc", "optimizer.lr=abc: is not a number"),
    ("optimizer.schedule=step", "optimizer.schedule=step: is not one of linear, cosine, constant"),
    ("trainer.epochs=inf", "trainer.epochs=inf"),
    ("trainer.batch_size=0", "trainer.batch_size=0: must be a finite number of at least 1"),
    ("trainer.max_steps=0.5", "trainer.max_steps=0.5: is not a whole number"),
    ("trainer.precision=fp8", "trainer.precision=fp8: is not one of auto, fp32, bf16"),
    ("trainer.device=tpu", "trainer.device=tpu: is not one of auto, cpu, cuda"),
    ("seed=-1", "seed=-1: must be a whole number from 0"),
    ("seed=abc", "seed=abc: must be a whole number from 0"),
    ("dry_run=maybe", "dry_run=maybe: must be true or false"),
    ("data.text_columns=abc", "data.text_columns=abc: is not a list"),
    ("data.text_columns=[question1]", "data.text_columns=['question1']: must name two columns"),
    ("data.selection_size=abc", "data.selection_size=abc: is not a number"),
    ("data.train_size=1000", "data.train_size=1000: is more than the 36 rows"),
    # keys
    ("adapter.rnak=8", "adapter.rnak: is not a known key. Did you mean adapter.rank?"),
    ("modle=bert", "modle: is not a known key. Did you mean model?"),
    ("optimiser.lr=1", "optimiser.lr: is not a known key. Did you mean optimizer.lr?"),
    ("+foo=1", "foo: is not a known key. Known: adapter, data"),
    ("+adapter.rnak=8", "adapter.rnak: is not a known key. Did you mean rank?"),
    ("~adapter.rank", "adapter.rank: is missing"),
    ("~adapter", "adapter: is missing"),
    ("~seed", "seed: is missing"),
    ("+metric.mine=3", "metric.mine=3: is not a group of keys"),
    ("+metric.mine={torchmetric: BinaryF1, direction: up}", "metric.mine.torchmetric=BinaryF1: is no binary metric"),
    # choices
    ("model=robrta", "model=robrta: is not one of its choices. Did you mean roberta? Choices: bert, deberta, minilm"),
    ("metric=nonsense", "metric=nonsense: is not one of its choices. Known: average_precision, cohen_kappa"),
    ("metric=[nonsense]", "metric=nonsense: is not one of its choices. Known: average_precision, cohen_kappa"),
    ("experiment=nonsense", "experiment=nonsense: is not one of its choices. Known: enhanced, quickstart"),
    (
        "sweep=nonsense",
        "sweep=nonsense: is not one of its choices. Known: ablation, baselines, lr, methods, rank, seeds, transfer",
    ),
    ("adapter=null", "'adapter=null' does not name one of the group's choices"),
    ("adapter=3", "'adapter=3' does not name one of the group's choices"),
    # methods are looked up among ours, never imported by a name
    ("adapter.method=os", "adapter.method=os: is not one of adalora, bitfit, full, head_only, lora"),
    ("adapter.method=../x", "adapter.method=../x: is not one of adalora, bitfit, full, head_only, lora"),
    ("adapter.method=__init__", "adapter.method=__init__: is not one of"),
    ("adapter.method=base", "adapter.method=base: is not one of"),
    ("adapter.method=pack", "adapter.method=pack: is not one of"),
    # how it is written
    ("adapter.rank=2,4", "adapter.rank=2,4: has several values. Add -m to sweep"),
    ("foo", "'foo' cannot be read as key=value"),
    ("adapter.target_modules=(", "cannot be read as key=value"),
    ("--nope", "unrecognized arguments: --nope"),
    ("--cfg=nope", "invalid choice: 'nope'"),
    ("--resolve", "Add --cfg job"),
    ("--config-dir=nowhere", "--config-dir=nowhere: is not a folder"),
    # what does not fit the backbone
    (
        "adapter.target_modules=.*foo",
        "adapter.target_modules=.*foo: matches no linear of the backbone. Names there are:",
    ),
    ("adapter.target_modules='('", "adapter.target_modules=(: is not a regular expression"),
    ("adapter.target_modules=query", "the whole name must match"),
    ("adapter.layers=top:9", "adapter.layers=top:9: is neither all, nor top:n with n from 1 to 2"),
    ("adapter.layers=[2]", "adapter.layers=[2]: is neither all"),
    # where it comes from and goes
    ("model.random=null", "model.path: names no weights. Give model.path=DIR"),
    ("model.path=nowhere", "is not a folder. Give a local Hugging Face folder"),
    ("hydra.run.dir=a_file/run", "hydra.run.dir=a_file/run: cannot be written: Not a directory"),
    ("hydra.run.dir=null", "hydra.run.dir=null"),
]


@pytest.mark.parametrize(("override", "said"), WRONG, ids=[override for override, _ in WRONG])
def test_wrong_request(in_tmp: Path, override: str, said: str) -> None:
    (in_tmp / "a_file").write_text("")
    assert said in refused("train", *toy_run(override))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the request can be met here")
def test_cuda_where_there_is_none(in_tmp: Path) -> None:
    assert "trainer.device=cuda: no CUDA device is usable here." in refused("train", *toy_run("trainer.device=cuda"))


@pytest.mark.parametrize("model", ["bert", "roberta", "t5"])
def test_hub_model_offline_names_the_remedy(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: str
) -> None:
    told = refused("train", *TOY_RUN[1:], f"model={model}", "model.hub_id=nobody/has-this-one")
    assert "model.hub_id=nobody/has-this-one" in told
    assert "Give model.path=DIR" in told


ROWS = [("how do I cook rice", "what is the way to cook rice", "1"), ("what is a verb", "who wrote this", "0")] * 8


def write_pairs(path: Path, *, header: str = "question1\tquestion2\tlabel", rows: int = 16, row_7: str = "") -> None:
    path.parent.mkdir(exist_ok=True)
    lines = [header, *("\t".join(row) for row in ROWS[:rows])]
    if row_7:
        lines[6] = row_7  # the editor's line 7
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("data", "overrides", "said"),
    [
        ({}, [], "data.path: is missing. Give it a value."),
        ({}, ["data.path=nowhere"], "nowhere: does not exist."),
        ({}, ["data.path=pairs"], "pairs: holds no train, validation or test file."),
        ({"train": {}}, ["data.path=pairs"], "data: there is no labelled split to report on."),
        ({"validation": {}}, ["data.path=pairs"], "data: there is no train split."),
        ({"train": {}, "validation": {"rows": 0}}, ["data.path=pairs"], "validation.tsv: has a header but no rows."),
        (
            {"train": {"header": "question1\tquestion_2\tlabel"}, "validation": {}},
            ["data.path=pairs"],
            "train.tsv: has no column 'question2'.",
        ),
        (
            {"train": {}, "validation": {"row_7": "a\tb\t2"}},
            ["data.path=pairs"],
            "validation.tsv, row 7: label '2' is neither 0 nor 1.",
        ),
        (
            {"train": {"row_7": "a\t1"}, "validation": {}},
            ["data.path=pairs"],
            "train.tsv, row 7: 2 columns where the header has 3.",
        ),
    ],
    ids=lambda value: None if isinstance(value, dict | list) else value[:40],
)
def test_wrong_data(in_tmp: Path, data: dict[str, dict[str, object]], overrides: list[str], said: str) -> None:
    (in_tmp / "pairs").mkdir()
    for split, settings in data.items():
        write_pairs(in_tmp / "pairs" / f"{split}.tsv", **settings)  # type: ignore[arg-type]
    assert said in refused("train", "model=tiny_bert", "data=pairs", "trainer.device=cpu", *overrides)


def test_data_of_the_hub_offline(in_tmp: Path) -> None:
    told = refused("train", "model=tiny_bert", "data=qqp", "data.hub_id=nobody/has-this-one")
    assert "data.hub_id=nobody/has-this-one" in told
    assert "data=toy" in told


def test_a_tab_in_yaml_is_told_with_file_and_row(in_tmp: Path) -> None:
    write(in_tmp / "mine" / "adapter" / "tabbed.yaml", "method: lora\nrank:\t8\n\talpha: 1\n")
    told = refused("train", *TOY_RUN, "--config-dir", "mine", "adapter=tabbed")
    assert str(in_tmp / "mine/adapter/tabbed.yaml, row 2: is not valid YAML: found character") in told


@pytest.mark.parametrize(
    ("text", "row"), [("rank: [1\nalpha: 2\n", 2), ("rank: 8\nrank: 4\n", 2), ("a: b: c\n", 1), ("- 'x\n", 2)]
)
def test_invalid_yaml_is_told_with_file_and_row(in_tmp: Path, text: str, row: int) -> None:
    write(in_tmp / "mine" / "adapter" / "broken.yaml", text)
    told = refused("train", *TOY_RUN, "--config-dir", "mine", "adapter=broken")
    assert str(in_tmp / f"mine/adapter/broken.yaml, row {row}: is not valid YAML") in told


def test_yml_is_told_as_what_it_is(in_tmp: Path) -> None:
    write(in_tmp / "mine" / "adapter" / "other.yml", "method: lora\n")
    told = refused("train", *TOY_RUN, "--config-dir=mine", "adapter=other")
    assert told == "lora-bench: mine/adapter/other.yml: ends in .yml, which is not read. " + (
        "Rename it so that it ends in .yaml.\n"
    )


def test_choices_of_the_users_folder_are_suggested(in_tmp: Path) -> None:
    write(in_tmp / "mine" / "adapter" / "my_lora.yaml", "defaults: [lora]\n")
    assert "Did you mean my_lora?" in refused("train", *TOY_RUN, "--config-dir=mine", "adapter=my_loar")


def test_keys_of_the_chosen_options_are_suggested(in_tmp: Path) -> None:
    """`data.train_rows` is a key of `toy` only; `data.path` is one of `pairs`."""
    assert "Did you mean data.train_rows?" in refused("train", *TOY_RUN, "data.train_row=9")
    assert "Did you mean data.path?" in refused("train", "model=tiny_bert", "data=pairs", "data.paht=x")


# -- code that a config names --


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


TARGET = "{_target_: os.mkdir, path: EVIL}"
LOGGING = "{version: 1, handlers: {x: {class: os.mkdir, path: EVIL}}, root: {handlers: [x]}}"

IN_ARGUMENTS = [
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
    f"hydra.sweeper={TARGET}",
    "hydra.searchpath=[pkg://this]",
    "+hydra.job.env_set.PATH=EVIL",
    "+hydra={job: {env_set: {PATH: EVIL}}}",
    "adapter._target_=os.mkdir",
    f"+adapter.x={TARGET}",
    "--experimental-rerun=config.pickle",
    "--experimental-re=config.pickle",
    "--config-path=mine",
    "--config-name=mine",
    "-cn=mine",
]


SIGNS = ("names code to run", "environment variables", "unrecognized", "invalid choice", "known key")


@pytest.mark.parametrize("mode", [[], ["-m"], ["--cfg=job"]], ids=["run", "sweep", "cfg"])
@pytest.mark.parametrize("argument", IN_ARGUMENTS)
def test_code_in_arguments_is_refused(in_tmp: Path, argument: str, mode: list[str]) -> None:
    evil = in_tmp / "evil"
    told = refused("train", *TOY_RUN, *mode, argument.replace("EVIL", str(evil)))
    assert not evil.exists()
    assert any(sign in told for sign in SIGNS)


PRESET = "# @package _global_\n"
IN_FILES = {
    "callbacks": ("experiment", f"{PRESET}hydra: {{callbacks: {{x: {TARGET}}}}}"),
    "callbacks by reference": ("experiment", f"{PRESET}x: {{y: {TARGET}}}\nhydra: {{callbacks: '${{x}}'}}"),
    "callbacks as a group": ("+hydra/callbacks", f"# @package hydra.callbacks\nx: {TARGET}"),
    "callbacks beside hydra's settings": ("hydra", f"defaults: [quiet]\ncallbacks: {{x: {TARGET}}}"),
    "a package directive": ("adapter", f"# @package hydra.callbacks\nx: {TARGET}"),
    "job logging": ("experiment", f"{PRESET}hydra: {{job_logging: {LOGGING}}}"),
    "hydra's logging": ("experiment", f"{PRESET}hydra: {{hydra_logging: {LOGGING}}}"),
    "a sweeper's part": ("experiment", f"{PRESET}hydra: {{sweeper: {{params: {TARGET}}}}}"),
    "a launcher": ("hydra/launcher", "_target_: os.mkdir\npath: EVIL"),
    "the environment": ("experiment", f"{PRESET}hydra: {{job: {{env_set: {{PATH: EVIL}}}}}}"),
    "an adapter": ("adapter", f"defaults: [lora]\nlayers: {TARGET}"),
    "a data set": ("data", "defaults: [toy]\n_target_: os.mkdir\npath: EVIL"),
}


@pytest.mark.parametrize("mode", [[], ["-m"]], ids=["run", "sweep"])
@pytest.mark.parametrize("case", IN_FILES)
def test_code_in_a_users_folder_is_never_run(in_tmp: Path, case: str, mode: list[str]) -> None:
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
    if not any(in_tmp.rglob("run.json")):  # what only the backbone can tell is a job that failed
        assert files_below(in_tmp) == before


def test_one_bad_option_of_a_sweep_is_found_before_the_first_job(in_tmp: Path) -> None:
    evil = in_tmp / "evil"
    write(in_tmp / "mine" / "adapter" / "bad.yaml", f"# @package hydra.job_logging\nx: {evil}\nroot: {{level: INFO}}")
    told = refused("train", "-m", "--config-dir=mine", *TOY_RUN, "adapter=lora,bad")
    assert "'hydra.job_logging' names code to run" in told


# -- folders that are someone else's --


def test_a_taken_folder_is_left_as_it_was(in_tmp: Path) -> None:
    write(in_tmp / "run" / "run.json", "{}")
    write(in_tmp / "run" / "notes.txt", "mine")
    assert "run: already holds a run. Give a folder that is not there yet." in refused(
        "train", *TOY_RUN, "hydra.run.dir=run"
    )


def test_a_sweeps_folder_below_a_file(in_tmp: Path) -> None:
    write(in_tmp / "a_file", "")
    told = refused("train", "-m", *TOY_RUN, "adapter.rank=1,2", "hydra.sweep.dir=a_file/sweep")
    assert "hydra.sweep.dir=a_file/sweep: cannot be written" in told


# -- the arguments themselves --


def test_arguments_are_put_in_the_order_of_hydras_parser() -> None:
    read = Arguments.read(["a=1", "--cfg", "job", "b=2", "-p", "adapter", "c=3", "--resolve"])
    assert read.overrides == ["a=1", "b=2", "c=3"]
    assert read.for_hydra() == ["--resolve", "--cfg=job", "--package=adapter", "a=1", "b=2", "c=3"]


def test_repeated_overrides() -> None:
    read = Arguments.read(["a=1", "b=2", "+a=2", "b=2", "a=3"])
    assert read.repeated() == ["a=1", "+a=2"]


@pytest.mark.parametrize("arguments", [["-m", "--cfg=job"], ["--cfg"], ["-cd"], ["--multi"], ["--info"], ["--version"]])
def test_options_that_make_no_sense(arguments: list[str]) -> None:
    with pytest.raises(UserError, match="--help lists the options"):
        Arguments.read(arguments)


def test_hydra_itself_would_have_run_it(in_tmp: Path) -> None:
    """The control: what `refuse_code` stops is executed by Hydra, so the tests above prove something."""
    from hydra._internal.callbacks import Callbacks
    from omegaconf import OmegaConf

    evil = in_tmp / "evil"
    callbacks = yaml.safe_load(TARGET.replace("EVIL", str(evil)))
    Callbacks(OmegaConf.create({"hydra": {"callbacks": {"x": callbacks}}}))
    assert evil.is_dir()
