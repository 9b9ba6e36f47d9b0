from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import tables
from data_prep.pairs import growth, inputs
from data_prep.pairs.growth import CrawlPlan, Published, combine_files, count_rejected, plan_crawl, stage_rejects
from data_prep.pairs.inputs import Columns
from data_prep.pairs.rows import NEW, RowNumbering
from data_prep.pairs.shards import WrittenPartition
from data_prep.pairs.staging import Part, Staging, partition_name
from data_prep.parts import HERE
from ovd_models.errors import InputError

A, B = "aaaaaaaa11111111", "bbbbbbbb22222222"
REASONS = {0: "timeout", 2: "dns", 3: "timeout", 4: "http_status", 13: "dns", 14: "too_small", 21: "timeout"}
"""Of the rejected rows of A, in partitions of ten."""


def rejects(rows: Sequence[int]) -> pa.Table:
    count = len(rows)
    columns: dict[str, Any] = {
        "source": [A] * count,
        "row": list(rows),
        "url": [f"http://a/{row}" for row in rows],
        "caption": [f"Caption {row}" for row in rows],
        "stage": ["fetch"] * count,
        "reason": [REASONS[row] for row in rows],
        "detail": ["seen"] * count,
        "http_status": [500] * count,
        "attempts": [3] * count,
        "duplicate_of": [{"source": A, "row": 1}] * count,
    }
    found = pa.table(columns, schema=tables.SCHEMAS["rejects"].remove_metadata())
    return found.append_column("license", pa.array([f"by {row}" for row in rows]))


def pairs(rows: Sequence[int]) -> pa.Table:
    schema = tables.SCHEMAS["pairs"].remove_metadata()
    filled = {
        "image_id": [f"image {row}" for row in rows],
        "source": [A] * len(rows),
        "row": list(rows),
        "url": [f"http://a/{row}" for row in rows],
        "caption": [f"caption {row}" for row in rows],
        "phash": [(1 << 63) + row for row in rows],
    }
    columns = [filled.get(name, [None] * len(rows)) for name in schema.names]
    return pa.table([pa.array(column, kind) for column, kind in zip(columns, schema.types, strict=True)], schema=schema)


def publish(
    root: Path, kept: Sequence[int] = (1, 5), rejected: Sequence[Sequence[int]] = ((0, 2, 3, 4), (13, 14), (21,))
) -> Published:
    """Generation 0 of tables of the source A."""
    uri = str(root)
    files = {
        "rejects": [
            tables.write_part(uri, "rejects", "t", f"{partition_name(A, rows[0] // 10)}.parquet", rejects(rows))
            for rows in rejected
        ],
        "pairs": [tables.write_file(uri, "pairs", "t", "stats/x.json", b"{}")],
    }
    if kept:
        files["pairs"].append(tables.write_part(uri, "pairs", "t", "index/x.parquet", pairs(kept)))
        files["pairs"].append(tables.write_file(uri, "pairs", "t", "shards/x.tar", b"tar"))
    rejected_for = Counter(REASONS[row] for rows in rejected for row in rows)
    details = {
        "generation": 0,
        "sources": {A: 30},
        "columns": {"license": "string"},
        "progress": [],
        "summary": {"rejected": dict(rejected_for)},
        "files": {"rejects": [asdict(entry) for entry in files["rejects"]], "scores": []},
    }
    for table, entries in files.items():
        tables.publish(uri, table, "t", entries, producer="test", config_hash="hash", details=details)
    found = Published.find(uri, "t")
    assert found is not None
    return found


def test_rows_rejected_for_a_reason_are_staged_for_another_try(tmp_path: Path) -> None:
    staging = Staging(str(tmp_path / "s"), 10, 1)
    found = stage_rejects(publish(tmp_path), ["timeout"], staging)
    first, last = partition_name(A, 0), partition_name(A, 2)
    assert found == ({first: 2, last: 1}, {"timeout": 3}, {first: f"{first}.parquet", last: f"{last}.parquet"})
    assert staging.read_part(Part(first, 1))["url"].to_pylist() == ["http://a/3"]


def test_retried_rows_look_like_an_input(tmp_path: Path) -> None:
    staging = Staging(str(tmp_path / "s"), 10, 100)
    partitions, retried, _ = stage_rejects(publish(tmp_path), ["dns", "http_status"], staging)
    assert list(partitions.values()) == [2, 1]
    assert retried == {"dns": 2, "http_status": 1}
    rows = pq.read_table(staging.rows_uri(partition_name(A, 0)))
    assert rows.to_pylist() == [
        {"source": A, "row": row, "url": f"http://a/{row}", "raw_caption": f"Caption {row}", "license": f"by {row}"}
        for row in (2, 4)
    ]


