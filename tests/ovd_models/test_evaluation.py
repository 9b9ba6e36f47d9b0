import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from faster_coco_eval import mask as rle

from ovd_models.batches import Detections
from ovd_models.errors import InputError
from ovd_models.evaluation import DetectionMetrics, evaluate_detections, evaluate_proposals, recall_by_image
from ovd_models.metrics.records import Category, truth_of_rows

NAMES = {3: "cat", 7: "dog", 9: "cow"}
SPLITS = {"cat": "base", "dog": "novel", "cow": "novel"}
BOX, OTHER = [10.0, 10.0, 50.0, 50.0], [60.0, 60.0, 90.0, 90.0]


def row(boxes: list[list[float]], categories: list[int], crowd: list[bool] | None = None) -> dict[str, Any]:
    iscrowd = crowd or [False] * len(boxes)
    return {"boxes": boxes, "category_ids": categories, "iscrowd": iscrowd, "width": 100, "height": 100}


def found(*entries: tuple[list[float], str, float]) -> Detections:
    names = tuple(NAMES.values())
    return Detections(
        torch.tensor([box for box, _, _ in entries]).view(-1, 4),
        torch.tensor([score for _, _, score in entries]),
        torch.tensor([names.index(name) for _, name, _ in entries], dtype=torch.int64),
        names,
        100,
        100,
    )


def measure(rows: list[dict[str, Any]], answers: list[Detections]) -> DetectionMetrics:
    return evaluate_detections(rows, answers, NAMES, SPLITS)


def by_name(metrics: DetectionMetrics) -> dict[str, tuple[float, float]]:
    return {entry.name: (entry.ap, entry.ap50) for entry in metrics.categories}


def test_perfect_detections_score_one() -> None:
    metrics = measure([row([BOX, OTHER], [3, 7])], [found((BOX, "cat", 0.9), (OTHER, "dog", 0.4))])
    assert by_name(metrics)["cat"] == pytest.approx((1.0, 1.0))
    assert by_name(metrics)["dog"] == pytest.approx((1.0, 1.0))
    summary = metrics.summary()
    assert list(summary) == ["ap50_base", "ap50_novel", "ap50_all", "ap_base", "ap_novel", "ap_all"]
    assert list(summary.values()) == pytest.approx([1.0] * 6)


def test_a_category_without_boxes_is_nan_and_counts_in_no_mean() -> None:
    metrics = measure([row([BOX], [7])], [found((BOX, "dog", 0.9), (OTHER, "cow", 0.8))])
    assert math.isnan(by_name(metrics)["cow"][1])
    assert metrics.mean("ap50", "novel") == pytest.approx(1.0)
    assert math.isnan(metrics.mean("ap50", "base"))


def test_checkpoints_are_ranked_by_all_names_if_none_is_novel() -> None:
    rows, answers = [row([BOX], [3])], [found((BOX, "cat", 0.9))]
    assert measure(rows, answers).headline == "ap50_novel"
    own = evaluate_detections(rows, answers, NAMES, dict.fromkeys(SPLITS, "base"))
    assert own.summary()[own.headline] == pytest.approx(1.0)
    assert math.isnan(own.summary()["ap50_novel"])


def test_a_false_positive_above_the_true_one_halves_the_precision() -> None:
    # Best first: wrong, right. Precision at the only recall step is 1/2, so the interpolated curve is 1/2 everywhere.
    metrics = measure([row([BOX], [3])], [found((OTHER, "cat", 0.9), (BOX, "cat", 0.5))])
    assert by_name(metrics)["cat"] == pytest.approx((0.5, 0.5))


def test_a_false_positive_below_the_true_one_costs_nothing() -> None:
    metrics = measure([row([BOX], [3])], [found((OTHER, "cat", 0.3), (BOX, "cat", 0.5))])
    assert by_name(metrics)["cat"] == pytest.approx((1.0, 1.0))


def test_one_of_two_objects_found_gives_half_the_curve() -> None:
    # Recall reaches 0.5: precision 1 at the 51 recall points 0, 0.01 ... 0.5 of 101, then 0.
    metrics = measure([row([BOX, OTHER], [3, 3])], [found((BOX, "cat", 0.9))])
    assert by_name(metrics)["cat"] == pytest.approx((51 / 101, 51 / 101))


