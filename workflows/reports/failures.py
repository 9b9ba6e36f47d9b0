"""The page of `failures.py`: confused names, elongated objects in square crops, and loose boxes with high scores.

K names, T annotated objects, N boxes or detections of one image, D embedding width.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.ops import box_iou

from data_prep.embeddings.crops import CropConfig, Fit, crop_squares, crop_windows
from data_prep.embeddings.teachers import Teacher, embed_regions
from ovd_models.batches import Detections
from ovd_models.vocabulary import Vocabulary
from workflows.reports import page

Boxes = npt.NDArray[np.float32]
FITS: tuple[Fit, ...] = get_args(Fit)


@dataclass(frozen=True)
class AnnotatedObject:
    """An annotated object."""

    image: Image.Image
    box: Boxes
    """[4] xyxy."""
    name: str


@dataclass(frozen=True)
class Confusion:
    """An object detected under another name."""

    target: AnnotatedObject
    predicted: str
    score: float
    similarity: float
    """Cosine of the two names' embeddings."""


@dataclass(frozen=True)
class Distortion:
    """An elongated object and the teacher's result on each kind of square crop."""

    target: AnnotatedObject
    squares: Mapping[Fit, Image.Image]
    predicted: Mapping[Fit, str]
    """The teacher's best name."""
    probability: Mapping[Fit, float]
    """The teacher's probability of the right name."""

    @property
    def disagreement(self) -> float:
        """Largest difference between the probabilities of the right name."""
        return max(self.probability.values()) - min(self.probability.values())


@dataclass(frozen=True)
class LooseBox:
    """A part or a loose box whose score is at least that of the tight box."""

    target: AnnotatedObject
    other: Boxes
    """[4] xyxy."""
    kind: str
    tight_score: float
    other_score: float


@dataclass(frozen=True)
class Failures:
    """The failures on an annotated set; each list starts with the worst."""

    num_objects: int
    confused: list[Confusion]
    elongated: list[Distortion]
    loose: list[LooseBox]

    @property
    def counts(self) -> dict[str, int]:
        """Number of objects and of failures of each kind."""
        confused, elongated, loose = len(self.confused), len(self.elongated), len(self.loose)
        return {"objects": self.num_objects, "confused": confused, "elongated": elongated, "loose": loose}


def annotated_objects(
    row: Mapping[str, Any], image: Image.Image, categories: Mapping[int, str]
) -> list[AnnotatedObject]:
    """The annotated objects of a `boxes` row, without crowds and unknown categories."""
    return [
        AnnotatedObject(image, np.array(box, np.float32), categories[key])
        for box, key, crowd in zip(row["boxes"], row["category_ids"], row["iscrowd"], strict=True)
        if key in categories and not crowd
    ]


# ---------------------------------------------------------------------------------------------------------- finding


def find_confusions(
    image_objects: Sequence[Sequence[AnnotatedObject]], detections: Sequence[Detections], vocabulary: Vocabulary
) -> list[Confusion]:
    """Objects whose best detection (IoU >= 0.5) has another name; the most similar names first."""
    embedding_of = dict(zip(vocabulary.names, vocabulary.embeddings, strict=True))
    confused = []
    for targets, found in zip(image_objects, detections, strict=True):
        if not targets or not len(found):
            continue
        overlap_TN = box_iou(torch.from_numpy(np.stack([target.box for target in targets])), found.boxes)
        score_TN = torch.where(overlap_TN >= 0.5, found.scores, -1.0)
        for target, score, best in zip(targets, score_TN.amax(1).tolist(), score_TN.argmax(1).tolist(), strict=True):
            name = found.names[found.labels[best]]
            if score > 0 and name != target.name:
                similarity = float(embedding_of[target.name] @ embedding_of[name])
                confused.append(Confusion(target, name, score, similarity))
    return sorted(confused, key=lambda entry: -entry.similarity)


def limit_repeats(confused: Sequence[Confusion], most: int = 2) -> list[Confusion]:
    """Keep the first `most` of each pair of names, so that one frequent confusion does not fill the page."""
    seen = Counter[tuple[str, str]]()
    kept = []
    for entry in confused:
        pair = entry.target.name, entry.predicted
        seen[pair] += 1
        if seen[pair] <= most:
            kept.append(entry)
    return kept


