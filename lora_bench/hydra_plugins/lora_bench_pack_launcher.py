"""The packed launcher: jobs of a sweep that may share a backbone are trained together."""

# No `from __future__ import annotations`: Hydra leaves plugins out of sys.modules, where dataclasses would look.
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
from lora_bench.console import sweep_progress
from lora_bench.console.stages import current_console, importing_libraries, show_progress
from lora_bench.console.text import sanitise
from lora_bench.records.folder_lock import Identity
from lora_bench.records.job import Job, is_done, job_titles, read_result


@dataclass
class PackedLauncherConf:
    _target_: str = "hydra_plugins.lora_bench_pack_launcher.PackedLauncher"


ConfigStore.instance().store(group="hydra/launcher", name="packed", node=PackedLauncherConf, provider="lora_bench")


class PackedLauncher(BasicLauncher):
    """Composes all jobs and trains them; the return value of each is the error that ended it early, or None."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run jobs with consecutive numbers."""
        return self.launch_numbered(dict(enumerate(job_overrides, initial_job_idx)))

    def launch_numbered(self, jobs_by_number: Mapping[int, Sequence[str]]) -> Sequence[JobReturn]:
        """Run jobs with any numbers, so that the missing jobs of a sweep are packed together.

        With `dry_run` their cost is printed instead. A job that cannot be composed fails alone; one whose run is done
        is skipped.

        Args:
            jobs_by_number: the overrides of each job.

        Returns:
            For each job, as return value, the error that ended it early, or None; the status is always `COMPLETED`.
        """
        console = current_console()
        with show_progress(console):
            return self._launch_numbered(jobs_by_number, console)

    def _launch_numbered(self, jobs_by_number: Mapping[int, Sequence[str]], console: Console) -> Sequence[JobReturn]:
        """Run the jobs as `launch_numbered` does, with messages on a console that shows progress."""
        with importing_libraries():
            from lora_bench.sweeps import cost_estimate  # torch: late

        progress = sweep_progress.current()
        titles = job_titles(jobs_by_number) if progress is None else progress.titles
        ended: dict[str, Exception | None] = {}

        def end(job: Job, error: Exception | None) -> None:
            """Show how a job ended; leave a failed record if it has none, except in a dry run."""
            if error is not None and not job.cfg.dry_run:
                job.fail(error)
            show_end(job.title, error, job)

        def show_end(title: str, error: Exception | None, job: Job | None = None) -> None:
            ended[title] = error
            if progress is not None:
                result = read_result(job.folder, is_resumed=job.resumed is not None) if job else None
                progress.job_ended(title, result, error)
            elif error is not None:
                console.print(sanitise(f"{sweep_progress.job_name(title)} failed: {error}", style="red"))

        jobs: list[Job] = []
        try:
            for number, overrides in jobs_by_number.items():
                try:
                    jobs += self._composed(number, list(overrides), titles[number])
                except Exception as error:
                    show_end(titles[number], error)
            assert self.config is not None
            (cost_estimate.print_sweep_estimate if self.config.dry_run else self._train)(jobs, console, end)
        finally:
            for job in jobs:
                if job.resumed:
                    job.resumed.release()
        return [
            JobReturn(_return_value=ended.get(titles[number]), status=JobStatus.COMPLETED) for number in jobs_by_number
        ]

    def _train(self, jobs: Sequence[Job], console: Console, ended: Callable[[Job, Exception | None], None]) -> None:
        from lora_bench.sweeps import workers  # torch: late

        workers.train_jobs(jobs, console, ended)

    def _composed(self, number: int, overrides: list[str], title: str) -> list[Job]:
        """Compose the job and return it in a list, which is empty if its run is done already.

        The run of a job with `resume` is claimed.

        Raises:
            UserError: the config is wrong, or the run cannot be resumed.
        """
        assert self.hydra_context is not None
        assert self.config is not None
        typed = [text for text in overrides if key_of(text) != "resume"]
        resume = [text for text in overrides if key_of(text) == "resume"]  # added by the sweeper
        composed = compose_job(self.hydra_context.config_loader, self.config, typed, resume)
        with open_dict(composed):
            composed.hydra.job.id = composed.hydra.job.num = number
            HydraConfig.instance().set_config(composed)
            folder = Path(composed.hydra.sweep.dir, str(composed.hydra.sweep.subdir)).absolute()
            hydra = composed.pop("hydra")
        if is_done(composed):
            return []
        dry = composed.dry_run  # the sweep has no folder then
        sweep = None if dry else Identity.of(Path(hydra.sweep.dir).absolute())
        return [Job.composed(composed, hydra, folder, title, sweep)]
