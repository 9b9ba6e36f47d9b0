"""The training stream of image-text pairs for a table whose index is too large to be held.

The manifest says how many pairs each index file lists. The files are put into a random order, anew every epoch, and cut
into windows of about `buffer` pairs; the pairs of a window are shuffled. This has the effect of a shuffle buffer but no
state: the pair at a position is a pure function of seed and position, so a stream can start at any step.

    manifest --order of files--> windows --order of pairs--> positions --a few range reads a shard, decode--> raw pixels

Imports no torch, so that data tasks start fast and stay small.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
from PIL import Image

from data_prep import storage, tables
from data_prep.embeddings.crops import Fit
from data_prep.streams.images import ImageRow, read_all, read_image, read_rows
from data_prep.streams.object_store import SharedValue, get_shared, put_shared
from data_prep.streams.pair_loader import pair_table, squared
from data_prep.streams.plans import Integers, plan_epochs
from ovd_models.errors import InputError, as_input_error
from ovd_models.images import decode_image

RUN = 16
"""Neighbours in a shard that stay near each other in the stream, so that one read gets several of them."""
MIX = 1024
"""Positions among which the pairs of their runs are shuffled."""
GAP_BYTES = 64 << 10
"""Unneeded bytes that are read rather than skipped by a further request, which takes longer."""
SPAN_BYTES = 8 << 20
"""Maximum bytes of a read of several pairs."""
INDEX = pa.schema([tables.SCHEMAS["pairs"].field(name) for name in ("shard", "offset", "size", "caption")])
SIDES = pa.schema([tables.SCHEMAS["pairs"].field(name) for name in ("width", "height")])


@dataclass(frozen=True)
class Window:
    """Positions of a stream whose pairs are listed by the same few index files."""

    files: Integers
    """Numbers of the files, in the order in which their rows follow each other."""
    rows: Integers
    """Row in these files together, for each position."""
    places: Integers
    """Where these positions stand among those asked for."""


def plan_windows(seed: int, rows_F: Integers, buffer: int, positions: Integers) -> Iterator[Window]:
    """The windows of positions of an endless stream, in which every row of every file comes once an epoch.

    Args:
        seed: of the stream.
        rows_F: rows of each of F files, at least 1.
        buffer: rows of a window. It holds whole files, so it has up to a file more or less.
        positions: of the stream, in any order.
    """
    epoch_B, inside_B = np.divmod(positions, rows_F.sum())
    for epoch in np.unique(epoch_B).tolist():
        files_F = plan_epochs(seed, len(rows_F), np.arange(epoch * len(rows_F), (epoch + 1) * len(rows_F)))
        ends_F = np.cumsum(rows_F[files_F])
        starts_F = ends_F - rows_F[files_F]
        window_F = starts_F // buffer
        window_B = window_F[np.searchsorted(ends_F, inside_B, side="right")]
        for window in np.unique(window_B[epoch_B == epoch]).tolist():
            first, stop = np.searchsorted(window_F, [window, window + 1])
            places = np.flatnonzero((epoch_B == epoch) & (window_B == window))
            order = window_order(seed, epoch, window, int(ends_F[stop - 1] - starts_F[first]))
            yield Window(files_F[first:stop], order[inside_B[places] - starts_F[first]], places)


@functools.lru_cache(maxsize=2)
def window_order(seed: int, epoch: int, window: int, count: int) -> Integers:
    """Row at each position of a window: runs of rows in random order, and shuffled among their neighbours."""
    rng = np.random.default_rng([seed, epoch, 6, window])
    at = np.arange(count)
    rows = np.argsort(rng.permutation(-(-count // RUN))[at // RUN], kind="stable")
    return rows[np.lexsort((rng.random(count), at // MIX))]


def spans(shards: Sequence[str], offsets: Sequence[int], sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Consecutive images (start, stop) that are read as one range, as they lie close together in a shard."""
    start, stops = 0, [offset + size for offset, size in zip(offsets, sizes, strict=True)]
    for at in range(1, len(shards)):
        near = shards[at] == shards[at - 1] and 0 <= offsets[at] - stops[at - 1] <= GAP_BYTES
        if not near or stops[at] - offsets[start] > SPAN_BYTES:
            yield start, at
            start = at
    if len(shards):
        yield start, len(shards)


@functools.lru_cache(maxsize=2)
def _read_index(uris: tuple[str, ...], max_side: int | None) -> pa.Table:
    with as_input_error("index of pairs: cannot be read"):
        dataset = tables.open_parquet(uris, pa.unify_schemas([INDEX, SIDES]))
        return dataset.to_table(INDEX.names, filter=_fitting(max_side)).combine_chunks()


