"""Predict: find named things in pictures of one's own.

model, names, pictures --> drawings, predictions.json (COCO), index.html

python workflows/predict.py --model runs/demo/codet --images photos/ --names "dog, red umbrella"
python workflows/predict.py --model models:/ovd-codet-pictograms@champion --storage runs/demo --images 'photos/*.jpg'
python workflows/predict.py --model store/runs/ovsam/NAME/model --images street.jpg    # all masks, named
python workflows/predict.py --model OVSAM --images photos/ --boxes predictions/predictions.json --output masks
"""

from workflows.common import brief_help

brief_help.answer(__name__, __file__, "model images names boxes output score_threshold min_iou device storage")

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data_prep.boxes.cleaning import Account, SkipReport, clip_box
from data_prep.boxes.coco import file_name
from data_prep.boxes.entries import load_entries
from data_prep.boxes.pictures import PathEnds
from data_prep.progress import Progress
from ovd_models.batches import Detections
from ovd_models.errors import InputError
from ovd_models.images import EXTENSIONS, open_image
from ovd_models.predictors import Classifier, Detector, Segmenter, TextSegmenter
from ovd_models.sam.model import EverythingConfig
from ovd_models.segments import Prompts, Segments
from workflows.common import cli, models
from workflows.common.output import check_folder, write_folder
from workflows.reports.page import render_page

LOWER = (0.6, 0.7)
"""Limits of predicted IoU and stability that a SAM of a short training reaches."""
Predictor = Detector | Segmenter | TextSegmenter
Boxes = Mapping[str, Sequence[Sequence[float]]]
"""Boxes (xyxy, pixels) by the name of their picture."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One prediction; requires `--model` and `--images`."""

    model: str = ""
    """Folder or URI of a checkpoint, or an MLflow `models:/` URI."""
    images: str = ""
    """A folder, which is searched with the folders below it, a file, or a pattern such as `photos/*.jpg`."""
    names: str = ""
    """Names to find, separated by commas; the model's own if empty."""
    boxes: str = ""
    """For OV-SAM: a file in COCO's format with boxes of the pictures; each gets a mask and a name."""
    output: str = "predictions"
    """New folder for the results."""
    score_threshold: float | None = None
    """What is found scores above it; if None, a detector's threshold of best F1, and all masks of other models."""
    points_per_side: int | None = EverythingConfig.points_per_side
    """For OV-SAM without `--boxes`: clicks along each side; if None, one every 8 pixels of the longer side, 8 to 32."""
    min_iou: float = EverythingConfig.min_iou
    """For OV-SAM without `--boxes`: the predicted IoU of a mask is at least this."""
    min_stability: float = EverythingConfig.min_stability
    """For OV-SAM without `--boxes`: a mask's IoU at a higher and a lower threshold is at least this."""
    device: str = "auto"
    """Device of the model, such as `cuda:1`; `auto` is a GPU if there is one."""
    storage: str = "store"
    """Folder or URI whose MLflow has the model of a `models:/` URI."""


CONFIGS = {"default": Run}


@dataclass(frozen=True)
class Job:
    """A prediction that can start."""

    predictor: Predictor
    pictures: Sequence[tuple[Path, str]]
    """Paths, and names relative to the searched folder."""
    names: Sequence[str] | None
    boxes: Boxes | None
    threshold: float
    everything: EverythingConfig
    """Which masks of a whole picture are kept."""


@dataclass(frozen=True)
class Predicted:
    """What was found in one picture."""

    file_name: str
    """Relative to the searched folder."""
    drawing: str
    """Path of the drawing, relative to the output."""
    found: dict[str, int]
    """How often each name was found, most often first."""
    note: str
    """Why nothing was found, or which names have no mask; else empty."""


