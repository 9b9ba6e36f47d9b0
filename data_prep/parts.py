"""One way to run the parts of a job: inside the driver, or in a pool of Ray Data's actors.

    for number, result in run_parts(partial(Embedder, checkpoint), parts, Pool(workers=4, gpus=1)):
        ...

A worker reads a part, works on it and saves what it makes; only a small result comes back. So images never pass
through Ray's object store, and a job that is run again leaves out the parts that are saved.
"""

import math
import pickle
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import pyarrow as pa
import ray
import ray.data
from ray._private.state import state
from ray.data._internal.execution.execution_callback import ExecutionCallback

from data_prep.progress import watched
from ovd_models.errors import InputError

PAUSE_SECONDS = 0.05
MIN_BLOCKS, BLOCKS_PER_WORKER = 128, 64
"""Parts are sent in blocks: Ray Data takes some 10 ms of CPU time for each, on both sides."""
P = TypeVar("P")
R = TypeVar("R")
Worker: TypeAlias = Callable[[P], R]


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Processes that work on parts."""

    workers: int
    """Number of processes; 0 works inside the driver."""
    grows: bool = False
    """Start more workers when the cluster gets more machines."""
    parts_at_a_time: int = 1
    """Parts of a worker that run side by side, each in a thread."""
    cpus: float = 0.5
    """CPUs that Ray reserves for a worker."""
    gpus: float = 0.0


HERE = Pool(workers=0)
"""Inside the driver, one part after the other."""


def run_parts(make_worker: Callable[[], Worker[P, R]], parts: Sequence[P], pool: Pool) -> Iterator[tuple[int, R]]:
    """Yield the number and the result of each part as it is done.

    Each process calls `make_worker` once. Parts of a process that is lost are done again elsewhere.

    Raises:
        InputError, OSError: a worker raised it; the parts that are running are finished or repeated by the next run.
        InputError: the workers need GPUs, and there is none.
    """
    if not parts:
        return
    yield from _run_on_ray(make_worker, parts, pool) if pool.workers else _run_here(make_worker, parts, pool)


def collect_parts(
    make_worker: Callable[[], Worker[P, R]], parts: Sequence[P], pool: Pool, label: str, unit: str
) -> list[R]:
    """The results of all parts in their order; `label` and `unit` (in the plural) are of the lines of progress."""
    done = dict(watched(run_parts(make_worker, parts, pool), label, unit, len(parts)))
    return [done[number] for number in range(len(parts))]


def _run_here(make_worker: Callable[[], Worker[P, R]], parts: Sequence[P], pool: Pool) -> Iterator[tuple[int, R]]:
    worker, todo = make_worker(), iter(enumerate(parts))
    running: dict[Future[R], int] = {}
    with ThreadPoolExecutor(pool.parts_at_a_time) as threads:
        while True:
            for number, part in todo:
                running[threads.submit(worker, part)] = number
                if len(running) == pool.parts_at_a_time:
                    break
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()


def check_gpus(gpus: float) -> None:
    """Raise InputError if a worker needs GPUs and the cluster cannot have any: Ray would wait for them for ever."""
    grown = state.get_max_resources_from_cluster_config() or {}  # None where no autoscaler runs
    if gpus and not max(ray.cluster_resources().get("GPU", 0), grown.get("GPU", 0)):  # type: ignore[no-untyped-call]
        raise InputError(f"{gpus:g} GPUs for a worker: there is none here or in the cluster, expected 0")


def _run_on_ray(make_worker: Callable[[], Worker[P, R]], parts: Sequence[P], pool: Pool) -> Iterator[tuple[int, R]]:
    check_gpus(pool.gpus)
    rows = [{"number": number, "part": pickle.dumps(part)} for number, part in enumerate(parts)]
    size = min(pool.workers, len(parts))
    blocks = min(len(parts), max(MIN_BLOCKS, BLOCKS_PER_WORKER * pool.workers))
    done = ray.data.from_items(rows, override_num_blocks=blocks).map_batches(
        _RayWorker,
        fn_constructor_args=(make_worker, pool.parts_at_a_time),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(
            min_size=1 if pool.grows else size,
            initial_size=size,
            max_size=None if pool.grows else size,
            max_concurrent_calls_per_actor=1 + math.ceil(pool.parts_at_a_time * blocks / len(parts)),
            enable_true_multi_threading=True,
        ),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus or None,
    )
    done.context.custom_execution_callback_classes = [ExecutorPause]
    batches: Iterator[pa.Table] = iter(done.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))
    for batch in batches:
        for number, content in zip(batch["number"].to_pylist(), batch["result"].to_pylist(), strict=True):
            result = pickle.loads(content)
            if isinstance(result, InputError | OSError):
                raise result
            yield number, result


class _RayWorker:
    """A worker as Ray Data calls it, with blocks of parts; all its calls share the threads."""

    def __init__(self, make_worker: Callable[[], Worker[Any, Any]], parts_at_a_time: int) -> None:
        self.worker, self.threads = make_worker(), ThreadPoolExecutor(parts_at_a_time)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Work on some parts; a part is a row, and so is its result, pickled."""
        results = list(self.threads.map(self._work, rows["part"].to_pylist()))
        return pa.table({"number": rows["number"], "result": results})

    def _work(self, part: bytes) -> bytes:
        try:
            return pickle.dumps(self.worker(pickle.loads(part)))
        except (InputError, OSError) as error:  # Ray would change its type and add lines to its message
            return pickle.dumps(error)


def ahead(calls: Iterable[Callable[[], R]], threads: ThreadPoolExecutor, depth: int) -> Iterator[R]:
    """The results of calls made in threads, in order; at most `depth` of them are running or waiting."""
    waiting: deque[Future[R]] = deque()
    for call in calls:
        waiting.append(threads.submit(call))
        if len(waiting) >= depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


class ExecutorPause(ExecutionCallback):
    """Pauses Ray Data's executor in each turn of its loop; else it would take up to a whole core from the workers.

    The loop does not wait while there are ready blocks that limits keep it from taking.
    """

    def on_execution_step(self, executor: object) -> None:
        """Pause."""
        time.sleep(PAUSE_SECONDS)
