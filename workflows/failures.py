"""Failure gallery: where a detector and its teacher go wrong, found automatically on an annotated set.

model, boxes/<name> --detect--> objects called by a similar name
teacher ----crops of annotated boxes--> long objects that the square resize distorts: warp, pad, centre side by side
                                    --> parts and loose boxes that the teacher takes for the whole

python workflows/failures.py --model store/runs/vild/<run>/model --teacher store/runs/clip/<run>/model
"""

import collections
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.ops import box_iou

import ovd_models
from data_prep import tables
from data_prep.embeddings.crops import CropConfig, Fit, crop_squares, crop_windows
from data_prep.embeddings.teachers import Teacher, embed_regions
from ovd_models.batches import Detections
from ovd_models.errors import InputError
from ovd_models.vocabulary import build_vocabulary
from workflows import evaluate
from workflows.common import cli, tracking
from workflows.common.teacher import open_teacher, read_categories
from workflows.reports import page

Boxes = npt.NDArray[np.float32]
FITS: tuple[Fit, ...] = get_args(Fit)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One gallery."""

    storage: str = "store"
    """Folder or URI that holds all tables."""
    model: str = ""
    """Folder or URI of a detector checkpoint, or an MLflow `models:/` URI."""
    teacher: str = ""
    """Folder or URI of the CLIP checkpoint."""
    boxes: str = "pictograms-eval"
    """Name of the `boxes` table."""
    categories: str = ""
    """Name of the `categories` table; that of `boxes` up to the last dash if empty."""
    output: str = "failures.html"
    """The page that is written."""
    max_images: int = 300
    score_threshold: float = 0.2
    """Detections below it are no claims."""
    elongated: float = 2.0
    """Aspect ratio from which an object counts as long."""
    temperature: float = 50.0
    """Multiplies the teacher's cosines."""
    shown: int = 8
    """Examples of each kind."""


def default() -> Run:
    """The pictogram world's held-out scenes; give it `--model` and `--teacher`."""
    return Run()


CONFIGS: dict[str, Callable[[], Run]] = {"default": default}


@dataclass(frozen=True)
class AnnotatedObject:
    """An annotated object."""

    image: Image.Image
    box: Boxes
    """[4] xyxy."""
    name: str


@dataclass(frozen=True)
class Confusion:
    """An object that was called by another name."""

    target: AnnotatedObject
    called: str
    score: float
    similarity: float
    """Cosine of the two names' embeddings."""


@dataclass(frozen=True)
class Distortion:
    """A long object, as each way of making it square shows it to the teacher."""

    target: AnnotatedObject
    squares: Mapping[Fit, Image.Image]
    said: Mapping[Fit, tuple[str, float]]
    """The teacher's best name and the probability of the right one, by way."""


@dataclass(frozen=True)
class LooseBox:
    """A part or a loose box that the teacher likes as much as the tight one."""

    target: AnnotatedObject
    other: Boxes
    """[4] xyxy."""
    kind: str
    tight_score: float
    other_score: float


# ---------------------------------------------------------------------------------------------------------- finding


def confusions(
    targets: Sequence[Sequence[AnnotatedObject]], found: Sequence[Detections], similar: Callable[[str, str], float]
) -> list[Confusion]:
    """Objects whose best detection bears another name, the most similar names first.

    Args:
        targets: of each image.
        found: of each image.
        similar: how alike two names are.
    """
    wrong = []
    for own, detections in zip(targets, found, strict=True):
        if not own or not len(detections):
            continue
        overlap_TN = box_iou(torch.from_numpy(np.stack([target.box for target in own])), detections.boxes)
        score_TN = torch.where(overlap_TN >= 0.5, detections.scores, -1.0)
        for target, score, best in zip(own, score_TN.amax(1).tolist(), score_TN.argmax(1).tolist(), strict=True):
            called = detections.names[detections.labels[best]]
            if score > 0 and called != target.name:
                wrong.append(Confusion(target, called, score, similar(target.name, called)))
    return sorted(wrong, key=lambda entry: -entry.similarity)


def varied(wrong: Sequence[Confusion], most: int = 2) -> list[Confusion]:
    """The first `most` of every pair of names, in order: one frequent confusion would fill the page."""
    seen: collections.Counter[tuple[str, str]] = collections.Counter()
    kept = []
    for entry in wrong:
        pair = entry.target.name, entry.called
        seen[pair] += 1
        if seen[pair] <= most:
            kept.append(entry)
    return kept


