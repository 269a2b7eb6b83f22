"""Typed settings of a run: a dataclass for each group of the configuration.

The default of a key is in its YAML file below `conf/`. Its type and meaning are in the dataclass here (those of an
adapter in `adapters/methods/`), and its range check in `__post_init__`, which raises a `UserError` that names the key.
`config.build` makes the dataclasses from a composed config.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from lora_bench.config.keys import renamed_choice_note
from lora_bench.config.metric_names import ALL_MAIN_METRICS, MAIN_METRIC_CHOICES, task_form
from lora_bench.config.removed import removal_note
from lora_bench.errors import Code, require, require_number, require_one_of

QUANT_BITS = {"nf4": 4, "int8": 8, "int4": 4, "int2": 2}
"""The quantisation types of frozen weights, with the bits that each takes for a value."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """The frozen backbone: a pretrained network and the sources of its weights, of which the first given is used."""

    family: str
    """Its name: `bert`, `t5`, one that an installed package registers, or `auto`, which serves any classifier."""
    path: str | None
    """A local Hugging Face folder: config.json, weights in safetensors, tokenizer."""
    tokenizer: str | None
    """A local folder or a hub id with the tokenizer; null: the tokenizer is beside the weights."""
    package: str | None
    """An installed Python package that holds the weights in its folder `model/`."""
    sha256: str | None
    """The SHA-256 digest that `model.safetensors` must have, checked when it is loaded; null: any."""
    folder: str | None
    """A folder below the folder that the environment variable LORA_BENCH_BACKBONES names."""
    hub_id: str | None
    """The id of a model on the Hugging Face hub."""
    revision: str | None
    """Branch, tag or commit of the model on the hub; null: the newest."""
    allow_bin: bool
    """Read `pytorch_model.bin`, with `torch.load(weights_only=True)`, where there is no `model.safetensors`."""
    random: dict[str, Any] | None
    """Settings of a Hugging Face config; a network with random weights is made of it, for tests."""
    quantize: str | None
    """Hold the weights of all linears of the layers quantised: `nf4`, `int8`, `int4`, `int2`; null: not quantised.
    Weights that `adapter.quantize` concerns have its type."""
    quantize_embeddings: str | None
    """Hold the token embeddings, and the output embeddings of a language model, quantised: `int8`, with a scale for
    each token; null: not quantised."""

    def __post_init__(self) -> None:
        """Refuse a model without a source of weights, and unknown types of quantisation.

        Whether a source exists is not checked here.
        """
        sources = (self.path, self.package, self.folder, self.hub_id, self.random)
        require(
            any(sources),
            "path",
            self.path,
            "names no weights",
            "Give model.path=DIR, a local Hugging Face folder, or model.hub_id=NAME, a model on the Hugging Face hub.",
            code=Code.MISSING,
        )
        if self.quantize is not None:
            require_one_of("quantize", self.quantize, tuple(QUANT_BITS))
        if self.quantize_embeddings is not None:
            require_one_of("quantize_embeddings", self.quantize_embeddings, ("int8",))


@dataclass(frozen=True, kw_only=True)
class Head:
    """The classification head, trained with every adapter."""

    pair_features: bool | None
    """Add products and differences of the two texts' mean token vectors to the logits, of a single text the vector
    itself; null: if the model can tell the texts apart."""
    differences: str | None
    """Differences among the pair features: `absolute`, which do not depend on the order of the texts, or `signed`;
    null: signed if `data.relation` is entailment."""
    fit_batches: int
    """Training batches of each task that the output layer, pair features included, is fitted to before the first step,
    with the backbone as it is; 0: it starts at random."""

    def __post_init__(self) -> None:
        """Refuse a negative number of batches, and an unknown kind of differences."""
        require_number("fit_batches", self.fit_batches, 0, 10_000)
        if self.differences is not None:
            require_one_of("differences", self.differences, ("absolute", "signed"))

    def has_signed_differences(self, data: Data) -> bool:
        """Return whether pair features of a task have signed differences: `differences`, or what null stands for."""
        return (self.differences or ("signed" if data.relation == DIRECTED else "absolute")) == "signed"


@dataclass(frozen=True, kw_only=True)
class Data:
    """A task: texts in one or two columns, and a class or a number for each."""

    source: str
    """`hub`, `files` or `toy`."""
    type: str
    """`classification`: two or more classes. `regression`: a number, such as a similarity score."""
    task: str
    """The short name of the task, the {task} of a template such as T5's."""
    text_columns: list[str]
    """One column (single sentences) or two columns (pairs)."""
    label_column: str
    """The column of the labels."""
    label_threshold: float | None
    """The column holds scores, and a score of at least this threshold is label 1 of two; null: it holds classes."""
    label_names: list[str] | None
    """The names of the classes 0, 1, …, which are also the label words of `model.form=text_to_text`. The column holds
    these names, or the numbers. null: the distinct values of the train split, sorted."""
    positive_label: str | None
    """The class of two whose F1, precision and recall are reported; null: the second one."""
    relation: str | None
    """The property of the texts that the label states, which decides which perturbations keep the label: `paraphrase`,
    `entailment` or `similarity` of two texts, or `form` (well-formedness); null: another one, such as a topic."""
    max_length: int
    """Maximum tokens of an example; longer examples are truncated and counted."""
    truncation: str
    """Where a longer example loses tokens: `longest_first` (at the end of its longer text), `first` or `second` (at the
    end of that text, or as `longest_first` if the other text alone is too long), or `middle` (of its longer text)."""
    train_size: int | None
    """Train on the first n rows of a fixed permutation of the train rows outside the selection split; null: on all."""
    selection_size: int | float
    """Size of the selection split as rows (2 or more) or as a fraction of train (below 1); stratified by label."""
    split_seed: int
    """Seed of the selection split and of the permutation that `train_size` cuts; independent of the run's seed."""
    perturb: Any
    """Transforms under which reported splits are scored again: a name, a level, `all`, or a list; null: none."""
    perturb_seeds: int
    """Number of perturbed copies of each split, with the seeds 0, 1, …"""
    augment: Any
    """Transforms of training examples, drawn anew in each epoch, named as in `perturb`; null: none."""
    augment_share: float
    """Fraction of the training examples that are transformed in each epoch."""
    intensity: float
    """Fraction, rounded up, of the positions (words of a row, or its texts) that a transform changes."""
    unseen: bool
    """Also score reported splits on the rows that share no text with the training data."""
    report: bool
    """Score the reported splits; false while something is chosen on the selection split."""
    tasks: list[str] | None
    """Choices of this group that one run learns together, each loaded as `data=NAME` loads it; null: one task."""
    share: str
    """`adapter`: tasks share one adapter, with a head for each task. `backbone`: each has its own adapter and head."""
    temperature: float
    """Sampling of tasks in a shared adapter, in proportion to rows ** (1 / temperature); at least 1."""

    def __post_init__(self) -> None:
        """Check numbers, columns and the form of lists; names of transforms are checked where they are looked up.

        Raises:
            UserError: naming the key. `max_length` is at least 8, `train_size`, `perturb_seeds` and `temperature` at
                least 1, shares are in (0, 1], and `selection_size` is a fraction below 1 or an integer from 2.
        """
        require_one_of("source", self.source, tuple(DATA))
        require(len(self.text_columns) in (1, 2), "text_columns", self.text_columns, "must name one or two columns")
        is_distinct = len(set(self.text_columns)) == len(self.text_columns)
        require(is_distinct, "text_columns", self.text_columns, "names a column twice", "Name each column once.")
        has_label = self.label_column in self.text_columns
        reason = f"names {self.label_column}, which is data.label_column: the model would read the label"
        remedy = "Name the columns of the texts only."
        require(not has_label, "text_columns", self.text_columns, reason, remedy, code=Code.CONFLICT)
        if self.label_threshold is not None:
            require(
                math.isfinite(self.label_threshold), "label_threshold", self.label_threshold, "is not a finite number"
            )
        require_one_of("type", self.type, TASK_TYPES)
        self._check_labels()
        if self.relation is not None:
            require_one_of("relation", self.relation, RELATIONS)
        require_number("max_length", self.max_length, 8)
        require_one_of("truncation", self.truncation, TRUNCATIONS)
        has_text = self.truncation != "second" or len(self.text_columns) == 2
        reason = "names the second of two texts, and data.text_columns has one"
        require(has_text, "truncation", self.truncation, reason, code=Code.CONFLICT)
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
            value = getattr(self, name)
            names = [value] if isinstance(value, str) else value
            is_listed = names is None or (isinstance(names, list) and all(isinstance(item, str) for item in names))
            require(is_listed, name, value, "is not a name or a list of names")

    @property
    def outputs(self) -> int:
        """Number of outputs of the model: the classes, or 1 for regression. The label names must be known."""
        if self.type == "regression":
            return 1
        assert self.label_names is not None
        return len(self.label_names)

    @property
    def form(self) -> str:
        """The form of the task: a key of `SHOWN_METRICS`. The label names must be known."""
        return task_form(self.type, self.outputs)

    @property
    def is_symmetric(self) -> bool:
        """True if the examples are pairs of texts whose label is the same in both orders."""
        return len(self.text_columns) == 2 and self.relation in SYMMETRIC

    def _check_labels(self) -> None:
        """Check that the settings of labels are consistent with one another and with the type of the task.

        Raises:
            UserError: naming the key.
        """
        names = self.label_names
        if self.type == "regression":
            for name in ("label_threshold", "label_names", "positive_label"):
                value = getattr(self, name)
                remedy = "Set it to null, or data.type=classification."
                reason = "is about classes, and data.type=regression has none"
                require(value is None, name, value, reason, remedy, code=Code.CONFLICT)
            return
        if names is not None:
            require(len(names) >= 2, "label_names", names, "must be two or more names")
            require(all(names), "label_names", names, "has an empty name")
            require(len(set(names)) == len(names), "label_names", names, "has a name twice")
        if self.label_threshold is not None:
            is_binary = names is None or len(names) == 2
            require(is_binary, "label_names", names, "must be two names where data.label_threshold is given")
        if self.positive_label is not None and names is not None:
            reason = "says which class of two binary F1 is about, and there are more"
            remedy = "Leave it out: F1 is then the mean over the classes."
            require(len(names) == 2, "positive_label", self.positive_label, reason, remedy, code=Code.CONFLICT)
            require_one_of("positive_label", self.positive_label, tuple(names))


