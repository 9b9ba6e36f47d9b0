"""The entries of annotation files in COCO's format, read leniently, and the checks of their identity.

Files of label tools leave out sizes and boxes, write paths of other machines, and join files without new ids. What has
one obvious meaning is read so and counted in an `Account`; what has two is refused in a line that names both rows.
"""

import json
import math
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import msgspec

from data_prep.boxes.cleaning import Account
from data_prep.progress import working
from ovd_models.errors import InputError

EXPECTED = "an annotation file in COCO's or LVIS's format"
MAX_ID, MAX_CATEGORY_ID = 2**63 - 1, 2**31 - 1
"""Largest ids of images and of categories that tables hold."""
WORD = re.compile(r"[^\W_]")
DRIVE = re.compile(r"[a-zA-Z]:")
ROOTS = ("", "none", "null")
"""Supercategories of categories that have none."""


class Picture(msgspec.Struct, gc=False):
    """An entry of `images`."""

    id: int
    width: float | None = None
    height: float | None = None
    file_name: str | None = ""
    coco_url: str | None = ""
    neg_category_ids: list[int] | None = None
    not_exhaustive_category_ids: list[int] | None = None

    @property
    def name(self) -> str:
        """The file, for messages."""
        return self.file_name or self.coco_url or ""

    @property
    def has_size(self) -> bool:
        """Whether the file says how large the picture is."""
        return bool(self.width and self.height and min(self.width, self.height) >= 1)


class Annotation(msgspec.Struct, gc=False):
    """An entry of `annotations`; its mask is decoded when its row is made."""

    image_id: int
    category_id: int
    bbox: list[float] | None = None
    iscrowd: bool | int | None = 0
    segmentation: msgspec.Raw = msgspec.Raw()


class Category(msgspec.Struct, gc=False):
    """An entry of `categories`."""

    id: int
    name: str | None = None
    frequency: str | None = None
    synonyms: list[str] | None = None
    supercategory: str | None = None


class AnnotationFile(msgspec.Struct, gc=False):
    """The parts of an annotation file that are used."""

    images: list[Picture]
    annotations: list[Annotation]
    categories: list[Category]


class Named(Protocol):
    """An entry with an id and a name."""

    @property
    def id(self) -> int:
        """Its id."""

    @property
    def name(self) -> str | None:
        """For messages."""


T = TypeVar("T", bound=Named)
F = TypeVar("F")


def load_entries(path: str | Path, account: Account) -> AnnotationFile:
    """Read a file; its ids, file names and names of categories are then unique.

    Raises:
        InputError: the file is unreadable, a field is missing or wrong, or two entries have one identity.
    """
    content = decode_file(path, AnnotationFile, EXPECTED)
    if not content.images:
        raise InputError(f"{path}: images is empty, expected at least one")
    content.images = unique_entries(content.images, "images", str(path), account)
    content.categories = unique_entries(content.categories, "categories", str(path), account)
    _check_ids(content, str(path))
    _check_files(content.images, str(path))
    content.categories = _named_categories(content, str(path), account)
    _check_boxes(content.annotations, str(path))
    return content


def decode_file(path: str | Path, kind: type[F], expected: str) -> F:
    """The content of a JSON file in UTF-8, or UTF-16 with a byte-order mark.

    Raises:
        InputError: it cannot be read, is not JSON of this kind, or holds a number that is not finite.
    """
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise InputError(f"{path}: cannot be read (not a regular file), expected {expected}")
        content = Path(path).read_bytes()
        if content.startswith((b"\xff\xfe", b"\xfe\xff")):
            content = content.decode("utf-16").encode()
        with working(f"{path}: reading"):
            return msgspec.json.decode(content.removeprefix(b"\xef\xbb\xbf"), type=kind, strict=False)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}), expected {expected}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        where = _not_finite(content) if "malformed" in str(error) else ""
        raise InputError(f"{path}: {where or f'{error}, expected {expected}'}") from error


def _not_finite(content: bytes) -> str:
    """The place of the first NaN or Infinity, which Python and JavaScript write; empty if there is none."""
    try:
        pending: list[tuple[str, Any]] = [("", json.loads(content.removeprefix(b"\xef\xbb\xbf")))]
    except ValueError:
        return ""
    while pending:
        place, value = pending.pop()
        if isinstance(value, float) and not math.isfinite(value):
            return f"{place.removeprefix('.')} is {value}, expected a finite number"
        if isinstance(value, dict):
            pending += [(f"{place}.{key}", entry) for key, entry in reversed(value.items())]
        elif isinstance(value, list):
            pending += [(f"{place}[{number}]", entry) for number, entry in reversed(list(enumerate(value)))]
    return ""


