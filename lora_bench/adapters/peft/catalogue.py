"""The methods of the installed PEFT: which of them can be trained here, and what their settings are called.

PEFT and torch are imported by the functions, not with this module: PEFT is an extra, and a refusal needs neither.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from enum import Enum
from importlib import metadata
from typing import TYPE_CHECKING, Any

from lora_bench.errors import Code, UserError, nearest, require

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_bench.backbones.base import Backbone

INSTALL = "pip install 'lora-bench[peft]'"

REFUSED = {
    "ADALORA": ("prunes ranks by a schedule of its own", "Use adapter=adalora, which has the same mathematics."),
    "ADAPTION_PROMPT": ("replaces the attention of LLaMA and GPT-2 as a whole", ""),
    "POLY": ("needs the number of a task with every row", ""),
    "SHADOW": ("trains a second network beside the backbone", ""),
    "TRAINABLE_TOKENS": ("trains rows of the embeddings, which lie below the first layer", ""),
    "XLORA": ("mixes adapters that are trained already", "Train one of them, or an ensemble: ensemble.members=3."),
}
"""Methods that change more than single modules of the layers: the reason, and what to do instead if there is something.

Prompt learning is refused as well, by its class.
"""
_PROMPT_REASON = (
    "puts virtual tokens before the text, and layers, masks and positions here are computed for the text alone"
)
ON_NORMS = {"LN_TUNING"}
"""Methods that adapt the norms of the layers; all others adapt linears."""

FROM_WEIGHT = {"ADAMSS", "FROD", "PSOFT"}
"""Methods that compute frozen tensors from the weights whenever they are loaded: rounded weights give other ones."""
SHARE_BY_SUFFIX = {"LILY"}
"""Methods whose layers share tensors where their names end alike; full names of targets would share nothing."""
MIX_POSITIONS = {"LILY"}
"""Methods that compute with averages over the positions of a batch."""

_NATIVE_STARTS = ("pissa", "olora", "eva", "loftq", "lora_ga")
"""PEFT's initialisations of LoRA that write into the frozen weight or read data, and that are methods here."""

_OWNED = {
    "target_modules": "Use adapter.target_modules.",
    "exclude_modules": "Use adapter.target_modules.",
    "target_parameters": "Use adapter.target_modules.",
    "layers_to_transform": "Use adapter.layers.",
    "layers_pattern": "Use adapter.layers.",
    "modules_to_save": "The head is always trained and saved.",
    "trainable_token_indices": "The embeddings stay frozen.",
    "layer_replication": "The backbone keeps its layers.",
    "bias": "Use adapter=bitfit to train biases.",
    "fan_in_fan_out": "It follows from the backbone.",
    **dict.fromkeys(
        ("base_model_name_or_path", "revision", "task_type", "peft_type", "auto_mapping", "peft_version"),
        "It follows from the run.",
    ),
    "inference_mode": "It follows from the run.",
}
"""Fields of PEFT's config classes that another key decides, or the run itself."""


def is_installed() -> bool:
    """Return whether PEFT is installed; it is not imported."""
    return importlib.util.find_spec("peft") is not None


def require_installed(peft_type: str) -> None:
    """Refuse a method of PEFT if PEFT is not installed; the key is `peft_type`."""
    reason, remedy = "needs PEFT, which is not installed", f"{INSTALL} installs it."
    require(is_installed(), "peft_type", peft_type, reason, remedy, code=Code.MISSING_PACKAGE)


