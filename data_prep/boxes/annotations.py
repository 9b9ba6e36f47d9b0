"""Box tables: from COCO or LVIS json, or drawn from the pictogram world."""

import contextlib
import csv
import io
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from faster_coco_eval import mask as rle
from PIL import Image

from data_prep import storage, tables
from data_prep.boxes.cleaning import SkipReport, clip_box
from data_prep.pictograms.world import SCENES, Style, World, encode_jpeg, join_phrases
from ovd_models.errors import InputError
from ovd_models.images import upright_size
from ovd_models.prompts import clean_name, with_article

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


@dataclass(frozen=True)
class BoxSet:
    """A `categories` and a `boxes` table."""

    categories: pa.Table
    boxes: pa.Table


def box_set(categories: Sequence[Mapping[str, Any]], boxes: pa.Table) -> BoxSet:
    """A set whose categories count the images in which they have a box."""
    counts = Counter(category for ids in boxes["category_ids"].to_pylist() for category in set(ids))
    rows = [{**category, "image_count": counts[category["category_id"]]} for category in categories]
    return BoxSet(pa.Table.from_pylist(rows, schema=tables.SCHEMAS["categories"]), boxes)


def _category(
    category_id: int, name: str, split: str, *, frequency: str = "", synonyms: Sequence[str] = ()
) -> dict[str, Any]:
    return {
        "category_id": category_id,
        "name": name,
        "synonyms": list(synonyms),
        "frequency": frequency,
        "split": split,
        "image_count": 0,
    }


def strip_novel(boxes: pa.Table, categories: pa.Table) -> pa.Table:
    """The same images with boxes of base categories only, for training."""
    base = {row["category_id"] for row in categories.to_pylist() if row["split"] == "base"}
    rows = boxes.to_pylist()
    for row in rows:
        kept = [category in base for category in row["category_ids"]]
        for column in ("boxes", "category_ids", "iscrowd", "masks"):
            row[column] = list(itertools.compress(row[column], kept))
    return pa.Table.from_pylist(rows, schema=boxes.schema)


def annotation_file_digest(folder: str | Path) -> str:
    """SHA-256 of a folder's `instances.json`.

    Raises:
        InputError: the file cannot be read.
    """
    path = Path(folder, "instances.json")
    with _reported(str(path), "a COCO annotation file"):
        content = path.read_bytes()
    return storage.sha256(content)


def read_coco(path: str | Path, images: str | Path) -> BoxSet:
    """Read an annotation file in COCO's or LVIS's format.

    LVIS, whose categories have a frequency, is split by it: rare ones are novel. COCO is split by `COCO_BASE` and
    `COCO_NOVEL`. If a name is not COCO's, or no name is in `COCO_BASE`, all categories are base. Boxes without area
    or outside their image are skipped; one line reports them.

    The folder `images` has the image files, under their names in `coco_url` (LVIS) or `file_name` (COCO).

    Raises:
        InputError: the file is unreadable or a field is missing or wrong; an image file is missing.
    """
    path, images = Path(path), Path(images)
    raw = _load(path)
    with _reported(str(path), "COCO's images and categories with id and name"):
        names = {int(entry["id"]): str(entry["name"]) for entry in raw["categories"]}
        annotations: dict[int, list[Mapping[str, Any]]] = {int(entry["id"]): [] for entry in raw["images"]}
    for number, annotation in enumerate(raw["annotations"]):
        with _reported(f"{path}: annotations[{number}]", "image_id, category_id and a bbox of 4 finite numbers"):
            image, category = int(annotation["image_id"]), int(annotation["category_id"])
            box = np.asarray(annotation["bbox"], float)
            if image not in annotations:
                raise ValueError(f"image_id {image} is not in images")
            if category not in names:
                raise ValueError(f"category_id {category} is not in categories")
            if box.shape != (4,) or not np.isfinite(box).all():
                raise ValueError(f"bbox {annotation['bbox']!r}")
            annotations[image].append(annotation)
    skipped = SkipReport()
    lvis = any("frequency" in entry for entry in raw["categories"])
    rows = [_coco_row(entry, lvis, annotations[int(entry["id"])], images, path, skipped) for entry in raw["images"]]
    if skipped:
        print(f"{path}: left out: {skipped}", flush=True)
    if lvis:
        entries = sorted(raw["categories"], key=lambda entry: int(entry["id"]))
        categories = [_lvis_category(entry, path) for entry in entries]
    else:
        splits = coco_splits(names.values()) or dict.fromkeys(names.values(), "base")
        categories = [_category(key, name, splits[name]) for key, name in sorted(names.items())]
    return box_set(categories, pa.Table.from_pylist(rows, schema=tables.SCHEMAS["boxes"]))


