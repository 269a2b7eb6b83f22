"""lora-bench: which low-rank adapter is best for a text classifier, at what cost, and is the difference real?

`load` loads a finished run; `lora_bench.api` trains, sweeps and compares:

    import lora_bench
    run = lora_bench.load("outputs/2026-11-22/12-00-00-000000-ab12cd")
    run.predict([("How do I learn Go?", "What is the best way to learn Go?")])   # P(duplicate) of each pair
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from lora_bench.run.finished_run import FinishedRun

__all__ = ["load"]


def __getattr__(name: str) -> str:
    """Return `__version__`, which takes longer to find out than the rest of the package to import."""
    if name == "__version__":
        from importlib.metadata import version

        return version("lora-bench")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load(
    run: str | Path, *, device: str = "auto", model_path: str | None = None, tokenizer: str | None = None
) -> FinishedRun:
    """Load a finished run for prediction: backbone, adapter and head of its best evaluation.

    Its `predict` returns (N,) P(label 1) of two classes, (N, C) probabilities of more, in the order of its
    `label_names`, or (N,) numbers of a regression.

    Args:
        run: the run's folder; its name, the first digits of its id, or `last`, looked for below `outputs/`; or
            `hf://OWNER/NAME`, with or without `@REVISION`, which is downloaded.
        device: `cpu`, `cuda` or `auto`.
        model_path: the new path of its backbone, if that was moved.
        tokenizer: the new path of its tokenizer, if that was moved.

    Raises:
        UserError: the folder holds no finished run of one task, or its backbone cannot be loaded or has other weights.
    """
    from lora_bench.run.finished_run import FinishedRun

    return FinishedRun.load(run, device=device, model_path=model_path, tokenizer=tokenizer)
