# ruff: noqa: E501  # one line for each case
"""Further lists and captions, written before the code that reads them was looked at."""

import datetime
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.pairs import inputs
from data_prep.pairs.filters import clean_caption
from data_prep.pairs.inputs import Columns
from data_prep.pairs.staging import Staging
from ovd_models.errors import InputError

Pair = tuple[Any, Any]
ONE, TWO = ("http://a/1", "one"), ("http://a/2", "two")
BAD = "bad"
"""In the place of a row that is rejected."""


def read(path: Path) -> list[Pair | str]:
    staging = Staging(str(path.parent / "staging"), 1000, 100)
    source = inputs.cut_file(str(path), Columns(), staging)
    tables = [pq.read_table(staging.rows_uri(name)) for name in source.partitions]
    rows = pa.concat_tables(tables, promote_options="permissive").to_pylist()
    return [BAD if row.get("reason") else (row["url"], row["raw_caption"]) for row in rows]


def jsonl(*captions: str) -> bytes:
    return b"".join(
        b'{"url": "http://a/%d", "caption": %s}\n' % (place + 1, text.encode()) for place, text in enumerate(captions)
    )


HEAD = b"url\tcaption\n"
TEXT: dict[str, tuple[str, bytes, list[Pair | str]]] = {
    "crlf": ("a.tsv", b"url\tcaption\r\nhttp://a/1\tone\r\nhttp://a/2\ttwo\r\n", [ONE, TWO]),
    "no last line end": ("a.tsv", HEAD + b"http://a/1\tone\nhttp://a/2\ttwo", [ONE, TWO]),
    "blank lines": ("a.tsv", HEAD + b"http://a/1\tone\n\n\nhttp://a/2\ttwo\n\n", [ONE, TWO]),
    "nul": ("a.tsv", HEAD + b"http://a/1\to\0e\nhttp://a/2\ttwo\n", [("http://a/1", "o\0e"), TWO]),
    "line separator": (
        "a.tsv",
        HEAD + "http://a/1\to\u2028ne\nhttp://a/2\ttwo\n".encode(),
        [("http://a/1", "o\u2028ne"), TWO],
    ),
    "next line": (
        "a.tsv",
        HEAD + "http://a/1\to\u0085ne\nhttp://a/2\ttwo\n".encode(),
        [("http://a/1", "o\u0085ne"), TWO],
    ),
    "form feed": ("a.tsv", HEAD + b"http://a/1\to\x0cne\nhttp://a/2\ttwo\n", [("http://a/1", "o\x0cne"), TWO]),
    "group separator": (
        "a.csv",
        b"url,caption\nhttp://a/1,o\x1dne\nhttp://a/2,two\n",
        [("http://a/1", "o\x1dne"), TWO],
    ),
    "quotes in tsv": ("a.tsv", HEAD + b'http://a/1\t"one\nhttp://a/2\ttwo\n', [("http://a/1", '"one'), TWO]),
    "quoted line end": ("a.csv", b'url,caption\nhttp://a/1,"o\nne"\nhttp://a/2,two\n', [("http://a/1", "o\nne"), TWO]),
    "doubled quotes": (
        "a.csv",
        b'url,caption\nhttp://a/1,"o ""n"" e"\nhttp://a/2,two\n',
        [("http://a/1", 'o "n" e'), TWO],
    ),
    "inch mark": (
        "a.csv",
        b'url,caption\nhttp://a/1,a 24" wheel\nhttp://a/2,two\n',
        [("http://a/1", 'a 24" wheel'), TWO],
    ),
    "header in quotes": ("a.csv", b'"url","caption"\n"http://a/1","one"\n"http://a/2","two"\n', [ONE, TWO]),
    "mark and quotes": ("a.csv", b'\xef\xbb\xbf"url","caption"\nhttp://a/1,one\nhttp://a/2,two\n', [ONE, TWO]),
    "empty value": ("a.csv", b"url,caption\nhttp://a/1,\nhttp://a/2,two\n", [("http://a/1", ""), TWO]),
    "too many of one": ("a.csv", b"url,caption\nhttp://a/1,one,more\nhttp://a/2,two\n", [BAD, TWO]),
    "cp1252 line": ("a.csv", b"url,caption\nhttp://a/1,it\x92s\nhttp://a/2,two\n", [BAD, TWO]),
    "surrogate bytes": ("a.tsv", HEAD + b"http://a/1\t\xed\xa0\x80\nhttp://a/2\ttwo\n", [BAD, TWO]),
    "cut character": ("a.tsv", HEAD + b"http://a/1\tone\nhttp://a/2\ttw\xe2\x82", [ONE, BAD]),
    "extra column first": ("a.tsv", b"id\turl\tcaption\n7\thttp://a/1\tone\n8\thttp://a/2\ttwo\n", [ONE, TWO]),
    "json gz of several members": (
        "a.jsonl.gz",
        gzip.compress(jsonl('"one"')) + gzip.compress(b'{"url": "http://a/2", "caption": "two"}\n'),
        [ONE, TWO],
    ),
    "json repeats a key": (
        "a.jsonl",
        b'{"url": "http://x", "url": "http://a/1", "caption": "one"}\n' + jsonl('"x"', '"two"').splitlines()[1],
        [ONE, TWO],
    ),
    "json crlf": ("a.jsonl", jsonl('"one"', '"two"').replace(b"\n", b"\r\n"), [ONE, TWO]),
    "json blank lines": ("a.jsonl", b"\n" + jsonl('"one"', '"two"').replace(b"\n", b"\n \n"), [ONE, TWO]),
    "json line separator": ("a.jsonl", jsonl('"o\u2028ne"', '"two"'), [("http://a/1", "o\u2028ne"), TWO]),
    "json pair of surrogates": ("a.jsonl", jsonl(r'"\ud83d\ude00"', '"two"'), [("http://a/1", "\U0001f600"), TWO]),
    "json lone surrogate": ("a.jsonl", jsonl(r'"o\ud83dne"', '"two"'), [BAD, TWO]),
    "json null": ("a.jsonl", jsonl("null", '"two"'), [("http://a/1", None), TWO]),
    "json NaN": ("a.jsonl", jsonl("NaN", '"two"'), [("http://a/1", None), TWO]),
    "json NaN beside": (
        "a.jsonl",
        b'{"url": "http://a/1", "caption": "one", "n": NaN}\n{"url": "http://a/2", "caption": "two", "n": 1.5}\n',
        [ONE, TWO],
    ),
    "json number": ("a.jsonl", jsonl("7", '"two"'), [BAD, TWO]),
    "json cut": ("a.jsonl", jsonl('"one"') + b'{"url": "http://a/2", "capt', [ONE, BAD]),
    "json array line": ("a.jsonl", b'["http://a/1", "one"]\n' + jsonl('"x"', '"two"').splitlines()[1], [BAD, TWO]),
    "json huge number": (
        "a.jsonl",
        b'{"url": "http://a/1", "caption": "one", "n": 1e400}\n{"url": "http://a/2", "caption": "two", "n": 123456789012345678901234567890}\n',
        [ONE, TWO],
    ),
    "json nested": (
        "a.jsonl",
        b'{"url": "http://a/1", "caption": "one", "m": {"a": 1}}\n{"url": "http://a/2", "caption": "two", "m": [1]}\n',
        [ONE, TWO],
    ),
    "json columns differ": (
        "a.jsonl",
        b'{"url": "http://a/1", "caption": "one"}\n{"caption": "two", "w": 3, "url": "http://a/2"}\n',
        [ONE, TWO],
    ),
    "json missing address": (
        "a.jsonl",
        b'{"caption": "one"}\n{"caption": "two", "url": "http://a/2"}\n',
        [(None, "one"), TWO],
    ),
    "json array with a mark": (
        "a.json",
        b"\xef\xbb\xbf" + json.dumps([{"url": u, "caption": c} for u, c in (ONE, TWO)], indent=2).encode(),
        [ONE, TWO],
    ),
    "json array gz": (
        "a.json.gz",
        gzip.compress(json.dumps([{"url": u, "caption": c} for u, c in (ONE, TWO)]).encode()),
        [ONE, TWO],
    ),
    "txt": ("a.txt", b"\xef\xbb\xbfhttp://a/1\r\n\r\n  http://a/2  \n", [("http://a/1", None), ("http://a/2", None)]),
    "txt with commas": ("a.txt", b'http://a/1,2\nhttp://a/"x"\n', [("http://a/1,2", None), ('http://a/"x"', None)]),
}