def test_parts_of_retried_rows_are_row_groups(tmp_path: Path) -> None:
    every, staging = sorted(set(REASONS.values())), Staging(str(tmp_path), 10, 3)
    partitions, retried, earlier = stage_rejects(publish(tmp_path), every, staging)
    assert (sum(partitions.values()), sum(retried.values())) == (7, 7)
    plan = CrawlPlan(sources={A: 30}, columns={}, partitions=partitions, retried=retried, earlier_rejects=earlier)
    repeated = np.array([NEW + 2])  # as an id of another list might be
    found = [staging.read_part(part)["row"].to_pylist() for part in plan.parts(staging, repeated)]
    assert found == [[0, 2, 3], [4], [13, 14], [21]]


@pytest.mark.parametrize("reasons", [[], ["blank"]])
def test_without_such_rows_there_is_nothing_to_retry(tmp_path: Path, reasons: list[str]) -> None:
    assert stage_rejects(publish(tmp_path), reasons, Staging(str(tmp_path / "s"), 10, 3)) == ({}, {}, {})
    assert not (tmp_path / "s").exists()


def test_nothing_is_published_until_pairs_are(tmp_path: Path) -> None:
    assert Published.find(str(tmp_path), "t") is None
    tables.publish(str(tmp_path), "rejects", "t", [], producer="test", config_hash="h")
    assert Published.find(str(tmp_path), "t") is None


def test_published_tables_give_their_rows(tmp_path: Path) -> None:
    found = publish(tmp_path)
    assert (found.sources, found.generation, found.pairs.config_hash) == ({A: 30}, 0, "hash")
    assert found.index_files() == ["index/x.parquet"]
    assert found.urls().schema.equals(growth.URLS)
    urls = {row["row"]: row["url"] for row in found.urls().to_table().to_pylist()}
    assert urls == {row: f"http://a/{row}" for row in (0, 1, 2, 3, 4, 5, 13, 14, 21)}
    assert found.images().to_table().to_pylist() == [
        {"source": A, "row": row, "image_id": f"image {row}", "phash": (1 << 63) + row, "caption": f"caption {row}"}
        for row in (1, 5)
    ]


def test_tables_without_kept_or_rejected_rows_can_be_opened(tmp_path: Path) -> None:
    none_kept = publish(tmp_path / "a", kept=())
    assert none_kept.images().to_table().num_rows == 0
    assert none_kept.urls().to_table().num_rows == 7
    none_rejected = publish(tmp_path / "b", rejected=())
    assert none_rejected.urls().to_table().num_rows == 2
    nothing = publish(tmp_path / "c", kept=(), rejected=())
    assert nothing.urls().to_table().schema.equals(growth.URLS)


def test_tables_of_an_older_version_are_refused(tmp_path: Path) -> None:
    details = {"generation": 0, "sources": {A: 30}}
    tables.publish(str(tmp_path), "pairs", "t", [], producer="test", config_hash="hash", details=details)
    with pytest.raises(InputError, match="pairs/t: made by another version of this program, expected another"):
        Published.find(str(tmp_path), "t")


def test_a_new_generation_adds_files_and_counts_and_replaces_retried_rejects(tmp_path: Path) -> None:
    published, name = publish(tmp_path), partition_name(A, 0)
    entries = {
        table: [tables.FileEntry(path, 1, 1, "0")]
        for table, path in (("pairs", "index/new"), ("rejects", "new"), ("scores", "new"))
    }
    written = [WrittenPartition(kept=1, rejected={"timeout": 1}, files=entries)]
    plan = CrawlPlan(
        sources={A: 30},
        columns={},
        partitions={name: 2},
        retried={"timeout": 2},
        earlier_rejects={name: f"{name}.parquet"},
    )
    files = combine_files(published, plan, written)
    assert files["pairs"] == [*published.files["pairs"], *entries["pairs"]]
    assert files["rejects"] == [*published.files["rejects"][1:], *entries["rejects"]]
    assert files["scores"] == entries["scores"]
    assert count_rejected(published, plan, written) == {"dns": 2, "http_status": 1, "timeout": 2, "too_small": 1}
    assert count_rejected(None, plan, written) == {"timeout": 1}
    with pytest.raises(AssertionError, match="every row is kept or rejected"):
        count_rejected(published, plan, [])


