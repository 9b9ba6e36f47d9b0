"""Rows on their way from a list to a table: their order, the columns that stages add, and how stages reject rows."""

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.tables import DecodeReason, FilterReason

INPUT_COLUMNS = ("source", "row", "url", "raw_caption")
"""The first columns of every row, read from the list; the list's further columns follow."""
STATUS: dict[str, pa.DataType] = {
    "stage": pa.string(),
    "reason": pa.string(),
    "detail": pa.string(),
    "http_status": pa.int32(),
    "attempts": pa.int32(),
}
"""Columns about a row's fetch and rejection; `reason` is null for rows not rejected so far."""
SCORE = "score_"
"""Prefix of a scorer's column."""
EMBEDDING = "embedding"
"""The image's embedding for semantic deduplication: a unit row of little-endian float16, as bytes."""
LABEL = "label"
"""An image's class, if it has one; it is then the image's only concept."""
RESERVED = ("id", *STATUS, "content", "duplicate_of", "contrast", EMBEDDING, LABEL)
"""Columns that rows get before they are published, beside those of `pairs`."""
LIGHT = pa.schema(
    {
        "source": pa.string(),
        "row": pa.int64(),
        "reason": pa.string(),
        "image_id": pa.string(),
        "phash": pa.uint64(),
        "caption": pa.string(),
    }
)
"""Columns that corpus-wide deduplication reads."""

NEW = 1 << 50
"""Added to the ids of new rows, so that they come after all published ones."""


class Rejection(NamedTuple):
    """Why a row is not kept."""

    reason: DecodeReason | FilterReason
    detail: str


def append_columns(rows: pa.Table, columns: Mapping[str, pa.Array]) -> pa.Table:
    """Append columns by name."""
    for name, column in columns.items():
        rows = rows.append_column(name, column)
    return rows


def with_rejections(
    rows: pa.Table, stage: Literal["decode", "filter"], rejections: Sequence[Rejection | None]
) -> pa.Table:
    """Write a stage's rejections into `stage`, `reason` and `detail`; earlier values stay."""
    values = {
        "stage": [rejection and stage for rejection in rejections],
        "reason": [rejection and rejection.reason for rejection in rejections],
        "detail": [rejection and rejection.detail for rejection in rejections],
    }
    return fill_nulls(rows, {name: pa.array(column, pa.string()) for name, column in values.items()})


def fill_nulls(rows: pa.Table, columns: Mapping[str, pa.Array]) -> pa.Table:
    """Replace the nulls of columns by other values."""
    for name, column in columns.items():
        filled = pc.coalesce(rows[name], column)
        rows = rows.set_column(rows.schema.get_field_index(name), name, filled)
    return rows


@dataclass(frozen=True)
class RowNumbering:
    """Numbers the rows of all sources: the source's base plus the row number."""

    bases: dict[str, int]
    rows: int
    """Number of rows of all sources."""

    @classmethod
    def of(cls, rows: dict[str, int]) -> Self:
        """Order sources by digest, given the number of rows of each."""
        digests = sorted(rows)
        starts = itertools.accumulate((rows[digest] for digest in digests), initial=0)
        return cls(dict(zip(digests, starts, strict=False)), sum(rows.values()))

    @functools.cached_property
    def _starts(self) -> tuple[pa.Array, npt.NDArray[np.int64]]:
        """The sources and their bases, in order."""
        return pa.array(self.bases, pa.string()), np.array(list(self.bases.values()), np.int64)

    def ids(self, source: str, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Ids of new rows of a source."""
        return rows + (self.bases[source] + NEW)

    def number(self, batch: pa.RecordBatch) -> npt.NDArray[np.int64]:
        """The base plus the row number of rows with `source` and `row`, as published ones have it for an id."""
        known = pc.unique(batch["source"])  # few: an array of all sources would cost more than the rows of a batch
        bases = pa.array([self.bases[source] for source in known.to_pylist()], pa.int64())
        base = bases.take(pc.index_in(batch["source"], known))
        numbers: npt.NDArray[np.int64] = pc.add(base, batch["row"]).to_numpy(zero_copy_only=False)
        return numbers

    def locate(self, ids: pa.Array) -> pa.StructArray:
        """`{source, row}` of ids, published or not; null for null."""
        digests, starts = self._starts
        known = ids.is_valid().to_numpy(zero_copy_only=False)
        plain = ids.fill_null(0).to_numpy(zero_copy_only=False) % NEW
        # A source without rows starts where the next one does: the last of these is meant.
        source = np.searchsorted(starts, plain, side="right") - 1
        return pa.StructArray.from_arrays(
            [digests.take(pa.array(source)), pa.array(plain - starts[source], pa.int64())],
            fields=[pa.field("source", pa.string()), pa.field("row", pa.int64())],
            mask=pa.array(~known),
        )
