"""Masks and names for what a detector found, measured by mask AP: OV-SAM beside SAM.

boxes/<name>-eval --detector--> boxes with names --> SAM, OV-SAM prompted by the boxes --> masks --> mask AP

python -m workflows.studies.ovsam_boxes --model store/runs/ovsam/<run>/model --sam store/runs/ovsam/<run>/sam_model \
    --detectors store/runs/codet/<run>/model store/runs/vild/<run>/model
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from faster_coco_eval import mask as rle
from torch import Tensor

import ovd_models
from data_prep import storage, tables
from ovd_models.batches import Detections
from ovd_models.checkpoints import Detector
from ovd_models.errors import InputError
from ovd_models.evaluation import evaluate_detections
from ovd_models.images import decode_image
from ovd_models.ovsam.checkpoints import Segmenter, load_sam_folder, load_segmenter
from ovd_models.preprocess import to_tensor
from ovd_models.sam.model import SamModel
from ovd_models.segments import Prompts, Segments
from ovd_models.vocabulary import Vocabulary
from workflows.common import cli
from workflows.common.teacher import read_categories


@dataclass(frozen=True, kw_only=True)
class Run:
    """One comparison."""

    storage: str = "store"
    """Folder or URI that holds all tables."""
    model: str = ""
    """Folder or URI of an OV-SAM checkpoint."""
    sam: str = ""
    """Folder or URI of a SAM checkpoint, such as the one that the OV-SAM learnt from."""
    detectors: tuple[str, ...] = ()
    """Folders or URIs of ViLD or CoDet checkpoints."""
    boxes: str = "pictograms"
    """Name of the box set: tables `boxes/<name>-eval` with masks, `categories/<name>`."""
    images: int = 0
    """Of the evaluation set, this many of its first images; all if 0."""
    score_threshold: float = 0.05
    max_detections: int = 100
    """Of an image."""


def default() -> Run:
    """The pictogram world's held-out scenes; give it `--model`, `--sam` and `--detectors`."""
    return Run()


CONFIGS: dict[str, Callable[[], Run]] = {"default": default}
Numbers = dict[str, float]


def compare(run: Run, detector_uri: str) -> dict[str, Numbers]:
    """Mask AP and AP50 of base, novel and all names, by who made masks and names.

    Rows: `SAM masks` and `OV-SAM masks` with the detector's names; `OV-SAM masks and names`, where each object counts
    once and its score is the box's times the name's; and `own masks` of a detector that predicts some.

    Raises:
        InputError: a checkpoint or a table is missing, or an annotated object has no mask.
    """
    detector = ovd_models.load(storage.local_folder(detector_uri))
    segmenter, (sam, _) = (
        load_segmenter(storage.local_folder(run.model)),
        load_sam_folder(storage.local_folder(run.sam)),
    )
    rows = tables.read_table(run.storage, "boxes", f"{run.boxes}-eval").to_pylist()[: run.images or None]
    categories, splits = read_categories(run.storage, run.boxes)
    vocabulary = segmenter.names(list(categories.values()))
    found: dict[str, list[Detections]] = {}
    for row in rows:
        uri = storage.join(run.storage, row["uri"])
        image = to_tensor(decode_image(storage.read_bytes(uri), uri))
        for name, entry in of_image(run, image, detector, segmenter, sam, vocabulary).items():
            found.setdefault(name, []).append(entry)
    return {
        name: evaluate_detections(rows, entries, categories, splits, "segm").summary()
        for name, entries in found.items()
    }


def of_image(
    run: Run, image: Tensor, detector: Detector, segmenter: Segmenter, sam: SamModel, vocabulary: Vocabulary
) -> dict[str, Detections]:
    """The masked detections of one image, by who made masks and names."""
    answer: Detections = detector.detect(
        image, list(vocabulary.names), score_threshold=run.score_threshold, max_detections=run.max_detections
    )
    boxed = replace(answer, image=None).with_area()
    objects = boxed.distinct()
    model = segmenter.model
    encoded, seen = model.encode(image), sam.encode(image)
    found = {
        "SAM masks": masked(boxed, lambda prompts: sam.segment(seen, prompts)),
        "OV-SAM masks": masked(boxed, lambda prompts: model.segment(encoded, prompts)),
        "OV-SAM masks and names": masked(objects, lambda prompts: model.segment(encoded, prompts, vocabulary)),
    }
    return found if boxed.masks is None else {"own masks": boxed, **found}


def masked(boxed: Detections, segment: Callable[[Prompts], Segments]) -> Detections:
    """Detections with the masks that their boxes prompt for, and with their names where the segments have some."""
    if not len(boxed):
        return replace(boxed, masks=())
    segments = segment(Prompts(boxes=boxed.boxes))
    columns = segments.masks.permute(1, 2, 0).cpu().numpy().astype("uint8")  # [H, W, P], as the encoder wants them
    counts = tuple(entry["counts"].decode() for entry in rle.encode(columns.copy(order="F")))
    if not segments.names:
        return replace(boxed, masks=counts)
    return replace(boxed, masks=counts, labels=segments.labels, scores=boxed.scores * segments.scores)


def as_table(results: dict[str, dict[str, Numbers]]) -> str:
    """Markdown, by detector."""
    lines = ["| boxes | masks and names | mask AP50 base | novel | mask AP base | novel |", "|---|---|---|---|---|---|"]
    for detector, of_detector in results.items():
        for name, values in of_detector.items():
            numbers = (values[key] for key in ("ap50_base", "ap50_novel", "ap_base", "ap_novel"))
            lines.append(f"| {detector} | {name} | " + " | ".join(f"{number:.3f}" for number in numbers) + " |")
    return "\n".join(lines) + "\n"


def check(run: Run) -> None:
    """Raise InputError unless all checkpoints are named."""
    for field in ("model", "sam", "detectors"):
        if not getattr(run, field):
            raise InputError(f"--{field}: missing, expected a checkpoint folder")


def main() -> None:
    """The script: measure and print."""
    run = cli.parse(CONFIGS, __doc__)
    check(run)
    print(as_table({detector: compare(run, detector) for detector in run.detectors}))


if __name__ == "__main__":
    cli.execute(main)
