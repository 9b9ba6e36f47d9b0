"""WebDataset shards as input lists, such as those of img2dataset: a row is a sample of a tar file.

for row in read_samples(stream, "s3://bucket/cc3m/00000.tar", url="url", caption="caption", label=""):
    ...
locate("s3://bucket/cc3m/00000.tar#512+20480")       # the image's file, offset and size

Only headers, captions, classes and JSON are read here; a crawler reads an image as one range.
"""

import json
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from ovd_models.errors import InputError

IMAGES = ("jpg", "jpeg", "png", "webp")
"""Extensions of images; of several images in a sample, the first of these counts."""
TEXTS = ("txt", "cls", "json")
"""Extensions (all after the first dot of a name) of members that are read: the caption, the class, and a JSON object
of further columns."""
MAX_TEXT_BYTES = 1 << 20
MAX_HEADER_BYTES = 1 << 17
"""Of all headers of a member: long names and further fields have headers of their own."""
PROBLEM = "__problem__"
"""The field of a row that tells why its sample cannot be used."""
PLACE = re.compile(r"(.*\.tar)#(\d+)\+(\d+)", re.IGNORECASE | re.DOTALL)


def read_samples(stream: BinaryIO, uri: str, *, url: str, caption: str, label: str) -> Iterator[dict[str, Any]]:
    """The samples of a tar file as `webdataset` groups them, ready for JSON.

    A sample is a run of members with the same name up to the first dot after the folder. Its row has the fields of its
    .json and, by the given names, the image's place (`FILE.tar#offset+size`), the caption (of .json, else .txt), and
    the class (of .json, else .cls) unless `label` is empty. A field of .json with the name `url` becomes `web_url`.

    A sample that cannot be used has no `url` but a `PROBLEM`. So has the rest of a tar file that is cut off or damaged.

    Args:
        stream: the file's content; it must be seekable.
        uri: of the file.
        url: column of the image's place.
        caption: column of the caption.
        label: column of the class; empty if classes are not wanted.

    Raises:
        InputError: it is no uncompressed tar file, or has no images.
    """
    from webdataset.tariterators import group_by_keys  # imported here because it brings torch: 470 MB

    try:
        headers = _Headers(stream)
        tar = tarfile.open(fileobj=headers, mode="r:")  # type: ignore[call-overload]  # noqa: SIM115
    except tarfile.TarError as error:
        raise InputError(f"{uri}: no uncompressed tar file ({error}), expected a WebDataset shard") from error
    repeated: list[str] = []

    def note_repeated(error: Exception) -> bool:
        repeated.append("two members of one name")
        return True

    has_images = False
    try:
        for sample in group_by_keys(_read_members(tar, headers, stream, uri), handler=note_repeated):
            has_images = has_images or _image(sample) is not None
            yield _read_sample(sample, repeated, url=url, caption=caption, label=label)
            repeated.clear()
    except tarfile.TarError as error:
        place = f"the shard is cut off or damaged from byte {tar.offset:,} on"
        yield {url: None, caption: None, PROBLEM: f"{place}: {error}"}
    if not has_images:
        raise InputError(f"{uri}: has no images, expected members with the extensions {', '.join(IMAGES)}")


class _Headers:
    """The content of a tar file, of which a member's headers may read `MAX_HEADER_BYTES`.

    `tarfile` reads headers whole, whatever size they claim, and any number of them in a row.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self.left = stream, MAX_HEADER_BYTES
        self.seek, self.tell = stream.seek, stream.tell

    def read(self, size: int) -> bytes:
        """The next bytes; TarError if they are too many."""
        self.left -= size
        if self.left < 0:
            raise tarfile.ReadError(f"a member with headers of more than {MAX_HEADER_BYTES:,} bytes")
        return self._stream.read(size)


def _read_members(tar: tarfile.TarFile, headers: _Headers, stream: BinaryIO, uri: str) -> Iterator[dict[str, Any]]:
    """Files of a tar file in the form that `group_by_keys` takes: texts as bytes, others by their place.

    Raises:
        tarfile.TarError: the file is cut off or damaged here. The sample before is complete by then.
    """
    try:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # it would keep all of them
            if member.size < 0:  # the next member would be this one again
                raise tarfile.ReadError("a member of negative size")
            if member.isreg():
                data: bytes | str = f"{uri}#{member.offset_data}+{member.size}"
                extension = member.name.rpartition("/")[2].partition(".")[2].lower()
                if extension in TEXTS and member.size <= MAX_TEXT_BYTES:
                    headers.left = MAX_TEXT_BYTES
                    data = tar.extractfile(member).read()  # type: ignore[union-attr]
                yield {"fname": member.name, "data": data, "__url__": uri}
            headers.left = MAX_HEADER_BYTES
        stream.seek(tar.offset)
        if any(stream.read(tarfile.BLOCKSIZE)):  # `next` takes a damaged header for the end
            raise tarfile.ReadError("bad header")
    except tarfile.TarError:
        yield {}  # ends a sample
        raise


def _image(sample: Mapping[str, Any]) -> str | None:
    return next((sample[name] for name in IMAGES if name in sample), None)


def _read_sample(
    sample: Mapping[str, Any], problems: Sequence[str], *, url: str, caption: str, label: str
) -> dict[str, Any]:
    """A sample's row, see `read_samples`; `problems` are those known by now."""
    row: dict[str, Any] = {url: None, caption: None, **({label: None} if label else {})}
    try:
        row |= _read_fields(sample, url=url, caption=caption, label=label)
        image = _image(sample)
        if image is None:
            members = ", ".join(name for name in sample if not name.startswith("__"))
            raise ValueError(f"no image among its members ({members})")
        if label and row[label] is None:
            raise ValueError("no class")
        if problems:
            raise ValueError(problems[0])
        row[url] = image
    except (ValueError, RecursionError) as error:
        problem = f"{sample['__key__']}: {' '.join(str(error).split())}"
        row[PROBLEM] = problem.encode(errors="replace").decode()
    return row


def _read_fields(sample: Mapping[str, Any], *, url: str, caption: str, label: str) -> dict[str, Any]:
    """The fields of a sample's .json, with its caption and class as text.

    Raises:
        ValueError: a member is malformed.
    """
    texts = {name: _decode(name, sample[name]) for name in TEXTS if name in sample}
    try:
        found = json.loads(texts.get("json", "{}"), parse_constant=lambda _: None)  # NaN has no place in JSON
    except json.JSONDecodeError as error:
        raise ValueError(f"its .json: {error}") from error
    if not isinstance(found, dict):
        raise ValueError("its .json: expected an object")
    for column, member in ((caption, "txt"), (label, "cls")):
        if column:
            value = found.get(column)
            value = texts.get(member) if value is None else value
            if isinstance(value, list | dict):
                raise ValueError(f"its .json: {column!r} is {value!r:.60}, expected text")
            found[column] = None if value is None else str(value)
    if label:
        found[label] = found[label] or None
    if url in found:
        found["web_url"] = found.pop(url)
    json.dumps(found, ensure_ascii=False).encode()  # surrogates cannot be stored
    return found


def _decode(name: str, content: bytes | str) -> str:
    if isinstance(content, str):
        raise ValueError(f"its .{name}: expected at most {MAX_TEXT_BYTES:,} bytes")
    try:
        return content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"its .{name}: {error}, expected UTF-8") from error


def locate(url: str) -> tuple[str, int, int] | None:
    """The file, offset and size of an image that `read_samples` found; None if it is a file of its own."""
    place = PLACE.fullmatch(url)
    return (place[1], int(place[2]), int(place[3])) if place else None
