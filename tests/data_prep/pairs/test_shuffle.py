"""The decisions of a cluster are those of one machine, row by row."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from ray.data import DataContext

from data_prep import tables
from data_prep.pairs import dedup, shuffle
from data_prep.pairs.dedup import Corpus
from data_prep.pairs.growth import IMAGES, URLS
from data_prep.pairs.rows import LIGHT, RowNumbering
from data_prep.pairs.shuffle import ShuffledCorpus, answer

SOURCES = {"a": 700, "b": 1500, "c": 800}
SCHEMA = pa.unify_schemas([LIGHT, URLS])


def chained_hashes(rng: np.random.Generator, count: int) -> list[int]:
    """Hashes of which most differ in 0 to 5 bits from one of the last few: long chains, and equal ones."""
    found = [int(rng.integers(0, 1 << 63))]
    while len(found) < count:
        near = found[-int(rng.integers(1, min(len(found), 30) + 1))]
        for bit in rng.choice(64, rng.integers(0, 6), replace=False).tolist():
            near ^= 1 << bit
        found.append(near if rng.random() < 0.8 else int(rng.integers(0, 1 << 63)))
    return found


def corpus_rows(seed: int) -> tuple[pa.Table, pa.Table]:
    """New and published rows with all kinds of repeats, in random order."""
    rng = np.random.default_rng(seed)
    every = [(source, row) for source, count in SOURCES.items() for row in range(count)]
    count = len(every)
    rows = pa.table(
        {
            "source": [source for source, _ in every],
            "row": [row for _, row in every],
            "reason": [None if number else "blank" for number in rng.integers(0, 9, count)],
            "image_id": [None if not number else f"i{number}" for number in rng.integers(0, 9000, count)],
            "phash": [None if number % 50 == 7 else value for number, value in enumerate(chained_hashes(rng, count))],
            "caption": [f"c{number**2 // 50}" if number else None for number in rng.integers(0, 400, count)],
            "url": [f"http://host/{number}" if number else None for number in rng.integers(0, 5000, count)],
        },
        schema=SCHEMA,
    ).take(pa.array(rng.permutation(count)))
    is_old = pa.array(rng.random(count) < 0.2)
    return rows.filter(pa.compute.invert(is_old)), rows.filter(is_old)


def opened(rows: pa.Table, folder: Path, schema: pa.Schema) -> ds.Dataset:
    folder.mkdir()
    for number in range(0, rows.num_rows, 170):
        pq.write_table(rows.slice(number, 170), folder / f"{number}.parquet", row_group_size=60)
    return tables.open_parquet(sorted(map(str, folder.glob("*"))), schema)


def decide_urls(corpus: Corpus) -> None:
    corpus.reject_repeats("url", "duplicate_url")


def decide_images(corpus: Corpus) -> None:
    corpus.reject_boilerplate(20)
    corpus.reject_repeats("image_id", "duplicate_bytes")
    corpus.reject_near_duplicates(3)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("decide", "schemas", "reasons"),
    [
        (decide_urls, (URLS, URLS), {"duplicate_url"}),
        (decide_images, (LIGHT, IMAGES), {"caption_boilerplate", "duplicate_bytes", "near_duplicate"}),
    ],
)
def test_a_cluster_decides_as_one_machine_row_by_row(
    decide: Callable[[Corpus], None],
    schemas: tuple[pa.Schema, pa.Schema],
    reasons: set[str],
    tmp_path: Path,
    ray_cluster: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shuffle, "PARTITION_ROWS", 1500)  # 2 partitions, and 8 for the bands of hashes
    monkeypatch.setattr(DataContext.get_current(), "max_hash_shuffle_aggregators", 2)  # each is a process
    monkeypatch.setattr(dedup, "SHARED_BANDS", range(3, 4))
    new, published = corpus_rows(seed=0)
    order = RowNumbering.of(SOURCES)
    rows = [opened(new, tmp_path / "new", schemas[0]), opened(published, tmp_path / "published", schemas[1])]
    alone, together = Corpus(order, *rows), ShuffledCorpus(order, *rows)
    decide(alone)
    decide(together)
    wanted = alone.decisions()
    for reason in reasons:
        assert wanted["reason"].to_pylist().count(reason) > 30
    assert together.decisions().equals(wanted)


@pytest.mark.ray
def test_no_rows_need_no_decisions(tmp_path: Path, ray_cluster: None) -> None:
    new, _ = corpus_rows(seed=0)
    corpus = ShuffledCorpus(RowNumbering.of(SOURCES), opened(new.slice(0, 1), tmp_path / "new", LIGHT))
    corpus.reject_repeats("image_id", "duplicate_bytes")
    assert corpus.decisions().num_rows == 0


def test_an_answer_compares_only_rows_of_the_same_search() -> None:
    rows = pa.table(
        {
            "id": pa.array([1 << 50, (1 << 50) + 1, (1 << 50) + 2]),
            "phash": pa.array([5, 5, 5], pa.uint64()),
            "search": pa.array([0, 0, 1], pa.int8()),
        }
    )
    query = "select id, id, 0 from keyed where (select count(*) from keyed) = 2"
    found = answer([[query], [query, query]], "pairs", "100MB", rows)
    assert found["first"].to_pylist() == [1 << 50, (1 << 50) + 1]
