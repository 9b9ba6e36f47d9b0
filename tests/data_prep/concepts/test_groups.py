from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from data_prep import storage, tables
from data_prep.concepts import groups
from data_prep.concepts.groups import build_groups
from data_prep.pairs import shards


def mentions(names: list[list[str] | None], image_ids: list[str] | None = None) -> pa.Table:
    count = len(names)
    images = image_ids or [f"image-{number:03d}" for number in range(count)]
    columns = {
        "image_id": images,
        "shard": [f"shards/{number % 3}.tar" for number in range(count)],
        "offset": [512 * number for number in range(count)],
        "size": [number + 1 for number in range(count)],
        "width": [64] * count,
        "height": [48] * count,
        "caption": [f"caption of {image}" for image in images],
        "names": names,
    }
    return pa.table(columns, schema=shards.MENTIONS)


def built(rows: pa.Table | ds.Dataset, min_images: int = 1, memory: str = "1GB") -> tuple[pa.Table, pa.Table]:
    with build_groups(rows, min_images=min_images, memory=memory) as (concepts, stream):
        return concepts, stream.read_all()


def test_groups_are_ranges_of_images_that_share_a_concept() -> None:
    rows = mentions([["cat", "zebra"], ["cat"], ["cat", "lonely", "zebra"]], ["c", "b", "a"])
    with build_groups(rows, min_images=2) as (concepts, stream):
        found = stream.read_all()
    assert concepts.to_pylist() == [
        {"concept_id": 0, "name": "cat", "image_count": 3, "start": 0, "stop": 3},
        {"concept_id": 1, "name": "zebra", "image_count": 2, "start": 3, "stop": 5},
    ]
    assert found["concept_id"].to_pylist() == [0, 0, 0, 1, 1]
    assert found["image_id"].to_pylist() == ["a", "b", "c", "a", "c"]
    assert found["concept_ids"].to_pylist() == [[0, 1], [0], [0, 1], [0, 1], [0, 1]]
    assert found["offset"].to_pylist() == [1024, 512, 0, 1024, 0]
    assert found["caption"].to_pylist() == [f"caption of {image}" for image in "abcac"]
    assert concepts.schema.equals(tables.SCHEMAS["concepts"])
    assert found.schema.equals(tables.SCHEMAS["groups"])


@pytest.mark.parametrize(("min_images", "names"), [(0, "abc"), (1, "abc"), (2, "ab"), (3, "a"), (4, "")])
def test_concepts_with_too_few_images_are_left_out(min_images: int, names: str) -> None:
    concepts, found = built(mentions([["a", "b", "c"], ["a", "b"], ["a"]]), min_images)
    assert concepts["name"].to_pylist() == list(names)
    assert set(found["concept_id"].to_pylist()) == set(range(len(names)))
    assert all(max(ids) < len(names) for ids in found["concept_ids"].to_pylist())


def test_images_without_a_concept_are_in_no_group() -> None:
    concepts, found = built(mentions([[], ["cat"], None, ["dog"], []]))
    assert concepts["image_count"].to_pylist() == [1, 1]
    assert found["image_id"].to_pylist() == ["image-001", "image-003"]
    assert found["concept_ids"].to_pylist() == [[0], [1]]


@pytest.mark.parametrize("rows", [mentions([]), mentions([[]]), mentions([None, []]), mentions([["rare"]])])
def test_no_images_or_no_concepts_give_empty_tables(rows: pa.Table) -> None:
    concepts, found = built(rows, 2)
    assert (concepts.num_rows, found.num_rows) == (0, 0)
    assert concepts.schema.equals(tables.SCHEMAS["concepts"])
    assert found.schema.equals(tables.SCHEMAS["groups"])


def test_names_are_sorted_as_python_sorts_them() -> None:
    names = [
        "é",
        "e",
        "f",
        "z",
        "Z",
        "a b",
        "a-b",
        "a",
        "aa",
        "ß",
        "ss",
        "Ä",
        "中",
        "🙂",
        "\ufb01",
        "e\u0301",
        "_",
        "1",
    ]
    concepts, found = built(mentions([sorted(names), *([name] for name in names)]))
    assert concepts["name"].to_pylist() == sorted(names)
    assert found["concept_ids"].to_pylist()[0] == list(range(len(names)))


def random_mentions(seed: int, count: int) -> pa.Table:
    rng = np.random.default_rng(seed)
    vocabulary = [f"name {number}é"[: 6 + number % 3] + str(number) for number in range(30)]
    names = [sorted(set(rng.choice(vocabulary, rng.integers(0, 6)).tolist())) for _ in range(count)]
    return mentions(names, [f"{number:06x}" for number in rng.permutation(count)])


