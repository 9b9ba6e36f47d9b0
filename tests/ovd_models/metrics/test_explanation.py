import io
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from eval_data import lvis_like, mask_of, predictions_for

from ovd_models.metrics.explanation import ERROR_KINDS, calibrate, confusions, find_errors, gains, image_scores
from ovd_models.metrics.files import read_results, read_truth
from ovd_models.metrics.matching import Matches, average_precisions, bootstrap, interval, match
from ovd_models.metrics.protocols import Protocol, counted, measure
from ovd_models.metrics.records import GroundTruth, IouType, Predictions

BOX = [10.0, 10.0, 40.0, 40.0]


def read(truth: dict[str, Any], rows: list[dict[str, Any]], kind: IouType) -> tuple[GroundTruth, Predictions]:
    loaded = read_truth(json.dumps(truth).encode(), "gt.json", masks=kind == "segm")
    return loaded, read_results(io.BytesIO(json.dumps(rows).encode()), "dt.json", loaded, kind)


def matched(truth: GroundTruth, predictions: Predictions, protocol: Protocol, kind: IouType = "bbox") -> Any:
    own, found = counted(truth, predictions, protocol)
    return own, match(own, found, kind)


def scene(
    objects: list[tuple[int, list[float]]], rows: list[tuple[int, list[float], float]]
) -> tuple[GroundTruth, Matches]:
    truth = {
        "images": [{"id": 1, "width": 200, "height": 200}],
        "annotations": [{"image_id": 1, "category_id": key, "bbox": box} for key, box in objects],
        "categories": [{"id": key, "name": f"n{key}"} for key in (1, 2, 3)],
    }
    results = [{"image_id": 1, "category_id": key, "bbox": box, "score": score} for key, box, score in rows]
    return matched(*read(truth, results, "bbox"), "coco")  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("protocol", ["lvis", "lvis-fixed", "coco", "coco-ovd"])
def test_matches_give_the_ap_of_the_protocol(kind: IouType, protocol: Protocol) -> None:
    # Crowds, which LVIS takes as objects; more predictions of an image than LVIS counts, and of a category than COCO
    # does; an image without any object of a split.
    truth = lvis_like(8, 10, 6, seed=3)
    left_out = truth["annotations"][0]["category_id"]
    truth["annotations"] = [e for e in truth["annotations"] if e["image_id"] > 1 or e["category_id"] == left_out]
    for number, entry in enumerate(truth["annotations"]):
        entry["iscrowd"] = int(number % 7 == 0)
        if entry["iscrowd"]:
            image = truth["images"][entry["image_id"] - 1]
            entry["segmentation"] = mask_of(entry["bbox"], image["width"], image["height"], round_=False)
    rows = list(predictions_for(truth, 600, masks=kind == "segm"))
    loaded, found = read(truth, rows, kind)
    splits = {entry.id: "" if entry.id == left_out else ("base", "novel")[entry.id % 2] for entry in loaded.categories}
    loaded = replace(loaded, categories=tuple(replace(each, split=splits[each.id]) for each in loaded.categories))
    curves = measure(loaded, found, protocol, kind).curves
    assert curves is not None
    ap_TK = average_precisions(*matched(loaded, found, protocol, kind))
    assert ap_TK[0] == pytest.approx(curves.ap_of_categories(0.5), abs=1e-9, nan_ok=True)
    assert ap_TK.mean(0) == pytest.approx(curves.ap_of_categories(), abs=1e-9, nan_ok=True)


