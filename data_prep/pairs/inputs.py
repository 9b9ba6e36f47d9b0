"""The lists that come in: files of URLs and captions, read in a stream and cut into partitions of rows.

    files = find_files("s3://bucket/lists/*.parquet")
    source = cut_file(files[0], columns=Columns(), staging=staging, partition=1000, part=100)

A partition is a run of consecutive rows of one file; it becomes one shard. A part is a run of rows of a partition, the
unit in which work is saved.
"""

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq
from pyarrow import fs

from data_prep import storage, tables
from ovd_models.errors import InputError

SUFFIXES = ("tsv", "csv", "jsonl", "parquet")
BLOCK_BYTES = 1 << 20
DIGEST_DIGITS = 16
SCORE = "score_"
"""Before a scorer's name in staged rows."""
EMBEDDING = "embedding"
"""Of the image by the model that finds duplicates by meaning: a unit row of little-endian float16, as bytes."""
OWN = ("source", "row", "url", "raw_caption")
"""Columns of our own that every row begins with."""
STAGED = (
    "id",
    "stage",
    "reason",
    "detail",
    "http_status",
    "attempts",
    "content",
    "duplicate_of",
    "contrast",
    EMBEDDING,
)
"""Columns that rows get on their way."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """What the columns of the lists are called."""

    url: str = "url"
    caption: str = "caption"
    header: tuple[str, ...] = ()
    """Names of all columns, for .tsv and .csv files without a header line."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One file of the input."""

    digest: str
    """First digits of its content's SHA-256; also each row's `source`."""
    rows: int
    rows_per_partition: int
    columns: dict[str, str]
    """Type of each further column of the input, by name."""

    @property
    def partitions(self) -> dict[str, int]:
        """Rows of its partitions by name, in order."""
        size = self.rows_per_partition
        starts = range(0, self.rows, size)
        return {partition_name(self.digest, start // size): min(size, self.rows - start) for start in starts}


@dataclass(frozen=True)
class Part:
    """A run of rows of a partition."""

    partition: str
    number: int
    left_out: tuple[int, ...] = ()
    """Positions of rows that there is nothing to do about."""

    @property
    def name(self) -> str:
        """The staged file that holds what came of it."""
        return f"{self.partition}-{self.number:05d}.parquet"


def partition_name(source: str, number: int) -> str:
    """The name of a partition, also of the files made from it."""
    return f"{source}-{number:06d}"


def find_files(uri: str) -> list[str]:
    """The lists behind a file name, a folder or a pattern such as `lists/*.parquet`, in alphabetical order.

    Raises:
        InputError: there is none, or a file has an unknown suffix.
    """
    if not uri:
        raise InputError(f"--urls: missing, expected a file, folder or pattern of {_expected()} files")
    filesystem, path = storage.resolve(uri)
    kind = filesystem.get_file_info(path).type
    if kind == fs.FileType.File:
        if _suffix(path) not in SUFFIXES:
            raise InputError(f"{uri}: unknown format, expected {_expected()}")
        return [uri]
    if kind == fs.FileType.Directory:
        folder, pattern = path, re.compile(re.escape(path) + r"/.*[^/]")
    elif re.search("[*?]", path):
        folder = re.split("[*?]", path)[0].rpartition("/")[0]
        pattern = re.compile(re.escape(path).replace(r"\*", "[^/]*").replace(r"\?", "[^/]"))
    else:
        raise InputError(f"{uri}: cannot be read, expected a URL list ({_expected()})")
    entries = filesystem.get_file_info(fs.FileSelector(folder, recursive=True, allow_not_found=True))
    found = sorted(
        entry.path
        for entry in entries
        if entry.type == fs.FileType.File
        and pattern.fullmatch(entry.path)
        and _suffix(entry.path) in SUFFIXES
        and not entry.base_name.startswith((".", "_"))
    )
    if not found:
        raise InputError(f"{uri}: cannot be read, expected a URL list ({_expected()})")
    if isinstance(filesystem, fs.LocalFileSystem):
        return found
    return [f"{uri.partition('://')[0]}://{quote(name)}" for name in found]


def _suffix(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _expected() -> str:
    return ", ".join(f".{suffix}" for suffix in SUFFIXES[:-1]) + f" or .{SUFFIXES[-1]}"


def file_digest(uri: str) -> str:
    """First digits of the SHA-256 of a file, read in a stream.

    Raises:
        InputError: it cannot be read.
    """
    filesystem, path = storage.resolve(uri)
    found = hashlib.sha256()
    try:
        with filesystem.open_input_stream(path) as stream:
            while block := stream.read(BLOCK_BYTES):
                found.update(block)
    except OSError as error:
        raise InputError(f"{uri}: cannot be read, expected a URL list ({one_line(error)})") from error
    return found.hexdigest()[:DIGEST_DIGITS]


def read_blocks(uri: str, columns: Columns) -> Iterator[pa.Table]:
    """The rows of a list, block after block.

    The columns of .tsv and .csv files are text; tabs separate those of the first, which know no quotes.

    Raises:
        InputError: the file is malformed.
    """
    filesystem, path = storage.resolve(uri)
    suffix = _suffix(path)
    try:
        match suffix:
            case "parquet":
                with pq.ParquetFile(path, filesystem=filesystem) as file:
                    for batch in file.iter_batches():
                        yield pa.Table.from_batches([batch])
            case "jsonl":
                yield from _read_json(filesystem, path, columns)
            case _:
                yield from _read_text(filesystem, path, suffix, columns)
    except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{uri}: not a {suffix} file that can be read ({one_line(error)})") from error


def _read_json(filesystem: fs.FileSystem, path: str, columns: Columns) -> Iterator[pa.Table]:
    """Two passes: the types of further columns follow from the whole file, not from its first lines."""
    schema = pa.schema({columns.url: pa.string(), columns.caption: pa.string()})
    named: set[str] = set()
    lines = 0
    for block in _whole_lines(filesystem, path):
        try:
            inferred = pyarrow.json.read_json(io.BytesIO(block)).schema
        except pa.ArrowInvalid as error:
            raise pa.ArrowInvalid(f"{error}, rows counted from line {lines + 1}") from error
        lines += block.count(b"\n")
        named.update(inferred.names)
        further = [_undated(entry) for entry in inferred if entry.name not in (columns.url, columns.caption)]
        schema = pa.unify_schemas([schema, pa.schema(further)], promote_options="permissive")
    schema = pa.schema([entry for entry in schema if entry.name in named])
    exact = pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="error")
    for block in _whole_lines(filesystem, path):
        yield pyarrow.json.read_json(io.BytesIO(block), parse_options=exact)


def _undated(field: pa.Field) -> pa.Field:
    """A field with text for dates: Arrow takes text for dates where a block holds nothing else."""
    kind = field.type
    if pa.types.is_timestamp(kind):
        kind = pa.string()
    elif pa.types.is_struct(kind):
        kind = pa.struct([_undated(entry) for entry in kind])
    elif pa.types.is_list(kind):
        kind = pa.list_(_undated(kind.value_field))
    return field.with_type(kind)


def _whole_lines(filesystem: fs.FileSystem, path: str) -> Iterator[bytes]:
    """A file in blocks that end with a line."""
    with filesystem.open_input_stream(path) as stream:
        rest = b""
        while block := stream.read(BLOCK_BYTES):
            lines, newline, rest = (rest + block).rpartition(b"\n")
            if newline:
                yield lines + newline
        if rest.strip():
            yield rest


def _read_text(filesystem: fs.FileSystem, path: str, suffix: str, columns: Columns) -> Iterator[pa.Table]:
    tabs = {"delimiter": "\t", "quote_char": False}
    plain = pyarrow.csv.ParseOptions(**(tabs if suffix == "tsv" else {"newlines_in_values": True}))
    names = list(columns.header) or None
    # Without threads, so that errors tell the row.
    reading = pyarrow.csv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES, column_names=names)
    with filesystem.open_input_stream(path) as stream:
        head = stream.read(BLOCK_BYTES).lstrip(b"\r\n").partition(b"\n")[0] + b"\n"
    if names is None:
        names = pyarrow.csv.read_csv(io.BytesIO(head), reading, plain).column_names
    text = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False)
    with filesystem.open_input_stream(path) as stream:
        for batch in pyarrow.csv.open_csv(stream, reading, plain, text):
            yield pa.Table.from_batches([batch])


