"""Timings inside one process, for teachers.py: forward passes, crops compared with a plain loop, random reads.

python benchmarks/teachers_models.py forward CHECKPOINT IMAGES THREADS
python benchmarks/teachers_models.py crops CHECKPOINT IMAGES BOXES float32|bfloat16
python benchmarks/teachers_models.py store FOLDER
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import torch
from open_clip.transform import image_transform
from PIL import Image
from torchvision.ops import roi_align

from data_prep import storage
from data_prep.embeddings import stores as embeddings
from data_prep.embeddings.crops import CropConfig, crop_squares, crop_windows, square
from data_prep.embeddings.stores import ROWS, EmbeddingJob, RegionStore
from data_prep.embeddings.teachers import EmbedConfig, Teacher, embed_regions
from ovd_models.clip.model import Clip, load_clip

T = TypeVar("T")
BATCH = 32
ROUNDS = 3
CORES = os.cpu_count() or 1
STORED_IMAGES, REGIONS, WIDTH = 2_000, 300, 512


def forward(checkpoint: str, count: str, threads: str) -> dict[str, float]:
    """Images per second and CPU-seconds an image of the image tower, with all images in memory."""
    torch.set_num_threads(int(threads))
    clip, _ = load_clip(checkpoint)
    side = clip.config.image_size
    images = torch.randint(0, 256, (BATCH, 3, side, side), dtype=torch.uint8)
    batches = int(count) // BATCH
    with torch.inference_mode():
        clip.encode_images(images)
        started, used = time.perf_counter(), time.process_time()
        for _ in range(batches):
            clip.encode_images(images)
        seconds, cpu = time.perf_counter() - started, time.process_time() - used
    return {"rate": batches * BATCH / seconds, "cpu_seconds": cpu / (batches * BATCH)}


def crops(checkpoint: str, images: str, boxes: str, bfloat16: str) -> dict[str, float]:
    """Embeddings of boxes: time of the plain loop divided by ours, and their lowest cosine; also ways to resample.

    The loop's forward passes use all cores. Ours works as an actor does (`ShardWorker`): a shard a core, in a thread.
    """
    teacher = Teacher(checkpoint, EmbedConfig(bfloat16=bfloat16 == "bfloat16"))
    rng = np.random.default_rng(0)
    pictures = [draw(rng) for _ in range(int(images))]
    arrays = [np.asarray(picture) for picture in pictures]
    box_N4 = [random_boxes(rng, int(boxes), picture) for picture in pictures]
    config = CropConfig(fit="centre")

    def embed_shard(number: int) -> list[np.ndarray]:
        own = slice(number, None, CORES)
        return embed_regions(teacher, arrays[own], box_N4[own], config)

    plain_loop(teacher.clip, pictures[:1], [box_N4[0][:2]], config)  # warm-up
    embed_regions(teacher, arrays[:1], [box_N4[0][:2]], config)
    loop, ours = [], []
    with ThreadPoolExecutor(CORES) as shards_at_a_time:
        for _ in range(ROUNDS):
            torch.set_num_threads(CORES)
            seconds, expected = timed(lambda: plain_loop(teacher.clip, pictures, box_N4, config))
            loop.append(seconds)
            torch.set_num_threads(1)
            seconds, parts = timed(lambda: list(shards_at_a_time.map(embed_shard, range(CORES))))
            ours.append(seconds)
    same = [pair for number, part in enumerate(parts) for pair in zip(expected[number::CORES], part, strict=True)]
    cosine = np.concatenate([(a * b.astype(np.float32)).sum(1) for a, b in same])
    count = int(images) * int(boxes)
    return {
        "ratio": statistics.median(loop) / statistics.median(ours),
        "loop_boxes_per_second": count / statistics.median(loop),
        "boxes_per_second": count / statistics.median(ours),
        "lowest_cosine": float(cosine.min()),
        **resampling(teacher, pictures, box_N4),
    }


def resampling(teacher: Teacher, pictures: list[Image.Image], box_N4: list[np.ndarray]) -> dict[str, float]:
    """Milliseconds on one core for a crop by torch, Pillow and RoIAlign, and RoIAlign's lowest cosine with torch."""
    side = teacher.side
    windows = [crop_windows(boxes, 1.0, *picture.size) for picture, boxes in zip(pictures, box_N4, strict=True)]
    count = sum(map(len, windows))

    def by_torch() -> np.ndarray:
        pairs = zip(pictures, windows, strict=True)
        return np.concatenate([crop_squares(np.asarray(picture), own.tolist(), side, "warp") for picture, own in pairs])

    def by_pillow() -> list[np.ndarray]:
        pairs = zip(pictures, windows, strict=True)
        return [square(picture.crop(tuple(window)), side, "warp") for picture, own in pairs for window in own.tolist()]

    def aligned() -> np.ndarray:
        parts = []
        for picture, own in zip(pictures, windows, strict=True):
            image = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None].float()
            found = roi_align(image, [torch.from_numpy(own).float()], side, sampling_ratio=-1, aligned=True)
            parts.append(found.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy())
        return np.concatenate(parts)

    torch_seconds, bicubic = timed(by_torch)
    pillow_seconds, _ = timed(by_pillow)
    align_seconds, aligned_pixels = timed(aligned)
    rows = []
    for pixels in (bicubic, aligned_pixels):
        parts = [partial(np.asarray, pixels[start : start + BATCH]) for start in range(0, count, BATCH)]
        found = teacher.embed_squares(parts)
        rows.append(found / np.linalg.norm(found, axis=1, keepdims=True))
    return {
        "mean_side": float(np.concatenate([own[:, 2:] - own[:, :2] for own in windows]).mean()),
        "resize_ms": 1e3 * torch_seconds / count,
        "pillow_ms": 1e3 * pillow_seconds / count,
        "roi_align_ms": 1e3 * align_seconds / count,
        "roi_align_lowest_cosine": float((rows[0] * rows[1]).sum(1).min()),
    }


