"""Keys that distinguish the rows of a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_bench.analysis.summary import summarise
from tests.test_compare import keys, make, values

if TYPE_CHECKING:
    from pathlib import Path


def test_a_key_that_only_some_runs_of_a_type_have_distinguishes_them(tmp_path: Path) -> None:
    """One value among trained runs, and none in the others, is a difference; a type without the key is not."""
    make(tmp_path / "a", 0.5, config={"trainer.extra": 1})
    make(tmp_path / "b", 0.6)
    table = summarise([tmp_path])
    assert keys(table) == ["trainer.extra"]
    assert values(table) == [(None,), (1,)]


def test_a_key_that_a_whole_type_of_runs_lacks_does_not(tmp_path: Path) -> None:
    prompt = {"model": None, "adapter": None, "prompt": "zero_shot"}
    make(tmp_path / "a", 0.5, config={"trainer.extra": 1})
    make(tmp_path / "b", 0.6, config={"trainer.extra": 1}, choices={"adapter": "dora"})
    make(tmp_path / "c", 0.4, config={"llm.model": "m"}, choices=prompt)
    table = summarise([tmp_path])
    assert "adapter" in keys(table)
    assert "trainer.extra" not in keys(table)
    assert len(table.rows) == 3


def test_any_classifier_is_reported_under_its_own_name(tmp_path: Path) -> None:
    for i, (choice, config) in enumerate(
        [
            ("auto", {"model.family": "auto", "model.hub_id": "org/some-bert", "model.path": None}),
            ("auto", {"model.family": "auto", "model.hub_id": None, "model.path": "/models/tiny-llama/"}),
            ("deberta", {"model.family": "auto", "model.hub_id": "microsoft/deberta", "model.path": "/models/other"}),
            ("deberta", {"model.family": "auto", "model.hub_id": "microsoft/deberta", "model.path": None}),
            ("roberta", {"model.family": "bert", "model.hub_id": None, "model.path": "/models/mine"}),
        ]
    ):
        make(tmp_path / str(i), 0.5, config=config, choices={"model": choice})
    table = summarise([tmp_path])
    assert keys(table)[0] == "model"
    assert {row[0] for row in values(table)} == {"some-bert", "tiny-llama", "other", "deberta", "roberta"}


def test_seeds_that_were_computed_in_different_ways_are_one_setting(tmp_path: Path) -> None:
    for seed, (threads, size) in enumerate([(1, 128), (1, None), (None, 64)]):
        computed = {"trainer.threads": threads, "trainer.eval_batch_size": size}
        made = make(tmp_path / str(seed), 0.5 + seed / 100, config={"seed": seed, **computed})
        made.update(environment={**made.record["environment"], "precision": "fp32" if seed else "bf16"})
    table = summarise([tmp_path])
    assert [row.n for row in table.rows] == [3]
    assert [note for note in table.notes if "trainer.eval_batch_size, trainer.threads, environment.precision" in note]
    assert sorted(row.n for row in summarise([tmp_path], by="trainer.threads").rows) == [1, 2]


def test_one_seed_that_was_computed_in_different_ways_is_compared(tmp_path: Path) -> None:
    for i, threads in enumerate([1, 2, 1, 2]):
        make(tmp_path / str(i), 0.5, config={"seed": i // 2, "trainer.threads": threads, "trainer.eval_batch_size": i})
    table = summarise([tmp_path])
    assert keys(table) == ["trainer.threads", "trainer.eval_batch_size"]
    for i, threads in enumerate([1, 2]):
        make(tmp_path / "apart" / str(i), 0.5, config={"seed": i, "trainer.threads": threads, "trainer.precision": i})
    assert keys(summarise([tmp_path / "apart"])) == ["trainer.precision"]


def test_only_the_setting_that_is_compared_is_split_by_how_it_was_computed(tmp_path: Path) -> None:
    def run(name: str, seed: int, threads: int, adapter: str, status: str = "done") -> None:
        config = {"seed": seed, "trainer.threads": threads}
        make(tmp_path / name, 0.5, choices={"adapter": adapter}, config=config, status=status)

    for seed, threads in enumerate((1, 1, 2)):
        run(f"dora{seed}", seed, threads, "dora")
    run("failed", 0, 2, "dora", "failed")
    run("running", 1, 2, "dora", "running")
    table = summarise([tmp_path])
    assert (keys(table), [row.n for row in table.rows]) == (["model", "adapter", "data"], [3])
    for seed, threads in ((0, 1), (0, 2), (1, 1)):
        run(f"lora{seed}{threads}", seed, threads, "lora")
    table = summarise([tmp_path])
    rows = {(row.keys["adapter"], row.keys.get("trainer.threads")): row.n for row in table.rows}
    assert rows == {("dora", None): 3, ("lora", 1): 2, ("lora", 2): 1}
    assert any("seeds of one row differ in trainer.threads" in note for note in table.notes)
    assert {row.n for row in summarise([tmp_path], by="trainer.threads").rows if row.chosen} == {2, 1}


def test_the_same_data_and_backbone_in_other_folders_are_one_setting(tmp_path: Path) -> None:
    def run(name: str, seed: int, data: str, weights: str | None = "a1") -> None:
        paths = {"data.path": f"/{name}/pairs", "model.path": f"/{name}/weights"}
        sections = {"data": {"fingerprint": {"train": data, "validation": "v"}}}
        made = make(tmp_path / name, 0.5, config={"seed": seed, **paths}, **sections)
        made.update(environment={**made.record["environment"], "backbone_sha256": weights})

    run("laptop", 0, "t")
    run("server", 1, "t")
    (row,) = summarise([tmp_path]).rows
    assert row.n == 2
    assert len(summarise([tmp_path], where="data.path=/server/pairs").rows) == 1
    run("edited", 2, "other")
    run("unknown", 3, "t", None)
    run("retrained", 4, "t", "b2")
    table = summarise([tmp_path])
    assert sorted(row.n for row in table.rows) == [1, 1, 1, 2]
    assert set(keys(table)) >= {"data.path", "model.path"}
