"""The search sweeper: it suggests settings in packs, and trains the best one again.

trials/   settings that Optuna suggests, with one seed and without an evaluation of the reported split
repeats/  the best of them with another seed, so that the choice among them depends less on chance
final/    the best setting on the selection split with fresh seeds, scored on the reported split
"""

# No `from __future__ import annotations`: Hydra leaves plugins out of sys.modules, where dataclasses would look.
import importlib.util
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf

from lora_bench.analysis.table import Table
from lora_bench.config.build import build
from lora_bench.config.compose import compose_job
from lora_bench.config.keys import key_of
from lora_bench.config.schema import Packing, Search
from lora_bench.console.format import format_number
from lora_bench.console.stages import current_console, show_progress, stage
from lora_bench.console.text import note, sanitise
from lora_bench.errors import Code, DivergedError, RunFailedError, UserError, require
from lora_bench.hydra_plugins.lora_bench_grid_sweeper import (
    SUBDIR_KEY,
    GridSweeper,
    GridSweeperConf,
    in_subfolders,
)
from lora_bench.records import sweep_folder
from lora_bench.sweeps.search_sampler import suggest_pack
from lora_bench.sweeps.search_space import (
    METHOD_KEY,
    Choices,
    Dimension,
    Interval,
    SearchSpace,
    split_overrides,
    with_types,
)
from lora_bench.sweeps.search_trials import (
    FINAL,
    REPEATS,
    TRIALS,
    UNREPORTED,
    Trial,
    affordable,
    best_repeated,
    best_trial,
    best_trials,
    full_flops,
    of_stage,
    read_repeats,
    read_trials,
    seconds_spent,
    setting_of,
)


@dataclass
class SearchSweeperConf(GridSweeperConf):
    _target_: str = "hydra_plugins.lora_bench_search_sweeper.SearchSweeper"


ConfigStore.instance().store(group="hydra/sweeper", name="search", node=SearchSweeperConf, provider="lora_bench")