SPLITS = ("train", "validation", "test")
"""Splits of the data; the last two are reported if they have labels."""

TASK_TYPES = ("classification", "regression")
"""Values of `data.type`."""

RELATIONS = ("paraphrase", "entailment", "similarity", "form")
"""Values of `data.relation`."""
SYMMETRIC = ("paraphrase", "similarity")
"""Relations whose label is the same for both orders of the two texts."""
DIRECTED = "entailment"
"""The relation of which it is known that the label depends on the order of the two texts."""

TRUNCATIONS = ("longest_first", "first", "second", "middle")
"""Values of `data.truncation`."""


@dataclass(frozen=True, kw_only=True)
class HubData(Data):
    """A data set of the Hugging Face hub."""

    hub_id: str
    """Its id, as `nyu-mll/glue`."""
    hub_config: str | None
    """Its configuration, as `qqp`; null: it has one only."""
    revision: str | None
    """Branch, tag or commit of the data set on the hub; null: the newest."""
    splits: dict[str, str] | None
    """The split of the hub that is used as `train`, `validation` or `test`; null: the splits of these names."""

    def __post_init__(self) -> None:
        """Check the settings of `Data`, and that `splits` has no other keys than the three splits.

        Raises:
            UserError: naming the key.
        """
        super().__post_init__()
        unknown = sorted(set(self.splits or {}) - set(SPLITS))
        reason = f"has keys other than {', '.join(SPLITS)}: {', '.join(unknown)}"
        require(not unknown, "splits", self.splits, reason)


