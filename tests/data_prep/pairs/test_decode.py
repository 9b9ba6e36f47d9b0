import io

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from PIL import Image

from data_prep import storage
from data_prep.pairs.decode import (
    DecodeConfig,
    Decoded,
    decode_body,
    perceptual_hash,
    with_images,
)
from data_prep.pairs.rows import Rejection
from data_prep.pictograms.website import png_bomb
from ovd_models.metadata import strip_jpeg

KEEP = DecodeConfig()


def picture(width: int = 80, height: int = 60, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def good(content: bytes, config: DecodeConfig = KEEP) -> Decoded:
    found = decode_body(content, config)
    assert isinstance(found, Decoded), found
    return found


def pixels(content: bytes) -> npt.NDArray[np.float64]:
    image = Image.open(io.BytesIO(content))
    assert (image.format, image.mode) == ("JPEG", "RGB")
    return np.asarray(image, np.float64)


def test_an_upright_rgb_jpeg_keeps_its_bytes() -> None:
    content = encoded(picture(), "JPEG", quality=95)
    found = good(content)
    assert found.content == content
    assert (found.width, found.height, found.original_width, found.original_height) == (80, 60, 80, 60)
    assert found.contrast > 10


def test_metadata_goes_and_pixel_data_stays() -> None:
    plain = encoded(picture(), "JPEG", quality=95)
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    told = encoded(
        picture(), "JPEG", quality=95, exif=exif, comment=b"secret place", icc_profile=b"x" * 100, xmp=b"<x/>"
    )
    assert b"a camera" in told
    assert b"secret place" in told
    assert good(told).content == plain
    assert strip_jpeg(plain) == plain


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(orientation: int) -> None:
    upright = np.zeros((60, 80, 3), np.uint8)
    upright[:20, :20] = (250, 20, 20)  # red top left, green top right, dark below
    upright[:20, 60:] = (20, 250, 20)
    turn = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2),
        6: np.rot90(upright), 7: upright[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(upright, -1),
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = good(encoded(Image.fromarray(np.ascontiguousarray(turn[orientation])), "JPEG", quality=95, exif=exif))
    assert (found.width, found.height, found.original_width) == (80, 60, 80)
    shown = pixels(found.content)
    assert np.abs(shown[10, 10] - (250, 20, 20)).max() < 40
    assert np.abs(shown[10, 70] - (20, 250, 20)).max() < 40
    assert shown[50, 40].max() < 40
    assert b"Exif" not in found.content


def test_sixteen_bit_greys_are_scaled_not_clipped() -> None:
    grey = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    shown = pixels(good(encoded(Image.fromarray(grey), "PNG")).content)
    assert np.abs(shown[..., 0] - grey / 257).max() < 6


def test_transparency_lies_over_white() -> None:
    layer = np.zeros((40, 40, 4), np.uint8)
    layer[:20] = (200, 0, 0, 255)
    for content in (
        encoded(Image.fromarray(layer), "PNG"),
        encoded(Image.fromarray(layer), "WEBP", lossless=True),
        encoded(Image.fromarray(layer).quantize(), "PNG"),
    ):
        shown = pixels(good(content).content)
        assert np.abs(shown[5, 5] - (200, 0, 0)).max() < 8
        assert shown[35, 35].min() > 247


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "LA"])
def test_other_modes_become_rgb(mode: str) -> None:
    image = picture().convert(mode)
    found = good(encoded(image, "JPEG" if mode == "CMYK" else "PNG"))
    wanted = np.asarray(image.convert("RGB"), np.float64)
    difference = np.abs(pixels(found.content) - wanted)
    assert difference.mean() < (60 if mode == "1" else 12)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF"])
def test_other_formats_become_jpeg(kind: str) -> None:
    found = good(encoded(picture(), kind))
    assert np.abs(pixels(found.content) - np.asarray(picture(), np.float64)).mean() < 15


def test_a_longer_image_is_reduced_to_max_side() -> None:
    found = good(encoded(picture(1600, 800), "JPEG", quality=95), DecodeConfig(max_side=200))
    assert (found.width, found.height, found.original_width, found.original_height) == (200, 100, 1600, 800)
    wanted = np.asarray(picture(1600, 800).resize((200, 100), Image.Resampling.LANCZOS), np.float64)
    assert np.abs(pixels(found.content) - wanted).mean() < 3
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = good(encoded(picture(1600, 800), "JPEG", exif=exif), DecodeConfig(max_side=200))
    assert (turned.width, turned.height, turned.original_width) == (100, 200, 800)


def test_a_shorter_image_keeps_its_size_and_bytes() -> None:
    content = encoded(picture(), "JPEG", quality=95)
    assert good(content, DecodeConfig(max_side=80)).content == content


