"""Folders and processes: whose a folder is, what a killed process leaves, and what cannot be written."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lora_bench import train
from lora_bench.errors import Code, LostFolderError, UserError
from lora_bench.records.run_folder import Run, read
from lora_bench.run.final_evaluation import TrainedTask
from lora_bench.training.checkpoint import Checkpoints
from tests import forked
from tests.command_line import files_below, lora_bench, refused, refuses, toy_run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


EPOCH = toy_run("trainer.max_steps=4", "trainer.eval_every=2", "trainer.checkpoint_every=1")


def status(folder: str) -> str:
    return str(json.loads((Path(folder) / "run.json").read_text())["status"])


def contents(folder: str | Path) -> dict[str, bytes | None]:
    """Every file below a folder by its path there."""
    return {os.path.relpath(path, folder): content for path, content in files_below(Path(folder)).items()}


def before_call(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, action: Callable[..., None]) -> None:
    """Do something before each call of a method, with its arguments."""
    original = getattr(owner, name)

    def call(*arguments: Any, **keywords: Any) -> Any:
        action(*arguments)
        return original(*arguments, **keywords)

    monkeypatch.setattr(owner, name, call)


def refusal_here(*arguments: str) -> UserError:
    """Return the error that refuses a training, where its text depends on the machine or files change meanwhile."""
    answer = lora_bench("train", *arguments)
    assert answer.code == 2, answer
    assert answer.err.count("\n") == 1, answer
    assert answer.error is not None, answer
    return answer.error


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file may grow beyond `limit` bytes: what a full disk is to those who write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.reliability(12)
def test_12_runs_of_the_same_second_have_folders_of_their_own(in_tmp: Path) -> None:
    arguments = ["train", "--cfg", "hydra", "-p", "hydra.run", "--resolve"]
    folders = [line for _ in range(4) for line in lora_bench(*arguments).out.splitlines() if line.startswith("dir: ")]
    assert len(set(folders)) == len(folders) == 4
    assert all(re.search(r"/\d\d-\d\d-\d\d-\d{6}-[0-9a-f]{6}$", folder) for folder in folders)


def claim_and_resume() -> None:
    """Print a line for each of two commands: exit code, error code, what is to blame, whether resuming is suggested."""
    for arguments in (toy_run("hydra.run.dir=run"), ["resume=run"]):
        answer = lora_bench("train", *arguments)
        assert answer.error is not None, answer
        print(answer.code, answer.error.code, answer.error.key or answer.error.file, "resume=" in answer.err)


@pytest.mark.reliability(13)
def test_13_of_two_processes_that_want_a_folder_the_second_is_refused(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit, lines = train.PackTraining.fit, []

    def second(*arguments: Any, **keywords: Any) -> Any:
        before = Path("run/run.json").read_bytes()
        other = forked.Forked(claim_and_resume)
        assert other.wait() == 0, other.err
        lines.extend(other.out.splitlines())
        assert Path("run/run.json").read_bytes() == before
        return fit(*arguments, **keywords)

    monkeypatch.setattr(train.PackTraining, "fit", second)
    assert lora_bench("train", *toy_run("hydra.run.dir=run")).code == 0
    assert lines == ["2 exists hydra.run.dir False", "2 in_use run False"]
    assert status("run") == "done"


@pytest.mark.reliability(14)
def test_14_a_name_that_leads_out_of_its_folder_is_refused(in_tmp: Path) -> None:
    assert lora_bench("train", *toy_run("hydra.run.dir=runs/a/run")).code == 0
    error = refused("train", "-m", *toy_run("hydra.sweep.subdir='../../x${hydra.job.num}'", "seed=0,1"))
    assert (error.code, error.key, error.value) == (Code.FORBIDDEN, "hydra.sweep.subdir", "../../x0")
    with refuses(Code.INVALID_VALUE, key="name") as caught:
        Run(Path("runs/a/run"), read(Path("runs/a/run"))).write_evaluation("../../x", {})
    assert caught.value.value == "../../x"


@pytest.mark.reliability(15)
@pytest.mark.parametrize("name", ["with spaces and ünï→😀", "a/b/c", "-dash", "x" * 255])
def test_15_unusual_names_are_used_as_they_are(in_tmp: Path, name: str) -> None:
    assert lora_bench("train", *toy_run(f"hydra.run.dir='runs/{name}'")).code == 0
    assert status(f"runs/{name}") == "done"
    assert lora_bench("train", f"resume='runs/{name}'").code == 0
    assert "minilm" not in lora_bench("compare", "runs").out


@pytest.mark.reliability(15)
@pytest.mark.parametrize(
    ("name", "code"),
    [("x" * 300, Code.UNWRITABLE), ("nul\0", Code.INVALID_VALUE), ("run/run.json/y", Code.UNWRITABLE)],
    ids=["long", "nul", "below a file"],
)
def test_15_names_that_cannot_be_are_refused(in_tmp: Path, name: str, code: Code) -> None:
    Path("run").mkdir()
    Path("run/run.json").write_text("")
    error = refused("train", *toy_run(f"hydra.run.dir='{name}'"))
    assert (error.code, error.key) == (code, "hydra.run.dir")
    error = refused("train", "-m", *toy_run(f"hydra.sweep.dir='{name}'"), "seed=0,1")
    assert (error.code, error.key) == (code, "hydra.sweep.dir")


@pytest.mark.reliability(16)
@pytest.mark.parametrize(("key", "mode"), [("hydra.run.dir", []), ("hydra.sweep.dir", ["-m", "seed=0,1"])])
def test_16_an_unwritable_root_is_told_before_training(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, key: str, mode: list[str]
) -> None:
    monkeypatch.setattr(train.PackTraining, "fit", lambda *_, **__: pytest.fail("it trained"))
    Path("a_file").write_text("")
    locked = Path("locked")
    locked.mkdir(mode=0o500)
    roots = ["a_file", "/proc"] + ["locked"] * (not os.access(locked, os.W_OK))
    for root in roots:
        error = refusal_here(*mode, *toy_run(f"{key}={root}/new"))
        assert (error.code, error.key, str(error.value)) == (Code.UNWRITABLE, key, f"{root}/new")
        assert not Path(root, "new").exists()


@pytest.mark.reliability(17)
def test_17_no_room_for_the_config(in_tmp: Path) -> None:
    assert lora_bench("train", *toy_run("hydra.run.dir=before")).code == 0  # what is kept of the data has its place
    with full_disk(100):
        error = refusal_here(*toy_run("hydra.run.dir=run"))
    assert (error.code, error.key, error.value) == (Code.UNWRITABLE, "hydra.run.dir", in_tmp / "run")
    assert os.strerror(errno.EFBIG) in str(error)
    assert not Path("run").exists()


@pytest.mark.reliability(17)
@pytest.mark.parametrize(
    ("owner", "name", "limit", "path"),
    [(Run, "log", 300, "metrics.jsonl"), (Checkpoints, "save", 20_000, "checkpoints/step-00000002")],
    ids=["log", "checkpoint"],
)
def test_17_no_room_for_the_log_or_a_checkpoint(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, limit: int, path: str
) -> None:
    assert lora_bench("train", *EPOCH, "hydra.run.dir=whole").code == 0
    original, calls = getattr(owner, name), iter(range(99))

    def filling(*arguments: Any) -> Any:
        with full_disk(limit) if next(calls) == 1 else nullcontext():
            return original(*arguments)

    monkeypatch.setattr(owner, name, filling)
    answer = lora_bench("train", *EPOCH, "hydra.run.dir=run")
    assert (answer.code, answer.err.count("\n")) == (1, 1), answer
    assert answer.error is not None
    assert (answer.error.code, answer.error.file) == (Code.UNWRITABLE, in_tmp / "run" / path)
    assert "lora-bench train resume=DIR" in answer.err
    assert status("run") == "failed"
    older = Checkpoints(Path("run/checkpoints"))
    assert older.newest() is not None
    assert older.damaged == []
    answer = lora_bench("train", "resume=run")
    assert answer.code == 0, answer
    assert "resumed from step" in answer.out
    for file in ("adapter/adapter_model.safetensors", "predictions/validation.parquet"):
        assert Path("run", file).read_bytes() == Path("whole", file).read_bytes()


@pytest.mark.reliability(17)
def test_17_no_room_for_the_checkpoint_before_scoring_ends_no_run(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, tried = Checkpoints.save, []

    def full(*arguments: Any) -> None:
        tried.append(arguments[1])
        with full_disk(20_000):
            save(*arguments)

    monkeypatch.setattr(Checkpoints, "save", full)
    answer = lora_bench("train", *toy_run("trainer.max_steps=4", "trainer.checkpoint_every=99", "hydra.run.dir=run"))
    assert answer.code == 0, answer
    assert tried == [4]
    assert status("run") == "done"


@pytest.mark.reliability(17)
@pytest.mark.skipif(sys.platform != "linux", reason="mounts a small file system")
def test_17_a_disk_that_is_really_full(in_tmp: Path) -> None:
    Path("small").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", "small"]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        answer = lora_bench("train", *EPOCH, "hydra.run.dir=small/run")
        assert answer.code == 1
        assert answer.error is not None
        assert answer.error.code == Code.UNWRITABLE
        assert os.strerror(errno.ENOSPC) in answer.err
        assert Checkpoints(Path("small/run/checkpoints")).newest() is not None
        subprocess.run(["mount", "-o", "remount,size=9m", "small"], check=True)
        assert lora_bench("train", "resume=small/run").code == 0
        assert status("small/run") == "done"
    finally:
        subprocess.run(["umount", "small"], check=True)


@pytest.mark.reliability(19)
def test_19_a_moved_or_renamed_run_still_compares(in_tmp: Path) -> None:
    assert lora_bench("train", *toy_run("hydra.run.dir=run")).code == 0
    before = lora_bench("compare", "run", "--format", "csv").out
    Path("elsewhere/deep").mkdir(parents=True)
    shutil.move("run", "elsewhere/deep/another name")
    answer = lora_bench("compare", "elsewhere", "--format", "csv")
    assert answer.code == 0
    assert "lora" in before
    assert answer.out.replace("elsewhere/deep/another name", "run") == before
    assert lora_bench("train", "resume='elsewhere/deep/another name'").code == 0


@pytest.mark.reliability(18)
def test_18_the_claim_of_a_killed_process_is_recovered(in_tmp: Path) -> None:
    arguments = toy_run(
        "trainer.epochs=9999", "trainer.max_steps=9999", "trainer.checkpoint_every=5", "hydra.run.dir=run"
    )
    process = forked.command("train", *arguments)
    try:
        until = time.monotonic() + 120
        while not list(Path("run/checkpoints").glob("step-*")) and time.monotonic() < until:
            time.sleep(0.02)
        error = refusal_here("resume=run")
        assert (error.code, error.file) == (Code.IN_USE, Path("run"))
        error = refusal_here(*arguments)
        assert (error.code, error.key) == (Code.EXISTS, "hydra.run.dir")
        assert "lora-bench train resume=" not in str(error)
        assert "running: run" in lora_bench("compare", "run").out
    finally:
        process.signal(signal.SIGKILL)
        process.wait()
    assert status("run") == "running"
    error = refused("train", *arguments)
    assert (error.code, error.key, error.value) == (Code.EXISTS, "hydra.run.dir", in_tmp / "run")
    assert f"lora-bench train resume={in_tmp / 'run'}" in str(error)
    assert "killed: run" in lora_bench("compare", "run").out
    record = json.loads(Path("run/run.json").read_text())
    record["config"]["trainer"]["max_steps"] = 8  # so that the test ends
    Path("run/run.json").write_text(json.dumps(record))
    for checkpoint in Path("run/checkpoints").iterdir():
        shutil.rmtree(checkpoint)
    assert lora_bench("train", "resume=run").code == 0
    assert status("run") == "done"


@pytest.mark.reliability(18)
def test_18_what_is_left_of_a_process_killed_as_it_started_is_no_claim(in_tmp: Path) -> None:
    Path("run").mkdir()
    for name in (".lock", "run.json", ".run.json.123.part"):
        Path("run", name).touch()
    assert lora_bench("train", *toy_run("hydra.run.dir=run")).code == 0
    assert status("run") == "done"


@pytest.mark.reliability(20)
@pytest.mark.parametrize("moment", ["evaluation", "checkpoint", "end"])
def test_20_a_folder_deleted_while_running_stops_the_run_cleanly(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def deleting(original: Any) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            shutil.rmtree("run", ignore_errors=True)
            return original(*arguments, **keywords)

        return call

    owner, name = {"evaluation": (Run, "log"), "checkpoint": (Checkpoints, "save"), "end": (Run, "finish")}[moment]
    monkeypatch.setattr(owner, name, deleting(getattr(owner, name)))
    answer = lora_bench("train", *toy_run("hydra.run.dir=run", "trainer.checkpoint_every=1"))
    assert answer.code == 1, answer
    assert answer.err.count("\n") == 1
    assert isinstance(answer.error, LostFolderError)
    assert (answer.error.code, answer.error.file) == (Code.LOST, in_tmp / "run")
    assert not Path("run").exists()


MOMENTS = {
    "evaluation": (Run, "log"),
    "checkpoint": (Checkpoints, "save"),
    "record": (Run, "update"),
    "predictions": (Run, "write_predictions"),
    "adapter": (TrainedTask, "save"),
    "end": (Run, "finish"),
    "cleanup": (Checkpoints, "clear"),
}


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the same kind; not to be changed."""
    folder = tmp_path_factory.mktemp("other") / "run"
    assert lora_bench("train", *toy_run("seed=7", f"hydra.run.dir={folder}")).code == 0
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "step-00000001").write_text("of the other run")
    return folder


