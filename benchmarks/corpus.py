"""The decisions about a whole corpus on one machine: time, memory and disk by number of rows.

make bench-corpus
python benchmarks/corpus.py 10000000 --memory 250MB
python benchmarks/corpus.py 1000000 --cluster       # by Ray Data's shuffle; memory and disk are the driver's

The corpus is synthetic: the columns that the decisions read, without images. Of its rows, 5 % repeat an earlier row's
URL, 5 % its image, 5 % differ from it in two bits of the perceptual hash, 10 % have one of 1,000 captions, and each
mentions up to three concepts. Time at 10^8 and 10^9 rows is extrapolated from the last two sizes by the exponent of the
growth between them, that of near-duplicates by the number of comparisons; disk is in proportion to the last size.
"""

import argparse
import contextlib
import math
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import duckdb
import pyarrow.dataset as ds
from measure import BENCH, reset_peak, resident_mb, update_figures

from data_prep import tables
from data_prep.concepts.groups import shuffle_groups, write_groups
from data_prep.pairs.dedup import SHARED_BANDS, Corpus, search_cost
from data_prep.pairs.growth import URLS
from data_prep.pairs.rows import LIGHT, RowNumbering
from data_prep.pairs.shards import MENTIONS
from data_prep.pairs.shuffle import ShuffledCorpus
from workflows.common import cluster

SIZES = (1_000_000, 10_000_000)
FAR = (10**8, 10**9)
"""Sizes to extrapolate to."""
FILE_ROWS = 10_000
SOURCE = "0" * 16
SAMPLE_SECONDS = 0.1
BITS = 4
MEMORY = "1GB"
Kind = Literal["urls", "light", "mentions"]

IMAGES = """
    select row, '{source}' as source, if(hash(row, 1) % 20 = 0, hash(row, 2) % (row + 1), row)::bigint as image,
      if(hash(row, 3) % 20 = 0, hash(row, 4) % (row + 1), row)::bigint as page, if(hash(image, 5) % 20 = 0,
      xor(xor(hash(hash(image, 6) % (image + 1)), 1::ubigint << (hash(image, 7) % 32)::int),
      1::ubigint << (32 + hash(image, 8) % 31)::int),
      hash(image))::ubigint as phash, if(hash(row, 9) % 10 = 0, 'a stock photo of kind ' || hash(row, 10) % 1000,
      format('photo {{}} of a red umbrella on a wooden bench near the old harbour', row)) as caption
    from range({start}, {stop}) as numbers(row)
"""
COLUMNS: dict[Kind, str] = {
    "urls": "source, row, format('https://images-{}.example.com/photographs/{}/large.jpg', page % 9973, page) as url",
    "light": "source, row, null::varchar as reason, sha256(image::varchar) as image_id, phash, caption",
    "mentions": "sha256(row::varchar) as image_id, format('shards/{}.tar', row // 1000) as shard, row as offset, "
    "20000::bigint as size, 512::integer as width, 384::integer as height, caption, list_sort(list_distinct("
    "list_transform(range(3), lambda i: format('concept {}', (20000 * pow(hash(row, 11 + i) / pow(2, 64), 3))::int)))) "
    "as names",
}
"""The columns of the inputs; concepts are as unequal as words are."""
SCHEMAS = {"urls": URLS, "light": LIGHT, "mentions": MENTIONS}


@dataclass(frozen=True)
class Cost:
    """What one decision took."""

    seconds: float
    peak_gb: float
    """Peak resident memory of the process."""
    disk_gb: float
    """Peak size of its temporary files."""


def run_apart(function: Callable[..., Any], *arguments: object) -> Any:
    """The result of a function in a new process, so that its memory does not count here."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def write_corpus(folder: Path, kind: Kind, count: int) -> list[str]:
    """Write one input of a corpus of `count` rows; returns its Parquet files."""
    paths = []
    with duckdb.connect() as sql:
        for start in range(0, count, FILE_ROWS):
            rows = IMAGES.format(source=SOURCE, start=start, stop=min(count, start + FILE_ROWS))
            paths.append(str(folder / f"{kind}-{start:012d}.parquet"))
            sql.execute("set enable_progress_bar = false")
            sql.execute(f"copy (select {COLUMNS[kind]} from ({rows})) to '{paths[-1]}' (row_group_size 10000)")
    return paths


@contextlib.contextmanager
def disk_peak(folder: Path) -> Iterator[list[float]]:
    """Sample the size of a folder's files while the block runs; the list then holds the peak in units of 10^9 bytes."""
    peak, done = [0.0], threading.Event()

    def sample() -> None:
        while not done.wait(SAMPLE_SECONDS):
            size = 0
            for path in folder.rglob("*"):
                with contextlib.suppress(OSError):
                    size += path.stat().st_blocks * 512 if path.is_file() else 0
            peak[0] = max(peak[0], size / 1e9)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def cost(scratch: Path, decide: Callable[[], object]) -> Cost:
    """Run a decision that keeps its temporary files in a folder."""
    reset_peak()
    started = time.perf_counter()
    with disk_peak(scratch) as disk:
        decide()
    return Cost(time.perf_counter() - started, resident_mb("VmHWM") / 1e3, disk[0])


