"""Any Hugging Face sequence classifier, through its own forward pass: members share the weights and no computation.

The layers of an unknown model cannot be derived from class names, so they are observed: the model computes an
artificial pair. The order in which its modules are called gives its layers, and the rows that it reads from its
position tables give the longest input.
"""

from __future__ import annotations

from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_bench.backbones.base import Backbone
from lora_bench.backbones.conv1d import replace_conv1d
from lora_bench.data.batching import Batch
from lora_bench.errors import Code, UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lora_bench.backbones.template import Template

PROBE_ROWS = 7  # a number that tables and windows seldom have as a factor
PROBE_TOKENS = 12


class Auto(Backbone):
    """`AutoModelForSequenceClassification`; what lies outside its base model is the head.

    Its layers are the entries of every outermost list of modules. Lists whose entries take turns (XLM keeps attentions
    and feed-forward networks apart) make up the same layers; lists that follow one another (an encoder's, a decoder's)
    make up layers that follow one another. The order is observed at construction, as the network computes a pair once.

    Args:
        network, tokenizer, new_parameters: as for `Backbone`.
        template: makes one text of a pair; None: the tokenizer joins the two texts.

    Raises:
        UserError: the model exposes no layers, cannot compute a pair, or does not use a layer.
    """

    has_prefix = False
    query_value = r".*\.(query|value|query_proj|value_proj|q_proj|v_proj|q_lin|v_lin|q|v)"
    layer_paths = ()
    keeps_template = True
    needs_text_ids = True

    def __init__(
        self, network: nn.Module, tokenizer: Any, new_parameters: set[str], template: Template | None = None
    ) -> None:
        self.template = template
        replace_conv1d(network)
        base: Any = network.base_model
        self.head_modules = [
            name
            for name, child in network.named_children()
            if child is not base and any(True for _ in child.parameters())
        ]
        lists = [] if base is network else list(_outermost_lists(network, self.head_modules))
        if not lists:
            raise UserError(
                f"{type(network).__name__} does not expose its layers and its head",
                key="model.family",
                value="auto",
                remedy="Take a model whose transformers class has a base model and a list of layers.",
                code=Code.UNSUPPORTED,
            )
        super().__init__(network, tokenizer, new_parameters)
        self._layers, self._position_limit, self.can_be_batched = self._observe(lists)
        self.layers = [(paths[0], network.get_submodule(paths[0])) for paths in self._layers]

    def layer_modules(self) -> Iterator[tuple[int, str, nn.Module]]:
        for number, paths in enumerate(self._layers):
            for path in paths:
                yield number, path, self.network.get_submodule(path)

    @property
    def max_tokens(self) -> int | None:
        """The most tokens that the position tables have rows for, else `max_position_embeddings`; else None."""
        if self._position_limit is not None:
            return self._position_limit
        configured = getattr(self.network.config, "max_position_embeddings", None)
        return configured if isinstance(configured, int) and configured > 0 else None  # XLNet's is -1

    def prefix(self, batch: Batch, depth: int) -> Tensor:
        return batch.input_ids  # (N, T): the whole network is suffix

    def encode(self, hidden: Tensor, batch: Batch, depth: int) -> Tensor:
        return hidden  # (N, T)

    def classify(self, encoded: Tensor, batch: Batch) -> Tensor:
        return self._logits(encoded, batch.attention_mask, batch.token_type_ids)

    def suffix_with_states(self, hidden: Tensor, batch: Batch, depth: int) -> tuple[Tensor, Tensor]:
        states: list[Tensor] = []

        def note_states(_module: nn.Module, _inputs: object, output: Any) -> None:
            of_encoder = getattr(output, "encoder_last_hidden_state", None)
            states.append(output[0] if of_encoder is None else of_encoder)

        base: Any = self.network.base_model
        hook = base.register_forward_hook(note_states)
        try:
            logits = self.suffix(hidden, batch, depth)
        finally:
            hook.remove()
        return logits, states[-1]

    @cached_property
    def separates_texts(self) -> bool:
        """True if the last layer gives a vector of the layers' width for each token; a test pair is computed."""
        ids, types = (row[None].to(self.device) for row in self.probe_row(PROBE_TOKENS))
        batch = Batch(ids, torch.ones_like(ids), types, None, full=True)
        with torch.no_grad():
            _, states = self.suffix_with_states(self.prefix(batch, 0), batch, 0)
        return tuple(states.shape) == (1, PROBE_TOKENS, self.hidden_size)

    def _logits(self, ids: Tensor, mask: Tensor, types: Tensor | None) -> Tensor:
        """Return the logits (N, 2) of the whole network for ids, mask and token types, (N, T) each.

        Token types are left out if the tokenizer does not name them as an input.
        """
        inputs = {"input_ids": ids, "attention_mask": mask}
        if "token_type_ids" in self.tokenizer.model_input_names and types is not None:
            inputs["token_type_ids"] = types
        return self.network(**inputs).logits  # type: ignore[no-any-return]

    @torch.no_grad()
    def _observe(self, lists: Sequence[Sequence[str]]) -> tuple[list[list[str]], int | None, bool]:
        """Compute a few copies of an artificial pair, and observe the modules.

        Args:
            lists: names of the modules in each outermost list.

        Returns:
            The layers in the order of computation, each as the names of its modules; the most tokens that the position
            tables have rows for, None where there are no such tables; and whether every linear takes the batch's rows,
            and not, as in DeBERTa, relative positions that all rows share.

        Raises:
            UserError: the model cannot compute the pair, or does not use one of the modules.
        """
        paths = [path for entries in lists for path in entries]
        first_calls: dict[str, int] = {}
        takes_rows: list[bool] = []

        def note_call(path: str, *_: object) -> None:
            first_calls.setdefault(path, len(first_calls))

        def note_rows(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            takes_rows.append(bool(inputs) and len(inputs[0]) in (PROBE_ROWS, PROBE_ROWS * PROBE_TOKENS))

        modules = [module for path in paths for module in self.network.get_submodule(path).modules()]
        hooks = [module.register_forward_pre_hook(note_rows) for module in modules if isinstance(module, nn.Linear)]
        hooks += [
            module.register_forward_pre_hook(partial(note_call, path))
            for path in paths
            for module in self.network.get_submodule(path).modules()  # SqueezeBERT calls a layer's `forward` itself
            if _has_own_parameters(module)  # layers may share an activation
        ]
        ids, types = (row.expand(PROBE_ROWS, -1).to(self.device) for row in self.probe_row(PROBE_TOKENS))
        tables = _PositionTables(PROBE_TOKENS)
        training = self.network.training
        self.network.eval()
        try:
            with tables:
                self._logits(ids, torch.ones_like(ids), types)
        except Exception as error:  # whatever an unknown model raises
            reason = f"{type(self.network).__name__} cannot compute a pair of texts ({type(error).__name__}: {error})"
            remedy = "Give the tokenizer and config.json of these weights."
            raise UserError(
                " ".join(reason.split()), key="model.family", value="auto", remedy=remedy, code=Code.UNSUPPORTED
            ) from None
        finally:
            self.network.train(training)
            for hook in hooks:
                hook.remove()
        idle = [path for path in paths if path not in first_calls]
        if idle:
            reason = f"{idle[0]} of {type(self.network).__name__} is not used when the model computes a pair"
            raise UserError(
                reason,
                key="model.family",
                value="auto",
                remedy="Take a model that uses all its layers.",
                code=Code.UNSUPPORTED,
            )
        return _in_order(lists, first_calls), min(tables.limits, default=None), all(takes_rows)


class _PositionTables(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A recorder of how many tokens the position embeddings have rows for.

    The indices of such a lookup are consecutive numbers, one per token. The first one is the table's offset: 2 for
    RoBERTa's kind and BART's, 0 for BERT's.
    """

    def __init__(self, tokens: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.limits: list[int] = []
        self._ascending = torch.arange(tokens)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation; if it looks up consecutive rows of a table, note the most tokens that the table serves."""
        if func is torch.ops.aten.embedding.default:
            table, indices = args[:2]
            tokens = len(self._ascending)
            if indices.ndim and indices.shape[-1] >= tokens:  # Longformer fills up a row to whole windows
                rows = indices[..., :tokens].reshape(-1, tokens)
                offset = int(rows[0, 0])
                if torch.equal(rows, (self._ascending + offset).to(rows).expand_as(rows)):
                    self.limits.append(len(table) - offset)
        return func(*args, **(kwargs or {}))


def _outermost_lists(network: nn.Module, head_modules: Sequence[str]) -> Iterator[list[str]]:
    """Yield the full names of the modules in each list that lies in no other list, in the order of definition.

    Lists in the head, and lists without parameters, are passed over.
    """
    outside = [f"{name}." for name in head_modules]
    for name, module in network.named_modules():
        if not isinstance(module, nn.ModuleList) or f"{name}.".startswith(tuple(outside)):
            continue
        outside.append(f"{name}.")
        if any(_has_own_parameters(child) for child in module.modules()):
            yield list(_entries(name, module))


def _has_own_parameters(module: nn.Module) -> bool:
    """Return whether a module has parameters outside of its children; an embedding does not count."""
    return not isinstance(module, nn.Embedding) and any(True for _ in module.parameters(recurse=False))


def _entries(name: str, modules: nn.ModuleList) -> Iterator[str]:
    """Yield the names of a list's modules, those of lists in the list in their place."""
    for key, child in modules.named_children():
        if isinstance(child, nn.ModuleList):
            yield from _entries(f"{name}.{key}", child)
        else:
            yield f"{name}.{key}"


def _in_order(lists: Sequence[Sequence[str]], first_calls: dict[str, int]) -> list[list[str]]:
    """Return the layers in the order of computation, each as the names of the modules that make it up.

    Args:
        lists: names of the modules in each list.
        first_calls: the position of each module among all, in the order of their first calls.
    """
    stacks: list[list[list[str]]] = []
    for paths in sorted(lists, key=lambda paths: first_calls[paths[0]]):
        stack = next((stack for stack in stacks if _take_turns(stack, paths, first_calls)), None)
        if stack is None:
            stacks.append([[path] for path in paths])
        else:
            for layer, path in zip(stack, paths, strict=True):
                layer.append(path)
    return sorted((layer for stack in stacks for layer in stack), key=lambda layer: first_calls[layer[0]])


def _take_turns(stack: Sequence[Sequence[str]], paths: Sequence[str], first_calls: dict[str, int]) -> bool:
    """Return whether a list makes up layers together with a stack of layers.

    It does if it lies in the same module as the stack's first list, is as long, and each entry of it is called within
    one layer.
    """
    if len(stack) != len(paths) or _parent(stack[0][0]) != _parent(paths[0]):
        return False
    begins = [first_calls[layer[0]] for layer in stack]
    ends = [*begins[1:], len(first_calls)]
    calls = [first_calls[path] for path in paths]
    return all(begin < call < end for begin, call, end in zip(begins, calls, ends, strict=True))


def _parent(path: str) -> str:
    """Return the name of the module that has the list in which `path` lies."""
    return path.rsplit(".", 2)[0]
