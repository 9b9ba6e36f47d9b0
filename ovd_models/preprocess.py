"""One way from any image to the tensor that models take, for training, evaluation and serving.

Resizing and normalisation are the detector's own (`rcnn.py`), so that they cannot differ between the three.
"""

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ovd_models.errors import InputError

ImageLike = str | Path | Image.Image | npt.NDArray[np.uint8] | Tensor
MAX_PIXELS = 100_000_000


def to_tensor(image: ImageLike) -> Tensor:
    """[3, H, W] uint8 RGB, upright.

    Args:
        image: a path, a PIL image, an array [H, W, 3] or [H, W] uint8, or a tensor [3, H, W] uint8.

    Raises:
        InputError: it is none of these, or the file cannot be decoded.
    """
    if isinstance(image, Tensor):
        if image.ndim != 3 or image.shape[0] != 3 or image.dtype != torch.uint8:
            raise InputError(f"image tensor: {image.dtype} {list(image.shape)}, expected uint8 [3, H, W]")
        return image
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
            raise InputError(f"image array: {image.dtype} {list(image.shape)}, expected uint8 [H, W, 3] or [H, W]")
        return to_tensor(Image.fromarray(image))
    if isinstance(image, Image.Image):
        upright = ImageOps.exif_transpose(image).convert("RGB")
        return torch.from_numpy(np.array(upright)).permute(2, 0, 1).contiguous()
    return to_tensor(open_image(image))


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
