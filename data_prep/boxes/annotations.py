"""Captions of annotated images, and annotated scenes drawn from the pictogram world."""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from faster_coco_eval import mask as rle

from data_prep import storage
from data_prep.boxes.coco import category_row, reported
from data_prep.pictograms.world import SCENES, Style, World, encode_jpeg, join_phrases
from ovd_models.errors import InputError
from ovd_models.prompts import with_article


def category_captions(boxes: pa.Table, categories: pa.Table) -> list[str]:
    """A caption for each image from the names of its categories: "a photo of a person and a dog"."""
    names = dict(zip(categories["category_id"].to_pylist(), categories["name"].to_pylist(), strict=True))
    captions = []
    for ids in boxes["category_ids"].to_pylist():
        shown = [with_article(name) for name in dict.fromkeys(names[key] for key in ids if key in names)]
        captions.append("a photo of " + (join_phrases(shown) or "a scene"))
    return captions


def find_captions(data: str | Path) -> list[Path]:
    """The captions beside an annotation file or in a folder: `captions.tsv`, else COCO's `captions*.json`, if any."""
    folder = Path(data).parent if Path(data).is_file() else Path(data)
    table = folder / "captions.tsv"
    return [table] if table.is_file() else sorted(folder.glob("captions*.json"))


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
    with reported(str(path), "captions in COCO's format"):
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
        category_row(number, name, split, frequency=frequency)
        for number, (name, split, frequency) in enumerate(rows, 1)
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
