"""Every table on disk: its schema with units, and how it is published and read.

A table is the folder `<storage>/<table>/<name>/`: Parquet files (zstd) and, written last, `manifest.json`. A folder
without a manifest is not a table, so readers never see an incomplete one. Published files never change.
"""

import difflib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pyarrow import fs

from data_prep import storage
from ovd_models.errors import InputError

SCHEMA_VERSION = 1
FILES_AT_A_TIME = 8
"""Files of a table that are read at a time: an object store answers each request in tens of milliseconds."""
TableName = Literal[
    "pairs", "rejects", "scores", "concepts", "groups", "categories", "boxes", "regions", "embeddings", "features",
    "texts", "predictions",
]  # fmt: skip
RejectStage = Literal["input", "fetch", "decode", "filter", "dedup"]

FetchReason = Literal[
    "bad_url", "forbidden_address", "dns", "connect", "tls", "timeout", "http_status", "too_many_redirects",
    "too_large", "opt_out",
]  # fmt: skip
DecodeReason = Literal["not_an_image", "truncated", "too_many_pixels", "animated"]
FilterReason = Literal[
    "too_small", "aspect", "blank", "caption_length", "caption_characters", "caption_boilerplate", "low_score",
]  # fmt: skip
REASONS: dict[RejectStage, tuple[str, ...]] = {
    "input": ("bad_row",),
    "fetch": get_args(FetchReason),
    "decode": get_args(DecodeReason),
    "filter": get_args(FilterReason),
    "dedup": ("duplicate_url", "duplicate_bytes", "near_duplicate", "semantic_duplicate"),
}
"""Reasons for rejecting a row, by the stage that rejects it."""


def _schema(*columns: tuple[str, pa.DataType, str]) -> pa.Schema:
    return pa.schema([pa.field(name, kind, metadata={"doc": doc}) for name, kind, doc in columns])


_BOX = pa.list_(pa.float32())
_ROW_REFERENCE = pa.struct([("source", pa.string()), ("row", pa.int64())])

