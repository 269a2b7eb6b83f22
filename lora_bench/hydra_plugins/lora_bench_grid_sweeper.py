"""The grid sweeper: every combination, each checked before the first one runs, and a table of the whole at the end."""

# No `from __future__ import annotations`: Hydra leaves plugins out of sys.modules, where dataclasses would look.
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import groupby, islice
from pathlib import Path
from typing import Any, TypeAlias

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console

from lora_bench.analysis.table import Table
from lora_bench.config.canonical import settings_hash
from lora_bench.config.compose import compose_job
from lora_bench.config.keys import flatten, key_of
from lora_bench.config.multitask import compose_tasks
from lora_bench.console.stages import Stage, current_console, importing_libraries, show_progress, stage
from lora_bench.console.sweep_progress import SweepProgress
from lora_bench.console.text import sanitise, stdout_console
from lora_bench.errors import Code, RunFailedError, SweepFailedError, UserError, quoted, shell_argument
from lora_bench.files.atomic_io import to_json
from lora_bench.records.folder_lock import Claim
from lora_bench.records.settings import Settings
from lora_bench.records.sweep_folder import Sweep
from lora_bench.run.callbacks import check_callbacks
from lora_bench.run.loaded_data import LoadedData
from lora_bench.run.preflight import check_paths, check_processes
from lora_bench.sweeps.sweep_display import count_ended, describe_interrupted, expect_jobs, training_pairs

SUBDIR_KEY = "hydra.sweep.subdir"
"""The key of a job's folder, relative to the sweep's."""

Batch: TypeAlias = dict[int, list[str]]


@dataclass
class GridSweeperConf:
    _target_: str = "hydra_plugins.lora_bench_grid_sweeper.GridSweeper"
    max_batch_size: int | None = None
    params: dict[str, str] | None = None
    exclude: list[str] = field(default_factory=list)
    variants: list[str] = field(default_factory=list)


ConfigStore.instance().store(group="hydra/sweeper", name="grid", node=GridSweeperConf, provider="lora_bench")


