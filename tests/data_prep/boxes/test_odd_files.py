# ruff: noqa: E501  # one line for each case
"""Annotation files as label tools and people write them: what is mended, left out or refused."""

import copy
import json
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from faster_coco_eval import mask as rle
from PIL import Image
from reference import REFERENCE
from reference_data import needs

from data_prep.boxes.annotations import read_captions
from data_prep.boxes.cleaning import Account
from data_prep.boxes.coco import BoxSet, box_set, read_annotations
from data_prep.boxes.pictures import add_pictures
from ovd_models.errors import InputError

Content = dict[str, Any]
TRIANGLE = [5, 5, 25, 5, 25, 25]


def content() -> Content:
    """Two pictures of 40 x 30 with a box of each of two categories."""
    return {
        "images": [
            {"id": 1, "file_name": "a.png", "width": 40, "height": 30},
            {"id": 2, "file_name": "b.png", "width": 40, "height": 30},
        ],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 10, 10]},
            {"id": 2, "image_id": 2, "category_id": 2, "bbox": [5, 5, 10, 10]},
        ],
        "categories": [{"id": 1, "name": "gate"}, {"id": 2, "name": "post"}],
    }


def changed(*path: Any, value: Any) -> Content:
    """`content` with one value replaced, or removed if it is None of `REMOVED`."""
    found = content()
    place: Any = found
    for key in path[:-1]:
        place = place[key]
    if value is REMOVED:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return found


REMOVED = object()


def more(field: str, *entries: Any) -> Content:
    """`content` with further entries."""
    found = content()
    found[field] += entries
    return found


def write(folder: Path, found: Content | bytes, names: tuple[str, ...] = ("a.png", "b.png")) -> Path:
    """A folder with an annotation file and its pictures."""
    for number, name in enumerate(names):
        path = folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (number * 40, 90, 200)).save(path)
    file = folder / "instances.json"
    file.write_bytes(found if isinstance(found, bytes) else json.dumps(found).encode())
    return file


def read(file: Path) -> tuple[BoxSet, Account]:
    """The tables and the account of such a folder."""
    account = Account(str(file))
    images = str(file.parent / "images")
    categories, rows = read_annotations(file, images, account)
    return box_set(categories, add_pictures(rows, images, str(file), account)), account


def found_kinds(account: Account) -> dict[str, str]:
    return {str(row["kind"]): str(row["fate"]) for row in account.to_rows()}


def test_a_whole_file_has_nothing_odd(tmp_path: Path) -> None:
    boxes, account = read(write(tmp_path, content()))
    assert not account
    assert account.to_rows() == []
    account.check_strict()
    assert boxes.boxes["boxes"].to_pylist() == [[[5, 5, 15, 15]]] * 2


# ------------------------------------------------------------------------------------------------------------ identity

