import io
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray.data
from PIL import Image

from data_prep import storage, tables
from data_prep.pairs import shards
from data_prep.streams import shard_loader as module
from data_prep.streams.object_store import get_shared
from data_prep.streams.plans import DriverStream, StreamShape, plan_epochs, stream
from data_prep.streams.shard_loader import (
    GAP_BYTES,
    MIX,
    RUN,
    SPAN_BYTES,
    ShardLoader,
    plan_windows,
    shard_loader,
    spans,
    window_order,
)
from ovd_models.errors import InputError

COUNTS = (5, 9, 7, 1, 8, 6)
"""Pairs of the shards; pair n of shard s shows the colour 10 s + n and is 20 + n pixels wide."""


def picture(shard: int, number: int) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(np.full((20, 20 + number, 3), 10 * shard + number, np.uint8)).save(sink, "PNG")
    return sink.getvalue()


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Shards with `COUNTS` pairs, each with an index file."""
    schema, files = tables.SCHEMAS["pairs"], []
    neutral = {column.name: "x" if column.type == pa.string() else 0 for column in schema}
    for shard, count in enumerate(COUNTS):
        images = [picture(shard, number) for number in range(count)]
        tar, offsets = shards.pack((f"{n}", image, f"{shard} {n}") for n, image in enumerate(images))
        path = f"shards/{shard}.tar"
        files.append(tables.write_file(str(tmp_path), "pairs", "t", path, tar))
        rows = [
            {
                **neutral,
                "shard": path,
                "offset": offset,
                "size": len(image),
                "width": 20 + n,
                "height": 20,
                "caption": f"{shard} {n}",
            }
            for n, (image, offset) in enumerate(zip(images, offsets, strict=True))
        ]
        part = pa.Table.from_pylist(rows, schema)
        files.append(tables.write_part(str(tmp_path), "pairs", "t", f"index/{shard}.parquet", part))
    tables.publish(str(tmp_path), "pairs", "t", files, producer="test", config_hash="0")
    return tmp_path


def open_loader(store: Path, *, buffer: int = 12, max_side: int | None = None, seed: int = 3) -> ShardLoader:
    return shard_loader(str(store), "t", seed=seed, buffer=buffer, image_size=8, fit="warp", max_side=max_side)


def shown(rows: pa.Table) -> list[str]:
    """Shard and number of each row's pair by its colour, which its caption must name too."""
    found = []
    for row in rows.to_pylist():
        (colour,) = set(row["image"])
        assert len(row["image"]) == 8 * 8 * 3
        found.append(f"{colour // 10} {colour % 10}")
        assert row["caption"] == found[-1]
    return found


ALL = sorted(f"{shard} {number}" for shard, count in enumerate(COUNTS) for number in range(count))


def test_every_pair_comes_once_an_epoch_with_its_caption(store: Path) -> None:
    found = shown(open_loader(store)(np.arange(3 * len(ALL))))
    epochs = [found[start : start + len(ALL)] for start in range(0, len(found), len(ALL))]
    assert [sorted(epoch) for epoch in epochs] == [ALL] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize("start", [0, 1, 11, 35, 36, 50, 107])
def test_a_stream_is_the_same_from_any_start(store: Path, start: int) -> None:
    whole = open_loader(store)(np.arange(108))
    assert open_loader(store)(np.arange(start, 108)).equals(whole.slice(start))
    assert not open_loader(store, seed=4)(np.arange(108)).equals(whole)


def test_positions_may_come_in_any_order(store: Path) -> None:
    order = np.random.default_rng(0).permutation(108)
    assert open_loader(store)(order).equals(open_loader(store)(np.arange(108)).take(order))
    assert open_loader(store)(np.arange(0)).num_rows == 0


# ------------------------------------------------------------------------------------------------------ plan


def test_windows_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    # Files of 2, 3, 1 and 4 rows, in this order in epoch 0. With a buffer of 4 those that start before row 4 are the
    # first window, of 5 rows, and the others, which start at rows 5 and 6, the second, of 5 rows.
    monkeypatch.setattr(module, "plan_epochs", lambda *_: np.array([0, 1, 2, 3]))
    monkeypatch.setattr(module, "window_order", lambda seed, epoch, window, count: np.arange(count)[::-1])
    first, second = plan_windows(0, np.array([2, 3, 1, 4]), 4, np.array([0, 9, 4, 5]))
    assert (first.files.tolist(), first.rows.tolist(), first.places.tolist()) == ([0, 1], [4, 0], [0, 2])
    assert (second.files.tolist(), second.rows.tolist(), second.places.tolist()) == ([2, 3], [0, 4], [1, 3])


