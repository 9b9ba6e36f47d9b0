import json
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from formats import write_tar
from pyarrow import fs

from data_prep import storage, tables
from data_prep.pairs import inputs, staging
from data_prep.pairs.inputs import Columns, Source
from data_prep.pairs.staging import Part, Staging, partition_name
from ovd_models.errors import InputError

LISTS = {
    "tsv": b'url\tcaption\tn\nhttp://a/1\ta "quoted" cat, really\t1\n\tno url\t2\n',
    "csv": b'url,caption,n\nhttp://a/1,"a ""quoted"" cat, really",1\n,no url,2\n',
    "jsonl": b'{"url": "http://a/1", "caption": "a \\"quoted\\" cat, really", "n": 1}\n{"caption": "no url", "n": 2}\n',
}


def read(path: Path, columns: Columns | None = None) -> pa.Table:
    """All rows of a list under our names, numbered through."""
    columns, found, count = columns or Columns(), [], 0
    for block in inputs.read_blocks(str(path), columns):
        found.append(inputs.normalize_columns(block, columns, "digest", count, str(path)))
        count += block.num_rows
    return pa.concat_tables(found)


def written(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def tsv(rows: int) -> str:
    return "url\tcaption\n" + "".join(f"http://a/{row}\tcaption {row}\n" for row in range(rows))


def cut(path: Path, folder: Path, *, partition: int, part: int) -> Source:
    return inputs.cut_file(str(path), Columns(), Staging(str(folder), partition, part))


def test_a_list_is_cut_into_partitions_and_parts(tmp_path: Path) -> None:
    source = cut(written(tmp_path / "list.tsv", tsv(5)), tmp_path, partition=3, part=2)
    first, second = partition_name(source.digest, 0), partition_name(source.digest, 1)
    assert source.partitions == {first: 3, second: 2}
    assert (first, second) == (f"{source.digest}-000000", f"{source.digest}-000001")
    assert Staging(str(tmp_path), 6, 2).read_part(Part(first, 1))["url"].to_pylist() == ["http://a/2"]
    assert Staging(str(tmp_path), 6, 2).read_part(Part(second, 0))["row"].to_pylist() == [3, 4]


@pytest.mark.parametrize("suffix", [*LISTS, "parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"list.{suffix}"
    if suffix == "parquet":
        url, caption = ["http://a/1", None], ['a "quoted" cat, really', "no url"]
        pq.write_table(pa.table({"url": url, "caption": caption, "n": [1, 2]}), path)
    else:
        path.write_bytes(LISTS[suffix])
    found = read(path)
    assert found.column_names == ["source", "row", "url", "raw_caption", "n"]
    assert found["source"].to_pylist() == ["digest", "digest"]
    assert found["row"].to_pylist() == [0, 1]
    assert found["url"].to_pylist() == ["http://a/1", None]
    assert found["raw_caption"].to_pylist() == ['a "quoted" cat, really', "no url"]
    assert [int(n) for n in found["n"].to_pylist()] == [1, 2]


@pytest.mark.parametrize("suffix", [*LISTS, "parquet"])
def test_blocks_make_no_difference(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, numbers = tmp_path / f"list.{suffix}", range(200)
    match suffix:
        case "parquet":
            rows = {"url": [f"u{n}" for n in numbers], "caption": [f"caption {n}" for n in numbers]}
            pq.write_table(pa.table(rows), path, row_group_size=7)
        case "jsonl":
            path.write_text("".join(f'{{"url": "u{n}", "caption": "caption {n}"}}\n' for n in numbers))
        case _:
            mark = "\t" if suffix == "tsv" else ","
            path.write_text(f"url{mark}caption\n" + "".join(f"u{n}{mark}caption {n}\n" for n in numbers))
    whole = read(path)
    monkeypatch.setattr(inputs, "BLOCK_BYTES", 64)
    assert len(list(inputs.read_blocks(str(path), Columns()))) > (0 if suffix == "parquet" else 20)
    assert read(path).equals(whole)
    assert whole["row"].to_pylist() == list(numbers)
    assert whole["url"].to_pylist() == [f"u{n}" for n in numbers]


@pytest.mark.parametrize(("suffix", "mark"), [("tsv", "\t"), ("csv", ",")])
def test_a_list_without_a_header_takes_its_names_from_the_config(tmp_path: Path, suffix: str, mark: str) -> None:
    path = written(tmp_path / f"cc3m.{suffix}", f"a cat{mark}http://a/1\na dog{mark}http://a/2\n")
    found = read(path, Columns(header=("caption", "url")))
    assert found["raw_caption"].to_pylist() == ["a cat", "a dog"]
    assert found["url"].to_pylist() == ["http://a/1", "http://a/2"]
    with pytest.raises(InputError, match="no column 'url', expected it among: caption, link"):
        read(path, Columns(header=("caption", "link")))
    wrong = Columns(header=("caption", "url", "n"))
    with pytest.raises(InputError, match=r"no row can be read, the first has 2 columns, expected 3: 'a cat"):
        inputs.cut_file(str(path), wrong, Staging(str(tmp_path / "s"), 10, 5))


def test_tabs_separate_and_quotes_mean_nothing_in_tsv(tmp_path: Path) -> None:
    path = written(tmp_path / "list.tsv", 'url\tcaption\nu\t"open, never closed\nv\t"a" cat\'s\nw\t""\n')
    assert read(path)["raw_caption"].to_pylist() == ['"open, never closed', '"a" cat\'s', '""']


def test_columns_of_text_files_stay_text(tmp_path: Path) -> None:
    path = written(tmp_path / "list.tsv", "url\tcaption\tn\tword\nu\t2020-01-01\t007\tnull\nv\ttrue\t1e5\tNA\n")
    found = read(path)
    assert found["raw_caption"].to_pylist() == ["2020-01-01", "true"]
    assert found["n"].to_pylist() == ["007", "1e5"]
    assert found["word"].to_pylist() == ["null", "NA"]


def test_line_ends_and_byte_order_marks_of_other_systems_are_read(tmp_path: Path) -> None:
    path = written(tmp_path / "list.tsv", b"\xef\xbb\xbfurl\tcaption\r\nu\ta cat\r\nv\tno line end")
    assert read(path)["raw_caption"].to_pylist() == ["a cat", "no line end"]
    assert read(path)["url"].to_pylist() == ["u", "v"]


def test_urls_are_trimmed_and_those_of_spaces_alone_are_missing(tmp_path: Path) -> None:
    path = written(tmp_path / "list.tsv", "url\tcaption\n  http://a/1 \tc\n \u00a0 \tc\n")
    assert read(path)["url"].to_pylist() == ["http://a/1", None]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.tsv", b"link\tcaption\na\tb\n", "no column 'url', expected it among: link, caption"),
        ("list.tsv", b"url\ttext\na\tb\n", "no column 'caption'"),
        ("list.tsv", b"url\tcaption\nc\td\te\n", "no row can be read, the first has 3 columns, expected 2: 'c"),
        ("list.jsonl", b'{"url": \n', "no row can be read, the first has Expecting value"),
        ("list.jsonl", b'{"url": ["a"], "caption": "b"}\n', "no row can be read, the first has url is no text"),
        ("list.jsonl", b'{"url": "a"}\n', "no column 'caption', expected it among: url"),
        ("list.parquet", b"PAR1 no", "not a readable parquet file"),
    ],
)
def test_a_bad_list_is_reported_in_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = written(tmp_path / name, content)
    with pytest.raises(InputError) as caught:
        cut(path, tmp_path / "staging", partition=10, part=5)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "staging/sources").exists(), "a list that failed is not taken for done"


def test_a_ragged_row_of_a_later_block_is_a_reject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "list.tsv", tsv(100) + "one\ttwo\tthree\n" + "u\tc\n" * 50)
    monkeypatch.setattr(inputs, "BLOCK_BYTES", 256)
    found = pa.concat_tables(
        [inputs.normalize_columns(block, Columns(), "d", 0, "x") for block in inputs.read_blocks(str(path), Columns())],
        promote_options="default",
    )
    assert [number for number, reason in enumerate(found["reason"].to_pylist()) if reason] == [100]
    assert found["detail"][100].as_py() == "3 columns, expected 2: 'one\\ttwo\\tthree'"