IDENTITY: dict[str, tuple[Content, str]] = {
    "two images of one id": (
        changed("images", 1, "id", value=1),
        "images[0] (a.png) and images[1] (b.png) have the id 1, expected an id for each",
    ),
    "two images of one id, as text": (
        changed("images", 1, "id", value="1"),
        "images[0] (a.png) and images[1] (b.png) have the id 1",
    ),
    "two images of one id, as a fraction": (
        changed("images", 1, "id", value=1.0),
        "images[0] (a.png) and images[1] (b.png) have the id 1",
    ),
    "one image with two sizes": (
        more("images", {"id": 1, "file_name": "a.png", "width": 30, "height": 40}),
        "images[0] (a.png) and images[2] (a.png) have the id 1",
    ),
    "an image's id is a fraction": (changed("images", 0, "id", value=1.2), "Expected `int`, got `float` - at `$.images[0]"),
    "an annotation's image is a fraction": (
        changed("annotations", 1, "image_id", value=1.7),
        "Expected `int`, got `float` - at `$.annotations[1].image_id`",
    ),
    "an id is a word": (changed("images", 0, "id", value="a"), "Expected `int`, got `str` - at `$.images[0].id`"),
    "an id is null": (changed("images", 0, "id", value=None), "Expected `int`, got `null` - at `$.images[0].id`"),
    "an id above 64 bits": (changed("images", 1, "id", value=2**64 - 5), "images[1]: id 18446744073709551611, expected"),
    "an id of 63 bits and one": (changed("images", 1, "id", value=2**63), "images[1]: id 9223372036854775808, expected"),
    "an id of a UUID": (changed("images", 1, "id", value=int("f" * 32, 16)), "images[1]: id 3402823669209384634"),
    "a category's id above 32 bits": (
        changed("categories", 1, "id", value=2**31),
        "categories[1]: id 2147483648, expected at most 2147483647",
    ),
    "two categories of one id": (
        changed("categories", 1, "id", value=1),
        "categories[0] (gate) and categories[1] (post) have the id 1",
    ),
    "two images of one file": (
        changed("images", 1, "file_name", value="a.png"),
        "images[0] (id 1) and images[1] (id 2) are of the file a.png",
    ),
    "two images of one file by other paths": (
        changed("images", 1, "file_name", value="./images/a.png"),
        "images with the ids 1 and 2 are of the file",
    ),
    "two images of one file by case": (
        changed("images", 1, "file_name", value="A.PNG"),
        "images with the ids 1 and 2 are of the file",
    ),
    "two categories of one name": (
        changed("categories", 1, "name", value="gate"),
        "categories[0] (id 1) 'gate' and categories[1] (id 2) 'gate' have one name",
    ),
    "two categories of one name and a space": (
        changed("categories", 1, "name", value=" gate "),
        "categories[0] (id 1) 'gate' and categories[1] (id 2) ' gate ' have one name",
    ),
    "two categories of one name in capitals": (
        changed("categories", 1, "name", value="Gate"),
        "categories[0] (id 1) 'gate' and categories[1] (id 2) 'Gate' have one name",
    ),
    "a name is null": (changed("categories", 0, "name", value=None), "categories[0] (id 1): name null, expected a word"),
    "a name is empty": (changed("categories", 0, "name", value=""), "categories[0] (id 1): name '', expected a word"),
    "a name is blank": (changed("categories", 0, "name", value=" \t"), "categories[0] (id 1): name ' \\t', expected"),
    "a name is a sign": (changed("categories", 1, "name", value="+"), "categories[1] (id 2): name '+', expected a word"),
    "a name is missing": (changed("categories", 1, "name", value=REMOVED), "categories[1] (id 2): name null, expected"),
    "a name is a number": (changed("categories", 1, "name", value=7), "Expected `str | null`, got `int`"),
    "no images": (changed("images", value=[]), "images is empty, expected at least one"),
    "an image without a file": (changed("images", 0, "file_name", value=""), "image 1: no file_name and no coco_url"),
    "an image whose file is null": (changed("images", 0, "file_name", value=None), "image 1: no file_name and no"),
    "boxes are fractions": (
        changed("annotations", value=[{"image_id": 1, "category_id": 1, "bbox": [0.1, 0.1, 0.5, 0.5]}]),
        "every bbox is within 0 and 1, expected x, y, width and height in pixels",
    ),
    "a bbox of two numbers": (changed("annotations", 1, "bbox", value=[1, 2]), "annotations[1]: bbox of 2 numbers"),
    "a bbox with a null": (changed("annotations", 1, "bbox", value=[1, 2, None, 4]), "at `$.annotations[1].bbox[2]`"),
    "most annotations of unknown images": (
        changed("annotations", value=[{"image_id": 9, "category_id": 1, "bbox": [5, 5, 9, 9]}]),
        "annotations[0]: image_id 9 is not in images",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", IDENTITY)
def test_what_has_two_meanings_is_refused_in_a_line_that_names_the_rows(name: str, tmp_path: Path) -> None:
    found, message = IDENTITY[name]
    with pytest.raises(InputError) as caught:
        read(write(tmp_path, found))
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


NOT_FINITE = {
    "annotations[0].bbox[2] is nan": ("annotations", 0, "bbox", [5, 5, float("nan"), 9]),
    "annotations[1].bbox[0] is inf": ("annotations", 1, "bbox", [float("inf"), 5, 5, 9]),
    "annotations[0].bbox[1] is -inf": ("annotations", 0, "bbox", [5, float("-inf"), 5, 9]),
    "annotations[0].segmentation[0][2] is nan": ("annotations", 0, "segmentation", [[5, 5, float("nan"), 5, 15, 15]]),
    "annotations[0].segmentation[1][0] is inf": ("annotations", 0, "segmentation", [TRIANGLE, [float("inf")] * 6]),
    "annotations[1].area is nan": ("annotations", 1, "area", float("nan")),
    "images[0].width is nan": ("images", 0, "width", float("nan")),
    "images[1].height is inf": ("images", 1, "height", float("inf")),
    "annotations[0].score is -inf": ("annotations", 0, "score", float("-inf")),
    "categories[0].weight is nan": ("categories", 0, "weight", float("nan")),
}


@pytest.mark.parametrize("message", NOT_FINITE)
def test_numbers_that_are_not_finite_are_refused_with_their_place(message: str, tmp_path: Path) -> None:
    *path, value = NOT_FINITE[message]
    with pytest.raises(InputError, match=f"^{tmp_path}/instances.json: ") as caught:
        read(write(tmp_path, changed(*path, value=value)))
    assert f"{message}, expected a finite number" in str(caught.value)


def test_a_number_too_large_for_a_float_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Number out of range"):
        read(write(tmp_path, json.dumps(content()).replace("[5, 5, 10, 10]", "[5, 5, 1e999, 10]", 1).encode()))


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: b"\xef\xbb\xbf" + text.encode(),
        lambda text: text.encode("utf-16"),
        lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
        lambda text: text.replace("{", "\n{").replace("\n", "\r\n").encode(),
    ],
)
def test_byte_order_marks_and_line_ends_do_not_matter(encode: Callable[[str], bytes], tmp_path: Path) -> None:
    boxes, account = read(write(tmp_path, encode(json.dumps(content()))))
    assert (boxes.boxes.num_rows, bool(account)) == (2, False)


