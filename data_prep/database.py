"""DuckDB over Parquet files, in bounded memory."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import duckdb
import pyarrow as pa
import pyarrow.dataset as ds

from data_prep.parts import ahead

FILES_AHEAD = 8
"""Files that `stream` reads at a time."""


def open_database(memory: str, folder: str, *, threads: int | None = None) -> duckdb.DuckDBPyConnection:
    """An empty database that uses at most `memory`, then files in the folder; `threads` is by default all cores."""
    sql = duckdb.connect(config={"memory_limit": memory, "temp_directory": folder, "preserve_insertion_order": False})
    sql.execute("set enable_progress_bar = false")
    if threads:
        sql.execute(f"set threads = {threads}")
    return sql


def stream(rows: ds.Dataset | pa.Table, columns: Sequence[str]) -> pa.RecordBatchReader:
    """Columns of all rows, batch by batch. Holds `FILES_AHEAD` files in memory; Arrow's own scan holds up to a GiB."""
    if isinstance(rows, pa.Table):
        return rows.select(list(columns)).to_reader()

    def batches() -> Iterator[pa.RecordBatch]:
        read = (partial(part.to_table, schema=rows.schema, columns=list(columns)) for part in rows.get_fragments())
        with ThreadPoolExecutor(FILES_AHEAD) as threads:
            for table in ahead(read, threads, FILES_AHEAD):
                yield from table.to_batches()

    schema = pa.schema([rows.schema.field(name) for name in columns])
    return pa.RecordBatchReader.from_batches(schema, batches())
