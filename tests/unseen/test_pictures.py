# ruff: noqa: E501  # one line for each case
"""Further pictures, written before the code that reads them was looked at."""

import gzip
import struct
from collections.abc import Callable

import numpy as np
import pytest
from pictures import encoded, exif_of, gradient, jpeg_with, png_chunk, png_with, webp_with
from PIL import Image, ImageOps

from data_prep.pairs.decode import DecodeConfig, Decoded, decode_body
from data_prep.pairs.rows import Rejection
from ovd_models.images import ImageError, decode_image

JPEG, PNG = encoded(gradient(), "JPEG", quality=95), encoded(gradient(), "PNG")
GREY = gradient().convert("L")
TURN = exif_of(struct.pack("<HHIHH", 0x112, 3, 1, 6, 0))
LONG_TURN = exif_of(struct.pack("<HHII", 0x112, 4, 1, 6))


def turned() -> Image.Image:
    return gradient().transpose(Image.Transpose.ROTATE_270)


def bmp(bits: int, **options: object) -> bytes:
    """A BMP of 5, 6 and 5 bits, or one whose rows begin at the top."""
    pixels = np.asarray(gradient()).astype(np.uint16)
    height, width = pixels.shape[:2]
    if bits == 16:
        packed = (pixels[..., 0] >> 3 << 11 | pixels[..., 1] >> 2 << 5 | pixels[..., 2] >> 3).astype("<u2")
        body, masks, compression = packed[::-1].tobytes(), struct.pack("<III", 0xF800, 0x7E0, 0x1F), 3
    else:
        body, masks, compression = pixels[..., ::-1].astype(np.uint8).tobytes(), b"", 0
    signed = height if bits == 16 else -height
    start = 14 + 40 + len(masks)
    info = struct.pack("<IiiHHIIiiII", 40, width, signed, 1, bits, compression, len(body), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start) + info + masks + body


def without_end(png: bytes) -> bytes:
    return png[:-12]


def transparent_key() -> bytes:
    """A PNG whose colour (1, 2, 3) is transparent, which no pixel has."""
    return png_with(png_chunk(b"tRNS", struct.pack(">HHH", 1, 2, 3)))


def twice(*parts: bytes) -> bytes:
    content = JPEG
    for part in reversed(parts):
        content = jpeg_with(0xE1, part, content)
    return content


def big_endian_16() -> bytes:
    values = np.asarray(GREY).astype(">u2") * 257
    return encoded(Image.frombytes("I;16B", GREY.size, values.tobytes()), "TIFF")


def floats() -> bytes:
    return encoded(Image.fromarray(np.asarray(GREY).astype(np.float32) / 255), "TIFF")


def bad_icc_count() -> bytes:
    return jpeg_with(0xE2, b"ICC_PROFILE\0\x01\x05" + b"x" * 50)


