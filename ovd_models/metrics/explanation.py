"""Why an AP is what it is: kinds of errors, confusions between names, calibration, and images from best to worst."""

from collections import Counter
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from ovd_models.metrics.matching import Matches, average_precisions, interpolated_ap, mean_of
from ovd_models.metrics.named_masks import by_image, overlaps
from ovd_models.metrics.records import Floats, GroundTruth, Ints, IouType

ErrorKind = Literal["classification", "localisation", "both", "duplicate", "background", "missed"]
ERROR_KINDS: tuple[ErrorKind, ...] = get_args(ErrorKind)
FOREGROUND, BACKGROUND = 0.5, 0.1
"""TIDE's IoU: of a match, and below which there is no object."""
BINS = 10


@dataclass(frozen=True)
class Errors:
    """What is wrong with each prediction at IoU 0.5, as TIDE defines it (Bolya et al., 2020)."""

    kinds: Ints
    """[P] index into `ERROR_KINDS`; -1 for right and ignored predictions."""
    targets: Ints
    """[P] the object that a wrong name, place or second box was meant for; -1 for none."""
    missed: Ints
    """Objects that neither a right prediction nor one of the wrong name or place found."""


def find_errors(truth: GroundTruth, matches: Matches, kind: IouType) -> Errors:
    """Find the kind of each wrong prediction.

    Of an object of its category it overlaps at least `BACKGROUND` and not `FOREGROUND`: localisation. Else, it fits an
    object of another category: classification; an object of its category that a better one has: duplicate; no object
    at all: background; one of another category badly: both.
    """
    predictions = matches.predictions
    kinds = np.full(len(predictions), -1, np.int64)
    targets = np.full(len(predictions), -1, np.int64)
    count = len(truth.image_ids)
    wrong_P = ~matches.hits[0] & ~matches.ignored[0]
    rows = zip(by_image(truth.images, count), by_image(predictions.images, count), strict=True)
    for image, (objects, found) in enumerate(rows):
        wrong = found[wrong_P[found]]
        if not len(wrong):
            continue
        own = objects[matches.counted[objects]]
        if not len(own):
            kinds[wrong] = ERROR_KINDS.index("background")
            continue
        table = overlaps(truth, own, predictions, wrong, kind, image)
        same = truth.labels[own][None] == predictions.labels[wrong][:, None]
        right_name, other_name = np.where(same, table, -1), np.where(same, -1, table)
        best_right, best_other = right_name.max(1), other_name.max(1)
        placed = (best_right >= BACKGROUND) & (best_right < FOREGROUND)
        confused = ~placed & (best_other >= FOREGROUND)
        second = ~placed & ~confused & (best_right >= FOREGROUND)
        nothing = ~placed & ~confused & ~second & (table.max(1) <= BACKGROUND)
        kinds[wrong] = np.select(
            [placed, confused, second, nothing],
            [ERROR_KINDS.index(name) for name in ("localisation", "classification", "duplicate", "background")],
            ERROR_KINDS.index("both"),
        )
        of_own, of_other = own[right_name.argmax(1)], own[other_name.argmax(1)]
        targets[wrong] = np.select([placed | second, confused], [of_own, of_other], -1)
    covered = np.zeros(len(truth.labels), np.bool_)
    covered[matches.objects[matches.objects >= 0]] = True
    almost = np.isin(kinds, [ERROR_KINDS.index("classification"), ERROR_KINDS.index("localisation")])
    covered[targets[almost]] = True
    return Errors(kinds, targets, np.flatnonzero(~covered & matches.counted))


def gains(truth: GroundTruth, matches: Matches, errors: Errors) -> dict[ErrorKind, float]:
    """TIDE's dAP: the AP50 that each kind of error costs, which is what mending that kind alone would give back.

    A wrong name or place is mended to a right prediction if it is the best one of an object that is not found, else
    it is taken away, as are the other kinds; missed objects are no longer to be found.
    """
    before = mean_of(average_precisions(truth, matches)[0])
    return {kind: _mended(truth, matches, errors, number) - before for number, kind in enumerate(ERROR_KINDS)}


def _mended(truth: GroundTruth, matches: Matches, errors: Errors, number: int) -> float:
    """Mean AP50 without one kind of error."""
    predictions = matches.predictions
    labels, hits = predictions.labels.copy(), matches.hits[0].copy()
    away = matches.ignored[0].copy()
    wanted = matches.counted.copy()
    if ERROR_KINDS[number] == "missed":
        wanted[errors.missed] = False
    else:
        rows = np.flatnonzero(errors.kinds == number)
        away[rows] = True
        if ERROR_KINDS[number] in ("classification", "localisation"):
            found = np.zeros(len(truth.labels), np.bool_)
            found[matches.objects[matches.objects >= 0]] = True
            ranked = rows[np.argsort(-predictions.scores[rows], kind="stable")]
            _, first = np.unique(errors.targets[ranked], return_index=True)
            best = ranked[first]
            best = best[~found[errors.targets[best]]]
            hits[best], away[best] = True, False
            labels[best] = truth.labels[errors.targets[best]]
    positives = np.bincount(truth.labels[wanted], minlength=len(truth.categories))
    kept = np.flatnonzero(~away)
    kept = kept[np.lexsort((-predictions.scores[kept], labels[kept]))]
    starts = np.searchsorted(labels[kept], np.arange(len(truth.categories) + 1))
    values = []
    for label in np.flatnonzero(positives).tolist():
        right = hits[kept[starts[label] : starts[label + 1]]][None].astype(np.float64)
        values.append(float(interpolated_ap(right, 1 - right, positives[label : label + 1])[0]))
    return float(np.mean(values)) if values else float("nan")


