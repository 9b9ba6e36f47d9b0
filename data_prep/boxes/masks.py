"""Segmentations of annotation files as COCO RLE."""

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from faster_coco_eval import mask as rle

from data_prep.boxes.cleaning import Fate

POLYGON_NUMBERS = 6
"""A polygon of fewer has no area; the RLE library would take four numbers as a box."""
SHORT = 16
"""Numbers of a polygon whose points are compared."""
FARTHEST = 10
"""Points farther outside than so many times the image's longer side are a mistake; their outlines would fill memory."""
EMPTY = b"", b"null", b"[]", b"{}", b"[[]]", b'""'
Finding = tuple[Fate, str]
DEGENERATE: Finding = "left out", "polygons of fewer than three points, or of half a point"
FAR: Finding = "left out", "polygons far outside their image"
FLAT: Finding = "mended", "polygons without the list around them"
FLOAT_COUNTS: Finding = "mended", "run lengths written as fractions"


class RunLengths(msgspec.Struct):
    """A mask in COCO's run-length encoding, compressed or not."""

    size: tuple[float, float]
    counts: str | list[float]


def encode_mask(segmentation: msgspec.Raw, height: int, width: int) -> tuple[str, Sequence[Finding]]:
    """COCO RLE counts of polygons or of an RLE, empty without a mask, and what was odd about it.

    Raises:
        ValueError: it is neither, or does not fit the image.
    """
    if bytes(segmentation) in EMPTY:
        return "", ()
    shape = msgspec.json.decode(segmentation, type=list[list[float] | float] | RunLengths)
    if isinstance(shape, list):
        return encode_polygons(shape, height, width)
    size = [int(side) for side in shape.size]
    if size != [height, width]:
        raise ValueError(f"mask of {size[0]} x {size[1]} in an image of {height} x {width}")
    if isinstance(shape.counts, str):
        merged: dict[str, Any] = {"size": size, "counts": shape.counts}
    else:
        whole = [int(count) for count in shape.counts]
        if whole != shape.counts or min(whole, default=0) < 0:
            raise ValueError("run lengths that are not whole numbers of 0 or more")
        merged = rle.frPyObjects({"size": size, "counts": whole}, height, width)
    rle.decode(merged)  # raises if the counts do not fit the size
    fractions = not isinstance(shape.counts, str) and b"." in bytes(segmentation)
    return _text(merged["counts"]), [FLOAT_COUNTS] if fractions else ()


def encode_polygons(shape: Sequence[list[float] | float], height: int, width: int) -> tuple[str, Sequence[Finding]]:
    """`encode_mask` of polygons: lists of x and y in turn, or one such list alone."""
    parts = [part for part in shape if isinstance(part, list)]
    odd: list[Finding] = []
    if len(parts) < len(shape):
        if parts:
            raise ValueError("numbers beside lists, expected polygons")
        parts, odd = [[value for value in shape if not isinstance(value, list)]], [FLAT]
    polygons, far = [], FARTHEST * max(height, width)
    for part in parts:
        if len(part) < POLYGON_NUMBERS or len(part) % 2 or (len(part) <= SHORT and _points(part) < 3):
            odd.append(DEGENERATE)
        elif max(part) > far or min(part) < -far:
            odd.append(FAR)
        else:
            polygons.append(part)
    if not polygons:
        return "", odd
    return _text(rle.merge(rle.frPyObjects(polygons, height, width))["counts"]), odd


def _points(part: Sequence[float]) -> int:
    return len(set(zip(part[::2], part[1::2], strict=True)))


def encode_pixels(mask: npt.NDArray[np.bool_]) -> str:
    """COCO RLE counts of a mask [H, W]."""
    return _text(rle.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"])


def mask_box(counts: str, height: int, width: int) -> list[float]:
    """The box of a mask: x, y, width and height."""
    return [float(value) for value in rle.toBbox({"size": [height, width], "counts": counts})]


def _text(counts: bytes | str) -> str:
    return counts.decode() if isinstance(counts, bytes) else counts
