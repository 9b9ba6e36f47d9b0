"""The store of embedded names: table `texts`, one for each teacher, filled once and read by every workflow.

names --those not in the store--> text encoder --parts of bounded size--> texts/<teacher>

Every part is published as it is written, so a fill that was killed goes on where it stopped.

K names, N those of them that are found, D embedding width.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from data_prep import storage, tables
from data_prep.tables import FileEntry, Manifest
from ovd_models.errors import InputError
from ovd_models.vocabulary import EmbeddingTable, TextEncoder, clean_names

PRODUCER = "workflows/embed_texts.py"
PART = 16_384
"""Names of a file, and how many are embedded before the next is published."""
Floats = npt.NDArray[np.float32]


def table_name(teacher: str) -> str:
    """The table of a teacher: `clip:0123ab` -> `clip-0123ab`."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", teacher)


@dataclass(frozen=True)
class TextStore:
    """The embedded names of one teacher."""

    storage: str
    name: str
    teacher: str

    @classmethod
    def of(cls, storage_uri: str, teacher: str) -> "TextStore":
        """The store that is named after its teacher."""
        return cls(storage_uri, table_name(teacher), teacher)

    def manifest(self) -> Manifest | None:
        """What is published, or None.

        Raises:
            InputError: the table was made by another teacher.
        """
        found = tables.find_manifest(self.storage, "texts", self.name)
        if found is not None and found.details["teacher"] != self.teacher:
            uri = tables.table_uri(self.storage, "texts", self.name)
            raise InputError(f"{uri}: embedded by {found.details['teacher']}, expected {self.teacher}")
        return found

    def missing(self, names: Sequence[str], prompt_set: str) -> list[str]:
        """Those names that are not in the store, each once."""
        wanted = pa.array(dict.fromkeys(names), pa.string())
        for _, keys in self._keys(prompt_set):
            wanted = wanted.filter(pc.invert(pc.is_in(wanted, keys)))
        return [str(name) for name in wanted.to_pylist()]

    def read(self, names: Sequence[str], prompt_set: str) -> Tensor:
        """[K, D] unit rows.

        Raises:
            InputError: there is no store, or a name is not in it.
        """
        wanted = pa.array(names, pa.string())
        manifest = self.manifest() or tables.read_manifest(self.storage, "texts", self.name)
        rows_KD = torch.empty(len(names), int(manifest.details["width"]))
        open_K = np.ones(len(names), bool)
        for file, keys in self._keys(prompt_set):
            row_K = pc.index_in(wanted, keys)
            here = np.flatnonzero(open_K & row_K.is_valid().to_numpy(zero_copy_only=False))
            if len(here):
                found = row_K.take(pa.array(here)).to_numpy()
                rows_KD[here] = torch.from_numpy(self._embeddings(file, prompt_set)[found])
                open_K[here] = False
        if open_K.any():
            name = names[int(open_K.argmax())]
            made_by = tables.PRODUCERS["texts"]
            raise InputError(f"texts/{self.name}: no {name!r} with prompt set {prompt_set!r}; `{made_by}` embeds it")
        return rows_KD

    def read_all(self, prompt_set: str) -> tuple[list[str], Tensor]:
        """All N names of a prompt set, and their [N, D] unit rows."""
        names: list[str] = []
        parts: list[Floats] = []
        for file, keys in self._keys(prompt_set):
            if len(keys):
                names += keys.to_pylist()
                parts.append(self._embeddings(file, prompt_set))
        return names, torch.from_numpy(np.concatenate(parts)) if parts else torch.empty(0, 0)

    def fill(self, encoder: TextEncoder, names: Sequence[str]) -> int:
        """Embed the names that are not in the store yet; returns how many there were.

        Raises:
            InputError: the encoder is of another teacher, or embeds in another width.
        """
        if encoder.teacher != self.teacher:
            raise InputError(f"texts/{self.name}: the store of {self.teacher}, expected that of {encoder.teacher}")
        new = self.missing(clean_names(names), encoder.prompt_set)
        for start in range(0, len(new), PART):
            part = new[start : start + PART]
            self.append(part, encoder.prompt_set, encoder.embed_names(part).numpy())
        return len(new)

    def append(self, names: Sequence[str], prompt_set: str, rows_KD: Floats) -> None:
        """Publish unit rows beside those that are there.

        Raises:
            InputError: their width is another.
        """
        published = self.manifest()
        width = rows_KD.shape[1]
        if published is not None and published.details["width"] != width:
            uri = tables.table_uri(self.storage, "texts", self.name)
            raise InputError(f"{uri}: embeddings of width {published.details['width']}, these have {width}")
        flat = pa.array(np.ascontiguousarray(rows_KD, np.float32).ravel())
        table = pa.table(
            {
                "name": pa.array(names, pa.string()),
                "prompt_set": pa.array([prompt_set] * len(names), pa.string()),
                "embedding": pa.ListArray.from_arrays(np.arange(len(names) + 1, dtype=np.int32) * width, flat),
            }
        )
        # Named by what it holds, so that two jobs that write at the same time never write to one file.
        key = storage.sha256(json.dumps([prompt_set, *names]).encode())[:16]
        entry = tables.write_part(self.storage, "texts", self.name, f"{key}.parquet", table)
        self._publish(entry, width, prompt_set)

    def _publish(self, entry: FileEntry, width: int, prompt_set: str) -> None:
        published = self.manifest()  # again: another job may have added to it
        files = {file.path: file for file in published.files} if published else {}
        sets: list[str] = published.details["prompt_sets"] if published else []
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
                "prompt_sets": sorted({*sets, prompt_set}),
                "generation": published.details["generation"] + 1 if published else 0,
            },
        )

    def _keys(self, prompt_set: str) -> Iterator[tuple[str, pa.Array]]:
        """Every file with the names that it holds of a prompt set."""
        manifest = self.manifest()
        for path in tables.parquet_files(manifest) if manifest else []:
            uri = storage.join(tables.table_uri(self.storage, "texts", self.name), path)
            rows = tables.read_parquet(uri, ["name", "prompt_set"])
            yield uri, rows.filter(pc.equal(rows["prompt_set"], prompt_set))["name"].combine_chunks()

    @staticmethod
    def _embeddings(uri: str, prompt_set: str) -> Floats:
        """[N, D] of one file, in the order of its names."""
        rows = tables.read_parquet(uri, ["prompt_set", "embedding"])
        lists = rows.filter(pc.equal(rows["prompt_set"], prompt_set))["embedding"].combine_chunks()
        array: Floats = lists.flatten().to_numpy().reshape(len(lists), -1)
        return array


