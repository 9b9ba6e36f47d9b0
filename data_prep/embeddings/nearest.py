"""The rows of flat arrays that are most like a query: exactly, or by an index of faiss where that is installed."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep import storage
from data_prep.embeddings.stores import FlatRows

Rows = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float32]
CHUNK_ROWS = 1 << 15
"""Rows that are looked at together: 64 MiB as float32 at a width of 512."""
INDEXED_ROWS = 1_000_000
"""With fewer rows, one pass over all of them takes no longer than opening an index."""
PROBES = 64
"""Cells of the index that a query looks into."""
CANDIDATES = 50
"""Rows that the index proposes for each that is wanted: its codes are coarse, so the rows themselves decide."""


def exact_nearest(rows: FlatRows, query_D: npt.NDArray[np.float32], top: int) -> tuple[Rows, Scores]:
    """The rows of largest inner product with a query, best first, and that product; of equals the first come first.

    Reads all rows once, in memory that does not depend on their number.
    """
    best, score = np.empty(0, np.int64), np.empty(0, np.float32)
    for first, chunk in rows.chunks(CHUNK_ROWS):
        found = chunk.astype(np.float32) @ query_D
        near = np.argpartition(-found, top - 1)[:top] if len(found) > top else np.arange(len(found))
        best, score = np.concatenate([best, first + near]), np.concatenate([score, found[near]])
        order = np.lexsort((best, -score))[:top]
        best, score = best[order], score[order]
    return best, score


def nearest(
    rows: FlatRows, query_D: npt.NDArray[np.float32], top: int, index: str, least: int = INDEXED_ROWS
) -> tuple[Rows, Scores]:
    """As `exact_nearest`, but approximately where faiss is installed and there are many rows.

    Args:
        rows: what is searched.
        query_D: [D] unit.
        top: how many are wanted.
        index: local file that keeps the index; it is made where it is missing.
        least: rows from which on an index is used.
    """
    if importlib.util.find_spec("faiss") is None or rows.offsets[-1] < max(least, 1):
        return exact_nearest(rows, query_D, top)
    faiss = importlib.import_module("faiss")
    found = faiss.read_index(index) if storage.exists(index) else build_index(faiss, rows, index)
    faiss.extract_index_ivf(found).nprobe = PROBES
    _, candidates = found.search(query_D[None], top * CANDIDATES)
    near = np.sort(candidates[0][candidates[0] >= 0])
    score = np.array([row_D.astype(np.float32) @ query_D for row_D in _take(rows, near)], np.float32)
    order = np.lexsort((near, -score))[:top]
    return near[order], score[order]


def _take(rows: FlatRows, chosen: Rows) -> list[npt.NDArray[np.float16]]:
    positions = rows.image_of(chosen)
    inside = chosen - rows.offsets[positions]
    return [rows.read(position)[row] for position, row in zip(positions.tolist(), inside.tolist(), strict=True)]


def build_index(faiss: Any, rows: FlatRows, path: str) -> Any:
    """An inverted file of product-quantised rows, one byte for eight values, saved to a local file."""
    count = int(rows.offsets[-1])
    cells = max(1, min(int(4 * count**0.5), count // 40))
    index = faiss.index_factory(rows.width, f"IVF{cells},PQ{rows.width // 8}", faiss.METRIC_INNER_PRODUCT)
    sample = [chunk[:: max(1, count // (64 * cells))] for _, chunk in rows.chunks(CHUNK_ROWS)]
    index.train(np.concatenate(sample).astype(np.float32))
    for _, chunk in rows.chunks(CHUNK_ROWS):
        index.add(chunk.astype(np.float32))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    faiss.write_index(index, f"{path}.tmp")
    Path(f"{path}.tmp").rename(path)
    return index
