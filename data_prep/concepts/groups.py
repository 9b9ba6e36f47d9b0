"""Concept groups: the images that share a concept, sorted so that a sampled group is random rows of one range.

    with build_groups(mentions, min_images=2) as (concepts, groups):  # a table, and a stream of record batches

DuckDB sorts in bounded memory and spills the rest to disk. `shuffle_groups` does the same with a cluster.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import ray

from data_prep import tables
from data_prep.database import open_database, stream
from data_prep.shuffles import PARTITION, map_files, shuffle

BATCH_ROWS = 1 << 16
FILE_ROWS = 1 << 18
ROW_GROUP_ROWS = 1 << 12
"""Rows that are read together with one row of `groups`."""
TASK_FILES = 100
"""Files of mentions that a task reads."""
COUNTS = "select name, count(*) as images from (select unnest(names) as name from mentions) group by all"
SORTED = "select * from memberships order by concept_id, image_id"


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
        open_database(memory, scratch) as sql,
    ):
        sql.register("mentions", stream(mentions, ["names"]))
        concepts = _concepts(sql, f"from ({COUNTS})", min_images)
        schema = tables.SCHEMAS["groups"]
        batches = stream(mentions, mentions.schema.names)
        memberships = pa.RecordBatchReader.from_batches(
            schema, (_memberships(batch, concepts["name"].combine_chunks()) for batch in batches)
        )
        sql.register("memberships", memberships)
        yield concepts, sql.sql(SORTED).to_arrow_reader(BATCH_ROWS)


def _concepts(sql: duckdb.DuckDBPyConnection, counts: str, min_images: int) -> pa.Table:
    """The rows of `concepts`, by the number of `images` of each `name`."""
    found = sql.sql(
        "select row_number() over names - 1 as concept_id, name, images as image_count, "
        "sum(images) over names - images as start, sum(images) over names as stop "
        f"{counts} where images >= {max(1, min_images)} window names as (order by name) order by name"
    )
    return found.to_arrow_table().cast(tables.SCHEMAS["concepts"])


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
        files = enumerate(_as_tables(groups, FILE_ROWS))
        group_files = [_write_file(storage_uri, name, stem, number, rows) for number, rows in files]
    return WrittenGroups(concepts=[concept_file], groups=group_files, num_concepts=concepts.num_rows)


def shuffle_groups(
    mentions: ds.Dataset, storage_uri: str, name: str, stem: str, *, min_images: int, memory: str
) -> WrittenGroups:
    """`write_groups` by a cluster, which sorts each file's rows apart: the same rows in the same order.

    Raises:
        ValueError: an image's id is not hexadecimal.
    """
    if not isinstance(mentions, ds.FileSystemDataset):  # there is no file
        return write_groups(mentions, storage_uri, name, stem, min_images=min_images, memory=memory)
    tasks = max(1, len(mentions.files) // TASK_FILES)
    with tempfile.TemporaryDirectory(prefix="ovd-") as scratch, open_database(memory, scratch) as sql:
        sql.execute("create table counts (name varchar, images bigint)")
        found = map_files({"": mentions}, _count_names, tasks=tasks)
        for counts in found.iter_batches(batch_size=None, batch_format="pyarrow"):
            sql.register("batch", counts)
            sql.execute("insert into counts select name, images from batch")
        total = "from (select name, sum(images)::bigint as images from counts group by all)"
        concepts = _concepts(sql, total, min_images)
    concept_file = tables.write_part(storage_uri, "concepts", name, f"{stem}-00000.parquet", concepts)
    partitions = -(-sum(concepts["image_count"].to_pylist()) // FILE_ROWS)
    group_files = []
    if partitions:
        rows = map_files({"": mentions}, partial(_partition, ray.put(concepts), FILE_ROWS), tasks=tasks)
        for entries in shuffle(rows, partial(_write_partition, storage_uri, name, stem, memory), partitions):
            group_files += [tables.FileEntry(**entry) for entry in entries.to_pylist()]
    else:
        group_files.append(_write_file(storage_uri, name, stem, 0, tables.SCHEMAS["groups"].empty_table()))
    group_files.sort(key=lambda entry: entry.path)
    return WrittenGroups(concepts=[concept_file], groups=group_files, num_concepts=concepts.num_rows)


def _count_names(_: str, mentions: ds.Dataset) -> Iterator[pa.Table]:
    """The number of images of each name in some files."""
    with open_database("1GB", "", threads=1) as sql:
        sql.register("mentions", stream(mentions, ["names"]))
        yield sql.sql(COUNTS).to_arrow_table()


def _partition(shared: "ray.ObjectRef[pa.Table]", file_rows: int, _: str, mentions: ds.Dataset) -> Iterator[pa.Table]:
    """The memberships of some files, each with the number of the file that will hold it.

    An image's place among those of its concept is estimated by its id, which is a digest: so the partitions are ranges
    of the order by concept and image, and of nearly equal size.
    """
    concepts = ray.get(shared)
    names = concepts["name"].combine_chunks()
    starts, counts = concepts["start"].to_numpy(), concepts["image_count"].to_numpy()
    for batch in stream(mentions, mentions.schema.names):
        rows = pa.Table.from_batches([_memberships(batch, names)])
        concept = rows["concept_id"].to_numpy()
        digits = "".join(pc.utf8_slice_codeunits(rows["image_id"], 0, 8).to_pylist())
        fraction = np.frombuffer(bytes.fromhex(digits), ">u4").astype(np.int64)
        place = starts[concept] + (counts[concept] * fraction >> 32)
        yield rows.append_column(PARTITION, pa.array(place // file_rows))


def _write_partition(storage_uri: str, name: str, stem: str, memory: str, rows: pa.Table) -> pa.Table:
    """Sort and write all rows of a partition; returns the entry of the file."""
    with tempfile.TemporaryDirectory(prefix="ovd-") as scratch, open_database(memory, scratch, threads=1) as sql:
        number = rows[PARTITION][0].as_py()
        sql.register("memberships", rows.drop_columns([PARTITION]))
        entry = _write_file(storage_uri, name, stem, number, sql.sql(SORTED).to_arrow_table())
    return pa.Table.from_pylist([asdict(entry)])


def _write_file(storage_uri: str, name: str, stem: str, number: int, rows: pa.Table) -> tables.FileEntry:
    return tables.write_part(storage_uri, "groups", name, f"{stem}-{number:05d}.parquet", rows, ROW_GROUP_ROWS)


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
