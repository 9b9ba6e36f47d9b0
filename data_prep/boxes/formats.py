"""Other formats of annotated images as files in COCO's: Open Images, Pascal VOC, YOLO. `layouts.py` finds the files.

Objects365 is in COCO's format already. VOC's boxes and polygons are read by supervision, a picture at a time: its
readers of whole folders keep a mask of every object's picture in memory, in pixels.
"""

import csv
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from defusedxml import ElementTree

from data_prep.boxes.masks import encode_pixels
from data_prep.parts import ahead
from ovd_models.errors import InputError, as_input_error
from ovd_models.images import open_picture

DESCRIPTIONS = "class-descriptions"
"""Start of the names of Open Images' files that translate its labels into names."""
IMAGE_LABELS = "imagelabels"
"""Part of the names of Open Images' files that say which names were checked in an image."""
READERS = 16


# --------------------------------------------------------------------------------------------------------- Open Images


def read_open_images(file: Path, images: Path) -> dict[str, Any]:
    """Open Images' boxes. Groups of many objects are crowds; names verified to be absent are negative.

    An image's other names were not looked for, as in LVIS.
    """
    name_of = read_descriptions(file)
    keys = {label: number for number, label in enumerate(sorted(name_of), 1)}
    boxes: dict[str, list[tuple[int, list[float], bool]]] = {}
    wanted = ("ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax")
    for number, row in read_csv(file, wanted):
        place = f"{file}: line {number}"
        if row["LabelName"] not in keys:
            raise InputError(f"{place}: LabelName {row['LabelName']!r} is in no {DESCRIPTIONS}*.csv beside the file")
        try:
            corners = [float(row[name]) for name in ("XMin", "YMin", "XMax", "YMax")]
        except ValueError as error:
            raise InputError(f"{place}: {error}, expected numbers from 0 to 1") from error
        if not all(-0.01 <= value <= 1.01 for value in corners):
            raise InputError(f"{place}: corners {corners}, expected numbers from 0 to 1")
        boxes.setdefault(row["ImageID"], []).append((keys[row["LabelName"]], corners, row.get("IsGroupOf") == "1"))
    absent = read_absent(file, keys)
    ids = sorted(boxes.keys() | absent.keys())
    names = [f"{image}.jpg" for image in ids]
    sizes = read_sizes([images / name for name in names])
    entries: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (image, name, size) in enumerate(zip(ids, names, sizes, strict=True), 1):
        entries.append(image_entry(number, name, size, neg_category_ids=sorted(absent.get(image, ()))))
        width, height = size or (0, 0)
        for key, (x0, y0, x1, y1), group in boxes.get(image, ()) if size else ():
            box = [x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height]
            annotations.append(annotation(len(annotations) + 1, number, key, box, crowd=group))
    categories = [{"id": key, "name": name_of[label]} for label, key in keys.items()]
    return {"images": entries, "annotations": annotations, "categories": categories}


def read_descriptions(file: Path) -> dict[str, str]:
    """Name by label, such as `/m/011k07`, from the files beside the boxes."""
    files = sorted(file.parent.glob(f"*{DESCRIPTIONS}*.csv"))
    if not files:
        raise InputError(f"{file.parent}: no {DESCRIPTIONS}*.csv, expected it beside {file.name}")
    # The other file of a release also has the 20,000 names that only whole images are labelled with.
    chosen = next((path for path in files if "boxable" in path.name), files[-1])
    with chosen.open(newline="", encoding="utf-8-sig") as opened:
        rows = [row for row in csv.reader(opened) if len(row) >= 2 and row[0].startswith("/")]
    return {label: name for label, name, *_ in rows}


def read_absent(file: Path, keys: Mapping[str, int]) -> dict[str, set[int]]:
    """The categories that people found absent from each image (confidence 0), if there is such a file."""
    absent: dict[str, set[int]] = {}
    for path in sorted(file.parent.glob(f"*{IMAGE_LABELS}*.csv")):
        if part_of(path.name) != part_of(file.name) or "machine" in path.name:
            continue
        for _, row in read_csv(path, ("ImageID", "LabelName", "Confidence")):
            if row["Confidence"] in ("0", "0.0") and row["LabelName"] in keys:
                absent.setdefault(row["ImageID"], set()).add(keys[row["LabelName"]])
    return absent


def part_of(name: str) -> str:
    """The part of Open Images that a file is of: its releases write `oidv6-train-`, `validation-` and `oidv7-val-`."""
    found = re.search("train|val|test", name)
    return found[0] if found else ""