WHOLE: dict[str, tuple[Callable[[], bytes], Callable[[], Image.Image], int]] = {
    "bytes behind a jpeg": (lambda: JPEG + b"\0" * 900 + b"footer", gradient, 12),
    "a jpeg behind a jpeg": (lambda: JPEG + JPEG, gradient, 12),
    "fill bytes": (lambda: JPEG[:2] + b"\xff\xff\xff" + JPEG[2:], gradient, 12),
    "progressive": (lambda: encoded(gradient(), "JPEG", quality=95, progressive=True), gradient, 12),
    "restarts": (lambda: encoded(gradient(), "JPEG", quality=95, restart_marker_blocks=1), gradient, 12),
    "grey jpeg": (lambda: encoded(GREY, "JPEG", quality=95), lambda: GREY.convert("RGB"), 12),
    "long comment": (lambda: jpeg_with(0xFE, b"c" * 65_000), gradient, 12),
    "orientation 0": (lambda: twice(exif_of(struct.pack("<HHIHH", 0x112, 3, 1, 0, 0))), gradient, 12),
    "orientation 9": (lambda: twice(exif_of(struct.pack("<HHIHH", 0x112, 3, 1, 9, 0))), gradient, 12),
    "orientation as long": (lambda: twice(LONG_TURN), turned, 12),
    "damaged exif before the good one": (lambda: twice(TURN, b"Exif\0\0garbage"), turned, 12),
    "exif and xmp": (lambda: twice(TURN, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta tiff:Orientation='3'"), turned, 12),
    "icc counts that lie": (bad_icc_count, gradient, 12),
    "adobe marker cut": (lambda: jpeg_with(0xEE, b"Adobe\0"), gradient, 255),
    "png turned": (lambda: png_with(png_chunk(b"eXIf", TURN[6:])), turned, 0),
    "png without end": (lambda: without_end(PNG), gradient, 0),
    "bytes behind a png": (lambda: PNG + b"\0" * 100, gradient, 0),
    "text behind the pixels": (lambda: without_end(PNG) + png_chunk(b"tEXt", b"a\0b", crc=7) + PNG[-12:], gradient, 0),
    "empty pixels first": (lambda: png_with(png_chunk(b"IDAT", b"")), gradient, 0),
    "gamma of sRGB": (lambda: png_with(png_chunk(b"gAMA", struct.pack(">I", 45455))), gradient, 3),
    "unknown chunk": (lambda: png_with(png_chunk(b"prVt", b"x" * 99)), gradient, 0),
    "a key colour unused": (transparent_key, gradient, 0),
    "png palette": (lambda: encoded(gradient().quantize(256), "PNG"), gradient, 40),
    "one bit": (lambda: encoded(GREY.point(lambda v: 255 * (v > 100)).convert("1"), "PNG"), lambda: GREY.point(lambda v: 255 * (v > 100)).convert("RGB"), 0),
    "grey and alpha": (lambda: encoded(GREY.convert("LA"), "PNG"), lambda: GREY.convert("RGB"), 0),
    "gif of one frame": (lambda: encoded(gradient(), "GIF"), gradient, 90),
    "gif without trailer": (lambda: encoded(gradient(), "GIF")[:-1], gradient, 90),
    "bytes behind a gif": (lambda: encoded(gradient(), "GIF") + b"x", gradient, 90),
    "webp with alpha": (lambda: encoded(gradient().convert("RGBA"), "WEBP", lossless=True), gradient, 0),
    "webp with an unknown part": (lambda: webp_with(b"ABCD", b"xyz"), gradient, 0),
    "bytes behind a webp": (lambda: encoded(gradient(), "WEBP", lossless=True) + b"xx", gradient, 0),
    "bmp 565": (lambda: bmp(16), gradient, 9),
    "bmp from the top": (lambda: bmp(24), gradient, 0),
    "bmp palette": (lambda: encoded(GREY, "BMP"), lambda: GREY.convert("RGB"), 0),
    "tiff lzw": (lambda: encoded(gradient(), "TIFF", compression="tiff_lzw"), gradient, 0),
    "tiff jpeg": (lambda: encoded(gradient(), "TIFF", compression="jpeg", quality=95), gradient, 12),
    "tiff big": (lambda: encoded(gradient(), "TIFF", big_tiff=True), gradient, 0),
    "tiff turned": (lambda: encoded(gradient(), "TIFF", tiffinfo={274: 6}), turned, 0),
    "tiff big-endian": (big_endian_16, lambda: GREY.convert("RGB"), 1),
    "tiff floats": (floats, lambda: ImageOps.autocontrast(GREY).convert("RGB"), 2),
    "tiff inks": (lambda: encoded(gradient().convert("CMYK"), "TIFF"), gradient, 2),
    "tiff bits": (lambda: encoded(GREY.convert("1"), "TIFF", compression="group4"), lambda: GREY.convert("1").convert("RGB"), 0),
    "avif": (lambda: encoded(gradient(), "AVIF", quality=100), gradient, 30),
    "avif turned": (lambda: encoded(gradient(), "AVIF", quality=100, exif=TURN[6:]), turned, 30),
    "webp turned": (lambda: encoded(gradient(), "WEBP", lossless=True, exif=TURN), turned, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_a_picture_is_read(name: str) -> None:
    make, expected, tolerance = WHOLE[name]
    content = make()
    found, wanted = np.asarray(decode_image(content)).astype(int), np.asarray(expected()).astype(int)
    assert found.shape == wanted.shape
    assert abs(found - wanted).max() <= tolerance
    kept = decode_body(content, DecodeConfig())
    assert isinstance(kept, Decoded)
    again = np.asarray(decode_image(kept.content)).astype(int)
    assert abs(again - found).max() <= 40
    assert (kept.width, kept.height) == (wanted.shape[1], wanted.shape[0])


def apng() -> bytes:
    return encoded(gradient(), "PNG", save_all=True, append_images=[gradient().rotate(180)])


FRAMES = {
    "apng": apng,
    "webp": lambda: encoded(gradient(), "WEBP", save_all=True, append_images=[gradient().rotate(180)]),
    "gif": lambda: encoded(gradient(), "GIF", save_all=True, append_images=[gradient().rotate(180), gradient()]),
    "tiff": lambda: encoded(gradient(), "TIFF", save_all=True, append_images=[GREY]),
    "avif": lambda: encoded(gradient(), "AVIF", save_all=True, append_images=[gradient().rotate(180)]),
}


@pytest.mark.parametrize("name", FRAMES)
def test_several_frames(name: str) -> None:
    content = FRAMES[name]()
    found = decode_body(content, DecodeConfig())
    assert isinstance(found, Rejection)
    assert found.reason == "animated"
    first = np.asarray(decode_image(content)).astype(int)
    assert abs(first - np.asarray(gradient()).astype(int)).max() <= 95


def damaged(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :]


def zero_width() -> bytes:
    return PNG[:8] + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 0, 36, 8, 2, 0, 0, 0)) + PNG[33:]


BROKEN = {
    "nothing": lambda: b"",
    "two bytes": lambda: b"\xff\xd8",
    "only a magic": lambda: b"\x89PNG\r\n\x1a\n",
    "html": lambda: b"<!DOCTYPE html><html>Not found</html>",
    "json": lambda: b'{"error": "not found"}',
    "svg with a mark": lambda: b"\xef\xbb\xbf<svg xmlns='http://www.w3.org/2000/svg'/>",
    "gzip of a picture": lambda: gzip.compress(PNG),
    "text of base64": lambda: b"data:image/png;base64,iVBORw0KGgo=",
    "half a progressive jpeg": lambda: encoded(gradient((480, 360)), "JPEG", progressive=True)[:4000],
    "a tenth of a webp": lambda: encoded(gradient((480, 360)), "WEBP")[:300],
    "half a gif": lambda: encoded(gradient((480, 360)), "GIF")[:9000],
    "half a tiff": lambda: encoded(gradient((480, 360)), "TIFF")[:9000],
    "half a bmp": lambda: encoded(gradient((480, 360)), "BMP")[:9000],
    "half an avif": lambda: encoded(gradient((480, 360)), "AVIF")[:900],
    "pixels of a wrong checksum": lambda: damaged(PNG, 50),
    "zero wide": zero_width,
    "webp of a wrong kind": lambda: b"RIFF\x20\0\0\0WAVEfmt " + b"\0" * 30,
    "a video": lambda: b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + b"\0" * 50,
    "zeros": lambda: b"\0" * 5000,
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_whole_picture_is_refused_in_one_line(name: str) -> None:
    content = BROKEN[name]()
    with pytest.raises(ImageError, match=r"cat\.jpg") as caught:
        decode_image(content, "cat.jpg")
    assert "\n" not in str(caught.value)
    found = decode_body(content, DecodeConfig())
    assert isinstance(found, Rejection)
    assert found.reason in ("not_an_image", "truncated")
