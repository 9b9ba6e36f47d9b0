"""Files under a storage URI: a local folder, `s3://`, `gs://` or anything else that pyarrow opens."""

import atexit
import contextlib
import errno
import functools
import hashlib
import posixpath
import shutil
import stat
import tempfile
import threading
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty, Queue

from pyarrow import fs

from data_prep import s3
from ovd_models.errors import InputError

TEMPORARY = ".tmp"
"""End of the names of local files that are being written."""
RANGE_BYTES, RANGES_AT_A_TIME = 8 << 20, 8
"""Large objects are read in ranges of this size, several at a time, since a store limits each connection."""
ANSWER_SECONDS = 10.0
MARKERS = ("clip.json", "table.json", "config.json", "step")
"""Files whose presence marks a checkpoint folder as complete."""


def resolve(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system of `uri` and the path on it; a plain path is local and made absolute.

    Raises:
        InputError: the scheme is unknown or malformed.
    """
    if "://" not in uri:
        return fs.LocalFileSystem(), str(Path(uri).expanduser().absolute())
    if uri.startswith(s3.SCHEME):
        return s3.filesystem(uri)
    try:
        filesystem, path = fs.FileSystem.from_uri(uri)
    except (ValueError, OSError) as error:
        raise InputError(f"{uri}: not a storage location pyarrow can open ({error})") from error
    return filesystem, path


def open_storage(uri: str, *, writes: bool = True) -> str:
    """Check within seconds that a job can use its storage; returns the URI without the options of its query.

    Those go to the environment, from which other libraries and processes take them.

    Args:
        uri: of the storage; a local folder need not exist.
        writes: whether the job writes there.

    Raises:
        InputError: it cannot be read or written; the message says why.
    """
    try:
        if not uri or "\0" in uri:
            raise InputError(f"{uri!r}: no path, expected a folder or URI")
        if uri.startswith(s3.SCHEME):
            uri = s3.adopt(uri)
            s3.check(uri, writes=writes)
        filesystem, path = resolve(uri)
        if isinstance(filesystem, fs.LocalFileSystem):
            _check_local(Path(path), writes)
        else:
            _check_remote(filesystem, path)
    except InputError as error:
        raise InputError(f"--storage {error}") from error
    except OSError as error:
        expected = f"a folder that this user may {'write to' if writes else 'read'}"
        raise InputError(f"--storage {uri}: {error.strerror or error}, expected {expected}") from error
    return uri


def _check_local(folder: Path, writes: bool) -> None:
    """Raise OSError or InputError if a folder, or the one in which it would be made, cannot be used."""
    place = next(each for each in (folder, *folder.parents) if each.exists() or each.is_symlink())
    if place.is_symlink() and not place.exists():
        raise InputError(f"{folder}: {place} is a link to nothing, expected a folder")
    if not place.is_dir():
        raise InputError(f"{folder}: {place} is a file, expected a folder")
    if writes:
        with tempfile.TemporaryFile(dir=place) as probe:  # has no name, so that a kill leaves nothing
            probe.write(b"x")


def _check_remote(filesystem: fs.FileSystem, path: str) -> None:
    """Raise OSError if an object store does not answer: pyarrow would try for a quarter of an hour."""
    answers: Queue[OSError | None] = Queue()

    def ask() -> None:
        try:
            filesystem.get_file_info(path)
            answers.put(None)
        except OSError as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        failure = answers.get(timeout=ANSWER_SECONDS)
    except Empty:
        raise OSError(f"no answer in {ANSWER_SECONDS:g} s") from None
    if failure is not None:
        raise failure


def absolute(uri: str) -> str:
    """`uri`, with a local path made absolute, so that it is valid in every process of this machine."""
    return uri if "://" in uri else str(Path(uri).expanduser().absolute())


def relative(uri: str, root: str) -> str:
    """The path of `uri` below `root`, which `join` gives back, also where the root has moved; absolute if elsewhere."""
    return absolute(uri).removeprefix(f"{absolute(root).rstrip('/')}/")


def join(uri: str, *parts: str) -> str:
    """`uri/part/...`, in front of the options of a URI's query.

    A part that is an absolute path or a URI replaces everything before it, options too.
    """
    for part in parts:
        address, options = split_options(uri)
        uri = part if "://" in part or part.startswith("/") else posixpath.join(address, part) + options
    return uri


def split_options(uri: str) -> tuple[str, str]:
    """A URI without the options of its query, and these with their question mark: both together are `uri`."""
    address, mark, query = uri.rpartition("?")
    return (address, mark + query) if "://" in address and "=" in query else (uri, "")


def base_name(uri: str) -> str:
    """The name of a file or folder, without the options of a URI's query."""
    return posixpath.basename(split_options(uri)[0])


def exists(uri: str) -> bool:
    """Whether there is a file or folder at `uri`.

    Raises:
        OSError: it cannot be asked, or there is no such bucket.
    """
    filesystem, path = resolve(uri)
    found = bool(filesystem.get_file_info(path).type != fs.FileType.NotFound)
    if not found:
        _check_bucket(uri)
    return found


def is_file(uri: str) -> bool:
    """Whether there is a file at `uri`.

    Raises:
        OSError: it cannot be asked.
    """
    filesystem, path = resolve(uri)
    return bool(filesystem.get_file_info(path).type == fs.FileType.File)


def _check_bucket(uri: str) -> None:
    """Raise OSError if there is no such bucket: its files would only seem to be missing."""
    filesystem, path = resolve(uri)
    if isinstance(filesystem, fs.S3FileSystem | fs.GcsFileSystem):
        bucket = path.split("/")[0]
        if filesystem.get_file_info(bucket).type == fs.FileType.NotFound:
            raise OSError(f"{uri}: cannot be read: no bucket {bucket}")


def list_files(uri: str, extension: str) -> list[str]:
    """URIs of a folder's files with an extension, sorted; none if there is no folder.

    Raises:
        OSError: it cannot be asked, or there is no such bucket.
    """
    filesystem, path = resolve(uri)
    infos = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    if not infos:
        _check_bucket(uri)
    return sorted(join(uri, info.base_name) for info in infos if info.extension == extension)


@contextlib.contextmanager
def reading(uri: str) -> Iterator[None]:
    """Name the file in errors of the block: pyarrow leaves it out of many.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be read.
    """
    try:
        yield
    except FileNotFoundError:
        _check_bucket(uri)
        raise FileNotFoundError(f"{uri}: cannot be read: no such file") from None
    except OSError as error:
        if resolve(uri)[1] in str(error):
            raise
        raise OSError(f"{uri}: cannot be read: {error}") from error


def read_bytes(uri: str, *, offset: int = 0, size: int | None = None) -> bytes:
    """The bytes of a file, or `size` of them from `offset`, in one request unless they are many.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be read, or is a pipe or device, which might never end.
    """
    filesystem, path = resolve(uri)
    if isinstance(filesystem, fs.LocalFileSystem) and not stat.S_ISREG(Path(path).stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file", path)
    with reading(uri), filesystem.open_input_file(path) as file:
        size = size if size is not None else file.size() - offset
        if size <= RANGE_BYTES or isinstance(filesystem, fs.LocalFileSystem):
            return bytes(file.read_at(size, offset))
        starts = range(offset, offset + size, RANGE_BYTES)
        with ThreadPoolExecutor(RANGES_AT_A_TIME) as pool:
            return b"".join(pool.map(lambda at: file.read_at(min(RANGE_BYTES, offset + size - at), at), starts))


def read_text(uri: str) -> str:
    """The text of a file in UTF-8, without the byte-order mark that Windows' programs put first.

    Raises:
        OSError: see `read_bytes`.
        UnicodeDecodeError: it is not UTF-8.
    """
    return read_bytes(uri).decode("utf-8-sig")


def write_bytes(uri: str, content: bytes) -> None:
    """Write a file so that readers see all of it or none."""
    write_chunks(uri, [content])


def write_chunks(uri: str, chunks: Iterable[bytes]) -> tuple[int, str]:
    """`write_bytes` for content that need not fit in memory at once.

    An object of S3 is written in place, since it appears whole. Elsewhere a file has a temporary name until it is
    complete; a killed process leaves it, see `remove_temporary`.

    Returns:
        The file's size and its SHA-256.

    Raises:
        OSError: the file cannot be written; nothing is left of it.
    """
    size, digest = 0, hashlib.sha256()

    def counted() -> Iterator[bytes]:
        nonlocal size
        for chunk in chunks:
            digest.update(chunk)
            size += len(chunk)
            yield chunk

    try:
        if uri.startswith(s3.SCHEME):
            s3.upload(uri, counted())
        else:
            _write_and_move(uri, counted())
    except OSError as error:
        if str(error).startswith(uri):
            raise
        raise OSError(f"{uri}: cannot be written: {error}") from error
    return size, digest.hexdigest()


def _write_and_move(uri: str, chunks: Iterable[bytes]) -> None:
    filesystem, path = resolve(uri)
    if isinstance(filesystem, fs.LocalFileSystem):  # an object store would get empty objects
        filesystem.create_dir(posixpath.dirname(path), recursive=True)
    temporary = f"{path}.{uuid.uuid4().hex}{TEMPORARY}"
    try:
        with filesystem.open_output_stream(temporary) as stream:
            for chunk in chunks:
                stream.write(chunk)
        filesystem.move(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            filesystem.delete_file(temporary)
        raise


def remove_temporary(uri: str) -> None:
    """Delete what killed processes left of unfinished files below a folder, where nothing may be writing."""
    if uri.startswith(s3.SCHEME):
        with contextlib.suppress(OSError):  # a key that may not list uploads; a bucket's own rules can remove them
            s3.abort_uploads(uri)
        return
    filesystem, path = resolve(uri)
    for info in filesystem.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True)):
        if info.type == fs.FileType.File and info.path.endswith(TEMPORARY):
            filesystem.delete_file(info.path)


def upload_folder(local: Path, uri: str) -> None:
    """Copy every file below a local folder to `uri`, those that mark it as complete (`MARKERS`) last."""
    files = [path for path in sorted(local.rglob("*")) if path.is_file()]
    for path in sorted(files, key=lambda path: MARKERS.index(path.name) + 1 if path.name in MARKERS else 0):
        write_chunks(join(uri, path.relative_to(local).as_posix()), _file_chunks(path))


def _file_chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(RANGE_BYTES):
            yield chunk


def sha256(content: bytes) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(content).hexdigest()


def download_folder(uri: str, local: Path) -> None:
    """Copy every file below `uri` to a local folder; large objects in ranges, several at a time."""
    filesystem, path = resolve(uri)
    files = _files_below(filesystem, path)

    def copy(task: tuple[fs.FileInfo, int]) -> None:
        info, start = task
        with filesystem.open_input_file(info.path) as source, targets[info.path].open("r+b") as target:
            target.seek(start)
            target.write(source.read_at(min(RANGE_BYTES, info.size - start), start))

    targets = {info.path: local / posixpath.relpath(info.path, path) for info in files}
    for name, target in targets.items():
        if not target.resolve().is_relative_to(local.resolve()):
            raise OSError(f"{uri}: the object {name!r} leads out of the folder")
    for target in targets.values():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(b"")
    tasks = [(info, start) for info in files for start in range(0, info.size, RANGE_BYTES)]
    with ThreadPoolExecutor(RANGES_AT_A_TIME) as pool:
        list(pool.map(copy, tasks))


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a local file of any size."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _files_below(filesystem: fs.FileSystem, path: str) -> list[fs.FileInfo]:
    found = filesystem.get_file_info(fs.FileSelector(path, recursive=True))
    return [info for info in found if info.type == fs.FileType.File]


def local_folder(uri: str) -> Path:
    """The path of a local folder, or of a copy of a remote one that is deleted when this process ends.

    A folder that has not changed is copied once.

    Raises:
        InputError: a remote folder cannot be read.
    """
    filesystem, path = resolve(uri)
    if isinstance(filesystem, fs.LocalFileSystem):
        return Path(path)
    try:
        files = _files_below(filesystem, path)
        return _fetched_folder(uri, tuple((info.path, info.size, info.mtime_ns) for info in files))
    except OSError as error:
        raise InputError(f"{uri}: cannot be read ({error}), expected a folder") from error


@contextlib.contextmanager
def borrow_folder(uri: str) -> Iterator[Path]:
    """The path of a local folder, or of a copy of a remote one that is deleted after the block.

    Raises:
        InputError: a remote folder cannot be read.
    """
    filesystem, path = resolve(uri)
    if isinstance(filesystem, fs.LocalFileSystem):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="ovd-", ignore_cleanup_errors=True) as copy:
        try:
            download_folder(uri, Path(copy))
        except OSError as error:
            raise InputError(f"{uri}: cannot be read ({error}), expected a folder") from error
        yield Path(copy)


@functools.cache
def _fetched_folder(uri: str, _files: tuple[tuple[str, int, int], ...]) -> Path:
    target = Path(tempfile.mkdtemp(prefix="ovd-"))
    atexit.register(shutil.rmtree, target, ignore_errors=True)
    download_folder(uri, target)
    return target


def local_file(uri: str) -> Path:
    """The path of a local file, or of a copy of a remote one, of the same name, that is deleted when this process ends.

    Raises:
        OSError: a remote file cannot be read.
    """
    filesystem, path = resolve(uri)
    return Path(path) if isinstance(filesystem, fs.LocalFileSystem) else _fetched_file(uri)


@functools.cache
def _fetched_file(uri: str) -> Path:
    target = Path(tempfile.mkdtemp(prefix="ovd-"))
    atexit.register(shutil.rmtree, target, ignore_errors=True)
    copy = target / posixpath.basename(resolve(uri)[1])
    copy.write_bytes(read_bytes(uri))
    return copy


def remove_folder(uri: str) -> None:
    """Delete a folder if it exists."""
    if uri.startswith(s3.SCHEME):
        s3.remove_folder(uri)
        return
    filesystem, path = resolve(uri)
    if exists(uri):
        filesystem.delete_dir(path)
