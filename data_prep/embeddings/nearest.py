"""Nearest-neighbour search in flat arrays: exact, or by a faiss index if faiss is installed."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.embeddings.stores import FlatRows

Rows = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float32]
CHUNK_ROWS = 1 << 15
"""Rows compared at once: 64 MiB as float32 at a width of 512."""
INDEXED_ROWS = 1_000_000
"""With fewer rows, one pass over all of them takes no longer than opening an index."""
PROBES = 64
"""Cells of the index that a query visits."""
CANDIDATES = 50
"""Candidates from the index for each result: its codes are coarse, so candidates are ranked again by their rows."""


def exact_nearest(rows: FlatRows, query_D: npt.NDArray[np.float32], top: int) -> tuple[Rows, Scores]:
    """The rows with the largest inner product with a query, best first, and these products; ties keep row order.

    Reads all rows once, in constant memory.
    """
    best, score = np.empty(0, np.int64), np.empty(0, np.float32)
    for first, chunk in rows.chunks(CHUNK_ROWS):
        products = chunk.astype(np.float32) @ query_D
        near = np.argpartition(-products, top - 1)[:top] if len(products) > top else np.arange(len(products))
        best, score = np.concatenate([best, first + near]), np.concatenate([score, products[near]])
        order = np.lexsort((best, -score))[:top]
        best, score = best[order], score[order]
    return best, score


def find_nearest(
    rows: FlatRows, query_D: npt.NDArray[np.float32], top: int, index_path: str, least: int = INDEXED_ROWS
) -> tuple[Rows, Scores]:
    """As `exact_nearest` of a unit query, but approximate from `least` rows on if faiss is installed.

    The local file of the index is built if it is missing.
    """
    if importlib.util.find_spec("faiss") is None or rows.offsets[-1] < max(least, 1):
        return exact_nearest(rows, query_D, top)
    faiss = importlib.import_module("faiss")
    index = faiss.read_index(index_path) if Path(index_path).exists() else build_index(faiss, rows, index_path)
    faiss.extract_index_ivf(index).nprobe = PROBES
    _, candidates = index.search(query_D[None], top * CANDIDATES)
    near = np.sort(candidates[0][candidates[0] >= 0])
    positions = rows.image_of(near)
    pairs = zip(positions.tolist(), (near - rows.offsets[positions]).tolist(), strict=True)
    score = np.array([rows.read(image)[row].astype(np.float32) @ query_D for image, row in pairs], np.float32)
    order = np.lexsort((near, -score))[:top]
    return near[order], score[order]


def build_index(faiss: Any, rows: FlatRows, path: str) -> Any:
    """Build an inverted file of product-quantised rows (one byte for eight values) and save it to a local file."""
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
