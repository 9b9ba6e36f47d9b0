"""Settings of the scripts that run a detector on an annotated set; imports nothing heavy."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from data_prep import tables
from ovd_models.errors import InputError
from ovd_models.metrics.records import IouType
from ovd_models.prompts import SynonymRule
from workflows.common.measured import ProtocolChoice

if TYPE_CHECKING:
    from ovd_models.predictors import Detector


@dataclass(frozen=True, kw_only=True)
class DetectorRun:
    """A detector and the annotated set on which a script runs it."""

    storage: str = "store"
    """Folder or URI that holds all tables."""
    model: str = ""
    """Folder or URI of a checkpoint, or an MLflow `models:/` URI."""
    boxes: str = "pictograms-eval"
    """Name of the `boxes` table."""
    categories: str = ""
    """Name of the `categories` table; if empty, that of `boxes` up to the last dash."""
    device: str = "auto"
    """Device of all models, such as `cuda`; `auto` is a GPU if this machine has one."""

    def load_detector(self) -> "Detector":
        """Load the detector, and let torch use all cores.

        Raises:
            InputError: there is no such checkpoint or device.
        """
        import os

        import torch

        import ovd_models
        from workflows.common import models

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        return ovd_models.load(models.local_model(self.model, self.storage), self.device)

    def read_rows(self) -> list[dict[str, Any]]:
        """The rows of the set.

        Raises:
            InputError: the table is missing or empty.
        """
        from data_prep import tables

        rows: list[dict[str, Any]] = tables.read_table(self.storage, "boxes", self.boxes).to_pylist()
        if not rows:
            raise InputError(f"boxes/{self.boxes}: no images, expected at least one")
        return rows

    def read_categories(self) -> tuple[dict[int, str], dict[str, str]]:
        """`workflows.common.teacher.read_categories` of the set."""
        from workflows.common.teacher import read_categories

        return read_categories(self.storage, self.category_table)

    def read_synonyms(self) -> dict[str, list[str]]:
        """Other words by name, of the set."""
        from workflows.common.teacher import read_synonyms

        return read_synonyms(self.storage, self.category_table)

    @property
    def category_table(self) -> str:
        """Name of the `categories` table."""
        return self.categories or tables.category_table(self.boxes)


@dataclass(frozen=True, kw_only=True)
class Run(DetectorRun):
    """One evaluation: of a model (`--model`) or of predictions (`--ground-truth` and `--predictions`)."""

    protocol: ProtocolChoice = "auto"
    """By whose rules; `auto` is LVIS for its files, OV-COCO if there are novel categories, else COCO."""
    iou_type: IouType = "bbox"
    """Boxes or masks; for masks, the detector or the file must have them."""
    ground_truth: str = ""
    """An annotation file in COCO's or LVIS's format, instead of `boxes`."""
    predictions: str = ""
    """Predictions made elsewhere: a results file in COCO's format (.json), or rows of `predictions` (.parquet)."""
    novel: str = ""
    """With `ground_truth`: a file with the names of the novel categories, one a line; if empty, they follow the data
    set."""
    output: str = ""
    """File for the protocol's numbers: a flat JSON object with their official names."""
    page: str = ""
    """With `ground_truth`: file for a page that explains the numbers; a model's is in `<storage>/reports`."""
    export: str = ""
    """File for the model's predictions: a results file (.json), or rows of `predictions` (.parquet)."""
    engine: Literal["fast", "lvis"] = "fast"
    """faster-coco-eval; `lvis` is LVIS's own package, for files and the protocol `lvis`."""
    workers: int = 0
    """Actors that predict, each with a GPU unless `device` is the CPU; 0 predicts in this process."""
    sam: str = ""
    """For OV-SAM: folder or URI of a SAM to compare with, also by naming its masks with CLIP."""
    images: int = 0
    """Number of images, from the start of the table; 0 means all."""
    batch_size: int = 16
    """For detectors only, as are the settings below."""
    score_threshold: float = 0.01
    max_detections: int = 0
    """Of an image; 0 is the protocol's: 300 for LVIS, 10,000 for `lvis-fixed`, else 100."""
    synonyms: SynonymRule = "none"
    """Use of the synonyms in `categories`: none, the mean of their embeddings, or the maximum of their scores."""
    num_pictures: int = 8
    """Number of images to draw."""
