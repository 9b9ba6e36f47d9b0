import numpy as np
import pytest

from data_prep.pictograms.world import (
    COLOURS,
    GLYPHS,
    PICTURES,
    SCENES,
    STYLES,
    Scene,
    Style,
    World,
    boxes_of_masks,
    contact_sheet,
    with_article,
)


def test_a_scene_has_exact_boxes_and_masks() -> None:
    world = World.create(seed=0)
    scene = world.scene(np.random.default_rng(1), SCENES)
    assert scene.pixels.shape == (128, 128, 3)
    assert len(scene.labels) == len(scene.boxes) == len(scene.masks) == len(scene.colours) >= 1
    assert (scene.masks.sum(0) <= 1).all()  # what is hidden belongs to the object on top
    for box, mask in zip(scene.boxes.astype(int), scene.masks, strict=True):
        rows, columns = np.nonzero(mask)
        assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_the_split_is_seeded_and_has_a_long_tail() -> None:
    world = World.create(seed=0)
    assert world == World.create(seed=0)
    assert world.splits != World.create(seed=1).splits
    assert len(world.names) == len(GLYPHS) == 68
    assert [world.splits.count(split) for split in ("base", "novel")] == [51, 17]
    assert [world.frequencies.count(kind) for kind in ("frequent", "common", "rare", "")] == [22, 17, 12, 17]
    probabilities = world.base_probabilities()
    assert probabilities.sum() == pytest.approx(1)
    assert all((p == 0) == (split == "novel") for p, split in zip(probabilities, world.splits, strict=True))
    ratio = probabilities[world.frequencies.index("rare")] / probabilities[world.frequencies.index("frequent")]
    assert ratio == pytest.approx(0.1)


@pytest.mark.parametrize("style", [PICTURES, *STYLES.values()])
def test_the_same_generator_draws_the_same_scene(style: Style) -> None:
    world = World.create(seed=0)
    first, second = (world.scene(np.random.default_rng(3), style) for _ in range(2))
    assert np.array_equal(first.pixels, second.pixels)
    assert np.array_equal(first.boxes, second.boxes)


def test_captions_name_every_object_and_loose_ones_some_of_them() -> None:
    world, rng = World.create(seed=0), np.random.default_rng(0)
    left_out = 0
    for _ in range(50):
        scene = world.scene(rng, SCENES)
        names = [world.names[label] for label in scene.labels]
        strict, loose = world.caption(rng, scene), world.loose_caption(rng, scene)
        assert strict.startswith("a photo of ")
        assert all(name in strict for name in names)
        assert any(name in loose for name in names)
        left_out += sum(name not in loose for name in names)
    assert left_out > 20


def test_scenes_may_be_confined_to_base_categories() -> None:
    world, rng = World.create(seed=0), np.random.default_rng(0)
    for _ in range(20):
        scene = world.scene(rng, SCENES, world.base_probabilities())
        assert all(world.splits[label] == "base" for label in scene.labels)


def test_every_glyph_can_be_drawn_in_every_style() -> None:
    sheet = contact_sheet(World.create(seed=0))
    assert sheet.width == 14 * 84


def test_the_empty_image() -> None:
    nothing = np.zeros((0, 8, 8), bool)
    assert boxes_of_masks(nothing).shape == (0, 4)
    scene = Scene(np.zeros((8, 8, 3), np.uint8), boxes_of_masks(nothing), nothing, np.zeros(0, np.int64), ())
    world, rng = World.create(seed=0), np.random.default_rng(0)
    assert world.caption(rng, scene) == "a photo of nothing"
    assert world.loose_caption(rng, scene).startswith("nothing ")


def test_articles() -> None:
    assert [with_article(name) for name in ("anchor", "red anchor", "umbrella")] == [
        "an anchor", "a red anchor", "an umbrella",
    ]  # fmt: skip
    assert len(COLOURS) == 8
