"""The stream of caption groups: which concepts and images come at which position, and their pixels.

    concepts, widths and heights of groups --scan--> GroupPlan --position--> rows of groups
    rows --Parquet row groups--> shard, offset, size --range reads, decode--> raw pixels

A plan is a pure function of the seed and a position. It holds one byte for each row of `groups`. The table itself is
never loaded: only the Parquet row groups around the chosen rows are read, and the last ones used are cached.

Imports no torch, so that data tasks start fast and stay small.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep import storage, tables
from data_prep.streams.augmentation import AS_IS, NO_REGIONS, AnnotatedImage, Augmentation, augment
from data_prep.streams.images import read_all, read_image
from data_prep.streams.object_store import SharedValue, get_shared, put_shared
from data_prep.streams.plans import Integers
from ovd_models.errors import InputError

ROW_COLUMNS = ["shard", "offset", "size", "caption", "concept_ids"]
CACHE_BYTES = 256 << 20
"""Size of a process's cache of row groups."""
OPEN_FILES = 128
MAX_ATTEMPTS = 100
"""Concepts tried for one position before the table is considered broken."""
GROUP_ROWS = pa.schema(
    {
        "images": pa.list_(pa.binary()),
        "heights": pa.list_(pa.int64()),
        "widths": pa.list_(pa.int64()),
        "captions": pa.list_(pa.string()),
        "concept_id": pa.int64(),
        "mentioned": pa.list_(pa.list_(pa.int64())),
        "unreadable": pa.list_(pa.string()),
    }
)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How groups are drawn."""

    weights: Literal["uniform", "frequency", "repeat_factor"] = "uniform"
    """A concept's chance: the same for all, its share p of the images, or p * max(1, sqrt(threshold / p))."""
    repeat_threshold: float = 1e-3
    """Share of the images below which a concept is drawn more often than its share."""
    by_orientation: bool = True
    """Images of a group are all wider than high, or none is, so that a batch needs little padding."""
    min_side: int = 0
    """Images with a shorter side below this, in pixels, are not used."""
    names: tuple[str, ...] = ()
    """Groups of these concepts only, such as words that a trained detector is to learn; of all if empty. The others are
    still negatives, or ignored where a caption mentions them."""


@dataclass(frozen=True)
class GroupPlan:
    """Everything that decides which rows form the group at a position."""

    concept_ids: Integers
    """[C] concepts with enough images of one kind."""
    starts: Integers
    """[C] first row of each in `groups`."""
    stops: Integers
    """[C] row after its last one."""
    ends: npt.NDArray[np.float64]
    """[C] running sum of the concepts' chances."""
    kinds: npt.NDArray[np.uint8]
    """[rows] 0 for an unused image, else its kind, 1 or 2; a group is of one kind."""
    counts: Integers
    """[C, 2] images of kind 1 and of kind 2."""
    seed: int
    group_size: int


def build_plan(
    concept_ids: Integers,
    starts: Integers,
    stops: Integers,
    kinds: npt.NDArray[np.uint8],
    sampling: Sampling,
    *,
    seed: int,
    group_size: int,
) -> GroupPlan:
    """The plan over concepts that have `group_size` images of one kind; arrays as in `GroupPlan`."""
    ranges = [slice(*limits) for limits in zip(starts.tolist(), stops.tolist(), strict=True)]
    counts = np.array([[np.count_nonzero(kinds[rows] == kind) for kind in (1, 2)] for rows in ranges], np.int64)
    counts = counts.reshape(-1, 2)  # also without concepts
    enough = (counts >= group_size).any(1)
    counts = counts[enough]
    chances = concept_chances(np.where(counts >= group_size, counts, 0).sum(1), sampling)
    return GroupPlan(
        concept_ids[enough], starts[enough], stops[enough], np.cumsum(chances), kinds, counts, seed, group_size
    )


def concept_chances(images: Integers, sampling: Sampling) -> npt.NDArray[np.float64]:
    """[C] image counts -> [C] chances that sum to 1 (repeat factors: Gupta et al., 2019, LVIS)."""
    if sampling.weights == "uniform":
        return np.full(len(images), 1 / max(1, len(images)))
    shares = images / max(1, images.sum())
    if sampling.weights == "repeat_factor":
        shares = shares * np.maximum(1.0, np.sqrt(sampling.repeat_threshold / shares))
    return np.asarray(shares / shares.sum(), np.float64)


