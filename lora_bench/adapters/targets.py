"""Choose the linears that an adapter changes: by regular expression on full module names, by layer, never the head."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_bench.adapters.base import Adapter
from lora_bench.adapters.patterns import limited_matching
from lora_bench.config.adapter_values import LAYERS_REMEDY, check_values
from lora_bench.errors import Code, UserError, require

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import nn

    from lora_bench.backbones.base import Backbone


@dataclass(frozen=True, kw_only=True)
class LinearAdapter(Adapter):
    """A method that adapts linears which the user chooses by name and layer."""

    target_modules: str
    """`all`, `qv`, or a regular expression that a linear's full name must match from end to end."""
    layers: Any
    """`all`, `top:n`, or a list of layer numbers, counted from 0 in the order of computation; of a model with both also
    `encoder`, `decoder`, `encoder:top:n` or `decoder:top:n`."""

    def __post_init__(self) -> None:
        """Refuse `layers` of a wrong type.

        Which layers exist is checked in `targets`, as it depends on the backbone.
        """
        super().__post_init__()
        check_values({"layers": self.layers})

    def targets(self, backbone: Backbone) -> list[str]:
        return match_targets(backbone, self.target_modules, self.layers)


def largest_rank(linear: nn.Linear) -> int:
    """Return the highest useful rank beside a linear: its smaller side."""
    return min(linear.in_features, linear.out_features)


def require_ranks(ranks: Mapping[str, int], names: Iterable[str]) -> None:
    """Refuse recorded ranks that lack a target.

    Raises:
        UserError: naming the first target without a rank.
    """
    if missing := [name for name in names if name not in ranks]:
        raise UserError(f"the record has no rank of {missing[0]}", key="targets", code=Code.MISMATCH)


def require_rank(key: str, rank: int, name: str, linear: nn.Linear, remedy: str = "") -> None:
    """Refuse a rank, given by `key`, that is above the smaller side of the linear called `name`."""
    largest, shape = largest_rank(linear), f"{linear.out_features} by {linear.in_features}"
    require(rank <= largest, key, rank, f"is above {largest}, the smaller side of {name} ({shape})", remedy)


def match_targets(
    backbone: Backbone, target_modules: str, layers: Any, candidates: Iterable[str] | None = None
) -> list[str]:
    """Return the full names of the linears that both settings choose, in the order of computation.

    Args:
        backbone: its linears are the candidates; a name outside its layers is never chosen.
        target_modules: `all` (every linear of the layers), `qv` (query and value of every attention; the words mean the
            same for every family), or a regular expression that the full name matches from end to end.
        layers: `all`, `top:n` (the last n), a list of layer numbers from 0, not empty, or one of the first two among
            the layers of one stack of the backbone, such as `decoder` or `decoder:top:n`.
        candidates: names to choose from in place of the linears', in the order of the result.

    Raises:
        UserError: the expression is invalid or takes too long, no name matches both settings, or a layer does not
            exist.
    """
    names = list(backbone.linears() if candidates is None else candidates)
    chosen_layers = _match_layers(layers, len(backbone.layers), backbone.stacks)
    pattern = {"all": r".*", "qv": backbone.query_value}.get(target_modules, target_modules)
    with limited_matching("target_modules", target_modules):
        matched = _match_names(names, pattern, target_modules)
    outer = set(matched)  # a fused linear is adapted as a whole, or its query, key and value are
    matched = [
        name for name in matched if backbone.layer_of(name) in chosen_layers and name.rpartition(".")[0] not in outer
    ]
    if not matched:
        raise UserError(
            f"leaves no linear that target_modules={target_modules} matches",
            key="layers",
            value=layers,
            code=Code.NO_MATCH,
        )
    return matched


def _match_names(names: list[str], pattern: str, target_modules: str) -> list[str]:
    """Return the names that the expression matches from end to end, in their order.

    Args:
        names: the candidates.
        pattern: the expression.
        target_modules: what the user gave for it, for the message.

    Raises:
        UserError: it is not an expression, or matches no name. If it matches a part of a name, the remedy gives an
            expression that matches it whole; else it lists the names, layer numbers as `*`.
    """
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(
            f"is not a regular expression: {error}",
            key="target_modules",
            value=target_modules,
            code=Code.INVALID_SYNTAX,
        ) from None
    matched = [name for name in names if compiled.fullmatch(name)]
    if not matched:
        near = [name for name in names if compiled.search(name)]
        hint = (
            f"It matches a part of {near[0]}: the whole name must match, so try '.*({pattern}).*'."
            if near
            else f"Names there are: {', '.join(_patterns(names))}."
        )
        raise UserError(
            "matches no linear of the backbone",
            key="target_modules",
            value=target_modules,
            remedy=hint,
            code=Code.NO_MATCH,
        )
    return matched


def unmatched_alternatives(target_modules: str, names: list[str]) -> list[str]:
    """Return the alternatives of an expression that match none of its targets: almost surely misspelt.

    That is `qurey` in `.*(query|value|qurey)`. The first bracket of plain names is split at its bars, or, without one,
    the whole expression. The list is empty for `all`, `qv`, an expression without alternatives, and bars that do not
    delimit any.

    Args:
        target_modules: the expression.
        names: full names of the linears that it chose.

    Raises:
        UserError: matching takes too long.
    """
    if target_modules in ("all", "qv"):
        return []
    group = re.search(r"\(\??:?([\w.|]+)\)", target_modules)
    alternatives = (group.group(1) if group else target_modules).split("|")
    if len(alternatives) < 2:
        return []
    rest = (target_modules[: group.start()], target_modules[group.end() :]) if group else ("", "")
    with limited_matching("adapter.target_modules", target_modules):
        try:
            compiled = {a: re.compile(f"{rest[0]}(?:{a}){rest[1]}") for a in alternatives}
        except re.error:  # the bars do not stand where they seem to: `[q|v]`, `(self\.query|value)`
            return []
        return [a for a, pattern in compiled.items() if not any(map(pattern.fullmatch, names))]


def _match_layers(layers: Any, count: int, stacks: Mapping[str, range]) -> set[int]:
    """Return the numbers of the layers that `layers` chooses among `count` of them.

    Args:
        layers: `all`, `top:n` (the last n, with n from 1 to `count`), a list of layer numbers from 0, not empty; or the
            name of a stack, alone or followed by `:top:n`.
        count: number of layers.
        stacks: the numbers of the layers of each stack; empty if there is only one.

    Raises:
        UserError: `layers` is none of these, or a number is out of range.
    """
    numbers, choice = range(count), layers
    if isinstance(layers, str) and layers.partition(":")[0] in stacks:
        stack, _, within = layers.partition(":")
        numbers, choice = stacks[stack], within or "all"
    if choice == "all":
        return set(numbers)
    top = re.fullmatch(r"top:(\d+)", str(choice))
    if top and 1 <= int(top.group(1)) <= len(numbers):
        return set(numbers[-int(top.group(1)) :])
    if isinstance(layers, list | tuple) and layers and all(type(i) is int and 0 <= i < count for i in layers):
        return set(layers)
    places = [f"{name} {numbers[0]} to {numbers[-1]}" for name, numbers in stacks.items()]
    listed = f" ({', '.join(places)})" if places else ""
    raise UserError(
        f"is neither all, nor top:n with n from 1 to {count}, nor a list of layers from 0 to {count - 1}{listed}",
        key="layers",
        value=layers,
        remedy=LAYERS_REMEDY,
        code=Code.INVALID_VALUE,
    )


def _patterns(names: list[str]) -> list[str]:
    """Return the names with their numbers blanked, each once: short enough to print."""
    return list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
