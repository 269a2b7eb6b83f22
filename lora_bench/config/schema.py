"""Typed settings, and the one function that makes them from a config node.

A key's default lives in its YAML under `conf/`, its type and meaning in the dataclass here (an adapter's in its own
file under `adapters/`), its range check in `__post_init__`. Below this file and `train.py` nobody knows OmegaConf.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lora_bench.config.removed import removal_note
from lora_bench.errors import Code, require, require_number, require_one_of


@dataclass(frozen=True, kw_only=True)
class Model:
    """The pretrained network that is the frozen backbone. The first of the places that is given is used.

    Each family has a subclass, with the keys that only this family has.
    """

    family: str
    """The name of the module in `lora_bench/backbones/families/` that defines it; `auto` serves any classifier."""
    path: str | None
    """A local Hugging Face folder: config.json, weights in safetensors, tokenizer."""
    tokenizer: str | None
    """A local folder or hub id of the tokenizer, where it is not beside the weights."""
    package: str | None
    """An installed Python package with the weights inside (`model/` below its folder)."""
    sha256: str | None
    """The digest that `model.safetensors` must have, checked at load."""
    folder: str | None
    """A folder below the one that the environment variable LORA_BENCH_BACKBONES names."""
    hub_id: str | None
    """A model on the Hugging Face hub."""
    revision: str | None
    """Branch, tag or commit of that model on the hub."""
    random: dict[str, Any] | None
    """Settings of a Hugging Face config from which a random network is made: for tests."""

    def __post_init__(self) -> None:
        places = (self.path, self.package, self.folder, self.hub_id, self.random)
        require(
            any(places),
            "path",
            self.path,
            "names no weights",
            "Give model.path=DIR, a local Hugging Face folder.",
            code=Code.MISSING,
        )


@dataclass(frozen=True, kw_only=True)
class Head:
    """The classification head, trained with every adapter."""

    pair_features: bool | None
    """Add products and differences of the two texts' mean token vectors to the logits; null: if the model can tell
    the texts apart."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """A task: texts in one or two columns, labels 0 and 1."""

    source: str
    """`hub`, `files` or `toy`."""
    task: str
    """The task's short name; T5's template begins with it."""
    text_columns: list[str]
    """One column (single sentences) or two (pairs)."""
    label_column: str
    label_threshold: float | None
    """Labels are numbers in the source, and become 1 from this one on; null: they are 0 and 1 there."""
    label_names: list[str]
    """What label 0 and label 1 are called; the words that T5 answers with."""
    max_length: int
    """Tokens per pair; longer ones are truncated (and counted)."""
    train_size: int | None
    """Train on the first n rows of a fixed permutation of what the selection split leaves; null: on all."""
    selection_size: int | float
    """Rows (2 or more), or the fraction (below 1), of train set aside for choosing: stratified, fixed by split_seed."""
    split_seed: int
    """Fixes the selection split and the permutation that train_size cuts; not the run's seed."""
    perturb: Any
    """Transforms under which reported splits are scored once more: a name, a level, `all`, or a list; null: none."""
    perturb_seeds: int
    """How many times each split is perturbed, with the seeds 0, 1, …"""
    augment: Any
    """Transforms of training pairs, drawn anew in each epoch, named as in `perturb`; null: none."""
    augment_share: float
    """Share of the training pairs that are perturbed in each epoch."""
    intensity: float
    """Share, rounded up, of the places where a transform can act (a row's words, or its questions) at which it does."""
    unseen: bool
    """Whether reported splits are also scored on those rows alone none of whose texts was seen in training."""
    report: bool
    """Whether reported splits are scored at all; while something is chosen on the selection split, they are not."""
    tasks: list[str] | None
    """Choices of this group that one run learns, each as `data=NAME` alone would; null: the one that `data` names."""
    share: str
    """What they share: `adapter`, with a head for each; or `backbone`, each with an adapter and a head of its own."""
    temperature: float
    """How often each has its turn in a shared adapter: as its size to the power 1 / temperature, which is 1 or more."""

    def __post_init__(self) -> None:
        require_one_of("source", self.source, tuple(DATA))
        require(len(self.text_columns) in (1, 2), "text_columns", self.text_columns, "must name one or two columns")
        if self.label_threshold is not None:
            require(
                math.isfinite(self.label_threshold), "label_threshold", self.label_threshold, "is not a finite number"
            )
        require(
            len(self.label_names) == 2, "label_names", self.label_names, "must be two names, of label 0 and label 1"
        )
        require_number("max_length", self.max_length, 8)
        if self.train_size is not None:
            require_number("train_size", self.train_size, 1)
        size = self.selection_size
        require_number("selection_size", size, 0, open_low=True)
        is_size = 0 < size < 1 or (size >= 2 and size == int(size))
        require(is_size, "selection_size", size, "must be a fraction between 0 and 1 or a whole number of rows from 2")
        require_number("split_seed", self.split_seed, 0)
        require_number("perturb_seeds", self.perturb_seeds, 1, 1000)
        require_number("augment_share", self.augment_share, 0, 1, open_low=True)
        require_number("intensity", self.intensity, 0, 1, open_low=True)
        require_one_of("share", self.share, ("adapter", "backbone"))
        require_number("temperature", self.temperature, 1)
        for name in ("perturb", "augment"):
            asked = getattr(self, name)
            texts = [asked] if isinstance(asked, str) else asked
            listed = texts is None or (isinstance(texts, list) and all(isinstance(each, str) for each in texts))
            require(listed, name, asked, "is not a name or a list of names")


