"""The reference of the benchmarks: PEFT and the Hugging Face Trainer on the same pairs, at their fastest.

Batches are grouped by length and padded no further than needed, except for a workload with `run_glue_defaults`. Needs
the extra `dev` (peft, accelerate).
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from composition import build_experiment

if TYPE_CHECKING:
    from lora_bench.run.settings import Experiment

BATCH_SIZE = 32
MAX_LENGTH = 128
MINILM_LAYERS = 6


@dataclass(frozen=True)
class Workload:
    """A training or an evaluation that both sides run."""

    adapter: str = "lora"
    rank: int = 8
    target_modules: str = "all"
    top_layers: int | None = None
    """Adapt only the last layers, so many; None: all."""
    precision: str = "fp32"
    epochs: int = 1
    run_glue_defaults: bool = False
    """The Trainer has the defaults of transformers' run_glue: fp32, padded to 128 tokens, not grouped."""
    evaluation_only: bool = False
    """Score the reported split and train nothing."""
    with_evaluation: bool = False
    """As in a user's run, score the selection split after each epoch and the reported split at the end."""


def shared_overrides(data: str, pairs: int) -> list[str]:
    """Return the overrides that both sides share: model, pairs and batch size."""
    return [
        "model=minilm",
        "data=pairs",
        f"data.path={data}",
        f"data.train_size={pairs}",
        "data.selection_size=1000",
        f"trainer.batch_size={BATCH_SIZE}",
    ]


def epoch_experiment(data: str, pairs: int, *overrides: str) -> Experiment:
    """Return the settings of one epoch on so many pairs, with further overrides."""
    fixed = [*shared_overrides(data, pairs), "trainer.epochs=1", "optimizer.lr=1e-4"]
    replaced = {override.partition("=")[0] for override in overrides}
    kept = [override for override in fixed if override.partition("=")[0] not in replaced]
    return build_experiment([*kept, *overrides])


def run_trainer(workload: Workload, data: str, pairs: int) -> dict[str, float]:
    """Train, or score the reported split, with PEFT and the Trainer; return its pairs per second."""
    import transformers

    from lora_bench.backbones.locate import locate
    from lora_bench.run.loaded_data import LoadedData

    transformers.logging.set_verbosity_error()
    experiment = epoch_experiment(data, pairs)
    splits = LoadedData.load(experiment.data).splits
    folder = locate(experiment.model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    padding: dict[str, Any] = {"padding": "max_length"} if workload.run_glue_defaults else {}

    def encode(name: str) -> Any:
        return encode_split(tokenizer, splits[name], **padding)

    with tempfile.TemporaryDirectory() as output:
        trainer = transformers.Trainer(
            model=build_model(workload, folder),
            args=training_arguments(workload, output),
            train_dataset=None if workload.evaluation_only else encode("train"),
            eval_dataset=sort_by_length(encode("selection" if workload.with_evaluation else "validation")),
            data_collator=transformers.DataCollatorWithPadding(tokenizer),
        )
        if workload.evaluation_only:
            return {"pairs_per_second": trainer.evaluate()["eval_samples_per_second"]}
        seconds = trainer.train().metrics["train_runtime"]
        if workload.with_evaluation:
            trainer.predict(sort_by_length(encode("validation")))
        return {"pairs_per_second": workload.epochs * pairs / seconds}


def encode_split(tokenizer: Any, examples: Any, max_length: int = MAX_LENGTH, **padding: str) -> Any:
    """Return the tokens and labels of a split as a `datasets.Dataset`."""
    import datasets

    first, second = examples.texts
    rows = tokenizer(list(first), list(second), truncation=True, max_length=max_length, **padding)
    return datasets.Dataset.from_dict({**rows, "labels": examples.labels.tolist()})


def sort_by_length(dataset: Any) -> Any:
    """Return the rows of a data set from the shortest to the longest."""
    return dataset.map(lambda row: {"length": len(row["input_ids"])}).sort("length")


def build_model(workload: Workload, folder: str) -> Any:
    """Return MiniLM with a classification head, and with PEFT's adapter unless it is fully fine-tuned."""
    import peft
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    if workload.adapter == "full":
        return model
    names = r"(query|value)" if workload.target_modules == "qv" else r"(query|key|value|dense)"
    top = workload.top_layers
    layers = "|".join(map(str, range(MINILM_LAYERS - top, MINILM_LAYERS))) if top else r"\d+"
    config = peft.LoraConfig(
        task_type="SEQ_CLS",
        r=workload.rank,
        lora_alpha=16,
        target_modules=rf".*encoder\.layer\.({layers})\..*{names}",
        modules_to_save=["pooler", "classifier"],
        use_dora=workload.adapter == "dora",
    )
    return peft.get_peft_model(model, config)


def training_arguments(workload: Workload, output: str) -> Any:
    """Return the Trainer's settings: nothing is saved, logged or reported."""
    import torch
    import transformers

    return transformers.TrainingArguments(
        output,
        per_device_train_batch_size=BATCH_SIZE,
        per_device_eval_batch_size=128,
        num_train_epochs=workload.epochs,
        learning_rate=1e-4,
        use_cpu=not torch.cuda.is_available(),
        bf16=workload.precision == "bf16",
        train_sampling_strategy="random" if workload.run_glue_defaults else "group_by_length",
        eval_strategy="epoch" if workload.with_evaluation else "no",
        save_strategy="no",
        report_to="none",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
