"""Files under a storage URI: a local folder, `s3://`, `gs://` or anything else pyarrow opens."""

import hashlib
import posixpath
import tempfile
import uuid
from collections.abc import Iterable
from pathlib import Path

from pyarrow import fs

from ovd_models.errors import InputError

MARKERS = ("clip.json", "table.json", "config.json", "progress.pt")
"""Files that are written last into a checkpoint's folder."""


def resolve(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system of `uri` and the path on it; a plain path is a local one, made absolute.

    Raises:
        InputError: the scheme is unknown or malformed.
    """
    if "://" not in uri:
        return fs.LocalFileSystem(), str(Path(uri).expanduser().absolute())
    try:
        filesystem, path = fs.FileSystem.from_uri(uri)
    except (ValueError, OSError) as error:
        raise InputError(f"{uri}: not a storage location pyarrow can open ({error})") from error
    return filesystem, path


def absolute(uri: str) -> str:
    """`uri` with a local path made absolute, so that it means the same in every process of this machine."""
    return uri if "://" in uri else str(Path(uri).expanduser().absolute())


def join(uri: str, *parts: str) -> str:
    """`uri/part/...`; a part that is itself absolute or a URI replaces what stands before it."""
    for part in parts:
        uri = part if "://" in part else posixpath.join(uri, part)
    return uri


def exists(uri: str) -> bool:
    """Whether a file or folder stands at `uri`."""
    filesystem, path = resolve(uri)
    return bool(filesystem.get_file_info(path).type != fs.FileType.NotFound)


def read_bytes(uri: str, *, offset: int = 0, size: int | None = None) -> bytes:
    """The file's bytes, or `size` of them from `offset` as one range read.

    Raises:
        FileNotFoundError: there is no such file.
    """
    filesystem, path = resolve(uri)
    with filesystem.open_input_file(path) as file:
        return bytes(file.read_at(size if size is not None else file.size() - offset, offset))


def write_bytes(uri: str, content: bytes) -> None:
    """Write a file so that a reader sees all of it or none: beside its name first, then moved there."""
    write_pieces(uri, [content])


def write_pieces(uri: str, pieces: Iterable[bytes]) -> tuple[int, str]:
    """`write_bytes` for what need not be in memory at a time.

    Returns:
        The file's size and its SHA-256.
    """
    filesystem, path = resolve(uri)
    if isinstance(filesystem, fs.LocalFileSystem):  # object stores have no folders, and would get empty objects
        filesystem.create_dir(posixpath.dirname(path), recursive=True)
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    size, digest = 0, hashlib.sha256()
    with filesystem.open_output_stream(temporary) as stream:
        for piece in pieces:
            stream.write(piece)
            digest.update(piece)
            size += len(piece)
    filesystem.move(temporary, path)
    return size, digest.hexdigest()


def upload_folder(local: Path, uri: str) -> None:
    """Copy every file below a local folder to `uri`, those by which readers know a whole folder (`MARKERS`) last."""
    files = [path for path in sorted(local.rglob("*")) if path.is_file()]
    for path in sorted(files, key=lambda path: MARKERS.index(path.name) + 1 if path.name in MARKERS else 0):
        write_bytes(join(uri, path.relative_to(local).as_posix()), path.read_bytes())


def sha256(content: bytes) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(content).hexdigest()


def download_folder(uri: str, local: Path) -> None:
    """Copy every file below `uri` to a local folder."""
    filesystem, path = resolve(uri)
    fs.copy_files(path, str(local), source_filesystem=filesystem, destination_filesystem=fs.LocalFileSystem())


def local_folder(uri: str) -> Path:
    """A folder as a local path: itself when it is one, else a copy in a temporary folder.

    Raises:
        InputError: there is nothing at the URI.
    """
    filesystem, path = resolve(uri)
    if isinstance(filesystem, fs.LocalFileSystem):
        return Path(path)
    target = Path(tempfile.mkdtemp(prefix="ovd-"))
    try:
        download_folder(uri, target)
    except OSError as error:
        raise InputError(f"{uri}: cannot be read ({error}), expected a folder") from error
    return target


def remove_folder(uri: str) -> None:
    """Delete a folder if it exists."""
    filesystem, path = resolve(uri)
    if exists(uri):
        filesystem.delete_dir(path)
