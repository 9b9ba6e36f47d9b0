"""One part from its rows to its saved results, without Ray."""

import asyncio
import io
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from data_prep import tables
from data_prep.pairs import crawl, inputs
from data_prep.pairs.crawl import DECODERS, Crawler, CrawlerPool, CrawlSteps, FileReader, PartCounts, show_progress
from data_prep.pairs.decode import DecodeConfig, Decoded, decode_body
from data_prep.pairs.filters import FilterConfig, filter_rows
from data_prep.pairs.inputs import Columns
from data_prep.pairs.rows import Rejection
from data_prep.pairs.staging import Part, Staging

SOURCE = "0" * 16
Decode = Callable[[bytes], Decoded | Rejection]


def photo(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def stage_list(root: Path, bodies: list[bytes]) -> Staging:
    """Files of these bodies, staged as one partition in parts of four."""
    for number, body in enumerate(bodies):
        (root / f"{number}.jpg").write_bytes(body)
    rows = {"url": [str(root / f"{number}.jpg") for number in range(len(bodies))], "caption": ["a cat"] * len(bodies)}
    staging = Staging(str(root), len(bodies), 4)
    staging.write_rows("p", inputs.normalize_columns(pa.table(rows), Columns(), SOURCE, 0, "list"))
    return staging


def as_usual(body: bytes) -> Decoded | Rejection:
    return decode_body(body, DecodeConfig())


def steps(decoder: Decode = as_usual, scorers: Sequence[object] = ()) -> CrawlSteps:
    filters = partial(filter_rows, config=FilterConfig())
    return CrawlSteps(fetcher=FileReader, decode=decoder, filter=filters, scorers=scorers)


def test_the_results_of_a_part_are_saved_and_counted(tmp_path: Path) -> None:
    staging = stage_list(tmp_path, [photo(0), b"<html>", photo(2), photo(3), photo(4)])
    crawler = Crawler(steps(), staging, 1 << 20)
    assert asyncio.run(crawler.crawl(Part("p", 0, (2,)))) == PartCounts(rows=3, good=2, unfetched=0)
    (saved,) = [file.read() for file in staging.open_parts("p", 5)]
    assert saved["row"].to_pylist() == [0, 1, 3]
    assert saved["reason"].to_pylist() == [None, "not_an_image", None]
    assert saved["content"].to_pylist()[::2] == [photo(0), photo(3)]
    assert saved["caption"].to_pylist() == ["a cat"] * 3


def test_a_part_without_rows_saves_nothing(tmp_path: Path) -> None:
    staging = stage_list(tmp_path, [photo(0)])
    crawler = Crawler(steps(), staging, 1 << 20)
    assert asyncio.run(crawler.crawl(Part("p", 0, (0,)))) == PartCounts(rows=0, good=0, unfetched=0)
    assert staging.files("parts") == []


def test_bodies_that_wait_to_be_decoded_stay_within_their_limit(tmp_path: Path) -> None:
    """Decoders are held up: of twelve bodies, those are read that fit the limit, and what was on its way by then."""
    staging = stage_list(tmp_path, [photo(seed) for seed in range(12)])
    size = max(len(photo(seed)) for seed in range(12))
    free, decoding = threading.Event(), threading.Semaphore(0)

    def held_up(body: bytes) -> Decoded | Rejection:
        decoding.release()
        assert free.wait(10)
        return decode_body(body, DecodeConfig())

    waiting = []

    async def run() -> list[PartCounts]:
        crawler = Crawler(steps(held_up), staging, 3 * size)
        crawler._fetcher._slots = asyncio.Semaphore(1)
        parts = [asyncio.create_task(crawler.crawl(Part("p", number))) for number in range(3)]
        for _ in range(DECODERS):
            await asyncio.to_thread(decoding.acquire)
        await asyncio.sleep(0.2)
        waiting.append(crawler._waiting)
        free.set()
        return await asyncio.gather(*parts)

    assert sum(done.good for done in asyncio.run(run())) == 12
    assert 2 * size < waiting[0] <= 4 * size


@pytest.mark.parametrize("count", [1, 2])
def test_scoring_models_take_turns(tmp_path: Path, count: int) -> None:
    staging = stage_list(tmp_path, [photo(seed) for seed in range(12)])

    class Model:
        """Answers as an actor's handle does."""

        def __init__(self, number: int) -> None:
            self.__call__ = SimpleNamespace(remote=partial(self.score, number))

        async def score(self, number: int, rows: pa.Table) -> pa.Table:
            return rows.append_column("score_light", pa.array([float(number)] * rows.num_rows))

    crawler = Crawler(steps(scorers=[Model(number) for number in range(count)]), staging, 1 << 20)

    async def run() -> None:
        for number in range(3):
            await crawler.crawl(Part("p", number))

    asyncio.run(run())
    found = [tables.read_parquet(path)["score_light"][0].as_py() for path in staging.files("parts")]
    assert found == [number % count for number in range(3)]


def test_local_files_are_read_in_the_place_of_urls(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")
    found = asyncio.run(FileReader().fetch(str(tmp_path / "a")))
    assert (found.content, found.reason) == (b"content", None)


def test_a_crawl_of_which_most_fetches_fail_warns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(crawl, "PROGRESS_SECONDS", 0.0)
    good, bad = PartCounts(rows=10, good=9, unfetched=1), PartCounts(rows=10, good=2, unfetched=8)
    done = show_progress([good, good], 40)
    assert [rows for _, rows in done] == [10, 20, 20]
    assert "WARNING" not in capsys.readouterr().out
    show_progress([good, bad, bad, bad], 40)
    assert capsys.readouterr().out.count("WARNING: 17 of 30 fetches failed") == 1


# ------------------------------------------------------------------------------------------------- inside the driver


def in_driver(staging: Staging, decoder: Decode = as_usual) -> CrawlerPool:
    """A pool without processes that works on two parts at a time."""
    return CrawlerPool(steps(decoder), staging, processes=0, parts_at_a_time=2, waiting_bytes=1 << 20)


def test_a_pool_without_processes_crawls_every_part(tmp_path: Path) -> None:
    staging = stage_list(tmp_path, [photo(number) for number in range(20)])
    with in_driver(staging) as pool:
        assert sum(part.rows for part in pool.crawl([Part("p", number) for number in range(5)])) == 20
        assert pool.run(max, [(1, 2), (4, 3)]) == [2, 4]
    assert len(staging.files("parts")) == 5


def test_a_part_that_fails_ends_a_pool_without_processes(tmp_path: Path) -> None:
    bodies = [photo(number) for number in range(20)]
    staging = stage_list(tmp_path, bodies)

    def fail(body: bytes) -> Decoded | Rejection:
        if body == bodies[7]:
            raise OSError("the disk is full")
        return as_usual(body)

    with in_driver(staging, fail) as pool, pytest.raises(OSError, match="the disk is full"):
        list(pool.crawl([Part("p", number) for number in range(5)]))


def test_a_pool_without_processes_can_be_left_early(tmp_path: Path) -> None:
    staging = stage_list(tmp_path, [photo(number) for number in range(20)])
    with in_driver(staging) as pool:
        progress = pool.crawl([Part("p", number) for number in range(5)])
        assert next(progress).rows == 4
        progress.close()
    assert len(staging.files("parts")) < 5
