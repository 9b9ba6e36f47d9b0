"""Time and additional memory of planning caption groups of a large table without loading it.

make bench-group_plan       # 10^8 memberships, a concept of 10^7 images; writes runs/bench/group_plan.json
python benchmarks/group_plan.py --rows 10000000

The rows are synthetic: one file of 2^20 rows is linked under as many names as needed, so reads come from the system's
cache. Images are not read.
"""

import argparse
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from measure import BENCH, reset_peak, resident_mb, write_figures

from data_prep import tables
from data_prep.concepts.groups import FILE_ROWS, ROW_GROUP_ROWS
from data_prep.streams.group_loader import Sampling, build_plan, open_file, plan_group, row_groups, scan_kinds

GROUP_SIZE = 8


def write_file(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    words = np.array(["red", "anchor", "umbrella", "on", "a", "sunny", "weekend", "photo", "of", "the"])
    captions = [" ".join(words[row]) for row in rng.integers(len(words), size=(4096, 8))]
    count = FILE_ROWS
    rows = pa.table(
        {
            "concept_id": pa.array(np.zeros(count, np.int32)),
            "image_id": pa.array([f"{number:064x}" for number in rng.integers(2**62, size=count).tolist()]),
            "shard": pa.array([f"shards/{number:06d}.tar" for number in rng.integers(10_000, size=count).tolist()]),
            "offset": pa.array(rng.integers(2**30, size=count)),
            "size": pa.array(rng.integers(10_000, 100_000, size=count)),
            "width": pa.array(rng.integers(200, 513, size=count).astype(np.int32)),
            "height": pa.array(rng.integers(200, 513, size=count).astype(np.int32)),
            "caption": pa.array(captions).take(pa.array(rng.integers(4096, size=count))),
            "concept_ids": pa.array(rng.integers(100_000, size=(count, 3)).tolist(), pa.list_(pa.int32())),
        }
    )
    entry = tables.write_part(str(folder), "groups", "large", "part-00000.parquet", rows, ROW_GROUP_ROWS)
    return folder / "groups" / "large" / entry.path


def ranges(rows: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Row ranges of concepts: a tenth of all rows for one concept, the rest along a long tail."""
    counts = [rows // 10]
    tail = np.maximum(2, rng.zipf(1.6, size=rows // 300).clip(max=rows // 100))
    counts += tail[np.cumsum(tail) <= rows - counts[0]].tolist()
    stops = np.cumsum(counts)
    return np.r_[0, stops[:-1]], stops


def measure(rows: int, groups: int, folder: Path) -> dict[str, Any]:
    first = write_file(folder)
    files = [first]
    for number in range(1, -(-rows // FILE_ROWS)):
        files.append(first.with_name(f"part-{number:05d}.parquet"))
        files[-1].hardlink_to(first)
    uris = [str(path) for path in files]
    starts, stops = ranges(rows, np.random.default_rng(1))
    sampling = Sampling(weights="repeat_factor", min_side=256)
    before, started = reset_peak(), time.perf_counter()
    kinds = scan_kinds(uris, FILE_ROWS * len(files), sampling)
    scanned = time.perf_counter()
    ids = np.arange(len(starts))
    plan = build_plan(ids, starts, stops, kinds, sampling, seed=0, group_size=GROUP_SIZE)
    built = time.perf_counter()
    planned = resident_mb("VmHWM") - before
    chosen, times = [], []
    for position in range(groups):
        begun = time.perf_counter()
        _, candidates = plan_group(plan, position)
        chosen.append([row for row, _ in zip(candidates, range(GROUP_SIZE), strict=False)])
        times.append(time.perf_counter() - begun)
    largest = plan_group(build_plan(ids[:1], starts[:1], stops[:1], kinds, sampling, seed=0, group_size=8), 0)[1]
    begun = time.perf_counter()
    next(largest)
    largest_seconds = time.perf_counter() - begun
    before_reading = reset_peak()
    few = chosen[: groups // 20]
    begun = time.perf_counter()
    for row in (row for group in few for row in group):
        row_groups().row(uris[row // FILE_ROWS], row % FILE_ROWS)
    reading = (time.perf_counter() - begun) / (len(few) * GROUP_SIZE)
    open_file.cache_clear()
    return {
        "rows": rows,
        "concepts": len(starts),
        "largest_concept": int(stops[0] - starts[0]),
        "scan_seconds": scanned - started,
        "build_seconds": built - scanned,
        "plan_added_peak_mb": planned,
        "plan_group_ms": 1e3 * statistics.median(times),
        "plan_group_slowest_ms": 1e3 * max(times),
        "first_of_largest_ms": 1e3 * largest_seconds,
        "row_read_ms": 1e3 * reading,
        "reading_added_peak_mb": resident_mb("VmHWM") - before_reading,
        "table_gb": len(files) * first.stat().st_size / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000_000)
    parser.add_argument("--groups", type=int, default=2000)
    arguments = parser.parse_args()
    folder = BENCH / "group_plan"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        figures = measure(arguments.rows, arguments.groups, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for name, value in figures.items():
        print(f"{name:26}{value:,.3f}" if isinstance(value, float) else f"{name:26}{value:,}")
    write_figures("group_plan", figures)


if __name__ == "__main__":
    main()
