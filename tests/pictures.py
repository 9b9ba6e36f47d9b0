"""Image files with damaged or rare parts, built from whole ones."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

SIZE = (48, 36)


def gradient(size: tuple[int, int] = SIZE) -> Image.Image:
    """A smooth picture without symmetry."""
    y, x = np.mgrid[0 : size[1], 0 : size[0]]
    return Image.fromarray(np.stack([x * 5 % 256, y * 7 % 256, (x + y) * 3 % 256], -1).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """A file of a picture."""
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def jpeg_with(marker: int, data: bytes, content: bytes = b"") -> bytes:
    """A JPEG file with a further segment at its start."""
    content = content or encoded(gradient(), "JPEG", quality=95)
    return content[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data + content[2:]


def png_chunk(kind: bytes, data: bytes, *, crc: int | None = None) -> bytes:
    """A chunk of a PNG file, with a wrong checksum if one is given."""
    return (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) if crc is None else crc)
    )


def png_with(*chunks: bytes, content: bytes = b"") -> bytes:
    """A PNG file with further chunks behind its header."""
    content = content or encoded(gradient(), "PNG")
    return content[:33] + b"".join(chunks) + content[33:]


def webp_with(kind: bytes, data: bytes) -> bytes:
    """A WebP file with a further chunk."""
    content = encoded(gradient(), "WEBP", lossless=True, exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0")
    body = content[12:] + kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def exif_of(entries: bytes, count: int = 1) -> bytes:
    """EXIF with the given directory entries of 12 bytes."""
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", count) + entries + b"\0\0\0\0"


def icc_profile(primaries: list[list[float]], gamma: float, description: bytes = b"test") -> bytes:
    """A colour profile (ICC version 2) from the XYZ of its red, green and blue at D50, and its gamma.

    A gamma of 0 is the curve of sRGB.
    """

    def xyz(values: list[float]) -> bytes:
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))

    levels = np.linspace(0, 1, 1024)
    linear = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    table = np.rint(linear * 65535).astype(">u2").tobytes()
    entries = struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0" if gamma else struct.pack(">I", 1024) + table
    curve = b"curv\0\0\0\0" + entries
    text = b"desc\0\0\0\0" + struct.pack(">I", len(description) + 1) + description + b"\0" + bytes(78)
    tags = {b"desc": text, b"wtpt": xyz([0.9642, 1.0, 0.8249]), b"cprt": b"text\0\0\0\0none\0\0\0\0"}
    tags |= {name + b"XYZ": xyz(values) for name, values in zip((b"r", b"g", b"b"), primaries, strict=True)}
    tags |= {name + b"TRC": curve for name in (b"r", b"g", b"b")}
    return _profile(b"RGB ", tags)


def grey_profile(gamma: float) -> bytes:
    """A grey colour profile."""
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"grey\0" + bytes(78)
    return _profile(b"GRAY", {b"desc": text, b"wtpt": white, b"kTRC": curve, b"cprt": b"text\0\0\0\0none\0\0\0\0"})


def cmyk_profile() -> bytes:
    """A profile of inks whose lightness falls with each of them, and that have no colour."""
    grid = [255 - min(255, 64 * (c + m + y) + 255 * k) for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)]
    ramp = bytes(range(256))
    table = struct.pack(">4sIBBBx", b"mft1", 0, 4, 3, 2) + struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    table += ramp * 4 + b"".join(bytes([level, 128, 128]) for level in grid) + ramp * 3
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"inks\0" + bytes(78)
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)
    tags = {b"desc": text, b"wtpt": white, b"A2B0": table, b"cprt": b"text\0\0\0\0none\0\0\0\0"}
    return _profile(b"CMYK", tags, b"prtr", b"Lab ")


def _profile(space: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr", connection: bytes = b"XYZ ") -> bytes:
    start, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += struct.pack(">4sII", name, start + len(body), len(data))
        body += data
    size = start + len(body)
    header = struct.pack(">I4sI4s4s4s12x4s", size, b"test", 0x02400000, kind, space, connection, b"acsp")
    header = header.ljust(68, b"\0") + struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


ADOBE_RGB = icc_profile([[0.60974, 0.31111, 0.01947], [0.20528, 0.62567, 0.06087], [0.14919, 0.06322, 0.74457]], 2.199)
DISPLAY_P3 = icc_profile([[0.51512, 0.2412, -0.00105], [0.29198, 0.69225, 0.04189], [0.1571, 0.06657, 0.78407]], 2.2)
WIDE_GAMUT = icc_profile([[0.7161, 0.2582, 0.0], [0.1009, 0.7249, 0.0518], [0.1472, 0.0169, 0.7731]], 2.199)
PROPHOTO = icc_profile([[0.7977, 0.288, 0.0], [0.1352, 0.7119, 0.0], [0.0313, 0.0001, 0.8249]], 1.8)
SRGB_LIKE = icc_profile(
    [[0.43607, 0.22249, 0.01392], [0.38515, 0.71687, 0.09708], [0.14307, 0.06061, 0.7141]], 0, b"c2"
)
