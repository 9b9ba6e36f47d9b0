"""Embeddings on disk: flat float16 arrays of unit rows, memory-mapped, found by image id in any order.

A shard of images is one array and one Parquet file with the rows that point into it:

    regions/<name>/rows/000007.f16  index/000007.parquet            a row a box
    embeddings/<name>/images/000007.f16  texts/000007.f16  index/000007.parquet     a row a pair
"""

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import fs

from data_prep import storage, tables
from data_prep.tables import FileEntry, Manifest
from ovd_models.errors import InputError

ROWS = np.dtype("<f2")
FOLDERS: dict[str, dict[str, str]] = {
    "regions": {"file": "rows"},
    "embeddings": {"file": "images", "text_file": "texts"},
}
"""The columns of each table that name a flat array, and the folder of it."""
MAPPED_FILES = 4096
"""Arrays that a process keeps mapped; a mapping takes no memory of its own."""


# --------------------------------------------------------------------------------------------------------- writing


@dataclass(frozen=True, kw_only=True)
class EmbeddingJob:
    """What all shards of a table share."""

    storage: str
    table: str
    """`regions` or `embeddings`."""
    name: str
    staging: str
    """Folder of the records of what is done."""


@dataclass(frozen=True, kw_only=True)
class SavedShard:
    """A shard that is on disk."""

    images: int
    rows: int
    width: int
    """D; 0 for a shard without rows."""
    files: tuple[FileEntry, ...]


def save_shard(rows: pa.Table, job: EmbeddingJob) -> pa.Table:
    """Write the arrays and the index of a shard, and then the record of it.

    Args:
        rows: of one shard (column `shard`), in order: the columns of the table's index but `start`, and instead of
            the name of each flat array the bytes of the image's rows.
        job: where to.

    Returns:
        One light row: `shard`, `images`, `rows`.
    """
    (shard,) = set(rows["shard"].to_pylist())
    counts = rows["count"].to_numpy()
    starts = np.cumsum(counts) - counts
    index = rows.drop_columns(["shard"]).append_column("start", pa.array(starts, pa.int64()))
    files, width = [], 0
    for column, folder in FOLDERS[job.table].items():
        content = b"".join(rows[column].to_pylist())
        width = len(content) // ROWS.itemsize // max(1, int(counts.sum()))
        path = f"{folder}/{shard}.f16"
        files.append(tables.write_file(job.storage, job.table, job.name, path, content))
        paths = pa.array([path] * rows.num_rows, pa.string())
        index = index.set_column(index.schema.get_field_index(column), column, paths)
    files.append(tables.write_part(job.storage, job.table, job.name, f"index/{shard}.parquet", index))
    saved = SavedShard(images=rows.num_rows, rows=int(counts.sum()), width=width, files=tuple(files))
    storage.write_bytes(storage.join(job.staging, f"{shard}.json"), json.dumps(asdict(saved)).encode())
    return pa.table({"shard": [shard], "images": [saved.images], "rows": [saved.rows]})


def saved_shards(staging: str) -> dict[str, SavedShard]:
    """The shards that are on disk, by name."""
    filesystem, folder = storage.resolve(staging)
    found = filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True))
    saved = {}
    for info in sorted(found, key=lambda info: str(info.base_name)):
        if info.extension == "json":
            raw = json.loads(storage.read_bytes(storage.join(staging, info.base_name)))
            files = tuple(FileEntry(**entry) for entry in raw.pop("files"))
            saved[info.base_name.removesuffix(".json")] = SavedShard(files=files, **raw)
    return saved


