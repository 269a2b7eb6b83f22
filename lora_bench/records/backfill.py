"""The config of a recorded run for today's code: keys that are newer than the run get their defaults.

A record holds every key that existed when its run started. A missing key gets the default of the option that the record
names; an option of the user's own is replaced by a built-in one of the same method, family or source.
"""

from __future__ import annotations

import os
from functools import cache
from typing import TYPE_CHECKING, Any, TypedDict

from lora_bench.config.canonical import normalise_numbers
from lora_bench.config.groups import choices, conf_folder
from lora_bench.config.keys import flatten, key_of, with_present_names
from lora_bench.config.removed import REMOVAL, REMOVED_CHOICES, REMOVED_GROUPS, REMOVED_KEYS, removed_settings
from lora_bench.config.schema import DIRECTED
from lora_bench.errors import Code, UserError
from lora_bench.files import untrusted
from lora_bench.records.run_folder import CONFIG_FILE, RECORD_FILE, is_prompted

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from pathlib import Path

    from omegaconf import DictConfig

TYPE_KEYS = {"model": "family", "adapter": "method", "data": "source"}
"""The key of a group on which its other keys depend."""
OPTIONS = {"hub": "qqp", "files": "pairs"}
"""An option with each family, method or source whose option of that name is absent or leaves keys open."""
RELATIONS = {
    "qqp": "paraphrase",
    "mrpc": "paraphrase",
    "stsb": "similarity",
    "rte": "entailment",
    "qnli": "entailment",
    "cola": "form",
}
"""`data.relation` by `data.task`, in records without that key."""
BEFORE_TEMPLATES = {"form": "classifier", "template": None, "chat_template": False, "label_words": None}
"""Keys of the model family `auto` in records without `model.form`: the tokenizer joined the texts of a pair."""


