"""Average precision of a detector's detections, by base, novel and all categories."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from torch import Tensor

from ovd_models.batches import Detections
from ovd_models.errors import InputError
from ovd_models.metrics.average_precision import Curves, accumulate
from ovd_models.metrics.matching import match
from ovd_models.metrics.records import (
    Category,
    Floats,
    GroundTruth,
    IouType,
    Predictions,
    concatenate,
    limit_per_image,
    truth_of_rows,
    xywh,
)

Measure = Literal["ap50", "ap"]


@dataclass(frozen=True)
class CategoryResult:
    """Average precision of one category."""

    name: str
    split: str
    ap: float
    """Mean over IoU 0.50 to 0.95; NaN if the category has no box."""
    ap50: float
    """At IoU 0.50."""


@dataclass(frozen=True)
class DetectionMetrics:
    """Average precision by category and its means."""

    categories: tuple[CategoryResult, ...]

    def mean(self, measure: Measure, split: str | None = None) -> float:
        """Mean over the categories of a split that have boxes (all splits if None); NaN if there are none."""
        return _nanmean([getattr(entry, measure) for entry in self.categories if split in (None, entry.split)])

    def summary(self) -> dict[str, float]:
        """`ap50_base`, `ap50_novel`, `ap50_all`, `ap_base`, `ap_novel`, `ap_all`."""
        splits = {"base": "base", "novel": "novel", "all": None}
        measures: tuple[Measure, ...] = ("ap50", "ap")
        return {
            f"{measure}_{name}": self.mean(measure, split) for measure in measures for name, split in splits.items()
        }

    @property
    def headline(self) -> str:
        """Key of the summary that checkpoints are ranked by: AP50 of novel names, of all names if none is novel."""
        return "ap50_novel" if any(entry.split == "novel" for entry in self.categories) else "ap50_all"


def evaluate_detections(
    rows: Sequence[Mapping[str, Any]],
    detections: Sequence[Detections],
    names: Mapping[int, str],
    splits: Mapping[str, str],
    kind: IouType = "bbox",
) -> DetectionMetrics:
    """COCO's AP of boxes or of masks, up to 100 detections per image.

    Args:
        rows: of a `boxes` table.
        detections: of the same images, in the same order; their `names` are those of `names`.
        names: category id -> name.
        splits: `base` or `novel` by name.
        kind: boxes or masks; masks need one for every box and detection.

    Raises:
        InputError: a mask is missing.
    """
    truth = truth_of_rows(rows, [Category(key, name, split=splits[name]) for key, name in names.items()])
    found = predictions_of_detections(truth, detections)
    if kind == "segm":
        complete = truth.masks is not None and all(truth.masks.to_pylist())
        if (len(truth.labels) and not complete) or (len(found) and found.masks is None):
            raise InputError("masks: a box or a detection has none, expected a mask for each")
    return detection_metrics(truth, accumulate(truth, found, kind))


def detection_metrics(truth: GroundTruth, curves: Curves) -> DetectionMetrics:
    """Average precision of the categories of a ground truth."""
    values = zip(
        truth.categories, curves.ap_of_categories().tolist(), curves.ap_of_categories(0.5).tolist(), strict=True
    )
    return DetectionMetrics(tuple(CategoryResult(entry.name, entry.split, ap, ap50) for entry, ap, ap50 in values))


def predictions_of_detections(truth: GroundTruth, detections: Sequence[Detections]) -> Predictions:
    """Detections of the images of a ground truth, in their order, as columns; labels are found by name."""
    label_of = {name: label for label, name in enumerate(truth.names)}
    parts = []
    for image, entry in enumerate(detections):
        known = np.array([label_of[name] for name in entry.names], np.int64)
        boxes = xywh(entry.boxes.cpu().numpy().astype(np.float64).reshape(-1, 4))
        parts.append(
            Predictions(
                images=np.full(len(entry), image, np.int64),
                labels=known[entry.labels.cpu().numpy().astype(np.int64)],
                boxes=boxes,
                scores=entry.scores.cpu().numpy().astype(np.float64),
                areas=boxes[:, 2] * boxes[:, 3],
                masks=pa.array(entry.masks, pa.large_string()) if entry.masks else None,
            )
        )
    return concatenate(parts)


def evaluate_proposals(
    rows: Sequence[Mapping[str, Any]],
    proposals: Sequence[tuple[Tensor, Tensor]],
    category_ids: Collection[int],
    limits: Sequence[int],
) -> dict[int, float]:
    """COCO's average recall of class-agnostic boxes over IoU 0.50 to 0.95.

    Args:
        rows: of a `boxes` table.
        proposals: boxes [N, 4] and scores [N] of each image.
        category_ids: categories whose boxes are to be found.
        limits: numbers of best proposals per image.

    Returns:
        AR by limit; NaN if there is no box to find.
    """
    truth, found = _proposed(rows, proposals, category_ids)
    if not len(truth.labels):
        return dict.fromkeys(limits, float("nan"))
    curves = accumulate(truth, found, "bbox", limits=sorted(limits))
    return {limit: curves.ar(limit) for limit in limits}


def recall_by_image(
    rows: Sequence[Mapping[str, Any]], proposals: Sequence[tuple[Tensor, Tensor]], category_ids: Collection[int]
) -> tuple[Floats, Floats]:
    """AR@100 of `evaluate_proposals` by image: [I] found boxes, averaged over IoU thresholds, and [I] boxes to find."""
    truth, found = _proposed(rows, proposals, category_ids)
    matches = match(truth, limit_per_image(found, 100), "bbox")
    hit = np.bincount(matches.predictions.images, matches.hits.mean(0), minlength=len(rows))
    wanted = np.bincount(truth.images[matches.counted], minlength=len(rows))
    return hit.astype(np.float64), wanted.astype(np.float64)


def _proposed(
    rows: Sequence[Mapping[str, Any]], proposals: Sequence[tuple[Tensor, Tensor]], category_ids: Collection[int]
) -> tuple[GroundTruth, Predictions]:
    """Boxes of some categories, and proposals, as one category."""
    truth = truth_of_rows(rows, [Category(key, str(key)) for key in category_ids]).class_agnostic()
    parts = [
        Predictions(
            images=np.full(len(boxes), image, np.int64),
            labels=np.zeros(len(boxes), np.int64),
            boxes=xywh(boxes.cpu().numpy().astype(np.float64).reshape(-1, 4)),
            scores=scores.cpu().numpy().astype(np.float64),
            areas=np.zeros(len(boxes)),
        )
        for image, (boxes, scores) in enumerate(proposals)
    ]
    return truth, concatenate(parts)


def _nanmean(values: Any) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")
