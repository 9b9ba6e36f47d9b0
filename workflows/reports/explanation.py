"""The page that explains an evaluation: `reports/eval-<name>.html`.

truth, predictions --match--> fates of predictions --> intervals, errors, confusions, calibration, pictures
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib import ticker
from PIL import Image

from ovd_models.drawing import beside, draw_boxes
from ovd_models.metrics.average_precision import SIZES, THRESHOLDS, Curves
from ovd_models.metrics.explanation import (
    ERROR_KINDS,
    Calibration,
    Errors,
    calibrate,
    confusions,
    find_errors,
    gains,
    image_scores,
)
from ovd_models.metrics.matching import Matches, average_precisions, bootstrap, interval, match, mean_of
from ovd_models.metrics.protocols import Measured, Protocol, counted
from ovd_models.metrics.records import Bools, Floats, GroundTruth, Ints, IouType, Predictions, xyxy
from workflows.reports.page import GREEN, INK, new_plot, plot_data_uri, render_page

DRAWS = 100
"""Of the bootstrap."""
NUM_PICTURES, NUM_CONFUSIONS = 6, 12
COLOURS = (GREEN, "#c2410c", "#2563a8", "#7a5195")
ReadImage = Callable[[int], Image.Image | None]
"""The image of a number, or None if it cannot be read."""
MEANING = {
    "classification": "fits an object of another name",
    "localisation": "the right name, but overlaps its object too little",
    "both": "another name, and too little overlap",
    "duplicate": "a second box of a found object",
    "background": "no object there",
    "missed": "objects that nothing found",
}


@dataclass(frozen=True, kw_only=True)
class Explained:
    """All that the page shows."""

    truth: GroundTruth
    matches: Matches
    errors: Errors
    gains: Mapping[str, float]
    calibration: Calibration
    groups: Mapping[str, Bools]
    """Groups of categories [K]: all, and by split or frequency."""
    draws: Mapping[str, Floats]
    """`AP <group>` and `AP50 <group>` in the draws of a bootstrap over images."""


def explain(truth: GroundTruth, predictions: Predictions, protocol: Protocol, kind: IouType) -> Explained:
    """Match predictions by a protocol's rules, and find what the page shows."""
    groups = groups_of(truth)
    truth, predictions = counted(truth, predictions, protocol)
    matches = match(truth, predictions, kind)
    errors = find_errors(truth, matches, kind)
    draws = bootstrap(truth, matches, dict(groups), DRAWS)
    return Explained(
        truth=truth,
        matches=matches,
        errors=errors,
        gains={str(name): value for name, value in gains(truth, matches, errors).items()},
        calibration=calibrate(truth, matches),
        groups=groups,
        draws=draws,
    )


def groups_of(truth: GroundTruth) -> dict[str, Bools]:
    """All categories, of which those with objects count, and those of each frequency or split."""
    frequencies = np.array([entry.frequency for entry in truth.categories])
    splits = np.array([entry.split for entry in truth.categories])
    named: dict[str, Bools] = {}
    if len(frequencies) and np.isin(frequencies, ["r", "c", "f"]).all():
        named = {"rare": frequencies == "r", "common": frequencies == "c", "frequent": frequencies == "f"}
    elif (splits == "novel").any():
        named = {"base": splits == "base", "novel": splits == "novel"}
    return {"all": np.ones(len(splits), np.bool_), **named}


def render(
    explained: Explained,
    measured: Measured,
    *,
    title: str,
    subject: str,
    protocol: Protocol,
    kind: IouType,
    read: ReadImage | None = None,
) -> str:
    """The page as HTML.

    Args:
        explained: of the evaluation.
        measured: its numbers and curves.
        title: name of the page.
        subject: the model or file that was evaluated.
        protocol: its rules.
        kind: boxes or masks.
        read: the images; None leaves the pictures out.
    """
    truth, matches, found = explained.truth, explained.matches, explained.calibration
    pictures = _pictures(explained, read) if read is not None else {"best": [], "worst": []}
    values: dict[str, Any] = {
        "title": title,
        "subject": subject,
        "protocol": protocol,
        "kind": {"bbox": "boxes", "segm": "masks"}[kind],
        "counts": {
            "images": len(truth.image_ids),
            "objects": int(matches.counted.sum()),
            "predictions": len(matches.predictions),
        },
        "tiles": _tiles(explained),
        "numbers": list(measured.numbers.items()),
        "curve_plots": [] if measured.curves is None else _curve_plots(explained, measured.curves),
        "sizes": [] if measured.curves is None else _sizes(explained, measured.curves),
        "errors": _error_rows(explained),
        "calibration": found,
        "calibration_plots": [plot_reliability(found.edges, found.precision, "score"), _threshold_plot(found)],
        "confusions": _confusion_rows(explained, read),
        "pictures": pictures,
        "classes": _class_rows(explained),
    }
    return render_page("evaluation", values)


