"""The shape of the source: imports flow one way, cheap commands stay light, nothing runs code that a file names."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

import lora_bench

ROOT = Path(lora_bench.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))

# Who may import whom inside the package, at run time and late imports included.
BASE = {"checks", "errors", "config"}
MAY_IMPORT: dict[str, set[str]] = {
    "__init__": {"predict"},
    "__main__": {"cli"},
    "cli": {
        "",
        "cache",
        "clean",
        "compare",
        "doctor",
        "errors",
        "evaluate",
        "expected",
        "export",
        "help",
        "hydra_errors",
        "job",
        "launch",
        "predict",
        "prediction_request",
        "record",
    }
    | {"cache", "config", "overrides", "preflight", "prompt", "resume", "screen", "secrets", "signals", "streams"}
    | {"sweep", "train"},
    "help": set(),
    "prompt": BASE
    | {
        "cache",
        "data",
        "disk",
        "environment",
        "evaluation",
        "progress",
        "record",
        "screen",
        "secret_patterns",
        "secrets",
    }
    | {"tables", "tracking", "training"},
    "prompted": set(),
    "tracking": BASE | {"experiments", "record", "screen"},
    "plugin": {
        "compare",
        "disk",
        "errors",
        "expected",
        "experiment",
        "experiments",
        "hydra_errors",
        "job",
        "preflight",
        "resume",
    }
    | {"claim", "config", "evaluate", "help", "record", "screen", "slurm", "sweep", "tasks", "transfer", "workers"},
    "transfer": {"disk", "figures", "record", "sweep", "tasks"},
    "packing": {"adapters", "errors", "experiment", "job", "progress", "record", "screen", "tables", "train"}
    | {"training"},
    "workers": {"errors", "experiment", "job", "packing", "progress", "record", "screen", "secrets"}
    | {"", "signals", "streams"},
    "slurm": {"checks", "errors", "experiment", "job", "record", "screen", "signals", "workers"},
    "expected": {"adapters", "errors", "evaluation", "experiment", "job", "packing", "screen", "tables", "train"}
    | {"training", "workers"},
    "job": {"checks", "errors", "help", "hydra_errors", "record", "recorded", "resume", "sweep"},
    "recorded": {"", "errors", "experiments", "help", "hydra_errors", "overrides", "prompted", "untrusted"},
    "resume": {"errors", "hydra_errors", "prompted", "record", "secrets", "sweep"},
    "sweep": {"", "claim", "disk", "errors", "record", "untrusted"},
    "evaluate": BASE
    | {"adapters", "backbones", "besides", "data", "evaluation", "finished", "paths", "predict", "progress", "record"}
    | {"recorded", "screen", "training"},
    "besides": BASE | {"data", "evaluation"},
    "export": BASE | {"adapters", "backbones", "paths", "predict", "recorded", "screen"},
    "predict": BASE
    | {"adapters", "backbones", "data", "evaluation", "experiment", "finished", "prediction_request", "record"}
    | {"training"},
    "prediction_request": BASE | {"data", "finished", "paths", "recorded"},
    "finished": {"", "errors", "evaluation", "prompted", "record", "recorded", "tasks", "untrusted"},
    "initial": {"adapters", "backbones", "errors", "experiment", "finished", "record"},
    "train": {"adapters", "errors", "evaluation", "experiment", "initial", "job", "progress", "recording", "screen"}
    | {"training"},
    "recording": {"environment", "errors", "adapters", "backbones", "evaluation", "progress", "record", "results"}
    | {"screen", "tracking", "training"},
    "results": {"adapters", "backbones", "besides", "data", "evaluation", "record", "tasks", "training"},
    "tasks": {"errors", "record"},
    "experiment": BASE | {"adapters", "backbones", "besides", "data", "evaluation", "finished", "tracking", "training"},
    "doctor": {"cache", "environment", "training"},
    "training": {"", "cache", "errors", "disk", "adapters", "backbones", "data", "evaluation", "launch", "progress"}
    | {"screen", "signals", "tables", "untrusted"},
    "evaluation": {"errors", "stats"},
    "data": BASE | {"cache", "hub", "paths"},
    "cache": {"errors", "screen"},
    "clean": {"cache", "errors", "screen", "tables"},
    "paths": {"errors"},
    "backbones": BASE | {"", "hub", "untrusted"},
    "adapters": BASE | {"", "untrusted"},
    "progress": {"screen", "tables"},
    "screen": {"secrets", "tables"},
    "secrets": {"secret_patterns"},
    "secret_patterns": set(),
    "compare": {"anchors", "baseline", "comparison", "costs", "disk", "errors", "experiments", "figures", "grid"}
    | {"", "paths", "prompted", "record", "recorded", "report", "tables", "tasks"},
    "grid": {"tables"},
    "report": {"comparison", "costs", "experiments", "figures", "predictions", "tables", "untrusted"},
    "baseline": {"comparison", "errors", "figures", "tables"},
    "comparison": {"errors", "experiments", "predictions", "stats", "tables"},
    "experiments": {"errors"},
    "costs": {"", "comparison", "tables", "untrusted"},
    "anchors": {"tables"},
    "predictions": {"", "errors", "stats", "untrusted"},
    "stats": set(),
    "figures": {"", "disk", "untrusted"},
    "record": {"", "claim", "disk", "errors", "predictions", "prompted", "record_types", "secrets", "untrusted"},
    "record_types": {"untrusted"},
    "untrusted": set(),
    "disk": {"errors", "secrets"},
    "claim": {"errors"},
    "hydra_errors": {"errors", "overrides"},
    "overrides": {"errors", "help"},
    "preflight": BASE | {"backbones", "finished", "paths"},
    "checks": {"errors"},
    "config": {"checks", "errors", "sharing"},
    "sharing": {"checks", "errors"},
    "tables": {"stats"},
    "environment": set(),
    "signals": set(),
    "launch": {"errors"},
    "streams": set(),
    "errors": set(),
    "hub": set(),
}
LIGHT = ("compare", "job", "record", "resume", "sweep", "screen", "secrets", "tables", "environment", "errors")
LIGHT += (
    "checks",
    "hydra_errors",
    "cli",
    "config",
    "anchors",
    "baseline",
    "comparison",
    "costs",
    "experiments",
    "figures",
    "grid",
)
LIGHT += ("cache", "clean", "launch", "paths", "signals", "streams", "help", "overrides", "prompted", "recorded")
LIGHT += ("slurm", "tasks", "transfer")
HEAVY = {"torch", "transformers", "datasets", "torchmetrics", "scipy", "safetensors", "tokenizers", "huggingface_hub"}
OPEN_CONFIG = {
    "config",
    "job",
    "resume",
    "experiment",
    "initial",
    "cli",
    "hydra_errors",
    "finished",
    "prediction_request",
    "overrides",
    "preflight",
    "prompt",
    "recorded",
    "evaluate",
    "plugin",
}


def module_of(path: Path) -> str:
    """`adapters.lora`, `cli`, `__init__`: the name below `lora_bench`."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path, *, late: bool = True) -> set[str]:
    """Modules that the file imports at run time; with `late=False` only those that it imports as it loads."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and not late:
                continue
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path} has a relative import"
                found.update(f"{child.module}.{alias.name}" for alias in child.names)
            visit(child)

    visit(tree(path))
    return found


def own(imported: set[str]) -> set[str]:
    """Which parts of lora_bench are among the imported: the first name below the package, `""` for itself."""
    below = {name.removeprefix("lora_bench.").split(".")[0] for name in imported if name.startswith("lora_bench.")}
    parts = {name for name in below if (ROOT / name).is_dir() or (ROOT / f"{name}.py").is_file()}
    return parts | ({""} if below - parts else set())


def ids(paths: list[Path]) -> list[str]:
    return [module_of(path) for path in paths]


def test_there_is_something_to_look_at() -> None:
    assert len(SOURCES) >= 47
    assert {module_of(path).split(".")[0] for path in SOURCES} <= set(MAY_IMPORT)


@pytest.mark.parametrize("path", SOURCES, ids=ids(SOURCES))
def test_imports_flow_one_way(path: Path) -> None:
    part = module_of(path).split(".")[0]
    assert own(imports(path)) - {part} <= MAY_IMPORT[part]


def test_the_flow_has_no_circle() -> None:
    """`MAY_IMPORT` itself: whoever is imported never imports back, on whatever detour."""
    done: set[str] = set()
    while remaining := {part: may for part, may in MAY_IMPORT.items() if part not in done}:
        free = {part for part, may in remaining.items() if may - {"", part} <= done}
        assert free, f"a circle among {sorted(remaining)}"
        done |= free


@pytest.mark.parametrize("path", ADAPTERS := sorted((ROOT / "adapters").glob("*.py")), ids=ids(ADAPTERS))
def test_adapters_need_only_torch(path: Path) -> None:
    import sys

    tops = {name.split(".")[0] for name in imports(path)}
    assert tops <= {"torch", "safetensors", "lora_bench"} | sys.stdlib_module_names


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_never_load_heavy_ones(name: str) -> None:
    """Neither directly nor through what they import as they load; and `compare` and `record` not even late."""
    late = name in ("compare", "figures", "record", "tables", "environment")
    heavy = HEAVY - {"scipy"} if late else HEAVY  # statistics import scipy where they need it
    seen, queue = set(), [name]
    while queue:
        current = queue.pop()
        if current in seen:
            continue
        seen.add(current)
        found = imports(ROOT / f"{current}.py", late=late)
        assert not {each.split(".")[0] for each in found} & heavy, f"{name} reaches them through {current}"
        parts = own(found) - {""}
        assert not {part for part in parts if (ROOT / part).is_dir()} - {"report"}, current
        queue += parts - {"report"}


@pytest.mark.parametrize("path", REPORT := sorted((ROOT / "report").glob("*.py")), ids=ids(REPORT))
def test_the_report_page_needs_no_torch(path: Path) -> None:
    tops = {name.split(".")[0] for name in imports(path)}
    assert not tops & HEAVY


@pytest.mark.parametrize("path", SOURCES, ids=ids(SOURCES))
def test_configs_stop_at_the_door(path: Path) -> None:
    if module_of(path).split(".")[0] not in OPEN_CONFIG:
        assert not {name.split(".")[0] for name in imports(path)} & {"omegaconf", "hydra"}


@pytest.mark.parametrize("path", SOURCES, ids=ids(SOURCES))
def test_nothing_runs_code_that_a_file_names(path: Path) -> None:
    forbidden = ("pickle", "dill", "joblib", "marshal", "shelve", "hydra.utils", "runpy")
    assert not {name for name in imports(path) if name.startswith(forbidden)}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "compile", "__import__", "torch.load", "os.system", "os.popen")
            assert not called.endswith(("instantiate", "get_class", "get_method", "get_object", "yaml.load"))
            for keyword in node.keywords:
                value = ast.unparse(keyword.value)
                assert (keyword.arg, value) not in (("shell", "True"), ("weights_only", "False"))
                if keyword.arg == "trust_remote_code":
                    assert value == "False"


def test_modules_are_imported_by_name_only_where_names_are_ours() -> None:
    users = {module_of(path) for path in SOURCES if "import_module" in path.read_text(encoding="utf-8")}
    assert users <= {"adapters", "hydra_errors"}


@pytest.mark.parametrize("path", SOURCES, ids=ids(SOURCES))
def test_every_module_says_what_it_is_for(path: Path) -> None:
    if path.name != "__main__.py":
        assert ast.get_docstring(tree(path))


@pytest.mark.parametrize("path", SOURCES, ids=ids(SOURCES))
def test_no_file_is_long(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 450
