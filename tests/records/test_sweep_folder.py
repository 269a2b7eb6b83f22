"""The folder of a sweep: its jobs, and which of them are left to run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from lora_bench.errors import Code
from lora_bench.records import sweep_folder
from lora_bench.records.run_folder import Run
from tests.command_line import refuses

if TYPE_CHECKING:
    from pathlib import Path


def job(folder: Path, status: str, *, stopped_at_step: int | None = None) -> None:
    run = Run.claim(folder, choices={}, config={"seed": 0}, overrides=[])
    if stopped_at_step is not None:
        run.update(selection={"stopped_at_step": stopped_at_step})
    if status != "running":
        run.finish(status, None if status == "done" else "a reason")
    run.release()


def test_jobs_that_have_not_ended_are_left_to_run(tmp_path: Path) -> None:
    statuses = ("done", "diverged", "eliminated", "interrupted", "failed", "running")
    names = [*statuses, "eliminated by version 0.1", "not started"]
    lock = sweep_folder.create(tmp_path, ["seed=0"], None, {name: ["seed=0"] for name in names})
    for status in statuses:
        job(tmp_path / status, status, stopped_at_step=2 if status == "eliminated" else None)
    job(tmp_path / "eliminated by version 0.1", "interrupted", stopped_at_step=2)
    sweep = sweep_folder.read(tmp_path)
    assert {names[k]: is_started for k, is_started in sweep.unfinished_jobs(tmp_path).items()} == {
        "interrupted": True,
        "failed": True,
        "running": True,
        "not started": False,
    }
    assert [folder for _, folder in sweep_folder.unfinished_sweeps(tmp_path)] == [tmp_path]
    lock.release()


def test_a_second_sweep_in_a_folder_is_refused(tmp_path: Path) -> None:
    sweep_folder.create(tmp_path, [], None, {"0": []}).release()
    with refuses(Code.EXISTS, key="hydra.sweep.dir"):
        sweep_folder.create(tmp_path, [], None, {"0": []})


@pytest.mark.parametrize("name", ["/x", "../x", "a/../../x", "nul\0"])
def test_a_job_outside_of_the_sweep_is_recognised(name: str) -> None:
    assert sweep_folder.is_outside(name)
    assert not sweep_folder.is_outside("train/0")


@pytest.mark.parametrize("name", ["run", "run/sweep", "run/tasks/a/sweep"])
def test_a_sweep_in_the_folder_of_a_run_is_refused(tmp_path: Path, name: str) -> None:
    job(tmp_path / "run", "done")
    with refuses(Code.EXISTS, key="hydra.sweep.dir"):
        sweep_folder.create(tmp_path / name, [], None, {"0": []})
    assert not (tmp_path / name / "sweep.json").exists()


def test_a_sweep_beside_a_run_and_below_a_file_of_another_program_is_created(tmp_path: Path) -> None:
    job(tmp_path / "run", "done")
    (tmp_path / "run.json").write_text('{"name": "another program"}')
    sweep_folder.create(tmp_path / "sweep", [], None, {"0": []}).release()
    job(tmp_path / "sweep" / "0", "done")
    assert not sweep_folder.read(tmp_path / "sweep").unfinished_jobs(tmp_path / "sweep")


@pytest.mark.parametrize("name", ["run.json", "predictions/validation.parquet", "adapter/new.txt", "tasks/a/run.json"])
def test_an_output_that_is_a_file_of_a_run_is_refused(tmp_path: Path, name: str) -> None:
    Run.claim(tmp_path / "run", choices={}, config={}, overrides=[]).release()
    with refuses(Code.EXISTS, key="output"):
        sweep_folder.refuse_own_file(tmp_path / "run" / name, "output")
    for other in (tmp_path / name, tmp_path / "run" / "report.html", "-"):
        sweep_folder.refuse_own_file(other, "output")


def test_an_output_that_is_the_record_of_a_sweep_is_refused(tmp_path: Path) -> None:
    sweep_folder.refuse_own_file(tmp_path / "sweep.json", "--html")
    sweep_folder.create(tmp_path, [], None, {})
    with refuses(Code.EXISTS, key="--html"):
        sweep_folder.refuse_own_file(tmp_path / "sweep.json", "--html")
    sweep_folder.refuse_own_file(tmp_path / "report.html", "--html")
