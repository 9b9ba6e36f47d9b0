"""Pictures as people have them; the pixels of each kind are compared with those of a whole file."""

import copy
import io
import os
import pickle
import struct
import threading
import zlib
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from pictures import (
    ADOBE_RGB,
    DISPLAY_P3,
    PROPHOTO,
    SIZE,
    SRGB_LIKE,
    WIDE_GAMUT,
    cmyk_profile,
    encoded,
    exif_of,
    gradient,
    grey_profile,
    jpeg_with,
    png_chunk,
    png_with,
    webp_with,
)
from PIL import Image, ImageCms
from reference import REFERENCE
from reference_data import needs

from data_prep.boxes.folders import list_images, read_images
from data_prep.pairs.decode import DecodeConfig, Decoded, decode_body
from data_prep.pairs.rows import Rejection
from ovd_models.errors import InputError
from ovd_models.images import (
    ImageError,
    check_whole,
    decode_image,
    has_image_magic,
    open_image,
    open_picture,
    scale_deep,
    to_rgb,
)
from ovd_models.preprocess import to_tensor

pytestmark = pytest.mark.filterwarnings("ignore")
TURN = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
EXIF = b"Exif\0\0"
GARBAGE = bytes(range(200)) * 3
RAW = b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n      12\nnot hexadecimal")


def pixels(content: bytes) -> npt.NDArray[np.int64]:
    return np.asarray(decode_image(content), np.int64)


DAMAGED = {
    "exif-no-header": jpeg_with(0xE1, EXIF + b"\0\x08\0\x02\x01\x12\0\x03"),
    "exif-text": jpeg_with(0xE1, EXIF + b"b'Exif\\x00'"),
    "exif-zeros": jpeg_with(0xE1, EXIF + bytes(32)),
    "exif-empty": jpeg_with(0xE1, EXIF),
    "exif-cut": jpeg_with(0xE1, EXIF + b"II*\0\x08\0"),
    "exif-offset-beyond": jpeg_with(0xE1, EXIF + b"II*\0\xff\xff\xff\x7f"),
    "exif-loop": jpeg_with(0xE1, EXIF + b"MM\0*\0\0\0\x08\0\0\0\0\0\x08"),
    "exif-too-many-entries": jpeg_with(0xE1, exif_of(TURN[:4], 40_000)),
    "exif-orientation-as-text": jpeg_with(0xE1, exif_of(struct.pack("<HHI4s", 0x0112, 2, 4, b"top\0"))),
    "exif-orientation-99": jpeg_with(0xE1, exif_of(struct.pack("<HHIHH", 0x0112, 3, 1, 99, 0))),
    "exif-orientation-0": jpeg_with(0xE1, exif_of(struct.pack("<HHIHH", 0x0112, 3, 1, 0, 0))),
    "exif-orientation-fraction": jpeg_with(0xE1, exif_of(struct.pack("<HHII", 0x0112, 5, 1, 2_000_000))),
    "exif-twice": jpeg_with(0xE1, EXIF + b"junk", jpeg_with(0xE1, EXIF + b"more")),
    "xmp-garbage": jpeg_with(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + GARBAGE),
    "mpf-garbage": jpeg_with(0xE2, b"MPF\0" + GARBAGE),
    "mpf-empty": jpeg_with(0xE2, b"MPF\0"),
    "icc-garbage": jpeg_with(0xE2, b"ICC_PROFILE\0\x01\x01" + GARBAGE),
    "icc-part-missing": jpeg_with(0xE2, b"ICC_PROFILE\0\x01\x03" + ADOBE_RGB),
    "icc-cut": jpeg_with(0xE2, b"ICC_PROFILE\0\x01\x01" + ADOBE_RGB[:140]),
    "photoshop-garbage": jpeg_with(0xED, b"Photoshop 3.0\08BIM\x04\x04" + GARBAGE),
    "photoshop-cut": jpeg_with(0xED, b"Photoshop 3.0\08BIM"),
    "jfif-short": jpeg_with(0xE0, b"JFIF\0"),
    "comment-latin-1": jpeg_with(0xFE, b"caf\xe9" * 1000),
    "png-text-crc": png_with(png_chunk(b"tEXt", b"Comment\0x", crc=1)),
    "png-time-crc": png_with(png_chunk(b"tIME", bytes(7), crc=1)),
    "png-gamma-crc": png_with(png_chunk(b"gAMA", bytes(4), crc=1)),
    "png-srgb-crc": png_with(png_chunk(b"sRGB", b"\0", crc=1)),
    "png-density-short": png_with(png_chunk(b"pHYs", b"\0\0")),
    "png-text-2-mb": png_with(png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2 << 20)))),
    "png-itext-2-mb": png_with(png_chunk(b"iTXt", b"k\0\x01\0\0\0" + zlib.compress(bytes(2 << 20)))),
    "png-text-not-zlib": png_with(png_chunk(b"zTXt", b"k\0\0garbage")),
    "png-exif-garbage": png_with(png_chunk(b"eXIf", b"\0\x08\0\x02")),
    "png-exif-empty": png_with(png_chunk(b"eXIf", b"")),
    "png-raw-profile": png_with(png_chunk(b"zTXt", RAW)),
    "png-icc-garbage": png_with(png_chunk(b"iCCP", b"p\0\0garbage")),
    "png-icc-crc": png_with(png_chunk(b"iCCP", b"p\0\0" + zlib.compress(ADOBE_RGB), crc=1)),
    "png-unknown-chunk": png_with(png_chunk(b"quIx", GARBAGE, crc=1)),
    "webp-exif-garbage": webp_with(b"EXIF", b"\0\x08\0\x02\x01\x12"),
    "webp-exif-cut": webp_with(b"EXIF", b"II*\0"),
    "webp-xmp-garbage": webp_with(b"XMP ", GARBAGE),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_metadata_never_decides_about_a_picture(name: str) -> None:
    content = DAMAGED[name]
    whole = pixels(encoded(gradient(), "JPEG", quality=95)) if content[:2] == b"\xff\xd8" else np.asarray(gradient())
    assert np.array_equal(pixels(content), whole)
    kept = decode_body(content, DecodeConfig())
    assert isinstance(kept, Decoded), kept
    assert (kept.width, kept.height) == SIZE
    again = pixels(kept.content)
    assert np.abs(again - whole).mean() < (0.01 if content[:2] == b"\xff\xd8" else 6)


