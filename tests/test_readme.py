"""The README and the documentation keep their word: commands compose, examples run, links lead somewhere."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import transformers
import yaml

import lora_bench.backbones.families
from lora_bench import compare, ls, rm, show, watch
from lora_bench.adapters.methods import method_class
from lora_bench.config.groups import COMMANDS, GROUPS, conf_folder
from lora_bench.extensions import entry_points
from lora_bench.records import run_folder
from tests.adapters.tools import adapter, pack
from tests.backbones.tools import enliven, random_batch, reference
from tests.command_line import lora_bench as run
from tests.command_line import toy_run
from tests.extensions.tools import install, on_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
GENERATED = [DOCS / "configuration.md", DOCS / "errors.md"]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PAGES}
WRITTEN = [name for name in TEXTS if ROOT / name not in GENERATED]
BLOCKS = [
    (language, block)
    for text in TEXTS.values()
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
]
NEEDS_A_FILE = ("adapter=bias", "adapter=gated", "model=distilbert_direct", "metric=[cost]")
"""Choices that a page adds with a Python file: its own test runs them."""
MAX_WORDS, MAX_WORDS_OF_A_CELL, MAX_COLUMNS = 30, 15, 100


def commands() -> Iterator[str]:
    """Yield each `lora-bench …` line of the bash blocks once; `torchrun … -m lora_bench` counts as one."""
    lines = [
        re.sub(r"^torchrun .*? -m lora_bench", "lora-bench", part.partition(" #")[0].strip())
        for language, block in BLOCKS
        if language == "bash"
        for line in block.splitlines()
        for part in line.split("&&")
    ]
    yield from dict.fromkeys(line for line in lines if line.startswith("lora-bench"))


COMMAND_LINES = list(commands())


def command_lines(*names: str) -> list[str]:
    return [line for line in COMMAND_LINES if shlex.split(line)[1] in names]


def named_blocks() -> dict[str, str]:
    """Return the code blocks whose first line is the name of a file, by that name."""
    blocks: dict[str, str] = {}
    for _, block in BLOCKS:
        if name := re.match(r"# (\S+\.(?:py|yaml|toml))\n", block):
            assert blocks.setdefault(name[1], block) == block, name[1]
    return blocks


def write_named_blocks(prefix: str, folder: Path) -> None:
    for name, block in named_blocks().items():
        if name.startswith(prefix):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.partition("\n")[2], encoding="utf-8")  # Hydra reads `# @package` in the first line


# -- commands --


def test_all_commands_are_seen() -> None:
    assert len(COMMAND_LINES) >= 60
    assert {shlex.split(line)[1] for line in COMMAND_LINES} == set(COMMANDS)


@pytest.mark.parametrize("line", command_lines("train"))
def test_train_commands_compose(line: str, in_tmp: Path) -> None:
    if any(choice in line for choice in NEEDS_A_FILE):
        return
    write_named_blocks("DIR/", in_tmp)
    dropped = {"-m", "--cfg", "job", "--help"}
    arguments = [
        argument
        for argument in shlex.split(line)[2:]
        if argument not in dropped and not re.search(r"^[^\[]*,|range\(", argument)
    ]
    answer = run("train", "--cfg", "job", *arguments)
    assert answer.code == 0, answer.err


@pytest.mark.parametrize("line", command_lines("search"))
def test_search_commands_compose(line: str, in_tmp: Path) -> None:
    arguments = [text for text in shlex.split(line)[2:] if not text.startswith("resume=")]
    answer = run("search", "--cfg", "job", *(text for text in arguments if not re.search(r"^[^\[]*[,(]", text)))
    assert answer.code == 0, answer.err


@pytest.mark.parametrize("line", command_lines("eval", "predict", "export", "push", "prompt"))
def test_other_commands_compose(line: str, in_tmp: Path) -> None:
    _, command, *arguments = shlex.split(line)
    answer = run(command, "--cfg", "job", *arguments)
    assert answer.code == 0, answer.err


@pytest.mark.parametrize("line", command_lines("compare", "ls", "show", "watch", "rm"))
def test_commands_with_options_parse(line: str) -> None:
    _, command, *arguments = shlex.split(re.sub(r"\$\(.*?\)", "RUN", line))
    modules = {"compare": compare, "ls": ls, "show": show, "watch": watch, "rm": rm}
    modules[command]._parser().parse_args(arguments)


def test_clean_commands_run(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_BENCH_CACHE", str(in_tmp))
    for line in command_lines("clean"):
        assert run(*shlex.split(line)[1:]).code == 0


def test_every_named_script_exists() -> None:
    """Scripts, or folders beside them, that any tracked text names; LOG.md is history."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    missing = set()
    for name in set(listed.stdout.splitlines()) - {"LOG.md"}:
        text = (ROOT / name).read_text(encoding="utf-8", errors="ignore") if (ROOT / name).is_file() else ""
        for path in re.findall(r"(?<![\w./-])(?:scripts|benchmarks|experiments)/\w+(?:\\?\.py)?", text):
            if not (ROOT / path.replace("\\", "")).exists():
                missing.add(f"{name}: {path}")
    assert missing == set()