@dataclass(frozen=True, kw_only=True)
class HubData(Data):
    hub_id: str
    hub_config: str | None
    revision: str | None
    """Branch, tag or commit of the data set on the hub; null: the newest."""


@dataclass(frozen=True, kw_only=True)
class FileData(Data):
    path: str
    """A folder with train, validation and test files (.tsv, .csv, .jsonl or .parquet), or one file."""


@dataclass(frozen=True, kw_only=True)
class ToyData(Data):
    train_rows: int
    validation_rows: int
    generator_seed: int

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.text_columns) == 2, "text_columns", self.text_columns, "must name two columns: it makes pairs")
        require_number("train_rows", self.train_rows, 8)
        require_number("validation_rows", self.validation_rows, 8)
        require_number("generator_seed", self.generator_seed, 0)


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW (Loshchilov and Hutter 2019) with warm-up."""

    lr: float
    """Peak learning rate; the default is the adapter's own `default_lr`."""
    weight_decay: float
    """Decoupled decay; never on biases and norms."""
    beta1: float
    beta2: float
    eps: float
    warmup: float
    """Share of all steps over which the rate climbs from 0."""
    schedule: str
    """What follows the warm-up: `linear` (to 0), `cosine` (to 0) or `constant`."""
    grad_clip_norm: float | None
    """Largest 2-norm of a member's gradient; null: no clipping."""

    def __post_init__(self) -> None:
        require_number("lr", self.lr, 0, open_low=True)
        require_number("weight_decay", self.weight_decay, 0)
        require_number("beta1", self.beta1, 0, 0.999999)
        require_number("beta2", self.beta2, 0, 0.999999)
        require_number("eps", self.eps, 0, open_low=True)
        require_number("warmup", self.warmup, 0, 1)
        require_one_of("schedule", self.schedule, ("linear", "cosine", "constant"))
        if self.grad_clip_norm is not None:
            require_number("grad_clip_norm", self.grad_clip_norm, 0, open_low=True)


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """How long, in which portions, in which precision, and how often to look."""

    epochs: float
    max_steps: int | None
    """Stop after this many optimizer updates, whatever `epochs` says; null: epochs decide."""
    batch_size: int
    """Pairs per optimizer update."""
    micro_batch_size: int | None
    """Pairs of each member (in all their orders) per forward pass; gradients add up. null: what is quick."""
    eval_batch_size: int
    """Pairs per forward pass without gradients."""
    eval_every: int | None
    """Score the selection split every so many steps; null: at the end of each epoch. The last step is always scored."""
    early_stopping_patience: int | None
    """Stop after so many evaluations in a row without a better selection MCC; null: never."""
    stop_at: float | None
    """Stop at the first evaluation whose selection MCC is this or more; null: never. What it took is the run's cost."""
    score_both_orders: bool
    """Score each pair in both orders of its texts and take the mean probability, which depends on neither; a score
    costs twice as much."""
    objective: str
    """`cross_entropy`; or that of each pair in one order of its texts, and in the next epoch in the other
    (`either_order`); or on both orders of each pair, and how far the two answers differ (`order_consistency`); or the
    same on each pair as it is and perturbed (`perturb_consistency`)."""
    consistency_weight: float
    """What that difference counts beside the cross-entropy; a symmetric Kullback-Leibler divergence, in nats."""
    average: float
    """Share of the steps so far, the latest of them, over which weights are averaged: at each look the mean is scored
    and kept. 0: off."""
    checkpoint_every: int | None
    """Steps between checkpoints; null: one at each look at the selection split."""
    prefix_cache_bytes: float
    """Most bytes on disk for what frozen layers below the first adapted one make of the pairs: computed once, read by
    every later epoch and run. 0: computed anew at every step."""
    precision: str
    """`fp32`, `bf16`, or `auto`: bf16 where the device computes it fast."""
    device: str
    """`cpu`, `cuda`, or `auto`."""
    cuda_graphs: bool
    """On a GPU, record forward and backward pass once per shape of batch and replay them."""
    threads: int | None
    """CPU threads; null: what torch chooses."""

    def __post_init__(self) -> None:
        require_number("epochs", self.epochs, 0, open_low=True)
        for name in ("batch_size", "eval_batch_size"):
            require_number(name, getattr(self, name), 1)
        every = ("eval_every", "checkpoint_every", "early_stopping_patience")
        for name in ("max_steps", "micro_batch_size", "threads", *every):
            if getattr(self, name) is not None:
                require_number(name, getattr(self, name), 1)
        reason = f"is not one of {', '.join(OBJECTIVES)}"
        remedy = removal_note("trainer.objective", self.objective) or ""
        is_known = self.objective in OBJECTIVES
        require(is_known, "objective", self.objective, reason, remedy, code=Code.UNKNOWN_CHOICE)
        require_number("consistency_weight", self.consistency_weight, 0)
        if self.stop_at is not None:
            require_number("stop_at", self.stop_at, 0, 1, open_low=True)
        require_number("average", self.average, 0, 1)
        require_number("prefix_cache_bytes", self.prefix_cache_bytes, 0)
        require_one_of("precision", self.precision, ("auto", "fp32", "bf16"))
        require_one_of("device", self.device, ("auto", "cpu", "cuda"))


