"""Embedding with a CLIP teacher: beside its forward passes alone, clip-retrieval and the plain loop over crops.

make bench-teachers
.venv/bin/python benchmarks/teachers.py --only clip_retrieval --images 256 --pairs 1

The weights of ViT-B/32 are random, since no network is assumed; both tools get the same ones. The torch of
clip-retrieval's virtual environment is this project's, so that they differ in nothing but themselves.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from measure import Cost, measure, provenance
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from pairs_servers import make_pictures
from PIL import Image

from data_prep import storage, tables
from data_prep.pairs import shards
from ovd_models.clip.model import Clip, ClipConfig, save_clip

REPOSITORY = Path(__file__).resolve().parent.parent
BENCH = REPOSITORY / "runs" / "bench"
FIGURES = BENCH / "teachers.json"
WORK = BENCH / "teachers"
PEER = BENCH / "venvs" / "clip-retrieval"
PACKAGES = ("clip-retrieval==2.45.0", "setuptools<81")
SHARED = ("torch", "torchgen", "torchvision", "functorch", "triton", "nvidia", "cuda")
"""What the peer's environment takes from this one's: the newest versions that both can use, 5.5 GB."""
SIDE = 256
QUALITY = 95
BATCH = 32
CORES = os.cpu_count() or 1
LOOK_SECONDS = 1.0
"""Between two looks at memory, which take the processor from what is measured."""
FEWER = 4
"""The run whose start-up is taken from the timed one's has this fraction of its images."""
WORDS = ["a", "red", "umbrella", "and", "two", "people", "on", "the", "beach", "near", "old", "boats", "at", "dusk"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line."""

    only: list[str]
    images: int
    pairs: int


def ceiling(options: Options) -> dict[str, float]:
    """Whole images: what each further one costs the workflow, beside the forward pass alone.

    By CPU-seconds, since both are measured one after the other on a machine that may be shared; by wall time beside it.
    """
    large, small = options.images, options.images // FEWER
    for count in (large, small):
        make_pairs(f"images-{count}", count, words=1)
    fractions, cpu_fractions, rates = [], [], []
    for number in range(options.pairs):
        long, short = (ours(f"images-{count}") for count in (large, small))
        rate = (large - small) / (long.wall_seconds - short.wall_seconds)
        cpu = (long.cpu_seconds - short.cpu_seconds) / (large - small)
        best, least_cpu = forward_alone(options)
        fractions.append(rate / best)
        cpu_fractions.append(least_cpu / cpu)
        rates.append(rate)
        print(
            f"ceiling {number + 1}/{options.pairs} {rate:.1f} images/s, {1e3 * cpu:.0f} ms CPU each; "
            f"forward alone {best:.1f} images/s, {1e3 * least_cpu:.0f} ms",
            flush=True,
        )
    return {
        "ceiling_fraction": statistics.median(cpu_fractions),
        "ceiling_fraction_wall": statistics.median(fractions),
        "images_per_second": statistics.median(rates),
    }


def forward_alone(options: Options) -> tuple[float, float]:
    """Images per second and CPU-seconds an image, of the better of one process on all cores and one on each."""
    found = []
    for processes, threads in ((1, CORES), (CORES, 1)):
        command = [sys.executable, "benchmarks/teachers_models.py", "forward", str(checkpoint())]
        count = str(options.images // 2 // processes)
        running = [
            subprocess.Popen([*command, count, str(threads)], cwd=REPOSITORY, stdout=subprocess.PIPE, env=environment())
            for _ in range(processes)
        ]
        told = [json.loads(process.communicate()[0]) for process in running]
        found.append((sum(each["rate"] for each in told), max(each["cpu_seconds"] for each in told)))
    return max(rate for rate, _ in found), min(cpu for _, cpu in found)


def clip_retrieval(options: Options) -> dict[str, float]:
    """Images and captions: the whole command beside `clip-retrieval inference`."""
    install_peer()
    make_pairs("pairs", options.images, words=12)
    costs: dict[str, list[Cost]] = {"ours": [], "theirs": []}
    for number in range(options.pairs):
        for tool, run in (("ours", lambda: ours("pairs")), ("theirs", theirs)):
            cost = run()
            print(
                f"clip_retrieval {number + 1}/{options.pairs} {tool:6} CPU {cost.cpu_seconds:.1f} s, "
                f"wall {cost.wall_seconds:.1f} s, peak {cost.peak_gb:.2f} GB",
                flush=True,
            )
            costs[tool].append(cost)
        record({**ratios(costs), **likeness()})  # a run of an hour that is ended keeps what it has
    return {**ratios(costs), **likeness()}


def ratios(costs: dict[str, list[Cost]]) -> dict[str, float]:
    """Medians of both tools, and theirs over ours."""
    figures = {"pairs": float(len(costs["theirs"]))}
    for measured in ("cpu_seconds", "wall_seconds", "peak_gb"):
        for tool, runs in costs.items():
            figures[f"{tool}_{measured}"] = statistics.median(getattr(cost, measured) for cost in runs)
    return {
        "clip_retrieval_ratio": figures["theirs_cpu_seconds"] / figures["ours_cpu_seconds"],
        "clip_retrieval_wall_ratio": figures["theirs_wall_seconds"] / figures["ours_wall_seconds"],
        **{f"clip_retrieval_{name}": value for name, value in figures.items()},
    }


def ours(name: str) -> Cost:
    """Embed a table of pairs with this project."""
    for folder in ("embeddings", "staging"):
        shutil.rmtree(WORK / folder, ignore_errors=True)
    flags = {"config": "photos", "boxes": "", "pairs": name, "name": "bench", "teacher": checkpoint(), "storage": WORK}
    command = [sys.executable, "workflows/embed.py", *as_flags(flags)]
    # Ray's workers are nicer than others by 15: on a machine that is shared, they would wait for the peer's kind.
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "RAY_worker_niceness": "0"}
    return succeed(measure(command, log=WORK / "ours.log", cwd=REPOSITORY, env=env, look_seconds=LOOK_SECONDS), "ours")


def theirs() -> Cost:
    """Embed the same shard with clip-retrieval: its defaults, but our size of batches and a process a core."""
    shutil.rmtree(WORK / "theirs", ignore_errors=True)
    flags = {
        "input_dataset": f"{WORK / 'pairs' / 'pairs' / 'shards'}/{{0..{CORES - 1}}}.tar",
        "output_folder": WORK / "theirs",
        "input_format": "webdataset",
        "clip_model": f"open_clip:ViT-B-32/{WORK / 'vit-b-32.pt'}",
        "batch_size": BATCH,
        "num_prepro_workers": CORES,
        "wds_number_file_per_input_file": 1000,
    }
    command = [str(PEER / "bin" / "clip-retrieval"), "inference", *as_flags(flags)]
    env = {**os.environ, "WANDB_MODE": "disabled"}
    return succeed(measure(command, log=WORK / "theirs.log", cwd=WORK, env=env, look_seconds=LOOK_SECONDS), "theirs")


def succeed(cost: Cost, tool: str) -> Cost:
    if cost.exit_code:
        raise SystemExit(f"error: {tool}: exit code {cost.exit_code}, see {WORK / f'{tool}.log'}")
    return cost


def likeness() -> dict[str, float]:
    """Lowest cosine between the rows of both tools; also after the mean, which random weights share, is taken away."""
    index = pq.read_table(sorted((WORK / "pairs" / "pairs" / "index").glob("*.parquet"))[0])
    key_of = dict(zip(index["image_id"].to_pylist(), index["key"].to_pylist(), strict=True))
    own = tables.read_table(str(WORK), "embeddings", "bench").to_pylist()
    metadata = pq.read_table(WORK / "theirs" / "metadata" / "metadata_0.parquet")
    place = {key: row for row, key in enumerate(metadata["image_path"].to_pylist())}
    order = [place[key_of[row["image_id"]]] for row in own]
    found = {}
    for kind, column, file in (("image", "file", "img_emb"), ("text", "text_file", "text_emb")):
        peer = np.load(WORK / "theirs" / file / f"{file}_0.npy").astype(np.float32)[order]
        arrays = {
            path: np.fromfile(WORK / "embeddings" / "bench" / path, "<f2") for path in {row[column] for row in own}
        }
        width = peer.shape[1]
        mine = np.stack([arrays[row[column]].reshape(-1, width)[row["start"]] for row in own]).astype(np.float32)
        found[f"clip_retrieval_{kind}_cosine"] = float(cosines(mine, peer).min())
        found[f"clip_retrieval_{kind}_centred_cosine"] = float(cosines(mine - peer.mean(0), peer - peer.mean(0)).min())
    return found


def cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return (first * second).sum(1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)


def crops(options: Options) -> dict[str, float]:
    """Boxes of pictures decoded once beside the plain loop: the tiny CLIP of the pictogram world, and ViT-B/32."""
    figures = {}
    for prefix, model, images, boxes, precision in (
        ("crop_loop", tiny_checkpoint(), 32, 50, "float32"),
        ("crop_loop_bfloat16", tiny_checkpoint(), 32, 50, "bfloat16"),
        ("crop_loop_vit", checkpoint(), 4, 20, "float32"),
        ("crop_loop_vit_bfloat16", checkpoint(), 4, 20, "bfloat16"),
    ):
        told = in_process("crops", str(model), str(images), str(boxes), precision)
        figures.update({f"{prefix}_{name}": value for name, value in told.items()})
    return figures


def random_rows(options: Options) -> dict[str, float]:
    """Regions of images in random order."""
    return {f"random_{name}": value for name, value in in_process("store", str(WORK / "store")).items()}


def in_process(*arguments: str) -> dict[str, float]:
    command = [sys.executable, "benchmarks/teachers_models.py", *arguments]
    told = subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.PIPE, env=environment())
    figures: dict[str, float] = json.loads(told.stdout)
    return figures


PARTS: dict[str, Callable[[Options], dict[str, float]]] = {
    "store": random_rows,
    "crops": crops,
    "ceiling": ceiling,
    "clip_retrieval": clip_retrieval,
}


# ------------------------------------------------------------------------------------------------------------ inputs


def checkpoint() -> Path:
    """ViT-B/32 with random weights, as a checkpoint of ours, and in the form that open_clip reads."""
    folder = WORK / "vit-b-32"
    if not (folder / "clip.json").exists():
        torch.manual_seed(0)
        clip = Clip(
            ClipConfig(
                embed_dim=512,
                vision={"image_size": 224, "layers": 12, "width": 768, "patch_size": 32},
                text={"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
                mean=OPENAI_DATASET_MEAN,
                std=OPENAI_DATASET_STD,
                prompt_set="photo",
            )
        )
        plain = {name.removeprefix("text."): value for name, value in clip.model.state_dict().items()}
        WORK.mkdir(parents=True, exist_ok=True)
        torch.save(plain, WORK / "vit-b-32.pt")
        save_clip(clip, folder)
    return folder


def tiny_checkpoint() -> Path:
    folder = WORK / "tiny"
    if not (folder / "clip.json").exists():
        torch.manual_seed(0)
        save_clip(Clip(ClipConfig()), folder)
    return folder


def make_pairs(name: str, count: int, words: int) -> None:
    """Publish a table of pictures of a crawl's size, with captions of a few words to twice as many."""
    found = tables.find_manifest(str(WORK), "pairs", name)
    if found is not None and found.rows == count:
        return
    make_pictures(WORK / "pictures", count)
    contents, captions = [], []
    for number in range(count):
        image = Image.open(WORK / "pictures" / f"{number}.jpg")
        image.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
        path = WORK / "stored.jpg"
        image.save(path, quality=QUALITY)
        contents.append((path.read_bytes(), image.size))
        length = words // 2 + number * 7 % (words + 1) or 1
        captions.append(" ".join(WORDS[(number + word * 3) % len(WORDS)] for word in range(length)))
    keys = [f"{number:010d}" for number in range(count)]
    empty, rows, files = dict.fromkeys(tables.SCHEMAS["pairs"].names), [], []
    for shard, part in enumerate(np.array_split(np.arange(count), CORES)):  # clip-retrieval wants one a process
        own = part.tolist()
        tar, offsets = shards.pack((keys[number], contents[number][0], captions[number]) for number in own)
        files.append(tables.write_file(str(WORK), "pairs", name, f"shards/{shard}.tar", tar))
        for number, offset in zip(own, offsets, strict=True):
            content, (width, height) = contents[number]
            place = {"shard": f"shards/{shard}.tar", "key": keys[number], "offset": offset, "size": len(content)}
            told = {"image_id": storage.sha256(content), "caption": captions[number], "width": width, "height": height}
            rows.append({**empty, **told, **place})
    table = pa.Table.from_pylist(rows, schema=tables.SCHEMAS["pairs"])
    files.append(tables.write_part(str(WORK), "pairs", name, "index/bench.parquet", table))
    tables.publish(str(WORK), "pairs", name, files, producer="benchmark", config_hash="")


def install_peer() -> None:
    """Make the virtual environment of clip-retrieval, once."""
    if (PEER / ".installed").exists():
        return
    print(f"installing {', '.join(PACKAGES)} into {PEER}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", PEER], check=True)
    site = Path(torch.__file__).parents[1]
    (PEER / "shared").mkdir(exist_ok=True)
    for name in SHARED:
        for found in (*site.glob(name), *site.glob(f"{name}.libs"), *site.glob(f"{name}[-_]*.dist-info")):
            (PEER / "shared" / found.name).symlink_to(found)
    (own,) = (PEER / "lib").glob("python*/site-packages")
    (own / "shared.pth").write_text(f"{PEER / 'shared'}\n")
    subprocess.run([PEER / "bin" / "pip", "install", "--quiet", *PACKAGES], check=True)
    (PEER / ".installed").touch()


