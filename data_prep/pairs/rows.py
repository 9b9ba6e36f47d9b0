"""Rows on their way from a list to a table: the columns that the stages add, and how a stage rejects rows."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

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
RESERVED = ("id", *STATUS, "content", "duplicate_of", "contrast", EMBEDDING)
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

RejectionReason = Literal[
    "not_an_image", "truncated", "too_many_pixels", "animated",
    "too_small", "aspect", "blank", "caption_length", "caption_characters", "low_score",
]  # fmt: skip


class Rejection(NamedTuple):
    """Why a row is not kept."""

    reason: RejectionReason
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