# ------------------------------------------------------------------------------------------------------------- mending


def with_mask(shape: Any, **fields: Any) -> Content:
    found = content()
    found["annotations"][0] |= {"segmentation": shape, **fields}
    return found


def without_box(shape: Any, box: Any = REMOVED) -> Content:
    found = with_mask(shape, bbox=box)
    if box is REMOVED:
        del found["annotations"][0]["bbox"]
    return found


RLE = {"size": [30, 40], "counts": [5 * 30 + 5, *[10, 20] * 9, 10, 30 * 40 - 5 * 30 - 5 - 9 * 30 - 10]}
FLOATS = {"size": [30.0, 40.0], "counts": [float(count) for count in RLE["counts"]]}
FROM_MASK = "boxes taken from their masks"
SIZE = "images without a size"
PATHS = "paths of pictures"

MENDED: dict[str, tuple[Content, str, str]] = {
    "width and height are missing": (changed("images", 0, value={"id": 1, "file_name": "a.png"}), SIZE, "mended"),
    "width is missing": (changed("images", 0, "width", value=REMOVED), SIZE, "mended"),
    "height is null": (changed("images", 0, "height", value=None), SIZE, "mended"),
    "width is -1": (changed("images", 0, "width", value=-1), SIZE, "mended"),
    "width is 0": (changed("images", 0, "width", value=0), SIZE, "mended"),
    "height is -1 as text": (changed("images", 0, "height", value="-1"), SIZE, "mended"),
    "no bbox beside polygons": (without_box([[5, 5, 15, 5, 15, 15, 5, 15]]), FROM_MASK, "mended"),
    "bbox is null": (without_box([[5, 5, 15, 5, 15, 15, 5, 15]], None), FROM_MASK, "mended"),
    "bbox is empty": (without_box([[5, 5, 15, 5, 15, 15, 5, 15]], []), FROM_MASK, "mended"),
    "no bbox beside run lengths": (without_box(RLE), FROM_MASK, "mended"),
    "a flat polygon": (with_mask([5, 5, 15, 5, 15, 15, 5, 15]), "polygons without the list around them", "mended"),
    "run lengths are fractions": (with_mask(FLOATS), "run lengths written as fractions", "mended"),
    "an images/ prefix": (changed("images", 0, "file_name", value="images/a.png"), PATHS, "mended"),
    "a path of Windows": (changed("images", 0, "file_name", value="images\\a.png"), PATHS, "mended"),
    "an absolute path of Windows": (changed("images", 0, "file_name", value="C:\\me\\images\\a.png"), PATHS, "mended"),
    "an absolute path": (changed("images", 0, "file_name", value="/home/me/set/images/a.png"), PATHS, "mended"),
    "a path from the annotations": (changed("images", 0, "file_name", value="../images/a.png"), PATHS, "mended"),
    "another case": (changed("images", 0, "file_name", value="A.PNG"), PATHS, "mended"),
    "a name with spaces around": (changed("categories", 0, "name", value=" gate\t"), "names with further spaces", "mended"),
    "a name with two spaces": (changed("categories", 0, "name", value="iron  gate"), "names with further spaces", "mended"),
    "an image twice": (more("images", copy.deepcopy(content()["images"][0])), "repeated entries of images", "mended"),
    "a category twice": (more("categories", {"id": 2, "name": "post"}), "repeated entries of categories", "mended"),
    "an annotation of an unknown image": (
        more("annotations", {"image_id": 99, "category_id": 1, "bbox": [5, 5, 9, 9]}),
        "annotations of unknown images", "left out",
    ),
    "an annotation of an unknown category": (
        more("annotations", {"image_id": 1, "category_id": 99, "bbox": [5, 5, 9, 9]}),
        "annotations of unknown categories", "left out",
    ),
    "a missing picture": (
        more("images", {"id": 3, "file_name": "c.png", "width": 40, "height": 30}), "missing pictures", "left out",
    ),
    "a missing picture without a size": (more("images", {"id": 3, "file_name": "c.png"}), "missing pictures", "left out"),
    "neither box nor mask": (
        more("annotations", {"image_id": 1, "category_id": 1}), "annotations without a box and a mask", "left out",
    ),
    "a box without area": (
        more("annotations", {"image_id": 1, "category_id": 1, "bbox": [5, 5, 0, 9]}), "boxes without area", "left out",
    ),
    "a box outside": (
        more("annotations", {"image_id": 1, "category_id": 1, "bbox": [50, 5, 9, 9]}),
        "boxes outside their image", "left out",
    ),
    "a root category": (
        {**content(), "categories": [
            {"id": 0, "name": "doors", "supercategory": "none"},
            {"id": 1, "name": "gate", "supercategory": "doors"}, {"id": 2, "name": "post", "supercategory": "doors"},
        ]},
        "categories that only group others", "left out",
    ),
    "a root category with a child's name": (
        {**content(), "categories": [
            {"id": 0, "name": "gate", "supercategory": "none"},
            {"id": 1, "name": "gate", "supercategory": "gate"}, {"id": 2, "name": "post", "supercategory": "gate"},
        ]},
        "categories that only group others", "left out",
    ),
    "polygon of two points": (with_mask([[5, 5, 15, 15]]), "polygons of fewer than three points, or of half a point", "left out"),
    "polygon of one point": (with_mask([[5, 5]]), "polygons of fewer than three points, or of half a point", "left out"),
    "polygon of an odd count": (with_mask([[5, 5, 15, 5, 15, 15, 9]]), "polygons of fewer than three points, or of half a point", "left out"),
    "polygon of one point thrice": (with_mask([[5, 5, 5, 5, 5, 5]]), "polygons of fewer than three points, or of half a point", "left out"),
    "polygon of two points in turn": (with_mask([[5, 5, 9, 9] * 3]), "polygons of fewer than three points, or of half a point", "left out"),
    "polygon far away": (with_mask([[5, 5, 1e9, 5, 15, 15]]), "polygons far outside their image", "left out"),
    "polygon far above": (with_mask([[5, 5, 15, -1e18, 15, 15]]), "polygons far outside their image", "left out"),
}  # fmt: skip


