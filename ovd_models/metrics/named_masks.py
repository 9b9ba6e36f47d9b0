"""IoU and accuracy of named masks, one answer for each annotated object (Yuan et al., 2024)."""

from collections.abc import Mapping

import numpy as np
from faster_coco_eval import mask as rle

from ovd_models.metrics.records import Bools, Floats, GroundTruth, Ints, IouType, Predictions


def overlaps(
    truth: GroundTruth, objects: Ints, predictions: Predictions, found: Ints, kind: IouType, image: int
) -> Floats:
    """IoU [predictions, objects] of one image; with a crowd, intersection over the prediction's area."""
    if not len(objects) or not len(found):
        return np.zeros((len(found), len(objects)))
    crowd = truth.crowd[objects].astype(int).tolist()
    if kind == "bbox":
        result: Floats = rle.iou(predictions.boxes[found], truth.boxes[objects], crowd)
        return result
    assert truth.masks is not None and predictions.masks is not None
    size = truth.sizes[image].tolist()
    one, two = (
        [{"size": size, "counts": counts} for counts in masks.take(rows).to_pylist()]
        for masks, rows in ((predictions.masks, found), (truth.masks, objects))
    )
    return np.asarray(rle.iou(one, two, crowd))


def by_image(images: Ints, count: int) -> list[Ints]:
    """The rows of each of `count` images, in order."""
    order = np.argsort(images, kind="stable")
    return list(np.split(order, np.searchsorted(images[order], np.arange(1, count))))[:count]


def evaluate_named_masks(
    truth: GroundTruth, predictions: Predictions, splits: Mapping[str, Bools], kind: IouType
) -> dict[str, float]:
    """For each object the prediction that overlaps it most is its answer, of equal ones the best score's.

    Returns:
        For each split: `IoU`, the mean over objects (0 without an answer), and `accuracy`, the share of objects whose
        answer bears their name. -1 without objects. Crowds are left out.
    """
    iou, right = np.zeros(len(truth.labels)), np.zeros(len(truth.labels), np.bool_)
    count = len(truth.image_ids)
    rows = zip(by_image(truth.images, count), by_image(predictions.images, count), strict=True)
    for image, (objects, found) in enumerate(rows):
        best = found[np.argsort(-predictions.scores[found], kind="stable")]
        table = overlaps(truth, objects, predictions, best, kind, image)
        if table.size:
            answer = table.argmax(0)
            iou[objects] = table.max(0)
            right[objects] = (predictions.labels[best[answer]] == truth.labels[objects]) & (iou[objects] > 0)
    numbers = {}
    for name, chosen in splits.items():
        counted = chosen[truth.labels] & ~truth.crowd
        numbers[f"IoU_{name}"] = float(iou[counted].mean()) if counted.any() else -1.0
        numbers[f"accuracy_{name}"] = float(right[counted].mean()) if counted.any() else -1.0
    return numbers
