"""Pairs: crawl a list of image URLs with captions into clean image-text pairs and concept groups.

URL list (tsv, csv, jsonl, parquet)
   | read, drop repeated URLs
   v
fetch --> decode --> filter          one staged part a partition: a killed run resumes from these
   | drop repeated bytes
   v
pairs (tar shards and index), rejects (each with its reason)
   | captions -> names of the vocabulary
   v
concepts, groups

python workflows/prepare_pairs.py --config smoke
python workflows/prepare_pairs.py --config web --name cc3m --urls cc3m.tsv --vocabulary nouns.txt
"""

import contextlib
import dataclasses
import io
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from data_prep import dedup, shards, storage, tables, website
from data_prep.concepts import Vocabulary, build_groups
from data_prep.decode import DecodeConfig, decode_rows
from data_prep.fetch import FetchConfig, FetchStage, ReadStage
from data_prep.filters import FilterConfig, filter_rows
from data_prep.pictograms import GLYPHS
from ovd_models.errors import InputError
from workflows import cli, cluster

PRODUCER = "workflows/prepare_pairs.py"
OUTPUTS = ("rejects", "concepts", "groups", "pairs")
PROGRESS_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Run:
    """One crawl."""

    storage: str = "runs"
    """Folder or URI that holds all tables."""
    name: str
    """Name of the tables."""
    urls: str = ""
    """The URL list: a .tsv, .csv, .jsonl or .parquet file, by path or URI."""
    url_column: str = "url"
    caption_column: str = "caption"
    vocabulary: str = ""
    """Text file with the concepts, one name a line, synonyms after commas."""
    names: tuple[str, ...] = ()
    """The concepts themselves, where there is no file."""
    site_pictures: int = 0
    """Build and serve the pictogram web site with this many pictures and crawl that, instead of `urls`."""
    site_scenes: int = 0
    fetch: FetchConfig = field(default_factory=FetchConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    filters: FilterConfig = field(default_factory=FilterConfig)
    rows_per_shard: int = 1000
    """Input rows of one shard, also the unit in which work is saved."""
    min_images: int = 2
    """Concepts with fewer unique images are left out."""
    fetchers: int = 2
    """Processes that fetch."""
    batches_per_fetcher: int = 4
    """Shards a fetcher works on at a time, so that one slow host does not hold up the rest."""


def web() -> Run:
    """A crawl of the public internet; name it and give it `--urls` and `--vocabulary`."""
    return Run(name="web", decode=DecodeConfig(max_side=512))


def pictograms() -> Run:
    """The pictogram web site: 12,000 small pictures and 4,000 scenes, about 10 % faulty rows on top."""
    local = FetchConfig(deadline_seconds=3.0, backoff_seconds=0.1, max_bytes=1 << 20, concurrency=64, per_host=64)
    return Run(
        name="pictograms",
        names=tuple(GLYPHS),
        site_pictures=12_000,
        site_scenes=4_000,
        fetch=dataclasses.replace(local, allow_networks=("127.0.0.1/32",)),
        rows_per_shard=500,
    )


def smoke() -> Run:
    """A tiny pictogram web site."""
    run = pictograms()
    return dataclasses.replace(
        run,
        name="smoke",
        fetch=dataclasses.replace(run.fetch, deadline_seconds=1.5),
        site_pictures=120,
        site_scenes=60,
        rows_per_shard=64,
        fetchers=1,
    )


Get = type[FetchStage] | type[ReadStage]
CONFIGS: dict[str, Callable[[], Run]] = {"smoke": smoke, "pictograms": pictograms, "web": web}


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What came of a crawl."""

    input: int
    kept: int
    rejected: dict[str, int]
    """Rows by reason."""
    concepts: int
    seconds: float
    reused: bool
    """The tables were there already."""


def prepare(run: Run) -> Summary:
    """Crawl a URL list and publish `pairs`, `rejects`, `concepts` and `groups` under the run's name.

    Raises:
        InputError: the list or the vocabulary is missing or malformed, or the name holds tables of another config.
    """
    return _prepare(run, shards.read_list(run.urls, run.url_column, run.caption_column), FetchStage)


def prepare_local(run: Run, rows: pa.Table) -> Summary:
    """Like `prepare`, for image files that are already here.

    Args:
        run: `urls` is not read.
        rows: `url` (path or URI of the file) and `caption` columns; further columns are kept.

    Raises:
        InputError: as `prepare`, or a file is missing.
    """
    uris = [storage.absolute(uri) for uri in rows["url"].to_pylist()]
    for number, uri in enumerate(uris):
        if not storage.exists(uri):
            raise InputError(f"{uri}: no such file (row {number}), expected an image")
    rows = rows.set_column(rows.schema.get_field_index("url"), "url", pa.array(uris, pa.string()))
    sink = io.BytesIO()
    pq.write_table(rows, sink)
    digest = storage.sha256(sink.getvalue())[:16]
    return _prepare(run, shards.as_listing(rows, "url", "caption", digest, "rows"), ReadStage)


def _prepare(run: Run, listing: shards.Listing, get: Get) -> Summary:
    started = time.monotonic()
    run = dataclasses.replace(run, storage=storage.absolute(run.storage))
    vocabulary = Vocabulary.read(run.vocabulary) if run.vocabulary else Vocabulary.parse(run.names)
    config_hash = result_hash(run, listing, vocabulary)
    staging = storage.join(run.storage, "staging", "pairs", run.name, config_hash)
    earlier = published(run, config_hash)
    if earlier is not None:
        print(f"pairs: {tables.table_uri(run.storage, 'pairs', run.name)} is there already, from the same config")
        shards.remove_folder(staging)
        return earlier
    cluster.start_ray()

    repeated_urls = dedup.duplicate_of(listing.rows, "url")
    outcomes = crawl(run, listing.rows.filter(pc.is_null(repeated_urls)), staging, get)
    good = outcomes.filter(pc.is_null(outcomes["reason"]))
    repeated_bytes = dedup.duplicate_of(good, "image_id")

    repeats = shards.Repeats(
        urls=listing.rows.append_column("duplicate_of", repeated_urls).filter(pc.is_valid(repeated_urls)),
        images=good.append_column("duplicate_of", repeated_bytes).filter(pc.is_valid(repeated_bytes)),
    )
    written = write_shards(run, staging, listing.rows, repeats)
    pairs = pa.concat_tables([part.pairs for part in written])
    reasons: Counter[str] = sum((Counter(part.rejected) for part in written), Counter())
    assert pairs.num_rows + reasons.total() == listing.rows.num_rows, "every row is kept or rejected, once"

    mentions = [vocabulary.match(caption) for caption in pairs["caption"].to_pylist()]
    concepts, groups = build_groups(pairs, mentions, vocabulary.names, min_images=run.min_images)

    summary = Summary(
        input=listing.rows.num_rows,
        kept=pairs.num_rows,
        rejected=dict(sorted(reasons.items())),
        concepts=concepts.num_rows,
        seconds=round(time.monotonic() - started, 2),
        reused=False,
    )
    publish(
        run,
        config_hash,
        summary,
        {
            "rejects": [entry for part in written for entry in part.rejects_files],
            "concepts": [tables.write_part(run.storage, "concepts", run.name, "part-00000.parquet", concepts)],
            "groups": [tables.write_part(run.storage, "groups", run.name, "part-00000.parquet", groups)],
            "pairs": [entry for part in written for entry in part.pairs_files],
        },
    )
    shards.remove_folder(staging)
    return summary


def crawl(run: Run, todo: pa.Table, staging: str, get: Get) -> pa.Table:
    """Fetch, decode and filter; one staged Parquet file a partition holds what came of each of its rows.

    Returns:
        `source`, `row`, `reason` (null if good) and `image_id` of every row.
    """
    staged = shards.read_staged(staging, ["source", "row", "reason", "image_id"])
    remaining = todo.filter(pc.invert(pc.is_in(todo["row"], staged["row"])))
    if staged.num_rows:
        print(f"pairs: {staged.num_rows:,} of {todo.num_rows:,} rows done by an earlier run", flush=True)
    if not remaining.num_rows:
        return staged
    parts = [part for _, part in shards.partitions(remaining, run.rows_per_shard)]
    save = partial(shards.stage_part, staging=staging, size=run.rows_per_shard)
    rows = (
        ray.data.from_blocks(parts)  # from_arrow would start a task a block, only to count its rows
        .map_batches(
            get,
            fn_constructor_args=(run.fetch,),
            batch_format="pyarrow",
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(
                size=min(run.fetchers, len(parts)),
                max_concurrent_calls_per_actor=run.batches_per_fetcher,
                max_tasks_in_flight_per_actor=run.batches_per_fetcher,
            ),
            num_cpus=0.25,  # fetching waits more than it works, and decoding needs the cores
        )
        .map_batches(partial(decode_rows, config=run.decode), batch_format="pyarrow", batch_size=None, num_cpus=0.5)
        .map_batches(partial(filter_rows, config=run.filters), batch_format="pyarrow", batch_size=None, num_cpus=0.5)
        .map_batches(save, batch_format="pyarrow", batch_size=None, num_cpus=0.5)
    )
    show_progress(rows, staged, todo.num_rows)
    return shards.read_staged(staging, ["source", "row", "reason", "image_id"])


def show_progress(rows: ray.data.Dataset, staged: pa.Table, total: int) -> None:
    """Run the crawl, with a line every few seconds."""
    started = shown = time.monotonic()
    done, kept = staged.num_rows, staged["reason"].null_count
    earlier = done
    batch: pa.Table
    for batch in rows.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        done, kept = done + batch.num_rows, kept + batch["reason"].null_count
        now = time.monotonic()
        if now - shown >= PROGRESS_SECONDS or done == total:
            shown, rate = now, (done - earlier) / (now - started)
            print(f"pairs: {done:,} of {total:,} rows done, {kept:,} good, {rate:,.0f} rows/s", flush=True)


def write_shards(run: Run, staging: str, rows: pa.Table, repeats: shards.Repeats) -> list[shards.Written]:
    """One tar shard with its index and its rejects for each partition of the input, in parallel."""
    write = ray.remote(num_cpus=0.5, scheduling_strategy="SPREAD")(shards.write_shard)
    pending = [
        write.remote(run.storage, run.name, staging, number, repeats.between(part["row"][0], part["row"][-1]))
        for number, part in shards.partitions(rows, run.rows_per_shard)
    ]
    written: list[shards.Written] = ray.get(pending)
    return written


def result_hash(run: Run, listing: shards.Listing, vocabulary: Vocabulary) -> str:
    """16 digits that change with whatever changes the tables' rows: not with where and how fast the job runs."""
    neutral = dataclasses.replace(
        run, storage="", urls="", vocabulary="", site_pictures=0, site_scenes=0, fetchers=0, batches_per_fetcher=0
    )
    inputs = f"{cli.config_hash(neutral)} {listing.digest} {sorted(vocabulary.phrases.items())} {vocabulary.names}"
    return storage.sha256(inputs.encode())[:16]


def published(run: Run, config_hash: str) -> Summary | None:
    """The summary of tables that are there already.

    Raises:
        InputError: they are, but of another config or input.
    """
    manifests = [tables.find_manifest(run.storage, table, run.name) for table in OUTPUTS]
    for manifest in manifests:
        if manifest is not None and manifest.config_hash != config_hash:
            uri = tables.table_uri(run.storage, manifest.table, run.name)
            raise InputError(f"{uri}: made from another config or list, expected a new --name or an empty place")
    if None in manifests:
        return None
    assert manifests[0] is not None
    return dataclasses.replace(Summary(**manifests[0].details), reused=True)


def publish(run: Run, config_hash: str, summary: Summary, files: dict[str, list[tables.FileEntry]]) -> None:
    """Write the manifests, that of `pairs` last."""
    for table in OUTPUTS:
        tables.publish(
            run.storage,
            table,
            run.name,
            files[table],
            producer=PRODUCER,
            config_hash=config_hash,
            details=dataclasses.asdict(summary),
        )


@contextlib.contextmanager
def site_of(run: Run) -> Iterator[Run]:
    """The run with the URL list of a pictogram web site, built if needed, that is served while the block runs."""
    if not run.site_pictures + run.site_scenes:
        yield run
        return
    local = "runs" if "://" in run.storage else run.storage  # images are served from files of this machine
    root = Path(storage.absolute(local)) / "sites" / f"{run.name}-{run.site_pictures}-{run.site_scenes}"
    if not (root / "expected.parquet").exists():
        print(f"web site: drawing {run.site_pictures + run.site_scenes:,} images in {root}", flush=True)
        website.build_site(root, num_pictures=run.site_pictures, num_scenes=run.site_scenes)
    with website.serving(root):
        yield dataclasses.replace(run, urls=str(root / "urls.tsv"))


def main() -> None:
    """The script."""
    run = cli.parse(CONFIGS, __doc__)
    with site_of(run) as run:
        summary = prepare(run)
    print(f"pairs: {summary.kept:,} of {summary.input:,} rows kept, {summary.concepts} concepts, {summary.seconds:g} s")
    for reason, count in summary.rejected.items():
        print(f"    {reason:20} {count:,}")
    print(f"next: python workflows/clip.py --storage {run.storage}")


if __name__ == "__main__":
    cli.execute(main)