@dataclass(frozen=True, kw_only=True)
class FileData(Data):
    """A data set in local files."""

    path: str
    """A folder with train, validation and test files (.tsv, .csv, .jsonl or .parquet). For evaluation also one file."""


@dataclass(frozen=True, kw_only=True)
class ToyData(Data):
    """Generated pairs, for tests and demonstrations."""

    train_rows: int
    """Rows of the train split, the selection split included."""
    validation_rows: int
    """Rows of the validation split."""
    generator_seed: int
    """Seed of the generator; independent of the run's seed."""

    def __post_init__(self) -> None:
        """Check the settings of `Data`, that there are two text columns, and that each split has at least 8 rows.

        Raises:
            UserError: naming the key.
        """
        super().__post_init__()
        require(len(self.text_columns) == 2, "text_columns", self.text_columns, "must name two columns: it makes pairs")
        require_number("train_rows", self.train_rows, 8)
        require_number("validation_rows", self.validation_rows, 8)
        require_number("generator_seed", self.generator_seed, 0)


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW (Loshchilov and Hutter 2019) with warm-up and a learning rate schedule."""

    lr: float
    """Peak learning rate; by default `adapter.default_lr`."""
    weight_decay: float
    """Decoupled weight decay, not applied to biases and norms."""
    beta1: float
    """Decay of the first moment."""
    beta2: float
    """Decay of the second moment."""
    eps: float
    """Term added to the denominator of the update."""
    warmup: float
    """Fraction of all steps over which the learning rate rises linearly from 0."""
    schedule: str
    """Learning rate after the warm-up: `linear` (to 0), `cosine` (to 0) or `constant`."""
    grad_clip_norm: float | None
    """Maximum 2-norm of the gradient of a member; null: no clipping."""

    def __post_init__(self) -> None:
        """Check the ranges: `lr` and `grad_clip_norm` above 0, `eps` from 1e-30, the betas below 1, `warmup` in [0, 1].

        Raises:
            UserError: naming the key, as for an unknown `schedule`.
        """
        require_number("lr", self.lr, 0, open_low=True)
        require_number("weight_decay", self.weight_decay, 0)
        require_number("beta1", self.beta1, 0, 0.999999)
        require_number("beta2", self.beta2, 0, 0.999999)
        require_number("eps", self.eps, 1e-30)  # the moments are in fp32
        require_number("warmup", self.warmup, 0, 1)
        require_one_of("schedule", self.schedule, ("linear", "cosine", "constant"))
        if self.grad_clip_norm is not None:
            require_number("grad_clip_norm", self.grad_clip_norm, 0, open_low=True)


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """The training loop: length, batches, evaluations, objective, checkpoints, precision and device."""

    epochs: float
    """Passes over the training data; may be a fraction."""
    max_steps: int | None
    """Optimizer updates, in place of `epochs`; null: `epochs` decides."""
    batch_size: int
    """Examples per optimizer update."""
    micro_batch_size: int | None
    """Examples of each member per forward pass, in both orders where both are used; null: on a CPU chosen for speed."""
    eval_batch_size: int | None
    """Examples per forward pass of an evaluation; null: as many as have about 8,192 tokens."""
    eval_every: int | None
    """Steps between evaluations on the selection split; null: one per epoch. The last step is always evaluated."""
    main_metric: str | None
    """The metric that chooses the best state, stops early, ranks, tunes and is tested: `mcc`, `accuracy`, `f1` (two
    classes), `macro_f1` or `weighted_f1` (more classes); for regression `spearman`, `pearson` or `r2`. null: `mcc`, for
    regression `spearman`."""
    early_stopping_patience: int | None
    """Stop after this many evaluations in a row without a better main metric on the selection split; null: never."""
    stop_at: float | None
    """Stop once the main metric on the selection split has reached this value in three evaluations in a row, to measure
    the cost of it; `compare` counts the first of them. Best with a small `eval_every`. null: never."""
    score_both_orders: bool | None
    """Predict the mean of the probabilities of a pair in both orders of its texts; this doubles the cost. null: if the
    label does not depend on the order."""
    objective: str | None
    """The loss. `cross_entropy`. `alternate_order`: the cross-entropy of each pair in one order of its texts, and in
    the next epoch in the reversed order. The others take the cross-entropy of two views of each example and add the
    divergence of the two predictions: both orders (`order_consistency`), original and perturbed
    (`perturb_consistency`). null: `alternate_order` if the label does not depend on the order, else `cross_entropy`."""
    class_weights: str
    """Weights of the classes in the loss. `none`. `balanced`: a class of n of N training examples with k classes has
    the weight N / (k n), so that each class counts as much as any other."""
    consistency_weight: float
    """Weight of that divergence, a symmetric Kullback-Leibler divergence in nats."""
    average: float
    """Fraction of the steps so far, the latest ones, over which weights are averaged; each evaluation scores the
    averaged weights. 0: no averaging."""
    checkpoint_every: int | None
    """Steps between checkpoints; null: one at each evaluation on the selection split."""
    prefix_cache_bytes: float
    """Maximum bytes on disk of the cached prefix: the output of the frozen layers below the first adapted layer, which
    later epochs and runs read. 0: the prefix is computed in every step."""
    activation_checkpointing: bool | str
    """Compute the activations of the layers again in the backward pass instead of holding them: less memory, a third to
    a half more arithmetic, which the FLOPs in the record include. `auto`: if they would not fit into the free memory,
    even in micro-batches of one pair (or of `micro_batch_size`, if it is set), and with `sharding=fsdp`. It turns
    `cuda_graphs` off."""
    sharding: str
    """`none`: each process of torchrun holds the whole backbone. `fsdp`: each holds a part of it, and a layer's weights
    are gathered while it computes (torch's `fully_shard`), with `adapter=full` too. Adapters and heads stay whole. No
    prefix is cached, and `cuda_graphs` are off."""
    precision: str
    """`fp32`, `bf16`, or `auto`: bf16 where the device computes it fast."""
    device: str
    """`cpu`, `cuda`, or `auto`."""
    quantization_kernels: str
    """The library that dequantises `nf4` weights: `torch`, or `bitsandbytes`, which gives the same bits in less time.
    `auto`: `bitsandbytes` on a GPU if it is installed. Other types always take `torch`."""
    cuda_graphs: bool
    """On a GPU, capture forward and backward pass as a CUDA graph once per batch shape, and replay it."""
    threads: int | None
    """CPU threads; null: as many as other programs leave free, at most torch's default (`OMP_NUM_THREADS`)."""

    def main_metric_of(self, data: Data) -> str:
        """Return the main metric of a task, whose label names are known: `main_metric`, or the default of its form.

        Raises:
            UserError: `main_metric` does not suit the task.
        """
        choices = MAIN_METRIC_CHOICES[data.form]
        if self.main_metric is not None:
            what = "regression" if data.type == "regression" else f"{data.outputs} classes"
            reason = f"does not suit {data.task}, a task of {what}"
            remedy = f"Choose one of {', '.join(choices)}."
            is_known = self.main_metric in choices
            require(is_known, "trainer.main_metric", self.main_metric, reason, remedy, code=Code.CONFLICT)
        return self.main_metric or choices[0]

    def objective_of(self, data: Data) -> str:
        """Return the objective for a task: `objective`, or the one that null stands for."""
        return self.objective or ("alternate_order" if data.is_symmetric else "cross_entropy")

    def scores_both_orders_of(self, data: Data) -> bool:
        """Return whether a task's pairs are scored in both orders: `score_both_orders`, or what null stands for."""
        return data.is_symmetric if self.score_both_orders is None else self.score_both_orders

    def __post_init__(self) -> None:
        """Check the ranges: sizes and intervals from 1, `stop_at` in (0, 1], `average` in [0, 1], `epochs` above 0.

        Raises:
            UserError: naming the key, as for an unknown objective, precision or device. Whether the device is there is
                not checked here.
        """
        require_number("epochs", self.epochs, 0, 1_000_000, open_low=True)
        require_number("batch_size", self.batch_size, 1)
        intervals = ("eval_every", "checkpoint_every", "early_stopping_patience")
        for name in ("max_steps", "micro_batch_size", "eval_batch_size", *intervals):
            if getattr(self, name) is not None:
                require_number(name, getattr(self, name), 1)
        if self.threads is not None:
            require_number("threads", self.threads, 1, 1024)  # the process crashes with many more
        reason = f"is not one of {', '.join(OBJECTIVES)}"
        key, objective = "trainer.objective", self.objective
        if objective is not None:
            remedy = removal_note(key, objective) or renamed_choice_note(key, objective) or ""
            require(objective in OBJECTIVES, "objective", objective, reason, remedy, code=Code.UNKNOWN_CHOICE)
        if self.main_metric is not None:
            require_one_of("main_metric", self.main_metric, ALL_MAIN_METRICS)
        require_one_of("class_weights", self.class_weights, ("none", "balanced"))
        require_number("consistency_weight", self.consistency_weight, 0)
        if self.stop_at is not None:
            require_number("stop_at", self.stop_at, 0, 1, open_low=True)
        require_number("average", self.average, 0, 1)
        require_number("prefix_cache_bytes", self.prefix_cache_bytes, 0)
        setting = self.activation_checkpointing
        is_known = isinstance(setting, bool) or setting == "auto"
        reason = "is not one of auto, true, false"
        require(is_known, "activation_checkpointing", setting, reason, code=Code.UNKNOWN_CHOICE)
        require_one_of("sharding", self.sharding, ("none", "fsdp"))
        require_one_of("quantization_kernels", self.quantization_kernels, ("auto", "torch", "bitsandbytes"))
        require_one_of("precision", self.precision, ("auto", "fp32", "bf16"))
        require_one_of("device", self.device, ("auto", "cpu", "cuda"))


OBJECTIVES = ("cross_entropy", "alternate_order", "order_consistency", "perturb_consistency")
"""Values of `trainer.objective`."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A binary metric, looked up by name: a class of `torchmetrics.classification`, or an installed function.

    The keys stand below a name that the user gives, so their defaults are here and not in a YAML file.
    """

    torchmetric: str | None = None
    """The name of the class, with or without its prefix: `BinaryFBetaScore` or `FBetaScore`."""
    function: str | None = None
    """The name of a function that an installed distribution registers in the entry point group `lora_bench.metrics`."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the class or function by name: numbers, texts, true and false."""
    direction: str = "up"
    """`up` if higher is better, `down` if lower is better; the arrow in tables."""

    def __post_init__(self) -> None:
        """Check that the metric has one source, that its arguments are plain values, and its direction.

        Raises:
            UserError: naming the key.
        """
        require(
            (self.torchmetric is None) != (self.function is None),
            "torchmetric",
            self.torchmetric,
            "excludes function" if self.torchmetric else "is missing",
            "Give torchmetric=CLASS, or function=NAME for a metric of an installed package.",
            code=Code.CONFLICT if self.torchmetric else Code.MISSING,
        )
        for name, value in self.args.items():
            is_plain = isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value))
            require(is_plain, f"args.{name}", value, "is neither a finite number, a text, true nor false")
        require_one_of("direction", self.direction, ("up", "down"))


