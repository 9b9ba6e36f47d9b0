"""Mirroring and large-scale jitter of an image together with its boxes, masks and stored regions.

Imports no torch, so that data tasks start fast and stay small.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from faster_coco_eval import mask as rle
from PIL import Image

from ovd_models.errors import InputError
from ovd_models.images import fitted_size

Boxes = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
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
class ObjectMask:
    """An object's mask inside a box with whole coordinates, outside of which it is empty."""

    pixels: npt.NDArray[np.uint8]
    """[h, w] of 0 and 1."""
    left: int
    top: int

    @classmethod
    def decode(cls, counts: str, height: int, width: int) -> Self:
        """The mask of COCO RLE counts in an image of this size; empty for empty counts."""
        encoded = {"size": [height, width], "counts": counts}
        left, top, w, h = map(int, rle.toBbox(encoded)) if counts else (0, 0, 0, 0)
        whole = rle.decode(encoded) if w else np.zeros((height, width), np.uint8)
        return cls(whole[top : top + h, left : left + w], left, top)

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Its place, xyxy."""
        height, width = self.pixels.shape
        return self.left, self.top, self.left + width, self.top + height

    def mirrored(self, width: int) -> "ObjectMask":
        """The mask in an image of this width mirrored left to right."""
        return ObjectMask(self.pixels[:, ::-1], width - self.box[2], self.top)

    def sampled(self, rows: Integers, columns: Integers) -> "ObjectMask":
        """The mask in an image that consists of these rows and columns of the old one, both rising."""
        x0, y0, x1, y1 = self.box
        left, right = np.searchsorted(columns, (x0, x1)).tolist()
        top, bottom = np.searchsorted(rows, (y0, y1)).tolist()
        pixels = self.pixels[:, columns[left:right] - x0][rows[top:bottom] - y0]
        return ObjectMask(pixels, left, top)


@dataclass(frozen=True)
class AnnotatedImage:
    """An image with its annotations and stored regions."""

    pixels: npt.NDArray[np.uint8]
    """[H, W, 3] RGB."""
    boxes: Boxes
    """[N, 4] xyxy."""
    labels: npt.NDArray[np.int64]
    """[N]."""
    masks: Sequence[ObjectMask]
    """N, or none."""
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
    areas = np.array([np.count_nonzero(mask.pixels) for mask in image.masks], np.int64)
    kept = areas >= min_area
    masks = list(itertools.compress(image.masks, kept))
    return replace(image, boxes=image.boxes[kept], labels=image.labels[kept], masks=masks)


def mirror(image: AnnotatedImage) -> AnnotatedImage:
    """The image mirrored left to right."""
    width = image.pixels.shape[1]
    masks = [mask.mirrored(width) for mask in image.masks]
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
    crop = np.ascontiguousarray(image.pixels[top : top + crop_h, left : left + crop_w])
    resized = cv2.resize(crop, (size_w, size_h), interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR)
    margins = (0, side - size_h, 0, side - size_w)
    canvas = np.asarray(cv2.copyMakeBorder(resized, *margins, cv2.BORDER_CONSTANT, value=FILL), np.uint8)

    scale = np.array([size_w / crop_w, size_h / crop_h], np.float32)
    boxes, _ = move_boxes(image.boxes, (left, top), scale, (size_w, size_h))
    regions, visible = move_boxes(image.regions, (left, top), scale, (size_w, size_h))
    kept = np.minimum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]) >= 1
    rows, columns = top + nearest(crop_h, size_h), left + nearest(crop_w, size_w)
    masks = [mask.sampled(rows, columns) for mask in itertools.compress(image.masks, kept)]
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


def fit_longer_side(pixels: npt.NDArray[np.uint8], side: int) -> npt.NDArray[np.uint8]:
    """[H, W, 3] resized to a longer side of `side` pixels as SAM resizes its inputs; 0 leaves it as it is."""
    if side in (0, max(pixels.shape)):
        return pixels
    height, width = fitted_size(pixels.shape[0], pixels.shape[1], side)
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))


def nearest(old: int, new: int) -> Integers:
    """[new] the pixel of a row of `old` pixels at the centre of each pixel when the row is resized."""
    return (2 * np.arange(new) + 1) * old // (2 * new)


# ----------------------------------------------------------------------------------------------------------- table rows

PIXELS = pa.schema({"image": pa.binary(), "height": pa.int64(), "width": pa.int64()})
MASKS = pa.schema({"masks": pa.list_(pa.binary()), "mask_boxes": pa.list_(pa.int64())})


def object_masks(counts: Sequence[str], image: Image.Image) -> list[ObjectMask]:
    """The masks of an image's COCO RLE counts."""
    return [ObjectMask.decode(entry, image.height, image.width) for entry in counts]


def pixel_row(pixels: npt.NDArray[np.uint8]) -> dict[str, object]:
    """A row of `PIXELS`: raw [H, W, 3], height and width."""
    return {"image": pixels.tobytes(), "height": pixels.shape[0], "width": pixels.shape[1]}


def mask_row(masks: Sequence[ObjectMask]) -> dict[str, object]:
    """A row of `MASKS`: for each object the raw [h, w] of its mask, and flat xyxy of its place."""
    return {
        "masks": [mask.pixels.tobytes() for mask in masks],
        "mask_boxes": list(itertools.chain.from_iterable(mask.box for mask in masks)),
    }
