"""Labelled images for classification: a folder for each class, a list, or the boxes of a table."""

import csv
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_prep import storage, tables
from ovd_models.errors import InputError, as_input_error
from ovd_models.images import EXTENSIONS
from ovd_models.prompts import clean_name

Boxes = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class LabelledSet:
    """N examples in some images: whole images, or boxes in them."""

    origin: str
    """Folder, file or table, for messages."""
    names: tuple[str, ...]
    """K names."""
    images: Sequence[str]
    """URIs."""
    labels: Sequence[int]
    """[N] index into `names`."""
    boxes: Sequence[Boxes] | None = None
    """[n, 4] xyxy, pixels, of each image; None if the examples are whole images."""

    @functools.cached_property
    def edges(self) -> npt.NDArray[np.int64]:
        """The number of the first example of each image, and N."""
        counts = [1] * len(self.images) if self.boxes is None else [len(own) for own in self.boxes]
        return np.cumsum([0, *counts])

    def examples_of(self, image: int) -> range:
        """The numbers of the examples of an image."""
        return range(int(self.edges[image]), int(self.edges[image + 1]))

    def image_of(self, number: int) -> tuple[int, int]:
        """The image of an example, and its place among the image's boxes."""
        image = int(np.searchsorted(self.edges, number, side="right")) - 1
        return image, number - int(self.edges[image])

    def first(self, count: int) -> "LabelledSet":
        """The examples of the first images."""
        stop = self.examples_of(min(count, len(self.images)) - 1).stop
        boxes = None if self.boxes is None else self.boxes[:count]
        return LabelledSet(
            origin=self.origin,
            names=self.names,
            images=self.images[:count],
            labels=self.labels[:stop],
            boxes=boxes,
        )


def read_labelled(data: str, names: str = "") -> LabelledSet:
    """A folder with a folder for each class, or a .tsv or .csv file with the columns `file` and `label`.

    Args:
        data: the folder or file; files of a list are relative to its folder.
        names: path or URI of a file with a label, a tab and its name on each line; if empty, labels are names, with
            spaces for `_`.

    Raises:
        InputError: there are no images, a row is malformed, or a label has no name.
    """
    path = Path(data)
    pairs = read_list(path) if path.is_file() else read_class_folders(path)
    if not pairs:
        raise InputError(f"{data}: no images, expected a folder for each class, or a list of files and labels")
    labels = sorted({label for _, label in pairs})
    name_of = read_names(names, labels) if names else {label: clean_name(label) for label in labels}
    index = {label: number for number, label in enumerate(labels)}
    shown = tuple(name_of[label] for label in labels)
    if len(set(shown)) < len(shown):
        repeated = next(name for name in shown if shown.count(name) > 1)
        raise InputError(f"{names or data}: {repeated!r} is the name of several labels, expected unique names")
    return LabelledSet(
        origin=data,
        names=shown,
        images=[file for file, _ in pairs],
        labels=[index[label] for _, label in pairs],
    )


def read_class_folders(folder: Path) -> list[tuple[str, str]]:
    """Each image below a folder with the name of the folder that is its class, in order."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder or list, expected a folder for each class")
    return [
        (str(file), own.name)
        for own in sorted(folder.iterdir())
        if own.is_dir()
        for file in sorted(own.rglob("*"))
        if file.suffix.lower().removeprefix(".") in EXTENSIONS
    ]


def read_list(path: Path) -> list[tuple[str, str]]:
    """Files and labels of a list."""
    with as_input_error(str(path)), path.open(newline="", encoding="utf-8-sig") as opened:
        reader = csv.DictReader(opened, delimiter="," if path.suffix == ".csv" else "\t")
        if not {"file", "label"} <= set(reader.fieldnames or ()):
            raise InputError(f"{path}: columns {reader.fieldnames}, expected file and label")
        pairs = []
        for row in reader:
            if not row["file"] or not row["label"]:
                raise InputError(f"{path}: line {reader.line_num}: empty, expected a file and its label")
            pairs.append((storage.join(str(path.parent), row["file"]), row["label"]))
        return pairs


def read_names(path: str, labels: Sequence[str]) -> dict[str, str]:
    """The name of each label."""
    with as_input_error(path):
        lines = storage.read_text(path).splitlines()
    name_of = {}
    for number, line in enumerate(lines, 1):
        label, tab, name = line.partition("\t")
        if line.strip():
            if not tab or not name.strip():
                raise InputError(f"{path}: line {number}: {line!r}, expected a label, a tab and a name")
            name_of[label.strip()] = name.strip()
    missing = [label for label in labels if label not in name_of]
    if missing:
        raise InputError(f"{path}: no name of label {missing[0]!r}, expected one for each label")
    return name_of


def read_boxes(storage_uri: str, boxes: str) -> LabelledSet:
    """The boxes of a table, without crowds, of categories with a split; all its names compete.

    Raises:
        InputError: a table is missing, or there is no box.
    """
    rows = tables.read_table(storage_uri, "categories", tables.category_table(boxes), ["category_id", "name", "split"])
    categories = [row for row in rows.to_pylist() if row["split"]]
    index = {row["category_id"]: number for number, row in enumerate(categories)}
    images: list[str] = []
    labels: list[int] = []
    kept: list[Boxes] = []
    columns = ["uri", "boxes", "category_ids", "iscrowd"]
    for row in tables.read_table(storage_uri, "boxes", boxes, columns).to_pylist():
        own = [
            (box, index[key])
            for box, key, crowd in zip(row["boxes"], row["category_ids"], row["iscrowd"], strict=True)
            if key in index and not crowd
        ]
        if own:
            images.append(storage.join(storage_uri, row["uri"]))
            kept.append(np.array([box for box, _ in own], np.float32))
            labels += [label for _, label in own]
    if not images:
        raise InputError(f"boxes/{boxes}: no boxes, expected some to classify")
    names = tuple(row["name"] for row in categories)
    return LabelledSet(origin=f"boxes/{boxes}", names=names, images=images, labels=labels, boxes=kept)
