"""Embeddings on disk: flat float16 arrays of unit rows, memory-mapped and looked up by image id.

A shard of images is one array of each kind, and one Parquet file with rows that point into it:

    regions/<name>/rows/000007.f16  index/000007.parquet            a row a box
    embeddings/<name>/images/000007.f16  texts/000007.f16  index/000007.parquet     a row a pair
"""

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs

from data_prep import storage, tables
from data_prep.tables import FileEntry, Manifest, TableName
from ovd_models.errors import InputError

ROWS = np.dtype("<f2")
ArrayTable = Literal["regions", "embeddings"]
FOLDERS: dict[TableName, dict[str, str]] = {
    "regions": {"file": "rows"},
    "embeddings": {"file": "images", "text_file": "texts"},
}
"""For each table the columns that name a flat array, and the folder of these arrays."""
MAPPED_FILES = 4096
"""Arrays that a process keeps mapped; a mapping takes no memory."""


# --------------------------------------------------------------------------------------------------------- writing


@dataclass(frozen=True, kw_only=True)
class EmbeddingJob:
    """The table that shards are saved for."""

    storage: str
    table: ArrayTable
    name: str
    staging: str
    """Folder with a record of each saved shard."""


@dataclass(frozen=True, kw_only=True)
class SavedShard:
    """The record of a shard on disk."""

    images: int
    rows: int
    width: int
    """Embedding width D; 0 for a shard without rows."""
    files: tuple[FileEntry, ...]
    unreadable: tuple[str, ...] = ()
    """Why each image that cannot be read has no rows."""


def save_shard(rows: pa.Table, job: EmbeddingJob) -> SavedShard:
    """Write the arrays and the index of a shard, then its record, which it returns.

    The rows are the images of one shard (column `shard`), in order, with all columns of the index except `start`. The
    columns of flat arrays hold the bytes of an image's rows instead of a file name. A column `unreadable`, if there is
    one, holds the reasons why images have no rows.
    """
    (shard,) = set(rows["shard"].to_pylist())
    counts = rows["count"].to_numpy()
    starts = np.cumsum(counts) - counts
    index = rows.drop_columns(["shard"]).append_column("start", pa.array(starts, pa.int64()))
    reasons: list[str] = []
    if "unreadable" in index.column_names:
        reasons, index = index["unreadable"].drop_null().to_pylist(), index.drop_columns(["unreadable"])
    files, width = [], 0
    for column, folder in FOLDERS[job.table].items():
        content = b"".join(rows[column].to_pylist())
        width = len(content) // ROWS.itemsize // max(1, int(counts.sum()))
        path = f"{folder}/{shard}.f16"
        files.append(tables.write_file(job.storage, job.table, job.name, path, content))
        paths = pa.array([path] * rows.num_rows, pa.string())
        index = index.set_column(index.schema.get_field_index(column), column, paths)
    files.append(tables.write_part(job.storage, job.table, job.name, f"index/{shard}.parquet", index))
    saved = SavedShard(
        images=rows.num_rows, rows=int(counts.sum()), width=width, files=tuple(files), unreadable=tuple(reasons)
    )
    storage.write_bytes(storage.join(job.staging, f"{shard}.json"), json.dumps(asdict(saved)).encode())
    return saved


def saved_shards(staging: str) -> dict[str, SavedShard]:
    """The records of the shards on disk, by name."""
    saved, uris = {}, storage.list_files(staging, "json")
    with ThreadPoolExecutor(tables.FILES_AT_A_TIME) as pool:
        contents = list(pool.map(storage.read_bytes, uris))
    for uri, content in zip(uris, contents, strict=True):
        raw = json.loads(content)
        files = tuple(FileEntry(**entry) for entry in raw.pop("files"))
        reasons = tuple(raw.pop("unreadable", ()))
        saved[storage.base_name(uri).removesuffix(".json")] = SavedShard(files=files, unreadable=reasons, **raw)
    return saved