def other_boxes(box: Boxes, width: int, height: int) -> dict[str, Boxes]:
    """Boxes that a tight one should beat: its four quarters, and one of twice its size."""
    x0, y0, x1, y1 = box.tolist()
    x, y, w, h = (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0
    found = {
        "its left half": [x0, y0, x, y1],
        "its right half": [x, y0, x1, y1],
        "its upper half": [x0, y0, x1, y],
        "its lower half": [x0, y, x1, y1],
        "a box of twice its size": [max(0, x - w), max(0, y - h), min(width, x + w), min(height, y + h)],
    }
    return {kind: np.array(corners, np.float32) for kind, corners in found.items()}


class CropScorer:
    """The teacher, asked about crops."""

    def __init__(self, teacher: Teacher, names: Sequence[str], text_KD: Tensor, temperature: float) -> None:
        """Take the teacher.

        Args:
            teacher: of a CLIP checkpoint.
            names: K names.
            text_KD: their unit rows.
            temperature: multiplies cosines.
        """
        self.teacher, self.names, self.text_KD, self.temperature = teacher, tuple(names), text_KD, temperature
        self.row_of = {name: row for row, name in enumerate(names)}

    def probabilities(self, image: Image.Image, boxes: Boxes, fit: Fit = "warp") -> Tensor:
        """[N, K] of the names, for boxes [N, 4] at their own size."""
        (rows,) = embed_regions(self.teacher, [np.asarray(image)], [boxes], CropConfig(scales=(1.0,), fit=fit))
        region_ND = torch.from_numpy(rows.astype(np.float32))
        return (self.temperature * region_ND @ self.text_KD.T).softmax(1)


def distortions(targets: Sequence[AnnotatedObject], scorer: CropScorer, least: float) -> list[Distortion]:
    """Long objects about which the three ways disagree, the largest disagreement first."""
    found = []
    for target in targets:
        width, height = (target.box[2:] - target.box[:2]).tolist()
        if max(width, height) < least * min(width, height):
            continue
        squares, said, right = {}, {}, []
        for fit in FITS:
            window = crop_windows(target.box[None], 1.0, *target.image.size)
            pixels = crop_squares(
                np.asarray(target.image), window.tolist(), scorer.teacher.side, fit, scorer.teacher.margin
            )
            (probability_K,) = scorer.probabilities(target.image, target.box[None], fit)
            squares[fit] = Image.fromarray(pixels[0])
            own = float(probability_K[scorer.row_of[target.name]])
            said[fit] = (scorer.names[int(probability_K.argmax())], own)
            right.append(own)
        found.append((max(right) - min(right), Distortion(target, squares, said)))
    return [entry for _, entry in sorted(found, key=lambda pair: -pair[0])]


def loose_boxes(targets: Sequence[AnnotatedObject], scorer: CropScorer) -> list[LooseBox]:
    """Objects of which a part, or a loose box, gets at least the tight box's score; the largest surplus first."""
    found = []
    for target in targets:
        others = other_boxes(target.box, *target.image.size)
        scores = scorer.probabilities(target.image, np.stack([target.box, *others.values()]))[
            :, scorer.row_of[target.name]
        ]
        best = int(scores[1:].argmax())
        kind, box = list(others.items())[best]
        if scores[best + 1] >= scores[0]:
            found.append(LooseBox(target, box, kind, float(scores[0]), float(scores[best + 1])))
    return sorted(found, key=lambda entry: entry.tight_score - entry.other_score)


# ---------------------------------------------------------------------------------------------------------- report


def gallery(run: Run) -> dict[str, Any]:
    """Find the failures and write the page; returns how many there are of each kind.

    Raises:
        InputError: a checkpoint or a table is missing.
    """
    if not run.model or not run.teacher:
        raise InputError("--model, --teacher: missing, expected a detector checkpoint and a CLIP checkpoint")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    detector = ovd_models.load(tracking.local_model(run.model, run.storage))
    categories, _ = read_categories(run.storage, run.categories or run.boxes.rsplit("-", 1)[0])
    names = list(categories.values())
    text_KD = build_vocabulary(detector.encoder, names).embeddings
    scorer = CropScorer(open_teacher(run.teacher, detector.teacher), names, text_KD, run.temperature)
    row_of = {name: row for row, name in enumerate(names)}
    similarity_KK = text_KD @ text_KD.T

    rows = tables.read_table(run.storage, "boxes", run.boxes).to_pylist()[: run.max_images]
    where = evaluate.Run(storage=run.storage)
    targets, found = [], []
    for row in rows:
        image = evaluate.read_box_image(where, row)
        targets.append(annotated_objects(row, image, categories))
        found.append(detector.detect(image, names, score_threshold=run.score_threshold))
    every = [target for own in targets for target in own]
    wrong = confusions(targets, found, lambda one, two: float(similarity_KK[row_of[one], row_of[two]]))
    long = distortions(every, scorer, run.elongated)
    loose = loose_boxes(every, scorer)
    counts = {"objects": len(every), "confused": len(wrong), "elongated": len(long), "loose": len(loose)}
    values = {
        "run": run,
        "counts": counts,
        "pairs": collections.Counter((entry.target.name, entry.called) for entry in wrong).most_common(run.shown),
        "confusions": [(entry, draw(entry.target)) for entry in varied(wrong)[: run.shown]],
        "distortions": [
            (entry, draw(entry.target), {fit: page.picture_uri(square) for fit, square in entry.squares.items()})
            for entry in long[: run.shown]
        ],
        "right": {fit: sum(entry.said[fit][0] == entry.target.name for entry in long) for fit in FITS},
        "loose": [(entry, draw(entry.target, entry.other)) for entry in loose[: run.shown]],
    }
    Path(run.output).write_text(page.render(TEMPLATE, values), encoding="utf-8")
    return counts


def annotated_objects(
    row: Mapping[str, Any], image: Image.Image, categories: Mapping[int, str]
) -> list[AnnotatedObject]:
    """The annotated objects of an image that are no crowds."""
    return [
        AnnotatedObject(image, np.array(box, np.float32), categories[key])
        for box, key, crowd in zip(row["boxes"], row["category_ids"], row["iscrowd"], strict=True)
        if key in categories and not crowd
    ]


def draw(target: AnnotatedObject, other: Boxes | None = None) -> str:
    """The picture with the object's box in green, and another one in red."""
    scale = max(1.0, 256 / max(target.image.size))
    picture = target.image.resize((round(target.image.width * scale), round(target.image.height * scale)))
    pen = ImageDraw.Draw(picture)
    pen.rectangle((target.box * scale).tolist(), outline="#0b6e4f", width=3)
    if other is not None:
        pen.rectangle((other * scale).tolist(), outline="#c1121f", width=3)
    return page.picture_uri(picture)


TEMPLATE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>Failures on {{ run.boxes }}</title><style>{{ style }}</style></head>
<body>
<h1>Failures on {{ run.boxes }}</h1>
<p>{{ counts.objects|count }} annotated objects; detector <code>{{ run.model }}</code>,
teacher <code>{{ run.teacher }}</code>.</p>

<h2>Similar things confused</h2>
<p><b>{{ counts.confused|count }}</b> objects were found under another name. Names most alike to the teacher come
first.</p>
<table>
  <tr><th>is</th><th>was called</th><th class="n">times</th></tr>
  {% for (name, called), times in pairs %}
  <tr><td>{{ name }}</td><td>{{ called }}</td><td class="n">{{ times }}</td></tr>
  {% endfor %}
</table>
<div class="row three">
  {% for entry, picture in confusions %}
  <figure><img src="{{ picture }}" alt=""><figcaption><b>{{ entry.target.name }}</b> called {{ entry.called }}
    ({{ "%.2f"|format(entry.score) }}); the names' cosine is {{ "%.2f"|format(entry.similarity) }}</figcaption></figure>
  {% endfor %}
</div>

<h2>Long things in a square</h2>
<p>Of <b>{{ counts.elongated|count }}</b> objects at least {{ run.elongated }} times as long as wide, the teacher names
{% for fit, count in right.items() %}{{ count }} with <code>{{ fit }}</code>{{ ", " if not loop.last }}{% endfor %}.
Those about which the three ways disagree most come first.</p>
{% for entry, picture, squares in distortions %}
<div class="row">
  <figure class="tiny"><img src="{{ picture }}" alt=""><figcaption><b>{{ entry.target.name }}</b></figcaption></figure>
  {% for fit, square in squares.items() %}
  <figure class="tiny"><img src="{{ square }}" alt=""><figcaption>{{ fit }}: {{ entry.said[fit][0] }}; the right name
    {{ "%.2f"|format(entry.said[fit][1]) }}</figcaption></figure>
  {% endfor %}
</div>
{% endfor %}

<h2>Parts and loose boxes taken for the whole</h2>
<p>For <b>{{ counts.loose|count }}</b> objects the teacher gives half of the object (red), or a box of twice its size,
at least the score of the tight box (green): why its scores alone cannot rank boxes.</p>
<div class="row three">
  {% for entry, picture in loose %}
  <figure><img src="{{ picture }}" alt=""><figcaption><b>{{ entry.target.name }}</b>: {{ entry.kind }}
    {{ "%.2f"|format(entry.other_score) }}, the tight box {{ "%.2f"|format(entry.tight_score) }}</figcaption></figure>
  {% endfor %}
</div>
</body>
</html>
"""


def main() -> None:
    """The script: find, write, tell."""
    run = cli.parse(CONFIGS, __doc__)
    counts = gallery(run)
    print(", ".join(f"{name} {count:,}" for name, count in counts.items()))
    print(f"report: {Path(run.output).absolute()}")


if __name__ == "__main__":
    cli.execute(main)
