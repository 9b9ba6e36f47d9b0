import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from faster_coco_eval import mask as rle
from PIL import Image
from reference_data import LVIS, PHOTOS, needs

from data_prep import storage
from data_prep.boxes.coco import (
    COCO_BASE,
    COCO_NOVEL,
    COCO_OTHERS,
    BoxSet,
    box_set,
    read_annotations,
    strip_novel,
    with_split,
)
from data_prep.boxes.pictures import add_pictures
from ovd_models.errors import InputError

photos = needs("data/coco_photos")
lvis = needs("data/lvis/lvis_val_100.json")
CATEGORIES = [{"id": 1, "name": "person"}, {"id": 17, "name": "cat"}, {"id": 7, "name": "hair drier"}]


def annotated(category: int, box: list[Any], **fields: Any) -> dict[str, Any]:
    return {"image_id": 5, "category_id": category, "bbox": box, **fields}


def coco(*annotations: dict[str, Any], **changes: Any) -> dict[str, Any]:
    images = [{"id": 5, "file_name": "a.jpg", "width": 40, "height": 30}]
    return {"images": images, "annotations": list(annotations), "categories": CATEGORIES, **changes}


def read_coco(path: Path, images: str) -> BoxSet:
    categories, rows = read_annotations(path)
    return box_set(categories, add_pictures(rows, images, str(path)))


def read(folder: Path, content: dict[str, Any] | str) -> list[dict[str, Any]]:
    (folder / "images").mkdir(exist_ok=True)
    Image.new("RGB", (40, 30)).save(folder / "images/a.jpg")
    path = folder / "instances.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    rows: list[dict[str, Any]] = read_coco(path, str(folder / "images")).boxes.to_pylist()
    return rows


def test_the_split_has_48_base_and_17_novel_names() -> None:
    assert (len(set(COCO_BASE)), len(set(COCO_NOVEL))) == (48, 17)
    assert len({*COCO_BASE, *COCO_NOVEL, *COCO_OTHERS}) == 80


def test_a_file_becomes_rows_with_corners(tmp_path: Path) -> None:
    found = read(tmp_path, coco(annotated(1, [10, 5, 20, 15]), annotated(17, [0.5, 0, 2, 2], iscrowd=1)))
    assert len(found) == 1
    row = found[0]
    assert row["boxes"] == [[10.0, 5.0, 30.0, 20.0], [0.5, 0.0, 2.5, 2.0]]
    assert (row["category_ids"], row["iscrowd"], row["masks"]) == ([1, 17], [False, True], ["", ""])
    assert (row["source_id"], row["width"], row["height"]) == (5, 40, 30)
    assert row["image_id"] == storage.sha256((tmp_path / "images/a.jpg").read_bytes())
    assert Path(row["uri"]).is_absolute()


def test_categories_carry_their_split_and_count_images(tmp_path: Path) -> None:
    read(tmp_path, coco(annotated(1, [1, 1, 5, 5]), annotated(1, [9, 9, 5, 5])))
    found = read_coco(tmp_path / "instances.json", str(tmp_path / "images")).categories.to_pylist()
    assert [(row["category_id"], row["name"], row["split"], row["image_count"]) for row in found] == [
        (1, "person", "base", 1),
        (7, "hair drier", "", 0),
        (17, "cat", "novel", 0),
    ]


@pytest.mark.parametrize(
    "names", [("person", "hair drier", "forklift", "cat"), ("hair drier", "stop sign"), ("cat", "dog")]
)
def test_names_of_another_data_set_are_all_base(tmp_path: Path, names: tuple[str, ...]) -> None:
    read(tmp_path, coco(categories=[{"id": key, "name": name} for key, name in enumerate(names)]))
    found = read_coco(tmp_path / "instances.json", str(tmp_path / "images")).categories.to_pylist()
    assert {row["name"]: row["split"] for row in found} == dict.fromkeys(names, "base")


def test_boxes_are_clipped_and_those_without_area_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    boxes = [[-5, -5, 10, 10], [35, 25, 10, 10], [3, 3, 0, 5], [3, 3, 5, -2], [41, 0, 5, 5], [-9, 0, 9, 9]]
    row = read(tmp_path, coco(*(annotated(1, box) for box in boxes)))[0]
    assert row["boxes"] == [[0, 0, 5, 5], [35, 25, 40, 30]]
    assert [len(row[name]) for name in ("category_ids", "iscrowd", "masks")] == [2, 2, 2]
    expected = "instances.json: left out: 2 boxes without area (a.jpg), 2 boxes outside their image (a.jpg)"
    assert expected in capsys.readouterr().out


