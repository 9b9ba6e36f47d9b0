from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from data_prep.embeddings import nearest
from data_prep.embeddings.nearest import exact_nearest, find_nearest
from data_prep.embeddings.stores import FlatRows


def flat(folder: Path, rows: npt.NDArray[np.float32], files: int = 3) -> FlatRows:
    """An image a row, spread over some files."""
    counts, starts, paths = [], [], []
    for number, part in enumerate(np.array_split(rows, files)):
        paths.append(f"{number}.f16")
        (folder / paths[-1]).write_bytes(part.astype("<f2").tobytes())
        counts += [number] * len(part)
        starts += list(range(len(part)))
    ids = np.array([f"{number:06d}" for number in range(len(rows))], np.bytes_)
    return FlatRows(
        uri=str(folder), width=rows.shape[1], files=tuple(paths), ids=ids, order=np.arange(len(rows)),
        file_of=np.array(counts, np.int64), starts=np.array(starts, np.int64), offsets=np.arange(len(rows) + 1),
    )  # fmt: skip


def random_rows(count: int, width: int = 16, seed: int = 0) -> npt.NDArray[np.float32]:
    rows = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_planted_rows_are_found_best_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "CHUNK_ROWS", 64)
    rows = random_rows(500)
    query = random_rows(1, seed=1)[0]
    for place, share in ((7, 1.0), (200, 3.0), (499, 2.0)):
        mixed = rows[place] * 0.1 + query * share
        rows[place] = mixed / np.linalg.norm(mixed)
    found, scores = exact_nearest(flat(tmp_path, rows), query, 3)
    assert found.tolist() == [200, 499, 7]
    assert scores == pytest.approx(rows[found] @ query, abs=1e-3)


def test_chunks_make_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, query = flat(tmp_path, random_rows(300)), random_rows(1, seed=2)[0]
    whole = exact_nearest(rows, query, 20)
    monkeypatch.setattr(nearest, "CHUNK_ROWS", 7)
    assert exact_nearest(rows, query, 20)[0].tolist() == whole[0].tolist()


def test_equal_rows_keep_their_order(tmp_path: Path) -> None:
    query = random_rows(1)[0]
    found, _ = exact_nearest(flat(tmp_path, np.tile(query, (10, 1))), query, 4)
    assert sorted(found.tolist()) == found.tolist()


def test_fewer_rows_than_wanted_are_all_found(tmp_path: Path) -> None:
    rows = random_rows(4)
    found, _ = exact_nearest(flat(tmp_path, rows), rows[2], 10)
    assert found[0] == 2
    assert sorted(found.tolist()) == [0, 1, 2, 3]


def test_nothing_is_found_in_nothing(tmp_path: Path) -> None:
    found, scores = find_nearest(flat(tmp_path, np.empty((0, 16), np.float32)), random_rows(1)[0], 5, "unused", least=0)
    assert found.tolist() == scores.tolist() == []


def test_a_faiss_index_finds_the_planted_row_and_is_kept(tmp_path: Path) -> None:
    pytest.importorskip("faiss", reason="faiss is not installed")
    rows = flat(tmp_path, random_rows(20_000))
    query = rows.read(12_345)[0].astype(np.float32)
    index = tmp_path / "indexes" / "t.faiss"
    for _ in range(2):
        found, scores = find_nearest(rows, query, 10, str(index), least=1000)
        assert found[0] == 12_345
        assert scores[0] == pytest.approx(1, abs=1e-2)
        assert (np.diff(scores) <= 0).all()
        assert index.is_file()
    exact = set(exact_nearest(rows, query, 10)[0].tolist())
    assert len(exact & set(found.tolist())) >= 8
