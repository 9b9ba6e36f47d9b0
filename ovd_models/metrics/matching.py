"""Which predictions are right, at every IoU threshold: what the explanations of an evaluation are computed from.

The engine gives curves of whole sets; this gives each prediction's fate, by the same rules, and AP from it.

T IoU thresholds, P predictions, A objects, I images, K categories.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ovd_models.metrics.average_precision import THRESHOLDS, by_category
from ovd_models.metrics.named_masks import by_image, overlaps
from ovd_models.metrics.records import (
    Bools,
    Floats,
    GroundTruth,
    Ints,
    IouType,
    Predictions,
    contains,
)

RECALLS = np.linspace(0, 1, 101)
ELEMENTS = 2_000_000
"""Of arrays that bootstraps compute at a time."""


@dataclass(frozen=True)
class Matches:
    """Predictions with what became of them."""

    predictions: Predictions
    """[P] best first within each image and category."""
    hits: Bools
    """[T, P] matched to an object that counts."""
    ignored: Bools
    """[T, P] matched to a crowd, or of a category that is not exhaustively annotated in the image."""
    objects: npt.NDArray[np.int64]
    """[P] the object matched at IoU 0.5; -1 for none."""
    counted: Bools
    """[A] objects that are to be found: no crowds."""


def match(truth: GroundTruth, predictions: Predictions, kind: IouType) -> Matches:
    """Match predictions to objects, best first: each to the best free object of its category.

    Others are ignored if they fit a crowd, or if their category is not exhaustively annotated in the image.

    Args:
        truth: all images of the set.
        predictions: of these images; all count. `protocols.counted` gives both as a protocol counts them.
        kind: boxes or masks.
    """
    counted = ~truth.crowd
    kept = predictions.take(np.lexsort((-predictions.scores, predictions.labels, predictions.images)))
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
    if truth.not_exhaustive is not None:
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
        weights: [I] how often each image counts; once if None.
    """
    once = np.ones(len(truth.image_ids)) if weights is None else weights
    return np.stack([ap_TK[0] for ap_TK in _weighted_aps(truth, matches, once[None])], axis=-1)


def _weighted_aps(truth: GroundTruth, matches: Matches, weights: Floats) -> list[Floats]:
    """[W, T] AP of each of K categories under weights [W, I]; NaN without objects."""
    shape = (len(weights), len(THRESHOLDS))
    results = []
    for _, objects, found in by_category(truth, matches.predictions):
        own = objects[matches.counted[objects]]
        ranked = found[np.argsort(-matches.predictions.scores[found], kind="stable")]
        hits = matches.hits[:, ranked]
        stop = int(np.flatnonzero(hits.any(0)).max(initial=-1)) + 1  # what comes after the last hit changes nothing
        ranked, hits = ranked[:stop], hits[:, :stop]
        wrong = ~hits & ~matches.ignored[:, ranked]
        values = np.full(shape, np.nan)
        step = max(1, ELEMENTS // max(1, hits.size))
        for first in range(0, len(weights) if len(own) else 0, step):
            some = weights[first : first + step]
            shown = some[:, matches.predictions.images[ranked]][:, None]
            positives = some[:, truth.images[own]].sum(1)[:, None]
            values[first : first + step] = interpolated_ap(hits * shown, wrong * shown, positives)
        results.append(values)
    return results


def interpolated_ap(right: Floats, wrong: Floats, positives: npt.NDArray[Any]) -> Floats:
    """AP over 101 recall levels, one for each row; NaN without objects.

    Args:
        right: [..., P] weights of right predictions, best first.
        wrong: [..., P] weights of wrong ones.
        positives: [...] weights of the objects to be found, or of fewer dimensions.
    """
    shape, count = right.shape[:-1], right.shape[-1]
    positives = np.broadcast_to(positives, shape)
    if not count:
        return np.where(positives > 0, 0.0, np.nan)
    true, false = right.cumsum(-1), wrong.cumsum(-1)
    recall = true / np.maximum(positives, 1e-9)[..., None]
    precision = true / (true + false + np.spacing(1))
    precision = np.maximum.accumulate(precision[..., ::-1], axis=-1)[..., ::-1]
    rows = recall.reshape(-1, count)
    # Row by row: offsets that put all rows into one search would round recalls, and miss levels that are just reached.
    places = np.stack([np.searchsorted(row, RECALLS, side="left") for row in rows])
    padded = np.concatenate([precision.reshape(-1, count), np.zeros((len(rows), 1))], axis=1)
    ap = np.take_along_axis(padded, places, axis=1).mean(1).reshape(shape)
    return np.where(positives > 0, ap, np.nan)


def draw_images(count: int, draws: int, seed: int = 0) -> Floats:
    """[draws, I] how often each of I = `count` images is in each draw of as many, with replacement."""
    rng = np.random.default_rng(seed)
    weights = [np.bincount(rng.integers(count, size=count), minlength=count) for _ in range(draws)]
    return np.stack(weights).astype(np.float64)


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
    ap_WTK = np.stack(_weighted_aps(truth, matches, draw_images(len(truth.image_ids), draws, seed)), axis=-1)
    results = {}
    for group, chosen in groups.items():
        results[f"AP {group}"] = np.array([mean_of(ap_TK[:, chosen]) for ap_TK in ap_WTK])
        results[f"AP50 {group}"] = np.array([mean_of(ap_TK[0, chosen]) for ap_TK in ap_WTK])
    return results


def mean_of(values: Floats) -> float:
    """Mean without NaN; NaN if there is nothing else."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def interval(values: Floats, estimate: float, confidence: float = 0.95) -> tuple[float, float]:
    """The interval of an estimate from a bootstrap's draws: their percentiles, without their bias.

    The bias is that of rare categories: draws without their few images leave them out, the others hold these images
    more than once. NaN if there are no draws.
    """
    finite = values[np.isfinite(values)]
    if not len(finite):
        return float("nan"), float("nan")
    tail = 50 * (1 - confidence)
    low, high = np.percentile(finite, [tail, 100 - tail]) - (finite.mean() - estimate)
    return float(low), float(high)
