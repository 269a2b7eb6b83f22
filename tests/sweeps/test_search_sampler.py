"""Suggestions: defaults first, packs that can train together, no setting twice, the same after a restart."""

from __future__ import annotations

from hydra.core.override_parser.overrides_parser import OverridesParser

from lora_bench.sweeps.search_sampler import suggest_pack
from lora_bench.sweeps.search_space import SearchSpace, split_overrides
from lora_bench.sweeps.search_trials import Trial

DEFAULTS = {"optimizer.lr": 5e-4, "adapter.layers": "all", "trainer.batch_size": 32}


def space(*texts: str, **defaults: dict[str, object]) -> SearchSpace:
    _, dimensions = split_overrides(OverridesParser.create().parse_overrides(list(texts)))
    return SearchSpace(tuple(dimensions.values()), defaults or {"": DEFAULTS})


LR = "optimizer.lr=tag(log,interval(1e-4,1e-2))"


def suggest(of: SearchSpace, trials: list[Trial], count: int, seed: int = 0) -> list[list[str]]:
    return suggest_pack(of, trials, count, seed=seed, is_valid=lambda setting: True)


def done(setting: list[str]) -> Trial:
    """A trial that is the better, the nearer its learning rate is to 2e-3."""
    rate = float(setting[-1].partition("=")[2])
    return Trial(setting, "done", 0.0, -abs(rate - 2e-3), curve=((1, 0.0),))


def test_each_method_is_tried_at_its_default_first_and_the_rest_differs() -> None:
    of = space("adapter=lora,dora", LR, lora={**DEFAULTS, "adapter": "lora"}, dora={"optimizer.lr": 0.5})
    first = suggest(of, [], 4)
    assert first[:2] == [["adapter=lora", "optimizer.lr=0.0005"], ["adapter=dora", "optimizer.lr=0.01"]]
    assert len({tuple(setting) for setting in first}) == 4
    assert suggest(of, [], 4) == first
    assert suggest(of, [], 4, seed=1) != first


def test_later_packs_search_where_results_are_good() -> None:
    of, trials = space(LR), list[Trial]()
    for _ in range(6):
        trials += map(done, suggest(of, trials, 4))
    trials += [Trial(["optimizer.lr=0.009"], "diverged"), Trial(["optimizer.lr=0.008"], "failed")]
    trials.append(Trial(["optimizer.lr=0.5"], "done", 9.0, 9.0))  # not in the space, so it is not considered
    rates = [float(setting[-1].partition("=")[2]) for setting in suggest(of, trials, 8)]
    assert sum(1e-3 < rate < 4e-3 for rate in rates) >= 5  # a third of them by chance
    assert len({trial.setting[-1] for trial in trials}) == len(trials)


def test_trials_of_a_pack_share_what_they_have_to() -> None:
    of = space("adapter.layers=all,'top:1'", "trainer.batch_size=8,16,32", LR)
    for seed in range(3):
        settings = suggest(of, [done(["adapter.layers=all", "trainer.batch_size=32", "optimizer.lr=0.001"])], 3, seed)
        assert len({tuple(setting[:2]) for setting in settings}) == 1
        assert len({setting[2] for setting in settings}) == 3


def test_a_small_space_is_tried_whole_and_then_ends() -> None:
    of, trials = space("trainer.batch_size=8,16", "optimizer.lr=1e-3,1e-2,1e-1"), list[Trial]()
    while settings := suggest(of, trials, 4):
        trials += map(done, settings)
    assert len({tuple(trial.setting) for trial in trials}) == len(trials) == 6


def test_what_cannot_be_trained_is_not_suggested() -> None:
    of = space("optimizer.lr=1e-3,1e-2,1e-1")
    settings = suggest_pack(of, [], 3, seed=0, is_valid=lambda setting: setting != ["optimizer.lr=0.01"])
    assert sorted(settings) == [["optimizer.lr=0.001"], ["optimizer.lr=0.1"]]
