import io
import json
import pickle
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import webdataset
from PIL import Image

from data_prep import storage, tables
from data_prep.concepts.names import NameMatcher
from data_prep.pairs import inputs, shards
from data_prep.pairs.decode import DecodeConfig, decode_body, with_images
from data_prep.pairs.dedup import DECISIONS
from data_prep.pairs.fetch import Fetched, with_fetch_status
from data_prep.pairs.filters import FilterConfig, filter_rows
from data_prep.pairs.inputs import Columns
from data_prep.pairs.rows import LIGHT, RowNumbering
from data_prep.pairs.shards import PartitionJob, PartitionPart, WrittenPartition, runs_of_size, write_partition
from data_prep.pairs.staging import Part, Staging

SAMPLES = [("000", b"first", "one"), ("001", b"x" * 512, "zwei \u00e4"), ("002", b"", "")]
SOURCE = "0123456789abcdef"
PARTITION = "0123456789abcdef-000001"
CATS = NameMatcher.parse(["cat", "dog"])


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


@pytest.mark.parametrize(
    ("sizes", "most", "runs"),
    [
        ([], 10, []),
        ([3], 10, [(0, 1)]),
        ([30], 10, [(0, 1)]),
        ([4, 6], 10, [(0, 2)]),
        ([4, 6, 1], 10, [(0, 2), (2, 3)]),
        ([30, 1, 30], 10, [(0, 1), (1, 2), (2, 3)]),
        ([0, 30, 0], 10, [(0, 1), (1, 2), (2, 3)]),
        ([5, 5, 5, 5, 5], 10, [(0, 2), (2, 4), (4, 5)]),
        ([0, 0, 0], 0, [(0, 3)]),
    ],
)
def test_runs_are_as_long_as_their_size_allows(sizes: list[int], most: int, runs: list[tuple[int, int]]) -> None:
    assert list(runs_of_size(sizes, most)) == runs


# A partition of ten rows, 10 to 19 of their list, in parts of four: what the crawl leaves of each.


