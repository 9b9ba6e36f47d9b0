"""Failure gallery: automatically found mistakes of a detector and its teacher on an annotated set.

model, boxes/<name> --detect--> objects missed, things invented, objects detected under a similar name
teacher ----crops of annotated boxes--> elongated objects distorted by the square resize: warp, pad and centre compared
                                    --> parts and loose boxes that score as high as the tight box

python workflows/failures.py --model store/runs/vild/NAME/model --teacher store/runs/clip/NAME/model
"""

from workflows.common import brief_help

brief_help.answer(__name__, __file__, "model teacher storage boxes score_threshold output device")

import functools
from dataclasses import asdict, dataclass, replace
from functools import partial

from PIL import Image

from data_prep import storage
from data_prep.progress import Progress
from ovd_models.batches import Detections
from ovd_models.errors import InputError
from ovd_models.vocabulary import build_vocabulary
from workflows.common import cli
from workflows.common.teacher import open_teacher
from workflows.configs.evaluation import DetectorRun
from workflows.reports import failures as gallery
from workflows.reports.detections import read_box_image, read_box_images

PICTURES = 4
"""Pictures in memory at a time."""


@dataclass(frozen=True, kw_only=True)
class Run(DetectorRun):
    """One gallery; requires `--model` and `--teacher`."""

    teacher: str = ""
    """Folder or URI of the CLIP checkpoint."""
    output: str = ""
    """File for the HTML page; if empty, `failures-<boxes>.html` in `<storage>/reports`."""
    max_images: int = 300
    score_threshold: float = 0.2
    """Minimum score of a detection."""
    elongated: float = 2.0
    """Minimum aspect ratio of an elongated object."""
    temperature: float = 50.0
    """Factor of the teacher's cosines before the softmax."""
    shown: int = 8
    """Number of examples of each kind."""


CONFIGS = {"default": Run}


def find_failures(run: Run) -> gallery.Failures:
    """Run the detector and the teacher on the annotated images.

    Raises:
        InputError: a checkpoint or a table is missing.
    """
    if not run.model or not run.teacher:
        raise InputError("--model, --teacher: missing, expected a detector checkpoint and a CLIP checkpoint")
    detector = run.load_detector()
    categories, _ = run.read_categories()
    vocabulary = build_vocabulary(detector.encoder, list(categories.values()))
    scorer = gallery.CropScorer(open_teacher(run.teacher, detector.teacher, run.device), vocabulary, run.temperature)

    rows = run.read_rows()[: run.max_images]

    @functools.lru_cache(PICTURES)  # the objects of a picture follow each other
    def read(number: int) -> Image.Image:
        return read_box_image(run.storage, rows[number])

    detections, kept = list[Detections](), list[int]()
    progress = Progress("detect", "images", len(rows))
    for number, (_, image) in enumerate(read_box_images(run.storage, rows)):
        if image is not None:
            found = detector.detect(image, vocabulary.names, score_threshold=run.score_threshold)
            detections.append(replace(found, image=None))
            kept.append(number)
        progress.add(1)
    progress.close()
    pictures = [partial(read, number) for number in kept]
    shown = [rows[number] for number in kept]
    image_objects = [gallery.annotated_objects(*row, categories) for row in zip(shown, pictures, strict=True)]
    objects = [target for targets in image_objects for target in targets]
    return gallery.Failures(
        num_objects=len(objects),
        missed=gallery.find_missed(image_objects, detections),
        invented=gallery.find_invented(shown, pictures, detections),
        confused=gallery.find_confusions(image_objects, detections, vocabulary),
        elongated=gallery.find_distortions(objects, scorer, run.elongated),
        loose=gallery.find_loose_boxes(objects, scorer),
    )


def main() -> None:
    """Find the failures, write the page and print the counts."""
    run = cli.parse(CONFIGS, __doc__)
    failures = find_failures(run)
    uri = storage.absolute(run.output or storage.join(run.storage, "reports", f"failures-{run.boxes}.html"))
    storage.write_bytes(uri, gallery.render_gallery(failures, asdict(run), run.shown).encode())
    print(", ".join(f"{name} {count:,}" for name, count in failures.counts.items()))
    print(f"report: {uri}")


if __name__ == "__main__":
    cli.execute(main)
