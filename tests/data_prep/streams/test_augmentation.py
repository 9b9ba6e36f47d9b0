import dataclasses

import cv2
import numpy as np
import pytest
from faster_coco_eval import mask as rle

from data_prep.streams.augmentation import (
    FILL,
    AnnotatedImage,
    Augmentation,
    ObjectMask,
    augment,
    flip_boxes,
    mask_row,
    mirror,
    move_boxes,
    nearest,
)
from data_prep.streams.collate import paste_masks
from ovd_models.errors import InputError


def encode(mask: np.ndarray) -> ObjectMask:
    counts = rle.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    return ObjectMask.decode(counts, *mask.shape)


def decode(mask: ObjectMask, height: int, width: int) -> np.ndarray:
    row = mask_row([mask])
    pasted = paste_masks(row["masks"], row["mask_boxes"], (height, width))  # type: ignore[arg-type]
    return pasted.numpy()[0]


def picture(height: int = 40, width: int = 60, box: tuple[int, int, int, int] = (10, 5, 30, 25)) -> AnnotatedImage:
    """A bright object on black with its box, its mask and a stored region at the same place."""
    x0, y0, x1, y1 = box
    mask = np.zeros((height, width), bool)
    mask[y0:y1, x0:x1] = True
    boxes = np.array([box], np.float32)
    pixels = np.where(mask[..., None], 255, 0).repeat(3, -1).astype(np.uint8)
    return AnnotatedImage(pixels, boxes, np.array([4]), [encode(mask)], boxes.copy(), np.ones(1, np.bool_))


def test_flipping_by_hand_and_twice() -> None:
    boxes = np.array([[1, 2, 4, 8], [0, 0, 10, 1]], np.float32)
    assert flip_boxes(boxes, 10).tolist() == [[6, 2, 9, 8], [0, 0, 10, 1]]
    assert np.array_equal(flip_boxes(flip_boxes(boxes, 10), 10), boxes)
    assert flip_boxes(np.zeros((0, 4), np.float32), 10).shape == (0, 4)


def test_stored_regions_are_flipped_once_with_the_pixels() -> None:
    # ViLD's released parser draws a second flip that leaves the regions where they were.
    for seed in range(20):
        image = picture()
        augmented = augment(image, Augmentation(flip_probability=0.5), np.random.default_rng(seed))
        assert np.array_equal(augmented.regions, augmented.boxes)
        x0, y0, x1, y1 = augmented.regions[0].astype(int)
        assert bool((augmented.pixels[y0:y1, x0:x1] == 255).all())
        assert int((augmented.pixels == 255).sum()) == 20 * 20 * 3
        assert np.array_equal(decode(augmented.masks[0], 40, 60), augmented.pixels[..., 0] == 255)


def test_mirrored_twice_is_the_original() -> None:
    image = picture()
    twice = mirror(mirror(image))
    assert np.array_equal(twice.pixels, image.pixels)
    assert np.array_equal(twice.regions, image.regions)
    assert np.array_equal(decode(twice.masks[0], 40, 60), decode(image.masks[0], 40, 60))


@pytest.mark.parametrize("seed", range(25))
def test_jitter_moves_pixels_boxes_masks_and_regions_together(seed: int) -> None:
    setting = Augmentation(flip_probability=0.5, side=64, scales=(0.4, 2.0))
    augmented = augment(picture(), setting, np.random.default_rng(seed))
    assert augmented.pixels.shape == (64, 64, 3)
    if not len(augmented.boxes):
        return
    assert np.allclose(augmented.boxes[0], augmented.regions[0])
    bright = augmented.pixels.min(-1) > 200
    ys, xs = np.nonzero(bright)
    extent = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
    assert np.abs(extent - augmented.boxes[0]).max() <= 2.5  # from interpolation at the edge
    mask = decode(augmented.masks[0], 64, 64)
    assert (mask & bright).sum() / (mask | bright).sum() > 0.8
    assert bool((augmented.boxes >= 0).all() and (augmented.boxes <= 64).all())


def test_objects_with_small_masks_are_left_out() -> None:
    masks = [np.zeros((8, 8), bool) for _ in range(3)]
    masks[0][:4, :8], masks[1][:4, :7], masks[2][2:8, 2:8] = True, True, True  # 32, 28 and 36 pixels
    boxes = np.array([[0, 0, 8, 4], [0, 0, 7, 4], [2, 2, 8, 8]], np.float32)
    image = dataclasses.replace(picture(8, 8), boxes=boxes, labels=np.arange(3), masks=[encode(m) for m in masks])
    found = augment(image, Augmentation(min_mask_area=32), np.random.default_rng(0))
    assert (found.labels.tolist(), found.boxes.tolist()) == ([0, 2], boxes[[0, 2]].tolist())
    assert [decode(counts, 8, 8).sum() for counts in found.masks] == [32, 36]
    nothing = augment(image, Augmentation(min_mask_area=37), np.random.default_rng(0))
    assert (nothing.boxes.shape, list(nothing.masks)) == ((0, 4), [])


