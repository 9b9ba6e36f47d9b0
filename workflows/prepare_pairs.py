"""Pairs: crawl lists of image URLs with captions into clean image-text pairs and concept groups.

URL lists (tsv, csv, jsonl, parquet)
   | cut into partitions; drop repeated URLs
   v
fetch --> decode --> filter          saved part by part: a killed run resumes from these
   | over the whole corpus: boilerplate captions, repeated bytes, near-duplicates
   v
pairs (tar shards and index), rejects (each with its reason)
   | captions -> nouns, or names of a vocabulary
   v
concepts, groups

python workflows/prepare_pairs.py --config smoke
python workflows/prepare_pairs.py --config web --name mine --urls list.tsv
python workflows/prepare_pairs.py --config laion --urls 's3://bucket/laion/*.parquet' --storage s3://bucket/ovd
python workflows/prepare_pairs.py --config web --name mine --urls more.tsv --add
python workflows/prepare_pairs.py --config web --name mine --urls list.tsv --retry timeout connect
"""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray

from data_prep import storage, tables
from data_prep.concepts.groups import write_groups
from data_prep.concepts.names import Extractor, NameMatcher
from data_prep.concepts.nouns import Nouns
from data_prep.pairs import generations, inputs, scores, shards
from data_prep.pairs.crawl import DECODERS, LASTING, CrawlerPool, CrawlSteps, Reader, follow
from data_prep.pairs.decode import DecodeConfig, decode
from data_prep.pairs.dedup import Corpus, CorpusConfig
from data_prep.pairs.fetch import FetchConfig, Fetcher
from data_prep.pairs.filters import FilterConfig, filter_rows
from data_prep.pairs.generations import CrawlPlan, Published
from data_prep.pairs.inputs import Columns
from data_prep.pairs.scores import ScoreConfig, ScoreStage
from data_prep.pictograms import webserver, website
from data_prep.pictograms.world import GLYPHS
from data_prep.shared import share
from ovd_models.errors import InputError
from workflows.common import cli, cluster

