"""Filters and exact and perceptual dedup of the rows of an index: rows a second and peak memory of one process.

python benchmarks/pairs_index.py 1000000
"""

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.pairs.dedup import Corpus, CorpusConfig
from data_prep.pairs.filters import FilterConfig, filter_rows
from data_prep.pairs.rows import LIGHT, RowNumbering
from data_prep.pairs.staging import Staging

BLOCK = 10_000
SOURCE = "0" * 16
COPIES, NEAR = 0.05, 0.05
"""Fraction of rows that repeat another row's bytes, and of rows whose hash differs from another in two bits."""


def block(first: int, count: int) -> pa.Table:
    """Rows as decoding returns them."""
    rng = np.random.default_rng(first)
    hashes = np.random.default_rng(1).integers(0, 2**63, 1, dtype=np.uint64)[0] ^ rng.integers(
        0, 2**63, count, dtype=np.uint64
    )
    ids = [f"{first + number:064x}" for number in range(count)]
    for number in np.flatnonzero(rng.random(count) < COPIES).tolist():
        ids[number] = ids[0]
    near = np.flatnonzero(rng.random(count) < NEAR)
    hashes[near] = hashes[1] ^ (np.uint64(1) << rng.integers(0, 60, len(near), dtype=np.uint64))
    text = pa.nulls(count, pa.string())
    return pa.table(
        {
            "source": pa.array([SOURCE]).take(pa.array(np.zeros(count, np.int64))),
            "row": np.arange(first, first + count),
            "raw_caption": [f"a photo of thing {number} &amp; more" for number in range(first, first + count)],
            "original_width": pa.array(rng.integers(16, 2000, count), pa.int32()),
            "original_height": pa.array(rng.integers(16, 2000, count), pa.int32()),
            "contrast": pa.array(rng.uniform(0, 80, count), pa.float32()),
            "image_id": ids,
            "phash": pa.array(hashes),
            "content": pa.nulls(count, pa.large_binary()),
            "stage": text,
            "reason": text,
            "detail": text,
        }
    )


def main() -> None:
    """Write the rows, then time the filters and the search for duplicates."""
    count = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "parts").mkdir()
        seconds = 0.0
        for first in range(0, count, BLOCK):
            rows = block(first, min(BLOCK, count - first))
            started = time.perf_counter()
            filtered = filter_rows(rows, FilterConfig())
            seconds += time.perf_counter() - started
            pq.write_table(filtered.drop_columns(["content"]), f"{folder}/parts/{first:012d}.parquet")
        started = time.perf_counter()
        config = CorpusConfig(max_caption_uses=50, memory="400MB")
        corpus = Corpus(
            RowNumbering.of({SOURCE: count}), Staging(folder, count, BLOCK).open("parts", LIGHT), memory=config.memory
        )
        corpus.reject_boilerplate(50)
        corpus.reject_repeats("image_id", "duplicate_bytes")
        corpus.reject_near_duplicates(4)
        decided = corpus.decisions().num_rows
        seconds += time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(json.dumps({"rows_per_second": count / seconds, "peak_gb": peak, "decided": decided}))


if __name__ == "__main__":
    main()
