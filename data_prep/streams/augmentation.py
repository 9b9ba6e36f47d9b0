"""Mirroring and large-scale jitter of an image together with its boxes, masks and stored regions.

Imports no torch, so that data tasks start fast and stay small.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
import numpy.typing as npt
from faster_coco_eval import mask as rle

from ovd_models.errors import InputError

Boxes = npt.NDArray[np.float32]
FILL = (124, 116, 104)
"""Padding colour: the mean that detectors subtract, so it becomes zero."""


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Mirroring and large-scale jitter."""

    flip_probability: float = 0.0
    """Probability that an image is mirrored left to right."""
    side: int = 0
    """Side in pixels of the square canvas that jittered images are put on; 0 turns jitter off."""
    scales: tuple[float, float] = (0.1, 2.0)
    """Range of the jitter: the longer side becomes this many times `side`, and the image is cropped to the canvas."""
    min_visible: float = 0.5
    """Share of a stored region's area that must stay in view for its embedding to be used."""
    min_mask_area: int = 0
    """Objects whose mask has fewer pixels after jitter are left out."""

    def __post_init__(self) -> None:
        if not 0 <= self.flip_probability <= 1 or not 0 <= self.min_visible <= 1:
            raise InputError(
                f"flip_probability {self.flip_probability}, min_visible {self.min_visible}: expected 0 to 1"
            )
        if self.side < 0 or not 0 < self.scales[0] <= self.scales[1]:
            raise InputError(f"side {self.side}, scales {self.scales}: expected 0 or more, and a range above 0")


AS_IS = Augmentation()
"""Neither mirrored nor jittered."""


@dataclass(frozen=True)
class AnnotatedImage:
    """An image with its annotations and stored regions."""

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
    """[M] False for padding, and for regions out of view."""


NO_REGIONS = (np.zeros((0, 4), np.float32), np.zeros(0, np.bool_))
"""The stored regions of an image without any, and which are valid."""


def augment(image: AnnotatedImage, augmentation: Augmentation, rng: np.random.Generator) -> AnnotatedImage:
    """Mirror, then jitter; boxes, masks and stored regions move with the pixels.

    Boxes out of view are left out; regions with less than `min_visible` in view are marked as not valid.
    """
    if rng.random() < augmentation.flip_probability:
        image = mirror(image)
    if augmentation.side:
        image = jitter(image, augmentation, rng)
    return drop_small_masks(image, augmentation.min_mask_area) if augmentation.min_mask_area else image


def drop_small_masks(image: AnnotatedImage, min_area: int) -> AnnotatedImage:
    """The image without objects whose mask has fewer than `min_area` pixels."""
    size = list(image.pixels.shape[:2])
    areas = np.array([rle.area({"size": size, "counts": counts}) for counts in image.masks], np.int64)
    kept = areas >= min_area
    masks = list(itertools.compress(image.masks, kept))
    return replace(image, boxes=image.boxes[kept], labels=image.labels[kept], masks=masks)


def mirror(image: AnnotatedImage) -> AnnotatedImage:
    """The image mirrored left to right."""
    height, width = image.pixels.shape[:2]
    masks = [_encode(_decode(counts, height, width)[:, ::-1]) for counts in image.masks]
    boxes, regions = flip_boxes(image.boxes, width), flip_boxes(image.regions, width)
    return replace(image, pixels=image.pixels[:, ::-1], boxes=boxes, masks=masks, regions=regions)


def flip_boxes(boxes: Boxes, width: int) -> Boxes:
    """[N, 4] xyxy boxes of an image mirrored left to right."""
    return np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)


def jitter(image: AnnotatedImage, augmentation: Augmentation, rng: np.random.Generator) -> AnnotatedImage:
    """Large-scale jitter (Ghiasi et al., 2021): a random crop at a random size on a square canvas."""
    side, (height, width) = augmentation.side, image.pixels.shape[:2]
    factor = side * rng.uniform(*augmentation.scales) / max(height, width)
    # Crop first: enlarging the rest would be wasted.
    crop_h, crop_w = (max(1, min(edge, round(side / factor))) for edge in (height, width))
    top, left = int(rng.integers(height - crop_h + 1)), int(rng.integers(width - crop_w + 1))
    size_h, size_w = (max(1, min(side, round(edge * factor))) for edge in (crop_h, crop_w))
    window = (slice(top, top + crop_h), slice(left, left + crop_w))

    canvas = np.full((side, side, 3), FILL, np.uint8)
    interpolation = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
    crop = np.ascontiguousarray(image.pixels[window])
    canvas[:size_h, :size_w] = cv2.resize(crop, (size_w, size_h), interpolation=interpolation)
    scale = np.array([size_w / crop_w, size_h / crop_h], np.float32)
    boxes, _ = move_boxes(image.boxes, (left, top), scale, (size_w, size_h))
    regions, visible = move_boxes(image.regions, (left, top), scale, (size_w, size_h))
    kept = np.minimum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]) >= 1
    masks = []
    for counts, keep in zip(image.masks, kept.tolist(), strict=bool(image.masks)):
        if keep:
            mask = np.zeros((side, side), np.uint8)
            crop = np.ascontiguousarray(_decode(counts, height, width)[window])
            mask[:size_h, :size_w] = cv2.resize(crop, (size_w, size_h), interpolation=cv2.INTER_NEAREST)
            masks.append(_encode(mask))
    valid = image.valid & (visible >= max(augmentation.min_visible, 1e-6))
    return AnnotatedImage(canvas, boxes[kept], image.labels[kept], masks, regions, valid)


def move_boxes(
    boxes: Boxes, corner: tuple[int, int], scale: npt.NDArray[np.float32], size: tuple[int, int]
) -> tuple[Boxes, npt.NDArray[np.float32]]:
    """Boxes of an image in the coordinates of a resized crop of it.

    Args:
        boxes: [N, 4] xyxy.
        corner: left and top of the crop.
        scale: [2] scale of x and y.
        size: width and height of the resized crop, to which the boxes are cut.

    Returns:
        [N, 4] xyxy, and [N] the share of each box's area that is in view.
    """
    moved = (boxes.reshape(-1, 2, 2) - np.array(corner, np.float32)) * scale
    inside = np.clip(moved, 0, np.array(size, np.float32))
    visible, whole = (np.prod(np.maximum(box[:, 1] - box[:, 0], 0), axis=1) for box in (inside, moved))
    return inside.reshape(-1, 4).astype(np.float32), (visible / np.maximum(whole, 1e-9)).astype(np.float32)


def _decode(counts: str, height: int, width: int) -> npt.NDArray[np.uint8]:
    """[H, W] of 0 and 1; all 0 for empty counts."""
    if not counts:
        return np.zeros((height, width), np.uint8)
    decoded: npt.NDArray[np.uint8] = rle.decode({"size": [height, width], "counts": counts})
    return decoded


def _encode(mask: npt.NDArray[np.uint8]) -> str:
    counts: bytes = rle.encode(np.asfortranarray(mask))["counts"]
    return counts.decode()
