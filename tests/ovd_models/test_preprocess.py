import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ovd_models.batches import Detections
from ovd_models.drawing import colour_of, draw_boxes, ink_on
from ovd_models.errors import InputError
from ovd_models.images import decode_image, open_image
from ovd_models.preprocess import to_tensor


def encoded(image: Image.Image, kind: str, exif: Image.Exif | None = None) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **({"exif": exif} if exif else {}))
    return sink.getvalue()


def gradient(width: int = 12, height: int = 8) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 20, y * 30, x * 0 + 9], -1).astype(np.uint8))


def test_a_file_becomes_an_upright_rgb_tensor(tmp_path: Path) -> None:
    gradient().save(tmp_path / "a.png")
    tensor = to_tensor(tmp_path / "a.png")
    assert tensor.dtype == torch.uint8
    assert tensor.shape == (3, 8, 12)
    assert tensor.is_contiguous()
    assert tensor[:, 2, 5].tolist() == [100, 60, 9]


@pytest.mark.parametrize("turn", range(1, 9))
def test_cameras_orientation_is_undone(turn: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    upright = np.array(decode_image(encoded(gradient(), "PNG", exif)))
    stored = np.array(gradient())
    # EXIF: 2 mirrors, 3 turns by 180 degrees, 4 flips, 5 transposes, 6 and 8 turn by 90 degrees, 7 transposes across
    expected = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1),
        7: np.rot90(stored, 2).transpose(1, 0, 2),
        8: np.rot90(stored, 1),
    }[turn]
    assert np.array_equal(upright, expected)


def test_a_rotated_picture_in_memory_is_turned_too_and_only_once() -> None:
    image = gradient()
    image.getexif()[0x0112] = 6
    assert to_tensor(image).shape == (3, 12, 8)
    assert to_tensor(decode_image(encoded(image, "PNG", image.getexif()))).shape == (3, 12, 8)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "RGBA", "LA", "YCbCr", "HSV"])
def test_any_mode_becomes_rgb(mode: str) -> None:
    assert to_tensor(gradient().convert("RGB").convert(mode)).shape == (3, 8, 12)


@pytest.mark.parametrize(("mode", "multiplied"), [("LA", "La"), ("RGBA", "RGBa")])
def test_multiplied_transparency_lies_over_white_too(mode: str, multiplied: str) -> None:
    layer = gradient().convert(mode)
    layer.putalpha(Image.fromarray(np.full((8, 12), 255, np.uint8)))
    assert torch.equal(to_tensor(layer.convert(multiplied)), to_tensor(layer))


def test_a_grey_array_has_three_equal_channels() -> None:
    grey = np.arange(20, dtype=np.uint8).reshape(4, 5)
    tensor = to_tensor(grey)
    assert tensor.shape == (3, 4, 5)
    assert all(np.array_equal(channel, grey) for channel in tensor.numpy())


def test_strides_of_an_array_do_not_matter() -> None:
    array = np.array(gradient())
    assert torch.equal(to_tensor(array[:, ::-1]), to_tensor(array[:, ::-1].copy()))


def test_sixteen_bits_are_scaled_to_eight() -> None:
    deep = Image.fromarray(np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16))
    found = np.array(decode_image(encoded(deep, "PNG")))[..., 0]
    assert abs(float(found.mean()) - 127.5) < 2


