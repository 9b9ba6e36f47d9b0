"""The web site of the pairs benchmark: images over HTTP and HTTPS, hosts that hang, and hostile bodies."""

import asyncio
import contextlib
import gzip
import os
import ssl
import struct
import subprocess
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIZES = ((640, 480), (800, 600), (1024, 768))
CANVAS = 2048
HUGE_BYTES = 400_000_000
BOMB_SIDE = 20_000
HOSTILE = {
    "huge": "too_large",
    "endless": "too_large",
    "unzips": "too_large",
    "bomb": "too_many_pixels",
    "drip": "timeout",
}
"""Kinds of bodies that a crawler must reject -> the expected reason."""
Address = tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class Addresses:
    """Addresses of the site."""

    http: Address
    https: Address
    many: list[Address]
    """Hosts that answer."""
    hanging: list[Address]
    """Hosts that accept connections and never answer."""


def make_pictures(folder: Path, count: int) -> None:
    """Write `0.jpg`, `1.jpg`, ...: visibly different, with a spectrum like photographs, 109 KB on average."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / f"{count - 1}.jpg").exists():
        return
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        list(pool.map(_draw, [folder] * 2, [0, 1], [count] * 2))


def _draw(folder: Path, start: int, count: int) -> None:
    canvases = [_canvas(seed) for seed in range(2)]
    for index in range(start, count, 2):
        rng = np.random.default_rng(index)
        width, height = SIZES[index % len(SIZES)]
        cuts = []
        for canvas in canvases:
            top, left = rng.integers(CANVAS - height), rng.integers(CANVAS - width)
            cut = canvas[top : top + height, left : left + width]
            cuts.append(cut[:: rng.choice((-1, 1)), :: rng.choice((-1, 1))])
        pixels = ((3 * cuts[0].astype(np.uint16) + cuts[1]) // 4).astype(np.uint8)
        temporary = folder / f"{index}.tmp"
        Image.fromarray(pixels).save(temporary, "JPEG", quality=77)
        temporary.rename(folder / f"{index}.jpg")


def _canvas(seed: int) -> np.ndarray:
    """Overlapping discs whose edges and sizes follow the statistics of photographs, with texture and grain."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (CANVAS, CANVAS))
    draw = ImageDraw.Draw(image)
    for radius in np.sort(6 * (1 - rng.random(4000)) ** -0.7)[::-1].clip(max=500):
        x, y = rng.uniform(0, CANVAS, 2)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=tuple(rng.integers(20, 236, 3).tolist()))
    frequency = np.hypot(np.fft.fftfreq(CANVAS)[:, None], np.fft.rfftfreq(CANVAS))
    frequency[0, 0] = 1
    texture = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((CANVAS, CANVAS))) / frequency)
    noise = 9 * texture / texture.std() + rng.normal(0, 1.0, (CANVAS, CANVAS))
    return (np.asarray(image) + noise[..., None]).clip(0, 255).astype(np.uint8)


def png_bomb(side: int = BOMB_SIDE) -> bytes:
    """A small valid PNG file of side x side black RGB pixels."""
    packer, row = zlib.compressobj(9), bytes(1 + 3 * side)
    data = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)), (b"IDAT", data), (b"IEND", b""))
    parts = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def make_certificates(folder: Path) -> None:
    """Write `server.pem` with its key, and `bundle.pem`: this machine's trusted certificates and our authority's."""
    if (folder / "bundle.pem").exists():
        return
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    days = ["-days", "3650"]
    (folder / "san.ext").write_text("subjectAltName=IP:127.0.0.1\n")
    for command in (
        ["req", "-x509", *key, *days, "-subj", "/CN=benchmark authority", "-keyout", "ca.key", "-out", "ca.pem"],
        ["req", *key, "-subj", "/CN=127.0.0.1", "-keyout", "server.key", "-out", "server.csr"],
        [
            "x509",
            "-req",
            "-in",
            "server.csr",
            "-CA",
            "ca.pem",
            "-CAkey",
            "ca.key",
            "-CAcreateserial",
            *days,
            "-extfile",
            "san.ext",
            "-out",
            "server.crt",
        ],
    ):
        subprocess.run(["openssl", *command], cwd=folder, check=True, capture_output=True)
    (folder / "server.pem").write_text((folder / "server.key").read_text() + (folder / "server.crt").read_text())
    trusted = ssl.get_default_verify_paths().cafile
    bundle = Path(trusted).read_text() if trusted else ""
    (folder / "bundle.pem").write_text(bundle + (folder / "ca.pem").read_text())


