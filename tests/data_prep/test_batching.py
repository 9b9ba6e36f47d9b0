import io
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray.data
import torch
from PIL import Image

from data_prep import shards, storage, tables
from data_prep.batching import (
    Integers,
    StreamShape,
    group_loader,
    pair_loader,
    plan_epochs,
    plan_group,
    plan_weighted,
    repeat_factors,
    stream,
)
from data_prep.collate import GroupCollate, PairCollate
from ovd_models.errors import InputError
from ovd_models.vocabulary import EmbeddingTable

# ------------------------------------------------------------------------------------------------------ plans


def test_every_epoch_is_a_permutation_of_its_own() -> None:
    rows = plan_epochs(3, 20, np.arange(60)).reshape(3, 20)
    assert all(sorted(epoch.tolist()) == list(range(20)) for epoch in rows)
    assert len({tuple(epoch.tolist()) for epoch in rows}) == 3


def test_weighted_rows_come_as_often_as_their_weights() -> None:
    # Weights sum to 8.5, so an epoch has 9 positions: 9 / 8.5 times 1, 2.5, 1, 4.
    weights = np.array([1.0, 2.5, 1.0, 4.0])
    rows = plan_weighted(3, weights, np.arange(9 * 400)).reshape(400, 9)
    counts = np.stack([np.bincount(epoch, minlength=4) for epoch in rows])
    share = weights * 9 / 8.5
    assert bool((counts >= np.floor(share)).all() and (counts <= np.ceil(share)).all())
    assert np.allclose(counts.mean(0), share, atol=0.1)
    assert len({tuple(epoch.tolist()) for epoch in rows}) > 300
    assert plan_weighted(3, weights, np.arange(20, 60)).tolist() == rows.ravel()[20:60].tolist()


def test_weights_of_one_give_permutations() -> None:
    rows = plan_weighted(0, np.ones(7), np.arange(21)).reshape(3, 7)
    assert all(sorted(epoch.tolist()) == list(range(7)) for epoch in rows)


def test_repeat_factors_by_hand() -> None:
    # Category 1 is in 4 of 4 images, category 2 in 1 of 4: sqrt(0.5 / 0.25) = 1.414 with a threshold of 0.5.
    found = repeat_factors([[1, 1], [1], [1, 2, 2], [1], []][:4], 0.5)
    assert np.allclose(found, [1, 1, 2**0.5, 1])
    assert repeat_factors([[1], []], 0.1).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("start", [0, 1, 19, 20, 33])
def test_a_plan_is_the_same_from_any_start(start: int) -> None:
    whole = plan_epochs(3, 20, np.arange(60))
    assert plan_epochs(3, 20, np.arange(start, 60)).tolist() == whole[start:].tolist()


def test_a_plan_depends_on_the_seed_alone() -> None:
    first, again, other = (plan_epochs(seed, 50, np.arange(50)).tolist() for seed in (1, 1, 2))
    assert first == again != other


def test_positions_may_come_in_any_order() -> None:
    positions = np.random.default_rng(0).permutation(60)
    assert plan_epochs(3, 20, positions).tolist() == plan_epochs(3, 20, np.arange(60))[positions].tolist()


def test_a_table_of_one_row_repeats_it_and_no_position_gives_no_row() -> None:
    assert plan_epochs(0, 1, np.arange(4)).tolist() == [0] * 4
    assert plan_epochs(0, 5, np.arange(0)).tolist() == []


STARTS, STOPS = np.array([0, 4, 10]), np.array([4, 10, 200])


def test_a_group_is_drawn_without_replacement_inside_its_concept() -> None:
    for position in range(300):
        concept, members = plan_group(0, STARTS, STOPS, 4, position)
        assert len(set(members.tolist())) == 4
        assert STARTS[concept] <= members.min()
        assert members.max() < STOPS[concept]


def test_concepts_are_drawn_uniformly_however_many_images_they_have() -> None:
    counts = Counter(plan_group(0, STARTS, STOPS, 2, position)[0] for position in range(3000))
    # 1000 each, standard deviation sqrt(3000 * 1/3 * 2/3) = 26: five of them are 130
    assert all(870 < counts[concept] < 1130 for concept in range(3))


def test_every_image_of_a_concept_is_drawn_equally_often() -> None:
    drawn = Counter(
        row for position in range(2000) for row in plan_group(1, STARTS[:1], STOPS[:1], 2, position)[1].tolist()
    )
    assert all(abs(drawn[row] - 1000) < 120 for row in range(4))  # standard deviation sqrt(2000 / 4) = 22