def publish(
    job: EmbeddingJob, saved: Sequence[SavedShard], *, producer: str, config_hash: str, made_of: Mapping[str, Any]
) -> Manifest:
    """Publish a table of these shards; `made_of` tells readers the teacher and what it was shown."""
    details = {
        **made_of,
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
    """The rows of the flat arrays of a table, by image; cheap to send to other processes, which map the same files."""

    uri: str
    """Of the table's folder."""
    width: int
    """D."""
    files: tuple[str, ...]
    """Paths in the table's folder, in published order."""
    ids: npt.NDArray[np.bytes_]
    """[I] images, in published order."""
    order: npt.NDArray[np.int64]
    """[I] sorts `ids`."""
    file_of: npt.NDArray[np.int64]
    """[I] which of `files` holds an image's rows."""
    starts: npt.NDArray[np.int64]
    """[I] their first one in that file."""
    offsets: npt.NDArray[np.int64]
    """[I + 1] and among the rows of all files."""

    def __len__(self) -> int:
        """Images."""
        return len(self.ids)

    def __contains__(self, image_id: str) -> bool:
        place = self._place(image_id)
        return place < len(self) and bool(self.ids[self.order[place]] == image_id.encode())

    def position(self, image_id: str) -> int:
        """The number of an image in published order.

        Raises:
            InputError: it has no rows here.
        """
        if image_id not in self:
            raise InputError(f"{self.uri}: no embeddings of image {image_id}")
        return int(self.order[self._place(image_id)])

    def _place(self, image_id: str) -> int:
        return int(np.searchsorted(self.ids, np.bytes_(image_id), sorter=self.order))

    def read(self, position: int) -> npt.NDArray[np.float16]:
        """[N, D] rows of an image, without copying them where the file is local."""
        count = int(self.offsets[position + 1] - self.offsets[position])
        return _read_rows(
            storage.join(self.uri, self.files[self.file_of[position]]), self.width, int(self.starts[position]), count
        )

    def chunks(self, most: int) -> Iterator[tuple[int, npt.NDArray[np.float16]]]:
        """All rows in published order, at most `most` at a time, each with the number of its first row."""
        first = 0
        counts = np.bincount(self.file_of, weights=np.diff(self.offsets), minlength=len(self.files)).astype(np.int64)
        for path, count in zip(self.files, counts.tolist(), strict=True):
            for start in range(0, count, most):
                size = min(most, count - start)
                yield first + start, _read_rows(storage.join(self.uri, path), self.width, start, size)
            first += count

    def image_of(self, row_N: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """[N] positions of the images that rows, counted over all files, belong to."""
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


def open_rows(storage_uri: str, table: str, name: str, made_of: Mapping[str, Any], column: str = "file") -> FlatRows:
    """The rows of a published table.

    Args:
        storage_uri: the storage.
        table: `regions` or `embeddings`.
        name: of the table.
        made_of: what its manifest must say: `teacher`, `crops`; nothing is checked that is not given.
        column: which of the table's arrays: `file`, or `text_file` of `embeddings`.

    Raises:
        InputError: there is no such table, it is made of something else, or a file of it is missing or cut off.
    """
    manifest = tables.read_manifest(storage_uri, table, name)
    uri = storage.absolute(tables.table_uri(storage_uri, table, name))
    check_made_of(manifest, uri, made_of)
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


def check_made_of(manifest: Manifest, uri: str, wanted: Mapping[str, Any]) -> None:
    """Check that a table was made with this teacher, these crops and so on.

    Raises:
        InputError: it was not; the message says what both are.
    """
    for key, value in wanted.items():
        found, plain = manifest.details.get(key), json.loads(json.dumps(value))
        if found != plain:
            raise InputError(f"{uri}: made with {key} {json.dumps(found)}, this run asks for {json.dumps(plain)}")


def _check_sizes(manifest: Manifest, uri: str, files: Sequence[str]) -> None:
    filesystem, folder = storage.resolve(uri)
    sizes = {entry.path: entry.size for entry in manifest.files}
    for path, info in zip(files, filesystem.get_file_info([str(Path(folder, path)) for path in files]), strict=True):
        if info.size != sizes[path]:
            found = "missing" if info.type == fs.FileType.NotFound else f"{info.size:,} bytes"
            raise InputError(f"{uri}/{path}: {found}, the manifest says {sizes[path]:,} bytes")


@dataclass(frozen=True)
class Regions:
    """The boxes of an image and what the teacher sees in them."""

    boxes: npt.NDArray[np.float32]
    """[N, 4] xyxy, pixels of the original image."""
    scores: npt.NDArray[np.float32]
    """[N] objectness; 1 for given boxes."""
    embeddings: npt.NDArray[np.float16]
    """[N, D] unit rows; read-only, and on disk until they are used."""


@dataclass(frozen=True)
class RegionStore:
    """A `regions` table by image id."""

    rows: FlatRows
    boxes: npt.NDArray[np.float32]
    """[R, 4] of all regions, in published order."""
    scores: npt.NDArray[np.float32]
    """[R]."""

    @classmethod
    def open(cls, storage_uri: str, name: str, made_of: Mapping[str, Any]) -> "RegionStore":
        """Open a published table.

        Args:
            storage_uri: the storage.
            name: of the table.
            made_of: what it must be made with: `{"teacher": ..., "crops": dataclasses.asdict(...)}`.

        Raises:
            InputError: as `open_rows`.
        """
        rows = open_rows(storage_uri, "regions", name, made_of)
        index = tables.read_table(storage_uri, "regions", name, ["boxes", "scores"])
        boxes = [np.empty(0, np.float32), *(_flat(chunk.flatten()) for chunk in index["boxes"].chunks)]
        scores = [np.empty(0, np.float32), *(_flat(chunk) for chunk in index["scores"].chunks)]
        return cls(rows, np.concatenate(boxes).reshape(-1, 4), np.concatenate(scores))

    def __len__(self) -> int:
        """Images."""
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


def _flat(lists: pa.ListArray) -> npt.NDArray[np.float32]:
    values: npt.NDArray[np.float32] = lists.flatten().to_numpy()
    return values
