"""Decode fetched bytes: every body gives an upright sRGB JPEG without metadata, or the reason for its rejection."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_prep import storage, tables
from data_prep.pairs.rows import Rejection, append_columns, with_rejections
from ovd_models.images import ImageError, Picture, open_picture
from ovd_models.metadata import strip_jpeg

HASH_SIDE = 32
END_OF_IMAGE = b"\xff\xd9"
REDUCTIONS = ((8, cv2.IMREAD_REDUCED_COLOR_8), (4, cv2.IMREAD_REDUCED_COLOR_4), (2, cv2.IMREAD_REDUCED_COLOR_2))
REDUCTION_MARGIN = 1.5
"""A JPEG is decoded at a fraction of its size if that is exactly the target size or at least this many times as large;
closer to the target, the second reduction would lose detail."""


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """How images are decoded and stored."""

    max_pixels: int = 50_000_000
    """Images that declare more are rejected before any pixel is decoded."""
    max_side: int | None = None
    """Maximum longer side in pixels; larger images are reduced. None keeps every size."""
    jpeg_quality: int = 95
    """Quality of re-encoded images; upright RGB JPEG files of an allowed size keep their pixel data."""


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """An image as it will be stored, with the measures that the filters need."""

    content: bytes
    """JPEG, RGB, upright, without metadata."""
    image_id: str
    """SHA-256 of the content."""
    width: int
    height: int
    original_width: int
    """Upright width of the fetched image in pixels."""
    original_height: int
    phash: int
    """See `perceptual_hash`."""
    contrast: float
    """Standard deviation of the image reduced to 32 x 32, in grey levels of 255."""

    @property
    def size(self) -> int:
        """Bytes of the content."""
        return len(self.content)


def decode_body(content: bytes, config: DecodeConfig) -> Decoded | Rejection:
    """Decode one body. No body raises."""
    try:
        picture = open_picture(content, max_pixels=config.max_pixels)
        if picture.frames > 1:
            return Rejection("animated", f"{picture.frames} frames")
        return _normalize(picture, content, config)
    except ImageError as error:
        return Rejection(error.reason, str(error))
    except Exception as error:
        return Rejection("truncated", f"{type(error).__name__}: {error}")


def _normalize(picture: Picture, content: bytes, config: DecodeConfig) -> Decoded:
    size, image = picture.size, picture.image
    scale = min(1.0, (config.max_side or max(size)) / max(size))
    stored_size = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
    plain = image.format == "JPEG" and image.mode in ("RGB", "L") and picture.is_plain
    keep = plain and image.mode == "RGB" and stored_size == size
    if plain and _is_whole(content):
        pixels = _decode_jpeg(content, (HASH_SIDE, HASH_SIDE) if keep else stored_size, size)
    else:
        pixels = np.ascontiguousarray(np.asarray(picture.decode())[..., ::-1])
    if keep:
        content = strip_jpeg(content)
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
    """Whether a JPEG file ends with its end marker: OpenCV silently fills missing pixels with grey."""
    return jpeg.endswith(END_OF_IMAGE) or jpeg.rstrip(b"\0\r\n ").endswith(END_OF_IMAGE)


def _decode_jpeg(content: bytes, wanted: tuple[int, int], size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """BGR pixels at an eighth, quarter or half of the size where `REDUCTION_MARGIN` allows it, else at full size."""
    ratio = min(size[0] / wanted[0], size[1] / wanted[1])
    flag = next(
        (
            flag
            for part, flag in REDUCTIONS
            if ratio >= part * REDUCTION_MARGIN or size == (part * wanted[0], part * wanted[1])
        ),
        cv2.IMREAD_COLOR,
    )
    pixels = cv2.imdecode(np.frombuffer(content, np.uint8), flag | cv2.IMREAD_IGNORE_ORIENTATION)
    if pixels is None:
        raise ValueError("broken pixel data")
    return cast(npt.NDArray[np.uint8], pixels)


def _resize(pixels: npt.NDArray[np.uint8], size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Resize to a width and height; each pixel is the average of the area it covers."""
    return cast(npt.NDArray[np.uint8], cv2.resize(pixels, size, interpolation=cv2.INTER_AREA))


def perceptual_hash(grey: npt.NDArray[np.float32]) -> int:
    """64-bit pHash of a 32 x 32 grey image: which of its 8 x 8 lowest DCT coefficients exceed their median."""
    frequency, position = np.ogrid[:8, :HASH_SIDE]
    basis = np.cos(np.pi * (2 * position + 1) * frequency / (2 * HASH_SIDE)).astype(np.float32)
    lowest = basis @ grey @ basis.T
    return int.from_bytes(np.packbits(lowest > np.median(lowest)).tobytes(), "big")


def with_images(rows: pa.Table, results: Sequence[Decoded | Rejection | None]) -> pa.Table:
    """Append the columns of `Decoded` and its `size`, and record rejections; None stands for rows not fetched."""
    kinds = {"content": pa.large_binary(), "image_id": pa.string(), "size": pa.int64(), "contrast": pa.float32()}
    for name in ("width", "height", "original_width", "original_height", "phash"):
        kinds[name] = tables.SCHEMAS["pairs"].field(name).type
    images = [result if isinstance(result, Decoded) else None for result in results]
    columns = {
        name: pa.array([image and getattr(image, name) for image in images], kind) for name, kind in kinds.items()
    }
    rejections = [result if isinstance(result, Rejection) else None for result in results]
    return with_rejections(append_columns(rows, columns), "decode", rejections)
