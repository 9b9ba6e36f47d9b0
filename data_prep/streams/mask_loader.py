"""Training streams of images with masks, and of images with cached SAM embeddings.

Imports no torch, so that data tasks start fast and stay small.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from data_prep import storage, tables
from data_prep.object_store import SharedValue, get_shared, put_shared
from data_prep.streams.images import pixel_columns, read_image, read_rows, unreadable_column
from data_prep.streams.plans import Integers, plan_epochs
from ovd_models.errors import InputError

ANNOTATIONS = ("masks", "labels")
INDEX = pa.schema({"uri": pa.string(), "masks": pa.list_(pa.string()), "labels": pa.list_(pa.int64())})


@dataclass(frozen=True)
class MaskLoader:
    """Images with masks at positions of a shuffled stream.

    Columns `image` (raw uint8 [H, W, 3]), `height`, `width`, `masks` (COCO RLE counts), `labels`, `unreadable` (images
    that this one replaces) and `flip`: the image is mirrored already, its masks are not.
    """

    index: SharedValue[pa.Table]
    """`uri`, `masks` and `labels` of every image."""
    count: int
    seed: int
    flip_probability: float = 0.0

    def __call__(self, positions: Integers) -> pa.Table:
        """The rows at `positions`."""
        numbers = plan_epochs(self.seed, self.count, positions)
        read = read_rows(get_shared(self.index), numbers, positions, self.seed, lambda row: read_image(row["uri"]))
        flips = [
            bool(np.random.default_rng([self.seed, position, 1]).random() < self.flip_probability)
            for position in positions.tolist()
        ]
        pixels = [np.asarray(entry.image) for entry in read]
        pixels = [array[:, ::-1] if flip else array for array, flip in zip(pixels, flips, strict=True)]
        columns = {name: pa.array([entry.row[name] for entry in read], INDEX.field(name).type) for name in ANNOTATIONS}
        return pa.table({**pixel_columns(pixels), **columns, "flip": flips, "unreadable": unreadable_column(read)})


def mask_loader(
    storage_uri: str, name: str, category_ids: Sequence[int], *, seed: int, flip_probability: float
) -> MaskLoader:
    """All images of a `boxes` table that have a mask; crowds are left out.

    Labels count the categories in the order of the training vocabulary; others get the label -1.

    Raises:
        InputError: the table is missing, or has no mask.
    """
    boxes = tables.read_table(storage_uri, "boxes", name, ["uri", "masks", "category_ids", "iscrowd"])
    label_of = {category: label for label, category in enumerate(category_ids)}
    index = []
    for row in boxes.to_pylist():
        annotations = zip(row["masks"], row["category_ids"], row["iscrowd"], strict=True)
        kept = [(mask, label_of.get(category, -1)) for mask, category, crowd in annotations if mask and not crowd]
        if kept:
            masks, labels = zip(*kept, strict=True)
            uri = storage.absolute(storage.join(storage_uri, row["uri"]))
            index.append({"uri": uri, "masks": masks, "labels": labels})
    if not index:
        raise InputError(f"boxes/{name}: no masks, expected segmentations in the annotation file")
    return MaskLoader(put_shared(pa.Table.from_pylist(index, schema=INDEX)), len(index), seed, flip_probability)


@dataclass(frozen=True)
class FeatureLoader:
    """Images with their cached SAM embedding at positions of a shuffled stream.

    Columns `image` (raw uint8 [H, W, 3]), `height`, `width`, `feature` (raw float16 [C, h, h]) and `unreadable` (images
    that this one replaces).
    """

    index: SharedValue[pa.Table]
    """`uri`, `file` (absolute URI) and `row` of every image."""
    count: int
    seed: int
    shape: tuple[int, int, int]
    """C, h, h."""

    def __call__(self, positions: Integers) -> pa.Table:
        """The rows at `positions`."""
        numbers = plan_epochs(self.seed, self.count, positions)
        read = read_rows(get_shared(self.index), numbers, positions, self.seed, lambda row: read_image(row["uri"]))
        size = 2 * int(np.prod(self.shape))
        pixels = [np.asarray(entry.image) for entry in read]
        places = [(entry.row["file"], entry.row["row"] * size) for entry in read]
        features = [storage.read_bytes(file, offset=offset, size=size) for file, offset in places]
        columns = {"feature": pa.array(features, pa.binary()), "unreadable": unreadable_column(read)}
        return pa.table({**pixel_columns(pixels), **columns})


def feature_loader(storage_uri: str, name: str, cache: str, teacher: str, *, seed: int) -> FeatureLoader:
    """All images of a `boxes` table with their embeddings in `features/<cache>`; those it could not read are left out.

    Raises:
        InputError: a table is missing, or the cache lacks an image or was made by another teacher.
    """
    manifest = tables.read_manifest(storage_uri, "features", cache)
    if manifest.details["teacher"] != teacher:
        raise InputError(f"features/{cache}: made by {manifest.details['teacher']}, expected {teacher}")
    root = storage.absolute(tables.table_uri(storage_uri, "features", cache))
    features = tables.read_table(storage_uri, "features", cache)
    place_of = {place["image_id"]: place for place in features.to_pylist()}
    index = []
    unreadable = set(manifest.details.get("unreadable", []))
    for image in tables.read_table(storage_uri, "boxes", name, ["image_id", "uri"]).to_pylist():
        if image["image_id"] in unreadable:
            continue
        if image["image_id"] not in place_of:
            raise InputError(f"features/{cache}: no image {image['image_id']}, expected those of boxes/{name}")
        place = place_of[image["image_id"]]
        uri = storage.absolute(storage.join(storage_uri, image["uri"]))
        index.append({"uri": uri, "file": storage.join(root, place["file"]), "row": place["row"]})
    schema = pa.schema({"uri": pa.string(), "file": pa.string(), "row": pa.int64()})
    channels, height, width = manifest.details["shape"]
    reference = put_shared(pa.Table.from_pylist(index, schema=schema))
    return FeatureLoader(reference, len(index), seed, (channels, height, width))
