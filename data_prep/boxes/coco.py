"""Annotation files in COCO's or LVIS's format.

json --entries.py, masks as raw bytes--> pictures, annotations --clip, encode masks--> rows --pictures.py--> boxes
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_prep import storage, tables
from data_prep.boxes.cleaning import Account, clip_box
from data_prep.boxes.entries import (
    EXPECTED,
    Annotation,
    AnnotationFile,
    Category,
    Picture,
    inner_path,
    load_entries,
    picture_places,
)
from data_prep.boxes.masks import encode_mask, mask_box
from data_prep.boxes.pictures import Absent, Found, PictureFolder, refuse_half
from ovd_models.errors import InputError
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


@dataclass(frozen=True)
class BoxSet:
    """A `categories` and a `boxes` table."""

    categories: pa.Table
    boxes: pa.Table


def read_annotations(
    path: str | Path, images: str = "", account: Account | None = None
) -> tuple[list[dict[str, Any]], pa.Table]:
    """Rows of `categories`, and rows of `boxes` without `image_id`, with `places` instead of `uri`.

    LVIS, whose categories have a frequency, is split by it: rare ones are novel. COCO is split by `COCO_BASE` and
    `COCO_NOVEL`. If a name is not COCO's, or no name is in `COCO_BASE`, all categories are base. Boxes without area
    or outside their image are skipped. `places` are a picture's possible paths below the folder of all pictures, best
    first.

    Args:
        path: of the file.
        images: folder or URI with the pictures, from which sizes are read that the file lacks.
        account: takes what is odd; printed if None.

    Raises:
        InputError: the file is unreadable, or something in it is wrong, see `load_entries`.
    """
    own = Account(str(path)) if account is None else account
    content = load_entries(path, own)
    lvis = any(category.frequency is not None for category in content.categories)
    _add_sizes(content, lvis, images, own)
    order_A, image_A = _by_image(content, own)
    parts = []
    starts = np.searchsorted(image_A, np.arange(len(content.images) + 1))
    for first in range(0, len(content.images), ROWS_PER_TABLE):
        rows = []
        for number, picture in enumerate(content.images[first : first + ROWS_PER_TABLE], first):
            annotations = [content.annotations[row] for row in order_A[starts[number] : starts[number + 1]].tolist()]
            rows.append(_row(picture, annotations, lvis, own))
        parts.append(pa.Table.from_pylist(rows, schema=ROWS))
    if account is None:
        own.print()
    return _categories(content.categories, lvis, path), pa.concat_tables(parts)


ROWS = pa.schema(
    [
        pa.field("places", pa.list_(pa.string())),
        pa.field("file_name", pa.string()),
        *(field for field in tables.SCHEMAS["boxes"] if field.name not in ("image_id", "uri")),
    ]
)
"""Rows of `boxes` before their pictures are read."""


def file_digest(path: Path) -> str:
    """SHA-256 of an annotation file.

    Raises:
        InputError: the file cannot be read.
    """
    with reported(str(path), EXPECTED):
        return storage.file_sha256(path)


def read_names(path: str | Path) -> dict[int, str]:
    """The path of each picture as an annotation file has it, by the image's id; the end of its address without one."""
    return {picture.id: file_name(picture) for picture in load_entries(path, Account(str(path))).images}


def file_name(picture: Picture) -> str:
    """The path of a picture as its annotation file has it, or the end of its address."""
    return inner_path(picture.file_name) if picture.file_name else picture_places(picture, lvis=True)[0]


def _add_sizes(content: AnnotationFile, lvis: bool, images: str, account: Account) -> None:
    """Read the sizes that a file lacks from its pictures; those that cannot be read are left out."""
    unsized = [picture for picture in content.images if not picture.has_size]
    if not unsized:
        return
    if not images:
        raise InputError(f"{account.origin}: image {unsized[0].id}: no width and height, expected both")
    folder = PictureFolder(images, account.origin)
    found = folder.read([picture_places(picture, lvis) for picture in unsized])
    for picture, one in zip(unsized, found, strict=True):
        if isinstance(one, Found):
            picture.width, picture.height = one.size
            account.add("mended", "images without a size", picture.name)
    failures = [one for one in found if isinstance(one, Absent)]
    refuse_half(failures, len(content.images))
    for one in failures:
        account.add("left out", one.kind, one.place)
    lost = {picture.id for picture in unsized if not picture.has_size}
    content.images = [picture for picture in content.images if picture.id not in lost]
    content.annotations = [entry for entry in content.annotations if entry.image_id not in lost]