def test_an_orientation_beside_damage_still_counts() -> None:
    turned = jpeg_with(0xE1, exif_of(TURN + struct.pack("<HHII", 0x927C, 7, 99_999, 7), 2))
    assert decode_image(turned).size == SIZE[::-1]
    assert open_picture(turned).size == SIZE[::-1]


@pytest.mark.parametrize(
    "content",
    [
        encoded(gradient((200, 200)), "PNG")[:-60],
        png_with(png_chunk(b"tEXt", b"a\0b", crc=1), content=encoded(gradient((200, 200)), "PNG")[:-60]),
        jpeg_with(0xE1, EXIF + GARBAGE, encoded(gradient((200, 200)), "JPEG")[:-900]),
        encoded(gradient((200, 200)), "WEBP", lossless=True)[:-40],
        encoded(gradient((200, 200)), "TIFF")[:-4000],
        encoded(gradient((200, 200)), "BMP")[:-4000],
        encoded(Image.fromarray(np.random.default_rng(0).integers(0, 65535, (64, 64), np.uint16)), "PNG")[:-99],
    ],
)
def test_missing_pixels_are_never_made_up(content: bytes) -> None:
    with pytest.raises(ImageError) as caught:
        check_whole(open_picture(content, "a"))
    assert caught.value.reason in ("truncated", "not_an_image")
    assert str(caught.value).startswith("a: ")


def test_an_end_marker_spares_the_decoding() -> None:
    picture = open_picture(encoded(gradient(), "JPEG"))
    check_whole(picture)
    assert picture.image.getim is not None
    assert getattr(picture.image, "_im", None) is None  # not loaded


