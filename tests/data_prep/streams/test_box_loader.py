import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from data_prep import storage, tables
from data_prep.embeddings.stores import EmbeddingJob, Regions, publish_embeddings, save_shard, saved_shards
from data_prep.streams import box_loader
from data_prep.streams.augmentation import Augmentation
from data_prep.streams.box_loader import RegionSource, detection_loader, sample_stored_regions, training_rows
from data_prep.streams.collate import DetectionCollate
from ovd_models.errors import InputError

CROPS = {"scales": (1.0, 1.5), "fit": "warp"}
SOURCE = RegionSource(name="t", teacher="clip:1", crops=CROPS, num_candidates=3, num_sampled=2)
WIDTH = 4


def encoded(pixels: np.ndarray) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


def box_row(
    name: str, size: tuple[int, int], boxes: list[list[float]], categories: list[int], crowds: list[bool]
) -> dict:
    return {
        "image_id": name, "source_id": 0, "uri": f"images/{name}.png", "width": size[0], "height": size[1],
        "boxes": boxes, "category_ids": categories, "iscrowd": crowds, "masks": [""] * len(boxes),
        "neg_category_ids": [], "not_exhaustive_category_ids": [],
    }  # fmt: skip


ROWS = [
    box_row("a", (16, 8), [[0, 0, 4, 8], [1, 1, 9, 5], [0, 0, 16, 8]], [30, 99, 10], [False, False, True]),
    box_row("b", (16, 4), [[1, 2, 3, 4], [2, 2, 2, 3], [20, 0, 30, 4]], [10, 10, 30], [False, False, False]),
    box_row("none", (16, 8), [], [], []),
    box_row("other", (16, 8), [[0, 0, 1, 1]], [99], [False]),
]


@pytest.fixture
def store(tmp_path: Path) -> str:
    """Two images with boxes of categories 10 and 30, two without; regions of the first two."""
    scene = np.zeros((8, 16, 3), np.uint8)
    scene[:, :4] = 200  # bright on the left
    storage.write_bytes(f"{tmp_path}/images/a.png", encoded(scene))
    storage.write_bytes(f"{tmp_path}/images/b.png", encoded(scene[:4]))
    table = pa.Table.from_pylist(ROWS, schema=tables.SCHEMAS["boxes"])
    entry = tables.write_part(str(tmp_path), "boxes", "t", "part-00000.parquet", table)
    tables.publish(str(tmp_path), "boxes", "t", [entry], producer="test", config_hash="0")
    write_regions(str(tmp_path), ["a", "b"])
    return str(tmp_path)


def write_regions(root: str, ids: list[str]) -> None:
    """Image a has four regions, the one of the bright part second best; b has one. Embeddings name their region."""
    boxes = {"a": [[8, 0, 16, 8], [0, 0, 4, 8], [4, 0, 8, 8], [0, 0, 16, 8]], "b": [[0, 0, 4, 4]]}
    scores = {"a": [0.9, 0.8, 0.1, 0.2], "b": [0.5]}
    rows = {key: np.eye(WIDTH, dtype="<f2")[: len(value)] for key, value in boxes.items()}
    table = pa.table(
        {
            "shard": ["000000"] * len(ids),
            "image_id": ids,
            "boxes": pa.array([boxes[key] for key in ids], pa.list_(pa.list_(pa.float32()))),
            "scores": pa.array([scores[key] for key in ids], pa.list_(pa.float32())),
            "count": [len(boxes[key]) for key in ids],
            "file": [rows[key].tobytes() for key in ids],
        }
    )
    job = EmbeddingJob(storage=root, table="regions", name="t", staging=f"{root}/staging")
    save_shard(table, job)
    provenance = {"teacher": "clip:1", "crops": CROPS}
    publish_embeddings(
        job, list(saved_shards(job.staging).values()), producer="test", config_hash="0", provenance=provenance
    )


def load(store: str, flip: float = 0.0, **options: object):  # type: ignore[no-untyped-def]
    return detection_loader(
        store,
        "t",
        [10, 30],
        seed=0,
        augmentation=Augmentation(flip_probability=flip),
        **options,  # type: ignore[arg-type]
    )


