"""The pictogram world as a local web site: captioned images and their URL list, with the web's faults mixed in.

What a crawl of it must keep and reject is known row by row, so it checks the crawler and feeds the demo.

`build_site` writes its files; `webserver.serve_site` serves them.
"""

import io
import json
import os
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data_prep.pictograms.world import PICTURES, SCENES, World

JPEG_QUALITY = 95
IMAGES_PER_FOLDER = 1000


@dataclass(frozen=True, kw_only=True)
class FaultRates:
    """Rows of each kind as a share of the good rows; any rate above 0 gives at least one row."""

    # good rows that need care and must be kept: 500 once, HTML's content type, redirects, markup in the caption
    flaky: float = 0.005
    wrong_type: float = 0.005
    redirects: float = 0.005
    messy_caption: float = 0.005
    # rows on top of the good ones, with the outcomes below
    missing: float = 0.005
    gone: float = 0.002
    server_error: float = 0.002
    hangs: float = 0.001
    disconnects: float = 0.002
    no_such_host: float = 0.002
    bad_url: float = 0.003
    private_address: float = 0.002
    redirect_private: float = 0.002
    redirect_metadata: float = 0.002
    redirect_file: float = 0.001
    redirect_loop: float = 0.002
    too_large: float = 0.002
    opt_out: float = 0.005
    html: float = 0.005
    svg: float = 0.003
    corrupt: float = 0.005
    truncated: float = 0.005
    bomb: float = 0.003
    animated: float = 0.003
    too_small: float = 0.005
    aspect: float = 0.003
    blank: float = 0.003
    caption_length: float = 0.004
    caption_characters: float = 0.004
    # rows that repeat another row's bytes under a URL of their own, or its URL
    copy: float = 0.01
    repeat: float = 0.01
    # rows that show another row's image, enlarged and compressed anew
    near: float = 0.01


KEPT = ("flaky", "wrong_type", "redirects", "messy_caption")
OUTCOMES: dict[str, tuple[str, str]] = {
    "missing": ("fetch", "http_status"), "gone": ("fetch", "http_status"), "server_error": ("fetch", "http_status"),
    "hangs": ("fetch", "timeout"), "disconnects": ("fetch", "connect"), "no_such_host": ("fetch", "dns"),
    "bad_url": ("fetch", "bad_url"), "private_address": ("fetch", "forbidden_address"),
    "redirect_private": ("fetch", "forbidden_address"), "redirect_metadata": ("fetch", "forbidden_address"),
    "redirect_file": ("fetch", "bad_url"), "redirect_loop": ("fetch", "too_many_redirects"),
    "too_large": ("fetch", "too_large"), "opt_out": ("fetch", "opt_out"), "html": ("decode", "not_an_image"),
    "svg": ("decode", "not_an_image"), "corrupt": ("decode", "not_an_image"), "truncated": ("decode", "truncated"),
    "bomb": ("decode", "too_many_pixels"), "animated": ("decode", "animated"), "too_small": ("filter", "too_small"),
    "aspect": ("filter", "aspect"), "blank": ("filter", "blank"), "caption_length": ("filter", "caption_length"),
    "caption_characters": ("filter", "caption_characters"),
}  # fmt: skip
"""Stage and reason of each fault that does not depend on other rows."""

BODIES: dict[str, str] = {
    "html": "text/html", "svg": "image/svg+xml", "corrupt": "image/jpeg", "bomb": "image/png",
    "animated": "image/gif", "too_small": "image/jpeg", "aspect": "image/jpeg", "blank": "image/jpeg",
}  # fmt: skip
"""Faults that are one fixed body, with the content type it is served as."""

BAD_URLS = ("file:///etc/passwd?{}", "not a url {}", "ftp://example.com/{}.jpg", "http:///{}.jpg", "javascript:{}")
PRIVATE_URLS = (
    "http://10.0.0.{}/a.jpg", "http://192.168.1.{}/a.jpg", "http://169.254.169.254/{}", "http://[::1]/{}.jpg",
    "http://[::ffff:10.0.0.1]/{}.jpg", "http://100.64.0.{}/a.jpg",
)  # fmt: skip
SHORT_CAPTIONS = ("", "x", "  ", "<p></p>")
NOISE_CAPTIONS = ("?!?! ... !?!?", "1234567890 1234567890", "#### @@@@ $$$$ %%%%", "=-=-=-=-=-=")
MESSES = ("<b>{}</b>", "\u202e{}\u202c", "  {}  ", "{}&nbsp;", '<a href="x?a=1&amp;b=2">{}</a>', "\ufeff{}\x07")


