from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_prep.pairs.generations import CrawlPlan, Cut, Published, cut_rejects, plan

from data_prep import tables
from data_prep.pairs import generations, inputs
from data_prep.pairs.inputs import Columns, Part
from data_prep.pairs.order import NEW, RowNumbering
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
            tables.write_part(uri, "rejects", "t", f"{inputs.partition_name(A, rows[0] // 10)}.parquet", rejects(rows))
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


def test_rows_rejected_for_a_reason_are_cut_for_another_try(tmp_path: Path) -> None:
    found = cut_rejects(publish(tmp_path), ["timeout"], str(tmp_path / "s"), partition=10, part=1)
    first, last = inputs.partition_name(A, 0), inputs.partition_name(A, 2)
    assert found == ({first: 2, last: 1}, {"timeout": 3}, {first: f"{first}.parquet", last: f"{last}.parquet"})
    assert inputs.read_part(Part(first, 1), str(tmp_path / "s"))["url"].to_pylist() == ["http://a/3"]


def test_what_is_tried_again_looks_like_an_input(tmp_path: Path) -> None:
    partitions, retried, _ = cut_rejects(
        publish(tmp_path), ["dns", "http_status"], str(tmp_path / "s"), partition=10, part=100
    )
    assert list(partitions.values()) == [2, 1]
    assert retried == {"dns": 2, "http_status": 1}
    rows = pq.read_table(inputs.rows_file(str(tmp_path / "s"), inputs.partition_name(A, 0)))
    assert rows.to_pylist() == [
        {"source": A, "row": row, "url": f"http://a/{row}", "raw_caption": f"Caption {row}", "license": f"by {row}"}
        for row in (2, 4)
    ]


def test_parts_of_what_is_tried_again_are_row_groups(tmp_path: Path) -> None:
    every = sorted(set(REASONS.values()))
    partitions, retried, earlier = cut_rejects(publish(tmp_path), every, str(tmp_path), partition=10, part=3)
    assert (sum(partitions.values()), sum(retried.values())) == (7, 7)
    crawl_plan = CrawlPlan(sources={A: 30}, columns={}, partitions=partitions, retried=retried, earlier_rejects=earlier)
    repeated = np.array([NEW + 2])  # as an id of another list might be
    found = [inputs.read_part(part, str(tmp_path))["row"].to_pylist() for part in crawl_plan.parts(10, 3, repeated)]
    assert found == [[0, 2, 3], [4], [13, 14], [21]]


@pytest.mark.parametrize("reasons", [[], ["blank"]])
def test_without_such_rows_there_is_nothing_to_try(tmp_path: Path, reasons: list[str]) -> None:
    assert cut_rejects(publish(tmp_path), reasons, str(tmp_path / "s"), partition=10, part=3) == ({}, {}, {})
    assert not (tmp_path / "s").exists()


def test_nothing_is_published_until_pairs_are(tmp_path: Path) -> None:
    assert Published.find(str(tmp_path), "t") is None
    tables.publish(str(tmp_path), "rejects", "t", [], producer="test", config_hash="h")
    assert Published.find(str(tmp_path), "t") is None


def test_published_tables_tell_their_rows(tmp_path: Path) -> None:
    found = publish(tmp_path)
    assert (found.sources, found.generation, found.config_hash) == ({A: 30}, 0, "hash")
    assert found.index_files() == ["index/x.parquet"]
    assert found.urls().schema.equals(generations.URLS)
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
    assert nothing.urls().to_table().schema.equals(generations.URLS)


def test_pairs_that_do_not_tell_of_their_rejects_are_told(tmp_path: Path) -> None:
    details = {"generation": 0, "sources": {A: 30}}
    tables.publish(str(tmp_path), "pairs", "t", [], producer="test", config_hash="hash", details=details)
    with pytest.raises(InputError, match="pairs/t: made by a program that this one cannot go on from, expected a new"):
        Published.find(str(tmp_path), "t")


def test_rejected_rows_are_counted_by_reason(tmp_path: Path) -> None:
    found = publish(tmp_path)
    assert found.rejected_for(["timeout"]) == 3
    assert found.rejected_for(["timeout", "blank", "dns"]) == 5
    assert found.rejected_for(sorted(set(REASONS.values()))) == len(REASONS)
    assert found.rejected_for(["blank"]) == found.rejected_for([]) == 0
    assert publish(tmp_path / "none", rejected=()).rejected_for(["timeout"]) == 0


def test_a_run_killed_between_two_manifests_publishes_no_file_twice(tmp_path: Path) -> None:
    before = publish(tmp_path)
    name = f"{inputs.partition_name(B, 0)}.parquet"
    added = tables.write_part(str(tmp_path), "rejects", "t", name, rejects([21]))
    files = [*before.files["rejects"], added]
    tables.publish(str(tmp_path), "rejects", "t", files, producer="test", config_hash="hash")  # then the kill
    again = Published.find(str(tmp_path), "t")
    assert again is not None
    assert again.files["rejects"] == before.files["rejects"]  # the run that goes on adds `added` to these


