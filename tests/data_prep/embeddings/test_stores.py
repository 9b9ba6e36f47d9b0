import dataclasses
import json
import pickle
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from data_prep import tables
from data_prep.embeddings import stores as embeddings
from data_prep.embeddings.crops import CropConfig
from data_prep.embeddings.stores import EmbeddingJob, RegionStore, open_rows
from ovd_models.errors import InputError

COUNTS = [[3, 0, 2], [1], [4, 5]]
"""Regions of the images of each shard."""
WIDTH = 8
PROVENANCE = {"teacher": "clip:aa", "crops": dataclasses.asdict(CropConfig())}


def rows_of(number: int, count: int) -> npt.NDArray[np.float16]:
    values = np.random.default_rng(number).normal(size=(count, WIDTH))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype("<f2")


def image_id(number: int) -> str:
    return f"{number * 7919 % 1000:03d}"  # not in order


def publish(storage: Path, name: str = "t") -> None:
    job = EmbeddingJob(storage=str(storage), table="regions", name=name, staging=str(storage / "staging" / name))
    number = 0
    for shard, counts in enumerate(COUNTS):
        images = []
        for count in counts:
            images.append(
                {
                    "shard": f"{shard:06d}",
                    "image_id": image_id(number),
                    "boxes": [[number, box, number + 1, box + 2] for box in range(count)],
                    "scores": [1 / (1 + box) for box in range(count)],
                    "count": count,
                    "file": rows_of(number, count).tobytes(),
                }
            )
            number += 1
        embeddings.save_shard(pa.Table.from_pylist(images), job)
    saved = embeddings.saved_shards(job.staging)
    assert embeddings.saved_shards(f"{Path(job.staging).as_uri()}?endpoint_override=http://a.b:1") == saved
    embeddings.publish_embeddings(job, list(saved.values()), producer="test", config_hash="0", provenance=PROVENANCE)


@pytest.fixture
def store(tmp_path: Path) -> RegionStore:
    publish(tmp_path)
    return RegionStore.open(str(tmp_path), "t", PROVENANCE)


def test_regions_are_found_by_image_id(store: RegionStore) -> None:
    assert len(store) == 6
    for number in (4, 0, 5, 2, 1, 3):  # any order
        count = [count for counts in COUNTS for count in counts][number]
        found = store[image_id(number)]
        assert np.array_equal(found.embeddings, rows_of(number, count))
        assert found.boxes.tolist() == [[number, box, number + 1, box + 2] for box in range(count)]
        assert found.scores.tolist() == pytest.approx([1 / (1 + box) for box in range(count)])


def test_random_access_gives_what_a_sequential_pass_gives(store: RegionStore) -> None:
    chunks = list(store.rows.chunks(2))
    every = np.concatenate([chunk for _, chunk in chunks])
    assert [first for first, _ in chunks] == [0, 2, 4, 5, 6, 8, 10, 12, 14]  # a chunk lies in one file
    assert len(every) == 15
    for position in range(len(store)):
        own = slice(store.rows.offsets[position], store.rows.offsets[position + 1])
        assert np.array_equal(store.rows.read(position), every[own])
    assert store.rows.image_of(np.arange(15)).tolist() == [0] * 3 + [2] * 2 + [3] + [4] * 4 + [5] * 5


def test_a_store_can_be_sent_to_another_process(store: RegionStore) -> None:
    sent: RegionStore = pickle.loads(pickle.dumps(store))
    assert np.array_equal(sent[image_id(4)].embeddings, rows_of(4, 4))


def test_embeddings_stay_on_disk_and_cannot_be_changed(store: RegionStore) -> None:
    found = store[image_id(0)].embeddings
    assert isinstance(found.base, np.memmap) or isinstance(found, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        found[0, 0] = 1


def test_unknown_image_says_which(store: RegionStore) -> None:
    assert "nowhere" not in store
    assert "" not in store
    with pytest.raises(InputError, match="nowhere"):
        store["nowhere"]


def test_another_teacher_is_told_with_both(tmp_path: Path) -> None:
    publish(tmp_path)
    with pytest.raises(InputError, match=r'teacher "clip:aa", this run asks for "clip:bb"'):
        RegionStore.open(str(tmp_path), "t", {**PROVENANCE, "teacher": "clip:bb"})


def test_other_crops_are_told_with_both(tmp_path: Path) -> None:
    publish(tmp_path)
    with pytest.raises(InputError, match=r"1\.0, 1\.5.*warp.*1\.0, 2\.0.*pad"):
        RegionStore.open(str(tmp_path), "t", {"crops": dataclasses.asdict(CropConfig(scales=(1.0, 2.0), fit="pad"))})


def test_another_schema_version_is_told_with_both(tmp_path: Path) -> None:
    publish(tmp_path)
    path = tmp_path / "regions" / "t" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "schema_version": 99}))
    with pytest.raises(InputError, match=f"version 99.*version {tables.SCHEMA_VERSION}"):
        RegionStore.open(str(tmp_path), "t", PROVENANCE)


def test_a_missing_table_says_what_makes_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"workflows/embed\.py"):
        RegionStore.open(str(tmp_path), "t", PROVENANCE)


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_array_is_told_when_the_store_is_opened(tmp_path: Path, damage: str) -> None:
    publish(tmp_path)
    path = tmp_path / "regions" / "t" / "rows" / "000002.f16"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-2])
    else:
        path.unlink()
    with pytest.raises(InputError, match=r"000002\.f16"):
        open_rows(str(tmp_path), "regions", "t", PROVENANCE)


def test_a_table_without_images_can_be_opened(tmp_path: Path) -> None:
    job = EmbeddingJob(storage=str(tmp_path), table="regions", name="t", staging=str(tmp_path / "staging"))
    embeddings.publish_embeddings(job, [], producer="test", config_hash="0", provenance=PROVENANCE)
    empty = RegionStore.open(str(tmp_path), "t", PROVENANCE)
    assert len(empty) == 0
    assert image_id(0) not in empty
    assert list(empty.rows.chunks(4)) == []
