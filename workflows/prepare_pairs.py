"""Pairs: crawl lists of image URLs with captions into clean image-text pairs and concept groups.

URL lists (tsv, csv, jsonl, parquet), WebDataset shards, or folders of classes
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
python workflows/prepare_pairs.py --config cc3m --shards 'cc3m/{00000..00331}.tar' --wordnet /usr/share/wordnet
python workflows/prepare_pairs.py --config classes --images imagenet/train --columns.class-names names.tsv
python workflows/prepare_pairs.py --config web --name mine --urls more.tsv --add
python workflows/prepare_pairs.py --config web --name mine --urls list.tsv --retry timeout connect
"""

from workflows.common import brief_help

brief_help.answer(__name__, __file__, "storage name urls shards images add retry vocabulary min_images crawlers")

import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

from data_prep import locks, storage, tables
from data_prep.concepts.groups import shuffle_groups, write_groups
from data_prep.concepts.names import Extractor, NameMatcher
from data_prep.concepts.nouns import NounExtractor
from data_prep.concepts.wordnet import read_wordnet
from data_prep.pairs import growth, inputs, shards
from data_prep.pairs.crawl import Crawler, watch
from data_prep.pairs.dedup import Corpus
from data_prep.pairs.growth import CrawlPlan, Published
from data_prep.pairs.labels import class_rows
from data_prep.pairs.rows import EMBEDDING, LABEL, LIGHT
from data_prep.pairs.shuffle import ShuffledCorpus
from data_prep.pairs.staging import Staging
from data_prep.parts import Pool, collect_parts, run_parts
from data_prep.progress import working
from ovd_models.errors import InputError
from workflows.common import cli, cluster
from workflows.configs.pairs import CONFIGS, Run, smoke
from workflows.inputs.pairs import (
    check,
    crawl_steps,
    crawler_pool,
    pictogram_site,
    result_hash,
    result_settings,
    uses_models,
)

PRODUCER = "workflows/prepare_pairs.py"
WAITING_PARTS = 4
"""Parts of a crawler that are in work or wait for slow rows, for each one in work."""
SAMPLED_PARTITIONS = 40
"""Partitions from which the report shows examples of rejected rows."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The contents of the published tables."""

    input: int
    kept: int
    rejected: dict[str, int]
    """Rows by reason."""
    concepts: int
    seconds: float
    """Duration of the last run."""
    reused: bool
    """The tables existed already."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the steps of a run share."""

    run: Run
    config_hash: str
    published: Published | None
    plan: CrawlPlan
    staging: Staging
    pool: Pool


@locks.exclusive("pairs", "rejects", "scores", "concepts", "groups")
def prepare(run: Run) -> Summary:
    """Crawl URL lists, or read shards, and publish `pairs`, `rejects`, `concepts` and `groups` under the run's name.

    Raises:
        InputError: a list or the vocabulary is missing or malformed, or the tables of that name have another config or
            other lists.
    """
    if run.images:
        return prepare_classes(run)
    if run.shards and run.urls:
        raise InputError("--urls: given beside --shards, expected one of them")
    files = inputs.find_shards(run.shards) if run.shards else inputs.find_lists(run.urls)
    with ThreadPoolExecutor(inputs.FILES_AT_A_TIME) as pool:
        digests = list(pool.map(inputs.file_digest, files))
    lists: dict[str, str] = {}
    for digest, file in zip(digests, files, strict=True):
        if digest in lists:
            raise InputError(f"{file}: holds the same as {lists[digest]}, expected it once")
        lists[digest] = file
    return _prepare(run, lists, are_files=bool(run.shards))


def prepare_classes(run: Run) -> Summary:
    """`prepare` for a folder of class folders."""
    given = [f"--{name}: given beside --images" for name in ("urls", "shards") if getattr(run, name)]
    if given or not run.columns.label:
        wrong = given[0] if given else "--columns.label: empty"
        raise InputError(f"{wrong}, expected --config classes --images FOLDER")
    columns = dataclasses.replace(run.columns, label=LABEL, url="url", caption="caption")
    rows = class_rows(run.images, columns.class_names)
    return _prepare_files(dataclasses.replace(run, columns=columns), rows)


