import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from faster_coco_eval import mask as rle
from PIL import Image

from data_prep import storage, tables
from data_prep.boxes.annotations import (
    category_captions,
    draw_scenes,
    find_captions,
    pictogram_categories,
    read_captions,
)
from data_prep.pictograms.world import World
from ovd_models.errors import InputError


def test_captions_name_each_category_once() -> None:
    categories = pa.table({"category_id": [1, 2, 3], "name": ["person", "dog", "kite"]})
    boxes = pa.table({"category_ids": [[1, 2, 1, 3], [2], [], [1, 3, 9]]})
    assert category_captions(boxes, categories) == [
        "a photo of a person, a dog and a kite",
        "a photo of a dog",
        "a photo of a scene",
        "a photo of a person and a kite",
    ]


def test_captions_of_a_file_are_matched_by_file_name(tmp_path: Path) -> None:
    path = tmp_path / "captions.tsv"
    path.write_text("file_name\tcaption\nb.jpg\ttwo, or three\na.jpg\tone\n", encoding="utf-8")
    assert read_captions([path], ["/x/a.jpg", "/y/b.jpg"]) == ["one", "two, or three"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected file_name and caption"),
        ("file\tcaption\na.jpg\tone\n", "expected file_name and caption"),
        ("file_name,caption\na.jpg,one\n", "expected file_name and caption"),
        ("file_name\tcaption\nb.jpg\tone\n", "no row for a.jpg"),
    ],
)
def test_malformed_captions_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "captions.tsv"
    path.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        read_captions([path], ["/x/a.jpg"])
    assert str(path) in str(caught.value)


def test_all_captions_of_a_coco_image_are_joined(tmp_path: Path) -> None:
    images = [{"id": 7, "file_name": "a.jpg"}, {"id": 8, "file_name": "cam/b.jpg"}, {"id": 9, "file_name": "none.jpg"}]
    texts = [(7, "A dog runs."), (8, "Two\n cats"), (7, " A brown dog "), (7, "")]
    annotated = [{"id": n, "image_id": key, "caption": text} for n, (key, text) in enumerate(texts)]
    path = tmp_path / "captions_train2017.json"
    path.write_text(json.dumps({"images": images, "annotations": annotated}))
    (tmp_path / "instances_train2017.json").write_text("{}")
    assert find_captions(tmp_path) == find_captions(tmp_path / "instances_train2017.json") == [path]
    assert read_captions([path], ["/x/cam/b.jpg", "/x/a.jpg"]) == ["Two cats.", "A dog runs. A brown dog."]
    with pytest.raises(InputError, match=r"captions_train2017\.json: no row for none\.jpg"):
        read_captions([path], ["/x/none.jpg"])
    for broken in ("[]", "{", json.dumps({"images": images, "annotations": [{"image_id": 99, "caption": "x"}]})):
        path.write_text(broken)
        with pytest.raises(InputError, match=r"captions_train2017\.json: .*expected captions in COCO's format"):
            read_captions([path], ["/x/a.jpg"])
    (tmp_path / "captions.tsv").write_text("file_name\tcaption\n")
    assert find_captions(tmp_path) == [tmp_path / "captions.tsv"]
    assert find_captions(tmp_path / "elsewhere") == []


def test_images_of_one_name_need_their_folders(tmp_path: Path) -> None:
    path = tmp_path / "captions.tsv"
    path.write_text("file_name\tcaption\n1.jpg\tone\n")
    with pytest.raises(InputError, match=r"1\.jpg may be /x/cam1/1\.jpg or /x/cam2/1\.jpg, expected names with"):
        read_captions([path], ["/x/cam1/1.jpg", "/x/cam2/1.jpg"])
    path.write_text("file_name\tcaption\ncam2/1.jpg\ttwo\ncam1/1.jpg\tone\n")
    assert read_captions([path], ["/x/cam1/1.jpg", "/x/cam2/1.jpg"]) == ["one", "two"]
    path.write_text("file_name\tcaption\n1.jpg\tone\n1.jpg\ttwo\n")
    with pytest.raises(InputError, match=r"captions\.tsv: line 3: 1\.jpg has a caption above, expected one a file"):
        read_captions([path], ["/x/1.jpg"])


@pytest.mark.parametrize("caption", ['"Stop" signs, two', '"one'])
def test_quotes_in_captions_are_plain_text(tmp_path: Path, caption: str) -> None:
    path = tmp_path / "captions.tsv"
    path.write_text(f"file_name\tcaption\na.jpg\t{caption}\nb.jpg\ttwo\n")
    assert read_captions([path], ["/x/a.jpg", "/x/b.jpg"]) == [caption, "two"]


def test_captions_that_are_not_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "captions.tsv"
    path.write_bytes(b"file_name\tcaption\na.jpg\tcaf\xe9\n")
    with pytest.raises(InputError):
        read_captions([path], ["/x/a.jpg"])


# ----------------------------------------------------------------------------------------- pictograms, photographs


def test_drawn_boxes_are_tight_around_their_masks(tmp_path: Path) -> None:
    world = World.create(0)
    rows = list(draw_scenes(str(tmp_path), "t", world, range(6), seed=3, base_only=False))
    assert any(len(row["boxes"]) > 1 for row in rows)
    for row in rows:
        assert Image.open(tmp_path / row["uri"]).size == (row["width"], row["height"]) == (128, 128)
        assert storage.sha256((tmp_path / row["uri"]).read_bytes()) == row["image_id"]
        for box, counts in zip(row["boxes"], row["masks"], strict=True):
            mask = rle.decode({"counts": counts.encode(), "size": [128, 128]})
            y, x = np.nonzero(mask)
            assert box == [x.min(), y.min(), x.max() + 1, y.max() + 1]
    pa.Table.from_pylist(rows, schema=tables.SCHEMAS["boxes"])


def test_scenes_depend_on_number_and_seed_and_base_scenes_show_base_only(tmp_path: Path) -> None:
    world = World.create(0)
    first = list(draw_scenes(str(tmp_path), "a", world, range(8), seed=3, base_only=True))
    again = list(draw_scenes(str(tmp_path), "b", world, [5], seed=3, base_only=True))
    assert again[0]["image_id"] == first[5]["image_id"]
    novel = {row["category_id"] for row in pictogram_categories(world) if row["split"] == "novel"}
    assert len(novel) == 17
    assert not novel & {key for row in first for key in row["category_ids"]}
