"""The metadata of a model card: the YAML header that the hub reads, with the results as its model index."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_bench.config.metric_names import display_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_bench.publishing.results import Result
    from lora_bench.publishing.source import PublishedRun

HUB_METRICS = {
    "mcc": "matthews_correlation",
    "macro_f1": "f1",
    "weighted_f1": "f1",
    "auroc": "roc_auc",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
    "r2": "r_squared",
    "brier": "brier_score",
}
"""Names of metrics on the hub, where they differ from ours."""
_TAGS = {"LORA": ["lora"], "ADALORA": ["lora"], "VERA": ["vera"]}
"""Further tags by type of PEFT."""


def card_metadata(run: PublishedRun, results: Sequence[Result], license_name: str | None) -> dict[str, Any]:
    """Return the metadata of a run's card, in the keys of the hub.

    Args:
        run: what is published.
        results: its metrics.
        license_name: an identifier of the hub, such as `apache-2.0`; None: the card names no licence.
    """
    library = "transformers" if run.is_full else "peft" if run.is_read_by_peft else "lora-bench"
    metadata: dict[str, Any] = {"license": license_name} if license_name else {}
    if run.base_id is not None:
        metadata |= {"base_model": run.base_id, "base_model_relation": "finetune" if run.is_full else "adapter"}
    metadata |= {
        "library_name": library,
        "pipeline_tag": "text-classification",
        "tags": list(
            dict.fromkeys(["lora-bench", run.method, *_TAGS.get(str(run.adapter_config.get("peft_type")), [])])
        ),
    }
    if run.data.get("hub_id"):
        metadata["datasets"] = [run.data["hub_id"]]
    metrics = [_hub_metric(result.metric) for result in results]
    metadata["metrics"] = list(dict.fromkeys(metrics))
    metadata["model-index"] = [{"name": run.repository.rpartition("/")[2], "results": _model_index(run, results)}]
    return metadata


def _model_index(run: PublishedRun, results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return the results by split, as the hub's model index has them."""
    entries = []
    for split in dict.fromkeys(result.split for result in results):
        dataset = {"type": run.data.get("hub_id") or run.data_name, "name": run.data_name, "split": split}
        if run.data.get("hub_config"):
            dataset["config"] = run.data["hub_config"]
        metrics = [
            {"type": _hub_metric(result.metric), "value": round(result.value, 6), "name": display_name(result.metric)}
            for result in results
            if result.split == split
        ]
        entries.append(
            {"task": {"type": "text-classification", "name": "Text classification"}, "dataset": dataset}
            | {"metrics": metrics}
        )
    return entries


def _hub_metric(name: str) -> str:
    return HUB_METRICS.get(name, name)
