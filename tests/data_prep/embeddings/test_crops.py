import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import v2

from data_prep.embeddings.crops import CropConfig, Fit, crop_squares, crop_windows, square
from ovd_models.errors import InputError


def windows(*boxes: tuple[float, float, float, float], scale: float = 1.0) -> list[list[int]]:
    return crop_windows(np.array(boxes, np.float32), scale, 100, 80).tolist()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def test_windows_grow_about_the_centre_and_are_rounded_outwards() -> None:
    # Centre (15, 20), half sides (5, 10) * 1.5 = (7.5, 15): from (7.5, 5) to (22.5, 35).
    assert windows((10, 10, 20, 30), scale=1.5) == [[7, 5, 23, 35]]
    assert windows((10.2, 10, 20.1, 30)) == [[10, 10, 21, 30]]


def test_windows_stay_inside_the_image() -> None:
    assert windows((0, 0, 100, 80), (90, 70, 100, 80), (-5, -9, 300, 4), scale=1.5) == [
        [0, 0, 100, 80], [87, 67, 100, 80], [0, 0, 100, 8],
    ]  # fmt: skip


def test_boxes_without_area_give_the_pixel_they_lie_on() -> None:
    boxes = [(5.5, 6.5, 5.5, 6.5), (100, 80, 100, 80), (0, 0, 0, 0), (200, -50, 210, -40)]
    assert windows(*boxes, scale=1.5) == [[5, 6, 6, 7], [99, 79, 100, 80], [0, 0, 1, 1], [99, 0, 100, 1]]


def test_no_box_gives_no_window() -> None:
    assert crop_windows(np.empty((0, 4), np.float32), 1.5, 10, 10).shape == (0, 4)
    assert crop_squares(np.asarray(noise(10, 10)), [], 8, "warp").shape == (0, 8, 8, 3)


@pytest.mark.parametrize("size", [(97, 41), (40, 130), (64, 64), (20, 21)])
def test_centre_is_clips_own_preprocessing(size: tuple[int, int]) -> None:
    image = noise(*size)
    expected = v2.Compose([v2.Resize(32, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(32)])(image)
    difference = np.abs(square(image, 32, "centre").astype(int) - np.asarray(expected).astype(int))
    assert difference.max() <= 1


def test_pad_keeps_the_whole_picture_inside_a_margin() -> None:
    found = square(Image.new("RGB", (60, 20), "red"), 30, "pad", (1, 2, 3))
    assert (found[10:20] == (255, 0, 0)).all()
    assert (found[:10] == (1, 2, 3)).all()
    assert (found[20:] == (1, 2, 3)).all()


@pytest.mark.parametrize("fit", ["warp", "pad", "centre"])
@pytest.mark.parametrize("window", [(5, 0, 6, 100_000), (0, 7, 9, 8)])
def test_the_thinnest_box_becomes_a_square(fit: Fit, window: tuple[int, int, int, int]) -> None:
    image = Image.new("RGB", (9, 100_000), (10, 200, 30))
    found = crop_squares(np.asarray(image), [window], 224, fit, (10, 200, 30))
    assert (found == (10, 200, 30)).all()


@pytest.mark.parametrize("fit", ["warp", "pad", "centre"])
def test_crops_look_as_squares_of_their_windows_do(fit: Fit) -> None:
    image = noise(120, 90)
    windows = [(0, 0, 120, 90), (3, 5, 40, 42), (7, 0, 27, 90), (60, 60, 120, 71), (1, 1, 9, 8), (50, 10, 51, 11)]
    found = crop_squares(np.asarray(image), windows, 48, fit, (1, 2, 3)).astype(int)
    for row, window in zip(found, windows, strict=True):
        assert np.abs(row - square(image.crop(window), 48, fit, (1, 2, 3))).max() <= 2
    sharp = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8))
    row = crop_squares(np.asarray(sharp), [(0, 0, 30, 90)], 48, fit, (1, 2, 3))[0].astype(int)
    assert np.abs(row - square(sharp.crop((0, 0, 30, 90)), 48, fit, (1, 2, 3))).max() <= 30


@pytest.mark.parametrize("scales", [(), (1.0, 0.0), (-1.0,)])
def test_scales_must_be_positive(scales: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="scales"):
        CropConfig(scales=scales)