def test_work_is_saved_and_loaded(tmp_path: Path) -> None:
    assert CrawlPlan.load(str(tmp_path)) is None
    crawl_plan = CrawlPlan(
        sources={B: 7, A: 30},
        columns={"license": "string"},
        partitions={"x": 3},
        retried={"dns": 1},
        earlier_rejects={"x": "x.parquet"},
    )
    assert crawl_plan.save(str(tmp_path)) is crawl_plan
    assert CrawlPlan.load(str(tmp_path)) == crawl_plan
    assert (crawl_plan.order, crawl_plan.rows) == (RowNumbering.of({A: 30, B: 7}), 3)


def test_parts_cover_every_row_of_every_partition_but_those_left_out() -> None:
    crawl_plan = CrawlPlan(
        sources={A: 30}, columns={}, partitions={f"{A}-000000": 10, f"{A}-000001": 4, f"{A}-000002": 5}
    )
    repeated = NEW + np.array([0, 4, 7, 13])
    assert crawl_plan.parts(10, 5, repeated) == [
        Part(f"{A}-000000", 0, (0, 4)),
        Part(f"{A}-000000", 1, (2,)),
        Part(f"{A}-000001", 0, (3,)),
        Part(f"{A}-000002", 0),
    ]
    assert len(crawl_plan.parts(10, 1, repeated)) == crawl_plan.rows == 19
    assert Part(f"{A}-000001", 2).name == f"{A}-000001-00002.parquet"
    assert CrawlPlan(sources={A: 3}, columns={}, partitions={}).parts(10, 5, repeated) == []


def test_the_first_id_of_a_partition_is_that_of_its_first_row() -> None:
    crawl_plan = CrawlPlan(sources={B: 25, A: 30}, columns={}, partitions={})
    for source, rows, base in ((A, 30, 0), (B, 25, 30)):
        partitions = inputs.Source(digest=source, rows=rows, rows_per_partition=10, columns={}).partitions
        assert [crawl_plan.first_id(name, 10) for name in partitions] == [NEW + base, NEW + base + 10, NEW + base + 20]
        first = int(crawl_plan.order.ids(source, np.array([20]))[0])
        assert crawl_plan.first_id(inputs.partition_name(source, 2), 10) == first


def test_lists_whose_digests_begin_alike_have_partitions_of_their_own() -> None:
    twin = A[:8] + "99999999"
    assert inputs.partition_name(A, 0) != inputs.partition_name(twin, 0)
    crawl_plan = CrawlPlan(sources={A: 30, twin: 20}, columns={}, partitions={})
    assert crawl_plan.first_id(inputs.partition_name(A, 1), 10) == NEW + 10
    assert crawl_plan.first_id(inputs.partition_name(twin, 1), 10) == NEW + 40


def here(task: Callable[..., inputs.Source], each: Sequence[tuple[Any, ...]]) -> list[inputs.Source]:
    """Runs tasks in this process."""
    return [task(*arguments) for arguments in each]


def a_list(source: str, **further: Sequence[object]) -> Cut:
    """A list of two rows with further columns."""
    rows = pa.table({"url": ["http://b/0", "http://b/1"], "caption": ["c", "d"], **further})
    return partial(inputs.cut, source, [rows], Columns(), source)


def test_a_plan_is_made_once_from_new_lists_and_rejected_rows(tmp_path: Path) -> None:
    published, staging = publish(tmp_path), str(tmp_path / "s")
    crawl_plan = plan(
        [a_list(B, license=["by", "by"], n=[1, 2])], published, ["dns"], staging, partition=10, part=5, run=here
    )
    again = {f"{A}-000000": 1, f"{A}-000001": 1}
    assert crawl_plan == CrawlPlan(
        sources={A: 30, B: 2},
        columns={"license": "string", "n": "int64"},
        partitions={f"{B}-000000": 2, **again},
        retried={"dns": 2},
        earlier_rejects={name: f"{name}.parquet" for name in again},
    )
    assert (
        plan([], None, [], staging, partition=1, part=1, run=here) == crawl_plan
    )  # what a run that was killed had planned


def test_lists_whose_columns_are_of_different_types_are_told(tmp_path: Path) -> None:
    lists = [a_list(A, n=[1, 2], m=["x", "y"]), a_list(B, n=["1", "2"], m=["x", "y"])]
    with pytest.raises(InputError, match=f"^list {B}: column 'n' holds string, elsewhere int64$"):
        plan(lists, None, [], str(tmp_path), partition=10, part=5, run=here)
    assert CrawlPlan.load(str(tmp_path)) is None


def test_a_list_whose_columns_differ_from_the_published_ones_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"^list {B}: column 'license' holds int64, elsewhere string$"):
        plan([a_list(B, license=[1, 2])], publish(tmp_path), [], str(tmp_path / "s"), partition=10, part=5, run=here)


def test_a_column_without_values_fits_every_type(tmp_path: Path) -> None:
    lists = [a_list(A, n=[None, None]), a_list(B, n=[1, 2])]
    assert plan(lists, None, [], str(tmp_path), partition=10, part=5, run=here).columns == {"n": "int64"}
