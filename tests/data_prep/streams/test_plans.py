from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
import ray.data

from data_prep.streams.plans import (
    Integers,
    StreamShape,
    plan_epochs,
    plan_weighted,
    repeat_factors,
    stream,
)

# ------------------------------------------------------------------------------------------------------ plans


def test_every_epoch_is_a_permutation_of_its_own() -> None:
    rows = plan_epochs(3, 20, np.arange(60)).reshape(3, 20)
    assert all(sorted(epoch.tolist()) == list(range(20)) for epoch in rows)
    assert len({tuple(epoch.tolist()) for epoch in rows}) == 3


def test_weighted_rows_come_as_often_as_their_weights() -> None:
    # Weights sum to 8.5, so an epoch has 9 positions: 9 / 8.5 times 1, 2.5, 1, 4.
    weights = np.array([1.0, 2.5, 1.0, 4.0])
    rows = plan_weighted(3, weights, np.arange(9 * 400)).reshape(400, 9)
    counts = np.stack([np.bincount(epoch, minlength=4) for epoch in rows])
    share = weights * 9 / 8.5
    assert bool((counts >= np.floor(share)).all() and (counts <= np.ceil(share)).all())
    assert np.allclose(counts.mean(0), share, atol=0.1)
    assert len({tuple(epoch.tolist()) for epoch in rows}) > 300
    assert plan_weighted(3, weights, np.arange(20, 60)).tolist() == rows.ravel()[20:60].tolist()


def test_weights_of_one_give_permutations() -> None:
    rows = plan_weighted(0, np.ones(7), np.arange(21)).reshape(3, 7)
    assert all(sorted(epoch.tolist()) == list(range(7)) for epoch in rows)


def test_repeat_factors_by_hand() -> None:
    # Category 1 is in 4 of 4 images, category 2 in 1 of 4: sqrt(0.5 / 0.25) = 1.414 with a threshold of 0.5.
    found = repeat_factors([[1, 1], [1], [1, 2, 2], [1], []][:4], 0.5)
    assert np.allclose(found, [1, 1, 2**0.5, 1])
    assert repeat_factors([[1], []], 0.1).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("start", [0, 1, 19, 20, 33])
def test_a_plan_is_the_same_from_any_start(start: int) -> None:
    whole = plan_epochs(3, 20, np.arange(60))
    assert plan_epochs(3, 20, np.arange(start, 60)).tolist() == whole[start:].tolist()


def test_a_plan_depends_on_the_seed_alone() -> None:
    first, again, other = (plan_epochs(seed, 50, np.arange(50)).tolist() for seed in (1, 1, 2))
    assert first == again != other


def test_positions_may_come_in_any_order() -> None:
    positions = np.random.default_rng(0).permutation(60)
    assert plan_epochs(3, 20, positions).tolist() == plan_epochs(3, 20, np.arange(60))[positions].tolist()


def test_a_table_of_one_row_repeats_it_and_no_position_gives_no_row() -> None:
    assert plan_epochs(0, 1, np.arange(4)).tolist() == [0] * 4
    assert plan_epochs(0, 5, np.arange(0)).tolist() == []


# ---------------------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize(
    ("shape", "steps", "expected"),
    [
        (StreamShape(rows_per_step=8, workers=1), (0, 10), (0, 80, 2)),
        (StreamShape(rows_per_step=8, workers=2), (0, 10), (0, 80, 4)),
        (StreamShape(rows_per_step=8, workers=2), (5, 10), (40, 40, 2)),
        (StreamShape(rows_per_step=4, workers=1), (0, 3), (0, 20, 1)),
    ],
)
def test_positions_of_a_range_of_steps(
    shape: StreamShape, steps: tuple[int, int], expected: tuple[int, int, int]
) -> None:
    assert shape.positions(*steps) == expected


def position_stream(shape: StreamShape, start: int, stop: int) -> ray.data.Dataset:
    """A stream whose rows hold their positions."""

    def load(positions: Integers) -> pa.Table:  # inside, so that workers need not import this file
        return pa.table({"position": positions})

    return stream(load, shape, start, stop)


def positions_of(data: ray.data.Dataset | ray.data.DataIterator, size: int) -> list[list[int]]:
    return [batch["position"].to_pylist() for batch in data.iter_batches(batch_size=size, batch_format="pyarrow")]


@pytest.mark.ray
def test_a_stream_started_late_is_the_tail_of_the_whole(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.data.DataContext.get_current().execution_options, "preserve_order", True)
    shape = StreamShape(rows_per_step=4, workers=1)
    whole = positions_of(position_stream(shape, 0, 15), 4)
    assert whole == [list(range(4 * step, 4 * step + 4)) for step in range(15)]
    for start in (5, 10):
        assert positions_of(position_stream(shape, start, 15), 4) == whole[start:]


def split(shape: StreamShape, start: int, stop: int) -> list[list[list[int]]]:
    """The batches of each worker, as Ray Train splits a stream."""
    parts = position_stream(shape, start, stop).streaming_split(shape.workers, equal=True)
    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(lambda part: positions_of(part, shape.rows_per_step // shape.workers), parts))


@pytest.mark.ray
def test_two_workers_read_each_position_once_and_checkpoints_cut_cleanly(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray.data.DataContext.get_current().execution_options, "preserve_order", True)
    parts = split(StreamShape(rows_per_step=4, workers=2), 0, 15)
    assert [len(part) for part in parts] == [15, 15]
    assert sorted(n for part in parts for batch in part for n in batch) == list(range(60))
    for step in (5, 10):  # both together have read exactly the first positions
        taken = [n for part in parts for batch in part[:step] for n in batch]
        assert sorted(taken) == list(range(4 * step))


@pytest.mark.ray
def test_checkpoints_cut_cleanly_in_a_run_of_any_length(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.data.DataContext.get_current().execution_options, "preserve_order", True)
    parts = split(StreamShape(rows_per_step=4, workers=2), 0, 7)
    taken = [n for part in parts for batch in part[:5] for n in batch]
    assert sorted(taken) == list(range(20))


@pytest.mark.ray
def test_a_long_stream_comes_in_windows(ray_cluster: None) -> None:
    # Two workers with 4 blocks a window: 2 blocks of 5 steps each.
    shape = StreamShape(rows_per_step=4, workers=2, max_blocks=4)
    parts = position_stream(shape, 5, 10_000_000).streaming_split(2, equal=True)

    def three_windows(part: ray.data.DataIterator) -> list[list[int]]:
        return [batch for _ in range(3) for batch in positions_of(part, 2)]

    with ThreadPoolExecutor(2) as pool:
        batches = list(pool.map(three_windows, parts))
    assert [len(entry) for entry in batches] == [30, 30]
    for steps in range(5, 35, 5):  # after each block both together have read exactly the positions up to its end
        taken = [n for entry in batches for batch in entry[:steps] for n in batch]
        assert sorted(taken) == list(range(20, 20 + 4 * steps))


@pytest.mark.ray
def test_large_blocks_are_not_split_between_workers(ray_cluster: None) -> None:
    def load(positions: Integers) -> pa.Table:  # 226 MB a block; Ray Data splits blocks of more than 192 MiB
        image = bytes(3 * 224 * 224)
        return pa.table({"position": positions, "image": pa.array([image] * len(positions), pa.binary())})

    parts = stream(load, StreamShape(rows_per_step=600, workers=2), 0, 10).streaming_split(2, equal=True)
    with ThreadPoolExecutor(2) as pool:
        batches = list(pool.map(lambda part: positions_of(part, 300), parts))
    assert all(batch == list(range(batch[0], batch[0] + 300)) for entry in batches for batch in entry)
