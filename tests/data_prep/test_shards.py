import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from data_prep import shards, storage, tables
from ovd_models.errors import InputError

SAMPLES = [("000", b"first", "one"), ("001", b"x" * 512, "zwei \u00e4"), ("002", b"", "")]


def test_the_offset_of_an_image_is_where_its_bytes_lie() -> None:
    tar, offsets = shards.pack(SAMPLES)
    assert offsets == [512, 2560, 4608]  # a header of 512; then image, header, text, header of 512 each
    for (_, image, _), offset in zip(SAMPLES, offsets, strict=True):
        assert tar[offset : offset + len(image)] == image


def test_the_bytes_depend_on_the_samples_alone() -> None:
    assert shards.pack(SAMPLES) == shards.pack(list(SAMPLES))
    with tarfile.open(fileobj=io.BytesIO(shards.pack(SAMPLES)[0])) as tar:
        members = tar.getmembers()
    assert [member.name for member in members] == ["000.jpg", "000.txt", "001.jpg", "001.txt", "002.jpg", "002.txt"]
    assert {(member.mtime, member.uid, member.mode, member.uname) for member in members} == {(0, 0, 0o644, "")}


def test_webdataset_reads_a_shard(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(shards.pack(SAMPLES)[0])
    found = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in found] == ["000", "001", "002"]
    assert [sample["jpg"] for sample in found] == [b"first", b"x" * 512, b""]
    assert found[1]["txt"].decode() == "zwei \u00e4"


def test_an_empty_shard_is_a_valid_tar() -> None:
    tar, offsets = shards.pack([])
    assert offsets == []
    with tarfile.open(fileobj=io.BytesIO(tar)) as opened:
        assert opened.getmembers() == []


def test_partitions_are_runs_of_input_rows() -> None:
    rows = pa.table({"row": pa.array([0, 1, 4, 5, 6, 13], pa.int64())})
    found = [(number, part["row"].to_pylist()) for number, part in shards.partitions(rows, 5)]
    assert found == [(0, [0, 1, 4]), (1, [5, 6]), (2, [13])]
    assert list(shards.partitions(rows.slice(0, 0), 5)) == []


LISTS = {
    "tsv": b'url\tcaption\tn\nhttp://a/1\ta "quoted" cat, really\t1\n\tno url\t2\n',
    "csv": b'url,caption,n\nhttp://a/1,"a ""quoted"" cat, really",1\n,no url,2\n',
    "jsonl": b'{"url": "http://a/1", "caption": "a \\"quoted\\" cat, really", "n": 1}\n{"caption": "no url", "n": 2}\n',
}


