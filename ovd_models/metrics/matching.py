"""Which predictions are right, at every IoU threshold: what the explanations of an evaluation are computed from.

The engine gives curves of whole sets; this gives each prediction's fate, by the same rules, and AP from it.

T IoU thresholds, P predictions, A objects, I images, K categories.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ovd_models.metrics.average_precision import THRESHOLDS, by_category, verified
from ovd_models.metrics.named_masks import by_image, overlaps
from ovd_models.metrics.records import (
    Bools,
    Floats,
    GroundTruth,
    Ints,
    IouType,
    Predictions,
    contains,
    limit_per_image,
    limit_per_image_and_category,
)

RECALLS = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class Matches:
    """Predictions with what became of them."""

    predictions: Predictions
    """[P] those that the protocol counts, best first within each image and category."""
    hits: Bools
    """[T, P] matched to an object that counts."""
    ignored: Bools
    """[T, P] matched to a crowd, or of a category that is not exhaustively annotated in the image."""
    objects: npt.NDArray[np.int64]
    """[P] the object matched at IoU 0.5; -1 for none."""
    counted: Bools
    """[A] objects that are to be found: no crowds."""


def match(truth: GroundTruth, predictions: Predictions, kind: IouType, *, federated: bool) -> Matches:
    """Match predictions to objects by COCO's rules, or by LVIS's: the best free object of the category, best first.

    Args:
        truth: all images of the set.
        predictions: of these images.
        kind: boxes or masks.
        federated: LVIS's rules and limit; else 100 predictions of an image and category.
    """
    counted = np.ones(len(truth.labels), np.bool_) if federated else ~truth.crowd
    kept = limit_per_image(predictions, 300) if federated else limit_per_image_and_category(predictions, 100)
    kept = verified(truth, kept) if federated else kept
    kept = kept.take(np.lexsort((-kept.scores, kept.labels, kept.images)))
    hits = np.zeros((len(THRESHOLDS), len(kept)), np.bool_)
    ignored = np.zeros_like(hits)
    objects = np.full(len(kept), -1, np.int64)
    count = len(truth.image_ids)
    groups = zip(by_image(truth.images, count), by_image(kept.images, count), strict=True)
    for image, (own, found) in enumerate(groups):
        table = overlaps(truth, own, kept, found, kind, image)
        same = truth.labels[own][None] == kept.labels[found][:, None]
        near = np.where(same, table, 0)
        for label in np.unique(kept.labels[found[near.max(1, initial=0) >= THRESHOLDS[0]]]).tolist():
            rows, columns = kept.labels[found] == label, truth.labels[own] == label
            result = _match_category(near[np.ix_(rows, columns)], counted[own[columns]])
            hits[:, found[rows]], ignored[:, found[rows]] = result[0], result[1]
            objects[found[rows]] = np.where(result[2] >= 0, own[columns][result[2]], -1)
    if federated and truth.not_exhaustive is not None:
        partial = contains(truth.not_exhaustive, kept.images * len(truth.categories) + kept.labels)
        ignored |= ~hits & partial
    return Matches(kept, hits, ignored, objects, counted)


def _match_category(table: Floats, counted: Bools) -> tuple[Bools, Bools, Ints]:
    """Match the predictions of an image and category.

    Args:
        table: [P, A] IoU, best prediction first.
        counted: [A] False for crowds, which any number of predictions may match.

    Returns:
        Hits and ignored predictions [T, P], and the object matched at the first threshold [P], -1 for none.
    """
    limits = np.minimum(THRESHOLDS, 1 - 1e-10)
    hits = np.zeros((len(limits), len(table)), np.bool_)
    ignored = np.zeros_like(hits)
    objects = np.full(len(table), -1, np.int64)
    free = np.broadcast_to(counted, (len(limits), len(counted))).copy()
    rows = np.arange(len(limits))
    for place, ious in enumerate(table):
        if ious.max() < limits[0]:
            continue
        candidates = np.where(free, ious, -1.0)
        best = candidates.shape[1] - 1 - candidates[:, ::-1].argmax(1)  # of equal ones the last
        found = candidates[rows, best] >= limits
        hits[found, place] = True
        free[rows[found], best[found]] = False
        if found[0]:
            objects[place] = best[0]
        crowds = ious[~counted]
        if len(crowds):
            ignored[:, place] = ~found & (crowds.max() >= limits)
    return hits, ignored, objects


# ----------------------------------------------------------------------------------------------------------------- AP


def average_precisions(truth: GroundTruth, matches: Matches, weights: Floats | None = None) -> Floats:
    """[T, K] AP of each category; NaN without objects.

    Args:
        truth: all images of the set.
        matches: of it.
        weights: [I] how often each image counts; once if None. A bootstrap's draws are such weights.
    """
    once = np.ones(len(truth.image_ids)) if weights is None else weights
    result = np.full((len(THRESHOLDS), len(truth.categories)), np.nan)
    for label, ranked, own in _ranked_categories(truth, matches):
        positives = once[own].sum()
        if positives:
            shown = once[matches.predictions.images[ranked]]
            right = matches.hits[:, ranked] * shown
            wrong = (~matches.hits[:, ranked] & ~matches.ignored[:, ranked]) * shown
            result[:, label] = interpolated_ap(right, wrong, positives)
    return result


def _ranked_categories(truth: GroundTruth, matches: Matches) -> list[tuple[int, Ints, Ints]]:
    """Each category with its predictions, best first, and the images of its objects."""
    rows = []
    for label, objects, found in by_category(truth, matches.predictions):
        own = objects[matches.counted[objects]]
        if len(own):
            ranked = found[np.argsort(-matches.predictions.scores[found], kind="stable")]
            rows.append((label, ranked, truth.images[own]))
    return rows


def interpolated_ap(right: Floats, wrong: Floats, positives: float) -> Floats:
    """[T] AP over 101 recall levels, from weights [T, P] of right and wrong predictions, best first."""
    if not right.shape[1]:
        return np.zeros(len(right))
    true, false = right.cumsum(1), wrong.cumsum(1)
    recall = true / positives
    precision = true / (true + false + np.spacing(1))
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    padded = np.concatenate([precision, np.zeros((len(right), 1))], axis=1)
    places = np.stack([np.searchsorted(row, RECALLS, side="left") for row in recall])
    result: Floats = np.take_along_axis(padded, places, axis=1).mean(1)
    return result


def bootstrap(
    truth: GroundTruth, matches: Matches, groups: dict[str, Bools], draws: int, seed: int = 0
) -> dict[str, Floats]:
    """AP and AP50 of groups of categories, in draws of as many images with replacement.

    Args:
        truth: all images of the set.
        matches: of it.
        groups: name -> categories [K].
        draws: number of them.
        seed: of the draws: equal seeds draw equal images, so that two evaluations of a set are paired.

    Returns:
        `AP <name>` and `AP50 <name>` -> [draws]; NaN where a draw has no object of the group.
    """
    rng = np.random.default_rng(seed)
    count = len(truth.image_ids)
    results: dict[str, list[float]] = {f"{name} {group}": [] for group in groups for name in ("AP", "AP50")}
    for _ in range(draws):
        weights = np.bincount(rng.integers(count, size=count), minlength=count).astype(np.float64)
        ap_TK = average_precisions(truth, matches, weights)
        for group, chosen in groups.items():
            results[f"AP {group}"].append(mean_of(ap_TK[:, chosen]))
            results[f"AP50 {group}"].append(mean_of(ap_TK[0, chosen]))
    return {name: np.array(values) for name, values in results.items()}


def mean_of(values: Floats) -> float:
    """Mean without NaN; NaN if there is nothing else."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def interval(values: Floats, confidence: float = 0.95) -> tuple[float, float]:
    """The percentile interval of a bootstrap's draws; NaN if there are none."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return float("nan"), float("nan")
    tail = 50 * (1 - confidence)
    low, high = np.percentile(finite, [tail, 100 - tail])
    return float(low), float(high)