def photo(seed: int, side: int = 64) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (side // 8, side // 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


CRAWLED = {
    10: (Fetched(content=photo(10), http_status=200, attempts=1), "A cat"),
    11: (Fetched(reason="dns", detail="no such host", attempts=3), "a dog"),
    12: (Fetched(content=b"<html>", http_status=200, attempts=1), "not an image"),
    13: (Fetched(content=photo(13, 16), http_status=200, attempts=2), "too small"),
    14: (Fetched(content=photo(10), http_status=200, attempts=1), "the same bytes"),
    15: None,  # its URL came before
    16: (Fetched(content=photo(16), http_status=200, attempts=1), "two <b>dogs</b> and a cat"),
    17: None,
    18: (Fetched(content=photo(18), http_status=200, attempts=1), "near another"),
    19: (Fetched(content=photo(19), http_status=200, attempts=1), "neither"),
}
REPEATED_URLS = {15: 10, 17: 3}
DUPLICATES = {14: ("duplicate_bytes", None, 10), 18: ("near_duplicate", "3 of 64 bits differ", 16)}


def listed(first: int = 10, last: int = 19) -> pa.Table:
    rows = range(first, last + 1)
    captions = [CRAWLED[row][1] if CRAWLED[row] else "came before" for row in rows]
    blocks = pa.table({"url": [f"http://a/{row}" for row in rows], "caption": captions, "license": ["by"] * len(rows)})
    return inputs.normalize_columns(blocks, Columns(), SOURCE, first, "list")


def outcome(rows: pa.Table, fetched: Sequence[Fetched]) -> pa.Table:
    """Rows with the results of their fetches."""
    images = [one.content and decode_body(one.content, DecodeConfig()) for one in fetched]
    return filter_rows(with_images(with_fetch_status(rows, fetched), images), FilterConfig())


def stage_crawl(staging: Staging, rows: pa.Table | None = None, partition: str = PARTITION) -> None:
    """Stage a partition as a crawl does: its input rows and the results of each part; the last part first."""
    rows, size = listed() if rows is None else rows, staging.part_rows
    staging.write_rows(partition, rows)
    for number in reversed(range(-(-rows.num_rows // size))):
        own = rows.slice(number * size, size)
        own = own.filter(pa.array([CRAWLED[row] is not None for row in own["row"].to_pylist()]))
        fetched = [CRAWLED[row][0] for row in own["row"].to_pylist()]
        staging.write_part(outcome(own, fetched), Part(partition, number))


def job(root: Path, part_rows: int = 4, **changes: object) -> PartitionJob:
    options = {"max_bytes": 1 << 30, **changes}
    order = RowNumbering.of({SOURCE: 100, "another": 50})
    staging = Staging(str(root / "staging"), 10, part_rows)
    return PartitionJob(storage=str(root / "out"), name="t", staging=staging, order=order, **options)


def decisions(order: RowNumbering, rows: Sequence[int] = tuple(range(10, 20))) -> pa.Table:
    def number(row: int) -> int:
        return int(order.ids(SOURCE, np.array([row]))[0])

    reasons = {row: ("duplicate_url", None, first) for row, first in REPEATED_URLS.items()} | DUPLICATES
    found = [
        {"id": number(row), "stage": "dedup", "reason": reason, "detail": detail, "duplicate_of": number(first)}
        for row, (reason, detail, first) in sorted(reasons.items())
        if row in rows
    ]
    return pa.Table.from_pylist(found, schema=DECISIONS)


def write(shared: PartitionJob, *, samples: bool = False) -> WrittenPartition:
    return write_partition(shared, CATS, PartitionPart(PARTITION, decisions(shared.order), samples))


def published(shared: PartitionJob, written: WrittenPartition) -> tuple[pa.Table, pa.Table]:
    for table, files in (("pairs", written.files["pairs"]), ("rejects", written.files["rejects"])):
        tables.publish(shared.storage, table, "t", files, producer="test", config_hash="h")
    return tables.read_table(shared.storage, "pairs", "t"), tables.read_table(shared.storage, "rejects", "t")


def test_every_row_of_a_partition_is_kept_or_rejected_once(tmp_path: Path) -> None:
    shared = job(tmp_path)
    stage_crawl(shared.staging)
    written = write(shared)
    pairs, rejects = published(shared, written)
    assert pairs["row"].to_pylist() == [10, 16, 19]
    assert [(row["row"], row["stage"], row["reason"]) for row in rejects.to_pylist()] == [
        (11, "fetch", "dns"),
        (12, "decode", "not_an_image"),
        (13, "filter", "too_small"),
        (14, "dedup", "duplicate_bytes"),
        (15, "dedup", "duplicate_url"),
        (17, "dedup", "duplicate_url"),
        (18, "dedup", "near_duplicate"),
    ]
    reasons = {
        "dns": 1,
        "duplicate_bytes": 1,
        "duplicate_url": 2,
        "near_duplicate": 1,
        "not_an_image": 1,
        "too_small": 1,
    }
    assert (written.kept, written.rejected) == (3, reasons)
    assert list(written.rejected) == sorted(reasons)


def test_kept_rows_are_range_reads_of_the_shard(tmp_path: Path) -> None:
    shared = job(tmp_path)
    stage_crawl(shared.staging)
    pairs, _ = published(shared, write(shared))
    assert pairs.column_names == [*tables.SCHEMAS["pairs"].names, "license"]
    assert pairs["key"].to_pylist() == [f"0123456789abcdef-{row:010d}" for row in (10, 16, 19)]
    assert pairs["caption"].to_pylist() == ["A cat", "two dogs and a cat", "neither"]
    assert pairs["raw_caption"].to_pylist() == ["A cat", "two <b>dogs</b> and a cat", "neither"]
    for row in pairs.to_pylist():
        uri = storage.join(shared.storage, "pairs", "t", row["shard"])
        image = storage.read_bytes(uri, offset=row["offset"], size=row["size"])
        assert storage.sha256(image) == row["image_id"]
    path = tmp_path / f"out/pairs/t/shards/{PARTITION}.tar"
    found = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [sample["__key__"] for sample in found] == pairs["key"].to_pylist()
    assert [sample["txt"].decode() for sample in found] == pairs["caption"].to_pylist()


def test_rejected_rows_tell_what_was_seen_and_whom_they_duplicate(tmp_path: Path) -> None:
    shared = job(tmp_path)
    stage_crawl(shared.staging)
    _, rejects = published(shared, write(shared))
    assert rejects.column_names == [*tables.SCHEMAS["rejects"].names, "license"]
    rows = {row["row"]: row for row in rejects.to_pylist()}
    survivors = {row: values["duplicate_of"] for row, values in rows.items() if values["stage"] == "dedup"}
    assert survivors == {
        row: {"source": SOURCE, "row": first} for row, first in ((14, 10), (15, 10), (17, 3), (18, 16))
    }
    assert all(rows[row]["duplicate_of"] is None for row in (11, 12, 13))
    assert {row: values["attempts"] for row, values in rows.items()} == {
        11: 3, 12: 1, 13: 2, 14: 1, 15: None, 17: None, 18: 1,
    }  # fmt: skip
    assert (rows[11]["http_status"], rows[12]["http_status"], rows[15]["http_status"]) == (None, 200, None)
    assert rows[11]["detail"] == "no such host"
    assert rows[18]["detail"] == "3 of 64 bits differ"
    assert [rows[row]["caption"] for row in (11, 13, 15)] == ["a dog", "too small", "came before"]
    assert rows[17]["url"] == "http://a/17"


def test_statistics_add_up(tmp_path: Path) -> None:
    shared = job(tmp_path)
    stage_crawl(shared.staging)
    written = write(shared)
    pairs, rejects = published(shared, written)
    stats = json.loads((tmp_path / f"out/pairs/t/stats/{PARTITION}.json").read_bytes())
    assert stats["partition"] == PARTITION
    assert stats["rows"] == 10 == stats["kept"] + sum(stats["rejected"].values())
    assert (stats["kept"], stats["rejected"]) == (pairs.num_rows, written.rejected)
    assert sum(stats["rejected"].values()) == rejects.num_rows
    assert stats["image_bytes"] == sum(pairs["size"].to_pylist())
    assert sum(entry.rows for entry in written.files["pairs"]) == pairs.num_rows
    for entry in written.files["pairs"]:
        content = (tmp_path / "out/pairs/t" / entry.path).read_bytes()
        assert (entry.size, entry.sha256) == (len(content), storage.sha256(content))


def test_mentions_are_staged_for_the_groups(tmp_path: Path) -> None:
    shared = job(tmp_path)
    stage_crawl(shared.staging)
    pairs, _ = published(shared, write(shared))
    mentions = shared.staging.open("mentions", shards.MENTIONS).to_table()
    assert mentions["names"].to_pylist() == [["cat"], ["cat", "dog"], []]
    assert mentions.select(shards.GROUP_COLUMNS).to_pylist() == pairs.select(shards.GROUP_COLUMNS).to_pylist()
    storage.remove_folder(f"{shared.staging.uri}/mentions")
    index = next(entry.path for entry in tables.read_manifest(shared.storage, "pairs", "t").files if entry.rows)
    shards.stage_published_mentions(shared, CATS, index)
    assert shared.staging.open("mentions", shards.MENTIONS).to_table().equals(mentions)


def bytes_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_staging_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        shared = job(tmp_path / name)
        stage_crawl(shared.staging)
        write(shared)
    parts = job(tmp_path / "c", part_rows=3)
    stage_crawl(parts.staging)
    write(parts)
    found = bytes_below(tmp_path / "a/out")
    assert found == bytes_below(tmp_path / "b/out") == bytes_below(tmp_path / "c/out")
    assert sorted(found) == [
        f"pairs/t/index/{PARTITION}.parquet",
        f"pairs/t/shards/{PARTITION}.tar",
        f"pairs/t/stats/{PARTITION}.json",
        f"rejects/t/{PARTITION}.parquet",
    ]


def test_a_rerun_reads_what_was_written(tmp_path: Path) -> None:
    shared = job(tmp_path)
    stage_crawl(shared.staging)
    written = write(shared)
    storage.remove_folder(f"{shared.staging.uri}/parts")
    storage.remove_folder(f"{shared.storage}/pairs")
    assert write(shared) == written
    assert not (tmp_path / "out/pairs").exists()


def test_a_rerun_of_what_was_not_finished_gives_the_same(tmp_path: Path) -> None:
    shared = job(tmp_path)
    stage_crawl(shared.staging)
    written, before = write(shared), bytes_below(tmp_path / "out")
    (tmp_path / f"staging/written/{PARTITION}.json").unlink()
    (tmp_path / f"out/pairs/t/index/{PARTITION}.parquet").unlink()
    assert write(shared) == written
    assert bytes_below(tmp_path / "out") == before


def tar_bytes(*rows: int) -> int:
    """Size of the tar of some of the kept rows."""
    captions = {10: "A cat", 16: "two dogs and a cat", 19: "neither"}
    return len(shards.pack((str(row), photo(row), captions[row]) for row in rows)[0])


def test_a_large_shard_is_continued_in_other_files(tmp_path: Path) -> None:
    shared = job(tmp_path, max_bytes=tar_bytes(10, 16))
    stage_crawl(shared.staging)
    written = write(shared)
    pairs, _ = published(shared, written)
    first, second = f"shards/{PARTITION}.tar", f"shards/{PARTITION}-1.tar"
    assert pairs["shard"].to_pylist() == [first, first, second]
    assert pairs["offset"].to_pylist()[0] == pairs["offset"].to_pylist()[2] == 512
    for row in pairs.to_pylist():
        uri = storage.join(shared.storage, "pairs", "t", row["shard"])
        assert storage.sha256(storage.read_bytes(uri, offset=row["offset"], size=row["size"])) == row["image_id"]
    assert [entry.path for entry in written.files["pairs"] if entry.path.endswith(".tar")] == [first, second]


def test_no_shard_of_several_images_is_larger_than_the_limit(tmp_path: Path) -> None:
    two, three = tar_bytes(10, 16), tar_bytes(10, 16, 19)
    for limit in (1, two - 1, two, three - 1, three):
        runs: list[list[int]] = []
        for row in (10, 16, 19):
            if runs and tar_bytes(*runs[-1], row) <= limit:
                runs[-1].append(row)
            else:
                runs.append([row])
        shared = job(tmp_path / str(limit), max_bytes=limit)
        stage_crawl(shared.staging)
        written = write(shared)
        shard = published(shared, written)[0]["shard"].to_pylist()
        sizes = {entry.path: entry.size for entry in written.files["pairs"] if entry.path.endswith(".tar")}
        assert [shard.count(path) for path in sizes] == [len(run) for run in runs]
        assert list(sizes.values()) == [tar_bytes(*run) for run in runs]
    assert runs == [[10, 16, 19]]


def test_a_partition_without_kept_rows_has_rejects_and_statistics_alone(tmp_path: Path) -> None:
    shared = job(tmp_path)
    stage_crawl(shared.staging, listed(11, 13))
    written = write_partition(shared, CATS, PartitionPart(PARTITION, DECISIONS.empty_table(), True))
    assert written.rejected == {"dns": 1, "not_an_image": 1, "too_small": 1}
    assert (written.kept, [entry.path for entry in written.files["pairs"]]) == (0, [f"stats/{PARTITION}.json"])
    assert shared.staging.files("mentions") == []
    assert json.loads((tmp_path / f"out/pairs/t/stats/{PARTITION}.json").read_bytes())["image_bytes"] == 0


def test_a_partition_of_nothing_but_repeated_urls_was_never_fetched(tmp_path: Path) -> None:
    shared = job(tmp_path)
    stage_crawl(shared.staging, listed(15, 15))
    assert shared.staging.files("parts") == []
    written = write(shared)
    _, rejects = published(shared, written)
    assert written.rejected == {"duplicate_url": 1}
    row = rejects.to_pylist()[0]
    assert (row["row"], row["attempts"], row["caption"], row["license"]) == (15, None, "came before", "by")
    assert row["duplicate_of"] == {"source": SOURCE, "row": 10}


def test_a_partition_without_rejected_rows_has_no_file_of_them(tmp_path: Path) -> None:
    shared = job(tmp_path)
    stage_crawl(shared.staging, listed(19, 19))
    written = write(shared, samples=True)
    assert (written.kept, written.rejected, written.files["rejects"]) == (1, {}, [])
    assert shared.staging.files("samples") == []


def test_a_row_of_unknown_fate_is_an_error(tmp_path: Path) -> None:
    shared = job(tmp_path)
    stage_crawl(shared.staging)
    with pytest.raises(AssertionError, match="neither staged nor rejected"):
        write_partition(shared, CATS, PartitionPart(PARTITION, decisions(shared.order, [14]), False))
    assert not (tmp_path / "out").exists()


def test_samples_show_a_row_of_each_reason(tmp_path: Path) -> None:
    shared = job(tmp_path)
    stage_crawl(shared.staging)
    written = write(shared, samples=True)
    found = shared.staging.open("samples", shards.SAMPLES).to_table().to_pylist()
    assert {row["reason"] for row in found} == set(written.rejected)
    rows = {row["reason"]: row for row in found}
    assert rows["duplicate_url"]["url"] == "http://a/15"
    assert rows["dns"]["detail"] == "no such host"
    pictured = [reason for reason, row in rows.items() if row["picture"]]
    assert pictured == ["too_small", "duplicate_bytes", "near_duplicate"]
    with Image.open(io.BytesIO(rows["near_duplicate"]["picture"])) as picture:
        assert (picture.format, picture.size) == ("JPEG", (64, 64))


def test_a_thumbnail_is_a_small_picture_of_the_same_shape() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (900, 300), "red").save(buffer, "JPEG")
    with Image.open(io.BytesIO(shards.thumbnail(buffer.getvalue()))) as small:
        assert small.size == (128, 43)


def test_a_list_with_ids_of_its_own_keeps_them(tmp_path: Path) -> None:
    shared = job(tmp_path)
    rows = pa.table({"url": ["http://a/19"], "text": ["a cat"], "id": [4711]})
    stage_crawl(shared.staging, inputs.normalize_columns(rows, Columns(caption="text"), SOURCE, 19, "coyo"))
    pairs, _ = published(shared, write(shared))
    assert pairs["input_id"].to_pylist() == [4711]


def test_a_list_with_scores_of_its_own_keeps_them(tmp_path: Path) -> None:
    shared = job(tmp_path)
    rows = pa.table({"url": ["http://a/19"], "caption": ["a cat"], "score_theirs": [0.5]})
    stage_crawl(shared.staging, inputs.normalize_columns(rows, Columns(), SOURCE, 19, "list"))
    written = write(shared)
    pairs, _ = published(shared, written)
    assert written.files["scores"] == []
    assert 0.5 in pairs.to_pylist()[0].values()


def test_rows_that_are_tried_again_join_the_earlier_rejects(tmp_path: Path) -> None:
    shared = job(tmp_path)
    stage_crawl(shared.staging)
    _, before = published(shared, write(shared))
    again = job(tmp_path, suffix="-retry1", earlier_rejects={PARTITION: f"{PARTITION}.parquet"})
    storage.remove_folder(shared.staging.uri)
    rows = listed(11, 13)
    again.staging.write_rows(PARTITION, rows)
    fetched = [Fetched(content=photo(seed), http_status=200, attempts=1) for seed in (11, 12)]
    rows = outcome(rows, [*fetched, Fetched(reason="timeout", attempts=2)])
    again.staging.write_part(rows, Part(PARTITION, 0))
    written = write_partition(again, CATS, PartitionPart(PARTITION, DECISIONS.empty_table(), False))
    assert (written.kept, written.rejected) == (2, {"timeout": 1})
    pairs, rejects = published(again, written)
    assert pairs["row"].to_pylist() == [11, 12]
    assert set(pairs["shard"].to_pylist()) == {f"shards/{PARTITION}-retry1.tar"}
    assert [entry.path for entry in written.files["rejects"]] == [f"{PARTITION}-retry1.parquet"]
    wanted = [row for row in before.to_pylist() if row["row"] >= 13]
    wanted[0] |= {"stage": "fetch", "reason": "timeout", "detail": None, "http_status": None, "attempts": 2}
    assert rejects.to_pylist() == wanted
    assert rejects.schema.equals(before.schema)


def test_staged_files_are_sorted_and_unfinished_ones_ignored(tmp_path: Path) -> None:
    staging = Staging(str(tmp_path), 10, 4)
    assert staging.files("parts") == []
    for name in ("b.parquet", "a.parquet", "c.parquet.1234.tmp"):
        storage.write_bytes(str(tmp_path / "parts" / name), b"")
    assert staging.files("parts") == [str(tmp_path / "parts" / name) for name in ("a.parquet", "b.parquet")]
    storage.remove_folder(str(tmp_path / "parts"))
    storage.remove_folder(str(tmp_path / "parts"))
    assert staging.files("parts") == []


def test_the_light_columns_of_all_parts_are_opened(tmp_path: Path) -> None:
    shared = job(tmp_path)
    stage_crawl(shared.staging)
    found = shared.staging.open("parts", LIGHT).to_table()
    assert found.schema.equals(LIGHT)
    assert found["row"].to_pylist() == [10, 11, 12, 13, 14, 16, 18, 19]
    assert found["reason"].to_pylist() == [None, "dns", "not_an_image", "too_small", None, None, None, None]


def test_a_part_without_rows_is_not_staged(tmp_path: Path) -> None:
    staging = Staging(str(tmp_path), 10, 4)
    staging.write_part(outcome(listed().slice(0, 0), []), Part(PARTITION, 0))
    assert list(staging.open_parts(PARTITION, 10)) == []
    assert list(tmp_path.iterdir()) == []


def test_decisions_of_a_partition_are_copied_alone() -> None:
    count = 500_000
    columns = [range(count), *[["near_duplicate"] * count] * 3, range(count)]
    rows = pa.table([pa.array(column) for column in columns], schema=DECISIONS)
    decisions = pa.Table.from_batches(rows.to_batches(max_chunksize=1 << 16))  # as they come from the corpus
    assert shards.decisions_between(decisions, 100_000, 100_050).equals(rows.slice(100_000, 50))
    usual, counting = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(counting)
    try:
        size = len(pickle.dumps(shards.decisions_between(decisions, 100_000, 100_050)))
    finally:
        pa.set_memory_pool(usual)
    assert (counting.max_memory() or 0) < 1 << 20
    assert size < 1 << 14
