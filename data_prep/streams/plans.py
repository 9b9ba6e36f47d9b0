"""Training streams: which rows come in which step.

A plan is a pure function of (seed, number of rows, position), so a stream can start at any step, on any number of
workers, and gives the same samples. Ray Data reads and decodes the images on the CPU pool; blocks hold whole steps.

    positions --plan--> rows of a table --range reads, decode--> raw pixels --collate.py--> batches

Nothing here imports torch: the data tasks start fast and stay small.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray.data

from data_prep import storage, tables
from data_prep.pace import ExecutorPause
from data_prep.shared import Shared, share, shared
from ovd_models.errors import InputError
from ovd_models.images import decode_image

Integers = npt.NDArray[np.int64]
Batch = TypeVar("Batch")


# ---------------------------------------------------------------------------------------------------- plans


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> Integers:
    return np.random.default_rng([seed, epoch]).permutation(count)


def plan_epochs(seed: int, count: int, positions: Integers) -> Integers:
    """Rows of a table of `count` rows at the given positions of an endless stream: a new permutation every epoch."""
    rows = np.empty_like(positions)
    for epoch in np.unique(positions // count).tolist():
        inside = positions // count == epoch
        rows[inside] = _permutation(seed, epoch, count)[positions[inside] % count]
    return rows


def plan_weighted(seed: int, weights: npt.NDArray[np.float64], positions: Integers) -> Integers:
    """Rows at the given positions of an endless stream in which row i comes `weights[i]` times an epoch.

    An epoch has as many positions as the weights sum to, rounded up. Each row comes in it either as often as its share
    rounded down or as rounded up (systematic resampling), so no row is left to chance.
    """
    ends = np.cumsum(weights)
    count = int(np.ceil(ends[-1]))
    rows = np.empty_like(positions)
    for epoch in np.unique(positions // count).tolist():
        marks = (np.arange(count) + np.random.default_rng([seed, epoch, 2]).random()) * (ends[-1] / count)
        drawn = np.minimum(np.searchsorted(ends, marks, side="right"), len(weights) - 1)
        inside = positions // count == epoch
        rows[inside] = drawn[_permutation(seed, epoch, count)[positions[inside] % count]]
    return rows


def repeat_factors(images: Sequence[Sequence[int]], threshold: float) -> npt.NDArray[np.float64]:
    """How often each image comes in an epoch: r = max over its categories of max(1, sqrt(threshold / frequency)).

    Repeat-factor sampling (Gupta et al., 2019, LVIS).

    Args:
        images: the categories of each.
        threshold: frequency, a part of all images, below which a category's images are repeated.
    """
    counts: dict[int, int] = {}
    for category in (entry for categories in images for entry in set(categories)):
        counts[category] = counts.get(category, 0) + 1
    factor_of = {key: max(1.0, (threshold * len(images) / count) ** 0.5) for key, count in counts.items()}
    return np.array([max((factor_of[key] for key in categories), default=1.0) for categories in images])


# -------------------------------------------------------------------------------------------------- streams


@dataclass(frozen=True, kw_only=True)
class StreamShape:
    """How a stream is cut into steps."""

    rows_per_step: int
    """Rows that all workers together take in one step."""
    workers: int
    """Workers among which the stream is split; `rows_per_step` is a multiple of it. 0: inside the driver."""
    steps_per_block: int = 5
    """Steps of one worker in a block; checkpoints come at multiples of it, so that a resumed stream is exact."""

    def positions(self, start_step: int, stop_step: int) -> tuple[int, int, int]:
        """First position, number of positions and number of blocks of a range of steps.

        Every block is whole, so the last ones may hold some steps more: a loop ends at its own last step.
        """
        rounds = max(1, -(-(stop_step - start_step) // self.steps_per_block))
        count = rounds * self.steps_per_block * self.rows_per_step
        return start_step * self.rows_per_step, count, rounds * self.workers


@dataclass(frozen=True)
class DriverStream:
    """A stream that is read where it is used, step by step, so that a debugger reaches what loads it."""

    load: Callable[[Integers], pa.Table]
    first: int
    """Position."""
    count: int

    def iter_torch_batches(
        self, *, batch_size: int, collate_fn: Callable[[pa.Table], Batch], prefetch_batches: int
    ) -> Iterator[Batch]:
        """As of Ray Data's iterators; nothing is fetched ahead."""
        for start in range(self.first, self.first + self.count, batch_size):
            yield collate_fn(self.load(np.arange(start, start + batch_size)))


