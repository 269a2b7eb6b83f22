"""The backbone protocol: a pretrained network as a sequence of layers that can be cut between any two of them.

    prefix(batch, depth)          -> hidden   the layers below `depth`, once for all members
    suffix(hidden, batch, depth)  -> logits   the rest, for every member's rows, and the head: encode, then classify

The prefix is frozen, so its output may be shared. A subclass per architecture implements them; their composition
equals the output of the Hugging Face model.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from hashlib import sha256
from itertools import groupby
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lora_bench.backbones.fused_linear import FusedLinear, LinearRows, fused_owner
from lora_bench.backbones.identity import tokenizer_digests
from lora_bench.backbones.page_out import page_out
from lora_bench.backbones.quantized_modules import QuantizedTable, QuantizedWeight
from lora_bench.backbones.quantized_network import (
    Quantization,
    dequantize_network,
    quantize_embeddings,
    quantize_linears,
)
from lora_bench.backbones.sharding import call_as_forward, full_tensor, is_sharded, shard_modules
from lora_bench.data.special_tokens import SpecialTokens
from lora_bench.data.text_positions import TextPositions
from lora_bench.errors import require

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence
    from pathlib import Path

    from lora_bench.backbones.activation_checkpointing import ActivationCheckpointing
    from lora_bench.backbones.label_words import LabelWords
    from lora_bench.backbones.template import Template
    from lora_bench.data.batching import Batch


HASHED_NUMBERS = 2**22
"""Numbers of a tensor that are cast to fp32 at a time to be hashed."""


class Backbone(ABC):
    """A pretrained network with its tokenizer.

    Args:
        network: the Hugging Face model on the CPU, in evaluation mode.
        tokenizer: its fast tokenizer.
        new_parameters: names of parameters that the checkpoint did not hold (the new head).
    """

    head_modules: Sequence[str]
    """Names of the head's modules; every member trains its own copy, and adapters never wrap them."""
    query_value: str
    """Regular expression for the linears that `target_modules=qv` selects."""
    peft_task = "SEQ_CLS"
    """PEFT's `task_type`."""
    can_be_batched = True
    """True if the inputs of every linear have one row per row of the batch; only then can members be batched."""
    all_positions = False
    """True if the last layer computes every position even if the head reads only one; set by users of its output."""
    layer_paths: Sequence[str]
    """Names of the lists of layers, in the order of computation."""
    template: Template | None = None
    """The text around the text columns, which become one text; None: the tokenizer reads the columns themselves."""
    keeps_template = False
    """True if truncation shortens the texts in a template only, and keeps its words."""
    needs_text_ids = False
    """True if token tables and batches hold the text of each token (`Batch.text_ids`), which `text_masks` reads."""
    words: Sequence[LabelWords] = ()
    """Of each head: the words for the classes, whose scores are the logits; empty with a classification head."""

    def __init__(self, network: nn.Module, tokenizer: Any, new_parameters: set[str]) -> None:
        self.network = network
        self._architecture = type(network).__name__
        self.tokenizer = tokenizer
        self.new_parameters = new_parameters
        self.compute_dtype = torch.float32
        self.device = torch.device("cpu")
        self._used_cache = False
        self.offloaded: dict[str, nn.Parameter] = {}
        """By name of the linear, the weights that are as the checkpoint has them, and not on the device."""
        self.quantization = Quantization()
        """The types in which the weights of the network are held."""
        self.is_sharded = False
        """True if each process holds its part of the weights; they are on the CPU and whole until `shard`."""
        self.notes: list[str] = []
        """Notes for the user about how it reads and scores texts."""
        self.layers: list[tuple[str, nn.Module]] = [
            (f"{path}.{i}", layer)
            for path in self.layer_paths
            for i, layer in enumerate(network.get_submodule(path).children())
        ]

    @abstractmethod
    def prefix(self, batch: Batch, depth: int) -> Tensor:
        """Return the output of the embeddings and the first `depth` layers: (N, T, D) for N rows."""

    def encode(self, hidden: Tensor, batch: Batch, depth: int) -> Tensor:
        """Return the output of the layers from `depth` on: (N, T, D), or (N, 1, D) if the head reads one position."""
        raise NotImplementedError

    def classify(self, encoded: Tensor, batch: Batch) -> Tensor:
        """Return the head's logits (N, C) for the output of `encode`."""
        raise NotImplementedError

    def suffix_with_states(self, hidden: Tensor, batch: Batch, depth: int) -> tuple[Tensor, Tensor]:
        """Return the logits (N, C) of `suffix`, and the hidden states that its head reads, (N, T, D) or (N, 1, D).

        They are those of `classify` and `encode`, and of every token if `all_positions` is true. An encoder-decoder
        gives the output of its encoder. A family that cannot separate the two overrides this method instead.
        """
        encoded = self.encode(hidden, batch, depth)
        return self.classify(encoded, batch), encoded

    def cut_depth(self, depth: int) -> int:
        """Return the number of layers that `prefix` computes for a depth: fewer where the network cannot be cut there.

        With 0 the prefix holds nothing worth caching.
        """
        return depth

    def outputs(self, head: int = 0) -> int:
        """Return the number of logits C of a head: the classes of its task, or 1 for a number."""
        if self.words:
            return len(self.words[head].paths)
        return int(self.network.config.num_labels)  # type: ignore[union-attr, arg-type]

    def words_of(self, batch: Batch) -> LabelWords:
        """Return the words for the classes of a batch's task, where words are scored; tasks may share them."""
        return self.words[batch.head if len(self.words) > 1 else 0]

    def name_labels(self, label_names: Sequence[Sequence[str] | None]) -> None:
        """Tell a family whose answers are words the names of the classes of each head; None for a number."""

    def suffix(self, hidden: Tensor, batch: Batch, depth: int) -> Tensor:
        """Return the logits (N, C) of the layers from `depth` on and the head; `hidden` is the prefix of this depth."""
        return self.suffix_with_states(hidden, batch, depth)[0]

    def compute_sharded(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the result of `suffix_with_states` for all layers, computed as the network's own forward pass.

        Only so weights outside of the layers are gathered for it. A family that calls the network overrides this.
        """
        result: tuple[Tensor, Tensor] = call_as_forward(
            self.network, lambda: self.suffix_with_states(self.prefix(batch, 0), batch, 0)
        )
        return result

    def shared_modules(self) -> list[nn.Module]:
        """Return the modules within a layer that are also called outside of the layer's forward pass."""
        return []

    @property
    def separates_texts(self) -> bool:
        """True if `text_masks` gives the tokens of each text, and `suffix_with_states` their vectors."""
        return self.needs_text_ids

    def text_masks(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the token masks (N, T) of the first and of the second text."""
        assert batch.text_ids is not None
        return batch.text_ids == 1, batch.text_ids == 2

    def render(self, columns: Sequence[tuple[str, list[str]]]) -> tuple[list[str], list[str] | None]:
        """Return the tokenizer's input for named text columns: the first texts and, for pairs, the second texts.

        A template makes one text of the columns.
        """
        if self.template is not None:
            return self.template.render(columns), None
        texts = [text for _, text in columns]
        return texts[0], texts[1] if len(texts) > 1 else None

    def text_positions(self, columns: Sequence[tuple[str, list[str]]]) -> TextPositions | None:
        """Return how the tokens of the result of `render` are assigned to their texts; None if nothing needs it."""
        if not self.needs_text_ids:
            return None
        if self.template is None:
            return TextPositions()
        return TextPositions(self.template.spans(columns), self.keeps_template)

    @cached_property
    def special_tokens(self) -> SpecialTokens:
        """The reading of special tokens of the tokenizer where a text contains them."""
        return SpecialTokens.of(self.tokenizer, () if self.template is None else self.template.parts)

    def save_tokenizer(self, folder: Path) -> None:
        """Write the files of the tokenizer, which reads special tokens in texts as it does here.

        Those that it cannot split by itself (`SpecialTokens.broken`) are special in transformers.
        """
        tokenizer = copy.deepcopy(self.tokenizer)
        if self.special_tokens.are_split:
            tokenizer.split_special_tokens = tokenizer.init_kwargs["split_special_tokens"] = True
        tokenizer.save_pretrained(folder)

    def for_task(self, task: str) -> Backbone:
        """Return a backbone with the same network and tokenizer whose template, if it has one, names this task."""
        if self.template is None:
            return self
        backbone = copy.copy(self)
        backbone.template = replace(self.template, task=task)
        return backbone

    @property
    def hidden_size(self) -> int:
        """D, the width of the layers."""
        return int(self.network.config.hidden_size)  # type: ignore[union-attr, arg-type]

    @property
    def initializer_range(self) -> float:
        """Standard deviation of a new head's weights."""
        return float(getattr(self.network.config, "initializer_range", 0.02))

    def export_config(self, label_names: Sequence[str] | None) -> Any:
        """Return the config of a plain Hugging Face model in fp32 with this network's weights and these labels.

        It is a copy. What config.json said of the checkpoint's own task and class is left behind. A network without a
        head (text to text) gets no labels. Without label names the model predicts a number.
        """
        config = copy.deepcopy(cast("Any", self.network.config))
        config.architectures = [self._architecture]  # the class of a sharded network has another name
        config.dtype = torch.float32
        for stale in ("finetuning_task", "auto_map"):
            vars(config).pop(stale, None)
        if self.head_modules:
            config.id2label = dict(enumerate(label_names or ["LABEL_0"]))
            config.label2id = {name: label for label, name in config.id2label.items()}
        problem = "single_label_classification" if label_names else "regression"
        config.problem_type = problem if self.peft_task == "SEQ_CLS" else None
        return config

    @property
    def max_tokens(self) -> int | None:
        """The largest number of tokens of an input; None if positions are relative."""
        return None

    def require_length(self, max_length: int) -> None:
        """Refuse a `data.max_length` of more tokens than the network takes.

        Raises:
            UserError: it is above `max_tokens`; any length is accepted if that is None.
        """
        longest = self.max_tokens
        reason = f"is more than the {longest} tokens that the model takes"
        require(longest is None or max_length <= longest, "data.max_length", max_length, reason)

    def probe_row(self, length: int) -> tuple[Tensor, Tensor]:
        """Return token ids and token type ids of a pair of `length` tokens, (length,) each, on the CPU.

        The tokenizer makes them, so the special tokens that a classifier looks for are there. It is left without
        padding and truncation.
        """
        text = " ".join(["a"] * length)
        first, second = self.render([("text1", [text]), ("text2", [text])])
        tokenizer = self.tokenizer.backend_tokenizer
        self.special_tokens.configure(tokenizer)
        tokenizer.enable_truncation(length, strategy="longest_first")
        encoding = tokenizer.encode(first[0], second[0] if second else None)
        tokenizer.no_truncation()
        ids, types = list(encoding.ids), list(encoding.type_ids)
        repeats = length - len(ids)  # above 0 where the tokenizer makes fewer tokens than words
        ids[1:1] = ids[1:2] * repeats or [0] * repeats
        types[1:1] = types[1:2] * repeats or [0] * repeats
        return torch.tensor(ids), torch.tensor(types)

    def layer_modules(self) -> Iterator[tuple[int, str, nn.Module]]:
        """Yield the number, full name and module of everything that the layers consist of, in order of computation.

        Several modules may have the same number: those of one layer (`Auto`).
        """
        for number, (path, layer) in enumerate(self.layers):
            yield number, path, layer

    @property
    def stacks(self) -> dict[str, range]:
        """The numbers of the layers of each list of layers, such as `encoder` and `decoder`; empty for a single list.

        Its name is what the lists' full names differ in.
        """
        lists = [path.rpartition(".")[0] for path, _ in self.layers]
        distinct = [name for name, _ in groupby(lists)]
        columns = zip(*(name.split(".") for name in distinct), strict=False)
        names = next((column for column in columns if len(set(column)) > 1), ())
        if len(set(names)) < len(distinct) or not all(name.isidentifier() for name in names):
            return {}
        starts = [lists.index(name) for name in distinct]
        return dict(zip(names, map(range, starts, [*starts[1:], len(lists)]), strict=True))

    def linears(self) -> dict[str, nn.Linear]:
        """Return every linear of the layers by its full name, in the order of computation: the possible targets.

        Embeddings and the head are outside of the layers. Query, key and value of a fused linear come behind it.
        """
        return {
            f"{path}.{name}" if name else path: module
            for _, path, layer in self.layer_modules()
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear)
        }

    def norms(self) -> dict[str, nn.LayerNorm]:
        """Return every LayerNorm of the layers that has a bias, by its full name, in the order of computation."""
        return {
            f"{path}.{name}" if name else path: module
            for _, path, layer in self.layer_modules()
            for name, module in layer.named_modules()
            if isinstance(module, nn.LayerNorm) and module.bias is not None
        }

    def layer_of(self, name: str) -> int | None:
        """Return the index, from 0, of the layer that contains module `name`; None if no layer does."""
        return next((i for i, path, _ in self.layer_modules() if f"{name}.".startswith(f"{path}.")), None)

    def to(
        self,
        device: torch.device,
        dtype: torch.dtype,
        *,
        trained: bool,
        offload: Collection[str] = (),
        quantization: Quantization | None = None,
    ) -> None:
        """Move to a device, and set the precision of products (`compute_dtype`).

        One tensor after another is cast, quantised and moved, so the network is never held twice. Frequencies of rotary
        positions stay fp32, since angles of far positions need them exact. The rest of a fused linear of which a part
        is offloaded is held apart, so that its weight is not needed.

        Args:
            device: to move the network to, head included.
            dtype: the precision of products.
            trained: the network's own weights are trained, so they stay fp32; otherwise all are cast to `dtype`, head
                included.
            offload: names of linears whose weights stay as they are until `load_weights`.
            quantization: the types in which weights are held, except offloaded ones; None: as numbers.
        """
        self.device, self.compute_dtype = device, dtype
        self.offloaded = {name: self._stored_weight(name) for name in offload}
        self.quantization = quantization or Quantization()
        self._hold_rest_of_fused()
        kept = {id(p) for p in self.offloaded.values()}
        if self.quantization.linears:
            linears = [
                linear
                for linear in Backbone.linears(self).values()
                if not isinstance(linear, LinearRows) and id(linear._parameters.get("weight")) not in kept
            ]
            quantize_linears(self.network, linears, self.quantization.linears, self._like)
        if self.quantization.embeddings:
            quantize_embeddings(self.network, self.head_modules, self._like)
        for p in self.network.parameters():
            if id(p) not in kept:
                p.data = p.data.to(device, None if trained else dtype)
        for module in self.network.modules():
            if isinstance(module, QuantizedWeight | QuantizedTable):
                continue
            for name, buffer in module.named_buffers(recurse=False):
                is_cast = buffer.is_floating_point() and not trained and not name.endswith("inv_freq")
                module._buffers[name] = buffer.to(device, dtype if is_cast else None)

    @property
    def _like(self) -> Tensor:
        """An empty tensor on the device, in the precision of products."""
        return torch.empty(0, dtype=self.compute_dtype, device=self.device)

    def _hold_rest_of_fused(self) -> None:
        """Let the other parts of a fused linear hold their rows themselves, where the weight of a part is offloaded."""
        for name, module in self.network.named_modules():
            if not isinstance(module, FusedLinear):
                continue
            rest = {f"{name}.{part}" for part in module.parts} - self.offloaded.keys()
            if len(rest) < len(module.parts):
                for part in rest:
                    self._hold(part)

    def _hold(self, name: str) -> None:
        """Hold the weight of a linear that is as the checkpoint has it, on the device, quantised or cast."""
        linear = cast("nn.Linear", self.network.get_submodule(name))
        if isinstance(linear, LinearRows):
            linear.hold(self.quantization.linears, self._like)
        elif self.quantization.linears:
            quantize_linears(self.network, [linear], self.quantization.linears, self._like)
        else:
            p = self._stored_weight(name)
            p.data = p.data.to(self.device, self.compute_dtype)

    def dequantize(self) -> None:
        """Hold all weights as numbers from now on, quantised ones dequantised, in the precision of products."""
        self.quantization = Quantization()
        dequantize_network(self.network)
        for p in self.offloaded.values():
            p.data = p.data.to(self.device, self.compute_dtype)
        self.offloaded.clear()

    def checkpoint_layers(self, checkpointing: ActivationCheckpointing | None) -> None:
        """Recompute the layers' activations in the backward pass from now on; None: hold them again.

        A family that does not call its layers as modules overrides this.
        """
        config: Any = self.network.config
        if checkpointing is not None and getattr(config, "use_cache", False):
            config.use_cache = False  # a layer that is computed twice would fill the cache twice
            self._used_cache = True
        elif checkpointing is None and self._used_cache:
            config.use_cache, self._used_cache = True, False
        for _, _, layer in self.layer_modules():
            vars(layer).pop("forward", None)
            if checkpointing is not None:
                layer.forward = checkpointing.wrap(layer.forward)

    def to_shards(self, device: torch.device, dtype: torch.dtype, *, trained: bool) -> None:
        """Set the precision, as `to` does, and the device to which `shard` will move the weights.

        Until then they stay on the CPU, in the memory of their file if they are stored in this precision.
        """
        self.to(torch.device("cpu"), dtype, trained=trained)
        self.device, self.is_sharded = device, True

    def shard(self, whole: Iterable[nn.Parameter]) -> None:
        """Shard the weights of every layer and then the rest over the processes of torchrun.

        Args:
            whole: trained parameters of adapters and heads, which are moved to the device as they are.
        """
        kept = set(whole)
        for p in kept:
            p.data = p.data.to(self.device)
        modules = [*self.shared_modules(), *(layer for _, _, layer in self.layer_modules()), self.network]
        shard_modules(modules, self.device, kept)

    def load_weights(self, names: Collection[str]) -> None:
        """Hold the weights of these offloaded linears on the device, quantised or cast; other names are ignored."""
        for name in sorted(self.offloaded.keys() & names):
            self._hold(name)
            del self.offloaded[name]

    @contextmanager
    def loaded_weight(self, name: str) -> Iterator[None]:
        """Hold the weight of a linear on the device, in the precision of products, within the context.

        An offloaded or sharded weight is as before afterwards, and the memory of its file's pages is returned.
        """
        parameters = self._owner(name)._parameters
        stored = parameters.get("weight")
        if stored is None or not (name in self.offloaded or self.is_sharded):
            yield
            return
        weight = full_tensor(stored).to(self.device, self.compute_dtype)
        parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        try:
            yield
        finally:
            parameters["weight"] = stored
            if not is_sharded(stored):
                page_out(stored)

    def _owner(self, name: str) -> nn.Module:
        """Return the linear that has the weight of a linear: the fused one for a part of it, else itself."""
        owner = fused_owner(self.network, name)
        return self.network.get_submodule(name) if owner is None else owner[1]

    def _stored_weight(self, name: str) -> nn.Parameter:
        """Return the parameter that holds the weight of a linear, transposed for a `Conv1D`."""
        return cast("nn.Parameter", self._owner(name)._parameters["weight"])

    @cached_property
    def tokenizer_identity(self) -> dict[str, str]:
        """The digests by which a run recognises its tokenizer; see `tokenizer_digests`."""
        return tokenizer_digests(self.tokenizer)

    def hash(self) -> str:
        """Return the SHA-256 of the names and bytes of all tensors excluding the head; no adapter may be attached.

        Floating-point numbers count as fp32, so a network in bf16 has the hash of the same numbers in fp32.
        """
        digest = sha256()
        for name, tensor in sorted(self.network.state_dict().items()):
            if not name.startswith(tuple(f"{head}." for head in self.head_modules)):
                dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
                digest.update(f"{name} {tuple(tensor.shape)} {dtype}".encode())
                for part in torch.split(tensor.detach().cpu().flatten(), HASHED_NUMBERS):
                    digest.update(part.to(dtype).contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def additive_mask(batch: Batch, dtype: torch.dtype) -> Tensor | None:
    """Return a mask (N, 1, 1, T): 0 for a token, the dtype's lowest number for padding; None if `batch.full`."""
    if batch.full:
        return None
    lowest = torch.finfo(dtype).min
    mask = torch.zeros(batch.attention_mask.shape, dtype=dtype, device=batch.attention_mask.device)
    return mask.masked_fill_(batch.attention_mask == 0, lowest)[:, None, None, :]


def run_layer(layer: nn.Module, *arguments: Any) -> Tensor:
    """Return a layer's hidden states, which some releases of transformers return as the first item of a tuple."""
    out = layer(*arguments)
    return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]
