"""Every file that a command reads, damaged in every way, against the cheapest command that reads it.

`scripts/attack.py` runs the whole product of `attacks.py`, each attack in a process of its own.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import torch

from tests.security.attacks import COMMANDS, SECRET_NAME, TARGETS, Target, World, damages_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder, cache, threads = os.getcwd(), os.environ["LORA_BENCH_CACHE"], torch.get_num_threads()
    torch.set_num_threads(1)
    attacked = World(tmp_path_factory.mktemp("attacks") / "top")
    attacked.build({target.commands[0] for target in TARGETS})
    yield attacked
    os.chdir(folder)
    torch.set_num_threads(threads)
    os.environ["LORA_BENCH_CACHE"] = cache
    del os.environ[SECRET_NAME]


@pytest.mark.parametrize(
    "target",
    TARGETS,
    ids=lambda target: target.path,
)
def test_a_damaged_file_is_refused_or_changes_nothing(world: World, target: Target) -> None:
    wrong = {}
    for damage in chosen_damages(target):
        world.restore()
        try:
            verdict = world.attack(target, damage, COMMANDS[target.commands[0]])
        except TimeoutError as error:
            verdict = str(error)
        if verdict is not None:
            wrong[damage.__name__] = verdict
    assert not wrong, "\n".join(f"{name}: {reason}" for name, reason in wrong.items())


def chosen_damages(target: Target) -> list[Callable[[Path], None]]:
    """Return the damages that the suite tries: where the command loads a model, every sixth, other ones by file.

    Over all files every damage meets a command of either kind; `scripts/attack.py` tries the rest.
    """
    damages = list(damages_of(target))
    return damages if target.commands[0].startswith("compare") else damages[TARGETS.index(target) % 6 :: 6]


def test_every_file_is_damaged_in_at_least_eight_ways() -> None:
    assert min(len(damages_of(target)) for target in TARGETS) >= 8
    assert {command for target in TARGETS for command in target.commands} == set(COMMANDS)
