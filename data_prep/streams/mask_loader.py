"""Training streams of annotated masks, and of cached SAM embeddings: which rows come in which step (see batching.py).

Nothing here imports torch: the data tasks start fast and stay small.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from data_prep import storage, tables
from data_prep.shared import Shared, share, shared
from data_prep.streams.plans import Integers, plan_epochs
from ovd_models.errors import InputError
from ovd_models.images import decode_image


@dataclass(frozen=True)
class MaskLoader:
    """Images with masks at positions of a shuffled stream.

    Columns `image` (raw uint8 [H, W, 3]), `height`, `width`, `masks` (COCO RLE counts), `labels` and `flip`: whether
    the masks, too, are still to be mirrored.
    """

    index: Shared[pa.Table]
    """`uri`, `masks`, `labels` of every image."""
    count: int
    seed: int
    flip_probability: float = 0.0

    def __call__(self, positions: Integers) -> pa.Table:
        """The rows at `positions`."""
        chosen = shared(self.index).take(plan_epochs(self.seed, self.count, positions))
        flips = [self._flip(int(position)) for position in positions]
        pixels = []
        for uri, flip in zip(chosen["uri"].to_pylist(), flips, strict=True):
            array = np.asarray(decode_image(storage.read_bytes(uri), uri))
            pixels.append(array[:, ::-1] if flip else array)
        columns = {**pixel_columns(pixels), "masks": chosen["masks"], "labels": chosen["labels"], "flip": flips}
        return pa.table(columns)

    def _flip(self, position: int) -> bool:
        return bool(np.random.default_rng([self.seed, position, 1]).random() < self.flip_probability)


def pixel_columns(pixels: Sequence[np.ndarray]) -> dict[str, Any]:
    """`image`, `height` and `width` of arrays [H, W, 3]."""
    return {
        "image": pa.array([entry.tobytes() for entry in pixels], pa.binary()),
        "height": [entry.shape[0] for entry in pixels],
        "width": [entry.shape[1] for entry in pixels],
    }


def mask_loader(
    storage_uri: str, name: str, category_ids: Sequence[int], *, seed: int, flip_probability: float
) -> MaskLoader:
    """All images of a `boxes` table with a mask; crowds are left out.

    Args:
        storage_uri: the storage.
        name: of the `boxes` table.
        category_ids: categories in the order of the training vocabulary; others get the label -1.
        seed: of the order.
        flip_probability: how often an image is mirrored.

    Raises:
        InputError: the table is missing, or has no mask.
    """
    boxes = tables.read_table(storage_uri, "boxes", name, ["uri", "masks", "category_ids", "iscrowd"])
    row_of = {category: row for row, category in enumerate(category_ids)}
    index = []
    for row in boxes.to_pylist():
        kept = [
            (mask, row_of.get(category, -1))
            for mask, category, crowd in zip(row["masks"], row["category_ids"], row["iscrowd"], strict=True)
            if mask and not crowd
        ]
        if kept:
            uri = storage.absolute(storage.join(storage_uri, row["uri"]))
            index.append({"uri": uri, "masks": [mask for mask, _ in kept], "labels": [label for _, label in kept]})
    if not index:
        raise InputError(f"boxes/{name}: no masks, expected segmentations in the annotation file")
    schema = pa.schema({"uri": pa.string(), "masks": pa.list_(pa.string()), "labels": pa.list_(pa.int64())})
    return MaskLoader(share(pa.Table.from_pylist(index, schema=schema)), len(index), seed, flip_probability)


@dataclass(frozen=True)
class FeatureLoader:
    """Images with their cached SAM embedding at positions of a shuffled stream.

    Columns `image` (raw uint8 [H, W, 3]), `height`, `width` and `feature` (raw float16 [C, h, h]).
    """

    index: Shared[pa.Table]
    """`uri`, `file` (absolute URI) and `row` of every image."""
    count: int
    seed: int
    shape: tuple[int, int, int]
    """C, h, h."""

    def __call__(self, positions: Integers) -> pa.Table:
        """The rows at `positions`."""
        chosen = shared(self.index).take(plan_epochs(self.seed, self.count, positions))
        size = 2 * int(np.prod(self.shape))
        pixels = [np.asarray(decode_image(storage.read_bytes(uri), uri)) for uri in chosen["uri"].to_pylist()]
        features = [
            storage.read_bytes(file, offset=row * size, size=size)
            for file, row in zip(chosen["file"].to_pylist(), chosen["row"].to_pylist(), strict=True)
        ]
        return pa.table({**pixel_columns(pixels), "feature": pa.array(features, pa.binary())})


def feature_loader(storage_uri: str, name: str, cache: str, teacher: str, *, seed: int) -> FeatureLoader:
    """All images of a `boxes` table with what `features/<cache>` holds of them.

    Raises:
        InputError: a table is missing, the cache is another teacher's, or lacks an image.
    """
    manifest = tables.read_manifest(storage_uri, "features", cache)
    if manifest.details["teacher"] != teacher:
        raise InputError(f"features/{cache}: made by {manifest.details['teacher']}, expected {teacher}")
    root = storage.absolute(tables.table_uri(storage_uri, "features", cache))
    features = tables.read_table(storage_uri, "features", cache)
    place = dict(
        zip(
            features["image_id"].to_pylist(),
            zip(features["file"].to_pylist(), features["row"].to_pylist(), strict=True),
            strict=True,
        )
    )
    index = []
    for image_id, uri in zip(*tables.read_table(storage_uri, "boxes", name, ["image_id", "uri"]).columns, strict=True):
        if image_id.as_py() not in place:
            raise InputError(f"features/{cache}: no image {image_id.as_py()}, expected those of boxes/{name}")
        file, row = place[image_id.as_py()]
        path = storage.absolute(storage.join(storage_uri, uri.as_py()))
        index.append({"uri": path, "file": storage.join(root, file), "row": row})
    schema = pa.schema({"uri": pa.string(), "file": pa.string(), "row": pa.int64()})
    channels, height, width = manifest.details["shape"]
    reference = share(pa.Table.from_pylist(index, schema=schema))
    return FeatureLoader(reference, len(index), seed, (channels, height, width))
