"""The page of a box set: what was odd about its files, its categories, and a sheet of annotated pictures."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from data_prep import storage, tables
from data_prep.streams.images import read_image
from ovd_models.drawing import draw_boxes
from ovd_models.errors import InputError
from workflows.reports import page

PICTURES = 24
"""Pictures shown of each part."""
CATEGORIES = 300
"""Categories listed, those with most images first."""


def write_boxes_report(storage_uri: str, name: str) -> str:
    """Write `<storage>/reports/boxes-<name>.html` from the published tables; returns its URI.

    Raises:
        InputError: a table is missing.
    """
    categories = sorted(
        tables.read_table(storage_uri, "categories", name).to_pylist(), key=lambda row: -row["image_count"]
    )
    names = {row["category_id"]: row["name"] for row in categories}
    manifest = tables.read_manifest(storage_uri, "boxes", f"{name}-train")
    parts = {part: tables.read_table(storage_uri, "boxes", f"{name}-{part}") for part in ("train", "eval")}
    values = {
        "name": name,
        "storage": storage.absolute(storage_uri),
        "account": manifest.details.get("account", ()),
        "categories": categories[:CATEGORIES],
        "category_count": len(categories),
        "images": {part: rows.num_rows for part, rows in parts.items()},
        "boxes": {part: len(rows["category_ids"].combine_chunks().flatten()) for part, rows in parts.items()},
        "sheets": {part: draw_sheet(storage_uri, rows, names) for part, rows in parts.items()},
    }
    uri = storage.join(storage_uri, "reports", f"boxes-{name}.html")
    storage.write_bytes(uri, page.render_page("boxes", values).encode())
    return uri


def draw_sheet(
    storage_uri: str, rows: pa.Table, names: Mapping[int, str]
) -> Sequence[tuple[Mapping[str, Any], Image.Image]]:
    """Evenly spaced rows of a `boxes` table with their pictures and boxes, without those that cannot be read."""
    drawn = []
    for number in sorted({round(place) for place in np.linspace(0, rows.num_rows - 1, min(PICTURES, rows.num_rows))}):
        (row,) = rows.slice(number, 1).to_pylist()
        try:
            image = read_image(storage.join(storage_uri, row["uri"]))
        except InputError:
            continue
        boxes = torch.tensor(row["boxes"], dtype=torch.float32).reshape(-1, 4)
        labels = [names[key] for key in row["category_ids"]]
        picture = draw_boxes(image, boxes, labels, labels)
        picture.thumbnail((480, 480))
        drawn.append((row, picture))
    return drawn