def publish_embeddings(
    job: EmbeddingJob, saved: Sequence[SavedShard], *, producer: str, config_hash: str, provenance: Mapping[str, Any]
) -> Manifest:
    """Publish a table of these shards, in order; its manifest's details get the provenance, which readers check."""
    details = {
        **provenance,
        "width": max((shard.width for shard in saved), default=0),
        "rows": sum(shard.rows for shard in saved),
        "images": sum(shard.images for shard in saved),
    }
    files = [entry for shard in saved for entry in shard.files]
    manifest = tables.publish(
        job.storage, job.table, job.name, files, producer=producer, config_hash=config_hash, details=details
    )
    storage.remove_folder(job.staging)
    return manifest


# --------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class FlatRows:
    """The rows of a table's flat arrays, by image. Cheap to pickle: other processes map the same files."""

    uri: str
    """The table's folder."""
    width: int
    """Embedding width D."""
    files: tuple[str, ...]
    """Paths in the table's folder, in published order."""
    ids: npt.NDArray[np.bytes_]
    """[I] image ids, in published order."""
    order: npt.NDArray[np.int64]
    """[I] positions that sort `ids`."""
    file_of: npt.NDArray[np.int64]
    """[I] index in `files` of the file with an image's rows."""
    starts: npt.NDArray[np.int64]
    """[I] first row of an image in its file."""
    offsets: npt.NDArray[np.int64]
    """[I + 1] first row of an image among all rows."""

    def __len__(self) -> int:
        """Number of images."""
        return len(self.ids)

    def __contains__(self, image_id: str) -> bool:
        return self._find(image_id) is not None

    def position(self, image_id: str) -> int:
        """The position of an image in published order.

        Raises:
            InputError: the table does not contain the image.
        """
        position = self._find(image_id)
        if position is None:
            raise InputError(f"{self.uri}: no embeddings of image {image_id}")
        return position

    def _find(self, image_id: str) -> int | None:
        rank = int(np.searchsorted(self.ids, np.bytes_(image_id), sorter=self.order))
        if rank == len(self) or self.ids[self.order[rank]] != image_id.encode():
            return None
        return int(self.order[rank])

    def read(self, position: int) -> npt.NDArray[np.float16]:
        """[N, D] rows of an image, not copied if the file is local."""
        count = int(self.offsets[position + 1] - self.offsets[position])
        uri = storage.join(self.uri, self.files[self.file_of[position]])
        return _read_rows(uri, self.width, int(self.starts[position]), count)

    def chunks(self, most: int) -> Iterator[tuple[int, npt.NDArray[np.float16]]]:
        """All rows in published order, at most `most` at a time, each time with the index of the first one."""
        first = 0
        counts = np.bincount(self.file_of, weights=np.diff(self.offsets), minlength=len(self.files)).astype(np.int64)
        for path, count in zip(self.files, counts.tolist(), strict=True):
            for start in range(0, count, most):
                size = min(most, count - start)
                yield first + start, _read_rows(storage.join(self.uri, path), self.width, start, size)
            first += count

    def image_of(self, row_N: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """[N] positions of the images that rows belong to, with rows numbered over all files."""
        return np.searchsorted(self.offsets, row_N, side="right") - 1


def _read_rows(uri: str, width: int, start: int, count: int) -> npt.NDArray[np.float16]:
    if not count:
        return np.empty((0, width), ROWS)
    filesystem, path = storage.resolve(uri)
    if isinstance(filesystem, fs.LocalFileSystem):
        return _map_file(path, width)[start : start + count]
    size = width * ROWS.itemsize
    return np.frombuffer(storage.read_bytes(uri, offset=start * size, size=count * size), ROWS).reshape(count, width)


@functools.lru_cache(maxsize=MAPPED_FILES)
def _map_file(path: str, width: int) -> npt.NDArray[np.float16]:
    return np.memmap(path, ROWS, "r").reshape(-1, width)


def open_rows(
    storage_uri: str, table: ArrayTable, name: str, provenance: Mapping[str, Any], column: str = "file"
) -> FlatRows:
    """The rows of a published table.

    `provenance` holds the required details of its manifest, such as `teacher` and `crops`; others are not checked.
    `column` is `file`, or `text_file` for the captions of `embeddings`.

    Raises:
        InputError: there is no such table, its provenance differs, or one of its files is missing or truncated.
    """
    manifest = tables.read_manifest(storage_uri, table, name)
    uri = storage.absolute(tables.table_uri(storage_uri, table, name))
    check_provenance(manifest, uri, provenance)
    index = tables.read_table(storage_uri, table, name, ["image_id", column, "start", "count"])
    files = tuple(entry.path for entry in manifest.files if entry.path.startswith(FOLDERS[table][column] + "/"))
    _check_sizes(manifest, uri, files)
    number = {path: position for position, path in enumerate(files)}
    ids = np.array(index["image_id"].to_pylist(), np.bytes_)
    return FlatRows(
        uri=uri,
        width=int(manifest.details["width"]),
        files=files,
        file_of=np.array([number[path] for path in index[column].to_pylist()], np.int64),
        starts=index["start"].to_numpy(),
        offsets=np.concatenate([[0], np.cumsum(index["count"].to_numpy())]).astype(np.int64),
        ids=ids,
        order=np.argsort(ids, kind="stable"),
    )


def check_provenance(manifest: Manifest, uri: str, expected: Mapping[str, Any]) -> None:
    """Check that a table was made with the expected teacher, crops and so on.

    Raises:
        InputError: it was not; the message gives both values.
    """
    for key, value in expected.items():
        actual, plain = manifest.details.get(key), json.loads(json.dumps(value))
        if actual != plain:
            raise InputError(f"{uri}: made with {key} {json.dumps(actual)}, this run asks for {json.dumps(plain)}")


def _check_sizes(manifest: Manifest, uri: str, files: Sequence[str]) -> None:
    filesystem, folder = storage.resolve(uri)
    sizes = {entry.path: entry.size for entry in manifest.files}
    for path, info in zip(files, filesystem.get_file_info([str(Path(folder, path)) for path in files]), strict=True):
        if info.size != sizes[path]:
            actual = "missing" if info.type == fs.FileType.NotFound else f"{info.size:,} bytes"
            raise InputError(f"{uri}/{path}: {actual}, the manifest says {sizes[path]:,} bytes")


@dataclass(frozen=True)
class Regions:
    """The boxes of an image and their embeddings."""

    boxes: npt.NDArray[np.float32]
    """[N, 4] xyxy, pixels of the original image."""
    scores: npt.NDArray[np.float32]
    """[N] objectness; 1 for given boxes."""
    embeddings: npt.NDArray[np.float16]
    """[N, D] unit rows, read-only and memory-mapped."""


@dataclass(frozen=True)
class RegionStore:
    """A `regions` table by image id."""

    rows: FlatRows
    boxes: npt.NDArray[np.float32]
    """[R, 4] all regions, in published order."""
    scores: npt.NDArray[np.float32]
    """[R] their scores."""

    @classmethod
    def open(cls, storage_uri: str, name: str, provenance: Mapping[str, Any]) -> Self:
        """Open a published table; its provenance is `{"teacher": ..., "crops": dataclasses.asdict(...)}`.

        Raises:
            InputError: as in `open_rows`.
        """
        rows = open_rows(storage_uri, "regions", name, provenance)
        index = tables.read_table(storage_uri, "regions", name, ["boxes", "scores"])
        boxes_R4 = pc.list_flatten(index["boxes"], recursive=True).to_numpy().reshape(-1, 4)
        return cls(rows, boxes_R4, pc.list_flatten(index["scores"]).to_numpy())

    def __len__(self) -> int:
        """Number of images."""
        return len(self.rows)

    def __contains__(self, image_id: str) -> bool:
        return image_id in self.rows

    def __getitem__(self, image_id: str) -> Regions:
        """The regions of an image.

        Raises:
            InputError: the image is not in the table.
        """
        position = self.rows.position(image_id)
        own = slice(*self.rows.offsets[position : position + 2].tolist())
        return Regions(self.boxes[own], self.scores[own], self.rows.read(position))
