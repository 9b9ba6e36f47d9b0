"""Crawl part by part: one process fetches, decodes, filters, scores and saves each part.

    with CrawlerPool(CrawlSteps(...), staging, processes=1, parts_at_a_time=6, waiting_bytes=64 << 20) as pool:
        for counts in pool.crawl([Part(partition, 0), Part(partition, 1)]):   # the part's results are saved by now
            ...

Image bytes are sent to no other process except a scoring model. While some rows of a part wait for their hosts, images
that have arrived are decoded in threads; OpenCV releases the GIL.
"""

import asyncio
import contextlib
import ctypes
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

import cv2
import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.util import ActorPool

from data_prep import storage
from data_prep.object_store import get_shared
from data_prep.pairs.decode import Decoded, with_images
from data_prep.pairs.fetch import Fetched, Fetcher, with_fetch_status
from data_prep.pairs.rows import Rejection
from data_prep.pairs.staging import Part, Staging
from data_prep.pairs.tars import locate
from ovd_models.errors import InputError

PROGRESS_SECONDS = 5.0
ALARMING_FAILURES = 0.5
"""Share of failed fetches that causes a warning."""
FILES_AT_A_TIME = 16
DECODERS = 2
"""Decoding threads of a process, as many as the cores it should keep busy."""
MMAP_THRESHOLD, TRIM_THRESHOLD, ARENA_MAX = -3, -1, -8
"""Parameters of glibc's mallopt(3)."""
KEPT_BYTES = 32 << 20
RESTARTING: dict[str, Any] = {
    "num_cpus": 0.5,  # so that a machine with a single one has room for a scoring model too
    "max_restarts": -1,
    "max_task_retries": 10,
    "scheduling_strategy": "SPREAD",
}
"""Options of actors that survive the loss of a machine."""
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class PartCounts:
    """Rows of a crawled part."""

    rows: int
    good: int
    """Rows not rejected so far."""
    unfetched: int


class FileReader:
    """Like `fetch.Fetcher`, for files that are known to exist, by path or URI, and for images in tar files."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self._slots = asyncio.Semaphore(FILES_AT_A_TIME)

    def open(self) -> contextlib.nullcontext[None]:
        """Do nothing: there are no connections."""
        return contextlib.nullcontext()

    async def fetch(self, url: str | None) -> Fetched:
        """Read a file."""
        if url is None:
            return Fetched(reason="bad_url", detail="a sample without an image")
        uri, offset, size = locate(url)
        async with self._slots:
            await self.gate.wait()
            return Fetched(content=await asyncio.to_thread(storage.read_bytes, uri, offset=offset, size=size))


@dataclass(frozen=True, kw_only=True)
class CrawlSteps:
    """The steps of crawling a part, in order."""

    fetcher: Callable[[], Fetcher | FileReader]
    """Called once per process."""
    decode: Callable[[bytes], Decoded | Rejection]
    filter: Callable[[pa.Table], pa.Table]
    scorers: Sequence[Any]
    """Actors of `scores.ScoreStage`, used in turn; empty if nothing is scored."""


class Crawler:
    """Crawls parts; calls overlap, so that a slow host does not hold up the rest."""

    def __init__(self, steps: CrawlSteps, staging: Staging, waiting_bytes: int) -> None:
        """Start the threads; while `waiting_bytes` of fetched images wait to be decoded, no request is made."""
        keep_memory()
        cv2.setNumThreads(1)
        self._steps, self._staging, self._waiting_limit, self._waiting = steps, staging, waiting_bytes, 0
        self._crawled = False
        self._fetcher = steps.fetcher()
        self._decoders = ThreadPoolExecutor(DECODERS)
        self._storage = ThreadPoolExecutor(DECODERS)
        self._scorers = itertools.cycle(steps.scorers)

    async def crawl(self, part: Part) -> PartCounts:
        """Read, fetch, decode, filter, score and save a part."""
        in_thread, self._crawled = asyncio.get_running_loop().run_in_executor, True
        rows = await in_thread(self._storage, self._staging.read_part, part)
        async with self._fetcher.open():
            results = await asyncio.gather(*(self._fetch_and_decode(url) for url in rows["url"].to_pylist()))
        rows = with_fetch_status(rows, [fetched for fetched, _ in results])
        rows = with_images(rows, [image for _, image in results])
        del results
        rows = self._steps.filter(rows)
        if self._steps.scorers:
            rows = await next(self._scorers).__call__.remote(rows)
        await in_thread(self._storage, self._staging.write_part, rows, part)
        unfetched = pc.sum(pc.equal(rows["stage"], "fetch")).as_py() or 0
        return PartCounts(rows=rows.num_rows, good=rows["reason"].null_count, unfetched=unfetched)

    async def run(self, task: Callable[..., T], *arguments: Any) -> T:
        """Run another task in this process, since a new one would take a second to start."""
        if self._crawled and not self._waiting:
            release_memory()
            self._crawled = False
        return await asyncio.get_running_loop().run_in_executor(self._storage, task, *arguments)

    async def _fetch_and_decode(self, url: str | None) -> tuple[Fetched, Decoded | Rejection | None]:
        """The fetch result without its body, and the decoded image, if there was a body."""
        fetched = await self._fetcher.fetch(url)
        body = fetched.content
        if body is None:
            return fetched, None
        self._add_waiting(len(body))
        try:
            loop = asyncio.get_running_loop()
            return replace(fetched, content=None), await loop.run_in_executor(self._decoders, self._steps.decode, body)
        finally:
            self._add_waiting(-len(body))

    def _add_waiting(self, size: int) -> None:
        self._waiting += size
        if self._waiting < self._waiting_limit:
            self._fetcher.gate.set()
        else:
            self._fetcher.gate.clear()


def keep_memory() -> None:
    """Make the C library keep freed image memory for the next images: new pages cost more than decoding.

    Arrow allocates there too, since its own pool would keep as much again. Does nothing else without glibc.
    """
    pa.set_memory_pool(pa.system_memory_pool())
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(MMAP_THRESHOLD, KEPT_BYTES)
        library.mallopt(TRIM_THRESHOLD, KEPT_BYTES)
        library.mallopt(ARENA_MAX, DECODERS)


def release_memory() -> None:
    """Make the C library release the memory it keeps."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


