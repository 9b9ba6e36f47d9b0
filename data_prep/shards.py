"""Rows on disk: the list that comes in, staged parts that survive a kill, and the shards that go out.

A partition is a run of consecutive input rows; each becomes one WebDataset tar with deterministic bytes.
"""

import io
import itertools
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq
from pyarrow import fs

from data_prep import storage, tables
from ovd_models.errors import InputError

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


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The rows to prepare: `source`, `row`, `url`, `raw_caption` and the input's further columns."""

    rows: pa.Table
    """Rows ascending; a missing or empty `url` is null."""
    digest: str
    """Of the input's content, also each row's `source`."""


def read_list(uri: str, url_column: str, caption_column: str) -> Listing:
    """The rows of a URL list: a .tsv (with header, unquoted), .csv (with header), .jsonl or .parquet file.

    Raises:
        InputError: it is missing, malformed or empty, or lacks a column.
    """
    if not uri:
        raise InputError("--urls: missing, expected a .tsv, .csv, .jsonl or .parquet file")
    try:
        content = storage.read_bytes(uri)
    except OSError as error:
        raise InputError(f"{uri}: cannot be read, expected a URL list ({one_line(error)})") from error
    suffix = uri.rpartition(".")[2].lower()
    text = {url_column: pa.string(), caption_column: pa.string()}
    convert = pyarrow.csv.ConvertOptions(column_types=text, strings_can_be_null=False)
    ordered = pyarrow.csv.ReadOptions(use_threads=False)  # only then do errors tell the row
    try:
        match suffix:
            case "tsv":
                plain = pyarrow.csv.ParseOptions(delimiter="\t", quote_char=False)
                rows = pyarrow.csv.read_csv(io.BytesIO(content), ordered, plain, convert)
            case "csv":
                rows = pyarrow.csv.read_csv(io.BytesIO(content), ordered, None, convert)
            case "jsonl":
                rows = pyarrow.json.read_json(io.BytesIO(content))
            case "parquet":
                rows = pq.read_table(io.BytesIO(content))
            case _:
                raise InputError(f"{uri}: unknown format, expected .tsv, .csv, .jsonl or .parquet")
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{uri}: not a {suffix} file that can be read ({one_line(error)})") from error
    return as_listing(rows, url_column, caption_column, storage.sha256(content)[:16], uri)


def as_listing(rows: pa.Table, url_column: str, caption_column: str, digest: str, where: str) -> Listing:
    """Rows of an input with our column names; its further columns follow, renamed where they clash with ours."""
    found = ", ".join(rows.column_names) or "none"
    columns: dict[str, Any] = {}
    for column in (url_column, caption_column):
        if column not in rows.column_names:
            raise InputError(f"{where}: no column {column!r}, expected it among: {found}")
        try:
            columns[column] = rows[column].cast(pa.string())
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            kind = rows.schema.field(column).type
            raise InputError(f"{where}: column {column!r} holds {kind}, expected text") from error
    if not rows.num_rows:
        raise InputError(f"{where}: holds no rows, expected at least one")
    urls = pc.utf8_trim_whitespace(columns[url_column])
    ours = {
        "source": pa.array([digest], pa.string()).take(pa.array(np.zeros(rows.num_rows, np.int64))),
        "row": pa.array(np.arange(rows.num_rows)),
        "url": pc.if_else(pc.equal(urls, ""), None, urls),
        "raw_caption": columns[caption_column],
    }
    taken = {*ours, *tables.SCHEMAS["pairs"].names, *STATUS, "content", "duplicate_of"}
    for column in rows.column_names:
        if column not in columns:
            ours[f"input_{column}" if column in taken else column] = rows[column]
    return Listing(rows=pa.table(ours), digest=digest)


def one_line(error: Exception) -> str:
    """An error's message without line breaks."""
    return " ".join(str(error).split())[:300]


def partitions(rows: pa.Table, size: int) -> Iterator[tuple[int, pa.Table]]:
    """Number and rows of each partition of `size` input rows, of which some may be absent; rows are ascending."""
    number = rows["row"].to_numpy() // size
    edges = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(number)]
    for start, stop in itertools.pairwise(edges):
        if stop > start:
            yield int(number[start]), rows.slice(start, stop - start)


def stage_part(rows: pa.Table, staging: str, size: int) -> pa.Table:
    """Save rows of one partition, whole or not at all, and return the light columns that progress needs."""
    first = rows["row"][0].as_py()
    buffer = io.BytesIO()
    pq.write_table(rows, buffer, compression="lz4")
    storage.write_bytes(storage.join(staging, f"{first // size:06d}-{first:010d}.parquet"), buffer.getvalue())
    return rows.select(["row", "reason"])


def read_staged(staging: str, columns: list[str] | None = None, *, partition: int | None = None) -> pa.Table:
    """All staged rows, or those of one partition, in the order of the input."""
    filesystem, folder = storage.resolve(staging)
    prefix = "" if partition is None else f"{partition:06d}-"
    found = filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True))
    names = sorted(info.path for info in found if info.base_name.startswith(prefix) and info.extension == "parquet")
    parts = [pq.read_table(name, columns=columns, filesystem=filesystem) for name in names]
    if not parts:
        kinds = {"source": pa.string(), "row": pa.int64(), "image_id": pa.string(), **STATUS}
        return pa.schema({name: kinds[name] for name in columns or kinds}).empty_table()
    return pa.concat_tables(parts, promote_options="default")


def remove_folder(uri: str) -> None:
    """Delete a folder if it is there."""
    filesystem, folder = storage.resolve(uri)
    if storage.exists(uri):
        filesystem.delete_dir(folder)


