"""Splits of categories into base and novel other than the published ones."""

from typing import Any

import numpy as np
import pyarrow as pa

from data_prep import storage
from data_prep.boxes.coco import flat_categories
from ovd_models.errors import InputError, as_input_error

RARE, COMMON = 10, 100
"""LVIS's limits: a rare category is in at most 10 training images, a common one in at most 100."""


def named_split(categories: list[dict[str, Any]], file: str) -> list[dict[str, Any]]:
    """Rows of `categories` in which the names of a file or URI, one a line, are novel and the others base.

    Raises:
        InputError: the file cannot be read, or a name is of no category.
    """
    with as_input_error(file):
        lines = storage.read_text(file).splitlines()
    names = {row["name"] for row in categories}
    novel = set()
    for number, line in enumerate(lines, 1):
        if name := line.strip():
            if name not in names:
                raise InputError(f"{file}: line {number}: {name!r} is the name of no category, expected one that is")
            novel.add(name)
    return [{**row, "split": "novel" if row["name"] in novel else "base"} for row in categories]


def frequency_split(categories: list[dict[str, Any]], rows: pa.Table) -> list[dict[str, Any]]:
    """Rows of `categories` with LVIS's `r`, `c` or `f` by their number of images; the rare ones are novel.

    Args:
        categories: rows of `categories`.
        rows: of the training images, with `category_ids`.
    """
    image_A, category_A = flat_categories(rows)
    pairs = np.unique(np.stack([image_A, category_A]), axis=1)
    ids, counts = np.unique(pairs[1], return_counts=True)
    count_of = dict(zip(ids.tolist(), counts.tolist(), strict=True))
    split = []
    for row in categories:
        count = count_of.get(row["category_id"], 0)
        frequency = "r" if count <= RARE else "c" if count <= COMMON else "f"
        split.append({**row, "frequency": frequency, "split": "novel" if frequency == "r" else "base"})
    return split