def test_a_group_depends_on_seed_and_position_alone() -> None:
    first = [plan_group(0, STARTS, STOPS, 3, position)[1].tolist() for position in range(20)]
    assert first == [plan_group(0, STARTS, STOPS, 3, position)[1].tolist() for position in range(20)]
    assert first != [plan_group(1, STARTS, STOPS, 3, position)[1].tolist() for position in range(20)]
    assert len({tuple(members) for members in first}) > 15


# ---------------------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize(
    ("shape", "steps", "expected"),
    [
        (StreamShape(rows_per_step=8, workers=1), (0, 10), (0, 80, 2)),
        (StreamShape(rows_per_step=8, workers=2), (0, 10), (0, 80, 4)),
        (StreamShape(rows_per_step=8, workers=2), (5, 10), (40, 40, 2)),
        (StreamShape(rows_per_step=4, workers=1), (0, 3), (0, 20, 1)),
    ],
)
def test_positions_of_a_range_of_steps(
    shape: StreamShape, steps: tuple[int, int], expected: tuple[int, int, int]
) -> None:
    assert shape.positions(*steps) == expected


def position_stream(shape: StreamShape, start: int, stop: int) -> ray.data.Dataset:
    """A stream of rows that tell their positions."""

    def load(positions: Integers) -> pa.Table:  # inside, so that workers need not import this file
        return pa.table({"position": positions})

    return stream(load, shape, start, stop)


def positions_of(data: ray.data.Dataset | ray.data.DataIterator, size: int) -> list[list[int]]:
    return [batch["position"].to_pylist() for batch in data.iter_batches(batch_size=size, batch_format="pyarrow")]


@pytest.mark.ray
def test_a_stream_started_late_is_the_tail_of_the_whole(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.data.DataContext.get_current().execution_options, "preserve_order", True)
    shape = StreamShape(rows_per_step=4, workers=1)
    whole = positions_of(position_stream(shape, 0, 15), 4)
    assert whole == [list(range(4 * step, 4 * step + 4)) for step in range(15)]
    for start in (5, 10):
        assert positions_of(position_stream(shape, start, 15), 4) == whole[start:]