def test_a_header_that_is_no_text_is_reported_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"list\.tsv"):
        read(written(tmp_path / "list.tsv", b"url\tcaption\t\xff\na\tb\tc\n"))


@pytest.mark.parametrize("header", ["url,caption,n,n", "url,url,caption,n"])
def test_columns_of_one_name_are_reported_in_one_line(tmp_path: Path, header: str) -> None:
    with pytest.raises(InputError, match=r"list\.csv"):
        read(written(tmp_path / "list.csv", f"{header}\na,b,c,d\n"))


def test_captions_of_several_lines_may_cross_blocks_of_csv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "list.csv", "url,caption\n" + 'http://a,"one\ntwo three"\n' * 6)
    monkeypatch.setattr(inputs, "BLOCK_BYTES", 64)
    assert read(path)["raw_caption"].to_pylist() == ["one\ntwo three"] * 6


def test_captions_of_several_lines_are_read_from_a_block_of_csv(tmp_path: Path) -> None:
    path = written(tmp_path / "list.csv", 'url,caption\nu,"one\ntwo, three"\nv,"a ""b"""\n')
    assert read(path)["raw_caption"].to_pylist() == ["one\ntwo, three", 'a "b"']


def test_empty_lines_are_no_rows(tmp_path: Path) -> None:
    path = written(tmp_path / "list.tsv", "\nurl\tcaption\nu\tone\n\nv\ttwo\n")
    assert read(path)["raw_caption"].to_pylist() == ["one", "two"]


