"""Checkpoints are whole or not there, and training goes on from one to the last bit."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from lora_bench.errors import Code
from lora_bench.training.checkpoint import MAX_CHECKPOINTS, Checkpoints
from tests.adapters.tools import adapter, assert_close, optimizer, pack, tables, trainer
from tests.command_line import refuses
from tests.training.tools import fit, prepare

if TYPE_CHECKING:
    from pathlib import Path

    from lora_bench.adapters.pack.pack import Pack

STATE = {"a/x": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2], dtype=torch.uint8)}


def saved(folder: Path, *steps: int) -> Checkpoints:
    checkpoints = Checkpoints(folder / "checkpoints")
    for step in steps:
        checkpoints.save(step, {**STATE, "step": torch.tensor(step)}, {"n": step})
    return checkpoints


# -- on disk --


def test_the_newest_comes_back_and_few_are_kept(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 10, 20, 100, 30)
    checkpoint = checkpoints.newest()
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.metadata) == (100, {"n": 100})
    assert_close({name: checkpoint.tensors[name] for name in STATE}, STATE, atol=0)
    assert checkpoint.tensors["b"].dtype == torch.uint8
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000030", "step-00000100"]
    assert MAX_CHECKPOINTS == 2
    checkpoints.clear()
    assert list(tmp_path.iterdir()) == []


def test_without_any_there_is_none(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "checkpoints").newest() is None


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "absent"])
def test_a_damaged_one_is_passed_over_and_named(tmp_path: Path, file: str, damage: str) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    path = tmp_path / "checkpoints" / "step-00000002" / file
    content = bytearray(path.read_bytes())
    if damage == "absent":
        path.unlink()
    elif damage == "flipped":
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    else:
        path.write_bytes(content[: 0 if damage == "empty" else len(content) - 1])
    checkpoint = checkpoints.newest()
    assert checkpoint is not None
    assert checkpoint.step == 1
    assert [trouble.partition(":")[0] for trouble in checkpoints.damaged] == ["step-00000002"]


def test_what_was_being_written_does_not_count(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    temporary = tmp_path / "checkpoints" / ".step-00000002.part"
    temporary.mkdir()
    (temporary / "tensors.safetensors").write_bytes(b"half")
    checkpoint = checkpoints.newest()
    assert checkpoint is not None
    assert checkpoint.step == 1
    checkpoints.save(2, STATE, {})
    assert not temporary.exists()


def test_a_write_that_fails_leaves_the_older_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = saved(tmp_path, 1)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with refuses(Code.UNWRITABLE) as caught:
        checkpoints.save(2, STATE, {})
    assert caught.value.file == tmp_path / "checkpoints/step-00000002"
    assert "No space left on device" in str(caught.value)
    newest = checkpoints.newest()
    assert newest is not None
    assert newest.step == 1
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


# -- going on --


class KilledError(Exception):
    """Stands for a kill in mid-training."""


class Killer:
    """A watcher that ends the process, so to say, after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def stepped(self, step: int, losses: object, pairs: int) -> None:
        if step == self.step:
            raise KilledError

    def evaluated(self, member: int, line: dict[str, Any]) -> None:
        pass


ASA = ("use_asa=true", "asa_target_subspaces=10", "init_warmup=1", "final_warmup=12", "mask_interval=4")
CASES = {
    "lora": (("lora", "dropout=0.3"),),
    "dora": (("dora",),),
    "pissa": (("pissa",),),
    "enhanced": (("enhanced", "rank=4", "allocation=gradient"),),
    "loftq": (("loftq",),),
    "vera": (("vera",),),
    "adalora": (("adalora", "interval=1", "dropout=0.2"),),
    "full": (("full",),),
    "adamss": (("peft_adamss", "rank=16", *(f"settings.{setting}" for setting in ASA)),),
    "pack": (("lora", "rank=2", "dropout=0.5"), ("adalora", "interval=2"), ("lora", "allocation=sensitivity")),
}


MOMENTS = ((5, 0.9), (6, 0.0), (11, 0.9))
"""The step before which a training is killed, and its weight average."""
OFTEN = ("lora", "pack")
"""Cases that are killed at every moment; the others are so in the matrix alone."""


def marks(case: str, moment: tuple[int, float]) -> list[pytest.MarkDecorator]:
    return [] if case in OFTEN or moment == MOMENTS[-1] else [pytest.mark.matrix]


