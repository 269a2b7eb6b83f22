"""The Python interface: what the commands do, from Python, without a trace in the process."""

from __future__ import annotations

import ast
import inspect
import io
import json
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

import lora_bench
from lora_bench import api
from lora_bench.errors import Code, SweepFailedError, UserError
from tests.command_line import TOY_RUN, files_below

EXAMPLES = Path(__file__).parent.parent / "examples"
TOY = dict(override.split("=") for override in TOY_RUN)
pytestmark = pytest.mark.usefixtures("in_tmp")


def test_a_run_is_trained_recorded_and_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.argv, os.environ.get("HYDRA_FULL_ERROR"), GlobalHydra.instance().hydra, HydraConfig.instance().cfg
    run = api.train("seed=3", adapter={"rank": 2}, quiet=True, **TOY)
    after = sys.argv, os.environ.get("HYDRA_FULL_ERROR"), GlobalHydra.instance().hydra, HydraConfig.instance().cfg
    assert after == before
    assert capsys.readouterr() == ("", "")
    assert run.folder.parts[0] == "outputs"
    assert (run.record["status"], run.record["config"]["seed"]) == ("done", 3)
    assert run.record["config"]["adapter"]["rank"] == 2
    assert run.metrics == run.record["metrics"]
    assert run.load(device="cpu").predict([("a", "b")]).shape == (1,)
    again = api.train(folder="mine", **TOY, **{"adapter.rank": 2}, seed=3)
    assert again.folder == Path("mine")
    assert again.metrics == run.metrics
    assert api.train(resume="mine") == again  # it is done
    assert "validation" in capsys.readouterr().out


def test_a_sweep_is_compared_as_a_frame() -> None:
    folders = api.sweep(adapter={"rank": [1, 2]}, seed=[0, 1], folder="two words", quiet=True, **TOY)
    assert folders == [Path("two words", str(number)) for number in range(4)]
    frame = api.compare("two words")
    assert sorted(frame["adapter.rank"]) == [1, 2]
    assert list(frame["n"]) == [2, 2]
    assert sorted(folder for row in frame["runs"] for folder in row) == sorted(map(str, folders))
    assert frame.attrs["notes"]
    assert frame.attrs["advice"]
    assert len(api.compare(folders[:1])) == 1
    assert list(api.compare(folders, by="seed")["seed"]) in ([0, 1], [1, 0])


def test_a_failed_sweep_is_resumed() -> None:
    with pytest.raises(SweepFailedError):
        api.sweep("optimizer.warmup=0", "optimizer.lr=1e-3,1e30", folder="sweep", quiet=True, **TOY)
    folders = api.sweep(resume="sweep", quiet=True)  # a run that diverged has ended
    assert folders == [Path("sweep/0"), Path("sweep/1")]
    assert len(api.compare(folders)) == 1


@pytest.mark.parametrize(
    ("function", "arguments", "code", "key"),
    [
        ("train", {"adapter.rank": 0}, Code.INVALID_VALUE, "adapter.rank"),
        ("train", {"adapter": "lroa"}, Code.UNKNOWN_CHOICE, "adapter"),
        ("train", {"sweep": "rank"}, Code.UNSUPPORTED, "sweep"),
        ("train", {"dry_run": True}, Code.UNSUPPORTED, "dry_run"),
        ("sweep", {"dry_run": True}, Code.UNSUPPORTED, "dry_run"),
        ("search", {"dry_run": True}, Code.UNSUPPORTED, "dry_run"),
        ("search", {"sweep": "rank"}, Code.UNSUPPORTED, "sweep"),
        ("search", {"adapter.rank": [1, 2]}, Code.MISSING, "search.trials"),
        ("train", {"hydra.run.dir": "there"}, Code.CONFLICT, "hydra.run.dir"),
        ("train", {"folder": "a", "resume": "b"}, Code.CONFLICT, "folder"),
        ("train", {"resume": "nowhere"}, Code.NOT_FOUND, "resume"),
        ("sweep", {"adapter.rank": [1, 0]}, Code.INVALID_VALUE, "adapter.rank"),
        ("compare", {"folders": "nowhere"}, Code.NOT_FOUND, "compare"),
    ],
)
def test_wrong_requests_are_refused_and_leave_nothing(
    function: str, arguments: dict[str, Any], code: Code, key: str | None
) -> None:
    with pytest.raises(UserError) as caught:
        getattr(api, function)(**arguments, **({} if function == "compare" or "resume" in arguments else TOY))
    assert (caught.value.code, caught.value.key) == (code, key), str(caught.value)
    assert not files_below(Path.cwd())


def test_options_are_no_overrides() -> None:
    with pytest.raises(UserError) as caught:
        api.train("--cfg=job")
    assert caught.value.code == Code.INVALID_SYNTAX


def test_without_pandas_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError) as caught:
        api.compare()
    assert caught.value.code == Code.MISSING_PACKAGE
    assert "pandas" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"seed": 1, "resume": None, "a": True}, ["seed=1", "resume=null", "a=true"]),
        ({"adapter": {"layers": [1, 2], "alpha": 1.5}}, ["adapter.layers=[1,2]", "adapter.alpha=1.5"]),
        ({"data": {"path": Path("my data,x")}, "b": "null"}, ["data.path='my data,x'", "b='null'"]),
        ({"c": ""}, ["c=''"]),
    ],
)
def test_settings_are_written_as_overrides(settings: dict[str, Any], expected: list[str]) -> None:
    assert list(api._overrides(settings)) == expected


def test_lists_are_swept() -> None:
    settings = {"adapter": ["lora", "dora"], "seed": range(2), "adapter.layers": [[0], [0, 1]]}
    assert list(api._overrides(settings, swept=True)) == ["adapter=lora,dora", "seed=0,1", "adapter.layers=[0],[0,1]"]


@pytest.mark.parametrize("name", ["train", "sweep", "compare"])
def test_the_interface_is_typed(name: str) -> None:
    signature = inspect.signature(getattr(api, name))
    assert all(parameter.annotation is not parameter.empty for parameter in signature.parameters.values())
    assert signature.return_annotation is not signature.empty
    assert (Path(lora_bench.__file__).parent / "py.typed").is_file()
    assert get_type_hints(api.TrainedRun)["folder"] is Path


def test_the_notebook_runs_and_is_stored_without_outputs() -> None:
    cells = json.loads((EXAMPLES / "compare_adapters.ipynb").read_text(encoding="utf-8"))["cells"]
    cells = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    module = ModuleType("notebook")
    values = []
    with redirect_stdout(io.StringIO()) as out:
        for cell in cells:
            *statements, last = ast.parse("".join(cell["source"])).body
            exec(compile(ast.Module(statements, []), "cell", "exec"), vars(module))
            if isinstance(last, ast.Expr):  # its value is what the notebook shows
                values.append(eval(compile(ast.Expression(last.value), "cell", "eval"), vars(module)))
            else:
                exec(compile(ast.Module([last], []), "cell", "exec"), vars(module))
    assert out.getvalue().count("on the selection split") >= 4
    mcc, folders, table, errors, probabilities, chart = (value for value in values if value is not None)
    assert mcc == module.run.metrics["validation/mcc"]
    assert sorted(table["adapter"]) == ["dora", "lora"]
    assert list(errors["error"]) == sorted(errors["error"], reverse=True)
    assert probabilities.shape == (2,)
    points = chart._repr_mimebundle_()["application/vnd.vegalite.v5+json"]["data"]["values"]
    assert len(points) == 4 * len(folders)