@pytest.mark.parametrize("name", MENDED)
def test_what_has_one_meaning_is_read_and_counted(name: str, tmp_path: Path) -> None:
    found, kind, fate = MENDED[name]
    boxes, account = read(write(tmp_path, found))
    assert found_kinds(account) == {kind: fate}
    rows = boxes.boxes.to_pylist()
    assert [row["source_id"] for row in rows] == [1, 2]
    assert [(row["width"], row["height"]) for row in rows] == [(40, 30)] * 2
    assert [row["boxes"] for row in rows] == [[[5, 5, 15, 15]]] * 2
    assert [row["category_ids"] for row in rows] == [[1], [2]]
    assert [row["name"] for row in boxes.categories.to_pylist()][-1] == "post"
    assert boxes.categories.num_rows == 2
    with pytest.raises(InputError, match=rf"instances.json: --strict: {fate}: 1 {kind} \(") as caught:
        account.check_strict()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("before", [[], [[5, 5, 15, 15]], [[5, 5]], [[]], [[1e9, 5, 5, 5, 9, 9]], [[5, 5, 15, 15]] * 3])
def test_a_degenerate_part_does_not_touch_the_others(before: list[list[float]], tmp_path: Path) -> None:
    good = [[5, 5, 25, 5, 25, 25], [2, 20, 12, 20, 12, 28, 2, 28]]
    expected = rle.decode(rle.merge(rle.frPyObjects(good, 30, 40)))
    for parts in ([*before, *good], [*good, *before], [good[0], *before, good[1]]):
        boxes, _ = read(write(tmp_path, with_mask(parts)))
        (counts,) = boxes.boxes["masks"][0].as_py()
        assert np.array_equal(rle.decode({"size": [30, 40], "counts": counts}), expected)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"size": [30, 40], "counts": [0.5, 1199.5]}, "run lengths that are not whole numbers"),
        ({"size": [30, 40], "counts": [-1, 1201]}, "run lengths that are not whole numbers"),
        ({"size": [30, 40], "counts": [100]}, "decoded 100 pixels but expected 1200"),
        ({"size": [30, 40], "counts": [5000]}, "RLE counts exceed the mask dimensions"),
        ({"size": [40, 30], "counts": [0, 1200]}, "mask of 40 x 30 in an image of 30 x 40"),
        ({"size": [30, 40]}, "missing required field `counts`"),
        ({"counts": [0, 1200]}, "missing required field `size`"),
        ([1, [2, 3]], "numbers beside lists"),
        ([["x"]], "Expected `float`, got `str`"),
        ([[[5, 5], [15, 5], [15, 15]]], "Expected `float`, got `array`"),
        (True, "got `bool`"),
    ],
)
def test_masks_that_do_not_fit_are_refused_with_their_image(shape: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"instances\.json: image 1: segmentation: ") as caught:
        read(write(tmp_path, with_mask(shape)))
    assert message in str(caught.value)


