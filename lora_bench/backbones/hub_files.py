"""The files of a model on the Hugging Face hub: which ones are read, and their download with progress.

Weights are read from safetensors. A repository that has only PyTorch's pickled format is read from the pull request in
which the hub's conversion bot offers safetensors, as transformers does, or with `model.allow_bin`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_bench.backbones.model_folder import INDEX, PICKLE_INDEX, PICKLED_WEIGHTS, WEIGHTS, read_header, read_json
from lora_bench.errors import Code, UserError
from lora_bench.files import hub

if TYPE_CHECKING:
    from collections.abc import Sequence

_BOT = "SFconvertbot"
_BOT_TITLE = "Adding `safetensors` variant of this model"
_TEXT_SUFFIXES = (".json", ".model", ".txt", ".jinja")


@dataclass(frozen=True)
class HubWeights:
    """The weights of a model on the hub."""

    revision: str | None
    """The revision that they are read from; None: the newest."""
    is_pickled: bool = False
    """They are read with `torch.load(weights_only=True)`."""
    paths: tuple[Path, ...] = ()
    """The files in the hub's cache, of shards perhaps only the index; empty for a local folder, or if none is there."""

    def location(self, hub_id: str) -> str:
        """Return what transformers loads them from: the folder of the downloaded files, else the hub id."""
        return str(self.paths[0].parent) if self.paths else hub_id


def download_texts(hub_id: str, revision: str | None, key: str = "model.hub_id") -> None:
    """Download config.json and the files of the tokenizer, if the hub can be reached and they are not here yet.

    Raises:
        UserError: the repository cannot be read; `key` names it.
    """
    if hub.is_reachable():
        texts = [name for name in _names(hub_id, revision, key) if name.endswith(_TEXT_SUFFIXES)]
        _download(hub_id, [name for name in texts if not name.endswith(".index.json")], revision, key)


def download_weights(hub_id: str, revision: str | None, *, allow_bin: bool) -> HubWeights:
    """Find and download the weights of a model, and check that each file of safetensors is complete.

    Raises:
        UserError: the repository cannot be read, has no weights that may be read, or a file is damaged.
    """
    if not hub.is_reachable():
        return _cached_weights(hub_id, revision, allow_bin=allow_bin)
    names = set(_names(hub_id, revision, "model.hub_id"))
    if names & {WEIGHTS, INDEX}:
        return HubWeights(revision, paths=_download_weights(hub_id, revision, WEIGHTS, INDEX, names))
    if not names & {PICKLED_WEIGHTS, PICKLE_INDEX}:
        remedy = "Take another repository: transformers' save_pretrained writes such a file."
        raise UserError(f"holds no {WEIGHTS}", key="model.hub_id", value=hub_id, remedy=remedy, code=Code.UNSUPPORTED)
    if allow_bin:
        paths = _download_weights(hub_id, revision, PICKLED_WEIGHTS, PICKLE_INDEX, names)
        return HubWeights(revision, is_pickled=True, paths=paths)
    converted = _conversion(hub_id) if revision is None else None
    if converted is None:
        raise _only_pickled(hub_id)
    names = set(_names(hub_id, converted, "model.hub_id"))
    return HubWeights(converted, paths=_download_weights(hub_id, converted, WEIGHTS, INDEX, names))


def _only_pickled(hub_id: str) -> UserError:
    """Return the error for a repository whose weights would be unpickled."""
    return UserError(
        f"holds no {WEIGHTS}, only {PICKLED_WEIGHTS}",
        key="model.hub_id",
        value=hub_id,
        remedy="Set model.allow_bin=true to read it with torch.load(weights_only=True), which runs no code of it.",
        code=Code.UNSUPPORTED,
    )


def _cached_weights(hub_id: str, revision: str | None, *, allow_bin: bool) -> HubWeights:
    """Return which weights the hub's cache holds, as far as they are there; nothing is downloaded.

    Raises:
        UserError: they are pickled, and `allow_bin` is false.
    """
    from huggingface_hub import try_to_load_from_cache

    for names in ((WEIGHTS, INDEX), (PICKLED_WEIGHTS, PICKLE_INDEX)):
        cached = (try_to_load_from_cache(hub_id, name, revision=revision) for name in names)
        if path := next((path for path in cached if isinstance(path, str)), None):
            is_pickled = names[0] == PICKLED_WEIGHTS
            if is_pickled and not allow_bin:
                raise _only_pickled(hub_id)
            return HubWeights(revision, is_pickled, (Path(path),))
    return HubWeights(revision)


@cache
def _names(hub_id: str, revision: str | None, key: str) -> tuple[str, ...]:
    """Return the names of the files at the top of a repository, asked for once per process.

    Raises:
        UserError: the repository or the revision does not exist, or may not be read.
    """
    import huggingface_hub

    try:
        entries = huggingface_hub.HfApi().model_info(hub_id, revision=revision).siblings or []
    except Exception as error:
        raise _refusal(error, key, hub_id, revision) from None
    return tuple(entry.rfilename for entry in entries if "/" not in entry.rfilename)


def _download_weights(hub_id: str, revision: str | None, single: str, index: str, names: set[str]) -> tuple[Path, ...]:
    """Download a file of weights, or the shards that an index names, and return their paths.

    Raises:
        UserError: the download fails, or a file is damaged.
    """
    key = "model.hub_id"
    if single in names:
        paths = _download(hub_id, [single], revision, key)
    else:
        (index_path,) = _download(hub_id, [index], revision, key)
        shards = sorted(set(read_json(index_path).get("weight_map", {}).values()) & names)
        paths = _download(hub_id, shards, revision, key)
    for path in paths:
        if path.suffix == ".safetensors":
            read_header(path, remedy="Delete it and start again: it is then downloaded once more.")
    return tuple(paths)


def _download(hub_id: str, names: Sequence[str], revision: str | None, key: str) -> list[Path]:
    """Return the paths of these files in the hub's cache, downloaded where they are missing.

    Raises:
        UserError: a file cannot be downloaded.
    """
    try:
        return [hub.download(hub_id, name, revision) for name in names]
    except Exception as error:
        raise _refusal(error, key, hub_id, revision) from None


def _conversion(hub_id: str) -> str | None:
    """Return the revision of the pull request in which the hub's bot offers safetensors of the newest weights, if any.

    It must be the bot's own, and made of the newest commit.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        for discussion in api.get_repo_discussions(hub_id, author=_BOT, discussion_type="pull_request"):
            is_open = discussion.title == _BOT_TITLE and discussion.author == _BOT and discussion.status == "open"
            if is_open and (reference := f"refs/pr/{discussion.num}"):
                commits = api.list_repo_commits(hub_id, revision=reference)
                if len(commits) > 1 and commits[1].commit_id == api.list_repo_commits(hub_id)[0].commit_id:
                    return reference
    except Exception as error:
        raise _refusal(error, "model.hub_id", hub_id, None) from None
    return None


def _refusal(error: Exception, key: str, hub_id: str, revision: str | None) -> UserError:
    """Return the error for a repository that cannot be read, whatever its cause."""
    known: Any = error if isinstance(error, UserError) else hub.translate_error(error, key, hub_id, revision)
    if known is not None:
        return known  # type: ignore[no-any-return]
    reason = f"cannot be downloaded ({type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')[:200]})"
    return UserError(reason, key=key, value=hub_id, remedy="Check its name on the hub.", code=Code.NOT_FOUND)
