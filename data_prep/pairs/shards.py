"""Write the partitions of a crawl as WebDataset shards with their index, rejects, scores and statistics.

Each partition becomes one shard (several if it is large) with deterministic names and bytes.
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
from PIL import Image

from data_prep import storage, tables
from data_prep.concepts.names import Extractor
from data_prep.pairs.rows import EMBEDDING, LABEL, SCORE, STATUS, RowNumbering, append_columns, fill_nulls
from data_prep.pairs.staging import Staging

BLOCK = tarfile.BLOCKSIZE
GROUP_COLUMNS = ["image_id", "shard", "offset", "size", "width", "height", "caption"]
MENTIONS = pa.schema([*(tables.SCHEMAS["pairs"].field(name) for name in GROUP_COLUMNS)]).append(
    pa.field("names", pa.list_(pa.string()))
)
"""The input of concept groups: kept images and the `names` that their captions mention."""
SAMPLES = pa.schema(
    {
        "reason": pa.string(),
        "url": pa.string(),
        "raw_caption": pa.string(),
        "detail": pa.string(),
        "picture": pa.binary(),
    }
)
"""Examples of rejected rows; `picture` is a small JPEG, null if the image was not decoded."""
SAMPLE_SIDE = 128


@dataclass(frozen=True, kw_only=True)
class PartitionJob:
    """What all partitions of a run share."""

    storage: str
    name: str
    """Name of the tables."""
    staging: Staging
    order: RowNumbering
    max_bytes: int
    """Maximum bytes of a shard; a larger partition is continued in another one."""
    suffix: str = ""
    """Suffix of file names, so that a retried partition does not overwrite published files."""
    earlier_rejects: dict[str, str] = field(default_factory=dict)
    """Published `rejects` files of retried partitions; each is replaced by the partition's new one."""


@dataclass(frozen=True, kw_only=True)
class WrittenPartition:
    """The files written for one partition."""

    kept: int
    rejected: dict[str, int]
    """Rows by reason."""
    files: dict[tables.TableName, list[tables.FileEntry]]
    """By table: `pairs`, `rejects`, `scores`."""


@dataclass(frozen=True)
class PartitionPart:
    """What differs between the partitions of a run."""

    name: str
    decisions: pa.Table
    """The corpus-wide decisions about its rows (`dedup.DECISIONS`)."""
    with_samples: bool
    """Stage examples of its rejected rows."""


def write_partition(job: PartitionJob, extractor: Extractor, part: PartitionPart) -> WrittenPartition:
    """Write a partition's shards, index, rejects, scores and statistics in input order, unless that was done before.

    Also stages its concept mentions, which the extractor finds in captions.
    """
    partition = part.name
    done = storage.join(job.staging.uri, "written", f"{partition}.json")
    if storage.exists(done):
        raw = json.loads(storage.read_bytes(done))
        raw["files"] = tables.entries_from_json(raw["files"])
        return WrittenPartition(**raw)
    rows = with_decisions(read_partition(job, partition), part.decisions, job.order)
    is_kept = pc.is_null(rows["reason"])
    kept, rejected = rows.filter(is_kept), rows.filter(pc.invert(is_kept))
    assert not kept["size"].null_count, f"{partition}: a row is neither staged nor rejected"
    stem = f"{partition}{job.suffix}"
    files: dict[tables.TableName, list[tables.FileEntry]] = {
        "pairs": _write_pairs(job, kept, stem, _contents(job, partition, rows.num_rows, kept), extractor),
        "rejects": [],
        "scores": _write_scores(job, kept, stem),
    }
    rejects = _rejects(job, partition, rejected, rows["row"])
    if rejects.num_rows:
        files["rejects"].append(tables.write_part(job.storage, "rejects", job.name, f"{stem}.parquet", rejects))
    if part.with_samples and rejected.num_rows:
        contents = dict(_contents(job, partition, rows.num_rows, rejected))
        job.staging.write("samples", f"{stem}.parquet", _samples(rejected, contents))
    reasons = dict(sorted(Counter(rejected["reason"].to_pylist()).items()))
    stats = {"partition": partition, "rows": rows.num_rows, "kept": kept.num_rows, "rejected": reasons}
    stats["image_bytes"] = sum(kept["size"].to_pylist())
    content = json.dumps(stats, indent=1).encode()
    files["pairs"].append(tables.write_file(job.storage, "pairs", job.name, f"stats/{stem}.json", content))
    written = WrittenPartition(kept=kept.num_rows, rejected=reasons, files=files)
    storage.write_bytes(done, json.dumps(asdict(written)).encode())
    return written


