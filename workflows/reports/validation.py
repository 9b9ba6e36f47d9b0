"""What a detector finds in a few fixed images while it trains, measured as the final evaluation does."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from PIL import Image

from data_prep import tables
from ovd_models.codet.model import CoDet
from ovd_models.evaluation import evaluate_detections
from ovd_models.preprocess import to_tensor
from ovd_models.vild.model import ViLD
from ovd_models.vocabulary import Vocabulary
from workflows.common.session import Validated
from workflows.reports.detections import draw_comparison, read_box_images

NUM_PICTURES = 4
"""Images that are drawn at each measurement."""


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
        for row, image in read_box_images(self.storage, table.to_pylist()):
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