def confusions(truth: GroundTruth, matches: Matches, errors: Errors, threshold: float) -> list[tuple[int, int, Ints]]:
    """Category, the name it was given, and the predictions that gave it, most frequent first; best prediction first."""
    predictions = matches.predictions
    chosen = np.flatnonzero((errors.kinds == ERROR_KINDS.index("classification")) & (predictions.scores >= threshold))
    chosen = chosen[np.argsort(-predictions.scores[chosen], kind="stable")]
    pairs = list(zip(truth.labels[errors.targets[chosen]].tolist(), predictions.labels[chosen].tolist(), strict=True))
    counts = Counter(pairs)
    rows_of: dict[tuple[int, int], list[int]] = {pair: [] for pair in counts}
    for pair, row in zip(pairs, chosen.tolist(), strict=True):
        rows_of[pair].append(row)
    return [(true, given, np.array(rows_of[true, given])) for (true, given), _ in counts.most_common()]


@dataclass(frozen=True)
class Calibration:
    """How far scores are probabilities of being right at IoU 0.5."""

    edges: Floats
    """[BINS + 1] of the scores."""
    counts: Ints
    """[BINS] predictions."""
    scores: Floats
    """[BINS] mean score; NaN for none."""
    precision: Floats
    """[BINS] share that is right."""
    error: float
    """Expected calibration error: the mean distance of both, over predictions (Guo et al., 2017)."""
    threshold: float
    """Score above which F1 is best."""
    f1: float
    precision_there: float
    recall_there: float
    curve: Floats
    """[3, 101] precision, recall and F1 above the scores 0, 0.01, ... 1."""


def calibrate(truth: GroundTruth, matches: Matches) -> Calibration:
    """Calibration of all predictions that are not ignored, and the threshold of best F1 over all categories."""
    counted = ~matches.ignored[0]
    scores, right = matches.predictions.scores[counted], matches.hits[0][counted]
    positives = int(matches.counted.sum())
    edges = np.linspace(0, 1, BINS + 1)
    places = np.clip(np.digitize(scores, edges) - 1, 0, BINS - 1)
    counts = np.bincount(places, minlength=BINS)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_score = np.bincount(places, scores, BINS) / counts
        precision = np.bincount(places, right, BINS) / counts
    error = float(np.nansum(counts * np.abs(mean_score - precision)) / max(1, counts.sum()))
    order = np.argsort(-scores, kind="stable")
    ranked, true = scores[order], right[order].cumsum()
    shown = np.arange(1, len(order) + 1)
    f1 = 2 * true / np.maximum(1, shown + positives)
    last = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1) if len(ranked) else np.zeros(0, np.int64)
    best = int(last[f1[last].argmax()]) if len(last) else -1
    levels = np.linspace(0, 1, 101)
    above = np.searchsorted(-ranked, -levels, side="right")
    hits = np.append(0, true)[above]
    curve = np.stack(
        [hits / np.maximum(1, above), hits / max(1, positives), 2 * hits / np.maximum(1, above + positives)]
    )
    return Calibration(
        edges=edges,
        counts=counts,
        scores=mean_score,
        precision=precision,
        error=error,
        threshold=float(ranked[best]) if best >= 0 else 1.0,
        f1=float(f1[best]) if best >= 0 else 0.0,
        precision_there=float(true[best] / shown[best]) if best >= 0 else 0.0,
        recall_there=float(true[best] / max(1, positives)) if best >= 0 else 0.0,
        curve=curve,
    )


def image_scores(truth: GroundTruth, matches: Matches, threshold: float) -> tuple[Floats, Ints]:
    """F1 of each image [I] above a score, NaN where there is nothing; and its right, wrong and missed ones [I, 3]."""
    predictions, count = matches.predictions, len(truth.image_ids)
    shown = predictions.scores >= threshold
    right = np.bincount(predictions.images[shown & matches.hits[0]], minlength=count)
    wrong = np.bincount(predictions.images[shown & ~matches.hits[0] & ~matches.ignored[0]], minlength=count)
    objects = np.bincount(truth.images[matches.counted], minlength=count)
    whole = 2 * right + wrong + (objects - right)
    f1 = np.where(whole > 0, 2 * right / np.maximum(1, whole), np.nan)
    return f1, np.stack([right, wrong, objects - right], axis=1)
