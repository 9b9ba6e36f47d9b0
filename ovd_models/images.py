"""Image files to upright RGB pictures in sRGB: the one reader of crawls, box sets, training, prediction and serving.

bytes --open_picture--> Picture (size, turn, frames) --decode--> 8-bit RGB

Metadata never decides whether a picture is read: what cannot be parsed is left out. Without torch, so that data tasks
start fast and stay small. `docs/files.md` lists the formats.
"""

import functools
import io
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

from ovd_models.errors import InputError
from ovd_models.metadata import has_damaged_pixels, without_metadata

MAX_PIXELS = 100_000_000
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF")
"""Formats that are decoded; Pillow knows others, some of which start programs."""
EXTENSIONS = ("jpg", "jpeg", "jpe", "jfif", "png", "gif", "webp", "bmp", "dib", "tif", "tiff", "avif")
"""Extensions of files in these formats."""
MAGIC: tuple[tuple[int, bytes], ...] = (
    (0, b"\xff\xd8\xff"), (0, b"\x89PNG\r\n\x1a\n"), (0, b"GIF8"), (8, b"WEBP"), (0, b"BM"), (0, b"II*\0"),
    (0, b"MM\0*"), (0, b"II+\0"), (0, b"MM\0+"),
)  # fmt: skip
"""Offset and first bytes of these formats, except AVIF's."""
AVIF_BRANDS = (b"avif", b"avis")
MAX_BRANDS_BYTES = 1024
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""EXIF orientation -> what undoes it."""
SIDEWAYS = tuple(TURNS[code] for code in (5, 6, 7, 8))
DEPTHS = (8, 10, 12, 14, 16)
"""Bits of a camera's or scanner's greys; files store more than 8 in 16."""
COLOUR_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}
"""Mode of a picture -> colour space of a profile that fits it."""
SRGB_LEVELS = 3
"""A profile that changes no colour by more levels of 255 counts as sRGB."""
ImageReason = Literal["not_an_image", "truncated", "too_many_pixels"]


class ImageError(InputError):
    """Why an image file is not read; the message names the file."""

    def __init__(self, message: str, reason: ImageReason = "not_an_image") -> None:
        super().__init__(message)
        self.reason: ImageReason = reason


def has_image_magic(content: bytes) -> bool:
    """Whether a file begins like one of `FORMATS`: a cheap check before decoding."""
    return any(content[offset : offset + len(magic)] == magic for offset, magic in MAGIC) or is_avif(content)


def is_avif(content: bytes) -> bool:
    """Whether AVIF is among the brands, major or compatible, of a file."""
    if content[4:8] != b"ftyp":
        return False
    size = min(struct.unpack_from(">I", content)[0], MAX_BRANDS_BYTES)
    brands = [content[8:12], *(content[start : start + 4] for start in range(16, size, 4))]
    return any(brand in AVIF_BRANDS for brand in brands)


@dataclass(frozen=True)
class Picture:
    """An image file whose header was read, but no pixels yet."""

    name: str
    """For error messages."""
    image: Image.Image
    """Not decoded, as stored."""
    turn: Image.Transpose | None
    """What makes it upright, by its EXIF orientation; None if it is."""
    content: bytes
    """The file."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the upright picture."""
        width, height = self.image.size
        return (height, width) if self.turn in SIDEWAYS else (width, height)

    @property
    def frames(self) -> int:
        """Frames of an animation, pages of a document; 1 for a single picture and for the pair of a stereo camera."""
        try:
            return 1 if self.image.format == "MPO" else int(getattr(self.image, "n_frames", 1))
        except Exception:  # a broken frame after the first
            return 1

    @property
    def is_plain(self) -> bool:
        """Whether the decoded colours are used as they are: upright, and in sRGB."""
        return self.turn is None and srgb_transform(_profile(self.image), self.image.mode) is None

    def decode(self) -> Image.Image:
        """The upright picture as 8-bit RGB in sRGB.

        Raises:
            ImageError: the file is not whole.
        """
        try:
            try:
                return self._decode(self.image, self.content)
            except Exception:  # Pillow's plugins raise anything
                stripped = without_metadata(self.content)
                if stripped == self.content:
                    raise
                return self._decode(_open(stripped), stripped)
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ImageError(f"{self.name}: broken image, expected a whole file ({reason})", "truncated") from error

    def _decode(self, image: Image.Image, content: bytes) -> Image.Image:
        if image.format == "PNG" and has_damaged_pixels(content):
            raise ValueError("wrong checksum of the pixels")
        image.load()
        deep = decode_deep(image, content)
        if deep is not None:
            deep.info = {"icc_profile": _profile(image)}
        found = to_rgb(deep or image)
        found = found if self.turn is None else found.transpose(self.turn)
        found.info = {}  # otherwise it would be turned again
        return found