def test_ap_averages_over_overlaps() -> None:
    # The detection covers [10, 50] x [10, 50] with 40 x 30: IoU 0.75, right at 0.50 to 0.75, 6 of 10 thresholds.
    metrics = measure([row([BOX], [3])], [found(([10.0, 10.0, 50.0, 40.0], "cat", 0.9))])
    assert by_name(metrics)["cat"] == pytest.approx((0.6, 1.0))


def test_the_right_box_of_another_name_is_wrong() -> None:
    metrics = measure([row([BOX], [3])], [found((BOX, "dog", 0.9))])
    assert by_name(metrics)["cat"] == pytest.approx((0.0, 0.0))


def test_a_second_detection_of_an_object_is_wrong() -> None:
    twice = [found((BOX, "cat", 0.9), (BOX, "cat", 0.8), (OTHER, "cat", 0.7))]
    # right, wrong, right: precisions 1, then max(2/3) at recall 1: 51 points of 1 and 50 of 2/3
    metrics = measure([row([BOX, OTHER], [3, 3])], twice)
    assert by_name(metrics)["cat"][1] == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_crowds_are_neither_objects_nor_false_positives() -> None:
    crowded = row([BOX, OTHER], [3, 3], [False, True])
    metrics = measure([crowded], [found((OTHER, "cat", 0.95), (OTHER, "cat", 0.94), (BOX, "cat", 0.5))])
    assert by_name(metrics)["cat"] == pytest.approx((1.0, 1.0))


def test_boxes_of_categories_outside_the_names_are_left_out() -> None:
    truth = truth_of_rows([row([BOX, OTHER], [3, 99])], [Category(key, name) for key, name in NAMES.items()])
    assert truth.boxes.tolist() == [[10.0, 10.0, 40.0, 40.0]]
    assert truth.areas.tolist() == [1600]
    assert truth.labels.tolist() == [0]


def test_detections_are_matched_within_their_own_image() -> None:
    rows = [row([BOX], [3]), row([OTHER], [3])]
    swapped = [found((OTHER, "cat", 0.9)), found((BOX, "cat", 0.9))]
    assert by_name(measure(rows, swapped))["cat"] == pytest.approx((0.0, 0.0))
    assert by_name(measure(rows, swapped[::-1]))["cat"] == pytest.approx((1.0, 1.0))


def test_nothing_found_scores_zero() -> None:
    metrics = measure([row([BOX], [3])], [found()])
    assert by_name(metrics)["cat"] == (0.0, 0.0)
    assert metrics.mean("ap50", "base") == 0.0


def test_nothing_found_of_a_category_without_boxes_is_nan() -> None:
    metrics = measure([row([BOX], [3])], [found()])
    assert math.isnan(by_name(metrics)["dog"][1])
    assert math.isnan(metrics.mean("ap50", "novel"))


def test_images_without_boxes_and_no_image_at_all_are_measured() -> None:
    assert math.isnan(measure([row([], [])], [found((BOX, "cat", 0.9))]).mean("ap50"))
    assert len(measure([], []).categories) == 3


def test_means_are_over_categories_not_objects() -> None:
    rows = [row([BOX, OTHER], [7, 9]), row([BOX], [7])]
    metrics = measure(rows, [found((BOX, "dog", 0.9)), found((BOX, "dog", 0.8))])
    assert by_name(metrics)["dog"][1] == pytest.approx(1.0)
    assert by_name(metrics)["cow"][1] == pytest.approx(0.0)
    assert metrics.mean("ap50", "novel") == pytest.approx(0.5)


def slow_ap50(truth: list[list[list[float]]], answers: list[list[tuple[list[float], float]]]) -> float:
    """Average precision at IoU 0.5 of one category, from the definition."""

    def overlap(a: list[float], b: list[float]) -> float:
        width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
        height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
        union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
        return width * height / union

    ranked = sorted(((score, n, box) for n, entries in enumerate(answers) for box, score in entries), reverse=True)
    free = [list(boxes) for boxes in truth]
    hits: list[bool] = []
    for _, image, box in ranked:
        best = max(free[image], key=lambda other: overlap(box, other), default=None)
        hits.append(best is not None and overlap(box, best) >= 0.5)
        if best is not None and hits[-1]:
            free[image].remove(best)
    right = np.cumsum(hits)
    precision, recall = right / np.arange(1, len(hits) + 1), right / sum(map(len, truth))
    points = [max([p for p, r in zip(precision, recall, strict=True) if r >= at - 1e-9], default=0.0) for at in grid()]
    return float(np.mean(points))


