"""Suggestions for the next pack of a search, by Optuna's samplers (Akiba et al. 2019).

A Gaussian process models the results (Jones et al. 1998): it tells noise from effects, and neighbours learn from one
another. If some methods lack some of the keys it is TPE (Bergstra et al. 2011), which allows that.

Eliminated trials count too, by an estimate of what they may have become. Results far below the median are raised: a
learning rate at which a trial fails would otherwise hide the differences of the good ones.

Nothing of Optuna's is stored: the study is rebuilt from the trials' records before each pack. The trials of a pack are
suggested one after another, and the samplers know of those that have no result yet, so that they differ.
"""

from __future__ import annotations

import math
import warnings
from statistics import median
from typing import TYPE_CHECKING, Any

from lora_bench.config.keys import split_override
from lora_bench.sweeps.search_space import METHOD_KEY
from lora_bench.sweeps.search_trials import estimate_final_scores

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from optuna import Study
    from optuna.samplers import BaseSampler

    from lora_bench.sweeps.search_space import SearchSpace
    from lora_bench.sweeps.search_trials import Trial

MAX_REJECTED = 10
"""Suggestions of the model that may be rejected for a pack before its other settings are drawn at random."""
MAX_REJECTED_DRAWS = 50
"""Random settings that may be rejected before the pack stays smaller."""


def suggest_pack(
    space: SearchSpace, trials: Sequence[Trial], count: int, *, seed: int, is_valid: Callable[[list[str]], bool]
) -> list[list[str]]:
    """Return up to `count` settings that are new and can train together; none if all seem to have been tried.

    The same arguments give the same settings. A method without a trial is first tried at its defaults, or at the values
    of the space that are nearest to them. The settings of a pack share the values of `space.shared_keys`.

    Args:
        space: of the search.
        trials: so far.
        count: size of the pack.
        seed: of the sampler.
        is_valid: returns whether a setting can be trained.
    """
    import optuna
    from optuna.samplers import RandomSampler

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    seed += len(trials)  # otherwise each pack would draw the same random numbers
    settings: list[list[str]] = []
    tried, defaults, shared = [trial.setting for trial in trials], _untried_defaults(space, trials), dict[str, Any]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        model = _model(space, count, seed)
        study = _study(space, trials, model)
        for sampler, max_rejected in ((model, MAX_REJECTED), (RandomSampler(seed=seed), MAX_REJECTED_DRAWS)):
            study.sampler, rejected = sampler, 0
            while len(settings) < count and rejected < max_rejected:
                study.enqueue_trial((defaults.pop(0) if defaults else {}) | shared)  # what is not in it is sampled
                suggestion = study.ask()
                setting = space.suggest(suggestion)
                if setting in tried or not is_valid(setting):
                    rejected += 1
                else:
                    settings.append(setting)
                    shared |= {key: suggestion.params[key] for key in space.shared_keys if key in suggestion.params}
                tried.append(setting)
    return settings


def _model(space: SearchSpace, count: int, seed: int) -> BaseSampler:
    """Return the sampler that learns from the trials; the first `count` are drawn at random."""
    from optuna.samplers import GPSampler, TPESampler

    if all(len(space.of_method(method)) == len(space.dimensions) for method in space.defaults):
        return GPSampler(n_startup_trials=count, seed=seed, warn_independent_sampling=False)
    # multivariate: the best learning rate depends on the rank; group: methods have different keys
    return TPESampler(n_startup_trials=count, multivariate=True, group=True, constant_liar=True, seed=seed)


def _study(space: SearchSpace, trials: Sequence[Trial], sampler: Any) -> Study:
    """Return a study that holds the trials that have ended, with their results.

    One that diverged or failed has the worst: most failures repeat, as that of a rank above a layer's width.
    """
    import optuna

    study = optuna.create_study(direction="maximize", sampler=sampler)
    ended = [trial for trial in trials if trial.has_ended or trial.status == "failed"]
    known = [(trial, parameters) for trial in ended if (parameters := space.parameters(trial.setting)) is not None]
    scores = _without_outliers(estimate_final_scores([trial for trial, _ in known]))
    for (_, parameters), score in zip(known, scores, strict=True):
        distributions = space.distributions(parameters)
        study.add_trial(optuna.create_trial(value=score, params=parameters, distributions=distributions))
    return study


def _without_outliers(values: Sequence[float]) -> list[float]:
    """Return the values, of which none is farther below the median than the best one is above it."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return [0.0] * len(values)
    lowest = 2 * median(finite) - max(finite)
    return [max(value, lowest) for value in values]


def _untried_defaults(space: SearchSpace, trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Return the parameters nearest to the defaults of each method that no trial has."""
    tried = {dict(map(split_override, trial.setting)).get(METHOD_KEY, "") for trial in trials}
    return [space.default_parameters(method) for method in space.defaults if method not in tried]
