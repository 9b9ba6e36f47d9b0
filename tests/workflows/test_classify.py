import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from data_prep import tables
from data_prep.embeddings.labelled import LabelledSet, read_boxes, read_labelled
from ovd_models.clip.model import Clip, ClipConfig, save_clip
from ovd_models.errors import InputError
from workflows import classify
from workflows.common import cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained CLIP, and a folder for each of three classes; one image is broken."""
    root = tmp_path_factory.mktemp("classify")
    torch.manual_seed(0)
    save_clip(Clip(ClipConfig()), root / "clip")
    rng = np.random.default_rng(0)
    for name, count in (("cat", 3), ("dog_house", 2), ("cow", 1)):
        (root / "data" / name).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(rng.integers(0, 255, (40, 60, 3), np.uint8)).save(root / "data" / name / f"{number}.png")
    (root / "data/cow/broken.jpg").write_bytes(b"no image")
    (root / "data/readme.txt").write_text("not a class")
    return root


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *flags: str) -> int:
    base = ["classify.py", "--storage", str(folder / "store"), "--model", str(folder / "clip")]
    monkeypatch.setattr(sys, "argv", [*base, *flags])
    return cli.outcome(classify.main)


def test_folders_are_classes(folder: Path) -> None:
    found = read_labelled(str(folder / "data"))
    assert found.names == ("cat", "cow", "dog house")
    assert [Path(uri).parent.name for uri in found.images] == ["cat"] * 3 + ["cow"] * 2 + ["dog_house"] * 2
    assert list(found.labels) == [0, 0, 0, 1, 1, 2, 2]
    assert [found.image_of(number) for number in (0, 6)] == [(0, 0), (6, 0)]
    assert list(found.first(4).labels) == [0, 0, 0, 1]


def test_a_list_has_files_and_labels_with_names(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "list.tsv").write_text(f"file\tlabel\n{folder}/data/cat/0.png\tn02\nx.png\tn01\n")
    (tmp_path / "names.tsv").write_text("n01\ttench\n\nn02\tgoldfish\n")
    found = read_labelled(str(tmp_path / "list.tsv"), (tmp_path / "names.tsv").as_uri())
    assert (found.names, list(found.labels)) == (("tench", "goldfish"), [1, 0])
    assert found.images == [f"{folder}/data/cat/0.png", str(tmp_path / "x.png")]


def test_boxes_are_examples_of_their_images(tmp_path: Path) -> None:
    box = [1.0, 1.0, 20.0, 20.0]
    rows = [
        {"source_id": n, "uri": f"{n}.jpg", "boxes": [box] * k, "category_ids": ids, "iscrowd": crowd}
        for n, k, ids, crowd in ((0, 2, [5, 9], [False, False]), (1, 1, [5], [True]), (2, 3, [9, 7, 5], [False] * 3))
    ]
    categories = [
        {"category_id": key, "name": f"n{key}", "split": split} for key, split in ((5, "base"), (7, ""), (9, "novel"))
    ]
    for table, name, content in (("boxes", "t-eval", rows), ("categories", "t", categories)):
        schema = tables.SCHEMAS[table]
        part = pa.Table.from_pylist([{field: row.get(field) for field in schema.names} for row in content], schema)
        entry = tables.write_part(str(tmp_path), table, name, "part-00000.parquet", part)
        tables.publish(str(tmp_path), table, name, [entry], producer="test", config_hash="0")
    found = read_boxes(str(tmp_path), "t-eval")
    assert found.names == ("n5", "n9")
    assert list(found.labels) == [0, 1, 1, 0]
    assert [Path(uri).name for uri in found.images] == ["0.jpg", "2.jpg"]
    assert [found.image_of(number) for number in range(4)] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert list(found.examples_of(1)) == [2, 3]
    assert isinstance(replace(found, labels=[]), LabelledSet)


def test_prompts_are_compared_and_images_that_cannot_be_read_are_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.json"
    flags = ["--data", str(folder / "data"), "--prompts", "photo", "a drawing of {a}", "--top", "2"]
    assert run(monkeypatch, folder, *flags, "--output", str(output)) == 0
    numbers = json.loads(output.read_text())
    assert set(numbers) == {"photo", "a drawing of {a}"}
    assert all(0 <= row["top1"] <= row["topk"] <= 1 for row in numbers.values())
    text = capsys.readouterr().out
    assert "1 images that cannot be read" in text
    assert "6 examples of 3 names" in text
    page = (folder / "store/reports/classify-data.html").read_text()
    assert "dog house" in page


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--data, --boxes: expected one of them"),
        (["--data", "none"], "none: no such folder or list"),
        (["--boxes", "none-eval"], "no such table"),
        (["--data", "{folder}/data", "--prompts", "nonsense"], "prompt set 'nonsense': unknown"),
        (["--data", "{folder}/data", "--top", "0"], "--top 0: expected at least 1"),
        (["--data", "{folder}/data", "--model", "nowhere"], "nowhere: no CLIP checkpoint"),
    ],
)
def test_bad_input_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert run(monkeypatch, folder, *(flag.format(folder=folder) for flag in flags)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("content", "names", "message"),
    [
        ("file,label\n", "", "columns"),
        ("file\tlabel\n", "", "no images"),
        ("file\tlabel\na.png\t\n", "", "line 2: empty"),
        ("file\tlabel\na.png\tx\n", "y\tz\n", "no name of label 'x'"),
        ("file\tlabel\na.png\tx\nb.png\ty\n", "x\tcat\ny\tcat\n", "'cat' is the name of several labels"),
        ("file\tlabel\na.png\tx\n", "x cat\n", "line 1: 'x cat', expected a label, a tab and a name"),
    ],
)
def test_malformed_lists_are_named(content: str, names: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "list.tsv").write_text(content)
    (tmp_path / "names.tsv").write_text(names)
    with pytest.raises(InputError) as raised:
        read_labelled(str(tmp_path / "list.tsv"), str(tmp_path / "names.tsv") if names else "")
    assert message in str(raised.value)
