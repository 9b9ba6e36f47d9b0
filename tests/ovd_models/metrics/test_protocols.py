import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval_data import lvis_like, mask_of, predictions_for, write_results
from faster_coco_eval import COCO, COCOeval_faster
from pycocotools import coco, cocoeval
from reference_data import LVIS, needs

from ovd_models.errors import InputError
from ovd_models.metrics.files import read_results, read_truth
from ovd_models.metrics.official import evaluate_official
from ovd_models.metrics.protocols import Measured, Protocol, measure
from ovd_models.metrics.records import GroundTruth, IouType, Predictions

LVIS_NAMES = [
    *("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf"),
    *("AR@300", "ARs@300", "ARm@300", "ARl@300"),
]
KINDS: tuple[IouType, ...] = ("bbox", "segm")


def read(truth: dict[str, Any], rows: list[dict[str, Any]], kind: IouType) -> tuple[GroundTruth, Predictions]:
    loaded = read_truth(json.dumps(truth).encode(), "gt.json", masks=kind == "segm")
    return loaded, read_results(io.BytesIO(json.dumps(rows).encode()), "dt.json", loaded, kind)


def numbers(truth: dict[str, Any], rows: list[dict[str, Any]], protocol: Protocol, kind: IouType = "bbox") -> Measured:
    return measure(*read(truth, rows, kind), protocol, kind)


def split(truth: dict[str, Any], novel: set[int]) -> GroundTruth:
    loaded = read_truth(json.dumps(truth).encode(), "gt.json", masks=True)
    named = [replace(entry, split="novel" if entry.id in novel else "base") for entry in loaded.categories]
    return replace(loaded, categories=tuple(named))


@needs("data/lvis/lvis_val_100.json")
@pytest.mark.parametrize("kind", KINDS)
def test_lvis_equals_the_official_package_on_real_annotations(kind: IouType, tmp_path: Path) -> None:
    path = LVIS / "lvis_val_100.json"
    truth = json.loads(path.read_bytes())
    write_results(predictions_for(truth, 100 if kind == "bbox" else 40, masks=kind == "segm"), tmp_path / "dt.json")
    expected = evaluate_official(str(path), str(tmp_path / "dt.json"), kind)
    loaded = read_truth(path.read_bytes(), str(path), masks=kind == "segm")
    with (tmp_path / "dt.json").open("rb") as file:
        found = measure(loaded, read_results(file, "dt.json", loaded, kind), "lvis", kind).numbers
    assert list(found) == list(expected) == LVIS_NAMES
    assert found == pytest.approx(expected, abs=1e-6)
    assert 0.01 < found["AP"] < 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_lvis_equals_the_official_package(kind: IouType, tmp_path: Path) -> None:
    # More than 300 predictions of an image, scores that repeat, files with masks alone, and categories without objects.
    truth = lvis_like(12, 10, 30)
    rows = list(predictions_for(truth, 330 if kind == "bbox" else 40, masks=kind == "segm"))
    if kind == "segm":
        rows = [{key: value for key, value in row.items() if key != "bbox"} for row in rows]
    (tmp_path / "gt.json").write_text(json.dumps(truth))
    (tmp_path / "dt.json").write_text(json.dumps(rows))
    expected = evaluate_official(str(tmp_path / "gt.json"), str(tmp_path / "dt.json"), kind)
    assert numbers(truth, rows, "lvis", kind).numbers == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_coco_equals_pycocotools(kind: IouType) -> None:
    truth = lvis_like(10, 12, 8, seed=1)
    for number, entry in enumerate(truth["annotations"]):
        entry["iscrowd"] = int(number % 9 == 0)
        if entry["iscrowd"]:  # a crowd's mask is an RLE
            image = next(image for image in truth["images"] if image["id"] == entry["image_id"])
            entry["segmentation"] = masks_of_truth(entry, image)
    rows = list(predictions_for(truth, 60, masks=kind == "segm"))
    found = numbers(truth, rows, "coco", kind).numbers
    published = coco.COCO()
    published.dataset = json.loads(json.dumps({**truth, "info": {}}))
    published.createIndex()
    evaluator = cocoeval.COCOeval(published, published.loadRes(json.loads(json.dumps(rows))), kind)
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    assert list(found.values()) == pytest.approx(evaluator.stats.tolist(), abs=1e-9)
    assert list(found)[6:9] == ["AR@1", "AR@10", "AR@100"]


