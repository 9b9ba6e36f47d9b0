"""A model's evaluation: its predictions as a table, the metrics from it, and both in MLflow."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from PIL import Image

from data_prep import storage, tables
from data_prep.predictions import PredictionJob, list_parts, pool_of, predict
from data_prep.streams.images import read_image
from ovd_models.checkpoints import CheckpointInfo, load_model, read_info
from ovd_models.errors import InputError
from ovd_models.evaluation import DetectionMetrics, detection_metrics
from ovd_models.metrics.average_precision import LVIS_LIMIT, Curves
from ovd_models.metrics.explanation import Calibration
from ovd_models.metrics.protocols import FIXED_LIMIT, Measured, Protocol, measure
from ovd_models.metrics.records import GroundTruth, IouType, Predictions
from ovd_models.predictors import choose_device, load_segmenter
from ovd_models.sam.model import SamModel
from workflows.common import cluster, measured, models, training
from workflows.common.optimisation import Optimisation
from workflows.common.runs import ActiveRun, Evaluation
from workflows.common.tracking import TrackedRun
from workflows.configs.evaluation import Run
from workflows.reports.detections import detections_of_row, draw_comparison, read_box_images
from workflows.reports.explanation import explain, render
from workflows.reports.pointing import SegmentationReport, evaluate_ovsam


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """A detector's predictions and their metrics."""

    truth: GroundTruth
    predictions: Predictions
    protocol: Protocol
    measured: Measured
    metrics: DetectionMetrics
    """Average precision of each category."""
    table: str
    """Name of the `predictions` table."""
    transfer: Mapping[str, float]
    """On another set than that of the training: AP of its names that the training knew, and of new ones; else empty."""


def check_images(storage_uri: str, boxes: str) -> None:
    """Raise InputError unless a `boxes` table is there and has images, before the hours of a training."""
    if not tables.read_manifest(storage_uri, "boxes", boxes).rows:
        raise InputError(f"boxes/{boxes}: no images to evaluate on, expected at least one")


def check_detector(info: CheckpointInfo, origin: str, kind: IouType) -> None:
    """Check that a checkpoint is a detector with what is evaluated, before it predicts.

    Raises:
        InputError: it is of another method, or has no masks for `segm`.
    """
    if info.method not in ("codet", "vild"):
        raise InputError(f"{origin}: checkpoint of method {info.method!r}, expected 'codet' or 'vild'")
    if info.method == "vild":
        masks = info.model.get("detector", {}).get("masks")
    else:
        masks = info.model.get("architecture") == "centernet2" and info.model.get("centernet2", {}).get("mask_convs")
    if kind == "segm" and not masks:
        raise InputError(f"--iou-type segm: {origin} predicts boxes only, expected a detector with masks")


def evaluate(run: Run) -> Evaluated:
    """Predict with all names of the set as vocabulary, and evaluate from the published predictions.

    An image that cannot be read is named, and has no detections.

    Raises:
        InputError: the model or a table is missing, or no image can be read.
    """
    table = predict_boxes(run)
    truth, found = measured.read_tables(
        run.storage, run.boxes, run.category_table, table, run.iou_type, images=run.images
    )
    protocol = measured.choose_protocol(truth, run.protocol)
    result = measure(truth, found, protocol, run.iou_type)
    if result.curves is None:
        raise InputError(f"--protocol {protocol}: has no average precision, expected another for a detector")
    return Evaluated(
        truth=truth,
        predictions=found,
        protocol=protocol,
        measured=result,
        metrics=detection_metrics(truth, result.curves),
        table=table,
        transfer=transfer_numbers(run, truth, result.curves),
    )


def transfer_numbers(run: Run, truth: GroundTruth, curves: Curves) -> dict[str, float]:
    """AP by what the training knew of the names of another data set: `base`, `novel` or nothing.

    Names are matched as they are written, whatever their case. -1 without objects.
    """
    info = read_info(models.local_model(run.model, run.storage))
    if info.run.get("boxes", run.category_table) == run.category_table:
        return {}
    split_of = {name.casefold(): split for name, split in info.splits.items()}
    known = np.array([split_of.get(name.casefold(), "new") for name in truth.names])
    numbers = {}
    for group in ("base", "novel", "new"):
        chosen = known == group
        numbers[f"names_{group}"] = float(chosen.sum())
        numbers[f"AP50_{group}"] = curves.ap(0.5, categories=chosen) if chosen.any() else -1.0
        numbers[f"AP_{group}"] = curves.ap(categories=chosen) if chosen.any() else -1.0
    return numbers


def predict_boxes(run: Run) -> str:
    """Publish the predictions of a detector for `boxes`, or find them; returns the table's name.

    Raises:
        InputError: the model or a table is missing, or no image can be read.
    """
    run = replace(run, device=choose_device(run.device))
    names, _ = run.read_categories()
    job = PredictionJob(
        model=shared_model(run),
        boxes=run.boxes,
        categories=names,
        images=run.images,
        batch_size=run.batch_size,
        score_threshold=run.score_threshold,
        max_detections=run.max_detections or image_limit(run),
        synonyms=run.synonyms,
        other_words=run.read_synonyms() if run.synonyms != "none" else {},
        device=run.device,
    )
    workers = run.workers
    if workers and run.device == "cpu" and len(list_parts(job, run.storage)) == 1:
        workers = 0  # sooner done than an actor is started
    if workers:
        cluster.start_ray()
        job = replace(job, device=run.device.partition(":")[0])  # Ray shows an actor one GPU
    return predict(job, run.storage, pool_of(workers, run.device))


