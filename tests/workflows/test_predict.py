import dataclasses
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from serving import save_detector, save_segmenter, save_text_segmenter

from ovd_models.batches import Detections
from ovd_models.detectors.resizing import Selection, select_detections
from ovd_models.errors import InputError
from ovd_models.predictors import Detector, Segmenter
from ovd_models.sam.model import EverythingConfig
from ovd_models.segments import Segments
from workflows import predict
from workflows.common import cli
from workflows.common.output import check_folder
from workflows.predict import Predicted, Run


def write_results(run: Run) -> tuple[list[Predicted], list[str]]:
    return predict.write_results(run, predict.prepare(run), Path(run.output))


def call(monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    monkeypatch.setattr(sys, "argv", ["predict.py", *flags])
    return cli.outcome(predict.main)


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
    shown, left_out = write_results(run)
    assert [entry.file_name for entry in shown] == ["a.png", "below/b.jpg"]
    assert not left_out
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


def test_an_object_is_kept_beside_one_with_many_better_names(
    detector: str, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = tuple(f"name {row}" for row in range(200))
    boxes, scores = torch.tensor([[0.0, 0, 20, 20], [30, 30, 50, 50]]), torch.full((2, 200), 0.9)
    scores[1] = 0.0
    scores[1, 7] = 0.5

    def find(self: Detector, encoded: object, query: object, **settings: Any) -> Detections:
        selection = Selection(0.5, settings["score_threshold"], settings["max_detections"], settings["distinct"])
        return Detections(*select_detections(boxes, scores, selection), names, 80, 60)

    monkeypatch.setattr(Detector, "find", find)
    job = predict.prepare(Run(model=detector, images=str(pictures), score_threshold=0.3))
    found = predict.predict_one(job, *job.pictures[0])
    assert [entry.box for entry in found] == [(0, 0, 20, 20), (30, 30, 50, 50)]


def test_broken_pictures_among_good_ones_are_named_and_the_rest_goes_on(
    detector: str,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for number in range(4):
        (pictures / f"broken{number}.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    Image.new("RGB", (64, 64)).save(pictures / os.fsdecode(b"caf\xe9.png"))
    flags = ("--model", detector, "--images", str(pictures), "--output", f"{tmp_path}/out", "--score-threshold", "0.25")
    assert call(monkeypatch, *flags) == 0
    printed = capsys.readouterr().out
    assert "5 pictures left out" in printed
    assert "broken0.png" in printed
    assert "score threshold: 0.25" in printed
    assert printed.splitlines()[-1] == f"next: python workflows/serve.py --model {detector} --storage store"
    page = (tmp_path / "out/index.html").read_text()
    assert all(f"broken{number}.png: not an image" in page for number in range(4))
    assert "the name is not UTF-8" in page
    assert "Score threshold: 0.25" in page
    alone = ("--model", detector, "--images", f"{pictures}/broken1.png", "--output", f"{tmp_path}/alone")
    assert call(monkeypatch, *alone) == 2
    assert "1 pictures left out" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "photos"]


def test_a_stopped_prediction_leaves_nothing(
    detector: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(predict, "summarise", stop)
    flags = ("--model", detector, "--images", str(pictures), "--output", f"{tmp_path}/out")
    assert call(monkeypatch, *flags) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


@pytest.mark.parametrize("kind", [save_segmenter, save_text_segmenter])
def test_models_with_masks_give_them_for_a_pattern_of_files(kind: object, pictures: Path, tmp_path: Path) -> None:
    assert callable(kind)
    run = Run(model=str(kind(tmp_path / "model")), images=f"{pictures}/*.png", names="anchor", output=f"{tmp_path}/out")
    shown, _ = write_results(run)
    coco = json.loads((tmp_path / "out/predictions.json").read_text())
    assert [entry.file_name for entry in shown] == ["a.png"]
    assert all(entry["segmentation"]["size"] == [60, 80] for entry in coco["annotations"])


def test_ovsam_gives_a_mask_for_each_box_of_a_file(pictures: Path, tmp_path: Path) -> None:
    content = {
        "images": [{"id": 7, "file_name": "a.png"}, {"id": 8, "file_name": "elsewhere.png"}],
        "annotations": [
            {"image_id": 7, "category_id": 1, "bbox": [-5, 10, 30, 20]},
            {"image_id": 7, "category_id": 1, "bbox": [40, 5, 20, 20]},
            {"image_id": 7, "category_id": 1, "bbox": [400, 5, 20, 20]},
            {"image_id": 8, "category_id": 1, "bbox": [0, 0, 9, 9]},
        ],
        "categories": [{"id": 1, "name": "thing"}],
    }
    file = tmp_path / "boxes.json"
    file.write_text(json.dumps(content))
    model = str(save_segmenter(tmp_path / "model"))
    run = Run(model=model, images=str(pictures), names="anchor", boxes=str(file), output=f"{tmp_path}/out")
    shown, left_out = write_results(run)
    assert [entry.file_name for entry in shown] == ["a.png"]
    assert len(json.loads((tmp_path / "out/predictions.json").read_text())["annotations"]) == 2
    assert left_out == [f"{pictures}/below/b.jpg: no box in the file of --boxes, expected some"]
    with pytest.raises(InputError, match=r"--boxes .*: no box of a picture .* file names such as b\.jpg"):
        predict.prepare(dataclasses.replace(run, images=str(pictures / "below"), output=f"{tmp_path}/other"))


def test_boxes_of_a_file_are_found_in_its_folder_of_images(pictures: Path, tmp_path: Path) -> None:
    def boxes_of(*names: str) -> dict[str, list[list[float]]] | None:
        content = {
            "images": [{"id": number, "file_name": name} for number, name in enumerate(names)],
            "annotations": [
                {"image_id": number, "category_id": 1, "bbox": [number, 2, 9, 9]} for number in range(len(names))
            ],
            "categories": [{"id": 1, "name": "thing"}],
        }
        (tmp_path / "instances.json").write_text(json.dumps(content))
        return predict.read_boxes(f"{tmp_path}/instances.json", [(pictures / name, name) for name in own])

    own = ["images/a.jpg", "images/b.jpg"]  # relative to a folder with `instances.json` and `images/`
    assert boxes_of("b.jpg", "train/images/a.jpg", "c.jpg") == {
        "images/a.jpg": [[1, 2, 10, 11]],
        "images/b.jpg": [[0, 2, 9, 11]],
    }
    own = ["a.jpg"]  # of a pattern of files
    with pytest.raises(InputError, match=r"left/a\.jpg and right/a\.jpg are both a\.jpg of --images"):
        boxes_of("left/a.jpg", "right/a.jpg")
    own = ["left/a.jpg", "right/a.jpg"]  # either could be meant
    with pytest.raises(InputError, match=r"no box of a picture .* file names such as left/a\.jpg"):
        boxes_of("a.jpg")


def test_boxes_are_refused_for_models_that_take_none(detector: str, pictures: Path, tmp_path: Path) -> None:
    content = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9]}],
        "categories": [],
    }
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    run = Run(model=detector, images=str(pictures), boxes=f"{tmp_path}/boxes.json", output=f"{tmp_path}/out")
    with pytest.raises(InputError, match=r"--boxes .*: .* is of method codet, expected an OV-SAM"):
        predict.prepare(run)


