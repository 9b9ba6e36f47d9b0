"""Image files without their metadata: the same pixel data in a smaller container."""

import struct
import zlib

PNG = b"\x89PNG\r\n\x1a\n"
PIXEL_CHUNKS = frozenset(
    {b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"iCCP", b"acTL", b"fcTL", b"fdAT", b"gAMA", b"cHRM", b"sRGB"}
)
"""Chunks of a PNG file that say how its pixels look."""
JFIF_BYTES = 18
"""Smallest JFIF header, with its marker."""
ADOBE_BYTES = 16
"""Adobe's colour transform, with its marker."""
RIFF_METADATA = (b"EXIF", b"XMP ")


def without_metadata(content: bytes) -> bytes:
    """A JPEG, PNG or WebP file without what is neither pixels nor colours; another file as it is."""
    if content.startswith(b"\xff\xd8"):
        return strip_jpeg(content, keep_profile=True)
    if content.startswith(PNG):
        return strip_png(content)
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return strip_webp(content)
    return content


def strip_jpeg(content: bytes, *, keep_profile: bool = False) -> bytes:
    """Remove EXIF, XMP, comments and, unless it is kept, the colour profile from a JPEG file.

    Of the application segments, only the JFIF header and Adobe's colour transform remain.
    """
    position, kept = 2, [content[:2]]
    while position + 4 <= len(content) and content[position] == 0xFF:
        marker = content[position + 1]
        if marker == 0xFF:  # padding
            position += 1
            continue
        if marker == 0xDA:  # the scan: pixel data follows
            break
        stop = position + 2 + struct.unpack_from(">H", content, position + 2)[0]
        if stop - position < {0xE0: JFIF_BYTES, 0xEE: ADOBE_BYTES}.get(marker, 0):  # cut short
            marker = 0xFE
        profile = keep_profile and content[position + 4 : position + 16] == b"ICC_PROFILE\0"
        if profile or not (0xE1 <= marker <= 0xED or marker == 0xEF or marker == 0xFE):
            kept.append(content[position:stop])
        position = stop
    kept.append(content[position:])
    return b"".join(kept)


def strip_png(content: bytes) -> bytes:
    """Remove all chunks of a PNG file but `PIXEL_CHUNKS`, and of those that are optional the damaged ones."""
    position, kept = len(PNG), [PNG]
    while position + 8 <= len(content):
        size, kind = struct.unpack_from(">I4s", content, position)
        stop = position + 12 + size
        optional = kind[:1].islower() and kind not in (b"fcTL", b"fdAT")
        whole = not optional or content[stop - 4 : stop] == struct.pack(
            ">I", zlib.crc32(content[position + 4 : stop - 4])
        )
        if kind in PIXEL_CHUNKS and whole:
            kept.append(content[position:stop])
        position = stop
    return b"".join(kept)


def has_damaged_pixels(png: bytes) -> bool:
    """Whether a checksum of the pixel data of a PNG file is wrong; Pillow does not look at them."""
    position = len(PNG)
    while position + 12 <= len(png):
        size, kind = struct.unpack_from(">I4s", png, position)
        stop = position + 8 + size
        if kind == b"IDAT" and stop + 4 <= len(png):
            data = memoryview(png)[position + 4 : stop]
            if zlib.crc32(data) != struct.unpack_from(">I", png, stop)[0]:
                return True
        position = stop + 4
    return False


def strip_webp(content: bytes) -> bytes:
    """Remove EXIF and XMP from a WebP file."""
    position, kept = 12, []
    while position + 8 <= len(content):
        kind, size = struct.unpack_from("<4sI", content, position)
        stop = position + 8 + size + size % 2
        if kind not in RIFF_METADATA:
            chunk = content[position:stop]
            if kind == b"VP8X":  # flags: 8 is EXIF, 4 is XMP
                chunk = chunk[:8] + bytes([chunk[8] & ~12 & 255]) + chunk[9:] if len(chunk) > 8 else chunk
            kept.append(chunk)
        position = stop
    body = b"WEBP" + b"".join(kept)
    return b"RIFF" + struct.pack("<I", len(body)) + body
