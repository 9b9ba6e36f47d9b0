"""Files under a storage URI: a local folder, `s3://`, `gs://` or anything else that pyarrow opens."""

import contextlib
import hashlib
import posixpath
import tempfile
import uuid
from collections.abc import Iterable
from pathlib import Path

from pyarrow import fs

from ovd_models.errors import InputError

MARKERS = ("clip.json", "table.json", "config.json", "progress.pt")
"""Files whose presence marks a checkpoint folder as complete."""


def resolve(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system of `uri` and the path on it; a plain path is local and made absolute.

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
    """`uri`, with a local path made absolute, so that it is valid in every process of this machine."""
    return uri if "://" in uri else str(Path(uri).expanduser().absolute())


def join(uri: str, *parts: str) -> str:
    """`uri/part/...`; a part that is an absolute path or a URI replaces everything before it."""
    for part in parts:
        uri = part if "://" in part else posixpath.join(uri, part)
    return uri


def exists(uri: str) -> bool:
    """Whether there is a file or folder at `uri`."""
    filesystem, path = resolve(uri)
    return bool(filesystem.get_file_info(path).type != fs.FileType.NotFound)


def list_files(uri: str, extension: str) -> list[str]:
    """URIs of a folder's files with an extension, sorted; none if there is no folder."""
    filesystem, path = resolve(uri)
    infos = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return sorted(join(uri, info.base_name) for info in infos if info.extension == extension)


def read_bytes(uri: str, *, offset: int = 0, size: int | None = None) -> bytes:
    """The bytes of a file, or `size` of them from `offset` as one range read.

    Raises:
        FileNotFoundError: there is no such file.
    """
    filesystem, path = resolve(uri)
    with filesystem.open_input_file(path) as file:
        return bytes(file.read_at(size if size is not None else file.size() - offset, offset))


def write_bytes(uri: str, content: bytes) -> None:
    """Write a file under a temporary name and move it, so that readers see all of it or none."""
    write_chunks(uri, [content])


def write_chunks(uri: str, chunks: Iterable[bytes]) -> tuple[int, str]:
    """`write_bytes` for content that need not fit in memory at once.

    Returns:
        The file's size and its SHA-256.
    """
    filesystem, path = resolve(uri)
    if isinstance(filesystem, fs.LocalFileSystem):  # an object store would get empty objects
        filesystem.create_dir(posixpath.dirname(path), recursive=True)
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    size, digest = 0, hashlib.sha256()
    try:
        with filesystem.open_output_stream(temporary) as stream:
            for chunk in chunks:
                stream.write(chunk)
                digest.update(chunk)
                size += len(chunk)
        filesystem.move(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            filesystem.delete_file(temporary)
        if isinstance(error, OSError):
            raise OSError(f"{uri}: cannot be written: {error}") from error
        raise
    return size, digest.hexdigest()


def upload_folder(local: Path, uri: str) -> None:
    """Copy every file below a local folder to `uri`, those that mark it as complete (`MARKERS`) last."""
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
    """The path of a local folder, or of a temporary copy of a remote one.

    Raises:
        InputError: a remote folder cannot be read.
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
