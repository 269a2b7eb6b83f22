"""`lora-bench eval run=DIR data=…`: a finished run on another data set; the figures go into the run's own folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from lora_bench import config
from lora_bench.data import sources
from lora_bench.errors import UserError
from lora_bench.evaluation.metrics import check_metrics, score
from lora_bench.predict import FinishedRun
from lora_bench.progress import metric_table
from lora_bench.record import Run

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from rich.console import Console


def run_eval(cfg: DictConfig, *, data_choice: str, console: Console) -> None:
    """Score every labelled split but train, and write `evaluations/<name>.json` with the predictions beside it."""
    data = config.build_data(cfg.data)
    metrics = config.build_metrics(cfg.metric)
    check_metrics(metrics)
    splits = sources.reported(sources.load(data))
    if not splits:
        raise UserError("there is no labelled validation or test split to score", key="data", value=data_choice)
    run = FinishedRun.load(cfg.run, device=cfg.device)
    if len(data.text_columns) != len(run.experiment.data.text_columns):
        reason = f"has {len(data.text_columns)} where the run was trained on {len(run.experiment.data.text_columns)}"
        raise UserError(reason, key="data.text_columns", value=data.text_columns)

    found: dict[str, float | None] = {}
    predictions = {}
    for name, split in splits.items():
        assert split.labels is not None
        scores = run.score(split, cached=True)
        found |= {f"{name}/{key}": value for key, value in score(scores, split.labels, metrics).items()}
        predictions[name] = (split.ids, split.labels, scores)
    described = {
        "source": data.source,
        "path": getattr(data, "path", None),
        "choice": data_choice,
        "fingerprint": {name: split.fingerprint() for name, split in splits.items()},
        **sources.examine(splits),
    }
    name = cfg.name or (Path(data.path).stem if isinstance(data, config.FileData) else data_choice)
    path = Run(run.folder, run.record).write_evaluation(str(name), {"data": described, "metrics": found}, predictions)
    console.print(metric_table(found))
    console.print(Text(f"written: {path}"), soft_wrap=True)  # a path is one word, however long
