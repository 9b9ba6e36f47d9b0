"""Inputs of a teacher: whole images, and crops of boxes, as squares of its input size.

Only `crop_squares`, which teachers call, imports torch, so that data tasks start fast and stay small.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from ovd_models.errors import InputError

Fit = Literal["warp", "pad", "centre"]
"""How an image becomes a square: stretched, padded, or cropped at its centre as in CLIP's own preprocessing."""
Colour = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class CropConfig:
    """The crops of a box."""

    scales: tuple[float, ...] = (1.0, 1.5)
    """Sizes of the crops relative to the box, about its centre; their embeddings are summed (ViLD, section 3.3)."""
    fit: Fit = "warp"

    def __post_init__(self) -> None:
        if not self.scales or not all(scale > 0 for scale in self.scales):
            raise InputError(f"--crops.scales {self.scales}: expected one or more numbers above 0")


def crop_windows(boxes_N4: npt.NDArray[np.float32], scale: float, width: int, height: int) -> npt.NDArray[np.int64]:
    """Windows of whole pixels around boxes scaled about their centres.

    Rounded outwards, clipped to the image, and never empty: a box without area gives the pixel that it lies on.
    Boxes, which are finite, and windows are [N, 4] xyxy in pixels.
    """
    low_N2, high_N2 = np.split(boxes_N4.reshape(-1, 4).astype(np.float64), 2, axis=1)
    centre_N2, half_N2 = (low_N2 + high_N2) / 2, (high_N2 - low_N2) / 2 * scale
    limit = np.array([width, height])
    first = np.floor(np.clip(centre_N2 - half_N2, 0, limit - 1))
    last = np.ceil(np.clip(centre_N2 + half_N2, 0, limit))
    return np.concatenate([first, np.maximum(last, first + 1)], axis=1).astype(np.int64)


FITS: dict[str, Fit] = {"squash": "warp", "shortest": "centre", "longest": "pad"}
"""A CLIP's `resize_mode` -> how an image becomes a square."""


def square(image: Image.Image, side: int, fit: Fit, margin: Colour = (0, 0, 0)) -> npt.NDArray[np.uint8]:
    """[side, side, 3] pixels of an RGB image, by bicubic resampling with antialiasing.

    `centre` equals torchvision's `Resize(side)` and `CenterCrop(side)`; `pad` surrounds the image with `margin`.
    """
    width, height = image.size
    new_width, new_height = _fitted((width, height), side, fit)
    x, y = (_outside(edge, side) for edge in (new_width, new_height))
    if fit == "pad":
        fitted = Image.new("RGB", (side, side), margin)
        fitted.paste(image.resize((new_width, new_height), Image.Resampling.BICUBIC), (-x, -y))
    else:
        # Resample only what stays inside: for a box one pixel wide, the rest would be a thousand times as much.
        scale_x, scale_y = new_width / width, new_height / height
        visible = (x / scale_x, y / scale_y, min((x + side) / scale_x, width), min((y + side) / scale_y, height))
        fitted = image.resize((side, side), Image.Resampling.BICUBIC, box=visible)
    return np.asarray(fitted)


def _fitted(edges: tuple[int, int], side: int, fit: Fit) -> tuple[int, int]:
    """Both edges after scaling both (`warp`), the shorter (`centre`) or the longer one (`pad`) to `side` pixels."""
    first, second = edges
    if fit == "warp":
        return side, side
    if fit == "centre":
        return int(side * first / min(edges)), int(side * second / min(edges))
    return max(1, round(side * first / max(edges))), max(1, round(side * second / max(edges)))


def _outside(edge: int, side: int) -> int:
    """Pixels of an edge before the square; negative for a margin. Rounds half pixels as torchvision's `CenterCrop`."""
    return round((edge - side) / 2.0) if edge >= side else -((side - edge) // 2)


def crop_squares(
    pixels_HW3: npt.NDArray[np.uint8],
    windows: Sequence[Sequence[int]],
    side: int,
    fit: Fit,
    margin: Colour = (0, 0, 0),
) -> npt.NDArray[np.uint8]:
    """[N, side, side, 3] pixels of N windows (xyxy, whole pixels inside the image), fitted as by `square`.

    Torch resamples faster than Pillow, and within 2 of 255 levels of it where the image is smooth. Sharp edges differ
    more in windows higher than wide, because Pillow reduces their height first.
    """
    import torch
    from torch.nn.functional import interpolate

    pixels_HW3 = np.require(pixels_HW3, requirements="W")  # torch shares the memory and warns if it is read-only
    squares_NSS3 = np.empty((len(windows), side, side, 3), np.uint8)
    for row, (x0, y0, x1, y1) in enumerate(windows):
        edges, window_hw3 = (y1 - y0, x1 - x0), pixels_HW3[y0:y1, x0:x1]
        if fit == "centre" and max(edges) > 3 * min(edges):  # torch would also resample the rest
            squares_NSS3[row] = square(Image.fromarray(window_hw3), side, fit)
            continue
        height, width = _fitted(edges, side, fit)
        y, x = (_outside(edge, side) for edge in (height, width))
        # Views are numpy's: each call into torch releases the GIL, which another thread would take.
        window_13hw = torch.from_numpy(window_hw3.transpose(2, 0, 1)[None])
        fitted_13hw = interpolate(window_13hw, (height, width), mode="bicubic", antialias=True)
        fitted_hw3 = fitted_13hw.numpy()[0].transpose(1, 2, 0)
        if fit == "pad":
            squares_NSS3[row] = margin
            squares_NSS3[row, -y : height - y, -x : width - x] = fitted_hw3
        else:
            squares_NSS3[row] = fitted_hw3[y : y + side, x : x + side]
    return squares_NSS3
