"""Metrics with their values on other draws of the images that they were measured on (a bootstrap over images).

Draws are the same for all metrics of equally many images, so that differences of variants are paired by image.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from ovd_models.metrics.matching import draw_images
from ovd_models.metrics.records import Floats
from workflows.configs.evaluation import Run as EvaluationRun
from workflows.reports import evaluation
from workflows.reports.explanation import DRAWS, explain
from workflows.studies.study import Metrics


class Sampled(float):
    """A metric with its values on other draws of its images."""

    draws: Floats

    def __new__(cls, value: float, draws: Floats) -> "Sampled":
        """A metric, and its values on `draws`."""
        made = super().__new__(cls, value)
        made.draws = draws
        return made


def ratio(sums_I: npt.ArrayLike, counts_I: npt.ArrayLike = 1.0) -> Sampled:
    """The sum over I images divided by their total count: a mean over all that is counted.

    Args:
        sums_I: [I] such as right answers.
        counts_I: [I] such as objects; one an image if a number.
    """
    sums, counts = np.broadcast_arrays(np.asarray(sums_I, np.float64), np.asarray(counts_I, np.float64))
    weights_WI = draw_images(len(sums), DRAWS)
    with np.errstate(invalid="ignore"):  # NaN for a draw without anything counted
        return Sampled(float(sums.sum() / counts.sum()), weights_WI @ sums / (weights_WI @ counts))


def mean_of_images(values: Iterable[npt.ArrayLike]) -> Sampled:
    """The mean of all values of all images, given as one array an image."""
    arrays = [np.atleast_1d(np.asarray(value, np.float64)) for value in values]
    return ratio([array.sum() for array in arrays], [len(array) for array in arrays])


def with_draws(metrics: Metrics, storage_uri: str, model: str, boxes: str) -> Metrics:
    """The metrics of a detector, those of AP50 with their values on other draws of the images of `boxes`."""
    found = evaluation.evaluate(EvaluationRun(storage=storage_uri, model=model, boxes=boxes))
    draws = explain(found.truth, found.predictions, found.protocol, "bbox").draws
    sampled = {f"ap50_{split}": draws.get(f"AP50 {split}") for split in ("base", "novel", "all")}
    more = {name: Sampled(metrics[name], values) for name, values in sampled.items() if values is not None}
    return {**metrics, **more}
