"""A run is found by its name, by the first digits of its id, and as the last one."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import lora_bench
from lora_bench.errors import Code, UserError
from lora_bench.records import run_folder
from lora_bench.records.live_progress import PROGRESS_FILE, LiveProgress
from lora_bench.records.run_names import find_folder, find_run
from tests.command_line import TOY_RUN, at_step, refused, refuses, signalled, toy_run
from tests.command_line import lora_bench as run
from tests.stored_runs import ids, make_run, make_sweep

if TYPE_CHECKING:
    from typing import Any

FIRST = Path("outputs/2026-01-01/00-00-00-000000-abc001")
SECOND = Path("outputs/2026-01-01/01-00-00-000000-abc2f3")
FAILED = Path("outputs/2026-01-01/02-00-00-000000-d00004")


@pytest.fixture
def runs(in_tmp: Path) -> None:
    """Two finished runs of one name, a failed one of another, and a sweep of three runs before them."""
    make_sweep(Path("outputs/sweeps/2026-01-01/00-00-00-000000"), 3, "name=grid", "seed=0,1,2", name="grid")
    make_run(FIRST, hour=3, name="baseline")
    make_run(SECOND, hour=4, name="baseline")
    make_run(FAILED, "failed", hour=5, name="broken")


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize(
    ("reference", "finished", "folder"),
    [
        ("baseline", False, SECOND),
        ("run=baseline", False, SECOND),
        ("abc0", False, FIRST),
        ("D0000", False, FAILED),
        ("last", False, FAILED),
        ("last", True, SECOND),
        ("broken", True, FAILED),
        ("grid", True, Path("outputs/sweeps/2026-01-01/00-00-00-000000/2")),
        ("no/such/folder", False, Path("no/such/folder")),
    ],
)
def test_a_reference_names_a_run(reference: str, finished: bool, folder: Path) -> None:
    assert find_run(reference, "run", finished=finished) == folder


@pytest.mark.usefixtures("runs")
def test_the_newest_run_of_a_name_is_taken_and_a_note_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    find_run("baseline", "run")
    assert str(SECOND) in capsys.readouterr().err
    find_run("broken", "run")
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("runs")
def test_a_folder_comes_before_a_name() -> None:
    Path("baseline").mkdir()
    assert find_run("baseline", "run") == Path("baseline")


@pytest.mark.usefixtures("runs")
def test_the_name_of_a_sweep_names_all_of_it() -> None:
    sweep = Path("outputs/sweeps/2026-01-01/00-00-00-000000")
    assert find_folder("grid", "compare") == sweep
    assert find_folder(ids(sweep / "1")[0], "compare") == sweep / "1"
    assert find_folder("last", "compare") == find_folder("run=last", "rm") == FAILED
    Path("run=last").mkdir()
    assert find_folder("run=last", "rm") == Path("run=last")


def test_each_job_of_a_sweep_has_an_id_that_a_move_keeps(in_tmp: Path) -> None:
    sweep = make_sweep(Path("sweep"), 3)
    before = ids(*(sweep / str(i) for i in range(3)))
    assert len(set(before)) == 3
    sweep.rename("moved")
    assert ids(*(Path("moved") / str(i) for i in range(3))) == before


@pytest.mark.usefixtures("runs")
def test_an_unknown_run_is_answered_with_the_nearest_and_an_ambiguous_one_with_all() -> None:
    with refuses(Code.NOT_FOUND, key="run") as unknown:
        find_run("basline", "run")
    assert "Did you mean baseline?" in str(unknown.value)
    with refuses(Code.AMBIGUOUS, key="run") as ambiguous:
        find_run("abc", "run")
    assert str(FIRST) in str(ambiguous.value)
    assert str(SECOND) in str(ambiguous.value)


def test_without_runs_a_name_is_refused(in_tmp: Path) -> None:
    assert refused("predict", "run=last", "input=-").code == Code.NOT_FOUND
    assert refused("export", "run=nobody", "format=peft", "output=x").code == Code.NOT_FOUND


@pytest.mark.parametrize("identifier", ["12e456", "123456", "0e1234"])
def test_an_id_that_looks_like_a_number_is_found(identifier: str, in_tmp: Path) -> None:
    folder = make_run(Path(f"outputs/00-00-00-000000-{identifier}"), "failed")
    error = refused("export", f"run={identifier}", "format=peft", "output=x")
    assert (error.code, error.value) == (Code.UNFINISHED, folder)
    assert refused("train", f"resume={identifier}").file == folder / "run.json"


@pytest.mark.parametrize("override", ["name=last", "name=a/b", "name=[a]", "tags=[a b]", "tags=a", "notes=[a]"])
def test_wrong_annotations_are_refused(override: str, in_tmp: Path) -> None:
    error = refused("train", *TOY_RUN, override)
    assert (error.code, error.key) == (Code.INVALID_VALUE, override.partition("=")[0])


def test_a_run_with_a_name_is_used_by_it(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    progress: list[Any] = []
    at_step(monkeypatch, 1, lambda: progress.extend(LiveProgress.read(path) for path in Path("outputs").glob("*/*")))
    assert run("train", *TOY_RUN, "name=first", "tags=[a,b]", "notes='a text'").code == 0
    (folder,) = Path("outputs").glob("*/*")
    assert (progress[0].step, progress[0].steps, progress[0].epoch) == (1, 1, 0.5)
    assert not (folder / PROGRESS_FILE).exists()
    config = run_folder.read(folder)["config"]
    assert (config["name"], config["tags"], config["notes"]) == ("first", ["a", "b"], "a text")
    Path("pairs.tsv").write_text("question1\tquestion2\none\tother\n")
    for reference in ("first", "last", folder.name[-6:]):
        assert run("predict", f"run={reference}", "input=pairs.tsv", "output=labelled.tsv").code == 0
    assert run("eval", "run=first", *TOY_RUN[1:4], "name=again").code == 0
    assert (folder / "evaluations/again.json").exists()
    assert run("train", "resume=first").out.endswith("there is nothing to resume\n")
    assert run("compare", "first", "--baseline", "first").code == 0
    assert lora_bench.load("first").folder == folder
    warm = run("train", *TOY_RUN, "adapter.init_from=first", "name=second")
    assert warm.code == 0
    assert run_folder.read(find_run("second", "run"))["config"]["adapter"]["init_from"] == str(folder.absolute())
    sweep = ["adapter.init_from=first", "seed=0,1", "hydra.sweep.dir=sweep", "pack.size=1"]
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 1, signalled(signal.SIGTERM))
        assert run("train", "-m", *toy_run(*sweep)).code == 143
    resumed = run("train", "-m", "resume=sweep")
    assert resumed.code == 0, resumed
    with pytest.raises(UserError):
        lora_bench.load("third")