SAMPLED_PARTITIONS = 40
"""Partitions that give the report examples of rejected rows."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One crawl."""

    storage: str = "store"
    """Folder or URI that holds all tables."""
    name: str
    """Name of the tables."""
    urls: str = ""
    """The URL lists: a .tsv, .csv, .jsonl or .parquet file, a folder of them, or a pattern; by path or URI."""
    columns: Columns = field(default_factory=Columns)
    add: bool = False
    """Add the rows of new lists to tables that are published already."""
    retry: tuple[str, ...] = ()
    """Try the rows again that were rejected for these reasons, such as `timeout connect http_status`."""
    vocabulary: str = ""
    """Text file with the concepts, one name a line, synonyms after commas; without it, concepts are nouns."""
    names: tuple[str, ...] = ()
    """The concepts themselves, where there is no file."""
    site_pictures: int = 0
    """Build and serve the pictogram web site with this many pictures and crawl that, instead of `urls`."""
    site_scenes: int = 0
    fetch: FetchConfig = field(default_factory=FetchConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    filters: FilterConfig = field(default_factory=FilterConfig)
    scores: ScoreConfig = field(default_factory=ScoreConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    rows_per_shard: int = 1000
    """Input rows of one shard."""
    max_shard_bytes: int = 1 << 30
    """A shard that would grow beyond this is continued in another file."""
    rows_per_part: int = 100
    """Input rows that are saved at a time: what a killed run may have to fetch again."""
    min_images: int = 2
    """Concepts with fewer images are left out."""
    crawlers: int | None = None
    """Processes that crawl, each of which keeps two cores busy; 0 crawls inside the driver. None: one for every two
    cores of the cluster, but none beside the driver on a machine of two cores that belongs to no cluster."""
    parts_per_crawler: int = 16
    """Parts a crawler works on at a time, so that slow hosts do not hold up the rest; a kill may lose as many."""
    waiting_bytes: int = 16 << 20
    """Of fetched images that wait to be decoded, a crawler; beyond, it asks for no more."""


def web() -> Run:
    """A crawl of the public internet; name it and give it `--urls`."""
    return Run(name="web", decode=DecodeConfig(max_side=512), corpus=CorpusConfig(max_caption_uses=50))


def cc3m() -> Run:
    """Conceptual Captions as published: captions and URLs in a .tsv file without a header."""
    return dataclasses.replace(web(), name="cc3m", columns=Columns(header=("caption", "url")))


def coyo() -> Run:
    """COYO-700M as published: Parquet files with `url` and `text`."""
    return dataclasses.replace(web(), name="coyo", columns=Columns(caption="text"))


def laion() -> Run:
    """LAION-400M and LAION-2B as published: Parquet files with `URL` and `TEXT`."""
    return dataclasses.replace(web(), name="laion", columns=Columns(url="URL", caption="TEXT"))


def pictograms() -> Run:
    """The pictogram web site: 12,000 small pictures and 4,000 scenes, about 10 % faulty rows on top."""
    local = FetchConfig(deadline_seconds=3.0, backoff_seconds=0.1, max_bytes=1 << 20, concurrency=64, per_host=128)
    return Run(
        name="pictograms",
        names=tuple(GLYPHS),
        site_pictures=12_000,
        site_scenes=4_000,
        fetch=dataclasses.replace(local, allow_networks=("127.0.0.1/32",)),
        corpus=CorpusConfig(near_bits=2),  # small drawings differ in little
        rows_per_shard=500,
    )


def smoke() -> Run:
    """A tiny pictogram web site."""
    run = pictograms()
    return dataclasses.replace(
        run,
        name="smoke",
        fetch=dataclasses.replace(run.fetch, deadline_seconds=1.0, backoff_seconds=0.1),
        site_pictures=120,
        site_scenes=60,
        rows_per_shard=64,
        rows_per_part=32,
    )


CONFIGS: dict[str, Callable[[], Run]] = {
    "smoke": smoke, "pictograms": pictograms, "web": web, "cc3m": cc3m, "coyo": coyo, "laion": laion,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What tables hold."""

    input: int
    kept: int
    rejected: dict[str, int]
    """Rows by reason."""
    concepts: int
    seconds: float
    """That the last run took."""
    reused: bool
    """The tables were there already."""


def prepare(run: Run) -> Summary:
    """Crawl URL lists and publish `pairs`, `rejects`, `concepts` and `groups` under the run's name.

    Raises:
        InputError: a list or the vocabulary is missing or malformed, or the name holds tables of another config or
            of other lists.
    """
    files = inputs.find_files(run.urls)
    with ThreadPoolExecutor(8) as pool:
        digests = list(pool.map(inputs.file_digest, files))
    for number, digest in enumerate(digests):
        if digest in digests[:number]:
            raise InputError(f"{files[number]}: holds the same as {files[digests.index(digest)]}, expected it once")
    cut = partial(inputs.cut_file, columns=run.columns)
    return _prepare(run, {digest: partial(cut, file) for digest, file in zip(digests, files, strict=True)})


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
    digest = storage.sha256(tables.parquet_bytes(rows))[: inputs.DIGEST_DIGITS]
    cut = partial(inputs.cut, "rows", [rows], Columns(), digest)
    return _prepare(run, {digest: cut}, are_files=True)


def _prepare(run: Run, lists: Mapping[str, generations.Cut], *, are_files: bool = False) -> Summary:
    started = time.monotonic()
    for name in ("rows_per_shard", "rows_per_part", "parts_per_crawler"):
        if getattr(run, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(run, name)}: expected 1 or more")
    run = dataclasses.replace(run, storage=storage.absolute(run.storage))
    extractor = NameMatcher.read(run.vocabulary) if run.vocabulary else NameMatcher.parse(run.names)
    concepts: Extractor = extractor if extractor.names else Nouns()
    for model in filter(None, (*run.scores.scorers.values(), run.corpus.semantic_model)):
        if not scores.is_class(model):
            scores.check_checkpoint(model)
    config_hash = result_hash(run, extractor)
    published = generations.find_published(
        run.storage, run.name, config_hash, lists=lists, add=run.add, retry=run.retry
    )
    new = [digest for digest in lists if published is None or digest not in published.sources]
    if published is not None and not new and not run.retry:
        print(f"pairs: {tables.table_uri(run.storage, 'pairs', run.name)} is there already, from the same config")
        shards.remove_folder(published.details["staging"])  # of a run that was killed at its very end
        return dataclasses.replace(summary_of(published), reused=True)
    if published is not None and not new and not published.rejected_for(run.retry):
        print(f"pairs: no row of {run.name} is rejected for {', '.join(run.retry)}")
        return dataclasses.replace(summary_of(published), reused=True)
    generation = published.generation if published else None
    task = f"{config_hash} {sorted(new)} {run.retry} {generation} {run.rows_per_part}"
    staging = storage.join(run.storage, "staging", "pairs", run.name, storage.sha256(task.encode())[:16])
    processes = count_crawlers(run)
    if run.scores.scorers or run.corpus.semantic_model:
        cluster.start_ray()
    pa.set_memory_pool(pa.system_memory_pool())  # Arrow's own keeps what it once took, beside what the crawl takes

    with start_crawlers(run, processes, staging, are_files=are_files) as pool:
        crawl_plan = generations.plan(
            [lists[digest] for digest in new],
            published,
            run.retry,
            staging,
            partition=run.rows_per_shard,
            part=run.rows_per_part,
            run=pool.run,
        )
        repeated_urls = find_repeated_urls(run, crawl_plan, published, staging)
        progress = crawl(run, crawl_plan, repeated_urls, staging, pool)
        decisions = pa.concat_tables([repeated_urls, decide(run, crawl_plan, published, staging)])
        written = write_shards(run, crawl_plan, published, decisions, staging, concepts, pool)

    grown = generations.combine_files(published, crawl_plan, written)
    generation = published.generation + 1 if published else 0
    mentions = shards.open_staged(staging, "mentions", shards.MENTIONS)
    grouped = write_groups(
        mentions, run.storage, run.name, f"part-{generation:03d}", min_images=run.min_images, memory=run.corpus.memory
    )
    summary = Summary(
        input=sum(crawl_plan.sources.values()),
        kept=grown.kept,
        rejected=grown.rejected,
        concepts=grouped.num_concepts,
        seconds=round(time.monotonic() - started, 2),
        reused=False,
    )
    details = {
        "generation": generation,
        "sources": crawl_plan.sources,
        "columns": crawl_plan.columns,
        "progress": progress,
        "staging": staging,
        "files": {name: [dataclasses.asdict(entry) for entry in grown.files[name]] for name in ("rejects", "scores")},
    }
    files = {**grown.files, "concepts": grouped.concepts, "groups": grouped.groups}
    if not run.scores.scorers and not run.corpus.semantic_model:
        del files["scores"]
    told = dataclasses.asdict(summary)
    generations.publish(run.storage, run.name, config_hash, summary=told, details=details, files=files)
    from workflows import pairs_report  # here, for its plots take memory that the crawl can do without

    report = pairs_report.write(
        run.storage, run.name, shards.open_staged(staging, "samples", shards.SAMPLES).to_table()
    )
    print(f"report: {report}")
    shards.remove_folder(staging)
    return summary


def find_repeated_urls(run: Run, crawl_plan: CrawlPlan, published: Published | None, staging: str) -> pa.Table:
    """Decisions about rows whose URL came before; rows that are tried again were looked at when they first came."""
    fresh = [
        inputs.rows_file(staging, name) for name in crawl_plan.partitions if name not in crawl_plan.earlier_rejects
    ]
    new = tables.open_parquet(fresh, generations.URLS)
    corpus = Corpus(crawl_plan.order, new, published.urls() if published else None, memory=run.corpus.memory)
    corpus.reject_repeats("url", "duplicate_url")
    return corpus.decisions()


def count_crawlers(run: Run) -> int:
    """Processes that crawl, beside the driver; where there are any, Ray is started."""
    alone = not cluster.is_joined() and (os.cpu_count() or 1) <= DECODERS
    if run.crawlers == 0 or (run.crawlers is None and alone):
        return 0  # the driver keeps two cores busy, and Ray would take as much memory again
    cluster.start_ray()
    return run.crawlers or max(1, cluster.cores() // DECODERS)


def start_crawlers(run: Run, processes: int, staging: str, *, are_files: bool) -> CrawlerPool:
    """What is done to every row, by processes that do it to some rows at a time."""
    fetch = dataclasses.replace(run.fetch, per_host=max(1, run.fetch.per_host // max(1, processes)))
    models = []
    if run.scores.scorers or run.corpus.semantic_model:
        model = ray.remote(ScoreStage).options(**LASTING, num_gpus=run.scores.gpus)
        models = [model.remote(run.scores, run.corpus.semantic_model) for _ in range(run.scores.actors)]
    steps = CrawlSteps(
        read=partial(inputs.read_part, staging=staging),
        fetch=Reader if are_files else partial(Fetcher, fetch),
        decode=partial(decode, config=run.decode),
        filter=partial(filter_rows, config=run.filters),
        score=models,
        save=partial(shards.stage_part, staging=staging),
    )
    return CrawlerPool(
        steps, processes=processes, parts_at_a_time=run.parts_per_crawler, waiting_bytes=run.waiting_bytes
    )


def crawl(
    run: Run, crawl_plan: CrawlPlan, repeated_urls: pa.Table, staging: str, pool: CrawlerPool
) -> list[tuple[float, int]]:
    """Fetch, decode, filter and score; one staged Parquet file a part holds what came of each of its rows.

    Returns:
        Seconds and rows done so far, for the report.
    """
    every = crawl_plan.parts(run.rows_per_shard, run.rows_per_part, repeated_urls["id"].to_numpy())
    done = {path.rpartition("/")[2] for path in shards.staged(staging, "parts")}
    parts = [part for part in every if part.name not in done]
    if not parts:
        return []
    if done:
        print(f"pairs: {len(done):,} of {len(every):,} parts done by an earlier run", flush=True)
    return follow(pool.crawl(parts), crawl_plan.rows - repeated_urls.num_rows)


def decide(run: Run, crawl_plan: CrawlPlan, published: Published | None, staging: str) -> pa.Table:
    """What only the whole corpus can tell: boilerplate captions, and images that come again."""
    semantic = run.corpus.semantic_model
    schema = shards.LIGHT.append(generations.EMBEDDINGS.field(inputs.EMBEDDING)) if semantic else shards.LIGHT
    new = shards.open_staged(staging, "parts", schema)
    corpus = Corpus(crawl_plan.order, new, published.images() if published else None, memory=run.corpus.memory)
    if run.corpus.max_caption_uses is not None:
        corpus.reject_boilerplate(run.corpus.max_caption_uses)
    corpus.reject_repeats("image_id", "duplicate_bytes")
    if run.corpus.near_bits is not None:
        corpus.reject_near_duplicates(run.corpus.near_bits)
    if semantic:
        corpus.reject_semantic_duplicates(run.corpus.semantic_cosine, published.embeddings() if published else None)
    return corpus.decisions()


def write_shards(
    run: Run,
    crawl_plan: CrawlPlan,
    published: Published | None,
    decisions: pa.Table,
    staging: str,
    extractor: Extractor,
    pool: CrawlerPool,
) -> list[shards.WrittenPartition]:
    """One tar shard with its index and its rejects for each partition, in parallel."""
    job = shards.PartitionJob(
        storage=run.storage,
        name=run.name,
        staging=staging,
        order=crawl_plan.order,
        part_rows=run.rows_per_part,
        max_bytes=run.max_shard_bytes,
        suffix=f"-retry{published.generation + 1}" if published and run.retry else "",
        earlier_rejects=crawl_plan.earlier_rejects,
    )
    decisions = decisions.sort_by("id")
    ids = decisions["id"].to_numpy()
    common, concepts = share(job), share(extractor)
    each = []
    for count, name in enumerate(crawl_plan.partitions):
        first = crawl_plan.first_id(name, run.rows_per_shard)
        start, stop = np.searchsorted(ids, [first, first + run.rows_per_shard])
        each.append((common, name, decisions.slice(start, stop - start), concepts, count < SAMPLED_PARTITIONS))
    written = pool.run(shards.write_shard, each)
    if published is not None:
        pool.run(shards.stage_published_mentions, [(common, path, concepts) for path in published.index_files()])
    return written


def result_hash(run: Run, vocabulary: NameMatcher) -> str:
    """16 digits that change with whatever changes the tables' rows: not with the lists, where and how fast."""
    neutral = dataclasses.replace(
        run,
        storage="",
        urls="",
        add=False,
        retry=(),
        vocabulary="",
        site_pictures=0,
        site_scenes=0,
        crawlers=0,
        parts_per_crawler=0,
        waiting_bytes=0,
        rows_per_part=0,
        corpus=dataclasses.replace(run.corpus, memory=""),
        scores=dataclasses.replace(run.scores, actors=0, gpus=0),
    )
    parts = f"{cli.config_hash(neutral)} {sorted(vocabulary.phrases.items())} {vocabulary.names}"
    return storage.sha256(parts.encode())[:16]


def summary_of(published: Published) -> Summary:
    """The summary of published tables."""
    return Summary(**published.details["summary"])


@contextlib.contextmanager
def site_of(run: Run) -> Iterator[Run]:
    """The run with the URL list of a pictogram web site, built if needed, that is served while the block runs."""
    if not run.site_pictures + run.site_scenes:
        yield run
        return
    local = "store" if "://" in run.storage else run.storage  # images are served from files of this machine
    root = Path(storage.absolute(local)) / "sites" / f"{run.name}-{run.site_pictures}-{run.site_scenes}"
    if not (root / "expected.parquet").exists():
        print(f"web site: drawing {run.site_pictures + run.site_scenes:,} images in {root}", flush=True)
        website.build_site(root, num_pictures=run.site_pictures, num_scenes=run.site_scenes)
    with webserver.serve_site(root):
        yield dataclasses.replace(run, urls=str(root / "urls.tsv"))


def prepare_smoke(storage_uri: str) -> Summary:
    """The tables of `smoke`, crawled inside the driver."""
    with site_of(dataclasses.replace(smoke(), storage=storage_uri, crawlers=0)) as run:
        return prepare(run)


def main() -> None:
    """The script."""
    run = cli.parse(CONFIGS, __doc__)
    config = "smoke" if run.name == "smoke" else "pictograms"
    training = f"--config {config} --pairs {run.name}" + (" --max-side None" if run.urls else "")
    with site_of(run) as run:
        summary = prepare(run)
    print(f"pairs: {summary.kept:,} of {summary.input:,} rows kept, {summary.concepts} concepts, {summary.seconds:g} s")
    for reason, count in summary.rejected.items():
        print(f"    {reason:20} {count:,}")
    print(f"next: python workflows/clip.py {training} --storage {run.storage}")


if __name__ == "__main__":
    cli.execute(main)
