"""The training stream of annotated images, with the stored embeddings of their regions.

    boxes ----------+
                    +--> index --plan--> range reads, decode --> augment --> rows for `collate.DetectionCollate`
    regions --------+

Imports no torch, so that data tasks start fast and stay small.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_prep import storage, tables
from data_prep.boxes.cleaning import SkipReport, clip_box
from data_prep.embeddings.stores import Regions, RegionStore
from data_prep.streams.augmentation import (
    MASKS,
    PIXELS,
    AnnotatedImage,
    Augmentation,
    augment,
    mask_row,
    object_masks,
    pixel_row,
)
from data_prep.streams.images import UNREADABLE, ImageRow, read_image, read_rows
from data_prep.streams.object_store import SharedValue, get_shared, put_shared
from data_prep.streams.plans import Integers, plan_epochs, plan_weighted, repeat_factors
from ovd_models.errors import InputError

ANNOTATIONS = pa.schema({"boxes": pa.list_(pa.float32()), "labels": pa.list_(pa.int64())})
REGIONS = pa.schema(
    {"region_boxes": pa.list_(pa.float32()), "region_valid": pa.list_(pa.bool_()), "region_embeddings": pa.binary()}
)
INDEX = pa.schema(
    [*pa.schema({"uri": pa.string(), "image_id": pa.string(), "masks": pa.list_(pa.string())}), *ANNOTATIONS]
)

READ = ("image_id", "uri", "width", "height", "boxes", "category_ids", "iscrowd")
"""Columns of `boxes` that any training needs."""

SampledRegions = tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_], npt.NDArray[np.float16]]
NO_REGIONS: SampledRegions = (np.zeros((0, 4), np.float32), np.zeros(0, np.bool_), np.zeros((0, 0), np.float16))


@dataclass(frozen=True, kw_only=True)
class RegionSource:
    """Stored embeddings of a training set's regions, and how many of an image are used in a step."""

    name: str
    """Name of the `regions` table."""
    teacher: str
    """Id of the teacher that must have made them."""
    crops: Mapping[str, Any]
    """The crop settings that they must have been made with."""
    num_candidates: int = 300
    """An image's regions of the highest objectness, from which those of a step are sampled."""
    num_sampled: int = 300
    """M: regions of an image in a step; images with fewer are padded."""


@dataclass(frozen=True)
class DetectionLoader:
    """Annotated images at positions of a shuffled stream.

    Columns `image` (raw uint8 [H, W, 3]), `height`, `width`, `boxes` (flat xyxy), `labels` and `unreadable` (images
    that this one replaces); with masks `masks` and `mask_boxes` (see `MASKS`); with stored regions `region_boxes` (flat
    xyxy), `region_valid` and `region_embeddings` (raw float16 rows).
    """

    index: SharedValue[pa.Table]
    """A row of `INDEX` for every image."""
    count: int
    seed: int
    augmentation: Augmentation
    masks: bool = False
    weights: npt.NDArray[np.float64] | None = None
    """[count] how often each image comes in an epoch; once if None."""
    source: RegionSource | None = None
    store: SharedValue[RegionStore] | None = None
    """The regions of `source`."""

    def __call__(self, positions: Integers) -> pa.Table:
        """The rows at `positions`."""
        if self.weights is None:
            numbers = plan_epochs(self.seed, self.count, positions)
        else:
            numbers = plan_weighted(self.seed, self.weights, positions)
        store = None if self.store is None else get_shared(self.store)
        read = read_rows(get_shared(self.index), numbers, positions, self.seed, lambda row: read_image(row["uri"]))
        rows = zip(read, positions.tolist(), strict=True)
        parts = [PIXELS, ANNOTATIONS, MASKS if self.masks else (), REGIONS if self.source else (), UNREADABLE]
        schema = pa.schema(itertools.chain.from_iterable(parts))
        return pa.Table.from_pylist([self._load(row, position, store) for row, position in rows], schema=schema)

    def _load(self, read: ImageRow, position: int, store: RegionStore | None) -> dict[str, Any]:
        row = read.row
        region_boxes, valid, embeddings = NO_REGIONS
        if self.source and store is not None:
            rng = np.random.default_rng([self.seed, position, 3])
            region_boxes, valid, embeddings = sample_stored_regions(store[row["image_id"]], self.source, rng)
        image = AnnotatedImage(
            np.asarray(read.image),
            np.asarray(row["boxes"], np.float32).reshape(-1, 4),
            np.asarray(row["labels"], np.int64),
            object_masks(row["masks"], read.image) if self.masks else [],
            region_boxes,
            valid,
        )
        image = augment(image, self.augmentation, np.random.default_rng([self.seed, position, 1]))
        return {
            **pixel_row(image.pixels),
            **mask_row(image.masks),
            "boxes": image.boxes.ravel(),
            "labels": image.labels,
            "region_boxes": image.regions.ravel(),
            "region_valid": image.valid.tolist(),
            "region_embeddings": embeddings.tobytes(),
            "unreadable": read.unreadable,
        }