def test_a_region_out_of_view_is_not_valid() -> None:
    # ViLD's released code clips such boxes to the border, where they may stay valid.
    setting = Augmentation(side=64, scales=(2.0, 2.0))
    image = dataclasses.replace(
        picture(),
        regions=np.array([[0, 0, 20, 20], [40, 20, 60, 40], [0, 0, 60, 40]], np.float32),
        valid=np.ones(3, bool),
    )
    states = set()
    for seed in range(60):
        augmented = augment(image, setting, np.random.default_rng(seed))
        area = (augmented.regions[:, 2] - augmented.regions[:, 0]) * (augmented.regions[:, 3] - augmented.regions[:, 1])
        assert not augmented.valid[area <= 0].any()
        assert not augmented.valid[2]  # 32 of 60 by 32 of 40 pixels are in view: less than half
        states.add(tuple(augmented.valid[:2].tolist()))
    assert (False, False) in states
    assert any(state[0] for state in states)
    assert any(state[1] for state in states)


def test_padding_never_becomes_valid() -> None:
    image = dataclasses.replace(picture(), regions=np.zeros((2, 4), np.float32), valid=np.zeros(2, np.bool_))
    for setting in (Augmentation(flip_probability=1.0), Augmentation(side=32), Augmentation(side=32, min_visible=0.0)):
        assert not augment(image, setting, np.random.default_rng(0)).valid.any()


def test_annotated_boxes_that_leave_the_image_are_left_out_with_their_labels_and_masks() -> None:
    setting = Augmentation(side=64, scales=(2.0, 2.0))
    image = picture(box=(0, 0, 4, 4))
    counts = set()
    for seed in range(40):
        augmented = augment(image, setting, np.random.default_rng(seed))
        counts.add(len(augmented.boxes))
        assert len(augmented.boxes) == len(augmented.labels) == len(augmented.masks)
    assert counts == {0, 1}


def test_visible_shares_by_hand() -> None:
    # The part from (10, 0), doubled, 20 x 20: the first box loses its left half, the second one everything.
    boxes = np.array([[5, 2, 15, 6], [0, 0, 9, 9], [12, 1, 14, 3]], np.float32)
    moved, visible = move_boxes(boxes, (10, 0), np.array([2, 2], np.float32), (20, 20))
    assert moved.tolist() == [[0, 4, 10, 12], [0, 0, 0, 18], [4, 2, 8, 6]]
    assert visible.tolist() == [0.5, 0.0, 1.0]


def test_small_images_are_padded_with_the_mean_colour() -> None:
    augmented = augment(picture(), Augmentation(side=64, scales=(0.5, 0.5)), np.random.default_rng(0))
    assert augmented.pixels[-1, -1].tolist() == list(FILL)
    assert augmented.pixels[20, 40].tolist() == list(FILL)  # 60 x 40 became 32 x 21
    assert augmented.pixels[0, 0].tolist() == [0, 0, 0]


def test_without_augmentation_the_image_is_unchanged() -> None:
    image = picture()
    assert augment(image, Augmentation(), np.random.default_rng(0)) is image


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"flip_probability": 1.5}, "flip_probability 1.5"),
        ({"scales": (2.0, 1.0)}, r"scales \(2.0, 1.0\)"),
        ({"scales": (0.0, 1.0)}, "a range above 0"),
        ({"side": -1}, "side -1"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Augmentation(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(12))
def test_a_mask_moves_as_the_whole_image_would(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((37, 53)) < 0.3
    mask[:, : rng.integers(20)] = mask[: rng.integers(20)] = False
    assert np.array_equal(decode(encode(mask), 37, 53), mask)
    assert np.array_equal(decode(encode(mask).mirrored(53), 37, 53), mask[:, ::-1])
    rows, columns = np.sort(rng.integers(0, 37, 50)), np.sort(rng.integers(0, 53, 20))
    assert np.array_equal(decode(encode(mask).sampled(rows, columns), 50, 20), mask[rows][:, columns])


@pytest.mark.parametrize("old", [1, 7, 512])
@pytest.mark.parametrize("new", [1, 3, 512, 1024])
def test_masks_take_the_pixels_that_opencv_takes(old: int, new: int) -> None:
    row = np.arange(old, dtype=np.float32)[None]
    assert nearest(old, new).tolist() == cv2.resize(row, (new, 1), interpolation=cv2.INTER_NEAREST_EXACT)[0].tolist()


def test_a_mask_without_pixels_stays_one() -> None:
    nothing = encode(np.zeros((8, 9), bool))
    assert not decode(nothing.mirrored(9).sampled(np.arange(4), np.arange(5)), 4, 5).any()
    assert ObjectMask.decode("", 8, 9).pixels.size == 0
