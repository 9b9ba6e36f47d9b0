"""Compare runs, checkpoints or predictions on one annotated set: is one better, where, and is it more than chance?

each: predictions --match--> fates --+--> differences with paired intervals over images, names that gained and lost
                                     +--> reports/compare-<name>.html, with pictures side by side

python workflows/compare.py --runs store/runs/codet/A store/runs/codet/B --boxes pictograms-eval
python workflows/compare.py --runs a.json b.json --ground-truth gt.json --output differences.json

The first one is what the others are compared with.
"""

from workflows.common import brief_help

brief_help.answer(__name__, __file__, "runs storage boxes ground_truth name output workers device")

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from data_prep import storage, tables
from ovd_models.checkpoints import read_info
from ovd_models.errors import InputError
from ovd_models.metrics.protocols import Measured, Protocol, measure
from ovd_models.metrics.records import GroundTruth, IouType, Predictions
from workflows.common import cli, measured, models
from workflows.common.measured import ProtocolChoice
from workflows.common.output import check_place
from workflows.configs.evaluation import Run as EvaluationRun
from workflows.reports import evaluation
from workflows.reports.compare import Compared, Entry, compare, console_table, render
from workflows.reports.explanation import ReadImage, explain

FILES = (".json", ".parquet")


@dataclass(frozen=True, kw_only=True)
class Run:
    """What to compare, and on which set."""

    runs: tuple[str, ...] = ()
    """Two or more: folders of trainings (`store/runs/codet/NAME`), checkpoints (a folder, a URI, `models:/NAME@ALIAS`)
    or files of predictions (.json, .parquet)."""
    storage: str = "store"
    """Folder or URI that holds all tables."""
    boxes: str = "pictograms-eval"
    """Name of the `boxes` table."""
    categories: str = ""
    """Name of the `categories` table; if empty, that of `boxes` up to the last dash."""
    ground_truth: str = ""
    """For files of predictions, an annotation file instead of `boxes`."""
    novel: str = ""
    """With `ground_truth`: a file with the names of the novel categories, one a line."""
    protocol: ProtocolChoice = "auto"
    iou_type: IouType = "bbox"
    name: str = ""
    """Of the page; made of the runs' names if empty."""
    output: str = ""
    """File for the differences, in JSON."""
    device: str = "auto"
    """Device of all models, such as `cuda`; `auto` is a GPU if this machine has one."""
    workers: int = 0
    """Actors that predict; 0 predicts in this process."""


CONFIGS = {"default": Run}


def evaluate_each(run: Run) -> tuple[list[Entry], Protocol]:
    """Predict and evaluate each of the runs, in their order.

    Raises:
        InputError: there are fewer than two, one cannot be read, or a checkpoint is compared on an annotation file.
    """
    if len(run.runs) < 2:
        raise InputError(f"--runs: {len(run.runs)} given, expected two or more")
    if run.ground_truth:
        truth = measured.read_truth_file(run.ground_truth, run.iou_type, run.novel)
    else:
        truth, _ = measured.read_truth_table(run.storage, run.boxes, run.categories or tables.category_table(run.boxes))
    protocol = measured.choose_protocol(truth, run.protocol)
    if protocol == "ovsam":
        raise InputError("--protocol ovsam: has no average precision, expected another")
    check_runs(run)
    names = short_names(run.runs)
    return [entry_of(run, uri, name, truth, protocol) for uri, name in zip(run.runs, names, strict=True)], protocol


def check_runs(run: Run) -> None:
    """Check that each of the runs can be evaluated, before the first one predicts.

    Raises:
        InputError: one is missing, or cannot be compared on this set.
    """
    for uri in run.runs:
        if storage.base_name(uri).endswith(FILES):
            if not storage.exists(uri):
                raise InputError(f"--runs {uri}: no such file, expected one of predictions")
            continue
        if run.ground_truth:
            raise InputError(f"--runs {uri}: a checkpoint needs pictures, expected --boxes instead of --ground-truth")
        model = checkpoint_of(uri, run.storage)
        if "://" in model:  # not downloaded for this
            cli.check_checkpoint("--runs", model)
        else:
            info = read_info(models.local_model(model, run.storage))
            evaluation.check_detector(info, f"--runs {uri}", run.iou_type)


