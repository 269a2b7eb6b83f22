"""What a backbone is: a pretrained network seen as a row of layers, with a cut anywhere between two of them.

    prefix(batch, depth)          -> hidden   the layers below `depth`, once for all members
    suffix(hidden, batch, depth)  -> logits   the rest, for every member's rows, and the head: encode, then answer

The prefix is frozen, so its output may be shared. One file per family implements the two; their composition equals the
Hugging Face model's own output.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from functools import cached_property
from hashlib import sha256
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lora_bench.backbones.identity import tokenizer_digests
from lora_bench.errors import require

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lora_bench.data.batching import Batch


class Backbone(ABC):
    """A pretrained network and its tokenizer.

    Args:
        network: the Hugging Face model, in fp32 and in evaluation mode.
        tokenizer: its fast tokenizer.
        new_parameters: names of parameters that the checkpoint did not hold (the new head).
    """

    head_modules: Sequence[str]
    """Names of the modules that make up the head; trained by every member, never wrapped."""
    query_value: str
    """Regular expression of the linears that `target_modules=qv` means."""
    peft_task = "SEQ_CLS"
    """What peft calls the kind of task."""
    has_prefix = True
    """Whether the prefix computes anything: False where the whole network is suffix."""
    can_be_batched = True
    """Whether every linear takes one row per row of the batch: only then may rows of several members pass together."""
    all_positions = False
    """Whether the last layer makes every position, also where the head looks at one: for those who look at it."""
    layer_paths: Sequence[str]
    """Names of the lists of layers, in the order of computation."""

    def __init__(self, network: nn.Module, tokenizer: Any, new_parameters: set[str]) -> None:
        self.network = network
        self.tokenizer = tokenizer
        self.new_parameters = new_parameters
        self.compute_dtype = torch.float32
        self.notes: list[str] = []
        """What the user should know of how it reads and scores."""
        self.layers: list[tuple[str, nn.Module]] = [
            (f"{path}.{i}", layer)
            for path in self.layer_paths
            for i, layer in enumerate(network.get_submodule(path).children())
        ]

    @abstractmethod
    def prefix(self, batch: Batch, depth: int) -> Tensor:
        """Embeddings and the first `depth` layers: (N, T, D) for N rows."""

    @abstractmethod
    def encode(self, hidden: Tensor, batch: Batch, depth: int) -> Tensor:
        """The layers from `depth` on: (N, T, D), or (N, 1, D) where the head looks at one position."""

    @abstractmethod
    def classify(self, encoded: Tensor, batch: Batch) -> Tensor:
        """The head: logits (N, 2) from what `encode` gave."""

    def suffix(self, hidden: Tensor, batch: Batch, depth: int) -> Tensor:
        """The layers from `depth` on and the head: logits (N, 2)."""
        return self.classify(self.encode(hidden, batch, depth), batch)

    @property
    def separates_texts(self) -> bool:
        """Whether `text_masks` can say which token belongs to which of a pair's texts."""
        return False

    def text_masks(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Which tokens make up the first and the second text, (N, T) each."""
        raise NotImplementedError

    def render(self, columns: Sequence[tuple[str, list[str]]]) -> tuple[list[str], list[str] | None]:
        """What the tokenizer gets for named text columns: the first text and, for pairs, the second."""
        texts = [text for _, text in columns]
        return texts[0], texts[1] if len(texts) > 1 else None

    def for_task(self, task: str) -> Backbone:
        """The same network with this task's name in what it reads."""
        return self

    @property
    def hidden_size(self) -> int:
        """D, the width of the layers."""
        return int(self.network.config.hidden_size)  # type: ignore[union-attr, arg-type]

    @property
    def initializer_range(self) -> float:
        """Standard deviation of a new head's weights."""
        return float(getattr(self.network.config, "initializer_range", 0.02))

    def export_config(self, label_names: Sequence[str]) -> Any:
        """Return the config of a plain Hugging Face model in fp32 with this network's weights and these labels.

        What config.json said of the checkpoint's own task and class is left behind.
        """
        config = copy.deepcopy(cast("Any", self.network.config))
        config.architectures = [type(self.network).__name__]
        config.dtype = torch.float32
        for stale in ("finetuning_task", "auto_map"):
            vars(config).pop(stale, None)
        if self.head_modules:
            config.id2label = dict(enumerate(label_names))
            config.label2id = {name: label for label, name in config.id2label.items()}
        config.problem_type = "single_label_classification" if self.peft_task == "SEQ_CLS" else None
        return config

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def max_tokens(self) -> int | None:
        """The longest input that the network takes; None where positions are relative."""
        return None

    def require_length(self, max_length: int) -> None:
        """Refuse pairs of more tokens than the network takes."""
        longest = self.max_tokens
        reason = f"is more than the {longest} tokens that the model takes"
        require(longest is None or max_length <= longest, "data.max_length", max_length, reason)

    def probe_row(self, length: int) -> tuple[Tensor, Tensor]:
        """Return token ids and token type ids of a pair of `length` tokens, (length,) each.

        The tokenizer makes them, so the special tokens that a classifier looks for are there.
        """
        text = " ".join(["a"] * length)
        first, second = self.render([("text1", [text]), ("text2", [text])])
        tokenizer = self.tokenizer.backend_tokenizer
        truncation, padding = tokenizer.truncation, tokenizer.padding
        tokenizer.no_padding()
        tokenizer.enable_truncation(length, strategy="longest_first")
        encoding = tokenizer.encode(first[0], second[0] if second else None)
        tokenizer.enable_truncation(**truncation) if truncation else tokenizer.no_truncation()
        if padding:
            tokenizer.enable_padding(**padding)
        ids, types = list(encoding.ids), list(encoding.type_ids)
        repeats = length - len(ids)  # above 0 where the tokenizer makes fewer tokens than words
        ids[1:1] = ids[1:2] * repeats or [0] * repeats
        types[1:1] = types[1:2] * repeats or [0] * repeats
        return torch.tensor(ids), torch.tensor(types)

    def layer_modules(self) -> Iterator[tuple[int, str, nn.Module]]:
        """Yield the number, full name and module of everything that the layers consist of, in order of computation."""
        for number, (path, layer) in enumerate(self.layers):
            yield number, path, layer

    def linears(self) -> dict[str, nn.Linear]:
        """Every linear of the layers by its full name, in the order of computation: what an adapter may change."""
        return {
            f"{path}.{name}" if name else path: module
            for _, path, layer in self.layer_modules()
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear)
        }

    def norms(self) -> dict[str, nn.LayerNorm]:
        """Every LayerNorm of the layers that has a bias, by its full name, in the order of computation."""
        return {
            f"{path}.{name}" if name else path: module
            for _, path, layer in self.layer_modules()
            for name, module in layer.named_modules()
            if isinstance(module, nn.LayerNorm) and module.bias is not None
        }

    def layer_of(self, name: str) -> int | None:
        """The number of the layer that module `name` lies in, from 0 in the order of computation."""
        return next((i for i, path, _ in self.layer_modules() if f"{name}.".startswith(f"{path}.")), None)

    def to(self, device: torch.device, dtype: torch.dtype, *, trained: bool) -> None:
        """Move to a device and set the precision of products; frozen weights are cast once, trained ones stay fp32."""
        self.compute_dtype = dtype
        self.network.to(device)
        if not trained:
            self.network.to(dtype)

    @cached_property
    def tokenizer_identity(self) -> dict[str, str]:
        """The digests by which a run knows its tokenizer again."""
        return tokenizer_digests(self.tokenizer)

    def hash(self) -> str:
        """sha256 over the names and bytes of every tensor outside the head; call it on a detached backbone."""
        digest = sha256()
        for name, tensor in sorted(self.network.state_dict().items()):
            if not name.startswith(tuple(f"{head}." for head in self.head_modules)):
                digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def additive_mask(batch: Batch, dtype: torch.dtype) -> Tensor | None:
    """(N, 1, 1, T): 0 for a token, the type's lowest number for padding; None where there is no padding."""
    if batch.full:
        return None
    lowest = torch.finfo(dtype).min
    mask = torch.zeros(batch.attention_mask.shape, dtype=dtype, device=batch.attention_mask.device)
    return mask.masked_fill_(batch.attention_mask == 0, lowest)[:, None, None, :]


def run_layer(layer: nn.Module, *arguments: Any) -> Tensor:
    """A layer's hidden states; some releases of transformers return them alone, some as the first of a tuple."""
    out = layer(*arguments)
    return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]
