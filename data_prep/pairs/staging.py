"""The staging folder of a run: input rows and results that survive a kill, so that the next run continues from them.

A partition is a run of consecutive rows of one list; it becomes one shard. A part is a run of rows of a partition, the
unit in which results are saved.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pyarrow import fs

from data_prep import storage, tables

ROWS_PER_GROUP = 100
"""Input rows that are read at a time."""


@dataclass(frozen=True)
class Part:
    """A run of rows of a partition."""

    partition: str
    number: int
    skipped: tuple[int, ...] = ()
    """Positions of rows that need no work."""
    rows: int = 0
    """Number of rows to work on."""

    @property
    def name(self) -> str:
        """The staged file with its results; once it is there, the part is done."""
        return f"{self.partition}-{self.number:05d}.parquet"


def partition_name(source: str, number: int) -> str:
    """The name of a partition, also used for the files made from it."""
    return f"{source}-{number:06d}"


@dataclass(frozen=True)
class Staging:
    """A staging folder, and the sizes of the partitions and parts in it."""

    uri: str
    partition_rows: int
    part_rows: int

    def rows_uri(self, partition: str) -> str:
        """The file of a partition's input rows."""
        return storage.join(self.uri, "rows", f"{partition}.parquet")

    def write_rows(self, partition: str, rows: pa.Table) -> None:
        """Write a partition's input rows."""
        storage.write_bytes(self.rows_uri(partition), tables.parquet_bytes(rows, row_group_size=ROWS_PER_GROUP))

    def read_part(self, part: Part) -> pa.Table:
        """The input rows of a part without the skipped ones."""
        uri = self.rows_uri(part.partition)
        filesystem, path = storage.resolve(uri)
        start = part.number * self.part_rows
        with storage.reading(uri), pq.ParquetFile(path, filesystem=filesystem) as file:
            stop = min(start + self.part_rows, file.metadata.num_rows)
            first, last = start // ROWS_PER_GROUP, (stop - 1) // ROWS_PER_GROUP
            groups = file.read_row_groups(range(first, last + 1))
        rows = groups.slice(start - first * ROWS_PER_GROUP, stop - start)
        return rows.filter(pa.array(~np.isin(np.arange(rows.num_rows), part.skipped))) if part.skipped else rows

    def write_part(self, rows: pa.Table, part: Part) -> None:
        """Write a part's results, unless it has no rows."""
        if rows.num_rows:
            self.write("parts", part.name, rows)

    def read_verdicts(self, part: Part) -> pa.Table | None:
        """The columns `stage` and `reason` of a part's results, if they are saved."""
        uri = storage.join(self.uri, "parts", part.name)
        return tables.read_parquet(uri, ["stage", "reason"]) if storage.exists(uri) else None

    def write_early(self, rows: pa.Table, part: Part) -> None:
        """Write those results of a part that do not wait for its slow rows; only `read_early` reads them."""
        self.write("early", part.name, rows)

    def read_early(self, part: Part) -> pa.Table | None:
        """The early results of a part, if a killed run or process saved some."""
        uri = storage.join(self.uri, "early", part.name)
        return tables.read_parquet(uri) if storage.exists(uri) else None

    def write(self, kind: str, name: str, rows: pa.Table) -> None:
        """Write a Parquet file of a kind (a subfolder), completely or not at all."""
        compression = {column: "none" if column == "content" else "lz4" for column in rows.column_names}  # JPEG files
        storage.write_bytes(storage.join(self.uri, kind, name), tables.parquet_bytes(rows, compression))

    def files(self, kind: str) -> list[str]:
        """URIs of the Parquet files of a kind, sorted."""
        return storage.list_files(storage.join(self.uri, kind), "parquet")

    def open(self, kind: str, schema: pa.Schema) -> ds.Dataset:
        """The given columns of all rows of a kind."""
        return tables.open_parquet(self.files(kind), schema)

    def open_parts(self, partition: str, num_rows: int) -> Iterator[pq.ParquetFile]:
        """The results of the parts of a partition, in the order of the input; parts without rows have no file."""
        parts = storage.join(self.uri, "parts")
        filesystem, folder = storage.resolve(parts)
        names = [f"{folder}/{Part(partition, number).name}" for number in range(-(-num_rows // self.part_rows))]
        for info in filesystem.get_file_info(names):
            if info.type == fs.FileType.File:
                uri = storage.join(parts, info.base_name)
                with storage.reading(uri), pq.ParquetFile(info.path, filesystem=filesystem) as file:
                    yield file