def entry_of(run: Run, uri: str, name: str, truth: GroundTruth, protocol: Protocol) -> Entry:
    """The evaluation of one of the runs."""
    settings: dict[str, Any] = {}
    if storage.base_name(uri).endswith(FILES):
        predictions = measured.read_prediction_file(uri, truth, run.iou_type)
    else:
        predictions, settings = predict(run, uri, protocol)
    result: Measured = measure(truth, predictions, protocol, run.iou_type)
    return Entry(name, explain(truth, predictions, protocol, run.iou_type), result, settings)


def predict(run: Run, uri: str, protocol: Protocol) -> tuple[Predictions, dict[str, Any]]:
    """The predictions of a checkpoint, and the settings of its training."""
    model = checkpoint_of(uri, run.storage)
    settings = EvaluationRun(
        storage=run.storage,
        model=model,
        boxes=run.boxes,
        categories=run.categories,
        iou_type=run.iou_type,
        protocol=run.protocol,
        device=run.device,
        workers=run.workers,
    )
    table = evaluation.predict_boxes(settings)
    _, predictions = measured.read_tables(
        run.storage, run.boxes, run.categories or tables.category_table(run.boxes), table, run.iou_type
    )
    info = read_info(models.local_model(model, run.storage))
    return predictions, cli.flatten_settings({"method": info.method, **info.run})


def checkpoint_of(uri: str, storage_uri: str) -> str:
    """The checkpoint of a training's folder, or the checkpoint itself."""
    if uri.startswith(models.MODEL_SCHEME):
        return uri
    model = storage.join(uri, "model")
    return model if storage.exists(model) else uri


def short_names(uris: tuple[str, ...]) -> list[str]:
    """The parts of the names in which the runs differ."""
    parts = [[part for part in storage.split_options(uri)[0].split("/") if part] for uri in uris]
    last = [own[-1] for own in parts]
    if len(set(last)) == len(last):
        return last
    shared = 0
    while len({own[shared] if shared < len(own) - 1 else shared for own in parts}) == 1 and shared < 20:
        shared += 1
    names = ["/".join(own[shared:]) for own in parts]
    return names if len(set(names)) == len(names) else [f"{number}: {uri}" for number, uri in enumerate(uris, 1)]


def image_reader(run: Run) -> ReadImage | None:
    """Reads the pictures of `boxes`; None for an annotation file."""
    if run.ground_truth:
        return None
    rows = tables.read_table(run.storage, "boxes", run.boxes, ["uri"]).to_pylist()

    def read(number: int) -> Image.Image | None:
        return evaluation.read_picture(run.storage, rows[number]["uri"])

    return read


def page_title(names: Sequence[str]) -> str:
    """The title of a page from the names of its entries, without the extensions of files: `v1.0` stays itself."""
    stems = [name.removesuffix(next((end for end in FILES if name.endswith(end)), "")) for name in names]
    return "-".join(stems)[:80].replace("/", "-")


def write_page(run: Run, compared: Compared, protocol: Protocol) -> str:
    """Write the page; returns its URI."""
    title = run.name or page_title([entry.name for entry in compared.entries])
    subject = run.ground_truth or run.boxes
    html = render(compared, title=title, subject=subject, protocol=protocol, read=image_reader(run))
    uri = storage.join(run.storage, "reports", f"compare-{title}.html")
    storage.write_bytes(uri, html.encode())
    return uri


def main() -> None:
    """Evaluate each, print the differences and write the page."""
    run = cli.parse(CONFIGS, __doc__)
    check_place(run.output, "--output")
    entries, protocol = evaluate_each(run)
    compared = compare(entries)
    print(console_table(compared))
    uri = write_page(run, compared, protocol)
    if run.output:
        storage.write_bytes(run.output, (json.dumps(compared.to_json(), indent=1) + "\n").encode())
    print(f"page: {uri}")


if __name__ == "__main__":
    cli.execute(main)