def find_pictures(images: str) -> list[tuple[Path, str]]:
    """Paths of pictures, and their names relative to the searched folder, sorted.

    Raises:
        InputError: there are none.
    """
    extensions = ", ".join(EXTENSIONS)
    if not images:
        raise InputError("--images: missing, expected a folder, a file or a pattern such as 'photos/*.jpg'")
    path = Path(images)
    if path.is_file():
        return [(path, path.name)]
    if path.is_dir():
        files = (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
        found = [(file, str(file.relative_to(path))) for file in files if is_picture(file)]
    else:
        files = Path(path.anchor).glob(str(path.relative_to(path.anchor)))
        found = [(file, file.name) for file in files if is_picture(file)]
        if repeated := [name for name, count in Counter(name for _, name in found).items() if count > 1]:
            raise InputError(f"--images {images}: several pictures are called {repeated[0]}, expected their folder")
    if not found:
        raise InputError(f"--images {images}: no picture matches, expected files with the extensions {extensions}")
    return sorted(found, key=lambda entry: entry[1])


def is_picture(path: Path) -> bool:
    """Whether a path is a file with the extension of a picture."""
    return path.suffix.lower().removeprefix(".") in EXTENSIONS and path.is_file()


def read_names(text: str) -> list[str] | None:
    """Names separated by commas; None for the model's own.

    Raises:
        InputError: a name is empty or repeated.
    """
    if not text:
        return None
    names = [name.strip() for name in text.split(",")]
    if "" in names:
        raise InputError(f"--names {text!r}: name {names.index('') + 1} is empty, expected names between the commas")
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise InputError(f"--names {text!r}: {repeated[0]!r} is repeated, expected each name once")
    return names


def read_boxes(path: str, pictures: Sequence[tuple[Path, str]]) -> Boxes | None:
    """The boxes of pictures in a file in COCO's format; None if no file is given.

    The file's `a.jpg` is also the only picture `images/a.jpg`, and the reverse.

    Raises:
        InputError: the file cannot be read, or has no box of these pictures.
    """
    if not path:
        return None
    content = load_entries(path, Account(path))
    boxes: dict[str, list[list[float]]] = {name: [] for _, name in pictures}
    ends = PathEnds(boxes)
    names, file_of = dict[int, str](), dict[str, str]()
    for picture in content.images:
        file = file_name(picture)
        if name := file if file in boxes else ends.find(file):
            names[picture.id] = name
            if (other := file_of.setdefault(name, file)) != file:
                raise InputError(
                    f"--boxes {path}: {other} and {file} are both {name} of --images, expected one of them"
                )
    for annotation in content.annotations:
        if annotation.bbox and (name := names.get(annotation.image_id, "")):
            x, y, width, height = annotation.bbox
            boxes[name].append([x, y, x + width, y + height])
    if not any(boxes.values()):
        raise InputError(
            f"--boxes {path}: no box of a picture of --images, expected file names such as {pictures[0][1]}"
        )
    return boxes


def load_predictor(run: Run) -> Predictor:
    """The detector, OV-SAM or text-to-mask model that `--model` names.

    Raises:
        InputError: there is no such model, it finds nothing, as a CLIP, or it takes no boxes.
    """
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    predictor = models.load(run.model, run.storage, run.device)
    if isinstance(predictor, Classifier):
        raise InputError(f"--model {run.model}: a CLIP, which names whole images, expected a detector or an OV-SAM")
    if everything_of(run) != EverythingConfig() and (run.boxes or not isinstance(predictor, Segmenter)):
        flags = "--points-per-side, --min-iou, --min-stability"
        raise InputError(f"{flags}: expected an OV-SAM without --boxes, whose masks they choose")
    if run.boxes and not isinstance(predictor, Segmenter):
        raise InputError(f"--boxes {run.boxes}: {run.model} is of method {predictor.method}, expected an OV-SAM")
    return predictor


def everything_of(run: Run) -> EverythingConfig:
    """Settings of the masks of all that is seen."""
    return EverythingConfig(points_per_side=run.points_per_side, min_iou=run.min_iou, min_stability=run.min_stability)


def prepare(run: Run) -> Job:
    """Check all settings and load the model.

    Raises:
        InputError: a setting is wrong; nothing was predicted.
    """
    pictures, names = find_pictures(run.images), read_names(run.names)
    check_folder(run.output, "--output")
    if run.score_threshold is not None and not 0 <= run.score_threshold <= 1:
        raise InputError(f"--score-threshold {run.score_threshold:g}: expected 0 to 1")
    for flag, value in (("--min-iou", run.min_iou), ("--min-stability", run.min_stability)):
        if not 0 <= value <= 1:
            raise InputError(f"{flag} {value:g}: expected 0 to 1")
    if run.points_per_side is not None and run.points_per_side < 1:
        raise InputError(f"--points-per-side {run.points_per_side}: expected at least 1")
    boxes = read_boxes(run.boxes, pictures)
    predictor = load_predictor(run)
    own = predictor.info.score_threshold if isinstance(predictor, Detector) else 0.0
    threshold = own if run.score_threshold is None else run.score_threshold
    return Job(predictor, pictures, names, boxes, threshold, everything_of(run))


def predict_one(job: Job, path: Path, name: str) -> Detections | Segments:
    """What a model finds in a picture: boxes, all masks, the masks of given boxes, or a mask for each name.

    Raises:
        InputError: the picture cannot be read or has no box, or a name cannot be embedded.
    """
    image, predictor = open_image(path), job.predictor
    if isinstance(predictor, Detector):
        return predictor.detect(image, job.names, score_threshold=job.threshold, distinct=True)
    if isinstance(predictor, TextSegmenter):
        found = predictor.segment(image, job.names)
    elif job.boxes is None:
        found = predictor.everything(image, job.names, job.everything)
    else:
        clipped = [clip_box(box, image.width, image.height) for box in job.boxes[name]]
        boxes = [box for box, reason in clipped if not reason]
        if not boxes:
            raise InputError(f"{path}: no box in the file of --boxes, expected some")
        found = predictor.segment(image, Prompts.create(boxes=boxes), job.names)
    return found.filter(min_score=job.threshold)


def predict(job: Job) -> Iterator[tuple[str, Detections | Segments | InputError]]:
    """The name of each picture and what is found in it, or why it is left out.

    Raises:
        InputError: a name cannot be embedded.
    """
    progress = Progress("predict", "pictures", len(job.pictures))
    for path, name in job.pictures:
        try:
            yield name, predict_one(job, path, name)
        except InputError as error:
            if not str(error).startswith(str(path)):
                raise
            yield name, error
        progress.add(1)
    progress.close()


def summarise(name: str, drawing: Path, result: Detections | Segments) -> Predicted:
    """What was found in a picture, by name; a mask that is empty is not found, and noted."""
    shown = result.with_area() if isinstance(result, Segments) else result
    found = Counter(entry.name or "something" for entry in shown)
    note = result.note if isinstance(result, Segments) else ""
    return Predicted(name, drawing.as_posix(), dict(found.most_common()), note)


def write_results(run: Run, job: Job, output: Path) -> tuple[list[Predicted], list[str]]:
    """Predict, and write drawings, `predictions.json` and `index.html`.

    Returns:
        What was found in each picture, and why others are left out.

    Raises:
        InputError: see `predict`, or no picture can be read.
    """
    shown: list[Predicted] = []
    left_out: list[str] = []
    merged: dict[str, list[Any]] = {"images": [], "categories": [], "annotations": []}
    for name, result in predict(job):
        if isinstance(result, InputError):
            left_out.append(str(result))
            continue
        if name != name.encode(errors="ignore").decode():  # an old file system's; neither JSON nor a page can hold it
            left_out.append(f"{name!a}: the name is not UTF-8, expected another")
            continue
        drawing = Path("drawn", f"{name}.jpg")
        (output / drawing).parent.mkdir(parents=True, exist_ok=True)
        result.draw(output / drawing)
        one = result.to_coco(name, len(shown) + 1)
        first = len(merged["annotations"]) + 1
        merged["images"] += one["images"]
        merged["categories"] = one["categories"]
        merged["annotations"] += [entry | {"id": first + at} for at, entry in enumerate(one["annotations"])]
        shown.append(summarise(name, drawing, result))
    if not shown:
        raise InputError(f"--images {run.images}: {count_left_out(left_out)}, expected at least one readable picture")
    (output / "predictions.json").write_text(json.dumps(merged))
    values = {"model": run.model, "names": run.names, "threshold": job.threshold, "pictures": shown}
    (output / "index.html").write_text(render_page("predictions", values | {"left_out": left_out}))
    return shown, left_out


def count_left_out(reasons: Sequence[str]) -> str:
    """The number of pictures that are left out, and the first of them."""
    skipped = SkipReport()
    for reason in reasons:
        skipped.add("pictures left out", reason)
    return str(skipped)


def main() -> None:
    """Predict, and print what was found and where the results are."""
    run = cli.parse(CONFIGS, __doc__, writes=False)
    job = prepare(run)
    print(f"score threshold: {job.threshold:g}", flush=True)
    shown, left_out = write_folder(partial(write_results, run, job), Path(run.output))
    total = sum((Counter(entry.found) for entry in shown), Counter())
    names = ", ".join(f"{count} {name}" for name, count in total.most_common(10)) or "nothing"
    print(f"{len(shown):,} pictures: {names}")
    if left_out:
        print(count_left_out(left_out))
    for note, count in Counter(entry.note for entry in shown if entry.note).most_common(3):
        print(f"{count:,} of {len(shown):,} pictures: {note}")
    if any(entry.note for entry in shown) and isinstance(job.predictor, Segmenter) and run.min_iou > LOWER[0]:
        print("lower limits keep more masks: --min-iou {:g} --min-stability {:g}".format(*LOWER))
    if not total and not any(entry.note for entry in shown):
        print(f"nothing scores above {job.threshold:g}: try a lower --score-threshold, or other names")
    print(f"drawings, predictions.json and page: {Path(run.output, 'index.html').absolute()}")
    print("next:", cli.script_command("serve", "--model", run.model, "--storage", run.storage))


if __name__ == "__main__":
    cli.execute(main)
