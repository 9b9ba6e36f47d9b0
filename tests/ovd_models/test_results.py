"""Results as other tools take them."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from faster_coco_eval import mask as rle
from PIL import Image

from ovd_models.batches import Detections, Found
from ovd_models.drawing import colour_of
from ovd_models.segments import Segments

SQUARE = np.zeros((6, 8), np.uint8)
SQUARE[1:3, 2:6] = 1  # 2 rows of 4 pixels
COUNTS = rle.encode(np.asfortranarray(SQUARE))["counts"].decode()
BLACK = Image.new("RGB", (8, 6))
FOUND = Detections(
    torch.tensor([[2.0, 1, 6, 3]]), torch.tensor([0.75]), torch.tensor([1]), ("anchor", "cat"), 8, 6, BLACK
)
MASKED = replace(FOUND, masks=(COUNTS,))
SEGMENTS = Segments(
    torch.from_numpy(SQUARE.astype(bool))[None], torch.tensor([0.9]), torch.tensor([1]), torch.tensor([0.75]),
    ("anchor", "cat"), torch.zeros(1, 4, 4), BLACK,
)  # fmt: skip
EMPTY = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), ("cat",), 8, 6)


@pytest.mark.parametrize("found", [FOUND, MASKED, SEGMENTS])
def test_a_coco_file_has_boxes_as_corner_and_size(found: Detections | Segments) -> None:
    coco = found.to_coco("a.jpg", image_id=7)
    assert coco["images"] == [{"id": 7, "file_name": "a.jpg", "width": 8, "height": 6}]
    assert coco["categories"] == [{"id": 1, "name": "anchor"}, {"id": 2, "name": "cat"}]
    (annotation,) = coco["annotations"]
    assert annotation["bbox"] == [2, 1, 4, 2]
    assert (annotation["category_id"], annotation["area"], annotation["score"]) == (2, 8, 0.75)
    if found is not FOUND:
        assert annotation["segmentation"] == {"size": [6, 8], "counts": COUNTS}


def test_masks_are_in_the_list_where_there_are_some() -> None:
    assert MASKED.to_list()[0]["mask"] == {"size": [6, 8], "counts": COUNTS}
    assert "mask" not in FOUND.to_list()[0]
    assert EMPTY.to_coco()["annotations"] == []


@pytest.mark.parametrize("found", [FOUND, MASKED, SEGMENTS, EMPTY])
def test_supervision_takes_them(found: Detections | Segments) -> None:
    supervision = pytest.importorskip("supervision")
    taken = found.to_supervision()
    assert isinstance(taken, supervision.Detections)
    assert len(taken) == len(found)
    if len(found):
        assert taken.xyxy.tolist() == [[2, 1, 6, 3]]
        assert taken["class_name"].tolist() == ["cat"]
        assert (taken.mask is None) == (found is FOUND)
    if found is MASKED or found is SEGMENTS:
        assert np.array_equal(taken.mask[0], SQUARE.astype(bool))


@pytest.mark.parametrize("found", [FOUND, SEGMENTS])
def test_a_notebook_shows_them(found: Detections | Segments) -> None:
    png = found._repr_png_()
    assert png is not None
    assert Image.open(io.BytesIO(png)).size == found.draw().size
    assert replace(found, image=None)._repr_png_() is None


@pytest.mark.parametrize("found", [FOUND, SEGMENTS])
def test_a_picture_to_draw_on_is_turned_as_it_was_for_the_model(found: Detections | Segments) -> None:
    photo = Image.new("RGB", (6, 8))
    photo.getexif()[0x0112] = 6  # turned, it is 8 x 6 pixels
    assert np.array_equal(np.asarray(found.draw(image=photo)), np.asarray(found.draw()))


SEVERAL = Detections(
    torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 5], [5, 0, 8, 6]]), torch.tensor([0.9, 0.5, 0.25]), torch.tensor([1, 0, 1]),
    ("anchor", "cat"), 8, 6, BLACK,
)  # fmt: skip


def test_detections_are_used_as_a_list() -> None:
    assert [(entry.name, entry.score) for entry in SEVERAL] == [
        ("cat", pytest.approx(0.9)),
        ("anchor", 0.5),
        ("cat", 0.25),
    ]
    assert SEVERAL[-1] == Found("cat", 0.25, (5.0, 0.0, 8.0, 6.0))
    assert [entry.name for entry in SEVERAL[1:]] == ["anchor", "cat"]
    assert [entry.score for entry in SEVERAL[::-1]] == [0.25, 0.5, pytest.approx(0.9)]
    with pytest.raises(IndexError):
        SEVERAL[3]
    assert list(EMPTY) == []


def test_segments_are_used_as_a_list() -> None:
    assert list(SEGMENTS) == [Found("cat", 0.75, (2.0, 1.0, 6.0, 3.0))]
    unnamed = replace(SEGMENTS, labels=torch.tensor([-1]), scores=torch.tensor([float("nan")]))
    assert unnamed[0] == Found(None, None, (2.0, 1.0, 6.0, 3.0))
    assert len(unnamed[:0]) == 0
    assert list(SEGMENTS[::-1]) == list(SEGMENTS)


def test_a_filter_keeps_scores_from_the_least_on_and_the_given_names() -> None:
    assert [entry.name for entry in SEVERAL.filter(min_score=0.5)] == ["cat", "anchor"]
    assert [entry.score for entry in SEVERAL.filter(names=["cat"], min_score=0.25)] == [pytest.approx(0.9), 0.25]
    assert len(SEVERAL.filter(names=[])) == 0
    assert (len(SEGMENTS.filter(min_score=0.75)), len(SEGMENTS.filter(min_score=0.76))) == (1, 0)
    with pytest.raises(ValueError, match="'dog' was not looked for, expected some of anchor, cat"):
        SEVERAL.filter(names=["dog"])


def test_one_label_is_drawn_for_a_thing_unless_all_are_wanted() -> None:
    def colours(picture: Image.Image) -> set[tuple[int, int, int]]:
        return {tuple(pixel) for pixel in np.asarray(picture).reshape(-1, 3).tolist()}

    assert colour_of("anchor") not in colours(SEVERAL.draw())  # 0.8 of it is the cat
    assert {colour_of("anchor"), colour_of("cat")} <= colours(SEVERAL.draw(distinct=False))


def test_a_name_has_the_same_colour_in_any_vocabulary() -> None:
    other = replace(FOUND, labels=torch.tensor([0]), names=("cat",))
    assert np.array_equal(np.asarray(FOUND.draw()), np.asarray(other.draw()))


def test_an_empty_mask_is_not_drawn() -> None:
    empty = replace(SEGMENTS, masks=torch.zeros_like(SEGMENTS.masks))
    assert len(empty.with_area()) == 0
    assert not np.asarray(empty.draw()).any()
