# ruff: noqa: E501  # one line for each case
"""Lists as people have them: which lines are rows, which are rejects, and what captions hold."""

import bz2
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.pairs import inputs
from data_prep.pairs.filters import clean_caption
from data_prep.pairs.inputs import Columns
from data_prep.pairs.staging import Staging
from ovd_models.errors import InputError

Rows = list[tuple[str | None, str | None]]
ONE, TWO = ("http://a/1", "one"), ("http://a/2", "two")


def read(path: Path, columns: Columns = Columns()) -> pa.Table:  # noqa: B008
    """All rows of a list, as they are staged."""
    staging = Staging(str(path.parent / "staging"), 1000, 100)
    source = inputs.cut_file(str(path), columns, staging)
    rows = [pq.read_table(staging.rows_uri(name)) for name in source.partitions]
    return pa.concat_tables(rows, promote_options="permissive")


def kept_and_rejected(path: Path) -> tuple[Rows, dict[int, str]]:
    """Addresses and captions of the rows, and the problems of the rejects by row; every line is one of them."""
    found = read(path)
    assert found["row"].to_pylist() == list(range(found.num_rows))
    details = found["detail"].to_pylist() if "detail" in found.column_names else [None] * found.num_rows
    for detail, reason in zip(
        details, found["reason"].to_pylist() if "reason" in found.column_names else details, strict=True
    ):
        assert (reason == "bad_row") == bool(detail)
        assert "\n" not in (detail or "")
    pairs = list(zip(found["url"].to_pylist(), found["raw_caption"].to_pylist(), strict=True))
    rows = [pair for pair, detail in zip(pairs, details, strict=True) if not detail]
    return rows, {number: detail for number, detail in enumerate(details) if detail}