def prepare_local(run: Run, rows: pa.Table) -> Summary:
    """Like `prepare`, for image files that need no download.

    `rows` have the columns `url` (path or URI of the file) and `caption`; further columns are kept.

    Raises:
        InputError: as `prepare`, or a file is missing.
    """
    uris = [storage.absolute(uri) for uri in rows["url"].to_pylist()]
    with ThreadPoolExecutor(32) as pool:  # they mostly wait
        for number, (uri, exists) in enumerate(zip(uris, pool.map(storage.exists, uris), strict=True)):
            if not exists:
                raise InputError(f"{uri}: no such file (row {number}), expected an image")
    return _prepare_files(run, rows.set_column(rows.schema.get_field_index("url"), "url", pa.array(uris, pa.string())))


@locks.exclusive("pairs", "rejects", "scores", "concepts", "groups")
def _prepare_files(run: Run, rows: pa.Table) -> Summary:
    """Run all steps for files that exist, by their `url`."""
    content = tables.parquet_bytes(rows)
    digest = storage.sha256(content)[: inputs.DIGEST_DIGITS]
    folder = storage.join(storage.absolute(run.storage), "staging", "lists", run.name, digest)
    storage.write_bytes(storage.join(folder, "list.parquet"), content)
    try:
        return _prepare(run, {digest: storage.join(folder, "list.parquet")}, are_files=True)
    finally:
        storage.remove_folder(folder)


def _prepare(run: Run, lists: Mapping[str, str], *, are_files: bool = False) -> Summary:
    """Run all steps for lists, given by digest."""
    started = time.monotonic()
    check(run)
    run = dataclasses.replace(run, storage=storage.absolute(run.storage))
    vocabulary = NameMatcher.read(run.vocabulary) if run.vocabulary else NameMatcher.of_names(run.names)
    nouns = NounExtractor(rule=read_wordnet(run.wordnet) if run.wordnet else None)
    extractor: Extractor = vocabulary if vocabulary.names else nouns
    config_hash = result_hash(run, vocabulary, nouns)
    published = growth.find_published(
        run.storage, run.name, config_hash, result_settings(run), lists=lists, add=run.add, retry=run.retry
    )
    new = {digest: uri for digest, uri in lists.items() if published is None or digest not in published.sources}
    if published is not None and not new and not published.rejected.keys() & set(run.retry):
        return reuse(run, published)
    generation = published.generation if published else None
    task = f"{config_hash} {sorted(new)} {run.retry} {generation} {run.rows_per_part}"
    folder = storage.join(run.storage, "staging", "pairs", run.name, storage.sha256(task.encode())[:16])
    staging = Staging(folder, run.rows_per_shard, run.rows_per_part)

    pool = crawler_pool(run)
    in_work = run.parts_per_crawler * max(1, pool.workers)
    plan = growth.plan_crawl(
        list(new.values()), run.columns, published, run.retry, staging, pool, parts_in_work=in_work
    )
    staging = dataclasses.replace(staging, part_rows=plan.part_rows)
    job = Job(run=run, config_hash=config_hash, published=published, plan=plan, staging=staging, pool=pool)
    repeated_urls = find_repeated_urls(job)
    progress = crawl(job, repeated_urls, are_files=are_files)
    with working("pairs: comparing all rows"):
        decisions = deduplicate(job, repeated_urls)
    written = write_shards(job, decisions, extractor)

    summary = publish(job, written, progress, started)
    from workflows.reports.pairs import write_pairs_report  # imported here to save its memory during the crawl

    samples = staging.open("samples", shards.SAMPLES).to_table()
    print(f"report: {write_pairs_report(run.storage, run.name, samples)}")
    storage.remove_folder(staging.uri)
    return summary


def reuse(run: Run, published: Published) -> Summary:
    """The summary of tables to which a run has nothing to add."""
    if run.retry:
        print(f"pairs: no row of {run.name} is rejected for {', '.join(run.retry)}")
    else:
        print(f"pairs: {tables.table_uri(run.storage, 'pairs', run.name)} is there already, from the same config")
        staging = storage.join(run.storage, published.pairs.details["staging"])
        storage.remove_folder(staging)  # left by a run that was killed at its very end
    return Summary(**{**published.pairs.details["summary"], "reused": True})


