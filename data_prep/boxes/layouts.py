"""Where sets of annotated images have their files: the pictures and labels for training, and those for evaluation."""

import functools
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from data_prep import storage
from data_prep.boxes import formats
from ovd_models.errors import InputError, as_input_error
from ovd_models.images import EXTENSIONS

EXPORTED = "_annotations.coco.json"
"""Name of Roboflow's files in COCO's format, which lie among their pictures."""


@dataclass(frozen=True)
class Part:
    """The training or the evaluation part of an annotated set."""

    origin: str
    """Its file or folder, for messages."""
    pictures: str
    """Folder or URI of the pictures."""
    convert: Callable[[], dict[str, Any]] | None = None
    """Reads it as the content of a file in COCO's format; None if `origin` is such a file."""


@functools.cache  # the same parts again, each of which is converted once
def find_parts(data: str, images: str = "") -> tuple[Part, ...]:
    """The training part of an annotated set and, if the set has one, its evaluation part.

    Args:
        data: a file in COCO's format; Open Images' boxes (`*-annotations-bbox.csv`, beside its
            `class-descriptions*.csv`); a YOLO YAML; a folder with `instances.json`, Roboflow's COCO file, a YOLO YAML,
            `Annotations/` or XML files of Pascal VOC; or one with such folders `train/` and, for evaluation, `valid/`
            or `val/`.
        images: folder or URI of the pictures; if empty, that of the format. Parts of a set are folders below it.

    Raises:
        InputError: it is none of these, or a YOLO YAML or what it names is missing or malformed.
    """
    path = Path(data)
    if data.endswith(".json"):
        return (Part(data, images or str(path.parent if path.name == EXPORTED else path.parent / "images")),)
    if data.endswith(".csv"):
        folder = images or str(path.parent / "images")
        return (Part(data, folder, partial(formats.read_open_images, path, Path(folder))),)
    if data.endswith((".yaml", ".yml")):
        return yolo_parts(data, path, images)
    for file in (path / "instances.json", path / EXPORTED):
        if file.is_file():
            return find_parts(str(file), images)
    for file in (path / "data.yaml", path / "data.yml"):
        if file.is_file():
            return yolo_parts(data, file, images)
    for labels, own in (("Annotations", "JPEGImages"), ("annotations", "images"), ("", "")):
        if next(path.joinpath(labels).glob("*.xml"), None):
            return (folder_part(data, Path(images or path / own), path / labels, ".xml", formats.read_voc_labels),)
    files = [*path.glob("*.yaml"), *path.glob("*.yml")]
    if len(files) == 1:
        return yolo_parts(data, files[0], images)
    if (path / "train").is_dir():
        names = [name for name in ("train", "valid", "val") if (path / name).is_dir()]
        return tuple(find_parts(str(path / name), images and storage.join(images, name))[0] for name in names[:2])
    raise InputError(
        f"{data}: no annotations, expected instances.json, {EXPORTED}, a YAML of YOLO, Annotations/, XML files, or "
        "train/ with one of these"
    )


# ---------------------------------------------------------------------------------------------------------------- YOLO


def yolo_parts(data: str, file: Path, images: str) -> tuple[Part, ...]:
    """The parts of a YOLO set: `train` and `val` of its YAML; without `train` one, of `images/` with `labels/`.

    A picture of both is for evaluation only. Where `val` has all pictures of `train`, its other ones are, if any.
    """
    content, names, pose = read_yaml(file)
    read = partial(formats.read_yolo_labels, names=names, pose=pose)
    if not content.get("train"):
        pictures = Path(images or file.parent / "images")
        return (folder_part(data, pictures, file.parent / "labels", ".txt", read, names),)
    roots = [Path(images)] if images else [file.parent / str(content.get("path") or ""), file.parent]
    train, val = (yolo_pairs(f"{file}: {key}", content.get(key), roots) for key in ("train", "val"))
    train = {path: label for path, label in train.items() if path not in val} or train
    val = {path: label for path, label in val.items() if path not in train}
    parts = []
    for origin, place, pairs in ((data, f"{file}: train", train), (f"{data} (val)", f"{file}: val", val)):
        if pairs:
            root = Path(os.path.commonpath([path.parent for path in pairs]))
            if root == Path(root.anchor):  # where a missing picture is looked for
                raise InputError(f"{place}: expected pictures in one folder, or in folders of one")
            if not any(label.is_file() for label in pairs.values()):
                raise InputError(f"{place}: {next(iter(pairs.values()))}: expected it or labels of other pictures")
            parts.append(Part(origin, str(root), partial(formats.from_labels, root, pairs, read, names)))
    return tuple(parts)


