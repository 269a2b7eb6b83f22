"""A scripted OpenAI-compatible server on a local port, which records its requests."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

Reply = tuple[int, dict[str, str], bytes]


def completion(text: str | None = "yes", *, logprobs: dict[str, float] | None = None, **message: Any) -> Reply:
    """Return a chat completion; `logprobs` are those of its first token.

    A reply with the header `X-Slow` is sent byte by byte, and one with `X-Cut` ends in the middle.
    """
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text, **message}}
    choice["finish_reason"] = "stop"
    if logprobs is not None:
        listed = [{"token": token, "logprob": value, "bytes": None} for token, value in logprobs.items()]
        choice["logprobs"] = {"content": [{**listed[0], "top_logprobs": listed}]}
    usage = {"prompt_tokens": 20, "completion_tokens": 1, "total_tokens": 21}
    body = {"id": "1", "object": "chat.completion", "created": 1, "model": "served-1", "choices": [choice]}
    return 200, {}, json.dumps({**body, "usage": usage}).encode()


def error(status: int, message: str = "no", headers: dict[str, str] | None = None, code: str | None = None) -> Reply:
    return status, headers or {}, json.dumps({"error": {"message": message, "code": code}}).encode()


class Server:
    """Answers a request with `script(body, number)`; the requests are numbered from 0."""

    def __init__(self, script: Callable[[dict[str, Any], int], Reply | None]) -> None:
        self.script = script
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        lock = threading.Lock()
        owner = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(owner.bodies)
                    owner.bodies.append(body)
                    owner.keys.append(self.headers["Authorization"])
                status, headers, content = owner.script(body, number) or completion()
                try:
                    self.send_response(status)
                    for name, value in {"Content-Type": "application/json", **headers}.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    if headers.get("X-Cut"):
                        self.wfile.write(content[: len(content) // 2])
                        self.close_connection = True
                    elif headers.get("X-Slow"):
                        for i in range(len(content)):
                            self.wfile.write(content[i : i + 1])
                            self.wfile.flush()
                            time.sleep(0.02)
                    else:
                        self.wfile.write(content)
                except OSError:  # the client has closed the connection
                    self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

        class Quiet(http.server.ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None:
                """Ignore errors of clients that close the connection."""

        self.server = Quiet(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/v1"

    @property
    def repeated(self) -> list[str]:
        """The bodies of the requests that were sent more than once."""
        counts = Counter(json.dumps(body, sort_keys=True) for body in self.bodies)
        return [body for body, count in counts.items() if count > 1]

    def __enter__(self) -> Server:
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()