def split(shape: StreamShape, start: int, stop: int) -> list[list[list[int]]]:
    """The batches of each worker, as Ray Train splits a stream."""
    parts = position_stream(shape, start, stop).streaming_split(shape.workers, equal=True)
    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(lambda part: positions_of(part, shape.rows_per_step // shape.workers), parts))


@pytest.mark.ray
def test_two_workers_see_each_position_once_and_checkpoints_cut_cleanly(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray.data.DataContext.get_current().execution_options, "preserve_order", True)
    parts = split(StreamShape(rows_per_step=4, workers=2), 0, 15)
    assert [len(part) for part in parts] == [15, 15]
    assert sorted(n for part in parts for batch in part for n in batch) == list(range(60))
    for step in (5, 10):  # what both have taken until a checkpoint are exactly the first positions
        taken = [n for part in parts for batch in part[:step] for n in batch]
        assert sorted(taken) == list(range(4 * step))


@pytest.mark.ray
def test_checkpoints_cut_cleanly_in_a_run_of_any_length(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.data.DataContext.get_current().execution_options, "preserve_order", True)
    parts = split(StreamShape(rows_per_step=4, workers=2), 0, 7)
    taken = [n for part in parts for batch in part[:5] for n in batch]
    assert sorted(taken) == list(range(20))


# --------------------------------------------------------------------------------------- tables, loaders, collate


def encoded(image: np.ndarray) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(image).save(sink, "PNG")
    return sink.getvalue()


def flat(value: int, height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


SIZES = [(10, 20), (30, 40), (64, 64), (64, 48)]  # height, width of pairs 0 .. 3
MENTIONED = [[0], [0, 1], [0, 1], [1, 2]]


def published(root: Path, table: str, name: str, rows: list[dict[str, object]]) -> None:
    """Publish rows; columns that they leave out hold something of their type."""
    schema = tables.SCHEMAS[table]
    neutral = {column.name: "x" if column.type == pa.string() else 0 for column in schema}
    complete = [{column: row.get(column, neutral[column]) for column in schema.names} for row in rows]
    entry = tables.write_part(str(root), table, name, "part-00000.parquet", pa.Table.from_pylist(complete, schema))
    tables.publish(str(root), table, name, [entry], producer="test", config_hash="0")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Four pairs whose pixels are 10, 20, 30, 40, in concepts 0 (three images), 1 (three) and 2 (one); two scenes."""
    images = [encoded(flat(10 * n + 10, *size)) for n, size in enumerate(SIZES)]
    tar, offsets = shards.pack((f"{n}", image, f"caption {n}") for n, image in enumerate(images))
    storage.write_bytes(f"{tmp_path}/pairs/t/shards/0.tar", tar)
    pairs: list[dict[str, object]] = [
        {
            "image_id": str(n),
            "shard": "shards/0.tar",
            "offset": offset,
            "size": len(image),
            "height": size[0],
            "width": size[1],
            "caption": f"caption {n}",
        }
        for n, (image, offset, size) in enumerate(zip(images, offsets, SIZES, strict=True))
    ]
    published(tmp_path, "pairs", "t", pairs)
    members = [
        {**pairs[n], "concept_id": concept, "concept_ids": MENTIONED[n]}
        for concept in range(3)
        for n in range(4)
        if concept in MENTIONED[n]
    ]
    columns = tables.SCHEMAS["groups"].names
    published(tmp_path, "groups", "t", [{key: row[key] for key in columns} for row in members])
    return tmp_path


@pytest.mark.ray
def test_pairs_are_read_resized_and_batched(ray_cluster: None, store: Path) -> None:
    loader = pair_loader(str(store), "t", seed=0, image_size=16, max_side=None)
    images, captions = PairCollate(16)(loader(np.arange(8)))
    assert images.shape == (8, 3, 16, 16)
    assert images.dtype == torch.uint8
    assert sorted(captions[:4]) == sorted(captions[4:]) == [f"caption {n}" for n in range(4)]
    for image, caption in zip(images, captions, strict=True):
        assert set(image.unique().tolist()) == {10 * int(caption[-1]) + 10}


@pytest.mark.ray
def test_large_pairs_are_left_out_on_demand(ray_cluster: None, store: Path) -> None:
    loader = pair_loader(str(store), "t", seed=0, image_size=16, max_side=40)
    assert loader.count == 2
    with pytest.raises(InputError, match="pairs/t: no pair with sides up to 5 px"):
        pair_loader(str(store), "t", seed=0, image_size=16, max_side=5)


@pytest.mark.ray
def test_groups_share_their_concept_and_know_what_else_is_mentioned(ray_cluster: None, store: Path) -> None:
    loader = group_loader(str(store), "t", seed=0, group_size=2, min_side=0)
    assert loader.concept_ids.tolist() == [0, 1]  # concept 2 has one image
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
    assert batch.caption_embeddings is None


@pytest.mark.ray
def test_small_images_take_no_part_in_groups_on_demand(ray_cluster: None, store: Path) -> None:
    loader = group_loader(str(store), "t", seed=0, group_size=2, min_side=45)
    assert loader.concept_ids.tolist() == [1]  # pairs 2 and 3
    assert {caption for row in loader(np.arange(9)).to_pylist() for caption in row["captions"]} == {
        "caption 2",
        "caption 3",
    }
    with pytest.raises(InputError, match="groups/t: no concept has 2 images with sides of 500 px or more"):
        group_loader(str(store), "t", seed=0, group_size=2, min_side=500)


@pytest.mark.ray
def test_captions_are_embedded_by_the_teacher(ray_cluster: None, store: Path) -> None:
    class Encoder(EmbeddingTable):
        def embed_captions(self, captions: object) -> torch.Tensor | None:
            return torch.tensor([[float(str(caption)[-1])] for caption in captions])  # type: ignore[attr-defined]

    encoder = Encoder(("a",), torch.ones(1, 1), "test")
    loader = group_loader(str(store), "t", seed=0, group_size=3, min_side=0)
    batch = GroupCollate(3, encoder)(loader(np.arange(2)))
    assert batch.caption_embeddings is not None
    assert [f"caption {int(value)}" for value in batch.caption_embeddings[:, 0]] == list(batch.captions)
    moved = batch.to(torch.device("cpu"))
    assert moved.captions == batch.captions


LOADERS: dict[str, tuple[Callable[[str], object], str]] = {
    "pairs": (lambda root: pair_loader(root, "t", seed=0, image_size=16, max_side=None), "prepare_pairs"),
    "groups": (lambda root: group_loader(root, "t", seed=0, group_size=2, min_side=0), "prepare_pairs"),
}


@pytest.mark.parametrize("table", LOADERS)
def test_a_missing_table_names_the_command_that_makes_it(tmp_path: Path, table: str) -> None:
    load, producer = LOADERS[table]
    with pytest.raises(InputError) as caught:
        load(str(tmp_path))
    assert str(caught.value) == (f"{tmp_path}/{table}/t: no such table; `python workflows/{producer}.py` makes it")


@pytest.mark.ray
def test_empty_groups_are_told(ray_cluster: None, tmp_path: Path) -> None:
    published(tmp_path, "groups", "t", [])
    with pytest.raises(InputError, match="groups/t: no concept has 2 images"):
        group_loader(str(tmp_path), "t", seed=0, group_size=2, min_side=0)
