"""Training streams of images with masks, and of images with cached SAM embeddings.

Imports no torch, so that data tasks start fast and stay small.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from data_prep import storage, tables
from data_prep.streams.augmentation import (
    AS_IS,
    MASKS,
    NO_REGIONS,
    PIXELS,
    AnnotatedImage,
    Augmentation,
    augment,
    fit_longer_side,
    mask_row,
    object_masks,
    pixel_row,
)
from data_prep.streams.images import UNREADABLE, ImageRow, read_all, read_image, read_rows
from data_prep.streams.object_store import SharedValue, get_shared, put_shared
from data_prep.streams.plans import Integers, plan_epochs
from ovd_models.errors import InputError

INDEX = pa.schema(
    {
        "uri": pa.string(),
        "boxes": pa.list_(pa.float32()),
        "masks": pa.list_(pa.string()),
        "labels": pa.list_(pa.int64()),
    }
)
ROWS = pa.schema(
    [*PIXELS, *MASKS, *pa.schema({"size": pa.list_(pa.int64()), "labels": pa.list_(pa.int64())}), *UNREADABLE]
)


@dataclass(frozen=True)
class MaskLoader:
    """Images with masks at positions of a shuffled stream.

    Columns `image` (raw uint8 [H, W, 3]), `height`, `width`, `masks` and `mask_boxes` (see `MASKS`), `size` (height and
    width of the image that the masks belong to, which `side` may resize), `labels` and `unreadable` (images that this
    one replaces).
    """

    index: SharedValue[pa.Table]
    """A row of `INDEX` for every image."""
    count: int
    seed: int
    augmentation: Augmentation
    side: int
    """The longer side of the images in pixels, as the model takes them; 0 leaves them as they are."""

    def __call__(self, positions: Integers) -> pa.Table:
        """The rows at `positions`."""
        numbers = plan_epochs(self.seed, self.count, positions)
        read = read_rows(get_shared(self.index), numbers, positions, self.seed, lambda row: read_image(row["uri"]))
        rows = [self._load(entry, position) for entry, position in zip(read, positions.tolist(), strict=True)]
        return pa.Table.from_pylist(rows, schema=ROWS)

    def _load(self, read: ImageRow, position: int) -> dict[str, Any]:
        image = AnnotatedImage(
            np.asarray(read.image),
            np.asarray(read.row["boxes"], np.float32).reshape(-1, 4),
            np.asarray(read.row["labels"], np.int64),
            object_masks(read.row["masks"], read.image),
            *NO_REGIONS,
        )
        image = augment(image, self.augmentation, np.random.default_rng([self.seed, position, 1]))
        return {
            **pixel_row(fit_longer_side(image.pixels, self.side)),
            **mask_row(image.masks),
            "size": image.pixels.shape[:2],
            "labels": image.labels,
            "unreadable": read.unreadable,
        }


def mask_loader(
    storage_uri: str,
    name: str,
    category_ids: Sequence[int],
    *,
    seed: int,
    augmentation: Augmentation = AS_IS,
    side: int = 0,
) -> MaskLoader:
    """All images of a `boxes` table that have a mask; crowds are left out.

    Labels count the categories in the order of the training vocabulary; others get the label -1.

    Raises:
        InputError: the table is missing, or has no mask.
    """
    table = tables.read_table(storage_uri, "boxes", name, ["uri", "boxes", "masks", "category_ids", "iscrowd"])
    label_of = {category: label for label, category in enumerate(category_ids)}
    index = []
    for row in table.to_pylist():
        annotations = zip(row["boxes"], row["masks"], row["category_ids"], row["iscrowd"], strict=True)
        kept = [(box, mask, label_of.get(key, -1)) for box, mask, key, crowd in annotations if mask and not crowd]
        if kept:
            boxes, masks, labels = zip(*kept, strict=True)
            uri = storage.absolute(storage.join(storage_uri, row["uri"]))
            index.append({"uri": uri, "boxes": list(itertools.chain(*boxes)), "masks": masks, "labels": labels})
    if not index:
        raise InputError(f"boxes/{name}: no masks, expected segmentations in the annotation file")
    return MaskLoader(put_shared(pa.Table.from_pylist(index, schema=INDEX)), len(index), seed, augmentation, side)


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
    side: int
    """The longer side of the images in pixels, as the model takes them; 0 leaves them as they are."""

    def __call__(self, positions: Integers) -> pa.Table:
        """The rows at `positions`."""
        numbers = plan_epochs(self.seed, self.count, positions)
        read = read_rows(get_shared(self.index), numbers, positions, self.seed, lambda row: read_image(row["uri"]))
        size = 2 * int(np.prod(self.shape))
        places = [(entry.row["file"], entry.row["row"] * size) for entry in read]
        features = read_all(lambda place: storage.read_bytes(place[0], offset=place[1], size=size), places)
        rows = [
            {
                **pixel_row(fit_longer_side(np.asarray(entry.image), self.side)),
                "feature": feature,
                "unreadable": entry.unreadable,
            }
            for entry, feature in zip(read, features, strict=True)
        ]
        return pa.Table.from_pylist(rows, schema=pa.schema([*PIXELS, pa.field("feature", pa.binary()), *UNREADABLE]))


def feature_loader(storage_uri: str, name: str, cache: str, teacher: str, *, seed: int, side: int = 0) -> FeatureLoader:
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
    return FeatureLoader(reference, len(index), seed, (channels, height, width), side)
