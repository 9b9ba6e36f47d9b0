from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch
from PIL import Image

from data_prep import parts, tables
from data_prep.embeddings import teachers
from data_prep.embeddings.crops import CropConfig, Fit, crop_windows
from data_prep.embeddings.teachers import EmbedConfig, PairStage, RegionStage, Teacher, embed_regions
from data_prep.pairs import shards
from ovd_models.checkpoints import save_checkpoint
from ovd_models.clip.model import Clip, ClipConfig, ClipTextEncoder, load_clip, save_clip
from ovd_models.codet.model import CoDet, CoDetConfig
from ovd_models.errors import InputError
from ovd_models.predictors import load


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    save_clip(Clip(ClipConfig()), folder)
    return str(folder)


@pytest.fixture(scope="module")
def teacher(checkpoint: str) -> Teacher:
    return Teacher(checkpoint, EmbedConfig(batch_size=5))


def noise(width: int, height: int, seed: int) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


IMAGES = [noise(120, 90, 0), noise(64, 64, 1), noise(50, 130, 2)]
PIXELS = [np.asarray(image) for image in IMAGES]
BOXES: list[npt.NDArray[np.float32]] = [
    np.array([[10, 10, 60, 50], [0, 0, 120, 90], [30.5, 20.2, 33.1, 80], [7, 7, 7, 7]], np.float32),
    np.empty((0, 4), np.float32),
    np.array([[0, 0, 50, 130], [20, 60, 45, 70]], np.float32),
]


