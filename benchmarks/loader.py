"""The loading of annotated images beside that of an earlier version: images for a second of CPU time.

python benchmarks/loader.py

JPEG files of 512 px, with masks and 300 stored regions each, are mirrored, jittered to 1,024 px and collated, as ViLD's
LVIS configs take them. Both versions run alone, one after the other in turn, on one thread. `make bench-train` writes
the figure with its own.
"""

import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
from faster_coco_eval import mask as rle
from measure import REPOSITORY, update_figures
from PIL import Image

from data_prep import tables
from data_prep.embeddings.stores import EmbeddingJob, publish_embeddings, save_shard, saved_shards

EARLIER = "0cf1bb0"
"""The commit to compare with."""
IMAGES, SIDE, OBJECTS, REGIONS, WIDTH, BATCH = 32, 512, 12, 300, 512, 8
CROPS = {"scales": [1.0, 1.5]}
ROUNDS = 5
CHILD = """
import sys, time
import numpy as np, torch
from data_prep.streams.augmentation import Augmentation
from data_prep.streams.box_loader import RegionSource, detection_loader
from data_prep.streams.collate import DetectionCollate
torch.set_num_threads(1)
root, images, batch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
source = RegionSource(name="bench", teacher="clip:1", crops={"scales": [1.0, 1.5]})
loader = detection_loader(root, "bench", list(range(10)), seed=0, masks=True, regions=source,
    augmentation=Augmentation(flip_probability=0.5, side=1024, scales=(0.1, 2.0)))
collate = DetectionCollate()
def run(first):
    for start in range(first, first + images, batch):
        found = collate(loader(np.arange(start, start + batch)))
        assert found.masks is not None and found.images[0].shape == (3, 1024, 1024)
run(0)
started = time.process_time()
run(images); run(2 * images)
print(2 * images / (time.process_time() - started))
"""


def main() -> None:
    figures = loader_speedup()
    update_figures("train", figures)
    print(json.dumps(figures))


def loader_speedup() -> dict[str, float]:
    """The median over pairs of runs of our rate divided by the earlier version's."""
    with tempfile.TemporaryDirectory(prefix="ovd-") as folder:
        root, earlier = Path(folder, "store"), Path(folder, "earlier")
        write_set(root)
        archive = ["git", "archive", EARLIER, "data_prep", "ovd_models"]
        content = subprocess.run(archive, cwd=REPOSITORY, capture_output=True, check=True).stdout
        with tarfile.open(fileobj=io.BytesIO(content)) as files:
            files.extractall(earlier, filter="data")
        pairs = [(rate(REPOSITORY, root), rate(earlier, root)) for _ in range(ROUNDS)]
    ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"{ours:.1f} images for a second of CPU time, {theirs:.1f} at {EARLIER}, medians of {ROUNDS} pairs")
    return {
        "loader_speedup": statistics.median(one / two for one, two in pairs),
        "loader_images_per_cpu_second": ours,
    }


def rate(tree: Path, root: Path) -> float:
    """Images for a second of CPU time with the code of a tree."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, str(root), str(IMAGES), str(BATCH)]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return float(done.stdout.splitlines()[-1])


def write_set(root: Path) -> None:
    """Tables `boxes/bench` and `regions/bench` of smooth random pictures with ellipses as objects."""
    rng = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    rows = []
    for number in range(IMAGES):
        coarse = rng.integers(0, 256, (24, 24, 3), np.uint8)
        pixels = cv2.resize(coarse, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
        boxes, masks = [], []
        for _ in range(OBJECTS):
            radius = rng.integers(8, 120, 2)
            centre = [int(value) for value in rng.uniform(radius, SIDE - radius)]
            mask = np.zeros((SIDE, SIDE), np.uint8)
            cv2.ellipse(mask, centre, radius.tolist(), 0, 0, 360, 1, -1)
            pixels[mask > 0] = rng.integers(0, 256, 3)
            ys, xs = np.nonzero(mask)
            boxes.append([float(value) for value in (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)])
            masks.append(rle.encode(np.asfortranarray(mask))["counts"].decode())
        Image.fromarray(pixels).save(root / "images" / f"{number}.jpg", quality=90)
        rows.append(
            {
                "image_id": f"{number:02}",
                "source_id": number,
                "uri": f"images/{number}.jpg",
                "width": SIDE,
                "height": SIDE,
                "boxes": boxes,
                "category_ids": rng.integers(0, 10, OBJECTS).tolist(),
                "iscrowd": [False] * OBJECTS,
                "masks": masks,
                "neg_category_ids": [],
                "not_exhaustive_category_ids": [],
            }
        )
    table = pa.Table.from_pylist(rows, schema=tables.SCHEMAS["boxes"])
    entry = tables.write_part(str(root), "boxes", "bench", "part-00000.parquet", table)
    tables.publish(str(root), "boxes", "bench", [entry], producer="benchmark", config_hash="0")
    write_regions(str(root), [str(row["image_id"]) for row in rows], rng)


def write_regions(root: str, ids: list[str], rng: np.random.Generator) -> None:
    """300 random boxes with random embeddings for each image."""
    corners = rng.uniform(0, SIDE / 2, (len(ids), REGIONS, 2, 2)).astype(np.float32)
    corners[:, :, 1] += corners[:, :, 0] + 8
    table = pa.table(
        {
            "shard": ["000000"] * len(ids),
            "image_id": ids,
            "boxes": pa.array(corners.reshape(len(ids), REGIONS, 4).tolist(), pa.list_(pa.list_(pa.float32()))),
            "scores": pa.array(rng.random((len(ids), REGIONS)).tolist(), pa.list_(pa.float32())),
            "count": [REGIONS] * len(ids),
            "file": [rng.standard_normal((REGIONS, WIDTH)).astype("<f2").tobytes() for _ in ids],
        }
    )
    job = EmbeddingJob(storage=root, table="regions", name="bench", staging=f"{root}/staging")
    save_shard(table, job)
    provenance = {"teacher": "clip:1", "crops": CROPS}
    publish_embeddings(
        job, list(saved_shards(job.staging).values()), producer="benchmark", config_hash="0", provenance=provenance
    )


if __name__ == "__main__":
    main()
