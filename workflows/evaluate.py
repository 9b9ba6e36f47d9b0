"""Evaluate a detector, an OV-SAM or any predictions by LVIS's, COCO's, OV-COCO's or OV-SAM's rules.

detector, boxes/<name> --parts on actors--> predictions --+
ground truth, results of any tool (COCO's JSON) ----------+--> protocol --> metrics, page, pictures
OV-SAM,   boxes/<name> --every object by its box, by a click--> named masks -> IoU, accuracy, cost, pictures

python workflows/evaluate.py --model runs/demo/codet --storage runs/demo --boxes pictograms-eval
python workflows/evaluate.py --model MODEL --boxes lvis-eval --workers 8 --device cuda --export dt.json
python workflows/evaluate.py --ground-truth gt.json --predictions dt.json --protocol lvis --output metrics.json
python workflows/evaluate.py --model store/runs/ovsam/<run>/model --sam store/runs/ovsam/<run>/sam_model
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Literal

from PIL import Image

from data_prep import storage, tables
from data_prep.predictions import PredictionJob, list_parts, pool_of, predict, read_predictions
from ovd_models.checkpoints import load_model, read_info
from ovd_models.errors import InputError
from ovd_models.evaluation import DetectionMetrics, detection_metrics
from ovd_models.metrics.average_precision import LVIS_LIMIT
from ovd_models.metrics.official import evaluate_official
from ovd_models.metrics.protocols import Measured, Protocol, measure
from ovd_models.metrics.records import GroundTruth, IouType, Predictions
from ovd_models.predictors import load_segmenter
from ovd_models.sam.model import SamModel
from ovd_models.vocabulary import SynonymRule
from workflows.common import cli, cluster, measured, registry, tracking
from workflows.common.measured import ProtocolChoice
from workflows.common.runs import Evaluation
from workflows.common.tracking import TrackedRun
from workflows.reports.detections import DetectorRun, detections_of_row, draw_comparison, read_box_images
from workflows.reports.pointing import SegmentationReport, evaluate_ovsam


@dataclass(frozen=True, kw_only=True)
class Run(DetectorRun):
    """One evaluation: of a model (`--model`) or of predictions (`--ground-truth` and `--predictions`)."""

    protocol: ProtocolChoice = "auto"
    """By whose rules; `auto` is LVIS for its files, OV-COCO if there are novel categories, else COCO."""
    iou_type: IouType = "bbox"
    """Boxes or masks; for masks, the detector or the file must have them."""
    ground_truth: str = ""
    """An annotation file in COCO's or LVIS's format, instead of `boxes`."""
    predictions: str = ""
    """Predictions made elsewhere: a results file in COCO's format (.json), or rows of `predictions` (.parquet)."""
    novel: str = ""
    """With `ground_truth`: a file with the names of the novel categories, one a line; if empty, they follow the data
    set."""
    output: str = ""
    """File for the protocol's numbers: a flat JSON object with their official names."""
    export: str = ""
    """File for the model's predictions: a results file (.json), or rows of `predictions` (.parquet)."""
    engine: Literal["fast", "lvis"] = "fast"
    """faster-coco-eval; `lvis` is LVIS's own package, for files and the protocol `lvis`."""
    workers: int = 0
    """Actors that predict, each with a GPU unless `device` is the CPU; 0 predicts in this process."""
    sam: str = ""
    """For OV-SAM: folder or URI of a SAM to compare with, also by naming its masks with CLIP."""
    images: int = 0
    """Number of images, from the start of the table; 0 means all."""
    batch_size: int = 16
    """For detectors only, as are the settings below."""
    score_threshold: float = 0.01
    max_detections: int = 0
    """Of an image; 0 is the protocol's: 300 for LVIS, else 100."""
    synonyms: SynonymRule = "none"
    """Use of the synonyms in `categories`: none, the mean of their embeddings, or the maximum of their scores."""
    num_pictures: int = 8
    """Number of images to draw."""


CONFIGS = {"default": Run}


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """Predictions and their metrics."""

    truth: GroundTruth
    predictions: Predictions
    protocol: Protocol
    measured: Measured
    table: str = ""
    """Name of the `predictions` table; empty for predictions made elsewhere."""

    @property
    def metrics(self) -> DetectionMetrics:
        """Average precision of each category."""
        if self.measured.curves is None:
            raise InputError(f"--protocol {self.protocol}: has no average precision, expected another")
        return detection_metrics(self.truth, self.measured.curves)

    def table_of_numbers(self) -> str:
        """The protocol's numbers for the console; those that have nothing to measure are -1."""
        return "\n".join(f"{name:16} {value:.3f}" for name, value in self.measured.numbers.items())


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
    return Evaluated(truth=truth, predictions=found, protocol=protocol, measured=result, table=table)


def predict_boxes(run: Run) -> str:
    """Publish the predictions of a detector for `boxes`, or find them; returns the table's name.

    Raises:
        InputError: the model or a table is missing, or no image can be read.
    """
    names, _ = run.read_categories()
    truth_like = tables.read_table(run.storage, "categories", run.category_table, ["frequency"])
    lvis = set(truth_like["frequency"].to_pylist()) <= {"r", "c", "f"}
    job = PredictionJob(
        model=shared_model(run),
        boxes=run.boxes,
        categories=names,
        images=run.images,
        batch_size=run.batch_size,
        score_threshold=run.score_threshold,
        max_detections=run.max_detections or (LVIS_LIMIT if lvis else 100),
        synonyms=run.synonyms,
        other_words=run.read_synonyms() if run.synonyms != "none" else {},
        device=run.device,
    )
    workers = run.workers
    if workers and run.device == "cpu" and len(list_parts(job, run.storage)) == 1:
        workers = 0  # sooner done than an actor is started
    if workers:
        cluster.start_ray()
    return predict(job, run.storage, pool_of(workers, run.device))


