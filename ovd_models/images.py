"""Image files to upright RGB pictures; without torch, so that data tasks start fast and stay small."""

import io
from pathlib import Path

from PIL import Image, ImageOps

from ovd_models.errors import InputError

MAX_PIXELS = 100_000_000


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
    """An RGB, upright PIL image from a file's bytes; `name` stands in messages.

    Raises:
        InputError: the bytes are not a whole image, or it has more than `MAX_PIXELS` pixels.
    """
    try:
        image = Image.open(io.BytesIO(content))
    except (OSError, Image.DecompressionBombError) as error:
        raise InputError(f"{name}: not an image, expected JPEG, PNG, WebP or the like") from error
    with image:
        if image.width * image.height > MAX_PIXELS:
            raise InputError(f"{name}: {image.width} x {image.height} pixels, at most {MAX_PIXELS:,} are accepted")
        try:
            return ImageOps.exif_transpose(image).convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:
            raise InputError(f"{name}: broken image, expected a whole file ({error})") from error
