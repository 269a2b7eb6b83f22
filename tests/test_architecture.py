"""The shape of the source: imports flow one way, cheap commands stay light, nothing runs code that a file names."""

from __future__ import annotations

import ast
import sys
from functools import cache
from pathlib import Path

import pytest

import lora_bench

ROOT = Path(lora_bench.__file__).parent
SOURCES = sorted(path for path in ROOT.rglob("*.py") if "conf" not in path.relative_to(ROOT).parts)

# From the bottom to the top: a folder, and what it may import of those above it in this list. Imports for type checking
# and inside of functions count too.
MAY_IMPORT = {
    "errors": "",
    "extensions": "errors",
    "config": "errors extensions",
    "console": "errors config",
    "files": "errors console",
    "head": "",
    "data": "errors config console files",
    "backbones": "errors config console files data extensions",
    "evaluation": "errors config data extensions",
    "adapters": "errors config files head data backbones extensions",
    "records": "errors config console files data backbones evaluation adapters",
    "tracking": "errors config console records",
    "analysis": "errors config console files evaluation records",
    "report": "config console files records analysis",
    "training": "errors config console files head data backbones evaluation adapters",
    "llm": "errors config console files data training",
    "run": "errors config console files data backbones evaluation records adapters tracking training extensions",
    "train": "errors config console data evaluation records adapters training run",
    "evaluate": "errors config console files data backbones evaluation records adapters training run",
    "predict": "config data evaluation run",
    "deployment": "errors console data backbones head evaluation adapters training run",
    "export": "errors config console files backbones records adapters run deployment",
    "publishing": "errors config console files evaluation records adapters analysis",
    "push": "errors config console files records publishing",
    "prompt": "errors config console files data evaluation records tracking llm",
    "compare": "errors config console files records analysis report",
    "clean": "errors console files records",
    "ls": "errors console files analysis records",
    "show": "errors config console files analysis records",
    "rm": "errors console files records",
    "watch": "errors console records",
    "doctor": "console files records adapters training extensions",
    "completion": "errors config extensions",
    "sweeps": "errors config console files evaluation records adapters training run train",
    "hydra_plugins": "errors config console files records analysis run evaluate compare sweeps",
    "__init__": "run",
    "cli": "__init__ errors config console files records run train evaluate predict export push prompt compare clean"
    " doctor sweeps ls show rm watch completion",
    "api": "__init__ errors config console records analysis run sweeps cli",
    "__main__": "cli completion",
}
COMMANDS = ("train", "evaluate", "predict", "export", "push", "prompt", "compare", "clean", "doctor")
COMMANDS += ("ls", "show", "rm", "watch", "completion")
HEAVY = {"torch", "transformers", "datasets", "torchmetrics", "scipy", "safetensors", "tokenizers", "huggingface_hub"}
LIGHT_COMMANDS = {"api", "cli", "compare", "clean", "doctor", "ls", "show", "rm", "watch", "completion", "push"}
LIGHT = {
    *LIGHT_COMMANDS,
    "errors",
    "extensions",
    "config",
    "console",
    "files",
    "analysis",
    "report",
    "tracking",
    "publishing",
}
"""What must not load a heavy library as it is imported: `--help`, refusals and tables take a fraction of a second."""
KNOWS_HYDRA = {
    "api",
    "cli",
    "config",
    "doctor",
    "evaluate",
    "export",
    "hydra_plugins",
    "prompt",
    "records",
    "run",
    "sweeps",
    "tracking",
}