@contextlib.contextmanager
def serve_site(root: Path, hosts: int, hanging: int) -> Iterator[Addresses]:
    """Serve `root/pictures` from a separate process while the block runs.

    Args:
        root: folder that also holds `server.pem`.
        hosts: number of loopback addresses that answer.
        hanging: number of further addresses that never answer.
    """
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=_serve, args=(root, hosts, hanging, theirs), daemon=True)
    server.start()
    theirs.close()
    try:
        yield ours.recv()
    finally:
        ours.close()
        server.join()


def _serve(root: Path, hosts: int, hanging: int, parent: Connection) -> None:
    asyncio.run(_Site(root).serve(hosts, hanging, parent))


class _Site:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.bomb = png_bomb()
        self.zipped = gzip.compress(bytes(HUGE_BYTES), 6)

    async def serve(self, hosts: int, hanging: int, parent: Connection) -> None:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(self.root / "server.pem")
        names = [f"127.0.{1 + index // 250}.{1 + index % 250}" for index in range(hosts + hanging)]
        http = await asyncio.start_server(self.keep_alive, "127.0.0.1", 0, backlog=1024)
        https = await asyncio.start_server(self.answer, "127.0.0.1", 0, ssl=tls, backlog=1024)
        many = await asyncio.start_server(self.keep_alive, names[:hosts], 0, backlog=1024)
        dead = await asyncio.start_server(self.hang, names[hosts:], 0, backlog=1024)
        found = [[socket.getsockname() for socket in server.sockets] for server in (http, https, many, dead)]
        parent.send(Addresses(http=found[0][0], https=found[1][0], many=found[2], hanging=found[3]))
        ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(parent.fileno(), ended.set)
        await ended.wait()
        os._exit(0)  # without messages about unfinished responses

    async def hang(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()  # returns when the client gives up
        writer.close()

    async def keep_alive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self.answer(reader, writer, close=False)

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, close: bool = True) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                request = await reader.readuntil(b"\r\n\r\n")
                kind, _, name = request.split(b" ", 2)[1].decode()[1:].partition("/")
                last = close or b"\r\nconnection: close" in request.lower()
                await self.respond(writer, kind, name, last or kind in HOSTILE)
                if last or kind in HOSTILE:
                    break
        writer.close()
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            await writer.wait_closed()

    async def respond(self, writer: asyncio.StreamWriter, kind: str, name: str, close: bool) -> None:
        """One response: an image, or a hostile body for the kinds of `HOSTILE`."""
        head = "HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\n" + "Connection: close\r\n" * close
        match kind:
            case "huge" | "endless":
                length = f"Content-Length: {HUGE_BYTES}\r\n" if kind == "huge" else ""
                writer.write(f"{head}{length}\r\n".encode() + b"\xff\xd8\xff\xe0")
                for _ in range(HUGE_BYTES >> 16):
                    writer.write(bytes(1 << 16))
                    await writer.drain()
            case "drip":
                writer.write(f"{head}Content-Length: 100000\r\n\r\n".encode() + b"\xff\xd8\xff\xe0")
                for _ in range(60):
                    writer.write(b"\0")
                    await writer.drain()
                    await asyncio.sleep(1)
            case _:
                encoding = ""
                if kind == "bomb":
                    body = self.bomb
                elif kind == "unzips":
                    body, encoding = self.zipped, "Content-Encoding: gzip\r\n"
                elif kind == "robots.txt":
                    body = b"User-agent: *\nDisallow:\n"
                else:
                    body = (self.root / "pictures" / name).read_bytes()
                writer.write(f"{head}{encoding}Content-Length: {len(body)}\r\n\r\n".encode())
                writer.write(body)
                await writer.drain()
