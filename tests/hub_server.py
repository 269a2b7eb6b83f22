"""A stand-in for the Hugging Face hub in this process: models are created, committed to, listed and downloaded."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants

from lora_bench.files import hub
from lora_bench.records import hub_run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import pytest

TOKEN = "hf_" + "standin" * 4
LFS_BYTES = 10_000
"""Files from this size on are sent through LFS, as are all weights."""


@dataclass
class Repository:
    """A model's repository: the files of each commit, the newest last."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes]) -> str:
        identity = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits[identity] = files
        return identity

    @property
    def newest(self) -> str:
        return list(self.commits)[-1]


class HubServer:
    """Repositories in memory, served on a local port.

    `refusals` maps the end of a path to the status and message with which requests for it are refused.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.uploads: dict[str, bytes] = {}
        self.refusals: dict[str, tuple[int, str]] = {}
        self.requests: list[str] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def handle_request(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Transfer-Encoding") == "chunked":
                    body = b""
                    while size := int(self.rfile.readline(), 16):
                        body += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                path = unquote(urlsplit(self.path).path)
                owner.requests.append(f"{self.command} {path}")
                answer = owner.answer(self.command, path, body, self.headers.get("Authorization"))
                status, headers, content = answer
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_HEAD = do_POST = do_PUT = handle_request

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, method: str, path: str, body: bytes, token: str | None) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and content for a request."""
        for end, (status, message) in self.refusals.items():
            if path.endswith(end):
                return _json(status, {"error": message}, {"X-Error-Message": message})
        if path == "/":
            return _json(200, {})
        if path == "/api/validate-yaml":
            return _json(200, {"warnings": [], "errors": []})
        if path.startswith("/lfs/"):
            self.uploads[path.rpartition("/")[2]] = body
            return _json(200, {})
        is_owner = token == f"Bearer {TOKEN}"
        if path == "/api/repos/create":
            return self._create(json.loads(body), is_owner=is_owner)
        match = re.fullmatch(r"(?:/api/models)?/([\w.-]+/[\w.-]+?)(?:\.git)?(?:/(\w[\w-]*)(?:/(.*))?)?", path)
        repository = self.repositories.get(match[1]) if match else None
        if match is None or repository is None or (repository.private and not is_owner):
            return _json(401 if not is_owner else 404, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})
        name, action, rest = match.groups()
        if path.startswith("/api/models"):
            return self._api(name, repository, action, rest, body)
        if action == "info":
            return self._batch(json.loads(body))
        return self._resolve(repository, rest, method)

    def _create(self, request: dict[str, Any], *, is_owner: bool) -> tuple[int, dict[str, str], bytes]:
        if not is_owner:
            return _json(401, {"error": "Invalid username or password."})
        name = f"{request.get('organization') or 'me'}/{request['name']}"
        content = {"url": f"{self.address}/{name}", "id": name}
        if name in self.repositories:
            return _json(409, {"error": "You already created this model repo", **content})
        self.repositories[name] = Repository(request.get("visibility") == "private")
        self.repositories[name].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        return _json(200, content)

    def _api(
        self, name: str, repository: Repository, action: str | None, rest: str | None, body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        if action in (None, "revision", "tree"):
            commit = _resolve_revision(repository, rest or "main")
            if commit is None:
                return _json(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
            files = repository.commits[commit]
            if action == "tree":
                return _json(
                    200, [{"type": "file", "path": path, "oid": "0", "size": len(files[path])} for path in files]
                )
            siblings = [{"rfilename": path} for path in files]
            return _json(200, {"id": name, "sha": commit, "private": repository.private, "siblings": siblings})
        if action == "preupload":
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs"
                    if file["path"].endswith(".safetensors") or file["size"] >= LFS_BYTES
                    else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return _json(200, {"files": modes})
        assert action == "commit", action
        files = dict(repository.commits[repository.newest])
        for operation in map(json.loads, body.splitlines()):
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.uploads[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        identity = repository.commit(files)
        return _json(
            200, {"success": True, "commitOid": identity, "commitUrl": f"{self.address}/{name}/commit/{identity}"}
        )

    def _batch(self, request: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        objects = [
            {**entry, "actions": {"upload": {"href": f"{self.address}/lfs/{entry['oid']}"}}}
            for entry in request["objects"]
        ]
        return _json(200, {"transfer": "basic", "objects": objects})

    def _resolve(self, repository: Repository, rest: str, method: str) -> tuple[int, dict[str, str], bytes]:
        revision, _, path = rest.partition("/")
        commit = _resolve_revision(repository, revision)
        content = repository.commits[commit].get(path) if commit else None
        if content is None:
            return _json(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": str(commit)}
        return 200, headers, content


def _resolve_revision(repository: Repository, revision: str) -> str | None:
    return repository.newest if revision == "main" else revision if revision in repository.commits else None


def _json(status: int, content: object, headers: dict[str, str] | None = None) -> tuple[int, dict[str, str], bytes]:
    return status, {"Content-Type": "application/json", **(headers or {})}, json.dumps(content).encode()


@contextmanager
def serving_hub(patch: pytest.MonkeyPatch, cache: Path, token: str | None = TOKEN) -> Iterator[HubServer]:
    """Serve a hub without repositories, and point the hub's client of this process to it and to an empty cache."""
    hub_server = HubServer()
    thread = threading.Thread(target=hub_server.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "ENDPOINT", hub_server.address)
    patch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub_server.address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    patch.setattr(constants, "HF_STORED_TOKENS_PATH", str(cache / "stored_tokens"))
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    patch.delenv("HF_TOKEN", raising=False)
    if token is not None:
        patch.setenv("HF_TOKEN", token)
    hub.is_reachable.cache_clear()
    hub_run._fetch.cache_clear()
    try:
        yield hub_server
    finally:
        hub_server.server.shutdown()
        hub_server.server.server_close()
        hub.is_reachable.cache_clear()
        hub_run._fetch.cache_clear()