def test_transparency_lies_over_white_as_in_the_crawl() -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    clear.putpixel((3, 3), (0, 0, 255, 255))
    assert np.array(decode_image(encoded(clear, "PNG")))[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_a_truncated_file_is_refused(kind: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    content = encoded(noise, kind)
    with pytest.raises(InputError, match=r"^cat: (broken image|not an image)") as caught:
        decode_image(content[: len(content) // 2], "cat")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"<html>", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"])
def test_other_files_are_refused(content: bytes) -> None:
    with pytest.raises(InputError, match=r"^a\.jpg: not an image, expected JPEG, PNG, WebP or the like$"):
        decode_image(content, "a.jpg")


def declared_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises any number of pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("side", "message"), [(11_000, "11000 x 11000 pixels, at most 100,000,000"), (60_000, "image: ")]
)
def test_a_bomb_is_refused_before_it_is_decoded(side: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        decode_image(declared_png(side, side))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be read .No such file or directory., expected an image file"):
        open_image(tmp_path / "none.jpg")
    with pytest.raises(InputError, match="cannot be read"):
        open_image(tmp_path)


@pytest.mark.parametrize(
    "image",
    [
        torch.zeros(3, 0, 5, dtype=torch.uint8),
        np.zeros((0, 0, 3), np.uint8),
        np.zeros((4, 0), np.uint8),
        Image.new("RGB", (0, 5)),
        Image.new("RGBA", (0, 5)),
    ],
)
def test_an_image_without_pixels_is_refused(image: torch.Tensor | np.ndarray | Image.Image) -> None:
    with pytest.raises(InputError, match="expected at least one pixel"):
        to_tensor(image)


@pytest.mark.parametrize(
    "image",
    [
        torch.zeros(3, 4, 5),
        torch.zeros(4, 5, 3, dtype=torch.uint8),
        torch.zeros(4, 5, dtype=torch.uint8),
        np.zeros((4, 5, 3), np.float32),
        np.zeros((3, 4, 5), np.uint8),
        np.zeros(4, np.uint8),
    ],
)
def test_other_shapes_and_types_are_refused(image: torch.Tensor | np.ndarray) -> None:
    with pytest.raises(InputError, match=r"^image (tensor|array): .*expected uint8"):
        to_tensor(image)


@pytest.mark.parametrize(
    "kind",
    [
        "PNG",
        "GIF",
        "BMP",
        "TIFF",
        *(name for name in ("JPEG", "PPM")),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_decoded_or_refused_with_one_line(kind: str) -> None:
    dice = random.Random(0)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    content = encoded(gradient(40, 30), kind, exif if kind in ("JPEG", "PNG", "TIFF") else None)
    for _ in range(1500):
        damaged = bytearray(content)
        for _ in range(dice.choice((1, 1, 2, 5))):
            damaged[int(dice.random() ** 2 * len(damaged))] = dice.randrange(256)
        try:
            assert decode_image(bytes(damaged)).mode == "RGB"
        except InputError as error:
            assert "\n" not in str(error)


# ----------------------------------------------------------------------------------------------------- pictures


def found(count: int, image: Image.Image | None) -> Detections:
    boxes = torch.tensor([[2.0, 2, 9, 7]]).repeat(count, 1)
    names = ("red umbrella", "anchor")
    return Detections(boxes, torch.full((count,), 0.5), torch.zeros(count, dtype=torch.int64), names, 12, 8, image)


def test_small_pictures_are_enlarged_and_the_original_stays(tmp_path: Path) -> None:
    image = gradient()
    before = np.array(image)
    drawn = found(1, image).draw(tmp_path / "found.png")
    assert drawn.size == (480, 320)
    assert np.array_equal(np.array(image), before)
    # the box's left edge, 2 px of 12 enlarged 40 times, in the colour of its name
    assert drawn.getpixel((81, 240)) == colour_of("red umbrella")
    assert Image.open(tmp_path / "found.png").size == (480, 320)


def test_nothing_found_draws_the_picture_alone() -> None:
    drawn = found(0, gradient()).draw()
    assert np.array_equal(np.array(drawn), np.array(gradient().resize((480, 320))))


def test_detections_without_a_picture_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match="pass image="):
        found(1, None).draw()
    assert found(1, None).draw(image=gradient()).size == (480, 320)


def test_boxes_outside_the_picture_and_a_single_pixel_are_drawn() -> None:
    boxes = torch.tensor([[-50.0, -50, 500, 500], [0, 0, 0, 0]])
    assert draw_boxes(Image.new("RGB", (1, 1)), boxes, ["a" * 200, "ä"], [3, 4]).size == (320, 320)


def test_a_long_picture_is_not_enlarged_without_bound() -> None:
    drawn = draw_boxes(Image.new("RGB", (2, 600)), torch.zeros(0, 4), [], [])
    assert drawn.width * drawn.height < 4_000_000


def test_labels_have_colours_of_their_own() -> None:
    assert len({colour_of(index) for index in range(100)}) == 100


def test_lines_and_letters_grow_with_the_picture() -> None:
    def drawn_pixels(scale: int) -> tuple[int, int]:
        """Width of the box's left line, and pixels of its label's height."""
        image = Image.new("RGB", (700 * scale, 500 * scale))
        box = torch.tensor([[200.0, 200, 600, 400]]) * scale
        pixels = np.asarray(draw_boxes(image, box, ["anchor"], ["anchor"]))
        own = (pixels == colour_of("anchor")).all(2)
        return int(own[350 * scale, : 400 * scale].sum()), int(own[: 200 * scale, 201 * scale].sum())

    (line, label), (wide, tall) = drawn_pixels(1), drawn_pixels(4)
    assert (line, wide) == (2, 8)
    assert 3.5 < tall / label < 4.5


def test_a_label_is_black_on_bright_colours_and_white_on_dark_ones() -> None:
    assert (ink_on((204, 200, 30)), ink_on((30, 30, 204))) == ("black", "white")


def test_detections_have_the_form_of_the_endpoint() -> None:
    assert found(1, None).to_list() == [{"box": [2.0, 2.0, 9.0, 7.0], "label": "red umbrella", "score": 0.5}]
