"""Annotation files in COCO's or LVIS's format, and the image files that they name.

json --msgspec, masks as raw bytes--> pictures, annotations --clip, encode masks--> rows --hash pictures--> boxes
"""

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from faster_coco_eval import mask as rle

from data_prep import storage, tables
from data_prep.boxes.cleaning import SkipReport, clip_box
from ovd_models.errors import InputError
from ovd_models.images import open_picture
from ovd_models.prompts import clean_name

COCO_NOVEL = (
    "airplane", "bus", "cat", "dog", "cow", "elephant", "umbrella", "tie", "snowboard", "skateboard", "cup", "knife",
    "cake", "couch", "keyboard", "sink", "scissors",
)  # fmt: skip
"""The 17 novel categories of the OV-COCO split (Bansal et al., 2018)."""
COCO_BASE = (
    "person", "bicycle", "car", "motorcycle", "train", "truck", "boat", "bench", "bird", "horse", "sheep", "bear",
    "zebra", "giraffe", "backpack", "handbag", "suitcase", "frisbee", "skis", "kite", "surfboard", "bottle", "fork",
    "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli", "carrot", "pizza", "donut", "chair", "bed",
    "toilet", "tv", "laptop", "mouse", "remote", "microwave", "oven", "toaster", "refrigerator", "book", "clock",
    "vase", "toothbrush",
)  # fmt: skip
"""The 48 base categories of that split."""
COCO_OTHERS = (
    "traffic light", "fire hydrant", "stop sign", "parking meter", "sports ball", "baseball bat", "baseball glove",
    "tennis racket", "wine glass", "hot dog", "potted plant", "dining table", "cell phone", "hair drier", "teddy bear",
)  # fmt: skip
"""The other 15 of COCO's 80 categories, which the split leaves out."""
ROWS_PER_TABLE = 2000
"""Rows that are Python objects at a time."""
HASH_THREADS = 4 * (os.cpu_count() or 1)
"""Readers of image files, which mostly wait for a disk or a network."""
EXPECTED = "an annotation file in COCO's or LVIS's format"


class Picture(msgspec.Struct, gc=False):
    """An entry of `images`."""

    id: int
    width: int
    height: int
    file_name: str = ""
    coco_url: str = ""
    neg_category_ids: list[int] = []
    not_exhaustive_category_ids: list[int] = []


class Annotation(msgspec.Struct, gc=False):
    """An entry of `annotations`; its mask is decoded when its row is made."""

    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    iscrowd: bool | int = 0
    segmentation: msgspec.Raw = msgspec.Raw()


class Category(msgspec.Struct, gc=False):
    """An entry of `categories`."""

    id: int
    name: str
    frequency: str | None = None
    synonyms: list[str] = []


class AnnotationFile(msgspec.Struct, gc=False):
    """The parts of an annotation file that are used."""

    images: list[Picture]
    annotations: list[Annotation]
    categories: list[Category]


class RunLengths(msgspec.Struct):
    """A mask in COCO's run-length encoding, compressed or not."""

    size: tuple[int, int]
    counts: str | list[int]


@dataclass(frozen=True)
class BoxSet:
    """A `categories` and a `boxes` table."""

    categories: pa.Table
    boxes: pa.Table


def read_annotations(path: str | Path) -> tuple[list[dict[str, Any]], pa.Table]:
    """Rows of `categories`, and rows of `boxes` without `image_id`, with `places` instead of `uri`.

    LVIS, whose categories have a frequency, is split by it: rare ones are novel. COCO is split by `COCO_BASE` and
    `COCO_NOVEL`. If a name is not COCO's, or no name is in `COCO_BASE`, all categories are base. Boxes without area
    or outside their image are skipped; one line reports them. `places` are a picture's possible paths below the folder
    of all pictures, best first.

    Raises:
        InputError: the file is unreadable, or a field is missing or wrong.
    """
    content = _load(path)
    lvis = any(category.frequency is not None for category in content.categories)
    order_A, image_A = _by_image(content, str(path))
    skipped, parts = SkipReport(), []
    starts = np.searchsorted(image_A, np.arange(len(content.images) + 1))
    for first in range(0, len(content.images), ROWS_PER_TABLE):
        rows = []
        for number, picture in enumerate(content.images[first : first + ROWS_PER_TABLE], first):
            own = [content.annotations[row] for row in order_A[starts[number] : starts[number + 1]].tolist()]
            rows.append(_row(picture, own, lvis, str(path), skipped))
        parts.append(pa.Table.from_pylist(rows, schema=ROWS))
    if skipped:
        print(f"{path}: left out: {skipped}", flush=True)
    categories = _categories(content.categories, lvis, path)
    return categories, pa.concat_tables(parts) if parts else ROWS.empty_table()