def test_a_run_killed_between_two_manifests_publishes_no_file_twice(tmp_path: Path) -> None:
    before = publish(tmp_path)
    name = f"{partition_name(B, 0)}.parquet"
    added = tables.write_part(str(tmp_path), "rejects", "t", name, rejects([21]))
    files = [*before.files["rejects"], added]
    tables.publish(str(tmp_path), "rejects", "t", files, producer="test", config_hash="hash")  # then the kill
    again = Published.find(str(tmp_path), "t")
    assert again is not None
    assert again.files["rejects"] == before.files["rejects"]  # the run that goes on adds `added` to these


def test_a_plan_is_saved_and_loaded(tmp_path: Path) -> None:
    staging = Staging(str(tmp_path), 10, 5)
    assert CrawlPlan.load(staging) is None
    plan = CrawlPlan(
        sources={B: 7, A: 30},
        columns={"license": "string"},
        partitions={"x": 3},
        retried={"dns": 1},
        earlier_rejects={"x": "x.parquet"},
    )
    plan.save(staging)
    assert CrawlPlan.load(staging) == plan
    assert (plan.order, plan.rows) == (RowNumbering.of({A: 30, B: 7}), 3)


def test_parts_cover_every_row_of_every_partition_except_skipped_ones() -> None:
    plan = CrawlPlan(sources={A: 30}, columns={}, partitions={f"{A}-000000": 10, f"{A}-000001": 4, f"{A}-000002": 5})
    repeated = NEW + np.array([0, 4, 7, 13])
    assert plan.parts(Staging("", 10, 5), repeated) == [
        Part(f"{A}-000000", 0, (0, 4), 3),
        Part(f"{A}-000000", 1, (2,), 4),
        Part(f"{A}-000001", 0, (3,), 3),
        Part(f"{A}-000002", 0, (), 5),
    ]
    assert len(plan.parts(Staging("", 10, 1), repeated)) == plan.rows == 19
    assert Part(f"{A}-000001", 2).name == f"{A}-000001-00002.parquet"
    assert CrawlPlan(sources={A: 3}, columns={}, partitions={}).parts(Staging("", 10, 5), repeated) == []


def test_the_first_id_of_a_partition_is_that_of_its_first_row() -> None:
    plan = CrawlPlan(sources={B: 25, A: 30}, columns={}, partitions={})
    for source, rows, base in ((A, 30, 0), (B, 25, 30)):
        partitions = inputs.Source(digest=source, rows=rows, rows_per_partition=10, columns={}).partitions
        assert [plan.first_id(name, 10) for name in partitions] == [NEW + base, NEW + base + 10, NEW + base + 20]
        first = int(plan.order.ids(source, np.array([20]))[0])
        assert plan.first_id(partition_name(source, 2), 10) == first


def test_lists_whose_digests_begin_alike_have_partitions_of_their_own() -> None:
    twin = A[:8] + "99999999"
    assert partition_name(A, 0) != partition_name(twin, 0)
    plan = CrawlPlan(sources={A: 30, twin: 20}, columns={}, partitions={})
    assert plan.first_id(partition_name(A, 1), 10) == NEW + 10
    assert plan.first_id(partition_name(twin, 1), 10) == NEW + 40


def write_list(root: Path, **further: Sequence[object]) -> str:
    """A list of two rows with further columns; its path."""
    path = root / f"{len(list(root.iterdir()))}.parquet"
    pq.write_table(pa.table({"url": ["http://b/0", "http://b/1"], "caption": ["c", "d"], **further}), path)
    return str(path)


def test_a_plan_is_made_once_from_new_lists_and_rejected_rows(tmp_path: Path) -> None:
    published, staging = publish(tmp_path), Staging(str(tmp_path / "s"), 10, 5)
    path = write_list(tmp_path, license=["by", "by"], n=[1, 2])
    plan = plan_crawl([path], Columns(), published, ["dns"], staging, HERE)
    digest, again = inputs.file_digest(path), {f"{A}-000000": 1, f"{A}-000001": 1}
    assert plan == CrawlPlan(
        sources={A: 30, digest: 2},
        columns={"license": "string", "n": "int64"},
        partitions={f"{digest}-000000": 2, **again},
        retried={"dns": 2},
        earlier_rejects={name: f"{name}.parquet" for name in again},
        part_rows=5,
    )
    assert plan_crawl([], Columns(), None, [], staging, HERE) == plan  # the plan of a killed run


def staged(staging: Staging, path: str, column: str) -> list[object]:
    """A column of a list's only partition."""
    rows = tables.read_parquet(staging.rows_uri(partition_name(inputs.file_digest(path), 0)))
    found: list[object] = rows[column].to_pylist()
    return found


