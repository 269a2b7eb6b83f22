"""The Hugging Face hub: whether it answers, downloads with their progress, and its errors in one paragraph."""

from __future__ import annotations

import errno
import sys
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from lora_bench.console.stages import stage
from lora_bench.errors import Code, UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

_TIMEOUT_SECONDS = 5
_LARGE_BYTES = 10_000_000
_ACCESS = "log in with hf auth login, or set HF_TOKEN"
_RETRY = "Start the command again: it goes on with what has been downloaded."


@cache
def is_reachable() -> bool:
    """Return whether the hub answers within 5 seconds, with any status; if not, switch its libraries to offline mode.

    Without offline mode they retry each request for half a minute and print messages. Downloaded files are still found
    in their cache. False, without a request, if they are offline already; the result is cached for the process.
    """
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=_TIMEOUT_SECONDS)
    except Exception:  # the errors of its HTTP client, whichever that is
        constants.HF_HUB_OFFLINE = True
        return False
    return True


@contextmanager
def shown_progress() -> Iterator[None]:
    """Show the progress bars of the hub's libraries as stages within the context: downloads, and reading of data sets.

    Neither library takes a class of bars for all of its downloads, so the class that they import is replaced.
    """
    import huggingface_hub.utils  # noqa: F401

    places = (("huggingface_hub.utils.tqdm", "tqdm"), ("datasets.builder", "hf_tqdm"))
    modules = [(sys.modules[name], attribute) for name, attribute in places if name in sys.modules]
    before = [(module, attribute, getattr(module, attribute)) for module, attribute in modules]
    for module, attribute in modules:
        setattr(module, attribute, _stage_bar())
    try:
        yield
    finally:
        for module, attribute, bar in before:
            setattr(module, attribute, bar)


@cache
def _stage_bar() -> Any:
    """Return a class that looks like `tqdm` to the hub's libraries and shows a stage."""
    from tqdm import tqdm

    class StageBar(tqdm):  # type: ignore[misc]
        """A bar of a download, whose unit is `B`, or of the rows of a data set that are read."""

        def __init__(self, *arguments: Any, name: str | None = None, **keywords: Any) -> None:
            super().__init__(*arguments, **keywords | {"disable": True})
            is_download = keywords.get("unit") == "B"
            text = str(keywords.get("desc") or "files").rpartition("/")[2].removeprefix("Generating ")
            context = stage(
                f"{'downloading' if is_download else 'reading'} {text}",
                total=keywords.get("total"),
                unit="B" if is_download else "rows",
                done=keywords.get("initial") or 0,
            )
            self.context: Any = context
            self.stage = context.__enter__()

        def update(self, n: float | None = 1) -> bool | None:
            """Count more bytes or rows."""
            self.stage.advance(n or 0)
            return None

        def close(self) -> None:
            """Remove the bar, once."""
            if self.context is not None:
                context, self.context = self.context, None
                context.__exit__(None, None, None)

    return StageBar


def download(repository: str, name: str, revision: str | None) -> Path:
    """Return the path of a model's file in the hub's cache, downloaded if it is not there.

    A large file goes on where an earlier download of it broke off. The hub's own client begins it anew.

    Raises:
        Exception: of the hub's client, if the download fails; see `translate_error`.
    """
    import huggingface_hub

    with shown_progress():
        _resume_large(repository, name, revision)
        return Path(huggingface_hub.hf_hub_download(repository, name, revision=revision))


