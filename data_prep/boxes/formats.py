"""Other formats of annotated images as files in COCO's: Open Images, Pascal VOC, YOLO.

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
import numpy.typing as npt
import yaml
from defusedxml import ElementTree
from faster_coco_eval import mask as rle

from data_prep.parts import ahead
from ovd_models.errors import InputError, as_input_error
from ovd_models.images import EXTENSIONS, open_picture

DESCRIPTIONS = "class-descriptions"
"""Start of the names of Open Images' files that translate its labels into names."""
IMAGE_LABELS = "imagelabels"
"""Part of the names of Open Images' files that say which names were checked in an image."""
READERS = 16


def needs_conversion(data: str) -> bool:
    """Whether `data` is in a format other than COCO's: an Open Images CSV file, or a folder of VOC or YOLO."""
    folder = Path(data)
    return data.endswith(".csv") or (
        not data.endswith(".json")
        and not (folder / "instances.json").is_file()
        and (yolo_file(folder) is not None or (folder / "Annotations").is_dir())
    )


def convert(data: str, images: str = "") -> dict[str, Any]:
    """Read an annotated set of another format; returns the content of a file in COCO's.

    Args:
        data: Open Images' boxes (`*-annotations-bbox.csv`, beside its `class-descriptions*.csv`), a YOLO folder
            (`data.yaml`, `images/`, `labels/`), or a Pascal VOC folder (`JPEGImages/`, `Annotations/`).
        images: folder of the pictures; if empty, that of the format, see `picture_folder`.

    Raises:
        InputError: a file is missing or malformed.
    """
    folder, pictures = Path(data), Path(images or picture_folder(data))
    if data.endswith(".csv"):
        return read_open_images(folder, pictures)
    if (file := yolo_file(folder)) is not None:
        return read_yolo(folder, file, pictures)
    return read_voc(folder, pictures)


def picture_folder(data: str) -> Path:
    """Where a format has its pictures: in the folder, or beside the file of Open Images."""
    if data.endswith(".csv"):
        return Path(data).parent / "images"
    is_voc = needs_conversion(data) and yolo_file(Path(data)) is None
    return Path(data, "JPEGImages" if is_voc else "images")


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


def yolo_file(folder: Path) -> Path | None:
    """The YAML file of a YOLO folder, if it is one."""
    return next((folder / name for name in ("data.yaml", "data.yml") if (folder / name).is_file()), None)


def read_yolo(folder: Path, file: Path, pictures: Path) -> dict[str, Any]:
    """A YOLO folder: boxes or polygons below `labels/`, pictures of the same names below `images/`."""
    labels = folder / "labels"
    for needed in (pictures, labels):
        if not needed.is_dir():
            raise InputError(f"{needed}: no such folder, expected images/ and labels/ beside {file.name}")
    names, pose = read_yolo_names(file)
    files = {path.stem: path for path in labels.glob("*.txt") if path.name != "classes.txt" and path.stat().st_size}
    return from_labels(pictures, files, partial(read_yolo_labels, names=names, pose=pose), names)


def read_yolo_names(file: Path) -> tuple[list[str], int]:
    """Names by class, and the numbers that follow each box for the keypoints of a pose.

    Raises:
        InputError: there are none, or their classes are not 0, 1, 2 ...
    """
    with as_input_error(str(file)):
        content = yaml.safe_load(file.read_text())
    names = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, dict):
        names = [names.get(key, names.get(str(key))) for key in range(len(names))]
    if not isinstance(names, list) or not names or None in names:
        raise InputError(f"{file}: names: {names}, expected a list, or the name of each class from 0 on")
    with as_input_error(f"{file}: kpt_shape"):
        return [str(name) for name in names], math.prod(map(int, content.get("kpt_shape") or [0]))


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


def read_voc(folder: Path, pictures: Path) -> dict[str, Any]:
    """A Pascal VOC folder, whose names are sorted: it has no list of them."""
    if not pictures.is_dir():
        raise InputError(f"{pictures}: no such folder, expected JPEGImages/ beside Annotations/, or --images")
    files = {path.stem: path for path in folder.joinpath("Annotations").glob("*.xml")}
    return from_labels(pictures, files, read_voc_labels)


def read_voc_labels(file: Path, size: tuple[int, int]) -> list[Labelled]:
    """The objects of an XML file, for a picture of this width and height.

    Raises:
        InputError: it is malformed.
    """
    from supervision.dataset.formats.pascal_voc import detections_from_xml_obj

    with as_input_error(str(file)):
        found, names = detections_from_xml_obj(ElementTree.parse(file).getroot(), [], size)
    masks = [None] * len(found) if found.mask is None else [encode(mask) for mask in found.mask]
    rows = zip(found.xyxy.tolist(), np.asarray(found.class_id).tolist(), masks, strict=True)
    return [Labelled(names[key], [x0, y0, x1 - x0, y1 - y0], mask) for (x0, y0, x1, y1), key, mask in rows]


def encode(mask: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """A mask [H, W] as COCO RLE."""
    encoded = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}


def from_labels(
    pictures: Path,
    files: Mapping[str, Path],
    read: Callable[[Path, tuple[int, int]], list[Labelled]],
    names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """A data set with a label file for each picture. One whose picture is missing names it, without a size.

    Args:
        pictures: their folder.
        files: label files by the plain name of their picture; a picture without one has no objects.
        read: the objects of a file, for a width and height.
        names: in the order of their categories; those of all objects, sorted, if None.
    """
    paths = sorted(path for path in pictures.iterdir() if path.suffix.lower().removeprefix(".") in EXTENSIONS)
    if not paths:
        raise InputError(f"{pictures}: no pictures, expected some")
    entries: list[dict[str, Any]] = []
    objects: list[tuple[int, Labelled]] = []
    for number, (path, size) in enumerate(zip(paths, read_sizes(paths), strict=True), 1):
        entries.append(image_entry(number, path.name, size))
        if size is not None and path.stem in files:
            objects += [(number, entry) for entry in read(files[path.stem], size)]
    for stem in sorted(files.keys() - {path.stem for path in paths}):
        entries.append(image_entry(len(entries) + 1, f"{stem}.jpg", None))
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