@pytest.mark.parametrize("buffer", [1, 7, 40, 1000])
def test_a_plan_gives_every_row_once_an_epoch_in_windows_of_the_buffers_size(buffer: int) -> None:
    rows_F = np.array([3, 11, 1, 20, 5, 2, 13])
    count = int(rows_F.sum())
    for epoch in range(3):
        seen: Counter[tuple[int, int]] = Counter()
        for window in plan_windows(5, rows_F, buffer, np.arange(epoch * count, (epoch + 1) * count)):
            ends = np.cumsum(rows_F[window.files])
            assert ends[-1] < buffer + 20  # it holds whole files
            at = np.searchsorted(ends, window.rows, side="right")
            starts = (ends - rows_F[window.files])[at]
            seen.update(zip(window.files[at].tolist(), (window.rows - starts).tolist(), strict=True))
        assert seen == Counter((file, row) for file, rows in enumerate(rows_F.tolist()) for row in range(rows))


def test_files_come_in_another_order_every_epoch() -> None:
    rows_F, orders = np.full(30, 4), set()
    for epoch in range(3):
        windows = plan_windows(0, rows_F, 4, np.arange(epoch * 120, (epoch + 1) * 120))
        orders.add(tuple(file for window in windows for file in window.files.tolist()))
    assert orders == {tuple(plan_epochs(0, 30, np.arange(30 * epoch, 30 * epoch + 30)).tolist()) for epoch in range(3)}
    assert len(orders) == 3


