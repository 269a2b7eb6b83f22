"""The rival of the benchmarks: PEFT and the Hugging Face Trainer, on the same pairs, at their fastest.

Batches are grouped by length and nothing is padded further than it must be, unless the work is `plain`. Needs the extra
`dev` (peft, accelerate).
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import Any

BATCH = 32


@dataclass(frozen=True)
class Work:
    """The training work of both sides."""

    adapter: str = "lora"
    rank: int = 8
    targets: str = "all"
    top: int | None = None
    """Only the last so many layers; None: all."""
    precision: str = "fp32"
    epochs: int = 1
    plain: bool = False
    """The rival in the defaults of transformers' run_glue (fp32, padded to 128 tokens, not grouped), we in ours."""
    evaluates: bool = False
    """Nothing is trained: the reported split is scored."""
    whole: bool = False
    """As in a user's run, the selection split is scored after each epoch, and the reported split at the end."""


def shared_overrides(data: str, pairs: int) -> list[str]:
    """The overrides that say what both sides train on."""
    overrides = [
        "model=minilm",
        "data=pairs",
        f"data.path={data}",
        f"data.train_size={pairs}",
        "data.selection_size=1000",
    ]
    return [*overrides, f"trainer.batch_size={BATCH}"]


def experiment_on(data: str, pairs: int, *overrides: str) -> Any:
    from hydra import compose, initialize_config_dir

    from lora_bench.config.compose import register_with_hydra
    from lora_bench.config.groups import conf_folder
    from lora_bench.run.settings import Experiment

    register_with_hydra()
    fixed = [*shared_overrides(data, pairs), "trainer.epochs=1", "optimizer.lr=1e-4"]
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return Experiment.build(compose("config", [*fixed, *overrides]))


def theirs(work: Work, data: str, pairs: int) -> dict[str, float]:
    """Train, or score the reported split, with PEFT and the Trainer."""
    import datasets
    import peft
    import torch
    import transformers

    from lora_bench.backbones.locate import locate
    from lora_bench.run.inputs import load_splits

    transformers.logging.set_verbosity_error()
    experiment = experiment_on(data, pairs)
    splits, _ = load_splits(experiment.data)
    folder = locate(experiment.model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    padding = {"padding": "max_length"} if work.plain else {}

    def encode(name: str) -> Any:
        first, second = splits[name].texts
        rows = tokenizer(list(first), list(second), truncation=True, max_length=128, **padding)
        return datasets.Dataset.from_dict({**rows, "labels": splits[name].labels.tolist()})

    def by_length(name: str) -> Any:
        return encode(name).map(lambda row: {"length": len(row["input_ids"])}).sort("length")

    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    if work.adapter != "full":
        names = r"(query|value)" if work.targets == "qv" else r"(query|key|value|dense)"
        layers = "|".join(map(str, range(6 - work.top, 6))) if work.top else r"\d+"
        config = peft.LoraConfig(
            task_type="SEQ_CLS",
            r=work.rank,
            lora_alpha=16,
            target_modules=rf".*encoder\.layer\.({layers})\..*{names}",
            modules_to_save=["pooler", "classifier"],
            use_dora=work.adapter == "dora",
        )
        model = peft.get_peft_model(model, config)
    with tempfile.TemporaryDirectory() as folder:
        settings = transformers.TrainingArguments(
            folder,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=128,
            num_train_epochs=work.epochs,
            learning_rate=1e-4,
            use_cpu=not torch.cuda.is_available(),
            bf16=work.precision == "bf16",
            train_sampling_strategy="random" if work.plain else "group_by_length",
            eval_strategy="epoch" if work.whole else "no",
            save_strategy="no",
            report_to="none",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = transformers.Trainer(
            model=model,
            args=settings,
            train_dataset=None if work.evaluates else encode("train"),
            eval_dataset=by_length("selection" if work.whole else "validation"),
            data_collator=transformers.DataCollatorWithPadding(tokenizer),
        )
        if work.evaluates:
            return {"pairs_per_second": trainer.evaluate()["eval_samples_per_second"]}
        seconds = trainer.train().metrics["train_runtime"]
        if work.whole:
            trainer.predict(by_length("validation"))
        return {"pairs_per_second": work.epochs * pairs / seconds}
