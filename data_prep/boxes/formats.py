"""Other formats of annotated images as files in COCO's: Open Images, Pascal VOC, YOLO.

Objects365 is in COCO's format already. The readers of VOC and YOLO are supervision's.
"""

import csv
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval import mask as rle

from ovd_models.errors import InputError, as_input_error
from ovd_models.images import open_picture

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
        InputError: a file is missing or malformed, or a picture cannot be read.
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
    for number, (image, name, (width, height)) in enumerate(zip(ids, names, sizes, strict=True), 1):
        entries.append(image_entry(number, name, width, height, neg_category_ids=sorted(absent.get(image, ()))))
        for key, (x0, y0, x1, y1), group in boxes.get(image, ()):
            box = [x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height]
            annotations.append(annotation(len(annotations) + 1, number, key, box, crowd=group))
    categories = [{"id": key, "name": name_of[label]} for label, key in keys.items()]
    return {"images": entries, "annotations": annotations, "categories": categories}


def read_descriptions(file: Path) -> dict[str, str]:
    """Name by label, such as `/m/011k07`, from the files beside the boxes."""
    files = sorted(file.parent.glob(f"*{DESCRIPTIONS}*.csv"))
    if not files:
        raise InputError(f"{file.parent}: no {DESCRIPTIONS}*.csv, expected it beside {file.name}")
    with files[-1].open(newline="", encoding="utf-8-sig") as opened:
        rows = [row for row in csv.reader(opened) if len(row) >= 2 and row[0].startswith("/")]
    return {label: name for label, name, *_ in rows}


def read_absent(file: Path, keys: Mapping[str, int]) -> dict[str, set[int]]:
    """The categories that people found absent from each image (confidence 0), if there is such a file."""
    absent: dict[str, set[int]] = {}
    start = file.name.split("-")[0]
    for path in sorted(file.parent.glob(f"{start}*{IMAGE_LABELS}*.csv")):
        for _, row in read_csv(path, ("ImageID", "LabelName", "Confidence")):
            if row["Confidence"] in ("0", "0.0") and row["LabelName"] in keys:
                absent.setdefault(row["ImageID"], set()).add(keys[row["LabelName"]])
    return absent


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


def yolo_file(folder: Path) -> Path | None:
    """The YAML file of a YOLO folder, if it is one."""
    return next((folder / name for name in ("data.yaml", "data.yml") if (folder / name).is_file()), None)


def read_yolo(folder: Path, file: Path, pictures: Path) -> dict[str, Any]:
    """A YOLO folder: boxes or polygons below `labels/`, pictures of the same names below `images/`."""
    from supervision import DetectionDataset

    labels = folder / "labels"
    for needed in (pictures, labels):
        if not needed.is_dir():
            raise InputError(f"{needed}: no such folder, expected images/ and labels/ beside {file.name}")
    with as_input_error(str(folder)):
        read = DetectionDataset.from_yolo(str(pictures), str(labels), str(file))
    return from_supervision(read, pictures)


def read_voc(folder: Path, pictures: Path) -> dict[str, Any]:
    """A Pascal VOC folder."""
    from supervision import DetectionDataset

    if not pictures.is_dir():
        raise InputError(f"{pictures}: no such folder, expected JPEGImages/ beside Annotations/, or --images")
    with as_input_error(str(folder / "Annotations")):
        read = DetectionDataset.from_pascal_voc(str(pictures), str(folder / "Annotations"))
    return from_supervision(read, pictures)


def from_supervision(read: Any, pictures: Path) -> dict[str, Any]:
    """A data set of supervision's."""
    paths = sorted(Path(path) for path in read.image_paths)
    if not paths:
        raise InputError(f"{pictures}: no pictures, expected some")
    entries: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (path, (width, height)) in enumerate(zip(paths, read_sizes(paths), strict=True), 1):
        entries.append(image_entry(number, path.relative_to(pictures).as_posix(), width, height))
        found = read.annotations[str(path)]
        if found.class_id is None:
            continue
        for row, ((x0, y0, x1, y1), key) in enumerate(zip(found.xyxy.tolist(), found.class_id.tolist(), strict=True)):
            mask = None if found.mask is None else rle.encode(np.asfortranarray(found.mask[row].astype(np.uint8)))
            annotations.append(annotation(len(annotations) + 1, number, key + 1, [x0, y0, x1 - x0, y1 - y0], mask=mask))
    categories = [{"id": key, "name": name} for key, name in enumerate(read.classes, 1)]
    return {"images": entries, "annotations": annotations, "categories": categories}


# ------------------------------------------------------------------------------------------------------------- entries


def image_entry(number: int, name: str, width: int, height: int, **lists: list[int]) -> dict[str, Any]:
    """An entry of `images`, with federated lists if they are given."""
    return {"id": number, "file_name": name, "width": width, "height": height, **lists}


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
        entry["segmentation"] = {"size": list(mask["size"]), "counts": mask["counts"].decode()}
    return entry


def read_sizes(paths: list[Path]) -> list[tuple[int, int]]:
    """Width and height of pictures, upright.

    Raises:
        InputError: a picture is missing or cannot be read.
    """

    def read(path: Path) -> tuple[int, int]:
        with as_input_error(str(path)):
            return open_picture(path.read_bytes(), str(path)).size

    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(read, paths))
