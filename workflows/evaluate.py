"""Evaluate: AP of a detector on an annotated set, by base, novel and all names, with pictures.

model, boxes/<name> --detect every image--> Detections -> faster-coco-eval -> metrics, per-class table, pictures

python workflows/evaluate.py --model runs/demo/codet --storage runs/demo --boxes pictograms-eval
"""

import workflows.startup

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image

import ovd_models
from data_prep import storage, tables
from ovd_models.batches import Detections
from ovd_models.errors import InputError
from ovd_models.evaluation import DetectionMetrics, evaluate_detections
from ovd_models.images import decode_image
from workflows import cli, tracking
from workflows.tracking import TrackedRun


@dataclass(frozen=True, kw_only=True)
class Run:
    """One evaluation."""

    storage: str = "runs"
    """Folder or URI that holds all tables."""
    model: str = ""
    """Folder or URI of a detector checkpoint, or an MLflow `models:/` URI."""
    boxes: str = "pictograms-eval"
    """Name of the `boxes` table."""
    categories: str = ""
    """Name of the `categories` table; that of `boxes` up to the last dash if empty."""
    device: str = "cpu"
    batch_size: int = 16
    score_threshold: float = 0.01
    max_detections: int = 100
    masks: bool = False
    """Compare masks instead of boxes; the detector must predict them."""
    num_pictures: int = 8
    """Images that are drawn."""


def default() -> Run:
    """The pictogram world's held-out scenes; give it `--model`."""
    return Run()


CONFIGS: dict[str, Callable[[], Run]] = {"default": default}


def evaluate(run: Run) -> tuple[DetectionMetrics, list[Image.Image]]:
    """Metrics of a detector, all names of the set asked for at once, and pictures of its detections above 0.3.

    Raises:
        InputError: the model or a table is missing.
    """
    if run.batch_size < 1:
        raise InputError(f"batch_size: {run.batch_size}, expected at least 1")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    detector = ovd_models.load(tracking.local_model(run.model, run.storage), run.device)
    rows = tables.read_table(run.storage, "boxes", run.boxes).to_pylist()
    table = run.categories or run.boxes.rsplit("-", 1)[0]
    categories = [row for row in tables.read_table(run.storage, "categories", table).to_pylist() if row["split"]]
    names = {row["category_id"]: row["name"] for row in categories}
    splits = {row["name"]: row["split"] for row in categories}
    found: list[Detections] = []
    for start in range(0, len(rows), run.batch_size):
        images = [open_image(run, row) for row in rows[start : start + run.batch_size]]
        results = detector.detect(
            images, list(names.values()), score_threshold=run.score_threshold, max_detections=run.max_detections
        )
        drawn = max(0, run.num_pictures - start)  # the other pictures would fill the memory
        found += [*results[:drawn], *(replace(result, image=None) for result in results[drawn:])]
    pictures = [draw_pair(row, result, names) for row, result in zip(rows[: run.num_pictures], found, strict=False)]
    return evaluate_detections(rows, found, names, splits, "segm" if run.masks else "bbox"), pictures


def open_image(run: Run, row: dict[str, Any]) -> Image.Image:
    """The picture of a row of `boxes`."""
    uri = storage.join(run.storage, row["uri"])
    return decode_image(storage.read_bytes(uri), uri)


def truth_as_detections(row: dict[str, Any], names: dict[int, str], found: Detections) -> Detections:
    """The annotated boxes of an image in the form of its detections, each with score 1."""
    known = [(box, names[key]) for box, key in zip(row["boxes"], row["category_ids"], strict=True) if key in names]
    index = {name: position for position, name in enumerate(found.names)}
    return replace(
        found,
        boxes=torch.tensor([box for box, _ in known]).view(-1, 4),
        scores=torch.ones(len(known)),
        labels=torch.tensor([index[name] for _, name in known], dtype=torch.int64),
    )


def draw_pair(row: dict[str, Any], found: Detections, names: dict[int, str], threshold: float = 0.3) -> Image.Image:
    """Annotated boxes on the left; on the right the best name of each object, if above the threshold."""
    left, right = truth_as_detections(row, names, found).draw(), found.above(threshold).distinct().draw()
    pair = Image.new("RGB", (left.width + right.width + 6, left.height), "white")
    pair.paste(left, (0, 0))
    pair.paste(right, (left.width + 6, 0))
    return pair


def log(
    tracked: TrackedRun, metrics: DetectionMetrics, pictures: Sequence[Image.Image], prefix: str, step: int
) -> None:
    """Metrics under `prefix`, the per-class table and the pictures."""
    tracked.log_metrics({f"{prefix}/{name}": value for name, value in metrics.summary().items()}, step)
    columns: dict[str, Sequence[object]] = {
        "name": [entry.name for entry in metrics.categories],
        "split": [entry.split for entry in metrics.categories],
        "ap": [entry.ap for entry in metrics.categories],
        "ap50": [entry.ap50 for entry in metrics.categories],
    }
    tracked.log_table(columns, f"{prefix}/per_class.json")
    for number, picture in enumerate(pictures):
        tracked.log_image(picture, f"{prefix}/picture_{number:02d}")


def main() -> None:
    """The script: evaluate, track, print."""
    run = cli.parse(CONFIGS, __doc__)
    tracking.tracking_uri(run.storage)
    started = time.perf_counter()
    metrics, pictures = evaluate(run)
    with tracking.run(run.storage, experiment="evaluate", name=run.boxes, params=cli.flatten(run)) as tracked:
        log(tracked, metrics, pictures, f"eval/{run.boxes}", 0)
    for name, value in metrics.summary().items():
        print(f"{name:12} {value:.3f}")
    print(f"{time.perf_counter() - started:.0f} s; pictures and the per-class table are in MLflow: {tracked.uri}")


if __name__ == "__main__":
    cli.execute(main)
