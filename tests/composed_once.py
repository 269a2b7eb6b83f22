"""Composes what stands in our files once: thousands of commands in one process differ only in what was typed.

Hydra reads and merges the same YAML files three times a command, which is nearly all that a refused one costs and half
of what a run of one step does. What it makes of them is a function of the groups' choices alone, so it is kept by them;
every step that sees a typed key or value (reading it, applying it, checking it, the job) is carried out as always, on a
copy. Where a folder of the user's (`--config-dir`) is searched too, nothing is kept: its files may change.
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
    """Until the patch is undone, the defaults list and the merged files are kept by the choices that led to them."""
    files: dict[str, Any] = {}
    listed: dict[str, Any] = {}
    merged: dict[str, Any] = {}
    list_defaults = defaults_list._create_defaults_list
    read = ConfigRepository.load_config
    merge = ConfigLoaderImpl._compose_config_from_defaults_list

    def list_once(repo: Any, config_name: Any, overrides: Any, prepend_hydra: bool, skip_missing: bool) -> Any:
        if (places := _places(repo)) is None:
            return list_defaults(repo, config_name, overrides, prepend_hydra, skip_missing)
        chosen = [getattr(overrides, name) for name in CHOICES]
        key = repr((places, config_name, prepend_hydra, skip_missing, chosen))
        if key not in listed:
            answer = list_defaults(repo, config_name, overrides, prepend_hydra, skip_missing)
            listed[key] = copy.deepcopy((answer, {k: v for k, v in vars(overrides).items() if k != "config_overrides"}))
        answer, state = copy.deepcopy(listed[key])
        vars(overrides).update(state)
        return answer

    def merge_once(loader: Any, defaults: Any, repo: Any) -> Any:
        if (places := _places(repo)) is None:
            return merge(loader, defaults, repo)
        key = repr((places, defaults))
        if key not in merged:
            merged[key] = merge(loader, defaults, repo)
        return copy.deepcopy(merged[key])

    def read_once(repo: Any, config_path: str) -> Any:
        if (places := _places(repo)) is None:
            return read(repo, config_path)
        key = repr((places, config_path))
        if key not in files:
            files[key] = read(repo, config_path)
        return copy.deepcopy(files[key])

    monkeypatch.setattr(ConfigRepository, "load_config", read_once)
    monkeypatch.setattr(defaults_list, "_create_defaults_list", list_once)
    monkeypatch.setattr(ConfigLoaderImpl, "_compose_config_from_defaults_list", merge_once)


def _places(repo: Any) -> list[str] | None:
    """Where configs are looked for; None if a folder of the user's is among it."""
    sources = repo.get_sources()
    return None if any(source.provider == "command-line" for source in sources) else [str(s.path) for s in sources]
