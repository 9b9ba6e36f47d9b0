"""Decode fetched bytes: every body ends as an upright RGB JPEG without metadata, or as a reason why not."""

import io
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, ImageFile

from data_prep import storage, tables
from ovd_models.images import FORMATS, has_image_magic, orientation, to_rgb, upright

SIDEWAYS = (
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90,
)  # fmt: skip
"""Turns that exchange width and height."""
HASH_SIDE = 32
END_OF_IMAGE = b"\xff\xd9"
REDUCTIONS = ((8, cv2.IMREAD_REDUCED_COLOR_8), (4, cv2.IMREAD_REDUCED_COLOR_4), (2, cv2.IMREAD_REDUCED_COLOR_2))
REDUCTION_MARGIN = 1.5
"""A JPEG is decoded at a fraction of its size if that is the wanted one or still so many times it: between, detail is
lost when it is reduced once more."""


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
    image_id: str
    """SHA-256 of the content."""
    width: int
    height: int
    original_width: int
    """As found, upright, in pixels."""
    original_height: int
    phash: int
    """See `perceptual_hash`."""
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
    if image.format == "JPEG" and image.mode in ("RGB", "L") and turn is None and _is_whole(content):
        pixels = _decode_jpeg(content, (HASH_SIDE, HASH_SIDE) if keep else stored_size, size)
    else:
        pixels = np.ascontiguousarray(np.asarray(to_rgb(upright(image)))[..., ::-1])
    if keep:
        content = strip_metadata(content)
    else:
        if stored_size != pixels.shape[1::-1]:
            pixels = _resize(pixels, stored_size)
        _, encoded = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, config.jpeg_quality])
        content = encoded.tobytes()
    small = _resize(pixels, (HASH_SIDE, HASH_SIDE))
    grey = cv2.cvtColor(small, cv2.COLOR_BGR2GRAY).astype(np.float32)
    return Decoded(
        content=content,
        image_id=storage.sha256(content),
        width=stored_size[0],
        height=stored_size[1],
        original_width=size[0],
        original_height=size[1],
        phash=perceptual_hash(grey),
        contrast=float(grey.std()),
    )


def _is_whole(jpeg: bytes) -> bool:
    """Whether a JPEG file ends with its end marker: OpenCV fills what is missing with grey and does not tell."""
    return jpeg.endswith(END_OF_IMAGE) or jpeg.rstrip(b"\0\r\n ").endswith(END_OF_IMAGE)


def _decode_jpeg(content: bytes, wanted: tuple[int, int], size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """BGR pixels at an eighth, quarter or half of the size where that leaves enough of them, else at full size."""
    ratio = min(size[0] / wanted[0], size[1] / wanted[1])
    fits = (
        flag
        for part, flag in REDUCTIONS
        if ratio >= part * REDUCTION_MARGIN or size == (part * wanted[0], part * wanted[1])
    )
    flag = next(fits, cv2.IMREAD_COLOR)
    pixels = cv2.imdecode(np.frombuffer(content, np.uint8), flag | cv2.IMREAD_IGNORE_ORIENTATION)
    if pixels is None:
        raise ValueError("broken pixel data")
    return cast(npt.NDArray[np.uint8], pixels)


def _resize(pixels: npt.NDArray[np.uint8], size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Pixels of another width and height, each the average of what it covers."""
    return cast(npt.NDArray[np.uint8], cv2.resize(pixels, size, interpolation=cv2.INTER_AREA))


def perceptual_hash(grey: npt.NDArray[np.float32]) -> int:
    """64-bit pHash of a 32 x 32 grey image: which of its 8 x 8 lowest DCT coefficients exceed their median."""
    frequency, position = np.ogrid[:8, :HASH_SIDE]
    basis = np.cos(np.pi * (2 * position + 1) * frequency / (2 * HASH_SIDE)).astype(np.float32)
    lowest = basis @ grey @ basis.T
    return int.from_bytes(np.packbits(lowest > np.median(lowest)).tobytes(), "big")


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


def with_images(rows: pa.Table, results: Sequence[Decoded | Rejection | None]) -> pa.Table:
    """Table rows with what is stored of their pictures, or why there is nothing; None where nothing was fetched.

    Adds the columns of `Decoded` and `size`, the bytes of the content; `stage`, `reason` and `detail` tell of failures,
    earlier ones stay.
    """
    images = [result if isinstance(result, Decoded) else None for result in results]
    columns = {
        "content": pa.array([image and image.content for image in images], pa.large_binary()),
        "image_id": pa.array([image and image.image_id for image in images], pa.string()),
        "size": pa.array([image and len(image.content) for image in images], pa.int64()),
        "contrast": pa.array([image and image.contrast for image in images], pa.float32()),
    }
    for name in ("width", "height", "original_width", "original_height", "phash"):
        kind = tables.SCHEMAS["pairs"].field(name).type
        columns[name] = pa.array([image and getattr(image, name) for image in images], kind)
    for name, column in columns.items():
        rows = rows.append_column(name, column)
    return with_failures(rows, "decode", [result if isinstance(result, Rejection) else None for result in results])


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
