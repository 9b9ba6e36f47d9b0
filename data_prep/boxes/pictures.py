"""The image files that an annotation file names: looked for in their folder only, measured and hashed."""

import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from urllib.parse import unquote

import pyarrow as pa
from pyarrow import fs

from data_prep import storage, tables
from data_prep.boxes.cleaning import Account
from data_prep.parts import ahead
from data_prep.progress import watched
from ovd_models.errors import InputError
from ovd_models.images import ImageError, check_whole, open_picture

READERS = 4 * (os.cpu_count() or 1)
"""Readers of image files, which mostly wait for a disk or a network."""
MISSING = "missing pictures"
UNREADABLE = "pictures that cannot be read"
OTHER_SIZE = "pictures of another size than the file says"


@dataclass(frozen=True)
class Found:
    """A picture's file."""

    uri: str
    image_id: str
    """SHA-256 of the file."""
    size: tuple[int, int]
    """Upright width and height."""
    renamed: bool
    """Whether the annotation file has another path."""


@dataclass(frozen=True)
class Absent:
    """Why a picture is left out."""

    kind: str
    place: str
    message: str


class PictureFolder:
    """A folder of pictures. No file outside it is read, whatever an annotation file names."""

    def __init__(self, uri: str, origin: str) -> None:
        """Name the folder, and the annotation file for messages."""
        self.root, self._origin = storage.absolute(uri), origin

    def read(self, places: Sequence[Sequence[str]]) -> list[Found | Absent]:
        """Find, measure and hash pictures, many at a time.

        Args:
            places: each picture's possible paths below the folder, best first. Those in a subfolder that is not there
                are skipped. For a picture that is at none, the only file is taken whose path ends in the picture's, or
                in which the picture's ends (`images/a.jpg` for `a.jpg` and the reverse), in any Unicode form and case.
        """
        folders = {folder for options in places for path in options[:-1] if (folder := path.rpartition("/")[0])}
        absent = {folder for folder in folders if not storage.exists(storage.join(self.root, folder))}
        chosen = [next((p for p in options if p.rpartition("/")[0] not in absent), options[-1]) for options in places]
        with ThreadPoolExecutor(READERS) as pool:
            calls = (partial(self._read_file, path) for path in chosen)
            found = list(watched(ahead(calls, pool, 4 * READERS), "boxes", "pictures", len(chosen)))
            missing = [number for number, one in enumerate(found) if isinstance(one, Absent) and one.kind == MISSING]
            if missing:
                again = pool.map(lambda number: self._read_alike(places[number], found[number]), missing)
                for number, one in zip(missing, again, strict=True):
                    found[number] = one
        return found

    def _read_file(self, path: str, renamed: bool = False) -> Found | Absent:
        uri = storage.join(self.root, path)
        expected = f"expected an image file, named by {self._origin}"
        try:
            content = storage.read_bytes(uri)
            picture = open_picture(content, uri)
            check_whole(picture)
        except ImageError as error:
            return Absent(UNREADABLE, path, f"{error}, named by {self._origin}")
        except FileNotFoundError as error:
            return Absent(MISSING, path, f"{uri}: cannot be read ({error.strerror or 'no such file'}), {expected}")
        except (OSError, ValueError) as error:
            text = " ".join(str(error).split()).removeprefix(f"{uri}: cannot be read: ")
            reason = getattr(error, "strerror", None) or text
            return Absent(UNREADABLE, path, f"{uri}: cannot be read ({reason}), {expected}")
        return Found(uri, storage.sha256(content), picture.size, renamed)

    def _read_alike(self, options: Sequence[str], missing: Found | Absent) -> Found | Absent:
        """The only file whose path ends like a picture's longest one, or the reverse; else `missing`.

        `cam2/1.jpg` is never taken for `cam1/1.jpg`.
        """
        longest = [path for path in options if not any(other.endswith(f"/{path}") for other in options)]
        for path in (*longest, *map(unquote, longest)):
            if alike := self._files.find(path):
                return self._read_file(alike, renamed=True)
        return missing

    @cached_property
    def _files(self) -> "PathEnds":
        filesystem, root = storage.resolve(self.root)
        infos = filesystem.get_file_info(fs.FileSelector(root, allow_not_found=True, recursive=True))
        return PathEnds(info.path.removeprefix(root).lstrip("/") for info in infos if info.type == fs.FileType.File)