def image_limit(run: Run) -> int:
    """The number of predictions of an image that the protocol counts."""
    if run.protocol == "lvis-fixed":
        return FIXED_LIMIT
    frequencies = tables.read_table(run.storage, "categories", run.category_table, ["frequency"])["frequency"]
    return LVIS_LIMIT if set(frequencies.to_pylist()) <= {"r", "c", "f"} else 100


def shared_model(run: Run) -> str:
    """The checkpoint as actors find it: a folder of this machine, or a URI."""
    if run.workers and "://" in run.model and not run.model.startswith(models.MODEL_SCHEME):
        return run.model
    return str(models.local_model(run.model, run.storage).absolute())


def evaluate_segmenter(run: Run) -> SegmentationReport:
    """Evaluate an OV-SAM with all names of the set as vocabulary; names with masks in its training are base.

    Raises:
        InputError: a model or a table is missing, or no object has a mask.
    """
    segmenter = load_segmenter(models.local_model(run.model, run.storage), run.device)
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
        device=choose_device(run.device),
    )


def draw_pictures(run: Run, table: str) -> list[Image.Image]:
    """The first images with their annotations, and with their predictions above a score of 0.3."""
    names, _ = run.read_categories()
    rows = tables.read_table(run.storage, "boxes", run.boxes).slice(0, run.num_pictures).to_pylist()
    found = (row for part in tables.read_parts(run.storage, "predictions", table) for row in part.to_pylist())
    shown = zip(read_box_images(run.storage, rows), islice(found, len(rows)), strict=False)
    return [
        draw_comparison(row, detections_of_row(prediction, names, image), names)
        for (row, image), prediction in shown
        if image is not None
    ]


def read_picture(storage_uri: str, uri: str) -> Image.Image | None:
    """The image of a `boxes` row; None if it cannot be read."""
    try:
        return read_image(storage.join(storage_uri, uri))
    except InputError:  # prediction has named it
        return None


@dataclass(frozen=True)
class Page:
    """The page that explains an evaluation."""

    uri: str
    html: str
    calibration: Calibration


def write_page(run: Run, evaluated: Evaluated) -> Page:
    """Write the page that explains an evaluation to `<storage>/reports`."""
    uris = tables.read_table(run.storage, "boxes", run.boxes, ["uri"])["uri"].to_pylist()
    explained = explain(evaluated.truth, evaluated.predictions, evaluated.protocol, run.iou_type)
    html = render(
        explained,
        evaluated.measured,
        title=f"Evaluation on {run.boxes}",
        subject=run.model,
        protocol=evaluated.protocol,
        kind=run.iou_type,
        read=lambda number: read_picture(run.storage, uris[number]),
    )
    uri = storage.join(run.storage, "reports", f"eval-{evaluated.table}.html")
    storage.write_bytes(uri, html.encode())
    return Page(uri, html, explained.calibration)


def log(
    evaluated: Evaluated, tracked: TrackedRun, pictures: Sequence[Image.Image], page: str, prefix: str, step: int
) -> None:
    """Log a detector's metrics, per-class table, page and pictures under `prefix`."""
    tracked.log_text(page, f"{prefix}/page.html")
    metrics = evaluated.metrics
    official = {
        f"{evaluated.protocol}/{name.replace('@', '_')}": value for name, value in evaluated.measured.numbers.items()
    }
    transfer = {f"transfer/{name}": value for name, value in evaluated.transfer.items()}
    values: Mapping[str, float] = metrics.summary() | official | transfer
    tracked.log_metrics({f"{prefix}/{name}": value for name, value in values.items()}, step)
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
    evaluated = evaluate(run)
    metrics = evaluated.metrics
    tracked.log_data_set(run.storage, "boxes", run.boxes, "evaluation")
    page = write_page(run, evaluated)
    log(evaluated, tracked, draw_pictures(run, evaluated.table), page.html, prefix, step)
    return Evaluation(
        metrics=metrics,
        headline=f"{prefix}/{metrics.headline}",
        value=metrics.summary()[metrics.headline],
        threshold=page.calibration.threshold if page.calibration.f1 else None,
    )


def evaluate_trained(run: Run, active: ActiveRun, stage: Optimisation, prefix: str) -> Evaluation[DetectionMetrics]:
    """Evaluate a training's detector on the training's workers and devices, and log the results under `prefix`.

    Args:
        run: of the evaluation.
        active: the training; its workers get the stored copy of a model that is in a folder of this machine alone.
        stage: settings of the stage that made the detector.
        prefix: of the metrics' names.
    """
    if stage.workers:
        run = replace(
            run,
            model=active.stored.get(run.model, run.model),
            workers=stage.workers,
            device="cuda" if stage.use_gpu else "cpu",
        )
    else:
        run = replace(run, device=training.device_of(stage))
    return evaluate_and_log(run, active.tracked, prefix, active.last_step)