def read_csv(file: Path, columns: Iterable[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Each row of a CSV file with its line number.

    Raises:
        InputError: the file cannot be read, or lacks a column.
    """
    with as_input_error(str(file)), file.open(newline="", encoding="utf-8-sig") as opened:
        reader = csv.DictReader(opened)
        missing = [name for name in columns if name not in (reader.fieldnames or ())]
        if missing:
            raise InputError(f"{file}: no column {missing[0]}, expected the columns of Open Images")
        for row in reader:
            yield reader.line_num, row


# ---------------------------------------------------------------------------------------------------------- VOC, YOLO


@dataclass(frozen=True)
class Labelled:
    """An object of a label file."""

    name: str
    box: list[float]
    """xywh, pixels."""
    segmentation: Any = None
    """In COCO's form, if it has a mask."""


Reader = Callable[[Path, tuple[int, int]], list[Labelled]]
"""Reads the objects of a label file, for a picture of a width and height."""


def read_yolo_labels(file: Path, size: tuple[int, int], names: Sequence[str], pose: int) -> list[Labelled]:
    """The objects of a label file, for a picture of this width and height.

    A line is a class and a box (its centre, width and height), a confidence or keypoints after it left out, or a class
    and a polygon; all are fractions of the picture.

    Raises:
        InputError: a line is neither, or its class has no name.
    """
    width, height = size
    with as_input_error(str(file)):
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{file}: line {number}"
        try:
            key, *values = map(float, line.split())
        except ValueError as error:
            raise InputError(f"{place}: {error}, expected a class and numbers") from error
        if len(values) < 4 or not all(map(math.isfinite, values)):
            raise InputError(f"{place}: {line.strip()[:80]!r}, expected a class and a box or a polygon")
        if key not in range(len(names)):
            raise InputError(f"{place}: class {key:g}, expected 0 to {len(names) - 1}, as in names")
        name = names[int(key)]
        if len(values) <= 5 or (pose and len(values) == 4 + pose):
            x, y, w, h = values[:4]
            found.append(Labelled(name, [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]))
            continue
        xs, ys = [x * width for x in values[: len(values) // 2 * 2 : 2]], [y * height for y in values[1::2]]
        polygon = [value for point in zip(xs, ys, strict=True) for value in point]
        box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
        found.append(Labelled(name, box, [polygon]))
    return found


def read_voc_labels(file: Path, size: tuple[int, int]) -> list[Labelled]:
    """The objects of an XML file of Pascal VOC, for a picture of this width and height.

    Raises:
        InputError: it is malformed.
    """
    from supervision.dataset.formats.pascal_voc import detections_from_xml_obj

    with as_input_error(str(file)):
        found, names = detections_from_xml_obj(ElementTree.parse(file).getroot(), [], size)
    masks: list[dict[str, Any] | None] = [None] * len(found)
    if found.mask is not None:
        masks = [{"size": list(mask.shape), "counts": encode_pixels(mask)} for mask in found.mask]
    rows = zip(found.xyxy.tolist(), np.asarray(found.class_id).tolist(), masks, strict=True)
    return [Labelled(names[key], [x0, y0, x1 - x0, y1 - y0], mask) for (x0, y0, x1, y1), key, mask in rows]


def from_labels(
    folder: Path,
    pairs: Mapping[Path, Path],
    read: Reader,
    names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """A data set with a label file for each picture. One whose picture is missing names it, without a size.

    Args:
        folder: of the pictures and their folders.
        pairs: the label file of each picture; one whose file does not exist has no objects.
        read: the objects of a file.
        names: in the order of their categories; those of all objects, sorted, if None, as for VOC, which has no list.
    """
    if not pairs:
        raise InputError(f"{folder}: no pictures, expected some")
    entries: list[dict[str, Any]] = []
    objects: list[tuple[int, Labelled]] = []
    sizes = zip(pairs.items(), read_sizes(list(pairs)), strict=True)
    for number, ((path, label), size) in enumerate(sizes, 1):
        entries.append(image_entry(number, path.relative_to(folder).as_posix(), size))
        if size is not None and label.is_file():
            objects += [(number, entry) for entry in read(label, size)]
    if names is None:
        names = sorted({entry.name for _, entry in objects})
    keys = {name: key for key, name in enumerate(names, 1)}
    annotations = [
        annotation(row, number, keys[entry.name], entry.box, mask=entry.segmentation)
        for row, (number, entry) in enumerate(objects, 1)
    ]
    categories = [{"id": key, "name": name} for key, name in enumerate(names, 1)]
    return {"images": entries, "annotations": annotations, "categories": categories}


# ------------------------------------------------------------------------------------------------------------- entries


def image_entry(number: int, name: str, size: tuple[int, int] | None, **lists: list[int]) -> dict[str, Any]:
    """An entry of `images`, with federated lists if they are given; without a size, its picture is left out later."""
    sides = {} if size is None else {"width": size[0], "height": size[1]}
    return {"id": number, "file_name": name, **sides, **lists}


def annotation(
    number: int, image: int, category: int, box: list[float], *, crowd: bool = False, mask: Any = None
) -> dict[str, Any]:
    """An entry of `annotations`; boxes are xywh."""
    entry = {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": [round(value, 3) for value in box],
        "area": round(box[2] * box[3], 3),
        "iscrowd": int(crowd),
    }
    if mask is not None:
        entry["segmentation"] = mask
    return entry


def read_sizes(paths: Sequence[Path]) -> list[tuple[int, int] | None]:
    """Width and height of pictures, upright; None for one that is missing or cannot be read."""

    def read(path: Path) -> tuple[int, int] | None:
        try:
            return open_picture(path.read_bytes(), str(path)).size
        except (OSError, InputError):
            return None

    with ThreadPoolExecutor(READERS) as pool:
        return list(ahead((partial(read, path) for path in paths), pool, 4 * READERS))