def _tiles(explained: Explained) -> list[dict[str, Any]]:
    ap_TK = average_precisions(explained.truth, explained.matches)
    tiles = []
    for group, chosen in explained.groups.items():
        for name, values in (("AP", ap_TK[:, chosen]), ("AP50", ap_TK[0, chosen])):
            if np.isfinite(mean_of(values)):
                low, high = interval(explained.draws[f"{name} {group}"], mean_of(values))
                tiles.append({"name": f"{name}, {group}", "value": mean_of(values), "low": low, "high": high})
    return tiles


def _curve_plots(explained: Explained, curves: Curves) -> list[str]:
    """Precision by recall: of each group at IoU 0.5, and of all categories at several IoUs."""
    recalls = np.linspace(0, 1, curves.precision.shape[1])
    precision_TRK = np.where(curves.precision[..., 0, -1] < 0, np.nan, curves.precision[..., 0, -1])
    by_group = {name: precision_TRK[0][:, chosen] for name, chosen in explained.groups.items()}
    chosen = explained.groups["all"]
    by_iou = {f"IoU {THRESHOLDS[at]:.2f}": precision_TRK[at][:, chosen] for at in (0, 5, 8)}
    plots = []
    for lines in (by_group, by_iou):
        figure, axes = new_plot("recall", "precision", 4.6)
        for colour, (name, values) in zip(COLOURS, lines.items(), strict=False):
            if np.isfinite(values).any():
                axes.plot(recalls, np.nanmean(values, axis=1), color=colour, label=name, linewidth=1.6)
        _unit_axes(axes)
        axes.legend(fontsize=8, frameon=False)
        plots.append(plot_data_uri(figure))
    return plots


def _unit_axes(axes: Any) -> None:
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(ticker.FormatStrFormatter("%.1f"))


def _sizes(explained: Explained, curves: Curves) -> list[dict[str, Any]]:
    truth = explained.truth
    own = truth.areas[explained.matches.counted]
    edges = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}
    rows = []
    for size in SIZES[1:]:
        low, high = edges[size]
        ap = curves.ap(size=size, categories=explained.groups["all"])
        count = int(((own >= low) & (own <= high)).sum())
        rows.append({"name": size, "objects": count, "ap": ap if ap >= 0 else None})
    return rows


def _error_rows(explained: Explained) -> list[dict[str, Any]]:
    counts = np.bincount(explained.errors.kinds[explained.errors.kinds >= 0], minlength=len(ERROR_KINDS))
    shown = explained.matches.predictions.scores >= explained.calibration.threshold
    above = np.bincount(explained.errors.kinds[(explained.errors.kinds >= 0) & shown], minlength=len(ERROR_KINDS))
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "meaning": MEANING[name],
            "gain": explained.gains[name],
            "count": int(counts[number]),
            "above": int(above[number]),
        }
        for number, name in enumerate(ERROR_KINDS)
    ]
    rows[-1] |= {"count": len(explained.errors.missed), "above": None}
    most = max([row["gain"] for row in rows if np.isfinite(row["gain"])], default=0)
    return [{**row, "share": 100 * max(0.0, row["gain"]) / most if most > 0 else 0} for row in rows]


def plot_reliability(edges: Floats, share: Floats, label: str) -> str:
    """Plot the share that is right in bins of a score; NaN for empty ones."""
    figure, axes = new_plot(label, "share that is right", 4.6)
    axes.bar((edges[1:] + edges[:-1]) / 2, np.nan_to_num(share), 0.9 * np.diff(edges), color=GREEN, alpha=0.75)
    axes.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle="--")
    _unit_axes(axes)
    return plot_data_uri(figure)


def _threshold_plot(found: Calibration) -> str:
    figure, axes = new_plot("score threshold", "", 4.6)
    levels = np.linspace(0, 1, found.curve.shape[1])
    for colour, name, values in zip(COLOURS, ("precision", "recall", "F1"), found.curve, strict=False):
        axes.plot(levels, values, color=colour, label=name, linewidth=1.6)
    axes.axvline(found.threshold, color=INK, linewidth=1, linestyle="--")
    _unit_axes(axes)
    axes.legend(fontsize=8, frameon=False)
    return plot_data_uri(figure)


def _class_rows(explained: Explained) -> list[dict[str, Any]]:
    """Each category with its support, worst first; those without objects are left out."""
    truth, matches = explained.truth, explained.matches
    ap_TK = average_precisions(truth, matches)
    labels = truth.labels[matches.counted]
    objects = np.bincount(labels, minlength=len(truth.categories))
    pairs = np.unique(np.stack([truth.images[matches.counted], labels]), axis=1)
    images = np.bincount(pairs[1], minlength=len(truth.categories))
    predictions = np.bincount(matches.predictions.labels, minlength=len(truth.categories))
    order = np.argsort(np.where(np.isnan(ap_TK[0]), np.inf, ap_TK[0]), kind="stable")
    return [
        {
            "name": truth.categories[label].name,
            "split": truth.categories[label].split or truth.categories[label].frequency,
            "objects": int(objects[label]),
            "images": int(images[label]),
            "predictions": int(predictions[label]),
            "ap": float(ap_TK[:, label].mean()),
            "ap50": float(ap_TK[0, label]),
        }
        for label in order.tolist()
        if objects[label]
    ]


