"""Sweep what can be changed after training, from one forward pass: lambda, temperature, objectness; and the baselines.

model, boxes/<name> --one pass--> regions' embeddings, boxes, objectness --> AP50 for every scoring
teacher --crops of the same regions--> ViLD-text + CLIP, CLIP on crops with and without objectness

python -m workflows.studies.vild_sweep --model store/runs/vild/<run>/model --boxes pictograms-eval
python -m workflows.studies.vild_sweep --model ... --boxes pictograms-eval --teacher store/runs/clip/<run>/model
"""

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ovd_models
from data_prep import storage, tables
from data_prep.embeddings.crops import CropConfig
from data_prep.embeddings.teachers import embed_regions
from ovd_models.checkpoints import Detector
from ovd_models.detectors.region_query import RegionQuery, build_query
from ovd_models.detectors.region_scores import RegionEncoder, RegionRecord, Scoring, use_teacher
from ovd_models.errors import InputError
from ovd_models.evaluation import DetectionMetrics, evaluate_detections
from ovd_models.images import decode_image
from ovd_models.preprocess import to_tensor
from ovd_models.vild.model import ViLD
from workflows.common import cli, tracking
from workflows.common.teacher import open_teacher, read_categories


@dataclass(frozen=True, kw_only=True)
class Run:
    """One sweep."""

    storage: str = "store"
    """Folder or URI that holds all tables."""
    model: str = ""
    """Folder or URI of a ViLD checkpoint, or an MLflow `models:/` URI."""
    boxes: str = "pictograms-eval"
    """Name of the `boxes` table."""
    categories: str = ""
    """Name of the `categories` table; that of `boxes` up to the last dash if empty."""
    teacher: str = ""
    """Folder or URI of a CLIP checkpoint that looks at the crops of the regions; no baselines if empty."""
    crops: CropConfig = field(default_factory=CropConfig)
    max_crops: int = 50
    """Regions of an image that the teacher looks at, those of the highest objectness."""
    novel_image: tuple[float, ...] = (1 / 3, 1 / 2, 2 / 3, 0.8)
    """Exponents of the image head for novel names; that for base names is the rest up to 1."""
    temperature: tuple[float, ...] = ()
    """The checkpoint's own if empty."""
    objectness: tuple[float, ...] = (0.0, 1 / 3)
    score_threshold: float = 0.01
    max_detections: int = 100


def default() -> Run:
    """The pictogram world's held-out scenes; give it `--model`."""
    return Run()


CONFIGS: dict[str, Callable[[], Run]] = {"default": default}


@dataclass(frozen=True)
class RecordedRegions:
    """An annotated set as a detector sees it, and what it is asked."""

    rows: list[dict[str, Any]]
    """Of the `boxes` table."""
    images: list[Tensor]
    records: list[RegionRecord]
    query: RegionQuery
    names: Mapping[int, str]
    splits: Mapping[str, str]


def record(detector: Detector, storage_uri: str, boxes: str, categories: str, batch_size: int = 16) -> RecordedRegions:
    """One forward pass over an annotated set.

    Raises:
        InputError: a table is missing, or the detector is no ViLD.
    """
    if not isinstance(detector.model, ViLD):
        raise InputError(f"--model: a checkpoint of method {detector.method!r}, expected 'vild'")
    rows = tables.read_table(storage_uri, "boxes", boxes).to_pylist()
    names, splits = read_categories(storage_uri, categories)
    images = [open_tensor(storage_uri, row) for row in rows]
    records: list[RegionRecord] = []
    for start in range(0, len(images), batch_size):
        batch = [image.to(detector.device) for image in images[start : start + batch_size]]
        records += detector.model.record_regions(batch)
    query = build_query(detector.encoder, list(names.values()), detector.info.splits).to(detector.device)
    return RecordedRegions(rows, images, records, query, names, splits)