def slow_groups(rows: pa.Table, min_images: int) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    images = rows.to_pylist()
    members: dict[str, list[str]] = {}
    for image in images:
        for name in image["names"]:
            members.setdefault(name, []).append(image["image_id"])
    names = sorted(name for name in members if len(members[name]) >= min_images)
    ids = {
        image["image_id"]: [number for number, name in enumerate(names) if name in image["names"]] for image in images
    }
    concepts, found = [], []
    for number, name in enumerate(names):
        concepts.append((number, name, len(members[name]), len(found), len(found) + len(members[name])))
        found.extend((number, image, ids[image]) for image in sorted(members[name]))
    return concepts, found


@pytest.mark.parametrize("seed", range(5))
def test_groups_equal_those_of_a_slow_loop_from_files_and_from_memory(seed: int, tmp_path: Path) -> None:
    rows = random_mentions(seed, 300)
    concepts, found = built(rows, 50)
    columns = ["concept_id", "image_id", "concept_ids"]
    members = [tuple(row[name] for name in columns) for row in found.to_pylist()]
    assert ([tuple(row.values()) for row in concepts.to_pylist()], members) == slow_groups(rows, 50)
    assert all(ids == sorted(set(ids)) for ids in found["concept_ids"].to_pylist())
    for number, start in enumerate(range(0, 300, 70)):
        pq.write_table(rows.slice(start, 70), tmp_path / f"{number}.parquet", row_group_size=11)
    files = ds.dataset(tmp_path, schema=shards.MENTIONS, format="parquet")
    chunks = pa.concat_tables([rows.slice(250), rows.slice(100, 150), rows.slice(0, 100)])
    for other in (files, chunks, rows.take(pa.array(np.random.default_rng(0).permutation(300)))):
        again = built(other, 50)
        assert again[0].equals(concepts)
        assert again[1].equals(found)


def test_a_slice_of_a_table_gives_its_own_rows_alone() -> None:
    concepts, found = built(mentions([["x", "y"], ["b"], [], ["c"], ["a", "c"], ["z"]]).slice(2, 3))
    assert concepts["name"].to_pylist() == ["a", "c"]
    assert [(row["image_id"], row["concept_ids"]) for row in found.to_pylist()] == [
        ("image-004", [0, 1]), ("image-003", [1]), ("image-004", [0, 1]),
    ]  # fmt: skip


def test_groups_are_streamed_in_batches_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "BATCH_ROWS", 2048)
    rows = random_mentions(0, 10_000)
    with build_groups(rows, min_images=1) as (concepts, stream):
        batches = list(stream)
    assert len(batches) > 5
    order = [key for batch in batches for key in zip(*(batch[name].to_pylist() for name in batch.schema.names[:2]))]  # noqa: B905
    assert order == sorted(order)
    ids = [concept for concept, _ in order]
    for concept in concepts.to_pylist():
        assert set(ids[concept["start"] : concept["stop"]]) == {concept["concept_id"]}
    assert concepts["stop"].to_pylist()[-1] == len(ids)


def test_less_memory_gives_the_same_groups() -> None:
    rows = random_mentions(1, 60_000)
    wide, narrow = built(rows, 2), built(rows, 2, memory="64MB")
    assert wide[1].num_rows > 100_000
    assert wide[0].equals(narrow[0])
    assert wide[1].equals(narrow[1])


@pytest.mark.ray
@pytest.mark.parametrize("min_images", [2, 1000])
def test_a_cluster_writes_the_same_groups_row_by_row(
    min_images: int, tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "FILE_ROWS", 300)
    monkeypatch.setattr(groups, "TASK_FILES", 2)
    rows = random_mentions(3, 800)
    digests = [storage.sha256(image.encode()) for image in rows["image_id"].to_pylist()]
    rows = rows.set_column(0, rows.schema.field("image_id"), pa.array(digests))
    for number, start in enumerate(range(0, 800, 150)):
        pq.write_table(rows.slice(start, 150), tmp_path / f"{number}.parquet")
    files = tables.open_parquet(sorted(map(str, tmp_path.glob("*.parquet"))), shards.MENTIONS)
    found = {}
    for write in (groups.write_groups, groups.shuffle_groups):
        written = write(files, str(tmp_path), write.__name__, "part", min_images=min_images, memory="1GB")
        read: list[pa.Table] = []
        for table, entries in (("concepts", written.concepts), ("groups", written.groups)):
            folder = tmp_path / table / write.__name__
            assert [entry.path for entry in entries] == sorted(path.name for path in folder.iterdir())
            parts = [pq.read_table(folder / entry.path) for entry in entries]
            assert [entry.rows for entry in entries] == [part.num_rows for part in parts]
            read.append(pa.concat_tables(parts))
        found[write] = (read, len(written.groups))
    (alone, _), (together, num_files) = found.values()
    assert together[0].equals(alone[0])
    assert together[1].equals(alone[1])
    assert num_files == (1 if min_images == 1000 else 7)
    assert alone[1].num_rows == (0 if min_images == 1000 else 1884)
