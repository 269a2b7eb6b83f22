"""Runs on disk, made without training, for the commands that list and remove them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_bench.records import run_folder, sweep_folder
from lora_bench.records.run_folder import Run

if TYPE_CHECKING:
    from pathlib import Path


def make_run(folder: Path, status: str = "done", *, hour: int = 0, mcc: float = 0.5, **settings: Any) -> Path:
    """Write a run that started at an hour of a day in the past; `running` without a living process is killed.

    Args:
        folder: of the run.
        status: of its record.
        hour: when it started, so that a later one is newer.
        mcc: on the validation split, if it is done.
        settings: `adapter`, and keys of the top level of the config.
    """
    adapter = settings.pop("adapter", "lora")
    config = {"adapter": {"method": adapter, "rank": 8}, "seed": 0, **settings}
    choices = {"model": "minilm", "adapter": adapter, "data": "toy"}
    run = Run.claim(
        folder,
        choices=choices,
        config=config,
        overrides=["adapter.rank=8", f"name={settings.get('name')}", f"seed={hour}"],
    )
    (folder / "adapter").mkdir()
    (folder / "adapter/adapter_model.safetensors").write_bytes(bytes(1000))
    run.record["created"] = f"2026-01-01T{hour:02}:00:00.000+00:00"
    if status == "done":
        run.update(metrics={"selection/mcc": mcc / 2, "validation/mcc": mcc}, cost={"train_seconds": 60.0 + hour})
    if status == "running":
        run.update(status="running")
        run.release()
    else:
        run.finish(status, None if status == "done" else "stopped")
    return folder


def make_sweep(folder: Path, jobs: int, *overrides: str, **settings: Any) -> Path:
    """Write a sweep with these overrides, whose jobs are done."""
    sweep_folder.create(folder, list(overrides), None, {str(i): [] for i in range(jobs)}).release()
    for i in range(jobs):
        make_run(folder / str(i), hour=i, **settings)
    return folder


def ids(*folders: Path) -> list[str]:
    """Return the ids of runs."""
    from lora_bench.records.stored_run import StoredRun

    return [StoredRun(folder, run_folder.read(folder)).id for folder in folders]