def _resume_large(repository: str, name: str, revision: str | None) -> None:
    """Download a large file that is missing to its place in the hub's cache, beginning at the part that is there."""
    from filelock import FileLock
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    url = file_download.hf_hub_url(repository, name, revision=revision)
    metadata = file_download.get_hf_file_metadata(url)
    name_in_cache = file_download.repo_folder_name(repo_id=repository, repo_type="model")
    if metadata.etag is None or metadata.size is None or metadata.size < _LARGE_BYTES:
        return
    blob = Path(constants.HF_HUB_CACHE, name_in_cache, "blobs", metadata.etag)
    if blob.exists():
        return
    partial = blob.with_name(f"{metadata.etag}.partial")
    lock = Path(constants.HF_HUB_CACHE, ".locks", name_in_cache, partial.name)
    for folder in (blob.parent, lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    headers = build_hf_headers()
    if urlsplit(metadata.location).netloc != urlsplit(url).netloc:
        headers.pop("authorization", None)  # the token is for the hub alone
    with FileLock(lock), partial.open("ab") as file:
        if blob.exists():  # another process was faster
            return
        if file.tell() < metadata.size:
            file_download.http_get(
                metadata.location,
                file,
                resume_size=file.tell(),
                headers=headers,
                expected_size=metadata.size,
                displayed_filename=name,
            )
        partial.rename(blob)


def translate_error(error: Exception, key: str, repository: str, revision: str | None = None) -> UserError | None:
    """Return the error for a repository that cannot be read, by its cause; None if it is none that is known here.

    Args:
        error: of one of the hub's libraries, or one that it caused.
        key: the configuration key that names the repository, such as `model.hub_id`. A key without a group, such as
            `run`, names the revision too.
        repository: its id.
        revision: its requested revision.
    """
    from huggingface_hub import constants, errors

    group = key.rpartition(".")[0]

    def refusal(reason: str, remedy: str, code: Code = Code.NOT_FOUND, *, name: str = "hub_id") -> UserError:
        value = revision if name == "revision" else repository
        return UserError(reason, key=f"{group}.{name}" if group else key, value=value, remedy=remedy, code=code)

    page = f"{constants.ENDPOINT}/{repository}"
    for cause in causes(error):
        status = status_of(cause)
        if isinstance(cause, errors.GatedRepoError):
            reason = f"is gated: its owner grants access to it (HTTP {status or 403})"
            return refusal(reason, f"Ask for access at {page}, then {_ACCESS}.", Code.FORBIDDEN)
        if isinstance(cause, errors.RevisionNotFoundError):
            return refusal(f"{repository} has no such revision", f"Choose one of {page}.", name="revision")
        if isinstance(cause, errors.RepositoryNotFoundError):
            if status == 401:  # the hub answers so to those who are not logged in
                remedy = f"Check the name; if it is private, {_ACCESS}."
                return refusal("does not exist, or is private (HTTP 401)", remedy)
            return refusal(f"does not exist (HTTP {status or 404})", "Check the name on the hub.")
        if status in (401, 403):
            return refusal(
                f"may not be read with this account (HTTP {status})",
                f"Check the access rights at {page}, then {_ACCESS}.",
                Code.FORBIDDEN,
            )
        if status is not None and (status == 429 or status >= 500):
            return refusal(f"cannot be read now: the hub answers HTTP {status}", "Try again later.", Code.SERVER)
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "Free space there, or set HF_HOME to a folder on another disk. Files that are complete are kept."
            return refusal(f"the disk of the hub's cache {constants.HF_HUB_CACHE} is full", remedy, Code.UNWRITABLE)
        if isinstance(cause, PermissionError):
            reason = f"the hub's cache cannot be written ({cause.strerror}: {cause.filename})"
            return refusal(reason, "Set HF_HOME to a folder that you may write to.", Code.UNWRITABLE)
        if "Consistency check failed" in str(cause):
            reason = f"the download is incomplete ({str(cause).splitlines()[0].partition(': ')[2]})"
            return refusal(reason, _RETRY, Code.DAMAGED)
        if type(cause).__module__.startswith(("httpx", "httpcore", "requests")):
            return refusal(f"the download broke off ({type(cause).__name__})", _RETRY, Code.SERVER)
    return None


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, the one that caused it, and so on; libraries hide the kind of an error behind others."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status of the answer that an error of the hub's client is about; None without an answer."""
    return getattr(getattr(error, "response", None), "status_code", None)
