"""A server on a raw socket: it compares request targets byte by byte, and answers with any bytes."""

import asyncio
import contextlib
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Mapping, Sequence

from fetching import fetch_all

from data_prep.pairs.fetch import FetchConfig, Fetched, Fetcher

LOCAL = FetchConfig(deadline_seconds=5.0, backoff_seconds=0.01, allow_networks=("127.0.0.1/32",), per_host=64)
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbody"


@contextlib.asynccontextmanager
async def serving(answers: Mapping[bytes, bytes], asked: list[bytes]) -> AsyncIterator[int]:
    """Port of a server with an answer for each request target; others get 404. Targets are added to `asked`."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            request = await reader.readuntil(b"\r\n\r\n")
            target = request.split(b"\r\n", 1)[0].removeprefix(b"GET ").removesuffix(b" HTTP/1.1")
            asked.append(target)
            writer.write(answers.get(target, b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"))
            await writer.drain()
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, limit=1 << 20)
    async with server:
        yield server.sockets[0].getsockname()[1]


def fetch_exactly(
    answers: Mapping[bytes, bytes], paths: Sequence[str], config: FetchConfig = LOCAL
) -> tuple[list[Fetched], list[bytes]]:
    """What the crawler gets for some paths of such a server, and the targets that it asked for."""
    asked: list[bytes] = []

    async def run() -> list[Fetched]:
        async with serving(answers, asked) as port:
            own = {target: body.replace(b"PORT", str(port).encode()) for target, body in answers.items()}
            answers.update(own) if isinstance(answers, dict) else None
            return await fetch_all(Fetcher(config), [f"http://127.0.0.1:{port}{path}" for path in paths])

    return asyncio.run(run()), [target for target in asked if target != b"/robots.txt"]


def urllib_exactly(answers: Mapping[bytes, bytes], paths: Sequence[str]) -> list[bytes | None]:
    """The bodies that urllib gets for these paths; None where it fails."""

    def get(url: str) -> bytes | None:
        try:
            with urllib.request.urlopen(url, timeout=5) as response:
                return bytes(response.read())
        except (urllib.error.URLError, ValueError, OSError):
            return None
        except Exception:  # http.client's own errors
            return None

    async def run() -> list[bytes | None]:
        async with serving(answers, []) as port:
            return [await asyncio.to_thread(get, f"http://127.0.0.1:{port}{path}") for path in paths]

    return asyncio.run(run())