def shared_model(run: Run) -> str:
    """The checkpoint as actors find it: a folder of this machine, or a URI."""
    if run.workers and "://" in run.model and not run.model.startswith(registry.MODEL_SCHEME):
        return run.model
    return str(registry.local_model(run.model, run.storage).absolute())


def evaluate_files(run: Run) -> Evaluated:
    """Evaluate predictions made elsewhere against an annotation file.

    Raises:
        InputError: a file is unreadable or malformed, or lacks what the protocol needs.
    """
    if not (run.ground_truth and run.predictions):
        lacking = "--predictions" if run.ground_truth else "--ground-truth"
        raise InputError(f"{lacking}: missing, expected both --ground-truth and --predictions")
    truth = measured.read_truth_file(run.ground_truth, run.iou_type, run.novel)
    protocol = measured.choose_protocol(truth, run.protocol)
    found = measured.read_prediction_file(run.predictions, truth, run.iou_type)
    if run.engine == "lvis":
        if protocol != "lvis":
            raise InputError(f"--engine lvis: evaluates --protocol lvis only, not {protocol}")
        numbers = evaluate_official(run.ground_truth, run.predictions, run.iou_type)
        result = Measured(numbers, None)
    else:
        result = measure(truth, found, protocol, run.iou_type)
    return Evaluated(truth=truth, predictions=found, protocol=protocol, measured=result)


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


# ------------------------------------------------------------------------------------------------------------- results


def draw_pictures(run: Run, table: str) -> list[Image.Image]:
    """The first images with their annotations, and with their predictions above a score of 0.3."""
    names, _ = run.read_categories()
    rows = tables.read_table(run.storage, "boxes", run.boxes).slice(0, run.num_pictures).to_pylist()
    manifest = tables.read_manifest(run.storage, "predictions", table)
    found = (row for part in read_predictions(run.storage, table, manifest) for row in part.to_pylist())
    shown = zip(read_box_images(run.storage, rows), islice(found, len(rows)), strict=False)
    return [
        draw_comparison(row, detections_of_row(prediction, names, image), names)
        for (row, image), prediction in shown
        if image is not None
    ]


def log(evaluated: Evaluated, tracked: TrackedRun, pictures: Sequence[Image.Image], prefix: str, step: int) -> None:
    """Log a detector's metrics, per-class table and pictures under `prefix`."""
    metrics = evaluated.metrics
    official = {
        f"{evaluated.protocol}/{name.replace('@', '_')}": value for name, value in evaluated.measured.numbers.items()
    }
    values: Mapping[str, float] = metrics.summary() | official
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
    log(evaluated, tracked, draw_pictures(run, evaluated.table), prefix, step)
    return Evaluation(
        metrics=metrics, headline=f"{prefix}/{metrics.headline}", value=metrics.summary()[metrics.headline]
    )


def write_results(run: Run, evaluated: Evaluated) -> None:
    """Write `output` and `export`, if they are asked for."""
    if run.output:
        measured.write_metrics(run.output, evaluated.measured.numbers)
    if run.export:
        manifest = tables.read_manifest(run.storage, "predictions", evaluated.table)
        rows = read_predictions(run.storage, evaluated.table, manifest)
        measured.export(evaluated.predictions, evaluated.truth, run.export, rows)


def run_on_files(run: Run) -> None:
    """Evaluate files, and print and write the numbers."""
    started = time.perf_counter()
    if run.model or run.export:
        raise InputError(f"--{'model' if run.model else 'export'}: not with --predictions, expected one of them")
    evaluated = evaluate_files(run)
    print(evaluated.table_of_numbers())
    write_results(run, evaluated)
    counts = f"{len(evaluated.truth.image_ids):,} images, {len(evaluated.truth.labels):,} objects, "
    counts += f"{len(evaluated.predictions):,} predictions"
    print(f"{evaluated.protocol}, {run.iou_type}: {counts}; {time.perf_counter() - started:.1f} s")


def main() -> None:
    """Evaluate, log to MLflow and print the metrics."""
    run = cli.parse(CONFIGS, __doc__)
    if run.ground_truth or run.predictions:
        run_on_files(run)
        return
    tracking.check_server(run.storage)
    started = time.perf_counter()
    folder = registry.local_model(run.model, run.storage)
    local = run if run.workers else replace(run, model=str(folder))
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
        evaluated = evaluate(local)
        pictures = draw_pictures(local, evaluated.table)
        with start_run() as tracked:
            tracked.log_data_set(run.storage, "boxes", run.boxes, "evaluation")
            log(evaluated, tracked, pictures, "eval", 0)
        print(evaluated.table_of_numbers())
        write_results(run, evaluated)
    print(f"{time.perf_counter() - started:.0f} s; metrics, pictures and tables are in MLflow: {tracked.uri}")


if __name__ == "__main__":
    cli.execute(main)
