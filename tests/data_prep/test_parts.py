"""Parts of a job inside the driver and on Ray Data: each is done once, and errors keep their type."""

import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from data_prep import parts
from data_prep.parts import HERE, Pool, collect_parts, run_parts
from ovd_models.errors import InputError

POOLS = [
    HERE,
    Pool(workers=0, parts_at_a_time=3),
    pytest.param(Pool(workers=2, parts_at_a_time=2), marks=pytest.mark.ray),
]
everywhere = pytest.mark.parametrize("pool", POOLS, ids=["driver", "threads", "ray"])


class Marker:
    """Leaves a file for each part and for each process, and returns the part's square."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / f"worker-{os.getpid()}").touch()

    def __call__(self, part: int) -> int:
        with (self.root / f"part-{part}").open("a") as file:
            file.write(".")
        return part * part


@pytest.fixture
def marked(tmp_path: Path, ray_cluster: None) -> Callable[[], Marker]:
    return partial(Marker, tmp_path)


@everywhere
def test_every_part_is_done_once_by_few_workers(pool: Pool, marked: Callable[[], Marker], tmp_path: Path) -> None:
    assert dict(run_parts(marked, range(3, 13), pool)) == {number: (number + 3) ** 2 for number in range(10)}
    assert {path.read_text() for path in tmp_path.glob("part-*")} == {"."}
    workers = {path.name for path in tmp_path.glob("worker-*")}
    assert len(workers) == 1 if not pool.workers else 1 <= len(workers) <= 2
    assert (f"worker-{os.getpid()}" in workers) == (not pool.workers)


@everywhere
def test_results_can_be_in_the_order_of_the_parts(pool: Pool, ray_cluster: None) -> None:
    def slow_first(part: int) -> int:
        time.sleep(0.05 * (5 - part))
        return part

    assert collect_parts(lambda: slow_first, range(5), pool, "squares", "parts") == [0, 1, 2, 3, 4]
    assert collect_parts(lambda: slow_first, [], pool, "squares", "parts") == []


@everywhere
@pytest.mark.parametrize("error", [InputError("list.tsv: no rows"), OSError(28, "No space left on device")])
def test_errors_of_a_user_or_a_disk_keep_their_type_and_message(
    pool: Pool, error: Exception, ray_cluster: None
) -> None:
    def fail(part: int) -> int:
        if part == 2:
            raise error
        return part

    with pytest.raises(type(error)) as found:
        list(run_parts(lambda: fail, range(4), pool))
    assert (type(found.value), str(found.value)) == (type(error), str(error))


@pytest.mark.ray
def test_parts_of_a_lost_process_are_done_again(tmp_path: Path, ray_cluster: None) -> None:
    def die_once(part: int) -> int:
        if part == 3 and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return part

    pool = Pool(workers=1, parts_at_a_time=2)
    assert collect_parts(lambda: die_once, range(6), pool, "squares", "parts") == list(range(6))
    assert (tmp_path / "died").exists()


@everywhere
def test_parts_of_a_worker_overlap(pool: Pool, ray_cluster: None) -> None:
    class Meeting:
        def __init__(self) -> None:
            self.barrier = threading.Barrier(pool.parts_at_a_time)

        def __call__(self, part: int) -> int:
            self.barrier.wait(timeout=20)
            return part

    one = Pool(workers=min(1, pool.workers), parts_at_a_time=pool.parts_at_a_time)
    count = 2 * pool.parts_at_a_time
    assert collect_parts(Meeting, range(count), one, "squares", "parts") == list(range(count))


def test_parts_can_be_left_early(tmp_path: Path) -> None:
    results = run_parts(partial(Marker, tmp_path), range(100), Pool(workers=0, parts_at_a_time=2))
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert len(list(tmp_path.glob("part-*"))) < 6


@pytest.mark.ray
def test_a_pool_that_may_grow_starts_with_its_size(marked: Callable[[], Marker], tmp_path: Path) -> None:
    pool = Pool(workers=2, grows=True, cpus=1)
    assert collect_parts(marked, range(20), pool, "squares", "parts") == [part * part for part in range(20)]
    assert 1 <= len(list(tmp_path.glob("worker-*"))) <= 4


@pytest.mark.ray
def test_more_parts_than_blocks_are_all_done(
    marked: Callable[[], Marker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "MIN_BLOCKS", 3)
    monkeypatch.setattr(parts, "BLOCKS_PER_WORKER", 1)
    pool = Pool(workers=1, parts_at_a_time=2)
    assert collect_parts(marked, range(10), pool, "squares", "parts") == [part * part for part in range(10)]


@pytest.mark.ray
def test_gpus_that_nobody_has_are_not_waited_for(marked: Marker, ray_cluster: None) -> None:
    with pytest.raises(InputError, match="1 GPUs for a worker: there is none here or in the cluster, expected 0"):
        list(run_parts(lambda: marked, [1], Pool(workers=1, gpus=1)))