ROWS = pa.schema(
    [
        pa.field("places", pa.list_(pa.string())),
        *(field for field in tables.SCHEMAS["boxes"] if field.name not in ("image_id", "uri")),
    ]
)
"""Rows of `boxes` before their pictures are read."""


def file_digest(path: Path) -> str:
    """SHA-256 of an annotation file.

    Raises:
        InputError: the file cannot be read.
    """
    with reported(str(path), EXPECTED), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_places(path: str | Path) -> list[str]:
    """The likeliest path of each picture of an annotation file, below the folder of all pictures."""
    return [next(iter(_places(picture, lvis=True)), "") for picture in _load(path).images]


def _load(path: str | Path) -> AnnotationFile:
    with reported(str(path), EXPECTED):
        return msgspec.json.decode(Path(path).read_bytes(), type=AnnotationFile, strict=False)


def _by_image(content: AnnotationFile, path: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Annotations sorted by the place of their image in `images`: their numbers, and these places.

    Raises:
        InputError: an annotation is of no image or no category.
    """
    place_of = {picture.id: place for place, picture in enumerate(content.images)}
    known = {category.id for category in content.categories}
    place_A = np.empty(len(content.annotations), np.int64)
    for number, annotation in enumerate(content.annotations):
        place = place_of.get(annotation.image_id)
        if place is None or annotation.category_id not in known:
            field, kind = ("image_id", "images") if place is None else ("category_id", "categories")
            value = getattr(annotation, field)
            raise InputError(f"{path}: annotations[{number}]: {field} {value} is not in {kind}, expected {EXPECTED}")
        place_A[number] = place
    order_A = np.argsort(place_A, kind="stable")
    return order_A, place_A[order_A]


def _row(
    picture: Picture, annotations: Sequence[Annotation], lvis: bool, path: str, skipped: SkipReport
) -> dict[str, Any]:
    width, height, places = picture.width, picture.height, _places(picture, lvis)
    if not places:
        raise InputError(f"{path}: image {picture.id}: no file_name and no coco_url, expected one")
    boxes, kept, masks = [], [], []
    for annotation in annotations:
        x, y, w, h = annotation.bbox
        box, reason = clip_box((x, y, x + w, y + h), width, height)
        if reason:
            skipped.add(reason, places[-1])
            continue
        boxes.append(box)
        kept.append(annotation)
        with reported(f"{path}: image {picture.id}: segmentation", "polygons or an RLE"):
            masks.append(_rle(annotation.segmentation, height, width))
    return {
        "places": places,
        "source_id": picture.id,
        "width": width,
        "height": height,
        "boxes": boxes,
        "category_ids": [annotation.category_id for annotation in kept],
        "iscrowd": [bool(annotation.iscrowd) for annotation in kept],
        "masks": masks,
        "neg_category_ids": picture.neg_category_ids,
        "not_exhaustive_category_ids": picture.not_exhaustive_category_ids,
    }


def _places(picture: Picture, lvis: bool) -> list[str]:
    """A picture's possible paths: LVIS's official files name pictures by their address, whose folder is COCO's."""
    parts = urlsplit(picture.coco_url).path.split("/")
    address = ["/".join(parts[-2:]), parts[-1]] if picture.coco_url else []
    named = [picture.file_name] if picture.file_name else []
    return list(dict.fromkeys([*address, *named] if lvis else [*address[:1], *named, *address[1:]]))


def _rle(segmentation: msgspec.Raw, height: int, width: int) -> str:
    """COCO RLE counts of polygons or of an RLE, compressed or not; empty without a mask."""
    if bytes(segmentation) in (b"", b"null", b"[]", b"{}"):
        return ""
    shape = msgspec.json.decode(segmentation, type=list[list[float]] | RunLengths)
    if isinstance(shape, list):
        merged = rle.merge(rle.frPyObjects(shape, height, width))
    else:
        if shape.size != (height, width):
            raise ValueError(f"size {list(shape.size)} in an image of {height} x {width}")
        merged = {"size": list(shape.size), "counts": shape.counts}
        if isinstance(shape.counts, list):
            merged = rle.frPyObjects(merged, height, width)
        rle.decode(merged)  # raises if the counts do not fit the size
    counts = merged["counts"]
    return counts.decode() if isinstance(counts, bytes) else str(counts)


# --------------------------------------------------------------------------------------------------------- categories


def category_row(
    category_id: int, name: str, split: str, *, frequency: str = "", synonyms: Sequence[str] = ()
) -> dict[str, Any]:
    """A row of `categories` whose images are not counted."""
    return {
        "category_id": category_id,
        "name": name,
        "synonyms": list(synonyms),
        "frequency": frequency,
        "split": split,
        "image_count": 0,
    }


def _categories(entries: Sequence[Category], lvis: bool, path: str | Path) -> list[dict[str, Any]]:
    ordered = sorted(entries, key=lambda entry: entry.id)
    if lvis:
        return [_lvis_category(entry, path) for entry in ordered]
    names = [entry.name for entry in ordered]
    splits = coco_splits(names) or dict.fromkeys(names, "base")
    return [category_row(entry.id, entry.name, splits[entry.name]) for entry in ordered]


def _lvis_category(entry: Category, path: str | Path) -> dict[str, Any]:
    if entry.frequency not in ("r", "c", "f"):
        raise InputError(f"{path}: category {entry.id}: frequency {entry.frequency!r}, expected 'r', 'c' or 'f'")
    name = clean_name(entry.name)
    synonyms = dict.fromkeys(clean_name(word) for word in entry.synonyms)
    synonyms.pop(name, None)
    split = "novel" if entry.frequency == "r" else "base"
    return category_row(entry.id, name, split, frequency=entry.frequency, synonyms=list(synonyms))


def coco_splits(names: Iterable[str]) -> dict[str, str] | None:
    """COCO's names as `base`, `novel` or "" (left out); None if a given name is not COCO's, or none is base."""
    coco = dict.fromkeys(COCO_BASE, "base") | dict.fromkeys(COCO_NOVEL, "novel") | dict.fromkeys(COCO_OTHERS, "")
    given = set(names)
    return coco if given <= coco.keys() and given & set(COCO_BASE) else None


# ------------------------------------------------------------------------------------------------------------ tables


def box_set(categories: Sequence[Mapping[str, Any]], boxes: pa.Table) -> BoxSet:
    """A set whose categories count the images in which they have a box."""
    image_A, category_A = flat_categories(boxes)
    pairs = np.unique(np.stack([image_A, category_A]), axis=1)
    ids, counts = np.unique(pairs[1], return_counts=True)
    count_of = dict(zip(ids.tolist(), counts.tolist(), strict=True))
    rows = [{**category, "image_count": count_of.get(category["category_id"], 0)} for category in categories]
    return BoxSet(pa.Table.from_pylist(rows, schema=tables.SCHEMAS["categories"]), boxes)


def flat_categories(boxes: pa.Table) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The row and the category of every annotation of a `boxes` table."""
    lists = boxes["category_ids"].combine_chunks()
    count_B = lists.value_lengths().to_numpy(zero_copy_only=False)
    return np.repeat(np.arange(len(lists)), count_B), lists.flatten().to_numpy(zero_copy_only=False).astype(np.int64)


def keep_annotations(boxes: pa.Table, keep_A: npt.NDArray[np.bool_]) -> pa.Table:
    """The same images with the chosen ones of all annotations."""
    image_A, _ = flat_categories(boxes)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(image_A[keep_A], minlength=boxes.num_rows))])
    for name in ("boxes", "category_ids", "iscrowd", "masks"):
        values = boxes[name].combine_chunks()
        kept = values.flatten().filter(pa.array(keep_A))
        lists = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), kept).cast(boxes.schema.field(name).type)
        boxes = boxes.set_column(boxes.schema.get_field_index(name), boxes.schema.field(name), lists)
    return boxes


def with_split(boxes: pa.Table, categories: pa.Table) -> pa.Table:
    """The images that OV-COCO evaluates, with an annotation of a base or novel category (4,836 of val2017).

    All images if every category has a split: LVIS also evaluates those where categories are known to be absent.
    """
    used = [row["category_id"] for row in categories.to_pylist() if row["split"]]
    if len(used) == categories.num_rows:
        return boxes
    image_A, category_A = flat_categories(boxes)
    return boxes.take(pa.array(np.unique(image_A[np.isin(category_A, used)])))


def strip_novel(boxes: pa.Table, categories: pa.Table) -> pa.Table:
    """The same images with boxes of base categories only, for training."""
    base = [row["category_id"] for row in categories.to_pylist() if row["split"] == "base"]
    return keep_annotations(boxes, np.isin(flat_categories(boxes)[1], base))


# ---------------------------------------------------------------------------------------------------------- pictures


def add_pictures(rows: pa.Table, images: str, origin: str) -> pa.Table:
    """Rows of `boxes` from those of `read_annotations`: each picture is found, measured and hashed, many at a time.

    Args:
        rows: of `read_annotations`.
        images: folder or URI with the pictures: under their `file_name`, or under the end of their `coco_url`, with its
            folder (`train2017/000000000009.jpg`) if there is such a folder.
        origin: the annotation file, for messages.

    Raises:
        InputError: a picture is missing, unreadable or of another size.
    """
    root = storage.absolute(images)
    places = rows["places"].to_pylist()
    folders = {folder for folder in {place[0].rpartition("/")[0] for place in places} if folder}
    absent = {folder for folder in folders if not storage.exists(storage.join(root, folder))}
    chosen = [next((p for p in options if p.rpartition("/")[0] not in absent), options[-1]) for options in places]
    uris = [storage.join(root, place) for place in chosen]
    sizes = zip(rows["width"].to_pylist(), rows["height"].to_pylist(), strict=True)
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        ids = list(pool.map(lambda uri, size: picture_id(uri, size, origin), uris, sizes))
    found = {"image_id": pa.array(ids, pa.string()), "uri": pa.array(uris, pa.string())}
    schema = tables.SCHEMAS["boxes"]
    return pa.table({name: found[name] if name in found else rows[name] for name in schema.names}, schema)


def picture_id(uri: str, size: tuple[int, int], origin: str) -> str:
    """The sha256 of an image file.

    Args:
        uri: of the file.
        size: its expected width and height, upright.
        origin: the annotation file, for messages.

    Raises:
        InputError: the file is missing, unreadable or of another size.
    """
    with reported(uri, f"an image file, named by {origin}"):
        content = storage.read_bytes(uri)
        found = open_picture(content, uri).size
    if found != size:
        raise InputError(f"{uri}: {found[0]} x {found[1]} pixels, {origin} says {size[0]} x {size[1]}")
    return storage.sha256(content)


@contextlib.contextmanager
def reported(place: str, expected: str) -> Iterator[None]:
    """Report any error in the block, the RLE library's included, as an `InputError` that names the place."""
    try:
        yield
    except Exception as error:
        match error:
            case KeyError():
                reason = f"no field {error}"
            case OSError():
                reason = f"cannot be read ({error.strerror or 'not an image'})"
            case _:
                reason = str(error) or repr(error)
        raise InputError(f"{place}: {reason}, expected {expected}") from error
