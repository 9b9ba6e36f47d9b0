"""What a crawl works with: checked settings and their digest, crawlers, scoring models, and the drawn web site."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ray

from data_prep import storage
from data_prep.concepts.names import NameMatcher
from data_prep.concepts.nouns import NounExtractor
from data_prep.pairs import scores
from data_prep.pairs.crawl import DECODERS, CrawlSteps
from data_prep.pairs.decode import decode_body
from data_prep.pairs.fetch import Fetcher
from data_prep.pairs.files import FileReader
from data_prep.pairs.filters import filter_rows
from data_prep.pairs.labels import read_class_names
from data_prep.pairs.scores import ScoreStage
from data_prep.parts import Pool, check_gpus
from data_prep.pictograms import webserver, website
from ovd_models.errors import InputError
from workflows.common import cli, cluster
from workflows.configs.pairs import Run

RESTARTING: dict[str, Any] = {
    "num_cpus": 0.5,
    "max_restarts": -1,
    "max_task_retries": 10,
    "scheduling_strategy": "SPREAD",
}
"""Options of scoring models, which survive the loss of a machine."""


def check(run: Run) -> None:
    """Raise InputError for sizes below 1 and missing CLIP checkpoints."""
    for name in ("rows_per_shard", "rows_per_part", "parts_per_crawler"):
        if getattr(run, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(run, name)}: expected 1 or more")
    if run.wordnet and (run.vocabulary or run.names):
        raise InputError("--wordnet: given beside a vocabulary, expected one of them")
    for model in filter(None, (*run.scores.scorers.values(), run.corpus.semantic_model)):
        if not scores.is_class(model):
            scores.check_checkpoint(model)


def result_hash(run: Run, vocabulary: NameMatcher, nouns: NounExtractor) -> str:
    """16 digits that identify everything that affects the tables' rows, except the lists."""
    parts = f"{cli.config_hash(neutral(run))} {sorted(vocabulary.phrases.items())} {vocabulary.names}"
    parts += f" {sorted(nouns.rule.objects)}" if nouns.rule else ""
    parts += f" {sorted(read_class_names(run.columns.class_names).items())}" if run.columns.class_names else ""
    return storage.sha256(parts.encode())[:16]


def result_settings(run: Run) -> dict[str, Any]:
    """The settings that affect the tables' rows by their dotted names."""
    return cli.flatten(neutral(run))


def neutral(run: Run) -> Run:
    """The run without what does not affect the tables' rows, or is recorded by its content."""
    return dataclasses.replace(
        run,
        storage="",
        urls="",
        shards="",
        images="",
        columns=dataclasses.replace(run.columns, class_names=""),
        wordnet="",
        add=False,
        retry=(),
        vocabulary="",
        site_pictures=0,
        site_scenes=0,
        crawlers=0,
        parts_per_crawler=0,
        waiting_bytes=0,
        rows_per_part=0,
        corpus=dataclasses.replace(run.corpus, memory="", shuffle_rows=0),
        scores=dataclasses.replace(run.scores, actors=0, gpus=0),
    )


def uses_models(run: Run) -> bool:
    """Whether the run scores or embeds images."""
    return bool(run.scores.scorers or run.corpus.semantic_model)


def crawler_pool(run: Run) -> Pool:
    """The crawler processes; if there are any, starts Ray."""
    alone = not cluster.is_joined() and (os.cpu_count() or 1) <= DECODERS
    if run.crawlers == 0 or (run.crawlers is None and alone):
        return Pool(workers=0, parts_at_a_time=DECODERS)  # Ray would take as much memory again
    cluster.start_ray()
    cores = cluster.cores()
    workers = run.crawlers or max(1, cores // DECODERS)
    # A cluster that grows may have no core yet.
    most = cores if run.crawlers else max(cores, int(cluster.most("CPU")))
    cpus = min(DECODERS - 0.5, (most - 0.5) / (run.crawlers or max(1, most // DECODERS)))  # leaves room for a scorer
    return Pool(workers=workers, grows=run.crawlers is None, parts_at_a_time=DECODERS, cpus=cpus)


def most_crawlers(pool: Pool) -> int:
    """The number of crawlers that a pool can grow to."""
    return max(pool.workers, int(cluster.most("CPU") / pool.cpus)) if pool.grows else max(1, pool.workers)


@contextlib.contextmanager
def crawl_steps(run: Run, pool: Pool, *, are_files: bool) -> Iterator[CrawlSteps]:
    """The steps of every row; while the block runs, the scoring models do."""
    fetch = dataclasses.replace(run.fetch, per_host=max(1, run.fetch.per_host // most_crawlers(pool)))
    scorers: list[Any] = []
    if uses_models(run):
        cluster.start_ray()
        check_gpus(run.scores.gpus)
        stage = ray.remote(ScoreStage).options(**RESTARTING, num_gpus=run.scores.gpus)
        scorers = [stage.remote(run.scores, run.corpus.semantic_model) for _ in range(run.scores.actors)]
    try:
        yield CrawlSteps(
            fetcher=partial(FileReader, fetch.max_bytes) if are_files else partial(Fetcher, fetch),
            decode=partial(decode_body, config=run.decode),
            filter=partial(filter_rows, config=run.filters),
            scorers=scorers,
        )
    finally:
        for actor in scorers:
            ray.kill(actor)


@contextlib.contextmanager
def pictogram_site(run: Run) -> Iterator[Run]:
    """The run with the URL list of its pictogram web site, drawn if needed and served while the block runs."""
    if not run.site_pictures + run.site_scenes:
        yield run
        return
    local = "store" if "://" in run.storage else run.storage  # the server reads local files
    root = Path(storage.absolute(local)) / "sites" / f"{run.name}-{run.site_pictures}-{run.site_scenes}"
    if not (root / "expected.parquet").exists():
        print(f"web site: drawing {run.site_pictures + run.site_scenes:,} images in {root}", flush=True)
        website.build_site(root, num_pictures=run.site_pictures, num_scenes=run.site_scenes)
    with webserver.serve_site(root):
        yield dataclasses.replace(run, urls=str(root / "urls.tsv"))
