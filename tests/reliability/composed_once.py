"""Composes what stands in files once: thousands of commands in one process differ only in what was typed.

Hydra reads and merges the same YAML files three times a command, which is nearly all that a refused one costs. What
it makes of them is a function of the groups' choices alone, so it is kept by them; every step that sees a typed key
or value (reading it, applying it, checking it, the job) is carried out as always, on a copy.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from hydra._internal import defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository

if TYPE_CHECKING:
    import pytest

CHOICES = ("override_choices", "append_group_defaults", "deletions")


def compose_files_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test ends, the defaults list and the merged files are kept by the choices that led to them."""
    files: dict[str, Any] = {}
    listed: dict[str, Any] = {}
    merged: dict[str, Any] = {}
    list_defaults = defaults_list._create_defaults_list
    read = ConfigRepository.load_config
    merge = ConfigLoaderImpl._compose_config_from_defaults_list

    def list_once(repo: Any, config_name: Any, overrides: Any, prepend_hydra: bool, skip_missing: bool) -> Any:
        key = repr((config_name, prepend_hydra, skip_missing, [getattr(overrides, name) for name in CHOICES]))
        if key not in listed:
            answer = list_defaults(repo, config_name, overrides, prepend_hydra, skip_missing)
            listed[key] = copy.deepcopy((answer, {k: v for k, v in vars(overrides).items() if k != "config_overrides"}))
        answer, state = copy.deepcopy(listed[key])
        vars(overrides).update(state)
        return answer

    def merge_once(loader: Any, defaults: Any, repo: Any) -> Any:
        key = repr(defaults)
        if key not in merged:
            merged[key] = merge(loader, defaults, repo)
        return copy.deepcopy(merged[key])

    def read_once(repo: Any, config_path: str) -> Any:
        key = repr((config_path, [source.path for source in repo.get_sources()]))
        if key not in files:
            files[key] = read(repo, config_path)
        return copy.deepcopy(files[key])

    monkeypatch.setattr(ConfigRepository, "load_config", read_once)
    monkeypatch.setattr(defaults_list, "_create_defaults_list", list_once)
    monkeypatch.setattr(ConfigLoaderImpl, "_compose_config_from_defaults_list", merge_once)
