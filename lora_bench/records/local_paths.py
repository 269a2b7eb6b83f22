"""Paths of this machine in what is published: an absolute path is cut to its last name."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Any

_FOLDERS = re.compile(r"(?<![\w:/.])/(?:[^/\s'\",=]+/)+(?=[^/\s'\",=])")
"""The folders of an absolute path; not of an address on the web."""
_PATH_KEYS = ("path", "init_from", "resume")
"""Keys whose value is a path, which may contain spaces."""
_PATH_OR_ID_KEYS = ("tokenizer", "base_model_name_or_path", "_name_or_path", "name_or_path")
"""Keys whose value is a path or an id of the hub: `/home/me/bert` becomes `./bert`, which is no id of the hub."""
_TEXT_KEYS = ("label_names", "label_words", "positive_label", "template")
"""Keys whose values are the user's own texts, which may look like paths: `/music/artist` is a name of a class."""


def without_folders(value: Any) -> Any:
    """Return a JSON value whose absolute paths are cut to their last names: `/home/me/data/qqp` becomes `qqp`.

    Names of classes, label words and templates are unchanged, and so are keys.
    """
    if isinstance(value, dict):
        return {key: _of_key(key, item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_folders(item) for item in value]
    return _FOLDERS.sub("", value) if isinstance(value, str) else value


def _of_key(key: str, value: Any) -> Any:
    """Return the value of a key without folders."""
    if key in _TEXT_KEYS:
        return value
    if key in (*_PATH_KEYS, *_PATH_OR_ID_KEYS) and isinstance(value, str) and value.startswith("/"):
        return f"{'./' if key in _PATH_OR_ID_KEYS else ''}{PurePath(value).name}"
    return without_folders(value)
