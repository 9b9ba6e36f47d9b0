"""One part from its rows to its saved results, without Ray."""

import asyncio
import io
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pytest
import ray
from PIL import Image

from data_prep import progress, tables
from data_prep.pairs import crawl, inputs
from data_prep.pairs.crawl import DECODERS, Crawler, CrawlSteps, PartCounts, watch
from data_prep.pairs.decode import DecodeConfig, Decoded, decode_body
from data_prep.pairs.fetch import Fetched
from data_prep.pairs.files import FileReader
from data_prep.pairs.filters import FilterConfig, filter_rows
from data_prep.pairs.inputs import Columns
from data_prep.pairs.rows import Rejection
from data_prep.pairs.staging import Part, Staging
from data_prep.parts import Pool, run_parts

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
    assert crawler(Part("p", 0, (2,))) == PartCounts(rows=3, good=2, unfetched=0)
    (saved,) = [file.read() for file in staging.open_parts("p", 5)]
    assert saved["row"].to_pylist() == [0, 1, 3]
    assert saved["reason"].to_pylist() == [None, "not_an_image", None]
    assert saved["content"].to_pylist()[::2] == [photo(0), photo(3)]
    assert saved["caption"].to_pylist() == ["a cat"] * 3


def test_a_part_without_rows_saves_nothing(tmp_path: Path) -> None:
    staging = stage_list(tmp_path, [photo(0)])
    crawler = Crawler(steps(), staging, 1 << 20)
    assert crawler(Part("p", 0, (0,))) == PartCounts(rows=0, good=0, unfetched=0)
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

    crawler = Crawler(steps(held_up), staging, 3 * size)
    crawler._fetcher._slots = asyncio.Semaphore(1)
    with ThreadPoolExecutor(3) as threads:
        parts = [threads.submit(crawler, Part("p", number)) for number in range(3)]
        for _ in range(DECODERS):
            decoding.acquire()
        time.sleep(0.2)
        waiting = crawler._waiting
        free.set()
        assert sum(part.result().good for part in parts) == 12
    assert 2 * size < waiting <= 4 * size


@pytest.mark.ray
@pytest.mark.parametrize("count", [1, 2])
def test_scoring_models_take_turns(tmp_path: Path, ray_cluster: None, count: int) -> None:
    staging = stage_list(tmp_path, [photo(seed) for seed in range(12)])

    @ray.remote(num_cpus=0)
    class Model:
        def __init__(self, number: int) -> None:
            self.number = number

        def __call__(self, rows: pa.Table) -> pa.Table:
            return rows.append_column("score_light", pa.array([float(self.number)] * rows.num_rows))

    crawler = Crawler(steps(scorers=[Model.remote(number) for number in range(count)]), staging, 1 << 20)
    for number in range(3):
        crawler(Part("p", number))
    found = [tables.read_parquet(path)["score_light"][0].as_py() for path in staging.files("parts")]
    assert found == [number % count for number in range(3)]


class SlowReader(FileReader):
    """Waits before it reads the file `slow`, and notes what it is asked for."""

    asked: ClassVar[list[str]] = []
    slow: ClassVar[str] = ""
    answer: ClassVar[threading.Event]

    async def fetch(self, url: str | None) -> Fetched:
        assert url
        self.asked.append(url)
        if url == self.slow:
            assert await asyncio.to_thread(self.answer.wait, 10)
        return await super().fetch(url)


def test_a_slow_row_does_not_hold_up_the_results_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crawl, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(SlowReader, "asked", [])
    monkeypatch.setattr(SlowReader, "slow", str(tmp_path / "1.jpg"))
    monkeypatch.setattr(SlowReader, "answer", threading.Event(), raising=False)
    staging = stage_list(tmp_path, [photo(seed) for seed in range(4)])
    with ThreadPoolExecutor(1) as threads:
        killed = threads.submit(Crawler(replace(steps(), fetcher=SlowReader), staging, 1 << 20), Part("p", 0))
        while not staging.files("early"):
            time.sleep(0.01)
        early = staging.read_early(Part("p", 0))
        assert early is not None
        assert (early["row"].to_pylist(), staging.files("parts")) == ([0, 2, 3], [])
        SlowReader.answer.set()
        assert killed.result() == PartCounts(rows=4, good=4)
    (whole,) = [file.read() for file in staging.open_parts("p", 4)]
    assert whole["row"].to_pylist() == [0, 1, 2, 3]

    (tmp_path / "parts" / Part("p", 0).name).unlink()  # as if the run had been killed before
    SlowReader.asked.clear()
    again = Crawler(replace(steps(), fetcher=SlowReader), staging, 1 << 20)
    assert again(Part("p", 0)) == PartCounts(rows=4, good=4)
    assert SlowReader.asked == [SlowReader.slow]
    (resumed,) = [file.read() for file in staging.open_parts("p", 4)]
    assert resumed == whole


def test_a_part_that_a_lost_process_saved_is_not_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SlowReader, "asked", [])
    staging = stage_list(tmp_path, [photo(0), b"<html>", photo(2), photo(3)])
    counts = Crawler(steps(), staging, 1 << 20)(Part("p", 0))
    again = Crawler(replace(steps(), fetcher=SlowReader), staging, 1 << 20)
    assert again(Part("p", 0)) == counts == PartCounts(rows=4, good=3)
    assert SlowReader.asked == []


def test_a_crawl_of_which_most_fetches_fail_warns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    monkeypatch.setattr(progress, "LINE_SHARE", 0.0)
    good, bad = PartCounts(rows=10, good=9, unfetched=1), PartCounts(rows=10, good=2, unfetched=8)
    done = watch([good, good], 40)
    assert [rows for _, rows in done] == [10, 20, 20]
    assert "WARNING" not in capsys.readouterr().out
    watch([good, bad, bad, bad], 40)
    assert capsys.readouterr().out.count("WARNING: 17 of 30 fetches failed") == 1


def test_a_part_that_fails_ends_the_crawl(tmp_path: Path) -> None:
    bodies = [photo(number) for number in range(20)]
    staging = stage_list(tmp_path, bodies)

    def fail(body: bytes) -> Decoded | Rejection:
        if body == bodies[7]:
            raise OSError("the disk is full")
        return as_usual(body)

    every = [Part("p", number) for number in range(5)]
    with pytest.raises(OSError, match="the disk is full"):
        list(run_parts(partial(Crawler, steps(fail), staging, 1 << 20), every, Pool(workers=0, parts_at_a_time=2)))
    assert staging.files("parts")
