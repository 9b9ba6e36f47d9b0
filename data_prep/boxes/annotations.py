"""Box tables: from COCO or LVIS json, or drawn from the pictogram world."""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from faster_coco_eval import mask as rle
from PIL import Image

from data_prep import storage, tables
from data_prep.boxes.cleaning import SkipReport
from data_prep.pictograms.world import SCENES, Style, World
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
"""Its 48 base categories."""
COCO_OTHERS = (
    "traffic light", "fire hydrant", "stop sign", "parking meter", "sports ball", "baseball bat", "baseball glove",
    "tennis racket", "wine glass", "hot dog", "potted plant", "dining table", "cell phone", "hair drier", "teddy bear",
)  # fmt: skip
"""The other 15 of COCO's 80, which take no part in it."""


@dataclass(frozen=True)
class BoxSet:
    """Rows of a `categories` and a `boxes` table."""

    categories: pa.Table
    boxes: pa.Table


# ------------------------------------------------------------------------------------------------ COCO, LVIS


def annotation_digest(folder: str | Path) -> str:
    """SHA-256 of a folder's annotation file.

    Raises:
        InputError: it cannot be read.
    """
    path = Path(folder) / "instances.json"
    try:
        return storage.sha256(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}), expected a COCO annotation file") from error


def read_coco(path: str | Path, images: str | Path) -> BoxSet:
    """An annotation file of COCO's or LVIS's form.

    LVIS, whose categories tell how frequent they are, is split by that: rare ones are novel. COCO is split by
    `COCO_BASE` and `COCO_NOVEL`. If a name is not COCO's, or none of its base ones is there, all categories are base.

    Args:
        path: the json file.
        images: folder of the image files, under their names in `coco_url` (LVIS) or `file_name` (COCO).

    Raises:
        InputError: the file is unreadable or a field is missing or wrong; an image file is missing.

    Boxes without area, or outside their image, teach nothing: they are left out, and a line counts and names them.
    """
    raw = _load(Path(path))
    try:
        names = {int(entry["id"]): str(entry["name"]) for entry in raw["categories"]}
        annotations: dict[int, list[Mapping[str, Any]]] = {int(entry["id"]): [] for entry in raw["images"]}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: {error!r}, expected COCO's images and categories with id and name") from error
    for number, annotation in enumerate(raw["annotations"]):
        try:
            image, category = int(annotation["image_id"]), int(annotation["category_id"])
            valid = len(annotation["bbox"]) == 4 and np.isfinite(np.asarray(annotation["bbox"], float)).all()
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{path}: annotations[{number}]: {error!r}, expected image_id, category_id, bbox"
            ) from error
        if image not in annotations:
            raise InputError(f"{path}: annotations[{number}]: image_id {image} is not in images")
        if category not in names:
            raise InputError(f"{path}: annotations[{number}]: category_id {category} is not in categories")
        if not valid:
            raise InputError(f"{path}: annotations[{number}]: bbox {annotation['bbox']!r}, expected 4 finite numbers")
        annotations[image].append(annotation)
    skipped = SkipReport()
    lvis = any("frequency" in entry for entry in raw["categories"])
    rows = [
        _coco_row(entry, lvis, annotations[int(entry["id"])], Path(images), Path(path), skipped)
        for entry in raw["images"]
    ]
    if skipped:
        print(f"{path}: left out: {skipped}", flush=True)
    if lvis:
        categories = _lvis_categories(raw["categories"], Path(path))
    else:
        splits = coco_splits(names.values()) or dict.fromkeys(names.values(), "base")
        categories = [
            {"category_id": key, "name": name, "synonyms": [], "frequency": "", "split": splits[name]}
            for key, name in sorted(names.items())
        ]
    return _box_set(categories, rows)


def coco_splits(names: Iterable[str]) -> dict[str, str] | None:
    """COCO's names as `base`, `novel` or "" (takes no part); None if a given one is not COCO's, or none is base."""
    coco = {
        **dict.fromkeys(COCO_BASE, "base"),
        **dict.fromkeys(COCO_NOVEL, "novel"),
        **dict.fromkeys(COCO_OTHERS, ""),
    }
    given = set(names)
    return coco if given <= coco.keys() and given & set(COCO_BASE) else None