DATA: dict[str, type[Data]] = {"hub": HubData, "files": FileData, "toy": ToyData}
"""Settings of each `data.source`."""


OPTIONAL = {"name", "notes", "predictions", "resume", "split", "tags", "tasks", "tracking"}
"""Top-level keys that a config may lack, as records of older versions do."""

LAST = "last"
"""The word that stands for the newest run in place of a name."""
RUN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,59}")
"""The form of the name of a run, and of a tag."""


@dataclass(frozen=True, kw_only=True)
class Annotations:
    """The name, tags and notes by which a user finds a run again; they do not affect its results."""

    name: str | None
    """The name by which other commands find the run: `run=NAME`. Up to 60 letters, digits and `. - _`; runs may share a
    name, as those of a sweep do. null: none."""
    tags: list[str]
    """Words of the same form, by which `lora-bench ls --tag` selects runs."""
    notes: str | None
    """A text about the run, which `lora-bench show` prints; null: none."""

    def __post_init__(self) -> None:
        """Raise a `UserError` if the name or a tag has another form, or the name is the word `last`."""
        remedy = "Give up to 60 letters, digits, dots, dashes and underscores, the first of them no dot or dash."
        is_name = self.name is None or RUN_NAME.fullmatch(self.name) is not None
        require(is_name, "name", self.name, "is not a plain name", remedy)
        require(self.name != LAST, "name", LAST, "stands for the newest run", "Give another name.")
        for tag in self.tags:
            require(RUN_NAME.fullmatch(tag) is not None, "tags", tag, "is not a plain word", remedy)


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Packing of the jobs of a sweep on one backbone; it does not change what a job learns."""

    size: int | None
    """Maximum jobs trained together; null: as many as fit into memory, on a CPU a few that adapt all layers; 1: one
    after another."""
    memory_bytes: int | None
    """Maximum bytes that a pack takes; null: a fraction of the memory that is free when it starts."""
    workers: int | None
    """Processes that train the packs of a sweep; null: one for each GPU, one in all without a GPU."""
    halving: bool
    """Successive halving: at most 4 jobs of a pack go on after 1/8 of the steps, 2 after 1/4, 1 after 1/2. AUROC on the
    selection split ranks them, or the main metric of tasks without it."""

    def __post_init__(self) -> None:
        """Raise a `UserError` for a number below 1, or for `halving` with `size` 1, which leaves nothing to compare."""
        for name in ("size", "memory_bytes", "workers"):
            if getattr(self, name) is not None:
                require_number(name, getattr(self, name), 1)
        require(
            self.size != 1 or not self.halving,
            "halving",
            "true",
            "compares the jobs of a pack, and pack.size=1 gives each pack one job",
            "Leave out one of the two.",
            code=Code.CONFLICT,
        )


@dataclass(frozen=True, kw_only=True)
class Search:
    """The budget of `lora-bench search`, of which the limit that is reached first counts, and what follows it.

    The best trials on the selection split are trained again with another seed before one setting is chosen. That one is
    trained with fresh seeds, beyond the budget. `pack.size` is the number of trials that are suggested and trained
    together, and `pack.halving` eliminates the worse ones early.
    """

    trials: int | None
    """Maximum trials; null: no limit."""
    flops: float | None
    """Maximum FLOPs of training the trials and repeats, as `cost.train_flops` of their records counts them; null: no
    limit. The first pack always starts, a later one if it is expected to stay below."""
    minutes: float | None
    """Maximum minutes of trials and repeats, time between an interruption and `resume` left out; null: no limit. Packs
    start as with `flops`."""
    repeats: int
    """Number of the best trials that are trained again with another seed. The setting with the best mean of both is
    chosen; AUROC decides between those that differ by less than a standard error. 0 or 1: the best trial is chosen."""
    final_seeds: int
    """Number of seeds, those after `seed`, with which the best setting is trained again and scored on the reported
    splits."""

    def __post_init__(self) -> None:
        """Raise a `UserError` without any budget, for one that is not above 0, or for `final_seeds` below 1."""
        budgets = (self.trials, self.flops, self.minutes)
        remedy = "Give search.trials=24, search.flops=1e15 or search.minutes=60."
        has_budget = any(budget is not None for budget in budgets)
        require(has_budget, "trials", None, "is missing, and so is any other budget", remedy, code=Code.MISSING)
        if self.trials is not None:
            require_number("trials", self.trials, 1)
        for name in ("flops", "minutes"):
            if getattr(self, name) is not None:
                require_number(name, getattr(self, name), 0, open_low=True)
        require_number("repeats", self.repeats, 0)
        require_number("final_seeds", self.final_seeds, 1)

    @property
    def repeated(self) -> int:
        """The number of trials that are repeated: none if only one would be, since there is nothing to choose from."""
        return self.repeats if self.repeats > 1 else 0


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """An ensemble: one run trains members and averages their probabilities (Wang, Aitchison and Rudolph 2023)."""

    members: int | None
    """Number of members, 2 to 100; null: no ensemble."""
    vary: list[str]
    """Randomness in which members differ: `init` (of adapter and head), `order` (of the examples), `dropout`."""

    def __post_init__(self) -> None:
        """Raise a `UserError` unless there are 2 to 100 `members` (or None), and `vary` has one or more of `VARIED`."""
        if self.members is not None:
            remedy = "Give ensemble.members=null to train one adapter."
            require(
                self.members >= 2, "members", self.members, "is too few for an ensemble, which has at least 2", remedy
            )
            require_number("members", self.members, 2, 100)
        require(
            bool(self.vary), "vary", self.vary, "is empty: the members would all be the same", code=Code.INVALID_VALUE
        )
        require(set(self.vary) <= set(VARIED), "vary", self.vary, f"has values other than {', '.join(VARIED)}")

    @property
    def size(self) -> int:
        """Number of members; 1 without an ensemble."""
        return self.members or 1


VARIED = ("init", "order", "dropout")
"""Values of `ensemble.vary`."""