def method_types() -> tuple[list[str], list[str]]:
    """Return the names of the installed PEFT's methods: those that can be trained here, and those that are refused."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    names = sorted(str(peft_type.value) for peft_type in PEFT_TYPE_TO_CONFIG_MAPPING)
    refused = [name for name in names if _refusal_reason(name) is not None]
    return [name for name in names if name not in refused], refused


def config_class(peft_type: str) -> Any:
    """Return PEFT's config class of a method that can be trained here.

    Raises:
        UserError: PEFT is not installed or has no such method, or the method does not fit; the key is `peft_type`.
    """
    require_installed(peft_type)
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    trainable, refused = method_types()
    name = peft_type.upper()
    if name not in [*trainable, *refused]:
        hint = nearest(name, trainable)
        hint = hint if hint.startswith("Did") else f"`lora-bench doctor` lists those of {version()}."
        raise UserError(
            f"is no method of {version()}, the installed version",
            key="peft_type",
            value=peft_type,
            remedy=f"{hint} A method of a newer PEFT needs pip install --upgrade peft.",
            code=Code.UNKNOWN_CHOICE,
        )
    if reason := _refusal_reason(name):
        remedy = REFUSED.get(name, ("", ""))[1] or "`lora-bench doctor` lists the methods that can be trained."
        raise UserError(reason, key="peft_type", value=peft_type, remedy=remedy, code=Code.UNSUPPORTED)
    return PEFT_TYPE_TO_CONFIG_MAPPING[name]


def _refusal_reason(name: str) -> str | None:
    """Return why a method of the installed PEFT cannot be trained here; None if it can."""
    from peft import PromptLearningConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if issubclass(PEFT_TYPE_TO_CONFIG_MAPPING[name], PromptLearningConfig):
        return _PROMPT_REASON
    return REFUSED[name][0] if name in REFUSED else None


def version() -> str:
    """Return the name and version of the installed PEFT."""
    return f"PEFT {metadata.version('peft')}"


def build_config(
    peft_type: str, mapped: Mapping[str, Any], names: Mapping[str, str | None], settings: Mapping[str, Any]
) -> Any:
    """Return PEFT's config of a method without targets, checked against the fields of its class.

    Args:
        peft_type: of `config_class`.
        mapped: the values of `rank`, `alpha` and `dropout`; None: PEFT's default.
        names: the fields for some of the three, or None where the method has no such setting; the others have the
            names that PEFT's methods usually give them.
        settings: further fields of the class by name.

    Raises:
        UserError: the method has no such field, another key decides it, or its class refuses the values. Keys are
            relative to `adapter`.
    """
    cls = config_class(peft_type)
    peft_type = peft_type.upper()
    fields = {field.name: field for field in dataclasses.fields(cls)}
    field_of = {key: names[key] if key in names else _usual_name(key, peft_type, fields) for key in mapped}
    free = [name for name in fields if name not in _OWNED and name not in field_of.values()]
    for key, field in field_of.items():
        if field is not None and field not in fields:
            raise _unknown(f"fields.{key}", field, peft_type, list(fields))
        if field is None and mapped[key] is not None:
            remedy = f"It has {', '.join(free)}: adapter.settings.{free[0]}=VALUE." if free else ""
            reason = f"has no meaning for {peft_type}"
            raise UserError(reason, key=key, value=mapped[key], remedy=remedy, code=Code.CONFLICT)
    for name, value in settings.items():
        _check_setting(name, value, peft_type, fields, {field: key for key, field in field_of.items() if field}, free)
    values = {field: mapped[key] for key, field in field_of.items() if field and mapped[key] is not None}
    try:
        return cls(**values, **settings)
    except (TypeError, ValueError, NotImplementedError, ImportError) as error:
        raise _refused_by_peft(peft_type, settings, error) from None


def _usual_name(key: str, peft_type: str, fields: Mapping[str, Any]) -> str | None:
    """Return the first of the names that PEFT's methods use for `rank`, `alpha` or `dropout`; None if none is there."""
    method = peft_type.lower()
    candidates = {
        "rank": ("r",),
        "alpha": ("alpha", f"{method}_alpha", "lora_alpha"),
        "dropout": (f"{method}_dropout", "lora_dropout", "module_dropout"),
    }
    return next((name for name in candidates[key] if name in fields), None)


