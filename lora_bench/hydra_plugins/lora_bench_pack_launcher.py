"""The packed launcher: a sweep's jobs that may share a backbone are trained together, in this process."""

# No `from __future__ import annotations`: Hydra leaves plugins out of sys.modules, where dataclasses would look.
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import open_dict
from rich.console import Console

from lora_bench.config.compose import compose_job
from lora_bench.config.keys import key_of
from lora_bench.console.text import sanitise
from lora_bench.records.folder_lock import Identity
from lora_bench.records.job import Job, is_done, titled


@dataclass
class PackedLauncherConf:
    _target_: str = "hydra_plugins.lora_bench_pack_launcher.PackedLauncher"


ConfigStore.instance().store(group="hydra/launcher", name="packed", node=PackedLauncherConf, provider="lora_bench")


class PackedLauncher(BasicLauncher):
    """Composes all jobs and has them trained; each return value is what ended the job before its time."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        return self.launch_numbered(dict(enumerate(job_overrides, initial_job_idx)))

    def launch_numbered(self, jobs_by_number: Mapping[int, Sequence[str]]) -> Sequence[JobReturn]:
        """The same for jobs that are not in a row: what a sweep lacks is packed whatever lies between."""
        from lora_bench.sweeps import cost_estimate  # torch: late

        console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
        ended: dict[str, Exception | None] = {}

        def end(job: Job, error: Exception | None) -> None:
            ended[job.title] = error
            if error is not None:
                if not job.cfg.dry_run:
                    job.fail(error)
                console.print(sanitise(f"{job.title.partition(':')[0]} failed: {error}", style="red"))

        titles, jobs = [], []
        try:
            alike = set.intersection(*map(set, jobs_by_number.values())) if len(jobs_by_number) > 1 else set()
            for number, overrides in jobs_by_number.items():
                told = [
                    text
                    for text in overrides
                    if not key_of(text).startswith(("resume", "hydra.")) and text not in alike
                ]
                titles.append(titled(number, told))
                try:
                    jobs += self._composed(number, list(overrides), titles[-1])
                except Exception as error:
                    ended[titles[-1]] = error
                    console.print(sanitise(f"job {number} failed: {error}", style="red"))
            assert self.config is not None
            (cost_estimate.run if self.config.dry_run else self._train)(jobs, console, end)
        finally:
            for job in jobs:
                if job.begun:
                    job.begun.release()
        return [JobReturn(_return_value=ended.get(title), status=JobStatus.COMPLETED) for title in titles]

    def _train(self, jobs: Sequence[Job], console: Console, ended: Callable[[Job, Exception | None], None]) -> None:
        from lora_bench.sweeps import workers  # torch: late

        workers.run(jobs, console, ended)

    def _composed(self, number: int, overrides: list[str], title: str) -> list[Job]:
        """The job; none where its run is done."""
        assert self.hydra_context is not None
        assert self.config is not None
        own = [text for text in overrides if key_of(text) != "resume"]
        resume = [text for text in overrides if key_of(text) == "resume"]  # added by the sweeper
        composed = compose_job(self.hydra_context.config_loader, self.config, own, resume)
        with open_dict(composed):
            composed.hydra.job.id = composed.hydra.job.num = number
            HydraConfig.instance().set_config(composed)
            folder = Path(composed.hydra.sweep.dir, str(composed.hydra.sweep.subdir)).absolute()
            hydra = composed.pop("hydra")
        if is_done(composed):
            return []
        dry = composed.dry_run  # then the sweep has no folder
        sweep = None if dry else Identity.of(Path(hydra.sweep.dir).absolute())
        return [Job.composed(composed, hydra, folder, title, sweep)]
