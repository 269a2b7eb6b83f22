"""Random overrides, data files and adapter files: done or refused, and never a traceback.

A few examples of each here; `scripts/fuzz` runs the whole bar.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, save_file

from lora_bench import train
from lora_bench.adapters.peft import files
from lora_bench.config.build import build
from lora_bench.errors import Code, UserError
from lora_bench.run.loaded_data import LoadedData
from lora_bench.run.settings import Experiment
from lora_bench.training import checkpoint
from lora_bench.training.checkpoint import Checkpoints
from lora_bench.training.member_run import MemberProgress, MemberRun, Schedule
from lora_bench.training.optim import make_optimizer
from lora_bench.training.training_state import gather, restore
from lora_bench.training.weight_averaging import WeightAverage
from tests.command_line import lora_bench, toy_run
from tests.training.test_loop import Make, optimizer, packed, spy

if TYPE_CHECKING:
    from collections.abc import Iterator

HEADER = b"question1\tquestion2\tlabel\n"
KEYS = ["adapter.rank", "adapter.alpha", "adapter.dropout", "adapter.target_modules", "adapter.layers", "adapter.init"]
KEYS += ["adapter", "model", "data", "trainer", "metric", "optimizer", "sweep", "seed", "dry_run", "optimizer.lr"]
KEYS += ["data.text_columns", "data.max_length", "data.selection_size", "trainer.epochs", "trainer.batch_size"]
KEYS += ["trainer.precision", "model.random", "model.path", "hydra.job.name", "hydra.callbacks", "adapter.allocation"]
VALUES = [
    "0",
    "-3",
    "2.5",
    "nan",
    "inf",
    "1e400",
    "null",
    "true",
    "''",
    "lora",
    "[1,2]",
    "{a:1}",
    "{_target_:os.abort}",
]
VALUES += ["${seed}", "${adapter.rank}", "${nothing}", "${oc.env:HOME}", "${now:%Y}", "9" * 40, "[['.*=3']]", "???"]
words = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=12)
strings = st.one_of(
    st.builds(
        "{}{}={}".format,
        st.sampled_from(["", "", "+", "++", "~"]),
        st.one_of(st.sampled_from(KEYS), st.sampled_from(KEYS), words),
        st.one_of(st.sampled_from(VALUES), words, st.integers().map(str), st.floats().map(str)),
    ),
    words,
).filter(lambda text: not text.startswith("-"))


def examples(name: str, few: int) -> Any:
    """Settings for so many examples, or for as many as the environment's LORA_BENCH_FUZZ_<NAME> says."""
    number = int(os.environ.get(f"LORA_BENCH_FUZZ_{name}", few))
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=number, deadline=None, suppress_health_check=checks, database=None)


def done_or_refused(*arguments: str) -> None:
    answer = lora_bench(*arguments)
    assert answer.code == (0 if answer.error is None else 2), answer
    assert "Traceback (most recent" not in answer.out + answer.err
    assert answer.code == 0 or answer.err.count("\nlora-bench: ") + answer.err.startswith("lora-bench: ") == 1, answer