@pytest.mark.ray
def test_images_keep_boxes_of_training_categories_without_crowds(ray_cluster: None, store: str) -> None:
    loader = load(store)
    assert loader.count == 2  # without the empty image and the one of category 99
    batch = DetectionCollate()(loader(np.arange(2)))
    first = [image.shape[1] for image in batch.images].index(8)
    assert batch.images[first].shape == (3, 8, 16)
    assert batch.boxes[first].tolist() == [[0.0, 0.0, 4.0, 8.0]]
    assert batch.labels[first].tolist() == [1]
    assert batch.labels[1 - first].tolist() == [0]
    assert batch.boxes[first].dtype == torch.float32
    assert (batch.num_images, batch.masks, batch.regions) == (2, None, None)


def test_skipped_boxes_and_images_are_counted_by_reason() -> None:
    index, skipped = training_rows(ROWS, [10, 30], "root")
    assert [row["image_id"] for row in index] == ["a", "b"]
    assert str(skipped) == (
        "2 boxes of other categories (category 99 in images/a.png, category 99 in images/other.png), "
        "1 crowds (images/a.png), 1 boxes without area (images/b.png), 1 boxes outside their image (images/b.png), "
        "2 images without boxes (images/none.png, images/other.png)"
    )


def test_no_more_than_three_places_are_named() -> None:
    skipped = training_rows([box_row(name, (16, 8), [], [], []) for name in "abcde"], [10], "root")[1]
    assert str(skipped) == "5 images without boxes (images/a.png, images/b.png, images/c.png, ...)"


def test_boxes_are_cut_to_their_image() -> None:
    index, skipped = training_rows([box_row("a", (16, 8), [[-3, 2, 20, 9]], [10], [False])], [10], "root")
    assert index[0]["boxes"] == [0.0, 2.0, 16.0, 8.0]
    assert not skipped


@pytest.mark.ray
def test_skipped_boxes_are_printed_once(ray_cluster: None, store: str, capsys: pytest.CaptureFixture[str]) -> None:
    box_loader.print_once.cache_clear()
    load(store)
    assert "boxes/t: trains on 2 images; left out: 2 boxes of other categories (category 99" in capsys.readouterr().out
    load(store)
    assert capsys.readouterr().out == ""


@pytest.mark.ray
def test_mirrored_scenes_carry_mirrored_boxes_and_regions(ray_cluster: None, store: str) -> None:
    batch = DetectionCollate()(load(store, flip=1.0, regions=SOURCE)(np.arange(40)))
    assert batch.regions is not None
    num_bright = 0
    for row, image in enumerate(batch.images):
        if image.shape[1] != 8:
            continue
        assert batch.boxes[row].tolist() == [[12.0, 0.0, 16.0, 8.0]]
        assert bool((image[:, :, 12:] == 200).all())
        for box, embedding in zip(batch.regions.boxes[row], batch.regions.embeddings[row], strict=True):
            if int(embedding.argmax()) == 1:  # the region of the bright part
                assert box.tolist() == [12.0, 0.0, 16.0, 8.0]
                num_bright += 1
    assert num_bright > 5


@pytest.mark.ray
def test_rows_depend_on_the_position_alone(ray_cluster: None, store: str) -> None:
    loader = load(store, flip=0.5, regions=SOURCE)
    whole = loader(np.arange(40))
    assert loader(np.arange(17, 40)).equals(whole.slice(17))
    assert len({tuple(box) for box in whole["boxes"].to_pylist()}) == 4  # both scenes, either way


@pytest.mark.ray
def test_regions_keep_their_embeddings_and_padding_is_not_valid(ray_cluster: None, store: str) -> None:
    batch = DetectionCollate()(load(store, regions=SOURCE)(np.arange(30)))
    regions = batch.regions
    assert regions is not None
    assert (regions.boxes.shape, regions.embeddings.shape) == ((30, 2, 4), (30, 2, WIDTH))
    drawn = set()
    for row, image in enumerate(batch.images):
        if image.shape[1] == 4:
            assert regions.valid[row].tolist() == [True, False]
            assert regions.boxes[row].tolist() == [[0, 0, 4, 4], [0, 0, 0, 0]]
            continue
        assert regions.valid[row].tolist() == [True, True]
        names = regions.embeddings[row].argmax(1).tolist()
        known = [[8, 0, 16, 8], [0, 0, 4, 8], [4, 0, 8, 8], [0, 0, 16, 8]]
        assert regions.boxes[row].tolist() == [known[name] for name in names]
        drawn |= set(names)
    assert drawn == {0, 1, 3}  # the three best of four
    moved = batch.to(torch.device("cpu"))
    assert moved.regions is not None
    assert torch.equal(moved.regions.valid, regions.valid)


