import time

import numpy as np
import pyarrow as pa

from data_prep.dedup import duplicate_of


def table(source: list[str], row: list[int], key: list[str | None]) -> pa.Table:
    return pa.table(
        {"source": pa.array(source, pa.string()), "row": pa.array(row, pa.int64()), "key": pa.array(key, pa.string())}
    )


def test_a_duplicate_names_the_lowest_row_with_its_key() -> None:
    rows = table(["s"] * 6, [0, 1, 2, 3, 4, 5], ["a", "b", "a", None, "a", None])
    found = duplicate_of(rows, "key").to_pylist()
    first = {"source": "s", "row": 0}
    assert found == [None, None, first, None, first, None]


def test_the_survivor_does_not_depend_on_the_order_or_chunks_of_the_rows() -> None:
    rows = table(["t", "s", "s", "t"], [0, 7, 3, 1], ["x", "x", "x", "y"])
    assert duplicate_of(rows, "key").to_pylist() == [{"source": "s", "row": 3}, {"source": "s", "row": 3}, None, None]
    chunked = pa.concat_tables([rows.slice(2), rows.slice(0, 2)])
    assert duplicate_of(chunked, "key").to_pylist() == [
        None, None, {"source": "s", "row": 3}, {"source": "s", "row": 3},
    ]  # fmt: skip


def test_no_rows_have_no_duplicates() -> None:
    assert duplicate_of(table([], [], []), "key").to_pylist() == []
    assert duplicate_of(table(["s"], [0], [None]), "key").to_pylist() == [None]


def test_agrees_with_a_slow_loop_and_is_fast() -> None:
    rng = np.random.default_rng(0)
    count = 100_000
    keys = [f"key-{number}" for number in rng.integers(0, 60_000, count)]
    order = rng.permutation(count)
    rows = table(["s"] * count, order.tolist(), keys)
    started = time.process_time()
    found = duplicate_of(rows, "key")
    assert time.process_time() - started < 2.0
    lowest: dict[str, int] = {}
    for row, key in zip(order.tolist(), keys, strict=True):
        lowest[key] = min(row, lowest.get(key, row))
    wanted = [None if lowest[k] == r else lowest[k] for r, k in zip(order.tolist(), keys, strict=True)]
    assert [survivor and survivor["row"] for survivor in found.to_pylist()] == [
        w if w is not None else None for w in wanted
    ]