# -- keys and choices --


def known_keys() -> set[str]:
    """Return the keys of the configuration reference."""
    return set(re.findall(r"^- \*\*`([\w.]+)`\*\*", TEXTS["docs/configuration.md"], re.MULTILINE))


@pytest.mark.parametrize("name", WRITTEN)
def test_keys_exist(name: str) -> None:
    known = known_keys()
    for key in re.findall(rf"`((?:{'|'.join(GROUPS)}|llm)\.\w+)[`=]", TEXTS[name]):
        assert key in known or key.startswith("tracking."), key


def options(group: str) -> set[str]:
    return {path.stem for path in (conf_folder() / group).glob("[!_]*.yaml")}


@pytest.mark.parametrize(
    ("group", "page"),
    [
        ("adapter", "README.md"),
        ("adapter", "docs/methods.md"),
        ("model", "docs/models.md"),
        ("data", "docs/data.md"),
        ("prompt", "docs/llm-baseline.md"),
    ],
)
def test_every_choice_is_in_the_table_of_its_group(group: str, page: str) -> None:
    (table,) = re.findall(rf"^\| `{group}=` \|.*\n((?:\|.*\n)+)", TEXTS[page], re.MULTILINE)
    named = re.findall(r"`([a-z_0-9]+)`", "".join(row.split(" | ")[0] for row in table.splitlines()))
    of_peft = {option for option in options(group) if option.startswith("peft_")}  # `lora-bench doctor` lists them
    assert sorted(named) == sorted(options(group) - of_peft)


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_numbers_of_methods_are_those_of_the_folder(page: str) -> None:
    choices = options("adapter") - {"full", "head_only", "peft"}
    of_peft = sum(choice.startswith("peft_") for choice in choices)
    assert f"- {len(choices) - of_peft} adapter methods and {of_peft} of PEFT, " in TEXTS[page]


def test_the_generated_pages_are_up_to_date() -> None:
    result = subprocess.run([sys.executable, ROOT / "scripts" / "config_reference.py", "--check"], capture_output=True)
    assert result.returncode == 0, result.stderr.decode()


