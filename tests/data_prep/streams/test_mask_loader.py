import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from data_prep import storage, tables
from data_prep.boxes import annotations
from data_prep.embeddings import features
from data_prep.pictograms.world import World
from data_prep.streams.augmentation import Augmentation
from data_prep.streams.collate import FeatureCollate, MaskCollate
from data_prep.streams.mask_loader import feature_loader, mask_loader
from ovd_models.checkpoints import load_model, sam_id, save_checkpoint
from ovd_models.errors import InputError
from ovd_models.sam.model import SamConfig, SamModel, fit_image
from ovd_models.segments import boxes_of

SAM = SamConfig(image_size=64, patch_size=16, width=16, depth=1, heads=2, window=4, global_blocks=(), prompt_width=16)


@pytest.fixture
def drawn(ray_cluster: None, tmp_path: Path) -> str:
    """Seven scenes with masks."""
    rows = annotations.draw_scenes(str(tmp_path), "s-train", World.create(0), range(7), seed=3, base_only=True)
    table = pa.Table.from_pylist(list(rows), schema=tables.SCHEMAS["boxes"])
    entry = tables.write_part(str(tmp_path), "boxes", "s-train", "part-00000.parquet", table)
    tables.publish(str(tmp_path), "boxes", "s-train", [entry], producer="test", config_hash="")
    return str(tmp_path)


@pytest.mark.ray
def test_masks_come_with_their_images_and_labels(drawn: str) -> None:
    rows = tables.read_table(drawn, "boxes", "s-train").to_pylist()
    known = sorted({key for row in rows for key in row["category_ids"]})[1:]  # without the first category
    load = mask_loader(drawn, "s-train", known, seed=0)
    batch = MaskCollate()(load(np.arange(7)))
    by_boxes = {tuple(map(tuple, row["boxes"])): row for row in rows}
    for image, masks, labels in zip(batch.images, batch.masks, batch.labels, strict=True):
        assert (image.shape, image.dtype) == ((3, 128, 128), torch.uint8)
        row = by_boxes[tuple(map(tuple, boxes_of(masks).tolist()))]
        expected = [known.index(key) if key in known else -1 for key in row["category_ids"]]
        assert labels.tolist() == expected


@pytest.mark.ray
def test_a_mirrored_image_has_mirrored_masks(drawn: str) -> None:
    plain = mask_loader(drawn, "s-train", [], seed=0)
    always = dataclasses.replace(plain, augmentation=Augmentation(flip_probability=1.0))
    one, two = (MaskCollate()(load(np.arange(3))) for load in (plain, always))
    for image, other in zip(one.images, two.images, strict=True):
        assert torch.equal(image.flip(2), other)
    for masks, other in zip(one.masks, two.masks, strict=True):
        assert torch.equal(masks.flip(2), other)


@pytest.mark.ray
def test_jitter_moves_masks_with_the_pixels_and_drops_small_ones(drawn: str) -> None:
    setting = Augmentation(flip_probability=0.5, side=96, scales=(0.9, 2.0))
    load = mask_loader(drawn, "s-train", [], seed=0, augmentation=setting)
    rows = load(np.arange(14))
    batch = MaskCollate()(rows)
    assert load(np.arange(5, 14)).equals(rows.slice(5))  # a function of seed and position
    assert not load(np.arange(7)).select(["image"]).equals(load(np.arange(7, 14)).select(["image"]))
    areas = []
    for image, masks, labels in zip(batch.images, batch.masks, batch.labels, strict=True):
        assert image.shape == (3, 96, 96)
        assert (masks.shape, len(labels)) == ((len(labels), 96, 96), len(masks))
        areas += masks.flatten(1).sum(1).tolist()
    assert min(areas) < 200 < max(areas)
    larger = dataclasses.replace(load, augmentation=dataclasses.replace(setting, min_mask_area=200))
    kept = MaskCollate()(larger(np.arange(14)))
    assert all(torch.equal(one, two) for one, two in zip(kept.images, batch.images, strict=True))
    left = [int(area) for masks in kept.masks for area in masks.flatten(1).sum(1)]
    assert left == [area for area in areas if area >= 200]
    assert [len(labels) for labels in kept.labels] == [len(masks) for masks in kept.masks]


@pytest.mark.ray
def test_images_come_in_the_models_size_as_sam_resizes_them_and_masks_in_their_own(drawn: str) -> None:
    plain, fitted = (
        MaskCollate()(mask_loader(drawn, "s-train", [], seed=0, side=side)(np.arange(3))) for side in (0, 64)
    )
    for image, small in zip(plain.images, fitted.images, strict=True):
        assert torch.equal(fit_image(image, 64)[0], small)
    assert all(torch.equal(one, two) for one, two in zip(plain.masks, fitted.masks, strict=True))


