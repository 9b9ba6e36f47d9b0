"""The pictogram web site's server: plays the faults that `website.build_site` put into the URL list.

    with serve_site(root) as base_url:          # the list is now at root/urls.tsv
        ...

By hand: `python -m data_prep.pictograms.webserver --root DIR --port 8000`.
"""

import argparse
import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
from aiohttp import web

from data_prep.pictograms.website import BODIES, child_environment, image_path, near_copy

READY_SECONDS = 60.0
OVERSIZED_BYTES = 64 << 20
RESPONSES: dict[str, tuple[int, dict[str, str]]] = {
    "missing": (404, {}), "gone": (410, {}), "server_error": (500, {}),
    "wrong_type": (200, {"Content-Type": "text/html"}), "opt_out": (200, {"X-Robots-Tag": "noai, noimageai"}),
    "redirect_private": (302, {"Location": "http://10.0.0.1/x.jpg"}),
    "redirect_metadata": (302, {"Location": "http://169.254.169.254/latest/meta-data/"}),
    "redirect_file": (302, {"Location": "file:///etc/passwd"}), "redirect_loop": (302, {"Location": "?again"}),
}  # fmt: skip
"""Status and extra headers by kind; other kinds answer 200 with the image."""


@contextlib.contextmanager
def serve_site(root: str | Path, *, port: int = 0) -> Iterator[str]:
    """Serve a built site from a child process while the block runs, and yield its base URL.

    The server also stops when this process dies. With `port` 0 it takes the port it had last time if that is free, so
    that the URL list, and with it the digest of the list, stays the same.

    Raises:
        RuntimeError: the server did not start.
    """
    command = [sys.executable, "-m", __name__, f"--root={root}", f"--port={port}", "--stop-at-eof"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=child_environment(), stdin=pipe, stdout=pipe, text=True) as server:
        watchdog = threading.Timer(READY_SECONDS, server.kill)
        watchdog.start()
        try:
            assert server.stdout
            base_url = server.stdout.readline().strip()
            watchdog.cancel()
            if not base_url:
                raise RuntimeError(f"the web site did not start: {' '.join(command)}")
            yield base_url
        finally:
            watchdog.cancel()
            server.kill()


def write_url_list(root: Path, base_url: str) -> None:
    """Write `root/urls.tsv`, a header and one `url<tab>caption` a row, for a site that answers at `base_url`."""
    expected = pq.read_table(root / "expected.parquet", columns=["url", "caption"])
    urls = [base_url + url if url.startswith("/") else url for url in expected["url"].to_pylist()]
    lines = [f"{url}\t{caption}\n" for url, caption in zip(urls, expected["caption"].to_pylist(), strict=True)]
    temporary = root / "urls.tsv.tmp"
    temporary.write_text("url\tcaption\n" + "".join(lines), encoding="utf-8")
    temporary.replace(root / "urls.tsv")


class SiteHandler:
    """Answers requests: `/<kind>/<image index>.jpg`, where the kind is `images` or a fault."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.requests: Counter[str] = Counter()
        """Requests so far by path, also served as JSON at `/_requests`."""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """One response."""
        if request.path == "/_requests":
            return web.json_response(self.requests)
        self.requests[request.path] += 1
        kind, _, name = request.path[1:].partition("/")
        if kind in BODIES:
            return web.Response(body=(self.root / "bodies" / kind).read_bytes(), content_type=BODIES[kind])
        stem = name.removesuffix(".jpg")
        if not stem.isdigit() or not image_path(self.root, int(stem)).exists():
            return web.Response(status=404)
        return await self._image(request, kind, image_path(self.root, int(stem)).read_bytes())

    async def _image(self, request: web.Request, kind: str, image: bytes) -> web.StreamResponse:
        match kind:
            case "flaky" if self.requests[request.path] == 1:
                return web.Response(status=500)
            case "hangs":
                await asyncio.sleep(3600)
            case "disconnects":
                assert request.transport is not None
                request.transport.close()
            case "near":
                image = near_copy(image)
            case "truncated":
                image = image[: len(image) * 6 // 10]
            case "redirects":
                hop = int(request.query.get("hop", "0"))
                location = f"?hop={hop + 1}" if hop < 2 else request.path.replace("/redirects/", "/images/")
                return web.Response(status=(301, 302, 307)[hop], headers={"Location": location})
            case "too_large":
                return await _oversized(request)
        status, headers = RESPONSES.get(kind, (200, {}))
        return web.Response(
            body=image if status == 200 else None, status=status, headers={"Content-Type": "image/jpeg", **headers}
        )


async def _oversized(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "image/jpeg"})
    await response.prepare(request)
    with contextlib.suppress(ConnectionError):
        for _ in range(OVERSIZED_BYTES >> 16):
            await response.write(bytes(1 << 16))
    return response


async def serve(root: Path, port: int, *, stop_at_eof: bool = False) -> None:
    """Serve until SIGTERM, SIGINT or, with `stop_at_eof`, the end of standard input; print the base URL when ready."""
    listener = _listen(root, port)
    application = web.Application()
    application.router.add_get("/{path:.*}", SiteHandler(root).answer)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.SockSite(runner, listener).start()
    base_url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    write_url_list(root, base_url)

    stopped, loop = asyncio.Event(), asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stopped.set)
    if stop_at_eof:
        loop.add_reader(sys.stdin, lambda: None if os.read(sys.stdin.fileno(), 1024) else stopped.set())
    print(base_url, flush=True)
    await stopped.wait()
    if stop_at_eof:
        loop.remove_reader(sys.stdin)
    await runner.cleanup()


def _listen(root: Path, port: int) -> socket.socket:
    """A listening socket on the given port; if that is 0, on the last one used, else on any free one."""
    port_file = root / "port"
    last = int(port_file.read_text()) if port_file.exists() else 0
    for candidate in (port,) if port else (last, 0):
        try:
            listener = socket.create_server(("127.0.0.1", candidate), backlog=1024)
        except OSError:
            continue
        port_file.write_text(str(listener.getsockname()[1]))
        return listener
    raise SystemExit(f"error: --port {port}: already in use")


def main() -> None:
    """Parse the command line and serve."""
    parser = argparse.ArgumentParser(description="Serve a built pictogram web site.")
    parser.add_argument("--root", type=Path, required=True, help="folder that build_site wrote")
    parser.add_argument("--port", type=int, default=0, help="0: the last one used, or any free one")
    parser.add_argument("--stop-at-eof", action="store_true", help="also stop at the end of standard input")
    options = parser.parse_args()
    if not (options.root / "expected.parquet").exists():
        raise SystemExit(f"error: --root {options.root}: no site here, expected the expected.parquet of build_site")
    asyncio.run(serve(options.root, options.port, stop_at_eof=options.stop_at_eof))


if __name__ == "__main__":
    main()