def test_captions_of_jsonl_that_look_like_dates_stay_as_they_are(tmp_path: Path) -> None:
    path = written(tmp_path / "list.jsonl", '{"url": "u", "caption": "2020-01-01"}\n')
    assert read(path)["raw_caption"].to_pylist() == ["2020-01-01"]


@pytest.mark.parametrize(
    ("first", "later"),
    [
        pytest.param({"caption": None}, {"caption": "text"}, id="text"),
        pytest.param({"caption": "2020-01-01"}, {"caption": "text"}, id="date-caption"),
        pytest.param({}, {"n": 1}, id="field"),
        pytest.param({"n": 1}, {}, id="no-field"),
        pytest.param({"n": None}, {"n": True}, id="null"),
        pytest.param({"n": 1}, {"n": 1.5}, id="float"),
        pytest.param({"n": []}, {"n": ["x"]}, id="list"),
        pytest.param({"n": {"a": 1, "b": None}}, {"n": {"a": None, "b": 1.5}}, id="struct"),
    ],
)
@pytest.mark.parametrize("block", [128, inputs.BLOCK_BYTES])
def test_later_blocks_of_jsonl_may_hold_what_the_first_did_not(
    tmp_path: Path, block: int, first: dict[str, object], later: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"url": "u", "caption": "c", **row} for row in (first, later) for _ in range(10)]
    path = written(tmp_path / "list.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))
    monkeypatch.setattr(inputs, "BLOCK_BYTES", block)
    found = read(path)
    assert found["raw_caption"].to_pylist() == [row["caption"] for row in rows]
    if "n" in {**first, **later}:
        assert found["n"].to_pylist() == [row.get("n") for row in rows]


def test_dates_of_jsonl_are_text_whatever_else_their_block_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dates = ["2020-01-01"] * 10 + ["unknown"] * 10
    path = written(tmp_path / "list.jsonl", "".join(f'{{"url": "u", "caption": "c", "n": "{n}"}}\n' for n in dates))
    assert read(path)["n"].to_pylist() == dates
    monkeypatch.setattr(inputs, "BLOCK_BYTES", 128)
    assert read(path)["n"].to_pylist() == dates


def test_empty_lines_and_those_longer_than_a_block_of_jsonl_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = '{"url": "u", "caption": "x"}\n'
    monkeypatch.setattr(inputs, "BLOCK_BYTES", len(line))
    long = line.replace("x", "many words " * 9)
    path = written(tmp_path / "list.jsonl", f"\n{line}\n{long}{line}\r\n\n{line.strip()}")
    assert read(path)["raw_caption"].to_pylist() == ["x", "many words " * 9, "x", "x"]


def test_a_line_of_jsonl_may_be_longer_than_a_block(tmp_path: Path) -> None:
    lines = [json.dumps({"url": "u", "caption": letter * (5 << 19)}) for letter in "ab"]
    path = written(tmp_path / "list.jsonl", "\n".join(lines))
    assert [caption[0] for caption in read(path)["raw_caption"].to_pylist()] == ["a", "b"]


def test_samples_of_a_shard_are_rows_and_those_that_cannot_be_used_are_rejected(tmp_path: Path) -> None:
    members = {"0.jpg": b"x", "0.cls": b"cat", "1.jpg": b"y", "2.txt": b"a dog", "3.jpg": b"z", "3.json": b"["}
    path = write_tar(tmp_path / "a.tar", members | {"4.jpg": b"w", "4.json": b'{"kind": "Dog", "reason": "r", "n": 2}'})
    found = read(path, Columns(label="kind")).to_pylist()
    assert [(row["label"], row["raw_caption"], row["url"] is None) for row in found] == [
        ("cat", "a photo of a cat", False), (None, None, True), (None, "a dog", True), (None, None, True),
        ("dog", "a photo of a dog", False),
    ]  # fmt: skip
    assert [(row["stage"], row["reason"]) for row in found] == [
        (None, None), ("input", "bad_row"), ("input", "bad_row"), ("input", "bad_row"), (None, None),
    ]  # fmt: skip
    assert [row["detail"] and row["detail"].partition(":")[0] for row in found] == [None, "1", "2", "3", None]
    assert [(row["n"], row["input_reason"]) for row in found] == [(None, None)] * 4 + [(2, "r")]
    assert cut(path, tmp_path, partition=10, part=10).columns == {
        "input_reason": "string", "kind": "string", "n": "int64",
    }  # fmt: skip
    unlabelled = read(path)
    assert unlabelled["kind"].to_pylist() == [None] * 4 + ["Dog"]
    assert [row["reason"] for row in unlabelled.to_pylist()] == [None, None, "bad_row", "bad_row", None]


def test_fields_of_a_shard_may_differ_between_samples(tmp_path: Path) -> None:
    members = {
        "0.jpg": b"x",
        "1.jpg": b"x",
        "1.json": b'{"n": 1}',
        "2.jpg": b"x",
        "2.json": b'{"n": 0.5, "t": "2020-01-01"}',
    }
    found = read(write_tar(tmp_path / "a.tar", members))
    assert found["n"].to_pylist() == [None, 1.0, 0.5]
    assert found["t"].to_pylist() == [None, None, "2020-01-01"]
    assert "stage" not in found.column_names


def test_shards_are_found_by_braces_patterns_and_folders(tmp_path: Path) -> None:
    for name in ("00000.tar", "00001.tar", "00002.TAR", "00000.parquet", "00000_stats.json", "sub/00003.tar", "_x.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        written(tmp_path / name, "x")

    def found(pattern: str) -> list[str]:
        return [file.rpartition(f"{tmp_path}/")[2] for file in inputs.find_shards(f"{tmp_path}/{pattern}")]

    assert found("{00000..00001}.tar") == ["00000.tar", "00001.tar"]
    assert found("{00001,00000}.tar") == ["00001.tar", "00000.tar"]
    assert found("{00000..00001..1}.{tar,tar}") == ["00000.tar", "00001.tar"]
    assert found("{*,sub/*}.tar") == ["00000.tar", "00001.tar", "sub/00003.tar"]
    assert found("") == ["00000.tar", "00001.tar", "00002.TAR", "sub/00003.tar"]
    assert inputs.find_shards(f"{tmp_path.as_uri()}/0000{{0,1}}.tar")[1] == f"{tmp_path.as_uri()}/00001.tar"
    for pattern, message in (("{00000..00009}.tar", "00002.tar: cannot be read"), ("{a", "Unbalanced braces")):
        with pytest.raises(InputError, match=message):
            found(pattern)
    for pattern in ("pipe:cat a.tar", "PIPE:cat {a,b}.tar", "{a.tar,pipe:cat b.tar}"):
        with pytest.raises(InputError, match="a command, which is never run; expected a path or URI"):
            inputs.find_shards(pattern)


def test_further_columns_stay_and_those_that_clash_with_ours_are_renamed() -> None:
    rows = pa.table({"URL": ["u"], "TEXT": ["c"], "width": [5], "url": ["other"], "reason": ["r"], "license": ["by"]})
    found = inputs.normalize_columns(rows, Columns(url="URL", caption="TEXT"), "digest", 7, "here")
    assert found.column_names == [
        "source", "row", "url", "raw_caption", "input_width", "input_url", "input_reason", "license",
    ]  # fmt: skip
    assert found.to_pylist()[0]["row"] == 7
    assert found.to_pylist()[0]["input_url"] == "other"


@pytest.mark.parametrize("name", ["id", "embedding"])
def test_columns_that_rows_get_on_their_way_are_renamed_too(name: str) -> None:
    found = inputs.normalize_columns(pa.table({"url": ["u"], "caption": ["c"], name: [1]}), Columns(), "d", 0, "here")
    assert found.column_names[-1] == f"input_{name}"


def test_a_renamed_column_does_not_replace_another() -> None:
    rows = pa.table({"url": ["u"], "caption": ["c"], "width": [1], "input_width": [2]})
    found = inputs.normalize_columns(rows, Columns(), "digest", 0, "here").to_pylist()[0]
    assert {1, 2} <= set(found.values())


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.binary()])
def test_text_of_any_kind_is_taken(kind: pa.DataType) -> None:
    text = pa.array(["u", None], pa.string())
    rows = pa.table({"url": text.cast(kind), "caption": text.cast(kind)})
    found = inputs.normalize_columns(rows, Columns(), "digest", 0, "here")
    assert found["url"].to_pylist() == ["u", None]
    assert found.schema.field("raw_caption").type == pa.string()