class PathEnds:
    """Paths that are found by how they end, in any Unicode form and case."""

    def __init__(self, paths: Iterable[str]) -> None:
        """Index the paths by their plain file name."""
        self._by_name: dict[str, list[str]] = defaultdict(list)
        for path in paths:
            self._by_name[_plain(path).rpartition("/")[2]].append(path)

    def find(self, path: str) -> str:
        """The only path that ends in another, or in which the other ends; empty if there is none, or several."""
        other = f"/{_plain(path)}"
        names = self._by_name.get(other.rpartition("/")[2], [])
        alike = [name for name in names if f"/{_plain(name)}".endswith(other) or other.endswith(f"/{_plain(name)}")]
        return alike[0] if len(alike) == 1 else ""


def _plain(path: str) -> str:
    return unicodedata.normalize("NFC", path).casefold()


def add_pictures(rows: pa.Table, images: str, origin: str, account: Account | None = None) -> pa.Table:
    """Rows of `boxes` from those of `read_annotations`; pictures that are missing or broken are left out.

    Args:
        rows: of `read_annotations`.
        images: folder or URI with the pictures, see `PictureFolder.read`.
        origin: the annotation file, for messages.
        account: takes what is odd; printed if None.

    Raises:
        InputError: half of the pictures or more are missing, unreadable or of another size, or one file is named twice.
    """
    own = Account(origin) if account is None else account
    kept, found = [], []
    failures = []
    sizes = zip(rows["width"].to_pylist(), rows["height"].to_pylist(), strict=True)
    pictures = PictureFolder(images, origin).read(rows["places"].to_pylist())
    for number, (one, size) in enumerate(zip(pictures, sizes, strict=True)):
        if isinstance(one, Found) and one.size != size:
            message = f"{one.uri}: {one.size[0]} x {one.size[1]} pixels, {origin} says {size[0]} x {size[1]}"
            one = Absent(OTHER_SIZE, rows["places"][number][-1].as_py(), message)
        if isinstance(one, Absent):
            failures.append(one)
            own.add("left out", one.kind, one.place)
            continue
        if one.renamed:
            own.add("mended", "paths of pictures", f"{rows['places'][number][0].as_py()} is {one.uri}")
        kept.append(number)
        found.append(one)
    refuse_half(failures, rows.num_rows)
    _check_distinct(rows.take(pa.array(kept, pa.int64())), [one.uri for one in found], origin)
    if account is None:
        own.print()
    columns = {"image_id": [one.image_id for one in found], "uri": [one.uri for one in found]}
    schema, rows = tables.SCHEMAS["boxes"], rows.take(pa.array(kept, pa.int64()))
    arrays = {name: pa.array(columns[name], pa.string()) if name in columns else rows[name] for name in schema.names}
    return pa.table(arrays, schema)


def refuse_half(failures: Sequence[Absent], count: int) -> None:
    """Raise InputError with the first of some failures if they are half of all or more: the folder is a wrong one."""
    if failures and 2 * len(failures) >= count:
        few = f" ({len(failures):,} of {count:,} pictures are left out)" if count > 1 else ""
        raise InputError(f"{failures[0].message}{few}")


def _check_distinct(rows: pa.Table, uris: Sequence[str], origin: str) -> None:
    first: dict[str, int] = {}
    for number, uri in enumerate(uris):
        other = first.setdefault(uri, number)
        if other != number:
            ids = rows["source_id"]
            both = f"images with the ids {ids[other]} and {ids[number]}"
            raise InputError(f"{origin}: {both} are of the file {uri}, expected a file for each")