@pytest.mark.parametrize("kind", [save_segmenter, save_text_segmenter])
def test_masks_below_the_score_threshold_are_left_out(kind: object, pictures: Path, tmp_path: Path) -> None:
    assert callable(kind)
    run = Run(model=str(kind(tmp_path / "model")), images=f"{pictures}/a.png", names="anchor", score_threshold=1.0)
    job = predict.prepare(run)
    ((_, found),) = predict.predict(job)
    assert isinstance(found, Segments)
    assert len(found) == 0


def test_the_limits_of_everything_mode_arrive(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def everything(self: Segmenter, image: object, names: object, settings: EverythingConfig) -> Segments:
        asked.append(settings)
        return find(self, image, names, settings)  # type: ignore[arg-type]

    find = Segmenter.everything
    monkeypatch.setattr(Segmenter, "everything", everything)
    model = str(save_segmenter(tmp_path / "model"))
    chosen: dict[str, Any] = {"points_per_side": 2, "min_iou": 0.125, "min_stability": 0.5}
    write_results(Run(model=model, images=str(pictures), output=f"{tmp_path}/out", **chosen))
    assert set(asked) == {EverythingConfig(**chosen)}


def test_an_output_in_a_read_only_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write anywhere
    with pytest.raises(InputError, match=rf"--output {tmp_path}/out: {tmp_path} is read-only"):
        check_folder(f"{tmp_path}/out", "--output")


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
        ({"output": "s3://bucket/found"}, "--output 's3://bucket/found': expected a folder of this machine"),
        ({"output": f"{__file__}/below"}, "--output .*test_predict.py is a file, expected a folder"),
        ({"boxes": "/nothing.json"}, r"/nothing\.json: cannot be read .* expected an annotation file"),
        ({"score_threshold": 2.0}, "--score-threshold 2: expected 0 to 1"),
        ({"min_iou": 2.0}, "--min-iou 2: expected 0 to 1"),
        ({"points_per_side": 0}, "--points-per-side 0: expected at least 1"),
        ({"min_iou": 0.5}, "--points-per-side, --min-iou, --min-stability: expected an OV-SAM without --boxes"),
        ({"model": ""}, "--model: missing"),
    ],
)
def test_wrong_settings_are_one_line(
    changes: dict[str, object],
    message: str,
    detector: str,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = {"model": detector, "images": str(pictures), "output": f"{tmp_path}/out", **changes}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    assert call(monkeypatch, *flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(f"error: .*{message}", error)
