"""Weights from the hub: safetensors, the conversion bot's pull request, or pickled files where the user allows them."""

from __future__ import annotations

import errno
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from huggingface_hub.utils import httpx
from safetensors.torch import save_file

from lora_bench.backbones import hub_files
from lora_bench.backbones.hub_files import download_texts, download_weights
from lora_bench.errors import Code
from lora_bench.files import hub
from tests.command_line import refuses

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


class FakeHub:
    """A repository `some/model`, with its files by revision."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: dict[str | None, list[str]] = {None: ["config.json", "onnx/config.json", "tokenizer.json"]}
        self.downloaded: list[tuple[str, str | None]] = []
        self.bot = "SFconvertbot"
        self.error: Exception | None = None

    def model_info(self, _id: str, revision: str | None) -> Any:
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in self.names[revision]])

    def get_repo_discussions(self, _id: str, **_: Any) -> list[Any]:
        title = "Adding `safetensors` variant of this model"
        return [SimpleNamespace(title=title, author=self.bot, status="open", num=n) for n in self.names if n == 7]

    def list_repo_commits(self, _id: str, revision: str | None = None) -> list[Any]:
        commits = ["the bot's", "newest"] if revision else ["newest", "older"]
        return [SimpleNamespace(commit_id=commit) for commit in commits]

    def download(self, _id: str, name: str, revision: str | None) -> Path:
        if self.error is not None:
            raise self.error
        self.downloaded.append((name, revision))
        if name.endswith(".safetensors"):
            save_file({"weight": torch.ones(2)}, self.folder / name)
        return self.folder / name


@pytest.fixture
def repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    fake = FakeHub(tmp_path)
    monkeypatch.setattr(hub, "is_reachable", lambda: True)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    monkeypatch.setattr(hub, "download", fake.download)
    hub_files._names.cache_clear()
    yield fake
    hub_files._names.cache_clear()


def test_only_texts_at_the_top_are_downloaded_for_the_tokenizer(repository: FakeHub) -> None:
    download_texts("some/model", None)
    assert repository.downloaded == [("config.json", None), ("tokenizer.json", None)]


def test_safetensors_are_preferred_to_a_pickle(repository: FakeHub) -> None:
    repository.names[None] += ["model.safetensors", "pytorch_model.bin"]
    weights = download_weights("some/model", None, allow_bin=True)
    assert not weights.is_pickled
    assert repository.downloaded == [("model.safetensors", None)]


def test_a_pickle_is_read_only_where_it_is_allowed(repository: FakeHub) -> None:
    repository.names[None] += ["pytorch_model.bin"]
    with refuses(Code.UNSUPPORTED, key="model.hub_id"):
        download_weights("some/model", None, allow_bin=False)
    assert repository.downloaded == []
    assert download_weights("some/model", None, allow_bin=True).is_pickled
    assert repository.downloaded == [("pytorch_model.bin", None)]


@pytest.mark.parametrize("author", ["SFconvertbot", "somebody"])
def test_the_bots_own_pull_request_stands_in_for_a_pickle(author: str, repository: FakeHub) -> None:
    repository.names |= {None: ["pytorch_model.bin"], "refs/pr/7": ["model.safetensors"], 7: []}  # type: ignore[dict-item]
    repository.bot = author
    if author != "SFconvertbot":
        with refuses(Code.UNSUPPORTED, key="model.hub_id"):
            download_weights("some/model", None, allow_bin=False)
        return
    assert download_weights("some/model", None, allow_bin=False).revision == "refs/pr/7"
    assert repository.downloaded == [("model.safetensors", "refs/pr/7")]


def test_a_truncated_file_in_the_cache_is_named(repository: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(*arguments: Any) -> Path:
        path = repository.download(*arguments)
        path.write_bytes(path.read_bytes()[:-3])
        return path

    repository.names[None] += ["model.safetensors"]
    monkeypatch.setattr(hub, "download", cut)
    with refuses(Code.DAMAGED) as caught:
        download_weights("some/model", None, allow_bin=False)
    assert caught.value.file == repository.folder / "model.safetensors"
    assert "Delete it" in str(caught.value.remedy)


def http(kind: Any, status: int) -> Callable[[], Exception]:
    """Return a function that makes an error of the hub's client with this status."""
    request = httpx.Request("GET", "https://huggingface.co/some/model")
    return lambda: kind("failed", response=httpx.Response(status, request=request))


def wrapped() -> Exception:
    error = RuntimeError("a library hides the cause")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    return error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (http(errors.GatedRepoError, 403), Code.FORBIDDEN),
        (http(errors.RepositoryNotFoundError, 404), Code.NOT_FOUND),
        (http(errors.RepositoryNotFoundError, 401), Code.NOT_FOUND),
        (http(errors.RevisionNotFoundError, 404), Code.NOT_FOUND),
        (http(errors.HfHubHTTPError, 403), Code.FORBIDDEN),
        (http(errors.HfHubHTTPError, 503), Code.SERVER),
        (wrapped, Code.UNWRITABLE),
        (lambda: OSError("Consistency check failed: file should be of size 9 but has size 5 (m)"), Code.DAMAGED),
        (lambda: httpx.ReadError("reset by peer"), Code.SERVER),
    ],
)
def test_each_fault_of_the_hub_has_its_paragraph(
    error: Callable[[], Exception], code: Code, repository: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/cache/hub")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://huggingface.co")
    repository.names["v7"] = ["model.safetensors"]
    repository.error = error()
    is_revision = isinstance(repository.error, errors.RevisionNotFoundError)
    with refuses(code, key="model.revision" if is_revision else "model.hub_id"):
        download_weights("some/model", "v7", allow_bin=False)


def test_a_download_goes_on_where_it_broke_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of a large file; a second command asks for the rest, and the hub's client then finds the whole."""
    content = bytes(range(256)) * 40
    asked: list[int] = []

    def http_get(_url: str, file: Any, *, resume_size: int, **_: Any) -> None:
        asked.append(resume_size)
        end = len(content) if resume_size else 1000
        file.write(content[resume_size:end])
        if end < len(content):
            raise KeyboardInterrupt

    def hf_hub_download(*_: Any, **__: Any) -> str:
        return str(tmp_path / "models--some--model" / "blobs" / "digest")

    metadata = SimpleNamespace(etag="digest", size=len(content), location="https://elsewhere.co/file")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.get_hf_file_metadata", lambda _: metadata)
    monkeypatch.setattr("huggingface_hub.file_download.http_get", http_get)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr(hub, "_LARGE_BYTES", 1000)
    with pytest.raises(KeyboardInterrupt):
        hub.download("some/model", "model.safetensors", None)
    path = hub.download("some/model", "model.safetensors", None)
    assert path.read_bytes() == content
    assert asked == [0, 1000]
    assert [blob.name for blob in path.parent.iterdir()] == ["digest"]