def grid() -> list[float]:
    return [step / 100 for step in range(101)]


def test_average_precision_equals_a_slow_loop() -> None:
    rng = np.random.default_rng(0)
    truth, answers = [], []
    for _ in range(12):
        corners = rng.uniform(0, 60, (rng.integers(1, 4), 2))
        boxes = np.concatenate([corners, corners + rng.uniform(15, 40, corners.shape)], 1).astype(np.float32)
        moved = np.clip(boxes + rng.normal(0, 4, boxes.shape), 0, 100).astype(np.float32)
        keep = rng.random(len(moved)) < 0.8
        extra = np.array([[1, 1, 30, 20]], np.float32)
        scores = rng.permutation(1000)[: keep.sum() + 1] / 1000
        truth.append(boxes.tolist())
        candidates = [*moved[keep].tolist(), *extra.tolist()]
        answers.append(list(zip(candidates, scores.tolist(), strict=True)))
    rows = [row(boxes, [3] * len(boxes)) for boxes in truth]
    detections = [found(*((box, "cat", score) for box, score in entries)) for entries in answers]
    assert by_name(measure(rows, detections))["cat"][1] == pytest.approx(slow_ap50(truth, answers), abs=0.02)


# ------------------------------------------------------------------------------------------------------- masks, recall


def rle_of(box: list[float]) -> str:
    mask = np.zeros((100, 100), np.uint8)
    x0, y0, x1, y1 = (int(value) for value in box)
    mask[y0:y1, x0:x1] = 1
    return rle.encode(np.asfortranarray(mask))["counts"].decode()


def test_masks_are_compared_with_masks() -> None:
    # The boxes agree; the first mask is its whole box, the second one a quarter of it.
    truth = {**row([BOX, OTHER], [3, 7]), "masks": [rle_of(BOX), rle_of(OTHER)]}
    answer = dataclasses.replace(
        found((BOX, "cat", 0.9), (OTHER, "dog", 0.8)), masks=(rle_of(BOX), rle_of([60.0, 60, 75, 75]))
    )
    as_masks = evaluate_detections([truth], [answer], NAMES, SPLITS, "segm")
    assert by_name(as_masks)["cat"] == pytest.approx((1.0, 1.0))
    assert by_name(as_masks)["dog"] == pytest.approx((0.0, 0.0))
    assert by_name(measure([truth], [answer]))["dog"] == pytest.approx((1.0, 1.0))


def test_a_missing_mask_is_refused() -> None:
    truth = {**row([BOX], [3]), "masks": [""]}
    with pytest.raises(InputError, match="masks: a box or a detection has none"):
        evaluate_detections([truth], [found((BOX, "cat", 0.9))], NAMES, SPLITS, "segm")


def proposals(*boxes: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(boxes).view(-1, 4), torch.linspace(0.9, 0.1, len(boxes))


def test_recall_counts_the_objects_of_some_categories_whatever_they_are() -> None:
    rows = [row([BOX, OTHER], [3, 7]), row([OTHER], [9])]
    answers = [proposals(BOX, [0.0, 0, 5, 5], OTHER), proposals([0.0, 0, 5, 5])]
    # Novel are the dog, found as third proposal, and the cow, never found.
    assert evaluate_proposals(rows, answers, [7, 9], (2, 100)) == pytest.approx({2: 0.0, 100: 0.5})
    assert evaluate_proposals(rows, answers, [3], (2, 100)) == pytest.approx({2: 1.0, 100: 1.0})
    for ids in ([7, 9], [3]):  # AR@100 is the ratio of the sums over images
        found, wanted = recall_by_image(rows, answers, ids)
        assert len(found) == len(wanted) == len(rows)
        assert found.sum() / wanted.sum() == pytest.approx(evaluate_proposals(rows, answers, ids, (100,))[100])


def test_recall_averages_over_overlaps() -> None:
    # IoU 40 x 30 / 40 x 40 = 0.75: found at 0.50, 0.55, ... 0.75, six of ten thresholds.
    answer = proposals([10.0, 10, 50, 40])
    assert evaluate_proposals([row([BOX], [3])], [answer], [3], (100,)) == pytest.approx({100: 0.6})


def test_recall_of_nothing() -> None:
    assert evaluate_proposals([row([BOX], [3])], [proposals()], [3], (100,)) == {100: 0.0}
    assert math.isnan(evaluate_proposals([row([BOX], [3])], [proposals(BOX)], [7], (100,))[100])