# ------------------------------------------------------------------------------------------------------------- formats


def brands(major: bytes, *compatible: bytes) -> bytes:
    """An AVIF file with other brands."""
    content = encoded(gradient(), "AVIF", quality=95)
    size = struct.unpack(">I", content[:4])[0]
    box = b"ftyp" + major + bytes(4) + b"".join(compatible)
    box = box.ljust(size - 4, b"\0")
    return content[:4] + box + content[size:]


@pytest.mark.parametrize(
    "content",
    [brands(b"avif", b"mif1"), brands(b"mif1", b"avif"), brands(b"mif1", b"miaf", b"avif"), brands(b"avif")],
)
def test_compatible_brands_make_a_file_avif(content: bytes) -> None:
    assert np.abs(pixels(content) - np.asarray(gradient())).mean() < 6
    assert isinstance(decode_body(content, DecodeConfig()), Decoded)


@pytest.mark.parametrize("major", [b"heic", b"mif1", b"isom", b"qt  "])
def test_other_brands_are_no_images(major: bytes) -> None:
    assert not has_image_magic(brands(major, b"heic", b"mif1"))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "AVIF", "TIFF"])
def test_animations_and_documents_are_rejected_by_a_crawl_and_else_show_their_first_picture(kind: str) -> None:
    frames = [gradient(), Image.new("RGB", SIZE, "red")]
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert decode_body(content, DecodeConfig()) == Rejection("animated", "2 frames")
    assert np.abs(pixels(content) - np.asarray(gradient())).mean() < 12


REFUSED = {
    "ppm": encoded(gradient(), "PPM"),
    "ico": encoded(gradient(), "ICO"),
    "jpeg-2000": b"\0\0\0\x0cjP  \r\n\x87\n",
    "jpeg-xl": b"\xff\x0a" + bytes(20),
    "heic": brands(b"heic", b"mif1"),
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "html": b"<!DOCTYPE html>",
    "pdf": b"%PDF-1.7\n",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n",
    "psd": b"8BPS\0\x01" + bytes(20),
    "zip": b"PK\x03\x04" + bytes(30),
    "riff-sound": b"RIFF\0\0\0\0WAVEfmt ",
    "empty": b"",
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_formats_are_refused_everywhere(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(REFUSED[name])
    message = "not an image, expected JPEG, PNG, WebP or the like"
    with pytest.raises(InputError, match=message):
        to_tensor(path)
    found = decode_body(REFUSED[name], DecodeConfig())
    assert isinstance(found, Rejection)
    assert found.reason == "not_an_image"
    with pytest.raises(InputError, match=message):
        read_images(str(tmp_path), list_images(str(tmp_path)))


@pytest.mark.parametrize("extension", ["jpg", "JPEG", "jfif", "png", "gif", "webp", "bmp", "tif", "TIFF", "avif"])
def test_a_folder_holds_every_format(extension: str, tmp_path: Path) -> None:
    kind = {"jpg": "JPEG", "jpeg": "JPEG", "jfif": "JPEG", "tif": "TIFF"}.get(extension.lower(), extension.upper())
    (tmp_path / f"a.{extension}").write_bytes(encoded(gradient(), kind))
    rows, skipped = read_images(str(tmp_path), list_images(str(tmp_path)))
    assert (rows["width"].to_pylist(), rows["height"].to_pylist(), str(skipped)) == ([SIZE[0]], [SIZE[1]], "")


# --------------------------------------------------------------------------------------------------------------- depth


def deep(bits: int, channels: int) -> npt.NDArray[np.uint16]:
    """A ramp of all values of a depth."""
    ramp = np.linspace(0, (1 << bits) - 1, 48 * 36).reshape(36, 48).astype(np.uint16)
    return ramp if channels == 1 else np.repeat(ramp[..., None], channels, -1)


def deep_file(kind: str, bits: int, channels: int) -> bytes:
    _, content = cv2.imencode(f".{kind}", deep(bits, channels))
    return bytes(content.tobytes())


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize(("kind", "channels"), [("png", 1), ("png", 3), ("tiff", 1), ("tiff", 3)])
def test_deep_pictures_are_scaled_by_their_real_depth(bits: int, kind: str, channels: int) -> None:
    expected = deep(bits, 1) / ((1 << bits) - 1) * 255
    found = pixels(deep_file(kind, bits, channels))
    assert np.abs(found[..., 0] - expected).max() <= 1
    assert np.ptp(found, axis=-1).max() == 0


def test_colours_of_deep_pictures_keep_their_order_and_their_transparency() -> None:
    values = np.zeros((8, 8, 4), np.uint16)
    values[:4] = (100, 2000, 4095, 65535)  # blue, green, red, alpha, as OpenCV has it
    values[7] = (0, 0, 0, 65535)
    _, content = cv2.imencode(".png", values)
    found = pixels(content.tobytes())
    assert np.abs(found[0, 0] - (255, 125, 6)).max() <= 1
    assert found[5, 5].tolist() == [255, 255, 255]
    assert found[7, 7].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 1000, 70_000]], np.int32), [0, 4, 255]),
        (np.array([[-5, 0, 255]], np.int32), [0, 0, 255]),
        (np.array([[0, 0, 0]], np.uint16), [0, 0, 0]),
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[np.nan, 2.0, 4.0]], np.float32), [0, 0, 255]),
        (np.array([[-np.inf, 2.0, np.inf]], np.float32), [0, 0, 255]),
        (np.array([[3.0, 3.0, 3.0]], np.float32), [0, 0, 0]),
        (np.array([[np.nan] * 3], np.float32), [0, 0, 0]),
    ],
)
def test_any_values_are_scaled(values: npt.NDArray[np.generic], expected: list[int]) -> None:
    assert scale_deep(values)[0].tolist() == expected


