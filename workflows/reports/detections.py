"""Annotated images and drawings of a detector's results beside the annotations."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from PIL import Image

from data_prep import storage
from ovd_models.batches import Detections
from ovd_models.images import decode_image


def read_box_image(storage_uri: str, row: Mapping[str, Any]) -> Image.Image:
    """Read the image of a `boxes` row."""
    uri = storage.join(storage_uri, row["uri"])
    return decode_image(storage.read_bytes(uri), uri)


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
    left = annotations_as_detections(row, names, detections).draw()
    right = detections.above(threshold).distinct().draw()
    comparison = Image.new("RGB", (left.width + right.width + 6, left.height), "white")
    comparison.paste(left, (0, 0))
    comparison.paste(right, (left.width + 6, 0))
    return comparison