def test_an_image_without_regions_gives_padding() -> None:
    nothing = Regions(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros((0, 4), np.float16))
    boxes, valid, embeddings = sample_stored_regions(nothing, SOURCE, np.random.default_rng(0))
    assert (boxes.shape, embeddings.shape) == ((2, 4), (2, 4))
    assert not valid.any()


@pytest.mark.ray
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": "clip:2"}, 'made with teacher "clip:1", this run asks for "clip:2"'),
        ({"crops": {"scales": (1.0,), "fit": "warp"}}, "made with crops"),
        ({"name": "missing"}, "no such table"),
    ],
)
def test_foreign_embeddings_are_refused(ray_cluster: None, store: str, change: dict[str, object], message: str) -> None:
    settings = {"name": "t", "teacher": "clip:1", "crops": CROPS, **change}
    with pytest.raises(InputError) as caught:
        load(store, regions=RegionSource(**settings))  # type: ignore[arg-type]
    assert message in str(caught.value)


@pytest.mark.ray
def test_missing_embeddings_are_counted_and_named(ray_cluster: None, store: str) -> None:
    write_regions(store, ["a"])
    with pytest.raises(InputError, match="regions/t: no embeddings for 1 of 2 images, such as b"):
        load(store, regions=SOURCE)


@pytest.mark.ray
def test_a_box_without_a_mask_is_refused(ray_cluster: None, store: str) -> None:
    with pytest.raises(InputError, match=r"boxes/t: a box has no mask, expected one for each"):
        load(store, masks=True)


@pytest.mark.ray
def test_rare_categories_come_more_often(ray_cluster: None, store: str) -> None:
    loader = load(store, repeat_threshold=2.0)  # each category is in one of two images: sqrt(2 / 0.5) = 2
    assert loader.weights is not None
    assert loader.weights.tolist() == [2.0, 2.0]
    assert loader(np.arange(4)).num_rows == 4


@pytest.mark.ray
def test_no_box_of_the_training_categories_is_refused(ray_cluster: None, store: str) -> None:
    with pytest.raises(InputError, match="boxes/t: no image has a box of the 1 training categories"):
        detection_loader(store, "t", [77], seed=0, augmentation=Augmentation())


def test_a_missing_table_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"boxes/t: no such table; `python workflows/prepare_boxes.py` makes it"):
        detection_loader(str(tmp_path), "t", [1], seed=0, augmentation=Augmentation())


@pytest.mark.ray
@pytest.mark.parametrize("damage", ["missing", "truncated", "text"])
def test_an_unreadable_image_is_replaced_by_another_with_its_own_boxes(
    ray_cluster: None, store: str, damage: str
) -> None:
    broken = Path(store, "images/a.png")
    content = broken.read_bytes()
    if damage == "missing":
        broken.unlink()
    else:
        broken.write_bytes(content[:60] if damage == "truncated" else b"<html>gone</html>")
    loader = detection_loader(store, "t", [10, 30], seed=0, augmentation=Augmentation(), regions=SOURCE)
    rows = loader(np.arange(8))
    batch = DetectionCollate()(rows)
    assert [image.shape for image in batch.images] == [(3, 4, 16)] * 8  # b's, also at the four positions of a
    assert batch.regions is not None and batch.regions.valid.tolist() == [[True, False]] * 8
    assert len(batch.unreadable) == 4
    assert all(f"{store}/images/a.png: " in reason for reason in batch.unreadable)
    assert loader(np.arange(5, 8)).equals(rows.slice(5))  # from any start, as after a resume


@pytest.mark.ray
def test_a_table_without_a_readable_image_ends_in_one_line(ray_cluster: None, store: str) -> None:
    for name in "ab":
        Path(store, f"images/{name}.png").unlink()
    loader = detection_loader(store, "t", [10, 30], seed=0, augmentation=Augmentation())
    with pytest.raises(InputError, match=r"100 images one after another cannot be read, such as .*png: no such file"):
        loader(np.arange(1))