def with_our_names(rows: pa.Table, columns: Columns, source: str, first: int, where: str) -> pa.Table:
    """Rows of an input under our column names.

    Args:
        rows: a block.
        columns: what its columns are called.
        source: digest of the file.
        first: number of the block's first row in the file.
        where: the file, for messages.

    Returns:
        `source`, `row`, `url` (null where missing or empty), `raw_caption` and the further columns of the input, with
        `input_` before those names that our tables use.

    Raises:
        InputError: a column is missing, or does not hold text.
    """
    found = ", ".join(rows.column_names) or "none"
    if len(set(rows.column_names)) < rows.num_columns:
        raise InputError(f"{where}: a column comes twice, expected each once among: {found}")
    texts = {}
    for column in (columns.url, columns.caption):
        if column not in rows.column_names:
            raise InputError(f"{where}: no column {column!r}, expected it among: {found}")
        try:
            texts[column] = rows[column].cast(pa.string())
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            kind = rows.schema.field(column).type
            raise InputError(f"{where}: column {column!r} holds {kind}, expected text") from error
        try:
            texts[column].validate(full=True)
        except pa.ArrowInvalid as error:
            raise InputError(f"{where}: column {column!r}: {one_line(error)}, expected UTF-8 text") from error
    urls = pc.utf8_trim_whitespace(texts[columns.url])
    ours: dict[str, Any] = {
        "source": pa.array([source], pa.string()).take(pa.array(np.zeros(rows.num_rows, np.int64))),
        "row": pa.array(np.arange(first, first + rows.num_rows)),
        "url": pc.if_else(pc.equal(urls, ""), None, urls),
        "raw_caption": texts[columns.caption],
    }
    taken = {*ours, *tables.SCHEMAS["pairs"].names, *STAGED}
    for column in rows.column_names:
        if column not in texts:
            name = column
            while name in taken or name.startswith(SCORE) or (name != column and name in rows.column_names):
                name = f"input_{name}"
            ours[name] = rows[column]
    return pa.table(ours)