# --------------------------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("written", ["NFC", "NFD"])
def test_unicode_forms_of_names_do_not_matter(form: str, written: str, tmp_path: Path) -> None:
    name = "caf\u00e9 \u30ac.png"
    found = changed("images", 0, "file_name", value=unicodedata.normalize(written, name))  # type: ignore[arg-type]
    boxes, account = read(write(tmp_path, found, (unicodedata.normalize(form, name), "b.png")))  # type: ignore[arg-type]
    assert boxes.boxes.num_rows == 2
    assert bool(account) == (form != written)


@pytest.mark.parametrize(
    "name", ["a b.png", "100%.png", "a#1.png", "q?.png", "a&b;c.png", "[1].png", "~a.png", "-a.png"]
)
def test_any_character_may_be_in_a_name(name: str, tmp_path: Path) -> None:
    boxes, account = read(write(tmp_path, changed("images", 0, "file_name", value=name), (name, "b.png")))
    assert (boxes.boxes.num_rows, bool(account)) == (2, False)


def test_a_quoted_name_is_found(tmp_path: Path) -> None:
    found = changed("images", 0, "file_name", value="my%20pictures/a.png")
    assert read(write(tmp_path, found, ("my pictures/a.png", "b.png")))[0].boxes.num_rows == 2


ESCAPES = ["../../secret.png", "..\\..\\secret.png", "{root}/secret.png", "images/../../secret.png", "file://{root}/secret.png",
           "x/../../../secret.png", "/etc/hostname", "../secret.png", "//secret.png", "~/secret.png"]  # fmt: skip


@pytest.mark.parametrize("name", ESCAPES)
@pytest.mark.parametrize("field", ["file_name", "coco_url"])
def test_no_file_outside_the_folder_is_read(name: str, field: str, tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "secret.png")
    folder = tmp_path / "data"
    Image.new("RGB", (40, 30), "red").save((folder.mkdir(), folder / "secret.png")[1])
    found = more("images", {"id": 3, field: name.format(root=tmp_path), "width": 40, "height": 30})
    boxes, account = read(write(folder, found))
    assert boxes.boxes["source_id"].to_pylist() == [1, 2]
    assert found_kinds(account) == {"missing pictures": "left out"}


@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_only_regular_files_of_the_folder_are_read(kind: str, tmp_path: Path) -> None:
    file = write(tmp_path, more("images", {"id": 3, "file_name": "c.png", "width": 40, "height": 30}))
    path = tmp_path / "images/c.png"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    boxes, account = read(file)
    assert boxes.boxes["source_id"].to_pylist() == [1, 2]
    assert found_kinds(account) == {"pictures that cannot be read": "left out"}