def _contents(job: PartitionJob, partition: str, num_rows: int, chosen: pa.Table) -> Iterator[tuple[int, bytes]]:
    """Row number and image bytes of the chosen rows that have an image, in order; holds one part in memory."""
    numbers = chosen["row"].combine_chunks()
    for file in job.staging.open_parts(partition, num_rows):
        part = file.read(["row", "content"])
        found = pc.and_(pc.is_in(part["row"], numbers), pc.is_valid(part["content"]))
        for position in np.flatnonzero(found.to_numpy()).tolist():
            yield part["row"][position].as_py(), part["content"][position].as_py()


def _write_pairs(
    job: PartitionJob, kept: pa.Table, stem: str, contents: Iterator[tuple[int, bytes]], extractor: Extractor
) -> list[tables.FileEntry]:
    files, index = [], []
    for number, (start, stop) in enumerate(runs_of_size(_tar_bytes(kept), job.max_bytes - 2 * BLOCK)):
        rows, shard = kept.slice(start, stop - start), f"shards/{stem}{f'-{number}' if number else ''}.tar"
        keys = [f"{kept['source'][0].as_py()}-{row:010d}" for row in rows["row"].to_pylist()]
        images = (content for _, content in itertools.islice(contents, rows.num_rows))
        offsets: list[int] = []
        tar = tar_pieces(zip(keys, images, rows["caption"].to_pylist(), strict=True), offsets)
        files.append(tables.write_file(job.storage, "pairs", job.name, shard, tar))
        kinds = tables.SCHEMAS["pairs"]
        columns = {"shard": [shard] * len(keys), "key": keys, "offset": offsets}
        arrays = {name: pa.array(values, kinds.field(name).type) for name, values in columns.items()}
        index.append(append_columns(rows, arrays))
    if not index:
        return []
    pairs = pa.concat_tables(index).drop_columns(["duplicate_of", "id", *STATUS, *_model_columns(kept)])
    _stage_mentions(job, stem, pairs, extractor)
    return [*files, tables.write_part(job.storage, "pairs", job.name, f"index/{stem}.parquet", pairs)]


def _write_scores(job: PartitionJob, kept: pa.Table, stem: str) -> list[tables.FileEntry]:
    scores = {name.removeprefix(SCORE): kept[name] for name in _model_columns(kept)}
    if not scores or not kept.num_rows:
        return []
    rows = pa.table({"image_id": kept["image_id"], **scores})
    return [tables.write_part(job.storage, "scores", job.name, f"{stem}.parquet", rows)]


def decisions_between(decisions: pa.Table, start: int, stop: int) -> pa.Table:
    """A copy of some decisions: a slice would be sent with the whole table, `take` without one copy the whole table."""
    return decisions.slice(start, stop - start).take(np.arange(stop - start))


def with_decisions(rows: pa.Table, decisions: pa.Table, order: RowNumbering) -> pa.Table:
    """Apply corpus-wide decisions to rows, and append `duplicate_of` as source and row."""
    survivors = order.locate(decisions["duplicate_of"].combine_chunks())
    position = pc.index_in(rows["id"], decisions["id"].combine_chunks())
    rows = fill_nulls(rows, {name: decisions[name].take(position) for name in ("stage", "reason", "detail")})
    return rows.append_column("duplicate_of", pa.chunked_array([survivors]).take(position))


def read_partition(job: PartitionJob, partition: str) -> pa.Table:
    """All rows of a partition with their `id` and results, without images; skipped rows have no results."""
    listed = tables.read_parquet(job.staging.rows_uri(partition))
    parts = [
        file.read([name for name in file.schema_arrow.names if name != "content"])
        for file in job.staging.open_parts(partition, listed.num_rows)
    ]
    crawled = pa.concat_tables([listed.slice(0, 0), *parts], promote_options="default")
    skipped = listed.filter(pc.invert(pc.is_in(listed["row"], crawled["row"].combine_chunks())))
    rows = pa.concat_tables([crawled, skipped], promote_options="default")
    kinds = {**STATUS, "caption": pa.string(), "size": pa.int64()}
    missing = {name: pa.nulls(rows.num_rows, kind) for name, kind in kinds.items() if name not in rows.column_names}
    rows = append_columns(rows, missing).sort_by("row")
    ids = job.order.ids(rows["source"][0].as_py(), rows["row"].to_numpy())
    return rows.append_column("id", pa.array(ids))


