"""The pictogram world as a local web site: captioned images and their URL list, with the web's faults mixed in.

Row by row it is known what a crawl must keep or reject, so the site tests the crawler and feeds the demo.

`build_site` writes its files; `webserver.serve_site` serves them.
"""

import io
import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data_prep.pictograms.world import PICTURES, SCENES, World, encode_jpeg
from data_prep.progress import Progress

IMAGES_PER_FOLDER = 1000


class Fault(NamedTuple):
    """A kind of bad row."""

    rate: float
    """Rows as a share of the good rows."""
    stage: str
    """Stage of a crawl that rejects it."""
    reason: str
    """One of `tables.REASONS[stage]`."""


FAULTS: dict[str, Fault] = {
    "missing": Fault(0.005, "fetch", "http_status"), "gone": Fault(0.002, "fetch", "http_status"),
    "server_error": Fault(0.002, "fetch", "http_status"), "hangs": Fault(0.001, "fetch", "timeout"),
    "disconnects": Fault(0.002, "fetch", "connect"), "no_such_host": Fault(0.002, "fetch", "dns"),
    "bad_url": Fault(0.003, "fetch", "bad_url"), "private_address": Fault(0.002, "fetch", "forbidden_address"),
    "redirect_private": Fault(0.002, "fetch", "forbidden_address"),
    "redirect_metadata": Fault(0.002, "fetch", "forbidden_address"), "redirect_file": Fault(0.001, "fetch", "bad_url"),
    "redirect_loop": Fault(0.002, "fetch", "too_many_redirects"), "too_large": Fault(0.002, "fetch", "too_large"),
    "opt_out": Fault(0.005, "fetch", "opt_out"), "html": Fault(0.005, "decode", "not_an_image"),
    "svg": Fault(0.003, "decode", "not_an_image"), "corrupt": Fault(0.005, "decode", "not_an_image"),
    "truncated": Fault(0.005, "decode", "truncated"), "bomb": Fault(0.003, "decode", "too_many_pixels"),
    "animated": Fault(0.003, "decode", "animated"), "too_small": Fault(0.005, "filter", "too_small"),
    "aspect": Fault(0.003, "filter", "aspect"), "blank": Fault(0.003, "filter", "blank"),
    "caption_length": Fault(0.004, "filter", "caption_length"),
    "caption_characters": Fault(0.004, "filter", "caption_characters"),
}  # fmt: skip
"""Bad rows, on top of the good ones, whose outcome does not depend on other rows."""
KEPT = {"flaky": 0.005, "wrong_type": 0.005, "redirects": 0.005, "messy_caption": 0.005}
"""Rates of good rows that need care: a 500 first, HTML's content type, redirects, markup in the caption."""
DUPLICATES = {"copy": 0.01, "repeat": 0.01, "near": 0.01}
"""Rates of rows with another row's bytes, its URL, or its image enlarged and compressed again."""
RATES = KEPT | {kind: fault.rate for kind, fault in FAULTS.items()} | DUPLICATES
"""All rates; any above 0 gives at least one row."""