def open_tensor(storage_uri: str, row: Mapping[str, Any]) -> Tensor:
    """The picture of a row of `boxes`, uint8 [3, H, W]."""
    uri = storage.join(storage_uri, row["uri"])
    return to_tensor(decode_image(storage.read_bytes(uri), uri))


def measure(
    detector: Detector, seen: RecordedRegions, records: Sequence[RegionRecord], scoring: Scoring, run: Run
) -> DetectionMetrics:
    """Metrics of recorded regions under a scoring."""
    assert isinstance(detector.model, ViLD)
    found = detector.model.find_in_records(
        records,
        seen.query,
        score_threshold=run.score_threshold,
        max_detections=run.max_detections,
        scoring=scoring,
    )
    return evaluate_detections(seen.rows, found, seen.names, seen.splits)


def crop_encoder(teacher: str, crops: CropConfig, expected: str) -> RegionEncoder:
    """The teacher of a checkpoint, looking at boxes as `embed.py` does.

    Raises:
        InputError: there is no such checkpoint, or its id is not the expected one.
    """
    model = open_teacher(teacher, expected)

    def encode(image: Tensor, boxes: Tensor) -> Tensor:
        picture_HW3 = image.cpu().permute(1, 2, 0).numpy()
        (rows,) = embed_regions(model, [picture_HW3], [boxes.cpu().numpy()], crops)
        return torch.from_numpy(rows.astype(np.float32)).to(boxes.device)

    return encode


def scorings(run: Run, base: Scoring) -> Iterator[Scoring]:
    """The grid."""
    temperatures = run.temperature or (base.temperature,)
    for share, temperature, objectness in itertools.product(run.novel_image, temperatures, run.objectness):
        yield dataclasses.replace(
            base,
            novel_image=share,
            base_image=1 - share,
            temperature=temperature,
            image_temperature=temperature,
            objectness=objectness,
        )


def baselines(
    detector: Detector, seen: RecordedRegions, teacher: str, base: Scoring, run: Run
) -> dict[str, DetectionMetrics]:
    """What the teacher itself says about crops of the detector's regions.

    Objectness enters as the geometric mean with the teacher's probability, which alone scores parts and loose boxes as
    highly as tight ones.
    """
    best = [entry.top(run.max_crops) for entry in seen.records]
    encoder = crop_encoder(teacher, run.crops, detector.teacher)
    crops = use_teacher(best, seen.images, encoder, keep_text=False)
    fused = [dataclasses.replace(entry, image=own.image) for entry, own in zip(best, crops, strict=True)]
    found = {
        "CLIP on crops": measure(detector, seen, crops, dataclasses.replace(base, objectness=0.0), run),
        "CLIP on crops, objectness": measure(detector, seen, crops, dataclasses.replace(base, objectness=0.5), run),
    }
    if best and best[0].text is not None:
        found["text + CLIP"] = measure(detector, seen, fused, dataclasses.replace(base, objectness=0.0), run)
    return found


def main() -> None:
    """The script: record, then one line for every scoring."""
    run = cli.parse(CONFIGS, __doc__)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    detector = ovd_models.load(tracking.local_model(run.model, run.storage))
    seen = record(detector, run.storage, run.boxes, run.categories or run.boxes.rsplit("-", 1)[0])
    assert isinstance(detector.model, ViLD)
    base = detector.model.config.scoring
    print(f"{'AP50':44}{'base':>8}{'novel':>8}")
    for scoring in scorings(run, base):
        row = measure(detector, seen, seen.records, scoring, run).summary()
        label = f"lambda {scoring.novel_image:.2f}  T {scoring.temperature:g}  objectness {scoring.objectness:.2f}"
        print(f"{label:44}{row['ap50_base']:8.3f}{row['ap50_novel']:8.3f}", flush=True)
    if run.teacher:
        for label, metrics in baselines(detector, seen, run.teacher, base, run).items():
            row = metrics.summary()
            print(f"{label:44}{row['ap50_base']:8.3f}{row['ap50_novel']:8.3f}", flush=True)


if __name__ == "__main__":
    cli.execute(main)