def cut(
    uri: str, blocks: Iterable[pa.Table], columns: Columns, source: str, *, staging: str, partition: int, part: int
) -> Source:
    """Write a list's rows, under our names, as one Parquet file a partition with a row group a part.

    Args:
        uri: the list, for messages.
        blocks: its rows.
        columns: what its columns are called.
        source: its digest.
        staging: folder that is written to.
        partition: rows of a partition.
        part: rows of a part.

    Raises:
        InputError: the list is malformed or empty.
    """
    count, waiting = 0, pa.table({})
    kinds: dict[str, str] = {}

    def write(rows: pa.Table) -> None:
        number = rows["row"][0].as_py() // partition
        write_rows(staging, partition_name(source, number), rows, part)

    for block in blocks:
        named = with_our_names(block, columns, source, count, uri)
        count += named.num_rows
        further = [entry for entry in named.schema if entry.name not in OWN and not pa.types.is_null(entry.type)]
        kinds |= {entry.name: str(entry.type) for entry in further}
        waiting = pa.concat_tables([waiting, named]) if waiting.num_rows else named
        whole = waiting.num_rows // partition * partition
        for start in range(0, whole, partition):
            write(waiting.slice(start, partition))
        waiting = waiting.slice(whole)
    if waiting.num_rows:
        write(waiting)
    if not count:
        raise InputError(f"{uri}: holds no rows, expected at least one")
    return Source(digest=source, rows=count, rows_per_partition=partition, columns=kinds)


def cut_file(uri: str, *, columns: Columns, staging: str, partition: int, part: int) -> Source:
    """`cut` for a file, unless that was done before."""
    source = file_digest(uri)
    done = storage.join(staging, "sources", f"{source}.json")
    if storage.exists(done):
        return Source(**json.loads(storage.read_bytes(done)))
    found = cut(uri, read_blocks(uri, columns), columns, source, staging=staging, partition=partition, part=part)
    storage.write_bytes(done, json.dumps(asdict(found)).encode())
    return found


def rows_file(staging: str, partition: str) -> str:
    """The file that holds a partition's input rows."""
    return storage.join(staging, "rows", f"{partition}.parquet")


def write_rows(staging: str, partition: str, rows: pa.Table, part: int) -> None:
    """Stage the input rows of a partition with a row group a part."""
    storage.write_bytes(rows_file(staging, partition), tables.parquet_bytes(rows, row_group_size=part))


def read_part(part: Part, staging: str) -> pa.Table:
    """The input rows of a part, without those that are left out."""
    filesystem, path = storage.resolve(rows_file(staging, part.partition))
    with pq.ParquetFile(path, filesystem=filesystem) as file:
        rows = file.read_row_group(part.number)
    return rows.filter(pa.array(~np.isin(np.arange(rows.num_rows), part.left_out))) if part.left_out else rows


def one_line(error: Exception) -> str:
    """An error's message without line breaks."""
    return " ".join(str(error).split())
