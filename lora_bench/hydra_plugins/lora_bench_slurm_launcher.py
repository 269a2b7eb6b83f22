"""The Slurm launcher: a sweep's packs are Slurm jobs. Its settings are those of `sweeps.slurm.Slurm`."""

# No `from __future__ import annotations`: Hydra leaves plugins out of sys.modules, where dataclasses would look.
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from lora_bench.config.build import build
from lora_bench.errors import Code, require
from lora_bench.hydra_plugins.lora_bench_pack_launcher import PackedLauncher
from lora_bench.records.job import Job
from lora_bench.run import callbacks
from lora_bench.sweeps.slurm import Slurm

# conf/hydra/launcher/slurm.yaml adds the settings.
NODE = {"_target_": "hydra_plugins.lora_bench_slurm_launcher.SlurmLauncher"}
ConfigStore.instance().store(group="hydra/launcher", name="slurm_packs", node=NODE, provider="lora_bench")


class SlurmLauncher(PackedLauncher):
    """Composes all jobs, as the packed launcher does, and submits their packs to Slurm."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Check the settings, that Slurm is available, and that no callbacks are to be called; a `UserError` if not."""
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        self.slurm = build(
            Slurm, OmegaConf.create(self.settings), "hydra.launcher"
        )  # in the constructor, Hydra would wrap the error
        self.slurm.check()
        reason = "trains in processes in which callbacks cannot be called"
        remedy = "Leave it out, or the callbacks."
        require(not callbacks.current(), "hydra/launcher", "slurm", reason, remedy, code=Code.CONFLICT)

    def _train(self, jobs: Sequence[Job], console: Console, ended: Callable[[Job, Exception | None], None]) -> None:
        """Train the jobs in Slurm jobs, whose files are in `.slurm` of the sweep's folder.

        The jobs do not check that the sweep's folder is still the same one.
        """
        from lora_bench.sweeps import slurm  # torch: late

        assert self.config is not None
        jobs = [replace(job, sweep=None) for job in jobs]  # device numbers of file systems differ between nodes
        slurm.train_jobs(
            jobs, console, ended, settings=self.slurm, folder=Path(self.config.hydra.sweep.dir).absolute() / ".slurm"
        )