def plain_loop(
    clip: Clip, pictures: list[Image.Image], boxes: list[np.ndarray], config: CropConfig
) -> list[np.ndarray]:
    """PIL crop, open_clip's preprocessing, encode: one crop after the other."""
    preprocess = image_transform(
        clip.config.image_size, is_train=False, mean=clip.normalise.mean, std=clip.normalise.std
    )
    every = []
    with torch.inference_mode():
        for picture, box_N4 in zip(pictures, boxes, strict=True):
            rows = []
            for box in box_N4:
                total = torch.zeros(clip.config.embed_dim)
                for scale in config.scales:
                    window = crop_windows(box[None], scale, *picture.size)[0].tolist()
                    total += clip.model.encode_image(preprocess(picture.crop(window))[None])[0]
                rows.append((total / total.norm()).numpy())
            every.append(np.stack(rows))
    return every


def draw(rng: np.random.Generator) -> Image.Image:
    """A 640 x 480 image with structure at several scales."""
    pixels = np.zeros((480, 640, 3))
    for step in (4, 16, 64):
        coarse = rng.integers(0, 256, (480 // step + 1, 640 // step + 1, 3)).astype(np.uint8)
        pixels += np.asarray(Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC)) / 3
    return Image.fromarray(pixels.astype(np.uint8))


def random_boxes(rng: np.random.Generator, count: int, picture: Image.Image) -> np.ndarray:
    """[N, 4] boxes with sides of 16 to 320 pixels, as proposals have."""
    sides = np.exp(rng.uniform(np.log(16), np.log(320), (count, 2)))
    first = rng.uniform(0, 1, (count, 2)) * (np.array(picture.size) - sides)
    return np.concatenate([first, first + sides], axis=1).astype(np.float32)


def store(folder: str) -> dict[str, float]:
    """Rows per second by image in random order, from memory and after the files were dropped from the page cache."""
    root = Path(folder)
    if not (root / "regions" / "bench" / "manifest.json").exists():
        write_store(root)
    opened, found = timed(lambda: RegionStore.open(folder, "bench", {"teacher": "none"}))
    ids = [image.decode() for image in found.rows.ids]
    order = np.random.default_rng(0).permutation(len(ids)).tolist()
    total = len(order) * REGIONS

    def read_all() -> float:
        return sum(float(np.array(found[ids[number]].embeddings, np.float32)[0, 0]) for number in order)

    for path in root.rglob("*.f16"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    cold, _ = timed(read_all)
    warm = statistics.median(timed(read_all)[0] for _ in range(ROUNDS))
    return {"rows_per_second": total / warm, "cold_rows_per_second": total / cold, "open_seconds": opened}


def write_store(root: Path) -> None:
    """2,000 images of 300 regions of width 512: 614 MB."""
    job = EmbeddingJob(storage=str(root), table="regions", name="bench", staging=str(root / "staging"))
    storage.remove_folder(str(root / "regions"))
    rng = np.random.default_rng(0)
    per_shard = 50
    for start in range(0, STORED_IMAGES, per_shard):
        rows = rng.standard_normal((per_shard, REGIONS, WIDTH), np.float32).astype(ROWS)
        boxes = rng.uniform(0, 640, (REGIONS, 4)).tolist()
        table = pa.table(
            {
                "shard": [f"{start:06d}"] * per_shard,
                "image_id": [f"{(start + number) * 7919 % 100_003:064x}" for number in range(per_shard)],
                "boxes": [boxes] * per_shard,
                "scores": [[1.0] * REGIONS] * per_shard,
                "count": [REGIONS] * per_shard,
                "file": pa.array([entry.tobytes() for entry in rows], pa.large_binary()),
            }
        )
        embeddings.save_shard(table, job)
    saved = list(embeddings.saved_shards(job.staging).values())
    embeddings.publish_embeddings(job, saved, producer="benchmark", config_hash="", provenance={"teacher": "none"})


def timed(work: Callable[[], T]) -> tuple[float, T]:
    started = time.perf_counter()
    found = work()
    return time.perf_counter() - started, found


if __name__ == "__main__":
    print(json.dumps({"forward": forward, "crops": crops, "store": store}[sys.argv[1]](*sys.argv[2:])))
