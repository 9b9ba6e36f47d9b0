"""The protocols: which images, categories and limits count, and the names of the numbers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ovd_models.errors import InputError
from ovd_models.metrics.average_precision import LVIS_LIMIT, Curves, accumulate, verified
from ovd_models.metrics.named_masks import evaluate_named_masks
from ovd_models.metrics.records import (
    Bools,
    GroundTruth,
    IouType,
    Predictions,
    limit_per_category,
    limit_per_image,
    limit_per_image_and_category,
)

Protocol = Literal["lvis", "lvis-fixed", "coco", "coco-ovd", "ovsam"]
FIXED_LIMIT = 10_000
"""Predictions of a category in the whole set (Dave et al., 2021)."""
COCO_LIMIT = 100
"""Predictions of an image and category."""
RECALL_LIMITS = (10, 100, 300)


@dataclass(frozen=True)
class Measured:
    """Results of a protocol."""

    numbers: Mapping[str, float]
    """By their official names; -1 where there is nothing to measure."""
    curves: Curves | None
    """Of all categories; None if the protocol has no precision."""


def measure(truth: GroundTruth, predictions: Predictions, protocol: Protocol, kind: IouType) -> Measured:
    """Evaluate predictions by a protocol.

    Args:
        truth: the annotated objects.
        predictions: in any order; of equal scores, the first counts as the better one.
        protocol: `lvis` (Gupta et al., 2019), `lvis-fixed` (AP-fixed: Dave et al., 2021), `coco` (Lin et al., 2014),
            `coco-ovd` (48 base and 17 novel categories: Bansal et al., 2018), or `ovsam` (IoU and accuracy of masks).
        kind: boxes or masks.

    Raises:
        InputError: the ground truth lacks what the protocol needs.
    """
    if kind == "segm" and truth.masks is None and len(truth.labels):
        raise InputError(f"{truth.origin}: no masks, expected a segmentation for each object for --iou-type segm")
    return PROTOCOLS[protocol](truth, predictions, kind)


def counted(truth: GroundTruth, predictions: Predictions, protocol: Protocol) -> tuple[GroundTruth, Predictions]:
    """The objects and predictions from which a protocol computes AP; images and categories keep their numbers.

    Crowds and categories that are not exhaustively annotated are marked only where the protocol knows them.

    Raises:
        InputError: the ground truth lacks what the protocol needs.
    """
    if protocol in ("lvis", "lvis-fixed"):
        check_federated(truth, protocol)
        one_image = protocol == "lvis"
        kept = limit_per_image(predictions, LVIS_LIMIT) if one_image else limit_per_category(predictions, FIXED_LIMIT)
        return replace(truth, crowd=np.zeros_like(truth.crowd)), verified(truth, kept)
    if protocol == "coco-ovd":
        base, novel = check_splits(truth, protocol)
        truth, predictions = _with_objects(truth, predictions, base | novel)
    return replace(truth, not_exhaustive=None), limit_per_image_and_category(predictions, COCO_LIMIT)


def lvis(truth: GroundTruth, predictions: Predictions, kind: IouType) -> Measured:
    """LVIS: 300 predictions of an image over all categories, federated; AP by the frequency of the category."""
    curves = accumulate(*counted(truth, predictions, "lvis"), kind, limits=(LVIS_LIMIT,), federated=True)
    numbers = {**_average_precisions(curves), **_frequencies(truth, curves), f"AR@{LVIS_LIMIT}": curves.ar()}
    for size in ("small", "medium", "large"):
        numbers[f"AR{size[0]}@{LVIS_LIMIT}"] = curves.ar(size=size)
    return Measured(numbers, curves)


def lvis_fixed(truth: GroundTruth, predictions: Predictions, kind: IouType) -> Measured:
    """AP-fixed: any number of predictions of an image, at most 10,000 of a category."""
    curves = accumulate(*counted(truth, predictions, "lvis-fixed"), kind, limits=(FIXED_LIMIT,), federated=True)
    return Measured({**_average_precisions(curves), **_frequencies(truth, curves)}, curves)


def coco(truth: GroundTruth, predictions: Predictions, kind: IouType) -> Measured:
    """COCO: 100 predictions of an image and category."""
    curves = accumulate(truth, predictions, kind)
    numbers = _average_precisions(curves) | {f"AR@{limit}": curves.ar(limit) for limit in curves.limits}
    for size in ("small", "medium", "large"):
        numbers[f"AR{size[0]}@100"] = curves.ar(size=size)
    return Measured(numbers, curves)


def coco_ovd(truth: GroundTruth, predictions: Predictions, kind: IouType) -> Measured:
    """OV-COCO: generalised over base and novel categories, and each of them alone.

    Images without an object of a base or novel category are left out: 4,836 of val2017 are used. The settings of one
    split alone use the images with its objects.
    """
    base, novel = check_splits(truth, "coco-ovd")
    truth, predictions = _with_objects(truth, predictions, base | novel)
    curves = accumulate(truth, predictions, kind)
    numbers = {}
    for name, threshold in (("AP50", 0.5), ("AP", None)):
        for split, chosen in (("novel", novel), ("base", base), ("all", base | novel)):
            numbers[f"{name}_{split}"] = curves.ap(threshold, categories=chosen)
    for split, chosen in (("base", base), ("novel", novel)):
        alone = accumulate(*_with_objects(truth, predictions, chosen), kind)
        numbers[f"AP50_{split}_only"] = alone.ap(0.5, categories=chosen)
    return Measured({**numbers, **recalls(truth, predictions, novel, kind)}, curves)


def ovsam(truth: GroundTruth, predictions: Predictions, kind: IouType) -> Measured:
    """OV-SAM: IoU and accuracy of named masks, and class-agnostic recall of novel objects."""
    base, novel = check_splits(truth, "ovsam")
    numbers = evaluate_named_masks(truth, predictions, {"base": base, "novel": novel, "all": base | novel}, kind)
    return Measured({**numbers, **recalls(truth, predictions, novel, kind)}, None)


PROTOCOLS: dict[Protocol, Callable[[GroundTruth, Predictions, IouType], Measured]] = {
    "lvis": lvis,
    "lvis-fixed": lvis_fixed,
    "coco": coco,
    "coco-ovd": coco_ovd,
    "ovsam": ovsam,
}


def recalls(truth: GroundTruth, predictions: Predictions, novel: Bools, kind: IouType) -> dict[str, float]:
    """Class-agnostic average recall of novel objects among the k best predictions of an image."""
    wanted = truth.only_categories(novel).class_agnostic()
    curves = accumulate(wanted, predictions.class_agnostic(), kind, limits=RECALL_LIMITS)
    return {f"AR@{limit}_novel": curves.ar(limit) for limit in RECALL_LIMITS}


def check_federated(truth: GroundTruth, protocol: Protocol) -> None:
    """Check that the ground truth has LVIS's fields.

    Raises:
        InputError: it has not; the message names the field.
    """
    for number, category in enumerate(truth.categories):
        if category.frequency not in ("r", "c", "f"):
            raise InputError(
                f"{truth.origin}: categories[{number}]: frequency {category.frequency or 'missing'}, expected 'r', 'c' "
                f"or 'f' for --protocol {protocol}"
            )
    for field, codes in (
        ("neg_category_ids", truth.negative),
        ("not_exhaustive_category_ids", truth.not_exhaustive),
    ):
        if codes is None:
            raise InputError(f"{truth.origin}: images: no {field}, expected it for --protocol {protocol}")


def check_splits(truth: GroundTruth, protocol: Protocol) -> tuple[Bools, Bools]:
    """Which categories [K] are base and which are novel.

    Raises:
        InputError: none is novel.
    """
    base = np.array([category.split == "base" for category in truth.categories], np.bool_)
    novel = np.array([category.split == "novel" for category in truth.categories], np.bool_)
    if not novel.any():
        raise InputError(
            f"{truth.origin}: categories: none is novel, expected COCO's names, a `split` or --novel for --protocol "
            f"{protocol}"
        )
    return base, novel


def _with_objects(truth: GroundTruth, predictions: Predictions, chosen: Bools) -> tuple[GroundTruth, Predictions]:
    """The objects of some categories, and these categories' predictions in the images with such an object."""
    objects = truth.only_categories(chosen)
    keep = np.zeros(len(truth.image_ids), np.bool_)
    keep[objects.images] = True
    return objects, predictions.take(chosen[predictions.labels] & keep[predictions.images])


def _average_precisions(curves: Curves) -> dict[str, float]:
    return {
        "AP": curves.ap(),
        "AP50": curves.ap(0.5),
        "AP75": curves.ap(0.75),
        "APs": curves.ap(size="small"),
        "APm": curves.ap(size="medium"),
        "APl": curves.ap(size="large"),
    }


def _frequencies(truth: GroundTruth, curves: Curves) -> dict[str, float]:
    of = np.array([category.frequency for category in truth.categories])
    return {f"AP{letter}": curves.ap(categories=of == letter) for letter in "rcf"}
