"""Region and pair embeddings from end to end, on two workers."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import killing
import numpy as np
import open_clip
import pyarrow as pa
import pytest
import ray
import torch
from killing import MOST_REPEATED, children_named
from PIL import Image

from data_prep import storage, tables
from data_prep.boxes import annotations
from data_prep.embeddings import teachers
from data_prep.embeddings.crops import CropConfig
from data_prep.embeddings.stores import EmbeddingJob, RegionStore, SavedShard, open_rows, save_shard
from data_prep.embeddings.teachers import EmbedConfig, Teacher, embed_regions, store_released
from data_prep.pairs import shards
from data_prep.pictograms.world import World
from ovd_models.clip.model import Clip, ClipConfig, save_clip, weights_digest
from ovd_models.errors import InputError
from workflows import embed, search

IMAGES = 10


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    save_clip(Clip(ClipConfig()), folder)
    return str(folder)


def make_tables(root: Path, images: int = IMAGES) -> None:
    """`boxes/t` and `pairs/t` of the same drawn scenes; the last image has no box."""
    rows = list(annotations.draw_scenes(str(root), "t", World.create(0), range(images), seed=1, base_only=False))
    for column in ("boxes", "category_ids", "iscrowd", "masks"):
        rows[-1][column] = []
    table = pa.Table.from_pylist(rows, schema=tables.SCHEMAS["boxes"])
    entry = tables.write_part(str(root), "boxes", "t", "part-00000.parquet", table)
    tables.publish(str(root), "boxes", "t", [entry], producer="test", config_hash="0")
    contents = [(root / row["uri"]).read_bytes() for row in rows]
    captions = [f"a photo of scene {number}" + " and more" * number for number in range(images)]
    samples = zip((f"{number:03d}" for number in range(images)), contents, captions, strict=True)
    tar, offsets = shards.pack(samples)
    pairs = [
        {
            **{field.name: None for field in tables.SCHEMAS["pairs"]},
            "image_id": storage.sha256(content), "caption": caption, "shard": "shards/t.tar", "offset": offset,
            "size": len(content), "width": 128, "height": 128,
        }
        for content, caption, offset in zip(contents, captions, offsets, strict=True)
    ]  # fmt: skip
    files = [
        tables.write_file(str(root), "pairs", "t", "shards/t.tar", tar),
        tables.write_part(
            str(root), "pairs", "t", "index/t.parquet", pa.Table.from_pylist(pairs, schema=tables.SCHEMAS["pairs"])
        ),
    ]
    tables.publish(str(root), "pairs", "t", files, producer="test", config_hash="0")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage whose regions and pairs the first test embeds."""
    folder = tmp_path_factory.mktemp("undisturbed")
    make_tables(folder)
    return folder


@pytest.fixture
def root(undisturbed: Path, tmp_path: Path) -> Path:
    """One with the same images, and nothing embedded."""
    for table in ("boxes", "pairs", "images"):
        shutil.copytree(undisturbed / table, tmp_path / table)
    return tmp_path


def run_of(root: Path, teacher: str) -> embed.Run:
    embedding = EmbedConfig(actors=2, images_per_shard=3, batch_size=8)
    return embed.Run(storage=str(root), teacher=teacher, name="t", boxes="t", embed=embedding)


def files_of(root: Path, table: str = "regions") -> dict[str, bytes]:
    folder = root / table / "t"
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("*/*")}


