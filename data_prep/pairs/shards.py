"""Rows on disk on their way to a table: staged parts that survive a kill, and the shards that go out.

Each partition of the input becomes one WebDataset shard (several if it is large) with deterministic names and bytes.
"""

import io
import itertools
import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from PIL import Image
from pyarrow import fs

from data_prep import storage, tables
from data_prep.concepts.names import Extractor
from data_prep.pairs import inputs
from data_prep.pairs.order import RowNumbering

BLOCK = tarfile.BLOCKSIZE
GROUP_COLUMNS = ["image_id", "shard", "offset", "size", "width", "height", "caption"]
STATUS: dict[str, pa.DataType] = {
    "stage": pa.string(),
    "reason": pa.string(),
    "detail": pa.string(),
    "http_status": pa.int32(),
    "attempts": pa.int32(),
}
"""Columns of staged rows that say what became of them, all null for none; `reason` is null for good rows."""
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
"""Columns of staged rows that decisions over the whole corpus look at."""
MENTIONS = pa.schema([*(tables.SCHEMAS["pairs"].field(name) for name in GROUP_COLUMNS)]).append(
    pa.field("names", pa.list_(pa.string()))
)
"""What concept groups are made of: kept images and what their captions mention."""
SAMPLES = pa.schema(
    {
        "reason": pa.string(),
        "url": pa.string(),
        "raw_caption": pa.string(),
        "detail": pa.string(),
        "picture": pa.binary(),
    }
)
"""Examples of rejected rows; `picture` is a small JPEG, null where nothing could be decoded."""
SAMPLE_SIDE = 128


# ------------------------------------------------------------------------------------------------- staged parts


def stage(rows: pa.Table, uri: str, *, plain: Sequence[str] = ()) -> None:
    """Write a Parquet file, whole or not at all; `plain` columns are compressed already."""
    compression = {name: "none" if name in plain else "lz4" for name in rows.column_names}
    storage.write_bytes(uri, tables.parquet_bytes(rows, compression))


def stage_part(rows: pa.Table, part: inputs.Part, staging: str) -> None:
    """Save what came of a part's rows, if it has any."""
    if rows.num_rows:
        stage(rows, storage.join(staging, "parts", part.name), plain=["content"])


def staged(staging: str, kind: str) -> list[str]:
    """URIs of the staged Parquet files of a kind, sorted."""
    uri = storage.join(staging, kind)
    filesystem, folder = storage.resolve(uri)
    found = filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True))
    return sorted(storage.join(uri, info.base_name) for info in found if info.extension == "parquet")


def open_staged(staging: str, kind: str, schema: pa.Schema) -> ds.Dataset:
    """The given columns of all staged rows of a kind."""
    return tables.open_parquet(staged(staging, kind), schema)


def open_parts(staging: str, partition: str, count: int) -> Iterator[pq.ParquetFile]:
    """The staged parts of a partition, in the order of the input; a part without rows was never staged."""
    filesystem, folder = storage.resolve(storage.join(staging, "parts"))
    names = [f"{folder}/{inputs.Part(partition, number).name}" for number in range(count)]
    for info in filesystem.get_file_info(names):
        if info.type == fs.FileType.File:
            with pq.ParquetFile(info.path, filesystem=filesystem) as file:
                yield file


def remove_folder(uri: str) -> None:
    """Delete a folder if it is there."""
    filesystem, folder = storage.resolve(uri)
    if storage.exists(uri):
        filesystem.delete_dir(folder)


# ------------------------------------------------------------------------------------------------------- shards


@dataclass(frozen=True, kw_only=True)
class PartitionJob:
    """What all partitions of a run share."""

    storage: str
    name: str
    """Of the tables."""
    staging: str
    order: RowNumbering
    part_rows: int
    """Rows of a part."""
    max_bytes: int
    """A shard that would grow beyond this is continued in another one."""
    suffix: str = ""
    """Of the names of files, where a partition was written before."""
    earlier_rejects: dict[str, str] = field(default_factory=dict)
    """The file of `rejects` that a partition's new one takes the place of."""


