"""Planning of streams: time and memory to the first batch.

python benchmarks/plans.py

- `plan_seconds_1e7`, `plan_mb_1e7`: of a stream of 10^7 steps on 32 workers.
- `shards_plan_seconds_1e8`, `shards_plan_mb_1e8`: of 10^8 pairs in 10^5 shuffled shards. Their manifest, which every
  training reads, takes `shards_manifest_seconds_1e8` and `shards_manifest_mb_1e8` of it.
- `shards_held_mb_1e8`: what the driver and the object store hold of the shards afterwards.
- `shards_count_ms`: an index file's part of the count of the pairs up to `--max-side`.
- `shards_reads_per_pair`, `shards_bytes_per_byte`: requests, and bytes read for each byte that is needed, where a task
  reads 960 pairs of 30 kB out of windows of 20,000.
- `captions_per_cpu_second`: tokenised by one thread.

`make bench-train` writes the figures with its own.
"""

import io
import logging
import tempfile
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
from measure import reset_peak, resident_mb, update_figures
from PIL import Image

from data_prep import tables
from data_prep.pairs.shards import BLOCK, pack
from data_prep.pictograms.world import World
from data_prep.streams.object_store import get_shared
from data_prep.streams.plans import StreamShape, stream
from data_prep.streams.shard_loader import ShardLoader, plan_windows, shard_loader, spans
from ovd_models.clip.model import Clip, ClipConfig

STEPS = 10**7
SHAPE = StreamShape(rows_per_step=256, workers=32)
SHARDS, PAIRS = 10**5, 10**3
"""Shards, and pairs of each."""
COUNTED = 2_000
"""Index files whose pairs are counted."""
BUFFER, TASK, IMAGE_BYTES = 20_000, 960, 30_000


def main() -> None:
    figures = planning()
    update_figures("train", figures)
    print(figures)


def planning() -> dict[str, float]:
    """All figures of this file."""
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    figures = {**step_planning(), **shard_planning(), **shard_reads(), "captions_per_cpu_second": tokenising()}
    ray.shutdown()
    return figures


def step_planning() -> dict[str, float]:
    """Seconds until the first batch, and the growth of this process's peak memory."""

    def load(positions: npt.NDArray[np.int64]) -> pa.Table:
        return pa.table({"position": positions})

    before, started = reset_peak(), time.perf_counter()
    batch = next(iter(stream(load, SHAPE, 0, STEPS).iter_batches(batch_size=8, batch_format="pyarrow")))
    seconds, grown = time.perf_counter() - started, resident_mb("VmHWM") - before
    assert batch["position"].to_pylist() == list(range(8))
    return {"plan_seconds_1e7": seconds, "plan_mb_1e7": grown}


def shard_planning() -> dict[str, float]:
    """The same for shuffled shards, with every index file a link to one and the same."""
    with tempfile.TemporaryDirectory(prefix="ovd-") as root:
        publish_shards(root)
        before, started = reset_peak(), time.perf_counter()
        tables.read_manifest(root, "pairs", "t")
        manifest_seconds, manifest_mb = time.perf_counter() - started, resident_mb("VmHWM") - before
        before, started = reset_peak(), time.perf_counter()
        loader = open_shards(root, "t", None)
        data = stream(loader, SHAPE, 0, STEPS)
        batch = next(iter(data.iter_batches(batch_size=8, batch_format="pyarrow")))
        seconds, grown = time.perf_counter() - started, resident_mb("VmHWM") - before
        files = get_shared(loader.files)
        assert (batch.num_rows, sum(files["rows"].to_pylist())) == (8, SHARDS * PAIRS)
        started = time.perf_counter()
        assert get_shared(open_shards(root, "counted", 8).files).num_rows == COUNTED
        count_ms = (time.perf_counter() - started) / COUNTED * 1000
    return {
        "shards_manifest_seconds_1e8": manifest_seconds,
        "shards_manifest_mb_1e8": manifest_mb,
        "shards_plan_seconds_1e8": seconds,
        "shards_plan_mb_1e8": grown,
        "shards_held_mb_1e8": files.nbytes / 1e6,
        "shards_count_ms": count_ms,
    }


