import io
import json
from collections.abc import Callable
from typing import Any

import pytest
from eval_data import lvis_like, mask_of, predictions_for

from ovd_models.errors import InputError
from ovd_models.metrics import files
from ovd_models.metrics.records import GroundTruth, IouType, Predictions

TRUTH = lvis_like(6, 6, 9)
ROWS = list(predictions_for(TRUTH, 12, masks=True))


def truth(masks: bool = False) -> GroundTruth:
    return files.read_truth(json.dumps(TRUTH).encode(), "gt.json", masks=masks)


def read(content: str, kind: IouType = "bbox") -> Predictions:
    return files.read_results(io.BytesIO(content.encode()), "dt.json", truth(), kind)


def test_results_are_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read(json.dumps(ROWS), "segm")
    assert len(whole) == 72
    assert whole.boxes.tolist() == [row["bbox"] for row in ROWS]
    assert whole.scores.tolist() == [row["score"] for row in ROWS]
    assert [truth().image_ids[place] for place in whole.images] == [row["image_id"] for row in ROWS]
    for size in (7, 300, 5000):
        monkeypatch.setattr(files, "CHUNK_BYTES", size)
        pieces = read(json.dumps(ROWS, indent=1 if size == 300 else None), "segm")
        assert pieces.boxes.tolist() == whole.boxes.tolist()
        assert pieces.masks.to_pylist() == [row["segmentation"]["counts"] for row in ROWS]


def test_results_are_written_as_they_were_read() -> None:
    found = read(json.dumps(ROWS), "segm")
    again = json.loads("".join(files.results_json(found, truth())))
    assert again == ROWS
    assert json.loads("".join(files.results_json(read("[]"), truth()))) == []


def test_polygons_and_uncompressed_masks_are_masks() -> None:
    x, y, w, h = 10, 20, 30, 40
    polygon = {**ROWS[0], "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]}
    size = mask_of([0, 0, 1, 1], 640, 480, round_=False)["size"]
    runs = {**ROWS[0], "segmentation": {"size": size, "counts": [size[0] * size[1]]}}
    found = read(json.dumps([{k: v for k, v in row.items() if k != "bbox"} for row in (polygon, runs)]), "segm")
    assert found.areas.tolist() == [w * h, 0]
    assert found.boxes[0].tolist() == [x, y, w, h]


def changed(row: int, **fields: Any) -> Callable[[], str]:
    rows = [dict(entry) for entry in ROWS]
    rows[row].update(fields)
    return lambda: json.dumps([{k: v for k, v in entry.items() if v is not ...} for entry in rows])


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (changed(5, image_id=99), "bbox", "dt.json: row 5: image_id 99 is not in gt.json"),
        (changed(7, category_id=10), "bbox", "dt.json: row 7: category_id 10 is not in gt.json"),
        (changed(3, score=float("nan")), "bbox", "dt.json: row 3: score nan, expected finite numbers"),
        (changed(3, score=float("inf")), "bbox", "dt.json: row 3: score inf, expected finite numbers"),
        (changed(4, bbox=[1, 2, float("nan"), 3]), "bbox", "dt.json: row 4: bbox nan, expected finite numbers"),
        (changed(4, bbox=[1, 2, -3, 3]), "bbox", "row 4: bbox [1.0, 2.0, -3.0, 3.0], expected x, y, width and height"),
        (changed(4, bbox=[1, 2, 3]), "bbox", "dt.json: row 4: Expected `array` of length 4, got 3 - at `$.bbox`"),
        (changed(6, score=...), "bbox", "dt.json: row 6: Object missing required field `score`"),
        (changed(6, score="high"), "bbox", "dt.json: row 6: "),
        (changed(2, bbox=...), "bbox", "dt.json: row 2: no bbox, expected one in each row"),
        (changed(2, segmentation=...), "segm", "dt.json: row 2: no segmentation, expected one in each row"),
        (
            changed(8, segmentation={"size": [10, 20], "counts": "0"}),
            "segm",
            "row 8: segmentation: mask of 10 x 20 (height x width), expected its image's 480 x 640",
        ),
        (lambda: '{"annotations": []}', "bbox", "dt.json: starts with '{', expected a list"),
        (lambda: "", "bbox", "dt.json: ends within its list"),
        (lambda: json.dumps(ROWS)[:-40], "bbox", "dt.json: ends within its list"),
        (lambda: "[1, 2]", "bbox", "dt.json: ends within its list"),
        (lambda: json.dumps(ROWS)[:-1] + "}]", "bbox", "dt.json: "),
    ],
)
def test_bad_results_are_one_line_that_names_the_row(content: Callable[[], str], kind: IouType, message: str) -> None:
    with pytest.raises(InputError) as raised:
        read(content(), kind)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_corners_instead_of_sizes_are_noticed() -> None:
    corners = [{**row, "bbox": [x, y, x + w, y + h]} for row in ROWS for x, y, w, h in [clipped(row)]]
    with pytest.raises(InputError, match=r"they look like x0, y0, x1, y1, expected x, y, width, height"):
        read(json.dumps(corners))
    # Boxes that leave their image a little, as some detectors' do, are no corners.
    assert len(read(json.dumps(ROWS))) == len(ROWS)


def clipped(row: dict[str, Any]) -> list[float]:
    image = TRUTH["images"][row["image_id"] - 1]
    x, y, w, h = row["bbox"]
    x, y = min(max(x, 0), image["width"] - 2), min(max(y, 0), image["height"] - 2)
    return [x, y, min(w, image["width"] - x), min(h, image["height"] - y)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["annotations"][3].update(image_id=77), "gt.json: annotations[3]: image_id 77 is not in images"),
        (lambda t: t["annotations"][3].update(category_id=77), "annotations[3]: category_id 77 is not in categories"),
        (lambda t: t["images"].append(t["images"][0]), "gt.json: images: id 1 is there twice"),
        (lambda t: t["annotations"][2].pop("segmentation"), "gt.json: annotations[2]: no segmentation"),
        (lambda t: t["annotations"][2].pop("bbox"), "missing required field `bbox` - at `$.annotations[2]`"),
        (lambda t: t.pop("categories"), "missing required field `categories`"),
    ],
)
def test_bad_ground_truth_is_one_line(change: Callable[[dict[str, Any]], object], message: str) -> None:
    broken = json.loads(json.dumps(TRUTH))
    change(broken)
    with pytest.raises(InputError) as raised:
        files.read_truth(json.dumps(broken).encode(), "gt.json", masks=True)
    assert message in str(raised.value)