def test_files_of_a_folder_or_a_pattern_come_in_alphabetical_order(tmp_path: Path) -> None:
    for name in ("b.tsv", "a.jsonl", "c.txt", "sub/d.parquet", "B.CSV"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        written(tmp_path / name, "x")

    def found(pattern: str) -> list[str]:
        files = inputs.find_lists(pattern)
        return [file.rpartition(f"{tmp_path}/")[2] for file in files]

    assert found(f"{tmp_path}/b.tsv") == ["b.tsv"]
    assert found(str(tmp_path)) == found(f"{tmp_path}/") == ["B.CSV", "a.jsonl", "b.tsv", "sub/d.parquet"]
    assert found(f"{tmp_path}/?.tsv") == ["b.tsv"]
    assert found(f"{tmp_path}/*/*.parquet") == ["sub/d.parquet"]
    assert inputs.find_lists(f"{tmp_path.as_uri()}/*.tsv") == [f"{tmp_path}/b.tsv"]
    assert inputs.find_lists(f"{tmp_path.as_uri()}/b.tsv") == [f"{tmp_path.as_uri()}/b.tsv"]


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("", f"--urls: missing, expected a file, folder or pattern of URL lists ({inputs.FORMATS})"),
        ("missing.tsv", f"missing.tsv: cannot be read, expected a URL list ({inputs.FORMATS})"),
        ("*.parquet", "*.parquet: cannot be read, expected a URL list"),
        ("no/such/folder/*.tsv", "cannot be read, expected a URL list"),
        ("list.xml", f"list.xml: unknown format, expected a URL list ({inputs.FORMATS})"),
        ("list", "list: unknown format"),
        ("a.tar", f"a.tar: unknown format, expected a URL list ({inputs.FORMATS})"),
        ("*.tar", f"*.tar: cannot be read, expected a URL list ({inputs.FORMATS})"),
        ("none://bucket/list.tsv", "none://bucket/list.tsv: not a storage location"),
    ],
)
def test_a_missing_list_is_reported(tmp_path: Path, uri: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "list.xml", "http://a/1")
    written(tmp_path / "list", "http://a/1")
    written(tmp_path / "a.tar", b"")
    with pytest.raises(InputError) as caught:
        inputs.find_lists(uri)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_may_have_brackets_in_its_name(tmp_path: Path) -> None:
    (tmp_path / "lists[1]").mkdir()
    path = written(tmp_path / "lists[1]/a.tsv", "x")
    for uri in ("lists[1]", "lists[1]/*.tsv", "list*[1]/?.tsv"):
        assert inputs.find_lists(f"{tmp_path}/{uri}") == [str(path)]