@pytest.mark.parametrize(
    ("case", "killed", "average"),
    [pytest.param(case, *moment, marks=marks(case, moment)) for case in CASES for moment in MOMENTS],
)
def test_training_goes_on_bit_for_bit(case: str, killed: int, average: float, tmp_path: Path) -> None:
    every = 14 if case == "adamss" else 3  # the weights to compare are those of the best evaluation
    settings = trainer(14, eval_every=every, checkpoint_every=2, average=average)

    def make() -> Pack:
        return pack("bert", *((adapter(*method), seed) for seed, method in enumerate(CASES[case])))

    def run(a_pack: Pack, **options: Any) -> tuple[list[Any], list[Any]]:
        learned, selection = tables(a_pack.backbone)
        torch.manual_seed(7)
        if options.get("resumed_from") is None:
            prepare(a_pack, settings, learned)
        outcomes = fit(a_pack, [optimizer(3e-3)] * a_pack.size, settings, learned, selection, **options)
        return outcomes, [a_pack.state(k) for k in range(a_pack.size)]

    expected, weights = run(make())
    checkpoints = [Checkpoints(tmp_path / str(k)) for k in range(len(CASES[case]))]
    with pytest.raises(KilledError):
        run(make(), checkpoints=checkpoints, watcher=Killer(killed))
    checkpoints_to_resume = [store.newest() for store in checkpoints]
    again = make()
    for k, checkpoint in enumerate(checkpoints_to_resume):
        assert checkpoint is not None
        assert checkpoint.step == (killed - 1) // 2 * 2
        if checkpoint.metadata["ranks"]:
            again.set_ranks(k, checkpoint.metadata["ranks"])
    outcomes, restored_weights = run(again, resumed_from=checkpoints_to_resume)
    for one, other in zip(weights, restored_weights, strict=True):
        assert_close(one, other, atol=0)
    for one, other in zip(expected, outcomes, strict=True):
        assert one.best is not None
        assert {**one.best, "seconds": 0} == {**other.best, "seconds": 0}
        for name in ("status", "steps", "pairs", "without_gain", "at_target"):
            assert getattr(one, name) == getattr(other, name)


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    def run(method: tuple[str, ...], **options: Any) -> None:
        a_pack = pack("bert", (adapter(*method), 0))
        fit(a_pack, [optimizer()], trainer(4, checkpoint_every=2), *tables(a_pack.backbone), **options)

    checkpoints = Checkpoints(tmp_path / "checkpoints")
    run(("lora", "rank=2"), checkpoints=[checkpoints])
    checkpoint = checkpoints.newest()
    assert checkpoint is not None
    for other in (("lora", "rank=3"), ("lora", "rank=2", "target_modules=qv"), ("adalora", "rank=2")):
        with refuses(Code.MISMATCH):
            run(other, resumed_from=[checkpoint])


def test_a_member_that_version_0_1_calls_stopped_is_eliminated(tmp_path: Path) -> None:
    def run(**options: Any) -> str:
        made = pack("bert", (adapter("lora", "rank=2"), 0))
        (progress,) = fit(made, [optimizer()], trainer(4, checkpoint_every=2), *tables(made.backbone), **options)
        return progress.status

    checkpoints = Checkpoints(tmp_path / "checkpoints")
    run(checkpoints=[checkpoints])
    checkpoint = checkpoints.newest(2)
    assert checkpoint is not None
    checkpoint.metadata["outcome"]["status"] = "stopped"
    del checkpoint.metadata["outcome"]["at_target"]
    assert run(resumed_from=[checkpoint]) == "eliminated"


def test_state_is_json_and_safetensors_alone(tmp_path: Path) -> None:
    saved(tmp_path, 3)
    folder = tmp_path / "checkpoints" / "step-00000003"
    assert {p.name for p in folder.iterdir()} == {"manifest.json", "state.json", "tensors.safetensors"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {name: entry["bytes"] for name, entry in manifest.items()} == {
        name: (folder / name).stat().st_size for name in manifest
    }


def test_facts_of_the_run_go_along(tmp_path: Path) -> None:
    checkpoints = replace(Checkpoints(tmp_path / "checkpoints"), metadata={"preparation": {"seconds": 1.5}})
    checkpoints.save(1, STATE, {"n": 1})
    checkpoint = checkpoints.newest()
    assert checkpoint is not None
    assert checkpoint.metadata == {"preparation": {"seconds": 1.5}, "n": 1}
