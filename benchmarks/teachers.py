"""Embedding with a CLIP teacher, compared with forward passes alone, clip-retrieval, and a plain loop over crops.

make bench-teachers
python benchmarks/teachers.py --only clip_retrieval --images 256 --pairs 1

ViT-B/32 has random weights, so that no network is needed; both tools use the same ones. clip-retrieval's virtual
environment uses this project's torch, so only the tools differ.
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
from measure import BENCH, REPOSITORY, Cost, measure, update_figures
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from pairs_servers import make_pictures
from PIL import Image

from data_prep import storage, tables
from data_prep.pairs import shards
from ovd_models.clip.model import Clip, ClipConfig, save_clip

WORK = BENCH / "teachers"
PEER = BENCH / "venvs" / "clip-retrieval"
PACKAGES = ("clip-retrieval==2.45.0", "setuptools<81")
SHARED = ("torch", "torchgen", "torchvision", "functorch", "triton", "nvidia", "cuda")
"""Packages (5.5 GB) that the peer's environment shares with this one: the newest versions that both can use."""
SIDE = 256
QUALITY = 95
BATCH = 32
CORES = os.cpu_count() or 1
SAMPLE_SECONDS = 1.0
"""Between two samples of memory, which take CPU time from the measured processes."""
FEWER = 4
"""The timed run is compared with one of fewer images by this factor, so that start-up cancels out."""
WORDS = ["a", "red", "umbrella", "and", "two", "people", "on", "the", "beach", "near", "old", "boats", "at", "dusk"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line."""

    only: list[str]
    images: int
    pairs: int


def ceiling(options: Options) -> dict[str, float]:
    """Whole images: the workflow's cost of each further image, compared with the forward pass alone.

    By CPU-seconds, since the two are measured one after the other on a machine that may be shared; also by wall time.
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
    """Images per second and CPU-seconds an image: the better of one process on all cores and one on each."""
    found = []
    for processes, threads in ((1, CORES), (CORES, 1)):
        command = [sys.executable, "benchmarks/teachers_models.py", "forward", str(checkpoint())]
        count = str(options.images // 2 // processes)
        running = [
            subprocess.Popen([*command, count, str(threads)], cwd=REPOSITORY, stdout=subprocess.PIPE, env=environment())
            for _ in range(processes)
        ]
        results = [json.loads(process.communicate()[0]) for process in running]
        found.append((sum(each["rate"] for each in results), max(each["cpu_seconds"] for each in results)))
    return max(rate for rate, _ in found), min(cpu for _, cpu in found)


def clip_retrieval(options: Options) -> dict[str, float]:
    """Images and captions: the whole command, compared with `clip-retrieval inference`."""
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
        figures = {**ratios(costs), **lowest_cosines()}
        update_figures("teachers", figures)  # after each pair, so that a run that is stopped keeps its figures
    return figures


def ratios(costs: dict[str, list[Cost]]) -> dict[str, float]:
    """Medians of both tools, and the ratio of theirs to ours."""
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
    # With Ray's default niceness of 15 its workers would wait for other programs, and the peer's would not.
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "RAY_worker_niceness": "0"}
    return run_tool("ours", command, REPOSITORY, env)


def theirs() -> Cost:
    """Embed the same shards with clip-retrieval: its defaults, except our batch size and one process a core."""
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
    return run_tool("theirs", command, WORK, env)


def run_tool(tool: str, command: list[str], cwd: Path, env: dict[str, str]) -> Cost:
    log = WORK / f"{tool}.log"
    cost = measure(command, log=log, cwd=cwd, env=env, sample_seconds=SAMPLE_SECONDS)
    if cost.exit_code:
        raise SystemExit(f"error: {tool}: exit code {cost.exit_code}, see {log}")
    return cost


def lowest_cosines() -> dict[str, float]:
    """Lowest cosine between the rows of both tools; also without the mean, which dominates with random weights."""
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
    """Boxes of decoded images, compared with the plain loop: the tiny CLIP of the pictogram world, and ViT-B/32."""
    figures = {}
    for prefix, model, images, boxes, precision in (
        ("crop_loop", tiny_checkpoint(), 32, 50, "float32"),
        ("crop_loop_bfloat16", tiny_checkpoint(), 32, 50, "bfloat16"),
        ("crop_loop_vit", checkpoint(), 4, 20, "float32"),
        ("crop_loop_vit_bfloat16", checkpoint(), 4, 20, "bfloat16"),
    ):
        results = in_process("crops", str(model), str(images), str(boxes), precision)
        figures.update({f"{prefix}_{name}": value for name, value in results.items()})
    return figures


def random_rows(options: Options) -> dict[str, float]:
    """Reads of regions by image in random order."""
    return {f"random_{name}": value for name, value in in_process("store", str(WORK / "store")).items()}


def in_process(*arguments: str) -> dict[str, float]:
    command = [sys.executable, "benchmarks/teachers_models.py", *arguments]
    ran = subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.PIPE, env=environment())
    figures: dict[str, float] = json.loads(ran.stdout)
    return figures


PARTS: dict[str, Callable[[Options], dict[str, float]]] = {
    "store": random_rows,
    "crops": crops,
    "ceiling": ceiling,
    "clip_retrieval": clip_retrieval,
}


# ------------------------------------------------------------------------------------------------------------ inputs


def checkpoint() -> Path:
    """ViT-B/32 with random weights, as our checkpoint and as a file for open_clip."""
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
                resize_mode="shortest",
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
    """Publish a table of images of a crawl's size, with captions of `words / 2` to `3 * words / 2` words."""
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
    for shard, part in enumerate(np.array_split(np.arange(count), CORES)):  # clip-retrieval needs one for each process
        own = part.tolist()
        tar, offsets = shards.pack((keys[number], contents[number][0], captions[number]) for number in own)
        files.append(tables.write_file(str(WORK), "pairs", name, f"shards/{shard}.tar", tar))
        for number, offset in zip(own, offsets, strict=True):
            content, (width, height) = contents[number]
            place = {"shard": f"shards/{shard}.tar", "key": keys[number], "offset": offset, "size": len(content)}
            pair = {"image_id": storage.sha256(content), "caption": captions[number], "width": width, "height": height}
            rows.append({**empty, **pair, **place})
    table = pa.Table.from_pylist(rows, schema=tables.SCHEMAS["pairs"])
    files.append(tables.write_part(str(WORK), "pairs", name, "index/bench.parquet", table))
    tables.publish(str(WORK), "pairs", name, files, producer="benchmark", config_hash="")


def install_peer() -> None:
    """Create the virtual environment of clip-retrieval, once."""
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
    """Environment of a timed process, in which waiting threads may spin, as is torch's default."""
    kept = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    return {**kept, "PYTHONPATH": str(REPOSITORY)}


def as_flags(flags: dict[str, object]) -> list[str]:
    return [text for name, value in flags.items() for text in (f"--{name}", str(value))]


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the embedding of images, captions and regions.")
    parser.add_argument("--only", nargs="+", choices=[*PARTS], default=[*PARTS], help="parts to run")
    parser.add_argument("--images", type=int, default=512, help="images of the timed tables, a multiple of 256")
    parser.add_argument("--pairs", type=int, default=3, help="runs of each tool")
    options = Options(**vars(parser.parse_args()))
    WORK.mkdir(parents=True, exist_ok=True)
    figures: dict[str, float] = {}
    for part in options.only:
        part_figures = PARTS[part](options)
        update_figures("teachers", part_figures)
        figures.update(part_figures)
    for name, value in figures.items():
        print(f"{name:40} {value:14.4f}")


if __name__ == "__main__":
    main()
