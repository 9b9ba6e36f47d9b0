import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from data_prep import tables
from data_prep.pictograms.world import World
from ovd_models.metrics.matching import draw_images
from workflows.studies import clip_towers
from workflows.studies.claims import clip_parts, codet_parts, sam_parts, sampled, transfer_parts, vild_parts
from workflows.studies.claims.parts import settings_of


def test_skill_is_zero_for_a_guess_and_one_for_no_error() -> None:
    assert clip_parts.answer([1, 0], 2)["skill"] == 0
    assert clip_parts.answer([1, 1], 8)["skill"] == 1
    found = clip_parts.answer([1, 1, 1, 0], 2)
    assert (found["accuracy"], found["chance"], found["skill"]) == pytest.approx((0.75, 0.5, 0.5))


def test_a_ratio_is_that_of_the_sums_in_every_draw() -> None:
    found = sampled.ratio([1, 0, 3], [1, 2, 3])
    assert found == pytest.approx(4 / 6)
    for value, weight in zip(found.draws, draw_images(3, len(found.draws)), strict=True):
        assert value == pytest.approx((weight @ [1, 0, 3]) / (weight @ [1, 2, 3]))
    assert sampled.ratio([1, 1]).draws.tolist() == [1.0] * len(found.draws)
    assert sampled.mean_of_images([np.array([1.0, 0.0]), np.array([0.5])]) == pytest.approx(0.5)


def test_base_and_novel_pictures_are_counted_apart() -> None:
    world = World.create(0)
    labels = np.arange(68)
    novel = np.array([world.splits[label] == "novel" for label in labels])
    found = clip_parts.top1(novel.astype(float), labels, world)
    assert (found["top1_base"], found["top1_novel"], found["top1"]) == (0, 1, pytest.approx(novel.mean()))


def test_a_vit_gets_as_many_operations_as_the_convnet() -> None:
    default = clip_towers.tower_run("flat convnet", 1_600)
    assert default.optimisation.steps == 1_600
    other = clip_towers.tower_run("ViT", 1_600)
    total = [clip_towers.multiply_adds(run.model) * run.optimisation.steps for run in (default, other)]
    assert total[1] == pytest.approx(total[0], rel=0.01)


def test_a_picture_of_rows_has_one_below_the_other() -> None:
    rows = [("one", Image.new("RGB", (1800, 400), "red")), ("two", Image.new("RGB", (1800, 400), "blue"))]
    picture = codet_parts.stack_rows(rows)
    assert picture.size == (900, 2 * (200 + 24))
    assert picture.getpixel((5, 100)) == (255, 0, 0)
    assert picture.getpixel((5, 300)) == (0, 0, 255)


def test_changes_leave_the_objects_pixels_or_cross_them_out() -> None:
    pixels, labels, colours = clip_parts.draw_pairs(World.create(0), 3)
    assert (pixels.shape, labels.tolist(), len(colours)) == ((3, 64, 64, 3), [0, 1, 2], 3)
    first = pixels[0]
    assert (clip_parts.CHANGES["upside-down"](first)[0, 0] == first[-1, -1]).all()
    assert (clip_parts.CHANGES["rotated"](first)[0, 0] == first[0, -1]).all()
    crossed = clip_parts.crossed_out(first)
    assert not crossed[5, 5].any() and not crossed[5, 58].any()
    assert (crossed[5, 30] == first[5, 30]).all()


def test_many_names_start_with_the_worlds_and_repeat_none() -> None:
    world = World.create(0)
    names = clip_parts.many_names(world.names, 22_000)
    assert names[:68] == list(world.names)
    assert len(set(names)) == 22_000
    assert "white chess queen" in names[:8_000]  # another glyph of the font


def test_random_embeddings_have_the_mean_and_covariance_of_the_names() -> None:
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((6, 6)) * np.array([1, 0.5, 0.2, 0.1, 0.1, 0.1])
    rows = (np.array([3, 1, 0, 0, 0, 0]) + rng.standard_normal((500, 6)) @ mix * 0.1).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    drawn = codet_parts.random_like(rows, 20_000, seed=3)
    assert np.linalg.norm(drawn, axis=1) == pytest.approx(1.0, abs=1e-5)
    assert np.abs(drawn.mean(0) - rows.mean(0)).max() < 0.02
    assert np.abs(np.cov(drawn.T) - np.cov(rows.T)).max() < 0.01
    assert codet_parts.random_like(rows, 5, seed=3) == pytest.approx(drawn[:5])
    assert not np.allclose(codet_parts.random_like(rows, 5, seed=4), drawn[:5])


def test_few_boxes_of_novel_names_are_kept_and_all_of_base_ones() -> None:
    every = [[1, 2, 2], [2, 1], [], [2, 3]]
    box = [0.0, 0.0, 1.0, 1.0]
    rows = [
        {name: [value] * len(ids) for name, value in (("boxes", box), ("iscrowd", False), ("masks", ""))}
        for ids in every
    ]
    table = pa.Table.from_pylist(
        [row | {"category_ids": ids} for row, ids in zip(rows, every, strict=True)], schema=tables.SCHEMAS["boxes"]
    )
    categories = [{"category_id": key, "split": split} for key, split in ((1, "base"), (2, "novel"), (3, "novel"))]
    kept = vild_parts.keep_few(table, categories, 2)
    assert kept["category_ids"].to_pylist() == [[1, 2, 2], [1], [], [3]]
    assert [len(entry) for entry in kept["boxes"].to_pylist()] == [3, 1, 0, 1]


def test_parts_share_the_trainings_of_their_method() -> None:
    """Equal settings give equal names of results, so a later claim reuses what an earlier one trained."""
    runs = [part.settings.training for part in (vild_parts.DISTILLATION, transfer_parts.TRANSFER, vild_parts.CROPS)]
    assert runs[0] == runs[1] == runs[2]
    assert codet_parts.SHARED.settings.training == codet_parts.GROUPS_AGAINST_NAMES.settings.training
    assert sam_parts.NAIVE.settings.training.sam_stage == sam_parts.CLICKS.settings.training.sam_stage
    assert settings_of(vild_parts.CROPS)["training.detector_stage.steps"] == 400