def plan_group(plan: GroupPlan, position: int, attempt: int = 0) -> tuple[int, Iterator[int]]:
    """The concept at a position, and its rows of one kind in random order, of which the first ones form the group.

    Each row comes once, so that one with a broken image is replaced by the next. Another attempt draws another concept.

    Returns:
        An index into the plan's concepts, and at least `group_size` rows of `groups`.
    """
    rng = np.random.default_rng([plan.seed, position, attempt])
    concept = min(int(np.searchsorted(plan.ends, rng.random() * plan.ends[-1], side="right")), len(plan.ends) - 1)
    count = np.where(plan.counts[concept] >= plan.group_size, plan.counts[concept], 0)
    kind = 1 + int(rng.random() * count.sum() >= count[0])
    start, stop = int(plan.starts[concept]), int(plan.stops[concept])
    rows = random_rows(rng, plan.kinds[start:stop], kind, int(count[kind - 1]))
    return concept, (start + row for row in rows)


def random_rows(rng: np.random.Generator, kinds_R: npt.NDArray[np.uint8], kind: int, count: int) -> Iterator[int]:
    """The `count` rows of a kind in random order; the first few of a long range are found without permuting it."""
    seen: set[int] = set()
    if 8 * count > len(kinds_R) > 1000:
        while 2 * len(seen) < len(kinds_R):
            for row in rng.integers(len(kinds_R), size=32).tolist():
                if row not in seen:
                    seen.add(row)
                    if kinds_R[row] == kind:
                        yield row
    for row in rng.permutation(np.flatnonzero(kinds_R == kind)).tolist():
        if row not in seen:
            yield row


class RowGroups:
    """A least-recently-used cache of Parquet row groups, bounded in bytes; threads read different files at a time."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._kept: OrderedDict[tuple[str, int], pa.Table] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def row(self, uri: str, number: int) -> dict[str, Any]:
        """A row of a file by its number."""
        file, starts, reading = open_file(uri)
        index = int(np.searchsorted(starts, number, side="right")) - 1
        key = (uri, index)
        with reading:
            group = self._find(key)
            if group is None:
                group = file.read_row_group(index, columns=ROW_COLUMNS)
                self._keep(key, group)
        rows: list[dict[str, Any]] = group.slice(number - int(starts[index]), 1).to_pylist()
        return rows[0]

    def _find(self, key: tuple[str, int]) -> pa.Table | None:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def _keep(self, key: tuple[str, int], group: pa.Table) -> None:
        with self._lock:
            if key not in self._kept:  # else two threads opened its file at once
                self._kept[key] = group
                self._bytes += group.nbytes
            while self._bytes > self.max_bytes and len(self._kept) > 1:
                self._bytes -= self._kept.popitem(last=False)[1].nbytes


@lru_cache(maxsize=OPEN_FILES)
def open_file(uri: str) -> tuple[pq.ParquetFile, Integers, threading.Lock]:
    """A Parquet file, the first row of each of its row groups, and the lock of the thread that reads it."""
    filesystem, path = storage.resolve(uri)
    file = pq.ParquetFile(filesystem.open_input_file(path))
    counts = [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]
    return file, np.cumsum([0, *counts])[:-1], threading.Lock()


@lru_cache(maxsize=1)
def row_groups() -> RowGroups:
    """This process's cache."""
    return RowGroups(CACHE_BYTES)


def scan_kinds(uris: Sequence[str], count: int, sampling: Sampling) -> npt.NDArray[np.uint8]:
    """[count] kind of every row, from the widths and heights in Parquet files."""
    kinds, done = np.zeros(count, np.uint8), 0
    for sides in tables.read_files(uris, ["width", "height"]):
        width, height = sides["width"].to_numpy(), sides["height"].to_numpy()
        kind = np.where((width > height) | (not sampling.by_orientation), 1, 2)
        kind[np.minimum(width, height) < sampling.min_side] = 0
        kinds[done : done + len(kind)] = kind
        done += len(kind)
    return kinds


