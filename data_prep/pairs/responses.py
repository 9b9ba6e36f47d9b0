"""HTTP responses: which bodies are whole, their content decoding, and a lenient parser.

Browsers and urllib read more than aiohttp does: see `get_leniently`.
"""

import contextlib
import http.client
import re
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aiohttp.abc import ResolveResult
from multidict import CIMultiDict
from yarl import URL

from data_prep.pairs.addresses import FetchError

BLOCK_BYTES = 1 << 16
SUCCESSES = (200, 201, 202, 203, 226)
CONTENT_RANGE = re.compile(r"bytes\s+(\d{1,15})-(\d{1,15})/(\d{1,15})", re.IGNORECASE)
GZIP = b"\x1f\x8b"
"""First bytes of a member of a gzip file, which may have several."""
MAX_MEMBERS = 1000
"""Each takes some microseconds, however few its bytes."""
UNSUPPORTED_ENCODINGS = ("br", "zstd", "compress")


class Body:
    """Receives a body block by block and decodes it, holding at most the limit and one block."""

    def __init__(self, encoding: str, limit: int) -> None:
        self.content = bytearray()
        self.received = 0
        self._encoding, self._limit = encoding.strip().lower().removeprefix("x-"), limit
        self._stream: zlib._Decompress | None = None
        self._rest, self._members = b"", 0
        if self._encoding in UNSUPPORTED_ENCODINGS or "," in self._encoding:
            raise FetchError("http_status", f"200, but encoded as {encoding[:100]!r}, which was not requested")

    def feed(self, block: bytes) -> None:
        """Add the next block received."""
        for start in range(0, len(block), BLOCK_BYTES):  # zlib copies what follows the end of each member
            self._add(block[start : start + BLOCK_BYTES])

    def _add(self, block: bytes) -> None:
        self.received += len(block)
        self.content += self._decode(block) if self._encoding in ("gzip", "deflate") else block
        if max(self.received, len(self.content)) > self._limit:
            raise FetchError("too_large", f"more than {self._limit} bytes")

    def _decode(self, block: bytes) -> bytes:
        block, self._rest, decoded = self._rest + block, b"", b""
        while block:
            if self._stream and self._stream.eof and block == GZIP[:1]:  # perhaps of the next member
                self._rest = block
                break
            if self._stream is None or (self._stream.eof and block.startswith(GZIP)):
                # Servers send "deflate" with and without a zlib header.
                bits = 31 if self._encoding == "gzip" else 15 if block[0] & 15 == 8 else -15
                self._stream = zlib.decompressobj(bits)
                self._members += 1
                if self._members > MAX_MEMBERS:
                    raise FetchError("http_status", f"200, but of more than {MAX_MEMBERS:,} gzip members")
            if self._stream.eof:  # padding
                break
            try:
                decoded += self._stream.decompress(block, max(1, self._limit + 1 - len(self.content) - len(decoded)))
            except zlib.error as error:
                raise FetchError("http_status", f"200, but not encoded as {self._encoding}: {error}") from error
            if len(self.content) + len(decoded) > self._limit:
                break
            block = self._stream.unused_data
        return decoded

    def end(self) -> None:
        """Check that the body is complete."""
        if self._stream is not None and not self._stream.eof:
            raise FetchError("connect", f"the body ends before its {self._encoding} encoding does", transient=True)


def is_complete(status: int, content_range: str) -> bool:
    """Whether a response brings a whole body: any success but an empty one or a part (206) of what is there."""
    if status == 206:
        part = CONTENT_RANGE.fullmatch(content_range.strip())
        return part is not None and part[1] == "0" and int(part[2]) + 1 == int(part[3])
    return status in SUCCESSES


@dataclass(frozen=True, kw_only=True)
class LenientResponse:
    """A response with its body, which may be cut off behind the limit."""

    status: int
    reason: str
    headers: CIMultiDict[str]
    content: bytes


def _shut_down(opened: socket.socket) -> None:
    with contextlib.suppress(OSError):  # closed
        opened.shutdown(socket.SHUT_RDWR)


def get_leniently(
    url: URL,
    addresses: Sequence[ResolveResult],
    headers: Mapping[str, str],
    *,
    limit: int,
    seconds: float,
    open_socket: Callable[[tuple[Any, ...]], socket.socket],
) -> LenientResponse:
    """Ask for a URL with the standard library's parser.

    It reads what aiohttp's parser refuses: repeated `Content-Length` headers, bytes behind the body and the like.

    Args:
        url: see `addresses.parse_url`.
        addresses: of its host; no other is connected to.
        headers: of the request.
        limit: bytes of the body after which reading ends.
        seconds: after which it ends as well.
        open_socket: makes a socket for one `getaddrinfo` record, or raises.

    Raises:
        TimeoutError: the response is not whole in time.
        OSError: the server cannot be reached or ends too early.
        http.client.HTTPException: the response is not HTTP.
    """
    deadline = time.monotonic() + seconds

    def connect(*_: object) -> socket.socket:
        first = addresses[0]
        target = (first["host"], url.port)
        opened = open_socket((first["family"], socket.SOCK_STREAM, first["proto"], "", target))
        opened.settimeout(max(0.1, deadline - time.monotonic()))
        opened.connect(target)
        return opened

    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    options: dict[str, Any] = {"context": ssl.create_default_context()} if url.scheme == "https" else {}
    connection = kind(url.raw_host or "", url.port, timeout=seconds, **options)
    connection._create_connection = connect  # type: ignore[attr-defined]
    end: threading.Timer | None = None
    try:
        connection.request("GET", url.raw_path_qs, headers=dict(headers))
        # A time-out of a socket is for each byte: a head that drips would never end.
        end = threading.Timer(max(0.1, deadline - time.monotonic()), _shut_down, [connection.sock])
        end.daemon = True
        end.start()
        response = connection.getresponse()
        content = bytearray()
        while len(content) <= limit and time.monotonic() < deadline and (block := response.read1(BLOCK_BYTES)):
            content += block
        if time.monotonic() >= deadline:  # the parser takes the end of a connection for the end of a head
            raise TimeoutError(f"not whole after {seconds:g} s")
        if response.length:
            raise ConnectionError(f"the body ends {response.length} bytes early")
        pairs = CIMultiDict(response.getheaders())
        return LenientResponse(status=response.status, reason=response.reason, headers=pairs, content=bytes(content))
    finally:
        if end is not None:
            end.cancel()
        connection.close()
