"""Names that other training programs give to settings, with the setting of lora-bench.

They are those of transformers' `TrainingArguments` and of its examples, of PEFT's configs, of LLaMA-Factory and of
Axolotl.
"""

from __future__ import annotations

_BATCH = "trainer.batch_size is the number of examples per optimizer update, on all devices together"
_STEPS = "It is called trainer.eval_every here: steps between evaluations, by default one per epoch."

FOREIGN_KEYS: dict[str, str] = {
    "per_device_train_batch_size": f"{_BATCH}.",
    "per_gpu_train_batch_size": f"{_BATCH}.",
    "train_batch_size": f"{_BATCH}.",
    "gradient_accumulation_steps": (
        f"{_BATCH}; trainer.micro_batch_size is the number per forward pass. 4 steps of 16 examples are "
        "trainer.batch_size=64 trainer.micro_batch_size=16."
    ),
    "per_device_eval_batch_size": "It is called trainer.eval_batch_size here.",
    "num_train_epochs": "It is called trainer.epochs here.",
    "num_epochs": "It is called trainer.epochs here.",
    "max_train_steps": "It is called trainer.max_steps here.",
    "learning_rate": "It is called optimizer.lr here; its default depends on the method.",
    "lr_scheduler_type": "It is called optimizer.schedule here: linear, cosine or constant.",
    "lr_scheduler": "It is called optimizer.schedule here: linear, cosine or constant.",
    "warmup_ratio": "It is called optimizer.warmup here: a fraction of all steps.",
    "warmup_steps": "Give optimizer.warmup, a fraction of all steps: 60 of 1,000 steps are optimizer.warmup=0.06.",
    "adam_beta1": "It is called optimizer.beta1 here.",
    "adam_beta2": "It is called optimizer.beta2 here.",
    "adam_epsilon": "It is called optimizer.eps here.",
    "max_grad_norm": "It is called optimizer.grad_clip_norm here.",
    "gradient_clip_val": "It is called optimizer.grad_clip_norm here.",
    "label_smoothing_factor": "Leave it out: label smoothing was removed, because it improved no score.",
    "optim": "The optimizer is AdamW; its settings are optimizer.lr, optimizer.weight_decay and others.",
    "r": "The rank is called adapter.rank here.",
    "lora_r": "It is called adapter.rank here.",
    "lora_rank": "It is called adapter.rank here.",
    "lora_alpha": "It is called adapter.alpha here.",
    "lora_dropout": "It is called adapter.dropout here.",
    "lora_target": "It is called adapter.target_modules here: all, qv, or a regular expression.",
    "lora_target_modules": "It is called adapter.target_modules here: all, qv, or a regular expression.",
    "layers_to_transform": "It is called adapter.layers here: all, top:3, or a list.",
    "init_lora_weights": "It is called adapter.init here.",
    "loraplus_lr_ratio": "It is called adapter.lr_ratio here; adapter=lora_plus sets it.",
    "use_rslora": "Choose adapter=rslora, or adapter.scaling=rank_stable.",
    "use_dora": "Choose adapter=dora, or adapter.magnitude=true.",
    "peft_method": "Choose a method: adapter=lora.",
    "finetuning_type": "Choose a method: adapter=lora, or adapter=full for full fine-tuning.",
    "rank_pattern": "Give adapter.allocation a list of expression=rank.",
    "modules_to_save": "Leave it out: the classification head is trained with every adapter.",
    "load_in_4bit": "Give model.quantize=nf4, with any method.",
    "load_in_8bit": "Give model.quantize=int8, with any method.",
    "quantization_bit": "Give model.quantize: nf4, int8, int4 or int2.",
    "fp16": "Half precision is bf16 here: trainer.precision=bf16, or auto, which takes it where it is fast.",
    "bf16": "Give trainer.precision=bf16, or auto, which takes it where it is fast.",
    "mixed_precision": "It is called trainer.precision here: auto, fp32 or bf16.",
    "torch_dtype": "Give trainer.precision: auto, fp32 or bf16.",
    "no_cuda": "Give trainer.device=cpu.",
    "use_cpu": "Give trainer.device=cpu.",
    "max_seq_length": "It is called data.max_length here.",
    "max_seq_len": "It is called data.max_length here.",
    "max_source_length": "It is called data.max_length here.",
    "model_max_length": "It is called data.max_length here.",
    "sequence_len": "It is called data.max_length here.",
    "cutoff_len": "It is called data.max_length here.",
    "model_name_or_path": "Choose model=NAME, or give model=auto with model.hub_id=NAME or model.path=DIR.",
    "pretrained_model_name_or_path": "Choose model=NAME, or give model=auto with model.hub_id=NAME or model.path=DIR.",
    "base_model": "Choose model=NAME, or give model=auto with model.hub_id=NAME or model.path=DIR.",
    "model_id": "Choose model=NAME, or give model=auto with model.hub_id=NAME or model.path=DIR.",
    "tokenizer_name": "It is called model.tokenizer here; by default the tokenizer is beside the weights.",
    "tokenizer_name_or_path": "It is called model.tokenizer here; by default the tokenizer is beside the weights.",
    "dataset_name": "Choose data=NAME, or give data=hub with data.hub_id=NAME.",
    "dataset_config_name": "It is called data.hub_config here.",
    "task_name": "Choose data=NAME.",
    "train_file": "Give data=files data.path=DIR; the folder holds train and validation files.",
    "validation_file": "Give data=files data.path=DIR; the folder holds train and validation files.",
    "max_train_samples": "It is called data.train_size here.",
    "num_labels": "Leave it out: the classes are those of the data, or of data.label_names.",
    "label_column_name": "It is called data.label_column here.",
    "output_dir": "Give hydra.run.dir=DIR, or for a sweep hydra.sweep.dir=DIR; by default it is below outputs/.",
    "overwrite_output_dir": "Leave it out: a run never overwrites another one. Give a new hydra.run.dir=DIR.",
    "resume_from_checkpoint": "Give resume=DIR with the folder of the run, or resume=last.",
    "eval_steps": _STEPS,
    "eval_strategy": _STEPS,
    "evaluation_strategy": _STEPS,
    "save_steps": "It is called trainer.checkpoint_every here: steps between checkpoints.",
    "save_strategy": "Give trainer.checkpoint_every: steps between checkpoints.",
    "save_total_limit": "Leave it out: the two newest checkpoints are kept until the run is done.",
    "load_best_model_at_end": "Leave it out: the state with the best trainer.main_metric is always kept.",
    "metric_for_best_model": "It is called trainer.main_metric here.",
    "run_name": "It is called name here.",
    "report_to": "Give tracking=tensorboard or another choice of tracking.",
    "logging_dir": "Give tracking=tensorboard.",
    "logging_steps": "Leave it out: progress is shown all the time, and each evaluation is in metrics.jsonl.",
    "gradient_checkpointing": "It is called trainer.activation_checkpointing here.",
    "fsdp": "Give trainer.sharding=fsdp under torchrun.",
    "deepspeed": "It is not supported; trainer.sharding=fsdp under torchrun shards the backbone.",
    "dataloader_num_workers": "Leave it out: texts are tokenised before training.",
}
"""The replacement of a setting of another program, by its name."""


def foreign_key_note(key: str) -> str | None:
    """Return what to give in place of a setting of another program; None if the name is not known.

    Args:
        key: as typed, with any group before it, and with `_` or `-` between its words.
    """
    return FOREIGN_KEYS.get(key.lstrip("-+~").rpartition(".")[2].replace("-", "_"))