def test_a_window_is_shuffled_by_runs_and_runs_are_shuffled_among_their_neighbours() -> None:
    order = window_order(0, 0, 0, 4 * MIX)
    assert sorted(order.tolist()) == list(range(4 * MIX))
    for part in order.reshape(4, MIX):
        runs = Counter((part // RUN).tolist())
        assert set(runs.values()) == {RUN}
        assert np.corrcoef(sorted(runs), range(len(runs)))[0, 1] > 0.9  # from everywhere in the window
        assert np.mean(np.diff(part) == 1) < 0.02
    assert not np.array_equal(order, window_order(0, 0, 1, 4 * MIX))
    assert window_order(0, 0, 0, 0).tolist() == []
    assert sorted(window_order(0, 0, 0, 21).tolist()) == list(range(21))


def test_a_table_of_a_hundred_thousand_shards_is_planned_from_its_manifest_alone(tmp_path: Path) -> None:
    entries = [tables.FileEntry(f"index/{n:06d}.parquet", 1, 1000, f"{n:064x}") for n in range(100_000)]
    entries += [tables.FileEntry(f"shards/{n:06d}.tar", 1, 0, f"{n:064x}") for n in range(10)]
    tables.publish(str(tmp_path), "pairs", "t", entries, producer="test", config_hash="0")
    files = get_shared(open_loader(tmp_path).files)  # none of them exists
    assert (files.num_rows, files.nbytes < 4e6) == (100_000, True)
    positions = np.arange(123_456_000, 123_457_000)  # in the second epoch
    windows = list(plan_windows(0, files["rows"].to_numpy(), 20_000, positions))
    assert sum(len(window.places) for window in windows) == 1000
    assert all(len(window.files) == 20 for window in windows)


# ------------------------------------------------------------------------------------------------------ reads


def test_spans_by_hand() -> None:
    near, far = 100 + GAP_BYTES, 301 + 2 * GAP_BYTES
    offsets = [0, near, near + 100, far, 0, 50]
    assert list(spans([*"aaaabb"], offsets, [100, 100, 100, 7, 50, 9])) == [(0, 3), (3, 4), (4, 6)]
    assert list(spans(["a"] * 3, [0, SPAN_BYTES - 10, SPAN_BYTES], [SPAN_BYTES - 10, 10, 1])) == [(0, 2), (2, 3)]
    assert list(spans(["a", "a"], [50, 0], [10, 10])) == [(0, 1), (1, 2)]
    assert list(spans([], [], [])) == []


def test_a_shard_is_read_once_an_epoch_if_its_window_is_read_at_once(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[tuple[str, int]] = []
    read_bytes = storage.read_bytes

    def record(uri: str, *, offset: int = 0, size: int | None = None) -> bytes:
        reads.append((uri.rpartition("/")[2], size or 0))
        return read_bytes(uri, offset=offset, size=size)

    loader = open_loader(store, buffer=1)
    monkeypatch.setattr(storage, "read_bytes", record)
    loader(np.arange(len(ALL)))
    assert sorted(name for name, _ in reads) == [f"{shard}.tar" for shard in range(len(COUNTS))]
    assert all(size < (store / "pairs/t/shards" / name).stat().st_size for name, size in reads)


def test_only_the_index_files_of_the_windows_are_opened(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    open_parquet = tables.open_parquet

    def record(uris: Any, schema: pa.Schema) -> Any:
        opened.extend(uris)
        return open_parquet(uris, schema)

    loader = open_loader(store)
    monkeypatch.setattr(tables, "open_parquet", record)
    rows = get_shared(loader.files)["rows"].to_numpy()
    (window,) = plan_windows(3, rows, 12, np.arange(3))
    loader(np.arange(3))
    assert opened == [f"{store}/pairs/t/index/{file}.parquet" for file in window.files.tolist()]
    assert len(opened) < len(COUNTS)


def test_large_pairs_are_left_out_and_the_others_still_come_once(store: Path) -> None:
    fitting = [name for name in ALL if int(name[-1]) <= 4]
    loader = open_loader(store, max_side=24)
    assert sorted(shown(loader(np.arange(len(fitting))))) == fitting
    assert sorted(shown(loader(np.arange(len(fitting), 2 * len(fitting))))) == fitting
    with pytest.raises(InputError, match="pairs/t: no pair with sides up to 19 px"):
        open_loader(store, max_side=19)


def test_an_index_file_that_is_missing_or_of_another_length_is_named(store: Path) -> None:
    folder = store / "pairs/t/index"
    whole = (folder / "0.parquet").read_bytes()
    (folder / "0.parquet").write_bytes((folder / "2.parquet").read_bytes())  # 7 pairs, where the manifest has 5
    with pytest.raises(InputError, match=r"index/\d\.parquet: \d+ pairs in it and \d others, expected \d+"):
        open_loader(store)(np.arange(36))
    (folder / "0.parquet").write_bytes(whole)
    (folder / "1.parquet").unlink()
    with pytest.raises(InputError, match=r"index of pairs: cannot be read: FileNotFoundError: .*/index/1\.parquet"):
        open_loader(store, max_side=50)
    loader = open_loader(store)
    with pytest.raises(InputError, match=r"index of pairs: cannot be read: FileNotFoundError: .*/index/1\.parquet"):
        loader(np.arange(36))


def test_a_pair_that_cannot_be_read_is_named_and_replaced_by_one_of_its_window(store: Path) -> None:
    loader = open_loader(store)
    tar = store / "pairs/t/shards/2.tar"
    content = bytearray(tar.read_bytes())
    start = content.index(b"IDAT")  # inside the first image of shard 2
    content[start : start + 12] = bytes(12)
    tar.write_bytes(bytes(content))
    rows = loader(np.arange(72))
    assert (loader(np.arange(40, 72)).equals(rows.slice(40)), len(set(shown(rows)))) == (True, len(ALL) - 1)
    reasons = [reason for row in rows["unreadable"].to_pylist() for reason in row]
    assert len(reasons) >= 2  # once an epoch, and where it was drawn as a replacement
    assert all(reason.startswith(f"{tar}@512") for reason in reasons)


def test_the_pairs_of_a_missing_shard_are_named_and_replaced(store: Path) -> None:
    (store / "pairs/t/shards/4.tar").unlink()
    rows = open_loader(store)(np.arange(36))
    found = shown(rows)
    assert "4" not in {name[0] for name in found}
    reasons = {reason for row in rows["unreadable"].to_pylist() for reason in row}
    assert len(reasons) == 8
    assert all("shards/4.tar@" in reason and "no such file, expected an image" in reason for reason in reasons)


def test_a_missing_table_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such table; `python workflows/prepare_pairs\.py` makes it"):
        open_loader(tmp_path)


# ---------------------------------------------------------------------------------------------------- streams


def batches(loader: ShardLoader, workers: int, start: int) -> list[list[pa.Table]]:
    """What each worker reads from a step up to step 15, in steps of 4 pairs."""
    data = stream(loader, StreamShape(rows_per_step=4, workers=workers), start, 15)
    if isinstance(data, DriverStream):
        found = data.iter_torch_batches(batch_size=4, collate_fn=lambda rows: rows, prefetch_batches=0)
        return [[next(found) for _ in range(15 - start)]]
    parts = [data] if workers == 1 else data.streaming_split(workers, equal=True)

    def tables_of(part: ray.data.Dataset | ray.data.DataIterator) -> list[pa.Table]:
        return list(part.iter_batches(batch_size=4 // workers, batch_format="pyarrow"))

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(tables_of, parts))


@pytest.mark.ray
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_resumed_stream_equals_an_undisturbed_one(
    ray_cluster: None, store: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray.data.DataContext.get_current().execution_options, "preserve_order", True)
    loader = open_loader(store, max_side=27)
    whole = batches(loader, workers, 0)
    for step in (5, 10):
        resumed = batches(loader, workers, step)
        assert all(rest == part[step:] for rest, part in zip(resumed, whole, strict=True))
    rows = pa.concat_tables([table for part in whole for table in part])
    count = sum(min(pairs, 8) for pairs in COUNTS)
    assert set(Counter(shown(rows)).values()) <= {60 // count, 60 // count + 1}
