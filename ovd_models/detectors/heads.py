"""Heads of a two-stage detector: box features, box refinement and masks.

B images, R regions, N boxes of one image, S side of a mask, F channels.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import maskrcnn_loss
from torchvision.ops import Conv2dNormActivation

from ovd_models.detectors.region_pool import RegionPool

POOLED = 7
"""Side of a pooled region."""
MASK_WIDTH = 256


def build_box_head(channels: int, width: int, convs: int) -> nn.Module:
    """[R, channels, 7, 7] -> [R, width]: any number of 3x3 convolutions, then two fully connected layers.

    With convolutions, every layer has batch norm, as in ViLD (4conv + 2FC).
    """
    if not convs:
        return cast(nn.Module, TwoMLPHead(channels * POOLED**2, width))
    layers: list[nn.Module] = [Conv2dNormActivation(channels, channels) for _ in range(convs)]
    layers.append(nn.Flatten())
    for inputs in (channels * POOLED**2, width):
        layers += [nn.Linear(inputs, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def build_box_deltas(width: int) -> nn.Sequential:
    """[R, width] features -> [R, 4] class-agnostic box displacements."""
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))


class MaskHead(nn.Module):
    """Class-agnostic masks: pooling to 14x14, four convolutions, one deconvolution, 28x28 logits."""

    def __init__(self, channels: int, strides: Sequence[int], samples: int) -> None:
        super().__init__()
        width = min(MASK_WIDTH, channels)
        self.pool = RegionPool(strides, 2 * POOLED, samples)
        self.layers = MaskRCNNHeads(channels, (width,) * 4, 1)
        self.predictor = MaskRCNNPredictor(width, width, 1)

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor]) -> Tensor:
        """[R, 28, 28] logits inside B tensors of boxes [N, 4], images in order."""
        return cast(Tensor, self.predictor(self.layers(self.pool(features, boxes))))[:, 0]


def mask_loss(logits_RSS: Tensor, boxes: list[Tensor], matched: list[Tensor], masks: Sequence[Tensor]) -> Tensor:
    """Binary cross-entropy between predicted masks and annotated ones cropped to the regions; 0 for no region.

    Args:
        logits_RSS: [R, S, S], images in order.
        boxes: B tensors [N, 4] of regions, pixels of the masks.
        matched: B tensors [N] int64, rows of the image's masks.
        masks: B tensors [objects, H, W] bool.
    """
    whole = [mask.float() for mask in masks]
    labels = [torch.zeros(len(mask), dtype=torch.int64, device=logits_RSS.device) for mask in masks]
    return cast(Tensor, maskrcnn_loss(logits_RSS[:, None].float(), boxes, whole, labels, matched))