@pytest.mark.parametrize("name", TEXT)
def test_rows_of_a_text(name: str, tmp_path: Path) -> None:
    file, content, expected = TEXT[name]
    (tmp_path / file).write_bytes(content)
    found = read(tmp_path / file)
    if file.endswith(".txt"):
        found = [(str(row[0]).strip(), row[1] or None) for row in found]
    assert found == expected


URLS = pa.array([ONE[0], TWO[0]])
CAPTIONS = pa.array([ONE[1], TWO[1]])
PARQUET: dict[str, tuple[Any, Any]] = {
    "large strings": (URLS.cast(pa.large_string()), CAPTIONS.cast(pa.large_string())),
    "views": (URLS.cast(pa.string_view()), CAPTIONS.cast(pa.string_view())),
    "bytes": (URLS.cast(pa.binary()), CAPTIONS.cast(pa.binary())),
    "large bytes": (URLS.cast(pa.large_binary()), CAPTIONS.cast(pa.large_binary())),
    "dictionary": (URLS.dictionary_encode(), CAPTIONS.dictionary_encode()),
    "dictionary of large strings": (URLS.cast(pa.large_string()).dictionary_encode(), CAPTIONS.dictionary_encode()),
    "fixed bytes": (URLS.cast(pa.binary()).cast(pa.binary(10)), CAPTIONS.cast(pa.binary()).cast(pa.binary(3))),
    "pieces": (pa.chunked_array([URLS[:1], URLS[1:]]), pa.chunked_array([CAPTIONS[:1], CAPTIONS[1:]])),
}


