"""The commands: help, exit codes, a run from any folder, and what answers without loading torch."""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lora_bench import cli, train
from lora_bench.__main__ import main as main_of_process
from lora_bench.config.groups import COMMANDS, GROUPS, PROMPT_GROUPS, choices, conf_folder
from lora_bench.errors import Code
from lora_bench.records import run_folder
from lora_bench.run import inputs
from tests.command_line import TOY_RUN, lora_bench, refused, unchanged_process

HEAVY = ("torch", "transformers", "scipy", "datasets", "torchmetrics", "pyarrow")


def in_process(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`lora-bench ARGUMENTS`; its last line of errors names the heavy modules that it loaded."""
    code = (
        "import sys; from lora_bench.cli import main; code = main(sys.argv[1:]); "
        f"print(*[name for name in {HEAVY} if name in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=cwd)


def test_help_names_every_command(in_tmp: Path) -> None:
    texts = {lora_bench(*arguments).out for arguments in ([], ["--help"], ["-h"], ["help"])}
    assert len(texts) == 1
    assert all(f"  {command} " in texts.copy().pop() for command in COMMANDS)
    assert lora_bench().code == 0


def test_version(in_tmp: Path) -> None:
    answer = lora_bench("--version")
    assert (answer.code, answer.out) == (0, f"lora-bench {version('lora-bench')}\n")


@pytest.mark.parametrize(("word", "meant"), [("trian", "train"), ("comapre", "compare"), ("predcit", "predict")])
def test_unknown_command_is_refused_with_the_nearest(in_tmp: Path, word: str, meant: str) -> None:
    error = refused(word)
    assert error.code == Code.UNKNOWN_CHOICE
    assert repr(word) in str(error)
    assert f"Did you mean {meant}?" in str(error)


def test_unknown_command_far_from_all_lists_them(in_tmp: Path) -> None:
    error = refused("xyzzy")
    assert error.code == Code.UNKNOWN_CHOICE
    assert [command for command in COMMANDS if command not in str(error)] == []


def test_train_help_lists_every_choice_of_every_group() -> None:
    text = lora_bench("train", "--help").out
    folders = {path.name for path in conf_folder().iterdir() if path.is_dir() and any(path.glob("*.yaml"))}
    assert folders - {"hydra"} == {*GROUPS, *PROMPT_GROUPS}
    for group in GROUPS:
        options = {path.stem for path in (conf_folder() / group).glob("*.yaml") if path.stem[0] != "_"}
        assert options == set(choices(group))
        (listed,) = re.findall(rf"^  {group}=(.*(?:\n {{6}}.*)*)", text, re.MULTILINE)
        assert set(listed.split()) - {"|"} == options


@pytest.mark.parametrize("command", ["search", "eval", "predict", "export", "prompt", "compare", "clean", "doctor"])
def test_every_command_has_help(command: str) -> None:
    answer = lora_bench(command, "--help")
    assert answer.code == 0
    assert f"lora-bench {command}" in answer.out


@pytest.mark.parametrize(
    ("arguments", "code", "printed"),
    [
        (["--help"], 0, "Commands"),
        (["train", "--help"], 0, "adapter.rank=8"),
        (["help", "adapter.rank"], 0, "Rank of every adapted linear"),
        (["completion", "bash"], 0, "complete -F"),
        (["train", "learning_rate=1e-3"], 2, "optimizer.lr"),
        (["train", "--cfg", "job", "model=tiny_bert"], 0, "default_lr: 0.0005"),
        (["train", "adapter.rnak=8"], 2, "Did you mean adapter.rank?"),
        (["train", "model=robrta"], 2, "Did you mean roberta?"),
        (["compare", "runs"], 0, "no finished run"),
        (["clean", "--dry-run"], 0, "tokens"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_cheap_answers_load_nothing_heavy(in_tmp: Path, arguments: list[str], code: int, printed: str) -> None:
    run_folder.Run.claim(in_tmp / "runs" / "one", choices={}, config={}, overrides=[])
    done = in_process(*arguments)
    *errors, loaded = done.stderr.splitlines()
    assert (done.returncode, loaded) == (code, ""), done
    assert printed in done.stdout + "\n".join(errors)


def test_cfg_job_prints_a_config_that_is_a_valid_request(in_tmp: Path) -> None:
    answer = lora_bench("train", *TOY_RUN, "adapter.rank=5", "--cfg", "job", "--resolve")
    assert answer.code == 0
    assert "rank: 5" in answer.out
    assert "lr: 0.0005" in answer.out
    assert "hydra" not in answer.out
    assert not any(in_tmp.iterdir())


def test_options_may_stand_anywhere(in_tmp: Path) -> None:
    (in_tmp / "mine" / "adapter").mkdir(parents=True)
    (in_tmp / "mine" / "adapter" / "small.yaml").write_text("defaults: [lora]\nrank: 3\n")
    for arguments in (
        ["--config-dir", "mine", "adapter=small", "--cfg", "job"],
        ["seed=1", "--config-dir=mine", "adapter=small", "--cfg=job", "seed=1"],
        ["-cd", "mine", "-c", "job", "adapter=small"],
    ):
        answer = lora_bench("train", *arguments)
        assert answer.code == 0, answer
        assert "rank: 3" in answer.out


def test_train_leaves_a_record(in_tmp: Path) -> None:
    answer = lora_bench("train", *TOY_RUN, "seed=3")
    assert (answer.code, answer.err) == (0, "")
    (folder,) = in_tmp.glob("outputs/*/*")
    assert f"record: {folder}" in answer.out
    record = run_folder.read(folder)
    assert record["status"] == "done"
    assert record["choices"]["adapter"] == "lora"
    assert record["config"]["seed"] == 3
    assert record["overrides"] == [*TOY_RUN, "seed=3"]
    assert set(record["metrics"]) >= {"validation/mcc", "validation/f1", "validation/accuracy", "selection/mcc"}
    assert "hydra" not in json.dumps(record["config"])


def test_two_runs_have_two_folders(in_tmp: Path) -> None:
    assert [lora_bench("train", *TOY_RUN, "seed=1").code for _ in range(2)] == [0, 0]
    assert len(list(in_tmp.glob("outputs/*/*/run.json"))) == 2


def test_named_folder_is_used_and_never_taken_twice(in_tmp: Path) -> None:
    assert lora_bench("train", *TOY_RUN, "hydra.run.dir=runs/first").code == 0
    assert run_folder.read(in_tmp / "runs" / "first")["status"] == "done"
    error = refused("train", *TOY_RUN, "hydra.run.dir=runs/first")
    assert (error.code, error.key, error.value) == (Code.EXISTS, "hydra.run.dir", in_tmp / "runs/first")


def test_dry_run_says_what_to_expect_and_leaves_nothing(in_tmp: Path) -> None:
    answer = lora_bench("train", *TOY_RUN, "dry_run=true")
    assert answer.code == 0
    for words in ("parameters", "steps", "computation", "FLOP", "training time", "evaluation time", "peak memory"):
        assert words in answer.out
    assert not any(in_tmp.iterdir())


def test_a_key_given_twice_is_noted(in_tmp: Path) -> None:
    answer = lora_bench("train", *TOY_RUN, "adapter.rank=2", "adapter.rank=4", "--cfg", "job")
    assert answer.code == 0
    assert answer.err.startswith("note: adapter.rank=2 ")
    assert answer.err.count("\n") == 1
    assert "rank: 4" in answer.out


def test_module_from_another_folder(in_tmp: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "lora_bench", "train", *TOY_RUN]
    done = subprocess.run(command, capture_output=True, text=True, cwd=in_tmp)
    assert (done.returncode, done.stderr) == (0, "")
    (written,) = in_tmp.glob("outputs/*/*/run.json")
    assert json.loads(written.read_text())["status"] == "done"


def test_a_failed_run_exits_1_and_keeps_its_traceback(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("the cable\nwas pulled")

    monkeypatch.setattr(train.PackTraining, "fit", broken)
    answer = lora_bench("train", *TOY_RUN, "hydra.run.dir=run")
    assert answer.code == 1
    log = in_tmp / "run" / "run.log"
    assert answer.err.count("\n") == 1
    assert "RuntimeError: the cable" in answer.err
    assert "was pulled" not in answer.err  # its first line alone
    assert str(log) in answer.err
    assert "Traceback" in log.read_text()
    record = run_folder.read(in_tmp / "run")
    assert record["status"] == "failed"
    assert "the cable" in record["error"]


def test_a_defect_before_the_run_exits_1_and_names_the_line(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(inputs, "load_backbone", broken)
    answer = lora_bench("train", *TOY_RUN)
    assert answer.code == 1
    assert answer.err.count("\n") == 1
    assert "ZeroDivisionError: oh" in answer.err
    assert f"{Path(inputs.__file__)}, line " in answer.err
    assert not any(in_tmp.iterdir())


@pytest.mark.parametrize(
    ("raised", "code"),
    [(KeyboardInterrupt(), 130), (SystemExit(143), 143), (SystemExit(None), 0)],
    ids=["ctrl-c", "sigterm", "exit"],
)
def test_exit_codes_of_interrupts(monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int) -> None:
    def interrupted(arguments: list[str]) -> int:
        raise raised

    monkeypatch.setattr(cli, "run_command", interrupted)
    with unchanged_process():
        assert cli.main([]) == code


def test_ctrl_c_while_the_command_line_is_imported(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    class Interrupted(ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "lora_bench.cli", Interrupted("lora_bench.cli"))
    monkeypatch.setattr(gc, "freeze", lambda: None)  # this process goes on
    assert main_of_process() == 130
    assert capsys.readouterr().err == "lora-bench: interrupted\n"


@pytest.mark.parametrize(("columns", "kept"), [("0", None), ("-1", None), ("²", None), ("", None), ("90", "90")])
def test_a_width_that_is_none_does_not_silence_a_command(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, columns: str, kept: str | None
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("LINES", columns)
    assert refused("xyzzy").code == Code.UNKNOWN_CHOICE
    assert (os.environ.get("COLUMNS"), os.environ.get("LINES")) == (kept, kept)


def test_a_reader_that_has_gone_is_no_error(in_tmp: Path) -> None:
    """`lora-bench … | head` closes the pipe early."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-u", "-m", "lora_bench", "--help"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, cwd=in_tmp)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_argument_that_a_command_does_not_take_is_refused(in_tmp: Path) -> None:
    error = refused("doctor", "now")
    assert (error.code, error.key) == (Code.UNKNOWN_CHOICE, "doctor")
    assert error.value == "now"


@pytest.mark.parametrize("command", ["eval", "predict", "export"])
def test_a_command_of_one_run_is_not_swept(in_tmp: Path, command: str) -> None:
    error = refused(command, "-m", "run=x")
    assert (error.code, error.key) == (Code.CONFLICT, "-m")
    assert command in str(error)


def test_eval_and_predict_name_what_they_need(in_tmp: Path) -> None:
    error = refused("eval", "data=toy")
    assert (error.code, error.key) == (Code.MISSING, "eval")
    assert "run=DIR or peft=DIR" in str(error)
    for arguments in (["eval", "data=toy"], ["predict", "input=pairs.tsv"]):
        error = refused(*arguments, "run=nowhere")
        assert (error.code, error.key, error.value) == (Code.NOT_FOUND, "run", "nowhere")
    error = refused("predict", "input=pairs.tsv")
    assert (error.code, error.key) == (Code.MISSING, "run")
