"""The page of `failures.py`: missed objects, false positives, confused names, elongated objects, loose boxes.

K names, T annotated objects, N boxes or detections of one image, D embedding width.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.ops import box_iou

from data_prep.embeddings.crops import CropConfig, Fit, crop_squares, crop_windows
from data_prep.embeddings.teachers import Teacher, embed_regions
from data_prep.progress import watched
from ovd_models.batches import Detections
from ovd_models.vocabulary import Vocabulary
from workflows.reports import page

Boxes = npt.NDArray[np.float32]
ReadPicture = Callable[[], Image.Image]
"""Reads the picture of an object again: hundreds of large photographs do not fit in memory."""
RED = "#c1121f"
FITS: tuple[Fit, ...] = get_args(Fit)


@dataclass(frozen=True)
class AnnotatedObject:
    """An annotated object."""

    read: ReadPicture
    box: Boxes
    """[4] xyxy."""
    name: str

    @property
    def image(self) -> Image.Image:
        """Its picture."""
        return self.read()


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
class FalsePositive:
    """A detection where nothing is annotated."""

    read: ReadPicture
    box: Boxes
    """[4] xyxy."""
    name: str
    score: float


@dataclass(frozen=True)
class Failures:
    """The failures on an annotated set; each list starts with the worst."""

    num_objects: int
    missed: list[AnnotatedObject]
    invented: list[FalsePositive]
    confused: list[Confusion]
    elongated: list[Distortion]
    loose: list[LooseBox]

    @property
    def counts(self) -> dict[str, int]:
        """Number of objects and of failures of each kind."""
        kinds = ("missed", "invented", "confused", "elongated", "loose")
        return {"objects": self.num_objects, **{kind: len(getattr(self, kind)) for kind in kinds}}


def annotated_objects(
    row: Mapping[str, Any], read: ReadPicture, categories: Mapping[int, str]
) -> list[AnnotatedObject]:
    """The annotated objects of a `boxes` row, without crowds and unknown categories."""
    return [
        AnnotatedObject(read, np.array(box, np.float32), categories[key])
        for box, key, crowd in zip(row["boxes"], row["category_ids"], row["iscrowd"], strict=True)
        if key in categories and not crowd
    ]


# ---------------------------------------------------------------------------------------------------------- finding


def find_missed(
    image_objects: Sequence[Sequence[AnnotatedObject]], detections: Sequence[Detections]
) -> list[AnnotatedObject]:
    """Objects that no detection of any name covers (IoU >= 0.5); the largest first."""
    missed = []
    for targets, found in zip(image_objects, detections, strict=True):
        if targets:
            overlap_TN = box_iou(torch.from_numpy(np.stack([target.box for target in targets])), found.boxes)
            covered = (overlap_TN >= 0.5).any(1).tolist()
            missed += [target for target, is_covered in zip(targets, covered, strict=True) if not is_covered]
    return sorted(missed, key=lambda target: -float(np.prod(target.box[2:] - target.box[:2])))


def find_invented(
    rows: Sequence[Mapping[str, Any]], pictures: Sequence[ReadPicture], detections: Sequence[Detections]
) -> list[FalsePositive]:
    """Detections that touch no annotation of their image (IoU < 0.1), crowds included; the surest first."""
    invented = []
    for row, read, found in zip(rows, pictures, detections, strict=True):
        annotated = torch.tensor(row["boxes"], dtype=torch.float32).view(-1, 4)
        shown = found.distinct()
        alone = (box_iou(shown.boxes, annotated) < 0.1).all(1).tolist()
        invented += [
            FalsePositive(read, np.array(entry.box, np.float32), str(entry.name), float(entry.score or 0))
            for entry, is_alone in zip(shown, alone, strict=True)
            if is_alone
        ]
    return sorted(invented, key=lambda entry: -entry.score)


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
    for target in watched(objects, "long objects", "objects"):
        width, height = (target.box[2:] - target.box[:2]).tolist()
        if max(width, height) < min_aspect * min(width, height):
            continue
        image = target.image
        window = crop_windows(target.box[None], 1.0, *image.size).tolist()
        side, margin = scorer.teacher.side, scorer.teacher.margin
        squares, predicted, probability = {}, {}, {}
        for fit in FITS:
            (probability_K,) = scorer.probabilities(image, target.box[None], fit)
            squares[fit] = Image.fromarray(crop_squares(np.asarray(image), window, side, fit, margin)[0])
            predicted[fit] = scorer.vocabulary.names[int(probability_K.argmax())]
            probability[fit] = float(probability_K[scorer.index_of[target.name]])
        found.append(Distortion(target, squares, predicted, probability))
    return sorted(found, key=lambda entry: -entry.disagreement)


def find_loose_boxes(objects: Sequence[AnnotatedObject], scorer: CropScorer) -> list[LooseBox]:
    """Objects with a part or loose box that scores at least as high as the tight box; the largest surplus first."""
    found = []
    for target in watched(objects, "loose boxes", "objects"):
        image = target.image
        others = alternative_boxes(target.box, *image.size)
        scores_NK = scorer.probabilities(image, np.stack([target.box, *others.values()]))
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


def render_gallery(failures: Failures, settings: Mapping[str, object], num_examples: int) -> str:
    """The page with `num_examples` of each kind; `settings` are the fields of the script's run."""
    pairs = Counter((entry.target.name, entry.predicted) for entry in failures.confused)
    values = {
        "run": settings,
        "counts": failures.counts,
        "pairs": pairs.most_common(num_examples),
        "missed": [(entry, draw_object(entry)) for entry in failures.missed[:num_examples]],
        "invented": [(entry, draw_box(entry.read(), entry.box, RED)) for entry in failures.invented[:num_examples]],
        "confused": [(entry, draw_object(entry.target)) for entry in limit_repeats(failures.confused)[:num_examples]],
        "elongated": [(entry, draw_object(entry.target)) for entry in failures.elongated[:num_examples]],
        "right": {fit: sum(each.predicted[fit] == each.target.name for each in failures.elongated) for fit in FITS},
        "loose": [(entry, draw_object(entry.target, entry.other)) for entry in failures.loose[:num_examples]],
    }
    return page.render_page("failures", values)


def draw_object(target: AnnotatedObject, other: Boxes | None = None) -> Image.Image:
    """The image with the object's box in green, and another box in red."""
    image = target.image
    drawing = draw_box(image, target.box, page.GREEN)
    return drawing if other is None else draw_box(drawing, other * (drawing.width / image.width), RED)


def draw_box(image: Image.Image, box: Boxes, colour: str) -> Image.Image:
    """The image, enlarged if it is small, with a box."""
    scale = max(1.0, 256 / max(image.size))
    drawing = image.resize((round(image.width * scale), round(image.height * scale)))
    line = max(3, round(max(drawing.size) / 200))
    ImageDraw.Draw(drawing).rectangle((box * scale).tolist(), outline=colour, width=line)
    return drawing