class CrawlerPool:
    """The `Crawler` actors of a run, started as needed; without processes, a crawler in the driver.

    An actor that is lost with its machine restarts elsewhere, and its unfinished parts are crawled again.
    """

    def __init__(
        self, steps: CrawlSteps, staging: Staging, *, processes: int, parts_at_a_time: int, waiting_bytes: int
    ) -> None:
        """Prepare up to `processes` actors (0: a crawler in the driver) with concurrent parts; none starts yet."""
        self._actor_class = ray.remote(Crawler).options(**RESTARTING, max_concurrency=parts_at_a_time)
        self._arguments = steps, staging, waiting_bytes
        self._processes, self._parts_at_a_time = processes, parts_at_a_time
        self._actors: list[Any] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for actor in (*self._actors, *self._arguments[0].scorers):
            ray.kill(actor)

    def crawl(self, parts: Sequence[Part]) -> Iterator[PartCounts]:
        """Crawl parts; yields the counts of each as soon as its results are saved."""
        if self._processes:
            pool: Any = self._pool(len(parts))
            yield from pool.map_unordered(lambda actor, part: actor.crawl.remote(part), parts)
        else:
            yield from self._crawl_in_driver(parts)

    def run(self, task: Callable[..., T], arguments: Sequence[tuple[Any, ...]]) -> list[T]:
        """Run a task with each of several argument tuples, which may hold shared values; results in their order.

        Raises:
            InputError: a task raised it.
        """
        if not self._processes:
            with ThreadPoolExecutor(DECODERS) as threads:
                return list(threads.map(lambda values: task(*map(get_shared, values)), arguments))
        pool: Any = self._pool(len(arguments))
        try:
            return list(pool.map(lambda actor, values: actor.run.remote(task, *values), arguments))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, InputError):
                raise error.cause from None
            raise

    def _crawl_in_driver(self, parts: Iterable[Part]) -> Iterator[PartCounts]:
        todo, running = iter(parts), set[asyncio.Task[PartCounts]]()
        crawler = Crawler(*self._arguments)
        with asyncio.Runner() as runner:
            start = runner.get_loop().create_task
            while True:
                free = self._parts_at_a_time - len(running)
                running |= {start(crawler.crawl(part)) for part in itertools.islice(todo, free)}
                if not running:
                    break
                done, running = runner.run(asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED))
                yield from (task.result() for task in done)
        release_memory()

    def _pool(self, tasks: int) -> ActorPool:
        while len(self._actors) < min(self._processes, tasks):
            self._actors.append(self._actor_class.remote(*self._arguments))
        return ActorPool([actor for _ in range(self._parts_at_a_time) for actor in self._actors])


def show_progress(parts: Iterable[PartCounts], total: int) -> list[tuple[float, int]]:
    """Finish a crawl of `total` rows; prints a line every few seconds, and a warning if most fetches fail.

    Returns the seconds and rows done so far at each line, for the report.
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
                print(f"pairs: WARNING: {failed:,} of {done:,} fetches failed; do the network and its DNS work?")
    print(f"pairs: {done:,} rows done, {good:,} good, {done / (time.monotonic() - started):,.0f} rows/s", flush=True)
    return [*progress, (round(time.monotonic() - started, 1), done)]
