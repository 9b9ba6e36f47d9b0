"""A crawl, part by part: each is fetched, decoded, filtered, scored and saved by one process.

    with Crew(Steps(...), processes=1, parts_at_a_time=6, waiting_bytes=64 << 20) as crew:
        for progress in crew.crawl([Part(partition, 0), Part(partition, 1)]):   # what came of them is saved by then
            ...

No picture's bytes go from one process to another, but to a scoring model. While some rows of a part wait for their
hosts, pictures that have come are decoded in threads, which OpenCV leaves free to run beside each other.
"""

import asyncio
import ctypes
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self, TypeVar

import cv2
import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.util import ActorPool

from data_prep import storage
from data_prep.pairs.decode import Decoded, Rejection, with_images
from data_prep.pairs.fetch import Fetched, Then, open_gate, with_status
from data_prep.pairs.inputs import Part
from data_prep.shared import shared
from ovd_models.errors import InputError

PROGRESS_SECONDS = 5.0
ALARMING_FAILURES = 0.5
"""Share of failed fetches that is worth a warning."""
FILES_AT_A_TIME = 16
DECODERS = 2
"""Threads of a process that decode: as many as the cores that it is meant to keep busy."""
MMAP_THRESHOLD, TRIM_THRESHOLD, ARENA_MAX = -3, -1, -8
"""Parameters of glibc's mallopt(3)."""
KEPT_BYTES = 32 << 20
LASTING: dict[str, Any] = {
    "num_cpus": 0.5,  # so that a machine with a single one has room for a scoring model too
    "max_restarts": -1,
    "max_task_retries": 10,
    "scheduling_strategy": "SPREAD",
}
"""Options of actors that outlive the loss of a machine."""
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class PartCounts:
    """What came of a part."""

    rows: int
    good: int
    """Rows that nothing speaks against so far."""
    unfetched: int


class Getter(Protocol):
    """Gets what is behind URLs: `fetch.Fetcher` or `Reader`."""

    gate: asyncio.Event
    """Nothing more is got while it is cleared."""

    async def fetch_then(self, urls: Sequence[str | None], then: Then[T]) -> list[T]:
        """Of each URL what `then` makes of it, in their order."""


class Reader:
    """Like `fetch.Fetcher` for files, by path or URI, that are known to exist."""

    def __init__(self) -> None:
        self.gate = open_gate()
        self._slots = asyncio.Semaphore(FILES_AT_A_TIME)

    async def fetch_then(self, urls: Sequence[str | None], then: Then[T]) -> list[T]:
        """What `then` makes of each file, in their order."""
        return list(await asyncio.gather(*(self._read(url or "", then) for url in urls)))

    async def _read(self, uri: str, then: Then[T]) -> T:
        async with self._slots:
            await self.gate.wait()
            content = await asyncio.to_thread(storage.read_bytes, uri)
        return await then(Fetched(content=content))


@dataclass(frozen=True, kw_only=True)
class CrawlSteps:
    """What is done to a part, in this order."""

    read: Callable[[Part], pa.Table]
    fetch: Callable[[], Getter]
    """Called once a process."""
    decode: Callable[[bytes], Decoded | Rejection]
    filter: Callable[[pa.Table], pa.Table]
    score: Sequence[Any]
    """Actors of `scores.ScoreStage`, which take turns; none where nothing is scored."""
    save: Callable[[pa.Table, Part], None]


class Crawler:
    """Does the steps; calls overlap, so that a slow host does not hold up the rest."""

    def __init__(self, steps: CrawlSteps, waiting_bytes: int) -> None:
        """Start the threads.

        Args:
            steps: what to do.
            waiting_bytes: of fetched bodies that wait to be decoded, beyond which no other is asked for.
        """
        keep_memory()
        cv2.setNumThreads(1)
        self._steps, self._most, self._waiting = steps, waiting_bytes, 0
        self._crawled = False
        self._get = steps.fetch()
        self._decoders = ThreadPoolExecutor(DECODERS)
        self._storage = ThreadPoolExecutor(DECODERS)
        self._scorers = itertools.cycle(steps.score)

    async def crawl(self, part: Part) -> PartCounts:
        """Read, fetch, decode, filter, score and save a part."""
        steps, in_thread, self._crawled = self._steps, asyncio.get_running_loop().run_in_executor, True
        rows = await in_thread(self._storage, steps.read, part)
        got = await self._get.fetch_then(rows["url"].to_pylist(), self._decode)
        rows = with_images(with_status(rows, [fetched for fetched, _ in got]), [image for _, image in got])
        del got
        rows = steps.filter(rows)
        if steps.score:
            rows = await next(self._scorers).__call__.remote(rows)
        await in_thread(self._storage, steps.save, rows, part)
        unfetched = pc.sum(pc.equal(rows["stage"], "fetch")).as_py() or 0
        return PartCounts(rows=rows.num_rows, good=rows["reason"].null_count, unfetched=unfetched)

    async def run(self, task: Callable[..., T], *arguments: Any) -> T:
        """Do something else: this process is at hand, and another one would take a second to start."""
        if self._crawled and not self._waiting:
            give_memory_back()
            self._crawled = False
        return await asyncio.get_running_loop().run_in_executor(self._storage, task, *arguments)

    async def _decode(self, fetched: Fetched) -> tuple[Fetched, Decoded | Rejection | None]:
        """The picture of a body, or why there is none, and what else is known of its fetch; the body may go."""
        body = fetched.content
        if body is None:
            return fetched, None
        self._wait_for(len(body))
        try:
            loop = asyncio.get_running_loop()
            return replace(fetched, content=None), await loop.run_in_executor(self._decoders, self._steps.decode, body)
        finally:
            self._wait_for(-len(body))

    def _wait_for(self, size: int) -> None:
        self._waiting += size
        if self._waiting < self._most:
            self._get.gate.set()
        else:
            self._get.gate.clear()