SCHEMAS: dict[TableName, pa.Schema] = {
    "pairs": _schema(
        ("image_id", pa.string(), "SHA-256 of the stored image bytes, hexadecimal"),
        ("source", pa.string(), "digest of the input file"),
        ("row", pa.int64(), "row in the input file, from 0"),
        ("url", pa.string(), "address of the image"),
        ("caption", pa.string(), "cleaned caption"),
        ("raw_caption", pa.string(), "caption before cleaning"),
        ("shard", pa.string(), "tar file, relative to the table's folder"),
        ("key", pa.string(), "WebDataset key of the sample"),
        ("offset", pa.int64(), "first byte of the image in the tar"),
        ("size", pa.int64(), "bytes of the image in the tar"),
        ("width", pa.int32(), "stored width in pixels"),
        ("height", pa.int32(), "stored height in pixels"),
        ("original_width", pa.int32(), "width before resizing, in pixels"),
        ("original_height", pa.int32(), "height before resizing, in pixels"),
        ("phash", pa.uint64(), "64-bit perceptual hash"),
    ),
    "rejects": _schema(
        ("source", pa.string(), "digest of the input file"),
        ("row", pa.int64(), "row in the input file, from 0"),
        ("url", pa.string(), "address of the image"),
        ("caption", pa.string(), "caption before cleaning"),
        ("stage", pa.string(), "input, fetch, decode, filter or dedup"),
        ("reason", pa.string(), "one of tables.REASONS[stage]"),
        ("detail", pa.string(), "explanation for a person"),
        ("http_status", pa.int32(), "last HTTP status, or null"),
        ("attempts", pa.int32(), "attempts made, each with its redirects"),
        ("duplicate_of", _ROW_REFERENCE, "the surviving row, for stage dedup"),
    ),
    "scores": _schema(("image_id", pa.string(), "SHA-256 of the stored image bytes, hexadecimal")),
    "concepts": _schema(
        ("concept_id", pa.int32(), "from 0, alphabetical"),
        ("name", pa.string(), "lemma or vocabulary name"),
        ("image_count", pa.int64(), "unique images"),
        ("start", pa.int64(), "first row of this concept in groups"),
        ("stop", pa.int64(), "row after its last one"),
    ),
    "groups": _schema(
        ("concept_id", pa.int32(), "sorted by this"),
        ("image_id", pa.string(), "SHA-256 of the stored image bytes, hexadecimal"),
        ("shard", pa.string(), "tar file, relative to the folder of the pairs table"),
        ("offset", pa.int64(), "first byte of the image in the tar"),
        ("size", pa.int64(), "bytes of the image in the tar"),
        ("width", pa.int32(), "pixels"),
        ("height", pa.int32(), "pixels"),
        ("caption", pa.string(), "cleaned caption"),
        ("concept_ids", pa.list_(pa.int32()), "all concepts of this image"),
    ),
    "categories": _schema(
        ("category_id", pa.int32(), "the annotation file's integer"),
        ("name", pa.string(), "name in plain words"),
        ("synonyms", pa.list_(pa.string()), "other names"),
        ("frequency", pa.string(), "f (frequent), c (common), r (rare), or empty"),
        ("split", pa.string(), "base, novel, or empty if it is not used"),
        ("image_count", pa.int64(), "images annotated with it"),
    ),
    "boxes": _schema(
        ("image_id", pa.string(), "SHA-256 of the image bytes, hexadecimal"),
        ("source_id", pa.int64(), "the annotation file's integer"),
        ("uri", pa.string(), "image file; relative ones are relative to the storage"),
        ("width", pa.int32(), "pixels"),
        ("height", pa.int32(), "pixels"),
        ("boxes", pa.list_(_BOX), "xyxy, pixels"),
        ("category_ids", pa.list_(pa.int32()), "one a box"),
        ("iscrowd", pa.list_(pa.bool_()), "one a box"),
        ("masks", pa.list_(pa.string()), "COCO RLE counts, one a box; empty without masks"),
        ("neg_category_ids", pa.list_(pa.int32()), "checked to be absent (LVIS)"),
        ("not_exhaustive_category_ids", pa.list_(pa.int32()), "not all instances are annotated (LVIS)"),
    ),
    "regions": _schema(
        ("image_id", pa.string(), "SHA-256 of the image bytes, hexadecimal"),
        ("boxes", pa.list_(_BOX), "xyxy, pixels"),
        ("scores", pa.list_(pa.float32()), "objectness"),
        ("file", pa.string(), "flat little-endian float16 array [N, D] of unit rows"),
        ("start", pa.int64(), "first row in the file"),
        ("count", pa.int64(), "rows"),
    ),
    "embeddings": _schema(
        ("image_id", pa.string(), "SHA-256 of the stored image bytes, hexadecimal"),
        ("file", pa.string(), "flat little-endian float16 array [N, D]: unit rows of the images"),
        ("text_file", pa.string(), "the same of their captions"),
        ("start", pa.int64(), "row in both files"),
        ("count", pa.int64(), "rows: 1"),
    ),
    "features": _schema(
        ("image_id", pa.string(), "SHA-256 of the image bytes, hexadecimal"),
        ("file", pa.string(), "flat little-endian float16 array [rows, C, h, h], relative to the table's folder"),
        ("row", pa.int64(), "row in the file"),
    ),
    "texts": _schema(
        ("name", pa.string(), "the embedded name"),
        ("prompt_set", pa.string(), "name of its prompt templates"),
        ("embedding", pa.list_(pa.float32()), "unit norm"),
    ),
    "predictions": _schema(
        ("image_id", pa.string(), "SHA-256 of the image bytes, hexadecimal"),
        ("source_id", pa.int64(), "that of the row in boxes"),
        ("boxes", pa.list_(_BOX), "xyxy, pixels; best first"),
        ("category_ids", pa.list_(pa.int32()), "one a box"),
        ("scores", pa.list_(pa.float32()), "in [0, 1]"),
        ("masks", pa.list_(pa.string()), "COCO RLE counts, one a box; an empty list without masks"),
        ("error", pa.string(), "why the image could not be read; empty if it was"),
    ),
}

PRODUCERS: dict[TableName, str] = {
    "pairs": "python workflows/prepare_pairs.py",
    "rejects": "python workflows/prepare_pairs.py",
    "concepts": "python workflows/prepare_pairs.py",
    "groups": "python workflows/prepare_pairs.py",
    "scores": "python workflows/prepare_pairs.py",
    "categories": "python workflows/prepare_boxes.py",
    "boxes": "python workflows/prepare_boxes.py",
    "regions": "python workflows/embed.py",
    "embeddings": "python workflows/embed.py",
    "features": "python workflows/ovsam.py",
    "texts": "python workflows/embed_texts.py",
    "predictions": "python workflows/evaluate.py",
}
"""The command that makes each table, for the message about a missing one."""


