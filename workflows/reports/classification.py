"""The page of a zero-shot classification: prompts compared, calibration, confusions, accuracy by name."""

from collections import Counter
from typing import Any

import numpy as np
import torch
from PIL import Image

from data_prep.embeddings.labelled import LabelledSet
from data_prep.streams.images import read_image
from ovd_models.clip.classification import Answers
from ovd_models.errors import InputError
from workflows.reports.explanation import crop, plot_reliability
from workflows.reports.page import render_page

NUM_CONFUSIONS = 18
BINS = 10


def render(labelled: LabelledSet, numbers: list[int], answers: dict[str, Answers], *, title: str, model: str) -> str:
    """The page as HTML.

    Args:
        labelled: the examples.
        numbers: those that were classified.
        answers: by prompt set; the page explains those of the best one.
        title: name of the page.
        model: that classified.
    """
    best = max(answers, key=lambda prompts: answers[prompts].top1)
    rows = sorted(((prompts, found.numbers()) for prompts, found in answers.items()), key=lambda row: -row[1]["top1"])
    values: dict[str, Any] = {
        "title": title,
        "model": model,
        "best": best,
        "top": answers[best].ranked.shape[1],
        "counts": {"examples": len(numbers), "names": len(labelled.names), "images": len(labelled.images)},
        "prompts": rows,
        "reliability": reliability(answers[best]),
        "confusions": confusions(labelled, numbers, answers[best]),
        "classes": classes(labelled, answers[best]),
    }
    return render_page("classify", values)


def reliability(found: Answers) -> str:
    """A plot of accuracy by confidence."""
    sure, right = found.confidence.numpy(), found.right.numpy()
    edges = np.linspace(0, 1, BINS + 1)
    places = np.clip(np.digitize(sure, edges) - 1, 0, BINS - 1)
    counts = np.bincount(places, minlength=BINS)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.bincount(places, right, BINS) / counts
    return plot_reliability(edges, share, "probability of the first name")


def confusions(labelled: LabelledSet, numbers: list[int], found: Answers) -> list[dict[str, Any]]:
    """The most frequent confusions, each with its most confident example."""
    rows_W = torch.nonzero(~found.right).squeeze(1)
    wrong: list[int] = rows_W[torch.argsort(found.confidence[rows_W], descending=True, stable=True)].tolist()
    pairs = Counter((int(found.labels[row]), int(found.ranked[row, 0])) for row in wrong)
    rows = []
    for (true, given), count in pairs.most_common(NUM_CONFUSIONS):
        example = next(row for row in wrong if (int(found.labels[row]), int(found.ranked[row, 0])) == (true, given))
        rows.append(
            {
                "true": labelled.names[true],
                "given": labelled.names[given],
                "count": count,
                "share": count / int((found.labels == true).sum()),
                "confidence": float(found.confidence[example]),
                "others": [labelled.names[label] for label in found.ranked[example].tolist()],
                "picture": example_picture(labelled, numbers[example]),
            }
        )
    return rows


def example_picture(labelled: LabelledSet, number: int) -> Image.Image | None:
    """The picture of an example, or the surroundings of its box."""
    image, place = labelled.image_of(number)
    try:
        picture = read_image(labelled.images[image])
    except InputError:
        return None
    box = [0, 0, *picture.size] if labelled.boxes is None else labelled.boxes[image][place].tolist()
    return crop(picture, box, margin=0.0 if labelled.boxes is None else 0.25)


def classes(labelled: LabelledSet, found: Answers) -> list[dict[str, Any]]:
    """Accuracy of each name that has examples, lowest first, with the name that it is most often given instead."""
    rows = []
    for label in sorted(set(found.labels.tolist())):
        own = found.labels == label
        first = found.ranked[own, 0]
        others = Counter(first[first != label].tolist()).most_common(1)
        rows.append(
            {
                "name": labelled.names[label],
                "examples": int(own.sum()),
                "top1": float((first == label).double().mean()),
                "topk": float((found.ranked[own] == label).any(1).double().mean()),
                "instead": labelled.names[others[0][0]] if others else "",
            }
        )
    return sorted(rows, key=lambda row: (row["top1"], row["topk"]))
