"""Mask AP of OV-SAM and SAM prompted by the boxes of detectors.

boxes/<name>-eval --detector--> boxes with names --> SAM, OV-SAM prompted by the boxes --> masks --> mask AP

python -m workflows.studies.ovsam_boxes --model store/runs/ovsam/NAME/model --sam store/runs/ovsam/NAME/sam_model \
    --detectors store/runs/codet/NAME/model store/runs/vild/NAME/model
"""

from workflows.common import brief_help

brief_help.answer(__name__, __file__, "storage model sam detectors boxes images device")

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from faster_coco_eval import mask as rle
from torch import Tensor

import ovd_models
from data_prep import storage, tables
from ovd_models.batches import Detections
from ovd_models.checkpoints import load_model
from ovd_models.errors import InputError
from ovd_models.evaluation import evaluate_detections
from ovd_models.predictors import Detector, Segmenter, find_device
from ovd_models.preprocess import to_tensor
from ovd_models.sam.model import SamModel
from ovd_models.segments import Prompts, Segments
from ovd_models.vocabulary import Vocabulary
from workflows.common import cli
from workflows.common.teacher import read_categories
from workflows.reports.detections import read_box_images
from workflows.studies import study as studies
from workflows.studies.study import Metrics, Result

COLUMNS = {
    "mask AP50 base": "ap50_base",
    "mask AP50 novel": "ap50_novel",
    "mask AP base": "ap_base",
    "mask AP novel": "ap_novel",
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One comparison; requires `--model`, `--sam` and `--detectors`."""

    storage: str = "store"
    """Folder or URI that holds all tables."""
    model: str = ""
    """Folder or URI of an OV-SAM checkpoint."""
    sam: str = ""
    """Folder or URI of a SAM checkpoint, such as OV-SAM's own."""
    detectors: tuple[str, ...] = ()
    """Folders or URIs of ViLD or CoDet checkpoints."""
    boxes: str = "pictograms"
    """Name of the box set: tables `boxes/<name>-eval` with masks, `categories/<name>`."""
    images: int = 0
    """Number of evaluation images to use; 0 for all."""
    device: str = "cpu"
    """Device of all models, such as `cuda`."""
    score_threshold: float = 0.05
    max_detections: int = 100


CONFIGS = {"default": Run}


def mask_ap(run: Run, detector_uri: str) -> dict[str, Metrics]:
    """Mask AP and AP50 of base, novel and all names, by source of masks and names.

    Rows: `SAM masks` and `OV-SAM masks` with the detector's names; `OV-SAM masks and names`, where each object counts
    once and its score is the box's times the name's; and `own masks` of a detector that predicts some.

    Raises:
        InputError: a checkpoint, a table or the device is missing, or an annotated object has no mask.
    """
    device = find_device(run.device)
    detector = ovd_models.load(storage.local_folder(detector_uri), run.device)
    segmenter = ovd_models.load_segmenter(storage.local_folder(run.model), run.device)
    sam = load_model(storage.local_folder(run.sam), SamModel).to(device)
    rows = tables.read_table(run.storage, "boxes", f"{run.boxes}-eval").to_pylist()[: run.images or None]
    categories, splits = read_categories(run.storage, run.boxes)
    vocabulary = segmenter.names(list(categories.values()))
    detections: dict[str, list[Detections]] = {}
    read = [(row, image) for row, image in read_box_images(run.storage, rows) if image is not None]
    rows = [row for row, _ in read]
    for _, picture in read:
        image = to_tensor(picture).to(device)
        for name, entry in segment_boxes(run, image, detector, segmenter, sam, vocabulary).items():
            detections.setdefault(name, []).append(entry)
    return {
        name: evaluate_detections(rows, entries, categories, splits, "segm").summary()
        for name, entries in detections.items()
    }


def segment_boxes(
    run: Run, image: Tensor, detector: Detector, segmenter: Segmenter, sam: SamModel, vocabulary: Vocabulary
) -> dict[str, Detections]:
    """Detections of one image with masks, by source of masks and names."""
    answer: Detections = detector.detect(
        image, list(vocabulary.names), score_threshold=run.score_threshold, max_detections=run.max_detections
    )
    boxed = replace(answer, image=None).with_area()
    model = segmenter.model
    encoded, sam_encoded = model.encode(image), sam.encode(image)
    masked = {
        "SAM masks": with_masks(boxed, lambda boxes: sam.segment(sam_encoded, boxes), image.device),
        "OV-SAM masks": with_masks(boxed, lambda boxes: model.segment(encoded, boxes), image.device),
        "OV-SAM masks and names": with_masks(
            boxed.distinct(), lambda boxes: model.segment(encoded, boxes, vocabulary), image.device
        ),
    }
    return masked if boxed.masks is None else {"own masks": boxed, **masked}


def with_masks(boxed: Detections, segment: Callable[[Prompts], Segments], device: torch.device) -> Detections:
    """Detections with the masks of their boxes as prompts, and with the segments' names if they have some.

    The detections are on the CPU, the model that segments on `device`.
    """
    if not len(boxed):
        return replace(boxed, masks=())
    segments = segment(Prompts(boxes=boxed.boxes.to(device)))
    masks_HWP = segments.masks.permute(1, 2, 0).cpu().numpy().astype("uint8")
    masks = tuple(entry["counts"].decode() for entry in rle.encode(masks_HWP.copy(order="F")))
    if not segments.names:
        return replace(boxed, masks=masks)
    return replace(boxed, masks=masks, labels=segments.labels.cpu(), scores=boxed.scores * segments.scores.cpu())


def main() -> None:
    """Measure and print."""
    run = cli.parse(CONFIGS, __doc__)
    for field in ("model", "sam", "detectors"):
        if not getattr(run, field):
            raise InputError(f"--{field}: missing, expected a checkpoint folder")
    results = {
        f"{detector}: {name}": Result({0: metrics})
        for detector in run.detectors
        for name, metrics in mask_ap(run, detector).items()
    }
    print("\n".join(studies.metric_table(results, "boxes: masks", COLUMNS)))


if __name__ == "__main__":
    cli.execute(main)
