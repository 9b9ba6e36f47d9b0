"""Metrics of prompted objects: mask IoU and accuracy of names over instances, for base and novel names.

N instances.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ovd_models.metrics.records import Floats
from ovd_models.segments import OFF, ON


def centre_points(masks_NHW: Tensor) -> Tensor:
    """[N, 2] float32 xy of the pixel deepest inside each mask, the first in reading order.

    Pixels beyond the image count as outside. An empty mask gives (0, 0).
    """
    points = np.zeros((len(masks_NHW), 2), np.float32)
    for row, mask in enumerate(masks_NHW.cpu().numpy().astype(np.uint8)):
        depth = mask_depth(mask)
        y, x = np.unravel_index(int(depth.argmax()), depth.shape)
        points[row] = (x, y)
    return torch.from_numpy(points)


def next_click(found_PHW: Tensor, true_PHW: Tensor) -> tuple[Tensor, Tensor]:
    """[P, 2] the deepest pixel of the larger error of each mask, and [P] whether it is missed (`ON`) or surplus.

    Both on the CPU, as the prompts of a request are.
    """
    missed_PHW, surplus_PHW = true_PHW & ~found_PHW, found_PHW & ~true_PHW
    missed_P = missed_PHW.flatten(1).sum(1) >= surplus_PHW.flatten(1).sum(1)
    error_PHW = torch.where(missed_P[:, None, None], missed_PHW, surplus_PHW)
    nothing_P = ~error_PHW.flatten(1).any(1)  # a perfect mask: click on the object again
    error_PHW = torch.where(nothing_P[:, None, None], true_PHW, error_PHW)
    return centre_points(error_PHW), torch.where(missed_P | nothing_P, ON, OFF).cpu()


def mask_depth(mask: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """[H, W] Euclidean distance of each pixel of a mask to the nearest one outside, in pixels."""
    depth = cv2.distanceTransform(np.pad(mask, 1), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return np.asarray(depth[1:-1, 1:-1], np.float32)


@dataclass
class PointingMetrics:
    """IoU and accuracy of instances, collected image by image; every mean is over instances."""

    ious: list[float] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    novel: list[bool] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    """Instances of each image."""

    def add(self, ious_N: Tensor, predicted_N: Sequence[int], labels_N: Sequence[int], novel_N: Sequence[bool]) -> None:
        """One image's instances: IoUs with the annotated masks, predicted and annotated labels, and which are novel."""
        self.ious += ious_N.tolist()
        self.right += [one == other for one, other in zip(predicted_N, labels_N, strict=True)]
        self.novel += list(novel_N)
        self.counts.append(len(labels_N))

    def by_image(self) -> dict[str, tuple[Floats, Floats]]:
        """For each metric of `summary`, its sum over the instances of each image, and their number."""
        novel, count = np.asarray(self.novel, bool), len(self.counts)
        image = np.repeat(np.arange(count), np.asarray(self.counts, np.int64))
        chosen: dict[str, npt.NDArray[np.bool_]] = {"base": ~novel, "novel": novel, "all": np.ones_like(novel)}
        values = {"iou": np.asarray(self.ious, float), "accuracy": np.asarray(self.right, float)}
        return {
            f"{value}_{split}": (
                np.bincount(image[rows], numbers[rows], minlength=count).astype(np.float64),
                np.bincount(image[rows], minlength=count).astype(np.float64),
            )
            for value, numbers in values.items()
            for split, rows in chosen.items()
        }

    def summary(self) -> dict[str, float]:
        """`iou_base`, `iou_novel`, `iou_all`, `accuracy_base` and so on; NaN where there is no instance."""
        return {
            name: float(sums_I.sum() / counts_I.sum()) if counts_I.any() else float("nan")
            for name, (sums_I, counts_I) in self.by_image().items()
        }