@dataclass(frozen=True)
class FileEntry:
    """One published file, its path relative to the table's folder."""

    path: str
    size: int
    rows: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The description of a table."""

    table: TableName
    name: str
    producer: str
    config_hash: str
    files: tuple[FileEntry, ...]
    details: Mapping[str, Any] = field(default_factory=dict)
    """What readers check or show: totals, teacher id, prompt set, crop settings."""
    schema_version: int = SCHEMA_VERSION

    @property
    def rows(self) -> int:
        """Rows of the table (tar shards count none)."""
        return sum(entry.rows for entry in self.files)

    @property
    def digest(self) -> str:
        """Digest of the content, 16 hexadecimal digits."""
        return storage.sha256("".join(entry.sha256 for entry in self.files).encode())[:16]


def table_uri(storage_uri: str, table: TableName, name: str) -> str:
    """`<storage>/<table>/<name>`."""
    return storage.join(storage_uri, table, name)


def write_part(
    storage_uri: str, table: TableName, name: str, path: str, rows: pa.Table, row_group_size: int | None = None
) -> FileEntry:
    """Write one Parquet file of a table, from any process; `publish` makes it part of the table.

    Columns of the schema come first, in its order; further columns follow unchanged. Small row groups suit tables
    whose rows are read at random.
    """
    schema = SCHEMAS[table]
    extra = [column for column in rows.column_names if column not in schema.names]
    fields = list(schema) + [rows.schema.field(column) for column in extra]
    ordered = rows.select([entry.name for entry in fields]).cast(pa.schema(fields))
    content = parquet_bytes(ordered, row_group_size=row_group_size)
    return write_file(storage_uri, table, name, path, content, rows=rows.num_rows)


def entries_from_json(raw: dict[TableName, list[dict[str, Any]]]) -> dict[TableName, list[FileEntry]]:
    """Parse the files of several tables from JSON."""
    return {table: [FileEntry(**entry) for entry in entries] for table, entries in raw.items()}


def parquet_bytes(
    rows: pa.Table, compression: str | dict[str, str] = "zstd", row_group_size: int | None = None
) -> bytes:
    """The bytes of a Parquet file."""
    buffer = io.BytesIO()
    pq.write_table(rows, buffer, compression=compression, row_group_size=row_group_size)
    return buffer.getvalue()


def read_parquet(uri: str, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of one Parquet file."""
    filesystem, path = storage.resolve(uri)
    with storage.reading(uri):
        return pq.read_table(path, columns=columns, filesystem=filesystem)