@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_only_regular_annotation_files_are_read(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "instances.json"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(InputError, match=r"instances.json: cannot be read \(not a regular file\)"):
        read_annotations(path)


def test_a_picture_is_never_taken_from_another_folder(tmp_path: Path) -> None:
    found = changed("images", 0, "file_name", value="cam1/1.png")
    found["images"] += [{"id": 3, "file_name": "cam3/1.png", "width": 40, "height": 30}]
    boxes, account = read(write(tmp_path, found, ("cam1/1.png", "cam2/1.png", "b.png")))
    assert [row["uri"].removeprefix(f"{tmp_path}/images/") for row in boxes.boxes.to_pylist()] == [
        "cam1/1.png",
        "b.png",
    ]
    assert found_kinds(account) == {"missing pictures": "left out"}


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "size", "turned"])
def test_pictures_that_do_not_fit_are_left_out(damage: str, tmp_path: Path) -> None:
    file = write(tmp_path, more("images", {"id": 3, "file_name": "c.png", "width": 40, "height": 30}))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8))
    path = tmp_path / "images/c.png"
    noise.resize({"size": (41, 30), "turned": (30, 40)}.get(damage, (40, 30))).save(path)
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[:-500], "text": b"<html>", "empty": b""}.get(damage, whole))
    boxes, account = read(file)
    assert boxes.boxes["source_id"].to_pylist() == [1, 2]
    size = "pictures of another size than the file says"
    expected = size if damage in ("size", "turned") else "pictures that cannot be read"
    assert found_kinds(account) == {expected: "left out"}


def test_half_of_the_pictures_missing_is_a_wrong_folder(tmp_path: Path) -> None:
    file = write(tmp_path, content(), ("a.png",))
    with pytest.raises(InputError, match=r"b\.png: cannot be read .*named by .*\(1 of 2 pictures are left out\)"):
        read(file)


# ------------------------------------------------------------------------------------------------------------ captions


def captions(images: list[tuple[int, str]], texts: list[tuple[int, str | None]]) -> Content:
    return {
        "images": [{"id": key, "file_name": name} for key, name in images],
        "annotations": [{"image_id": key, "caption": text} for key, text in texts],
    }


TWO = [(1, "x/1.png"), (2, "y/1.png")]
CAPTIONED: dict[str, tuple[str | Content, list[str], list[str]]] = {
    "names with folders": ("x/1.png\tone\ny/1.png\ttwo\n", ["x/1.png", "y/1.png"], ["one", "two"]),
    "names with more folders": ("d/x/1.png\tone\nd/y/1.png\ttwo\n", ["x/1.png", "y/1.png"], ["one", "two"]),
    "names with fewer folders": ("1.png\tone\n2.png\ttwo\n", ["x/1.png", "y/2.png"], ["one", "two"]),
    "names of Windows": ("x\\1.png\tone\ny\\1.png\ttwo\n", ["x/1.png", "y/1.png"], ["one", "two"]),
    "names from here": ("./x/1.png\tone\n./y/1.png\ttwo\n", ["x/1.png", "y/1.png"], ["one", "two"]),
    "Windows's line ends": ("a.png\tone\r\nb.png\ttwo\r\n", ["a.png", "b.png"], ["one", "two"]),
    "empty lines": ("a.png\tone\n\nb.png\ttwo\n\n", ["a.png", "b.png"], ["one", "two"]),
    "a caption of 200,000 characters": (f"a.png\t{'x' * 200_000}\n", ["a.png"], ["x" * 200_000]),
    "a separator of lines in a caption": ("a.png\tone\u2028more\x0b\n", ["a.png"], ["one\u2028more\x0b"]),
    "quotes": ('a.png\t"one\nb.png\ttwo"\n', ["a.png", "b.png"], ['"one', 'two"']),
    "COCO's with folders": (captions(TWO, [(1, "one"), (2, "two")]), ["x/1.png", "y/1.png"], ["one.", "two."]),
    "COCO's with null": (captions(TWO, [(1, "one"), (1, None), (2, "two")]), ["x/1.png", "y/1.png"], ["one.", "two."]),
}  # fmt: skip


