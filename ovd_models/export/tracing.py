"""Steps of inference with sizes and counts that a traced graph follows.

R regions, F channels, K names, M detections.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.onnx.operators import shape_as_tensor
from torchvision.models.detection._utils import _topk_min
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import batched_nms, roi_align

from ovd_models.detectors.resizing import CANDIDATES


def resize_traced(transform: GeneralizedRCNNTransform, pixels_3HW: Tensor) -> ImageList:
    """A batch of one, resized, normalised and padded as the detector's own transform does.

    The size is a product in double precision, as there: traced, the transform and `interpolate` compute it in float32,
    where 374 pixels times 128 / 374 are one less.
    """
    side_2 = shape_as_tensor(pixels_3HW)[1:].double()
    limits = torch.tensor([transform.min_size[0], transform.max_size], dtype=torch.float64)
    scaled_2 = (side_2 * (limits / torch.stack([side_2.amin(), side_2.amax()])).amin()).floor().long()
    size: Any = [scaled_2[0], scaled_2[1]]  # tensors, which tracing follows
    (resized_3hw,) = F.interpolate(transform.normalize(pixels_3HW)[None], size, mode="bilinear", align_corners=False)
    batch = transform.batch_images([resized_3hw], transform.size_divisible)
    return ImageList(batch, [(resized_3hw.shape[1], resized_3hw.shape[2])])


def select_traced(
    box_R4: Tensor, score_RK: Tensor, threshold: Tensor, overlap: float, limit: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The best (region, name) pairs after suppression within each name: boxes [M, 4], scores [M], names [M].

    As `select_detections`, but a graph cannot take more candidates if too few survive.
    """
    has_area_R1 = (box_R4[:, 2:] - box_R4[:, :2]).amin(1, keepdim=True) > 0
    region, label = torch.where((score_RK > threshold) & has_area_R1)
    score = score_RK[region, label]
    best = score.topk(_topk_min(score, CANDIDATES * limit, 0)).indices
    region, label, score = region[best], label[best], score[best]
    # Names are moved apart, in float32: by few of them, else that rounds overlaps.
    keep = batched_nms(box_R4[region], score, torch.unique(label, return_inverse=True)[1], overlap)[:limit]
    return box_R4[region[keep]], score[keep], label[keep]


def pool_traced(levels: Sequence[Tensor], strides: Sequence[int], level_R: Tensor, box_R4: Tensor, size: int) -> Tensor:
    """[R, F, size, size] as `pool_levels` for the only image of maps [1, F, H, W]."""
    rows = [torch.where(level_R == index)[0] for index in range(len(levels))]
    parts = [
        roi_align(level, [box_R4[row]], size, 1 / stride, -1, aligned=True)
        for level, stride, row in zip(levels, strides, rows, strict=True)
    ]
    return torch.cat(parts)[torch.cat(rows).argsort()]