@pytest.mark.parametrize("name", PARQUET)
def test_texts_of_any_arrow_type(name: str, tmp_path: Path) -> None:
    url, caption = PARQUET[name]
    pq.write_table(pa.table({"url": url, "caption": caption}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [ONE, TWO]


@pytest.mark.parametrize(
    "values",
    [
        pa.nulls(2),
        pa.array([np.nan, np.nan], pa.float16()),
        pa.array([None, None], pa.int8()),
        pa.array([np.nan, np.nan], pa.float32()),
    ],
)
def test_no_captions(values: pa.Array, tmp_path: Path) -> None:
    if values.type == pa.float16():
        values = pa.array(np.array([np.nan, np.nan], np.float16))
    pq.write_table(pa.table({"url": URLS, "caption": values}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [(ONE[0], None), (TWO[0], None)]


@pytest.mark.parametrize(
    "values",
    [
        pa.array([[1], None]),
        pa.array([{"a": 1}, None]),
        pa.array([datetime.datetime(2020, 1, 1), None]),
        pa.array([b"\xff", b""]),
        pa.array([True, None]),
        pa.nulls(2),
    ],
)
def test_further_columns_of_any_type(values: pa.Array, tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": URLS, "caption": CAPTIONS, "more": values}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [ONE, TWO]


WRONG: dict[str, tuple[str, bytes]] = {
    "semicolons": ("a.csv", b"url;caption\nhttp://a/1;one\n"),
    "no url column": ("a.tsv", b"link\tcaption\nhttp://a/1\tone\n"),
    "two url columns": ("a.tsv", b"url\turl\tcaption\nhttp://a/1\thttp://a/2\tone\n"),
    "cut gzip": ("a.tsv.gz", gzip.compress(HEAD + b"http://a/1\tone\n" * 5000)[:-30]),
    "no gzip": ("a.tsv.gz", HEAD + b"http://a/1\tone\n"),
    "cut parquet": ("a.parquet", b"PAR1" + b"\0" * 40),
    "csv named parquet": ("a.parquet", b"url,caption\nhttp://a/1,one\n"),
    "nothing": ("a.parquet", b""),
    "json of a number": ("a.json", b"7"),
    "json of an object of lists": ("a.json", b'{"url": ["http://a/1"], "caption": ["one"]}'),
    "deep json": ("a.json", b"[" * 100_000),
    "deep json line": ("a.jsonl", b'{"url":' * 100_000),
    "xlsx": ("a.csv", b"PK\x03\x04\x14\x00\x06\x00\x08\x00\n\x92\xff,\n\x00\n"),
    "html": ("a.csv", b"<!DOCTYPE html>\n<html><body>Not found</body></html>\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_list_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    file, content = WRONG[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError, match=file) as caught:
        read(tmp_path / file)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


CLEAN = {
    "I <3 dogs": "I <3 dogs",
    "I &lt;3 dogs": "I <3 dogs",
    "a <b>bold</b> dog": "a bold dog",
    "a<br/>b": "a b",
    "x<y and y>z": "x<y and y>z",
    "<!-- c -->a dog": "a dog",
    "Ben &amp; Jerry&#39;s": "Ben & Jerry's",
    "a&nbsp;dog": "a dog",
    "List<String> of dogs": "List<String> of dogs",
    "<NAME> and a dog": "<NAME> and a dog",
    "a dog <http://x.de>": "a dog <http://x.de>",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467": "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "a\u202edog": "adog",
    "cafe\u0301": "caf\u00e9",
    "a\u2028dog": "a dog",
    "\ufeffa dog": "a dog",
    "a\x00dog": "adog",
    "a \t\n dog": "a dog",
    "dogs > cats > mice": "dogs > cats > mice",
    "<div class='x'>a dog</div>": "a dog",
    "AT&T; a dog": "AT&T; a dog",
    "nan": "nan",
}


@pytest.mark.parametrize("raw", CLEAN)
def test_captions(raw: str) -> None:
    assert clean_caption(raw) == CLEAN[raw]
