"""The training stream of annotated images, with the stored embeddings of their regions.

    boxes ----------+
                    +--> index --plan--> range reads, decode --> augment --> rows for `collate.DetectionCollate`
    regions --------+

Nothing here imports torch: the data tasks start fast and stay small.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_prep import storage, tables
from data_prep.boxes.skipped import SkippedRows
from data_prep.embeddings.stores import Regions, RegionStore
from data_prep.shared import Shared, share, shared
from data_prep.streams.augmentation import Annotated, Augmentation, augment
from data_prep.streams.plans import Integers, plan_epochs, plan_weighted, repeat_factors
from ovd_models.errors import InputError
from ovd_models.images import decode_image

INDEX = pa.schema(
    {
        "uri": pa.string(),
        "image_id": pa.string(),
        "boxes": pa.list_(pa.float32()),
        "labels": pa.list_(pa.int64()),
        "masks": pa.list_(pa.string()),
    }
)


@dataclass(frozen=True, kw_only=True)
class RegionSource:
    """Stored embeddings of a training set's regions, and how many of an image take part in a step."""

    name: str
    """Of the `regions` table."""
    teacher: str
    """Id of the teacher that must have made them."""
    crops: Mapping[str, Any]
    """The crop settings that they must have been made with."""
    most: int = 300
    """M: only an image's best proposals are drawn from."""
    per_step: int = 300
    """Regions of an image in a step, drawn from these; images with fewer are padded."""


@dataclass(frozen=True)
class DetectionLoader:
    """Annotated images at positions of a shuffled stream.

    Columns `image` (raw uint8 [H, W, 3]), `height`, `width`, `boxes` (flat xyxy) and `labels`; with masks `masks`; with
    stored regions `region_boxes` (flat xyxy), `region_valid` and `region_embeddings` (raw float16 rows).
    """

    index: Shared[pa.Table]
    """A row of `INDEX` for every image."""
    count: int
    seed: int
    augmentation: Augmentation
    masks: bool = False
    weights: npt.NDArray[np.float64] | None = None
    """[count] how often each image comes in an epoch; once if None."""
    regions: Shared[RegionStore] | None = None
    most_regions: int = 0
    """Only so many of an image's regions are drawn from, those of the highest objectness."""
    regions_per_step: int = 0
    """Drawn from them."""

    def __call__(self, positions: Integers) -> pa.Table:
        """The rows at `positions`."""
        index = shared(self.index)
        store = None if self.regions is None else shared(self.regions)
        if self.weights is None:
            rows = plan_epochs(self.seed, self.count, positions)
        else:
            rows = plan_weighted(self.seed, self.weights, positions)
        loaded = [
            self._load(row, int(position), store)
            for row, position in zip(index.take(rows).to_pylist(), positions, strict=True)
        ]
        return pa.Table.from_pylist(loaded, schema=self._schema())

    def _load(self, row: dict[str, Any], position: int, store: RegionStore | None) -> dict[str, Any]:
        pixels = np.asarray(decode_image(storage.read_bytes(row["uri"]), row["uri"]))
        drawn = NO_REGIONS
        if store is not None:
            rng = np.random.default_rng([self.seed, position, 3])
            drawn = draw_regions(store[row["image_id"]], self.most_regions, self.regions_per_step, rng)
        image = Annotated(
            pixels,
            np.asarray(row["boxes"], np.float32).reshape(-1, 4),
            np.asarray(row["labels"], np.int64),
            row["masks"] if self.masks else [],
            drawn.boxes,
            drawn.valid,
        )
        image = augment(image, self.augmentation, np.random.default_rng([self.seed, position, 1]))
        return {
            "image": image.pixels.tobytes(),
            "height": image.pixels.shape[0],
            "width": image.pixels.shape[1],
            "boxes": image.boxes.ravel(),
            "labels": image.labels,
            "masks": image.masks,
            "region_boxes": image.regions.ravel(),
            "region_valid": image.valid.tolist(),
            "region_embeddings": drawn.embeddings.tobytes(),
        }

    def _schema(self) -> pa.Schema:
        columns: dict[str, pa.DataType] = {
            "image": pa.binary(),
            "height": pa.int64(),
            "width": pa.int64(),
            "boxes": pa.list_(pa.float32()),
            "labels": pa.list_(pa.int64()),
        }
        if self.masks:
            columns["masks"] = pa.list_(pa.string())
        if self.regions is not None:
            columns["region_boxes"] = pa.list_(pa.float32())
            columns["region_valid"] = pa.list_(pa.bool_())
            columns["region_embeddings"] = pa.binary()
        return pa.schema(columns)


# -------------------------------------------------------------------------------------------------- regions


@dataclass(frozen=True)
class DrawnRegions:
    """Regions of one image that take part in a step, padded to a fixed number."""

    boxes: npt.NDArray[np.float32]
    """[M, 4] xyxy, pixels of the image as stored."""
    valid: npt.NDArray[np.bool_]
    """[M] False for padding."""
    embeddings: npt.NDArray[np.float16]
    """[M, D]."""


NO_REGIONS = DrawnRegions(np.zeros((0, 4), np.float32), np.zeros(0, np.bool_), np.zeros((0, 0), np.float16))


