"""Folders of images without annotations, such as SA-1B's, as rows of the `boxes` table."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
from pyarrow import fs

from data_prep import storage, tables
from data_prep.boxes.cleaning import SkipReport
from ovd_models.errors import InputError
from ovd_models.images import EXTENSIONS, open_picture

THREADS = 16
"""Files read at a time: their reading takes longer than their hashing."""


def list_images(folder: str) -> list[str]:
    """Paths of the images in a folder and the folders below, relative to it and sorted; other files are ignored.

    Raises:
        InputError: there are none.
    """
    filesystem, path = storage.resolve(folder)
    infos = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True, recursive=True))
    files = [info for info in infos if info.type == fs.FileType.File and info.extension.lower() in EXTENSIONS]
    if not files:
        raise InputError(f"{folder}: no images, expected files with the extensions {', '.join(EXTENSIONS)}")
    return sorted(info.path.removeprefix(path).lstrip("/") for info in files)


def read_images(folder: str, paths: list[str]) -> tuple[pa.Table, SkipReport]:
    """Rows of `boxes` without boxes for the images of `list_images`, and a report of those that cannot be read.

    Raises:
        InputError: none can be read.
    """
    root, skipped = storage.absolute(folder), SkipReport()
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(_read_image, (storage.join(root, path) for path in paths)))
    rows = [{**row, "source_id": number} for number, row in enumerate(found) if not isinstance(row, str)]
    for reason in found:
        if isinstance(reason, str):
            skipped.add("images that cannot be read", reason)
    if not rows:
        raise InputError(f"{folder}: no image can be read: {skipped}")
    return pa.Table.from_pylist(rows, schema=tables.SCHEMAS["boxes"]), skipped


def _read_image(uri: str) -> Mapping[str, Any] | str:
    """A row of `boxes`, or why there is none."""
    try:
        content = storage.read_bytes(uri)
        width, height = open_picture(content, uri).size
    except InputError as error:
        return str(error)
    except OSError as error:
        return f"{uri}: cannot be read ({' '.join(str(error).split())})"
    empty: list[Any] = []
    lists = ("boxes", "category_ids", "iscrowd", "masks", "neg_category_ids", "not_exhaustive_category_ids")
    row = {"image_id": storage.sha256(content), "uri": uri, "width": width, "height": height}
    return {**row, **dict.fromkeys(lists, empty)}