def open_picture(content: bytes, name: str = "image", max_pixels: int = MAX_PIXELS) -> Picture:
    """Read the header of an image file.

    Raises:
        ImageError: the bytes are not in one of `FORMATS`, or declare more than `max_pixels` pixels.
    """
    try:
        if not has_image_magic(content):
            raise ValueError(f"starts with {content[:16]!r}")
        try:
            image = _open(content)
        except Image.DecompressionBombError:
            raise
        except Exception:  # Pillow's plugins raise anything
            image = _open(without_metadata(content))
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: too many pixels, at most {max_pixels:,} are accepted", "too_many_pixels") from error
    except Exception as error:
        raise ImageError(f"{name}: not an image, expected JPEG, PNG, WebP or the like", "not_an_image") from error
    if image.width * image.height > max_pixels:
        size = f"{image.width} x {image.height} pixels"
        raise ImageError(f"{name}: {size}, at most {max_pixels:,} are accepted", "too_many_pixels")
    return Picture(name, image, orientation(image), content)


def _open(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content), formats=FORMATS)


def open_image(path: str | Path) -> Image.Image:
    """An upright RGB picture in sRGB.

    Raises:
        InputError: there is no such regular file, it is not an image, or it has too many pixels.
    """
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise InputError(f"{path}: cannot be read (not a regular file), expected an image file")
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null byte
        if isinstance(error, InputError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read ({reason}), expected an image file") from error
    return decode_image(content, str(path))


def decode_image(content: bytes, name: str = "image") -> Image.Image:
    """An upright RGB picture in sRGB from a file's bytes; `name` is used in error messages.

    Raises:
        ImageError: the bytes are not a whole image, or it has more than `MAX_PIXELS` pixels.
    """
    return open_picture(content, name).decode()


def check_whole(picture: Picture) -> None:
    """Check that an image file was not cut short; decodes it only if its end does not tell.

    Raises:
        ImageError: the file is not whole.
    """
    end = picture.content[-64:].rstrip(b"\0\r\n ")
    if not (end.endswith(b"\xff\xd9") or b"IEND" in end):
        picture.decode()


def orientation(image: Image.Image) -> Image.Transpose | None:
    """The transposition that makes a picture upright by its EXIF orientation; None if it is, or EXIF is damaged."""
    if image.format == "TIFF":  # Pillow turns it
        return None
    try:
        return TURNS.get(image.getexif().get(0x0112, 1))
    except Exception:  # Pillow raises anything
        return None


def upright(image: Image.Image) -> Image.Image:
    """The picture turned by its EXIF orientation; metadata that holds the orientation is then dropped."""
    turn = orientation(image)
    if turn is None:
        return image
    turned = image.transpose(turn)
    for name in ("exif", "xmp", "XML:com.adobe.xmp"):  # otherwise it would be turned again
        turned.info.pop(name, None)
    return turned


# ------------------------------------------------------------------------------------------------------------- colours


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode as 8-bit RGB in sRGB: transparency over white, greys of more bits scaled by their real depth.

    Transparency that hides the whole picture is ignored: 32-bit files often leave it 0. So is a colour profile that
    does not fit.
    """
    profile = _profile(image)
    if image.mode.startswith("I") or image.mode == "F":
        image, profile = Image.fromarray(scale_deep(np.asarray(image))), b""
    if not image.has_transparency_data:
        return to_srgb(image, profile)
    layer = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")  # Pillow converts La to LA alone
    alpha = layer.getchannel("A")
    colours = to_srgb(layer.convert("RGB"), profile)
    if alpha.getextrema()[1] == 0:
        return colours
    return Image.composite(colours, Image.new("RGB", layer.size, "white"), alpha)


def decode_deep(image: Image.Image, content: bytes) -> Image.Image | None:
    """8-bit RGB or RGBA of a file with 16 bits a colour, of which Pillow drops the lower eight; None for others."""
    png = image.format == "PNG" and content[24] == 16 and image.mode in ("RGB", "RGBA", "LA")
    tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    tiff = tags.get(258) in ((16,) * 3, (16,) * 4)
    if not (png or (tiff and image.mode in ("RGB", "RGBA"))):
        return None
    flags = cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION
    pixels = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    if pixels is None or pixels.dtype != np.uint16 or pixels.ndim != 3:
        return None
    found = scale_deep(np.ascontiguousarray(pixels[..., 2::-1]))
    if pixels.shape[2] == 4:
        found = np.concatenate([found, (pixels[..., 3:] // 257).astype(np.uint8)], -1)
    deep, turn = Image.fromarray(found), TURNS.get(tags.get(274, 1))
    deep = deep.transpose(turn) if turn is not None else deep
    return deep if deep.size == image.size else None


def scale_deep(values: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
    """Values of more than 8 bits as 8 bits.

    Integers are scaled by the smallest of `DEPTHS` that holds them all, as files rarely say how many bits they use, or
    else by their maximum, and floats by their finite extremes. Negative integers and what is not a number become 0.
    """
    deep = values.astype(np.float64)
    if np.issubdtype(values.dtype, np.floating):
        finite = deep[np.isfinite(deep)]
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
        deep = np.nan_to_num((deep - low) / (high - low or 1.0), nan=0.0, posinf=1.0, neginf=0.0)
    else:
        peak = float(deep.max()) if deep.size else 0.0
        deep = deep / next((2.0**bits - 1 for bits in DEPTHS if peak < 1 << bits), peak)
    return np.asarray(np.clip(np.rint(deep * 255), 0, 255), np.uint8)


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """A picture without transparency as RGB, converted from the colour profile of its file if that fits it."""
    if image.mode not in COLOUR_SPACES:
        image = image.convert("RGB")
    transform = srgb_transform(profile, image.mode)
    if transform is None:
        found = image.copy() if image.mode == "RGB" else image.convert("RGB")
    else:
        found = Image.new("RGB", image.size)
        transform.apply(image, found)
        found.info = dict(image.info)
    found.info.pop("icc_profile", None)  # otherwise it would be converted again
    return found


@functools.lru_cache(maxsize=64)
def srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The conversion of a mode's pixels from an ICC profile to sRGB; None if there is none to make."""
    if not profile or mode not in COLOUR_SPACES:
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != COLOUR_SPACES[mode]:
            return None
        intent = ImageCms.Intent(ImageCms.getDefaultIntent(source))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB", intent)
        if mode != "CMYK":
            levels = np.arange(0, 256, 17, dtype=np.uint8)
            grid = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
            colours = Image.fromarray(grid) if mode == "RGB" else Image.fromarray(levels[None])
            found = ImageCms.applyTransform(colours, transform)
            change = np.asarray(found, np.int64) - np.asarray(colours.convert("RGB"), np.int64)
            if np.abs(change).max() <= SRGB_LEVELS:
                return None
    except Exception:  # a damaged profile never decides about a picture
        return None
    return transform


def _profile(image: Image.Image) -> bytes:
    profile = image.info.get("icc_profile")
    return profile if isinstance(profile, bytes) else b""


def fitted_size(height: int, width: int, side: int) -> tuple[int, int]:
    """Height and width resized to a longer side of `side` pixels, rounded as SAM does; at least 1."""
    scale = side / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))