@dataclass(frozen=True, kw_only=True)
class Repeats:
    """Rows that repeat another one, each with `row` and `duplicate_of`."""

    urls: pa.Table
    """Rows whose URL came before, with the columns of the input."""
    images: pa.Table
    """Rows whose image bytes came before."""

    def between(self, first: pa.Scalar, last: pa.Scalar) -> "Repeats":
        """Those of the rows from `first` to `last`."""
        chosen = (pc.field("row") >= first) & (pc.field("row") <= last)
        return Repeats(urls=self.urls.filter(chosen), images=self.images.filter(chosen))


@dataclass(frozen=True, kw_only=True)
class Written:
    """What was written for one partition."""

    pairs: pa.Table
    """Of the kept rows, the columns that `groups` needs."""
    rejected: dict[str, int]
    """Rows by reason."""
    pairs_files: list[tables.FileEntry]
    rejects_files: list[tables.FileEntry]


def write_shard(storage_uri: str, name: str, staging: str, partition: int, repeats: Repeats) -> Written:
    """Write a partition's tar, index and rejects, in the order of the input's rows.

    Args:
        storage_uri: where the tables are.
        name: the tables' name.
        staging: folder of the staged parts.
        partition: its number.
        repeats: the partition's duplicates.
    """
    staged = read_staged(staging, partition=partition)
    repeated = pc.is_in(staged["row"], repeats.images["row"].combine_chunks())
    kept = staged.filter(pc.and_(pc.is_null(staged["reason"]), pc.invert(repeated)))
    light = pa.schema([tables.SCHEMAS["pairs"].field(column) for column in GROUP_COLUMNS]).empty_table()
    pairs_files, rejects_files = [], []
    if kept.num_rows:
        shard, stem = f"shards/{partition:05d}.tar", f"{partition:05d}"
        tar, pairs = _pack_rows(kept, shard)
        pairs_files.append(tables.write_file(storage_uri, "pairs", name, shard, tar))
        pairs_files.append(tables.write_part(storage_uri, "pairs", name, f"index/{stem}.parquet", pairs))
        light = pairs.select(GROUP_COLUMNS)
    rejects = _rejects(staged, repeats)
    if rejects.num_rows:
        path = f"{partition:05d}.parquet"
        rejects_files.append(tables.write_part(storage_uri, "rejects", name, path, rejects))
    return Written(
        pairs=light,
        rejected=dict(Counter(rejects["reason"].to_pylist())),
        pairs_files=pairs_files,
        rejects_files=rejects_files,
    )


def _pack_rows(kept: pa.Table, shard: str) -> tuple[bytes, pa.Table]:
    """The tar of these rows, and their rows of the index."""
    keys, images = [f"{row:09d}" for row in kept["row"].to_pylist()], kept["content"].to_pylist()
    tar, offsets = pack(zip(keys, images, kept["caption"].to_pylist(), strict=True))
    pairs = kept.drop_columns(["content", *STATUS])
    for name, values in {
        "shard": [shard] * len(keys),
        "key": keys,
        "offset": offsets,
        "size": [len(image) for image in images],
    }.items():
        pairs = pairs.append_column(name, pa.array(values, tables.SCHEMAS["pairs"].field(name).type))
    return tar, pairs


def _rejects(staged: pa.Table, repeats: Repeats) -> pa.Table:
    """The partition's rows of the `rejects` table, ascending."""
    names = ["source", "row", "url", "raw_caption", "duplicate_of"]
    parts = []
    if staged.num_rows:
        failed = staged.filter(pc.is_valid(staged["reason"]))
        parts.append(failed.select([*names[:-1], *STATUS]))
        position = pc.index_in(repeats.images["row"], staged["row"].combine_chunks())
        copies = staged.take(position).append_column("duplicate_of", repeats.images["duplicate_of"])
        parts.append(_labelled(copies.select([*names, "http_status", "attempts"]), "duplicate_bytes"))
    parts.append(_labelled(repeats.urls.select(names), "duplicate_url"))
    rejects = pa.concat_tables(parts, promote_options="default").rename_columns({"raw_caption": "caption"})
    schema = tables.SCHEMAS["rejects"]
    for name in schema.names:
        if name not in rejects.column_names:
            rejects = rejects.append_column(name, pa.nulls(rejects.num_rows, schema.field(name).type))
    return rejects.select(schema.names).cast(schema).sort_by("row")


def _labelled(rows: pa.Table, reason: str) -> pa.Table:
    for name, value in (("stage", "dedup"), ("reason", reason)):
        rows = rows.append_column(name, pa.array([value] * rows.num_rows, pa.string()))
    return rows


def pack(samples: Iterable[tuple[str, bytes, str]]) -> tuple[bytes, list[int]]:
    """A tar file of `key.jpg` and `key.txt` members.

    Args:
        samples: key, JPEG bytes and caption of each.

    Returns:
        The file's bytes, which depend on the samples alone, and for each sample the offset of its image's first
        byte, so that one range read of the shard gets the image.
    """
    buffer, offsets = io.BytesIO(), []
    for key, image, caption in samples:
        offsets.append(_add(buffer, f"{key}.jpg", image))
        _add(buffer, f"{key}.txt", caption.encode())
    buffer.write(bytes(2 * BLOCK))
    return buffer.getvalue(), offsets


def _add(buffer: io.BytesIO, name: str, content: bytes) -> int:
    member = tarfile.TarInfo(name)  # owner 0 and time 0 by default
    member.size, member.mode = len(content), 0o644
    buffer.write(member.tobuf(tarfile.USTAR_FORMAT))
    offset = buffer.tell()
    buffer.write(content)
    buffer.write(bytes(-len(content) % BLOCK))
    return offset
