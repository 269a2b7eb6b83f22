"""On a GPU: every method with and without CUDA graphs, packs, resumed runs."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_bench.training.cuda_graphs import Graphs
from tests.adapters.tools import OWN_METHODS
from tests.command_line import at_step, lora_bench, signalled, toy_run

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.usefixtures("in_tmp"),
]

ASKED = toy_run(
    "trainer.device=cuda",
    "trainer.max_steps=16",
    "trainer.epochs=9",
    "trainer.batch_size=8",
    "trainer.eval_every=8",
    "data.train_rows=48",
    "adapter.dropout=0.1",
)


def arguments_of(method: str, *overrides: str) -> list[str]:
    """A run of the method; dropout where it knows of one."""
    plain = method in ("full", "head_only", "bitfit")
    return [f"adapter={method}", *(o for o in ASKED if not (plain and "dropout" in o)), *overrides]


def train(folder: str, *overrides: str) -> dict[str, torch.Tensor]:
    answer = lora_bench("train", *overrides, f"hydra.run.dir={folder}")
    assert answer.code == 0, answer
    return trained(folder)


def trained(folder: str) -> dict[str, torch.Tensor]:
    files = sorted((Path(folder) / "adapter").glob("*.safetensors")) or sorted(Path(folder).glob("**/*.safetensors"))
    assert files
    return {f"{file.name}/{name}": tensor.float() for file in files for name, tensor in load_file(file).items()}


def assert_alike(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], atol: float) -> None:
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=atol, msg=name)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Return for each shape that came twice whether it could be recorded."""
    replayed: list[bool] = []
    record = Graphs._record

    def noted(*arguments: object) -> object:
        graph = record(*arguments)  # type: ignore[arg-type]
        replayed.append(graph is not None)
        return graph

    monkeypatch.setattr(Graphs, "_record", noted)
    return replayed


def launch_all(patch: pytest.MonkeyPatch) -> None:
    """Record nothing. Batches are padded alike, so dropout draws the same."""
    patch.setattr(Graphs, "_record", lambda *_: None)


@pytest.mark.parametrize("method", OWN_METHODS)
def test_a_recorded_pass_learns_what_a_launched_one_learns(
    method: str, recorded: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_graphs = train("graphs", *arguments_of(method))
    assert recorded
    assert all(recorded)
    launch_all(monkeypatch)
    assert_alike(with_graphs, train("launched", *arguments_of(method)), 1e-5)


@pytest.mark.parametrize("model", ["tiny_roberta", "tiny_t5", "tiny_t5 model.form=encoder"])
def test_of_every_family(model: str, recorded: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    family = [f"model={model.split()[0]}", *model.split()[1:]]
    overrides = [o for o in arguments_of("lora") if not o.startswith("model=")]
    with_graphs = train("graphs", *overrides, *family)
    assert all(recorded)
    launch_all(monkeypatch)
    assert_alike(with_graphs, train("launched", *overrides, *family), 1e-5)


def test_a_cpu_learns_the_same() -> None:
    plain = [o for o in arguments_of("lora") if "dropout" not in o]
    there = [o for o in plain if "device" not in o]
    assert_alike(train("gpu", *plain), train("cpu", *there, "trainer.device=cpu"), 1e-4)


def test_members_of_a_pack_learn_what_they_learn_alone(recorded: list[bool]) -> None:
    overrides = [o for o in arguments_of("lora") if not o.startswith(("adapter=", "model="))]
    kinds = "adapter=lora,dora,vera,adalora"
    sweep = ["model=tiny_bert", kinds, "seed=0,1", *overrides, "trainer.micro_batch_size=8", "hydra.sweep.dir=sweep"]
    answer = lora_bench("train", "-m", *sweep)
    assert answer.code == 0, answer
    assert all(recorded)
    for job in range(8):
        record = json.loads(Path(f"sweep/{job}/run.json").read_text())
        assert record["cost"]["pack_size"] > 1
        method, seed = ("lora", "dora", "vera", "adalora")[job // 2], job % 2
        alone = train(f"alone{job}", *arguments_of(method, f"seed={seed}", "trainer.micro_batch_size=8"))
        assert_alike(trained(f"sweep/{job}"), alone, 1e-4)


def test_it_goes_on_where_it_was_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train("whole", *arguments_of("lora"))
    with monkeypatch.context() as patch:
        at_step(patch, 9, signalled(signal.SIGTERM))
        assert lora_bench("train", *arguments_of("lora"), "hydra.run.dir=run").code == 143
    assert lora_bench("train", "resume=run").code == 0
    assert_alike(trained("run"), whole, 1e-6)


def test_what_lies_below_the_adapted_layers_is_kept() -> None:
    top = arguments_of("lora", "adapter.layers=top:1")
    cached = train("kept", *top)
    assert json.loads(Path("kept/run.json").read_text())["cost"]["prefix_fill_flops"] > 0
    assert_alike(cached, train("computed", *top, "trainer.prefix_cache_bytes=0"), 1e-4)


def test_full_fine_tuning_in_bf16(recorded: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    bf16 = [o for o in arguments_of("full") if "precision" not in o]
    with_graphs = train("graphs", *bf16, "trainer.precision=bf16")
    assert all(recorded)
    launch_all(monkeypatch)
    assert_alike(with_graphs, train("launched", *bf16, "trainer.precision=bf16"), 1e-5)
