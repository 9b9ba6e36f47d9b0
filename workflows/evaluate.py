"""Evaluate a checkpoint on an annotated set, by base, novel and all names, with pictures.

detector, boxes/<name> --detect every image--> Detections -> faster-coco-eval -> AP, per-class table, pictures
OV-SAM,   boxes/<name> --every object by its box, by a click--> named masks -> IoU, accuracy, cost, pictures

python workflows/evaluate.py --model runs/demo/codet --storage runs/demo --boxes pictograms-eval
python workflows/evaluate.py --model store/runs/ovsam/<run>/model --sam store/runs/ovsam/<run>/sam_model
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from PIL import Image

from data_prep import storage, tables
from ovd_models.batches import Detections
from ovd_models.checkpoints import load_model, read_info
from ovd_models.errors import InputError
from ovd_models.evaluation import DetectionMetrics, evaluate_detections
from ovd_models.predictors import load_segmenter
from ovd_models.sam.model import SamModel
from ovd_models.vocabulary import SynonymRule
from workflows.common import cli, registry, tracking
from workflows.common.runs import Evaluation
from workflows.common.tracking import TrackedRun
from workflows.reports.detections import DetectorRun, draw_comparison, read_box_images
from workflows.reports.pointing import SegmentationReport, evaluate_ovsam


@dataclass(frozen=True, kw_only=True)
class Run(DetectorRun):
    """One evaluation of a detector or an OV-SAM; requires `--model`."""

    sam: str = ""
    """For OV-SAM: folder or URI of a SAM to compare with, also by naming its masks with CLIP."""
    images: int = 0
    """Number of images, from the start of the table; 0 means all."""
    batch_size: int = 16
    """For detectors only, as are the three settings below."""
    score_threshold: float = 0.01
    max_detections: int = 100
    masks: bool = False
    """Evaluate masks instead of boxes; the detector must predict them."""
    synonyms: SynonymRule = "none"
    """Use of the synonyms in `categories`: none, the mean of their embeddings, or the maximum of their scores."""
    num_pictures: int = 8
    """Number of images to draw."""


CONFIGS = {"default": Run}


def evaluate(run: Run) -> tuple[DetectionMetrics, list[Image.Image]]:
    """Evaluate a detector with all names of the set as vocabulary.

    An image that cannot be read is named, and has no detections.

    Returns:
        The metrics, and drawings of the first images' detections with scores above 0.3.

    Raises:
        InputError: the model or a table is missing, or no image can be read.
    """
    if run.batch_size < 1:
        raise InputError(f"batch_size: {run.batch_size}, expected at least 1")
    detector = run.load_detector()
    rows = tables.read_table(run.storage, "boxes", run.boxes).to_pylist()[: run.images or None]
    names, splits = run.read_categories()
    words = None if run.synonyms == "none" else run.read_synonyms()
    detections: list[Detections] = []
    read = read_box_images(run.storage, rows)
    while batch := list(islice(read, run.batch_size)):
        images = [image for _, image in batch if image is not None]
        found = iter(
            detector.detect(
                images,
                list(names.values()),
                score_threshold=run.score_threshold,
                max_detections=run.max_detections,
                synonyms=words,
                merge="max" if run.synonyms == "max" else "mean",
            )
            if images
            else ()
        )
        results = [no_detections(row, names) if image is None else next(found) for row, image in batch]
        drawn = max(0, run.num_pictures - len(detections))  # keeping all images would fill the memory
        detections += [*results[:drawn], *(replace(result, image=None) for result in results[drawn:])]
    shown = zip(rows[: run.num_pictures], detections, strict=False)
    pictures = [draw_comparison(row, result, names) for row, result in shown if result.image is not None]
    return evaluate_detections(rows, detections, names, splits, "segm" if run.masks else "bbox"), pictures


def no_detections(row: Mapping[str, Any], names: Mapping[int, str]) -> Detections:
    """The detections of an image that cannot be read."""
    return Detections(
        boxes=torch.zeros(0, 4),
        scores=torch.zeros(0),
        labels=torch.zeros(0, dtype=torch.int64),
        names=tuple(names.values()),
        width=row["width"],
        height=row["height"],
        masks=(),
    )


def evaluate_segmenter(run: Run) -> SegmentationReport:
    """Evaluate an OV-SAM with all names of the set as vocabulary; names with masks in its training are base.

    Raises:
        InputError: a model or a table is missing, or no object has a mask.
    """
    segmenter = load_segmenter(registry.local_model(run.model, run.storage), run.device)
    categories, _ = run.read_categories()
    return evaluate_ovsam(
        run.storage,
        run.boxes,
        {name: category_id for category_id, name in categories.items()},
        segmenter.names(list(categories.values())),
        segmenter.model,
        load_model(storage.local_folder(run.sam), SamModel) if run.sam else None,
        limit=run.images,
        num_pictures=run.num_pictures,
        device=run.device,
    )


def log_detection_metrics(
    tracked: TrackedRun, metrics: DetectionMetrics, pictures: Sequence[Image.Image], prefix: str, step: int
) -> None:
    """Log a detector's metrics, per-class table and pictures under `prefix`."""
    tracked.log_metrics({f"{prefix}/{name}": value for name, value in metrics.summary().items()}, step)
    columns: dict[str, Sequence[object]] = {
        column: [getattr(entry, column) for entry in metrics.categories] for column in ("name", "split", "ap", "ap50")
    }
    tracked.log_table(columns, f"{prefix}/per_class.json")
    tracked.log_pictures(pictures, prefix)


def evaluate_and_log(run: Run, tracked: TrackedRun, prefix: str, step: int) -> Evaluation[DetectionMetrics]:
    """Evaluate a detector in training and log the results.

    Raises:
        InputError: the model or a table is missing.
    """
    metrics, pictures = evaluate(run)
    tracked.log_data_set(run.storage, "boxes", run.boxes, "evaluation")
    log_detection_metrics(tracked, metrics, pictures, prefix, step)
    return Evaluation(
        metrics=metrics, headline=f"{prefix}/{metrics.headline}", value=metrics.summary()[metrics.headline]
    )


def main() -> None:
    """Evaluate, log to MLflow and print the metrics."""
    run = cli.parse(CONFIGS, __doc__)
    tracking.check_server(run.storage)
    started = time.perf_counter()
    folder = registry.local_model(run.model, run.storage)
    local = replace(run, model=str(folder))
    method = read_info(folder).method
    start_run = partial(
        tracking.run,
        run.storage,
        experiment=run.boxes.removesuffix("-eval"),
        name=f"{method} evaluated, {run.boxes}",
        params=cli.flatten(run),
        tags={"method": method},
    )
    if method == "ovsam":
        report = evaluate_segmenter(local)
        with start_run() as tracked:
            tracked.log_data_set(run.storage, "boxes", run.boxes, "evaluation")
            report.log(tracked, "eval", 0)
        print(report.table())
    else:
        metrics, pictures = evaluate(local)
        with start_run() as tracked:
            tracked.log_data_set(run.storage, "boxes", run.boxes, "evaluation")
            log_detection_metrics(tracked, metrics, pictures, "eval", 0)
        for name, value in metrics.summary().items():
            print(f"{name:12} {value:.3f}")
    print(f"{time.perf_counter() - started:.0f} s; metrics, pictures and tables are in MLflow: {tracked.uri}")


if __name__ == "__main__":
    cli.execute(main)