def coco_splits(names: Iterable[str]) -> dict[str, str] | None:
    """COCO's names as `base`, `novel` or "" (left out); None if a given name is not COCO's, or none is base."""
    coco = dict.fromkeys(COCO_BASE, "base") | dict.fromkeys(COCO_NOVEL, "novel") | dict.fromkeys(COCO_OTHERS, "")
    given = set(names)
    return coco if given <= coco.keys() and given & set(COCO_BASE) else None


def _lvis_category(entry: Mapping[str, Any], path: Path) -> dict[str, Any]:
    frequency = entry.get("frequency")
    if frequency not in ("r", "c", "f"):
        raise InputError(f"{path}: category {entry['id']}: frequency {frequency!r}, expected 'r', 'c' or 'f'")
    name = clean_name(str(entry["name"]))
    synonyms = dict.fromkeys(clean_name(str(word)) for word in entry.get("synonyms", ()))
    synonyms.pop(name, None)
    split = "novel" if frequency == "r" else "base"
    return _category(int(entry["id"]), name, split, frequency=frequency, synonyms=list(synonyms))


@contextlib.contextmanager
def _reported(place: str, expected: str) -> Iterator[None]:
    """Report any error in the block, the RLE library's included, as an `InputError` that names the place."""
    try:
        yield
    except Exception as error:
        match error:
            case KeyError():
                reason = f"no field {error}"
            case OSError():
                reason = f"cannot be read ({error.strerror or 'not an image'})"
            case json.JSONDecodeError() | UnicodeDecodeError():
                reason = f"not JSON ({error})"
            case _:
                reason = str(error) or repr(error)
        raise InputError(f"{place}: {reason}, expected {expected}") from error


def _load(path: Path) -> dict[str, Any]:
    with _reported(str(path), "a COCO annotation file"):
        raw = json.loads(path.read_bytes())
        for key in ("images", "annotations", "categories"):
            if not isinstance(raw, dict) or not isinstance(raw.get(key), list):
                raise ValueError(f"no list {key!r}")
    return dict(raw)


def _coco_row(
    image: Mapping[str, Any],
    lvis: bool,
    annotations: Sequence[Mapping[str, Any]],
    folder: Path,
    path: Path,
    skipped: SkipReport,
) -> dict[str, Any]:
    place = f"{path}: image {image['id']}"
    with _reported(place, "file_name, width and height"):
        # LVIS's official files name images by their address alone.
        url = image.get("coco_url") if lvis else None
        name = str(url).rpartition("/")[2] if url else str(image["file_name"])
        file, width, height = folder / name, int(image["width"]), int(image["height"])
    with _reported(str(file), f"an image file, named by {path}"):
        content = file.read_bytes()
        with Image.open(io.BytesIO(content)) as opened:
            size = upright_size(opened)  # as it is decoded
    if size != (width, height):
        raise InputError(f"{file}: {size[0]} x {size[1]} pixels, {path} says {width} x {height}")
    boxes, kept, masks = [], [], []
    for annotation in annotations:
        x, y, w, h = (float(value) for value in annotation["bbox"])
        box, reason = clip_box((x, y, x + w, y + h), width, height)
        if reason:
            skipped.add(reason, file.name)
            continue
        boxes.append(box)
        kept.append(annotation)
        with _reported(f"{place}: segmentation", "polygons or an RLE"):
            masks.append(_rle(annotation.get("segmentation"), height, width))
    return {
        "image_id": storage.sha256(content),
        "source_id": int(image["id"]),
        "uri": str(file.absolute()),
        "width": width,
        "height": height,
        "boxes": boxes,
        "category_ids": [int(annotation["category_id"]) for annotation in kept],
        "iscrowd": [bool(annotation.get("iscrowd", 0)) for annotation in kept],
        "masks": masks,
        "neg_category_ids": list(image.get("neg_category_ids", [])),
        "not_exhaustive_category_ids": list(image.get("not_exhaustive_category_ids", [])),
    }


def _rle(segmentation: Any, height: int, width: int) -> str:
    """COCO RLE counts of polygons or of an RLE, compressed or not; empty without a mask."""
    if not segmentation:
        return ""
    if isinstance(segmentation, list):
        merged = rle.merge(rle.frPyObjects(segmentation, height, width))
    else:
        if list(segmentation["size"]) != [height, width]:
            raise ValueError(f"size {segmentation['size']} in an image of {height} x {width}")
        listed = isinstance(segmentation["counts"], list)
        merged = rle.frPyObjects(segmentation, height, width) if listed else segmentation
        rle.decode(merged)  # raises if the counts do not fit the size
    counts = merged["counts"]
    return counts.decode() if isinstance(counts, bytes) else str(counts)