def write_captions(folder: Path, found: str | Content) -> Path:
    path = folder / ("captions.tsv" if isinstance(found, str) else "captions.json")
    text = f"file_name\tcaption\n{found}" if isinstance(found, str) else json.dumps(found)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    return path


@pytest.mark.parametrize("name", CAPTIONED)
def test_captions_are_found_by_their_file_name(name: str, tmp_path: Path) -> None:
    found, names, expected = CAPTIONED[name]
    assert read_captions([write_captions(tmp_path, found)], names) == expected


AMBIGUOUS: dict[str, tuple[str | Content, list[str], str]] = {
    "a name for two pictures": ("1.png\tone\n", ["x/1.png", "y/1.png"], "1.png may be x/1.png or y/1.png"),
    "a name with two captions": ("1.png\tone\n1.png\ttwo\n", ["1.png"], "line 3: 1.png has a caption above"),
    "a path with two captions": ("1.png\tone\n./1.png\ttwo\n", ["1.png"], "line 3: ./1.png has a caption above"),
    "two names for a picture": ("x/1.png\tone\ny/1.png\ttwo\n", ["1.png"], "no row for 1.png"),
    "a file of two images": (captions([(1, "1.png"), (2, "1.png")], [(1, "one"), (2, "two")]), ["1.png"],
                             "two images are of the file 1.png"),
    "an id of two images": (captions([(1, "a.png"), (1, "b.png")], [(1, "one")]), ["a.png"],
                            "images[0] (a.png) and images[1] (b.png) have the id 1"),
    "ids that are fractions": ({"images": [{"id": 1.2, "file_name": "a.png"}, {"id": 1.7, "file_name": "b.png"}],
                                "annotations": []}, ["a.png"], "Expected `int`, got `float` - at `$.images[0].id`"),
    "an unknown image": (captions([(1, "a.png")], [(9, "one")]), ["a.png"], "annotations[0]: image_id 9 is not in images"),
    "a ragged line": ("a.png\tone\ttwo\n", ["a.png"], "line 2: 3 columns, expected 2"),
    "no caption": ("a.png\tone\n", ["b.png"], "no row for b.png"),
    "only null": (captions([(1, "a.png")], [(1, None)]), ["a.png"], "no row for a.png"),
}  # fmt: skip


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_captions_of_two_pictures_are_refused(name: str, tmp_path: Path) -> None:
    found, names, message = AMBIGUOUS[name]
    path = write_captions(tmp_path, found)
    with pytest.raises(InputError) as caught:
        read_captions([path], names)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


# ------------------------------------------------------------------------------------------------------ reported files


@needs("cases")
@pytest.mark.parametrize("case", sorted(path.name for path in (REFERENCE / "cases/coco").glob("*")))
def test_reported_files_are_refused_or_read(case: str) -> None:
    file = REFERENCE / "cases/coco" / case / "instances.json"
    refused = {
        "big-image-id": "images[0]: id 18446744073709551611",
        "dup-category-id": "categories[0] (gate) and categories[1] (post) have the id 1",
        "dup-image-id": "images[0] (a.png) and images[1] (b.png) have the id 1",
        "null-name": "categories[0] (id 1): name null",
        "seg-nan": "annotations[0].segmentation[0][2] is nan",
        "space-name": "categories[0] (id 1) ' gate ' and categories[1] (id 2) 'gate' have one name",
    }
    if case in refused:
        with pytest.raises(InputError) as caught:
            read(file)
        assert refused[case] in str(caught.value)
        return
    boxes, account = read(file)
    assert boxes.boxes.num_rows == 2
    assert (
        found_kinds(account)
        == {
            "bom": {},
            "subfolders": {},
            "dup-category-name": {"categories that only group others": "left out"},
            "seg-2pts": {"polygons of fewer than three points, or of half a point": "left out"},
            "seg-2pts-then-poly": {"polygons of fewer than three points, or of half a point": "left out"},
        }[case]
    )


def test_an_account_names_three_places_of_a_kind() -> None:
    account = Account("a.json")
    for number in range(5):
        account.add("left out", "boxes without area", f"{number}.jpg")
    assert account.to_rows() == [
        {
            "file": "a.json",
            "fate": "left out",
            "kind": "boxes without area",
            "count": 5,
            "examples": "0.jpg, 1.jpg, 2.jpg",
        }
    ]
    assert pa.Table.from_pylist(account.to_rows()).num_rows == 1
