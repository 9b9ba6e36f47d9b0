"""Crawl part by part: one process fetches, decodes, filters, scores and saves each part.

    for _, counts in run_parts(partial(Crawler, steps, staging, 64 << 20), parts, Pool(workers=2, parts_at_a_time=16)):
        ...   # the part's results are saved by now

Image bytes are sent to no other process except a scoring model. While some rows of a part wait for their hosts, images
that have arrived are decoded in threads; OpenCV releases the GIL.
"""

import asyncio
import contextlib
import ctypes
import itertools
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias, TypeVar

import cv2
import pyarrow as pa
import pyarrow.compute as pc
import ray

from data_prep.pairs.decode import Decoded, with_images
from data_prep.pairs.fetch import Fetched, Fetcher, with_fetch_status
from data_prep.pairs.files import FileReader
from data_prep.pairs.rows import Rejection
from data_prep.pairs.staging import Part, Staging
from data_prep.progress import Progress

ALARMING_FAILURES = 0.5
"""Share of failed fetches that causes a warning."""
PATIENCE_SECONDS = 1.0
"""When no row of a part has finished for this time, its finished rows are saved without waiting for the others."""
DECODERS = 2
"""Decoding threads of a process, as many as the cores it should keep busy."""
SAVERS = 4
"""Threads of a process that read, filter and save parts."""
MMAP_THRESHOLD, TRIM_THRESHOLD, ARENA_MAX = -3, -1, -8
"""Parameters of glibc's mallopt(3)."""
KEPT_BYTES = 32 << 20
T = TypeVar("T")
Result: TypeAlias = tuple[Fetched, Decoded | Rejection | None]
"""The fetch result of a row without its body, and the decoded image, if there was a body."""


@dataclass(frozen=True, kw_only=True)
class PartCounts:
    """Rows of a crawled part."""

    rows: int = 0
    good: int = 0
    """Rows not rejected so far."""
    unfetched: int = 0

    def __add__(self, other: "PartCounts") -> "PartCounts":
        return PartCounts(
            rows=self.rows + other.rows, good=self.good + other.good, unfetched=self.unfetched + other.unfetched
        )


@dataclass(frozen=True, kw_only=True)
class CrawlSteps:
    """The steps of crawling a part, in order."""

    fetcher: Callable[[], Fetcher | FileReader]
    """Called once per process."""
    decode: Callable[[bytes], Decoded | Rejection]
    filter: Callable[[pa.Table], pa.Table]
    scorers: Sequence[Any] = ()
    """Actors of `scores.ScoreStage`, used in turn; empty if nothing is scored."""