def find_repeated_urls(job: Job) -> pa.Table:
    """Rejections of rows with a repeated URL; those of retried rows were checked by an earlier run."""
    names = [name for name in job.plan.partitions if name not in job.plan.earlier_rejects]
    new = tables.open_parquet([job.staging.rows_uri(name) for name in names], growth.URLS)
    published = job.published.urls() if job.published else None
    corpus = open_corpus(job, new, published)
    corpus.reject_repeats("url", "duplicate_url")
    return corpus.decisions()


def is_shuffled(job: Job) -> bool:
    """Whether there are so many rows that a cluster compares them; if so, joins it."""
    if job.plan.order.rows <= job.run.corpus.shuffle_rows:
        return False
    cluster.start_ray()
    return True


def open_corpus(job: Job, new: ds.Dataset, published: ds.Dataset | None, decided: pa.Table | None = None) -> Corpus:
    """The rows to compare, and earlier decisions about them."""
    kind = ShuffledCorpus if is_shuffled(job) else Corpus
    return kind(job.plan.order, new, published, memory=job.run.corpus.memory, decided=decided)


def crawl(job: Job, repeated_urls: pa.Table, *, are_files: bool) -> list[tuple[float, int]]:
    """Fetch, decode, filter and score; stages one Parquet file of results per part.

    Returns:
        Seconds and rows done so far, for the report.
    """
    run, pool = job.run, job.pool
    every = job.plan.parts(job.staging, repeated_urls["id"].to_numpy())
    done = {storage.base_name(uri) for uri in job.staging.files("parts")}
    parts = [part for part in every if part.name not in done]
    if not parts:
        return []
    if done:
        print(f"pairs: {len(done):,} of {len(every):,} parts done by an earlier run", flush=True)
    pa.set_memory_pool(pa.system_memory_pool())  # Arrow's own keeps freed memory, beside what the crawl keeps
    with crawl_steps(run, pool, are_files=are_files) as steps:
        pool = dataclasses.replace(pool, parts_at_a_time=WAITING_PARTS * run.parts_per_crawler)
        crawler = partial(Crawler, steps, job.staging, run.waiting_bytes, run.parts_per_crawler)
        results = run_parts(crawler, parts, pool)
        return watch((counts for _, counts in results), sum(part.rows for part in parts))


def deduplicate(job: Job, repeated_urls: pa.Table) -> pa.Table:
    """All corpus-wide rejections by id: also boilerplate captions, repeated images, near- and semantic duplicates."""
    config, published = job.run.corpus, job.published
    schema = LIGHT.append(growth.EMBEDDINGS.field(EMBEDDING)) if config.semantic_model else LIGHT
    new = job.staging.open("parts", schema)
    corpus = open_corpus(job, new, published.images() if published else None, repeated_urls)
    if config.max_caption_uses is not None:
        corpus.reject_boilerplate(config.max_caption_uses)
    corpus.reject_repeats("image_id", "duplicate_bytes")
    if config.near_bits is not None:
        corpus.reject_near_duplicates(config.near_bits)
    if config.semantic_model:
        corpus.reject_semantic_duplicates(config.semantic_cosine, published.embeddings() if published else None)
    return corpus.decisions()


def write_shards(job: Job, decisions: pa.Table, extractor: Extractor) -> list[shards.WrittenPartition]:
    """Write each partition's tar shard, index and rejects, in parallel."""
    run, plan, published = job.run, job.plan, job.published
    partition_job = shards.PartitionJob(
        storage=run.storage,
        name=run.name,
        staging=job.staging,
        order=plan.order,
        max_bytes=run.max_shard_bytes,
        suffix=f"-retry{published.generation + 1}" if published and run.retry else "",
        earlier_rejects=plan.earlier_rejects,
    )
    ids = decisions["id"].to_numpy()
    parts: list[shards.PartitionPart] = []
    for count, name in enumerate(plan.partitions):
        first = plan.first_id(name, run.rows_per_shard)
        start, stop = np.searchsorted(ids, [first, first + run.rows_per_shard])
        own = shards.decisions_between(decisions, start, stop)
        parts.append(shards.PartitionPart(name, own, count < SAMPLED_PARTITIONS))
    write = partial(shards.write_partition, partition_job, extractor)
    written = collect_parts(lambda: write, parts, job.pool, f"pairs/{run.name}", "shards")
    if published is not None:
        stage = partial(shards.stage_published_mentions, partition_job, extractor)
        collect_parts(lambda: stage, published.index_files(), job.pool, "groups", "files of captions")
    return written