@dataclass(frozen=True)
class StoredEncoder:
    """A text encoder that looks names up in its teacher's store, and adds those that are missing."""

    encoder: TextEncoder
    store: TextStore

    @property
    def teacher(self) -> str:
        """The encoder's."""
        return self.encoder.teacher

    @property
    def prompt_set(self) -> str:
        """The encoder's."""
        return self.encoder.prompt_set

    def embed_names(self, names: Sequence[str]) -> Tensor:
        """[K, D] unit rows."""
        self.store.fill(self.encoder, names)
        return self.store.read(names, self.prompt_set)

    def embed_captions(self, captions: Sequence[str]) -> Tensor | None:
        """[B, D] unit rows, not stored."""
        return self.encoder.embed_captions(captions)


class PreloadedEncoder:
    """A text encoder that has its teacher's store in memory, embeds what is not there, and adds nothing to it."""

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


# ------------------------------------------------------------------------------------------------ matrices of others


def read_category_names(path: str) -> list[str]:
    """Names of a JSON file in the order of their ids: a list of {id, name}, or COCO's and LVIS's `categories`.

    Raises:
        InputError: it is no such file, or ids or names repeat.
    """
    try:
        raw = json.loads(storage.read_bytes(path))
        entries = raw["categories"] if isinstance(raw, dict) else raw
        names = {int(entry["id"]): str(entry["name"]) for entry in entries}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: {type(error).__name__} {error}, expected categories with id and name") from error
    if len(names) != len(entries) or len(set(names.values())) != len(names):
        raise InputError(f"{path}: {len(entries)} categories, but an id or a name is there twice")
    return [names[key] for key in sorted(names)]


def read_matrix(path: str, names: Sequence[str], width: int | None = None) -> EmbeddingTable:
    """A .npy matrix with a row for each name, in their order; ViLD's form, a column for each name, is turned.

    Args:
        path: of the matrix.
        names: of the rows.
        width: that the embeddings must have; any if None.

    Raises:
        InputError: there is no such matrix, or its shape is another.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}), expected a .npy matrix") from error
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path}: an archive, expected a .npy matrix")
    if array.ndim == 2 and array.shape[0] != len(names) and array.shape[1] == len(names):
        array = array.T
    table = EmbeddingTable.from_array(names, array, path)
    if width is not None and table.embeddings.shape[1] != width:
        raise InputError(f"{path}: embeddings of width {table.embeddings.shape[1]}, expected {width}")
    return table


def check_order(table: EmbeddingTable, encoder: TextEncoder, path: str, sample: int = 64) -> float:
    """The share of a sample of names, embedded by the encoder, whose nearest row is their own: a matrix has no names.

    Raises:
        InputError: fewer than half, so the rows are of other names or of another model.
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


def import_matrix(storage_uri: str, table: EmbeddingTable, prompt_set: str) -> TextStore:
    """Put the rows of a matrix into the store of their teacher; names that are there already stay as they are."""
    store = TextStore.of(storage_uri, table.teacher)
    new = store.missing(table.names, prompt_set)
    for start in range(0, len(new), PART):
        part = new[start : start + PART]
        store.append(part, prompt_set, table.embed_names(part).numpy())
    return store