class Crawler:
    """Crawls parts; calls overlap, so that a slow host does not hold up the rest."""

    def __init__(self, steps: CrawlSteps, staging: Staging, waiting_bytes: int, parts_at_a_time: int = 8) -> None:
        """Start the threads; while `waiting_bytes` of fetched images wait to be decoded, no request is made.

        At most `parts_at_a_time` are in work; those that only wait for slow rows do not count.
        """
        keep_memory()
        cv2.setNumThreads(1)
        self._steps, self._staging, self._waiting_limit, self._waiting = steps, staging, waiting_bytes, 0
        self._fetcher = steps.fetcher()
        self._decoders, self._savers = ThreadPoolExecutor(DECODERS), ThreadPoolExecutor(SAVERS)
        self._scorers, self._places = itertools.cycle(steps.scorers), asyncio.Semaphore(parts_at_a_time)
        self._loop = asyncio.new_event_loop()
        self._in_thread = partial(self._loop.run_in_executor, self._savers)
        threading.Thread(target=self._loop.run_forever, name="network", daemon=True).start()
        weakref.finalize(self, _stop, self._loop)

    def __call__(self, part: Part) -> PartCounts:
        """Read, fetch, decode, filter, score and save a part."""
        return asyncio.run_coroutine_threadsafe(self._crawl(part), self._loop).result()

    async def _crawl(self, part: Part) -> PartCounts:
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(self._fetcher.open())
            async with self._places:
                verdicts = await self._in_thread(self._staging.read_verdicts, part)
                if verdicts is not None:  # by a process that was lost before it could say so
                    return count(verdicts)
                rows, saved = await self._in_thread(self._staging.read_part, part), list[pa.Table]()
                early = await self._in_thread(self._staging.read_early, part)
                if early is not None:
                    saved = [early]
                    rows = rows.filter(pc.invert(pc.is_in(rows["row"], early["row"].combine_chunks())))
                urls = rows["url"].to_pylist()
                tasks = await stack.enter_async_context(run_tasks(map(self._fetch_and_decode, urls)))
                done = await wait_for_most(tasks)
                if all(done):
                    return await self._save(part, saved, rows, tasks)
                results = [task.result() for task in itertools.compress(tasks, done)]
                saved.append(await self._in_thread(self._finish, rows.filter(pa.array(done)), results))
                await self._in_thread(self._staging.write_early, join_rows(saved), part)
            waiting = [not is_done for is_done in done]
            return await self._save(
                part, saved, rows.filter(pa.array(waiting)), list(itertools.compress(tasks, waiting))
            )

    async def _save(
        self, part: Part, saved: Sequence[pa.Table], rows: pa.Table, tasks: "Sequence[asyncio.Task[Result]]"
    ) -> PartCounts:
        """Wait for the rows that are left of a part, and save it."""
        results = await asyncio.gather(*tasks)
        rows = join_rows([*saved, await self._in_thread(self._finish, rows, results)])
        await self._in_thread(self._staging.write_part, rows, part)
        return count(rows)

    async def _fetch_and_decode(self, url: str | None) -> Result:
        fetched = await self._fetcher.fetch(url)
        body = fetched.content
        if body is None:
            return fetched, None
        self._add_waiting(len(body))
        try:
            decoded = await self._loop.run_in_executor(self._decoders, self._steps.decode, body)
            return replace(fetched, content=None), decoded
        finally:
            self._add_waiting(-len(body))

    def _finish(self, rows: pa.Table, results: Sequence[Result]) -> pa.Table:
        """Add the results to their rows, filter and score them."""
        rows = with_fetch_status(rows, [fetched for fetched, _ in results])
        rows = with_images(rows, [image for _, image in results])
        rows = self._steps.filter(rows)
        return ray.get(next(self._scorers).__call__.remote(rows)) if self._steps.scorers else rows

    def _add_waiting(self, size: int) -> None:
        self._waiting += size
        if self._waiting < self._waiting_limit:
            self._fetcher.gate.set()
        else:
            self._fetcher.gate.clear()


def count(verdicts: pa.Table) -> PartCounts:
    """Count the rows of a part by `stage` and `reason`."""
    unfetched = pc.sum(pc.equal(verdicts["stage"], "fetch")).as_py() or 0
    return PartCounts(rows=verdicts.num_rows, good=verdicts["reason"].null_count, unfetched=unfetched)


@contextlib.asynccontextmanager
async def run_tasks(coroutines: Iterable[Coroutine[Any, Any, T]]) -> AsyncIterator[list[asyncio.Task[T]]]:
    """Run coroutines side by side; those that have not ended with the block are cancelled."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def wait_for_most(tasks: "Sequence[asyncio.Task[Any]]") -> list[bool]:
    """Wait until all tasks are done, or some are but no other for `PATIENCE_SECONDS`; returns which are."""
    done = [False] * len(tasks)
    while not all(done):
        before = done
        await asyncio.wait(tasks, timeout=PATIENCE_SECONDS)
        done = [task.done() for task in tasks]
        if any(done) and done == before:
            break
    return done


def join_rows(tables: Sequence[pa.Table]) -> pa.Table:
    """All rows of some tables in the order of the input."""
    return tables[0] if len(tables) == 1 else pa.concat_tables(tables, promote_options="default").sort_by("row")


def _stop(loop: asyncio.AbstractEventLoop) -> None:
    loop.call_soon_threadsafe(loop.stop)
    release_memory()


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


def watch(parts: Iterable[PartCounts], total: int) -> list[tuple[float, int]]:
    """Finish a crawl of `total` rows, showing its progress; warns once if most fetches fail.

    Returns the seconds and rows done so far at each line of progress, for the report.
    """
    progress, counts, warned = Progress("pairs", "rows", total), PartCounts(), False
    lines: list[tuple[float, int]] = []
    for part in parts:
        counts += part
        if progress.add(part.rows, f"{counts.good:,} good"):
            lines.append((round(progress.seconds, 1), counts.rows))
            if counts.unfetched > ALARMING_FAILURES * counts.rows and not warned:
                warned = True
                failures = f"{counts.unfetched:,} of {counts.rows:,} fetches failed"
                print(f"pairs: WARNING: {failures}; do the network and its DNS work?", flush=True)
    progress.close(f"{counts.good:,} good")
    return [*lines, (round(progress.seconds, 1), counts.rows)]