class SearchSweeper(GridSweeper):
    """A search: packs of trials until the budget is spent, the best ones once more, then the best with fresh seeds.

    The values in `params` are the space, which overrides of the command line replace by key.

    Args:
        grid: settings of `GridSweeper`; there are no variants.
    """

    def __init__(self, **grid: Any) -> None:
        super().__init__(**grid)
        self.began = datetime.now(UTC)
        self.fixed: list[str] = []
        """The overrides with one value."""
        self.identities: dict[tuple[str, ...], str] = {}
        """Of the runs of settings, so that settings that mean the same are suggested once."""

    # -- the request --

    def _combinations(self, variants: Sequence[list[Override]]) -> list[list[str]]:
        """Read and check the request: the budget, the space and each of its values; return no jobs.

        Raises:
            UserError: Optuna is not installed, the budget is missing, or the space has a wrong key or value.
        """
        assert self.config is not None
        require("search" in self.config, "hydra/sweeper", "search", "needs the settings of sweep=search")
        self.search = build(Search, self.config.search, "search")
        self.packing = build(Packing, self.config.pack, "pack")
        reason = "must be the number of trials that a search suggests at a time, not null"
        require(self.packing.size is not None, "pack.size", None, reason, "Give pack.size=6.")
        reason, remedy = "are sets of overrides, and a search has one", "Search over the keys that vary."
        require(len(variants) == 1, "hydra.sweeper.variants", None, reason, remedy, code=Code.UNSUPPORTED)
        remedy = "Install it: pip install 'lora-bench[search]'."
        is_installed = importlib.util.find_spec("optuna") is not None
        require(is_installed, "search", None, "needs the package optuna", remedy, code=Code.MISSING_PACKAGE)
        overrides = [override for override in variants[0] if override.key_or_group.split(".")[0] != "search"]
        typed = {override.key_or_group for override in overrides[len(self.params) :]}
        self.fixed, dimensions = split_overrides(overrides)
        remedy = "Give a key several values, for example adapter.rank=2,4,8."
        require(bool(dimensions), "search", None, "has no key with several values", remedy, code=Code.MISSING)
        self.space = self._space(dimensions, typed)
        if not self.config.resume:  # else they were checked when the search was started
            self._check_values(typed)
        return []

    def _space(self, dimensions: Mapping[str, Dimension], typed: set[str]) -> SearchSpace:
        """Return the space with the defaults of each method; a key of the preset that no method has is left out.

        Args:
            dimensions: by key.
            typed: keys of the command line.

        Raises:
            UserError, HydraException: a typed key does not exist.
        """
        assert self.config is not None
        assert self.hydra_context is not None
        methods = dimensions.get(METHOD_KEY)
        defaults: dict[str, dict[str, Any]] = {}
        for method in methods.texts if isinstance(methods, Choices) else ("",):
            job = [*self.fixed, *([f"{METHOD_KEY}={method}"] if method else [])]
            composed = compose_job(self.hydra_context.config_loader, self.config, job)
            choices = composed.hydra.runtime.choices
            defaults[method] = {}
            for key in dimensions:
                if key in choices:
                    defaults[method][key] = choices[key]
                elif _has_key(composed, key):
                    defaults[method][key] = OmegaConf.select(composed, key)
        existing = {}
        for key, dimension in dimensions.items():
            having = [values[key] for values in defaults.values() if key in values]
            if not having and key in typed:
                self._check(0, [*self.fixed, f"{key}={dimension.probes[0]}"])  # says what is wrong
                having = [None]
            if having:
                existing[key] = with_types(dimension, having[0])
            else:
                note(f"{key} is left out of the search: no method in it has this key")
        return SearchSpace(tuple(existing.values()), defaults)

    def _check_values(self, typed: Set[str]) -> None:
        """Check each value of the space, the other keys being at their defaults, and print the keys.

        Args:
            typed: keys of the command line, whose values are checked first.

        Raises:
            UserError: one is out of range.
        """
        settings: list[list[str]] = []
        for method in self.space.defaults:
            chosen = [f"{METHOD_KEY}={method}"] if method else []
            others = [d for d in self.space.of_method(method) if d.key != METHOD_KEY]
            settings += [chosen, *([*chosen, f"{d.key}={text}"] for d in others for text in d.probes)]
        settings.sort(key=lambda setting: typed.isdisjoint(map(key_of, setting)))
        console = current_console()
        keys = ", ".join(dimension.key for dimension in self.space.dimensions)
        console.print(sanitise(f"search over {keys}: checking"))
        with show_progress(console), stage("checking the space", total=len(settings), unit="values") as progress:
            self._check_each(((0, self._trial_job(setting)) for setting in settings), progress)
        for dimension in self.space.dimensions:
            if isinstance(dimension, Interval) and not dimension.is_log and dimension.high >= 30 * dimension.low > 0:
                note(f"{dimension.key}: tag(log,interval(…)) tries small numbers as often as large ones")

    # -- the stages --

    def _first_stage(self, jobs: list[list[str]]) -> list[list[str]]:
        """Return the first pack, or all recorded trials of a search that is resumed."""
        assert self.config is not None
        if self.config.resume:
            recorded = of_stage(sweep_folder.read(Path(self.config.hydra.sweep.dir)).jobs, TRIALS)
            settings = [setting_of(job) for job in recorded.values()]
        else:
            settings = self._suggest([])
            require(bool(settings), "search", None, "none of the settings tried can be trained", code=Code.NO_MATCH)
        return in_subfolders(map(self._trial_job, settings), TRIALS)

    def _later_stages(self, jobs: list[list[str]]) -> list[list[str]]:
        """Return the final runs of a setting of the first pack, since the best one is not known yet."""
        assert self.config is not None
        setting = self._suggest([])[0] if self.config.dry_run else []
        if self.config.dry_run:
            print("estimating the first pack and the final runs; a further pack costs as much, a repeat one run")
        return self._final_jobs(setting)

    def _work_to_come(self, jobs: Mapping[str, Sequence[str]]) -> list[float]:
        """Return the work of the trials that the budget still allows, as far as it counts them, and of later stages."""
        trials = [self.work.get(name, 0.0) for name in of_stage(jobs, TRIALS)]
        if of_stage(jobs, FINAL):
            return []
        if of_stage(jobs, REPEATS):
            return [max(trials)] * self.search.final_seeds
        further = max(0, (self.search.trials or 0) - len(trials))
        return [max(trials)] * (further + self.search.repeated + self.search.final_seeds)

    def _next_stage(self, folder: Path, jobs: dict[str, list[str]]) -> list[list[str]]:
        """Return the next pack; the repeats once the budget is spent or no new setting is left; then the final runs.

        After a pack in which all trials have failed, or all repeats have, the search stops; it can be resumed.

        Raises:
            RunFailedError: the budget is spent, and every trial or every repeat diverged.
        """
        if of_stage(jobs, FINAL):
            return []
        trials = read_trials(folder, jobs)
        if of_stage(jobs, REPEATS):
            return self._after_repeats(trials, read_repeats(folder, jobs))
        assert self.packing.size is not None
        if not any(trial.has_ended for trial in trials[-self.packing.size :]):
            return []
        settings = self._suggest(trials)
        if settings:
            self._report_progress(trials, len(settings))
            return in_subfolders(map(self._trial_job, settings), TRIALS, len(trials))
        best = best_trials(trials, max(1, self.search.repeats))
        if not best:
            raise _unfinished("no trial was trained to its end, so no setting is chosen")
        print(f"\nbest of {len(trials)} trials on the selection split: {_describe(best[0])}")
        if len(best) == 1:
            return self._final_jobs(best[0].setting)
        print(f"training the best {len(best)} again with another seed before one is chosen")
        seed = [f"seed={self._final_seeds().stop}"]
        return in_subfolders(([*self._alone(), UNREPORTED, *trial.setting, *seed] for trial in best), REPEATS)

    def _after_repeats(self, trials: Sequence[Trial], repeats: Sequence[Trial]) -> list[list[str]]:
        """Return the final runs of the trial with the best mean; none if a repeat may still end well on `resume`.

        Raises:
            RunFailedError: every repeat diverged.
        """
        if not all(repeat.has_ended for repeat in repeats):
            return []
        best = best_repeated(trials, repeats)
        if best is None:
            raise _unfinished("every repeat diverged, so no setting is chosen")
        print(f"\nbest mean of two seeds: {_describe(best)}")
        return self._final_jobs(best.setting)

    def _is_expected(self, job: Sequence[str], error: Exception) -> bool:
        """Return whether a trial or a repeat diverged, which is a result of the search."""
        is_chosen_from = any(text.startswith((f"{SUBDIR_KEY}={TRIALS}/", f"{SUBDIR_KEY}={REPEATS}/")) for text in job)
        return isinstance(error, DivergedError) and is_chosen_from

    def _conclude(self, folder: Path, table: Table) -> None:
        """Print what the trials and repeats cost, then the comparison."""
        jobs = sweep_folder.read(folder).jobs
        trials, repeats = read_trials(folder, jobs), read_repeats(folder, jobs)
        statuses = ("done", "eliminated", "diverged", "failed", "interrupted")
        counts = {status: sum(trial.status == status for trial in trials) for status in statuses}
        print(f"\n{len(trials)} trials: {', '.join(f'{count} {status}' for status, count in counts.items() if count)}")
        spent, grid = sum(trial.flops for trial in [*trials, *repeats]), self.space.grid_size * full_flops(trials)
        if grid:
            estimate = f"a grid of {self.space.grid_size} settings, about {format_number(grid, 'FLOP')}"
            print(f"training them took {format_number(spent, 'FLOP')}, {100 * spent / grid:.0f} % of {estimate}")
        super()._conclude(folder, table)

    # -- jobs --

    def _suggest(self, trials: Sequence[Trial]) -> list[list[str]]:
        """Return the settings of the next pack; none if the budget is spent or no new setting was found."""
        assert self.config is not None
        count = affordable(trials, self.search, self.packing, seconds_spent(trials, self.began))
        if count == 0:
            return []
        identities = [self._identity(trial.setting, number) for number, trial in enumerate(trials)]

        def is_valid(setting: list[str]) -> bool:
            """Return whether a setting can be trained, is not excluded, and means another run than earlier ones."""
            try:
                identity = self._identity(setting, len(identities))
            except UserError as error:
                note(f"{' '.join(setting)} is left out: {error}")
                return False
            if identity in identities or self._is_excluded(self._trial_job(setting)):
                return False
            identities.append(identity)
            return True

        with show_progress(current_console()), stage("suggesting trials"):
            return suggest_pack(self.space, trials, count, seed=int(self.config.seed), is_valid=is_valid)

    def _identity(self, setting: Sequence[str], number: int) -> str:
        """Return a text that is equal for settings that mean the same run; a `UserError` if it cannot be trained.

        Args:
            setting: of a trial.
            number: of the trial; its config is kept, so that it is composed once.
        """
        key = tuple(setting)
        if key not in self.identities:
            (job,) = in_subfolders([self._trial_job(setting)], TRIALS, number)
            _, self.identities[key] = self._check(number, job)
        return self.identities[key]

    def _trial_job(self, setting: Sequence[str]) -> list[str]:
        """Return the overrides of a trial: the reported splits are not scored."""
        return [*self.fixed, UNREPORTED, *setting]

    def _final_jobs(self, setting: Sequence[str]) -> list[list[str]]:
        """Return the final runs of a setting, one for each of `search.final_seeds`."""
        return in_subfolders(([*self._alone(), *setting, f"seed={seed}"] for seed in self._final_seeds()), FINAL)

    def _final_seeds(self) -> range:
        """Return the seeds of the final runs; the one after them is that of the repeats."""
        assert self.config is not None
        return range(self.config.seed + 1, self.config.seed + 1 + self.search.final_seeds)

    def _alone(self) -> list[str]:
        """Return the fixed overrides without a seed, for jobs of which none is eliminated."""
        fixed = [text for text in self.fixed if key_of(text) not in ("seed", "pack.size", "pack.halving")]
        return [*fixed, "pack.size=null", "pack.halving=false"]

    def _report_progress(self, trials: Sequence[Trial], count: int) -> None:
        """Print which trials come next, and the best one so far."""
        limit = f" of {self.search.trials}" if self.search.trials else ""
        best = best_trial(trials)
        so_far = f"; best so far {_describe(best)}" if best else ""
        print(f"\ntrials {len(trials) + 1} to {len(trials) + count}{limit}{so_far}")


def _describe(trial: Trial) -> str:
    """Return the setting of a done trial with its score: `adapter.rank=8 optimizer.lr=0.002 (mcc 0.5421)`."""
    return f"{' '.join(trial.setting)} ({trial.metric} {trial.score:.4f})"


def _unfinished(reason: str) -> RunFailedError:
    return RunFailedError(reason, key="search", remedy="Search smaller learning rates.", code=Code.UNFINISHED)


def _has_key(config: Any, key: str) -> bool:
    """Return whether a config has a dotted key, whatever its value."""
    parent, _, name = key.rpartition(".")
    with suppress(HydraException, ValueError):
        node = OmegaConf.select(config, parent) if parent else config
        return OmegaConf.is_dict(node) and name in node
    return False
