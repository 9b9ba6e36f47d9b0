import json
from pathlib import Path

import pytest

from data_prep.pairs.labels import class_rows, label_caption, name_classes, read_class_names
from ovd_models.errors import InputError


def folder_of(root: Path, *paths: str) -> str:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"image")
    return str(root)


def test_a_folder_of_class_folders_becomes_rows(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "fire_truck/1.JPEG", "fire_truck/2.png", "dog/1.jpg", "dog/notes.txt")
    assert class_rows(folder).to_pylist() == [
        {"url": f"{tmp_path}/dog/1.jpg", "label": "dog"},
        {"url": f"{tmp_path}/fire_truck/1.JPEG", "label": "fire_truck"},
        {"url": f"{tmp_path}/fire_truck/2.png", "label": "fire_truck"},
    ]
    assert name_classes(["dog", "fire_truck", "dog"], "", "here") == ["dog", "fire truck", "dog"]
    assert label_caption("fire truck") == "a photo of a fire truck"
    assert label_caption("umbrella") == "a photo of an umbrella"
    assert name_classes([], "", "here") == []


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("names.tsv", "n01440764\ttench, Tinca tinca\n\n0\tgreat white shark\n"),
        ("LOC_synset_mapping.txt", "n01440764 tench, Tinca tinca\n0\tgreat white shark\n"),
        ("names.json", json.dumps({"n01440764": "Tench", "0": ["great white shark", "white shark"]})),
    ],
)
def test_names_of_ids_come_from_a_file(tmp_path: Path, file: str, content: str) -> None:
    (tmp_path / file).write_text(content)
    assert name_classes(["0", "n01440764"], str(tmp_path / file), "here") == ["great white shark", "tench"]


def test_the_class_index_of_imagenet_names_numbers_and_ids(tmp_path: Path) -> None:
    (tmp_path / "i.json").write_text(json.dumps({"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"]}))
    assert read_class_names(str(tmp_path / "i.json")) == {
        "0": "tench", "n01440764": "tench", "1": "goldfish", "n01443537": "goldfish",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["dog", "n01440764"], "here: class 'n01440764' is an id, expected --columns.class-names with lines of"),
        (["7"], "here: class '7' is an id"),
        (["dog", " "], "here: row 11: no class, expected one for each image"),
        ([None], "here: row 10: no class"),
    ],
)
def test_classes_without_a_name_are_refused(classes: list[str | None], message: str) -> None:
    with pytest.raises(InputError) as caught:
        name_classes(classes, "", "here", first=10)
    assert message in str(caught.value)


def test_ids_that_the_file_lacks_are_refused(tmp_path: Path) -> None:
    (tmp_path / "n.tsv").write_text("n1\tdog\n")
    with pytest.raises(InputError, match=r"here: class 'n2' is not in .*n\.tsv, expected ids such as 'n1'"):
        name_classes(["n1", "n2"], str(tmp_path / "n.tsv"), "here")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("n.tsv", b"n1\tdog\njust words\n", "n.tsv: line 2 is 'just words', expected lines of an id, a tab and a name"),
        ("n.tsv", b"", "n.tsv: holds no names"),
        ("n.tsv", b"\xff\xfe", "n.tsv: "),
        ("n.json", b"{", "n.json: "),
        ("n.json", b"[1]", "n.json: "),
        ("n.json", b'{"a": 3}', "n.json: the name of 'a' is 3, expected"),
        ("n.json", b'{"a": []}', "n.json: the name of 'a' is [], expected"),
        ("none.tsv", None, "none.tsv: "),
    ],
)
def test_a_file_of_other_content_is_refused(tmp_path: Path, file: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_class_names(str(tmp_path / file))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["a.jpg", "dog/1.jpg"], "a.jpg: not in a class folder, expected"),
        (["train/dog/1.jpg"], "train/dog/1.jpg: not in a class folder, expected"),
        (["dog/notes.txt"], "no images, expected files with the extensions jpg, jpeg, jpe, "),
        (["n01440764/1.jpg"], "class 'n01440764' is an id"),
    ],
)
def test_a_folder_of_another_layout_is_refused(tmp_path: Path, paths: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        class_rows(folder_of(tmp_path, *paths))
    assert message in str(caught.value)