def test_random_overrides_are_taken_or_refused(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the whole command, up to the experiment built; it is not trained."""
    monkeypatch.setattr(train, "train", lambda job, **_: Experiment.build(job.cfg))

    @given(strings)
    @example("+=")
    @example("metric=[['.*=3']]")
    @example("model.path=-3")
    @examples("OVERRIDES", 40)
    def check(override: str) -> None:
        done_or_refused("train", "model=tiny_bert", "data=toy", override)

    check()


rows = st.lists(st.tuples(words, words, st.sampled_from(["0", "1", "2", "", "x"])), max_size=12)
damage = st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=3)), max_size=3)


def test_random_data_files_are_read_or_refused(in_tmp: Path) -> None:
    """The readers and the cut into splits, with what the command would catch and nothing else."""
    from lora_bench.config.build import build_data
    from tests.helpers import composed

    Path("validation.tsv").write_bytes(HEADER + b"a\tb\t0\nc\td\t1\n")
    settings_by_size = {
        size: build_data(composed("data=pairs", "data.path=.", f"data.selection_size={size}").data) for size in (0.2, 2)
    }

    @given(st.sampled_from([".tsv", ".csv", ".jsonl", ".parquet"]), rows, damage, st.sampled_from([0.2, 2]))
    @examples("DATA", 60)
    def check(ending: str, table: list[tuple[str, str, str]], bytes_at: Any, size: float) -> None:
        separator = "," if ending == ".csv" else "\t"
        content = bytearray(HEADER.replace(b"\t", separator.encode()))
        content += "".join(separator.join(row) + "\n" for row in table).encode()
        content = content if ending not in (".jsonl", ".parquet") else bytearray(valid(ending))
        for offset, put in bytes_at:
            content[offset : offset + len(put)] = put
        for old in Path().glob("train.*"):
            old.unlink()
        Path("train" + ending).write_bytes(content)
        try:
            loaded = LoadedData.load(settings_by_size[size])
        except UserError as error:
            assert "\n" not in str(error)  # noqa: PT017
            return
        assert loaded.described["rows"]["train"] == len(loaded.splits["train"]) >= 1

    check()


def valid(ending: str) -> bytes:
    import io

    import pyarrow as pa
    from pyarrow import parquet

    columns = {"question1": ["a", "b", "c"] * 4, "question2": ["d", "e", "f"] * 4, "label": [0, 1, 1] * 4}
    if ending == ".parquet":
        sink = io.BytesIO()
        parquet.write_table(pa.table(columns), sink)
        return sink.getvalue()
    return b'{"question1": "a", "question2": "b", "label": 1}\n' * 6


mutations = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4)


def mutated(original: bytes, changes: Any, cut: float | None) -> bytes:
    content = bytearray(original)
    for offset, value in changes:
        # half of the places lie in the header, where a change does more than to a weight
        content[int(offset * (len(content) - 1)) if value % 2 else int(offset * min(999, len(content) - 1))] = value
    return bytes(content if cut is None else content[: int(cut * len(content))])


def test_mutated_adapters_are_loaded_as_they_are_or_refused(in_tmp: Path, backbone: Make) -> None:
    pack = packed(backbone(), spy())
    files.save(Path("adapter"), pack, 0, "")
    path = Path("adapter") / files.TENSORS
    original = path.read_bytes()

    @given(mutations, st.one_of(st.none(), st.none(), st.floats(0, 1)))
    @examples("ADAPTERS", 20)
    def check(changes: Any, cut: float | None) -> None:
        path.write_bytes(mutated(original, changes, cut))
        try:
            files.load(Path("adapter"), pack, 0)
        except UserError as error:
            assert (error.code, error.file) == (Code.DAMAGED, path)  # noqa: PT017
            return
        with safe_open(path, "numpy") as file:  # another reader's opinion
            for name, tensor in files._saved(pack, 0).items():
                np.testing.assert_array_equal(tensor.detach().numpy(), file.get_tensor(name))
                assert torch.isfinite(tensor).all()

    check()


def test_mutated_checkpoints_are_passed_over(in_tmp: Path) -> None:
    written = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.uint8)}
    Checkpoints(Path("checkpoints")).save(7, written, {"fact": [1, None]})
    files = {path: path.read_bytes() for path in Path("checkpoints/step-00000007").iterdir()}

    @given(st.sampled_from(sorted(files)), mutations, st.one_of(st.none(), st.floats(0, 1)))
    @examples("CHECKPOINTS", 40)
    def check(path: Path, changes: Any, cut: float | None) -> None:
        for file, content in files.items():
            file.write_bytes(content)
        path.write_bytes(mutated(files[path], changes, cut))
        checkpoints = Checkpoints(Path("checkpoints"))
        newest = checkpoints.newest()
        if newest is None:
            assert checkpoints.damaged
            return
        assert (newest.step, newest.facts) == (7, {"fact": [1, None]})
        assert all(torch.equal(newest.tensors[name], tensor) for name, tensor in written.items())

    check()


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_mutated_checkpoints_with_a_manifest_of_their_own_are_taken_or_refused(
    method: str, in_tmp: Path, backbone: Make
) -> None:
    """The manifests are rewritten too, so that every hash is right and only the content is wrong."""
    state = trained(backbone, method)
    Checkpoints(Path("checkpoints")).save(7, *gather(state))
    folder = Path("checkpoints/step-00000007")
    files = {path: path.read_bytes() for path in folder.iterdir()}
    restore(state, checkpoint._read(folder))  # as it is, it fits
    strange = st.one_of(st.none(), st.integers(-3, 10**30), st.floats(), st.sampled_from(["x", [], {}, [{}], {"0": 1}]))

    @given(st.sampled_from(["bytes", "facts", "tensors"]), mutations, st.data())
    @examples("MANIFESTS", 20)
    def check(target: str, changes: Any, data: st.DataObject) -> None:
        for file, content in files.items():
            file.write_bytes(content)
        tensors, facts = folder / "tensors.safetensors", folder / "state.json"
        if target == "bytes":
            path = data.draw(st.sampled_from([tensors, facts]))
            path.write_bytes(mutated(files[path], changes, None))
        elif target == "facts":
            values = json.loads(files[facts])
            node, key = data.draw(st.sampled_from(list(positions(values))))
            if data.draw(st.booleans()):
                del node[key]
            else:
                node[key] = data.draw(strange)
            facts.write_text(json.dumps(values))
        else:
            held = load(files[tensors])
            name = data.draw(st.sampled_from(sorted(held)))
            tensor = held.pop(name)
            name = data.draw(st.sampled_from([name, name, name + "x", "0/adamw/99/exp_avg", "0/mean/x", "rng/cuda"]))
            shape = data.draw(st.sampled_from([(), (0,), (3,), (2, 2), tuple(tensor.shape)]))
            if data.draw(st.booleans()):
                dtypes = st.sampled_from([torch.float32, torch.float16, torch.int64, torch.uint8, torch.bool])
                held[name] = torch.ones(shape, dtype=data.draw(dtypes))
            save_file(held, tensors)
        manifest = {path.name: checkpoint._describe(path) for path in (tensors, facts)}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        checkpoints = Checkpoints(Path("checkpoints"))
        newest = checkpoints.newest()
        if newest is None:
            assert checkpoints.damaged
            return
        try:
            restore(state, newest)
        except UserError as error:
            assert error.code == Code.MISMATCH  # noqa: PT017
            return
        step(state)  # what was taken can be trained on
        gather(state)

    check()


def test_mutated_records_are_read_or_refused(in_tmp: Path) -> None:
    """`run.json` and `sweep.json`, by bytes and by value, against every command that reads them."""
    assert lora_bench("train", *toy_run("hydra.run.dir=runs/a")).code == 0
    assert lora_bench("train", "-m", *toy_run("hydra.sweep.dir=sweep"), "seed=0,1").code == 0
    shutil.rmtree("sweep/1")
    Path("pairs.tsv").write_text("question1\tquestion2\na\tb\n")
    shutil.copytree(in_tmp, in_tmp / "whole")
    strange = st.sampled_from([None, True, -1, 10**400, float("nan"), 1e300, "", "x" * 9999, "\ud800", [], {}, [{}]])
    commands = {
        "runs/a/run.json": [
            ("compare", "runs", "--html", "page.html"),
            ("compare", "runs", "sweep", "--by", "adapter.rank"),
            ("predict", "run=runs/a", "input=pairs.tsv", "output=scores.tsv"),
            ("train", "resume=runs/a"),
        ],
        "sweep/sweep.json": [("train", "-m", "resume=sweep"), ("compare", "sweep")],
    }

    @given(st.sampled_from(sorted(commands)), st.one_of(st.none(), mutations), st.data())
    @examples("RECORDS", 15)
    def check(name: str, changes: Any, data: st.DataObject) -> None:
        for folder in ("runs", "sweep"):
            shutil.rmtree(folder)
            shutil.copytree(Path("whole", folder), folder)
        path = Path(name)
        if changes is not None:
            path.write_bytes(mutated(path.read_bytes(), changes, None))
        else:
            content = json.loads(path.read_text())
            node, key = data.draw(st.sampled_from(list(positions(content))))
            if data.draw(st.booleans()):
                del node[key]
            else:
                node[key] = data.draw(strange)
            path.write_text(json.dumps(content))
        done_or_refused(*data.draw(st.sampled_from(commands[name])))

    check()


def trained(backbone: Make, method: str) -> MemberRun:
    """A member after one step, its mean and its best weights kept."""
    from lora_bench.adapters.methods import method_class
    from tests.helpers import composed

    adapter = build(method_class(method), composed(f"adapter={method}").adapter, "adapter")
    pack = packed(backbone(), adapter)
    member = MemberRun(
        0,
        pack,
        optimizer(),
        make_optimizer(optimizer(), pack, 0),
        WeightAverage(pack.trainable(0).values()),
        Schedule(10, 10, 10),
        MemberProgress(state=pack.state(0)),
        [0],
    )
    step(member)
    member.average.update()
    return member


def step(member: MemberRun) -> None:
    for p in member.pack.trainable(0).values():
        p.grad = torch.ones_like(p)
    member.optimizer.step()
    for p, mean in member.average.means.items():
        mean.lerp_(p.float(), 0.5)


def positions(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a JSON value, as a container and the key in it."""
    for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
        yield node, key
        if isinstance(value, dict | list):
            yield from positions(value)