# ------------------------------------------------------------------------------------------------------------ pictures


def _confusion_rows(explained: Explained, read: ReadImage | None) -> list[dict[str, Any]]:
    """The most frequent confusions above the best threshold, each with the crop of its best-scored example."""
    truth, predictions = explained.truth, explained.matches.predictions
    threshold = explained.calibration.threshold
    rows = []
    for true, given, found in confusions(truth, explained.matches, explained.errors, threshold)[:NUM_CONFUSIONS]:
        image = read(int(predictions.images[found[0]])) if read is not None else None
        box = xyxy(predictions.boxes[found[:1]])[0].tolist()
        rows.append(
            {
                "true": truth.categories[true].name,
                "given": truth.categories[given].name,
                "count": len(found),
                "score": float(predictions.scores[found[0]]),
                "picture": crop(image, box) if image is not None else None,
            }
        )
    return rows


def crop(image: Image.Image, box: Sequence[float], margin: float = 0.4, side: int = 220) -> Image.Image:
    """A box with some of its surroundings, at most `side` pixels wide and high."""
    x0, y0, x1, y1 = box
    dx, dy = margin * max(8.0, x1 - x0), margin * max(8.0, y1 - y0)
    window = (
        int(max(0, x0 - dx)),
        int(max(0, y0 - dy)),
        int(min(image.width, x1 + dx)) or 1,
        int(min(image.height, y1 + dy)) or 1,
    )
    part = image.convert("RGB").crop((*window[:2], max(window[2], window[0] + 1), max(window[3], window[1] + 1)))
    scale = side / max(part.size)
    return part.resize((max(1, round(part.width * scale)), max(1, round(part.height * scale))))


def _pictures(explained: Explained, read: ReadImage) -> dict[str, list[dict[str, Any]]]:
    """The images of the lowest and of the highest F1; of equal ones, those with most objects."""
    f1, counts = image_scores(explained.truth, explained.matches, explained.calibration.threshold)
    size = counts.sum(1)
    known = np.flatnonzero(np.isfinite(f1))
    worst = known[np.lexsort((-size[known], f1[known]))]
    best = known[np.lexsort((-size[known], -f1[known]))]
    return {name: _drawn(explained, read, order, f1, counts) for name, order in (("worst", worst), ("best", best))}


def _drawn(explained: Explained, read: ReadImage, order: Ints, f1: Any, counts: Ints) -> list[dict[str, Any]]:
    shown: list[dict[str, Any]] = []
    for number in order.tolist():
        if len(shown) == NUM_PICTURES:
            break
        image = read(number)
        if image is not None:
            right, wrong, missed = counts[number].tolist()
            entry = {"f1": float(f1[number]), "right": right, "wrong": wrong, "missed": missed}
            shown.append({**entry, "picture": draw_pair(explained, number, image)})
    return shown


def draw_pair(explained: Explained, number: int, image: Image.Image) -> Image.Image:
    """The annotated objects of an image on the left, its predictions above the best threshold on the right."""
    return beside(draw_annotated(explained, number, image), draw_predicted(explained, number, image))


def draw_annotated(explained: Explained, number: int, image: Image.Image) -> Image.Image:
    """An image with its annotated objects."""
    truth = explained.truth
    own = np.flatnonzero((truth.images == number) & explained.matches.counted)
    return draw_columns(image, truth, own, [truth.names[label] for label in truth.labels[own].tolist()])


def draw_predicted(explained: Explained, number: int, image: Image.Image) -> Image.Image:
    """An image with its predictions above the best threshold."""
    predictions = explained.matches.predictions
    found = np.flatnonzero((predictions.images == number) & (predictions.scores >= explained.calibration.threshold))
    rows = zip(predictions.labels[found].tolist(), predictions.scores[found].tolist(), strict=True)
    texts = [f"{explained.truth.names[label]} {score:.2f}" for label, score in rows]
    return draw_columns(image, predictions, found, texts)


def draw_columns(
    image: Image.Image, columns: GroundTruth | Predictions, rows: Ints, texts: Sequence[str]
) -> Image.Image:
    """An image with some boxes of a ground truth or of predictions, in the colours of their names."""
    boxes = torch.from_numpy(xyxy(columns.boxes[rows]).astype(np.float32))
    return draw_boxes(image.convert("RGB"), boxes, list(texts), columns.labels[rows].tolist())
