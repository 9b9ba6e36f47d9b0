"""A part of a crawl at a time: its rows are fetched, decoded, filtered, scored and saved by one process.

    crawler = ray.remote(Crawler).remote(Steps(...))
    await crawler.crawl.remote(Part(partition, 0))          # what came of it is saved; returns counts

No picture's bytes go from one process to another, but to a scoring model. While some rows of a part wait for their
hosts, pictures that have come are decoded in threads, which OpenCV leaves free to run beside each other.
"""

import asyncio
import ctypes
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import cv2
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.decode import Decoded, Rejection, with_images
from data_prep.fetch import Fetched, Then, with_status
from data_prep.inputs import Part

DECODERS = 2
"""Threads of a process that decode: as many as the cores that it is meant to keep busy."""
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1
"""Parameters of glibc's mallopt(3)."""
KEPT_BYTES = 32 << 20
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What came of a part."""

    rows: int
    good: int
    """Rows that nothing speaks against so far."""
    unfetched: int


class Get(Protocol):
    """Gets what is behind URLs: `fetch.Fetcher` or `fetch.Reader`."""

    gate: asyncio.Event
    """Nothing more is got while it is cleared."""

    async def fetch_then(self, urls: Sequence[str | None], then: Then[T]) -> list[T]:
        """Of each URL what `then` makes of it, in their order."""


@dataclass(frozen=True, kw_only=True)
class Steps:
    """What is done to a part, in this order."""

    read: Callable[[Part], pa.Table]
    fetch: Callable[[], Get]
    """Called once a process."""
    decode: Callable[[bytes], Decoded | Rejection]
    filter: Callable[[pa.Table], pa.Table]
    score: Sequence[Any]
    """Actors of `scores.ScoreStage`, which take turns; none where nothing is scored."""
    save: Callable[[pa.Table, Part], None]


class Crawler:
    """Does the steps; calls overlap, so that a slow host does not hold up the rest."""

    def __init__(self, steps: Steps, waiting_bytes: int) -> None:
        """Start the threads.

        Args:
            steps: what to do.
            waiting_bytes: of fetched bodies that wait to be decoded, beyond which no other is asked for.
        """
        keep_memory()
        cv2.setNumThreads(1)
        self._steps, self._most, self._waiting = steps, waiting_bytes, 0
        self._get = steps.fetch()
        self._decoders = ThreadPoolExecutor(DECODERS)
        self._storage = ThreadPoolExecutor(DECODERS)
        self._scorers = itertools.cycle(steps.score)

    async def crawl(self, part: Part) -> Progress:
        """Read, fetch, decode, filter, score and save a part."""
        steps, in_thread = self._steps, asyncio.get_running_loop().run_in_executor
        rows = await in_thread(self._storage, steps.read, part)
        got = await self._get.fetch_then(rows["url"].to_pylist(), self._decode)
        rows = with_images(with_status(rows, [fetched for fetched, _ in got]), [image for _, image in got])
        del got
        rows = steps.filter(rows)
        if steps.score:
            rows = await next(self._scorers).__call__.remote(rows)
        await in_thread(self._storage, steps.save, rows, part)
        unfetched = pc.sum(pc.equal(rows["stage"], "fetch")).as_py() or 0
        return Progress(rows=rows.num_rows, good=rows["reason"].null_count, unfetched=unfetched)

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

    Where there is no glibc, nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, KEPT_BYTES)
        mallopt(TRIM_THRESHOLD, 2 * KEPT_BYTES)
