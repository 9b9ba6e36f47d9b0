"""Average precision of detections, by base, novel and all categories, with faster-coco-eval.

T IoU thresholds, R recall levels, K categories, L limits on the number of detections.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from torch import Tensor

from ovd_models.batches import Detections
from ovd_models.errors import InputError

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


def coco_truth(rows: Sequence[Mapping[str, Any]], names: Mapping[int, str]) -> dict[str, Any]:
    """Rows of a `boxes` table as COCO json, without boxes of categories outside `names` (by category id)."""
    annotations: list[dict[str, Any]] = []
    for number, row in enumerate(rows):
        masks = row.get("masks") or [""] * len(row["boxes"])
        for box, category, crowd, mask in zip(row["boxes"], row["category_ids"], row["iscrowd"], masks, strict=True):
            if category in names:
                _, _, width, height = bbox = _xywh(box)
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": number,
                        "category_id": category,
                        "bbox": bbox,
                        "area": width * height,
                        "iscrowd": int(crowd),
                        **_segmentation(row, mask),
                    }
                )
    return {
        "images": [{"id": n, "width": row["width"], "height": row["height"]} for n, row in enumerate(rows)],
        "categories": [{"id": key, "name": name} for key, name in names.items()],
        "annotations": annotations,
    }


def _xywh(box: Sequence[float]) -> list[float]:
    x0, y0, x1, y1 = box
    return [x0, y0, x1 - x0, y1 - y0]


def _segmentation(row: Mapping[str, Any], counts: str) -> dict[str, Any]:
    """COCO's field for a mask in an image of the row's size; empty without a mask."""
    return {"segmentation": {"size": [row["height"], row["width"]], "counts": counts}} if counts else {}


def evaluate_detections(
    rows: Sequence[Mapping[str, Any]],
    detections: Sequence[Detections],
    names: Mapping[int, str],
    splits: Mapping[str, str],
    kind: Literal["bbox", "segm"] = "bbox",
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
    truth, masked = coco_truth(rows, names), kind == "segm"
    if masked and not (
        all("segmentation" in entry for entry in truth["annotations"])
        and all(entry.masks is not None for entry in detections)
    ):
        raise InputError("masks: a box or a detection has none, expected a mask for each")
    ids = {name: key for key, name in names.items()}
    results = [
        {
            "image_id": number,
            "category_id": ids[found["label"]],
            "bbox": _xywh(found["box"]),
            "score": found["score"],
            **(_segmentation(rows[number], mask) if masked else {}),
        }
        for number, entry in enumerate(detections)
        for found, mask in zip(entry.to_list(), entry.masks or [""] * len(entry), strict=True)
    ]
    if not results:
        annotated = {entry["category_id"] for entry in truth["annotations"] if not entry["iscrowd"]}
        zeros = {key: 0.0 if key in annotated else float("nan") for key in names}
        return DetectionMetrics(tuple(CategoryResult(n, splits[n], zeros[k], zeros[k]) for k, n in names.items()))
    evaluator = _accumulate(truth, results, kind)
    # [IoU thresholds, recalls, categories, areas, limits]: all areas, 100 detections; -1 for no box.
    precision_TRK = np.asarray(evaluator.eval["precision"])[:, :, :, 0, -1]
    precision_TRK = np.where(precision_TRK < 0, np.nan, precision_TRK)
    column = {int(key): precision_TRK[:, :, k] for k, key in enumerate(evaluator.params.catIds)}
    return DetectionMetrics(
        tuple(
            CategoryResult(name, splits[name], _nanmean(column[key]), _nanmean(column[key][0]))
            for key, name in names.items()
        )
    )


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
    truth = coco_truth(rows, dict.fromkeys(category_ids, "object"))
    for annotation in truth["annotations"]:
        annotation["category_id"] = 1
    truth["categories"] = [{"id": 1, "name": "object"}]
    results = [
        {"image_id": number, "category_id": 1, "bbox": _xywh(box), "score": score}
        for number, (boxes, scores) in enumerate(proposals)
        for box, score in zip(boxes.tolist(), scores.tolist(), strict=True)
    ]
    if not truth["annotations"] or not results:
        return dict.fromkeys(limits, 0.0 if truth["annotations"] else float("nan"))
    evaluator = _accumulate(truth, results, "bbox", limits)
    recall_TL = np.asarray(evaluator.eval["recall"])[:, 0, 0, :]  # [IoU thresholds, categories, areas, limits]
    return {limit: float(recall_TL[:, column].mean()) for column, limit in enumerate(limits)}


def _accumulate(
    truth: dict[str, Any], results: list[dict[str, Any]], kind: Literal["bbox", "segm"], limits: Sequence[int] = ()
) -> COCOeval_faster:
    """COCO's evaluation with its `eval` filled."""
    loaded = COCO(truth, print_function=lambda *_: None)
    evaluator = COCOeval_faster(loaded, loaded.loadRes(results), kind, print_function=lambda *_: None)
    if limits:
        evaluator.params.maxDets = list(limits)
    evaluator.evaluate()
    evaluator.accumulate()
    return evaluator


def _nanmean(values: Any) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")
