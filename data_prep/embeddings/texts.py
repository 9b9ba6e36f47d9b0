"""The store of embedded names: a table `texts` for each teacher, filled once and read by every workflow.

names --those not in the store--> text encoder --parts of bounded size--> texts/<teacher>

Each part is published when it is written, so a killed fill continues where it stopped.

K requested names, N stored names, D embedding width.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from data_prep import locks, storage, tables
from data_prep.parts import HERE, Pool, run_parts
from data_prep.progress import Progress
from data_prep.tables import FileEntry, Manifest
from ovd_models.errors import InputError, first_line
from ovd_models.vocabulary import EmbeddingTable, TextEncoder, clean_names

PRODUCER = "workflows/embed_texts.py"
PART = 16_384
"""Names embedded and published at a time: those of one file."""
WAIT_SECONDS = 60.0
"""For other jobs that add a part to the same store."""
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TextStore:
    """The embedded names of one teacher."""

    storage: str
    teacher: str

    @property
    def name(self) -> str:
        """The table of the teacher: `clip:0123ab` -> `clip-0123ab`."""
        return re.sub(r"[^A-Za-z0-9._-]+", "-", self.teacher)

    @property
    def uri(self) -> str:
        """The table's folder."""
        return tables.table_uri(self.storage, "texts", self.name)

    def manifest(self) -> Manifest | None:
        """The published manifest, or None.

        Raises:
            InputError: the table was made by another teacher.
        """
        published = tables.find_manifest(self.storage, "texts", self.name)
        if published is not None and published.details["teacher"] != self.teacher:
            raise InputError(f"{self.uri}: embedded by {published.details['teacher']}, expected {self.teacher}")
        return published

    def missing(self, names: Sequence[str], prompt_set: str) -> list[str]:
        """The names that are not in the store, each once."""
        missing = pa.array(dict.fromkeys(names), pa.string())
        for _, stored in self._stored(prompt_set):
            missing = missing.filter(pc.invert(pc.is_in(missing, stored)))
        return [str(name) for name in missing.to_pylist()]

    def read(self, names: Sequence[str], prompt_set: str) -> Tensor:
        """[K, D] unit rows.

        Raises:
            InputError: there is no store, or a name is not in it.
        """
        requested = pa.array(names, pa.string())
        manifest = self.manifest() or tables.read_manifest(self.storage, "texts", self.name)
        rows_KD = torch.empty(len(names), int(manifest.details["width"]))
        missing_K = np.ones(len(names), bool)
        for uri, stored in self._stored(prompt_set):
            row_K = pc.index_in(requested, stored)
            here = np.flatnonzero(missing_K & row_K.is_valid().to_numpy(zero_copy_only=False))
            if len(here):
                rows = row_K.take(pa.array(here)).to_numpy()
                rows_KD[here] = torch.from_numpy(_read_embeddings(uri, prompt_set)[rows])
                missing_K[here] = False
        if missing_K.any():
            name = names[int(missing_K.argmax())]
            made_by = tables.PRODUCERS["texts"]
            raise InputError(f"texts/{self.name}: no {name!r} with prompt set {prompt_set!r}; `{made_by}` embeds it")
        return rows_KD

    def read_all(self, prompt_set: str) -> tuple[list[str], Tensor]:
        """All N names of a prompt set, and their [N, D] unit rows."""
        names: list[str] = []
        parts: list[Floats] = []
        for uri, stored in self._stored(prompt_set):
            if len(stored):
                names += stored.to_pylist()
                parts.append(_read_embeddings(uri, prompt_set))
        return names, torch.from_numpy(np.concatenate(parts)) if parts else torch.empty(0, 0)

    def fill(
        self,
        encoder: TextEncoder,
        names: Sequence[str],
        pool: Pool = HERE,
        make_encoder: Callable[[], TextEncoder] | None = None,
    ) -> int:
        """Embed the names that are not in the store; returns their number.

        `make_encoder` makes it again in each process of the pool; without it, all parts use this one.

        Raises:
            InputError: the encoder is another teacher's, or its embeddings have another width.
        """
        if encoder.teacher != self.teacher:
            raise InputError(f"texts/{self.name}: the store of {self.teacher}, expected that of {encoder.teacher}")
        return self._append_missing(encoder, clean_names(names), pool, make_encoder or (lambda: encoder))

    def import_table(self, table: EmbeddingTable) -> int:
        """Add the rows of a table whose names are not in the store; returns their number."""
        return self._append_missing(table, table.names, HERE, lambda: table)

    def _append_missing(
        self, encoder: TextEncoder, names: Sequence[str], pool: Pool, make_encoder: Callable[[], TextEncoder]
    ) -> int:
        new = self.missing(names, encoder.prompt_set)
        parts = [new[start : start + PART] for start in range(0, len(new), PART)]
        progress = Progress(f"texts/{self.name}", "names", len(new)) if len(parts) > 1 else None
        for number, (entry, width) in run_parts(lambda: _TextWorker(self, make_encoder()), parts, pool):
            self._publish(entry, encoder.prompt_set, width)
            if progress:
                progress.add(len(parts[number]))
        if progress:
            progress.close()
        return len(new)

    def write(self, names: Sequence[str], prompt_set: str, rows_KD: Floats) -> FileEntry:
        """Write a file of unit rows, without publishing it.

        Raises:
            InputError: their width is not that of the store.
        """
        published = self.manifest()
        width = rows_KD.shape[1]
        if published is not None and published.details["width"] != width:
            raise InputError(f"{self.uri}: embeddings of width {published.details['width']}, these have {width}")
        flat = pa.array(np.ascontiguousarray(rows_KD, np.float32).ravel())
        table = pa.table(
            {
                "name": pa.array(names, pa.string()),
                "prompt_set": pa.array([prompt_set] * len(names), pa.string()),
                "embedding": pa.ListArray.from_arrays(np.arange(len(names) + 1, dtype=np.int32) * width, flat),
            }
        )
        # The file is named by its content, so that a part that is written again is the same file.
        key = storage.sha256(json.dumps([prompt_set, *names]).encode())[:16]
        return tables.write_part(self.storage, "texts", self.name, f"{key}.parquet", table)

    def _publish(self, entry: FileEntry, prompt_set: str, width: int) -> None:
        with locks.hold(self.storage, f"texts/{self.name}", wait_seconds=WAIT_SECONDS):
            published = self.manifest()  # another job may have published since
            files = {file.path: file for file in published.files} if published else {}
            prompt_sets: list[str] = published.details["prompt_sets"] if published else []
            tables.publish(
                self.storage,
                "texts",
                self.name,
                list((files | {entry.path: entry}).values()),
                producer=PRODUCER,
                config_hash=storage.sha256(self.teacher.encode())[:16],
                details={
                    "teacher": self.teacher,
                    "width": width,
                    "prompt_sets": sorted({*prompt_sets, prompt_set}),
                    "generation": published.details["generation"] + 1 if published else 0,
                },
                others_write=True,
            )

    def _stored(self, prompt_set: str) -> Iterator[tuple[str, pa.Array]]:
        """The URI of every file, with its names of a prompt set."""
        manifest = self.manifest()
        for path in tables.parquet_files(manifest) if manifest else []:
            uri = storage.join(self.uri, path)
            rows = tables.read_parquet(uri, ["name", "prompt_set"])
            yield uri, rows.filter(pc.equal(rows["prompt_set"], prompt_set))["name"].combine_chunks()