RAGGED = b"http://a/1\tone\n%s\nhttp://a/2\ttwo\n"
BAD_LINES: dict[str, tuple[str, bytes, str]] = {
    "tsv: too few columns": ("tsv", RAGGED % b"http://a/x", "1 columns, expected 2"),
    "tsv: too many columns": ("tsv", RAGGED % b"http://a/x\tcat\tdog", "3 columns, expected 2"),
    "tsv: latin-1": ("tsv", RAGGED % b"http://a/x\tcaf\xe9", "not UTF-8 text"),
    "tsv: a binary line": ("tsv", RAGGED % b"\xff\xfe\x00\x01\tx", "not UTF-8 text"),
    "tsv: half a character": ("tsv", RAGGED % b"http://a/x\t\xe5\x9c", "not UTF-8 text"),
    "tsv: a text": ("tsv", RAGGED % b"<html>", "1 columns, expected 2"),
    "csv: too few columns": ("csv", b"http://a/1,one\nhttp://a/x\nhttp://a/2,two\n", "1 columns, expected 2"),
    "csv: a comma too many": ("csv", b"http://a/1,one\nhttp://a/x,cat,dog\nhttp://a/2,two\n", "3 columns, expected 2"),
    "csv: latin-1": ("csv", b"http://a/1,one\nhttp://a/x,caf\xe9\nhttp://a/2,two\n", "not UTF-8 text"),
    "csv: an open quote": ("csv", b'http://a/1,one\nhttp://a/x,"cat\nhttp://a/2,two\n', "a quote that is not closed"),
    "csv: an open quote at the end": ("csv", b'http://a/1,one\nhttp://a/2,two\nhttp://a/x,"cat\n', "a quote that is not closed"),
    "csv: latin-1 in quotes": ("csv", b'http://a/1,one\nhttp://a/x,"caf\xe9"\nhttp://a/2,"two"\n', "not UTF-8 text"),
    "csv: a ragged line among quotes": ("csv", b'http://a/1,"one"\nhttp://a/x\nhttp://a/2,"two"\n', "1 columns, expected 2"),
    "jsonl: half a line": ("jsonl", b'{"url": "http://a/1", "caption": "one"}\n{"url": \n{"url": "http://a/2", "caption": "two"}\n', "Expecting value"),
    "jsonl: a list": ("jsonl", b'{"url": "http://a/1", "caption": "one"}\n["x"]\n{"url": "http://a/2", "caption": "two"}\n', "no JSON object"),
    "jsonl: a number": ("jsonl", b'{"url": "http://a/1", "caption": "one"}\n7\n{"url": "http://a/2", "caption": "two"}\n', "no JSON object"),
    "jsonl: a caption that is a number": ("jsonl", b'{"url": "http://a/1", "caption": "one"}\n{"url": "http://a/x", "caption": 5}\n{"url": "http://a/2", "caption": "two"}\n', "caption is no text"),
    "jsonl: an address that is a list": ("jsonl", b'{"url": "http://a/1", "caption": "one"}\n{"url": ["x"], "caption": "y"}\n{"url": "http://a/2", "caption": "two"}\n', "url is no text"),
    "jsonl: latin-1": ("jsonl", b'{"url": "http://a/1", "caption": "one"}\n{"url": "http://a/x", "caption": "caf\xe9"}\n{"url": "http://a/2", "caption": "two"}\n', "not"),
    "jsonl: HTML": ("jsonl", b'{"url": "http://a/1", "caption": "one"}\n<html>\n{"url": "http://a/2", "caption": "two"}\n', "Expecting value"),
    "json: an array with a number": ("json", b'[{"url": "http://a/1", "caption": "one"}, 7, {"url": "http://a/2", "caption": "two"}]', "no JSON object"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_LINES)
@pytest.mark.parametrize("block", [40, inputs.BLOCK_BYTES])
def test_a_bad_line_is_a_reject_and_the_others_are_rows(
    name: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suffix, content, problem = BAD_LINES[name]
    header = {"tsv": b"url\tcaption\n", "csv": b"url,caption\n"}.get(suffix, b"")
    path = tmp_path / f"list.{suffix}"
    path.write_bytes(header + content)
    monkeypatch.setattr(inputs, "BLOCK_BYTES", block)
    rows, rejects = kept_and_rejected(path)
    assert rows == [ONE, TWO]
    assert len(rejects) == 1
    assert problem in next(iter(rejects.values())) or "codec can't decode" in next(iter(rejects.values()))


QUOTED: dict[str, tuple[str, Rows, int]] = {
    "two lines": ('http://a/1,"one\ntwo"\nhttp://a/2,two\n', [("http://a/1", "one\ntwo"), TWO], 0),
    "an empty line": ('http://a/1,"one\n\ntwo"\nhttp://a/2,two\n', [("http://a/1", "one\n\ntwo"), TWO], 0),
    "quotes in quotes": ('http://a/1,"a ""b""\nc"\nhttp://a/2,two\n', [("http://a/1", 'a "b"\nc'), TWO], 0),
    "commas": ('http://a/1,"a, b\nc, d"\nhttp://a/2,two\n', [("http://a/1", "a, b\nc, d"), TWO], 0),
    "two open quotes": ('http://a/x,"cat\nhttp://a/1,one\nhttp://a/y,"dog\nhttp://a/2,two\n', [ONE, TWO], 2),
    "an open one before a closed one": ('http://a/x,"cat\nhttp://a/1,"one"\nhttp://a/2,"two"\n', [ONE, TWO], 1),
    "Windows's line ends": ('http://a/1,"one"\r\nhttp://a/2,"two"\r\n', [ONE, TWO], 0),
    "no line end": ('http://a/1,one\nhttp://a/2,"two"', [ONE, TWO], 0),
}  # fmt: skip


@pytest.mark.parametrize("name", QUOTED)
@pytest.mark.parametrize("block", [24, inputs.BLOCK_BYTES])
def test_a_quote_swallows_no_rows(name: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, expected, bad = QUOTED[name]
    path = tmp_path / "list.csv"
    path.write_bytes(b"url,caption\n" + text.encode())
    monkeypatch.setattr(inputs, "BLOCK_BYTES", block)
    rows, rejects = kept_and_rejected(path)
    assert (rows, len(rejects)) == (expected, bad)


def test_an_open_quote_costs_one_row_of_many(tmp_path: Path) -> None:
    lines = [f"http://a/{number},caption {number}" for number in range(3000)]
    lines[7] = 'http://a/7,"caption 7'
    (tmp_path / "list.csv").write_text("url,caption\n" + "\n".join(lines) + "\n")
    rows, rejects = kept_and_rejected(tmp_path / "list.csv")
    assert (len(rows), list(rejects)) == (2999, [7])


# ------------------------------------------------------------------------------------------------------------- formats

TSV, CSV = "url\tcaption\nhttp://a/1\tone\nhttp://a/2\ttwo\n", "url,caption\nhttp://a/1,one\nhttp://a/2,two\n"
OBJECTS = [{"url": url, "caption": caption} for url, caption in (ONE, TWO)]
JSONL = "".join(json.dumps(row) + "\n" for row in OBJECTS)
BOM = b"\xef\xbb\xbf"
FORMATS: dict[str, bytes] = {
    "list.tsv.gz": gzip.compress(TSV.encode()),
    "list.csv.gz": gzip.compress(CSV.encode()),
    "list.jsonl.gz": gzip.compress(JSONL.encode()),
    "list.json.gz": gzip.compress(json.dumps(OBJECTS).encode()),
    "two members.tsv.gz": gzip.compress(TSV[:20].encode()) + gzip.compress(TSV[20:].encode()),
    "list.TSV.GZ": gzip.compress(TSV.encode()),
    "list.csv.bz2": bz2.compress(CSV.encode()),
    "list.csv.zst": pa.compress(CSV.encode(), "zstd", asbytes=True),
    "list.json": json.dumps(OBJECTS).encode(),
    "indented.json": json.dumps(OBJECTS, indent=2).encode(),
    "lines.json": JSONL.encode(),
    "mark.json": BOM + json.dumps(OBJECTS).encode(),
    "mark.jsonl": BOM + JSONL.encode(),
    "mark.tsv": BOM + TSV.encode(),
    "mark.csv": BOM + CSV.encode(),
    "quoted mark.csv": BOM + b'"url","caption"\n' + CSV.partition("\n")[2].encode(),
    "spaces.csv": b" url , caption\n" + CSV.partition("\n")[2].encode(),
    "windows.jsonl": JSONL.replace("\n", "\r\n").encode(),
    "empty lines.jsonl": ("\n" + JSONL.replace("\n", "\n\n")).encode(),
    "no line end.tsv": TSV.encode()[:-1],
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_and_compression_is_read(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(FORMATS[name])
    assert inputs.find_lists(str(tmp_path / name)) == [str(tmp_path / name)]
    assert kept_and_rejected(tmp_path / name) == ([ONE, TWO], {})


@pytest.mark.parametrize(
    "content", ["http://a/1\nhttp://a/2\n", "http://a/1\r\nhttp://a/2", "\nhttp://a/1\n\nhttp://a/2\n"]
)
def test_a_file_of_addresses_alone_is_a_list(content: str, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(content)
    assert kept_and_rejected(tmp_path / "list.txt") == ([("http://a/1", None), ("http://a/2", None)], {})


def test_other_files_of_a_folder_are_no_lists(tmp_path: Path) -> None:
    for name in ("a.tsv.gz", "README.txt", "stats.json", "b.csv", "c.parquet.gz", "d.gz"):
        (tmp_path / name).write_bytes(b"")
    assert inputs.find_lists(str(tmp_path)) == [f"{tmp_path}/a.tsv.gz", f"{tmp_path}/b.csv"]
    assert inputs.find_lists(f"{tmp_path}/*.json") == [f"{tmp_path}/stats.json"]
    with pytest.raises(InputError, match=r"c\.parquet\.gz: unknown format"):
        inputs.find_lists(f"{tmp_path}/c.parquet.gz")


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1, "x"], "string"), ([1, 2.5], "double"), ([{"k": 1}, "x"], "string"), ([[1], 2], "string"),
        (["x", None], "string"), ([True, 3], "string"), ([[1], ["x"]], "string"), ([2**70, "x"], "string"),
        ([None, None], None), (["2020-01-01", 5], "string"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("block", [30, inputs.BLOCK_BYTES])
def test_a_column_of_several_types_is_text(
    values: list[Any], kind: str | None, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "list.jsonl"
    path.write_text("".join(json.dumps({**row, "n": value}) + "\n" for row, value in zip(OBJECTS, values, strict=True)))
    monkeypatch.setattr(inputs, "BLOCK_BYTES", block)
    assert kept_and_rejected(path) == ([ONE, TWO], {})
    found = read(path)["n"]
    assert kind is None or str(found.type) == kind
    if kind == "string":
        texts = [value if isinstance(value, str | None) else json.dumps(value) for value in values]
        assert found.to_pylist() == texts


# ------------------------------------------------------------------------------------------------------------ captions

TEXTS = ["one", None]
CAPTIONS: dict[str, tuple[Any, list[str | None]]] = {
    "all NaN": (np.array([np.nan, np.nan]), [None, None]),
    "all NaN in 32 bits": (np.array([np.nan, np.nan], np.float32), [None, None]),
    "all NaN in 16 bits": (np.array([np.nan, np.nan], np.float16), [None, None]),
    "a number and NaN": (np.array([5.5, np.nan]), ["5.5", None]),
    "None and NaN": (pd.Series([None, np.nan]), [None, None]),
    "text and NaN": (pd.Series(["one", np.nan]), TEXTS),
    "text and None": (pd.Series(["one", None]), TEXTS),
    "text and NA": (pd.Series(["one", pd.NA], dtype="string"), TEXTS),
    "null": (pa.nulls(2), [None, None]),
    "a category": (pd.Series(["one", None], dtype="category"), TEXTS),
    "large text": (pa.array(TEXTS, pa.large_string()), TEXTS),
    "a view of text, as of Polars": (pa.array(TEXTS, pa.string_view()), TEXTS),
    "bytes": (pa.array([b"one", None]), TEXTS),
    "a view of bytes": (pa.array([b"one", None], pa.binary_view()), TEXTS),
    "large bytes": (pa.array([b"one", None], pa.large_binary()), TEXTS),
    "bytes of one length": (pa.array([b"one", None], pa.binary(3)), TEXTS),
    "integers": (pa.array([5, None]), ["5", None]),
    "the word nan": (["nan", "NaN"], ["nan", "NaN"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CAPTIONS)
def test_missing_captions_are_null(name: str, tmp_path: Path) -> None:
    values, expected = CAPTIONS[name]
    column = pa.Array.from_pandas(values) if not isinstance(values, pa.Array) else values
    pq.write_table(pa.table({"url": ["http://a/1", "http://a/2"], "caption": column}), tmp_path / "list.parquet")
    rows, rejects = kept_and_rejected(tmp_path / "list.parquet")
    assert ([caption for _, caption in rows], rejects) == (expected, {})


def test_bytes_of_parquet_that_are_no_text_are_rejects(tmp_path: Path) -> None:
    table = pa.table({"url": [b"http://a/1", b"http://a/x", b"http://a/2"], "caption": [b"one", b"caf\xe9", b"two"]})
    pq.write_table(table, tmp_path / "list.parquet")
    rows, rejects = kept_and_rejected(tmp_path / "list.parquet")
    assert (rows, rejects) == ([ONE, TWO], {1: "caption is not UTF-8 text: b'caf\\xe9'"})


@pytest.mark.parametrize("kind", [pa.list_(pa.string()), pa.struct({"a": pa.string()})])
def test_captions_of_another_kind_are_refused_with_their_file(kind: pa.DataType, tmp_path: Path) -> None:
    table = pa.table({"url": ["http://a/1"], "caption": pa.nulls(1, kind)})
    pq.write_table(table, tmp_path / "list.parquet")
    with pytest.raises(InputError, match=r"list\.parquet: column 'caption' holds .*, expected text"):
        read(tmp_path / "list.parquet")


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("a photo of <PERSON> at <LOCATION>", "a photo of <PERSON> at <LOCATION>"),
        ("vector<int> in C++", "vector<int> in C++"),
        ("a<b and c>d", "a<b and c>d"),
        ("List<String> and Map<K, V>", "List<String> and Map<K, V>"),
        ("3 < 4 and 5 > 2", "3 < 4 and 5 > 2"),
        ("<unk> a cat", "<unk> a cat"),
        ("<3 my cat", "<3 my cat"),
        ("cat <cat@example.com>", "cat <cat@example.com>"),
        ("<person> waves", "<person> waves"),
        ("<|endoftext|> a cat", "<|endoftext|> a cat"),
        ("x<ab>y", "x<ab>y"),
        ("<b>bold</b> cat", "bold cat"),
        ("<B>bold</B> cat", "bold cat"),
        ("a<br>cat", "a cat"),
        ("a<br/>cat", "a cat"),
        ("a <a href='http://x'>link</a> here", "a link here"),
        ("<!-- note --> a cat", "a cat"),
        ('<p class="x">a cat</p>', "a cat"),
        ("&lt;i&gt;a cat&lt;/i&gt;", "a cat"),
        ("<img src=x onerror=y> a cat", "a cat"),
    ],
)
def test_only_real_tags_are_taken_from_captions(raw: str, clean: str) -> None:
    assert clean_caption(raw) == clean
