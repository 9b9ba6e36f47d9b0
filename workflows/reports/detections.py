"""Annotated images and drawings of a detector's results beside the annotations."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from PIL import Image

from data_prep import storage
from data_prep.boxes.cleaning import SkipReport
from data_prep.streams.images import read_image
from ovd_models.batches import Detections
from ovd_models.drawing import beside
from ovd_models.errors import InputError


def read_box_image(storage_uri: str, row: Mapping[str, Any]) -> Image.Image:
    """Read the image of a `boxes` row.

    Raises:
        InputError: it cannot be read.
    """
    return read_image(storage.join(storage_uri, row["uri"]))


def read_box_images(
    storage_uri: str, rows: Iterable[Mapping[str, Any]]
) -> Iterator[tuple[Mapping[str, Any], Image.Image | None]]:
    """Each of some `boxes` rows with its image, or None if that cannot be read.

    Prints at the end how many cannot be read.

    Raises:
        InputError: none of them can be read.
    """
    skipped, count = SkipReport(), 0
    for row in rows:
        count += 1
        image = None
        try:
            image = read_box_image(storage_uri, row)
        except InputError as error:
            skipped.add("images that cannot be read", str(error))
        yield row, image
    if count and skipped.counts.total() == count:
        raise InputError(f"no image can be read: {skipped}")
    if skipped:
        print(f"left out: {skipped}", flush=True)


def detections_of_row(row: Mapping[str, Any], names: Mapping[int, str], image: Image.Image | None) -> Detections:
    """A row of `predictions` as detections.

    Args:
        row: of `predictions`.
        names: category id -> name; the vocabulary.
        image: the picture, or None.
    """
    label_of = {key: label for label, key in enumerate(names)}
    return Detections(
        boxes=torch.tensor(row["boxes"]).view(-1, 4),
        scores=torch.tensor(row["scores"]),
        labels=torch.tensor([label_of[key] for key in row["category_ids"]], dtype=torch.int64),
        names=tuple(names.values()),
        width=image.width if image is not None else 0,
        height=image.height if image is not None else 0,
        image=image,
        masks=tuple(row["masks"]) if row["masks"] else None,
    )


def annotations_as_detections(row: Mapping[str, Any], names: Mapping[int, str], detections: Detections) -> Detections:
    """Give the annotated boxes of an image the form of its detections, each with score 1.

    Args:
        row: a `boxes` row.
        names: category id -> name; other categories are left out.
        detections: the image's detections, whose vocabulary holds all of `names`.
    """
    known = [(box, names[key]) for box, key in zip(row["boxes"], row["category_ids"], strict=True) if key in names]
    label_of = {name: label for label, name in enumerate(detections.names)}
    return replace(
        detections,
        boxes=torch.tensor([box for box, _ in known]).view(-1, 4),
        scores=torch.ones(len(known)),
        labels=torch.tensor([label_of[name] for _, name in known], dtype=torch.int64),
    )


def draw_comparison(
    row: Mapping[str, Any], detections: Detections, names: Mapping[int, str], threshold: float = 0.3
) -> Image.Image:
    """Draw annotated boxes on the left and the best name of each detected object above `threshold` on the right."""
    left = annotations_as_detections(row, names, detections).draw(distinct=False)
    right = detections.filter(min_score=threshold).draw()
    return beside(left, right)