@pytest.mark.parametrize("name", ["my list.tsv", "100%25.tsv", "é.tsv", "[1].tsv", "a#b.tsv"])
def test_files_behind_a_uri_can_be_opened_whatever_their_name(tmp_path: Path, name: str) -> None:
    written(tmp_path / name, "x")
    assert [storage.read_bytes(file) for file in inputs.find_lists(tmp_path.as_uri())] == [b"x"]


def test_files_of_an_object_store_are_uris_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "day=1").mkdir()
    written(tmp_path / "day=1" / "my list.tsv", "x")
    bucket = fs.SubTreeFileSystem(str(tmp_path.parent), fs.LocalFileSystem())
    monkeypatch.setattr(storage, "resolve", lambda uri: (bucket, uri.removeprefix("s3://")))
    assert inputs.find_lists(f"s3://{tmp_path.name}/day=1/*.tsv") == [f"s3://{tmp_path.name}/day=1/my list.tsv"]


def test_a_star_stays_within_a_folder(tmp_path: Path) -> None:
    for name in ("a.tsv", "sub/b.tsv", ".hidden.tsv", "_unfinished.tsv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        written(tmp_path / name, "x")
    assert inputs.find_lists(f"{tmp_path}/*.tsv") == [f"{tmp_path}/a.tsv"]
    assert inputs.find_lists(str(tmp_path)) == [f"{tmp_path}/a.tsv", f"{tmp_path}/sub/b.tsv"]


def test_a_digest_is_that_of_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = np.random.default_rng(0).bytes(1000)
    path = written(tmp_path / "a.parquet", content)
    monkeypatch.setattr(inputs, "BLOCK_BYTES", 64)
    assert inputs.file_digest(str(path)) == inputs.file_digest(path.as_uri()) == storage.sha256(content)[:16]
    with pytest.raises(InputError, match=r"none\.tsv: cannot be read"):
        inputs.file_digest(str(tmp_path / "none.tsv"))


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6, 7, 11, 12, 13])
@pytest.mark.parametrize("block", [48, inputs.BLOCK_BYTES])
def test_cuts_are_exact_at_the_boundaries(
    tmp_path: Path, rows: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "list.tsv", tsv(rows))
    monkeypatch.setattr(inputs, "BLOCK_BYTES", block)
    monkeypatch.setattr(staging, "ROWS_PER_GROUP", 3)
    source = cut(path, tmp_path, partition=6, part=2)
    assert source == Source(digest=inputs.file_digest(str(path)), rows=rows, rows_per_partition=6, columns={})
    files = sorted((tmp_path / "rows").iterdir())
    assert [file.name for file in files] == [f"{name}.parquet" for name in source.partitions]
    numbers = list(range(rows))
    for start, (name, count) in zip(range(0, rows, 6), source.partitions.items(), strict=True):
        with pq.ParquetFile(Staging(str(tmp_path), 6, 2).rows_uri(name)) as file:
            assert [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)][:-1] in ([], [3])
            assert file.read()["row"].to_pylist() == numbers[start : start + 6]
        for number in range(-(-count // 2)):
            part = Staging(str(tmp_path), 6, 2).read_part(Part(name, number))
            assert part["row"].to_pylist() == numbers[start : start + count][2 * number : 2 * number + 2]
            assert part["source"].to_pylist() == [source.digest] * part.num_rows


def test_a_source_without_rows_has_no_partitions() -> None:
    assert Source(digest="d", rows=0, rows_per_partition=6, columns={}).partitions == {}


@pytest.mark.parametrize(("suffix", "kind"), [("tsv", "string"), ("csv", "string"), ("jsonl", "int64")])
def test_a_source_tells_the_types_of_its_further_columns(tmp_path: Path, suffix: str, kind: str) -> None:
    path = written(tmp_path / f"list.{suffix}", LISTS[suffix].replace(b"n\n", b"width\n").replace(b'"n"', b'"width"'))
    source = cut(path, tmp_path, partition=3, part=2)
    assert source.columns == {"input_width": kind}
    assert cut(path, tmp_path, partition=3, part=2).columns == source.columns


def test_blocks_without_rows_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = pa.table({"url": ["u"], "caption": ["c"]})
    blocks = [some.slice(1), some, some.slice(1), some]
    monkeypatch.setattr(inputs, "read_blocks", lambda uri, columns: iter(blocks))
    found = cut(written(tmp_path / "x", "one"), tmp_path, partition=10, part=10)
    assert found.rows == 2
    blocks = [some.slice(1)]
    assert cut(written(tmp_path / "x", "other"), tmp_path, partition=10, part=10).rows == 0


def test_a_file_that_was_cut_is_not_cut_again(tmp_path: Path) -> None:
    path = written(tmp_path / "list.tsv", tsv(5))
    source = cut(path, tmp_path, partition=3, part=2)
    for file in (tmp_path / "rows").iterdir():
        file.unlink()
    assert cut(path, tmp_path, partition=3, part=2) == source
    assert list((tmp_path / "rows").iterdir()) == []


def test_a_file_that_was_cut_in_part_is_cut_anew_to_the_same_bytes(tmp_path: Path) -> None:
    path = written(tmp_path / "list.tsv", tsv(5))
    source = cut(path, tmp_path, partition=3, part=2)
    before = {file.name: file.read_bytes() for file in (tmp_path / "rows").iterdir()}
    (tmp_path / f"sources/{source.digest}.json").unlink()  # what a kill before the end leaves
    (tmp_path / "rows" / sorted(before)[1]).unlink()
    assert cut(path, tmp_path, partition=3, part=2) == source
    assert {file.name: file.read_bytes() for file in (tmp_path / "rows").iterdir()} == before
    assert json.loads((tmp_path / f"sources/{source.digest}.json").read_bytes())["rows"] == 5


@pytest.mark.parametrize("suffix", ["tsv", "csv", "jsonl"])
def test_a_large_list_is_read_in_a_stream(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"list.{suffix}"
    row = {"tsv": "{}\t{}\n", "csv": "{},{}\n", "jsonl": '{{"url": "{}", "caption": "{}"}}\n'}[suffix]
    with path.open("w") as file:
        file.write("" if suffix == "jsonl" else row.format("url", "caption"))
        for number in range(200_000):
            url = f"http://example.org/pictures/of/some/kind/{number}.jpg"
            file.write(row.format(url, f"a caption of a common length {number}"))
    size = path.stat().st_size
    monkeypatch.setattr(inputs, "BLOCK_BYTES", 1 << 16)
    before, most, count = pa.total_allocated_bytes(), 0, 0
    tracemalloc.start()
    for block in inputs.read_blocks(str(path), Columns()):
        most, count = max(most, pa.total_allocated_bytes() - before), count + block.num_rows
        del block
    python = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 200_000
    assert most + python < size / 3


def test_names_of_our_tables_are_all_guarded() -> None:
    for name in {*tables.SCHEMAS["pairs"].names, *tables.SCHEMAS["rejects"].names} - {"url", "caption"}:
        found = inputs.normalize_columns(
            pa.table({"url": ["u"], "caption": ["c"], name: [1]}), Columns(), "d", 0, "here"
        )
        assert found.column_names == ["source", "row", "url", "raw_caption", f"input_{name}"]