OBJECTIVES = ("cross_entropy", "either_order", "order_consistency", "perturb_consistency")


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A binary metric of torchmetrics, looked up by name: `BinarySpecificity` of `torchmetrics.classification`."""

    torchmetric: str
    direction: str
    """`up` where more is better, `down` where less is: the arrow in tables."""

    def __post_init__(self) -> None:
        require_one_of("direction", self.direction, ("up", "down"))


DATA: dict[str, type[Data]] = {"hub": HubData, "files": FileData, "toy": ToyData}


OPTIONAL = {"predictions", "resume", "split", "tasks", "tracking"}
"""Keys at the top of a config that may be left out; records of older versions do so."""


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How jobs of a sweep share one backbone; what a job learns it learns in any pack."""

    size: int | None
    """Jobs trained together; null: as many as memory takes, 1: one after another."""
    memory_bytes: int | None
    """What a pack may take; null: a share of what is free when it starts."""
    workers: int | None
    """Processes that a sweep's packs are spread over; null: one for each GPU, and without any one in all."""
    halving: bool
    """Stop the worse half of a pack's jobs, by selection MCC, after an eighth, a quarter and the half of the steps."""

    def __post_init__(self) -> None:
        for name in (name for name in ("size", "memory_bytes", "workers") if getattr(self, name) is not None):
            require_number(name, getattr(self, name), 1)
        require(
            self.size != 1 or not self.halving,
            "halving",
            "true",
            "compares jobs of a pack; pack.size=1 makes it one",
            code=Code.CONFLICT,
        )


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """Members that one run trains together, and whose probabilities are averaged (Wang, Aitchison and Rudolph 2023)."""

    members: int | None
    """How many; null: no ensemble."""
    vary: list[str]
    """In what they differ: `init` (random starts of adapter and head), `order` (of the pairs), `dropout`."""

    def __post_init__(self) -> None:
        if self.members is not None:
            remedy = "null trains one adapter as usual."
            require(self.members >= 2, "members", self.members, "is no ensemble: it takes at least 2 members", remedy)
            require_number("members", self.members, 2, 100)
        require(
            bool(self.vary), "vary", self.vary, "is empty: the members would all be the same", code=Code.INVALID_VALUE
        )
        require(set(self.vary) <= set(VARIED), "vary", self.vary, f"holds something else than {', '.join(VARIED)}")

    @property
    def size(self) -> int:
        return self.members or 1  # without an ensemble, one


VARIED = ("init", "order", "dropout")  # in what the members of an ensemble can differ
