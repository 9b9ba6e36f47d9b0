"""Input lists: files of URLs and captions, or WebDataset shards, read in a stream and cut into partitions of rows.

files = find_lists("s3://bucket/lists/*.parquet")
source = cut_file(files[0], Columns(), Staging("s3://bucket/staging", partition_rows=1000, part_rows=100))
"""

import contextlib
import hashlib
import io
import json
import re
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO
from urllib.parse import quote

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from braceexpand import braceexpand
from pyarrow import fs

from data_prep import s3, storage, tables
from data_prep.pairs.labels import label_caption, name_classes
from data_prep.pairs.rows import INPUT_COLUMNS, LABEL, RESERVED, SCORE, STATUS
from data_prep.pairs.staging import Staging, partition_name
from data_prep.pairs.tars import PROBLEM, read_samples
from data_prep.pairs.text_lists import BOM, array_lines, read_delimited, read_json
from ovd_models.errors import InputError

LISTS = {"tsv", "csv", "txt", "jsonl", "json", "parquet"}
LOOSE = {"txt", "json"}
"""Suffixes that a pattern must name: a folder of lists may have other such files."""
COMPRESSIONS = {"gz": "gzip", "bz2": "bz2", "zst": "zstd", "lz4": "lz4", "br": "brotli"}
"""Suffixes behind those of text formats, and pyarrow's names of them."""
FORMATS = ".tsv, .csv, .txt, .jsonl, .json or .parquet, text also as .gz; for .tar shards: --shards"
SHARDS = {"tar"}
BLOCK_BYTES = 1 << 20
SHARD_BYTES = 4 << 20
"""Bytes of a shard that are read at a time."""
FILES_AT_A_TIME = 8
DIGEST_DIGITS = 16


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of the columns of the lists."""

    url: str = "url"
    caption: str = "caption"
    header: tuple[str, ...] = ()
    """Names of all columns of .tsv and .csv files without a header line."""
    label: str = ""
    """A column with each image's class, which is then its only concept; rows need no caption. Empty: captions have the
    concepts."""
    class_names: str = ""
    """File of the names of classes, if `label` holds ids: .json, or lines of an id, a tab and a name."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One input list."""

    digest: str
    """First digits of its SHA-256; also each row's `source`."""
    rows: int
    rows_per_partition: int
    columns: dict[str, str]
    """Types of its further columns, by name."""

    @property
    def partitions(self) -> dict[str, int]:
        """Number of rows of its partitions by name, in order."""
        size = self.rows_per_partition
        starts = range(0, self.rows, size)
        return {partition_name(self.digest, start // size): min(size, self.rows - start) for start in starts}


def find_lists(uri: str) -> list[str]:
    """The lists of a file name, a folder or a pattern such as `lists/*.parquet`, in alphabetical order.

    Raises:
        InputError: there are none, or a file has an unknown suffix.
    """
    if not uri:
        raise InputError(f"--urls: missing, expected a file, folder or pattern of URL lists ({FORMATS})")
    return _find_files(uri, LISTS, f"a URL list ({FORMATS})")


def find_shards(pattern: str) -> list[str]:
    """The .tar files of a pattern such as `s3://bucket/{00000..01242}.tar` or `shards/*.tar`, a file name or a folder.

    Braces are expanded as `webdataset` does, and each result may be what `find_lists` takes.

    Raises:
        InputError: there are none, braces do not match, or a shell command (`pipe:`) is given.
    """
    try:
        uris = list(braceexpand(pattern))
    except ValueError as error:
        raise InputError(f"--shards {pattern}: {one_line(error)}") from error
    if commands := [uri for uri in uris if uri.lower().startswith("pipe:")]:
        raise InputError(f"--shards {commands[0]}: a command, which is never run; expected a path or URI")
    with ThreadPoolExecutor(FILES_AT_A_TIME) as pool:
        found = pool.map(lambda uri: _find_files(uri, SHARDS, "an uncompressed .tar shard"), uris)
        return list(dict.fromkeys(file for files in found for file in files))


def _find_files(uri: str, suffixes: set[str], expected: str) -> list[str]:
    filesystem, path = storage.resolve(uri)
    kind = filesystem.get_file_info(path).type
    if kind == fs.FileType.File:
        if _suffix(path) not in suffixes:
            raise InputError(f"{uri}: unknown format, expected {expected}")
        return [uri]
    suffixes = suffixes if _suffix(path) in suffixes else suffixes - LOOSE
    if kind == fs.FileType.Directory:
        folder, pattern = path, re.compile(re.escape(path) + r"/.*[^/]")
    elif re.search("[*?]", path):
        folder = re.split("[*?]", path)[0].rpartition("/")[0]
        pattern = re.compile(re.escape(path).replace(r"\*", "[^/]*").replace(r"\?", "[^/]"))
    else:
        raise InputError(f"{uri}: cannot be read, expected {expected}")
    entries = filesystem.get_file_info(fs.FileSelector(folder, recursive=True, allow_not_found=True))
    paths = sorted(
        entry.path
        for entry in entries
        if entry.type == fs.FileType.File
        and pattern.fullmatch(entry.path)
        and _suffix(entry.path) in suffixes
        and not entry.base_name.startswith((".", "_"))
    )
    if not paths:
        raise InputError(f"{uri}: cannot be read, expected {expected}")
    if isinstance(filesystem, fs.LocalFileSystem):
        return paths
    options = storage.split_options(uri)[1]
    if uri.startswith(s3.SCHEME):  # whose keys are taken literally, where other URIs are decoded
        return [f"{s3.SCHEME}{path}{options}" for path in paths]
    return [f"{uri.partition('://')[0]}://{quote(path)}{options}" for path in paths]


def _suffix(name: str) -> str:
    """The suffix of a format, in front of that of a compression."""
    *_, inner, outer = f"..{storage.split_options(name)[0].lower()}".split(".")
    return inner if outer in COMPRESSIONS and inner in LISTS - {"parquet"} else outer


def file_digest(uri: str) -> str:
    """First digits of the SHA-256 of a file, read in a stream.

    Raises:
        InputError: it cannot be read.
    """
    filesystem, path = storage.resolve(uri)
    try:
        with filesystem.open_input_stream(path, buffer_size=SHARD_BYTES) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()[:DIGEST_DIGITS]
    except OSError as error:
        raise InputError(f"{uri}: cannot be read ({one_line(error)})") from error


def read_blocks(uri: str, columns: Columns) -> Iterator[pa.Table]:
    """Read a list block by block.

    All columns of .tsv and .csv files are text; .tsv files have no quoting; .txt files have an address on each line.
    Text formats may be compressed (`list.tsv.gz`). A line that cannot be read is a row with a `PROBLEM`. Rows of a
    shard: see `tars.read_samples`.

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
            case "jsonl" | "json":
                yield from _read_json_list(filesystem, path, columns)
            case "tar":
                yield from _read_shard(filesystem, path, uri, columns)
            case _:
                header = columns.header or ((columns.url,) if suffix == "txt" else ())
                with _open_text(filesystem, path) as stream:
                    yield from read_delimited(
                        stream, quoted=suffix == "csv", header=header, url=columns.url, block_bytes=BLOCK_BYTES
                    )
    except (pa.ArrowException, UnicodeDecodeError, OSError, msgspec.DecodeError, RecursionError) as error:
        raise InputError(f"{uri}: not a readable {suffix} file ({one_line(error)})") from error


def _read_shard(filesystem: fs.FileSystem, path: str, uri: str, columns: Columns) -> Iterator[pa.Table]:
    """A shard by way of a temporary .jsonl file, so that the types of its columns are inferred from all samples."""
    names = {"url": columns.url, "caption": columns.caption, "label": columns.label}
    with filesystem.open_input_file(path) as file, tempfile.TemporaryFile() as lines:
        stream = io.BufferedReader(file, SHARD_BYTES)
        for row in read_samples(stream, storage.absolute(uri), **names):
            lines.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")

        def rewind() -> contextlib.nullcontext[BinaryIO]:
            lines.seek(0)
            return contextlib.nullcontext(lines)

        yield from read_json(rewind, (columns.url, columns.caption), BLOCK_BYTES)


def _open_text(filesystem: fs.FileSystem, path: str) -> pa.NativeFile:
    return filesystem.open_input_stream(path, compression=COMPRESSIONS.get(path.lower().rpartition(".")[2]))


def _read_json_list(filesystem: fs.FileSystem, path: str, columns: Columns) -> Iterator[pa.Table]:
    texts = (columns.url, columns.caption)
    with _open_text(filesystem, path) as stream:
        head = stream.read(BLOCK_BYTES).removeprefix(BOM).lstrip()
        if head.startswith(b"["):
            try:
                content = array_lines(head + stream.read())
            except msgspec.DecodeError:
                if _suffix(path) == "json":
                    raise  # else a line that is an array, and no object
            else:
                yield from read_json(lambda: io.BytesIO(content), texts, BLOCK_BYTES)
                return
    yield from read_json(lambda: _open_text(filesystem, path), texts, BLOCK_BYTES)


def normalize_columns(rows: pa.Table, columns: Columns, source: str, first: int, uri: str) -> pa.Table:
    """Rename the columns of a block of a list, whose first row has the number `first`.

    Returns:
        `source`, `row`, `url` (null if missing or empty), `raw_caption`, the names of classes as `label` if
        `columns.label` is given, the rejection of samples with a `PROBLEM`, and the further columns of the list; those
        whose names our tables use get the prefix `input_`.

    Raises:
        InputError: a column is missing or repeated, or does not hold text, or a class has no name.
    """
    names = ", ".join(rows.column_names) or "none"
    if len(set(rows.column_names)) < rows.num_columns:
        raise InputError(f"{uri}: a column is repeated, expected each once among: {names}")
    texts = {}
    optional = (columns.caption,) if columns.label or _suffix(uri) == "txt" else ()
    for column in optional:
        if column not in rows.column_names:
            rows = rows.append_column(column, pa.nulls(rows.num_rows, pa.string()))
    for column in filter(None, (columns.url, columns.caption, columns.label)):
        if column not in rows.column_names:
            raise InputError(f"{uri}: no column {column!r}, expected it among: {names}")
        try:
            texts[column], rows = _as_text(rows, column)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            kind = rows.schema.field(column).type
            raise InputError(f"{uri}: column {column!r} holds {kind}, expected text") from error
    urls = pc.utf8_trim_whitespace(texts[columns.url])
    ours: dict[str, Any] = {
        "source": pa.array([source], pa.string()).take(pa.array(np.zeros(rows.num_rows, np.int64))),
        "row": pa.array(np.arange(first, first + rows.num_rows)),
        "url": pc.if_else(pc.equal(urls, ""), None, urls),
        "raw_caption": texts[columns.caption],
    }
    if columns.label:
        classes = texts[columns.label].to_pylist()
        labels = name_classes(classes, columns.class_names, uri, first, optional=PROBLEM in rows.column_names)
        captions = [label and label_caption(label) for label in labels]
        ours["raw_caption"] = pc.coalesce(texts[columns.caption], pa.array(captions, pa.string()))
        ours[LABEL] = pa.array(labels, pa.string())
    if PROBLEM in rows.column_names:
        detail = rows[PROBLEM].cast(pa.string())
        for name, value in (("stage", "input"), ("reason", "bad_row"), ("detail", detail)):
            ours[name] = pc.if_else(pc.is_valid(detail), value, pa.scalar(None, pa.string()))
        rows = rows.drop_columns(PROBLEM)
    taken = {*ours, *tables.SCHEMAS["pairs"].names, *RESERVED}
    for column in rows.column_names:
        if column not in texts:
            name = column
            while name in taken or name.startswith(SCORE) or (name != column and name in rows.column_names):
                name = f"input_{name}"
            ours[name] = rows[column]
    return pa.table(ours)


def _as_text(rows: pa.Table, column: str) -> tuple[pa.ChunkedArray, pa.Table]:
    """A column as text, null where pandas has NaN; rows whose bytes are not UTF-8 get a `PROBLEM`."""
    values = rows[column]
    if pa.types.is_floating(values.type):
        values = pc.if_else(pc.is_nan(values), pa.scalar(None, values.type), values)
    kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    try:
        text = values.cast(kind).cast(pa.string())
        text.validate(full=True)
        return text, rows
    except pa.ArrowInvalid:
        raw = values.cast(kind).cast(pa.binary()).to_pylist()
    decoded: list[str | None] = []
    problems = rows[PROBLEM].to_pylist() if PROBLEM in rows.column_names else [None] * rows.num_rows
    for number, content in enumerate(raw):
        try:
            decoded.append(None if content is None else content.decode())
        except UnicodeDecodeError:
            decoded.append(None)
            problems[number] = f"{column} is not UTF-8 text: {content[:60]!r}"
    rows = rows.drop_columns(PROBLEM) if PROBLEM in rows.column_names else rows
    return pa.chunked_array([pa.array(decoded, pa.string())]), rows.append_column(
        PROBLEM, pa.array(problems, pa.string())
    )


def cut_file(uri: str, columns: Columns, staging: Staging) -> Source:
    """Stage a list's rows, cut into partitions, unless that was done before; an empty list has none.

    Raises:
        InputError: the list is malformed.
    """
    source = file_digest(uri)
    done = storage.join(staging.uri, "sources", f"{source}.json")
    if storage.exists(done):
        return Source(**json.loads(storage.read_bytes(done)))
    size = staging.partition_rows
    count, faulty, problem, waiting = 0, 0, "", pa.table({})
    kinds: dict[str, str] = {}

    def write(rows: pa.Table) -> None:
        for start in range(0, rows.num_rows, size):
            partition = rows.slice(start, size)
            staging.write_rows(partition_name(source, partition["row"][0].as_py() // size), partition)

    for block in read_blocks(uri, columns):
        rows = normalize_columns(block, columns, source, count, uri)
        count += rows.num_rows
        if "detail" in rows.column_names:
            faulty += rows.num_rows - rows["detail"].null_count
            problem = problem or next(filter(None, rows["detail"].to_pylist()), "")
        further = [entry for entry in rows.schema if entry.name not in (*INPUT_COLUMNS, *STATUS)]
        kinds |= {entry.name: str(entry.type) for entry in further if not pa.types.is_null(entry.type)}
        waiting = pa.concat_tables([waiting, rows], promote_options="permissive") if waiting.num_rows else rows
        whole = waiting.num_rows // size * size
        write(waiting.slice(0, whole))
        waiting = waiting.slice(whole)
    write(waiting)
    if count == faulty and _suffix(uri) != "tar" and problem:
        raise InputError(f"{uri}: no row can be read, the first has {problem}")
    found = Source(digest=source, rows=count, rows_per_partition=size, columns=kinds)
    storage.write_bytes(done, json.dumps(asdict(found)).encode())
    return found


def one_line(error: Exception) -> str:
    """An error's message without line breaks."""
    return " ".join(str(error).split())