@pytest.mark.ray
def test_a_set_without_masks_is_refused(drawn: str) -> None:
    rows = tables.read_table(drawn, "boxes", "s-train").to_pylist()
    for row in rows:
        row["masks"] = ["" for _ in row["masks"]]
    entry = tables.write_part(
        drawn, "boxes", "bare", "part-00000.parquet", pa.Table.from_pylist(rows, schema=tables.SCHEMAS["boxes"])
    )
    tables.publish(drawn, "boxes", "bare", [entry], producer="test", config_hash="")
    with pytest.raises(InputError, match="boxes/bare: no masks"):
        mask_loader(drawn, "bare", [], seed=0)


@pytest.mark.ray
def test_the_cache_equals_sams_embeddings_and_resumes_by_shard(drawn: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = str(tmp_path / "sam")
    sam = SamModel(SAM)
    save_checkpoint(sam, None, folder, splits={}, run={})
    teacher = sam_id(sam)
    name = features.cache_name(drawn, "s-train", teacher)
    rows = tables.read_table(drawn, "boxes", "s-train", ["image_id", "uri"])
    # an interrupted run left one whole shard, and another without its receipt; one before it had shards of another size
    features.FeatureWriter(drawn, name, rows, folder, 2, False)(0)
    worker = features.FeatureWriter(drawn, name, rows, folder, 3, False)
    worker(1)
    worker(2)
    Path(features.receipt_uri(drawn, name, features.part_name(3, 2))).unlink()
    whole = Path(drawn) / "features" / name / "part-3-00001.f16"
    before = whole.stat().st_mtime_ns
    manifest = features.cache_features(drawn, "s-train", folder, teacher, SAM, rows_per_shard=3, workers=1)
    assert whole.stat().st_mtime_ns == before
    assert (manifest.rows, manifest.details["shape"], manifest.details["teacher"]) == (7, [16, 4, 4], teacher)

    load = feature_loader(drawn, "s-train", name, teacher, seed=0)
    batch = FeatureCollate(load.shape)(load(np.arange(7)))
    model = load_model(folder, SamModel)
    assert sam_id(model) == teacher
    assert batch.features.dtype == torch.float16
    for image, feature in zip(batch.images, batch.features, strict=True):
        assert torch.equal(model.encode(image).embedding[0].half(), feature)
    assert storage.exists(storage.join(drawn, "features", name, "manifest.json"))
    with pytest.raises(InputError, match="expected sam:other"):
        feature_loader(drawn, "s-train", name, "sam:other", seed=0)
    with pytest.raises(InputError, match="no such table"):
        feature_loader(drawn, "s-train", "elsewhere", teacher, seed=0)


@pytest.mark.ray
def test_an_unreadable_image_is_replaced_with_its_masks(drawn: str) -> None:
    rows = tables.read_table(drawn, "boxes", "s-train").to_pylist()
    Path(drawn, rows[2]["uri"]).write_bytes(b"no image")
    load = mask_loader(drawn, "s-train", [], seed=0, augmentation=Augmentation(flip_probability=0.5))
    loaded = load(np.arange(14))
    batch = MaskCollate()(loaded)
    assert len(batch.unreadable) == 2
    assert all(rows[2]["uri"] in reason and "not an image" in reason for reason in batch.unreadable)
    boxes = {tuple(map(tuple, boxes_of(masks).tolist())) for masks in batch.masks}
    assert tuple(map(tuple, rows[2]["boxes"])) not in boxes
    assert load(np.arange(4, 14)).equals(loaded.slice(4))


@pytest.mark.ray
def test_an_image_that_cannot_be_read_is_not_cached(
    drawn: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tables.read_table(drawn, "boxes", "s-train").to_pylist()
    Path(drawn, rows[2]["uri"]).write_bytes(b"no image")
    torch.manual_seed(0)
    sam = SamModel(SAM)
    folder, teacher = str(tmp_path / "sam"), sam_id(sam)
    save_checkpoint(sam, None, tmp_path / "sam", splits={}, run={})
    manifest = features.cache_features(drawn, "s-train", folder, teacher, SAM, rows_per_shard=3, workers=0)
    assert (manifest.rows, manifest.details["unreadable"]) == (6, [rows[2]["image_id"]])
    assert "1 of 7 images cannot be read, such as " in capsys.readouterr().out
    load = feature_loader(drawn, "s-train", manifest.name, teacher, seed=0)
    batch = FeatureCollate(load.shape)(load(np.arange(6)))
    for image, feature in zip(batch.images, batch.features, strict=True):
        assert torch.equal(load_model(folder, SamModel).encode(image).embedding[0].half(), feature)
    for row in rows:
        Path(drawn, row["uri"]).write_bytes(b"no image")
    storage.remove_folder(storage.join(drawn, "features"))
    with pytest.raises(InputError, match=r"boxes/s-train: 7 of 7 images cannot be read, such as "):
        features.cache_features(drawn, "s-train", folder, teacher, SAM, rows_per_shard=2, workers=0)
