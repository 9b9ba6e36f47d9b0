import io
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from data_prep import storage, tables
from data_prep.embeddings.crops import FITS
from data_prep.pairs import shards
from data_prep.streams.collate import PairCollate
from data_prep.streams.pair_loader import pair_loader
from ovd_models.errors import InputError


def encoded(image: np.ndarray) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(image).save(sink, "PNG")
    return sink.getvalue()


def flat(value: int, height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


SIZES = [(10, 20), (30, 40), (64, 64), (64, 48)]  # height, width of pairs 0 .. 3


def published(root: Path, table: str, name: str, rows: list[dict[str, object]]) -> None:
    """Publish rows; missing columns get a value of their type."""
    schema = tables.SCHEMAS[table]
    neutral = {column.name: "x" if column.type == pa.string() else 0 for column in schema}
    complete = [{column: row.get(column, neutral[column]) for column in schema.names} for row in rows]
    entry = tables.write_part(str(root), table, name, "part-00000.parquet", pa.Table.from_pylist(complete, schema))
    tables.publish(str(root), table, name, [entry], producer="test", config_hash="0")


def lengths(captions: Sequence[str]) -> torch.Tensor:
    """Stands for a tokenizer."""
    return torch.tensor([[len(caption), 7] for caption in captions])


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Four pairs whose pixels are 10, 20, 30, 40."""
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
    return tmp_path


@pytest.mark.ray
def test_pairs_are_read_resized_and_batched(ray_cluster: None, store: Path) -> None:
    loader = pair_loader(str(store), "t", seed=0, image_size=16, fit="warp", max_side=None)
    batch = PairCollate(16, lengths)(loader(np.arange(8)))
    images, captions = batch.images, batch.captions
    assert images.shape == (8, 3, 16, 16)
    assert images.dtype == torch.uint8
    assert batch.tokens.tolist() == [[9, 7]] * 8
    assert sorted(captions[:4]) == sorted(captions[4:]) == [f"caption {n}" for n in range(4)]
    for image, caption in zip(images, captions, strict=True):
        assert set(image.unique().tolist()) == {10 * int(caption[-1]) + 10}


@pytest.mark.ray
def test_large_pairs_can_be_left_out(ray_cluster: None, store: Path) -> None:
    loader = pair_loader(str(store), "t", seed=0, image_size=16, fit="warp", max_side=40)
    assert loader.count == 2
    with pytest.raises(InputError, match="pairs/t: no pair with sides up to 5 px"):
        pair_loader(str(store), "t", seed=0, image_size=16, fit="warp", max_side=5)


def test_a_missing_table_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        pair_loader(str(tmp_path), "t", seed=0, image_size=16, fit="warp", max_side=None)
    assert str(caught.value) == f"{tmp_path}/pairs/t: no such table; `python workflows/prepare_pairs.py` makes it"


@pytest.mark.ray
def test_an_unreadable_pair_is_replaced_with_its_caption(ray_cluster: None, store: Path) -> None:
    loader = pair_loader(str(store), "t", seed=0, image_size=16, fit="warp", max_side=None)
    tar = store / "pairs/t/shards/0.tar"
    content = bytearray(tar.read_bytes())
    start = content.index(b"IDAT")  # inside the first image
    content[start : start + 12] = bytes(12)
    tar.write_bytes(bytes(content))
    rows = loader(np.arange(8))
    batch = PairCollate(16, lengths)(rows)
    assert (batch.images.shape, len(batch.unreadable)) == ((8, 3, 16, 16), 2)
    assert all("0.tar@" in reason for reason in batch.unreadable)
    for image, caption in zip(batch.images, batch.captions, strict=True):
        assert caption != "caption 0"
        assert set(image.unique().tolist()) == {10 * int(caption[-1]) + 10}
    assert loader(np.arange(3, 8)).equals(rows.slice(3))


@pytest.mark.parametrize("resize_mode", ["squash", "shortest", "longest"])
def test_pairs_become_squares_as_the_model_expects(
    resize_mode: Literal["squash", "shortest", "longest"], tmp_path: Path
) -> None:
    picture = smooth(48, 30)
    tar, offsets = shards.pack([("0", encoded(picture), "a caption")])
    storage.write_bytes(f"{tmp_path}/pairs/t/shards/0.tar", tar)
    row = {"shard": "shards/0.tar", "offset": offsets[0], "size": len(encoded(picture)), "caption": "a caption"}
    published(tmp_path, "pairs", "t", [row])
    loader = pair_loader(str(tmp_path), "t", seed=0, image_size=32, fit=FITS[resize_mode], max_side=None)
    found = PairCollate(32, lengths)(loader(np.arange(1))).images[0]
    theirs = image_transform_v2(
        PreprocessCfg(size=32, mean=(0.0,) * 3, std=(1.0,) * 3, resize_mode=resize_mode), is_train=False
    )(Image.fromarray(picture))
    assert int((found.int() - (theirs * 255).round().int()).abs().max()) <= 2


def smooth(height: int, width: int) -> np.ndarray:
    """A picture that changes from edge to edge, so that every way to a square gives other pixels."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack((255 * y / height, 255 * x / width, 255 * (x + y) / (height + width)), axis=2).astype(np.uint8)