def fill_defaults(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record's config with today's defaults for the keys of `lora-bench train` that it lacks.

    The defaults of a group are those of the option that the record names, or else of a built-in option of the same
    method, family or source; a group without such an option gets none. The data of each of several tasks is completed
    like that of a single one, and `data.relation` follows from the task (`RELATIONS`). Recorded values are unchanged,
    null included, but for pair features that a model could not have then; removed keys whose values changed nothing are
    left out. The config of a prompted run is returned unchanged, and the seed is never filled in.
    """
    if is_prompted(record):
        return dict(record["config"])
    config, top, default_options = _without_neutral_settings(record["config"]), *_top_level_defaults()
    if isinstance(config.get("data"), dict):
        config["data"] = _with_relation(config["data"])
    if isinstance(config.get("tasks"), dict):
        config["tasks"] = {name: _fill_task(name, node) for name, node in config["tasks"].items()}
    config = _with_form(_with_head(config))
    options = {
        group: _find_option(group, record["choices"].get(group), record["config"].get(group), option)
        for group, option in default_options.items()
    }
    defaults_by_group = _group_defaults(tuple((group, option) for group, option in options.items() if option))
    for group, defaults in defaults_by_group.items():
        recorded, type_key = config.get(group, {}), TYPE_KEYS.get(group)
        if isinstance(recorded, dict) and (type_key is None or recorded.get(type_key) == defaults[type_key]):
            config[group] = recorded | {key: value for key, value in defaults.items() if key not in recorded}
    for key, default in top.items():
        value = config.get(key, default)
        config[key] = default | value if isinstance(default, dict) and isinstance(value, dict) else value
    return config


def changed_settings(record: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return the settings of a run that are not the defaults of the choices that its record names.

    The seed, the annotations and the requests `resume` and `dry_run` are left out. Of a group whose choice is not built
    in, only keys that were typed count. The config of a prompted run is compared with no defaults.

    Returns:
        (key, value, default) of each; the default is `NO_DEFAULT` for a key that has none, or one that is not known.
    """
    config, (top, default_options) = record["config"], _top_level_defaults()
    options: dict[str, str] = {}
    for group, default_option in {} if is_prompted(record) else default_options.items():
        option = _find_option(group, record["choices"].get(group), config.get(group), default_option)
        options |= {group: option} if option else {}
    defaults = dict(flatten(_resolved(_group_defaults(tuple(options.items())), top)))
    typed = {key_of(text) for text in record["overrides"]}
    return [
        (key, value, defaults.get(key, NO_DEFAULT))
        for key, value in flatten(config)
        if key.partition(".")[0] not in _NO_SETTINGS
        and (key in defaults or key in typed or key.partition(".")[0] in options)
        and normalise_numbers(value) != normalise_numbers(defaults.get(key, NO_DEFAULT))
    ]


def _resolved(groups: Mapping[str, dict[str, Any]], top: Mapping[str, Any]) -> dict[str, Any]:
    """Return default groups and top-level keys as one config with resolved interpolations, if they can be resolved."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    merged: dict[str, Any] = {**top, **groups}
    merged |= {key: value | groups.get(key, {}) for key, value in top.items() if isinstance(value, dict)}
    try:
        return OmegaConf.to_container(OmegaConf.create(merged), resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException:  # one refers to a group without defaults
        return merged


NO_DEFAULT = "???"
"""OmegaConf's mark of a value that has to be given."""
_NO_SETTINGS = ("name", "tags", "notes", "seed", "resume", "dry_run")
"""Keys of the top level that do not change what a run learns, and the seed."""


def _with_form(config: dict[str, Any]) -> dict[str, Any]:
    """Return a recorded config whose model of the family `auto` has a form and, if it had none yet, no pair features.

    Such a model had none before there were forms, so `head.pair_features=null` meant false.
    """
    model, head = config.get("model"), config.get("head")
    if not isinstance(model, dict) or model.get("family") != "auto" or "form" in model:
        return config
    if isinstance(head, dict) and head.get("pair_features", False) is None:
        config = config | {"head": head | {"pair_features": False}}
    return config | {"model": model | BEFORE_TEMPLATES}


def _with_head(config: dict[str, Any]) -> dict[str, Any]:
    """Return a recorded config whose head has the pair features that null stood for when the run started.

    Differences were absolute for every task before there was `head.differences`. A T5 had no pair features before
    there was `head.fit_batches`.
    """
    model, head = config.get("model"), config.get("head")
    if not isinstance(model, dict) or not isinstance(head, dict):
        return config
    tasks = config.get("tasks")
    data = [config.get("data"), *(tasks.values() if isinstance(tasks, dict) else ())]
    if any(isinstance(of_task, dict) and of_task.get("relation") == DIRECTED for of_task in data):
        head = {"differences": "absolute"} | head
    if model.get("family") == "t5" and head.get("pair_features", False) is None and "fit_batches" not in head:
        head = head | {"pair_features": False}
    return config | {"head": head}


def _with_relation(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data of a record with `relation`, by its task if it has none."""
    return {"relation": RELATIONS.get(str(data.get("task"))), **data}


def _fill_task(name: str, data: Any) -> Any:
    """Return the data of one of several tasks with defaults for the keys that it lacks, as `fill_defaults` does.

    What is no group of keys, or of an unknown source, is returned unchanged.
    """
    option = _find_option("data", name, data, "") if isinstance(data, dict) else None
    if option is None:
        return data
    return _group_defaults((("data", option),))["data"] | _with_relation(data)


def _without_neutral_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recorded config without the removed keys whose values changed nothing."""
    return _without(config, REMOVED_KEYS.keys() - removed_settings(config).keys())


def without_removed_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of a finished run without removed training settings, on which its predictions do not depend.

    Removed keys are left out, and a removed choice is replaced as `REMOVED_CHOICES` says.
    """
    kept = _without(config, REMOVED_KEYS.keys())
    for key, value in removed_settings(kept).items():  # only choices of keys that still exist
        group, _, name = key.partition(".")
        kept[group] = kept[group] | {name: REMOVED_CHOICES[key, value]}
    return kept


def _without(config: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """Return a config without these keys, each `group.name`."""

    def filtered(group: str, node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        return {name: value for name, value in node.items() if f"{group}.{name}" not in keys}

    return {group: filtered(group, node) for group, node in config.items()}


def refuse_removed_settings(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse to resume a run whose training was influenced by settings that were removed since.

    Args:
        folder: of the run.
        config: of its record.

    Raises:
        UserError: there is such a setting; it is named with its value.
    """
    for key, value in removed_settings(config).items():
        raise UserError(
            f"the run was started with {key}={value}, which was {REMOVAL}",
            key="resume",
            value=folder,
            remedy="Resume it with version 0.1, or start a new run without that setting.",
            code=Code.NOT_RESUMABLE,
        )


MODEL_KEYS = ("path", "tokenizer")
"""Keys of the group `model` of a command that takes a finished run."""


class ModelPaths(TypedDict):
    """New paths of a finished run's backbone and tokenizer; None keeps the recorded one."""

    model_path: str | None
    tokenizer: str | None


def model_paths(node: Mapping[str, Any]) -> ModelPaths:
    """Return the paths that a command was given for a finished run.

    Args:
        node: the command's `model` group, with the keys `MODEL_KEYS`.
    """
    path, tokenizer = (None if node[key] is None else str(node[key]) for key in MODEL_KEYS)
    return ModelPaths(model_path=path, tokenizer=tokenizer)


def relocate(config: dict[str, Any], path: str | None, tokenizer: str | None) -> dict[str, Any]:
    """Return a recorded config with new paths of its backbone and tokenizer; new paths that exist are made absolute.

    A config whose `model` is no group is returned unchanged.

    Args:
        config: as `fill_defaults` returns it.
        path: of the backbone; None keeps the recorded one.
        tokenizer: a path or hub id; None keeps the recorded one.

    Raises:
        UserError: a recorded folder does not exist here, and no new one is given.
    """
    if not isinstance(config.get("model"), dict):
        return config
    paths = {"path": path, "tokenizer": tokenizer}
    absolute = {key: os.path.abspath(value) for key, value in paths.items() if value and os.path.exists(value)}
    model = config["model"] | {key: value for key, value in paths.items() if value} | absolute
    for key in ("path", "tokenizer"):
        folder = model.get(key)
        if isinstance(folder, str) and paths[key] is None and _is_path(key, folder) and not os.path.isdir(folder):
            remedy = f"Give its present path, model.{key}=DIR. Its content is checked."
            raise UserError(
                "the folder that this run was trained with does not exist here",
                key=f"model.{key}",
                value=folder,
                remedy=remedy,
                code=Code.NOT_FOUND,
            )
    return config | {"model": model}


def _is_path(key: str, value: str) -> bool:
    """Return whether the recorded value of a key is a path; `model.tokenizer` may be an id of the hub instead."""
    return key == "path" or os.path.isabs(value) or value.startswith("./")


def differences(record: Mapping[str, Any], config: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return each key whose value differs between an earlier copy of a record's config and the record.

    A key that one of them lacks has its default there. `path` and `init_from` of any group are not compared: the
    content of the files is checked by its hash.

    Args:
        record: as it is read now.
        config: the copy.

    Returns:
        (key, value in the copy, value in the record) of each.
    """
    before, now = (
        dict(flatten(fill_defaults({**record, "config": dict(values)}))) for values in (config, record["config"])
    )
    return _differing(before | now, before, now)


def refuse_edited(folder: Path, record: Mapping[str, Any]) -> None:
    """Refuse a run whose record disagrees with the copy of its config, `.hydra/config.yaml`.

    Only keys of both are compared, paths excluded. A copy that is absent or damaged is ignored.

    Args:
        folder: of the run.
        record: as it is read now.

    Raises:
        UserError: the values of a key differ; it is named with both values.
    """
    before, now = (
        dict(flatten(with_present_names(_read_config_copy(folder / CONFIG_FILE)))),
        dict(flatten(record["config"])),
    )
    for difference in _differing([key for key in before if key in now], before, now):
        raise edited(folder, *difference)


def edited(folder: Path, key: str, before: object, now: object) -> UserError:
    """Return the error for a run whose record was edited: a key's value before and now."""
    reason = f"{key} was edited: it was {before} when the run started, and is {now} now"
    remedy = "The run was trained with the earlier value: restore it, or train a new run."
    return UserError(reason, file=folder / RECORD_FILE, remedy=remedy, code=Code.DAMAGED)


def _differing(keys: Iterable[str], before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (key, before, now) of the keys whose values differ, paths excluded."""
    keys = [key for key in keys if key.rpartition(".")[2] not in ("path", "init_from")]
    return [(key, before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)]


_COPY_BYTES = 100_000  # a larger copy is ignored


def _read_config_copy(path: Path) -> dict[str, Any]:
    """Return the copy of a config beside its record; empty if it cannot be used.

    It cannot if it is absent, damaged, larger than 100,000 bytes, not in ASCII, nested too deeply, or has YAML aliases.
    """
    import yaml

    from lora_bench.config.overrides import MAX_DEPTH, yaml_nesting

    try:
        text = untrusted.read_bytes(path, _COPY_BYTES).decode("ascii")
        if yaml_nesting(text) > MAX_DEPTH or any(
            isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)
        ):
            return {}
        content = yaml.safe_load(text)
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def load_config(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record's config with defaults for newer keys (`fill_defaults`), after a check: a record is untrusted.

    Raises:
        UserError: it is damaged, lacks a group, or holds a value that only the command line may give
            (`overrides.check_config`). No file is named.
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from lora_bench.config.overrides import check_config

    try:
        content = fill_defaults(record)
        config = OmegaConf.create(content)
        check_config(config)
        for group in ("data", "model", "adapter", "optimizer", "trainer"):
            if not isinstance(config.get(group), DictConfig):
                raise TypeError(f"{group} is not a group of keys")
    except UserError:
        raise
    except (OmegaConfBaseException, RecursionError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"is damaged: its config cannot be read ({reason})", code=Code.DAMAGED) from None
    return content


def restore_config(folder: Path, record: Mapping[str, Any], paths: ModelPaths) -> DictConfig:
    """Return the config with which a run is resumed, from its record.

    Args:
        folder: of the run.
        record: as it is read.
        paths: of its backbone and tokenizer.

    Raises:
        UserError: as `load_config` (here the record is named) and `relocate`; or the run has settings that were
            removed.
    """
    from omegaconf import OmegaConf

    try:
        content = load_config(record)
    except UserError as error:
        error.file = error.file or folder / RECORD_FILE
        raise
    refuse_removed_settings(folder, content)
    return OmegaConf.create(relocate(content, paths["model_path"], paths["tokenizer"]))


def align_configs(runs: Sequence[tuple[Path, dict[str, Any]]]) -> list[tuple[Path, dict[str, Any]]]:
    """Return runs (folder, record) whose configs can be compared.

    If runs of the same choices have different keys, defaults are filled in for all runs; otherwise configs do not
    change. Removed groups are always left out of the choices.
    """
    runs = [(folder, record | {"choices": _without_removed_groups(record["choices"])}) for folder, record in runs]
    keys_by_choices: dict[str, set[str]] = {}
    for _, record in runs:
        keys = {key: node.keys() if isinstance(node, dict) else 0 for key, node in record["config"].items()}
        keys_by_choices.setdefault(str(record["choices"]), set()).add(str(keys))
    if all(len(variants) == 1 for variants in keys_by_choices.values()):
        return runs
    return [(folder, record | {"config": fill_defaults(record)}) for folder, record in runs]


def _without_removed_groups(choices_by_group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the choices of a record without those of configuration groups that were removed."""
    return {group: choice for group, choice in choices_by_group.items() if group not in REMOVED_GROUPS}


def _find_option(group: str, option: str | None, node: Any, default: str) -> str | None:
    """Return the built-in option of a group whose defaults complete a record; the recorded keys are not compared.

    It is the recorded option, if that is built in and of the recorded type (`TYPE_KEYS`). Otherwise it is one of that
    type, or `default` for a group that has no types or is not a group in the recorded config. It is None if no built-in
    option has the recorded type.

    Args:
        group: the config group.
        option: in the record's `choices`.
        node: the group in the record's config.
        default: the group's default option.
    """
    if option is None and group not in TYPE_KEYS:
        return default
    type_key = TYPE_KEYS.get(group) if isinstance(node, dict) else None
    type_ = default if type_key is None else str(node.get(type_key))
    built_in = [candidate for candidate in (option, OPTIONS.get(type_, type_)) if candidate in choices(group)]
    if type_key is None:
        return next(iter(built_in), None)
    types = ((candidate, _group_defaults(((group, candidate),))[group][type_key]) for candidate in built_in)
    return next((candidate for candidate, candidate_type in types if candidate_type == type_), None)


@cache
def _top_level_defaults() -> tuple[dict[str, Any], dict[str, str]]:
    """Return the top-level keys with their defaults, without the seed, and the default option of each group.

    The result is cached, so it must not be changed.
    """
    import yaml

    top = yaml.safe_load((conf_folder() / "config.yaml").read_text(encoding="utf-8"))
    del top["seed"]  # the seed of a run is never guessed
    options = {
        group: option for entry in top.pop("defaults") if isinstance(entry, dict) for group, option in entry.items()
    }
    return top, {group: option for group, option in options.items() if group != "hydra" and isinstance(option, str)}


@cache
def _group_defaults(options: tuple[tuple[str, str], ...]) -> dict[str, dict[str, Any]]:
    """Return the keys of these (group, option) pairs with their defaults, by group; interpolations are not resolved.

    The result is cached, so it must not be changed.
    """
    from omegaconf import OmegaConf

    from lora_bench.config.compose import compose

    composed: Any = compose(conf_folder(), None, [f"+{group}={option}" for group, option in options])
    return {group: OmegaConf.to_container(composed[group], resolve=False) for group, _ in options}  # type: ignore[misc]