def _by_image(content: AnnotationFile, account: Account) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Annotations sorted by the place of their image in `images`: their numbers, and these places.

    Raises:
        InputError: half of the annotations or more are of no image or no category.
    """
    place_of = {picture.id: place for place, picture in enumerate(content.images)}
    known = {category.id for category in content.categories}
    number_A, place_A, first = [], [], ""
    for number, annotation in enumerate(content.annotations):
        place = place_of.get(annotation.image_id)
        if place is not None and annotation.category_id in known:
            number_A.append(number)
            place_A.append(place)
            continue
        field, kind = ("image_id", "images") if place is None else ("category_id", "categories")
        problem = f"annotations[{number}]: {field} {getattr(annotation, field)} is not in {kind}"
        account.add("left out", f"annotations of unknown {kind}", f"annotations[{number}]")
        first = first or problem
    if first and 2 * len(number_A) <= len(content.annotations):
        raise InputError(f"{account.origin}: {first}, expected {EXPECTED}")
    numbers, places = np.array(number_A, np.int64), np.array(place_A, np.int64)
    order = np.argsort(places, kind="stable")
    return numbers[order], places[order]


def _row(picture: Picture, annotations: Sequence[Annotation], lvis: bool, account: Account) -> dict[str, Any]:
    width, height, places = int(picture.width or 0), int(picture.height or 0), picture_places(picture, lvis)
    boxes, kept, masks = [], [], []
    for annotation in annotations:
        with reported(f"{account.origin}: image {picture.id}: segmentation", "polygons or an RLE"):
            mask, odd = encode_mask(annotation.segmentation, height, width)
        for fate, kind in odd:
            account.add(fate, kind, places[-1])
        if not annotation.bbox:
            if not mask:
                account.add("left out", "annotations without a box and a mask", places[-1])
                continue
            account.add("mended", "boxes taken from their masks", places[-1])
        x, y, w, h = annotation.bbox or mask_box(mask, height, width)
        box, reason = clip_box((x, y, x + w, y + h), width, height)
        if reason:
            account.add("left out", reason, places[-1])
            continue
        boxes.append(box)
        kept.append(annotation)
        masks.append(mask)
    return {
        "places": places,
        "file_name": file_name(picture),
        "source_id": picture.id,
        "width": width,
        "height": height,
        "boxes": boxes,
        "category_ids": [annotation.category_id for annotation in kept],
        "iscrowd": [bool(annotation.iscrowd) for annotation in kept],
        "masks": masks,
        "neg_category_ids": picture.neg_category_ids or [],
        "not_exhaustive_category_ids": picture.not_exhaustive_category_ids or [],
    }


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
    names = [entry.name or "" for entry in ordered]
    splits = coco_splits(names) or dict.fromkeys(names, "base")
    return [category_row(entry.id, name, splits[name]) for entry, name in zip(ordered, names, strict=True)]


def _lvis_category(entry: Category, path: str | Path) -> dict[str, Any]:
    if entry.frequency not in ("r", "c", "f"):
        raise InputError(f"{path}: category {entry.id}: frequency {entry.frequency!r}, expected 'r', 'c' or 'f'")
    name = clean_name(entry.name or "")
    synonyms = dict.fromkeys(clean_name(word) for word in entry.synonyms or ())
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


def in_ids_of(
    categories: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]], rows: pa.Table, origin: str
) -> pa.Table:
    """Rows of `read_annotations` of one file with the ids of another's categories, which are matched by name.

    Args:
        categories: of the other file.
        own: of the rows.
        rows: of `read_annotations`.
        origin: the rows' file, for messages.

    Raises:
        InputError: a name is not among the other file's.
    """
    id_of = {row["name"]: row["category_id"] for row in categories}
    unknown = [row["name"] for row in own if row["name"] not in id_of]
    if unknown:
        raise InputError(f"{origin}: category {unknown[0]!r} is not in the training's file, expected its names")
    moved = {row["category_id"]: id_of[row["name"]] for row in own}
    if all(old == new for old, new in moved.items()):
        return rows
    for name in ("category_ids", "neg_category_ids", "not_exhaustive_category_ids"):
        field = rows.schema.field(name)
        lists = [[moved[key] for key in ids if key in moved] for ids in rows[name].to_pylist()]
        rows = rows.set_column(rows.schema.get_field_index(name), field, pa.array(lists, field.type))
    return rows


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