@pytest.mark.reliability(20)
@pytest.mark.parametrize("moment", MOMENTS)
def test_20_a_folder_that_another_run_took_the_place_of_is_not_written(
    in_tmp: Path, other: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def replace(*_: Any) -> None:
        if not Path("moved").exists():
            Path("run").rename("moved")
            shutil.copytree(other, "run")

    before_call(monkeypatch, *MOMENTS[moment], replace)
    answer = lora_bench("train", *toy_run("hydra.run.dir=run", "trainer.checkpoint_every=1"))
    assert answer.code == 1, answer
    assert answer.err.count("\n") == 1
    assert isinstance(answer.error, LostFolderError)
    assert (answer.error.code, answer.error.file) == (Code.LOST, in_tmp / "run")
    assert contents("run") == contents(other)


@pytest.mark.reliability(20)
def test_20_a_sweep_s_folder_that_another_one_took_the_place_of_is_not_written(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = toy_run("hydra.sweep.dir=sweep", "pack.size=1")
    assert lora_bench("train", "-m", *arguments, "seed=7,8").code == 0
    Path("sweep").rename("other")

    def replace(run: Run, *_: Any) -> None:
        if run.folder.name == "1" and not Path("moved").exists():
            Path("sweep").rename("moved")
            shutil.copytree("other", "sweep")

    before_call(monkeypatch, Run, "finish", replace)
    answer = lora_bench("train", "-m", *arguments, "seed=0,1,2")
    assert answer.code == 1, answer
    assert f"job 2 failed: {in_tmp / 'sweep'}: " in answer.out
    assert isinstance(answer.error, LostFolderError)
    assert (answer.error.code, answer.error.file) == (Code.LOST, Path("sweep"))
    assert contents("sweep") == contents("other")  # no third job, and tables of the other


@pytest.mark.reliability(20)
def test_20_an_evaluation_is_not_written_into_another_run(
    in_tmp: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert lora_bench("train", *toy_run("hydra.run.dir=run")).code == 0

    def replace(*_: Any) -> None:
        shutil.rmtree("run")
        shutil.copytree(other, "run")

    before_call(monkeypatch, Run, "write_evaluation", replace)
    answer = lora_bench("eval", "run=run", "data=toy", "data.validation_rows=20")
    assert answer.code == 1, answer
    assert isinstance(answer.error, LostFolderError)
    assert (answer.error.code, answer.error.file) == (Code.LOST, Path("run"))
    assert contents("run") == contents(other)


@pytest.mark.reliability(20)
def test_20_the_other_jobs_of_a_sweep_go_on(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Run.log

    def deleting(run: Run, line: Any) -> None:
        if run.folder.name == "1":
            shutil.rmtree(run.folder, ignore_errors=True)
        log(run, line)

    monkeypatch.setattr(Run, "log", deleting)
    answer = lora_bench("train", "-m", *toy_run("hydra.sweep.dir=sweep"), "seed=0,1,2")
    assert answer.code == 1
    assert f"job 1 failed: {in_tmp / 'sweep/1'}: " in answer.out
    assert not Path("sweep/1").exists()
    assert [status(f"sweep/{number}") for number in (0, 2)] == ["done", "done"]
