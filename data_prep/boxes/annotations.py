"""Captions of annotated images, and annotated scenes drawn from the pictogram world."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from data_prep import storage
from data_prep.boxes.cleaning import Account
from data_prep.boxes.coco import category_row
from data_prep.boxes.entries import decode_file, inner_path, unique_entries
from data_prep.boxes.masks import encode_pixels
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


class Caption(msgspec.Struct, gc=False):
    """An entry of `annotations` in COCO's files of captions."""

    image_id: int
    caption: str | None


class CaptionedPicture(msgspec.Struct, gc=False):
    """An entry of `images` in these files."""

    id: int
    file_name: str

    @property
    def name(self) -> str:
        """The file, for messages."""
        return self.file_name


class CaptionFile(msgspec.Struct, gc=False):
    """The parts of such a file that are used."""

    images: list[CaptionedPicture]
    annotations: list[Caption]


def read_captions(files: Sequence[Path], names: Sequence[str]) -> list[str]:
    """The caption of each image, from files of `find_captions`.

    An image is found by its file name with its folders, or by the end of either. Several captions of an image in COCO's
    format are joined, so that its concepts are the nouns of all of them.

    Args:
        files: `captions.tsv`, with the tab-separated columns `file_name` and `caption`, or files in COCO's format.
        names: paths or URIs of the images, or their file names in the annotation file.

    Raises:
        InputError: a file is malformed, has two captions for a file name, or an image has no caption or shares its with
            another.
    """
    captions: dict[str, str] = {}
    for path in files:
        for name, caption in (_table_captions(path) if path.suffix == ".tsv" else _coco_captions(path)).items():
            if captions.setdefault(name, caption) is not caption:
                raise InputError(f"{path}: {name} has a caption in another file, expected one a file")
    by_end = _by_ending(captions)
    taken: dict[str, str] = {}
    for image in names:
        name = _find_caption(inner_path(image), captions, by_end)
        if not name:
            last = image.rpartition("/")[2]
            raise InputError(f"{files[0]}: no row for {last}, expected a caption for each training image")
        if name in taken:
            raise InputError(f"{files[0]}: {name} may be {taken[name]} or {image}, expected names with their folders")
        taken[name] = image
    return [captions[name] for name in taken]


def _by_ending(captions: Mapping[str, str]) -> dict[str, str]:
    """The only file name with captions that ends in a path, by that path."""
    found: dict[str, str] = {}
    for name in captions:
        parts = name.split("/")
        for start in range(1, len(parts)):
            ending = "/".join(parts[start:])
            found[ending] = "" if ending in found else name
    return found


def _find_caption(image: str, captions: Mapping[str, str], by_end: Mapping[str, str]) -> str:
    parts = image.split("/")
    endings = ["/".join(parts[start:]) for start in range(len(parts))]
    return next((name for name in endings if name in captions), "") or by_end.get(image, "")


def _table_captions(path: Path) -> dict[str, str]:
    """Captions by file name."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}), expected UTF-8 text") from error
    lines = [line.removesuffix("\r") for line in text.split("\n")]  # Python would also split at further characters
    header = lines[0].split("\t") if lines[0] else []
    if not {"file_name", "caption"} <= set(header):
        raise InputError(f"{path}: columns {header}, expected file_name and caption, tab-separated")
    captions: dict[str, str] = {}
    for number, line in enumerate(lines[1:], 2):
        if not line.strip():
            continue
        values = line.split("\t")
        if len(values) != len(header):
            raise InputError(f"{path}: line {number}: {len(values)} columns, expected {len(header)}")
        row = dict(zip(header, values, strict=True))
        name = inner_path(row["file_name"])
        if name in captions:
            raise InputError(f"{path}: line {number}: {row['file_name']} has a caption above, expected one a file")
        captions[name] = row["caption"]
    return captions


def _coco_captions(path: Path) -> dict[str, str]:
    """The joined captions of each image, each ending as a sentence, by file name."""
    expected = "captions in COCO's format"
    content = decode_file(path, CaptionFile, expected)
    images = unique_entries(content.images, "images", str(path), Account(str(path)))
    sentences: dict[int, list[str]] = {image.id: [] for image in images}
    for number, entry in enumerate(content.annotations):
        if entry.image_id not in sentences:
            place = f"annotations[{number}]: image_id {entry.image_id}"
            raise InputError(f"{path}: {place} is not in images, expected {expected}")
        caption = " ".join((entry.caption or "").split()).rstrip(".")
        if caption:
            sentences[entry.image_id].append(f"{caption}.")
    captions: dict[str, str] = {}
    for image in images:
        name, joined = inner_path(image.file_name), " ".join(sentences[image.id])
        if name in captions and joined:
            raise InputError(f"{path}: two images are of the file {image.file_name}, expected an image for each")
        captions |= {name: joined} if joined else {}
    return captions


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
        yield {
            "image_id": storage.sha256(content),
            "source_id": number,
            "uri": uri,
            "width": style.side,
            "height": style.side,
            "boxes": scene.boxes.tolist(),
            "category_ids": (scene.labels + 1).tolist(),
            "iscrowd": [False] * len(scene.labels),
            "masks": [encode_pixels(mask) for mask in scene.masks],
            "neg_category_ids": [],
            "not_exhaustive_category_ids": [],
        }
