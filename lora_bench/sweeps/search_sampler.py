"""Suggestions for the next pack of a search, by Optuna's TPE sampler (Bergstra et al. 2011; Akiba et al. 2019).

Nothing of Optuna's is stored: the study is rebuilt from the trials' records before each pack. The trials of a pack are
suggested one after another; the sampler takes those that have no result yet for bad ones ("constant liar", Ginsbourger
et al. 2010), so that they differ.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from lora_bench.config.keys import split_override
from lora_bench.sweeps.search_space import METHOD_KEY

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from optuna import Study

    from lora_bench.sweeps.search_space import SearchSpace
    from lora_bench.sweeps.search_trials import Trial

MAX_REJECTED = 50
"""Suggestions that may be rejected for a pack before settings are drawn at random, and then before it stays smaller."""


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
    from optuna.samplers import RandomSampler, TPESampler

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    seed += len(trials)  # otherwise each pack would draw the same random numbers
    settings: list[list[str]] = []
    tried, defaults, shared = [trial.setting for trial in trials], _untried_defaults(space, trials), dict[str, Any]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # multivariate: the best learning rate depends on the rank; group: methods have different keys
        tpe = TPESampler(n_startup_trials=count, multivariate=True, group=True, constant_liar=True, seed=seed)
        study = _study(space, trials, tpe)
        for sampler in (tpe, RandomSampler(seed=seed)):
            study.sampler, rejected = sampler, 0
            while len(settings) < count and rejected < MAX_REJECTED:
                study.enqueue_trial((defaults.pop(0) if defaults else {}) | shared)  # what is not in it is sampled
                suggestion = study.ask()
                setting = space.suggest(suggestion)
                if setting in tried or not is_valid(setting):
                    study.tell(suggestion, state=optuna.trial.TrialState.FAIL)
                    rejected += 1
                else:
                    settings.append(setting)
                    shared |= {key: suggestion.params[key] for key in space.shared_keys if key in suggestion.params}
                tried.append(setting)
    return settings


def _study(space: SearchSpace, trials: Sequence[Trial], sampler: Any) -> Study:
    """Return a study that holds the trials that have ended.

    An eliminated trial is a pruned one with its evaluations. One that diverged or failed is pruned without any, which
    counts as the worst: most failures repeat, as that of a rank above a layer's width.
    """
    import optuna
    from optuna.trial import TrialState, create_trial

    study = optuna.create_study(direction="maximize", sampler=sampler)
    for trial in trials:
        parameters = space.parameters(trial.setting)
        if parameters is None or not (trial.has_ended or trial.status == "failed"):
            continue
        has_scores = trial.status in ("done", "eliminated")
        study.add_trial(
            create_trial(
                state=TrialState.PRUNED if trial.score is None else TrialState.COMPLETE,
                value=trial.score,
                params=parameters,
                distributions=space.distributions(parameters),
                intermediate_values={int(step): value for step, value in trial.curve} if has_scores else {},
            )
        )
    return study


def _untried_defaults(space: SearchSpace, trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Return the parameters nearest to the defaults of each method that no trial has."""
    tried = {dict(map(split_override, trial.setting)).get(METHOD_KEY, "") for trial in trials}
    return [space.default_parameters(method) for method in space.defaults if method not in tried]
