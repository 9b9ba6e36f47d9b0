"""RoIAlign over the levels of a pyramid, fast on CPU.

torchvision's backward pass scatters sample by sample on one core and takes a third of a small detector's training step.
A bin is the mean of bilinear samples on a grid, so pooling is a product with two small matrices, one per axis. BLAS
computes these products, and those of the backward pass, many times faster.

B images, F channels, R regions, P bins per side, S samples per bin and axis.
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align
from torchvision.ops.poolers import LevelMapper

from ovd_models.detectors.resizing import by_level, image_indices

POOLED = 7
"""Side of a pooled region."""
MAX_CELLS = 40 * 40
MAX_CELLS_TRAINING = 64 * 64
"""Largest maps that products are used on: their time grows with the map. torchvision's forward pass is slower on small
maps only, its backward pass on larger ones too."""


class RegionPool(nn.Module):
    """RoIAlign of each region on the level that suits its size (FPN, equation 1), equal to torchvision's.

    Each level has twice the stride of the one before; `size` is P and `samples` is S.
    """

    def __init__(self, strides: Sequence[int], size: int, samples: int) -> None:
        super().__init__()
        self.strides, self.size, self.samples = tuple(strides), size, samples
        self.level_of = LevelMapper(int(math.log2(strides[0])), int(math.log2(strides[-1])))

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor]) -> Tensor:
        """Pool regions of a batch of padded images.

        Args:
            features: levels `{"0": [B, F, H / stride, W / stride], ...}`; those beyond the strides are not used.
            boxes: B tensors [N, 4] xyxy, pixels of the images.

        Returns:
            [R, F, P, P], images in order.
        """
        levels = [features[str(index)] for index in range(len(self.strides))]
        box_R4 = torch.cat(boxes)
        region_R5 = torch.cat([image_indices(boxes)[:, None].to(box_R4.dtype), box_R4], dim=1)
        level_R = self.level_of(boxes)
        order_R, counts = by_level(level_R, len(levels))
        parts = torch.split(region_R5[order_R], counts)
        parts_RFPP = [
            pool_level(level, part, self.size, 1 / stride, self.samples).to(levels[0].dtype)
            for level, part, stride in zip(levels, parts, self.strides, strict=True)
        ]
        pooled_RFPP = torch.cat(parts_RFPP)
        return torch.empty_like(pooled_RFPP).index_copy(0, order_R, pooled_RFPP)


def pool_level(level: Tensor, region_R5: Tensor, size: int, scale: float, samples: int) -> Tensor:
    """RoIAlign on one map [B, F, H, W]: [R, F, P, P] of regions [R, 5], image index (in order) and xyxy in pixels."""
    images, channels, height, width = level.shape
    learns = torch.is_grad_enabled() and level.requires_grad
    if level.device.type != "cpu" or height * width > (MAX_CELLS_TRAINING if learns else MAX_CELLS):
        return cast(Tensor, roi_align(level, region_R5, size, scale, samples))
    region_R5 = region_R5.detach()
    across_RPW = bin_weights(region_R5[:, 1], region_R5[:, 3], width, size, scale, samples).to(level.dtype)
    down_RPH = bin_weights(region_R5[:, 2], region_R5[:, 4], height, size, scale, samples).to(level.dtype)
    counts = torch.bincount(region_R5[:, 0].long(), minlength=images).tolist()
    level_BHFW = level.transpose(1, 2).reshape(images, height, channels * width)
    with torch.autocast(level.device.type, enabled=False):
        # Along the columns of the map for all regions of an image at once, along its rows region by region.
        parts = (torch.split(weights, counts) for weights in (down_RPH, across_RPW))
        pooled = [
            (down.flatten(0, 1) @ rows).view(len(down), size * channels, width) @ across.mT
            for rows, down, across in zip(level_BHFW, *parts, strict=True)
        ]
    return torch.cat(pooled).view(len(region_R5), size, channels, size).transpose(1, 2)


def bin_weights(start_R: Tensor, stop_R: Tensor, cells: int, size: int, scale: float, samples: int) -> Tensor:
    """Weights of the cells along an axis in each bin of a region: the mean of bilinear samples.

    Args:
        start_R: [R] left or upper ends in pixels.
        stop_R: [R] right or lower ends.
        cells: number of cells of the map along this axis.
        size: P.
        scale: cells per pixel.
        samples: S.

    Returns:
        [R, P, cells]; rows sum to 1 if all samples lie in the map or less than one cell outside it.
    """
    first_R = start_R * scale
    step_R = (stop_R * scale - first_R).clamp(min=1.0) / (size * samples)  # a region is at least one cell wide
    place_RQ = first_R[:, None] + (torch.arange(size * samples, device=start_R.device) + 0.5) * step_R[:, None]
    inside_RQ = (place_RQ >= -1.0) & (place_RQ <= cells)
    place_RQ = place_RQ.clamp(0, cells - 1)
    distance_RQC = (place_RQ[:, :, None] - torch.arange(cells, device=start_R.device)).abs()
    weight_RQC = (1 - distance_RQC).clamp(min=0) * inside_RQ[:, :, None]
    return weight_RQC.view(len(start_R), size, samples, cells).mean(2)