@pytest.mark.ray
def test_regions_and_pairs_of_two_workers_are_what_the_teacher_says(
    undisturbed: Path, teacher: str, ray_cluster: None
) -> None:
    root = undisturbed
    run = dataclasses.replace(run_of(root, teacher), pairs="t", fit="warp")
    regions, pairs = embed.embed(run)
    boxes = tables.read_table(str(root), "boxes", "t").to_pylist()
    alone = Teacher(teacher, run.embed)
    store = RegionStore.open(
        str(root), "t", {"teacher": alone.id, "crops": dataclasses.asdict(run.crops), "proposals": "given"}
    )
    assert len(store) == regions.rows == IMAGES
    for row in boxes:
        image, own = Image.open(root / row["uri"]), np.array(row["boxes"], np.float32).reshape(-1, 4)
        found = store[row["image_id"]]
        assert np.array_equal(found.boxes, own)
        assert found.scores.tolist() == [1.0] * len(own)
        (expected,) = embed_regions(alone, [np.asarray(image)], [own], CropConfig())
        assert np.abs(found.embeddings.astype(np.float32) - expected).max(initial=0) < 1e-3
    assert pairs.details["images"] == IMAGES
    texts = open_rows(str(root), "embeddings", "t", {"teacher": alone.id}, "text_file")
    captions = tables.read_table(str(root), "pairs", "t").to_pylist()
    expected = alone.embed_texts([row["caption"] for row in captions])
    for row, text in zip(captions, expected, strict=True):
        assert np.abs(texts.read(texts.position(row["image_id"]))[0] - text).max() < 1e-3


@pytest.mark.ray
def test_a_table_that_is_there_is_neither_made_again_nor_mistaken(
    undisturbed: Path, teacher: str, tmp_path: Path, ray_cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run, before = run_of(undisturbed, teacher), files_of(undisturbed)
    (manifest,) = embed.embed(run)
    assert "there already" in capsys.readouterr().out
    assert files_of(undisturbed) == before
    torch.manual_seed(1)
    other = save_clip(Clip(ClipConfig()), tmp_path)
    both = f'"{manifest.details["teacher"]}", this run asks for "{other}"'
    with pytest.raises(InputError, match=both):
        embed.embed(dataclasses.replace(run, teacher=str(tmp_path)))
    with pytest.raises(InputError, match=both):
        search.search(search.Run(storage=str(undisturbed), name="t", text="cat", teacher=str(tmp_path)))


@pytest.mark.ray
def test_search_finds_captions_and_frames_regions(undisturbed: Path, teacher: str, ray_cluster: None) -> None:
    run = search.Run(storage=str(undisturbed), name="t", top=3)
    planted = "a photo of scene 4 and more and more and more and more"
    hits = search.search(dataclasses.replace(run, text=planted, over="captions", prompt_set=""))
    assert hits[0].caption == planted
    assert hits[0].score == pytest.approx(1, abs=1e-3)
    assert hits[0].picture.size == (128, 128)
    store = RegionStore.open(str(undisturbed), "t", {})
    framed = search.search(dataclasses.replace(run, text="cat", top=5))
    assert [hit.score for hit in framed] == sorted((hit.score for hit in framed), reverse=True)
    assert all(list(hit.box) in store[hit.image_id].boxes.tolist() for hit in framed)
    # Five tiles of 224 pixels, two lines of text below them and two above.
    assert search.result_sheet("cat", framed).size == (5 * 224, 224 + 4 * 16)
    assert search.result_sheet("cat", []).width == 5 * 224


def test_search_frames_the_boxes_of_each_copy_of_a_picture(teacher: str, tmp_path: Path) -> None:
    make_tables(tmp_path, images=2)
    first, last = tables.read_table(str(tmp_path), "boxes", "t").to_pylist()
    boxes = [[[4.0, 4.0, 40.0, 40.0]] * 3, [[50.0, 50.0, 90.0, 90.0]], [[8.0, 8.0, 60.0, 60.0]] * 2]
    rows = [{**row, "boxes": own} for row, own in zip((first, first, last), boxes, strict=True)]
    table = pa.Table.from_pylist(rows, schema=tables.SCHEMAS["boxes"])
    entry = tables.write_part(str(tmp_path), "boxes", "t", "part-00000.parquet", table)
    tables.publish(str(tmp_path), "boxes", "t", [entry], producer="test", config_hash="0")
    run = run_of(tmp_path, teacher)
    embed.embed(dataclasses.replace(run, embed=dataclasses.replace(run.embed, actors=0, images_per_shard=2)))
    found = search.search(search.Run(storage=str(tmp_path), name="t", text="cat", top=9))
    assert sorted(list(hit.box) for hit in found) == sorted(box for own in boxes for box in own)
    one, _ = tables.read_table(str(tmp_path), "regions", "t")["image_id"].to_pylist()[:2]
    assert {tuple(boxes[0][0]), tuple(boxes[1][0])} == {hit.box for hit in found if hit.image_id == one}


@pytest.mark.ray
def test_more_actors_start_only_on_more_machines(ray_cluster: None) -> None:
    cpus = ray.cluster_resources()["CPU"]  # type: ignore[no-untyped-call]
    pool = embed.embedder_pool(EmbedConfig())
    assert pool.grows and pool.cpus * pool.workers <= cpus < pool.cpus * (pool.workers + 1)
    assert not embed.embedder_pool(EmbedConfig(actors=2)).grows


def test_a_moved_storage_is_searched_with_its_own_teacher(teacher: str, tmp_path: Path) -> None:
    first, moved = tmp_path / "first", tmp_path / "moved"
    make_tables(first, images=2)
    shutil.copytree(teacher, first / "teacher")
    embedding = EmbedConfig(actors=0)
    embed.embed(embed.Run(storage=str(first), teacher=str(first / "teacher"), name="t", pairs="t", embed=embedding))
    first.rename(moved)
    run = search.Run(storage=str(moved), name="t", text="a cat", over="captions", top=1)
    assert len(search.search(run)) == 1
    (moved / "teacher").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=str(moved / "teacher")):
        search.search(run)


