"""Lists in text formats, block by block; a line that cannot be read is a row with a `PROBLEM`, not the end of a list.

Blocks are parsed by Arrow. A block in which it finds a fault, or a quoted value of several lines, is parsed line by
line.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, BinaryIO

import msgspec
import pyarrow as pa
import pyarrow.csv
import pyarrow.json

from data_prep.pairs.tars import PROBLEM

MAX_LINES = 100
"""Lines of a quoted value; behind a quote that stays open for more, only its own line is lost."""
SHOWN = 60
"""Characters of a faulty line that its problem shows."""
BOM = b"\xef\xbb\xbf"
Opener = Callable[[], AbstractContextManager[BinaryIO]]


def whole_lines(file: BinaryIO, block_bytes: int) -> Iterator[bytes]:
    """A file in blocks of whole lines, without a byte-order mark."""
    rest, first = b"", True
    while block := file.read(block_bytes):
        if first:
            block, first = block.removeprefix(BOM), False
        lines, newline, rest = (rest + block).rpartition(b"\n")
        if newline:
            yield lines + newline
    if rest.strip():
        yield rest + b"\n"


def _shown(line: bytes) -> str:
    return repr(line[:SHOWN].decode(errors="replace"))


# -------------------------------------------------------------------------------------------------- .tsv, .csv and .txt


def read_delimited(
    file: BinaryIO, *, quoted: bool, header: Sequence[str], url: str, block_bytes: int
) -> Iterator[pa.Table]:
    """Text columns of a file with tabs, or commas and quotes, between its values.

    Args:
        file: its content.
        quoted: whether values are separated by commas and may have quotes; else tabs separate them.
        header: names of the columns; if empty, the first line has them.
        url: the column of addresses, by which a line within an open quote is known as a row of its own.
        block_bytes: bytes that are read at a time.
    """
    names, rest = list(header), b""
    for block in whole_lines(file, block_bytes):
        block = (rest + block).replace(b"\r\n", b"\n")
        rest = b""
        if not names:
            block = block.lstrip(b"\n")
            first, _, block = block.partition(b"\n")
            found = _split(first, quoted)
            if found is None:
                raise pa.ArrowInvalid(f"the line of names is not UTF-8 text: {_shown(first)}")
            names = [name.strip() for name in found] if first else []
        if not names or not block:
            continue
        if quoted and any(line.count(b'"') % 2 for line in block.split(b"\n")):
            rows, rest = _split_records(block, names, url)
            if rows:
                yield _table(rows, names)
        else:
            yield _parse_block(block, names, quoted)
    if rest:
        rows, left = _split_records(rest + b"\n" * MAX_LINES, names, url)
        assert not left.strip(), "a quote is given up after MAX_LINES"
        yield _table(rows, names)


def _split(line: bytes, quoted: bool) -> list[str] | None:
    """The values of a line; None if it is not UTF-8 text."""
    try:
        text = line.decode()
        return next(csv.reader([text], strict=True), []) if quoted else text.split("\t")
    except (UnicodeDecodeError, csv.Error):
        return None


def _parse_block(block: bytes, names: Sequence[str], quoted: bool) -> pa.Table:
    """Rows of lines that are one record each."""
    bad: list[tuple[int, str]] = []

    def skip(row: pyarrow.csv.InvalidRow) -> str:
        bad.append(
            (row.number - 1, f"{row.actual_columns} columns, expected {row.expected_columns}: {row.text[:SHOWN]!r}")
        )
        return "skip"

    # Without threads, so that faulty rows have a number.
    reading = pyarrow.csv.ReadOptions(use_threads=False, block_size=len(block) + 1, column_names=list(names))
    format_options: dict[str, Any] = {} if quoted else {"delimiter": "\t", "quote_char": False}
    parsing = pyarrow.csv.ParseOptions(**format_options, invalid_row_handler=skip)
    text = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False)
    try:
        rows = pyarrow.csv.read_csv(io.BytesIO(block), reading, parsing, text)
    except (pa.ArrowInvalid, UnicodeDecodeError):  # not UTF-8, or no row at all
        lines = [line for line in block.split(b"\n") if line]
        return _table([_row(line, _split(line, quoted), len(names)) for line in lines], names)
    if not bad:
        return rows
    places = dict(bad)
    count = rows.num_rows + len(bad)
    good, faulty = iter(range(rows.num_rows)), iter(range(rows.num_rows, count))
    order = [next(faulty if number in places else good) for number in range(count)]
    problems = pa.array([None] * rows.num_rows + list(places.values()), pa.string())
    empty = pa.table({name: pa.nulls(len(bad), pa.string()) for name in names})
    return pa.concat_tables([rows, empty]).append_column(PROBLEM, problems).take(pa.array(order, pa.int64()))


def _row(line: bytes, values: list[str] | None, columns: int) -> list[str] | str:
    """The values of a line, or its problem."""
    if values is None:
        return f"not UTF-8 text, or a quote within a value: {_shown(line)}"
    if len(values) != columns:
        return f"{len(values)} columns, expected {columns}: {_shown(line)}"
    return values


def _split_records(block: bytes, names: Sequence[str], url: str) -> tuple[list[list[str] | str], bytes]:
    """Rows of lines with quotes that stay open at their end, and the lines behind the last open one."""
    lines = block.removesuffix(b"\n").split(b"\n")
    place = names.index(url) if url in names else None
    rows: list[list[str] | str] = []
    number = 0
    while number < len(lines):
        line = lines[number]
        alone = _split(line, True)
        if line.count(b'"') % 2 == 0 or alone is not None:  # an inch mark within a value opens nothing
            if line:
                rows.append(_row(line, alone, len(names)))
            number += 1
            continue
        stop = number + 1
        while stop < len(lines) and stop - number < MAX_LINES and lines[stop].count(b'"') % 2 == 0:
            stop += 1
        if stop == len(lines) and stop - number < MAX_LINES:
            return rows, b"\n".join(lines[number:]) + b"\n"
        values = _split_long(lines[number : stop + 1], names, place) if stop - number < MAX_LINES else None
        rows.append(values or f"a quote that is not closed: {_shown(line)}")
        number = stop + 1 if values else number + 1
    return rows, b""


def _split_long(lines: Sequence[bytes], names: Sequence[str], place: int | None) -> list[str] | None:
    """The values of a record of several lines; None if it is none, or has swallowed rows."""
    for line in lines[1:]:
        alone = _split(line, True)
        if place is not None and alone and len(alone) == len(names) and "://" in alone[place][:12]:
            return None
    try:
        text = b"\n".join(lines).decode()
        (values,) = csv.reader(io.StringIO(text, newline=""), strict=True)
    except (UnicodeDecodeError, csv.Error, ValueError):
        return None
    return values if len(values) == len(names) else None


def _table(rows: Sequence[list[str] | str], names: Sequence[str]) -> pa.Table:
    good = [None if isinstance(row, str) else row for row in rows]
    columns = [pa.array([row and row[number] for row in good], pa.string()) for number in range(len(names))]
    problems = pa.array([row if isinstance(row, str) else None for row in rows], pa.string())
    table = pa.Table.from_arrays(columns, names=list(names))
    return table if problems.null_count == len(rows) else table.append_column(PROBLEM, problems)


# ----------------------------------------------------------------------------------------------------- .jsonl and .json


def array_lines(content: bytes) -> bytes:
    """A JSON array as one object a line."""
    entries = msgspec.json.decode(content.removeprefix(BOM), type=list[msgspec.Raw])
    return b"".join(bytes(entry).replace(b"\n", b" ").replace(b"\r", b" ") + b"\n" for entry in entries)


def read_json(open_file: Opener, texts: Sequence[str], block_bytes: int) -> Iterator[pa.Table]:
    """Columns of a file with a JSON object on each line, in two passes.

    The types of columns are inferred from the whole file, not from its first lines; a column of several types is text.

    Args:
        open_file: opens it.
        texts: columns that hold text; a row with something else in one has a problem.
        block_bytes: bytes that are read at a time.
    """
    kinds: dict[str, pa.DataType] = {}
    with open_file() as file:
        for block in whole_lines(file, block_bytes):
            for name, kind in _infer(block).items():
                kinds[name] = pa.string() if name in texts else promote(kinds.get(name, kind), kind)
    kinds = kinds or dict.fromkeys(texts, pa.string())
    schema = pa.schema(list(kinds.items()))
    exact = pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="error")
    with open_file() as file:
        for block in whole_lines(file, block_bytes):
            try:
                yield _parse_json(block, exact)
            except pa.ArrowInvalid:
                yield _json_rows(block, kinds, texts)


def promote(first: pa.DataType, second: pa.DataType) -> pa.DataType:
    """The type of a column that has both; text if there is no other."""
    try:
        schemas = [pa.schema({"": kind}) for kind in (first, second)]
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.string()


def _infer(block: bytes) -> dict[str, pa.DataType]:
    try:
        return {field.name: dates_as_text(field.type) for field in _parse_json(block).schema}
    except pa.ArrowInvalid:
        kinds: dict[str, pa.DataType] = {}
        for _, row, _ in _json_lines(block):
            for name, value in (row or {}).items():
                try:
                    kind = dates_as_text(pa.infer_type([value]))
                except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
                    kind = pa.string()
                kinds[name] = promote(kinds.get(name, kind), kind)
        return kinds


def _parse_json(block: bytes, options: pyarrow.json.ParseOptions | None = None) -> pa.Table:
    whole = pyarrow.json.ReadOptions(block_size=len(block))  # a line must not be longer
    return pyarrow.json.read_json(io.BytesIO(block), whole, options)


def _json_lines(block: bytes) -> Iterator[tuple[bytes, dict[str, Any] | None, str]]:
    """Each line that is not empty, with its object, or None and what is wrong."""
    for line in block.split(b"\n"):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # raises for half of a surrogate pair
        except (ValueError, RecursionError) as error:
            yield line, None, f"{' '.join(str(error).split())}: {_shown(line)}"
            continue
        if isinstance(row, dict):
            yield line, row, ""
        else:
            yield line, None, f"no JSON object: {_shown(line)}"


def _json_rows(block: bytes, kinds: Mapping[str, pa.DataType], texts: Sequence[str]) -> pa.Table:
    values: dict[str, list[Any]] = {name: [] for name in kinds}
    problems: list[str | None] = []
    for line, row, problem in _json_lines(block):
        for name in texts:
            if row is not None and row.get(name) != row.get(name):  # NaN
                row[name] = None
            if row is not None and not isinstance(row.get(name), str | None):
                row, problem = None, f"{name} is no text: {_shown(line)}"
        problems.append(problem or None)
        for name, kind in kinds.items():
            values[name].append(_as_kind((row or {}).get(name), kind))
    table = pa.table({name: pa.array(values[name], kind) for name, kind in kinds.items()})
    return table.append_column(PROBLEM, pa.array(problems, pa.string())) if any(problems) else table


def _as_kind(value: Any, kind: pa.DataType) -> Any:
    if value is None or (pa.types.is_string(kind) and isinstance(value, str)):
        return value
    if pa.types.is_string(kind):
        return json.dumps(value, ensure_ascii=False)
    try:
        return pa.scalar(value, kind).as_py()
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return None


def dates_as_text(kind: pa.DataType) -> pa.DataType:
    """A type with dates as text: whether Arrow infers dates depends on the block."""
    if pa.types.is_timestamp(kind):
        return pa.string()
    if pa.types.is_struct(kind):
        return pa.struct([entry.with_type(dates_as_text(entry.type)) for entry in kind])
    if pa.types.is_list(kind):
        return pa.list_(dates_as_text(kind.value_type))
    return kind
