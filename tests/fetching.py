"""Fetch several URLs at once, as a crawl does."""

import asyncio
from collections.abc import Sequence

from data_prep.pairs.fetch import Fetched, Fetcher


async def fetch_all(fetcher: Fetcher, urls: Sequence[str | None]) -> list[Fetched]:
    async with fetcher.open():
        return list(await asyncio.gather(*(fetcher.fetch(url) for url in urls)))