def masks_of_truth(entry: dict[str, Any], image: dict[str, Any]) -> dict[str, Any]:
    return mask_of(entry["bbox"], image["width"], image["height"], round_=False)


def box(image: int, category: int, bbox: list[float], score: float) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": bbox, "score": score}


A, B, FAR = [10.0, 10.0, 40.0, 40.0], [60.0, 60.0, 30.0, 30.0], [5.0, 60.0, 20.0, 20.0]


def small_truth(objects: list[tuple[int, int, list[float]]], images: int = 3) -> dict[str, Any]:
    return {
        "images": [
            {
                "id": number,
                "width": 100,
                "height": 100,
                "neg_category_ids": [2] if number == 2 else [],
                "not_exhaustive_category_ids": [1] if number == 3 else [],
            }
            for number in range(1, images + 1)
        ],
        "annotations": [
            {
                "id": at,
                "image_id": image,
                "category_id": category,
                "bbox": bbox,
                "segmentation": [[*bbox[:2], bbox[0] + bbox[2], bbox[1], bbox[0], 99.0]],
            }
            for at, (image, category, bbox) in enumerate(objects, 1)
        ],
        "categories": [{"id": key, "name": f"n{key}", "frequency": "fcr"[key - 1]} for key in (1, 2, 3)],
    }


def test_federated_rules_by_hand() -> None:
    truth = small_truth([(1, 1, A), (3, 1, A), (1, 2, B)])
    rows = [
        box(1, 1, A, 0.5),
        box(3, 1, A, 0.4),
        box(2, 1, FAR, 0.9),  # nobody says whether category 1 is in image 2: left out
        box(3, 1, FAR, 0.9),  # category 1 is not exhaustively annotated in image 3: ignored
        box(2, 2, FAR, 0.9),  # category 2 is known to be absent from image 2: wrong, above the right one
        box(1, 2, B, 0.5),
    ]
    found = numbers(truth, rows, "lvis").numbers
    assert (found["APf"], found["APc"], found["APr"]) == pytest.approx((1.0, 0.5, -1.0))
    assert found["AP"] == pytest.approx(0.75)


def test_ap_fixed_has_no_limit_for_an_image() -> None:
    # 300 better predictions of an image push the right one out of LVIS's AP, not out of AP-fixed.
    truth = small_truth([(1, 1, A), (1, 2, B)])
    rows = [box(1, 2, B, 0.5 + number / 1000) for number in range(300)] + [box(1, 1, A, 0.4)]
    assert numbers(truth, rows, "lvis").numbers["APf"] == 0
    fixed = numbers(truth, rows, "lvis-fixed").numbers
    assert fixed["APf"] == pytest.approx(1.0)
    assert list(fixed) == LVIS_NAMES[:9]


def test_no_predictions_are_zero_where_there_is_something_to_find() -> None:
    truth = small_truth([(1, 1, A)])
    for kind in KINDS:
        found = numbers(truth, [], "lvis", kind).numbers
        assert found["AP"] == found["AP50"] == found["AR@300"] == 0
        assert found["APr"] == -1
    assert set(numbers(truth, [], "coco").numbers.values()) == {0.0, -1.0}