def plain_loop(checkpoint: str, image: Image.Image, boxes: npt.NDArray[np.float32], crops: CropConfig) -> torch.Tensor:
    """PIL crop, preprocess, encode: one box at a time."""
    clip, _ = load_clip(checkpoint)
    side = clip.config.image_size
    margin = teachers.margin_of(clip.normalise.mean)
    rows = []
    for box in boxes:
        total = torch.zeros(clip.config.embed_dim)
        for scale in crops.scales:
            crop = image.crop(tuple(crop_windows(box[None], scale, *image.size)[0].tolist()))
            short, long = min(crop.size), max(crop.size)
            if crops.fit == "warp":
                crop = crop.resize((side, side), Image.Resampling.BICUBIC)
            elif crops.fit == "pad":
                fitted = Image.new("RGB", (side, side), margin)
                size = (max(1, round(side * crop.width / long)), max(1, round(side * crop.height / long)))
                fitted.paste(
                    crop.resize(size, Image.Resampling.BICUBIC), ((side - size[0]) // 2, (side - size[1]) // 2)
                )
                crop = fitted
            else:
                crop = crop.resize((side * crop.width // short, side * crop.height // short), Image.Resampling.BICUBIC)
                x, y = round((crop.width - side) / 2), round((crop.height - side) / 2)
                crop = crop.crop((x, y, x + side, y + side))
            pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1)[None]
            with torch.no_grad():
                total += clip.model.encode_image(clip.normalise(pixels.float() / 255))[0]
        rows.append(total / total.norm())
    return torch.stack(rows) if rows else torch.empty(0, clip.config.embed_dim)


@pytest.mark.parametrize("fit", ["warp", "pad", "centre"])
def test_batched_crops_are_those_of_the_plain_loop(fit: Fit, checkpoint: str, teacher: Teacher) -> None:
    crops = CropConfig(fit=fit)
    found = embed_regions(teacher, PIXELS, BOXES, crops)
    for image, boxes, rows in zip(IMAGES, BOXES, found, strict=True):
        assert rows.dtype == np.dtype("<f2")
        expected = plain_loop(checkpoint, image, boxes, crops).numpy()
        assert rows.shape == expected.shape
        assert ((rows.astype(np.float32) * expected).sum(1) > 1 - 1e-3).all()
        assert np.abs(rows - expected).max(initial=0) < 2e-3


def test_an_image_without_boxes_gives_no_rows(teacher: Teacher) -> None:
    assert [rows.shape for rows in embed_regions(teacher, PIXELS[:1], BOXES[1:2], CropConfig())] == [(0, 128)]
    assert embed_regions(teacher, [], [], CropConfig()) == []


def test_bfloat16_rows_are_nearly_those_of_float32(checkpoint: str, teacher: Teacher) -> None:
    half = Teacher(checkpoint, EmbedConfig(bfloat16=True))
    pairs = zip(*(embed_regions(each, PIXELS, BOXES, CropConfig()) for each in (teacher, half)), strict=True)
    cosines = np.concatenate([(a.astype(np.float32) * b).sum(1) for a, b in pairs])
    assert 1 - 1e-3 < cosines.min() < 1 - 1e-7


def test_rows_do_not_depend_on_the_batches(checkpoint: str, teacher: Teacher) -> None:
    wide = Teacher(checkpoint, EmbedConfig(batch_size=64, threads=3))
    for narrow, broad in zip(
        embed_regions(teacher, PIXELS, BOXES, CropConfig()),
        embed_regions(wide, PIXELS, BOXES, CropConfig()),
        strict=True,
    ):
        assert np.abs(narrow.astype(np.float32) - broad).max(initial=0) < 1e-3


def test_texts_keep_their_order_whatever_their_length(teacher: Teacher) -> None:
    texts = ["a cat", "a photo of a very long red umbrella under an even longer sky", "", "dogs and cats", "x"] * 3
    found = teacher.embed_texts(texts)
    with torch.no_grad():
        expected = torch.cat([teacher.clip.encode_tokens(teacher.clip.tokenize([text])) for text in texts]).numpy()
    assert np.abs(found - expected).max() < 1e-5
    assert teacher.embed_texts([]).shape == (0, 128)


def test_a_repeated_text_is_embedded_once(teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    encode = teacher.clip.encode_tokens
    monkeypatch.setattr(teacher.clip, "encode_tokens", lambda tokens: (seen.append(len(tokens)), encode(tokens))[1])
    found = teacher.embed_texts(["cat", "dog", "cat", "cat", "dog"])
    assert sum(seen) == 2
    assert np.array_equal(found[[0, 1]][[0, 1, 0, 0, 1]], found)


def test_work_ahead_keeps_its_order_and_its_bound() -> None:
    running: list[int] = []
    seen: list[int] = []

    def work(number: int) -> npt.NDArray[np.uint8]:
        running.append(number)
        return np.full(1, number, np.uint8)

    with ThreadPoolExecutor(4) as pool:
        for found in parts.ahead((partial(work, number) for number in range(20)), pool, 3):
            seen.append(int(found[0]))
            assert len(running) <= len(seen) + 3
    assert seen == list(range(20))


# ------------------------------------------------------------------------------------------------------- shards


def publish_boxes(storage: Path, sizes: Sequence[tuple[int, int]], *, per_file: int = 100) -> None:
    entries = []
    for start in range(0, len(sizes), per_file):
        rows = [
            {"image_id": f"{start + number:02d}", "width": width, "height": height}
            for number, (width, height) in enumerate(sizes[start : start + per_file])
        ]
        table = pa.Table.from_pylist(rows, schema=tables.SCHEMAS["boxes"])
        entries.append(tables.write_part(str(storage), "boxes", "t", f"part-{start:05d}.parquet", table))
    tables.publish(str(storage), "boxes", "t", entries, producer="test", config_hash="0")


def extents(storage: Path, images: int) -> list[tuple[str, int, int]]:
    found = teachers.cut_shards(str(storage), "boxes", "t", images, prefix="a-")
    return [(shard.name, shard.start, shard.stop) for shard in found]


def test_shards_hold_few_images_of_one_file(tmp_path: Path) -> None:
    publish_boxes(tmp_path, [(64, 64)] * 7, per_file=5)
    assert extents(tmp_path, 3) == [("a-000000", 0, 3), ("a-000001", 3, 5), ("a-000002", 0, 2)]


def test_shards_hold_few_pixels_and_a_huge_image_stands_alone(tmp_path: Path) -> None:
    publish_boxes(tmp_path, [(64, 64), (10_000, 10_000), (4096, 4096), (4096, 4096), (8, 8)])
    assert [(start, stop) for _, start, stop in extents(tmp_path, 100)] == [(0, 1), (1, 2), (2, 4), (4, 5)]


def test_a_table_without_images_has_no_shards(tmp_path: Path) -> None:
    publish_boxes(tmp_path, [])
    assert extents(tmp_path, 3) == []


@pytest.mark.parametrize("name", ["threads", "batch_size", "images_per_shard"])
def test_numbers_below_one_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=name.replace("_", "-")):
        replace(EmbedConfig(), **{name: 0})


def test_members_of_tars_are_read_together(tmp_path: Path) -> None:
    contents = [bytes([number]) * (600 + number) for number in range(6)]
    rows = []
    for shard, part in (("b.tar", contents[:4]), ("c.tar", contents[4:])):
        tar, offsets = shards.pack((f"{number}", content, "caption") for number, content in enumerate(part))
        (tmp_path / shard).write_bytes(tar)
        rows += [
            {"shard": shard, "offset": offset, "size": len(content)}
            for offset, content in zip(offsets, part, strict=True)
        ]
    order = [3, 0, 1, 4, 5, 2]
    found = list(teachers.read_members(pa.Table.from_pylist([rows[number] for number in order]), str(tmp_path)))
    assert [content for content, _ in found] == [contents[number] for number in order]
    assert list(teachers.read_members(pa.table({"shard": [], "offset": [], "size": []}), str(tmp_path))) == []


# ------------------------------------------------------------------------------------------------------- stages


PICTURES = pa.table(
    {
        "shard": ["s"] * 3,
        "image_id": ["a", "b", "c"],
        "boxes": pa.array([boxes.tolist() for boxes in BOXES], pa.list_(pa.list_(pa.float32()))),
        "pixels": pa.array([image.tobytes() for image in IMAGES], pa.large_binary()),
        "width": [image.width for image in IMAGES],
        "height": [image.height for image in IMAGES],
        "unreadable": pa.nulls(3, pa.string()),
    }
)


def test_region_stage_gives_rows_of_the_table(checkpoint: str) -> None:
    found = RegionStage(checkpoint, EmbedConfig(), CropConfig())(PICTURES)
    assert found["count"].to_pylist() == [4, 0, 2]
    assert found["scores"].to_pylist() == [[1.0] * 4, [], [1.0] * 2]
    expected = embed_regions(Teacher(checkpoint, EmbedConfig()), PIXELS, BOXES, CropConfig())
    assert found["file"].to_pylist() == [entry.tobytes() for entry in expected]


def test_proposals_of_a_detector_are_embedded(checkpoint: str, tmp_path: Path) -> None:
    clip, teacher_id = load_clip(checkpoint)
    torch.manual_seed(0)
    encoder = ClipTextEncoder(clip.config, clip.model.text, teacher_id)
    save_checkpoint(CoDet(CoDetConfig()), encoder, tmp_path, splits={}, run={})
    found = RegionStage(checkpoint, EmbedConfig(), CropConfig(), str(tmp_path), max_proposals=7)(PICTURES)
    detector = load(tmp_path)
    for image, row in zip(IMAGES, found.to_pylist(), strict=True):
        ((boxes, scores),) = detector.propose([image], 7)
        assert 1 <= row["count"] == len(boxes) <= 7
        assert np.array_equal(np.array(row["boxes"], np.float32), boxes.numpy())
        assert row["scores"] == scores.tolist() == sorted(row["scores"], reverse=True)
        assert (boxes >= 0).all()
        assert (boxes <= torch.tensor(image.size).repeat(2)).all()
        (expected,) = embed_regions(
            Teacher(checkpoint, EmbedConfig()), [np.asarray(image)], [boxes.numpy()], CropConfig()
        )
        assert np.abs(np.frombuffer(row["file"], "<f2").reshape(-1, 128) - expected).max() < 1e-3


def test_pair_stage_embeds_images_and_captions(checkpoint: str, teacher: Teacher) -> None:
    pixels = np.stack([np.asarray(image.resize((64, 64))) for image in IMAGES])
    rows = pa.table(
        {
            "shard": ["s"] * 3,
            "image_id": ["a", "b", "c"],
            "caption": ["a cat", "two dogs under a tree", ""],
            "pixels": pa.array([entry.tobytes() for entry in pixels], pa.large_binary()),
            "unreadable": pa.nulls(3, pa.string()),
        }
    )
    found = PairStage(checkpoint, EmbedConfig(batch_size=2))(rows)
    images = np.stack([np.frombuffer(entry, "<f2") for entry in found["file"].to_pylist()]).astype(np.float32)
    texts = np.stack([np.frombuffer(entry, "<f2") for entry in found["text_file"].to_pylist()]).astype(np.float32)
    with torch.no_grad():
        expected = teacher.clip.encode_images(torch.from_numpy(pixels).permute(0, 3, 1, 2)).numpy()
    assert np.abs(images - expected).max() < 1e-3
    assert np.abs(texts - teacher.embed_texts(rows["caption"].to_pylist())).max() < 1e-3
    assert found["count"].to_pylist() == [1, 1, 1]