def test_recall_levels_that_are_just_reached_are_those_of_the_engine() -> None:
    # With 100 objects each found one reaches a level, but for rounding, which must be the engine's.
    grid = [[20.0 * (at % 10), 20.0 * (at // 10), 10.0, 10.0] for at in range(100)]
    for found in range(0, 101, 3):
        truth = {
            "images": [{"id": 1, "width": 200, "height": 200}],
            "annotations": [{"image_id": 1, "category_id": 1, "bbox": box} for box in grid],
            "categories": [{"id": 1, "name": "n1"}],
        }
        rows = [{"image_id": 1, "category_id": 1, "bbox": box, "score": 0.5} for box in grid[:found]]
        loaded, predictions = read(truth, rows, "bbox")
        curves = measure(loaded, predictions, "coco", "bbox").curves
        assert curves is not None
        assert average_precisions(*matched(loaded, predictions, "coco"))[:, 0] == pytest.approx(
            [curves.ap()] * 10, abs=1e-9
        )


def test_a_bootstrap_draws_images_with_replacement() -> None:
    truth = lvis_like(30, 8, 5, seed=1)
    loaded, matches = matched(*read(truth, list(predictions_for(truth, 30)), "bbox"), "lvis")
    everything = {"all": np.ones(5, np.bool_)}
    draws = bootstrap(loaded, matches, everything, 60, seed=4)
    estimate = float(np.nanmean(average_precisions(loaded, matches)[0]))
    low, high = interval(draws["AP50 all"], estimate)
    assert low < estimate < high
    assert np.array_equal(draws["AP all"], bootstrap(loaded, matches, everything, 60, seed=4)["AP all"])
    # Weights are repetitions: an image that counts twice is an image that is there twice.
    twice = lvis_like(2, 8, 3, seed=2)
    # Scores differ: of equal ones, those of the repeated image would not stand side by side.
    rows = [{**row, "score": row["score"] + 1e-6 * place} for place, row in enumerate(predictions_for(twice, 25))]
    doubled = {
        **twice,
        "images": [*twice["images"], {**twice["images"][0], "id": 3}],
        "annotations": [
            *twice["annotations"],
            *({**e, "image_id": 3} for e in twice["annotations"] if e["image_id"] == 1),
        ],
    }
    more = [*rows, *({**row, "image_id": 3} for row in rows if row["image_id"] == 1)]
    one, two = (matched(*read(*each, "bbox"), "lvis") for each in ((twice, rows), (doubled, more)))
    weighted = average_precisions(*one, np.array([2.0, 1.0]))
    assert weighted == pytest.approx(average_precisions(*two), abs=1e-9, nan_ok=True)
    assert np.array_equal(average_precisions(*one, np.ones(2)), average_precisions(*one), equal_nan=True)


def test_each_kind_of_error_by_hand() -> None:
    far = [150.0, 150.0, 20.0, 20.0]
    truth, matches = scene(
        [(1, BOX), (2, [100, 10, 40, 40]), (3, [10, 100, 40, 40]), (3, [100, 100, 40, 40])],
        [
            (1, BOX, 0.95),  # right
            (1, BOX, 0.9),  # duplicate
            (3, [100, 10, 40, 40], 0.85),  # the second object under another name
            (3, [10, 100, 40, 15], 0.8),  # IoU 0.375 with the third object: localisation
            (1, [10, 100, 40, 12], 0.75),  # both: IoU 0.3 with the third object, of another name
            (2, far, 0.7),  # background
        ],
    )
    errors = find_errors(truth, matches, "bbox")
    by_score = [
        ERROR_KINDS[kind] if kind >= 0 else "right" for kind in errors.kinds[np.argsort(-matches.predictions.scores)]
    ]
    assert by_score == ["right", "duplicate", "classification", "localisation", "both", "background"]
    assert errors.missed.tolist() == [3]
    # AP50 is 1, 0 and 0. With the right name the second is 1; in the right place, the third finds one of its two
    # objects below a wrong prediction, so precision is 0.5 at 51 of 101 recall levels.
    gained = gains(truth, matches, errors)
    assert gained["duplicate"] == gained["both"] == gained["background"] == pytest.approx(0)
    assert gained["classification"] == pytest.approx(1 / 3)
    assert gained["localisation"] == pytest.approx(0.5 * 51 / 101 / 3)
    assert gained["missed"] == pytest.approx(0)
    ((true, given, rows),) = confusions(truth, matches, errors, 0.5)
    assert (true, given, len(rows)) == (1, 2, 1)
    assert confusions(truth, matches, errors, 0.86) == []


def test_mending_an_error_gives_back_its_ap() -> None:
    # The only object of category 2 was found under name 1, which stands above the right one of category 1.
    truth, matches = scene([(1, BOX), (2, [100, 10, 40, 40])], [(1, [100, 10, 40, 40], 0.9), (1, BOX, 0.8)])
    gained = gains(truth, matches, find_errors(truth, matches, "bbox"))
    # Before: 0.5 and 0; mended: 1 and 1.
    assert gained["classification"] == pytest.approx(1 - 0.25)
    assert gained["missed"] == gained["background"] == pytest.approx(0)
    truth, matches = scene([(1, BOX), (1, [100, 10, 40, 40])], [(1, BOX, 0.8)])
    gained = gains(truth, matches, find_errors(truth, matches, "bbox"))
    assert gained["missed"] == pytest.approx(1 - 51 / 101)


def test_calibration_and_the_best_threshold_by_hand() -> None:
    # Scores 0.95, 0.85 are right, 0.75 and 0.25 wrong; two objects.
    truth, matches = scene(
        [(1, BOX), (2, [100, 10, 40, 40])],
        [(1, BOX, 0.95), (2, [100, 10, 40, 40], 0.85), (3, [0, 0, 9, 9], 0.75), (3, [0, 0, 9, 9], 0.25)],
    )
    found = calibrate(truth, matches)
    assert (found.threshold, found.f1) == (0.85, 1.0)
    assert (found.precision_there, found.recall_there) == (1.0, 1.0)
    assert found.counts.tolist() == [0, 0, 1, 0, 0, 0, 0, 1, 1, 1]
    assert found.error == pytest.approx((0.05 + 0.15 + 0.75 + 0.25) / 4)
    assert found.curve[:, 80].tolist() == [1.0, 1.0, 1.0]
    assert found.curve[:, 20].tolist() == pytest.approx([0.5, 1.0, 2 / 3])
    f1, counts = image_scores(truth, matches, 0.7)
    assert counts.tolist() == [[2, 1, 0]]
    assert f1.tolist() == pytest.approx([4 / 5])


def test_nothing_at_all_is_explained() -> None:
    truth, matches = scene([], [])
    errors = find_errors(truth, matches, "bbox")
    assert all(np.isnan(value) for value in gains(truth, matches, errors).values())
    assert calibrate(truth, matches).f1 == 0
    assert np.isnan(image_scores(truth, matches, 0.5)[0]).all()
    truth, matches = scene([(1, BOX)], [])
    assert find_errors(truth, matches, "bbox").missed.tolist() == [0]
    assert average_precisions(truth, matches)[0, 0] == 0
    assert np.isnan(interval(np.array([np.nan]), 0.5)).all()