# -------------------------------------------------------------------------------------------------------- transparency


def with_alpha(alpha: int) -> Image.Image:
    image = gradient().convert("RGBA")
    image.putalpha(alpha)
    return image


def bmp_with_alpha(alpha: int) -> bytes:
    _, content = cv2.imencode(".bmp", np.asarray(with_alpha(alpha))[..., [2, 1, 0, 3]])
    return bytes(content.tobytes())


@pytest.mark.parametrize(
    "content",
    [
        bmp_with_alpha(0),
        encoded(with_alpha(0), "PNG"),
        encoded(with_alpha(0), "TIFF"),
        encoded(with_alpha(0), "WEBP", lossless=True, exact=True),
        encoded(with_alpha(255), "PNG"),
    ],
)
def test_transparency_that_hides_all_is_ignored(content: bytes) -> None:
    assert np.array_equal(pixels(content), np.asarray(gradient()))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_half_transparency_lies_over_white(kind: str) -> None:
    content = encoded(with_alpha(128), kind, **({"lossless": True} if kind == "WEBP" else {}))
    expected = np.asarray(gradient()) * (128 / 255) + 255 * (127 / 255)
    assert np.abs(pixels(content) - expected).max() <= 2


# ------------------------------------------------------------------------------------------------------------- colours


@pytest.mark.parametrize("profile", [ADOBE_RGB, DISPLAY_P3, WIDE_GAMUT, PROPHOTO])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_colours_are_converted_by_their_profile(profile: bytes, kind: str) -> None:
    options: dict[str, object] = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "JPEG" else {}
    image = Image.new("RGB", SIZE, (200, 60, 40))
    content = encoded(image, kind, icc_profile=profile, **options)
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    expected = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert expected is not None
    colour = np.asarray(expected)[0, 0]
    assert np.abs(pixels(content)[9, 9] - colour).max() <= 2
    assert abs(int(colour[0]) - 200) > 10  # the profile matters
    kept = decode_body(content, DecodeConfig())
    assert isinstance(kept, Decoded)
    assert np.abs(np.asarray(Image.open(io.BytesIO(kept.content)), np.int64)[9, 9] - colour).max() <= 4


