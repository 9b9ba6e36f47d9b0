# ruff: noqa: E501  # one line for each case
"""Further annotation files, written before the code that reads them was looked at."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from faster_coco_eval import mask as rle
from PIL import Image

from data_prep.boxes.annotations import read_captions
from data_prep.boxes.cleaning import Account
from data_prep.boxes.coco import read_annotations
from data_prep.boxes.pictures import add_pictures
from ovd_models.errors import InputError

Content = dict[str, Any]


def content(**changes: Any) -> Content:
    found: Content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 40, "height": 30}, {"id": 2, "file_name": "b.png", "width": 40, "height": 30}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 10, 10]}, {"id": 2, "image_id": 2, "category_id": 2, "bbox": [5, 5, 10, 10]}],
        "categories": [{"id": 1, "name": "gate"}, {"id": 2, "name": "post"}],
    }  # fmt: skip
    for path, value in changes.items():
        field, place, key = path.split("__")
        entry = found[field][int(place)]
        if value is ...:
            del entry[key]
        else:
            entry[key] = value
    return found


def plus(field: str, *entries: Any) -> Content:
    found = content()
    found[field] += entries
    return found


def read(folder: Path, found: Content | bytes, names: tuple[str, ...] = ("a.png", "b.png")) -> tuple[pa.Table, Account]:
    for number, name in enumerate(names):
        path = folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (number * 40, 90, 200)).save(path)
    file = folder / "instances.json"
    file.write_bytes(found if isinstance(found, bytes) else json.dumps(found).encode())
    account = Account(str(file))
    _, rows = read_annotations(file, str(folder / "images"), account)
    return add_pictures(rows, str(folder / "images"), str(file), account), account


BOX = [5.0, 5.0, 15.0, 15.0]
SAME: dict[str, Content] = {
    "negative ids": content(
        images__0__id=-1, annotations__0__image_id=-1, categories__0__id=-5, annotations__0__category_id=-5
    ),
    "zero ids": content(
        images__0__id=0, annotations__0__image_id=0, categories__0__id=0, annotations__0__category_id=0
    ),
    "whole fractions": content(images__0__id=1.0, annotations__0__image_id=1.0, annotations__0__category_id=1.0),
    "annotations of one id": content(annotations__1__id=1),
    "annotations without id": content(annotations__0__id=..., annotations__1__id=None),
    "box of text": content(annotations__0__bbox=["5", "5", "10", "10"]),
    "crowd null": content(annotations__0__iscrowd=None),
    "crowd false": content(annotations__0__iscrowd=False),
    "no mask": content(annotations__0__segmentation=[]),
    "null mask": content(annotations__0__segmentation=None),
    "empty part": content(annotations__0__segmentation=[[]]),
    "area null": content(annotations__0__area=None),
    "score": content(annotations__0__score=0.5, annotations__0__attributes={"occluded": False}),
    "supercategory number": content(categories__0__supercategory=None),
    "space behind the name": content(categories__0__name="gate\u00a0", categories__1__name="\tpost\n"),
    "dot folder": content(images__0__file_name="./a.png"),
    "folder twice": content(images__0__file_name="images//a.png"),
    "address": content(images__0__file_name="http://host/data/a.png"),
    "windows drive": content(images__0__file_name="D:\\x\\images\\a.png"),
    "bucket": content(images__0__file_name="s3://bucket/images/a.png"),
    "sizes as floats": content(images__0__width=40.0, images__0__height=30.0),
    "sizes of zero": content(images__0__width=0, images__0__height=0),
    "sizes of null": content(images__0__width=None, images__0__height=None),
    "copies of annotations' images": plus("images", {"id": 1, "file_name": "a.png", "width": 40, "height": 30}),
    "unused category": plus("categories", {"id": 9, "name": "lamp"}),
    "licence lists": content() | {"licenses": [{"id": 1, "url": None}], "info": None, "videos": []},
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_boxes_are_read(name: str, tmp_path: Path) -> None:
    rows, _ = read(tmp_path, SAME[name])
    assert rows["boxes"].to_pylist() == [[BOX], [BOX]]
    assert [Path(uri).name for uri in rows["uri"].to_pylist()] == ["a.png", "b.png"]


REFUSED: dict[str, Content | bytes] = {
    "ids of text": content(images__0__id="000001", annotations__0__image_id="000001"),
    "id true": content(images__0__id=True),
    "id null": content(images__0__id=None),
    "no id": content(images__0__id=...),
    "a list as id": content(categories__0__id=[1]),
    "image without file": content(images__0__file_name=...),
    "file null": content(images__0__file_name=None),
    "file number": content(images__0__file_name=7),
    "one file twice, with a dot": content(images__1__file_name="./a.png"),
    "one file twice, with a folder": content(images__1__file_name="x/../a.png"),
    "box of five": content(annotations__0__bbox=[5, 5, 10, 10, 0.5]),
    "box of corners": content(annotations__0__bbox=[[5, 5], [10, 10]]),
    "box of names": content(annotations__0__bbox={"x": 5, "y": 5, "w": 10, "h": 10}),
    "box null inside": content(annotations__0__bbox=[5, 5, None, 10]),
    "points as pairs": content(annotations__0__segmentation=[[[5, 5], [15, 5], [15, 15]]]),
    "mask of text": content(annotations__0__segmentation="5 5 15 5 15 15"),
    "run lengths too short": content(annotations__0__segmentation={"size": [30, 40], "counts": [100, 10]}),
    "run lengths too long": content(annotations__0__segmentation={"size": [30, 40], "counts": [100, 10, 99999]}),
    "run lengths negative": content(annotations__0__segmentation={"size": [30, 40], "counts": [-5, 1205]}),
    "mask of another size": content(annotations__0__segmentation={"size": [40, 30], "counts": [600, 100, 500]}),
    "packed garbage": content(annotations__0__segmentation={"size": [30, 40], "counts": "\u00ff\u00ff~~"}),
    "no counts": content(annotations__0__segmentation={"size": [30, 40]}),
    "name number": content(categories__0__name=7),
    "name empty": content(categories__0__name=""),
    "name of spaces": content(categories__0__name=" \u200b "),
    "names of two forms": content(categories__0__name="caf\u00e9", categories__1__name="cafe\u0301"),
    "names of two cases": content(categories__0__name="Stra\u00dfe", categories__1__name="STRASSE"),
    "names with two spaces": content(categories__0__name="fire  hydrant", categories__1__name="fire hydrant"),
    "no categories": {key: value for key, value in content().items() if key != "categories"},
    "one file twice, with a slash": content(images__1__file_name="a.png/"),
    "a list of annotations": json.dumps(content()["annotations"]).encode(),
    "lines": b"\n".join(json.dumps(entry).encode() for entry in content()["annotations"]),
    "cut": json.dumps(content()).encode()[:-40],
    "comma": json.dumps(content()).encode()[:-1] + b",}",
    "comments": b"// exported\n" + json.dumps(content()).encode(),
    "latin-1": json.dumps(content(categories__0__name="caf\u00e9"), ensure_ascii=False).encode("latin-1"),
    "huge number": json.dumps(content()).encode().replace(b"[5, 5, 10, 10]", b"[5, 5, 1e400, 10]", 1),
    "infinity beside": json.dumps(content(annotations__0__score=float("inf"))).encode(),
    "nesting": b"[" * 200_000,
    "nothing": b"",
    "zeros": b"\0" * 99,
    "images an object": json.dumps(content() | {"images": {"1": content()["images"][0]}}).encode(),
    "crowd text": content(annotations__0__iscrowd="no"),
    "all unknown images": content(annotations__0__image_id=7, annotations__1__image_id=8),
    "a control sign as a name": content(images__0__file_name="a\0.png"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_one_meaning_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"instances\.json") as caught:
        read(tmp_path, REFUSED[name])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


LEFT_OUT: dict[str, tuple[Content, str]] = {
    "width negative": (plus("annotations", {"id": 3, "image_id": 1, "category_id": 1, "bbox": [5, 5, -3, 4]}), "area"),
    "box outside": (plus("annotations", {"id": 3, "image_id": 1, "category_id": 1, "bbox": [90, 5, 3, 4]}), "outside"),
    "unknown image": (plus("annotations", {"id": 3, "image_id": 7, "category_id": 1, "bbox": [5, 5, 3, 4]}), "image"),
    "unknown category": (plus("annotations", {"id": 3, "image_id": 1, "category_id": 7, "bbox": [5, 5, 3, 4]}), "categor"),
    "missing picture": (plus("images", {"id": 3, "file_name": "c.png", "width": 40, "height": 30}), "missing"),
    "name too long": (plus("images", {"id": 3, "file_name": "c" * 400 + ".png", "width": 40, "height": 30}), "read"),
    "name of a folder": (plus("images", {"id": 3, "file_name": ".", "width": 40, "height": 30}), "read"),
    "outside the folder": (plus("images", {"id": 3, "file_name": "../instances.json", "width": 40, "height": 30}), "missing"),
    "another size": (plus("images", {"id": 3, "file_name": "sub/d.png", "width": 41, "height": 30}), "size"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_cannot_be_used_is_left_out_and_counted(name: str, tmp_path: Path) -> None:
    found, kind = LEFT_OUT[name]
    rows, account = read(tmp_path, found, ("a.png", "b.png", "sub/d.png"))
    assert rows["boxes"].to_pylist()[:2] == [[BOX], [BOX]]
    assert rows.num_rows == 2
    assert any(kind in row["kind"] for row in account.to_rows()), account.to_rows()
    with pytest.raises(InputError):
        account.check_strict()


SQUARE = [5, 5, 15, 5, 15, 15, 5, 15]
MASKS: dict[str, Any] = {
    "whole": [SQUARE],
    "fractions": [[5.0, 5.0, 15.0, 5.0, 15.0, 15.0, 5.0, 15.0]],
    "closed": [[*SQUARE, 5, 5]],
    "backwards": [[5, 15, 15, 15, 15, 5, 5, 5]],
    "an empty part beside": [[], SQUARE],
    "a line beside": [[1, 1, 2, 2], SQUARE],
    "a point beside": [SQUARE, [1, 1]],
    "half a point more beside": [SQUARE, [1, 1, 3, 1, 3, 3, 9]],
    "twice": [SQUARE, SQUARE],
    "flat": SQUARE,
    "run lengths": {"size": [30, 40], "counts": [155, *[10, 20] * 9, 10, 765]},
    "run lengths as fractions": {"size": [30.0, 40.0], "counts": [155.0, *[10.0, 20.0] * 9, 10.0, 765.0]},
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_is_the_square(name: str, tmp_path: Path) -> None:
    rows, _ = read(tmp_path, content(annotations__0__segmentation=MASKS[name]))
    (mask,) = rows["masks"].to_pylist()[0]
    counts = mask if isinstance(mask, str) else mask["counts"]
    pixels = rle.decode({"size": [30, 40], "counts": counts.encode()})
    assert pixels.sum() == 100
    assert pixels[5:15, 5:15].sum() == 100


def test_files_that_differ_in_case_are_two(tmp_path: Path) -> None:
    rows, _ = read(tmp_path, content(images__1__file_name="A.png"), ("a.png", "A.png"))
    assert [Path(uri).name for uri in rows["uri"].to_pylist()] == ["a.png", "A.png"]


@pytest.mark.parametrize(
    "name",
    [
        "a b.png",
        "a%20b.png",
        "a#b.png",
        "a?b.png",
        "100%.png",
        "\u5716.png",
        "'a'.png",
        "-a.png",
        "a.b.png",
        "a\\b.png",
        "a.PNG",
        "a",
    ],
)
def test_pictures_of_any_name(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    with (folder / name).open("wb") as file:
        Image.new("RGB", (40, 30)).save(file, "PNG")
    rows, _ = read(tmp_path, content(images__0__file_name=name), ("b.png",)) if name != "b.png" else (None, None)
    assert rows is not None
    assert Path(rows["uri"].to_pylist()[0]).name == name


@pytest.mark.parametrize("kind", ["loop", "dangling", "folder", "empty file"])
def test_what_is_no_file_is_left_out(kind: str, tmp_path: Path) -> None:
    place = tmp_path / "images" / "c.png"
    place.parent.mkdir()
    if kind == "loop":
        place.symlink_to("c.png")
    elif kind == "dangling":
        place.symlink_to("nowhere.png")
    elif kind == "folder":
        place.mkdir()
    else:
        place.touch()
    rows, account = read(tmp_path, plus("images", {"id": 3, "file_name": "c.png", "width": 40, "height": 30}))
    assert rows.num_rows == 2
    assert account


CAPTIONS: dict[str, bytes] = {
    "tabs": b"file_name\tcaption\na.png\tone\nb.png\ttwo\n",
    "crlf": b"file_name\tcaption\na.png\tone\r\nb.png\ttwo\r\n",
    "blank lines": b"file_name\tcaption\n\na.png\tone\n\nb.png\ttwo\n\n",
    "mark": b"\xef\xbb\xbffile_name\tcaption\na.png\tone\nb.png\ttwo\n",
    "other order": b"file_name\tcaption\nb.png\ttwo\na.png\tone\n",
    "a folder": b"file_name\tcaption\nimages/a.png\tone\nimages/b.png\ttwo\n",
    "backslashes": b"file_name\tcaption\nx\\a.png\tone\nx\\b.png\ttwo\n",
    "a picture more": b"file_name\tcaption\na.png\tone\nb.png\ttwo\nc.png\tthree\n",
    "columns in another order": b"caption\tfile_name\none\ta.png\ntwo\tb.png\n",
}


@pytest.mark.parametrize("name", CAPTIONS)
def test_captions_by_file_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "captions.tsv").write_bytes(CAPTIONS[name])
    assert read_captions([tmp_path / "captions.tsv"], ["a.png", "b.png"]) == ["one", "two"]


@pytest.mark.parametrize(
    "text",
    [
        b"a.png one\nb.png two\n",
        b"a.png\tone\na.png\ttwo\nb.png\tx\n",
        b"x/a.png\tone\ny/a.png\ttwo\nb.png\tx\n",
        b"a.png\tone\n",
        b"a.png\tcaf\xe9\nb.png\ttwo\n",
        b"",
    ],
)
def test_captions_that_are_unclear(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "captions.tsv").write_bytes(text)
    with pytest.raises(InputError, match=r"captions\.tsv|a\.png|b\.png") as caught:
        read_captions([tmp_path / "captions.tsv"], ["a.png", "b.png"])
    assert "\n" not in str(caught.value)
