"""Concept groups: which images share a concept, sorted so that a group is random rows of one range.

    concepts, groups = build_groups(mentions, min_images=2)     # a table, and a stream of record batches

The sorting is DuckDB's: its memory is bounded, what does not fit goes to disk.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from data_prep import tables

BATCH_ROWS = 1 << 16
FILE_ROWS = 1 << 20
ROW_GROUP_ROWS = 1 << 12
"""What is read for one row of `groups`."""


@contextlib.contextmanager
def build_groups(
    mentions: ds.Dataset | pa.Table, *, min_images: int, memory: str = "1GB"
) -> Iterator[tuple[pa.Table, pa.RecordBatchReader]]:
    """The rows of `concepts`, and those of `groups` in a stream that lasts as long as the block.

    Args:
        mentions: kept images with the image columns of `groups` and `names`, what each caption mentions, each name
            once; images are distinct.
        min_images: concepts of fewer images are left out.
        memory: how much DuckDB may take before it uses the disk.

    Yields:
        Concepts in alphabetical order with the range of their rows in groups, and groups sorted by concept and image.
    """
    with (
        tempfile.TemporaryDirectory(prefix="ovd-") as scratch,
        duckdb.connect(config={"memory_limit": memory, "temp_directory": scratch}) as sql,
    ):
        sql.register("mentions", mentions)
        counted = sql.sql(
            "select name, count(*) as images from (select unnest(names) as name from mentions) "
            f"group by name having images >= {max(1, min_images)} order by name"
        ).to_arrow_table()
        concepts = _concepts(counted)
        scanned = mentions.scanner() if isinstance(mentions, ds.Dataset) else mentions
        schema = tables.SCHEMAS["groups"]
        memberships = pa.RecordBatchReader.from_batches(
            schema, (_memberships(batch, concepts["name"].combine_chunks()) for batch in scanned.to_batches())
        )
        sql.register("memberships", memberships)
        groups = sql.sql("select * from memberships order by concept_id, image_id").to_arrow_reader(BATCH_ROWS)
        yield concepts, groups


def _concepts(counted: pa.Table) -> pa.Table:
    count = counted["images"].to_numpy().astype(np.int64)
    stop = np.cumsum(count)
    return pa.table(
        [
            pa.array(np.arange(len(count)), pa.int32()),
            counted["name"],
            pa.array(count),
            pa.array(stop - count),
            pa.array(stop),
        ],
        schema=tables.SCHEMAS["concepts"],
    )


def _memberships(batch: pa.RecordBatch, concepts: pa.StringArray) -> pa.RecordBatch:
    """One row for each concept of each image."""
    lists = batch["names"]
    concept = pc.index_in(lists.flatten(), concepts)
    image = pc.list_parent_indices(lists).filter(concept.is_valid())
    concept = concept.drop_null()
    counts = np.bincount(image.to_numpy(), minlength=len(batch))
    offsets = pa.array(np.r_[0, np.cumsum(counts)], pa.int32())
    # Names are alphabetical in each image, and concepts too: so the ids of each image ascend.
    ids = pa.ListArray.from_arrays(offsets, concept)
    columns = {"concept_id": concept, "concept_ids": ids.take(image)}
    schema = tables.SCHEMAS["groups"]
    return pa.RecordBatch.from_arrays(
        [
            (columns[name] if name in columns else batch[name].take(image)).cast(schema.field(name).type)
            for name in schema.names
        ],
        schema=schema,
    )


@dataclass(frozen=True, kw_only=True)
class WrittenGroups:
    """What was written of concepts and groups."""

    concepts: list[tables.FileEntry]
    groups: list[tables.FileEntry]
    num_concepts: int


def write_groups(
    mentions: ds.Dataset, storage_uri: str, name: str, stem: str, *, min_images: int, memory: str
) -> WrittenGroups:
    """Write the files of `concepts` and of `groups` in a stream; they are published later.

    Args:
        mentions: as `build_groups`.
        storage_uri: the storage.
        name: of the tables.
        stem: of the names of files.
        min_images: as `build_groups`.
        memory: as `build_groups`.
    """
    with build_groups(mentions, min_images=min_images, memory=memory) as (concepts, groups):
        concept_file = tables.write_part(storage_uri, "concepts", name, f"{stem}-00000.parquet", concepts)
        group_files = [
            tables.write_part(storage_uri, "groups", name, f"{stem}-{number:05d}.parquet", rows, ROW_GROUP_ROWS)
            for number, rows in enumerate(in_tables(groups, FILE_ROWS))
        ]
    return WrittenGroups(concepts=[concept_file], groups=group_files, num_concepts=concepts.num_rows)


def in_tables(batches: pa.RecordBatchReader, rows: int) -> Iterator[pa.Table]:
    """A stream as tables of `rows` rows, the last one shorter; one empty table for an empty stream."""
    waiting, first = batches.schema.empty_table(), True
    for batch in batches:
        waiting = pa.concat_tables([waiting, pa.Table.from_batches([batch])])
        while waiting.num_rows >= rows:
            yield waiting.slice(0, rows)
            waiting, first = waiting.slice(rows), False
    if waiting.num_rows or first:
        yield waiting
