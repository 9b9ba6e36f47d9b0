"""Convert any image to the tensor that models take, in the same way for training, evaluation and serving.

Detectors resize and normalise it themselves (`detectors/resizing.py`).
"""

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ovd_models.errors import InputError
from ovd_models.images import decode_image, open_image, to_rgb, upright

ImageLike = str | Path | bytes | Image.Image | npt.NDArray[np.uint8] | Tensor


def to_tensor(image: ImageLike) -> Tensor:
    """[3, H, W] uint8 RGB, upright.

    Args:
        image: a path, the bytes of a file, a PIL image, an array [H, W, 3] or [H, W] uint8, or a tensor [3, H, W]
            uint8. Nothing is downloaded: an address is no path.

    Raises:
        InputError: it is none of these, it has no pixels, or the file cannot be decoded.
    """
    if isinstance(image, Tensor):
        if image.ndim != 3 or image.shape[0] != 3 or image.dtype != torch.uint8:
            raise InputError(f"image tensor: {image.dtype} {list(image.shape)}, expected uint8 [3, H, W]")
        if not image.numel():
            raise InputError(f"image tensor: {list(image.shape)}, expected at least one pixel")
        return image
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
            raise InputError(f"image array: {image.dtype} {list(image.shape)}, expected uint8 [H, W, 3] or [H, W]")
        return to_tensor(Image.fromarray(image))
    if isinstance(image, Image.Image):
        if not image.width * image.height:
            raise InputError(f"image: {image.width} x {image.height}, expected at least one pixel")
        pixels = np.array(to_rgb(upright(image)))
        return to_tensor(torch.from_numpy(pixels).permute(2, 0, 1).contiguous())
    return to_tensor(decode_image(image) if isinstance(image, bytes) else open_image(image))


def add_edge(image: Tensor, side: int, pixels: int = 1) -> Tensor:
    """Pad the shorter side of an extremely long image at its end, so that `pixels` of it remain at size `side`."""
    height, width = image.shape[-2:]
    least = math.ceil(pixels * max(height, width) / side)
    return F.pad(image, (0, max(0, least - width), 0, max(0, least - height)))