class GridSweeper(BasicSweeper):
    """The Cartesian product of the values, with every job checked before the first one runs; it can be resumed.

    Args:
        max_batch_size: maximal number of jobs passed to the launcher at a time.
        params: the grid, as `key: "1,2,3"`; overrides of the command line replace single keys.
        exclude: combinations to omit, as `key=pattern key=pattern` with shell wildcards.
        variants: sets of overrides, as `key=value key=value`; the grid is run with each set. The first one, at its
            setting that is best on selection, is the baseline of the final comparison.
    """

    def __init__(
        self,
        max_batch_size: int | None,
        params: dict[str, str] | None,
        exclude: Sequence[str],
        variants: Sequence[str],
    ) -> None:
        super().__init__(max_batch_size, params)
        self.exclude = [dict(pattern.split("=", 1) for pattern in rule.split()) for rule in exclude]
        self.variants = [variant.split() for variant in variants] or [[]]
        self.baseline_jobs: list[list[str]] = []
        """The jobs of the first variant, if there are several."""
        self.checked_data: set[str] = set()
        """Hashes of the settings of data that were loaded without a fault."""
        self.work: dict[str, float] = {}
        """The training pairs of each job that was checked, by its folder."""
        self.later_jobs: list[str] = []
        """The folders of the jobs of later stages, as far as they are known when the sweep is started."""

    def sweep(self, arguments: list[str]) -> None:
        """Run every job, or with `resume` every job that has not ended; write the tables, even after Ctrl-C.

        What is kept after Ctrl-C, and how to resume, is a note of the exception. With `dry_run` the jobs of all stages
        are only estimated, and nothing is written.

        Args:
            arguments: overrides of the command line.

        Raises:
            UserError: the request cannot be met; nothing is left behind. Also if every job was such a request.
            SweepFailedError: some jobs failed.
        """
        from lora_bench.records import sweep_folder

        assert self.config is not None
        assert self.hydra_context is not None
        assert self.launcher is not None
        hydra, folder = self.config.hydra, Path(self.config.hydra.sweep.dir)
        grid = [*self._parse_config(), *(text for text in arguments if key_of(text) != "resume")]
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        combinations = self._combinations([parser.parse_overrides([*grid, *variant]) for variant in self.variants])
        jobs = self._checked(self._first_stage(combinations))
        later = {} if self.config.resume else self._checked(self._later_stages(combinations), len(jobs))
        if self.config.dry_run:
            jobs |= later
            ended = [done.return_value for done in self.launcher.launch(list(jobs.values()), initial_job_idx=0)]
            _raise_failures([error for error in ended if error is not None], len(ended))
            return
        if self.config.resume:
            recorded_jobs = sweep_folder.read(folder).jobs
            later_jobs = list(islice(recorded_jobs.values(), len(jobs), None))  # added after the first stage
            expected = to_json(jobs | self._checked(later_jobs, len(jobs)))
            if list(recorded_jobs.items()) != list(expected.items()):
                remedy = "Its presets have changed since: start a new sweep."
                raise UserError(
                    "the sweep's jobs differ from those that it was started with",
                    key="resume",
                    value=folder,
                    remedy=remedy,
                    code=Code.MISMATCH,
                )
            lock = sweep_folder.reopen(folder)
        else:
            typed: Any = OmegaConf.to_container(hydra.overrides, resolve=False)
            overrides = [text for text in [*typed["hydra"], *typed["task"]] if key_of(text) != "resume"]
            config_dirs = [source.path for source in hydra.runtime.config_sources if source.provider == "command-line"]
            lock = sweep_folder.create(folder, overrides, config_dirs[0] if config_dirs else None, jobs)
        self.later_jobs = list(later)
        self._run(folder, lock)

    def _run(self, folder: Path, lock: Claim) -> None:
        """Run the stages of a recorded sweep, and finish it, even after an error or Ctrl-C.

        Args:
            folder: of the sweep.
            lock: its claim, which is released.

        Raises:
            UserError: every job was a wrong request, or the sweep's folder is lost.
            SweepFailedError: some jobs failed.
        """
        from lora_bench.records import sweep_folder

        is_interrupted = False
        try:
            with SweepProgress(stdout_console()) as progress:
                sweep = sweep_folder.read(folder)
                expect_jobs(progress, sweep.jobs, self._work_to_come(sweep.jobs), self.work)
                count_ended(progress, folder, sweep)
                failures, tried = self._run_stages(folder, lock, progress)
        except (KeyboardInterrupt, SystemExit) as stop:
            is_interrupted = True
            with suppress(UserError):  # the folder was moved away, which is said below
                stop.add_note(describe_interrupted(folder, sweep_folder.read(folder)))
            raise
        finally:
            lock.release()
            lock.check()
            self._finish(folder, is_interrupted)
        _raise_failures(failures, len(tried))

    def _run_stages(self, folder: Path, lock: Claim, progress: SweepProgress) -> tuple[list[Exception], set[int]]:
        """Run the missing jobs of each stage; return the errors that are no results, and the numbers of the jobs."""
        from lora_bench.records import sweep_folder

        failures: list[Exception] = []
        tried: set[int] = set()
        while True:
            for batch in self._batches(folder, sweep_folder.read(folder), tried):
                lock.check()
                ended = [done.return_value for done in self._launch(batch)]
                tried |= batch.keys()
                for job, error in zip(batch.values(), ended, strict=True):
                    failures += [] if error is None or self._is_expected(job, error) else [error]
            lock.check()
            sweep = sweep_folder.read(folder)
            recorded_jobs = sweep.jobs
            try:
                next_jobs = self._next_stage(folder, recorded_jobs)
            except RunFailedError:  # which it would be again
                sweep_folder.complete(folder)
                raise
            if not next_jobs:
                if not sweep.unfinished_jobs(folder):
                    sweep_folder.complete(folder)
                return failures, tried
            sweep_folder.extend(folder, self._checked(next_jobs, len(recorded_jobs)))
            recorded_jobs = sweep_folder.read(folder).jobs
            expect_jobs(progress, recorded_jobs, self._work_to_come(recorded_jobs), self.work)

    def _finish(self, folder: Path, is_interrupted: bool) -> None:
        """Write the tables of the sweep, and print its comparison, its folder and the next command.

        Nothing is printed after an interruption.
        """
        from lora_bench.analysis.summary import write_tables
        from lora_bench.records import sweep_folder

        sweep = sweep_folder.read(folder)
        has_runs = any((folder / name / "run.json").exists() for name in sweep.jobs)
        table = write_tables(folder, self._baseline_runs(folder, sweep.jobs)) if has_runs else None
        if is_interrupted:
            return
        if table is not None:
            self._conclude(folder, table)
        missing, total = len(sweep.unfinished_jobs(folder)), len(sweep.jobs)
        print()
        print(sanitise(f"{total - missing} of {total} jobs have ended: {folder}").plain)
        if missing:
            command = f"lora-bench train -m {shell_argument('resume', folder)}"
            print(f"{missing} of {total} jobs are missing; run them with: {command}")
        else:
            print(sanitise(f"next: lora-bench compare {shlex.quote(str(folder))} --html report.html").plain)

    # -- hooks for sweepers of several stages --

    def _first_stage(self, jobs: list[list[str]]) -> list[list[str]]:
        """Return the jobs of the first stage, given all combinations."""
        return jobs

    def _later_stages(self, jobs: list[list[str]]) -> list[list[str]]:
        """Return the known jobs of later stages; they are checked and estimated with the first stage."""
        return []

    def _work_to_come(self, jobs: Mapping[str, Sequence[str]]) -> list[float]:
        """Return the work of each job that is expected in later stages, given the recorded jobs by folder."""
        return [self.work[name] for name in self.later_jobs if name not in jobs]

    def _next_stage(self, folder: Path, jobs: dict[str, list[str]]) -> list[list[str]]:
        """Return the jobs of the next stage, given the sweep's folder and its jobs by folder; [] after the last."""
        return []

    def _is_expected(self, job: Sequence[str], error: Exception) -> bool:
        """Return whether this error of a job is a result, not a failure of the sweep."""
        return False

    def _conclude(self, folder: Path, table: Table) -> None:
        """Print the comparison of the sweep's runs."""
        from lora_bench.analysis.terminal import render

        print()
        render(table, Console(highlight=False))

    def _baseline_runs(self, folder: Path, jobs: Mapping[str, Sequence[str]]) -> list[str] | None:
        """Return the folders of the finished runs of the first variant, the baseline; None without any.

        Args:
            folder: of the sweep.
            jobs: overrides by folder.
        """
        from lora_bench.records import run_folder

        runs = []
        for name, job in jobs.items():
            if [text for text in job if not text.startswith(f"{SUBDIR_KEY}=")] in self.baseline_jobs:
                run = folder / name
                if (run / "run.json").exists() and run_folder.read(run)["status"] == "done":
                    runs.append(str(run))
        return runs or None

    def _refuse_halving(self) -> None:
        """Refuse `pack.halving` for a sweep that needs the results of all its jobs."""
        assert self.config is not None
        if self.config.pack.halving:
            reason = "would eliminate jobs whose results this sweep needs"
            raise UserError(reason, key="pack.halving", value="true", remedy="Leave it out.", code=Code.CONFLICT)

    def _combinations(self, variants: Sequence[list[Override]]) -> list[list[str]]:
        """Return the jobs of each variant in turn, without the excluded ones, and set `baseline_jobs`.

        Raises:
            UserError: all are excluded, or a key has no values.
        """
        for override in (override for overrides in variants for override in overrides):
            if override.is_discrete_sweep() and next(override.sweep_string_iterator(), None) is None:
                key, _, value = str(override.input_line).partition("=")
                raise UserError("has no values", key=key, value=value, remedy="Give at least one.", code=Code.NO_MATCH)
        jobs_by_variant: list[list[list[str]]] = []
        for overrides in variants:
            (combined,) = BasicSweeper.split_arguments(overrides, None)
            jobs_by_variant.append([job for job in combined if not self._is_excluded(job)])
        self.baseline_jobs = jobs_by_variant[0] if len(jobs_by_variant) > 1 else []
        jobs = [job for variant_jobs in jobs_by_variant for job in variant_jobs]
        if not jobs:
            rules = "; ".join(" ".join(f"{key}={value}" for key, value in rule.items()) for rule in self.exclude)
            raise UserError("leaves no job to run", key="hydra.sweeper.exclude", value=rules, code=Code.NO_MATCH)
        return jobs

    def _is_excluded(self, job: list[str]) -> bool:
        """Return whether all patterns of a rule in `exclude` match the job's values; a missing value is empty."""
        chosen = dict(text.split("=", 1) for text in job if "=" in text)
        return any(
            all(fnmatchcase(chosen.get(key, ""), pattern) for key, pattern in rule.items()) for rule in self.exclude
        )

    def _checked(self, jobs: list[list[str]], first: int = 0) -> dict[str, list[str]]:
        """Check the jobs before the sweep's folder is created, and return them by their folders.

        Args:
            jobs: the overrides of each job.
            first: the number of the first job.

        Raises:
            UserError: a job cannot be run, two jobs are the same run or have the same folder, or a folder is outside of
                the sweep's.
        """
        from lora_bench.records import sweep_folder

        job_by_folder: dict[str, list[str]] = {}
        job_by_identity: dict[str, list[str]] = {}
        console = current_console()
        if first == 0:
            console.print(f"{len(jobs)} job{'s' * (len(jobs) != 1)}: checking")
        with show_progress(console), stage("checking the jobs", total=len(jobs), unit="jobs") as progress:
            checked = self._check_each(enumerate(jobs, first), progress)
        for (name, identity), job in zip(checked, jobs, strict=True):
            if sweep_folder.is_outside(name):
                raise UserError("leads out of the sweep's folder", key=SUBDIR_KEY, value=name, code=Code.FORBIDDEN)
            if identity in job_by_identity:
                reason = f"two jobs are the same run: {' '.join(job_by_identity[identity])!r} and {' '.join(job)!r}"
                raise UserError(reason, key="sweep", remedy="Leave one of them out.", code=Code.CONFLICT)
            job_by_identity[identity] = job
            if name in job_by_folder:
                raise UserError("gives two jobs the same folder", key=SUBDIR_KEY, value=name, code=Code.CONFLICT)
            job_by_folder[name] = job
        return job_by_folder

    def _check(self, number: int, job: list[str]) -> tuple[str, str]:
        """Check one job, and return its folder's name and the identity of its run (equal for equal settings).

        Raises:
            UserError: the config or a setting is wrong, its model does not exist, or its data cannot be used.
        """
        name, composed, settings = self._check_settings(number, job)
        self._check_data(settings)
        return name, _identity(composed, settings)

    def _check_each(self, jobs: Iterable[tuple[int, list[str]]], progress: Stage) -> list[tuple[str, str]]:
        """Check each of these jobs, with its number, as `_check` does; all are composed before torch is imported."""
        checked = []
        for number, job in jobs:
            checked.append(self._check_settings(number, job))
            progress.advance()
        for _, _, settings in checked:
            self._check_data(settings)
        with importing_libraries():
            return [(name, _identity(composed, settings)) for name, composed, settings in checked]

    def _check_settings(self, number: int, job: list[str]) -> tuple[str, DictConfig, Settings]:
        """Check what needs no torch of one job: all but the adapter and the metrics.

        Returns:
            The name of its folder, its config without the `hydra` node, and the settings.

        Raises:
            UserError: the config or a setting is wrong, or its data or model does not exist.
        """
        assert self.hydra_context is not None
        assert self.config is not None
        composed = compose_job(self.hydra_context.config_loader, self.config, job, keep=True)
        with open_dict(composed):
            composed.hydra.job.num = number
            name = str(composed.hydra.sweep.subdir)
            hydra = composed.pop("hydra")
        compose_tasks(composed, job, hydra.runtime.config_sources)
        settings = Settings.build(composed)
        self.work[name] = training_pairs(settings)
        check_paths(settings)
        check_processes(settings.trainer)
        check_callbacks(settings.pack)
        return name, composed, settings

    def _check_data(self, settings: Settings) -> None:
        """Refuse data of a job that cannot be used, so that not every job of the sweep fails by it.

        Data that were checked already are not loaded again, nor those of a sweep that is resumed.

        Raises:
            UserError: as `LoadedData.of_tasks`.
        """
        assert self.config is not None
        identity = settings_hash((settings.data, settings.tasks, settings.trainer.main_metric))
        if identity not in self.checked_data and not self.config.resume:
            LoadedData.of_tasks(settings)
            self.checked_data.add(identity)

    def _batches(self, folder: Path, recorded: Sweep, tried: Set[int]) -> Iterator[Batch]:
        """Yield the missing jobs that were not tried yet, by number, in batches of at most `max_batch_size`.

        A job whose run has started gets the override `resume`. None and -1 do not limit a batch.
        """
        batch: Batch = {}
        for number, is_started in recorded.unfinished_jobs(folder).items():
            if number in tried:
                continue
            if self.max_batch_size not in (None, -1) and len(batch) == self.max_batch_size:
                yield batch
                batch = {}
            name = list(recorded.jobs)[number]
            batch[number] = recorded.jobs[name] + ([f"resume={quoted(folder / name)}"] if is_started else [])
        if batch:
            yield batch

    def _launch(self, batch: Batch) -> Iterator[JobReturn]:
        """Launch a batch and yield the job returns in order; Hydra's own launchers take only consecutive numbers."""
        assert self.launcher is not None
        numbered = getattr(self.launcher, "launch_numbered", None)
        if numbered is not None:
            yield from numbered(batch)
            return
        for _, row in groupby(enumerate(batch), lambda indexed: indexed[1] - indexed[0]):
            numbers = [number for _, number in row]
            yield from self.launcher.launch([batch[number] for number in numbers], initial_job_idx=numbers[0])