Stream = ray.data.Dataset | DriverStream


def stream(load: Callable[[Integers], pa.Table], shape: StreamShape, start_step: int, stop_step: int) -> Stream:
    """The rows that `load` makes of each position, in order, from one step to another."""
    first, count, blocks = shape.positions(start_step, stop_step)
    if not shape.workers:
        return DriverStream(load, first, count)

    def rows(batch: pa.Table) -> pa.Table:
        return load(np.asarray(batch["id"], np.int64) + first)

    data = ray.data.range(count, override_num_blocks=blocks)
    data = data.map_batches(rows, batch_format="pyarrow", batch_size=None)
    data.context.execution_options.preserve_order = True
    data.context.custom_execution_callback_classes = [ExecutorPause]  # type: ignore[list-item]
    return data


@dataclass(frozen=True)
class PairLoader:
    """Image-text pairs at positions of a shuffled stream, resized to a square.

    Columns `image` (raw uint8 [S, S, 3]) and `caption`.
    """

    index: Shared[pa.Table]
    """`shard` (absolute URI), `offset`, `size`, `caption` of every pair."""
    count: int
    seed: int
    image_size: int

    def __call__(self, positions: Integers) -> pa.Table:
        """The rows at `positions`."""
        chosen = shared(self.index).take(plan_epochs(self.seed, self.count, positions))
        side = self.image_size
        images = [decode_image(content, name).resize((side, side)).tobytes() for content, name in read_images(chosen)]
        return pa.table({"image": pa.array(images, pa.binary()), "caption": chosen["caption"]})


def read_images(rows: pa.Table) -> list[tuple[bytes, str]]:
    """The image bytes of rows with `shard`, `offset` and `size`, one range read each, with a name for messages."""
    shards, offsets, sizes = (rows[name].to_pylist() for name in ("shard", "offset", "size"))
    return [
        (storage.read_bytes(shard, offset=offset, size=size), f"{shard}@{offset}")
        for shard, offset, size in zip(shards, offsets, sizes, strict=True)
    ]


# -------------------------------------------------------------------------------------------------- indexes


def pair_loader(storage_uri: str, name: str, *, seed: int, image_size: int, max_side: int | None) -> PairLoader:
    """All pairs of a table whose longer side is at most `max_side` (of any size if None).

    Raises:
        InputError: the table is missing, or no pair fits.
    """
    columns = ["shard", "offset", "size", "width", "height", "caption"]
    pairs = _absolute_shards(tables.read_table(storage_uri, "pairs", name, columns), storage_uri, name)
    if max_side is not None:
        longer = np.maximum(pairs["width"].to_numpy(), pairs["height"].to_numpy())
        pairs = pairs.filter(pa.array(longer <= max_side))
    if not pairs.num_rows:
        raise InputError(f"pairs/{name}: no pair with sides up to {max_side} px")
    return PairLoader(share(pairs), pairs.num_rows, seed, image_size)


def _absolute_shards(rows: pa.Table, storage_uri: str, name: str) -> pa.Table:
    """`shard` as a URI that any process can open."""
    root = storage.absolute(tables.table_uri(storage_uri, "pairs", name))
    encoded = rows["shard"].combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    absolute = pa.DictionaryArray.from_arrays(
        encoded.indices, pa.array([storage.join(root, shard) for shard in encoded.dictionary.to_pylist()], pa.string())
    )
    return rows.set_column(rows.schema.get_field_index("shard"), "shard", absolute)