@dataclass(frozen=True, kw_only=True)
class WrittenPartition:
    """What was written for one partition."""

    kept: int
    rejected: dict[str, int]
    """Rows by reason."""
    files: dict[str, list[tables.FileEntry]]
    """By table: `pairs`, `rejects`, `scores`."""


def write_shard(
    job: PartitionJob, partition: str, decisions: pa.Table, extractor: Extractor, samples: bool
) -> WrittenPartition:
    """Write a partition's tars, index, rejects and statistics, in the order of the input's rows, unless that was done.

    Also stages what the concept groups need of it, and examples of rejected rows for the report.

    Args:
        job: what all partitions share.
        partition: its name.
        decisions: what was decided about its rows for the whole corpus: `dedup.DECISIONS`.
        extractor: finds concepts in captions.
        samples: whether to stage examples.
    """
    done = storage.join(job.staging, "written", f"{partition}.json")
    if storage.exists(done):
        return _from_json(storage.read_bytes(done))
    rows = with_decisions(read_rows(job, partition), decisions, job.order)
    is_kept = pc.is_null(rows["reason"])
    kept, rejected = rows.filter(is_kept), rows.filter(pc.invert(is_kept))
    assert not kept["size"].null_count, f"{partition}: a row is neither staged nor rejected"
    stem = f"{partition}{job.suffix}"
    parts = -(-rows.num_rows // job.part_rows)
    files = {
        "pairs": _write_pairs(job, kept, stem, _contents(job, partition, parts, kept), extractor),
        "rejects": [],
        "scores": _write_scores(job, kept, stem),
    }
    rejects = _rejects(rejected, _earlier(job, partition, rows))
    if rejects.num_rows:
        files["rejects"].append(tables.write_part(job.storage, "rejects", job.name, f"{stem}.parquet", rejects))
    if samples and rejected.num_rows:
        pictures = dict(_contents(job, partition, parts, rejected))
        stage(_samples(rejected, pictures), storage.join(job.staging, "samples", f"{stem}.parquet"))
    reasons = dict(sorted(Counter(rejected["reason"].to_pylist()).items()))
    stats = {"partition": partition, "rows": rows.num_rows, "kept": kept.num_rows, "rejected": reasons}
    stats["image_bytes"] = sum(kept["size"].to_pylist())
    content = json.dumps(stats, indent=1).encode()
    files["pairs"].append(tables.write_file(job.storage, "pairs", job.name, f"stats/{stem}.json", content))
    written = WrittenPartition(kept=kept.num_rows, rejected=reasons, files=files)
    storage.write_bytes(done, json.dumps(asdict(written)).encode())
    return written


def _from_json(content: bytes) -> WrittenPartition:
    raw = json.loads(content)
    raw["files"] = tables.entries_from_json(raw["files"])
    return WrittenPartition(**raw)


def _contents(job: PartitionJob, partition: str, parts: int, rows: pa.Table) -> Iterator[tuple[int, bytes]]:
    """Row and picture of those of the rows that have one, in their order; a part's pictures are held at a time."""
    chosen = rows["row"].combine_chunks()
    for file in open_parts(job.staging, partition, parts):
        part = file.read(["row", "content"])
        found = pc.and_(pc.is_in(part["row"], chosen), pc.is_valid(part["content"]))
        for place in np.flatnonzero(found.to_numpy()).tolist():
            yield part["row"][place].as_py(), part["content"][place].as_py()


def _write_pairs(
    job: PartitionJob, kept: pa.Table, stem: str, contents: Iterator[tuple[int, bytes]], extractor: Extractor
) -> list[tables.FileEntry]:
    files, index = [], []
    for number, (start, stop) in enumerate(runs_of_size(_members(kept), job.max_bytes - 2 * BLOCK)):
        rows, shard = kept.slice(start, stop - start), f"shards/{stem}{f'-{number}' if number else ''}.tar"
        keys = [f"{kept['source'][0].as_py()}-{row:010d}" for row in rows["row"].to_pylist()]
        images = (content for _, content in itertools.islice(contents, rows.num_rows))
        offsets: list[int] = []
        tar = tar_pieces(zip(keys, images, rows["caption"].to_pylist(), strict=True), offsets)
        files.append(tables.write_pieces(job.storage, "pairs", job.name, shard, tar))
        index.append(_index(rows, shard, keys, offsets))
    if not index:
        return []
    pairs = pa.concat_tables(index)
    stage_mentions(job.staging, stem, pairs, extractor)
    return [*files, tables.write_part(job.storage, "pairs", job.name, f"index/{stem}.parquet", pairs)]


def _index(kept: pa.Table, shard: str, keys: Sequence[str], offsets: Sequence[int]) -> pa.Table:
    """Rows of the `pairs` table."""
    pairs = kept.drop_columns(["duplicate_of", "id", *STATUS, *_measured(kept)])
    for name, values in {"shard": [shard] * len(keys), "key": keys, "offset": offsets}.items():
        pairs = pairs.append_column(name, pa.array(values, tables.SCHEMAS["pairs"].field(name).type))
    return pairs


def _write_scores(job: PartitionJob, kept: pa.Table, stem: str) -> list[tables.FileEntry]:
    scores = {name.removeprefix(inputs.SCORE): kept[name] for name in _measured(kept)}
    if not scores or not kept.num_rows:
        return []
    rows = pa.table({"image_id": kept["image_id"], **scores})
    return [tables.write_part(job.storage, "scores", job.name, f"{stem}.parquet", rows)]


def _earlier(job: PartitionJob, partition: str, rows: pa.Table) -> pa.Table | None:
    """Published rejects of a partition that are not tried again."""
    if partition not in job.earlier_rejects:
        return None
    folder = tables.table_uri(job.storage, "rejects", job.name)
    rejects = tables.read_parquet(storage.join(folder, job.earlier_rejects[partition]))
    return rejects.filter(pc.invert(pc.is_in(rejects["row"], rows["row"].combine_chunks())))


def with_decisions(rows: pa.Table, decisions: pa.Table, order: RowNumbering) -> pa.Table:
    """Rows with what was decided about them for the whole corpus, and `duplicate_of` as source and row."""
    survivors = order.locate(decisions["duplicate_of"].combine_chunks())
    position = pc.index_in(rows["id"], decisions["id"].combine_chunks())
    for column in ("stage", "reason", "detail"):
        decided = decisions[column].take(position)
        rows = rows.set_column(rows.schema.get_field_index(column), column, pc.coalesce(rows[column], decided))
    return rows.append_column("duplicate_of", pa.chunked_array([survivors]).take(position))


def read_rows(job: PartitionJob, partition: str) -> pa.Table:
    """All rows of a partition with their `id` and what came of them so far, but their pictures.

    Rows that were not tried have no reason.
    """
    listed = tables.read_parquet(inputs.rows_file(job.staging, partition))
    parts = [
        file.read([name for name in file.schema_arrow.names if name != "content"])
        for file in open_parts(job.staging, partition, -(-listed.num_rows // job.part_rows))
    ]
    tried = pa.concat_tables([listed.slice(0, 0), *parts], promote_options="default")
    missing = listed.filter(pc.invert(pc.is_in(listed["row"], tried["row"].combine_chunks())))
    rows = pa.concat_tables([tried, missing], promote_options="default")
    for name, kind in {**STATUS, "caption": pa.string(), "size": pa.int64()}.items():
        if name not in rows.column_names:
            rows = rows.append_column(name, pa.nulls(rows.num_rows, kind))
    rows = rows.sort_by("row")
    ids = job.order.ids(rows["source"][0].as_py(), rows["row"].to_numpy())
    return rows.append_column("id", pa.array(ids))


def runs_of_size(sizes: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Consecutive runs of items whose sizes sum to at most `most`, as (start, stop); a larger item stands alone."""
    start, total = 0, 0
    for position, size in enumerate(sizes):
        if total + size > most and position > start:
            yield start, position
            start, total = position, 0
        total += size
    if sizes:
        yield start, len(sizes)


def _members(rows: pa.Table) -> list[int]:
    """Bytes that each row takes in a tar: a header and whole blocks for the image and for the caption."""
    sizes = zip(rows["size"].to_pylist(), pc.binary_length(rows["caption"]).to_pylist(), strict=True)
    return [2 * BLOCK + sum(-(-size // BLOCK) * BLOCK for size in pair) for pair in sizes]


def _rejects(rows: pa.Table, earlier: pa.Table | None) -> pa.Table:
    """Rows of the `rejects` table; the further columns of the input stay, so that a row can be tried again."""
    images = {name for name in tables.SCHEMAS["pairs"].names if name not in ("source", "row", "url")}
    own = [name for name in rows.column_names if name not in images | {"id", *_measured(rows)}]
    rejects = rows.select(own).append_column("caption", rows["raw_caption"])
    return (
        rejects if earlier is None else pa.concat_tables([rejects, earlier], promote_options="default").sort_by("row")
    )


def _measured(rows: pa.Table) -> list[str]:
    """Columns that models added."""
    return [name for name in rows.column_names if name.startswith(inputs.SCORE) or name == inputs.EMBEDDING]


def _samples(rejected: pa.Table, pictures: Mapping[int, bytes]) -> pa.Table:
    """The first row of each reason, with a small picture where the image could be decoded."""
    found: dict[str, dict[str, Any]] = {}
    for row in rejected.select(["reason", "row", "url", "raw_caption", "detail"]).to_pylist():
        best = found.get(row["reason"])
        if best is None or (best["row"] not in pictures and row["row"] in pictures):
            found[row["reason"]] = row
    for row in found.values():
        content = pictures.get(row.pop("row"))
        row["picture"] = content and thumbnail(content)
    return pa.Table.from_pylist(list(found.values()), schema=SAMPLES)


def thumbnail(content: bytes) -> bytes:
    """A small JPEG of a stored image."""
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(content)) as image:
        image.draft("RGB", (SAMPLE_SIDE, SAMPLE_SIDE))
        image.thumbnail((SAMPLE_SIDE, SAMPLE_SIDE))
        image.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def stage_mentions(staging: str, stem: str, pairs: pa.Table, extractor: Extractor) -> None:
    """Stage what concept groups need of a partition's pairs, with the `names` that each caption mentions."""
    names = pa.array([extractor.match(caption) for caption in pairs["caption"].to_pylist()], pa.list_(pa.string()))
    mentions = pairs.select(GROUP_COLUMNS).append_column("names", names)
    stage(mentions, storage.join(staging, "mentions", f"{stem}.parquet"))


def stage_published_mentions(job: PartitionJob, index: str, extractor: Extractor) -> None:
    """`stage_mentions` for an index file that is published already."""
    uri = storage.join(tables.table_uri(job.storage, "pairs", job.name), index)
    pairs = tables.read_parquet(uri, GROUP_COLUMNS)
    stage_mentions(job.staging, f"published-{storage.sha256(index.encode())[:16]}", pairs, extractor)


def pack(samples: Iterable[tuple[str, bytes, str]]) -> tuple[bytes, list[int]]:
    """A tar file of `key.jpg` and `key.txt` members.

    Args:
        samples: key, JPEG bytes and caption of each.

    Returns:
        The file's bytes, which depend on the samples alone, and for each sample the offset of its image's first
        byte, so that one range read of the shard gets the image.
    """
    offsets: list[int] = []
    return b"".join(tar_pieces(samples, offsets)), offsets


def tar_pieces(samples: Iterable[tuple[str, bytes, str]], offsets: list[int]) -> Iterator[bytes]:
    """`pack` piece by piece; the offsets are appended to a list as it goes."""
    position = 0
    for key, image, caption in samples:
        offsets.append(position + BLOCK)
        for name, content in ((f"{key}.jpg", image), (f"{key}.txt", caption.encode())):
            member = tarfile.TarInfo(name)  # owner 0 and time 0 by default
            member.size, member.mode = len(content), 0o644
            padding = bytes(-len(content) % BLOCK)
            yield from (member.tobuf(tarfile.USTAR_FORMAT), content, padding)
            position += BLOCK + len(content) + len(padding)
    yield bytes(2 * BLOCK)