def _identity(composed: DictConfig, settings: Settings) -> str:
    """Return the identity of a job's run, after a check of its adapter and metrics."""
    from lora_bench.run.settings import Experiment  # torch: late

    return Experiment.build(composed, settings).identity


def to_overrides(nested: Any) -> list[str]:
    """Return the settings of a configuration node as overrides: `trainer: {epochs: 3}` as `trainer.epochs=3`."""
    settings: Any = OmegaConf.to_container(OmegaConf.create(nested))
    return [f"{key}={'null' if value is None else value}" for key, value in flatten(settings)]


def in_subfolders(jobs: Iterable[list[str]], stage: str, first: int = 0) -> list[list[str]]:
    """Return the jobs, each with an override for its folder, `STAGE/NUMBER`, numbered from `first`."""
    return [[*job, f"{SUBDIR_KEY}={stage}/{number}"] for number, job in enumerate(jobs, first)]


def _raise_failures(failures: Sequence[Exception], ran: int) -> None:
    """Raise an error that counts the failures, if there are any: a `UserError` if all jobs were wrong requests."""
    if failures:
        reason = f"{len(failures)} of {ran} jobs failed"
        requests = [e for e in failures if isinstance(e, UserError) and not isinstance(e, RunFailedError)]
        if len(requests) == ran:
            raise UserError(reason, code=requests[0].code)
        raise SweepFailedError(reason)