def _lvis_categories(entries: Sequence[Mapping[str, Any]], path: Path) -> list[dict[str, Any]]:
    rows = []
    for entry in sorted(entries, key=lambda entry: int(entry["id"])):
        frequency = entry.get("frequency")
        if frequency not in ("r", "c", "f"):
            raise InputError(f"{path}: category {entry['id']}: frequency {frequency!r}, expected 'r', 'c' or 'f'")
        name = clean_name(str(entry["name"]))
        synonyms = [clean_name(str(word)) for word in entry.get("synonyms", ())]
        rows.append(
            {
                "category_id": int(entry["id"]),
                "name": name,
                "synonyms": [word for word in dict.fromkeys(synonyms) if word != name],
                "frequency": frequency,
                "split": "novel" if frequency == "r" else "base",
            }
        )
    return rows


def _load(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}), expected a COCO annotation file") from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}), expected a COCO annotation file") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(raw, dict) or not isinstance(raw.get(key), list):
            raise InputError(f"{path}: no list {key!r}, expected a COCO annotation file")
    return dict(raw)


def _coco_row(
    image: Mapping[str, Any],
    lvis: bool,
    annotations: Sequence[Mapping[str, Any]],
    folder: Path,
    origin: Path,
    skipped: SkipReport,
) -> dict[str, Any]:
    try:
        # LVIS's official files name images by their address alone.
        by_address = lvis and image.get("coco_url")
        name = str(image["coco_url"]).rpartition("/")[2] if by_address else str(image["file_name"])
        file, width, height = folder / name, int(image["width"]), int(image["height"])
        content = file.read_bytes()
        with Image.open(io.BytesIO(content)) as opened:
            size = upright_size(opened)  # as it is decoded
    except KeyError as error:
        raise InputError(f"{origin}: image {image.get('id')}: no field {error}") from error
    except (TypeError, ValueError) as error:
        raise InputError(f"{origin}: image {image.get('id')}: {error}, expected width and height") from error
    except (OSError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or "not an image"
        raise InputError(f"{file}: cannot be read ({reason}), named by {origin}") from error
    if size != (width, height):
        raise InputError(f"{file}: {size[0]} x {size[1]} pixels, {origin} says {width} x {height}")
    boxes, kept, masks = [], [], []
    for annotation in annotations:
        x, y, w, h = (float(value) for value in annotation["bbox"])
        box = [max(0.0, x), max(0.0, y), min(float(width), x + w), min(float(height), y + h)]
        if not (w > 0 and h > 0):
            skipped.add("boxes without area", file.name)
        elif not (box[2] > box[0] and box[3] > box[1]):
            skipped.add("boxes outside their image", file.name)
        else:
            boxes.append(box)
            kept.append(annotation)
            try:
                masks.append(_rle(annotation.get("segmentation"), height, width))
            except Exception as error:  # of the RLE library, of any kind
                raise InputError(
                    f"{origin}: image {image['id']}: segmentation: {error!r}, expected polygons or an RLE"
                ) from error
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
    """COCO RLE counts of polygons or of an uncompressed or compressed RLE; empty without a mask."""
    if not segmentation:
        return ""
    if isinstance(segmentation, list):
        merged = rle.merge(rle.frPyObjects(segmentation, height, width))
    else:
        if list(segmentation["size"]) != [height, width]:
            raise ValueError(f"size {segmentation['size']} of an image of {height} x {width}")
        listed = isinstance(segmentation["counts"], list)
        merged = rle.frPyObjects(segmentation, height, width) if listed else segmentation
        rle.decode(merged)  # raises if the counts are of another size
    counts = merged["counts"]
    return counts.decode() if isinstance(counts, bytes) else str(counts)


def category_captions(boxes: pa.Table, categories: pa.Table) -> list[str]:
    """A caption for each annotated image from the names of what it shows: "a photo of a person and a dog"."""
    names = dict(zip(categories["category_id"].to_pylist(), categories["name"].to_pylist(), strict=True))
    captions = []
    for ids in boxes["category_ids"].to_pylist():
        shown = [with_article(name) for name in dict.fromkeys(names[key] for key in ids if key in names)]
        head = ", ".join(shown[:-1])
        captions.append("a photo of " + (f"{head} and {shown[-1]}" if head else "".join(shown) or "a scene"))
    return captions


def read_captions(path: Path, uris: Sequence[str]) -> list[str]:
    """The caption of each image from a tab-separated file with `file_name` and `caption` columns.

    Raises:
        InputError: the file is malformed, or an image has no caption.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}), expected UTF-8 text") from error
    with io.StringIO(text, newline="") as file:
        reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        if not {"file_name", "caption"} <= set(reader.fieldnames or ()):
            raise InputError(f"{path}: columns {reader.fieldnames}, expected file_name and caption, tab-separated")
        captions = {row["file_name"]: row["caption"] or "" for row in reader}
    for uri in uris:
        if Path(uri).name not in captions:
            raise InputError(f"{path}: no row for {Path(uri).name}, expected a caption for each training image")
    return [captions[Path(uri).name] for uri in uris]


# ------------------------------------------------------------------------------------------------ pictograms


def pictogram_categories(world: World, image_counts: Mapping[int, int]) -> list[dict[str, Any]]:
    """Rows of `categories` for a pictogram world; ids count from 1, as in COCO."""
    return [
        {
            "category_id": row + 1,
            "name": name,
            "synonyms": [],
            "frequency": frequency,
            "split": split,
            "image_count": image_counts.get(row + 1, 0),
        }
        for row, (name, frequency, split) in enumerate(zip(world.names, world.frequencies, world.splits, strict=True))
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
    """Draw annotated scenes, write their images below the storage and yield their rows of `boxes`.

    Args:
        storage_uri: where `images/<name>/` is written.
        name: of the box set.
        world: what is drawn.
        numbers: which scenes; each depends on its number and the seed alone.
        seed: of the scenes.
        base_only: draw from the long tail over base categories; else uniformly from all.
        style: how.
    """
    probabilities = world.base_probabilities() if base_only else None
    for number in numbers:
        scene = world.scene(np.random.default_rng([seed, number]), style, probabilities)
        sink = io.BytesIO()
        Image.fromarray(scene.pixels).save(sink, "JPEG", quality=95)
        uri = f"images/{name}/{number:06d}.jpg"
        storage.write_bytes(storage.join(storage_uri, uri), sink.getvalue())
        encoded = [rle.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in scene.masks]
        count = len(scene.labels)
        yield {
            "image_id": storage.sha256(sink.getvalue()),
            "source_id": number,
            "uri": uri,
            "width": style.side,
            "height": style.side,
            "boxes": scene.boxes.tolist(),
            "category_ids": (scene.labels + 1).tolist(),
            "iscrowd": [False] * count,
            "masks": [entry["counts"].decode() for entry in encoded],
            "neg_category_ids": [],
            "not_exhaustive_category_ids": [],
        }


# ----------------------------------------------------------------------------------------------------- both


def _box_set(categories: list[dict[str, Any]], rows: list[dict[str, Any]]) -> BoxSet:
    counts = count_images(rows)
    for category in categories:
        category["image_count"] = counts.get(category["category_id"], 0)
    return BoxSet(
        pa.Table.from_pylist(categories, schema=tables.SCHEMAS["categories"]),
        pa.Table.from_pylist(rows, schema=tables.SCHEMAS["boxes"]),
    )


def count_images(rows: Iterable[Mapping[str, Any]]) -> dict[int, int]:
    """Images in which each category has a box."""
    counts: dict[int, int] = {}
    for row in rows:
        for category in set(row["category_ids"]):
            counts[category] = counts.get(category, 0) + 1
    return counts


def strip_novel(boxes: pa.Table, categories: pa.Table) -> pa.Table:
    """The same images with boxes of base categories only, as a training set may have them."""
    is_base = [split == "base" for split in categories["split"].to_pylist()]
    base = {key for key, keep in zip(categories["category_id"].to_pylist(), is_base, strict=True) if keep}
    rows = boxes.to_pylist()
    for row in rows:
        keep = [key in base for key in row["category_ids"]]
        for column in ("boxes", "category_ids", "iscrowd", "masks"):
            row[column] = [value for value, kept in zip(row[column], keep, strict=True) if kept]
    return pa.Table.from_pylist(rows, schema=boxes.schema)