# -- examples --


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The documented package, installed with the entry points of its `pyproject.toml`; the current folder is empty."""
    site, project = tmp_path / "site", tomllib.loads(named_blocks()["pyproject.toml"])["project"]
    files = {name: block for name, block in named_blocks().items() if name.startswith("my_lora/")}
    install(site, project["name"], project["entry-points"], {"my_lora/__init__.py": "", **files})
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with on_path(site, monkeypatch):
        yield


def test_the_documented_package_has_all_that_it_registers() -> None:
    pyproject = tomllib.loads(named_blocks()["pyproject.toml"])
    groups = pyproject["project"]["entry-points"]
    for values in groups.values():
        for value in values.values():
            module = value.partition(":")[0].replace(".", "/")
            assert any(name == f"{module}.py" or name.startswith(f"{module}/") for name in named_blocks()), value
    assert set(groups) == {entry_points.METHODS, entry_points.BACKBONES, entry_points.METRICS, entry_points.CONF}
    assert pyproject["tool"]["setuptools"]["packages"] == ["my_lora"]


def test_the_documented_method_trains(package: None) -> None:
    answer = run("train", "adapter=bias", *toy_run("trainer.max_steps=3", "hydra.run.dir=run"))
    assert answer.code == 0, answer.err
    record = run_folder.read(Path("run"))
    assert record["params"]["adapter"] == 2 * (4 * 32 + 64 + 32)  # a bias for each output of two layers' linears
    assert set(record["targets"].values()) == {0}
    answer = run("export", "run=run", "format=merged", "output=merged")
    assert answer.code == 0, answer.err


@pytest.mark.parametrize(
    "axes",
    [
        [],
        ["adapter.magnitude=true", "adapter.init=pissa", "adapter.gate=0.5"],
        ["adapter.allocation=sensitivity", "adapter.scaling=rank_stable"],
    ],
)
def test_the_documented_variant_trains(axes: list[str], package: None) -> None:
    arguments = ["trainer.max_steps=3", "hydra.run.dir=run", "adapter.rank=2", *axes]
    answer = run("train", "adapter=gated", *toy_run(*arguments))
    assert answer.code == 0, answer.err
    record = run_folder.read(Path("run"))
    gates = sum(record["targets"].values())
    plain = sum(rank * (32 + 32) for name, rank in record["targets"].items() if "attention" in name)
    wide = sum(rank * (32 + 64) for name, rank in record["targets"].items() if "attention" not in name)
    magnitudes = 2 * (4 * 32 + 64 + 32) if "adapter.magnitude=true" in axes else 0
    assert record["params"]["adapter"] == plain + wide + magnitudes + gates  # a gate for each rank
    for format_ in ("merged", "peft"):
        answer = run("export", "run=run", f"format={format_}", f"output={format_}")
        assert answer.code == 0, answer.err
    toy = ["data=toy", "data.train_rows=40", "data.validation_rows=16"]
    answer = run("eval", "run=run", *toy, "name=again")
    assert answer.code == 0, answer.err
    evaluation = yaml.safe_load(Path("run/evaluations/again.json").read_text(encoding="utf-8"))
    assert evaluation["metrics"]["validation/nll"] == pytest.approx(record["metrics"]["validation/nll"], abs=1e-6)


@torch.no_grad()
def test_the_initial_gate_is_part_of_what_pissa_subtracts(package: None) -> None:
    settings = vars(adapter("lora", "init=pissa", "magnitude=true", "rank=4")) | {"method": "gated", "gate": 0.5}
    made = pack("bert", (method_class("gated")(**settings), 0)).eval()
    batch = random_batch(made.backbone)
    frozen = pack("bert", (adapter("head_only"), 0)).eval()
    torch.testing.assert_close(made(batch), frozen(batch), atol=1e-5, rtol=0)


def test_the_documented_metric_is_computed(package: None) -> None:
    answer = run("train", "metric=[cost]", *toy_run("hydra.run.dir=run"))
    assert answer.code == 0, answer.err
    assert run_folder.read(Path("run"))["metrics"]["validation/cost"] >= 0


def test_the_documented_model_family_equals_the_model(package: None, backbone: Callable[..., Any]) -> None:
    tokenizer = backbone("tiny_bert").tokenizer
    sizes = {"dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 64}
    config = transformers.DistilBertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes)
    network = transformers.AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
    enliven(network.eval()).save_pretrained("MODEL")
    tokenizer.save_pretrained("MODEL")
    family = lora_bench.backbones.families.family_class("distilbert")
    attached = family.make_backbone(None, network, tokenizer, set(), "qqp")
    batch = dataclasses.replace(random_batch(attached), token_type_ids=None)
    for depth in range(4):
        logits = attached.suffix(attached.prefix(batch, depth), batch, depth)
        assert logits.tolist() == [pytest.approx(row, abs=1e-5) for row in reference(network, batch).tolist()]
    overrides = ["model=distilbert_direct", "model.path=MODEL", "adapter.target_modules=qv", "hydra.run.dir=run"]
    answer = run("train", *toy_run(*overrides))
    assert answer.code == 0, answer.err
    assert len(run_folder.read(Path("run"))["targets"]) == 2 * 3


def test_the_documented_yamls_are_used(in_tmp: Path, backbone: Callable[..., Any]) -> None:
    tiny = backbone("tiny_bert")
    tiny.network.save_pretrained("MODEL")
    tiny.tokenizer.save_pretrained("MODEL")
    Path("PAIRS").mkdir()
    rows = [f"left text {i}\tright text {i % 7}\t{i % 2}" for i in range(40)]
    for split in ("train", "validation"):
        Path(f"PAIRS/{split}.tsv").write_text("\n".join(["left\tright\tsame", *rows]) + "\n", encoding="utf-8")
    write_named_blocks("DIR/", in_tmp)
    arguments = "train --config-dir DIR model=mine data=mine metric=[mine]"
    assert f"lora-bench {arguments}" in COMMAND_LINES
    answer = run(
        *arguments.split(), "adapter=mine", "trainer.max_steps=1", "trainer.precision=fp32", "hydra.run.dir=run"
    )
    assert answer.code == 0, answer.err
    record = run_folder.read(in_tmp / "run")
    assert {"validation/jaccard", "validation/f2", "validation/errors"} <= record["metrics"].keys()
    assert set(record["targets"].values()) == {4}


@pytest.mark.parametrize("block", [block for language, block in BLOCKS if language == "python"])
def test_python_blocks_are_valid(block: str) -> None:
    compile(block, "documentation", "exec")


# -- language and links --


def prose(text: str) -> str:
    """Return a page without code blocks, comments, tables and headings."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^(\||#|<!--).*\n", "\n", text, flags=re.MULTILINE)


