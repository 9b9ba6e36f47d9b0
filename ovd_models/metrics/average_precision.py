"""Average precision and recall of a whole set with faster-coco-eval, a category at a time in bounded memory.

T IoU thresholds, R recall levels, K categories, S sizes of objects, L limits on the number of detections per image.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster

from ovd_models.metrics.records import Bools, Floats, GroundTruth, Ints, IouType, Predictions, contains

SIZES = ("all", "small", "medium", "large")
"""COCO's ranges of area: below 32 x 32, up to 96 x 96, and larger."""
THRESHOLDS = np.linspace(0.5, 0.95, 10)
LVIS_LIMIT = 300


@dataclass(frozen=True)
class Curves:
    """Precision at recall levels, and recall; -1 where a category has no object of a size."""

    precision: Floats
    """[T, R, K, S, L]"""
    recall: Floats
    """[T, K, S, L]"""
    limits: tuple[int, ...]

    def ap(self, threshold: float | None = None, size: str = "all", categories: Bools | Ints | None = None) -> float:
        """Mean AP of the categories that have objects, at the largest limit; -1 if there is none."""
        values = self.precision[..., SIZES.index(size), -1]
        if threshold is not None:
            values = values[np.isclose(THRESHOLDS, threshold)]
        return _mean(values if categories is None else values[:, :, categories])

    def ar(self, limit: int | None = None, size: str = "all") -> float:
        """Mean recall over IoU thresholds and categories; -1 if there is none."""
        column = -1 if limit is None else self.limits.index(limit)
        return _mean(self.recall[:, :, SIZES.index(size), column])

    def ap_of_categories(self, threshold: float | None = None, size: str = "all") -> Floats:
        """[K] AP; NaN for categories without objects."""
        values = self.precision[..., SIZES.index(size), -1]
        if threshold is not None:
            values = values[np.isclose(THRESHOLDS, threshold)]
        result: Floats = np.where(values < 0, np.nan, values).mean((0, 1))
        return result


def _mean(values: Floats) -> float:
    """As both official packages: over all values of categories with objects."""
    counted = values[values > -1]
    return float(counted.mean()) if len(counted) else -1.0


def accumulate(
    truth: GroundTruth,
    predictions: Predictions,
    kind: IouType,
    *,
    limits: Sequence[int] = (1, 10, 100),
    federated: bool = False,
) -> Curves:
    """Match predictions to objects and accumulate their curves by COCO's rules, or by LVIS's.

    Args:
        truth: all images of the set.
        predictions: of these images, at most as many of an image as the protocol allows, if it limits them over all
            categories; `limits` are for each category. Federated, those of `verified`.
        kind: boxes or masks.
        limits: ascending numbers of best detections of an image and category.
        federated: LVIS's rules (Gupta et al., 2019): unmatched predictions of a category that is not exhaustively
            annotated in the image are ignored.
    """
    shape = (len(THRESHOLDS), 101, len(truth.categories), len(SIZES), len(limits))
    precision, recall = -np.ones(shape), -np.ones((shape[0], *shape[2:]))
    for label, objects, found in by_category(truth, predictions):
        if len(objects):
            result = _evaluate_category(truth, predictions, label, objects, found, kind, limits, federated)
            precision[:, :, label], recall[:, label] = result["precision"][:, :, 0], result["recall"][:, 0]
    return Curves(precision, recall, tuple(limits))


def verified(truth: GroundTruth, predictions: Predictions) -> Predictions:
    """The predictions that LVIS counts: their category is annotated in their image, or known to be absent from it."""
    count = len(truth.categories)
    present = np.unique(truth.images * count + truth.labels)
    pairs = predictions.images * count + predictions.labels
    known = contains(present, pairs)
    if truth.negative is not None:
        known |= contains(truth.negative, pairs)
    return predictions.take(known)


def by_category(truth: GroundTruth, predictions: Predictions) -> Iterator[tuple[int, Ints, Ints]]:
    """Each category's index, and the numbers of its objects and predictions in their order."""
    edges = np.arange(len(truth.categories) + 1)
    order_A = np.argsort(truth.labels, kind="stable")
    order_P = np.argsort(predictions.labels, kind="stable")
    starts_A = np.searchsorted(truth.labels[order_A], edges)
    starts_P = np.searchsorted(predictions.labels[order_P], edges)
    for label in range(len(truth.categories)):
        yield (
            label,
            order_A[starts_A[label] : starts_A[label + 1]],
            order_P[starts_P[label] : starts_P[label + 1]],
        )


def _evaluate_category(
    truth: GroundTruth,
    predictions: Predictions,
    label: int,
    objects: Ints,
    found: Ints,
    kind: IouType,
    limits: Sequence[int],
    federated: bool,
) -> dict[str, Any]:
    """The library's arrays of one category, which sees the images of its objects and predictions alone."""
    images = np.unique(np.concatenate([truth.images[objects], predictions.images[found]]))
    category = {"id": 1, "name": truth.categories[label].name, "frequency": "f"}
    codes = images * len(truth.categories) + label
    absent = _marks(truth.negative, codes, federated)
    partial = _marks(truth.not_exhaustive, codes, federated)
    size_of = {image: tuple(truth.sizes[image].tolist()) for image in images.tolist()}
    dataset = {
        "images": [
            {
                "id": image,
                "height": size_of[image][0],
                "width": size_of[image][1],
                "neg_category_ids": absent[place],
                "not_exhaustive_category_ids": partial[place],
            }
            for place, image in enumerate(images.tolist())
        ],
        "categories": [category],
        "annotations": _entries(truth, objects, kind, size_of),
    }
    loaded = COCO(dataset, print_function=_silent)
    results = COCO({**dataset, "annotations": _entries(predictions, found, kind, size_of)}, print_function=_silent)
    evaluator = COCOeval_faster(loaded, results, kind, lvis_style=federated, print_function=_silent)
    evaluator.params.maxDets = list(limits)
    evaluator.evaluate()
    evaluator.accumulate()
    result: dict[str, Any] = evaluator.eval
    return result


def _marks(codes: Ints | None, pairs: Ints, federated: bool) -> list[list[int]]:
    marked = contains(codes, pairs) if federated and codes is not None else np.zeros(len(pairs), np.bool_)
    return [[1] if mark else [] for mark in marked.tolist()]


def _entries(
    columns: GroundTruth | Predictions, rows: Ints, kind: IouType, size_of: dict[int, tuple[int, int]]
) -> list[dict[str, Any]]:
    """Rows as the library's dictionaries; ids count from 1, since it takes 0 for no match."""
    images = columns.images[rows].tolist()
    entries = [
        {"id": number, "image_id": image, "category_id": 1, "bbox": box, "area": area}
        for number, image, box, area in zip(
            range(1, len(rows) + 1), images, columns.boxes[rows].tolist(), columns.areas[rows].tolist(), strict=True
        )
    ]
    if isinstance(columns, GroundTruth):
        extra: dict[str, list[Any]] = {"iscrowd": columns.crowd[rows].astype(int).tolist()}
    else:
        extra = {"score": columns.scores[rows].tolist(), "iscrowd": [0] * len(rows)}
    if kind == "segm" and len(rows):
        assert columns.masks is not None
        counts = columns.masks.take(rows).to_pylist()
        extra["segmentation"] = [
            {"size": list(size_of[image]), "counts": mask} for image, mask in zip(images, counts, strict=True)
        ]
    for name, values in extra.items():
        for entry, value in zip(entries, values, strict=True):
            entry[name] = value
    return entries


def _silent(*_: object) -> None:
    """Print nothing."""