def test_red_of_adobe_rgb_is_brighter_in_srgb() -> None:
    # (150, 0, 0) of Adobe RGB: its XYZ over that of sRGB's red is 1.3984 at the same chromaticity, so the linear red is
    # 1.3984 (150 / 255)^2.199 = 0.4355, which sRGB writes as 176
    content = encoded(Image.new("RGB", SIZE, (150, 0, 0)), "PNG", icc_profile=ADOBE_RGB)
    assert abs(int(pixels(content)[5, 5, 0]) - 176) <= 2


def test_a_profile_of_srgb_leaves_the_file_as_it_is() -> None:
    for profile in (SRGB_LIKE, ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()):
        content = encoded(gradient(), "JPEG", quality=95, icc_profile=profile)
        kept = decode_body(content, DecodeConfig())
        assert isinstance(kept, Decoded)
        assert kept.content == encoded(gradient(), "JPEG", quality=95)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_greys_are_converted_by_their_profile(kind: str) -> None:
    image = Image.new("L", SIZE, 128)
    found = pixels(encoded(image, kind, icc_profile=grey_profile(1.0)))
    assert abs(int(found[3, 3, 0]) - 188) <= 2  # linear 0.5 in sRGB


def test_inks_are_converted_by_their_profile() -> None:
    image = Image.new("CMYK", SIZE, (0, 0, 0, 128))
    found = pixels(encoded(image, "JPEG", quality=100, icc_profile=cmyk_profile()))
    # half of the black ink: L* 50, which sRGB writes as 119; without the profile 127
    assert np.abs(found[3, 3] - 119).max() <= 3


@pytest.mark.parametrize(
    ("mode", "profile"),
    [("L", ADOBE_RGB), ("RGB", grey_profile(1.0)), ("CMYK", ADOBE_RGB), ("RGB", b"garbage"), ("RGB", ADOBE_RGB[:99])],
)
def test_a_profile_that_does_not_fit_is_ignored(mode: str, profile: bytes) -> None:
    image = Image.new("RGB", SIZE, (99, 99, 99)).convert(mode)
    kind = "JPEG" if mode == "CMYK" else "PNG"
    assert np.abs(pixels(encoded(image, kind, icc_profile=profile))[3, 3] - 99).max() <= 2


def test_colours_are_converted_once() -> None:
    image = Image.open(io.BytesIO(encoded(Image.new("RGB", SIZE, (200, 60, 40)), "PNG", icc_profile=ADOBE_RGB)))
    once = to_rgb(image)
    assert np.array_equal(np.asarray(to_rgb(once)), np.asarray(once))
    assert np.array_equal(np.asarray(to_rgb(copy.copy(once))), np.asarray(once))


# --------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "missing", "null byte"])
def test_only_regular_files_are_read(kind: str, tmp_path: Path) -> None:
    path = {"device": "/dev/zero", "null byte": "a\0b"}.get(kind, str(tmp_path / "a.jpg"))
    if kind == "fifo":
        os.mkfifo(path)
    if kind == "folder":
        Path(path).mkdir()
    errors: list[Exception] = []

    def read() -> None:
        try:
            open_image(path)
        except InputError as error:
            errors.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive()
    assert len(errors) == 1
    assert "cannot be read (" in str(errors[0])


def test_an_error_survives_another_process() -> None:
    error = pickle.loads(pickle.dumps(ImageError("a: broken", "truncated")))
    assert (str(error), error.reason) == ("a: broken", "truncated")


@needs("cases")
@pytest.mark.parametrize(
    "path", sorted([*(REFERENCE / "cases/exif").glob("*"), *(REFERENCE / "cases/images").glob("*")])
)
def test_reported_files_are_read(path: Path) -> None:
    if path.name == "ppm.ppm":
        with pytest.raises(InputError, match="not an image"):
            open_image(path)
        return
    image = open_image(path)
    assert image.size == (96, 80)
    assert 100 < np.asarray(image).mean() < 180
    found = decode_body(path.read_bytes(), DecodeConfig())
    assert isinstance(found, Rejection) == (path.name == "avif-anim.avif")
