"""Sweep the settings of a ViLD that can change after training: lambda, temperature, objectness; and the baselines.

model, boxes/<name> --one pass--> regions' embeddings, boxes, objectness --> AP50 for every scoring
teacher --crops of the same regions--> CLIP on crops with and without objectness, ViLD-text fused with CLIP

python -m workflows.studies.vild_sweep --model store/runs/vild/NAME/model --boxes pictograms-eval
python -m workflows.studies.vild_sweep --model ... --boxes pictograms-eval --teacher store/runs/clip/NAME/model
"""

from workflows.common import brief_help

brief_help.answer(__name__, __file__, "storage model boxes teacher max_crops temperature device")

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_prep.embeddings.crops import CropConfig
from data_prep.embeddings.teachers import embed_regions
from data_prep.progress import watched
from ovd_models.detectors.region_query import RegionQuery, build_query
from ovd_models.detectors.region_scores import RegionRecord, Scoring, use_teacher
from ovd_models.errors import InputError
from ovd_models.evaluation import DetectionMetrics, evaluate_detections
from ovd_models.predictors import Detector
from ovd_models.preprocess import to_tensor
from ovd_models.vild.model import ViLD
from workflows.common import cli
from workflows.common.teacher import open_teacher
from workflows.configs.evaluation import DetectorRun
from workflows.reports.detections import read_box_images


@dataclass(frozen=True, kw_only=True)
class Run(DetectorRun):
    """One sweep; requires `--model`, a ViLD."""

    teacher: str = ""
    """Folder or URI of a CLIP checkpoint for baselines on crops of the regions; no baselines if empty."""
    crops: CropConfig = field(default_factory=CropConfig)
    max_crops: int = 50
    """Number of crops per image, from the regions of highest objectness."""
    novel_image: tuple[float, ...] = (1 / 3, 1 / 2, 2 / 3, 0.8)
    """Exponents of the image head for novel names; that for base names is the rest up to 1."""
    temperature: tuple[float, ...] = ()
    """The checkpoint's own if empty."""
    objectness: tuple[float, ...] = (0.0, 1 / 3)
    score_threshold: float = 0.01
    max_detections: int = 100


CONFIGS = {"default": Run}


@dataclass(frozen=True)
class RecordedRegions:
    """The regions that a detector found in an annotated set, and the names to score them with."""

    model: ViLD
    teacher: str
    """Id of the detector's teacher."""
    rows: Sequence[Mapping[str, Any]]
    """Rows of the `boxes` table."""
    images: list[Tensor]
    records: list[RegionRecord]
    query: RegionQuery
    names: Mapping[int, str]
    splits: Mapping[str, str]


def record(detector: Detector, run: DetectorRun, batch_size: int = 16) -> RecordedRegions:
    """One forward pass of a detector over a run's annotated set.

    Raises:
        InputError: a table is missing, or the detector is not a ViLD.
    """
    model = detector.model
    if not isinstance(model, ViLD):
        raise InputError(f"--model: a checkpoint of method {detector.method!r}, expected 'vild'")
    rows = run.read_rows()
    names, splits = run.read_categories()
    read = [(row, to_tensor(image)) for row, image in read_box_images(run.storage, rows) if image is not None]
    images = [image for _, image in read]
    records: list[RegionRecord] = []
    for start in watched(range(0, len(images), batch_size), "regions", "batches"):
        records += model.record_regions([image.to(detector.device) for image in images[start : start + batch_size]])
    query = build_query(detector.encoder, list(names.values()), detector.info.splits).to(detector.device)
    found = [row for row, _ in read]
    return RecordedRegions(model, detector.teacher, found, images, records, query, names, splits)


def measure(
    recorded: RecordedRegions, scoring: Scoring, run: Run, records: Sequence[RegionRecord] | None = None
) -> DetectionMetrics:
    """Metrics of the recorded regions, or of other records of the same images, under a scoring."""
    detections = recorded.model.find_in_records(
        recorded.records if records is None else records,
        recorded.query,
        score_threshold=run.score_threshold,
        max_detections=run.max_detections,
        scoring=scoring,
    )
    return evaluate_detections(recorded.rows, detections, recorded.names, recorded.splits)


def baselines(recorded: RecordedRegions, run: Run) -> dict[str, DetectionMetrics]:
    """Metrics of the teacher's own embeddings of crops of the detector's regions.

    The geometric mean with objectness is one baseline: the teacher's probability alone is as high for parts and loose
    boxes as for tight ones.

    Raises:
        InputError: there is no such checkpoint, or it is not the detector's teacher.
    """
    teacher, base = open_teacher(run.teacher, recorded.teacher, run.device), recorded.model.config.scoring

    def encode(image: Tensor, boxes: Tensor) -> Tensor:
        pixels_HW3 = image.cpu().permute(1, 2, 0).numpy()
        (region_ND,) = embed_regions(teacher, [pixels_HW3], [boxes.cpu().numpy()], run.crops)
        return torch.from_numpy(region_ND.astype(np.float32)).to(boxes.device)

    best = [entry.top(run.max_crops) for entry in recorded.records]
    crops = use_teacher(best, recorded.images, encode, keep_text=False)
    plain = replace(base, objectness=0.0)
    metrics = {
        "clip-crops": measure(recorded, plain, run, crops),
        "clip-crops-objectness": measure(recorded, replace(base, objectness=0.5), run, crops),
    }
    if best and best[0].text is not None:
        fused = [replace(entry, image=own.image) for entry, own in zip(best, crops, strict=True)]
        metrics["text-and-clip"] = measure(recorded, plain, run, fused)
    return metrics


def scorings(run: Run, base: Scoring) -> Iterator[tuple[str, Scoring]]:
    """The grid of settings, each with a label."""
    temperatures = run.temperature or (base.temperature,)
    for share, temperature, objectness in itertools.product(run.novel_image, temperatures, run.objectness):
        scoring = replace(base, temperature=temperature, image_temperature=temperature, objectness=objectness)
        label = f"lambda {share:.2f}  T {temperature:g}  objectness {objectness:.2f}"
        yield label, replace(scoring, novel_image=share, base_image=1 - share)


def main() -> None:
    """Record the regions, then print a line for each scoring and baseline."""
    run = cli.parse(CONFIGS, __doc__)
    detector = run.load_detector()
    if run.teacher:
        open_teacher(run.teacher, detector.teacher, run.device)  # a wrong one is refused before the pass over the set
    recorded = record(detector, run)
    print(f"{'AP50':44}{'base':>8}{'novel':>8}")
    for label, scoring in scorings(run, recorded.model.config.scoring):
        print_row(label, measure(recorded, scoring, run))
    if run.teacher:
        for label, metrics in baselines(recorded, run).items():
            print_row(label, metrics)


def print_row(label: str, metrics: DetectionMetrics) -> None:
    """Print a line of the table."""
    print(f"{label:44}{metrics.mean('ap50', 'base'):8.3f}{metrics.mean('ap50', 'novel'):8.3f}", flush=True)


if __name__ == "__main__":
    cli.execute(main)
