"""Evaluate a detector, an OV-SAM or any predictions by LVIS's, COCO's, OV-COCO's or OV-SAM's rules.

detector, boxes/<name> --parts on actors--> predictions --+
ground truth, results of any tool (COCO's JSON) ----------+--> protocol --> metrics, page, pictures
OV-SAM,   boxes/<name> --every object by its box, by a click--> named masks -> IoU, accuracy, cost, pictures

python workflows/evaluate.py --model runs/demo/codet --storage runs/demo --boxes pictograms-eval
python workflows/evaluate.py --model MODEL --boxes lvis-eval --workers 8 --device cuda --export dt.json
python workflows/evaluate.py --ground-truth gt.json --predictions dt.json --protocol lvis --output metrics.json
python workflows/evaluate.py --model MODEL --boxes pictograms2-eval   # transfer: another set, by its names alone
python workflows/evaluate.py --model store/runs/ovsam/NAME/model --sam store/runs/ovsam/NAME/sam_model
"""

from workflows.common import brief_help

brief_help.answer(
    __name__,
    __file__,
    "model storage boxes protocol iou_type ground_truth predictions output export images workers device",
)

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from data_prep import storage, tables
from ovd_models.errors import InputError
from ovd_models.metrics.official import evaluate_official
from ovd_models.metrics.protocols import Measured, Protocol, measure
from ovd_models.metrics.records import GroundTruth, Predictions
from workflows.common import cli, measured
from workflows.common.output import check_place
from workflows.configs.evaluation import Run

CONFIGS = {"default": Run}


def evaluate_files(run: Run) -> tuple[dict[str, float], str]:
    """Evaluate predictions made elsewhere against an annotation file; returns the numbers and what was read.

    Raises:
        InputError: a file is unreadable or malformed, or lacks what the protocol needs.
    """
    started = time.perf_counter()
    if run.model or run.export:
        raise InputError(f"--{'model' if run.model else 'export'}: not with --predictions, expected one of them")
    if not (run.ground_truth and run.predictions):
        lacking = "--predictions" if run.ground_truth else "--ground-truth"
        raise InputError(f"{lacking}: missing, expected both --ground-truth and --predictions")
    truth = measured.read_truth_file(run.ground_truth, run.iou_type, run.novel)
    protocol = measured.choose_protocol(truth, run.protocol)
    if run.page and (run.engine == "lvis" or protocol == "ovsam"):
        raise InputError("--page: shows curves, which --engine lvis and --protocol ovsam do not give")
    if run.engine == "lvis" and protocol != "lvis":
        raise InputError(f"--engine lvis: evaluates --protocol lvis only, not {protocol}")
    found = measured.read_prediction_file(run.predictions, truth, run.iou_type)
    if run.engine == "lvis":
        numbers = evaluate_official(run.ground_truth, run.predictions, run.iou_type)
    else:
        result = measure(truth, found, protocol, run.iou_type)
        numbers = dict(result.numbers)
    if run.page:
        write_page(run, truth, found, protocol, result)
    return numbers, (
        f"{protocol}, {run.iou_type}: {len(truth.image_ids):,} images, {len(truth.labels):,} objects, "
        f"{len(found):,} predictions; {time.perf_counter() - started:.1f} s"
    )


def write_page(run: Run, truth: GroundTruth, found: Predictions, protocol: Protocol, result: Measured) -> None:
    """Write the page that explains an evaluation of files, without pictures."""
    from workflows.reports.explanation import explain, render  # here, since it takes torch to draw

    explained = explain(truth, found, protocol, run.iou_type)
    title = f"Evaluation on {run.ground_truth.rpartition('/')[2]}"
    html = render(explained, result, title=title, subject=run.predictions, protocol=protocol, kind=run.iou_type)
    storage.write_bytes(run.page, html.encode())
    print(f"page: {run.page}")


def check_flags(run: Run) -> None:
    """Raise InputError for flags that are of files only, or a wrong ending."""
    if run.engine != "fast":
        raise InputError(f"--engine {run.engine}: reads files, expected --ground-truth and --predictions, not --model")
    if run.novel:
        raise InputError(f"--novel {run.novel}: of files, expected --ground-truth; a box set has a split of its own")
    if run.export and not storage.base_name(run.export).endswith((".json", ".parquet")):
        raise InputError(f"--export {run.export}: expected a name that ends with .json or .parquet")


