"""A second request with the standard library's parser, for responses that aiohttp's parser refuses.

Repeated `Content-Length` headers, bytes behind the body and the like: browsers and urllib read them.
"""

import http.client
import socket
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aiohttp.abc import ResolveResult
from multidict import CIMultiDict
from yarl import URL

BLOCK_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class LenientResponse:
    """A response with its body, which may be cut off behind the limit."""

    status: int
    reason: str
    headers: CIMultiDict[str]
    content: bytes


def get(
    url: URL,
    addresses: Sequence[ResolveResult],
    headers: Mapping[str, str],
    *,
    limit: int,
    seconds: float,
    open_socket: Callable[[tuple[Any, ...]], socket.socket],
) -> LenientResponse:
    """Ask for a URL.

    Args:
        url: see `addresses.parse_url`.
        addresses: of its host; no other is connected to.
        headers: of the request.
        limit: bytes of the body after which reading ends.
        seconds: after which it ends as well.
        open_socket: makes a socket for one `getaddrinfo` record, or raises.

    Raises:
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
    try:
        connection.request("GET", url.raw_path_qs, headers=dict(headers))
        response = connection.getresponse()
        content = bytearray()
        while len(content) <= limit and time.monotonic() < deadline and (block := response.read1(BLOCK_BYTES)):
            content += block
        if response.length:
            raise ConnectionError(f"the body ends {response.length} bytes early")
        pairs = CIMultiDict(response.getheaders())
        return LenientResponse(status=response.status, reason=response.reason, headers=pairs, content=bytes(content))
    finally:
        connection.close()
