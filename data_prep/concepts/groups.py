"""Concept groups: the images that share a concept, sorted so that a sampled group is random rows of one range.

    with build_groups(mentions, min_images=2) as (concepts, groups):  # a table, and a stream of record batches

DuckDB sorts in bounded memory and spills the rest to disk.
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
"""Rows that are read together with one row of `groups`."""


@contextlib.contextmanager
def build_groups(
    mentions: ds.Dataset | pa.Table, *, min_images: int, memory: str = "1GB"
) -> Iterator[tuple[pa.Table, pa.RecordBatchReader]]:
    """The rows of `concepts`, and those of `groups` as a stream that is valid inside the block.

    Concepts are in alphabetical order with the range of their rows in groups, groups sorted by concept and image.

    Args:
        mentions: distinct kept images: the image columns of `groups`, and `names`, which its caption mentions, each
            once and in alphabetical order.
        min_images: concepts with fewer images are left out.
        memory: DuckDB's memory before it uses the disk.
    """
    with (
        tempfile.TemporaryDirectory(prefix="ovd-") as scratch,
        duckdb.connect(config={"memory_limit": memory, "temp_directory": scratch}) as sql,
    ):
        sql.register("mentions", mentions)
        concepts = (
            sql.sql(
                "select row_number() over names - 1 as concept_id, name, images as image_count, "
                "sum(images) over names - images as start, sum(images) over names as stop "
                "from (select name, count(*) as images from (select unnest(names) as name from mentions) group by all) "
                f"where images >= {max(1, min_images)} window names as (order by name) order by name"
            )
            .to_arrow_table()
            .cast(tables.SCHEMAS["concepts"])
        )
        scanned = mentions.scanner() if isinstance(mentions, ds.Dataset) else mentions
        schema = tables.SCHEMAS["groups"]
        memberships = pa.RecordBatchReader.from_batches(
            schema, (_memberships(batch, concepts["name"].combine_chunks()) for batch in scanned.to_batches())
        )
        sql.register("memberships", memberships)
        groups = sql.sql("select * from memberships order by concept_id, image_id").to_arrow_reader(BATCH_ROWS)
        yield concepts, groups


def _memberships(batch: pa.RecordBatch, concepts: pa.StringArray) -> pa.RecordBatch:
    """One row for each concept of each image."""
    lists = batch["names"]
    concept = pc.index_in(lists.flatten(), concepts)
    image = pc.list_parent_indices(lists).filter(concept.is_valid())
    concept = concept.drop_null()
    counts = np.bincount(image.to_numpy(), minlength=len(batch))
    offsets = pa.array(np.r_[0, np.cumsum(counts)], pa.int32())
    # An image's names are in alphabetical order, as concepts are: so its ids ascend.
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
    """The files of `concepts` and of `groups`."""

    concepts: list[tables.FileEntry]
    groups: list[tables.FileEntry]
    num_concepts: int


def write_groups(
    mentions: ds.Dataset, storage_uri: str, name: str, stem: str, *, min_images: int, memory: str
) -> WrittenGroups:
    """Write the files (`<stem>-<number>`) of what `build_groups` yields, without publishing them."""
    with build_groups(mentions, min_images=min_images, memory=memory) as (concepts, groups):
        concept_file = tables.write_part(storage_uri, "concepts", name, f"{stem}-00000.parquet", concepts)
        group_files = [
            tables.write_part(storage_uri, "groups", name, f"{stem}-{number:05d}.parquet", rows, ROW_GROUP_ROWS)
            for number, rows in enumerate(_as_tables(groups, FILE_ROWS))
        ]
    return WrittenGroups(concepts=[concept_file], groups=group_files, num_concepts=concepts.num_rows)


def _as_tables(batches: pa.RecordBatchReader, rows: int) -> Iterator[pa.Table]:
    """Regroup a stream into tables of `rows` rows, the last one shorter; an empty stream gives one empty table."""
    waiting, first = batches.schema.empty_table(), True
    for batch in batches:
        waiting = pa.concat_tables([waiting, pa.Table.from_batches([batch])])
        while waiting.num_rows >= rows:
            yield waiting.slice(0, rows)
            waiting, first = waiting.slice(rows), False
    if waiting.num_rows or first:
        yield waiting
