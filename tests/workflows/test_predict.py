import dataclasses
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from serving import save_detector, save_segmenter, save_text_segmenter

from ovd_models.errors import InputError
from ovd_models.segments import Segments
from workflows import predict
from workflows.predict import Run


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_detector(tmp_path_factory.mktemp("model")))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    for name, size in (("a.png", (80, 60)), ("below/b.jpg", (50, 90))):
        Image.effect_noise(size, 80).convert("RGB").save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_a_folder_becomes_drawings_a_coco_file_and_a_page(detector: str, pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run = Run(model=detector, images=str(pictures), names="anchor, umbrella", output=str(output), score_threshold=0.0)
    shown, skipped = predict.write_results(run)
    assert [entry.file_name for entry in shown] == ["a.png", "below/b.jpg"]
    assert not skipped
    coco = json.loads((output / "predictions.json").read_text())
    assert [(entry["file_name"], entry["width"], entry["height"]) for entry in coco["images"]] == [
        ("a.png", 80, 60),
        ("below/b.jpg", 50, 90),
    ]
    assert [entry["name"] for entry in coco["categories"]] == ["anchor", "umbrella"]
    ids = [entry["id"] for entry in coco["annotations"]]
    assert ids == list(range(1, len(ids) + 1))
    assert sum(sum(entry.found.values()) for entry in shown) == len(ids) > 0
    page = (output / "index.html").read_text()
    for entry in shown:
        assert Image.open(output / entry.drawing).width
        assert entry.drawing in page


def test_a_broken_picture_among_good_ones_is_named_and_the_rest_goes_on(
    detector: str, pictures: Path, tmp_path: Path
) -> None:
    (pictures / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    run = Run(model=detector, images=str(pictures), output=str(tmp_path / "out"))
    shown, skipped = predict.write_results(run)
    assert len(shown) == 2
    assert skipped.counts == {"pictures that cannot be read": 1}
    assert "broken.png" in str(skipped)
    alone = Run(model=detector, images=str(pictures / "broken.png"), output=str(tmp_path / "alone"))
    with pytest.raises(InputError, match=r"1 pictures that cannot be read .*broken\.png.*at least one readable"):
        predict.write_results(alone)
    assert not Path(alone.output).exists()


@pytest.mark.parametrize("kind", [save_segmenter, save_text_segmenter])
def test_models_with_masks_give_them_for_a_pattern_of_files(kind: object, pictures: Path, tmp_path: Path) -> None:
    assert callable(kind)
    run = Run(model=str(kind(tmp_path / "model")), images=f"{pictures}/*.png", names="anchor", output=f"{tmp_path}/out")
    shown, _ = predict.write_results(run)
    coco = json.loads((tmp_path / "out/predictions.json").read_text())
    assert [entry.file_name for entry in shown] == ["a.png"]
    assert all(entry["segmentation"]["size"] == [60, 80] for entry in coco["annotations"])


def test_names_whose_masks_are_empty_are_said_to_be() -> None:
    masks = torch.zeros(3, 4, 4, dtype=torch.bool)
    masks[1, 1, 1] = True
    nothing = torch.zeros(3)
    segments = Segments(masks, nothing, torch.arange(3), nothing, ("anchor", "cat", "dog"), torch.zeros(3, 2, 2))
    summary = predict.summarise("a.jpg", Path("drawn/a.jpg.jpg"), segments)
    assert (summary.found, summary.note) == ({"cat": 1}, "no mask for anchor, dog")
    none = dataclasses.replace(segments[:0], reason="0 of 64 clicks ...")
    assert predict.summarise("a.jpg", Path("drawn/a.jpg.jpg"), none).note == "0 of 64 clicks ..."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": ""}, "--images: missing"),
        ({"images": "/nothing/*.jpg"}, r"--images /nothing/\*\.jpg: no picture matches"),
        ({"names": "anchor,,cat"}, "--names 'anchor,,cat': name 2 is empty"),
        ({"names": "cat, anchor,cat"}, "--names 'cat, anchor,cat': 'cat' is repeated"),
        ({"output": "."}, r"--output \.: exists"),
        ({"score_threshold": 2.0}, "--score-threshold 2: expected 0 to 1"),
        ({"model": ""}, "--model: missing"),
    ],
)
def test_wrong_settings_are_one_line(
    changes: dict[str, object], message: str, detector: str, pictures: Path, tmp_path: Path
) -> None:
    given = {"model": detector, "images": str(pictures), "output": f"{tmp_path}/out", **changes}
    with pytest.raises(InputError, match=message):
        predict.write_results(Run(**given))  # type: ignore[arg-type]
