"""Decode fetched bytes: every body ends as an upright RGB JPEG without metadata, or as a reason why not."""

import io
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import imagehash
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, ImageFile

from data_prep import storage, tables
from ovd_models.images import FORMATS, has_image_magic, orientation, to_rgb, upright

SIDEWAYS = (
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90,
)  # fmt: skip
"""Turns that exchange width and height."""
HASH_SIDE = 32  # imagehash reduces to this size; doing it here lets the contrast share the work


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """How images are decoded and stored."""

    max_pixels: int = 50_000_000
    """Images that declare more are rejected before any pixel is decoded."""
    max_side: int | None = None
    """Longer images are reduced to this longer side, in pixels; None keeps every size."""
    jpeg_quality: int = 95
    """For images that have to be encoded anew; upright RGB JPEG files of an allowed size keep their pixel data."""


class Rejection(NamedTuple):
    """Why a row is not kept."""

    reason: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """An image as it will be stored, and what the filters need to know of it."""

    content: bytes
    """JPEG, RGB, upright, without metadata."""
    width: int
    height: int
    original_width: int
    """As found, upright, in pixels."""
    original_height: int
    phash: int
    """64-bit perceptual hash of `imagehash.phash`."""
    contrast: float
    """Standard deviation of the image reduced to 32 x 32, in grey levels of 255."""


def decode(content: bytes, config: DecodeConfig) -> Decoded | Rejection:
    """Decode one body; never raises for its sake."""
    if not has_image_magic(content):
        return Rejection("not_an_image", f"starts with {content[:16]!r}")
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    except Image.DecompressionBombError as error:
        return Rejection("too_many_pixels", str(error))
    except Exception as error:
        return Rejection("not_an_image", f"{type(error).__name__}: {error}")
    if image.width * image.height > config.max_pixels:
        return Rejection("too_many_pixels", f"{image.width} x {image.height}, at most {config.max_pixels} pixels")
    if frames > 1:
        return Rejection("animated", f"{frames} frames")
    try:
        return _store(image, content, config)
    except Exception as error:
        return Rejection("truncated", f"{type(error).__name__}: {error}")


def _store(image: ImageFile.ImageFile, content: bytes, config: DecodeConfig) -> Decoded:
    turn = orientation(image)
    size = image.size[::-1] if turn in SIDEWAYS else image.size
    scale = min(1.0, (config.max_side or max(size)) / max(size))
    stored_size = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
    keep = image.format == "JPEG" and image.mode == "RGB" and turn is None and stored_size == size
    if scale < 1 and image.format == "JPEG":  # decode at a half, quarter or eighth where that leaves detail enough
        width, height = stored_size if size == image.size else stored_size[::-1]
        image.draft(None, (2 * width, 2 * height))
    image.load()
    pixels = to_rgb(upright(image))
    if pixels.size != stored_size:
        pixels = pixels.resize(stored_size, Image.Resampling.LANCZOS)
    if keep:
        content = strip_metadata(content)
    else:
        buffer = io.BytesIO()
        Image.fromarray(np.asarray(pixels)).save(buffer, "JPEG", quality=config.jpeg_quality)
        content = buffer.getvalue()
    grey = pixels.convert("L").resize((HASH_SIDE, HASH_SIDE), Image.Resampling.LANCZOS)
    return Decoded(
        content=content,
        width=stored_size[0],
        height=stored_size[1],
        original_width=size[0],
        original_height=size[1],
        phash=int(str(imagehash.phash(grey)), 16),
        contrast=float(np.asarray(grey).std()),
    )


def strip_metadata(jpeg: bytes) -> bytes:
    """A JPEG file without EXIF, XMP, colour profile and comments; its pixel data stays as it is.

    Only the JFIF header and Adobe's colour transform remain of the application segments.
    """
    position, kept = 2, [jpeg[:2]]
    while position + 4 <= len(jpeg) and jpeg[position] == 0xFF:
        marker = jpeg[position + 1]
        if marker == 0xFF:  # padding
            position += 1
            continue
        if marker == 0xDA:  # the scan: pixel data follows
            break
        stop = position + 2 + struct.unpack_from(">H", jpeg, position + 2)[0]
        if not (0xE1 <= marker <= 0xED or marker == 0xEF or marker == 0xFE):
            kept.append(jpeg[position:stop])
        position = stop
    kept.append(jpeg[position:])
    return b"".join(kept)


def decode_rows(rows: pa.Table, config: DecodeConfig) -> pa.Table:
    """Table rows with fetched `content` -> the same rows with what is stored, or why there is nothing.

    Adds the columns of `Decoded` and `image_id`; `stage`, `reason` and `detail` tell of failures, earlier ones stay.
    """
    results = [
        Rejection("", "") if content is None else decode(content, config) for content in rows["content"].to_pylist()
    ]
    images = [result if isinstance(result, Decoded) else None for result in results]
    failures = [result if isinstance(result, Rejection) and result.reason else None for result in results]
    columns = {
        "content": pa.array([image and image.content for image in images], pa.large_binary()),
        "image_id": pa.array([image and storage.sha256(image.content) for image in images], pa.string()),
        "contrast": pa.array([image and image.contrast for image in images], pa.float32()),
    }
    for name in ("width", "height", "original_width", "original_height", "phash"):
        kind = tables.SCHEMAS["pairs"].field(name).type
        columns[name] = pa.array([image and getattr(image, name) for image in images], kind)
    rows = rows.drop_columns(["content"])
    for name, column in columns.items():
        rows = rows.append_column(name, column)
    return with_failures(rows, "decode", failures)


def with_failures(rows: pa.Table, stage: str, failures: Sequence[Rejection | None]) -> pa.Table:
    """Enter what a stage rejects into `stage`, `reason` and `detail`; rows without a failure stay as they are."""
    told = {
        "stage": [failure and stage for failure in failures],
        "reason": [failure and failure.reason for failure in failures],
        "detail": [failure and failure.detail for failure in failures],
    }
    for name, values in told.items():
        position = rows.schema.get_field_index(name)
        rows = rows.set_column(position, name, pc.coalesce(pa.array(values, pa.string()), rows[name]))
    return rows