def module_of(path: Path) -> str:
    """Return the name below `lora_bench`: `adapters.methods.lora`, `cli`, `__init__`."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def file_of(module: str) -> Path | None:
    """Return the file of a module below `lora_bench`, if there is one."""
    path = ROOT.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path, *, types: bool = True, late: bool = True) -> set[str]:
    """Return the names that a file imports; without `types` and `late` only those that it imports as it loads."""
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test) and not types:
                continue
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and not late:
                continue
            if isinstance(child, ast.Import):
                names.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path} has a relative import"
                names.update(f"{child.module}.{alias.name}" for alias in child.names)
            visit(child)

    visit(tree(path))
    return names


def own_modules(names: set[str]) -> set[str]:
    """Return the modules below `lora_bench` among imported names; `__init__` for a name of the package itself."""
    modules = set()
    for name in names:
        if name.startswith("lora_bench."):
            parts = name.split(".")[1:]
            known = [".".join(parts[:n]) for n in range(len(parts), 0, -1) if file_of(".".join(parts[:n]))]
            modules.add(known[0] if known else "__init__")
    return modules


def test_every_file_is_in_a_room() -> None:
    assert len(SOURCES) >= 120
    assert {module_of(path).split(".")[0] for path in SOURCES} == set(MAY_IMPORT)
    at_the_top = {path.stem for path in ROOT.glob("*.py")}
    assert at_the_top == {"__init__", "__main__", "api", "cli", "errors", *COMMANDS}


def test_imports_flow_one_way() -> None:
    for path in SOURCES:
        room = module_of(path).split(".")[0]
        others = {module.split(".")[0] for module in own_modules(imports(path))} - {room}
        assert others <= set(MAY_IMPORT[room].split()), path


def test_the_flow_has_no_circle() -> None:
    """A room imports rooms that stand above it in the list."""
    above: set[str] = set()
    for room, others in MAY_IMPORT.items():
        assert set(others.split()) <= above - {room} | ({"__init__"} if room == "cli" else set()), room
        above.add(room)


def test_adapters_need_only_torch() -> None:
    needed = {"torch", "safetensors", "lora_bench"} | sys.stdlib_module_names
    for path in (ROOT / "adapters").rglob("*.py"):
        at_once, late = ({n.split(".")[0] for n in imports(path, types=False, late=late)} for late in (False, True))
        assert at_once <= needed, path
        assert late <= needed | ({"peft"} if path.parent.name == "peft" else set()), path


def loaded_by(module: str) -> set[str]:
    """Return the modules of lora_bench that are imported with this one."""
    modules: set[str] = set()
    queue = [module]
    while queue:
        current = queue.pop()
        path = file_of(current)
        if current in modules or path is None:
            continue
        modules.add(current)
        queue += own_modules(imports(path, types=False, late=False))
        queue += [".".join(current.split(".")[:n]) for n in range(1, current.count(".") + 1)]
    return modules


LIGHT_MODULES = sorted(module_of(path) for path in SOURCES if module_of(path).split(".")[0] in {*LIGHT, "records"})


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_light_modules_load_nothing_heavy(module: str) -> None:
    for loaded in loaded_by(module):
        path = file_of(loaded)
        assert path is not None
        heavy = {name.split(".")[0] for name in imports(path, types=False, late=False)} & HEAVY
        assert not heavy, f"{module} loads them through {loaded}"


TABLES = sorted([*(ROOT / "report").glob("*.py"), *(ROOT / "analysis").glob("*.py"), ROOT / "compare.py"])


def test_comparing_needs_no_torch() -> None:
    """Not even late; statistics import scipy where they need it."""
    for path in TABLES:
        assert not {name.split(".")[0] for name in imports(path, types=False)} & HEAVY - {"scipy"}, path


def test_configs_stop_at_the_door() -> None:
    for path in SOURCES:
        if module_of(path).split(".")[0] not in KNOWS_HYDRA:
            assert not {name.split(".")[0] for name in imports(path, types=False)} & {"omegaconf", "hydra"}, path


def test_nothing_runs_code_that_a_file_names() -> None:
    forbidden = ("pickle", "dill", "joblib", "marshal", "shelve", "hydra.utils", "runpy")
    for path in SOURCES:
        assert not {name for name in imports(path) if name.startswith(forbidden)}, path
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call):
                check_call(node, path)


def check_call(node: ast.Call, path: Path) -> None:
    """Assert that a call runs no code that is data."""
    called = ast.unparse(node.func)
    assert called not in ("eval", "exec", "compile", "__import__", "torch.load", "os.system", "os.popen"), path
    assert not called.endswith(("instantiate", "get_class", "get_method", "get_object", "yaml.load")), path
    for keyword in node.keywords:
        value = ast.unparse(keyword.value)
        assert (keyword.arg, value) not in (("shell", "True"), ("weights_only", "False")), path
        if keyword.arg == "trust_remote_code":
            assert value == "False", path


def test_modules_are_imported_by_name_only_where_names_are_ours() -> None:
    users = {module_of(path) for path in SOURCES if "import_module" in path.read_text(encoding="utf-8")}
    assert users <= {"files.discovery", "config.compose"}


def test_every_module_has_a_docstring() -> None:
    for path in SOURCES:
        assert path.name == "__main__.py" or ast.get_docstring(tree(path)), path