def yolo_pairs(origin: str, entry: Any, roots: Sequence[Path]) -> dict[Path, Path]:
    """The label file of each picture of a part, by Ultralytics' rules.

    Args:
        origin: the YAML file and its key, for messages.
        entry: a folder, with those below it; a .txt file with a picture a line, relative to that file; a list of these.
        roots: folders that the entry is relative to. Roboflow writes `../` before what is in the YAML's own.

    Raises:
        InputError: there is no such folder or file, or it has no pictures.
    """
    pairs: dict[Path, Path] = {}
    for name in map(str, entry if isinstance(entry, list) else [entry] if entry else []):
        options = [root / option for option in (re.sub(r"^(\.\./)+", "", name), name) for root in roots]
        places = [path for path in options if path.is_dir() or (path.suffix == ".txt" and path.is_file())]
        if not places:
            raise InputError(f"{origin}: no {options[0]}, expected a folder of pictures or a .txt file of them")
        place = plain_path(places[0])
        if place.is_dir():
            found = pair(place.rglob("*"), yolo_label)
        else:
            with as_input_error(str(place)):
                lines = place.read_text(encoding="utf-8-sig").splitlines()
            paths = [plain_path(place.parent / line.strip()) for line in lines if line.strip()]
            found = {path: yolo_label(path) for path in paths}
        if not found:
            raise InputError(f"{place}: no pictures, expected some")
        pairs |= found
    return pairs


def plain_path(path: Path) -> Path:
    """An absolute path without `..`; links stay, since labels are found by the names of folders."""
    return Path(os.path.normpath(path.absolute()))


def yolo_label(picture: Path) -> Path:
    """The label file of a picture: its path with `labels/` for the last `images/`, or beside it if it is in none."""
    before, found, after = str(picture).rpartition("/images/")
    return Path(f"{before}/labels/{after}" if found else picture).with_suffix(".txt")


def read_yaml(file: Path) -> tuple[dict[str, Any], list[str], int]:
    """Content, names by class, and the numbers that follow each box for the keypoints of a pose.

    Raises:
        InputError: there are no names, or their classes are not 0, 1, 2 ...
    """
    with as_input_error(str(file)):
        content = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    names = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, dict):
        names = [names.get(key, names.get(str(key))) for key in range(len(names))]
    if not isinstance(names, list) or not names or None in names:
        raise InputError(f"{file}: names: {names}, expected a list, or the name of each class from 0 on")
    with as_input_error(f"{file}: kpt_shape"):
        return content, [str(name) for name in names], math.prod(map(int, content.get("kpt_shape") or [0]))


# ------------------------------------------------------------------------------------------------ pictures and labels


def folder_part(
    data: str, pictures: Path, labels: Path, suffix: str, read: formats.Reader, names: Sequence[str] | None = None
) -> Part:
    """A set with its pictures in one folder, and label files of the same plain names in one.

    Raises:
        InputError: a folder is missing.
    """
    for needed in (pictures, labels):
        if not needed.is_dir():
            raise InputError(f"{needed}: no such folder, expected {pictures.name}/ and {labels.name}/, or --images")
    pairs = pair(pictures.glob("*"), lambda path: labels / f"{path.stem}{suffix}")
    return Part(data, str(pictures), partial(formats.from_labels, pictures, pairs, read, names))


def pair(paths: Iterable[Path], label_of: Callable[[Path], Path]) -> dict[Path, Path]:
    """The label file of each picture, which may not exist; then label files without a picture, of one that is missing.

    Args:
        paths: files of a folder.
        label_of: the label file of a picture. Text files beside pictures may be no labels, so all those have a picture.
    """
    pairs = {path: label_of(path) for path in sorted(paths) if path.suffix.lower().removeprefix(".") in EXTENSIONS}
    known, lost = set(pairs.values()), dict[Path, Path]()
    for folder, labels, suffix in sorted({(path.parent, label.parent, label.suffix) for path, label in pairs.items()}):
        if folder != labels or suffix != ".txt":
            others = sorted(path for path in labels.glob(f"*{suffix}") if path not in known and path.stat().st_size)
            lost |= {folder / f"{path.stem}.jpg": path for path in others if path.name != "classes.txt"}
    return pairs | lost