def draw_regions(found: Regions, most: int, count: int, rng: np.random.Generator) -> DrawnRegions:
    """Regions of an image, without replacement: all of them where there are not more than wanted.

    Args:
        found: of an image.
        most: only so many of the highest objectness are drawn from.
        count: wanted.
        rng: draws them.
    """
    best = np.argsort(-found.scores, kind="stable")[:most]
    chosen = best[np.sort(rng.permutation(len(best))[:count])]
    drawn = DrawnRegions(
        np.zeros((count, 4), np.float32),
        np.arange(count) < len(chosen),
        np.zeros((count, found.embeddings.shape[1]), np.float16),
    )
    drawn.boxes[: len(chosen)] = found.boxes[chosen]
    drawn.embeddings[: len(chosen)] = found.embeddings[chosen]
    return drawn


def open_regions(storage_uri: str, source: RegionSource, image_ids: Sequence[str]) -> RegionStore:
    """The stored regions of a training set's images.

    Raises:
        InputError: the table is missing, of another teacher or of other crops, or lacks an image.
    """
    store = RegionStore.open(storage_uri, source.name, {"teacher": source.teacher, "crops": dict(source.crops)})
    missing = [image_id for image_id in image_ids if image_id not in store]
    if missing:
        uri = tables.table_uri(storage_uri, "regions", source.name)
        raise InputError(f"{uri}: no embeddings for {len(missing)} of {len(image_ids)} images, such as {missing[0]}")
    return store


# ---------------------------------------------------------------------------------------------------- index


def training_rows(
    rows: Sequence[Mapping[str, Any]], category_ids: Sequence[int], root: str
) -> tuple[list[dict[str, Any]], SkippedRows]:
    """The images of a box table with a box that can be trained with, and what was left out.

    Args:
        rows: of `boxes`.
        category_ids: categories in the order of the training vocabulary.
        root: the storage, which relative image files belong to.
    """
    row_of, left = {category: row for row, category in enumerate(category_ids)}, SkippedRows()
    index = []
    for row in rows:
        kept: list[tuple[list[float], int, str]] = []
        for box, category, crowd, mask in zip(
            row["boxes"], row["category_ids"], row["iscrowd"], row["masks"], strict=True
        ):
            corners = 2 * (float(row["width"]), float(row["height"]))
            x0, y0, x1, y1 = (min(max(value, 0.0), edge) for value, edge in zip(box, corners, strict=True))
            if category not in row_of:
                left.add("boxes of other categories", f"category {category} in {row['uri']}")
            elif crowd:
                left.add("crowds", row["uri"])
            elif not (box[2] > box[0] and box[3] > box[1]):
                left.add("boxes without area", row["uri"])
            elif not (x1 > x0 and y1 > y0):
                left.add("boxes outside their image", row["uri"])
            else:
                kept.append(([x0, y0, x1, y1], row_of[category], mask))
        if not kept:
            left.add("images without boxes", row["uri"])
            continue
        index.append(
            {
                "uri": storage.absolute(storage.join(root, row["uri"])),
                "image_id": row["image_id"],
                "boxes": [corner for box, _, _ in kept for corner in box],
                "labels": [label for _, label, _ in kept],
                "masks": [mask for _, _, mask in kept],
            }
        )
    return index, left


def detection_loader(
    storage_uri: str,
    name: str,
    category_ids: Sequence[int],
    *,
    seed: int,
    augmentation: Augmentation,
    masks: bool = False,
    repeat_threshold: float = 0.0,
    regions: RegionSource | None = None,
) -> DetectionLoader:
    """All images with a box of the given categories; other boxes and crowds are left out, and counted.

    Args:
        storage_uri: the storage.
        name: of the `boxes` table.
        category_ids: categories in the order of the training vocabulary.
        seed: of the order.
        augmentation: what happens to images.
        masks: whether masks are learned.
        repeat_threshold: of repeat-factor sampling; 0 takes every image once an epoch.
        regions: stored embeddings to learn from.

    Raises:
        InputError: a table is missing, no box or a mask is left out, or the embeddings are not those of these images.
    """
    found = tables.read_table(storage_uri, "boxes", name).to_pylist()
    index, left = training_rows(found, category_ids, storage_uri)
    if not index:
        raise InputError(f"boxes/{name}: no image has a box of the {len(category_ids)} training categories")
    if left:
        print(f"boxes/{name}: trains on {len(index):,} images; left out: {left}", flush=True)
    if masks and not all(mask for row in index for mask in row["masks"]):
        raise InputError(f"boxes/{name}: a box has no mask, expected one for each, or model.detector.masks=False")
    weights = repeat_factors([row["labels"] for row in index], repeat_threshold) if repeat_threshold else None
    table = share(pa.Table.from_pylist(index, schema=INDEX))
    if regions is None:
        return DetectionLoader(table, len(index), seed, augmentation, masks, weights)
    store = share(open_regions(storage_uri, regions, [row["image_id"] for row in index]))
    return DetectionLoader(table, len(index), seed, augmentation, masks, weights, store, regions.most, regions.per_step)