def measure_size(count: int, memory: str, with_cluster: bool) -> dict[str, Cost]:
    """All decisions about a corpus of `count` rows, by name, in the order of a crawl."""
    costs: dict[str, Cost] = {}
    order = RowNumbering.of({SOURCE: count})
    corpus_type, write = (ShuffledCorpus, shuffle_groups) if with_cluster else (Corpus, write_groups)
    if with_cluster:
        cluster.start_ray()
    with tempfile.TemporaryDirectory(dir=BENCH) as folder:
        data, scratch = Path(folder, "data"), Path(folder, "scratch")
        data.mkdir()
        scratch.mkdir()
        tempfile.tempdir = str(scratch)

        def opened(kind: Kind) -> ds.Dataset:
            return tables.open_parquet(run_apart(write_corpus, data, kind, count), SCHEMAS[kind])

        def decide(name: str, run: Callable[[], object]) -> None:
            costs[name] = cost(scratch, run)
            print(f"{count:>13,} rows  {name:12} {costs[name]}", flush=True)

        def decide_urls() -> None:
            urls = corpus_type(order, opened("urls"), memory=memory)
            decide("urls", lambda: urls.reject_repeats("url", "duplicate_url"))
            print(f"{'':>13} rejected {urls.decisions().num_rows:,}")

        def decide_images() -> None:
            corpus = corpus_type(order, opened("light"), memory=memory)
            decide("boilerplate", lambda: corpus.reject_boilerplate(50))
            decide("bytes", lambda: corpus.reject_repeats("image_id", "duplicate_bytes"))
            decide("near", lambda: corpus.reject_near_duplicates(BITS))
            decide("decisions", corpus.decisions)
            print(f"{'':>13} rejected {corpus.decisions().num_rows:,}")

        decide_urls()
        decide_images()
        mentions = opened("mentions")
        store = str(data / "store")
        decide("groups", lambda: write(mentions, store, "bench", "part", min_images=2, memory=memory))
        tempfile.tempdir = None
    return costs


def extrapolated_seconds(name: str, measured: dict[int, dict[str, Cost]], count: int) -> float:
    """The time of a decision about `count` rows."""
    (small, few), (large, many) = ((size, costs[name].seconds) for size, costs in list(measured.items())[-2:])
    if name == "near":
        fewest = [min(search_cost(BITS, shared, rows) for shared in SHARED_BANDS) for rows in (large, count)]
        return many * count / large * fewest[1] / fewest[0]
    return many * (count / large) ** max(1.0, math.log(many / few) / math.log(large / small))


def show(measured: dict[int, dict[str, Cost]]) -> None:
    """Print the table of measured and extrapolated costs."""
    last = max(measured)
    print(f"\n{'decision':12} {'rows':>13} {'seconds':>11} {'rows/s':>10} {'memory GB':>9} {'disk GB':>9}")
    for name in measured[last]:
        for count in measured:
            found = measured[count][name]
            rate = count / found.seconds
            print(
                f"{name:12} {count:13,} {found.seconds:11.1f} {rate:10,.0f} {found.peak_gb:9.2f} {found.disk_gb:9.2f}"
            )
        for count in FAR if len(measured) > 1 else ():
            seconds = extrapolated_seconds(name, measured, count)
            disk = measured[last][name].disk_gb * count / last
            print(f"{name:12} {count:13,} {seconds:11,.0f} {count / seconds:10,.0f} {'':9} {disk:9.1f}  extrapolated")


def main() -> None:
    """Measure all sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", type=int, nargs="*", default=list(SIZES), help="numbers of rows, ascending")
    parser.add_argument("--memory", default=MEMORY, help="DuckDB's memory")
    parser.add_argument("--cluster", action="store_true", help="by Ray, on the cluster or this machine")
    options = parser.parse_args()
    BENCH.mkdir(parents=True, exist_ok=True)
    measured = {count: run_apart(measure_size, count, options.memory, options.cluster) for count in options.sizes}
    show(measured)
    prefix = "cluster_" if options.cluster else ""
    figures = {}
    for count, costs in measured.items():
        for name, found in costs.items():
            figures |= {f"{prefix}{name}_{count:.0e}_{key}": value for key, value in vars(found).items()}
    if options.memory == MEMORY:
        update_figures("corpus", figures)


if __name__ == "__main__":
    main()
