"""Runs on the Hugging Face hub, as `lora-bench push` writes them: `run=hf://OWNER/NAME`, or with `@REVISION` after it.

A run is downloaded into the hub's cache and read from there like any other folder: nothing in it is trusted, and
nothing is written into it. Of a repository only the record, the log and the weights are downloaded.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lora_bench.errors import Code, UserError
from lora_bench.files import hub
from lora_bench.records.run_folder import ADAPTER, METRICS_FILE, RECORD_FILE

if TYPE_CHECKING:
    from collections.abc import Sequence

SCHEME = "hf://"
_REFERENCE = re.compile(r"hf:/{1,2}([^@]*)(?:@(.+))?")  # pathlib makes one slash of two
_REPOSITORY = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9_][\w.-]*(?:/[A-Za-z0-9_][\w.-]*)?", re.ASCII)
_FILES = re.compile(
    rf"{re.escape(RECORD_FILE)}|{re.escape(METRICS_FILE)}|"
    rf"{ADAPTER}/(?:member_[0-9]{{1,6}}/)?(?:adapter_config\.json|(?:adapter_)?model\.safetensors)",
    re.ASCII,
)
"""The files that are downloaded; a full model's config and tokenizer are for other programs."""


class HubRun(NamedTuple):
    """A run's repository on the hub, and the revision that is requested; None: the newest."""

    repository: str
    revision: str | None

    def __str__(self) -> str:
        return f"{SCHEME}{self.repository}" + (f"@{self.revision}" if self.revision else "")


def is_on_hub(reference: str | Path) -> bool:
    """Return whether a reference to a run names the hub, well formed or not."""
    return str(reference).startswith("hf:/")


def parse(reference: str | Path, key: str) -> HubRun:
    """Return the repository and revision that a reference such as `hf://me/qqp@v1` names.

    Raises:
        UserError: it is not of this form; `key` had it.
    """
    match = _REFERENCE.fullmatch(str(reference))
    if match is None or not is_repository(match[1]):
        remedy = "Give hf://OWNER/NAME, or hf://OWNER/NAME@REVISION."
        value = re.sub("^hf:/+", SCHEME, str(reference))
        raise UserError("names no repository", key=key, value=value, remedy=remedy, code=Code.INVALID_VALUE)
    return HubRun(match[1], match[2])


def is_repository(name: str) -> bool:
    """Return whether the hub allows this id of a repository, with or without an owner."""
    return len(name) <= 96 and _REPOSITORY.fullmatch(name) is not None and not name.endswith((".git", ".", "-"))


def fetch(reference: str | Path, key: str) -> Path:
    """Return the folder of a run in the hub's cache, downloaded if necessary, all files from one commit.

    Without a connection the cached files are used. The run is looked up once per process. Its content is not checked.

    Args:
        reference: `hf://OWNER/NAME`, with or without `@REVISION`.
        key: the option that gave it, for messages.

    Raises:
        UserError: the repository or revision does not exist, may not be read, holds no run, or is not in the cache
            while the hub cannot be reached.
    """
    return _fetch(parse(reference, key), key)


def pin(reference: str | Path, key: str) -> str:
    """Return a reference with the commit that it names now, `hf://me/qqp@6f1c…`, and download the run.

    Raises:
        UserError: as `fetch`.
    """
    run = parse(reference, key)
    return str(run._replace(revision=_fetch(run, key).name))


@cache
def _fetch(run: HubRun, key: str) -> Path:
    if not hub.is_reachable():
        return _cached(run, key)
    import huggingface_hub

    try:
        info = huggingface_hub.HfApi().model_info(run.repository, revision=run.revision)
        names = [entry.rfilename for entry in info.siblings or [] if _FILES.fullmatch(entry.rfilename)]
        if RECORD_FILE not in names:
            raise _holds_no_run(run, key)
        return _download(run, names, info.sha)
    except UserError:
        raise
    except Exception as error:
        refusal = hub.translate_error(error, key, run.repository, run.revision) or _undownloadable(run, key, error)
        refusal.key, refusal.value = key, run
        raise refusal from None


def _download(run: HubRun, names: Sequence[str], commit: str | None) -> Path:
    """Download files of one commit, and return their folder.

    The record is last, so that a folder with a record is complete. It is requested by the revision too: then the cache
    knows the revision's commit, and finds the run without a connection.
    """
    for name in sorted(names, key=lambda name: name == RECORD_FILE):
        path = hub.download(run.repository, name, commit)
    hub.download(run.repository, RECORD_FILE, run.revision)
    return path.parent


def _cached(run: HubRun, key: str) -> Path:
    """Return the folder of a run in the hub's cache; a `UserError` if it is not there."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(run.repository, RECORD_FILE, revision=run.revision)
    if not isinstance(path, str):
        raise UserError(
            "is not in the hub's cache, and the hub cannot be reached",
            key=key,
            value=run,
            remedy="Check the connection, and that HF_HUB_OFFLINE is not set.",
            code=Code.SERVER,
        )
    return Path(path).parent


def _holds_no_run(run: HubRun, key: str) -> UserError:
    remedy = "Give a repository that `lora-bench push` wrote. `lora-bench eval peft=DIR` evaluates an adapter of PEFT."
    return UserError(f"holds no {RECORD_FILE}", key=key, value=run, remedy=remedy, code=Code.NOT_FOUND)


def _undownloadable(run: HubRun, key: str, error: Exception) -> UserError:
    reason = f"cannot be downloaded ({type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')[:200]})"
    return UserError(reason, key=key, value=run, remedy="Check its name on the hub.", code=Code.NOT_FOUND)
