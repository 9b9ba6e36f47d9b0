"""Image files to upright RGB pictures; without torch, so that data tasks start fast and stay small."""

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from ovd_models.errors import InputError

MAX_PIXELS = 100_000_000
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "MPO")
"""Formats that are decoded; Pillow knows others, some of which start programs."""
MAGIC: tuple[tuple[int, bytes], ...] = (
    (0, b"\xff\xd8\xff"), (0, b"\x89PNG\r\n\x1a\n"), (0, b"GIF8"), (8, b"WEBP"), (0, b"BM"), (0, b"II*\0"),
    (0, b"MM\0*"), (4, b"ftypavif"),
)  # fmt: skip
"""Offset and first bytes of these formats."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""EXIF orientation -> what undoes it."""


def has_image_magic(content: bytes) -> bool:
    """Whether a file begins like one of `FORMATS`: a cheap check before decoding."""
    return any(content[offset : offset + len(magic)] == magic for offset, magic in MAGIC)


def open_image(path: str | Path) -> Image.Image:
    """An RGB, upright PIL image.

    Raises:
        InputError: there is no such file, it is not an image, or it has too many pixels.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}), expected an image file") from error
    return decode_image(content, str(path))


def decode_image(content: bytes, name: str = "image") -> Image.Image:
    """An RGB, upright PIL image from a file's bytes; `name` is used in error messages.

    Raises:
        InputError: the bytes are not a whole image, or it has more than `MAX_PIXELS` pixels.
    """
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise InputError(f"{name}: too many pixels, at most {MAX_PIXELS:,} are accepted") from error
    except Exception as error:  # Pillow's plugins raise anything
        raise InputError(f"{name}: not an image, expected JPEG, PNG, WebP or the like") from error
    with image:
        if image.width * image.height > MAX_PIXELS:
            raise InputError(f"{name}: {image.width} x {image.height} pixels, at most {MAX_PIXELS:,} are accepted")
        try:
            return to_rgb(upright(image))
        except Exception as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{name}: broken image, expected a whole file ({reason})") from error


def orientation(image: Image.Image) -> Image.Transpose | None:
    """The transposition that makes a picture upright by its EXIF orientation; None if it is."""
    return TURNS.get(image.getexif().get(0x0112, 1))


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height after `upright`, without decoding the picture."""
    width, height = image.size
    return (height, width) if orientation(image) in [TURNS[code] for code in (5, 6, 7, 8)] else (width, height)


def upright(image: Image.Image) -> Image.Image:
    """The picture turned by its EXIF orientation; metadata that holds the orientation is then dropped."""
    turn = orientation(image)
    if turn is None:
        return image
    turned = image.transpose(turn)
    for name in ("exif", "xmp", "XML:com.adobe.xmp"):  # otherwise it would be turned again
        turned.info.pop(name, None)
    return turned


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode as 8-bit RGB: transparency over white, 16-bit and float greys scaled to 8 bits."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_scale_deep(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _scale_deep(values: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
    """Greys of more than 8 bits as 8 bits: 16-bit integers by their range, floats by their own extremes."""
    deep = values.astype(np.float64)
    if np.issubdtype(values.dtype, np.floating):
        low, high = (float(deep.min()), float(deep.max())) if deep.size else (0.0, 0.0)
        deep = (deep - low) / (high - low or 1.0) * 65535
    return np.asarray(np.clip(np.rint(deep / 257), 0, 255), np.uint8)


def fitted_size(height: int, width: int, side: int) -> tuple[int, int]:
    """Height and width resized to a longer side of `side` pixels, rounded as SAM does; at least 1."""
    scale = side / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))
