import io
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from PIL import Image

from data_prep import storage, tables
from data_prep.pairs import shards
from data_prep.streams import group_loader as group_loading
from data_prep.streams.augmentation import FILL, Augmentation
from data_prep.streams.collate import GroupCollate
from data_prep.streams.group_loader import (
    GroupPlan,
    RowGroups,
    Sampling,
    build_plan,
    concept_chances,
    group_loader,
    plan_group,
    random_rows,
    scan_kinds,
)
from ovd_models.errors import InputError

STARTS, STOPS = np.array([0, 4, 10]), np.array([4, 10, 200])
EVERYTHING = Sampling(by_orientation=False)


def plan_of(kinds: np.ndarray | None = None, *, group_size: int, seed: int = 0) -> GroupPlan:
    """Concepts of 4, 6 and 190 images."""
    kinds = np.ones(200, np.uint8) if kinds is None else kinds
    return build_plan(np.arange(3), STARTS, STOPS, kinds, EVERYTHING, seed=seed, group_size=group_size)


def group_at(plan: GroupPlan, position: int) -> tuple[int, list[int]]:
    concept, rows = plan_group(plan, position)
    return concept, [row for row, _ in zip(rows, range(plan.group_size), strict=False)]


# ------------------------------------------------------------------------------------------------------ plans


def test_a_group_is_drawn_without_replacement_inside_its_concept() -> None:
    plan = plan_of(group_size=4)
    for position in range(300):
        concept, members = group_at(plan, position)
        assert len(set(members)) == 4
        assert STARTS[concept] <= min(members)
        assert max(members) < STOPS[concept]


def test_uniform_concepts_come_equally_often_however_many_images_they_have() -> None:
    plan = plan_of(group_size=2)
    counts = Counter(plan_group(plan, position)[0] for position in range(3000))
    # 1000 each, standard deviation sqrt(3000 * 1/3 * 2/3) = 26: five of them are 130
    assert all(870 < counts[concept] < 1130 for concept in range(3))


def test_chances_of_concepts_by_hand() -> None:
    images = np.array([2, 6, 32])  # shares 0.05, 0.15, 0.8
    assert concept_chances(images, Sampling()).tolist() == pytest.approx([1 / 3] * 3)
    assert concept_chances(images, Sampling(weights="frequency")).tolist() == pytest.approx([0.05, 0.15, 0.8])
    # Below a threshold of 0.2: 0.05 * sqrt(4) = 0.1 and 0.15 * sqrt(4 / 3) = 0.1732.
    found = concept_chances(images, Sampling(weights="repeat_factor", repeat_threshold=0.2))
    total = 0.1 + 0.15 * (4 / 3) ** 0.5 + 0.8
    assert found.tolist() == pytest.approx([0.1 / total, 0.15 * (4 / 3) ** 0.5 / total, 0.8 / total])


def test_frequent_concepts_come_as_often_as_their_share() -> None:
    plan = build_plan(
        np.arange(3), STARTS, STOPS, np.ones(200, np.uint8), Sampling(weights="frequency"), seed=0, group_size=2
    )
    counts = Counter(plan_group(plan, position)[0] for position in range(2000))
    assert abs(counts[2] - 1900) < 50  # 0.95 of 2000, standard deviation 10
    assert counts[0] > 0


def test_every_image_of_a_concept_comes_equally_often() -> None:
    plan = build_plan(np.arange(1), STARTS[:1], STOPS[:1], np.ones(4, np.uint8), EVERYTHING, seed=1, group_size=2)
    drawn = Counter(row for position in range(2000) for row in group_at(plan, position)[1])
    assert all(abs(drawn[row] - 1000) < 120 for row in range(4))  # standard deviation sqrt(2000 / 4) = 22


def test_a_group_depends_on_seed_and_position_alone() -> None:
    first = [group_at(plan_of(group_size=3), position) for position in range(20)]
    assert first == [group_at(plan_of(group_size=3), position) for position in range(20)]
    assert first != [group_at(plan_of(group_size=3, seed=1), position) for position in range(20)]
    assert len({tuple(members) for _, members in first}) > 15


def test_a_group_is_of_one_kind_and_kinds_come_in_proportion() -> None:
    kinds = np.ones(200, np.uint8)
    kinds[:4] = 0  # concept 0 is not used
    kinds[4:7] = 2  # concept 1: three of each kind
    kinds[10:48] = 2  # concept 2: 38 of 190
    kinds[180:190] = 0
    plan = plan_of(kinds, group_size=3)
    assert plan.concept_ids.tolist() == [1, 2]
    seen: Counter[tuple[int, int]] = Counter()
    for position in range(1000):
        concept, members = group_at(plan, position)
        (kind,) = {int(kinds[row]) for row in members}
        assert kind > 0
        seen[concept, kind] += 1
    assert abs(seen[0, 2] - 250) < 75  # half of the half
    assert abs(seen[1, 2] / (seen[1, 1] + seen[1, 2]) - 38 / 180) < 0.1