def environment() -> dict[str, str]:
    """Of a process; threads that wait for each other may spin, as torch's do where nobody forbids it."""
    kept = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    return {**kept, "PYTHONPATH": str(REPOSITORY)}


def as_flags(flags: dict[str, object]) -> list[str]:
    return [text for name, value in flags.items() for text in (f"--{name}", str(value))]


def record(figures: dict[str, float]) -> None:
    """Update the figures' file, and leave those of other parts as they are."""
    earlier = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    rounded = {name: round(value, 4) for name, value in figures.items()}
    FIGURES.write_text(json.dumps({**earlier, **rounded, **provenance(REPOSITORY)}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the embedding of images, captions and regions.")
    parser.add_argument("--only", nargs="+", choices=[*PARTS], default=[*PARTS], help="parts to run")
    parser.add_argument("--images", type=int, default=512, help="of the timed tables, a multiple of 256")
    parser.add_argument("--pairs", type=int, default=3, help="times that each tool runs")
    options = Options(**vars(parser.parse_args()))
    WORK.mkdir(parents=True, exist_ok=True)
    figures: dict[str, float] = {}
    for part in options.only:
        found = PARTS[part](options)
        record(found)
        figures.update(found)
    for name, value in figures.items():
        print(f"{name:40} {value:14.4f}")


if __name__ == "__main__":
    main()