def runs_of_size(sizes: Sequence[int], maximum: int) -> Iterator[tuple[int, int]]:
    """Consecutive runs (start, stop) of items whose sizes sum to at most `maximum`; a larger item is a run alone."""
    start, total = 0, 0
    for position, size in enumerate(sizes):
        if total + size > maximum and position > start:
            yield start, position
            start, total = position, 0
        total += size
    if sizes:
        yield start, len(sizes)


def _tar_bytes(rows: pa.Table) -> list[int]:
    """Bytes of each row in a tar: a header and whole blocks for the image and for the caption."""
    sizes = zip(rows["size"].to_pylist(), pc.binary_length(rows["caption"]).to_pylist(), strict=True)
    return [2 * BLOCK + sum(-(-size // BLOCK) * BLOCK for size in pair) for pair in sizes]


def _rejects(job: PartitionJob, partition: str, rejected: pa.Table, crawled: pa.ChunkedArray) -> pa.Table:
    """Rows of the `rejects` table, with the published ones of a retried partition that were not crawled again.

    The input's further columns stay, so that a row can be tried again.
    """
    images = {name for name in tables.SCHEMAS["pairs"].names if name not in ("source", "row", "url")}
    columns = [name for name in rejected.column_names if name not in images | {"id", *_model_columns(rejected)}]
    rejects = rejected.select(columns).append_column("caption", rejected["raw_caption"])
    if partition not in job.earlier_rejects:
        return rejects
    folder = tables.table_uri(job.storage, "rejects", job.name)
    earlier = tables.read_parquet(storage.join(folder, job.earlier_rejects[partition]))
    earlier = earlier.filter(pc.invert(pc.is_in(earlier["row"], crawled.combine_chunks())))
    return pa.concat_tables([rejects, earlier], promote_options="default").sort_by("row")


def _model_columns(rows: pa.Table) -> list[str]:
    """Columns of scores and embeddings."""
    return [name for name in rows.column_names if name.startswith(SCORE) or name == EMBEDDING]


def _samples(rejected: pa.Table, contents: Mapping[int, bytes]) -> pa.Table:
    """The first row of each reason, if possible one with an image."""
    samples: dict[str, dict[str, Any]] = {}
    for row in rejected.select(["reason", "row", "url", "raw_caption", "detail"]).to_pylist():
        sample = samples.get(row["reason"])
        if sample is None or (sample["row"] not in contents and row["row"] in contents):
            samples[row["reason"]] = row
    for row in samples.values():
        content = contents.get(row.pop("row"))
        row["picture"] = content and thumbnail(content)
    return pa.Table.from_pylist(list(samples.values()), schema=SAMPLES)


def thumbnail(content: bytes) -> bytes:
    """A small JPEG of a stored image."""
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(content)) as image:
        image.draft("RGB", (SAMPLE_SIDE, SAMPLE_SIDE))
        image.thumbnail((SAMPLE_SIDE, SAMPLE_SIDE))
        image.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def _stage_mentions(job: PartitionJob, stem: str, pairs: pa.Table, extractor: Extractor) -> None:
    if LABEL in pairs.column_names:
        found = [[label] for label in pairs[LABEL].to_pylist()]
    else:
        found = [extractor.match(caption) for caption in pairs["caption"].to_pylist()]
    names = pa.array(found, pa.list_(pa.string()))
    job.staging.write("mentions", f"{stem}.parquet", pairs.select(GROUP_COLUMNS).append_column("names", names))


def stage_published_mentions(job: PartitionJob, extractor: Extractor, index: str) -> None:
    """Stage the concept mentions of a published index file."""
    uri = storage.join(tables.table_uri(job.storage, "pairs", job.name), index)
    stem = f"published-{storage.sha256(index.encode())[:16]}"
    _stage_mentions(job, stem, tables.read_parquet(uri), extractor)


def pack(samples: Iterable[tuple[str, bytes, str]]) -> tuple[bytes, list[int]]:
    """Pack samples (key, JPEG bytes, caption) into a tar file of `key.jpg` and `key.txt` members.

    Returns its bytes, which depend on the samples alone, and the offset of each image: an image is one range read.
    """
    offsets: list[int] = []
    return b"".join(tar_pieces(samples, offsets)), offsets


def tar_pieces(samples: Iterable[tuple[str, bytes, str]], offsets: list[int]) -> Iterator[bytes]:
    """`pack` piece by piece; appends the offsets to a list."""
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