@pytest.mark.parametrize(
    ("first", "second", "kind", "expected"),
    [
        ([1, 2], [1.5, 2.5], "double", [1.0, 2.0]),
        ([1, 2], ["x", "y"], "string", ["1", "2"]),
        ([1.5, None], ["x", "y"], "string", ["1.5", None]),
        ([True, False], [1, 2], "string", ["true", "false"]),
        ([["a"], []], ["x", "y"], "string", ['["a"]', "[]"]),
        ([{"k": 1}, None], ["x", "y"], "string", ['{"k": 1}', None]),
        ([[1], [2]], [["a"], ["b"]], "string", ["[1]", "[2]"]),
        (np.array([1, 2], np.int32), [3, 4], "int64", [1, 2]),
        (np.array([1, 2], np.float32), [3.0, 4.0], "double", [1.0, 2.0]),
        (np.array([1, 2], np.uint8), [-3, 4], "int64", [1, 2]),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_columns_of_different_types_are_promoted(
    tmp_path: Path, first: Sequence[object], second: Sequence[object], kind: str, expected: list[object], turned: bool
) -> None:
    lists = [write_list(tmp_path, n=first), write_list(tmp_path, n=second)]
    staging = Staging(str(tmp_path / "s"), 10, 5)
    plan = plan_crawl(lists[::-1] if turned else lists, Columns(), None, [], staging, HERE)
    assert plan.columns == {"n": kind}
    assert staged(staging, lists[0], "n") == expected


def test_new_lists_take_the_types_of_published_columns(tmp_path: Path) -> None:
    published, path = publish(tmp_path), write_list(tmp_path, license=[1, 2])
    staging = Staging(str(tmp_path / "s"), 10, 5)
    assert plan_crawl([path], Columns(), published, [], staging, HERE).columns["license"] == "string"
    assert staged(staging, path, "license") == ["1", "2"]


def test_a_value_that_a_published_column_cannot_hold_is_refused_with_its_file(tmp_path: Path) -> None:
    published, path = publish(tmp_path), write_list(tmp_path, license=["x", "y"])
    numbers = replace(
        published, pairs=replace(published.pairs, details={**published.pairs.details, "columns": {"license": "int64"}})
    )
    with pytest.raises(InputError, match=rf"^{path}: column 'license' holds string, elsewhere int64"):
        plan_crawl([path], Columns(), numbers, [], Staging(str(tmp_path / "s"), 10, 5), HERE)


def test_empty_lists_are_passed_over_unless_all_are(tmp_path: Path) -> None:
    empty = str(tmp_path / "empty.tsv")
    (tmp_path / "empty.tsv").write_text("")
    path, staging = write_list(tmp_path), Staging(str(tmp_path / "s"), 10, 5)
    plan = plan_crawl([empty, path], Columns(), None, [], staging, HERE)
    assert plan.rows == 2
    assert plan.first_id(partition_name(inputs.file_digest(path), 0), 10) >= 0
    with pytest.raises(InputError, match=r"empty\.tsv: holds no rows, expected at least one"):
        plan_crawl([empty], Columns(), None, [], Staging(str(tmp_path / "t"), 10, 5), HERE)


@pytest.mark.parametrize(
    ("rows", "in_work", "expected"), [(2_146, 8, 8), (4_000, 8, 15), (15_000, 8, 58), (60_000, 8, 100), (20, 1, 8)]
)
def test_parts_of_a_short_list_are_small(tmp_path: Path, rows: int, in_work: int, expected: int) -> None:
    """Those in work hold 3 % of the rows, but each has eight rows or more."""
    staging = Staging(str(tmp_path / "s"), 1000, 100)
    path = tmp_path / "list.parquet"
    pq.write_table(pa.table({"url": [f"http://b/{row}" for row in range(rows)], "caption": ["c"] * rows}), path)
    plan = plan_crawl([str(path)], Columns(), None, [], staging, HERE, parts_in_work=in_work)
    assert plan.part_rows == expected
    parts = plan.parts(replace(staging, part_rows=plan.part_rows), NEW + np.array([3]))
    assert sum(part.rows for part in parts) == rows - 1
    assert {part.rows for part in parts[1:-1]} <= {expected, 1000 % expected}


def test_a_column_without_values_fits_every_type(tmp_path: Path) -> None:
    lists = [write_list(tmp_path, n=[None, None]), write_list(tmp_path, n=[1, 2])]
    plan = plan_crawl(lists, Columns(), None, [], Staging(str(tmp_path / "s"), 10, 5), HERE)
    assert plan.columns == {"n": "int64"}
