"""Read PEFT's `adapter_config.json`: the modules that a finished adapter adapts, their ranks and scalings.

Module names are matched as peft matches them. A setting that is not known here is refused, since it may change what
the adapter computes.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_bench.adapters.patterns import limited_matching
from lora_bench.errors import Code, UserError
from lora_bench.files import untrusted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

FILE = "adapter_config.json"
SUBTRACTED_STARTS = ("pissa", "olora")
"""Starts by which peft changes the backbone's weights, in the same way each time that it loads the adapter."""

MAX_ENTRIES = 10_000
"""Of a list or an object in the file: more than any network has modules to name."""

_REQUIRED = {
    "LORA": ("r", "lora_alpha", "target_modules"),
    "ADALORA": ("init_r", "lora_alpha", "target_modules"),
    "VERA": ("r", "target_modules"),
}
_READ = {
    *("peft_type", "base_model_name_or_path", "revision", "task_type", "r", "init_r", "lora_alpha", "use_rslora"),
    *("use_dora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "modules_to_save", "bias", "init_lora_weights", "save_projection"),
}
# Keys that decide nothing about a finished adapter, whatever their value.
_IDLE = {
    *("auto_mapping", "peft_version", "inference_mode", "lora_dropout", "vera_dropout", "d_initial", "init_weights"),
    *("projection_prng_key", "megatron_core", "qalora_group_size", "runtime_config", "eva_config", "corda_config"),
    *("lora_ga_config", "loftq_config", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight"),
    *("total_step", "fan_in_fan_out"),
}
# Starts that leave the backbone's weights as they are.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class PeftConfig:
    """The config of a folder that peft's `save_pretrained` left, read and checked."""

    folder: Path
    values: dict[str, Any]

    @classmethod
    def read(cls, folder: str | Path) -> PeftConfig:
        """Read and check `adapter_config.json` of a folder.

        Raises:
            UserError: it is absent or damaged, lacks a key, has a key or value that is not known here, or has an
                expression that takes too long.
        """
        path = Path(folder) / FILE
        try:
            values = untrusted.read_json(path)
        except OSError as error:
            remedy = "Give the folder that peft's save_pretrained wrote."
            code = Code.NOT_FOUND if isinstance(error, FileNotFoundError) else Code.UNREADABLE
            raise UserError(f"cannot be read: {error.strerror}", file=path, remedy=remedy, code=code) from None
        except ValueError as error:
            raise UserError(f"is damaged: {error}", file=path, code=Code.DAMAGED) from None
        if not isinstance(values, dict):
            raise UserError("is damaged: it holds no object", file=path, code=Code.DAMAGED)
        config = cls(Path(folder), values)
        with limited_matching("adapter", file=path):
            config._check()
        return config

    @property
    def peft_type(self) -> str:
        """`peft_type`: LORA, ADALORA or VERA."""
        return str(self.values["peft_type"])

    @property
    def base_model(self) -> str | None:
        """The local folder or hub id of the backbone that the adapter was made for."""
        return self.values.get("base_model_name_or_path") or None

    @property
    def revision(self) -> str | None:
        """Branch, tag or commit of that backbone on the hub."""
        return self.values.get("revision") or None

    @property
    def saved_modules(self) -> list[str]:
        """Ends of the names of modules that are trained and saved whole; for a classifier peft adds its own."""
        added = ["classifier", "score"] if self.values.get("task_type") in ("SEQ_CLS", "TOKEN_CLS") else []
        return [*(self.values.get("modules_to_save") or []), *added]

    def adapts(self, name: str) -> bool:
        """Return whether PEFT adapts the module of this full name.

        A text in `target_modules` is an expression for the whole name, a list has names or ends of names.
        `layers_to_transform` restricts only what a list names by its end. Excluded modules, and those saved whole with
        all in them, are never adapted.
        """
        targets, excluded = self.values["target_modules"], self.values.get("exclude_modules") or []
        if _fits(excluded, name) or any(re.match(rf"(^|.*\.){whole}($|\..*)", name) for whole in self.saved_modules):
            return False
        layers = self.values.get("layers_to_transform")
        if isinstance(targets, str) or name in targets or layers is None or layers == []:
            return _fits(targets, name)
        patterns = self.values.get("layers_pattern") or []
        lists = [patterns] if isinstance(patterns, str) else patterns
        expressions = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in lists] or [r".*?\.[^.]*\.(\d+)\."]
        number = next((int(hit[1]) for expression in expressions if (hit := re.match(expression, name))), None)
        return _fits(targets, name) and number in (layers if isinstance(layers, list) else [layers])

    def by_module(self, key: str, default: Any, names: Iterable[str]) -> dict[str, Any]:
        """Return for each name the value of the first pattern in `rank_pattern` or `alpha_pattern` that fits.

        A name that none fits gets `default`. A pattern is an expression, and fits a name if it matches the name's end,
        in whole components. Values are not checked.

        Raises:
            UserError: a pattern fits none of the names.
        """
        patterns = self.values.get(key) or {}
        pattern_of = {name: next((p for p in patterns if _ends(p, name)), None) for name in names}
        for pattern in patterns:
            if not any(_ends(pattern, name) for name in pattern_of):
                raise self.refusal(key, None, f"{pattern!r} fits no adapted module", code=Code.NO_MATCH)
        return {name: default if pattern is None else patterns[pattern] for name, pattern in pattern_of.items()}

    def refusal(
        self, key: str, value: object, reason: str, remedy: str = "", *, code: Code = Code.UNSUPPORTED
    ) -> UserError:
        """Return (not raise) the error that names a key of the file."""
        return UserError(reason, key=key, value=value, file=self.folder / FILE, remedy=remedy, code=code)

    def _check(self) -> None:
        """Refuse a config that is not understood completely.

        Raises:
            UserError: the PEFT type is not supported, a required key is missing, a value has a wrong type or too many
                entries, biases are trained, `init_lora_weights` needs more than the file holds, or an unknown key has a
                value that is not empty, zero or false.
        """
        peft_type = self.values.get("peft_type")
        if not isinstance(peft_type, str) or peft_type not in _REQUIRED:
            raise self.refusal(
                "peft_type", peft_type, f"is none of {', '.join(_REQUIRED)}, which can be evaluated here"
            )
        for key in _REQUIRED[peft_type]:
            if self.values.get(key) is None:
                raise self.refusal(key, None, "is missing", code=Code.MISSING)
        for key, (holds, reason) in _RULES.items():
            value = self.values.get(key)
            if value is not None and not holds(value):
                raise self.refusal(key, value, reason, code=Code.INVALID_VALUE)
        bias = self.values.get("bias")
        if bias not in (None, "none"):
            raise self.refusal("bias", bias, "trains biases of the backbone, which are not read here")
        for key, value in self.values.items():
            if value and key not in _READ | _IDLE:
                reason = "is not known here and may change what the adapter computes"
                raise self.refusal(key, value, reason, "Merge it with peft's merge_and_unload.")
        for key, value in self.values.items():
            if isinstance(value, list | dict) and len(value) > MAX_ENTRIES:
                reason = f"has {len(value):,} entries; at most {MAX_ENTRIES:,} are read"
                raise self.refusal(key, None, reason, code=Code.TOO_LARGE)
        start = self.values.get("init_lora_weights")
        if start not in (*_PLAIN_STARTS, *SUBTRACTED_STARTS):
            raise self.refusal(
                "init_lora_weights",
                start,
                "leaves A and B beside a backbone that was changed in a way which the file does not tell",
                "peft's save_pretrained with path_initial_model_for_weight_conversion makes it a plain LoRA; "
                "where that leaves the head out, put its tensors back.",
            )


def _fits(targets: str | list[str], name: str) -> bool:
    """Return whether an expression matches the whole name, or an entry of a list is the name or its last components."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    components = name.split(".")
    return not {".".join(components[i:]) for i in range(len(components))}.isdisjoint(targets)


def _ends(pattern: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _is_expression(value: object) -> bool:
    """Return whether it is a text that compiles as a regular expression."""
    try:
        return isinstance(value, str) and re.compile(value) is not None
    except (re.error, OverflowError, RecursionError):
        return False


def _is_part(value: object) -> bool:
    """Return whether it can stand inside an expression, where flags for the whole cannot."""
    return _is_expression(value) and _is_expression(f"x({value})")


def _are_parts(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_part, value))


def _names(value: object) -> bool:
    return _is_expression(value) or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def is_rank(value: object) -> bool:
    """Return whether it is a whole number from 1."""
    return type(value) is int and value >= 1


def _by_module(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_part, value))


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (is_rank, "must be a whole number from 1"),
    "init_r": (is_rank, "must be a whole number from 1"),
    "lora_alpha": (_is_number, "must be a finite number above 0"),
    "target_modules": (_names, "is neither a list of names nor a regular expression"),
    "exclude_modules": (_names, "is neither a list of names nor a regular expression"),
    "modules_to_save": (_are_parts, "is no list of names"),
    "layers_to_transform": (
        lambda value: all(type(layer) is int for layer in (value if isinstance(value, list) else [value])),
        "is neither a layer number nor a list of them",
    ),
    "layers_pattern": (lambda value: _is_part(value) or _are_parts(value), "is no name"),
    "rank_pattern": (_by_module, "does not go by module names"),
    "alpha_pattern": (
        lambda value: _by_module(value) and all(map(_is_number, value.values())),
        "does not give each module a number above 0",
    ),
}
