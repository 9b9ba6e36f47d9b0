"""The order of all rows of a corpus: the first of equal rows survives deduplication."""

import itertools
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

NEW = 1 << 50
"""Added to the ids of new rows, so that they come after all published ones."""


@dataclass(frozen=True)
class RowNumbering:
    """Numbers the rows of all sources: the source's base plus the row number."""

    bases: dict[str, int]

    @classmethod
    def of(cls, rows: dict[str, int]) -> Self:
        """Order sources by digest, given the number of rows of each."""
        digests = sorted(rows)
        starts = itertools.accumulate((rows[digest] for digest in digests), initial=0)
        return cls(dict(zip(digests, starts, strict=False)))

    def ids(self, source: str, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Ids of new rows of a source."""
        return rows + (self.bases[source] + NEW)

    def locate(self, ids: pa.Array) -> pa.StructArray:
        """`{source, row}` of ids, published or not; null for null."""
        digests, starts = list(self.bases), np.array(list(self.bases.values()), np.int64)
        known = ids.is_valid().to_numpy(zero_copy_only=False)
        plain = ids.fill_null(0).to_numpy(zero_copy_only=False) % NEW
        # A source without rows starts where the next one does: the last of these is meant.
        source = np.searchsorted(starts, plain, side="right") - 1
        return pa.StructArray.from_arrays(
            [pa.array(digests, pa.string()).take(pa.array(source)), pa.array(plain - starts[source], pa.int64())],
            fields=[pa.field("source", pa.string()), pa.field("row", pa.int64())],
            mask=pa.array(~known),
        )