BODIES: dict[str, str] = {
    "html": "text/html", "svg": "image/svg+xml", "corrupt": "image/jpeg", "bomb": "image/png",
    "animated": "image/gif", "too_small": "image/jpeg", "aspect": "image/jpeg", "blank": "image/jpeg",
}  # fmt: skip
"""Faults with a fixed body, and its content type."""

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
    rates: Mapping[str, float] | None = None,
    processes: int | None = None,
) -> pa.Table:
    """Write the site's files below `root`; the same arguments give the same bytes.

    Captions of small pictures (64 px, one or two objects) name every object; those of scenes (128 px, two to five
    objects) are loose. `rates` holds those that differ from `RATES`; by default one process a core renders.

    Returns:
        The outcomes a crawl must give, as in `root/expected.parquet`: one row for each row of the URL list, in order,
        with `row`, `kind`, `url` (relative to the site unless absolute), `caption` (raw), `clean_caption`, `stage`
        and `reason` (null for rows to keep) and `duplicate_of` (the surviving row).

    Raises:
        ValueError: `rates` has an unknown kind.
    """
    if rates and not rates.keys() <= RATES.keys():
        raise ValueError(f"rates {sorted(rates)}: expected some of {sorted(RATES)}")
    root, total = Path(root), num_pictures + num_scenes
    chunk = max(400, -(-total // (processes or os.cpu_count() or 1)))
    jobs = [(root, start, min(start + chunk, total), num_pictures, seed) for start in range(0, total, chunk)]
    progress = Progress("web site", "images", total)
    if len(jobs) < 2:
        parts = [list(render_images(*job)) for job in jobs]
    else:
        with ThreadPoolExecutor(len(jobs)) as pool:
            parts = list(pool.map(partial(_render_elsewhere, progress), jobs))
    progress.end()
    for kind, body in _fault_bodies().items():
        _write(root / "bodies" / kind, body)
    captions = [caption for part in parts for caption in part]
    rows = _list_rows(captions, num_pictures, {**RATES, **(rates or {})}, np.random.default_rng([seed, 2]))
    expected = _expectations(rows, captions)
    pq.write_table(expected, root / "expected.parquet")
    return expected


def render_images(root: Path, start: int, stop: int, num_pictures: int, seed: int) -> Iterator[str]:
    """Draw images `start` to `stop` as JPEG files and yield their captions; each depends on seed and index alone."""
    world = World.create(seed)
    for index in range(start, stop):
        rng = np.random.default_rng([seed, 1, index])
        style, caption = (PICTURES, world.caption) if index < num_pictures else (SCENES, world.loose_caption)
        scene = world.scene(rng, style)
        while not len(scene.labels):
            scene = world.scene(rng, style)
        _write(image_path(root, index), encode_jpeg(scene.pixels))
        yield caption(rng, scene)


def _render_elsewhere(progress: Progress, job: tuple[Path, int, int, int, int]) -> list[str]:
    """`render_images` in a fresh interpreter; the caller's threads may make forking unsafe."""
    command = [sys.executable, "-m", "data_prep.pictograms.website", json.dumps([str(job[0]), *job[1:]])]
    captions: list[str] = []
    with subprocess.Popen(command, env=child_environment(), stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            captions.append(json.loads(line))
            progress.add(1)
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, command)
    return captions


def image_path(root: Path, index: int) -> Path:
    """The file of image `index`."""
    return root / "images" / f"{index // IMAGES_PER_FOLDER:03d}" / f"{index:06d}.jpg"


def near_copy(jpeg: bytes) -> bytes:
    """The same picture, enlarged and compressed again."""
    with Image.open(io.BytesIO(jpeg)) as image:
        return encode_jpeg(image.resize((2 * image.width, 2 * image.height), Image.Resampling.BICUBIC), quality=90)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _fault_bodies() -> dict[str, bytes]:
    """The content of each of `BODIES`."""

    def noise(height: int, width: int, rng: np.random.Generator | None = None) -> npt.NDArray[np.uint8]:
        return (rng or np.random.default_rng(0)).integers(0, 255, (height, width, 3), dtype=np.uint8)

    rng = np.random.default_rng(0)
    first, second = (Image.fromarray(noise(64, 64, rng)) for _ in range(2))
    animation = io.BytesIO()
    first.save(animation, "GIF", save_all=True, append_images=[second], duration=100)
    return {
        "html": b"<!DOCTYPE html><html><body><h1>Not found</h1></body></html>",
        "svg": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"/>',
        "corrupt": b"\xff\xd8\xff\xe0" + np.random.default_rng(0).bytes(2000),
        "bomb": png_bomb(30_000, 30_000),
        "animated": animation.getvalue(),
        "too_small": encode_jpeg(noise(20, 20)),
        "aspect": encode_jpeg(noise(40, 300)),
        "blank": encode_jpeg(np.full((64, 64, 3), 200, np.uint8)),
    }


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
    """Key of `FAULTS`; a repeated row has the fault of the row it repeats."""


def _list_rows(
    captions: list[str], num_pictures: int, rates: Mapping[str, float], rng: np.random.Generator
) -> list[_Row]:
    """The rows of the URL list, in order; only scenes have near copies, since pictures of 64 px show too little."""
    total = len(captions)
    counts = {kind: min(total, max(1, round(rate * total))) if rate else 0 for kind, rate in rates.items()}
    rows = [_Row("images", f"/images/{index}.jpg", caption, index) for index, caption in enumerate(captions)]
    special = iter(rng.permutation(total).tolist())
    for kind in KEPT:
        for _, index in zip(range(counts[kind]), special, strict=False):
            frame = MESSES[index % len(MESSES)] if kind == "messy_caption" else "{}"
            rows[index] = _Row(kind, f"/{kind}/{index}.jpg", frame.format(captions[index]), index)
    for kind in FAULTS:
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
    """The outcome of each row: repeated URLs first, then faults, repeated bytes, near copies; the first row stays."""
    firsts: dict[tuple[str, Any], int] = {}
    outcomes: list[dict[str, Any]] = []
    for number, row in enumerate(rows):
        stage, reason = FAULTS[row.fault][1:] if row.fault else (None, None)
        keys: list[tuple[str, Any]] = [("duplicate_url", row.url)]
        if not row.fault:
            near = row.url.startswith("/near/")
            keys += [("duplicate_bytes", (row.content, near)), ("near_duplicate", row.content)]
        for key in keys:
            survivor = firsts.setdefault(key, number)
            if survivor != number:
                stage, reason = "dedup", key[0]
                break
        outcomes.append(
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
    return pa.Table.from_pylist(outcomes, schema=pa.schema({"row": pa.int64(), **text, "duplicate_of": pa.int64()}))


def child_environment() -> dict[str, str]:
    """The environment of a child process: it can import this package, and uses one thread."""
    paths = (str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH"))
    return {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def main() -> None:
    """Draw a range of images, and print a caption a line; `build_site` runs this in child processes."""
    root, *arguments = json.loads(sys.argv[1])
    for caption in render_images(Path(root), *arguments):
        print(json.dumps(caption))


if __name__ == "__main__":
    main()
