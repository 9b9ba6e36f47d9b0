"""What a detector finds in a few fixed images while it trains, measured as the final evaluation does."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from PIL import Image

from data_prep import storage, tables
from data_prep.progress import watched
from ovd_models.codet.model import CoDet
from ovd_models.evaluation import evaluate_detections
from ovd_models.preprocess import to_tensor
from ovd_models.vild.model import ViLD
from ovd_models.vocabulary import Vocabulary
from workflows.common.session import Validated
from workflows.reports.detections import draw_comparison, read_box_images

NUM_PICTURES = 4
"""Images that are drawn at each measurement."""


class DetectorTraining(Protocol):
    """What the runs of both detectors have."""

    @property
    def storage(self) -> str:
        """Folder or URI that holds tables."""

    @property
    def boxes(self) -> str:
        """Name of the box set."""

    @property
    def validate_images(self) -> int:
        """Number of images that are measured."""

    @property
    def max_detections(self) -> int:
        """Detections of an image."""


class DetectorNames(Protocol):
    """What the names of both detectors have."""

    @property
    def categories(self) -> dict[int, str]:
        """Category id -> name, for categories with a split."""

    @property
    def splits(self) -> dict[str, str]:
        """`base` or `novel` by name."""

    @property
    def vocabulary(self) -> Vocabulary:
        """All names, embedded."""


@dataclass(frozen=True)
class ValidationSet:
    """The first images of a `boxes` table, and all names of its categories."""

    storage: str
    boxes: str
    """Name of the table."""
    images: int
    categories: Mapping[int, str]
    """Category id -> name, for categories with a split."""
    splits: Mapping[str, str]
    """`base` or `novel` by name."""
    vocabulary: Vocabulary
    """All names, embedded."""
    max_detections: int
    """Detections of an image."""

    def measure(self, model: torch.nn.Module) -> Validated:
        """AP of a detector, and drawings of the first images. Images that cannot be read are left out.

        Raises:
            InputError: the table is missing, or no image can be read.
        """
        assert isinstance(model, CoDet | ViLD)
        device = next(model.parameters()).device
        vocabulary = self.vocabulary.to(device)
        table = tables.read_table(self.storage, "boxes", self.boxes).slice(0, self.images)
        rows, found = [], []
        pictures: list[Image.Image] = []
        images = read_box_images(self.storage, table.to_pylist())
        for row, image in watched(images, "validation", "images", table.num_rows):
            if image is None:
                continue
            pixels = to_tensor(image).to(device)
            (detections,) = model.detect([pixels], vocabulary, score_threshold=0.01, max_detections=self.max_detections)
            rows.append(row)
            found.append(detections.to(torch.device("cpu")))
            if len(pictures) < NUM_PICTURES:
                pictures.append(draw_comparison(row, replace(found[-1], image=image), self.categories))
        metrics = evaluate_detections(rows, found, self.categories, self.splits)
        return Validated(metrics.summary(), tuple(pictures))


def validation_set(run: DetectorTraining, names: DetectorNames) -> ValidationSet:
    """The images on which a detector is measured during training; made in the driver, whose folder workers lack."""
    return ValidationSet(
        storage=storage.absolute(run.storage),
        boxes=f"{run.boxes}-eval",
        images=run.validate_images,
        categories=names.categories,
        splits=names.splits,
        vocabulary=names.vocabulary,
        max_detections=run.max_detections,
    )