def words(text: str) -> list[str]:
    """Return the words of a text: a code span, a link's text and a number count as they are read."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`[^`]*`", "code", text)
    return [word for word in text.split() if re.search(r"\w", word)]


def sentences(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n|^\s*(?:[-*]|\d+\.) ", prose(text), flags=re.MULTILINE):
        protected = re.sub(r"`[^`]*`|\([^)]*\)", lambda span: span[0].replace(". ", "·").replace(": ", "·"), paragraph)
        yield from re.split(r"(?<=[.!?])\s+", " ".join(protected.split()))


@pytest.mark.parametrize("name", WRITTEN)
def test_sentences_and_cells_are_short(name: str) -> None:
    long = [sentence for sentence in sentences(TEXTS[name]) if len(words(sentence)) > MAX_WORDS]
    assert not long
    text = re.sub(r"^```.*?^```", "", TEXTS[name], flags=re.MULTILINE | re.DOTALL)
    rows = re.findall(r"^\|(.*)\|$", text, re.MULTILINE)
    cells = [cell for row in rows for cell in row.split(" | ") if len(words(cell)) > MAX_WORDS_OF_A_CELL]
    assert not cells


@pytest.mark.parametrize("name", WRITTEN)
def test_prose_is_wrapped(name: str) -> None:
    wide = [line for line in prose(TEXTS[name]).splitlines() if len(line) > MAX_COLUMNS and "](" not in line]
    assert not wide


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_to_files(name: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", TEXTS[name]):
        assert ((ROOT / name).parent / target).exists(), target


def test_every_page_is_in_the_navigation() -> None:
    def pages(entries: list[Any]) -> Iterator[str]:
        for entry in entries:
            (value,) = entry.values()
            yield from pages(value) if isinstance(value, list) else [value]

    settings = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))
    assert sorted(pages(settings["project"]["nav"])) == sorted(str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md"))


def test_the_readme_is_short() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= 180


# -- scripts and continuous integration --


def test_ci_runs_the_test_command_of_the_readme() -> None:
    command = 'pip install -e ".[dev]" && pytest -n logical'
    assert f"```bash\n{command}\n```" in TEXTS["README.md"]
    assert f"{command} " in (ROOT / "scripts" / "test").read_text(encoding="utf-8")
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert ci[-4:] == ["scripts/install", "scripts/lint", "scripts/docs", "scripts/test"]


def test_the_public_workflow_runs_the_same_scripts() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8"))
    job = workflow["jobs"]["tests"]
    assert [step["run"] for step in job["steps"] if "run" in step] == [
        "scripts/install",
        "scripts/lint",
        "scripts/test",
    ]
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]


def test_citation_and_hooks_are_valid_yaml() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert {"ruff-check", "ruff-format"} <= {hook["id"] for repo in hooks["repos"] for hook in repo["hooks"]}