def check_method(run: Run, method: str) -> None:
    """Raise InputError for flags that do not fit the method of the model."""
    if method == "ovsam" and run.export:
        raise InputError(
            f"--export: {run.model} is an OV-SAM, expected a detector; predict.py writes masks in COCO's format"
        )
    if method != "ovsam" and run.protocol == "ovsam":
        raise InputError(f"--protocol ovsam: {run.model} is of method {method!r}, expected an OV-SAM")


def evaluate_model(run: Run) -> tuple[dict[str, float], str]:
    """Evaluate a model on a `boxes` table and log to MLflow; returns the numbers and where they are.

    Raises:
        InputError: the model or a table is missing, or no image can be read.
    """
    # Here, since they take seconds, which predictions made elsewhere do not need.
    from ovd_models.checkpoint_info import read_info, read_source
    from workflows.common import models, tracking
    from workflows.reports import evaluation

    check_flags(run)
    tracking.check_server(run.storage)
    started = time.perf_counter()
    folder = models.local_model(run.model, run.storage)
    local = run if run.workers else replace(run, model=str(folder))
    info = read_info(folder)
    method = info.method
    check_method(run, method)
    if method != "ovsam":
        evaluation.check_detector(info, run.model, run.iou_type)
    start_run = partial(
        tracking.run,
        run.storage,
        experiment=run.boxes.removesuffix("-eval"),
        name=f"{method} evaluated, {run.boxes}",
        params=cli.flatten(run),
        tags={"method": method, "source": read_source(folder)},
    )
    numbers: dict[str, float] = {}
    lines: list[str] = []
    if method == "ovsam":
        report = evaluation.evaluate_segmenter(local)
        with start_run() as tracked:
            tracked.log_data_set(run.storage, "boxes", run.boxes, "evaluation")
            report.log(tracked, "eval", 0)
        print(report.table())
        numbers = {name: value if math.isfinite(value) else -1.0 for name, value in report.rows["ovsam", "box"].items()}
    else:
        evaluated = evaluation.evaluate(local)
        page = evaluation.write_page(run, evaluated)
        with start_run() as tracked:
            tracked.log_data_set(run.storage, "boxes", run.boxes, "evaluation")
            evaluation.log(evaluated, tracked, evaluation.draw_pictures(local, evaluated.table), page.html, "eval", 0)
        numbers = dict(evaluated.measured.numbers)
        if run.export:
            rows = tables.read_parts(run.storage, "predictions", evaluated.table)
            measured.export(evaluated.predictions, evaluated.truth, run.export, rows)
        best = page.calibration
        lines = [
            *transfer_table(evaluated.transfer),
            f"best F1 {best.f1:.3f} above a score of {best.threshold:.3f}: precision {best.precision_there:.3f}, "
            f"recall {best.recall_there:.3f}",
            f"page: {page.uri}",
        ]
    seconds = time.perf_counter() - started
    place = tracking.how_to_open(tracked.uri, tracked.experiment_id)
    lines.append(f"{seconds:.0f} s; metrics, pictures and tables are in MLflow: {place}")
    return numbers, "\n".join(lines)


def transfer_table(numbers: Mapping[str, float]) -> list[str]:
    """AP on another data set by what the training knew of its names, for the console; empty if it is the same set."""
    rows = ["transfer, by what the training knew of the names:"] if numbers else []
    for group in ("base", "novel", "new") if numbers else ():
        count, ap50, ap = (numbers[f"{name}_{group}"] for name in ("names", "AP50", "AP"))
        rows.append(f"  {group:6} {count:4.0f} names  AP50 {ap50:.3f}  AP {ap:.3f}")
    return rows


def main() -> None:
    """Evaluate and print the metrics; those with nothing to measure are -1."""
    run = cli.parse(CONFIGS, __doc__)
    for flag, file in (("--output", run.output), ("--page", run.page), ("--export", run.export)):
        check_place(file, flag)
    numbers, summary = evaluate_files(run) if run.ground_truth or run.predictions else evaluate_model(run)
    for name, value in numbers.items():
        print(f"{name:16} {value:.3f}")
    if run.output:
        measured.write_metrics(run.output, numbers)
    print(summary)
    if run.model:
        words = ("--model", run.model, "--storage", run.storage, "--images", "PICTURES")
        print("next:", cli.script_command("predict", *words))


if __name__ == "__main__":
    cli.execute(main)
