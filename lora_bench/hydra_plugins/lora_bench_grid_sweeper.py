"""The grid sweeper: every combination, each checked before the first one runs, and a table of the whole at the end."""

# No `from __future__ import annotations`: Hydra leaves plugins out of sys.modules, where dataclasses would look.
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
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
from omegaconf import OmegaConf, open_dict

from lora_bench.config.build import Settings
from lora_bench.config.compose import compose_job
from lora_bench.config.keys import flatten, key_of, split_override
from lora_bench.config.multitask import compose_tasks
from lora_bench.errors import Code, RunFailedError, SweepFailedError, UserError, quoted, shell_argument
from lora_bench.files.atomic_io import to_json
from lora_bench.records.sweep_folder import Sweep
from lora_bench.run.preflight import check_paths

PLACE = "hydra.sweep.subdir"
"""The key of a job's folder below the sweep's."""

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
    """Hydra's basic sweeper for whole evenings: jobs are checked first, and what a sweep lacks can be run later.

    Args:
        max_batch_size: jobs handed to the launcher at a time.
        params: the grid, as `key: "1,2,3"`; the command line replaces it key by key.
        exclude: combinations to leave out, as `key=pattern key=pattern` with shell wildcards.
        variants: overrides that go together, as `key=value key=value`: the grid is run with each. The first is what the
            others are compared with in the end.
    """

    def __init__(
        self,
        max_batch_size: int | None,
        params: dict[str, str] | None,
        exclude: Sequence[str],
        variants: Sequence[str],
    ) -> None:
        super().__init__(max_batch_size, params)
        self.exclude = [dict(map(split_override, rule.split())) for rule in exclude]
        self.variants = [variant.split() for variant in variants] or [[]]
        self.whole: list[list[str]] = []
        """The jobs of the first of several variants."""

    def sweep(self, arguments: list[str]) -> None:
        """Run every job, or with `resume` those that have not ended; then the table, also after Ctrl-C."""
        from lora_bench.analysis.summary import write_tables
        from lora_bench.records import sweep_folder

        assert self.config is not None
        assert self.hydra_context is not None
        assert self.launcher is not None
        hydra, folder = self.config.hydra, Path(self.config.hydra.sweep.dir)
        grid = [*self._parse_config(), *(text for text in arguments if key_of(text) != "resume")]
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        combinations = self._combinations([parser.parse_overrides([*grid, *variant]) for variant in self.variants])
        jobs = self._checked(self._first(combinations))
        later = {} if self.config.resume else self._checked(self._later(combinations), len(jobs))
        if self.config.dry_run:
            jobs |= later
            ended = [done.return_value for done in self.launcher.launch(list(jobs.values()), initial_job_idx=0)]
            _raise_failures([error for error in ended if error is not None], len(ended))
            return
        if self.config.resume:
            begun = sweep_folder.read(folder).jobs
            further = list(islice(begun.values(), len(jobs), None))  # added later, as those before ended
            expected = to_json(jobs | self._checked(further, len(jobs)))
            if list(begun.items()) != list(expected.items()):
                remedy = "Its presets have changed since: begin a new sweep."
                raise UserError(
                    "the sweep's jobs are not those it began with",
                    key="resume",
                    value=folder,
                    remedy=remedy,
                    code=Code.MISMATCH,
                )
            lock = sweep_folder.reopen(folder)
        else:
            typed: Any = OmegaConf.to_container(hydra.overrides, resolve=False)
            asked = [text for text in [*typed["hydra"], *typed["task"]] if key_of(text) != "resume"]
            places = [source.path for source in hydra.runtime.config_sources if source.provider == "command-line"]
            lock = sweep_folder.begin(folder, asked, places[0] if places else None, jobs)
        tried: set[int] = set()
        failures: list[Exception] = []
        try:
            while True:
                for batch in self._batches(folder, sweep_folder.read(folder), tried):
                    lock.check()
                    ended = [done.return_value for done in self._launch(batch)]
                    tried |= batch.keys()
                    for job, error in zip(batch.values(), ended, strict=True):
                        failures += [] if error is None or self._expected(job, error) else [error]
                lock.check()
                begun = sweep_folder.read(folder).jobs
                more = self._next(folder, begun)
                if not more:
                    break
                sweep_folder.extend(folder, self._checked(more, len(begun)))
        finally:
            lock.release()
            lock.check()
            begun = sweep_folder.read(folder).jobs
            if any((folder / name / "run.json").exists() for name in begun):
                write_tables(folder, self._baseline(folder, begun))
                self._conclude(folder)
            if lacking := len(sweep_folder.read(folder).lacks(folder)):
                command = f"lora-bench train -m {shell_argument('resume', folder)}"
                print(f"{lacking} of {len(begun)} jobs are lacking; run them with: {command}")
        _raise_failures(failures, len(tried))

    # -- what a sweeper of more than one stage does otherwise --

    def _first(self, jobs: list[list[str]]) -> list[list[str]]:
        """The jobs to begin with, of all combinations."""
        return jobs

    def _later(self, jobs: list[list[str]]) -> list[list[str]]:
        """What jobs may follow, as far as it is known beforehand: they are checked and estimated with the first."""
        return []

    def _next(self, folder: Path, jobs: dict[str, list[str]]) -> list[list[str]]:
        """The jobs that follow from how those before ended."""
        return []

    def _expected(self, job: Sequence[str], error: Exception) -> bool:
        """Whether that this job ends so is a result like another."""
        return False

    def _conclude(self, folder: Path) -> None:
        """Print what came out."""
        from lora_bench.compare import main
        from lora_bench.records import sweep_folder

        baseline = self._baseline(folder, sweep_folder.read(folder).jobs)
        print()
        main([str(folder), *(["--baseline", baseline] if baseline else [])])

    def _baseline(self, folder: Path, begun: Mapping[str, Sequence[str]]) -> str | None:
        """A finished run of the first variant, where there are several: its row is what others are compared with."""
        from lora_bench.records import run_folder

        for name, job in begun.items():
            if [text for text in job if key_of(text) != PLACE] in self.whole:
                place = folder / name
                if (place / "run.json").exists() and run_folder.read(place)["status"] == "done":
                    return str(place)
        return None

    def _refuse_halving(self) -> None:
        """For sweeps whose jobs are no rivals."""
        assert self.config is not None
        if self.config.pack.halving:
            reason = "would stop jobs of this sweep against one another that it needs all of"
            raise UserError(reason, key="pack.halving", value="true", remedy="Leave it out.", code=Code.CONFLICT)

    def _combinations(self, variants: Sequence[list[Override]]) -> list[list[str]]:
        """The jobs of each variant, one after the other."""
        of_each: list[list[list[str]]] = []
        for overrides in variants:
            (combined,) = BasicSweeper.split_arguments(overrides, None)
            of_each.append([job for job in combined if not self._is_excluded(job)])
        self.whole = of_each[0] if len(of_each) > 1 else []
        jobs = [job for own in of_each for job in own]
        if not jobs:
            rules = "; ".join(" ".join(f"{key}={value}" for key, value in rule.items()) for rule in self.exclude)
            raise UserError("leaves no job to run", key="hydra.sweeper.exclude", value=rules, code=Code.NO_MATCH)
        return jobs

    def _is_excluded(self, job: list[str]) -> bool:
        chosen = dict(map(split_override, job))
        return any(
            all(fnmatchcase(chosen.get(key, ""), pattern) for key, pattern in rule.items()) for rule in self.exclude
        )

    def _checked(self, jobs: list[list[str]], first: int = 0) -> dict[str, list[str]]:
        """The jobs by their folders, before the sweep's is made: a wrong value in the last one leaves nothing.

        Args:
            jobs: their overrides.
            first: the number of the first of them.
        """
        from lora_bench.records import sweep_folder

        found: dict[str, list[str]] = {}
        asked: dict[str, list[str]] = {}
        for number, job in enumerate(jobs, first):
            name, identity = self._check(number, job)
            if sweep_folder.leads_out(name):
                raise UserError("leads out of the sweep's folder", key=PLACE, value=name, code=Code.FORBIDDEN)
            if identity in asked:
                reason = f"two jobs are the same run: {' '.join(asked[identity])!r} and {' '.join(job)!r}"
                raise UserError(reason, key="sweep", remedy="Leave one of them out.", code=Code.CONFLICT)
            asked[identity] = job
            if name in found:
                raise UserError("gives two jobs the same folder", key=PLACE, value=name, code=Code.CONFLICT)
            found[name] = job
        return found

    def _check(self, number: int, job: list[str]) -> tuple[str, str]:
        """The name of the job's folder, and what it would train, names and folders left out."""
        assert self.hydra_context is not None
        assert self.config is not None
        composed = compose_job(self.hydra_context.config_loader, self.config, job, keep=True)
        with open_dict(composed):
            composed.hydra.job.num = number
            name = str(composed.hydra.sweep.subdir)
            hydra = composed.pop("hydra")
        compose_tasks(composed, job, hydra.runtime.config_sources)
        settings = Settings.build(composed)
        check_paths(settings)
        from lora_bench.run.settings import Experiment  # torch: late

        return name, Experiment.build(composed, settings).identity

    def _batches(self, folder: Path, begun: Sweep, tried: Set[int]) -> Iterator[Batch]:
        """What the sweep lacks and was not tried yet, by number, as many at a time as the launcher may be given."""
        batch: Batch = {}
        for number, is_begun in begun.lacks(folder).items():
            if number in tried:
                continue
            if self.max_batch_size not in (None, -1) and len(batch) == self.max_batch_size:
                yield batch
                batch = {}
            name = list(begun.jobs)[number]
            batch[number] = begun.jobs[name] + ([f"resume={quoted(folder / name)}"] if is_begun else [])
        if batch:
            yield batch

    def _launch(self, batch: Batch) -> Iterator[JobReturn]:
        """What became of the jobs; Hydra's launchers take only jobs in a row."""
        assert self.launcher is not None
        numbered = getattr(self.launcher, "launch_numbered", None)
        if numbered is not None:
            yield from numbered(batch)
            return
        for _, row in groupby(enumerate(batch), lambda placed: placed[1] - placed[0]):
            numbers = [number for _, number in row]
            yield from self.launcher.launch([batch[number] for number in numbers], initial_job_idx=numbers[0])


def overrides_of(nested: Any) -> list[str]:
    """What is set in a config node, as overrides: `trainer: {epochs: 3}` as `trainer.epochs=3`."""
    asked: Any = OmegaConf.to_container(OmegaConf.create(nested))
    return [f"{key}={'null' if value is None else value}" for key, value in flatten(asked)]


def placed(jobs: Iterable[list[str]], stage: str, first: int = 0) -> list[list[str]]:
    """The jobs, each in a numbered folder below that of its stage."""
    return [[*job, f"{PLACE}={stage}/{number}"] for number, job in enumerate(jobs, first)]


def _raise_failures(failures: Sequence[Exception], ran: int) -> None:
    """Say how many of the jobs that ran have failed, if any."""
    if failures:
        reason = f"{len(failures)} of {ran} jobs failed"
        requests = [e for e in failures if isinstance(e, UserError) and not isinstance(e, RunFailedError)]
        if len(requests) == ran:
            raise UserError(reason, code=requests[0].code)
        raise SweepFailedError(reason)