def unique_entries(entries: Sequence[T], field: str, path: str, account: Account) -> list[T]:
    """Entries with an id each; copies of an entry are left out.

    Raises:
        InputError: two different entries have one id.
    """
    first: dict[int, int] = {}
    kept = []
    for number, entry in enumerate(entries):
        other = first.setdefault(entry.id, number)
        if other == number:
            kept.append(entry)
        elif entries[other] == entry:
            account.add("mended", f"repeated entries of {field}", f"{field}[{number}]")
        else:
            both = f"{field}[{other}] ({entries[other].name}) and {field}[{number}] ({entry.name})"
            raise InputError(f"{path}: {both} have the id {entry.id}, expected an id for each")
    return kept


def _check_ids(content: AnnotationFile, path: str) -> None:
    kinds: list[tuple[str, Sequence[Named], int]] = [
        ("images", content.images, MAX_ID),
        ("categories", content.categories, MAX_CATEGORY_ID),
    ]
    for field, entries, most in kinds:
        for number, entry in enumerate(entries):
            if abs(entry.id) > most:
                raise InputError(f"{path}: {field}[{number}]: id {entry.id}, expected at most {most}")


def _check_files(images: Sequence[Picture], path: str) -> None:
    first: dict[tuple[str | None, str | None], int] = {}
    for number, entry in enumerate(images):
        if not entry.name:
            raise InputError(f"{path}: image {entry.id}: no file_name and no coco_url, expected one")
        other = first.setdefault((entry.file_name, entry.coco_url), number)
        if other != number:
            both = f"images[{other}] (id {images[other].id}) and images[{number}] (id {entry.id})"
            raise InputError(f"{path}: {both} are of the file {entry.name}, expected a file for each")


def _check_boxes(annotations: Sequence[Annotation], path: str) -> None:
    """Raise InputError for a bbox that is not four numbers, and where all are fractions of their image."""
    largest = 0.0
    for number, entry in enumerate(annotations):
        if entry.bbox:
            if len(entry.bbox) != 4:
                raise InputError(f"{path}: annotations[{number}]: bbox of {len(entry.bbox)} numbers, expected 4")
            largest = max(largest, *entry.bbox)
    if 0 < largest <= 1:
        raise InputError(f"{path}: every bbox is within 0 and 1, expected x, y, width and height in pixels")


def _named_categories(content: AnnotationFile, path: str, account: Account) -> list[Category]:
    """Categories with trimmed names, without a root that only groups the others.

    Raises:
        InputError: a name is missing, without a letter or digit, or that of two categories.
    """
    used = {annotation.category_id for annotation in content.annotations}
    groups = {entry.supercategory for entry in content.categories}
    kept: dict[str, tuple[int, str]] = {}
    found = []
    for number, entry in enumerate(content.categories):
        place = f"categories[{number}] (id {entry.id})"
        name = " ".join((entry.name or "").split())
        if not WORD.search(name):
            given = "null" if entry.name is None else repr(entry.name)
            raise InputError(f"{path}: {place}: name {given}, expected a word")
        is_root = (entry.supercategory or "").lower() in ROOTS and entry.frequency is None
        if is_root and entry.id not in used and groups - {entry.supercategory} >= {entry.name}:
            account.add("left out", "categories that only group others", name)
            continue
        if name != entry.name:
            account.add("mended", "names with further spaces", f"{place} {entry.name!r}")
        other = kept.setdefault(unicodedata.normalize("NFC", name).casefold(), (number, place))
        if other[0] != number:
            both = f"{other[1]} {content.categories[other[0]].name!r} and {place} {entry.name!r}"
            raise InputError(f"{path}: {both} have one name, expected a name for each")
        found.append(msgspec.structs.replace(entry, name=name))
    return found


# --------------------------------------------------------------------------------------------------------------- paths


def inner_path(name: str) -> str:
    """A path of any system as one below a folder: without drive, root, `.` and `..`, with `/` between its parts."""
    path = DRIVE.sub("", name.replace("\\", "/"), count=1) if DRIVE.match(name) else name.replace("\\", "/")
    return "/".join(part for part in path.split("/") if part not in ("", ".", ".."))


def picture_places(picture: Picture, lvis: bool) -> list[str]:
    """A picture's possible paths: LVIS's official files name pictures by their address, whose folder is COCO's."""
    parts = inner_path(urlsplit(picture.coco_url).path).split("/") if picture.coco_url else []
    address = ["/".join(parts[-2:]), parts[-1]] if parts else []
    named = [inner_path(picture.file_name)] if picture.file_name else []
    if picture.file_name and "\\" in picture.file_name and "/" not in picture.file_name:
        named.insert(0, picture.file_name)  # an archive of Windows, unpacked as it is
    ordered = [*address, *named] if lvis else [*address[:1], *named, *address[1:]]
    return [place for place in dict.fromkeys(ordered) if place] or [inner_path(picture.name)]