def test_a_kind_with_too_few_images_makes_no_group() -> None:
    kinds = np.array([1, 1, 2, 2, 2, 1, 2, 0], np.uint8)
    plan = build_plan(np.array([7, 8]), np.array([0, 5]), np.array([5, 8]), kinds, Sampling(), seed=0, group_size=3)
    assert plan.concept_ids.tolist() == [7]
    assert {tuple(sorted(group_at(plan, position)[1])) for position in range(20)} == {(2, 3, 4)}


def test_after_the_group_come_the_concepts_other_images() -> None:
    concept, rows = plan_group(plan_of(group_size=2), 4)
    assert sorted(rows) == list(range(STARTS[concept], STOPS[concept]))


@pytest.mark.parametrize("share", [1.0, 0.3, 0.01])
def test_random_rows_are_all_rows_of_a_kind_once_in_random_order(share: float) -> None:
    rng = np.random.default_rng(0)
    kinds = (rng.random(5000) < share).astype(np.uint8)
    expected = np.flatnonzero(kinds == 1)
    found = list(random_rows(rng, kinds, 1, len(expected)))
    assert sorted(found) == expected.tolist()
    assert abs(np.mean(found[: len(found) // 2]) - 2500) < 700


def test_the_first_of_many_rows_come_without_a_permutation() -> None:
    class Watched(np.random.Generator):
        def permutation(self, *_: object, **__: object) -> np.ndarray:  # type: ignore[override]
            raise AssertionError("permuted")

    rows = random_rows(Watched(np.random.PCG64(0)), np.ones(10**6, np.uint8), 1, 10**6)
    assert len({next(rows) for _ in range(1000)}) == 1000


# ------------------------------------------------------------------------------------------- tables and images

SIZES = [(10, 20), (30, 40), (64, 64), (64, 48)]  # height, width of pairs 0 .. 3
MENTIONED = [[0], [0, 1], [0, 1], [1, 2]]


def publish(root: Path, table: str, rows: list[dict[str, object]], row_group_size: int | None = None) -> None:
    whole = pa.Table.from_pylist(rows, schema=tables.SCHEMAS[table])
    half = len(rows) // 2
    entries = [
        tables.write_part(str(root), table, "t", f"part-{number}.parquet", part, row_group_size)
        for number, part in enumerate((whole.slice(0, half), whole.slice(half)))
    ]
    tables.publish(str(root), table, "t", entries, producer="test", config_hash="0")


def make_store(root: Path, broken: tuple[int, ...] = ()) -> Path:
    """Four images whose pixels are 10, 20, 30, 40, in concepts 0 (three images), 1 (three) and 2 (one)."""
    contents = []
    for number, (height, width) in enumerate(SIZES):
        sink = io.BytesIO()
        Image.fromarray(np.full((height, width, 3), 10 * number + 10, np.uint8)).save(sink, "PNG")
        contents.append(b"no picture" if number in broken else sink.getvalue())
    tar, offsets = shards.pack((f"{n}", content, f"caption {n}") for n, content in enumerate(contents))
    storage.write_bytes(f"{root}/pairs/t/shards/0.tar", tar)
    members: list[dict[str, object]] = [
        {
            "concept_id": concept,
            "image_id": str(n),
            "shard": "shards/0.tar",
            "offset": offsets[n],
            "size": len(contents[n]),
            "height": SIZES[n][0],
            "width": SIZES[n][1],
            "caption": f"caption {n}",
            "concept_ids": MENTIONED[n],
        }
        for concept in range(3)
        for n in range(4)
        if concept in MENTIONED[n]
    ]
    publish(root, "groups", members, row_group_size=2)
    stops = np.cumsum([sum(concept in entry for entry in MENTIONED) for concept in range(3)]).tolist()
    concepts: list[dict[str, object]] = [
        {"concept_id": n, "name": f"concept {n}", "image_count": stop - start, "start": start, "stop": stop}
        for n, (start, stop) in enumerate(zip([0, *stops], stops, strict=False))
    ]
    publish(root, "concepts", concepts)
    return root


def test_kinds_follow_from_widths_and_heights(tmp_path: Path) -> None:
    root = make_store(tmp_path)
    uris = [f"{root}/groups/t/part-{number}.parquet" for number in range(2)]
    # Rows of concept 0 are images 0, 1, 2, of concept 1 images 1, 2, 3, of concept 2 image 3; 0 and 1 are wide.
    assert scan_kinds(uris, 7, Sampling()).tolist() == [1, 1, 2, 1, 2, 2, 2]
    assert scan_kinds(uris, 7, Sampling(min_side=30)).tolist() == [0, 1, 2, 1, 2, 2, 2]
    assert scan_kinds(uris, 7, Sampling(min_side=45, by_orientation=False)).tolist() == [0, 0, 1, 0, 1, 1, 1]


def test_rows_are_read_by_number_and_the_cache_is_bounded(tmp_path: Path) -> None:
    root = make_store(tmp_path)
    reader = RowGroups(max_bytes=1)
    uri = f"{root}/groups/t/part-1.parquet"
    whole = tables.read_parquet(uri).to_pylist()
    for number in (3, 0, 2, 1, 0):
        row = reader.row(uri, number)
        assert row == {key: whole[number][key] for key in row}
        assert len(reader._kept) == 1


def test_threads_read_different_files_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    class File:
        def __init__(self, name: str) -> None:
            self.name, self.reads = name, 0

        def read_row_group(self, index: int, columns: list[str]) -> pa.Table:
            self.reads += 1
            together.wait(10)  # raises if they are read one after another
            return pa.table({"caption": [f"{self.name}{index}"]})

    together, files = threading.Barrier(2), {name: File(name) for name in "ab"}
    opened = {name: (file, np.arange(3), threading.Lock()) for name, file in files.items()}
    monkeypatch.setattr(group_loading, "open_file", opened.__getitem__)
    reader = RowGroups(max_bytes=1 << 20)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda uri: reader.row(uri, 1), "abab"))
    assert found == [{"caption": "a1"}, {"caption": "b1"}] * 2
    assert [file.reads for file in files.values()] == [1, 1]


@pytest.mark.ray
def test_groups_share_a_concept_and_list_all_mentioned_ones(ray_cluster: None, tmp_path: Path) -> None:
    loader = group_loader(str(make_store(tmp_path)), "t", seed=0, group_size=2, sampling=EVERYTHING)
    assert ray.get(loader.plan).concept_ids.tolist() == [0, 1]  # concept 2 has one image
    batch = GroupCollate(3, None)(loader(np.arange(20)))
    assert (batch.num_images, batch.group_size, len(batch.concept_ids)) == (40, 2, 20)
    assert set(batch.concept_ids.tolist()) == {0, 1}
    for row, (image, caption) in enumerate(zip(batch.images, batch.captions, strict=True)):
        number = int(caption[-1])
        assert image.shape == (3, *SIZES[number])
        assert set(image.unique().tolist()) == {10 * number + 10}
        assert torch.nonzero(batch.mentioned[row]).flatten().tolist() == MENTIONED[number]
        assert batch.mentioned[row, batch.concept_ids[row // 2]]
        if row % 2:
            assert caption != batch.captions[row - 1]
    assert (batch.caption_embeddings, batch.unreadable) == (None, ())


@pytest.mark.ray
def test_groups_of_one_orientation(ray_cluster: None, tmp_path: Path) -> None:
    loader = group_loader(str(make_store(tmp_path)), "t", seed=0, group_size=2, sampling=Sampling())
    captions = {tuple(sorted(row["captions"])) for row in loader(np.arange(20)).to_pylist()}
    assert captions == {("caption 0", "caption 1"), ("caption 2", "caption 3")}


@pytest.mark.ray
def test_small_images_can_be_left_out(ray_cluster: None, tmp_path: Path) -> None:
    root = str(make_store(tmp_path))
    sampling = Sampling(min_side=45)
    loader = group_loader(root, "t", seed=0, group_size=2, sampling=sampling)
    assert ray.get(loader.plan).concept_ids.tolist() == [1]  # pairs 2 and 3
    captions = {caption for row in loader(np.arange(9)).to_pylist() for caption in row["captions"]}
    assert captions == {"caption 2", "caption 3"}
    with pytest.raises(InputError, match="groups/t: no concept has 2 images with sides of 500 px or more"):
        group_loader(root, "t", seed=0, group_size=2, sampling=Sampling(min_side=500))


@pytest.mark.ray
def test_groups_of_named_concepts_only(ray_cluster: None, tmp_path: Path) -> None:
    root = str(make_store(tmp_path))
    names = tables.read_table(root, "concepts", "t", ["name"])["name"].to_pylist()
    for number, name in enumerate(names[:2]):
        loader = group_loader(root, "t", seed=0, group_size=2, sampling=Sampling(names=(name,)))
        assert ray.get(loader.plan).concept_ids.tolist() == [number]
        assert set(loader(np.arange(9))["concept_id"].to_pylist()) == {number}
    with pytest.raises(InputError, match="names zebra: unknown, expected a name in concepts/t"):
        group_loader(root, "t", seed=0, group_size=2, sampling=Sampling(names=(names[0], "zebra")))


@pytest.mark.ray
def test_an_unreadable_image_is_replaced_within_its_concept(ray_cluster: None, tmp_path: Path) -> None:
    loader = group_loader(str(make_store(tmp_path, broken=(1,))), "t", seed=0, group_size=2, sampling=EVERYTHING)
    whole = loader(np.arange(12))
    for row in whole.to_pylist():
        assert "caption 1" not in row["captions"]
        assert all(row["concept_id"] in mentioned for mentioned in row["mentioned"])
    batch = GroupCollate(3, None)(whole)
    assert 0 < len(batch.unreadable) <= 12
    assert all("0.tar@" in reason and "not an image" in reason for reason in batch.unreadable)
    assert loader(np.arange(5, 12)).equals(whole.slice(5))  # from any start


@pytest.mark.ray
def test_a_concept_without_enough_readable_images_is_replaced(ray_cluster: None, tmp_path: Path) -> None:
    loader = group_loader(str(make_store(tmp_path, broken=(0, 1))), "t", seed=0, group_size=2, sampling=EVERYTHING)
    assert {row["concept_id"] for row in loader(np.arange(8)).to_pylist()} == {1}
    nothing = make_store(tmp_path / "nothing", broken=(0, 1, 2, 3))
    loader = group_loader(str(nothing), "t", seed=0, group_size=2, sampling=EVERYTHING)
    with pytest.raises(InputError, match=r"groups/t: 100 concepts without 2 readable images: .*not an image"):
        loader(np.arange(1))


@pytest.mark.ray
def test_captions_are_tokenised_in_order(ray_cluster: None, tmp_path: Path) -> None:
    def last_digits(captions: Sequence[str]) -> torch.Tensor:
        return torch.tensor([[int(caption[-1])] for caption in captions])

    loader = group_loader(str(make_store(tmp_path)), "t", seed=0, group_size=3, sampling=EVERYTHING)
    batch = GroupCollate(3, last_digits)(loader(np.arange(2)))
    assert batch.caption_tokens is not None
    assert [f"caption {int(value)}" for value in batch.caption_tokens[:, 0]] == list(batch.captions)
    moved = batch.to(torch.device("cpu"))
    assert moved.captions == batch.captions


def test_a_missing_table_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        group_loader(str(tmp_path), "t", seed=0, group_size=2, sampling=Sampling())
    assert str(caught.value) == f"{tmp_path}/groups/t: no such table; `python workflows/prepare_pairs.py` makes it"


def test_empty_groups_are_refused(tmp_path: Path) -> None:
    publish(tmp_path, "groups", [])
    publish(tmp_path, "concepts", [])
    with pytest.raises(InputError, match="groups/t: no concept has 2 images"):
        group_loader(str(tmp_path), "t", seed=0, group_size=2, sampling=Sampling())


@pytest.mark.ray
def test_captioned_images_are_jittered_each_by_itself(ray_cluster: None, tmp_path: Path) -> None:
    root = str(make_store(tmp_path))
    half = Augmentation(side=32, scales=(0.5, 0.5))
    loader = group_loader(root, "t", seed=0, group_size=2, sampling=EVERYTHING, augmentation=half)
    batch = GroupCollate(3, None)(loader(np.arange(6)))
    for image, caption in zip(batch.images, batch.captions, strict=True):
        number = int(caption[-1])
        high, wide = (round(16 * edge / max(SIZES[number])) for edge in SIZES[number])  # the longer side is 0.5 of 32
        expected = torch.tensor(FILL, dtype=torch.uint8)[:, None, None].repeat(1, 32, 32)
        expected[:, :high, :wide] = 10 * number + 10
        assert torch.equal(image, expected)
    varied = Augmentation(flip_probability=0.5, side=32, scales=(0.5, 1.5))
    loader = group_loader(root, "t", seed=0, group_size=2, sampling=EVERYTHING, augmentation=varied)
    rows = loader(np.arange(8))
    assert loader(np.arange(3, 8)).equals(rows.slice(3))  # a function of seed and position
    other = group_loader(root, "t", seed=1, group_size=2, sampling=EVERYTHING, augmentation=varied)
    assert not other(np.arange(8)).equals(rows)
    padding = torch.tensor(FILL, dtype=torch.uint8)[:, None, None]
    shown = {int((image != padding).any(0).sum()) for image in GroupCollate(3, None)(rows).images}
    assert len(shown) > 4  # different scales, in one group too
