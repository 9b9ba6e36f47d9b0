"""WebDataset shards as input lists, such as those that img2dataset writes: a row is a sample of a tar file.

for rows in read_tar(stream, "s3://bucket/cc3m/00000.tar", seekable=False):   # url, caption, label, web_url
    ...
locate("s3://bucket/cc3m/00000.tar#512+20480")                                # the image's file, offset and size

Only file headers, captions and labels are read here; a crawler reads an image as one range.
"""

import json
import re
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa

from ovd_models.errors import InputError

IMAGES = ("jpg", "jpeg", "png", "webp")
TEXTS = ("txt", "cls", "json")
"""Members that are read: the caption, the class, and a JSON object that may hold either, and the image's URL."""
ROWS = pa.schema({"url": pa.string(), "caption": pa.string(), "label": pa.string(), "web_url": pa.string()})
ROWS_PER_BLOCK = 1 << 13
BUFFER_BYTES = 1 << 20
PLACE = re.compile(r"(.*\.tar)#(\d+)\+(\d+)", re.IGNORECASE | re.DOTALL)


def read_tar(stream: BinaryIO, uri: str, *, seekable: bool) -> Iterator[pa.Table]:
    """The samples of a tar file in blocks of `ROWS`; a sample is consecutive members with the same name up to a dot.

    Args:
        stream: the file's content.
        uri: of the file.
        seekable: whether images can be skipped; otherwise the whole file is read.

    Raises:
        InputError: a member's text is malformed.
        tarfile.TarError: it is no tar file.
    """
    rows: list[dict[str, Any]] = []
    key = ""
    with tarfile.open(fileobj=stream, mode="r:" if seekable else "r|", bufsize=BUFFER_BYTES) as tar:
        for member in tar:
            folder, _, name = member.name.rpartition("/")
            stem, _, extension = name.partition(".")
            extension = extension.lower()
            if not member.isfile() or extension not in IMAGES + TEXTS:
                continue
            if not rows or key != f"{folder}/{stem}":
                key = f"{folder}/{stem}"
                if len(rows) == ROWS_PER_BLOCK:
                    yield pa.Table.from_pylist(rows, schema=ROWS)
                    rows = []
                rows.append({})
            if extension in IMAGES:
                rows[-1].setdefault("url", f"{uri}#{member.offset_data}+{member.size}")
            else:
                file = tar.extractfile(member)
                rows[-1] |= _read_text(extension, file.read() if file else b"", f"{uri}: {member.name}", rows[-1])
    yield pa.Table.from_pylist(rows, schema=ROWS)


def _read_text(extension: str, content: bytes, place: str, row: dict[str, Any]) -> dict[str, Any]:
    """The columns that a member adds to its sample; those of .txt and .cls come before those of .json."""
    try:
        text = content.decode()
        if extension != "json":
            return {{"txt": "caption", "cls": "label"}[extension]: text.strip()}
        found = json.loads(text)
        named = {"caption": found.get("caption"), "label": found.get("label", found.get("cls"))}
        named["web_url"] = found.get("url")
    except (ValueError, AttributeError) as error:
        expected = "a JSON object" if extension == "json" else "UTF-8 text"
        raise InputError(f"{place}: {' '.join(str(error).split())}, expected {expected}") from error
    return {name: str(value) for name, value in named.items() if value is not None and name not in row}


def locate(url: str) -> tuple[str, int, int | None]:
    """The file, offset and size of an image that `read_tar` found; other files are read whole."""
    place = PLACE.fullmatch(url)
    return (place[1], int(place[2]), int(place[3])) if place else (url, 0, None)
