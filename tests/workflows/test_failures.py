from typing import Any

import numpy as np
import torch
from PIL import Image

from ovd_models.batches import Detections
from workflows.reports.failures import annotated_objects, find_invented, find_missed

IMAGE = Image.new("RGB", (100, 100))
NAMES = {1: "anchor", 2: "cat"}
ROW: dict[str, Any] = {
    "boxes": [[0.0, 0, 10, 10], [20, 20, 60, 60], [70, 70, 100, 100]],
    "category_ids": [1, 2, 1],
    "iscrowd": [False, False, True],
}


def found(boxes: list[list[float]], scores: list[float]) -> Detections:
    labels = torch.zeros(len(boxes), dtype=torch.int64)
    return Detections(torch.tensor(boxes).view(-1, 4), torch.tensor(scores), labels, ("anchor", "cat"), 100, 100)


def test_a_missed_object_is_covered_by_no_detection_of_any_name() -> None:
    targets = annotated_objects(ROW, IMAGE.copy, NAMES)
    nothing = find_missed([targets], [found([], [])])
    assert [entry.name for entry in nothing] == ["cat", "anchor"]  # the larger first; the crowd is no object
    # the first covers 100 of 120 px of the union with the anchor, the second 800 of 1600 with the cat: just enough
    covers = found([[0, 0, 10, 12], [20, 20, 40, 60]], [0.5, 0.4])
    assert find_missed([targets], [covers]) == []
    assert [entry.name for entry in find_missed([targets], [found([[0, 0, 10, 21]], [0.9])])] == ["cat", "anchor"]
    assert find_missed([[]], [covers]) == []


def test_a_detection_is_invented_where_nothing_is_annotated() -> None:
    boxes = [[40.0, 0, 60, 18], [70, 70, 99, 99], [0, 50, 15, 90], [41, 0, 61, 18], [15, 15, 60, 60]]
    invented = find_invented([ROW], [IMAGE.copy], [found(boxes, [0.6, 0.9, 0.8, 0.5, 0.4])])
    # a crowd is annotated, the fourth repeats the first, and the last is the cat with a margin
    assert [(entry.name, round(entry.score, 1)) for entry in invented] == [("anchor", 0.8), ("anchor", 0.6)]
    assert np.array_equal(invented[0].box, boxes[2])
    empty = ROW | {"boxes": [], "category_ids": [], "iscrowd": []}
    assert len(find_invented([empty], [IMAGE.copy], [found(boxes[:1], [0.6])])) == 1
