"""A cache of Hydra's work on the YAML files of `conf/`, for tests that run thousands of commands in one process.

The merged files depend on the choices of the groups alone, and most commands of the tests have the same choices. So the
merged files are cached by the choices, pickled: loading them takes a fifth of the time of a deep copy. Every step that
depends on a typed key or value (parsing, applying and checking it) is carried out as always, on a copy. With a folder
of the user's (`--config-dir`) nothing is cached.
"""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

from hydra._internal import defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository

if TYPE_CHECKING:
    import pytest

CHOICES = ("override_choices", "append_group_defaults", "deletions")


def compose_files_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cache the defaults list and the merged files by their choices, until the patch is undone."""
    files: dict[str, bytes] = {}
    listed: dict[str, bytes] = {}
    merged: dict[str, bytes] = {}
    list_defaults = defaults_list._create_defaults_list
    read = ConfigRepository.load_config
    merge = ConfigLoaderImpl._compose_config_from_defaults_list

    def list_once(repo: Any, config_name: Any, overrides: Any, prepend_hydra: bool, skip_missing: bool) -> Any:
        if (folders := _folders(repo)) is None:
            return list_defaults(repo, config_name, overrides, prepend_hydra, skip_missing)
        chosen = [getattr(overrides, name) for name in CHOICES]
        key = repr((folders, config_name, prepend_hydra, skip_missing, chosen))
        if key not in listed:
            answer = list_defaults(repo, config_name, overrides, prepend_hydra, skip_missing)
            listed[key] = pickle.dumps((answer, {k: v for k, v in vars(overrides).items() if k != "config_overrides"}))
        answer, state = pickle.loads(listed[key])
        vars(overrides).update(state)
        return answer

    def merge_once(loader: Any, defaults: Any, repo: Any) -> Any:
        if (folders := _folders(repo)) is None:
            return merge(loader, defaults, repo)
        key = repr((folders, defaults))
        if key not in merged:
            merged[key] = pickle.dumps(merge(loader, defaults, repo))
        return pickle.loads(merged[key])

    def read_once(repo: Any, config_path: str) -> Any:
        if (folders := _folders(repo)) is None:
            return read(repo, config_path)
        key = repr((folders, config_path))
        if key not in files:
            files[key] = pickle.dumps(read(repo, config_path))
        return pickle.loads(files[key])

    monkeypatch.setattr(ConfigRepository, "load_config", read_once)
    monkeypatch.setattr(defaults_list, "_create_defaults_list", list_once)
    monkeypatch.setattr(ConfigLoaderImpl, "_compose_config_from_defaults_list", merge_once)


def _folders(repo: Any) -> list[str] | None:
    """Return the folders in which Hydra looks for configs; None if one of them is the user's."""
    sources = repo.get_sources()
    return None if any(source.provider == "command-line" for source in sources) else [str(s.path) for s in sources]
