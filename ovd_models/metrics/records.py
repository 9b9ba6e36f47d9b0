"""Ground truth and predictions as columns: a whole validation set in arrays, not in Python objects.

I images, K categories, A annotated objects, P predictions. Boxes are xywh in pixels here, as in COCO's files.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from faster_coco_eval import mask as rle

from ovd_models.errors import InputError

IouType = Literal["bbox", "segm"]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Category:
    """A category of the ground truth."""

    id: int
    name: str
    frequency: str = ""
    """LVIS's `r`, `c` or `f`, by the number of training images; empty if unknown."""
    split: str = ""
    """`base`, `novel`, or empty."""


@dataclass(frozen=True, kw_only=True)
class GroundTruth:
    """The annotated objects of a set."""

    origin: str
    """File or table, for messages."""
    image_ids: Ints
    """[I] ascending."""
    sizes: Ints
    """[I, 2] height and width in pixels."""
    categories: tuple[Category, ...]
    """K, by ascending id."""
    images: Ints
    """[A] index of each object's image."""
    labels: Ints
    """[A] index of its category."""
    boxes: Floats
    """[A, 4] xywh."""
    areas: Floats
    """[A] square pixels: of the mask where there is one."""
    crowd: Bools
    """[A] regions of many objects, which are neither to be found nor counted as wrong."""
    masks: pa.Array | None = None
    """[A] COCO RLE counts, empty without a mask; None if no object has one."""
    negative: Ints | None = None
    """Pairs of an image and a category known to be absent, as image * K + category, ascending; None if not given."""
    not_exhaustive: Ints | None = None
    """Pairs whose objects are not all annotated."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the K categories."""
        return tuple(category.name for category in self.categories)

    def only_categories(self, keep: Bools) -> "GroundTruth":
        """The same images and categories with the objects of some categories [K]."""
        return self.only_objects(keep[self.labels])

    def only_objects(self, keep: Bools) -> "GroundTruth":
        """The same images and categories with some of the objects [A]."""
        return replace(
            self,
            images=self.images[keep],
            labels=self.labels[keep],
            boxes=self.boxes[keep],
            areas=self.areas[keep],
            crowd=self.crowd[keep],
            masks=None if self.masks is None else self.masks.filter(pa.array(keep)),
        )

    def class_agnostic(self) -> "GroundTruth":
        """The same objects, all of one category."""
        one = (Category(1, "object"),)
        zeros = np.zeros_like(self.labels)
        return replace(self, categories=one, labels=zeros, negative=None, not_exhaustive=None)


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Scored boxes or masks; indices are those of a ground truth."""

    images: Ints
    """[P] index of each image."""
    labels: Ints
    """[P] index of each category."""
    boxes: Floats
    """[P, 4] xywh."""
    scores: Floats
    """[P] finite."""
    areas: Floats
    """[P] square pixels: of the box, or of the mask where the file has no boxes."""
    masks: pa.Array | None = None
    """[P] COCO RLE counts; None without masks."""

    def __len__(self) -> int:
        return len(self.scores)

    def take(self, rows: Ints | Bools) -> "Predictions":
        """Some of the predictions, by number or by mask."""
        rows = np.flatnonzero(rows) if rows.dtype == np.bool_ else rows
        return Predictions(
            images=self.images[rows],
            labels=self.labels[rows],
            boxes=self.boxes[rows],
            scores=self.scores[rows],
            areas=self.areas[rows],
            masks=None if self.masks is None else self.masks.take(pa.array(rows)),
        )

    def class_agnostic(self) -> "Predictions":
        """The same predictions, all of one category."""
        return replace(self, labels=np.zeros_like(self.labels))


def no_predictions() -> Predictions:
    """No prediction at all."""
    none = np.zeros(0, np.int64)
    return Predictions(images=none, labels=none, boxes=np.zeros((0, 4)), scores=np.zeros(0), areas=np.zeros(0))


def concatenate(parts: Sequence[Predictions]) -> Predictions:
    """Predictions one after the other; all have masks, or none has."""
    if not parts:
        return no_predictions()
    columns = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in ("images", "labels", "boxes", "scores", "areas")
    }
    masks = [part.masks for part in parts if part.masks is not None]
    return Predictions(**columns, masks=pa.concat_arrays(masks) if masks else None)


def limit_per_image(predictions: Predictions, limit: int) -> Predictions:
    """The `limit` best predictions of each image; of equal scores the first, in unchanged order."""
    return predictions.take(_best_of_each(predictions.images, predictions.scores, limit))


def limit_per_image_and_category(predictions: Predictions, limit: int) -> Predictions:
    """The `limit` best predictions of each category in each image."""
    width = int(predictions.labels.max(initial=0)) + 1
    return predictions.take(_best_of_each(predictions.images * width + predictions.labels, predictions.scores, limit))


def limit_per_category(predictions: Predictions, limit: int) -> Predictions:
    """The `limit` best predictions of each category in the whole set."""
    return predictions.take(_best_of_each(predictions.labels, predictions.scores, limit))


def _best_of_each(groups: Ints, scores: Floats, limit: int) -> Bools:
    order = np.lexsort((-scores, groups))  # stable
    sorted_groups = groups[order]
    starts = np.searchsorted(sorted_groups, sorted_groups, side="left")
    keep = np.zeros(len(groups), np.bool_)
    keep[order[np.arange(len(order)) - starts < limit]] = True
    return keep


def pair_codes(pairs: Iterable[tuple[int, int]], num_categories: int) -> Ints:
    """Pairs of image and category indices as ascending codes."""
    return np.array(sorted({image * num_categories + label for image, label in pairs}), np.int64)


def contains(codes: Ints, pairs: Ints) -> Bools:
    """Which of some pairs are among ascending codes."""
    if not len(codes):
        return np.zeros(len(pairs), np.bool_)
    at = np.minimum(np.searchsorted(codes, pairs), len(codes) - 1)
    return np.asarray(codes[at] == pairs)


# -------------------------------------------------------------------------------------------------------- from tables


def truth_of_rows(
    rows: Sequence[Mapping[str, Any]], categories: Sequence[Category], origin: str = "boxes"
) -> GroundTruth:
    """Rows of a `boxes` table as ground truth; boxes of categories outside `categories` are left out.

    Images are numbered by their row. The area of an object is that of its mask, or of its box without one.
    """
    ordered = tuple(sorted(categories, key=lambda category: category.id))
    index = {category.id: label for label, category in enumerate(ordered)}
    images: list[int] = []
    labels: list[int] = []
    boxes: list[Sequence[float]] = []
    crowd: list[bool] = []
    masks: list[str] = []
    areas: list[float] = []
    for number, row in enumerate(rows):
        given = row.get("masks") or [""] * len(row["boxes"])
        for box, key, many, mask in zip(row["boxes"], row["category_ids"], row["iscrowd"], given, strict=True):
            if key not in index:
                continue
            images.append(number)
            labels.append(index[key])
            boxes.append(box)
            crowd.append(many)
            masks.append(mask)
            size = [row["height"], row["width"]]
            areas.append(
                float(rle.area({"size": size, "counts": mask})) if mask else (box[2] - box[0]) * (box[3] - box[1])
            )
    pairs = {
        name: pair_codes(
            ((number, index[key]) for number, row in enumerate(rows) for key in row.get(name) or () if key in index),
            len(ordered),
        )
        for name in ("neg_category_ids", "not_exhaustive_category_ids")
    }
    return GroundTruth(
        origin=origin,
        image_ids=np.arange(len(rows)),
        sizes=np.array([(row["height"], row["width"]) for row in rows], np.int64).reshape(-1, 2),
        categories=ordered,
        images=np.array(images, np.int64),
        labels=np.array(labels, np.int64),
        boxes=xywh(np.array(boxes, np.float64).reshape(-1, 4)),
        areas=np.array(areas, np.float64),
        crowd=np.array(crowd, np.bool_),
        masks=pa.array(masks, pa.large_string()) if any(masks) else None,
        negative=pairs["neg_category_ids"] if any(row.get("neg_category_ids") for row in rows) else None,
        not_exhaustive=pairs["not_exhaustive_category_ids"],
    )


def predictions_of_rows(table: pa.Table, truth: GroundTruth, number_of: Mapping[int, int], origin: str) -> Predictions:
    """Rows of a `predictions` table.

    Args:
        table: any number of its rows, with `masks` or without.
        truth: whose indices to use.
        number_of: `source_id` -> index of an image of `truth`.
        origin: of the table, for messages.

    Raises:
        InputError: a row is of no image or category of the ground truth.
    """
    counts = table["scores"].combine_chunks().value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    sources = table["source_id"].to_pylist()
    unknown = next((source for source in sources if source not in number_of), None)
    if unknown is not None:
        raise InputError(f"{origin}: source_id {unknown}: not in {truth.origin}, expected its images")
    image_R = np.array([number_of[source] for source in sources], np.int64)
    ids = _flat(table, "category_ids").astype(np.int64)
    known = np.array([category.id for category in truth.categories], np.int64)
    labels = np.minimum(np.searchsorted(known, ids), max(0, len(known) - 1))
    if len(ids) and (not len(known) or (known[labels] != ids).any()):
        wrong = ids[known[labels] != ids][0] if len(known) else ids[0]
        raise InputError(f"{origin}: category_id {wrong}: not in {truth.origin}, expected its categories")
    boxes = table["boxes"].combine_chunks().flatten().flatten().to_numpy(zero_copy_only=False)
    found = xywh(boxes.astype(np.float64).reshape(-1, 4))
    masks = table["masks"].combine_chunks().flatten().cast(pa.large_string()) if "masks" in table.column_names else None
    return Predictions(
        images=np.repeat(image_R, counts),
        labels=labels,
        boxes=found,
        scores=_flat(table, "scores").astype(np.float64),
        areas=found[:, 2] * found[:, 3],
        masks=masks if masks is not None and len(masks) == len(ids) and len(ids) else None,
    )


def _flat(table: pa.Table, column: str) -> npt.NDArray[Any]:
    values: npt.NDArray[Any] = table[column].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return values


def xywh(boxes: Floats) -> Floats:
    """Corners [N, 4] as COCO's x, y, width and height."""
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def xyxy(boxes: Floats) -> Floats:
    """COCO's boxes [N, 4] as corners."""
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