def keep_memory() -> None:
    """Have the C library keep what pictures of usual size took for the next ones: fresh pages cost more than decoding.

    Arrow takes its memory there too, since its own pool keeps as much again. Without glibc nothing else happens.
    """
    pa.set_memory_pool(pa.system_memory_pool())
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(MMAP_THRESHOLD, KEPT_BYTES)
        library.mallopt(TRIM_THRESHOLD, KEPT_BYTES)
        library.mallopt(ARENA_MAX, DECODERS)


def give_memory_back() -> None:
    """Have the C library give back what it keeps."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


class CrawlerPool:
    """The processes of a run, each an actor of `Crawler`, which start as they are needed; or the driver alone.

    A process that is lost with its machine starts again elsewhere, and what it had in hand is begun again.
    """

    def __init__(self, steps: CrawlSteps, *, processes: int, parts_at_a_time: int, waiting_bytes: int) -> None:
        """Prepare, and start nothing yet.

        Args:
            steps: of a part.
            processes: how many there may be; 0 does everything inside the driver.
            parts_at_a_time: that each works on.
            waiting_bytes: see `Crawler`.
        """
        self._start = ray.remote(Crawler).options(**LASTING, max_concurrency=parts_at_a_time)
        self._arguments = steps, waiting_bytes
        self._most, self._each = processes, parts_at_a_time
        self._actors: list[Any] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for actor in (*self._actors, *self._arguments[0].score):
            ray.kill(actor)

    def crawl(self, parts: Sequence[Part]) -> Iterator[PartCounts]:
        """Crawl parts; what came of each as soon as it is saved."""
        if self._most:
            pool: Any = self._pool(len(parts))
            yield from pool.map_unordered(lambda actor, part: actor.crawl.remote(part), parts)
        else:
            yield from self._crawl_here(parts)

    def run(self, task: Callable[..., T], each: Sequence[tuple[Any, ...]]) -> list[T]:
        """The results of a task for each of some arguments, which may be shared ones, in their order.

        Raises:
            InputError: a task did.
        """
        if not self._most:
            with ThreadPoolExecutor(DECODERS) as threads:
                return list(threads.map(lambda arguments: task(*map(shared, arguments)), each))
        pool: Any = self._pool(len(each))
        try:
            return list(pool.map(lambda actor, arguments: actor.run.remote(task, *arguments), each))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, InputError):
                raise error.cause from None
            raise

    def _crawl_here(self, parts: Iterable[Part]) -> Iterator[PartCounts]:
        todo, waiting = iter(parts), set[asyncio.Task[PartCounts]]()
        crawler = Crawler(*self._arguments)
        with asyncio.Runner() as runner:
            start = runner.get_loop().create_task
            while True:
                waiting |= {start(crawler.crawl(part)) for part in itertools.islice(todo, self._each - len(waiting))}
                if not waiting:
                    break
                done, waiting = runner.run(asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED))
                yield from (task.result() for task in done)
        give_memory_back()

    def _pool(self, tasks: int) -> ActorPool:
        while len(self._actors) < min(self._most, tasks):
            self._actors.append(self._start.remote(*self._arguments))
        return ActorPool([actor for _ in range(self._each) for actor in self._actors])


def follow(parts: Iterable[PartCounts], total: int) -> list[tuple[float, int]]:
    """See a crawl to its end, with a line every few seconds, and a warning where most fetches fail.

    Args:
        parts: what came of each, as it comes.
        total: rows of all parts.

    Returns:
        Seconds and rows done so far, for the report.
    """
    started = shown = time.monotonic()
    done, good, failed, warned = 0, 0, 0, False
    progress: list[tuple[float, int]] = []
    for part in parts:
        done, good, failed = done + part.rows, good + part.good, failed + part.unfetched
        now = time.monotonic()
        if now - shown >= PROGRESS_SECONDS:
            shown, rate = now, done / (now - started)
            progress.append((round(now - started, 1), done))
            print(f"pairs: {done:,} of {total:,} rows done, {good:,} good, {rate:,.0f} rows/s", flush=True)
            if failed > ALARMING_FAILURES * done and not warned:
                warned = True
                print(f"pairs: WARNING: {failed:,} of {done:,} fetches failed; is the network, or its DNS, all right?")
    print(f"pairs: {done:,} rows done, {good:,} good, {done / (time.monotonic() - started):,.0f} rows/s", flush=True)
    return [*progress, (round(time.monotonic() - started, 1), done)]