def _check_setting(
    name: str, value: object, peft_type: str, fields: Mapping[str, Any], keys: Mapping[str, str], free: list[str]
) -> None:
    """Refuse a setting that the method does not have, that another key decides, or whose value is of a wrong type."""
    key = f"settings.{name}"
    if name in keys:
        reason = f"is adapter.{keys[name]} here, so that sweeps over methods have one name for it"
        remedy = f"Give adapter.{keys[name]}={value}."
        raise UserError(reason, key=key, value=value, remedy=remedy, code=Code.CONFLICT)
    if name.endswith("_config") or "megatron" in name:
        reason = "is an object of PEFT's, which a configuration cannot hold"
        raise UserError(reason, key=key, value=value, remedy="Leave it out.", code=Code.UNSUPPORTED)
    if name in _OWNED:
        raise UserError("is not set here", key=key, value=value, remedy=_OWNED[name], code=Code.CONFLICT)
    if name not in fields:
        raise _unknown(key, value, peft_type, free)
    native = next((start for start in _NATIVE_STARTS if str(value).startswith(start)), None)
    if name == "init_lora_weights" and native:
        reason = "writes into the frozen weight, or reads data through PEFT"
        raise UserError(reason, key=key, value=value, remedy=f"Use adapter={native}.", code=Code.UNSUPPORTED)
    default = fields[name].default
    if default is dataclasses.MISSING or default is None or value is None or isinstance(value, str | list):
        return
    expected = (int, float) if isinstance(default, float) else type(default)
    is_flag = isinstance(value, bool) and not isinstance(default, bool | str)
    if not isinstance(value, expected) or is_flag:
        reason = f"is not of the type of PEFT's default, {default!r}"
        raise UserError(reason, key=key, value=value, code=Code.INVALID_VALUE)


def _unknown(key: str, value: object, peft_type: str, known: list[str]) -> UserError:
    """Return the error for a field that a method does not have, with the nearest one or all."""
    name = key.rpartition(".")[2] if key.startswith("settings.") else str(value)
    return UserError(
        f"is no setting of {peft_type} in {version()}",
        key=key,
        value=value,
        remedy=nearest(name, known),
        code=Code.UNKNOWN_KEY,
    )


def _refused_by_peft(peft_type: str, settings: Mapping[str, Any], error: Exception) -> UserError:
    """Return the error for settings that PEFT's own code refuses."""
    reason = " ".join(str(error).split()).rstrip(".")
    return UserError(
        f"PEFT refuses these settings of {peft_type}: {reason}",
        key="settings",
        value=dict(settings) or None,
        code=Code.INVALID_VALUE,
    )


def draws_in_training(config: Any) -> bool:
    """Return whether the layers of a method draw random numbers in training: for dropout, or PVeRA's samples."""
    dropouts = [value for name, value in vars(config).items() if "dropout" in name and not isinstance(value, bool)]
    return any(dropouts) or config.peft_type == "PVERA"


def norms(backbone: Backbone) -> list[str]:
    """Return the names of the norms of the layers, with or without a bias, in the order of computation."""
    from torch import Tensor

    names = []
    for _, path, layer in backbone.layer_modules():
        for name, module in layer.named_modules():
            if type(module).__name__.endswith("Norm") and isinstance(getattr(module, "weight", None), Tensor):
                names.append(f"{path}.{name}" if name else path)
    return names


def to_json(config: Any) -> dict[str, Any]:
    """Return the fields of PEFT's config as plain values, by name; sets become sorted lists.

    The targets are among them only where PEFT needs the ends of their names.
    """
    left_out = set() if config.peft_type.value in SHARE_BY_SUFFIX else {"target_modules"}
    return {name: _plain(value) for name, value in config.to_dict().items() if name not in left_out}


def _plain(value: Any) -> Any:
    if isinstance(value, set):
        return sorted(value)
    return value.value if isinstance(value, Enum) else value
