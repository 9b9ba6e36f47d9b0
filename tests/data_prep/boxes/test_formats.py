import dataclasses
import json
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep import storage, tables
from data_prep.boxes import layouts
from ovd_models.errors import InputError
from workflows import prepare_boxes
from workflows.common import measured
from workflows.configs import boxes as boxes_configs

OPEN_IMAGES = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf\n"
VOC = """<annotation><filename>{name}.jpg</filename><size><width>100</width><height>50</height><depth>3</depth></size>
<object><name>cat</name><difficult>0</difficult>
<bndbox><xmin>11</xmin><ymin>6</ymin><xmax>50</xmax><ymax>25</ymax></bndbox></object></annotation>"""


def draw(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        pixels = np.random.default_rng(number).integers(0, 255, (50, 100, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)


def open_images(folder: Path) -> str:
    draw(folder / "images", "aa.jpg", "bb.jpg", "cc.jpg")
    file = folder / "validation-annotations-bbox.csv"
    rows = ["bb,xclick,/m/2,1,0.1,0.5,0.2,0.6,0,0,0", "aa,xclick,/m/1,1,0,1,0,1,0,0,1"]
    file.write_text(OPEN_IMAGES + "\n".join(rows) + "\n")
    (folder / "class-descriptions-boxable.csv").write_text("/m/2,Cat\n/m/1,Dog\n/m/3,Cow\n")
    labels = "ImageID,Source,LabelName,Confidence\nbb,verification,/m/3,0\ncc,verification,/m/1,0\nbb,v,/m/2,1\n"
    (folder / "validation-annotations-human-imagelabels-boxable.csv").write_text(labels)
    return str(file)


def yolo(folder: Path) -> str:
    draw(folder / "images", "a.jpg", "b.jpg", "c.jpg")
    (folder / "labels").mkdir()
    (folder / "data.yaml").write_text("names: [cat, dog]\n")
    (folder / "labels/a.txt").write_text("1 0.5 0.5 0.2 0.4\n0 0.1 0.2 0.2 0.4\n")
    (folder / "labels/b.txt").write_text("0 0.1 0.2 0.5 0.2 0.5 0.6 0.1 0.6\n")
    return str(folder)


def voc(folder: Path) -> str:
    draw(folder / "JPEGImages", "a.jpg", "b.jpg")
    (folder / "Annotations").mkdir()
    for name in ("a", "b"):
        (folder / f"Annotations/{name}.xml").write_text(VOC.format(name=name))
    return str(folder)


def convert(data: str) -> dict[str, Any]:
    """Content of the only part of a data set."""
    (part,) = layouts.find_parts(data)
    assert part.convert is not None
    return part.convert()


def test_open_images_has_groups_absent_names_and_relative_boxes(tmp_path: Path) -> None:
    content = convert(open_images(tmp_path))
    assert [(entry["id"], entry["name"]) for entry in content["categories"]] == [(1, "Dog"), (2, "Cat"), (3, "Cow")]
    assert [entry["file_name"] for entry in content["images"]] == ["aa.jpg", "bb.jpg", "cc.jpg"]
    assert [entry["neg_category_ids"] for entry in content["images"]] == [[], [3], [1]]
    first, second = content["annotations"]
    assert (first["image_id"], first["category_id"], first["bbox"], first["iscrowd"]) == (1, 1, [0, 0, 100, 50], 1)
    assert (second["image_id"], second["category_id"], second["bbox"], second["iscrowd"]) == (2, 2, [10, 10, 40, 20], 0)


def test_yolo_has_boxes_polygons_and_pictures_without_objects(tmp_path: Path) -> None:
    content = convert(yolo(tmp_path))
    assert [entry["file_name"] for entry in content["images"]] == ["a.jpg", "b.jpg", "c.jpg"]
    assert [(entry["image_id"], entry["category_id"], entry["bbox"]) for entry in content["annotations"]] == [
        (1, 2, pytest.approx([40, 15, 20, 20], abs=0.01)),
        (1, 1, pytest.approx([0, 0, 20, 20], abs=0.01)),
        (2, 1, pytest.approx([10, 10, 40, 20], abs=0.01)),
    ]
    assert content["annotations"][2]["segmentation"] == [pytest.approx([10, 10, 50, 10, 50, 30, 10, 30])]
    assert "segmentation" not in content["annotations"][0]


def test_yolo_lines_may_have_confidences_keypoints_and_odd_spaces(tmp_path: Path) -> None:
    data = yolo(tmp_path)
    (tmp_path / "data.yaml").write_text("names: {0: cat, 1: dog}\nkpt_shape: [2, 2]\n")
    (tmp_path / "labels/a.txt").write_text("1.0  0.5 0.5 0.2 0.4 0.9\n\n0 0.5 0.5 0.2 0.4 0.1 0.1 0.2 0.2\r\n")
    found = convert(data)["annotations"]
    assert [entry["category_id"] for entry in found] == [2, 1, 1]
    assert [entry["bbox"] for entry in found[:2]] == [pytest.approx([40, 15, 20, 20])] * 2
    assert "segmentation" not in found[1]


def test_polygons_need_no_masks_of_whole_pictures(tmp_path: Path) -> None:
    data = yolo(tmp_path)
    (tmp_path / "labels/a.txt").write_text("0 0.1 0.2 0.5 0.2 0.5 0.6\n" * 2000)
    (tmp_path / "images/a.jpg").unlink()
    Image.new("RGB", (2000, 2000), "red").save(tmp_path / "images/a.jpg")
    tracemalloc.start()
    convert(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6  # the masks would be 8 GB


def sorted_out(data: str, store: Path, **others: str) -> tuple[list[str], list[str]]:
    """Names of a data set's categories, and its boxes for training by name."""
    run = boxes_configs.Run(storage=str(store), name="t", data=data, train_images=0, eval_images=1, **others)
    prepare_boxes.prepare(run)
    rows = tables.read_table(run.storage, "categories", "t").to_pylist()
    name_of = {row["category_id"]: row["name"] for row in rows}
    keys = tables.read_table(run.storage, "boxes", "t-eval")["category_ids"].to_pylist()
    return list(name_of.values()), [name_of[key] for own in keys for key in own]


def voc_of(folder: Path, *names: str) -> str:
    """A picture for each name."""
    data = voc(folder)
    draw(folder / "JPEGImages", *(f"{number}.jpg" for number in range(len(names))))
    for name in ("a", "b"):
        (folder / f"JPEGImages/{name}.jpg").unlink()
        (folder / f"Annotations/{name}.xml").unlink()
    for number, name in enumerate(names):
        content = VOC.format(name=number).replace("<name>cat", f"<name>{name}")
        (folder / f"Annotations/{number}.xml").write_text(content)
    return data


def test_voc_folders_with_the_same_names_have_the_same_categories(tmp_path: Path) -> None:
    train, evaluation = voc_of(tmp_path / "a", "dog", "cat", "cow"), voc_of(tmp_path / "b", "cow", "cat", "dog", "dog")
    names, shown = sorted_out(train, tmp_path / "store", eval_data=evaluation)
    assert names == ["cat", "cow", "dog"]
    assert shown == ["cow", "cat", "dog", "dog"]


@pytest.mark.parametrize("make", [open_images, yolo, voc])
def test_a_missing_picture_is_left_out_and_named(
    make: Callable[[Path], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make(tmp_path / "data")
    if make is voc:
        draw(tmp_path / "data/JPEGImages", "c.jpg", "d.jpg")
        for name in "cd":
            (tmp_path / f"data/Annotations/{name}.xml").write_text(VOC.format(name=name))
    (gone,) = (path for path in (tmp_path / "data").rglob("*.jpg") if path.name in ("b.jpg", "cc.jpg"))
    gone.unlink()
    sorted_out(data, tmp_path / "store")
    assert f"{data}: left out: 1 missing pictures ({gone.name})" in capsys.readouterr().out
    assert tables.read_manifest(str(tmp_path / "store"), "boxes", "t-train").details["account"][0]["file"] == data
    for path in gone.parent.glob("*"):
        path.unlink()
    draw(gone.parent, "other.jpg")
    with pytest.raises(InputError, match="pictures are left out"):
        sorted_out(data, tmp_path / "again")


def test_absent_names_are_those_of_the_same_part_of_open_images(tmp_path: Path) -> None:
    file = Path(open_images(tmp_path))
    own = tmp_path / "validation-annotations-human-imagelabels-boxable.csv"
    own.rename(tmp_path / "oidv7-val-annotations-human-imagelabels.csv")  # as the last release has it
    header = "ImageID,Source,LabelName,Confidence\n"
    for other in ("oidv6-train-annotations-human", "test-annotations-human", "validation-annotations-machine"):
        (tmp_path / f"{other}-imagelabels.csv").write_text(f"{header}zz,x,/m/1,0\n")
    entries = convert(str(file))["images"]
    assert [(entry["file_name"], entry["neg_category_ids"]) for entry in entries] == [
        ("aa.jpg", []), ("bb.jpg", [3]), ("cc.jpg", [1])
    ]  # fmt: skip


def test_open_images_names_are_those_of_boxes(tmp_path: Path) -> None:
    file = open_images(tmp_path)
    (tmp_path / "class-descriptions.csv").write_text("/m/2,Cat\n/m/1,Dog\n/m/3,Cow\n/m/4,Sunset\n")  # sorted last
    assert [entry["name"] for entry in convert(file)["categories"]] == ["Dog", "Cat", "Cow"]


def test_voc_counts_pixels_from_one(tmp_path: Path) -> None:
    content = convert(voc(tmp_path))
    assert content["categories"] == [{"id": 1, "name": "cat"}]
    assert [entry["bbox"] for entry in content["annotations"]] == [[10, 5, 40, 20]] * 2


@pytest.mark.parametrize("make", [open_images, yolo, voc])
def test_every_format_becomes_tables(make: Callable[[Path], str], tmp_path: Path) -> None:
    data = make(tmp_path / "data")
    run = boxes_configs.Run(storage=str(tmp_path / "store"), name="t", data=data, train_images=0, eval_images=1)
    prepare_boxes.prepare(run)
    rows = [
        row for part in ("train", "eval") for row in tables.read_table(run.storage, "boxes", f"t-{part}").to_pylist()
    ]
    names = tables.read_table(run.storage, "categories", "t")["name"].to_pylist()
    assert len(rows) == (2 if make is voc else 3)
    assert {"cat", "Cat"} & set(names)
    assert all((row["width"], row["height"]) == (100, 50) for row in rows)
    prepare_boxes.prepare(run)  # again: the same config
    (pictures,) = (folder for folder in Path(data).parent.rglob("*") if folder.name in ("images", "JPEGImages"))
    pictures.rename(tmp_path / "elsewhere")
    elsewhere = dataclasses.replace(run, storage=str(tmp_path / "other"), images=str(tmp_path / "elsewhere"))
    prepare_boxes.prepare(elsewhere)
    assert tables.read_table(elsewhere.storage, "boxes", "t-train")["image_id"].to_pylist() == [
        row["image_id"] for row in tables.read_table(run.storage, "boxes", "t-train").to_pylist()
    ]


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        (open_images, lambda f: (f / "class-descriptions-boxable.csv").unlink(), "no class-descriptions"),
        (
            open_images,
            lambda f: (f / "validation-annotations-bbox.csv").write_text(OPEN_IMAGES + "a,x,/m/9,1,0,1,0,1,0,0,0\n"),
            "line 2: LabelName '/m/9'",
        ),
        (
            open_images,
            lambda f: (f / "validation-annotations-bbox.csv").write_text(OPEN_IMAGES + "a,x,/m/1,1,0,90,0,1,0,0,0\n"),
            "line 2: corners [0.0, 0.0, 90.0, 1.0], expected numbers from 0 to 1",
        ),
        (open_images, lambda f: (f / "validation-annotations-bbox.csv").write_text("a,b\n"), "no column ImageID"),
        (
            yolo,
            lambda f: (f / "labels/a.txt").write_text("5 0.5 0.5 0.2 0.4\n"),
            "line 1: class 5, expected 0 to 1",
        ),
        (yolo, lambda f: (f / "labels/a.txt").write_text("0 0.5 x 0.2 0.4\n"), "a.txt: line 1: "),
        (yolo, lambda f: (f / "labels/a.txt").write_text("0 0.5 0.5 0.2\n"), "expected a class and a box or a polygon"),
        (yolo, lambda f: (f / "labels/a.txt").write_text("0 0.5 nan 0.2 0.1\n"), "expected a class and a box"),
        (yolo, lambda f: (f / "data.yaml").write_text("nc: 2\n"), "names: None, expected a list"),
        (yolo, lambda f: (f / "data.yaml").write_text("names: {1: cat, 2: dog}\n"), "the name of each class from 0"),
        (yolo, lambda f: (f / "data.yaml").write_text("names: [cat, dog]\nkpt_shape: x\n"), "kpt_shape: "),
        (voc, lambda f: (f / "Annotations/a.xml").write_text("<annotation>"), "Annotations/a.xml: "),
    ],
)
def test_what_is_malformed_is_named_in_one_line(
    make: Callable[[Path], str], change: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    data = make(tmp_path)
    change(tmp_path)
    with pytest.raises(InputError) as raised:
        convert(data)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


# --------------------------------------------------------------------------------------------------- sets of two parts


def picture(path: Path, seed: int, label: str = "") -> None:
    """A picture, with its label file in YOLO's format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (50, 100, 3), np.uint8)).save(path)
    if label:
        file = Path(str(path).replace("/images/", "/labels/")).with_suffix(".txt")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{label} 0.5 0.5 0.2 0.4\n")


def ultralytics(folder: Path, content: str, name: str = "set.yaml") -> str:
    """A cat in `a`, a dog in another `a` one folder below, and a dog for evaluation, in a third `a`."""
    picture(folder / "images/train/a.jpg", 1, "0")
    picture(folder / "images/train/more/a.jpg", 2, "1")
    picture(folder / "images/val/a.jpg", 3, "1")
    (folder / name).write_text(f"{content}\nnames: {{0: cat, 1: dog}}\n")
    return str(folder)


def roboflow_yolo(folder: Path) -> str:
    picture(folder / "train/images/a_jpg.rf.1.jpg", 1, "0")
    picture(folder / "train/images/a_jpg.rf.2.jpg", 2, "1")
    picture(folder / "valid/images/a_jpg.rf.1.jpg", 3, "1")
    picture(folder.parent / "train/images/other.jpg", 4, "0")  # another set, unpacked beside it
    parts = "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n"
    (folder / "data.yaml").write_text(f"{parts}\nnc: 2\nnames: ['cat', 'dog']\n")
    return str(folder)


def roboflow_coco(folder: Path) -> str:
    """Category 0 groups the others."""
    groups = [(1, "cat"), (2, "dog")]
    categories = [{"id": key, "name": name, "supercategory": "pets"} for key, name in groups]
    for part, shown in (("train", {1: 1, 2: 2}), ("valid", {3: 2})):
        entries = [{"id": n, "file_name": f"{n}.jpg", "width": 100, "height": 50} for n in shown]
        annotations = [{"image_id": n, "category_id": key, "bbox": [40, 15, 20, 20]} for n, key in shown.items()]
        for number in shown:
            picture(folder / part / f"{number}.jpg", number)
        content = {"images": entries, "annotations": annotations}
        content["categories"] = [{"id": 0, "name": "pets", "supercategory": "none"}, *categories]
        (folder / part / "_annotations.coco.json").write_text(json.dumps(content))
    return str(folder)


def roboflow_voc(folder: Path) -> str:
    for part, shown in (("train", {1: "cat", 2: "dog"}), ("valid", {3: "dog"})):
        for number, name in shown.items():
            picture(folder / part / f"{number}.jpg", number)
            content = VOC.format(name=number).replace("<name>cat", f"<name>{name}")
            content = content.replace(">11<", ">41<").replace(">50</xmax", ">60</xmax")
            (folder / part / f"{number}.xml").write_text(content.replace(">6<", ">16<").replace(">25<", ">35<"))
    return str(folder)


def lists(folder: Path) -> str:
    data = ultralytics(folder, "path: .\ntrain: train.txt\nval: [lists/val.txt]\ntest: none.txt")
    (folder / "train.txt").write_text("./images/train/a.jpg\nimages/train/more/a.jpg\n\n")
    (folder / "lists").mkdir()
    (folder / "lists/val.txt").write_text(f"{folder}/images/val/a.jpg\r\n")
    return f"{data}/set.yaml"


def beside(folder: Path) -> str:
    """Labels beside the pictures, as Darknet has them."""
    for number, (path, label) in enumerate((("train/a", "0"), ("train/more/a", "1"), ("val/a", "1")), 1):
        picture(folder / f"{path}.jpg", number, label)
    (folder / "train/README.txt").write_text("no label")
    (folder / "data.yml").write_text("train: train\nval: val\nnames: [cat, dog]\n")
    return str(folder)


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: ultralytics(folder, "path: ../datasets/set\ntrain: images/train\nval: images/val"),
        lambda folder: ultralytics(folder, "path: datasets\ntrain: images/train\nval: images/val") + "/set.yaml",
        lambda folder: (
            ultralytics(folder, f"path: {folder}\ntrain: images/train/\nval: images/val/", "../s.yaml")
            and f"{folder.parent}/s.yaml"
        ),
        lambda folder: ultralytics(folder, "train: [images/train/more, images/train]\nval: [images/val]", "data.yaml"),
        lambda folder: ultralytics(folder, "train: images\nval: images/val"),  # within the other
        lambda folder: ultralytics(folder, "train: images/train\nval: images"),
        lists,
        beside,
        roboflow_yolo,
        roboflow_coco,
        roboflow_voc,
    ],
)
def test_a_set_with_a_part_for_evaluation_keeps_it(
    make: Callable[[Path], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make(tmp_path / "data")
    found = {}
    for part, rows in zip(("train", "eval"), prepared(data, tmp_path / "store"), strict=True):
        names = {row["category_id"]: row["name"] for row in categories_of(tmp_path / "store")}
        assert all(row["boxes"] == [pytest.approx([40, 15, 60, 35], abs=0.01)] for row in rows)
        found[part] = {row["image_id"]: names[row["category_ids"][0]] for row in rows}
    expected = {}
    for seed in (1, 2, 3):
        picture(tmp_path / "same.jpg", seed)
        expected[seed] = storage.sha256((tmp_path / "same.jpg").read_bytes())
    assert found == {"train": {expected[1]: "cat", expected[2]: "dog"}, "eval": {expected[3]: "dog"}}
    shown = capsys.readouterr().out
    assert "missing" not in shown
    assert "noted" not in shown
    assert len(categories_of(tmp_path / "store")) == 2


def prepared(data: str, store: Path, **others: str) -> list[list[dict[str, Any]]]:
    run = boxes_configs.Run(storage=str(store), name="t", data=data, train_images=0, eval_images=1, **others)
    prepare_boxes.prepare(run)
    prepare_boxes.prepare(run)  # again: the same config
    return [tables.read_table(run.storage, "boxes", f"t-{part}").to_pylist() for part in ("train", "eval")]


def categories_of(store: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = tables.read_table(str(store), "categories", "t").to_pylist()
    return rows


@pytest.mark.parametrize(
    "parts", ["train: images/train", "train: images/train\nval: images/train", "train: images\nval:"]
)
def test_some_pictures_are_held_out_without_a_part_for_evaluation(parts: str, tmp_path: Path) -> None:
    train, held_out = prepared(ultralytics(tmp_path, parts), tmp_path / "store")
    assert len(held_out) == 1
    assert len(train) == (2 if "images\n" in parts else 1)
    assert not {row["uri"] for row in train} & {row["uri"] for row in held_out}


def test_a_set_for_evaluation_takes_the_place_of_the_own_part(tmp_path: Path) -> None:
    data = ultralytics(tmp_path / "a", "train: images/train\nval: images/val")
    other = roboflow_coco(tmp_path / "b")
    for given, count in ((other, 1), (f"{other}/train", 2), (f"{other}/train/_annotations.coco.json", 2)):
        rows = prepared(data, tmp_path / f"store-{count}-{len(given)}", eval_data=given)
        assert [len(part) for part in rows] == [2, count]
        assert all(row["uri"].startswith(f"{tmp_path}/b/") for row in rows[1])


def moved_yolo(folder: Path) -> str:
    return ultralytics(folder, "path: /old\ntrain: images/train\nval: images/val")


@pytest.mark.parametrize("make", [moved_yolo, roboflow_coco])
def test_pictures_elsewhere_are_in_a_folder_for_each_part(make: Callable[[Path], str], tmp_path: Path) -> None:
    data, moved = Path(make(tmp_path / "data")), tmp_path / "moved"
    data.rename(moved)
    for file in [path for path in moved.rglob("*") if path.suffix in (".yaml", ".json")]:
        (data / file.relative_to(moved)).parent.mkdir(parents=True, exist_ok=True)
        file.rename(data / file.relative_to(moved))
    found = prepared(str(data), tmp_path / "store", images=str(moved))
    assert [len(rows) for rows in found] == [2, 1]


def test_a_label_or_picture_alone_is_of_its_own_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ultralytics(tmp_path / "data", "train: images/train\nval: images/val")
    picture(tmp_path / "data/images/train/more/b.jpg", 4)  # without a label: that of the other b is not its own
    picture(tmp_path / "data/images/train/b.jpg", 5, "0")
    (tmp_path / "data/labels/train/more/lost.txt").write_text("0 0.5 0.5 0.2 0.4\n")
    (tmp_path / "data/labels/train/classes.txt").write_text("cat\ndog\n")
    train, _ = prepared(data, tmp_path / "store")
    counts = {row["uri"].partition("/images/train/")[2]: len(row["boxes"]) for row in train}
    assert counts == {"a.jpg": 1, "b.jpg": 1, "more/a.jpg": 1, "more/b.jpg": 0}
    assert f"{data}: left out: 1 missing pictures (more/lost.jpg)\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("train: images/none", "set.yaml: train: no {}/images/none, expected a folder of pictures or a .txt file"),
        ("train: images/train\nval: /none", "set.yaml: val: no /none, expected a folder of pictures"),
        ("train: empty", "{}/empty: no pictures, expected some"),
        ("train: empty.txt", "{}/empty.txt: no pictures, expected some"),
        ("train: bare/images", "set.yaml: train: {}/bare/labels/a.txt: expected it or labels of other pictures"),
        ("train: far.txt", "set.yaml: train: expected pictures in one folder, or in folders of one"),
        ("{", "set.yaml: "),
    ],
)
def test_a_wrong_part_of_a_yaml_is_named_in_one_line(content: str, message: str, tmp_path: Path) -> None:
    data = ultralytics(tmp_path, content)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "far.txt").write_text("images/train/a.jpg\n/elsewhere/images/b.jpg\n")
    picture(tmp_path / "bare/images/a.jpg", 1)
    with pytest.raises(InputError) as raised:
        layouts.find_parts(data)
    assert message.format(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_folder_of_no_known_format_says_what_was_expected(tmp_path: Path) -> None:
    draw(tmp_path / "train", "a.jpg")
    for data in (tmp_path, tmp_path / "none"):
        with pytest.raises(
            InputError, match=r": no annotations, expected instances.json, _annotations.coco.json, a YAML"
        ):
            layouts.find_parts(str(data))


def test_names_of_a_file_or_rare_names_are_novel(tmp_path: Path) -> None:
    draw(tmp_path / "images", *(f"{number}.jpg" for number in range(14)))
    content = {
        "images": [{"id": n, "file_name": f"{n}.jpg", "width": 100, "height": 50} for n in range(14)],
        "annotations": [{"image_id": n, "category_id": 1 + (n > 11), "bbox": [1, 1, 9, 9]} for n in range(14)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "rare cat"}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(content))
    (tmp_path / "novel.txt").write_text("cat\n\n")
    run = boxes_configs.Run(storage=str(tmp_path / "a"), name="t", data=str(tmp_path), train_images=0, eval_images=1)
    for changed, splits in (({"split": "frequency"}, ["base", "novel"]), ({"novel": "novel.txt"}, ["novel", "base"])):
        changed = {key: (tmp_path / value).as_uri() if key == "novel" else value for key, value in changed.items()}
        store = str(tmp_path / f"store-{len(splits)}-{splits[0]}")
        prepare_boxes.prepare(replace(run, storage=store, **changed))
        assert tables.read_table(store, "categories", "t")["split"].to_pylist() == splits
        # LVIS's rules need names that images are known not to show, which no set has by its frequencies alone.
        truth, _ = measured.read_truth_table(store, "t-eval", "t")
        assert measured.choose_protocol(truth, "auto") == "coco-ovd"
    (tmp_path / "novel.txt").write_text("cat\ndog\n")
    with pytest.raises(InputError, match=r"novel.txt: line 2: 'dog' is the name of no category"):
        prepare_boxes.prepare(replace(run, novel=str(tmp_path / "novel.txt")))