def sample_stored_regions(regions: Regions, source: RegionSource, rng: np.random.Generator) -> SampledRegions:
    """Sample an image's regions for one step without replacement, padded to M.

    Returns:
        [M, 4] xyxy boxes in pixels of the image as stored, [M] False for padding, and [M, D] embeddings.
    """
    best = np.argsort(-regions.scores, kind="stable")[: source.num_candidates]
    chosen = best[np.sort(rng.permutation(len(best))[: source.num_sampled])]
    padding = ((0, source.num_sampled - len(chosen)), (0, 0))
    valid = np.arange(source.num_sampled) < len(chosen)
    return np.pad(regions.boxes[chosen], padding), valid, np.pad(regions.embeddings[chosen], padding)


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


def training_rows(
    rows: Sequence[Mapping[str, Any]], category_ids: Sequence[int], storage_uri: str
) -> tuple[list[dict[str, Any]], SkipReport]:
    """Rows of `INDEX` for the rows of `boxes` with a usable box, and a report of what was skipped.

    The categories are in the order of the training vocabulary. Rows without `masks` give masks that are None.
    """
    label_of, skipped = {category: label for label, category in enumerate(category_ids)}, SkipReport()
    index = []
    for row in rows:
        boxes: list[float] = []
        labels, masks = [], []
        own_masks = row.get("masks", [None] * len(row["boxes"]))
        annotations = zip(row["boxes"], row["category_ids"], row["iscrowd"], own_masks, strict=True)
        for box, category, crowd, mask in annotations:
            clipped, reason = clip_box(box, row["width"], row["height"])
            if category not in label_of:
                skipped.add("boxes of other categories", f"category {category} in {row['uri']}")
            elif crowd or reason:
                skipped.add("crowds" if crowd else reason, row["uri"])
            else:
                boxes += clipped
                labels.append(label_of[category])
                masks.append(mask)
        if not labels:
            skipped.add("images without boxes", row["uri"])
            continue
        uri = storage.absolute(storage.join(storage_uri, row["uri"]))
        index.append({"uri": uri, "image_id": row["image_id"], "boxes": boxes, "labels": labels, "masks": masks})
    return index, skipped


@cache
def print_once(line: str) -> None:
    """Print a line, unless this process has: a loader is built to check its tables, and again for every stage."""
    print(line, flush=True)


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
    """All images with a box of the given categories; other boxes and crowds are skipped, and reported.

    The categories are in the order of the training vocabulary. A `repeat_threshold` of 0 takes every image once an
    epoch; others are those of `repeat_factors`.

    Raises:
        InputError: a table is missing, no box is left, a mask is missing, or the embeddings are not of these images.
    """
    columns = [*READ, *(["masks"] if masks else [])]  # most of a table's bytes
    rows = tables.read_table(storage_uri, "boxes", name, columns).to_pylist()
    index, skipped = training_rows(rows, category_ids, storage_uri)
    if not index:
        raise InputError(f"boxes/{name}: no image has a box of the {len(category_ids)} training categories")
    if skipped:
        print_once(f"boxes/{name}: trains on {len(index):,} images; left out: {skipped}")
    if masks and not all(mask for row in index for mask in row["masks"]):
        raise InputError(f"boxes/{name}: a box has no mask, expected one for each, or model.detector.masks=False")
    weights = repeat_factors([row["labels"] for row in index], repeat_threshold) if repeat_threshold else None
    ids = [row["image_id"] for row in index]
    store = put_shared(open_regions(storage_uri, regions, ids)) if regions else None
    table = put_shared(pa.Table.from_pylist(index, schema=INDEX))
    return DetectionLoader(table, len(index), seed, augmentation, masks, weights, regions, store)