def open_shards(root: str, name: str, max_side: int | None) -> ShardLoader:
    return shard_loader(root, name, seed=0, buffer=BUFFER, image_size=8, fit="warp", max_side=max_side)


def publish_shards(root: str) -> None:
    """A table of all shards, and one of the first `COUNTED`; as in a crawl, each has an index and statistics."""
    sink = io.BytesIO()
    Image.new("RGB", (8, 8)).save(sink, "PNG")
    tar, offsets = pack((f"{number:010d}", sink.getvalue(), "x") for number in range(PAIRS))
    kinds = tables.SCHEMAS["pairs"]
    column = {field.name: ["x" * 60 if field.type == pa.string() else 8] * PAIRS for field in kinds}
    column |= {"shard": ["shards/0.tar"] * PAIRS, "offset": offsets, "size": [len(sink.getvalue())] * PAIRS}
    column["caption"] = captions(PAIRS)
    entry = tables.write_part(root, "pairs", "t", "index/0.parquet", pa.table(column, kinds))
    tables.write_file(root, "pairs", "t", "shards/0.tar", tar)
    folder, digests = Path(root, "pairs/t/index"), [f"{number:064x}" for number in range(SHARDS)]
    stems = [f"{digest[-16:]}-{number:06d}" for number, digest in enumerate(digests)]
    for stem in stems:
        (folder / f"{stem}.parquet").symlink_to("0.parquet")
    Path(root, "pairs/counted").mkdir()
    Path(root, "pairs/counted/index").symlink_to("../t/index")
    for name, count in (("counted", COUNTED), ("t", SHARDS)):
        files = [
            file
            for stem, digest in zip(stems[:count], digests, strict=False)
            for file in (
                tables.FileEntry(f"index/{stem}.parquet", entry.size, PAIRS, digest),
                tables.FileEntry(f"shards/{stem}.tar", len(tar), 0, digest),
                tables.FileEntry(f"stats/{stem}.json", 200, 0, digest),
            )
        ]
        tables.publish(root, "pairs", name, files, producer="benchmark", config_hash="0")


def shard_reads() -> dict[str, float]:
    """Requests a pair, and bytes read for each byte that is needed, over tasks from all parts of an epoch."""
    rows_F, requests, read, needed = np.full(1000, PAIRS), 0, 0, 0
    size = IMAGE_BYTES + 3 * BLOCK
    for start in range(0, 1000 * PAIRS - TASK, 97 * TASK):
        for window in plan_windows(0, rows_F, BUFFER, np.arange(start, start + TASK)):
            file, row = np.divmod(np.sort(window.rows), PAIRS)
            offsets = row * size
            for first, stop in spans(file.tolist(), offsets.tolist(), [IMAGE_BYTES] * len(row)):
                requests += 1
                read += int(offsets[stop - 1] - offsets[first]) + IMAGE_BYTES
            needed += len(row) * IMAGE_BYTES
    return {"shards_reads_per_pair": requests * IMAGE_BYTES / needed, "shards_bytes_per_byte": read / needed}


def captions(count: int) -> list[str]:
    names = np.random.default_rng(0).choice(World.create(0).names, (count, 3)).tolist()
    return [f"a photo of a {first} that stands beside a {second} and an old {third}" for first, second, third in names]


def tokenising() -> float:
    """Captions a CPU-second, after the first thousand."""
    clip, texts = Clip(ClipConfig()), captions(5_000)
    clip.tokenize(texts[:1_000])
    started = time.thread_time()
    clip.tokenize(texts[1_000:])
    return 4_000 / (time.thread_time() - started)


if __name__ == "__main__":
    main()