def read_files(uris: Sequence[str], columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """The rows of each of many Parquet files, `FILES_AT_A_TIME` of which are in memory."""
    with ThreadPoolExecutor(FILES_AT_A_TIME) as pool:
        for start in range(0, len(uris), FILES_AT_A_TIME):
            yield from pool.map(partial(read_parquet, columns=columns), uris[start : start + FILES_AT_A_TIME])


def open_parquet(uris: Sequence[str], schema: pa.Schema) -> ds.Dataset:
    """The given columns of Parquet files on one file system, read lazily; no file gives no row."""
    if not uris:
        return ds.dataset([], schema)
    filesystem, _ = storage.resolve(uris[0])
    paths = [storage.resolve(uri)[1] for uri in uris]
    return ds.dataset(paths, schema=schema, format="parquet", filesystem=filesystem)


def write_file(
    storage_uri: str, table: TableName, name: str, path: str, content: bytes | Iterable[bytes], *, rows: int = 0
) -> FileEntry:
    """Write one file of a table; readers see all of it or none. Chunks need not fit in memory together."""
    chunks = [content] if isinstance(content, bytes) else content
    size, digest = storage.write_chunks(storage.join(table_uri(storage_uri, table, name), path), chunks)
    return FileEntry(path, size, rows, digest)


def changed_settings(manifest: Manifest, settings: Mapping[str, object]) -> list[str]:
    """Names of the settings that differ from those recorded in a manifest's details; empty if it has none."""
    before = manifest.details.get("settings")
    now = json.loads(json.dumps(settings, default=str))
    return [] if before is None else sorted(name for name in {**before, **now} if before.get(name) != now.get(name))


def publish(
    storage_uri: str,
    table: TableName,
    name: str,
    files: Sequence[FileEntry],
    *,
    producer: str,
    config_hash: str,
    details: Mapping[str, Any] | None = None,
    others_write: bool = False,
) -> Manifest:
    """Write the manifest, which makes the table visible to readers.

    Temporary files that killed processes left in its folder are removed, unless `others_write` files of the table
    meanwhile.
    """
    if not others_write:
        storage.remove_temporary(table_uri(storage_uri, table, name))
    manifest = Manifest(
        table=table,
        name=name,
        producer=producer,
        config_hash=config_hash,
        files=tuple(sorted(files, key=lambda entry: entry.path)),
        details=dict(details or {}),
    )
    content = json.dumps(asdict(manifest), indent=1).encode()
    storage.write_bytes(storage.join(table_uri(storage_uri, table, name), "manifest.json"), content)
    return manifest


def find_manifest(storage_uri: str, table: TableName, name: str) -> Manifest | None:
    """The manifest of a published table, or None if there is no table.

    Raises:
        InputError: the manifest is unreadable or of another schema version.
    """
    uri = storage.join(table_uri(storage_uri, table, name), "manifest.json")
    if not storage.exists(uri):
        return None
    try:
        raw = json.loads(storage.read_bytes(uri))
        files = tuple(FileEntry(**entry) for entry in raw.pop("files"))
        manifest = Manifest(files=files, **raw)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{uri}: not a table manifest ({error})") from error
    if manifest.schema_version != SCHEMA_VERSION:
        raise InputError(
            f"{uri}: schema version {manifest.schema_version}, this program reads version {SCHEMA_VERSION}"
        )
    return manifest


def read_manifest(storage_uri: str, table: TableName, name: str) -> Manifest:
    """The manifest of a published table.

    Raises:
        InputError: there is no such table; the message says which command makes it, and which name is close.
    """
    manifest = find_manifest(storage_uri, table, name)
    if manifest is None:
        close = difflib.get_close_matches(name, list_tables(storage_uri, table), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise InputError(f"{table_uri(storage_uri, table, name)}: no such table; `{PRODUCERS[table]}` makes it{hint}")
    return manifest


def list_tables(storage_uri: str, table: TableName) -> list[str]:
    """The names of the published tables of a kind."""
    filesystem, path = storage.resolve(storage.join(storage_uri, table))
    names = [info.base_name for info in filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))]
    return [name for name in names if storage.exists(storage.join(storage_uri, table, name, "manifest.json"))]


def parquet_files(manifest: Manifest) -> list[str]:
    """Paths of the table's Parquet files, relative to its folder."""
    return [entry.path for entry in manifest.files if entry.path.endswith(".parquet")]


def category_table(boxes: str) -> str:
    """Name of the `categories` table of a `boxes` table: `photos` of `photos-train` and `photos-eval`."""
    return boxes.rsplit("-", 1)[0]


def read_table(storage_uri: str, table: TableName, name: str, columns: Iterable[str] | None = None) -> pa.Table:
    """All rows of a table, in published order.

    Raises:
        InputError: there is no such table.
    """
    manifest = read_manifest(storage_uri, table, name)
    root = table_uri(storage_uri, table, name)
    names = list(columns) if columns is not None else None
    parts = list(read_files([storage.join(root, path) for path in parquet_files(manifest)], names))
    if parts:
        return pa.concat_tables(parts, promote_options="default")
    schema = SCHEMAS[table]
    return (schema if names is None else pa.schema([schema.field(entry) for entry in names])).empty_table()


def read_parts(
    storage_uri: str, table: TableName, name: str, columns: Sequence[str] | None = None
) -> Iterator[pa.Table]:
    """The rows of a table, a file at a time, in published order; see `read_files`.

    Raises:
        InputError: there is no such table.
    """
    root = table_uri(storage_uri, table, name)
    paths = parquet_files(read_manifest(storage_uri, table, name))
    yield from read_files([storage.join(root, path) for path in paths], columns)