@dataclass(frozen=True)
class GroupLoader:
    """Caption groups at positions of the stream; a row is a whole group, so its images stay together.

    Columns `images` (raw uint8, one an image), `heights`, `widths`, `captions`, `concept_id`, `mentioned`, and
    `unreadable`: why each broken image was replaced by another of its concept.
    """

    plan: SharedValue[GroupPlan]
    uris: tuple[str, ...]
    """Parquet files of `groups`."""
    firsts: tuple[int, ...]
    """First row of each."""
    shards: str
    """Folder that `shard` is relative to."""
    table: str
    """Name for messages."""
    augmentation: Augmentation = AS_IS

    def __call__(self, positions: Integers) -> pa.Table:
        """The groups at `positions`.

        Raises:
            InputError: none of `MAX_ATTEMPTS` concepts has enough readable images.
        """
        plan = get_shared(self.plan)
        rows = read_all(partial(self._load, plan), positions.tolist())
        return pa.Table.from_pylist(rows, schema=GROUP_ROWS)

    def _load(self, plan: GroupPlan, position: int) -> dict[str, Any]:
        unreadable: list[str] = []
        for attempt in range(MAX_ATTEMPTS):
            concept, candidates = plan_group(plan, position, attempt)
            images: list[npt.NDArray[np.uint8]] = []
            chosen: list[dict[str, Any]] = []
            for number in candidates:
                file = int(np.searchsorted(self.firsts, number, side="right")) - 1
                row = row_groups().row(self.uris[file], number - self.firsts[file])
                shard = storage.join(self.shards, row["shard"])
                try:
                    image = read_image(shard, offset=row["offset"], size=row["size"])
                except InputError as error:
                    unreadable.append(str(error))
                    continue
                rng = np.random.default_rng([plan.seed, position, 5, len(chosen)])
                images.append(self._augment(np.asarray(image), rng))
                chosen.append(row)
                if len(chosen) == plan.group_size:
                    return {
                        "images": [image.tobytes() for image in images],
                        "heights": [image.shape[0] for image in images],
                        "widths": [image.shape[1] for image in images],
                        "captions": [row["caption"] for row in chosen],
                        "concept_id": int(plan.concept_ids[concept]),
                        "mentioned": [row["concept_ids"] for row in chosen],
                        "unreadable": unreadable,
                    }
        message = f"{MAX_ATTEMPTS} concepts without {plan.group_size} readable images"
        raise InputError(f"{self.table}: {message}: {unreadable[-1]}")

    def _augment(self, pixels: npt.NDArray[np.uint8], rng: np.random.Generator) -> npt.NDArray[np.uint8]:
        nothing = AnnotatedImage(pixels, NO_REGIONS[0], np.zeros(0, np.int64), [], *NO_REGIONS)
        return augment(nothing, self.augmentation, rng).pixels


def group_loader(
    storage_uri: str, name: str, *, seed: int, group_size: int, sampling: Sampling, augmentation: Augmentation = AS_IS
) -> GroupLoader:
    """All concepts of `concepts/<name>` and `groups/<name>` that the sampling asks for, with enough images for a group.

    Raises:
        InputError: a table is missing, a name of the sampling is no concept, or no concept has enough images.
    """
    manifest = tables.read_manifest(storage_uri, "groups", name)
    concepts = tables.read_table(storage_uri, "concepts", name, ["concept_id", "name", "start", "stop"])
    if sampling.names:
        unknown = sorted(set(sampling.names) - set(concepts["name"].to_pylist()))
        if unknown:
            raise InputError(f"--sampling.names {unknown[0]}: unknown, expected a name in concepts/{name}")
        concepts = concepts.filter(pc.is_in(concepts["name"], pa.array(sampling.names)))
    root = storage.absolute(tables.table_uri(storage_uri, "groups", name))
    files = [file for file in manifest.files if file.path.endswith(".parquet")]
    uris = tuple(storage.join(root, file.path) for file in files)
    rows = [file.rows for file in files]
    ids, starts, stops = (concepts[key].to_numpy().astype(np.int64) for key in ("concept_id", "start", "stop"))
    kinds = scan_kinds(uris, sum(rows), sampling)
    plan = build_plan(ids, starts, stops, kinds, sampling, seed=seed, group_size=group_size)
    if not len(plan.concept_ids):
        raise InputError(
            f"groups/{name}: no concept has {group_size} images with sides of {sampling.min_side} px or more"
            + (" of one orientation" if sampling.by_orientation else "")
        )
    shards = storage.absolute(tables.table_uri(storage_uri, "pairs", name))
    firsts = tuple(np.cumsum([0, *rows])[:-1].tolist())
    return GroupLoader(put_shared(plan), uris, firsts, shards, f"groups/{name}", augmentation)