@dataclass(frozen=True)
class _TextWorker:
    """Embeds and writes parts of names."""

    store: TextStore
    encoder: TextEncoder

    def __call__(self, names: Sequence[str]) -> tuple[FileEntry, int]:
        """The written file, and the width of its rows."""
        rows_KD = self.encoder.embed_names(names).numpy()
        return self.store.write(names, self.encoder.prompt_set, rows_KD), rows_KD.shape[1]


def _read_embeddings(uri: str, prompt_set: str) -> Floats:
    """[N, D] rows of one file and prompt set, in the order of its names."""
    rows = tables.read_parquet(uri, ["prompt_set", "embedding"])
    lists = rows.filter(pc.equal(rows["prompt_set"], prompt_set))["embedding"].combine_chunks()
    array: Floats = lists.flatten().to_numpy().reshape(len(lists), -1)
    return array


class StoredEncoder:
    """A text encoder that reads names from its teacher's store, and adds missing ones to it."""

    def __init__(self, encoder: TextEncoder, store: TextStore) -> None:
        self.encoder, self.teacher, self.prompt_set = encoder, encoder.teacher, encoder.prompt_set
        self.store = store

    def embed_names(self, names: Sequence[str]) -> Tensor:
        """[K, D] unit rows."""
        self.store.fill(self.encoder, names)
        return self.store.read(names, self.prompt_set)

    def embed_captions(self, captions: Sequence[str]) -> Tensor | None:
        """[B, D] unit rows, not stored."""
        return self.encoder.embed_captions(captions)