def test_generalised_and_separate_settings_of_ovd() -> None:
    # Image 3 has only an object of neither split and is left out; image 2 has no novel object.
    truth = split(small_truth([(1, 1, A), (2, 1, A), (1, 2, B), (3, 3, A)]), novel={2})
    truth = replace(truth, categories=(*truth.categories[:2], replace(truth.categories[2], split="")))
    rows = [box(1, 1, A, 0.9), box(2, 1, A, 0.8), box(2, 2, FAR, 0.9), box(1, 2, B, 0.5), box(3, 2, A, 0.99)]
    predictions = read_results(io.BytesIO(json.dumps(rows).encode()), "dt.json", truth, "bbox")
    found = measure(truth, predictions, "coco-ovd", "bbox").numbers
    assert found["AP50_base"] == pytest.approx(1.0)
    assert found["AP50_novel"] == pytest.approx(0.5)  # the false one in image 2 comes first, that in image 3 is gone
    assert found["AP50_novel_only"] == pytest.approx(1.0)  # image 2 is no image of the novel setting
    assert found["AP50_all"] == pytest.approx(0.75)
    assert found["AR@10_novel"] == pytest.approx(1.0)


def test_named_masks_are_answers_by_overlap() -> None:
    truth = split(small_truth([(1, 1, A), (1, 2, B), (2, 2, A)]), novel={2})
    rows = [box(1, 1, A, 0.3), box(1, 1, [60, 60, 30, 15], 0.9), box(1, 3, FAR, 0.9)]
    found = measure(truth, read_results(io.BytesIO(json.dumps(rows).encode()), "d", truth, "bbox"), "ovsam", "bbox")
    assert found.curves is None
    # The cat is found and named; of two novel objects one is half covered with a wrong name, one has no answer.
    assert found.numbers["IoU_base"] == found.numbers["accuracy_base"] == pytest.approx(1.0)
    assert found.numbers["IoU_novel"] == pytest.approx(0.25)
    assert found.numbers["accuracy_novel"] == 0
    assert found.numbers["accuracy_all"] == pytest.approx(1 / 3)


def test_what_a_protocol_needs_is_named() -> None:
    truth = small_truth([(1, 1, A)])
    plain = read_truth(json.dumps(without(truth, "categories", "frequency")).encode(), "gt.json", masks=False)
    for changed, protocol, message in (
        (plain, "lvis", r"^gt.json: categories\[0\]: frequency missing, expected 'r', 'c' or 'f' for --protocol lvis"),
        (plain, "coco-ovd", r"^gt.json: categories: none is novel"),
        (plain, "ovsam", r"^gt.json: categories: none is novel"),
    ):
        with pytest.raises(InputError, match=message):
            measure(changed, read(truth, [], "bbox")[1], protocol, "bbox")  # type: ignore[arg-type]
    for field in ("neg_category_ids", "not_exhaustive_category_ids"):
        lacking = read_truth(json.dumps(without(truth, "images", field)).encode(), "gt.json", masks=False)
        with pytest.raises(InputError, match=rf"^gt.json: images: no {field}, expected it for --protocol lvis"):
            measure(lacking, read(truth, [], "bbox")[1], "lvis", "bbox")


def without(truth: dict[str, Any], table: str, field: str) -> dict[str, Any]:
    return {**truth, table: [{k: v for k, v in row.items() if k != field} for row in truth[table]]}


def test_the_order_of_categories_and_images_in_a_file_does_not_matter() -> None:
    truth = lvis_like(6, 8, 10)
    rows = list(predictions_for(truth, 40))
    shuffled = {name: values[::-1] if name != "annotations" else values for name, values in truth.items()}
    assert numbers(shuffled, rows, "lvis").numbers == numbers(truth, rows, "lvis").numbers
    by_hand = COCO(json.loads(json.dumps(truth)))
    evaluator = COCOeval_faster(by_hand, by_hand.loadRes(json.loads(json.dumps(rows))), "bbox")
    evaluator.run()
    assert numbers(truth, rows, "coco").numbers["AP"] == pytest.approx(evaluator.stats[0])
    assert np.isfinite(evaluator.stats[0])