def publish(
    job: Job, written: Sequence[shards.WrittenPartition], progress: Sequence[tuple[float, int]], started: float
) -> Summary:
    """Group the kept pairs by concept and publish all tables."""
    run, plan, published = job.run, job.plan, job.published
    generation = published.generation + 1 if published else 0
    group = shuffle_groups if is_shuffled(job) else write_groups
    with working("pairs: grouping by concept"):
        grouped = group(
            job.staging.open("mentions", shards.MENTIONS),
            run.storage,
            run.name,
            f"part-{generation:03d}",
            min_images=run.min_images,
            memory=run.corpus.memory,
        )
    files = growth.combine_files(published, plan, written)
    num_rows, rejected = sum(plan.sources.values()), growth.count_rejected(published, plan, written)
    summary = Summary(
        input=num_rows,
        kept=num_rows - sum(rejected.values()),
        rejected=rejected,
        concepts=grouped.num_concepts,
        seconds=round(time.monotonic() - started, 2),
        reused=False,
    )
    details = {
        "generation": generation,
        "settings": result_settings(run),
        "sources": plan.sources,
        "columns": plan.columns,
        "progress": progress,
        "staging": storage.relative(job.staging.uri, run.storage),
        "files": {name: [dataclasses.asdict(entry) for entry in files[name]] for name in ("rejects", "scores")},
    }
    files |= {"concepts": grouped.concepts, "groups": grouped.groups}
    if not uses_models(run):
        del files["scores"]
    for table, entries in sorted(files.items(), key=lambda item: item[0] == "pairs"):  # `pairs` makes them complete
        about = {"summary": dataclasses.asdict(summary), **(details if table == "pairs" else {})}
        tables.publish(
            run.storage, table, run.name, entries, producer=PRODUCER, config_hash=job.config_hash, details=about
        )
    return summary


def prepare_smoke(storage_uri: str) -> None:
    """Prepare the tables of `smoke` in the driver, if they are missing."""
    if tables.find_manifest(storage_uri, "pairs", "smoke") is None:
        with pictogram_site(dataclasses.replace(smoke(), storage=storage_uri, crawlers=0)) as run:
            prepare(run)


HELP_AGAINST = {
    "forbidden_address": "private addresses are not fetched; `--retry forbidden_address --fetch.allow-networks "
    "127.0.0.1/32` fetches those of a network",
    "dns": "no host was found: is this machine online, and is the URL column the right one? `--retry dns` tries again",
    "connect": "no host answered: is this machine online? `--retry connect` tries again",
    "bad_url": "is --columns.url the column of the URLs? Another one needs a new --name",
    "opt_out": "the hosts do not want to be used; `--retry opt_out --fetch.no-respect-opt-out` fetches nevertheless",
    "too_small": "--filters.min-side is the smallest accepted side; another one needs a new --name",
}
"""What to do when most rows are rejected for a reason, as flags that are added to the command."""


def why_nothing(rejected: Mapping[str, int]) -> str:
    """The most frequent reason for rejection, and what helps against it; empty if there was no row."""
    if not any(rejected.values()):
        return ": the lists have no rows"
    reason = max(rejected, key=lambda each: rejected[each])
    advice = HELP_AGAINST.get(reason, "the table `rejects` has each row with its detail")
    return f", {rejected[reason]:,} of {sum(rejected.values()):,} rejected for {reason}: {advice}"


def next_command(run: Run) -> str:
    """The training of a CLIP on these pairs, of any size unless they are drawn."""
    config = "smoke" if run.name == "smoke" else "pictograms"
    any_size = ("--max-side", "None") if run.urls or run.shards or run.images else ()
    return cli.script_command("clip", "--config", config, "--pairs", run.name, *any_size, "--storage", run.storage)


def main() -> None:
    """The script."""
    run = cli.parse(CONFIGS, __doc__)
    following = next_command(run)
    with pictogram_site(run) as run:
        summary = prepare(run)
    print(f"pairs: {summary.kept:,} of {summary.input:,} rows kept, {summary.concepts} concepts, {summary.seconds:g} s")
    for reason, count in summary.rejected.items():
        print(f"    {reason:20} {count:,}")
    if not summary.kept:
        sys.exit(f"error: no row was kept{why_nothing(summary.rejected)}")
    print("next:", following)


if __name__ == "__main__":
    cli.execute(main)
