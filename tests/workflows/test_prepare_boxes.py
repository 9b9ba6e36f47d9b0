import dataclasses
import json
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep import storage, tables
from data_prep.boxes.coco import COCO_BASE, COCO_NOVEL, COCO_OTHERS
from data_prep.streams.augmentation import Augmentation
from data_prep.streams.box_loader import detection_loader
from ovd_models.errors import InputError
from workflows import prepare_boxes
from workflows.common.teacher import read_categories
from workflows.configs import boxes as boxes_configs
from workflows.configs.boxes import Run
from workflows.prepare_boxes import prepare, prepare_captions

NAMES = ["person", "cat", "dog", "hair drier"]


def folder_of(root: Path, count: int = 6) -> Path:
    """Photographs of 64 px with a person, and a cat on every other one."""
    (root / "images").mkdir(parents=True)
    images, annotations = [], []
    for number in range(count):
        Image.new("RGB", (64, 64), (number * 30, 90, 10)).save(root / f"images/{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 64, "height": 64})
        for category in (1, 2) if number % 2 else (1,):
            box = [5 * category, 5, 20, 30]
            annotations.append({"image_id": number, "category_id": category, "bbox": box, "id": len(annotations)})
    categories = [{"id": key, "name": name} for key, name in enumerate(NAMES, 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "instances.json").write_text(json.dumps(content))
    return root


def photos(tmp_path: Path, **changes: Any) -> Run:
    data = str(folder_of(tmp_path / "data"))
    run = dataclasses.replace(boxes_configs.coco(), storage=str(tmp_path / "store"), data=data, eval_images=2)
    return dataclasses.replace(run, **changes)


def read(run: Run, part: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = tables.read_table(run.storage, "boxes", f"{run.name}-{part}").to_pylist()
    return rows


def test_a_folder_becomes_a_training_and_an_evaluation_set(tmp_path: Path) -> None:
    run = photos(tmp_path)
    prepare(run)
    train, held_out = read(run, "train"), read(run, "eval")
    assert (len(train), len(held_out)) == (4, 2)
    assert sorted(row["source_id"] for row in train + held_out) == list(range(6))
    assert {key for row in train for key in row["category_ids"]} == {1}  # cats are novel
    whole = {row["source_id"]: row["category_ids"] for row in held_out}
    assert all(categories == ([1, 2] if number % 2 else [1]) for number, categories in whole.items())
    categories = tables.read_table(run.storage, "categories", "photos").to_pylist()
    assert [(row["name"], row["split"]) for row in categories] == [
        ("person", "base"),
        ("cat", "novel"),
        ("dog", "novel"),
        ("hair drier", ""),
    ]


def test_categories_of_two_files_are_matched_by_name(tmp_path: Path) -> None:
    other = folder_of(tmp_path / "val", count=3)
    expected = photos(tmp_path, eval_data=str(other), storage=str(tmp_path / "expected"))
    prepare(expected)
    file = other / "instances.json"
    content = json.loads(file.read_text())
    moved = {row["id"]: number for number, row in enumerate(reversed(content["categories"]), 70)}
    content["categories"] = [
        {**row, "id": moved[row["id"]]} for row in content["categories"] if row["name"] != "hair drier"
    ]
    for row in content["annotations"]:
        row["category_id"] = moved[row["category_id"]]
    for image in content["images"]:
        image["neg_category_ids"] = [moved[1], 5000]
    file.write_text(json.dumps(content))
    run = dataclasses.replace(expected, storage=str(tmp_path / "store"))
    prepare(run)
    found = read(run, "eval")
    assert [row["category_ids"] for row in found] == [row["category_ids"] for row in read(expected, "eval")]
    assert all(row["neg_category_ids"] == [1] for row in found)
    assert len(tables.read_table(run.storage, "categories", run.name)) == 4


def test_evaluation_may_have_its_own_folder(tmp_path: Path) -> None:
    other = folder_of(tmp_path / "val", count=3)
    run = photos(tmp_path, eval_data=str(other))
    prepare(run)
    assert (len(read(run, "train")), len(read(run, "eval"))) == (6, 3)
    content = json.loads((other / "instances.json").read_text())
    content["categories"][3]["name"] = "toaster"
    (other / "instances.json").write_text(json.dumps(content))
    again = dataclasses.replace(run, storage=str(tmp_path / "again"), images=str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="category 'toaster' is not in the training's file"):  # before any picture
        prepare(again)
    with pytest.raises(InputError, match=r"nowhere/.*\.png: cannot be read .*expected an image file, named by .*json"):
        prepare(dataclasses.replace(again, eval_data=""))


def test_a_set_of_two_parts_is_trained_and_evaluated_on_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder_of(tmp_path / "set/train")
    valid = folder_of(tmp_path / "set/valid", count=3)
    for number in range(3):
        Image.new("RGB", (64, 64), (number, 0, 200)).save(valid / f"images/{number}.png")
    prepare_boxes.prepare_for_training(str(tmp_path / "store"), "photos", "mine", str(tmp_path / "set"), held_out=2)
    run = Run(storage=str(tmp_path / "store"), name="mine")
    assert [row["uri"] for row in read(run, "train")] == [f"{tmp_path}/set/train/images/{n}.png" for n in range(6)]
    assert [row["uri"] for row in read(run, "eval")] == [f"{tmp_path}/set/valid/images/{n}.png" for n in range(3)]
    assert "6 images for training, 6 of them with base boxes, and 3 for evaluation" in capsys.readouterr().out
    with (valid / "instances.json").open("a") as file:  # part of what the tables are made from
        file.write(" ")
    with pytest.raises(InputError, match="made from another config"):
        prepare_boxes.prepare_for_training(run.storage, "photos", "mine", str(tmp_path / "set"), held_out=2)


def published_coco(root: Path, shown: dict[str, list[list[str]]]) -> dict[str, str]:
    """COCO's folders and files as published; the names shown on each picture, by part (`train2017`, `val2017`)."""
    names = [*COCO_BASE, *COCO_NOVEL, *COCO_OTHERS]
    (root / "annotations").mkdir(parents=True)
    for part, pictures in shown.items():
        (root / part).mkdir()
        images, annotations = [], []
        for number, objects in enumerate(pictures, 9):
            file_name = f"{number:012d}.jpg"
            noise = np.random.default_rng(number).integers(0, 255, (48, 64, 3), np.uint8)
            Image.fromarray(noise).save(root / part / file_name)
            address = f"http://images.cocodataset.org/{part}/{file_name}"
            images.append({"id": number, "file_name": file_name, "coco_url": address, "width": 64, "height": 48})
            for name in objects:
                entry = {"image_id": number, "category_id": names.index(name) + 1, "bbox": [4, 4, 20, 30], "iscrowd": 0}
                annotations.append({**entry, "id": len(annotations)})
        categories = [{"id": key, "name": name} for key, name in enumerate(names, 1)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"annotations/instances_{part}.json").write_text(json.dumps(content))
    files = (f"{root}/annotations/instances_{part}2017.json" for part in ("train", "val"))
    return dict(zip(("data", "eval_data"), files, strict=True)) | {"images": str(root)}


def coco_captions(root: Path, part: str, captions: list[list[str]]) -> str:
    """COCO's file of captions for the pictures of `published_coco`."""
    images = [{"id": number, "file_name": f"{number:012d}.jpg"} for number in range(9, 9 + len(captions))]
    annotations = [
        {"id": 10 * number + place, "image_id": number, "caption": caption}
        for number, several in enumerate(captions, 9)
        for place, caption in enumerate(several)
    ]
    path = root / f"annotations/captions_{part}.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return str(path)


def test_the_published_files_of_coco_give_the_48_17_protocol(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = [["person", "cat"], ["cat"], ["wine glass"], ["dog", "car", "person"], []]
    val = [["teddy bear", "hot dog"], ["umbrella"], [], ["person", "stop sign"], ["dining table"]]
    flags = published_coco(tmp_path / "coco", {"train2017": train, "val2017": val})
    run = dataclasses.replace(boxes_configs.coco(), storage=str(tmp_path / "store"), name="coco", **flags)
    prepare(run)
    assert "5 images for training, 2 of them with base boxes, and 2 for evaluation" in capsys.readouterr().out
    names = {row["category_id"]: row for row in tables.read_table(run.storage, "categories", "coco").to_pylist()}
    evaluated = {row["source_id"]: [names[key]["name"] for key in row["category_ids"]] for row in read(run, "eval")}
    assert evaluated == {10: ["umbrella"], 12: ["person", "stop sign"]}  # not those of the 15 other names alone
    assert Counter(row["split"] for row in names.values()) == {"base": 48, "novel": 17, "": 15}
    categories, splits = read_categories(run.storage, "coco")
    base = [key for key, name in categories.items() if splits[name] == "base"]
    trained = detection_loader(run.storage, "coco-train", base, seed=0, augmentation=Augmentation())
    assert trained.count == 2
    uris = [row["uri"].removeprefix(f"{tmp_path}/coco/") for part in ("train", "eval") for row in read(run, part)]
    assert uris[:2] == ["train2017/000000000009.jpg", "train2017/000000000010.jpg"]
    assert uris[5:] == ["val2017/000000000010.jpg", "val2017/000000000012.jpg"]


def test_the_split_follows_the_seed(tmp_path: Path) -> None:
    first = photos(tmp_path)
    runs = [first, *(dataclasses.replace(first, name=f"n{seed}", seed=seed) for seed in (0, 1, 2, 3))]
    for run in runs:
        prepare(run)
    held_out = [tuple(row["source_id"] for row in read(run, "eval")) for run in runs]
    assert held_out[0] == held_out[1]
    assert len(set(held_out)) > 1


def test_published_tables_are_kept_and_another_config_is_refused(tmp_path: Path) -> None:
    run = photos(tmp_path)
    prepare(run)
    before = storage.read_bytes(f"{run.storage}/boxes/photos-eval/manifest.json")
    prepare(run)
    assert storage.read_bytes(f"{run.storage}/boxes/photos-eval/manifest.json") == before
    with pytest.raises(
        InputError,
        match=r"photos-eval: made from another config \(other eval_images\), expected a new --name \(.*: --boxes\) or",
    ):
        prepare(dataclasses.replace(run, eval_images=3))


def test_a_folder_is_the_same_however_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = photos(tmp_path)
    prepare(run)
    before = storage.read_bytes(f"{run.storage}/boxes/photos-eval/manifest.json")
    folder = Path(run.data)
    monkeypatch.chdir(folder.parent)
    for data in (f"{folder}/", folder.name, f"./{folder.name}/"):
        prepare(dataclasses.replace(run, data=data))
    assert storage.read_bytes(f"{run.storage}/boxes/photos-eval/manifest.json") == before


def test_a_changed_annotation_file_is_noticed(tmp_path: Path) -> None:
    run = photos(tmp_path)
    prepare(run)
    path = Path(run.data) / "instances.json"
    path.write_text(path.read_text().replace('"dog"', '"bird"'))
    with pytest.raises(InputError, match="made from another config"):
        prepare(run)


def test_a_fifth_is_held_out_of_a_small_folder_and_twenty_of_a_large_one() -> None:
    run = boxes_configs.coco()
    for given, count, expected in ((0, 2, 1), (0, 9, 1), (0, 10, 2), (0, 99, 19), (0, 1000, 20), (7, 10, 7)):
        kept, held_out = prepare_boxes.split_rows(dataclasses.replace(run, eval_images=given), count)
        assert (len(kept), len(held_out)) == (count - expected, expected)
        assert sorted([*kept, *held_out]) == list(range(count))
    with pytest.raises(InputError, match=r"--held-out 1 .*: expected 1 to 0 of the 1 images"):
        prepare_boxes.split_rows(dataclasses.replace(run, eval_images=0), 1)


@pytest.mark.parametrize("count", [6, 7, -1])
def test_an_impossible_split_is_refused(tmp_path: Path, count: int) -> None:
    with pytest.raises(InputError, match=rf"--held-out {count} .*--eval-images\): expected 1 to 5 of the 6 images"):
        prepare(photos(tmp_path, eval_images=count))


def test_a_folder_without_annotations_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r": no annotations, expected instances\.json, "):
        prepare(photos(tmp_path, data=str(tmp_path)))


@pytest.mark.ray
def test_the_coco_config_asks_for_its_folder(ray_cluster: None, tmp_path: Path) -> None:
    run = dataclasses.replace(boxes_configs.coco(), storage=str(tmp_path))
    drawn = dataclasses.replace(boxes_configs.smoke(), storage=str(tmp_path))
    for wrong in (run, dataclasses.replace(run, name="lvis"), dataclasses.replace(drawn, eval_data="elsewhere")):
        with pytest.raises(InputError, match="--data: missing"):
            prepare(wrong)


@pytest.mark.ray
def test_photographs_become_pairs_with_given_captions(ray_cluster: None, tmp_path: Path) -> None:
    run = photos(tmp_path)
    lines = ["file_name\tcaption", *(f"{n}.png\ta person and a cat number {n}" for n in range(6))]
    (Path(run.data) / "captions.tsv").write_text("\n".join(lines) + "\n")
    prepare(run)
    prepare_captions(run, "photos", "photos")
    pairs = tables.read_table(run.storage, "pairs", "photos").to_pylist()
    rejects = tables.read_table(run.storage, "rejects", "photos").to_pylist()
    assert len(pairs) + len(rejects) == 4
    assert all("cat" in row["caption"] for row in pairs)


@pytest.mark.ray
def test_captions_made_of_annotations_hold_no_novel_name(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = photos(tmp_path)
    prepare_captions(run, "photos", "photos")
    rows = [
        *tables.read_table(run.storage, "pairs", "photos").to_pylist(),
        *tables.read_table(run.storage, "rejects", "photos").to_pylist(),
    ]
    assert {row["caption"] for row in rows if row["caption"]} == {"a photo of a person"}  # cats are novel
    assert set(tables.read_table(run.storage, "concepts", "photos", ["name"])["name"].to_pylist()) <= {"person"}
    assert f"captions: none in {run.data}; made of the names of each image's base boxes" in capsys.readouterr().out


@pytest.mark.ray
def test_concepts_of_cocos_captions_are_their_nouns(ray_cluster: None, tmp_path: Path) -> None:
    run = photos(tmp_path)
    noise = np.random.default_rng(0)
    for number in range(6):  # pictures that are not alike
        Image.fromarray(noise.integers(0, 255, (64, 64, 3), np.uint8)).save(Path(run.data, f"images/{number}.png"))
    annotated = [
        {"id": 10 * number + part, "image_id": number, "caption": caption}
        for number in range(6)
        for part, caption in enumerate([f"A woman with umbrella number {number}.", "A frisbee on the grass"])
    ]
    images = [{"id": number, "file_name": f"{number}.png"} for number in range(6)]
    Path(run.data, "captions_train2017.json").write_text(json.dumps({"images": images, "annotations": annotated}))
    prepare_captions(run, "photos", "photos")
    concepts = tables.read_table(run.storage, "concepts", "photos", ["name"])["name"].to_pylist()
    assert concepts == ["frisbee", "grass", "umbrella", "woman"]  # none of the four categories
    prepare_captions(dataclasses.replace(run, storage=str(tmp_path / "published")), "coco", "coco_r50")
    assert not tables.read_table(str(tmp_path / "published"), "concepts", "coco").num_rows  # at least 20 images


@pytest.mark.ray
def test_cocos_published_captions_become_groups_by_command(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = published_coco(tmp_path / "coco", {"train2017": [["person"], [], ["cat"]], "val2017": [["person"]]})
    five = ["A man on a bench.", "a Man\nwith a kite", "Two umbrellas", "the grass behind a bench ", "A kite. "]
    captions = coco_captions(tmp_path / "coco", "train2017", [five, ["An umbrella."], ["A man in a boat"] * 5])
    arguments = ["--config", "coco", "--name", "coco", "--storage", str(tmp_path / "store"), "--min-images", "2"]
    arguments += [text for name, value in flags.items() for text in ("--" + name.replace("_", "-"), value)]
    monkeypatch.setattr(sys, "argv", ["prepare_boxes.py", *arguments, "--captions", captions])
    prepare_boxes.main()
    groups = tables.read_table(str(tmp_path / "store"), "groups", "coco").to_pylist()
    concepts = tables.read_table(str(tmp_path / "store"), "concepts", "coco").to_pylist()
    assert [(row["name"], row["image_count"]) for row in concepts] == [("man", 2), ("umbrella", 2)]
    assert {row["caption"] for row in groups if row["concept_ids"] == [0, 1]} == {
        "A man on a bench. a Man with a kite. Two umbrellas. the grass behind a bench. A kite."
    }
    assert len(groups) == 4  # an image once in each of its groups, the one without boxes too
    shown = capsys.readouterr().out
    assert "pairs: 3 of 3 images with captions kept, 2 concepts" in shown
    assert "--boxes coco" in shown
    assert "--pairs coco" in shown
    arguments[arguments.index(str(tmp_path / "store"))] = str(tmp_path / "few")
    arguments[arguments.index("--min-images") + 1] = "3"
    monkeypatch.setattr(sys, "argv", ["prepare_boxes.py", *arguments, "--captions", captions])
    with pytest.raises(InputError, match="no name is in the captions of 3 images, expected more captions or a lower"):
        prepare_boxes.main()


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        ("captions_val2017.json", "captions_val2017.json: no row for 000000000010.jpg, expected a caption for each"),
        (
            "instances_train2017.json",
            "instances_train2017.json: Object missing required field `caption` - at `$.annotations[0]`",
        ),
        ("none.json", "none.json: cannot be read (No such file or directory), expected captions in COCO's format"),
    ],
)
def test_captions_of_other_images_are_refused_before_any_picture_is_read(
    tmp_path: Path, captions: str, message: str
) -> None:
    flags = published_coco(tmp_path / "coco", {"train2017": [["person"], ["cat"]], "val2017": [["person"]]})
    coco_captions(tmp_path / "coco", "val2017", [["a man"]])
    shutil.rmtree(tmp_path / "coco/train2017")
    run = dataclasses.replace(boxes_configs.coco(), storage=str(tmp_path / "store"), name="coco", **flags)
    path = str(tmp_path / "coco/annotations" / captions)
    with pytest.raises(InputError, match=re.escape(message)):
        prepare(dataclasses.replace(run, captions=path))
    with pytest.raises(InputError, match="--data: missing"):
        prepare(dataclasses.replace(boxes_configs.pictograms(), storage=run.storage, captions=path))
    assert not Path(run.storage).exists()


def test_a_published_config_refuses_to_make_captions_up(tmp_path: Path) -> None:
    run = photos(tmp_path)
    for config in ("coco_r50", "lvis_swin_b"):
        with pytest.raises(InputError, match=r"--data .*: no captions, expected captions\.tsv or COCO's captions_"):
            prepare_captions(run, "coco", config)
    assert not Path(run.storage).exists()


@pytest.mark.ray
def test_drawn_scenes_do_not_depend_on_their_number(ray_cluster: None, tmp_path: Path) -> None:
    run = dataclasses.replace(boxes_configs.smoke(), storage=str(tmp_path), train_images=9, eval_images=4)
    prepare(run)
    train = read(run, "train")
    assert [row["source_id"] for row in train] == list(range(9))
    for row in train:
        with Image.open(tmp_path / row["uri"]) as image:
            assert image.size == (row["width"], row["height"])
    fewer = dataclasses.replace(run, name="few", train_images=3)
    prepare(fewer)
    assert [row["image_id"] for row in read(fewer, "train")] == [row["image_id"] for row in train[:3]]


def test_what_is_odd_is_in_the_manifest_and_on_the_page_and_refused_if_strict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = photos(tmp_path)
    path = Path(run.data) / "instances.json"
    content = json.loads(path.read_text())
    content["annotations"].append({"image_id": 99, "category_id": 1, "bbox": [1, 1, 5, 5]})
    del content["images"][0]["width"]
    content["images"].append({"id": 77, "file_name": "none.png", "width": 64, "height": 64})
    path.write_text(json.dumps(content))
    strict = dataclasses.replace(run, strict=True)
    with pytest.raises(InputError, match=r"--strict: mended: 1 images without a size \(0\.png\); left out: 1 annot"):
        prepare(strict)
    assert not Path(run.storage, "boxes").exists()
    prepare(run)
    shown = capsys.readouterr().out
    assert (
        "instances.json: left out: 1 annotations of unknown images (annotations[9]), 1 missing pictures (none" in shown
    )
    account = tables.read_manifest(run.storage, "boxes", "photos-train").details["account"]
    assert [(row["fate"], row["kind"], row["count"]) for row in account] == [
        ("mended", "images without a size", 1),
        ("left out", "annotations of unknown images", 1),
        ("left out", "missing pictures", 1),
    ]
    page = Path(run.storage, "reports/boxes-photos.html").read_text()
    assert all(row["kind"] in page and row["examples"] in page for row in account)
    assert page.count("data:image/jpeg") == len(read(run, "train")) + len(read(run, "eval")) == 6
    with pytest.raises(InputError, match="--strict: something was mended or left out, see `account`"):
        prepare(strict)


def test_pictures_of_both_parts_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = photos(tmp_path, eval_data=str(folder_of(tmp_path / "val", count=3)))
    prepare(run)
    assert "noted: 3 pictures for evaluation that are also trained on" in capsys.readouterr().out


def test_a_set_without_a_box_to_train_on_is_refused(tmp_path: Path) -> None:
    run = photos(tmp_path)
    path = Path(run.data) / "instances.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "annotations": []}))
    with pytest.raises(InputError, match="no boxes of base categories for training, expected at least one"):
        prepare(run)


def test_the_second_style_has_the_same_names_in_other_pictures(tmp_path: Path) -> None:
    sets = {}
    for name, config in (("first", boxes_configs.pictograms()), ("second", boxes_configs.second_style())):
        run = dataclasses.replace(config, storage=str(tmp_path / name), train_images=1, eval_images=3)
        prepare_boxes.prepare(run)
        boxes = tables.read_table(run.storage, "boxes", f"{run.name}-eval")
        names = tables.read_table(run.storage, "categories", run.name)["name"].to_pylist()
        sets[name] = (names, boxes["image_id"].to_pylist())
    assert sets["first"][0] == sets["second"][0]
    assert not set(sets["first"][1]) & set(sets["second"][1])


def test_all_names_can_stay_base(tmp_path: Path) -> None:
    run = Run(storage=str(tmp_path / "store"), name="own", data=str(folder_of(tmp_path / "data")), train_images=0)
    prepare(dataclasses.replace(run, eval_images=2, split="none"))
    categories, splits = read_categories(run.storage, "own")
    assert set(splits.values()) == {"base"}
    assert sorted(categories.values()) == sorted(NAMES)
