"""Any Hugging Face sequence classifier, through its own forward pass.

The layers of an unknown model cannot be derived from class names, so they are observed: the model computes a few copies
of an artificial pair. The order in which its modules are called gives its layers, the rows that it reads from its
position tables give the longest input, and the inputs of its layers show between which of them it can be cut.
"""

from __future__ import annotations

import inspect
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_bench.backbones.base import Backbone
from lora_bench.backbones.conv1d import replace_conv1d
from lora_bench.backbones.fused_linear import replace_fused_linears
from lora_bench.backbones.layer_cut import LayerCut, record_calls
from lora_bench.data.batching import Batch
from lora_bench.errors import Code, UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lora_bench.backbones.template import Template

PROBE_ROWS = 7  # a number that tables and windows seldom have as a factor
PROBE_TOKENS = 13  # likewise: a network that pads rows to whole windows is seen to do so
PROBE_PADDING = 4


class Auto(Backbone):
    """`AutoModelForSequenceClassification`; what lies outside its base model is the head.

    A pooler in the base model belongs to the head if the checkpoint does not hold it. Without that it stays frozen.

    Its layers are the entries of every outermost list of modules. Lists whose entries take turns (XLM keeps attentions
    and feed-forward networks apart) make up the same layers; lists that follow one another (an encoder's, a decoder's)
    make up layers that follow one another. The order is observed at construction, as the network computes a pair once.

    The prefix is the output of the layers below the cut (`LayerCut`), or the token ids (N, T) if the network cannot be
    cut at or below that depth: then the whole network is suffix.

    A subclass with another output overrides `run_network`, `read_logits` and, if these need more than the network,
    `probe_output`.

    Args:
        network, tokenizer, new_parameters: as for `Backbone`.
        template: makes one text of a pair; None: the tokenizer joins the two texts.

    Raises:
        UserError: the model exposes no layers, cannot compute a pair, or does not use a layer.
    """

    query_value = r".*\.(query|value|query_proj|value_proj|q_proj|v_proj|q_lin|v_lin|q_head|v_head|q|v)"
    layer_paths = ()
    keeps_template = True
    needs_text_ids = True

    def __init__(
        self, network: nn.Module, tokenizer: Any, new_parameters: set[str], template: Template | None = None
    ) -> None:
        self.template = template
        replace_conv1d(network)
        replace_fused_linears(network)
        base: Any = network.base_model
        self.head_modules = [
            name
            for name, child in network.named_children()
            if child is not base and any(True for _ in child.parameters())
        ]
        pooler = f"{network.base_model_prefix}.pooler"
        if any(name.startswith(f"{pooler}.") for name in new_parameters):
            self.head_modules.insert(0, pooler)
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
        self._takes_use_cache = "use_cache" in inspect.signature(network.forward).parameters
        self._separates_texts = False
        self._layers, self._position_limit, self.can_be_batched, self._cut = self._observe(lists)
        self.layers = [(paths[0], network.get_submodule(paths[0])) for paths in self._layers]
        if not self._cut.depths:
            self.notes.append(
                f"{type(network).__name__} cannot be cut between layers: every layer runs for every member."
            )

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

    @property
    def hidden_size(self) -> int:
        """D, which the config of a model for more than text has in the part for text."""
        config: Any = self.network.config
        return int(getattr(config, "hidden_size", None) or config.get_text_config().hidden_size)

    # -- computation --

    def cut_depth(self, depth: int) -> int:
        """Return the largest depth up to this one at which the network can be cut; 0 if there is none.

        It is 0 while `torch.export` traces the network, whose tracer loses its place where a forward pass ends early.
        """
        return 0 if torch.compiler.is_exporting() else self._cut.deepest(depth)

    def prefix(self, batch: Batch, depth: int) -> Tensor:
        """Return the output (N, T, D) of the first `cut_depth(depth)` layers; for 0 the token ids (N, T)."""
        depth = self.cut_depth(depth)
        return self._cut.prefix(depth, lambda: self.run_network(batch)) if depth else batch.input_ids

    def suffix_with_states(self, hidden: Tensor, batch: Batch, depth: int) -> tuple[Tensor, Tensor]:
        """Return the logits (N, C), and the hidden states (N, T, D) that the base model, or its encoder, returns."""
        cut = self._cut.suffix(self.cut_depth(depth), hidden) if hidden.is_floating_point() else nullcontext()
        with cut, self.collecting_states() as states:
            logits = self.read_logits(self.run_network(batch), batch)
        return logits, states[0]

    def compute_sharded(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.suffix_with_states(batch.input_ids, batch, 0)

    @property
    def separates_texts(self) -> bool:
        """True if the last layer gives a vector of the layers' width for each token, as observed at construction."""
        return self._separates_texts

    def run_network(self, batch: Batch) -> Any:
        """Return what the network's own forward pass returns for the rows of a batch."""
        return self.network(**self.inputs(batch))

    def read_logits(self, output: Any, batch: Batch) -> Tensor:
        """Return the logits (N, C) in an output of `run_network`."""
        return output.logits  # type: ignore[no-any-return]

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Return the arguments of the network's forward pass.

        Token types are left out if the tokenizer does not name them as an input. A decoder stores no keys and values.
        """
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if "token_type_ids" in self.tokenizer.model_input_names and batch.token_type_ids is not None:
            inputs["token_type_ids"] = batch.token_type_ids
        return inputs | ({"use_cache": False} if self._takes_use_cache else {})

    @contextmanager
    def collecting_states(self) -> Iterator[list[Tensor]]:
        """Yield a list that gets the hidden states (N, T, D) of each pass within the context."""
        states: list[Tensor] = []

        def note_states(_module: nn.Module, _inputs: object, output: Any) -> None:
            of_encoder = getattr(output, "encoder_last_hidden_state", None)
            states.append(output[0] if of_encoder is None else of_encoder)

        base: Any = self.network.base_model
        hook = base.register_forward_hook(note_states)
        try:
            yield states
        finally:
            hook.remove()

    # -- observation --

    @torch.no_grad()
    def _observe(self, lists: Sequence[Sequence[str]]) -> tuple[list[list[str]], int | None, bool, LayerCut]:
        """Compute a few copies of an artificial pair, the last one shorter and padded, and observe the modules.

        Args:
            lists: names of the modules in each outermost list.

        Returns:
            The layers in the order of computation, each as the names of its modules; the most tokens that the position
            tables have rows for, None where there are no such tables; whether every linear takes the batch's rows,
            and not, as in DeBERTa, relative positions that all rows share; and where the network can be cut.

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
        batch = self._probe_batch()
        tables = _PositionTables(PROBE_TOKENS)
        training = self.network.training
        self.network.eval()
        try:
            with tables, self.collecting_states() as states:
                calls, logits = record_calls(self.network, paths, lambda: self.probe_output(batch))
        except Exception as error:  # whatever an unknown model raises
            reason = f"{type(self.network).__name__} cannot compute a pair of texts ({type(error).__name__}: {error})"
            remedy = "Give the tokenizer and config.json of these weights."
            raise UserError(
                " ".join(reason.split()), key="model.family", value="auto", remedy=remedy, code=Code.UNSUPPORTED
            ) from None
        finally:
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
        shape = (PROBE_ROWS, PROBE_TOKENS, self.hidden_size)
        self._separates_texts = bool(states) and tuple(states[0].shape) == shape
        layers = _in_order(lists, first_calls)
        forward = partial(self.probe_output, batch)
        cut = LayerCut(self.network, layers, calls, logits, forward, batch.attention_mask, self.hidden_size)
        self.network.train(training)
        return layers, min(tables.limits, default=None), all(takes_rows), cut

    def probe_output(self, batch: Batch) -> Tensor:
        """Return what the observation compares between forward passes: the logits (N, C).

        It is called at construction. A subclass whose logits need more than the network, such as the names of the
        classes, overrides it.
        """
        return self.read_logits(self.run_network(batch), batch)

    def _probe_batch(self) -> Batch:
        """Return PROBE_ROWS artificial pairs of PROBE_TOKENS tokens; the last has PROBE_PADDING tokens of padding."""
        ids, types = (row.repeat(PROBE_ROWS, 1) for row in self.probe_row(PROBE_TOKENS))  # (N, T)
        mask = torch.ones_like(ids)
        if self.tokenizer.pad_token_id is not None:
            short_ids, short_types = self.probe_row(PROBE_TOKENS - PROBE_PADDING)
            ids[-1] = nn.functional.pad(short_ids, (0, PROBE_PADDING), value=self.tokenizer.pad_token_id)
            types[-1] = nn.functional.pad(short_types, (0, PROBE_PADDING))
            mask[-1, -PROBE_PADDING:] = 0
        return Batch(ids, mask, types, None, full=False).map(lambda tensor: tensor.to(self.device))


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
                row = indices[..., :tokens].reshape(-1, tokens)[0]  # the last row is padded
                offset = int(row[0])
                if torch.equal(row, (self._ascending + offset).to(row)):
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