@pytest.mark.parametrize("suffix", [*LISTS, "parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"list.{suffix}"
    if suffix == "parquet":
        url, caption = ["http://a/1", None], ['a "quoted" cat, really', "no url"]
        pq.write_table(pa.table({"url": url, "caption": caption, "n": [1, 2]}), path)
    else:
        path.write_bytes(LISTS[suffix])
    found = shards.read_list(str(path), "url", "caption")
    assert found.rows["row"].to_pylist() == [0, 1]
    assert found.rows["url"].to_pylist() == ["http://a/1", None]
    assert found.rows["raw_caption"].to_pylist() == ['a "quoted" cat, really', "no url"]
    assert found.rows["n"].to_pylist() == [1, 2]
    assert set(found.rows["source"].to_pylist()) == {found.digest}
    assert found.digest == storage.sha256(path.read_bytes())[:16]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.tsv", None, "cannot be read, expected a URL list"),
        ("list.txt", b"http://a/1", "unknown format, expected .tsv, .csv, .jsonl or .parquet"),
        ("list.tsv", b"", "not a tsv file that can be read"),
        ("list.tsv", b"url\tcaption\n", "holds no rows"),
        ("list.tsv", b"link\tcaption\na\tb\n", "no column 'url', expected it among: link, caption"),
        ("list.tsv", b"url\ttext\na\tb\n", "no column 'caption'"),
        ("list.tsv", b"url\tcaption\na\tb\nc\td\te\n", "Row #3: Expected 2 columns, got 3"),
        ("list.tsv", b"url\tcaption\na\t\xff\xfe\n", "UTF8"),
        ("list.jsonl", b'{"url": "a", "caption": "b"}\n{"url": \n', "not a jsonl file"),
        ("list.jsonl", b'{"url": ["a"], "caption": "b"}\n', "column 'url' holds list<item: string>, expected text"),
        ("list.parquet", b"PAR1 no", "not a parquet file"),
    ],
)
def test_a_bad_list_is_told_in_one_line(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        shards.read_list(str(path), "url", "caption")
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_extra_columns_that_clash_with_ours_are_renamed() -> None:
    rows = pa.table({"url": ["u"], "caption": ["c"], "width": [5], "license": ["by"]})
    found = shards.as_listing(rows, "url", "caption", "digest", "here").rows
    assert found.column_names == ["source", "row", "url", "raw_caption", "input_width", "license"]


def staged_rows(first: int, contents: list[bytes | None]) -> pa.Table:
    count = len(contents)
    rows = {
        "source": ["s"] * count,
        "row": list(range(first, first + count)),
        "url": [f"u{number}" for number in range(first, first + count)],
        "raw_caption": ["Raw"] * count,
        "caption": ["clean"] * count,
        "image_id": [content and storage.sha256(content) for content in contents],
        "content": pa.array(contents, pa.large_binary()),
        "stage": pa.array([None if content else "fetch" for content in contents], pa.string()),
        "reason": pa.array([None if content else "dns" for content in contents], pa.string()),
        "detail": pa.array([None] * count, pa.string()),
        "http_status": pa.array([200 if content else None for content in contents], pa.int32()),
        "attempts": pa.array([1] * count, pa.int32()),
        "phash": pa.array([2**63 + 1] * count, pa.uint64()),
        "license": ["by"] * count,
    }
    sizes = {
        name: pa.array([64] * count, pa.int32()) for name in ("width", "height", "original_width", "original_height")
    }
    return pa.table({**rows, **sizes})


def test_a_partition_is_written_from_all_its_staged_parts(tmp_path: Path) -> None:
    root, staging = str(tmp_path / "out"), str(tmp_path / "staging")
    light = shards.stage_part(staged_rows(12, [b"c", b"a"]), staging, 10)  # saved out of order, as a resumed run may
    shards.stage_part(staged_rows(10, [b"a", None]), staging, 10)
    shards.stage_part(staged_rows(20, [b"other partition"]), staging, 10)
    assert light.column_names == ["row", "reason"]
    reference = pa.struct([("source", pa.string()), ("row", pa.int64())])
    repeats = shards.Repeats(
        urls=pa.table(
            {"source": ["s"], "row": [15], "url": ["u10"], "raw_caption": ["Raw"]},
        ).append_column("duplicate_of", pa.array([{"source": "s", "row": 10}], reference)),
        images=pa.table({"row": [13]}).append_column("duplicate_of", pa.array([{"source": "s", "row": 10}], reference)),
    )
    written = shards.write_shard(root, "t", staging, 1, repeats)
    assert written.rejected == {"dns": 1, "duplicate_bytes": 1, "duplicate_url": 1}
    assert written.pairs.column_names == shards.GROUP_COLUMNS
    tables.publish(root, "pairs", "t", written.pairs_files, producer="test", config_hash="h")
    tables.publish(root, "rejects", "t", written.rejects_files, producer="test", config_hash="h")

    pairs = tables.read_table(root, "pairs", "t")
    assert pairs.column_names == [*tables.SCHEMAS["pairs"].names, "license"]
    assert pairs["row"].to_pylist() == [10, 12]
    assert pairs["key"].to_pylist() == ["000000010", "000000012"]
    for row in pairs.to_pylist():
        uri = storage.join(root, "pairs", "t", row["shard"])
        image = storage.read_bytes(uri, offset=row["offset"], size=row["size"])
        assert storage.sha256(image) == row["image_id"]
    rejects = tables.read_table(root, "rejects", "t").to_pylist()
    assert [(row["row"], row["stage"], row["reason"]) for row in rejects] == [
        (11, "fetch", "dns"), (13, "dedup", "duplicate_bytes"), (15, "dedup", "duplicate_url"),
    ]  # fmt: skip
    assert [row["duplicate_of"] for row in rejects] == [None, *[{"source": "s", "row": 10}] * 2]
    assert [row["caption"] for row in rejects] == ["Raw"] * 3
    assert [row["attempts"] for row in rejects] == [1, 1, None]


def test_a_partition_without_kept_rows_has_rejects_alone(tmp_path: Path) -> None:
    root, staging = str(tmp_path / "out"), str(tmp_path / "staging")
    shards.stage_part(staged_rows(0, [None]), staging, 10)
    none = pa.table(
        {"source": pa.array([], pa.string()), "row": pa.array([], pa.int64()), "url": pa.array([], pa.string())}
    )
    none = none.append_column("raw_caption", pa.array([], pa.string())).append_column(
        "duplicate_of", pa.array([], tables.SCHEMAS["rejects"].field("duplicate_of").type)
    )
    written = shards.write_shard(root, "t", staging, 0, shards.Repeats(urls=none, images=none))
    assert (written.pairs_files, written.rejected, written.pairs.num_rows) == ([], {"dns": 1}, 0)
    assert json.dumps(written.rejected)


def test_nothing_staged_is_an_empty_table(tmp_path: Path) -> None:
    assert shards.read_staged(str(tmp_path / "none"), ["row", "reason"]).column_names == ["row", "reason"]
    shards.remove_folder(str(tmp_path / "none"))
