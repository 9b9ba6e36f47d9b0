"""Average precision of detections, by base, novel and all categories, with faster-coco-eval."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from torch import Tensor

from ovd_models.batches import Detections
from ovd_models.errors import InputError


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

    def mean(self, value: str, split: str | None = None) -> float:
        """Mean of `ap` or `ap50` over the categories of a split that have boxes (all splits if None); NaN if none."""
        chosen = [getattr(entry, value) for entry in self.categories if split in (None, entry.split)]
        return float(np.nanmean(chosen)) if np.isfinite(chosen).any() else float("nan")

    def summary(self) -> dict[str, float]:
        """`ap50_base`, `ap50_novel`, `ap50_all`, `ap_base`, `ap_novel`, `ap_all`."""
        splits = {"base": "base", "novel": "novel", "all": None}
        return {
            f"{value}_{name}": self.mean(value, split) for value in ("ap50", "ap") for name, split in splits.items()
        }

    @property
    def headline(self) -> str:
        """Key of the summary by which checkpoints compete: novel AP50, or that of all where no name is novel."""
        return "ap50_novel" if any(entry.split == "novel" for entry in self.categories) else "ap50_all"


def coco_truth(rows: Sequence[Mapping[str, Any]], names: Mapping[int, str]) -> dict[str, Any]:
    """Rows of a `boxes` table as COCO json; boxes of categories outside `names` are left out.

    Args:
        rows: of a `boxes` table.
        names: category id -> name.
    """
    annotations: list[dict[str, Any]] = []
    for number, row in enumerate(rows):
        masks = row.get("masks") or [""] * len(row["boxes"])
        for box, category, crowd, mask in zip(row["boxes"], row["category_ids"], row["iscrowd"], masks, strict=True):
            if category in names:
                x0, y0, x1, y1 = box
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": number,
                        "category_id": category,
                        "bbox": [x0, y0, x1 - x0, y1 - y0],
                        "area": (x1 - x0) * (y1 - y0),
                        "iscrowd": int(crowd),
                        **_segmentation(row, mask),
                    }
                )
    return {
        "images": [{"id": n, "width": row["width"], "height": row["height"]} for n, row in enumerate(rows)],
        "categories": [{"id": key, "name": name} for key, name in names.items()],
        "annotations": annotations,
    }


def _segmentation(row: Mapping[str, Any], counts: str) -> dict[str, Any]:
    """COCO's field for a mask in an image of the row's size; nothing without a mask."""
    return {"segmentation": {"size": [row["height"], row["width"]], "counts": counts}} if counts else {}


def evaluate_detections(
    rows: Sequence[Mapping[str, Any]],
    found: Sequence[Detections],
    names: Mapping[int, str],
    splits: Mapping[str, str],
    kind: Literal["bbox", "segm"] = "bbox",
) -> DetectionMetrics:
    """COCO's AP of boxes or of masks, up to 100 detections an image.

    Args:
        rows: of a `boxes` table.
        found: detections of the same images, in the same order; their `names` are those of `names`.
        names: category id -> name.
        splits: `base` or `novel` by name.
        kind: what is compared; masks must be there on both sides.

    Raises:
        InputError: a mask is missing.
    """
    if kind == "segm" and not _all_masked(rows, found, names):
        raise InputError("masks: a box or a detection has none, expected a mask for each")
    ids = {name: key for key, name in names.items()}
    results = [
        {
            "image_id": number,
            "category_id": ids[detections.names[label]],
            "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
            "score": score,
            **(_segmentation(rows[number], mask) if kind == "segm" else {}),
        }
        for number, detections in enumerate(found)
        for box, label, score, mask in zip(
            detections.boxes.tolist(),
            detections.labels.tolist(),
            detections.scores.tolist(),
            detections.masks or [""] * len(detections),
            strict=True,
        )
    ]
    truth = COCO(coco_truth(rows, names), print_function=_silent)
    if not results:
        value = {key: 0.0 if truth.getAnnIds(catIds=[key], iscrowd=False) else np.nan for key in names}
        empty = [CategoryResult(name, splits[name], value[key], value[key]) for key, name in names.items()]
        return DetectionMetrics(tuple(empty))
    evaluator = COCOeval_faster(truth, truth.loadRes(results), kind, print_function=_silent)
    evaluator.evaluate()
    evaluator.accumulate()
    # [IoU thresholds, recalls, categories, areas, maximal detections]; all areas, 100 detections. -1: no box.
    precision_TRK = np.asarray(evaluator.eval["precision"])[:, :, :, 0, -1]
    precision_TRK = np.where(precision_TRK < 0, np.nan, precision_TRK)
    order = [int(key) for key in evaluator.params.catIds]
    by_category = {
        key: CategoryResult(names[key], splits[names[key]], _mean(precision_TRK[..., k]), _mean(precision_TRK[0, :, k]))
        for k, key in enumerate(order)
    }
    return DetectionMetrics(tuple(by_category[key] for key in names))


def _all_masked(rows: Sequence[Mapping[str, Any]], found: Sequence[Detections], names: Mapping[int, str]) -> bool:
    annotated = (
        mask for row in rows for mask, key in zip(row["masks"], row["category_ids"], strict=True) if key in names
    )
    return all(annotated) and all(entry.masks is not None for entry in found)


def evaluate_proposals(
    rows: Sequence[Mapping[str, Any]],
    found: Sequence[tuple[Tensor, Tensor]],
    category_ids: Collection[int],
    limits: Sequence[int],
) -> dict[int, float]:
    """COCO's average recall of class-agnostic boxes over IoU 0.50 to 0.95.

    Args:
        rows: of a `boxes` table.
        found: boxes [N, 4] and scores [N] of each image.
        category_ids: whose boxes are looked for.
        limits: how many of an image's proposals count.

    Returns:
        AR by limit; NaN where there is no box to find.
    """
    truth = coco_truth(rows, dict.fromkeys(category_ids, "thing"))
    for annotation in truth["annotations"]:
        annotation["category_id"] = 1
    truth["categories"] = [{"id": 1, "name": "thing"}]
    results = [
        {
            "image_id": number,
            "category_id": 1,
            "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
            "score": score,
        }
        for number, (boxes, scores) in enumerate(found)
        for box, score in zip(boxes.tolist(), scores.tolist(), strict=True)
    ]
    if not truth["annotations"] or not results:
        return dict.fromkeys(limits, 0.0 if truth["annotations"] else float("nan"))
    loaded = COCO(truth, print_function=_silent)
    evaluator = COCOeval_faster(loaded, loaded.loadRes(results), "bbox", print_function=_silent)
    evaluator.params.maxDets = list(limits)
    evaluator.evaluate()
    evaluator.accumulate()
    recall_TL = np.asarray(evaluator.eval["recall"])[:, 0, 0, :]  # [IoU thresholds, categories, areas, limits]
    return {limit: float(recall_TL[:, column].mean()) for column, limit in enumerate(limits)}


def _mean(values: Any) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def _silent(*words: object) -> None:
    """The library reports to this instead of the console."""