def category_captions(boxes: pa.Table, categories: pa.Table) -> list[str]:
    """A caption for each image from the names of its categories: "a photo of a person and a dog"."""
    names = dict(zip(categories["category_id"].to_pylist(), categories["name"].to_pylist(), strict=True))
    captions = []
    for ids in boxes["category_ids"].to_pylist():
        shown = [with_article(name) for name in dict.fromkeys(names[key] for key in ids if key in names)]
        captions.append("a photo of " + (join_phrases(shown) or "a scene"))
    return captions


def find_captions(folder: str | Path) -> list[Path]:
    """The files with captions of a folder's images: `captions.tsv`, else COCO's `captions*.json`; none without them."""
    table = Path(folder, "captions.tsv")
    return [table] if table.is_file() else sorted(Path(folder).glob("captions*.json"))


def read_captions(files: Sequence[Path], uris: Sequence[str]) -> list[str]:
    """The caption of each image, from files of `find_captions`.

    An image is found by its file name, with or without the folders before it. Several captions of an image in COCO's
    format are joined, so that its concepts are the nouns of all of them.

    Args:
        files: `captions.tsv`, with the tab-separated columns `file_name` and `caption`, or files in COCO's format.
        uris: of the images.

    Raises:
        InputError: a file is malformed, or an image has no caption or shares its with another.
    """
    captions: dict[str, str] = {}
    for path in files:
        captions |= _table_captions(path) if path.suffix == ".tsv" else _coco_captions(path)
    taken: dict[str, str] = {}
    for uri in uris:
        parts = uri.split("/")
        name = next((name for start in range(len(parts)) if (name := "/".join(parts[start:])) in captions), None)
        if name is None:
            raise InputError(f"{files[0]}: no row for {parts[-1]}, expected a caption for each training image")
        if name in taken:
            raise InputError(f"{files[0]}: {name} may be {taken[name]} or {uri}, expected names with their folders")
        taken[name] = uri
    return [captions[name] for name in taken]


def _table_captions(path: Path) -> dict[str, str]:
    """Captions by file name."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}), expected UTF-8 text") from error
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE)
    if not {"file_name", "caption"} <= set(reader.fieldnames or ()):
        raise InputError(f"{path}: columns {reader.fieldnames}, expected file_name and caption, tab-separated")
    captions: dict[str, str] = {}
    for number, row in enumerate(reader, 2):
        if row["file_name"] in captions:
            raise InputError(f"{path}: line {number}: {row['file_name']} has a caption above, expected one a file")
        captions[row["file_name"]] = row["caption"] or ""
    return captions


def _coco_captions(path: Path) -> dict[str, str]:
    """The joined captions of each image, each ending as a sentence, by file name."""
    with _reported(str(path), "captions in COCO's format"):
        raw = json.loads(path.read_bytes())
        sentences: dict[int, list[str]] = {int(image["id"]): [] for image in raw["images"]}
        for entry in raw["annotations"]:
            caption = " ".join(str(entry["caption"]).split()).rstrip(".")
            if caption:
                sentences[int(entry["image_id"])].append(f"{caption}.")
        joined = {str(image["file_name"]): " ".join(sentences[int(image["id"])]) for image in raw["images"]}
    return {name: caption for name, caption in joined.items() if caption}


def pictogram_categories(world: World) -> list[dict[str, Any]]:
    """Rows of `categories` for a pictogram world; ids count from 1, as in COCO."""
    rows = zip(world.names, world.splits, world.frequencies, strict=True)
    return [
        _category(number, name, split, frequency=frequency) for number, (name, split, frequency) in enumerate(rows, 1)
    ]


def draw_scenes(
    storage_uri: str,
    name: str,
    world: World,
    numbers: Iterable[int],
    *,
    seed: int,
    base_only: bool,
    style: Style = SCENES,
) -> Iterator[dict[str, Any]]:
    """Draw annotated scenes, write their images to `<storage>/images/<name>/` and yield their rows of `boxes`.

    Each scene depends on its number and the seed alone. Its objects are drawn uniformly from all categories, or with
    `base_only` from the long tail over base categories.
    """
    probabilities = world.base_probabilities() if base_only else None
    for number in numbers:
        scene = world.scene(np.random.default_rng([seed, number]), style, probabilities)
        content = encode_jpeg(scene.pixels)
        uri = f"images/{name}/{number:06d}.jpg"
        storage.write_bytes(storage.join(storage_uri, uri), content)
        encoded = [rle.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in scene.masks]
        yield {
            "image_id": storage.sha256(content),
            "source_id": number,
            "uri": uri,
            "width": style.side,
            "height": style.side,
            "boxes": scene.boxes.tolist(),
            "category_ids": (scene.labels + 1).tolist(),
            "iscrowd": [False] * len(scene.labels),
            "masks": [entry["counts"].decode() for entry in encoded],
            "neg_category_ids": [],
            "not_exhaustive_category_ids": [],
        }
