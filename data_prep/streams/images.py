"""Image files, and images inside tar shards, read for a stream."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from data_prep import storage
from ovd_models.errors import InputError
from ovd_models.images import decode_image

MAX_ATTEMPTS = 100
"""Images tried for one position of a stream before the table is considered broken."""
CONCURRENT_READS = 8
"""Of a process; an object store answers each in tens of milliseconds."""
UNREADABLE = pa.schema({"unreadable": pa.list_(pa.string())})
"""The images that a row's image replaces, with the reason."""
S = TypeVar("S")
T = TypeVar("T")


def read_all(read: Callable[[S], T], items: Iterable[S]) -> list[T]:
    """What `read` returns for each item, in order; several are read at a time."""
    with ThreadPoolExecutor(CONCURRENT_READS) as pool:
        return list(pool.map(read, items))


def read_image(uri: str, *, offset: int = 0, size: int | None = None) -> Image.Image:
    """Decode an image file, or the `size` bytes at `offset` of a shard, read as one range.

    Raises:
        InputError: there is no such file, it cannot be read, or the bytes are not a whole image.
        OSError: the file is remote and its storage fails, which says nothing about the image.
    """
    name = uri if size is None else f"{uri}@{offset}"
    try:
        content = storage.read_bytes(uri, offset=offset, size=size)
    except FileNotFoundError as error:
        raise InputError(f"{name}: no such file, expected an image") from error
    except OSError as error:
        if "://" in uri:
            raise
        reason = " ".join(str(error).split()).removeprefix(f"{uri}: cannot be read: ")
        raise InputError(f"{name}: cannot be read ({reason}), expected an image") from error
    return decode_image(content, name)


def try_image(uri: str) -> Image.Image | str:
    """An image, or why it cannot be read."""
    try:
        return read_image(uri)
    except InputError as error:
        return str(error)


@dataclass(frozen=True)
class ImageRow:
    """A row of a table with its image."""

    row: dict[str, Any]
    image: Image.Image
    unreadable: list[str]
    """Images that could not be read and were replaced by this one, with the reason."""


def read_rows(
    index: pa.Table,
    numbers: npt.NDArray[np.int64],
    positions: npt.NDArray[np.int64],
    seed: int,
    read: Callable[[dict[str, Any]], Image.Image],
) -> list[ImageRow]:
    """Rows of a table with their images, where one that cannot be read is replaced by another.

    Replacements depend only on the seed and the position, so that batches stay full and resumed streams are equal.

    Args:
        index: the table.
        numbers: of the rows.
        positions: of the stream, one for each row.
        seed: of the stream.
        read: reads the image of a row; raises InputError if it cannot be read.

    Raises:
        InputError: `MAX_ATTEMPTS` images for one position cannot be read.
        OSError: the storage fails: other images in place of these would change the stream.
    """

    def read_one(number: int, position: int) -> ImageRow:
        rng = np.random.default_rng([seed, position, 4])
        unreadable: list[str] = []
        for _ in range(MAX_ATTEMPTS):
            (row,) = index.slice(number, 1).to_pylist()
            try:
                return ImageRow(row, read(row), list(dict.fromkeys(unreadable)))
            except InputError as error:
                unreadable.append(str(error))
                number = int(rng.integers(index.num_rows))
        raise InputError(f"{MAX_ATTEMPTS} images one after another cannot be read, such as {unreadable[0]}")

    return read_all(lambda pair: read_one(*pair), zip(numbers.tolist(), positions.tolist(), strict=True))


def unreadable_column(rows: Sequence[ImageRow]) -> pa.Array:
    """The column of `UNREADABLE`."""
    return pa.array([entry.unreadable for entry in rows], UNREADABLE.field("unreadable").type)
