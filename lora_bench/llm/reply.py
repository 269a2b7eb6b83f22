"""A server's HTTP reply while it comes: bounded in size, from the address that was asked, and never with the key in it.

A server is not trusted. `check_reply` is called with each reply before its body is read.
"""

from __future__ import annotations

import html
import re
import zlib
from base64 import b64encode
from typing import TYPE_CHECKING
from urllib.parse import unquote

import httpx2

from lora_bench.errors import Code, UserError
from lora_bench.llm.parsing import BrokenAnswerError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

MAX_BYTES = 8 * 2**20
"""Of one reply, as it is sent and when it is decompressed."""
ENCODINGS = {"gzip": 31, "x-gzip": 31, "deflate": 15}
"""Compressions that are read, and zlib's name for each."""


async def check_reply(response: httpx2.Response) -> None:
    """Refuse a redirect that would take the key elsewhere, and bound what is read of any other reply.

    The body of the response is replaced by one that decompresses it and raises BrokenAnswerError beyond `MAX_BYTES`.

    Raises:
        UserError: the reply is a redirect to another origin, or one that does not repeat the request.
        BrokenAnswerError: the reply is compressed in a way that is not read.
    """
    if response.has_redirect_location:
        _check_redirect(response)
    names = ",".join(response.headers.get_list("content-encoding")).lower().split(",")
    encodings = [name for name in map(str.strip, names) if name not in ("", "identity")]
    if len(encodings) > 1 or not ENCODINGS.keys() >= set(encodings):
        raise BrokenAnswerError(f"the reply is compressed with {', '.join(encodings)[:60]}, which was not offered")
    if "content-encoding" in response.headers:
        del response.headers["content-encoding"]
    response.encoding = "utf-8"  # whatever the reply calls it: Python has encodings that decompress
    assert isinstance(response.stream, httpx2.AsyncByteStream)
    response.stream = _Bounded(response.stream, encodings[0] if encodings else None)


def _check_redirect(response: httpx2.Response) -> None:
    """Refuse a redirect to another scheme, host or port, or one whose status is not 307 or 308.

    Raises:
        UserError: naming the origin that it leads to, or the status.
    """
    request_url = response.request.url
    try:
        target = request_url.join(response.headers["location"])
        same = (target.scheme, target.host, _port(target)) == (request_url.scheme, request_url.host, _port(request_url))
        origin = f"{target.scheme}://{target.host}"
    except (httpx2.InvalidURL, ValueError):
        same, origin = False, "an address that is none"
    if not same:
        remedy = "The key is sent nowhere else. If you trust that address, give it as llm.base_url."
        raise UserError(f"the server redirects to {origin[:200]}", key="llm.base_url", remedy=remedy, code=Code.SERVER)
    if response.status_code not in (307, 308):
        remedy = "Give the address that it redirects to; it often ends in /v1."
        reason = f"the server answers with the redirect {response.status_code}, which sends no question on"
        raise UserError(reason, key="llm.base_url", remedy=remedy, code=Code.SERVER)


def _port(url: httpx2.URL) -> int | None:
    return url.port or {"http": 80, "https": 443}.get(url.scheme)


class _Bounded(httpx2.AsyncByteStream):
    """The decompressed body of a reply, at most `MAX_BYTES` long."""

    def __init__(self, stream: httpx2.AsyncByteStream, encoding: str | None) -> None:
        self.stream = stream
        self.encoding = encoding

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield the decompressed body in chunks.

        Raises:
            BrokenAnswerError: it is longer than `MAX_BYTES`, as sent or decompressed, or is not compressed as
                announced.
        """
        received = total = 0
        decoder = None
        async for chunk in self.stream:
            received += len(chunk)
            if received > MAX_BYTES:
                raise _too_long()
            if self.encoding is not None:
                try:
                    decoder = decoder or zlib.decompressobj(_window_bits(self.encoding, chunk))
                    chunk = decoder.decompress(chunk, MAX_BYTES + 1 - total)
                except zlib.error:
                    raise BrokenAnswerError(f"the reply is not the {self.encoding} that it says") from None
            total += len(chunk)
            if total > MAX_BYTES:
                raise _too_long()
            yield chunk

    async def aclose(self) -> None:
        await self.stream.aclose()


def _window_bits(encoding: str, first: bytes) -> int:
    """Return zlib's `wbits` for a body; some servers send `deflate` without zlib's header."""
    bare = encoding == "deflate" and not (first[:1] and first[0] & 0x0F == 8)
    return -15 if bare else ENCODINGS[encoding]


def _too_long() -> BrokenAnswerError:
    return BrokenAnswerError(f"the reply is longer than {MAX_BYTES:,} bytes")


WITHHELD = "its message repeats the API key, so it is not shown"
_WINDOW = 6
"""Length of the fragments of a key that are searched for."""
_MASKED = re.compile(r"([^\s'\"]{0,200})(?:\*{2,}|\.{3}|…|[xX]{4,})([^\s'\"]{0,200})")


def contains_key(text: str, key: str) -> bool:
    """Return whether a text holds the key or a part of it, in whatever form: split, escaped, encoded or masked.

    Six characters in a row are a part; in a masked key (`sk-…wxyz`) it is the first or last three. False for a shorter
    key.
    """
    if len(key) < _WINDOW:
        return False
    fragments = {form[i : i + _WINDOW] for form in _forms(key) for i in range(len(form) - _WINDOW + 1)}
    if any(fragment in reading for reading in _readings(text) for fragment in fragments):
        return True
    return any(key[:3] in hit[1] or key[-3:] in hit[2] for hit in _MASKED.finditer(text))


def _forms(key: str) -> Iterator[str]:
    """Yield the forms of a key that are searched for: itself, in hexadecimal, and in base64 at any offset."""
    yield key
    yield key.encode().hex()
    for offset in range(3):
        coded = b64encode(b"\0" * offset + key.encode()).decode().rstrip("=")
        core = coded[4 if offset else 0 : -1]
        yield core
        yield core.replace("+", "-").replace("/", "_")


def _readings(text: str) -> Iterator[str]:
    """Yield a text as it is and without its escapes and encodings, each also without white space."""
    unescaped = re.sub(r"\\+u([0-9a-fA-F]{4})", lambda hit: chr(int(hit[1], 16)), text)
    for reading in dict.fromkeys((text, unescaped, unquote(unescaped), unquote(unquote(text)), html.unescape(text))):
        yield reading
        yield re.sub(r"\\+[nrt]|[\s\\]", "", reading)