class PreloadedEncoder:
    """A text encoder with its teacher's store in memory; it embeds missing names without adding them to the store."""

    def __init__(self, encoder: TextEncoder, store: TextStore) -> None:
        self.encoder, self.teacher, self.prompt_set = encoder, encoder.teacher, encoder.prompt_set
        names, self._stored_ND = store.read_all(encoder.prompt_set)
        self._row_of = {name: row for row, name in enumerate(names)}

    def embed_names(self, names: Sequence[str]) -> Tensor:
        """[K, D] unit rows."""
        new = [name for name in dict.fromkeys(names) if name not in self._row_of]
        embedded = dict(zip(new, self.encoder.embed_names(new), strict=True)) if new else {}
        rows = [embedded[name] if name in embedded else self._stored_ND[self._row_of[name]] for name in names]
        return torch.stack(rows) if rows else self.encoder.embed_names(names)

    def embed_captions(self, captions: Sequence[str]) -> Tensor | None:
        """[B, D] unit rows."""
        return self.encoder.embed_captions(captions)


# ------------------------------------------------------------------------------------------------ matrices from files


def read_category_names(path: str) -> list[str]:
    """Names of a JSON file in order of their ids: a list of {id, name}, or the `categories` of COCO and LVIS files.

    Raises:
        InputError: the file has another form, or an id or a name is repeated.
    """
    try:
        raw = json.loads(storage.read_bytes(path))
        entries = raw["categories"] if isinstance(raw, dict) else raw
        names = {int(entry["id"]): str(entry["name"]) for entry in entries}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: {type(error).__name__} {error}, expected categories with id and name") from error
    if len(names) != len(entries) or len(set(names.values())) != len(names):
        raise InputError(f"{path}: {len(entries)} categories, but an id or a name is repeated")
    return [names[key] for key in sorted(names)]


def read_matrix(path: str, names: Sequence[str], width: int | None = None) -> EmbeddingTable:
    """Read a .npy matrix with a row for each name; ViLD's form, with a column for each name, is transposed.

    Raises:
        InputError: the file is not such a matrix, or not of the required `width`.
    """
    try:
        array = np.load(storage.local_file(path), allow_pickle=False)
    except (OSError, EOFError, ValueError, MemoryError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({first_line(error)}), expected a .npy matrix") from error
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path}: an archive, expected a .npy matrix")
    if array.ndim == 2 and array.shape[0] != len(names) and array.shape[1] == len(names):
        array = array.T
    table = EmbeddingTable.from_array(names, array, path)
    if width is not None and table.embeddings.shape[1] != width:
        raise InputError(f"{path}: embeddings of width {table.embeddings.shape[1]}, expected {width}")
    return table


def check_order(table: EmbeddingTable, encoder: TextEncoder, path: str, sample: int = 64) -> float:
    """The share of sampled names whose embedding is nearest to their own row of a matrix, which holds no names.

    Raises:
        InputError: fewer than half: the rows are of other names or of another model.
    """
    chosen = np.unique(np.linspace(0, len(table.names) - 1, sample).round().astype(int))
    own_ND = encoder.embed_names([table.names[row] for row in chosen])
    if own_ND.shape[1] != table.embeddings.shape[1]:
        raise InputError(f"{path}: width {table.embeddings.shape[1]}, the teacher's is {own_ND.shape[1]}")
    nearest = (own_ND @ table.embeddings.T).argmax(1).numpy()
    share = float((nearest == chosen).mean())
    if share < 0.5:
        raise InputError(
            f"{path}: only {share:.0%} of {len(chosen)} names are nearest to their own row, expected rows of "
            f"{encoder.teacher} in the order of the category ids"
        )
    return share