class CropScorer:
    """Scores crops with the teacher."""

    def __init__(self, teacher: Teacher, vocabulary: Vocabulary, temperature: float) -> None:
        """Keep the teacher and its K names; `temperature` multiplies cosines."""
        self.teacher, self.vocabulary, self.temperature = teacher, vocabulary, temperature
        self.index_of = {name: index for index, name in enumerate(vocabulary.names)}

    def probabilities(self, image: Image.Image, boxes: Boxes, fit: Fit = "warp") -> Tensor:
        """[N, K] probabilities of the names for tight crops of boxes [N, 4]."""
        (rows,) = embed_regions(self.teacher, [np.asarray(image)], [boxes], CropConfig(scales=(1.0,), fit=fit))
        region_ND = torch.from_numpy(rows.astype(np.float32))
        return (self.temperature * region_ND @ self.vocabulary.embeddings.T).softmax(1)


def find_distortions(objects: Sequence[AnnotatedObject], scorer: CropScorer, min_aspect: float) -> list[Distortion]:
    """Objects with at least this aspect ratio; those with the largest disagreement between square crops first."""
    found = []
    for target in objects:
        width, height = (target.box[2:] - target.box[:2]).tolist()
        if max(width, height) < min_aspect * min(width, height):
            continue
        window = crop_windows(target.box[None], 1.0, *target.image.size).tolist()
        side, margin = scorer.teacher.side, scorer.teacher.margin
        squares, predicted, probability = {}, {}, {}
        for fit in FITS:
            (probability_K,) = scorer.probabilities(target.image, target.box[None], fit)
            squares[fit] = Image.fromarray(crop_squares(np.asarray(target.image), window, side, fit, margin)[0])
            predicted[fit] = scorer.vocabulary.names[int(probability_K.argmax())]
            probability[fit] = float(probability_K[scorer.index_of[target.name]])
        found.append(Distortion(target, squares, predicted, probability))
    return sorted(found, key=lambda entry: -entry.disagreement)


def find_loose_boxes(objects: Sequence[AnnotatedObject], scorer: CropScorer) -> list[LooseBox]:
    """Objects with a part or loose box that scores at least as high as the tight box; the largest surplus first."""
    found = []
    for target in objects:
        others = alternative_boxes(target.box, *target.image.size)
        scores_NK = scorer.probabilities(target.image, np.stack([target.box, *others.values()]))
        tight_score, *other_scores = scores_NK[:, scorer.index_of[target.name]].tolist()
        score, kind = max(zip(other_scores, others, strict=True), key=lambda entry: entry[0])
        if score >= tight_score:
            found.append(LooseBox(target, others[kind], kind, tight_score, score))
    return sorted(found, key=lambda entry: entry.tight_score - entry.other_score)


def alternative_boxes(box: Boxes, width: int, height: int) -> dict[str, Boxes]:
    """Boxes that should score lower than a tight one: its four halves, and a box of twice its size."""
    x0, y0, x1, y1 = box.tolist()
    x, y, w, h = (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0
    boxes = {
        "its left half": [x0, y0, x, y1],
        "its right half": [x, y0, x1, y1],
        "its upper half": [x0, y0, x1, y],
        "its lower half": [x0, y, x1, y1],
        "a box of twice its size": [max(0, x - w), max(0, y - h), min(width, x + w), min(height, y + h)],
    }
    return {kind: np.array(corners, np.float32) for kind, corners in boxes.items()}


# ------------------------------------------------------------------------------------------------------------- page


def write_gallery(path: Path, failures: Failures, settings: Mapping[str, object], num_examples: int) -> None:
    """Write the page with `num_examples` of each kind; `settings` are the fields of the script's run."""
    pairs = Counter((entry.target.name, entry.predicted) for entry in failures.confused)
    values = {
        "run": settings,
        "counts": failures.counts,
        "pairs": pairs.most_common(num_examples),
        "confused": [(entry, draw_object(entry.target)) for entry in limit_repeats(failures.confused)[:num_examples]],
        "elongated": [(entry, draw_object(entry.target)) for entry in failures.elongated[:num_examples]],
        "right": {fit: sum(each.predicted[fit] == each.target.name for each in failures.elongated) for fit in FITS},
        "loose": [(entry, draw_object(entry.target, entry.other)) for entry in failures.loose[:num_examples]],
    }
    path.write_text(page.render_page("failures", values), encoding="utf-8")


def draw_object(target: AnnotatedObject, other: Boxes | None = None) -> Image.Image:
    """The image with the object's box in green, and another box in red."""
    scale = max(1.0, 256 / max(target.image.size))
    drawing = target.image.resize((round(target.image.width * scale), round(target.image.height * scale)))
    pen = ImageDraw.Draw(drawing)
    pen.rectangle((target.box * scale).tolist(), outline=page.GREEN, width=3)
    if other is not None:
        pen.rectangle((other * scale).tolist(), outline="#c1121f", width=3)
    return drawing
