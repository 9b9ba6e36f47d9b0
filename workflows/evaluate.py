"""Evaluate a checkpoint on an annotated set, by base, novel and all names, with pictures.

detector, boxes/<name> --detect every image--> Detections -> faster-coco-eval -> AP, per-class table, pictures
OV-SAM,   boxes/<name> --every object by its box, by a click--> named masks -> IoU, accuracy, cost, pictures

python workflows/evaluate.py --model runs/demo/codet --storage runs/demo --boxes pictograms-eval
python workflows/evaluate.py --model store/runs/ovsam/<run>/model --sam store/runs/ovsam/<run>/sam_model
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from PIL import Image

import ovd_models
from data_prep import storage, tables
from ovd_models.batches import Detections
from ovd_models.checkpoints import read_info
from ovd_models.errors import InputError
from ovd_models.evaluation import DetectionMetrics, evaluate_detections
from ovd_models.images import decode_image
from ovd_models.ovsam.checkpoints import load_sam_folder, load_segmenter
from workflows.common import cli, tracking
from workflows.common.runs import Evaluation
from workflows.common.teacher import read_categories
from workflows.common.tracking import TrackedRun
from workflows.reports import pointing as pointing_report


@dataclass(frozen=True, kw_only=True)
class Run:
    """One evaluation."""

    storage: str = "store"
    """Folder or URI that holds all tables."""
    model: str = ""
    """Folder or URI of a detector's or an OV-SAM's checkpoint, or an MLflow `models:/` URI."""
    boxes: str = "pictograms-eval"
    """Name of the `boxes` table."""
    categories: str = ""
    """Name of the `categories` table; that of `boxes` up to the last dash if empty."""
    device: str = "cpu"
    sam: str = ""
    """For an OV-SAM: folder or URI of the SAM to measure beside it, with CLIP on that one's masks as baselines."""
    images: int = 0
    """So many of the table's first images; all if 0."""
    batch_size: int = 16
    """Of a detector, as the three settings below."""
    score_threshold: float = 0.01
    max_detections: int = 100
    masks: bool = False
    """Compare masks instead of boxes; the detector must predict them."""
    num_pictures: int = 8
    """Images that are drawn."""

    @property
    def categories_table(self) -> str:
        """Name of the `categories` table."""
        return self.categories or self.boxes.rsplit("-", 1)[0]


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
    rows = tables.read_table(run.storage, "boxes", run.boxes).to_pylist()[: run.images or None]
    names, splits = read_categories(run.storage, run.categories_table)
    found: list[Detections] = []
    for start in range(0, len(rows), run.batch_size):
        images = [read_box_image(run, row) for row in rows[start : start + run.batch_size]]
        results = detector.detect(
            images, list(names.values()), score_threshold=run.score_threshold, max_detections=run.max_detections
        )
        drawn = max(0, run.num_pictures - start)  # the other pictures would fill the memory
        found += [*results[:drawn], *(replace(result, image=None) for result in results[drawn:])]
    pictures = [draw_pair(row, result, names) for row, result in zip(rows[: run.num_pictures], found, strict=False)]
    return evaluate_detections(rows, found, names, splits, "segm" if run.masks else "bbox"), pictures


def evaluate_segmenter(run: Run) -> pointing_report.Report:
    """IoU and accuracy of an OV-SAM, all names of the set competing; those that had masks in its training are base.

    Raises:
        InputError: a model or a table is missing, or no object has a mask.
    """
    segmenter = load_segmenter(tracking.local_model(run.model, run.storage))
    categories, _ = read_categories(run.storage, run.categories_table)
    return pointing_report.evaluate(
        run.storage,
        run.boxes,
        {name: category_id for category_id, name in categories.items()},
        segmenter.names(list(categories.values())),
        segmenter.model,
        load_sam_folder(storage.local_folder(run.sam))[0] if run.sam else None,
        limit=run.images,
        num_pictures=run.num_pictures,
        device=run.device,
    )


def read_box_image(run: Run, row: dict[str, Any]) -> Image.Image:
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
    tracked.log_pictures(pictures, prefix)


def evaluate_and_log(run: Run, tracked: TrackedRun, prefix: str, step: int) -> Evaluation[DetectionMetrics]:
    """Evaluate a detector in training and log the results.

    Raises:
        InputError: the model or a table is missing.
    """
    metrics, pictures = evaluate(run)
    log(tracked, metrics, pictures, prefix, step)
    return Evaluation(
        metrics=metrics, headline=f"{prefix}/{metrics.headline}", value=metrics.summary()[metrics.headline]
    )


def main() -> None:
    """The script: evaluate, track, print."""
    run = cli.parse(CONFIGS, __doc__)
    tracking.tracking_uri(run.storage)
    started = time.perf_counter()
    folder = tracking.local_model(run.model, run.storage)
    local = replace(run, model=str(folder))
    start_run = partial(tracking.run, run.storage, experiment="evaluate", name=run.boxes, params=cli.flatten(run))
    if read_info(folder).method == "ovsam":
        report = evaluate_segmenter(local)
        with start_run() as tracked:
            report.log(tracked, f"eval/{run.boxes}", 0)
        print(report.table())
    else:
        metrics, pictures = evaluate(local)
        with start_run() as tracked:
            log(tracked, metrics, pictures, f"eval/{run.boxes}", 0)
        for name, value in metrics.summary().items():
            print(f"{name:12} {value:.3f}")
    print(f"{time.perf_counter() - started:.0f} s; metrics, pictures and tables are in MLflow: {tracked.uri}")


if __name__ == "__main__":
    cli.execute(main)