def _fitting(max_side: int | None) -> ds.Expression | None:
    return None if max_side is None else (ds.field("width") <= max_side) & (ds.field("height") <= max_side)


@dataclass(frozen=True)
class ShardLoader:
    """Image-text pairs at positions of a stream of shuffled shards, resized to a square; the columns of `PairLoader`.

    A pair that cannot be read is replaced by another one of its window.
    """

    files: SharedValue[pa.Table]
    """`path` of every index file, and the number `rows` of its pairs that fit."""
    root: str
    """Absolute URI of the table's folder."""
    seed: int
    buffer: int
    """Pairs of a window."""
    image_size: int
    """S, in pixels."""
    fit: Fit
    """How an image becomes a square."""
    max_side: int | None
    """Longest side of a pair that fits, in pixels."""

    def __call__(self, positions: Integers) -> pa.Table:
        """The rows at `positions`."""
        files = get_shared(self.files)
        windows = plan_windows(self.seed, files["rows"].to_numpy(), self.buffer, positions)
        read = [entry for window in windows for entry in self._read_window(files.take(window.files), window, positions)]
        return pair_table([row for _, row in sorted(read, key=lambda entry: entry[0])])

    def _read_window(self, files: pa.Table, window: Window, positions: Integers) -> list[tuple[int, ImageRow]]:
        """Place and image of each of a window's positions; bytes are read in their order, some ranges at a time."""
        uris = tuple(storage.join(self.root, path) for path in files["path"].to_pylist())
        index = _read_index(uris, self.max_side)
        expected = sum(files["rows"].to_pylist())
        if index.num_rows != expected:
            raise InputError(f"{uris[0]}: {index.num_rows} pairs in it and {len(uris) - 1} others, expected {expected}")
        by_row = np.argsort(window.rows)
        rows, places = window.rows[by_row], window.places[by_row]
        shards, offsets, sizes = (index[name].take(rows).to_pylist() for name in ("shard", "offset", "size"))

        def read_span(span: tuple[int, int]) -> list[tuple[int, ImageRow]]:
            start, stop = span
            read = self._open_span(shards[start], offsets[start], offsets[stop - 1] + sizes[stop - 1])
            chosen = places[start:stop]
            found = read_rows(index, rows[start:stop], positions[chosen], self.seed, read)
            return list(zip(chosen.tolist(), found, strict=True))

        return [entry for part in read_all(read_span, spans(shards, offsets, sizes)) for entry in part]

    def _open_span(self, shard: str, first: int, stop: int) -> Callable[[dict[str, Any]], Image.Image]:
        """Read bytes of a shard; returns a function from a row to its image."""
        try:
            content = storage.read_bytes(storage.join(self.root, shard), offset=first, size=stop - first)
        except OSError:
            content = b""  # each image is then tried alone, which names those that cannot be read

        def read(row: dict[str, Any]) -> Image.Image:
            uri, start = storage.join(self.root, row["shard"]), row["offset"] - first
            if row["shard"] == shard and start >= 0 and start + row["size"] <= len(content):
                image = decode_image(content[start : start + row["size"]], f"{uri}@{row['offset']}")
            else:
                image = read_image(uri, offset=row["offset"], size=row["size"])
            return squared(image, self.image_size, self.fit)

        return read


def shard_loader(
    storage_uri: str, name: str, *, seed: int, buffer: int, image_size: int, fit: Fit, max_side: int | None
) -> ShardLoader:
    """All pairs of a table whose longer side is at most `max_side` pixels (of any size if None).

    With `max_side` the sides of all pairs are read once, to count those that fit; without it only the manifest is read.

    Raises:
        InputError: the table is missing, or no pair fits.
    """
    manifest = tables.read_manifest(storage_uri, "pairs", name)
    root = storage.absolute(tables.table_uri(storage_uri, "pairs", name))
    rows = {entry.path: entry.rows for entry in manifest.files if entry.rows}  # only index files have rows
    if max_side is not None:
        rows = _count_fitting(root, list(rows), max_side)
    if not rows:
        raise InputError(f"pairs/{name}: no pair with sides up to {max_side} px")
    files = pa.table({"path": list(rows), "rows": pa.array(rows.values(), pa.int64())})
    return ShardLoader(put_shared(files), root, seed, buffer, image_size, fit, max_side)


def _count_fitting(root: str, paths: Sequence[str], max_side: int) -> dict[str, int]:
    """Pairs of each index file that fit, for the files that have any."""

    def count(path: str) -> int:
        with as_input_error("index of pairs: cannot be read"):
            rows: int = tables.open_parquet([storage.join(root, path)], SIDES).count_rows(filter=_fitting(max_side))
            return rows

    return {path: rows for path, rows in zip(paths, read_all(count, paths), strict=True) if rows}
