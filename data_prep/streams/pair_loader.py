"""The training stream of image-text pairs. Imports no torch, so that data tasks start fast and stay small."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from data_prep import storage, tables
from data_prep.embeddings.crops import Fit, square
from data_prep.streams.images import ImageRow, read_image, read_rows, unreadable_column
from data_prep.streams.object_store import SharedValue, get_shared, put_shared
from data_prep.streams.plans import Integers, plan_epochs
from ovd_models.errors import InputError


@dataclass(frozen=True)
class PairLoader:
    """Image-text pairs at positions of a shuffled stream, resized to a square.

    Columns `image` (raw uint8 [S, S, 3]), `caption` and `unreadable` (images that this one replaces).
    """

    index: SharedValue[pa.Table]
    """`shard`, `offset`, `size` and `caption` of every pair."""
    count: int
    root: str
    """Absolute URI of the folder that `shard` is relative to."""
    seed: int
    image_size: int
    """S, in pixels."""
    fit: Fit
    """How an image becomes a square."""

    def __call__(self, positions: Integers) -> pa.Table:
        """The rows at `positions`."""
        numbers = plan_epochs(self.seed, self.count, positions)
        return pair_table(read_rows(get_shared(self.index), numbers, positions, self.seed, self._read))

    def _read(self, row: dict[str, Any]) -> Image.Image:
        image = read_image(storage.join(self.root, row["shard"]), offset=row["offset"], size=row["size"])
        return squared(image, self.image_size, self.fit)


def squared(image: Image.Image, side: int, fit: Fit) -> Image.Image:
    """An RGB image as a square; rows that wait for the others of their block hold these, not images of any size."""
    return Image.fromarray(square(image, side, fit))


def pair_table(read: Sequence[ImageRow]) -> pa.Table:
    """Rows with square images as a block of the stream."""
    images = pa.array([entry.image.tobytes() for entry in read], pa.binary())
    captions = pa.array([entry.row["caption"] for entry in read], pa.string())
    return pa.table({"image": images, "caption": captions, "unreadable": unreadable_column(read)})


def pair_loader(
    storage_uri: str, name: str, *, seed: int, image_size: int, fit: Fit, max_side: int | None
) -> PairLoader:
    """All pairs of a table whose longer side is at most `max_side` pixels (of any size if None).

    Raises:
        InputError: the table is missing, or no pair fits.
    """
    columns = ["shard", "offset", "size", "width", "height", "caption"]
    pairs = tables.read_table(storage_uri, "pairs", name, columns)
    if max_side is not None:
        longer = np.maximum(pairs["width"].to_numpy(), pairs["height"].to_numpy())
        pairs = pairs.filter(pa.array(longer <= max_side))
    if not pairs.num_rows:
        raise InputError(f"pairs/{name}: no pair with sides up to {max_side} px")
    # A shard's name is stored once, not once a pair.
    pairs = pairs.set_column(0, "shard", pairs["shard"].dictionary_encode()).combine_chunks()
    root = storage.absolute(tables.table_uri(storage_uri, "pairs", name))
    return PairLoader(put_shared(pairs), pairs.num_rows, root, seed, image_size, fit)
