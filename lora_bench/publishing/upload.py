"""The upload of a folder to a repository of the Hugging Face hub, in one commit, and the hub's refusals."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, NamedTuple

from lora_bench.console.format import format_number
from lora_bench.console.stages import stage
from lora_bench.errors import Code, UserError
from lora_bench.files import hub

if TYPE_CHECKING:
    from pathlib import Path

REPLACED = ("adapter/**", "predictions/**")
"""Older files of these patterns are removed when a repository is overwritten."""
_NEW_REPOSITORY = {".gitattributes"}
"""The files of a repository that nothing was uploaded to."""


class Upload(NamedTuple):
    """A finished upload."""

    repository: str
    """The full id: OWNER/NAME."""
    address: str
    """The page of the repository."""
    commit: str


def require_access() -> None:
    """Refuse to publish without a token of the hub, or if the hub cannot be reached.

    Raises:
        UserError: with the reason.
    """
    from huggingface_hub import constants, get_token

    if get_token() is None:
        remedy = "Log in with `hf auth login`, or set HF_TOKEN to a token with write access."
        raise UserError("there is no token of the Hugging Face hub", key="push", remedy=remedy, code=Code.FORBIDDEN)
    if not hub.is_reachable():
        remedy = "Check the connection, and that HF_HUB_OFFLINE is not set. dry_run=true writes the files only."
        reason = f"{constants.ENDPOINT} cannot be reached"
        raise UserError(reason, key="push", remedy=remedy, code=Code.SERVER)


def create_repository(name: str, *, private: bool, overwrite: bool) -> str:
    """Create a repository, and return its full id; one that exists is taken if it is empty, or with `overwrite`.

    Args:
        name: with or without its owner, by default that of the token.
        private: only the owner can read a new repository. An existing one that everybody can read is refused.
        overwrite: take one that has files.

    Raises:
        UserError: it exists and has files, it is public, or the hub refuses.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        created = api.create_repo(name, private=private, exist_ok=True)
        repository = str(created.repo_id)
        info = api.model_info(repository)
    except Exception as error:
        raise _refusal(error, name) from None
    files = {entry.rfilename for entry in info.siblings or []}
    if files - _NEW_REPOSITORY and not overwrite:
        remedy = "Give another name, or overwrite=true to replace its run."
        raise UserError("exists and has files", key="repo", value=repository, remedy=remedy, code=Code.EXISTS)
    if private and info.private is False:
        remedy = "Add private=false, or make it private in its settings on the hub."
        raise UserError("exists and is public", key="repo", value=repository, remedy=remedy, code=Code.CONFLICT)
    return repository


def upload(folder: Path, repository: str, message: str) -> Upload:
    """Upload the files of a folder in one commit; an older run in the repository is replaced.

    Args:
        folder: its files keep their paths.
        repository: the full id of an existing one.
        message: of the commit.

    Raises:
        UserError: the hub refuses, or the connection broke off; the repository is unchanged.
    """
    import huggingface_hub
    from huggingface_hub import utils

    files = [path for path in folder.rglob("*") if path.is_file()]
    size = format_number(sum(path.stat().st_size for path in files), "B")
    had_bars = not utils.are_progress_bars_disabled()  # type: ignore[attr-defined]
    # The hub's client has bars of several kinds, none of which takes a class.
    utils.disable_progress_bars()  # type: ignore[attr-defined]
    try:
        with stage(f"uploading {len(files)} files, {size}"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # predictions in Parquet look like a data set to it
            commit = huggingface_hub.HfApi().upload_folder(
                repo_id=repository, folder_path=folder, commit_message=message, delete_patterns=list(REPLACED)
            )
    except Exception as error:
        raise _refusal(error, repository) from None
    finally:
        if had_bars:
            utils.enable_progress_bars()  # type: ignore[attr-defined]
    return Upload(repository, str(commit.repo_url), str(commit.oid))


def _refusal(error: Exception, repository: str) -> UserError:
    """Return the error for a repository that cannot be written, by its cause."""

    def refusal(reason: str, remedy: str, code: Code) -> UserError:
        return UserError(reason, key="repo", value=repository, remedy=remedy, code=code)

    status = next((status for cause in hub.causes(error) if (status := hub.status_of(cause)) is not None), None)
    answer = next((text for cause in hub.causes(error) if (text := getattr(cause, "server_message", None))), "")
    said = f": {' '.join(str(answer).split())[:200].rstrip('.')}" if answer else ""
    if status == 401:
        remedy = "Make a new one at https://huggingface.co/settings/tokens, and log in with `hf auth login`."
        return refusal(f"the hub does not accept the token (HTTP 401){said}", remedy, Code.FORBIDDEN)
    if status == 403:
        remedy = (
            "Give a repository of your own or of an organisation that you may write to, and a token with write access."
        )
        return refusal(f"may not be written with this token (HTTP 403){said}", remedy, Code.FORBIDDEN)
    if status is not None and 400 <= status < 500 and status != 429:
        remedy = "Give another name, or check the repository on the hub."
        return refusal(f"the hub refuses the request (HTTP {status}){said}", remedy, Code.SERVER)
    if status is not None:
        return refusal(f"the hub cannot take it now (HTTP {status}){said}", "Try again later.", Code.SERVER)
    reason = f"the upload broke off ({type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')[:200]})"
    return refusal(reason, "Start the command again: files that arrived are not sent twice.", Code.SERVER)