@pytest.mark.ray
def test_an_image_that_cannot_be_read_has_no_rows_and_is_named(
    undisturbed: Path, root: Path, teacher: str, ray_cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tables.read_table(str(root), "boxes", "t").to_pylist()[:2]
    (root / first["uri"]).unlink()
    tar = root / "pairs/t/shards/t.tar"
    content, picture = tar.read_bytes(), (root / second["uri"]).read_bytes()
    tar.write_bytes(content.replace(picture, bytes(len(picture))))
    run = run_of(root, teacher)
    run = dataclasses.replace(run, pairs="t", fit="warp", embed=dataclasses.replace(run.embed, actors=0))
    embed.embed(run)
    printed = capsys.readouterr().out
    assert f"boxes/t: 1 of 10 images cannot be read, such as {root}/{first['uri']}: no such file" in printed
    assert "pairs/t: 1 of 10 images cannot be read, such as shards/t.tar@" in printed
    found, whole = (RegionStore.open(str(folder), "t", {}) for folder in (root, undisturbed))
    assert (len(found), len(found[first["image_id"]].boxes)) == (IMAGES, 0)
    own, expected = found[second["image_id"]], whole[second["image_id"]]
    assert np.array_equal(own.boxes, expected.boxes)
    assert np.abs(own.embeddings.astype(np.float32) - expected.embeddings).max() < 1e-3
    images = open_rows(str(root), "embeddings", "t", {})
    counts = {key.decode(): len(images.read(place)) for place, key in enumerate(images.ids)}
    assert (counts.pop(second["image_id"]), set(counts.values())) == (0, {1})
    for row in tables.read_table(str(root), "boxes", "t").to_pylist():
        (root / row["uri"]).write_bytes(b"no image")
    with pytest.raises(InputError, match=r"^boxes/t: 10 of 10 images cannot be read, such as .*not an image"):
        embed.embed(dataclasses.replace(run, name="nothing", pairs=""))


@pytest.mark.ray
def test_a_job_that_failed_goes_on_and_gives_the_same_bytes(
    undisturbed: Path,
    root: Path,
    teacher: str,
    ray_cluster: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inside = dataclasses.replace(run_of(root, teacher).embed, actors=0)
    shards = iter(range(2))

    def fail_at_the_third(rows: pa.Table, job: EmbeddingJob) -> SavedShard:
        if next(shards, None) is None:
            raise OSError("no space left")
        return save_shard(rows, job)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the actors, for equal bytes
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr(teachers, "save_shard", fail_at_the_third)
        embed.embed(dataclasses.replace(run_of(root, teacher), embed=inside))
    torch.set_num_threads(threads)
    assert tables.find_manifest(str(root), "regions", "t") is None
    embed.embed(run_of(root, teacher))
    assert "2 of 4 shards done" in capsys.readouterr().out
    assert files_of(root) == files_of(undisturbed)
    assert not list((root / "staging").rglob("*.json"))


def test_shards_of_another_precision_are_not_mixed_in(
    root: Path, teacher: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = EmbedConfig(actors=0, images_per_shard=3)
    run = dataclasses.replace(run_of(root, teacher), embed=dataclasses.replace(inside, bfloat16=True))
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(embed.stores, "publish_embeddings", None)  # as if it were killed here
        embed.embed(run)
    embed.embed(dataclasses.replace(run, embed=inside))
    assert "shards done by an earlier run" not in capsys.readouterr().out


def test_released_weights_are_a_teacher_once_they_are_in_the_storage(tmp_path: Path) -> None:
    small = {"layers": 1, "width": 64, "patch_size": 16, "image_size": 32}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    path = tmp_path / "ViT-for-embed-tests.json"
    path.write_text(json.dumps({"embed_dim": 16, "vision_cfg": small, "text_cfg": text}))
    open_clip.add_model_config(path)
    model = Clip(ClipConfig(name=path.stem))
    torch.save(model.model.state_dict(), tmp_path / "weights.pt")
    run = embed.Run(
        storage=str(tmp_path / "runs"), name="t", pairs="t", teacher=path.stem, pretrained=str(tmp_path / "weights.pt")
    )
    checkpoint = store_released(run.storage, run.teacher, run.pretrained)
    assert checkpoint.startswith(f"{tmp_path}/runs/teachers/{path.stem}-weights-")
    info = embed.read_teacher_info(checkpoint)
    assert (info.id, info.side, info.fit) == (f"clip:{weights_digest(model.model.state_dict())}", 32, "warp")
    written = (Path(checkpoint) / "clip.safetensors").stat()
    assert store_released(run.storage, run.teacher, run.pretrained) == checkpoint
    assert (Path(checkpoint) / "clip.safetensors").stat() == written
    by_uri = store_released(str(tmp_path / "more"), run.teacher, f"file://{run.pretrained}")
    assert Path(by_uri, "clip.safetensors").read_bytes() == Path(checkpoint, "clip.safetensors").read_bytes()
    cut = tmp_path / "ViT-B-32.pt"  # the name of a released file
    cut.write_bytes(b"the first part of it")
    with pytest.raises(InputError, match=r"ViT-B-32.pt: sha256 .*, published 40d3657.*; expected the whole file"):
        store_released(run.storage, run.teacher, str(cut))
    with pytest.raises(InputError, match="unknown to open_clip"):
        store_released(run.storage, "ViT-for-embed-test", run.pretrained)
    with pytest.raises(InputError, match="--pretrained openai: no such file and no weights"):
        embed.embed(dataclasses.replace(run, pretrained="openai"))


def test_bad_requests_say_what_is_wrong(root: Path, teacher: str) -> None:
    with pytest.raises(InputError, match="--teacher"):
        embed.embed(run_of(root, ""))
    with pytest.raises(InputError, match="no CLIP checkpoint"):
        embed.embed(run_of(root, str(root)))
    (root / "clip.json").write_text("{}")
    with pytest.raises(InputError, match=r"clip\.json: not the description of a CLIP checkpoint \(KeyError"):
        embed.embed(run_of(root, str(root)))
    with pytest.raises(InputError, match="boxes/nowhere"):
        embed.embed(dataclasses.replace(run_of(root, teacher), boxes="nowhere"))
    with pytest.raises(InputError, match="pairs/nowhere"):
        embed.embed(dataclasses.replace(run_of(root, teacher), pairs="nowhere"))
    assert not (root / "staging").exists()
    with pytest.raises(InputError, match="--boxes"):
        dataclasses.replace(run_of(root, teacher), boxes="")
    with pytest.raises(InputError, match="max-proposals"):
        dataclasses.replace(run_of(root, teacher), max_proposals=0)
    with pytest.raises(InputError, match="--text"):
        search.Run(name="t", text=" ")
    with pytest.raises(InputError, match="--top"):
        search.Run(name="t", top=0)
    with pytest.raises(InputError, match=r"workflows/embed\.py"):
        search.search(search.Run(storage=str(root), name="t"))


# ----------------------------------------------------------------------------------------------------------- kills

PROGRAM = """
import sys
import ray
from counting_stage import CountingStage
from killing import join_cluster_that_loses_a_node
from data_prep.embeddings.teachers import EmbedConfig
from workflows import embed

storage, teacher, node_dies_after = sys.argv[1], sys.argv[2], float(sys.argv[3])
embed.RegionStage = CountingStage
if node_dies_after:
    cluster = join_cluster_that_loses_a_node(storage, "staging/**/*.json", node_dies_after)
actors = 2 if node_dies_after else 1  # one on each
embed.embed(embed.Run(storage=storage, teacher=teacher, name="t", boxes="t", embed=EmbedConfig(actors=actors)))
ray.shutdown()
"""


@dataclass(frozen=True)
class Job:
    """A finished job."""

    tables: Path
    """A storage with the images alone."""
    teacher: str
    files: dict[str, bytes]
    shards: int
    seconds: float


def start(root: Path, teacher: str, node_dies_after: float = 0.0) -> subprocess.Popen[str]:
    return killing.start(PROGRAM, root, teacher, node_dies_after, COUNTED=str(root / "counted"))


def wait_for_first(job: subprocess.Popen[str], root: Path) -> float:
    while job.poll() is None and not list((root / "staging").rglob("*.json")):
        time.sleep(0.01)
    return time.monotonic()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Job:
    images, root, folder = (tmp_path_factory.mktemp(name) for name in ("tables", "finished", "clip"))
    torch.manual_seed(0)
    save_clip(Clip(ClipConfig()), folder)
    make_tables(images, 640)
    shutil.copytree(images, root, dirs_exist_ok=True)
    job = start(root, str(folder))
    first = wait_for_first(job, root)
    killing.finish(job, 300)
    shards = (root / "counted").read_text().splitlines()
    assert len(shards) == len(set(shards)) == 80
    return Job(images, str(folder), files_of(root), len(shards), time.monotonic() - first)


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(20))
def test_a_kill_at_a_random_point_changes_nothing(finished: Job, tmp_path: Path, trial: int) -> None:
    root, kind = tmp_path / "storage", ("driver", "actor")[trial % 2]
    shutil.copytree(finished.tables, root)
    job = start(root, finished.teacher)
    wait_for_first(job, root)
    time.sleep(random.Random(trial).uniform(0.0, 0.8) * finished.seconds)
    if kind == "actor":
        for pid in children_named(job, "MapWorker"):
            os.kill(pid, signal.SIGKILL)
    else:
        os.killpg(job.pid, signal.SIGKILL)
        job.communicate()
        job = start(root, finished.teacher)
    killing.finish(job, 300)
    again = len((root / "counted").read_text().splitlines()) / finished.shards - 1
    print(f"{kind} killed: {again:.2%} of the shards were embedded again")
    assert files_of(root) == finished.files
    assert again <= MOST_REPEATED
    assert not list(root.rglob("*.tmp"))


@pytest.mark.slow
def test_a_lost_node_changes_nothing(finished: Job, tmp_path: Path) -> None:
    root = tmp_path / "storage"
    shutil.copytree(finished.tables, root)
    assert "node removed" in killing.finish(start(root, finished.teacher, node_dies_after=1.0), 300)
    assert files_of(root) == finished.files
    again = len((root / "counted").read_text().splitlines()) / finished.shards - 1
    assert again <= MOST_REPEATED
