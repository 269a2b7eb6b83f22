"""What every test stands on: no network, caches in a temporary folder, configs composed as the command line does."""

from __future__ import annotations

import gc
import os
from typing import TYPE_CHECKING, Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before any library of theirs is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:  # a process a core: torch's threads would wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from tests.reliability.score import Score

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


SMOKE = (
    "adapters/lowrank/test_linear.py",
    "adapters/methods/test_lora.py",
    "analysis/test_statistics.py",
    "config/test_composes.py",
    "config/test_overrides.py",
    "console/test_redaction.py",
    "data/test_batching.py",
    "data/test_readers.py",
    "records/test_run_folder.py",
    "test_architecture.py",
    "test_cli.py",
    "test_errors.py",
    "training/test_optim.py",
    "training/test_plain.py",
)
"""Files of the fast tier, `pytest -m smoke`: one or more of every layer, up to a whole training."""


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Score(), "reliability")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.as_posix().endswith(SMOKE):
            item.add_marker(pytest.mark.smoke)
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)  # no process ends with a long one


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    os.environ["LORA_BENCH_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    del os.environ["LORA_BENCH_CACHE"]


@pytest.fixture(autouse=True, scope="session")
def _work_is_done_once() -> Iterator[None]:
    # Late: with `-n`, the first process runs no test, and need not wait for torch before it starts the others.
    from tests.composed_once import compose_files_once
    from tests.measured_once import measure_once, write_without_waiting

    with pytest.MonkeyPatch.context() as patch:
        compose_files_once(patch)
        measure_once(patch)
        write_without_waiting(patch)
        yield


@pytest.fixture(autouse=True, scope="module")
def _quick_collections() -> None:
    """Every run collects garbage once; what was imported before need not be walked through each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def backbone() -> Callable[..., Any]:
    """Makes a random tiny backbone: `backbone("tiny_t5", "model.form=encoder")`."""

    def make(model: str = "tiny_bert", *overrides: str) -> Any:
        from lora_bench.backbones.families import build_model
        from lora_bench.backbones.load import load, load_tokenizer
        from tests.helpers import QQP_LABELS, composed

        settings = build_model(composed(f"model={model}", *overrides).model)
        return load(settings, load_tokenizer(settings), task="qqp", label_names=[QQP_LABELS])

    return make


@pytest.fixture(scope="module")
def of_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny run of three classes, for all tests of a file."""
    from tests import three_classes

    return three_classes.run_of(tmp_path_factory.mktemp("classes"))


@pytest.fixture(scope="module")
def of_numbers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny run that predicts numbers, for all tests of a file."""
    from tests import three_classes

    return three_classes.run_of(tmp_path_factory.mktemp("numbers"), numbers=True)


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