def test_an_image_without_annotations_is_kept(tmp_path: Path) -> None:
    assert read(tmp_path, coco())[0]["boxes"] == []


def test_polygons_and_both_kinds_of_rle_give_the_same_mask(tmp_path: Path) -> None:
    mask = np.zeros((30, 40), np.uint8)
    mask[10:20, 5:15] = 1
    compressed = rle.encode(np.asfortranarray(mask))
    # column after column: 5 columns of 30 zeros and 10 more, then 10 ones and 20 zeros ten times
    counts = [5 * 30 + 10, *([10, 20] * 9), 10, 30 * 40 - 5 * 30 - 10 - 9 * 30 - 10]
    forms = [
        {"counts": compressed["counts"].decode(), "size": [30, 40]},
        {"counts": counts, "size": [30, 40]},
        [[5, 10, 15, 10, 15, 20, 5, 20]],
    ]
    row = read(tmp_path, coco(*(annotated(1, [5, 10, 10, 10], segmentation=form) for form in forms)))[0]
    for counts_text in row["masks"]:
        decoded = rle.decode({"counts": counts_text.encode(), "size": [30, 40]})
        assert np.array_equal(decoded, mask)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "truncated"),
        ("{", "truncated"),
        ("[]", "Expected `object`, got `array`"),
        ({"images": [], "annotations": {}, "categories": []}, "Expected `array`, got `object` - at `$.annotations`"),
        ({"images": [], "annotations": []}, "missing required field `categories`"),
        (coco(categories=[{"id": 1}]), "categories[0] (id 1): name null, expected a word"),
        (coco(categories=["person"]), "Expected `object`, got `str` - at `$.categories[0]`"),
        (coco(images=[{"file_name": "a.jpg"}]), "missing required field `id` - at `$.images[0]`"),
        (
            coco(images=[{"id": 5, "file_name": "a.jpg", "width": 1}]),
            "image 5: no width and height, expected both",
        ),
        (coco(annotated(1, [1, 1, 5, 5]), annotated(99, [1, 1, 5, 5])), "annotations[1]: category_id 99"),
        (coco({**annotated(1, [1, 1, 5, 5]), "image_id": 6}), "annotations[0]: image_id 6 is not in images"),
        (coco(annotated(1, [1, 1, 5])), "annotations[0]: bbox of 3 numbers, expected 4"),
        (coco(annotated(1, [1, 1, "x", 5])), "at `$.annotations[0].bbox[2]`"),
        (coco(annotated(1, [1, 1, float("nan"), 5])), "annotations[0].bbox[2] is nan, expected a finite"),
        (coco(annotated(1, [1, 1, float("inf"), 5])), "annotations[0].bbox[2] is inf, expected a finite"),
        ({**coco(), "annotations": ["x"]}, "at `$.annotations[0]`"),
    ],
)
def test_a_malformed_file_is_refused_with_its_name_and_field(
    tmp_path: Path, content: dict[str, Any] | str, message: str
) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, content)
    assert message in str(caught.value)
    assert str(tmp_path / "instances.json") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        coco(images=[{"id": 5, "file_name": "a.jpg", "width": "wide", "height": 30}]),
        coco(annotated(1, [1, 1, 5, 5], segmentation={"size": [30, 40]})),
        coco(annotated(1, [1, 1, 5, 5], segmentation=[["x"]])),
        coco(annotated(1, [1, 1, 5, 5], segmentation="x")),
        coco(annotated(1, [1, 1, 5, 5], segmentation={"size": [4, 4], "counts": [0, 16]})),
        coco(annotated(1, [1, 1, 5, 5], segmentation={"size": [30, 40], "counts": "0`0"})),
        coco(images=[{"id": 5, "file_name": "a.jpg", "width": 30, "height": 40}]),  # the file has 40 x 30
    ],
    ids=[
        "width text",
        "rle without counts",
        "polygon of text",
        "mask of text",
        "rle of another size",
        "short rle",
        "another size",
    ],
)
def test_wrong_types_and_sizes_are_refused(tmp_path: Path, content: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        read(tmp_path, content)


def test_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_coco(tmp_path / "none.json", str(tmp_path))
    changed = coco(images=[{"id": 5, "file_name": "b.jpg", "width": 1, "height": 1}])
    with pytest.raises(InputError, match=r"b\.jpg: cannot be read .*, named by .*instances\.json"):
        read(tmp_path, changed)


# ---------------------------------------------------------------------------------------------- split, captions


def test_stripping_keeps_only_boxes_of_base_categories(tmp_path: Path) -> None:
    read(
        tmp_path,
        coco(annotated(17, [1, 1, 5, 5]), annotated(1, [2, 2, 5, 5], iscrowd=1), annotated(7, [3, 3, 5, 5])),
    )
    whole = read_coco(tmp_path / "instances.json", str(tmp_path / "images"))
    row = strip_novel(whole.boxes, whole.categories).to_pylist()[0]
    assert (row["boxes"], row["category_ids"], row["iscrowd"]) == ([[2.0, 2.0, 7.0, 7.0]], [1], [True])
    assert len(row["masks"]) == 1
    assert strip_novel(whole.boxes.slice(0, 0), whole.categories).num_rows == 0


def test_images_are_counted_once_a_category() -> None:
    boxes = pa.table({"category_ids": [[3, 3, 4], [3], []]})
    categories = box_set([{"category_id": number, "name": "x"} for number in (3, 4, 5)], boxes).categories
    assert categories["image_count"].to_pylist() == [2, 1, 0]


def test_lvis_is_split_by_frequency_and_names_images_by_their_address(tmp_path: Path) -> None:
    categories = [
        {"id": 2, "name": "aerosol_can", "frequency": "c", "synonyms": ["aerosol_can", "spray_can"]},
        {"id": 1, "name": "acorn", "frequency": "r"},
    ]
    image = {"id": 5, "coco_url": "http://images.cocodataset.org/val2017/a.jpg", "width": 40, "height": 30}
    content = coco(annotated(2, [1, 1, 5, 5]), categories=categories, images=[{**image, "neg_category_ids": [1]}])
    assert read(tmp_path, content)[0]["neg_category_ids"] == [1]
    found = read_coco(tmp_path / "instances.json", str(tmp_path / "images")).categories.to_pylist()
    assert [(row["name"], row["split"], row["frequency"], row["synonyms"], row["image_count"]) for row in found] == [
        ("acorn", "novel", "r", [], 0),
        ("aerosol can", "base", "c", ["spray can"], 1),
    ]
    categories[1]["frequency"] = "x"
    with pytest.raises(InputError, match="category 1: frequency 'x', expected 'r', 'c' or 'f'"):
        read(tmp_path, {**content, "categories": categories})


@lvis
def test_the_real_lvis_file_is_read(tmp_path: Path) -> None:
    raw = json.loads((LVIS / "lvis_val_100.json").read_text())
    raw["images"] = raw["images"][:5]
    kept = {image["id"] for image in raw["images"]}
    raw["annotations"] = [entry for entry in raw["annotations"] if entry["image_id"] in kept]
    for image in raw["images"]:
        Image.new("RGB", (image["width"], image["height"])).save(tmp_path / image["coco_url"].rpartition("/")[2])
    (tmp_path / "lvis.json").write_text(json.dumps(raw))
    found = read_coco(tmp_path / "lvis.json", str(tmp_path))
    assert sum(len(boxes) for boxes in found.boxes["boxes"].to_pylist()) == len(raw["annotations"]) > 0
    assert all(mask for masks in found.boxes["masks"].to_pylist() for mask in masks)
    assert len(set(found.categories["name"].to_pylist())) == len(raw["categories"])
    rare = sum(entry["frequency"] == "r" for entry in raw["categories"])
    assert found.categories["split"].to_pylist().count("novel") == rare > 0


def test_sizes_are_those_of_the_upright_picture(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.new("RGB", (30, 40)).save(tmp_path / "images/b.jpg", exif=exif)
    images = [{"id": 5, "file_name": "b.jpg", "width": 40, "height": 30}]
    assert [row["width"] for row in read(tmp_path, coco(annotated(1, [1, 1, 39, 9]), images=images))] == [40]
    with pytest.raises(InputError, match=r"40 x 30 pixels, .* says 30 x 40"):
        read(tmp_path, coco(images=[{**images[0], "width": 30, "height": 40}]))


@photos
def test_real_photographs_are_read() -> None:
    found = read_coco(PHOTOS / "instances.json", str(PHOTOS / "images"))
    rows = found.boxes.to_pylist()
    assert len(rows) == 100
    assert sum(len(row["boxes"]) for row in rows) == 746
    assert len(found.categories) == 80
    assert [found.categories["split"].to_pylist().count(split) for split in ("base", "novel", "")] == [48, 17, 15]
    for row in rows:
        with Image.open(row["uri"]) as image:
            assert image.size == (row["width"], row["height"])
        for box, counts in zip(row["boxes"], row["masks"], strict=True):
            mask = rle.decode({"counts": counts.encode(), "size": [row["height"], row["width"]]})
            y, x = np.nonzero(mask)
            assert np.abs(np.array(box) - [x.min(), y.min(), x.max() + 1, y.max() + 1]).max() < 25
    stripped = strip_novel(found.boxes, found.categories)
    assert 0 < sum(map(len, stripped["boxes"].to_pylist())) < 746


def test_pictures_are_found_in_cocos_folders_without_merging_them(tmp_path: Path) -> None:
    for folder, colour in (("train2017", "red"), ("val2017", "blue")):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (40, 30), colour).save(tmp_path / folder / "a.jpg")
    address = "http://images.cocodataset.org"
    pictures = [
        {"id": 5, "coco_url": f"{address}/train2017/a.jpg", "width": 40, "height": 30},
        {"id": 6, "coco_url": f"{address}/val2017/a.jpg", "width": 40, "height": 30},
    ]
    categories = [{"id": 1, "name": "acorn", "frequency": "f"}]
    (tmp_path / "lvis.json").write_text(json.dumps(coco(images=pictures, categories=categories)))
    rows = read_coco(tmp_path / "lvis.json", str(tmp_path)).boxes.to_pylist()
    assert [row["uri"] for row in rows] == [f"{tmp_path}/train2017/a.jpg", f"{tmp_path}/val2017/a.jpg"]
    assert [row["image_id"] for row in rows] == [storage.sha256(Path(row["uri"]).read_bytes()) for row in rows]
    (tmp_path / "val2017/a.jpg").unlink()
    with pytest.raises(InputError, match=r"val2017/a.jpg: cannot be read .*, expected an image file, named by .*lvis"):
        read_coco(tmp_path / "lvis.json", str(tmp_path))


def test_annotations_may_come_in_any_order(tmp_path: Path) -> None:
    pictures = [{"id": key, "file_name": f"{key}.jpg", "width": 40, "height": 30} for key in (9, 5, 7)]
    boxes = [(7, 1), (9, 2), (7, 3), (5, 4), (9, 5)]
    entries = [annotated(1, [x, 1, 5, 5]) | {"image_id": image} for image, x in boxes]
    (tmp_path / "coco.json").write_text(json.dumps(coco(*entries, images=pictures)))
    categories, rows = read_annotations(tmp_path / "coco.json")
    found = {row["source_id"]: [box[0] for box in row["boxes"]] for row in rows.to_pylist()}
    assert found == {9: [2, 5], 5: [4], 7: [1, 3]}
    assert rows["places"].to_pylist() == [["9.jpg"], ["5.jpg"], ["7.jpg"]]
    assert len(categories) == 3


def test_images_without_a_category_of_the_split_are_left_out_of_evaluation(tmp_path: Path) -> None:
    pictures = [{"id": key, "file_name": f"{key}.jpg", "width": 40, "height": 30} for key in range(4)]
    entries = [annotated(category, [1, 1, 5, 5]) | {"image_id": image} for image, category in ((0, 7), (1, 17), (3, 1))]
    for number in range(4):
        Image.new("RGB", (40, 30), (number, 0, 0)).save(tmp_path / f"{number}.jpg")
    (tmp_path / "coco.json").write_text(json.dumps(coco(*entries, images=pictures)))
    whole = read_coco(tmp_path / "coco.json", str(tmp_path))  # 7 is in neither split, and image 2 has nothing
    assert with_split(whole.boxes, whole.categories)["source_id"].to_pylist() == [1, 3]
    split = whole.categories.filter(pc.field("split") != "")
    assert with_split(whole.boxes, split) == whole.boxes