def build_site(
    root: str | Path,
    *,
    num_pictures: int = 12_000,
    num_scenes: int = 4_000,
    seed: int = 0,
    rates: FaultRates | None = None,
    processes: int | None = None,
) -> pa.Table:
    """Write the site's files below `root`; the same arguments give the same bytes.

    Small pictures come with captions that name all they show, scenes with loose captions. Faulty rows come on top
    of the good ones.

    Args:
        root: folder to write to, made if needed.
        num_pictures: 64 px pictures of one or two objects.
        num_scenes: 128 px scenes of two to five objects.
        seed: what the world, its images and the faults follow from.
        rates: how often each fault occurs.
        processes: renderers at a time, by default one a core.

    Returns:
        What a crawl must find, as in `root/expected.parquet`: one row for each row of the URL list, in its order,
        with `row`, `kind`, `url` (relative to the site unless absolute), `caption` (raw), `clean_caption`, `stage`
        and `reason` (null for rows to keep) and `duplicate_of` (the surviving row).
    """
    root, total = Path(root), num_pictures + num_scenes
    chunk = max(400, -(-total // (processes or os.cpu_count() or 1)))
    jobs = [(root, start, min(start + chunk, total), num_pictures, seed) for start in range(0, total, chunk)]
    if len(jobs) < 2:
        parts = [render_images(*job) for job in jobs]
    else:
        with ThreadPoolExecutor(len(jobs)) as pool:
            parts = list(pool.map(_render_elsewhere, jobs))
    for kind in BODIES:
        _write(root / "bodies" / kind, _fault_body(kind))
    captions = [caption for part in parts for caption in part]
    rows = _list_rows(captions, num_pictures, rates or FaultRates(), np.random.default_rng([seed, 2]))
    expected = _expectations(rows, captions)
    pq.write_table(expected, root / "expected.parquet")
    return expected


def render_images(root: Path, start: int, stop: int, num_pictures: int, seed: int) -> list[str]:
    """Draw images `start` to `stop` as JPEG files and return their captions; each follows from its index alone."""
    world, captions = World.create(seed), []
    for index in range(start, stop):
        rng = np.random.default_rng([seed, 1, index])
        is_picture = index < num_pictures
        scene = world.scene(rng, PICTURES if is_picture else SCENES)
        while not len(scene.labels):
            scene = world.scene(rng, PICTURES if is_picture else SCENES)
        captions.append(world.caption(rng, scene) if is_picture else world.loose_caption(rng, scene))
        _write(image_path(root, index), _jpeg(scene.pixels))
    return captions


def _render_elsewhere(job: tuple[Path, int, int, int, int]) -> list[str]:
    """`render_images` in a fresh interpreter, since the caller may hold threads that forbid forking."""
    command = [sys.executable, "-m", "data_prep.pictograms.website", json.dumps([str(job[0]), *job[1:]])]
    captions: list[str] = json.loads(
        subprocess.run(command, env=child_environment(), stdout=subprocess.PIPE, check=True).stdout
    )
    return captions


def image_path(root: Path, index: int) -> Path:
    """The file of image `index`."""
    return root / "images" / f"{index // IMAGES_PER_FOLDER:03d}" / f"{index:06d}.jpg"


def near_copy(jpeg: bytes) -> bytes:
    """The same picture, enlarged and compressed anew."""
    with Image.open(io.BytesIO(jpeg)) as image:
        width, height = image.size
        buffer = io.BytesIO()
        image.resize((2 * width, 2 * height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _jpeg(pixels: npt.NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def _fault_body(kind: str) -> bytes:
    rng = np.random.default_rng(0)
    match kind:
        case "html":
            return b"<!DOCTYPE html><html><body><h1>Not found</h1></body></html>"
        case "svg":
            return b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"/>'
        case "corrupt":
            return b"\xff\xd8\xff\xe0" + rng.bytes(2000)
        case "bomb":
            return png_bomb(30_000, 30_000)
        case "animated":
            first, second = (Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)) for _ in range(2))
            buffer = io.BytesIO()
            first.save(buffer, "GIF", save_all=True, append_images=[second], duration=100)
            return buffer.getvalue()
        case "too_small":
            return _jpeg(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8))
        case "aspect":
            return _jpeg(rng.integers(0, 255, (40, 300, 3), dtype=np.uint8))
        case _:
            return _jpeg(np.full((64, 64, 3), 200, np.uint8))


def png_bomb(width: int, height: int) -> bytes:
    """A small PNG file that declares a huge size in pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(100_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@dataclass(frozen=True)
class _Row:
    kind: str
    url: str
    caption: str
    content: int
    """Index of the image behind the URL."""
    fault: str | None = None
    """Key of `OUTCOMES`; a repeated row has the fault of the row it repeats."""


def _list_rows(captions: list[str], num_pictures: int, rates: FaultRates, rng: np.random.Generator) -> list[_Row]:
    """The rows of the URL list, in order; scenes alone have near copies, since pictures of 64 px show too little."""
    total = len(captions)
    counts = {kind: min(total, max(1, round(rate * total))) if rate else 0 for kind, rate in asdict(rates).items()}
    rows = [_Row("images", f"/images/{index}.jpg", caption, index) for index, caption in enumerate(captions)]
    special = iter(rng.permutation(total).tolist())
    for kind in KEPT:
        for _, index in zip(range(counts[kind]), special, strict=False):
            caption = (
                MESSES[index % len(MESSES)].format(captions[index]) if kind == "messy_caption" else captions[index]
            )
            rows[index] = _Row(kind, f"/{kind}/{index}.jpg", caption, index)
    for kind in OUTCOMES:
        for number, index in enumerate(rng.choice(total, counts[kind], replace=False).tolist()):
            rows.append(_faulty_row(kind, number, index, captions[index]))
    for index in rng.choice(total, counts["copy"], replace=False).tolist():
        rows.append(_Row("copy", f"/copy/{index}.jpg", rows[index].caption, index))
    near = min(counts["near"], total - num_pictures)
    for index in (num_pictures + rng.choice(max(1, total - num_pictures), near, replace=False)).tolist():
        rows.append(_Row("near", f"/near/{index}.jpg", rows[index].caption, index))
    for index in rng.choice(len(rows), counts["repeat"], replace=False).tolist():
        rows.append(replace(rows[index], kind="repeat"))
    return [rows[index] for index in rng.permutation(len(rows)).tolist()]


def _faulty_row(kind: str, number: int, index: int, caption: str) -> _Row:
    url = f"/{kind}/{index}.jpg"
    match kind:
        case "no_such_host":
            url = f"http://no-such-host-{number}.invalid/{index}.jpg"
        case "bad_url":
            url = BAD_URLS[number % len(BAD_URLS)].format(number)
        case "private_address":
            url = PRIVATE_URLS[number % len(PRIVATE_URLS)].format(number % 250)
        case "caption_length":
            caption = SHORT_CAPTIONS[number % len(SHORT_CAPTIONS)]
        case "caption_characters":
            caption = NOISE_CAPTIONS[number % len(NOISE_CAPTIONS)]
    return _Row(kind, url, caption, index, fault=kind)


def _expectations(rows: list[_Row], captions: list[str]) -> pa.Table:
    """What becomes of each row: repeated URLs first, then faults, then repeated bytes; the first of equals stays.

    Last come near-duplicates: of an image and its near copy, too, the first stays.
    """
    by_url: dict[str, int] = {}
    by_content: dict[tuple[int, bool], int] = {}
    by_picture: dict[int, int] = {}
    found: list[dict[str, Any]] = []
    for number, row in enumerate(rows):
        stage, reason = OUTCOMES[row.fault] if row.fault else (None, None)
        survivor = by_url.setdefault(row.url, number)
        if survivor != number:
            stage, reason = "dedup", "duplicate_url"
        elif not row.fault:
            survivor = by_content.setdefault((row.content, row.url.startswith("/near/")), number)
            if survivor != number:
                stage, reason = "dedup", "duplicate_bytes"
            else:
                survivor = by_picture.setdefault(row.content, number)
                if survivor != number:
                    stage, reason = "dedup", "near_duplicate"
        found.append(
            {
                "row": number,
                "kind": row.kind,
                "url": row.url,
                "caption": row.caption,
                "clean_caption": captions[row.content] if stage is None else None,
                "stage": stage,
                "reason": reason,
                "duplicate_of": survivor if survivor != number else None,
            }
        )
    text = dict.fromkeys(("kind", "url", "caption", "clean_caption", "stage", "reason"), pa.string())
    return pa.Table.from_pylist(found, schema=pa.schema({"row": pa.int64(), **text, "duplicate_of": pa.int64()}))


def child_environment() -> dict[str, str]:
    """Lets a child import this package wherever it runs, on one thread."""
    paths = (str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH"))
    return {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def main() -> None:
    """Draws a range of images, as `build_site` asks in processes of their own."""
    root, *arguments = json.loads(sys.argv[1])
    print(json.dumps(render_images(Path(root), *arguments)))


if __name__ == "__main__":
    main()
