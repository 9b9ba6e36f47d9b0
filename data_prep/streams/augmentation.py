"""What happens to a training image, and to everything that lies on it: one draw, applied to all of it together.

Nothing here imports torch: the data tasks start fast and stay small.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
from faster_coco_eval import mask as rle

from ovd_models.errors import InputError

Boxes = npt.NDArray[np.float32]
FILL = (124, 116, 104)
"""Colour beside a picture smaller than its canvas: the mean that detectors subtract, so it becomes zero."""


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Mirroring and large-scale jitter."""

    flip_probability: float = 0.0
    """How often an image is mirrored left to right."""
    side: int = 0
    """Sides of the square canvas that jittered images are put on, in pixels; 0 leaves sizes as they are."""
    scales: tuple[float, float] = (0.1, 2.0)
    """Range of the jitter: the longer side becomes so many times `side`, and what stands out is cut off."""
    min_visible: float = 0.5
    """Part of a stored region that must stay in view for its embedding to be learnt."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 <= self.flip_probability <= 1 or not 0 <= self.min_visible <= 1:
            raise InputError(
                f"flip_probability {self.flip_probability}, min_visible {self.min_visible}: expected 0 to 1"
            )
        if self.side < 0 or not 0 < self.scales[0] <= self.scales[1]:
            raise InputError(f"side {self.side}, scales {self.scales}: expected 0 or more, and a range above 0")


@dataclass(frozen=True)
class Annotated:
    """An image and what lies on it."""

    pixels: npt.NDArray[np.uint8]
    """[H, W, 3] RGB."""
    boxes: Boxes
    """[N, 4] xyxy."""
    labels: npt.NDArray[np.int64]
    """[N]."""
    masks: Sequence[str]
    """N COCO RLE counts, or none."""
    regions: Boxes
    """[M, 4] xyxy of the stored regions."""
    valid: npt.NDArray[np.bool_]
    """[M] which of them can be learnt from."""


def augment(image: Annotated, augmentation: Augmentation, rng: np.random.Generator) -> Annotated:
    """Mirror, then jitter; annotated boxes, masks and stored regions move together, once.

    Boxes cut down to nothing are left out; regions of which too little stays in view are marked as not valid.
    """
    if rng.random() < augmentation.flip_probability:
        image = mirror(image)
    return jitter(image, augmentation, rng) if augmentation.side else image


def mirror(image: Annotated) -> Annotated:
    """The image left to right."""
    height, width = image.pixels.shape[:2]
    masks = [_encode(_decode(counts, height, width)[:, ::-1]) for counts in image.masks]
    return Annotated(
        image.pixels[:, ::-1],
        flip_boxes(image.boxes, width),
        image.labels,
        masks,
        flip_boxes(image.regions, width),
        image.valid,
    )


def flip_boxes(boxes: Boxes, width: int) -> Boxes:
    """[N, 4] xyxy boxes of an image mirrored left to right."""
    return np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)


def jitter(image: Annotated, augmentation: Augmentation, rng: np.random.Generator) -> Annotated:
    """Large-scale jitter (Ghiasi et al., 2021): a random part at a random size on a square canvas."""
    side, (height, width) = augmentation.side, image.pixels.shape[:2]
    factor = side * rng.uniform(*augmentation.scales) / max(height, width)
    # The part that will be seen is cut out first: enlarging the rest would be wasted.
    part_h, part_w = (max(1, min(edge, round(side / factor))) for edge in (height, width))
    top, left = int(rng.integers(height - part_h + 1)), int(rng.integers(width - part_w + 1))
    size_h, size_w = (max(1, min(side, round(edge * factor))) for edge in (part_h, part_w))
    window = (slice(top, top + part_h), slice(left, left + part_w))

    canvas = np.full((side, side, 3), FILL, np.uint8)
    smaller = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
    canvas[:size_h, :size_w] = cv2.resize(
        np.ascontiguousarray(image.pixels[window]), (size_w, size_h), interpolation=smaller
    )
    scale = np.array([size_w / part_w, size_h / part_h], np.float32)
    boxes, _ = move_boxes(image.boxes, (left, top), scale, (size_w, size_h))
    regions, visible = move_boxes(image.regions, (left, top), scale, (size_w, size_h))
    kept = np.minimum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]) >= 1
    masks = []
    for counts, keep in zip(image.masks, kept.tolist(), strict=bool(image.masks)):
        if keep:
            mask = np.zeros((side, side), np.uint8)
            part = np.ascontiguousarray(_decode(counts, height, width)[window])
            mask[:size_h, :size_w] = cv2.resize(part, (size_w, size_h), interpolation=cv2.INTER_NEAREST)
            masks.append(_encode(mask))
    valid = image.valid & (visible >= max(augmentation.min_visible, 1e-6))
    return Annotated(canvas, boxes[kept], image.labels[kept], masks, regions, valid)


def move_boxes(
    boxes: Boxes, corner: tuple[int, int], scale: npt.NDArray[np.float32], size: tuple[int, int]
) -> tuple[Boxes, npt.NDArray[np.float32]]:
    """Boxes of an image as boxes of a part of it, resized.

    Args:
        boxes: [N, 4] xyxy.
        corner: left and top of the part.
        scale: [2] of x and y.
        size: width and height of the resized part, to which the boxes are cut.

    Returns:
        [N, 4] xyxy, and [N] the part of each box's area that is in view.
    """
    moved = (boxes.reshape(-1, 2, 2) - np.array(corner, np.float32)) * scale
    inside = np.clip(moved, 0, np.array(size, np.float32))
    areas = [np.prod(np.maximum(entry[:, 1] - entry[:, 0], 0), axis=1) for entry in (inside, moved)]
    return inside.reshape(-1, 4).astype(np.float32), (areas[0] / np.maximum(areas[1], 1e-9)).astype(np.float32)


def _decode(counts: str, height: int, width: int) -> npt.NDArray[np.uint8]:
    """[H, W] of 0 and 1; nothing for empty counts."""
    if not counts:
        return np.zeros((height, width), np.uint8)
    decoded: npt.NDArray[np.uint8] = rle.decode({"size": [height, width], "counts": counts})
    return decoded


def _encode(mask: npt.NDArray[np.uint8]) -> str:
    counts: bytes = rle.encode(np.asfortranarray(mask))["counts"]
    return counts.decode()