def test_the_hash_is_the_sign_of_the_lowest_frequencies_about_their_median() -> None:
    grey = np.random.default_rng(1).uniform(0, 255, (32, 32)).astype(np.float32)
    lowest = np.zeros((8, 8))
    for u in range(8):
        for v in range(8):
            for y in range(32):
                for x in range(32):
                    wave = np.cos(np.pi * (2 * y + 1) * u / 64) * np.cos(np.pi * (2 * x + 1) * v / 64)
                    lowest[u, v] += grey[y, x] * wave
    bits = "".join("1" if value > np.median(lowest) else "0" for value in lowest.ravel())
    assert perceptual_hash(grey) == int(bits, 2)


def test_copies_have_near_hashes_and_other_pictures_far_ones() -> None:
    image = picture(300, 200)
    hashes = [
        good(content).phash
        for content in (
            encoded(image, "JPEG", quality=95),
            encoded(image, "JPEG", quality=40),
            encoded(image.resize((150, 100)), "PNG"),
            encoded(image.resize((900, 600)), "WEBP"),
        )
    ]
    assert max((hashes[0] ^ other).bit_count() for other in hashes) <= 4
    assert (hashes[0] ^ good(encoded(picture(300, 200, seed=1), "JPEG")).phash).bit_count() > 16


@pytest.mark.parametrize("size", [(1600, 1200), (1024, 768), (800, 600), (640, 480)])  # by 4, exactly 4, 2 and none
def test_a_reduced_decode_looks_like_a_full_one(size: tuple[int, int]) -> None:
    image = picture(*size)
    config = DecodeConfig(max_side=256)
    fast, slow = good(encoded(image, "JPEG", quality=95), config), good(encoded(image, "PNG"), config)
    assert np.abs(pixels(fast.content) - pixels(slow.content)).mean() < 2


@pytest.mark.parametrize("tail", [b"\0\0", b"\r\n", b" "])
def test_padding_behind_the_end_of_a_jpeg_is_no_fault(tail: bytes) -> None:
    assert good(encoded(picture(400, 300), "JPEG") + tail, DecodeConfig(max_side=100)).width == 100


def test_a_jpeg_cut_short_is_never_filled_with_grey() -> None:
    content = encoded(picture(400, 300), "JPEG", quality=95)
    for stop in range(len(content) - 2, len(content) // 2, -97):
        found = decode_body(content[:stop], DecodeConfig(max_side=100))
        assert isinstance(found, Rejection)
        assert found.reason == "truncated"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not_an_image"),
        (b"<!DOCTYPE html><html></html>", "not_an_image"),
        (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "not_an_image"),
        (b"\xff\xd8\xff", "not_an_image"),
        (b"\xff\xd8\xff\xe0" + bytes(range(256)) * 4, "not_an_image"),
        (b"RIFF\0\0\0\0WEBPVP8 garbage", "not_an_image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not_an_image"),
    ],
)
def test_what_is_no_image_is_said_to_be_none(content: bytes, reason: str) -> None:
    found = decode_body(content, KEEP)
    assert isinstance(found, Rejection)
    assert found.reason == reason
    assert found.detail


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_half_a_file_is_truncated(kind: str) -> None:
    content = encoded(picture(300, 200), kind)
    found = decode_body(content[: len(content) // 2], KEEP)
    assert isinstance(found, Rejection)
    assert found.reason in ("truncated", "not_an_image") if kind == "WEBP" else found.reason == "truncated"


def test_a_bomb_is_rejected_from_its_header() -> None:
    for side in (8_000, 30_000, 2_000_000):
        found = decode_body(png_bomb(side, side), KEEP)
        assert isinstance(found, Rejection)
        assert found.reason == "too_many_pixels"


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animations_are_rejected(kind: str) -> None:
    frames = [picture(seed=seed) for seed in range(3)]
    found = decode_body(encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50), KEEP)
    assert found == Rejection("animated", "3 frames")


def test_rows_keep_earlier_failures_and_gain_new_ones() -> None:
    content = encoded(picture(), "JPEG")
    rows = pa.table(
        {
            "row": [3, 4, 5],
            "stage": pa.array([None, "fetch", None], pa.string()),
            "reason": pa.array([None, "dns", None], pa.string()),
            "detail": pa.array([None, "no such host", None], pa.string()),
        }
    )
    found = with_images(rows, [decode_body(content, KEEP), None, decode_body(b"nothing", KEEP)])
    assert found["row"].to_pylist() == [3, 4, 5]
    assert found["stage"].to_pylist() == [None, "fetch", "decode"]
    assert found["reason"].to_pylist() == [None, "dns", "not_an_image"]
    assert found["detail"].to_pylist()[1] == "no such host"
    assert found["image_id"].to_pylist() == [storage.sha256(content), None, None]
    assert found["width"].to_pylist() == [80, None, None]
    assert found["phash"].type == pa.uint64()
    assert with_images(rows.slice(0, 0), []).schema.equals(found.schema)
