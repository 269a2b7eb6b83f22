"""Cut any network between two layers: its own forward pass runs, with the layers below replaced by a stored output.

A layer may take more than hidden states: masks, position embeddings, relative positions, the output of an encoder. The
network's forward pass makes them from the batch, whatever they are, so it runs in full. Only the layers below the cut
return their input at once, and the last one of them returns the stored hidden states. What the layers below would have
passed on besides hidden states is lost; `LayerCut` finds out between which layers nothing is.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Handler = Callable[..., Any]
    """Called in place of a module's forward pass, as `handler(path, forward, *args, **kwargs)`."""


@dataclass(frozen=True)
class LayerCall:
    """A call of a module of a layer; tensors are copies, since some networks change them in place afterwards."""

    path: str
    """The module's full name."""
    inputs: Any
    output: Any


class LayerCut:
    """The depths at which a network can be cut, and its forward pass up to a cut and from a cut on.

    A cut at depth d lies behind the last module of layer d - 1: the hidden states there are the first output of that
    module. It is possible if the forward pass with the layers below replaced gives every module above the same inputs,
    and gives the same logits. Nothing above has to be computed to see this: modules above return what they returned
    before. One cut is then checked by computing all layers above it.

    Args:
        network: in evaluation mode.
        layers: the names of the modules of each layer, in the order of computation.
        calls: of the modules in one forward pass, as `record_calls` returns them.
        logits: of that forward pass.
        forward: the same forward pass again; returns the logits.
        mask: (N, T) its attention mask; it should have rows with and without padding.
        width: D, the number of features of hidden states.
    """

    def __init__(
        self,
        network: nn.Module,
        layers: Sequence[Sequence[str]],
        calls: Sequence[LayerCall],
        logits: Tensor,
        forward: Callable[[], Tensor],
        mask: Tensor,
        width: int,
    ) -> None:
        self.network = network
        self._paths = [path for paths in layers for path in paths]
        layer_of = {path: layer for layer, paths in enumerate(layers) for path in paths}
        order = [layer_of[call.path] for call in calls]
        is_layered = order == sorted(order) and set(order) == set(range(len(layers)))
        self._ends = [len(order) - order[::-1].index(i) for i in range(len(layers))] if is_layered else []
        """By layer, the number of calls up to the end of its last module."""
        self._outputs = [_sequence_type(call.output) for call in calls]
        """By call, the type and length of the tuple or list that it returned; None for a tensor."""
        hidden = [_hidden_states(calls[end - 1].output) for end in self._ends]
        shape = (*mask.shape, width)
        self.depths = {
            depth
            for depth, states in enumerate(hidden, 1)
            if states is not None and states.shape == shape and self._keeps_inputs(depth, calls, logits, forward)
        }
        """The depths, from 1 to the number of layers, at which the network can be cut."""
        if self.depths:
            states = hidden[min(self.depths) - 1]
            assert states is not None
            # The cached prefix holds no padding: reading it gives zeros there.
            with self.suffix(min(self.depths), states * mask[:, :, None].to(states.dtype)):
                if not _are_close(forward(), logits):
                    self.depths = set()

    def deepest(self, depth: int) -> int:
        """Return the largest possible depth that is not above `depth`; 0 if there is none."""
        return max((possible for possible in self.depths if possible <= depth), default=0)

    def prefix(self, depth: int, forward: Callable[[], object]) -> Tensor:
        """Return the hidden states (N, T, D) at a possible depth from 1; `forward` stops there.

        Args:
            depth: number of layers to compute.
            forward: runs the network.
        """
        calls = 0

        def handle(_path: str, layer_forward: Handler, *args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            output = layer_forward(*args, **kwargs)
            if calls == self._ends[depth - 1]:
                raise _CutReachedError(_hidden_states(output))
            return output

        with self._handling(handle):
            try:
                forward()
            except _CutReachedError as reached:
                return reached.hidden
        raise AssertionError("the forward pass ended below the cut")

    @contextmanager
    def suffix(self, depth: int, hidden: Tensor) -> Iterator[None]:
        """Compute the network's forward passes within the context from these hidden states on.

        Args:
            depth: a possible depth from 1.
            hidden: (N, T, D), the result of `prefix` for the same rows.
        """
        calls = 0

        def handle(_path: str, layer_forward: Handler, *args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > self._ends[depth - 1]:
                return layer_forward(*args, **kwargs)
            return self._skip(calls, depth, hidden, args, kwargs)

        with self._handling(handle):
            yield

    def _skip(self, call: int, depth: int, hidden: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Return in place of the output of a call (from 1) its own input, or the hidden states at the last call.

        The hidden states are copied, because some networks (XLM) change a layer's output in place.
        """
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        states = hidden.clone() if call == self._ends[depth - 1] else next(tensors, hidden)
        returned = self._outputs[call - 1]
        if returned is None:
            return states
        sequence, length = returned
        return sequence([states, *[None] * (length - 1)])

    def _keeps_inputs(
        self, depth: int, calls: Sequence[LayerCall], logits: Tensor, forward: Callable[[], Tensor]
    ) -> bool:
        """Return whether with a cut there the modules above get the inputs of `calls`, and the logits are the same."""
        hidden = _hidden_states(calls[self._ends[depth - 1] - 1].output)
        assert hidden is not None
        number = 0

        def handle(_path: str, _forward: Handler, *args: Any, **kwargs: Any) -> Any:
            nonlocal number
            number += 1
            if number <= self._ends[depth - 1]:
                return self._skip(number, depth, hidden, args, kwargs)
            if not _are_close((args, kwargs), calls[number - 1].inputs):
                raise _OtherInputsError
            return _copied(calls[number - 1].output)

        with self._handling(handle):
            try:
                return _are_close(forward(), logits) and number == len(calls)
            except Exception:  # whatever a network raises for want of what the layers below pass on
                return False

    @contextmanager
    def _handling(self, handler: Handler) -> Iterator[None]:
        with _handled(self.network, self._paths, handler):
            yield


def record_calls(
    network: nn.Module, paths: Sequence[str], forward: Callable[[], Tensor]
) -> tuple[list[LayerCall], Tensor]:
    """Run a forward pass, and record the calls of these modules.

    Args:
        network: as it is; nothing is left behind in it.
        paths: full names of the modules.
        forward: runs the network and returns the logits.

    Returns:
        The calls in their order, and the logits.
    """
    calls: list[LayerCall] = []

    def handle(path: str, module_forward: Handler, *args: Any, **kwargs: Any) -> Any:
        inputs = _copied((args, kwargs))
        output = module_forward(*args, **kwargs)
        calls.append(LayerCall(path, inputs, _copied(output)))
        return output

    with _handled(network, paths, handle):
        return calls, forward()


@contextmanager
def _handled(network: nn.Module, paths: Sequence[str], handler: Handler) -> Iterator[None]:
    """Call `handler` in place of the forward pass of each of these modules within the context.

    The modules are looked up anew each time, since an adapter may have replaced some. An attribute `forward` of the
    object takes the place of the method, so that direct calls of `forward` (SqueezeBERT) are handled too.
    """
    modules = {network.get_submodule(path): path for path in reversed(paths)}  # of a module's names the first
    before = {module: vars(module).get("forward") for module in modules}
    for module, path in modules.items():
        module.forward = partial(handler, path, module.forward)
    try:
        yield
    finally:
        for module, forward in before.items():
            del module.forward
            if forward is not None:
                module.forward = forward


class _CutReachedError(Exception):
    """Ends a forward pass at the cut; carries the hidden states there."""

    def __init__(self, hidden: Any) -> None:
        super().__init__()
        self.hidden: Tensor = hidden


class _OtherInputsError(Exception):
    """A module above the cut got other inputs than in the whole forward pass."""


def _hidden_states(output: Any) -> Tensor | None:
    """Return the tensor that a module returned, or the first of a tuple or list; None for anything else."""
    first = output[0] if isinstance(output, tuple | list) and output else output
    return first if isinstance(first, Tensor) and first.is_floating_point() else None


def _sequence_type(output: Any) -> tuple[Callable[[list[Any]], Any], int] | None:
    """Return the type and length of a tuple or list that a module returned; None for anything else."""
    return (tuple if isinstance(output, tuple) else list, len(output)) if isinstance(output, tuple | list) else None


def _copied(values: Any) -> Any:
    """Return nested values with copies of their tensors."""
    return tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, values)


def _are_close(values: Any, expected: Any) -> bool:
    """Return whether the tensors in nested values are equal up to rounding, and as many; other values do not count."""
    tensors, others = ([leaf for leaf in tree_leaves(v) if isinstance(leaf, Tensor)] for v in (values, expected))
    return len(tensors) == len(others) and all(map(_is_close, tensors, others))


def _is_close(tensor: Tensor, expected: Tensor) -> bool:
    if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
        return False
    return torch.allclose(tensor, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
