"""Read image files that are known to exist, in the place of a crawl: by path or URI, alone or in tar shards."""

import asyncio
import contextlib
import functools

from pyarrow import NativeFile

from data_prep import storage
from data_prep.pairs.addresses import FetchError
from data_prep.pairs.fetch import FetchConfig, Fetched
from data_prep.pairs.tars import locate

FILES_AT_A_TIME = 16
OPEN_SHARDS = 16
"""Shards that stay open: an object store would be asked for the size of the shard with each image."""


class FileReader:
    """Like `fetch.Fetcher`, for files and for images in tar shards."""

    def __init__(self, max_bytes: int = FetchConfig.max_bytes) -> None:
        """Set the largest size of an image in a shard, whose header may claim any."""
        self._max_bytes = max_bytes
        self.gate = asyncio.Event()
        self.gate.set()
        self._slots = asyncio.Semaphore(FILES_AT_A_TIME)
        self._open_shard = functools.lru_cache(OPEN_SHARDS)(_open_file)

    def open(self) -> contextlib.nullcontext[None]:
        """Do nothing: there are no connections."""
        return contextlib.nullcontext()

    async def fetch(self, url: str | None) -> Fetched:
        """Read a file; one that is cut off gives what there is of it."""
        if url is None:
            return Fetched(reason="bad_url", detail="no image")
        async with self._slots:
            await self.gate.wait()
            try:
                return Fetched(content=await asyncio.to_thread(self._read, url))
            except FetchError as error:
                return Fetched(reason=error.reason, detail=error.detail)

    def _read(self, url: str) -> bytes:
        place = locate(url)
        if place is None:
            return storage.read_bytes(url)
        uri, offset, size = place
        if size > self._max_bytes:
            raise FetchError("too_large", f"{size} bytes, at most {self._max_bytes}")
        return bytes(self._open_shard(uri).read_at(size, offset))


def _open_file(uri: str) -> NativeFile:
    filesystem, path = storage.resolve(uri)
    return filesystem.open_input_file(path)
