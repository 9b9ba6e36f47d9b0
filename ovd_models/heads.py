"""What a two-stage detector says about regions, beside their class: the box head's layers, and masks.

B images, R regions, F channels.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import maskrcnn_loss
from torchvision.ops import Conv2dNormActivation

from ovd_models.region_pool import RegionPool

POOLED = 7
"""Side of a pooled region."""
MASK_WIDTH = 256


def build_box_head(channels: int, width: int, convs: int) -> nn.Module:
    """[R, channels, 7, 7] -> [R, width]: two fully connected layers, after any number of 3x3 convolutions.

    With convolutions every layer has batch norm, as in ViLD (4conv + 2FC).
    """
    if not convs:
        return cast(nn.Module, TwoMLPHead(channels * POOLED**2, width))
    layers: list[nn.Module] = [Conv2dNormActivation(channels, channels) for _ in range(convs)]
    layers.append(nn.Flatten())
    for inputs in (channels * POOLED**2, width):
        layers += [nn.Linear(inputs, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class MaskHead(nn.Module):
    """Class-agnostic masks: 14x14 regions, four convolutions, one deconvolution, 28x28 logits."""

    def __init__(self, channels: int, strides: Sequence[int], samples: int) -> None:
        super().__init__()
        width = min(MASK_WIDTH, channels)
        self.pool = RegionPool(strides, 2 * POOLED, samples)
        self.layers = MaskRCNNHeads(channels, (width,) * 4, 1)
        self.predictor = MaskRCNNPredictor(width, width, 1)

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]]) -> Tensor:
        """[R, 28, 28] logits of the boxes of each image, in resized pixels."""
        return cast(Tensor, self.predictor(self.layers(self.pool(features, boxes, sizes))))[:, 0]


def mask_loss(logits_RSS: Tensor, boxes: list[Tensor], matched: list[Tensor], masks: Sequence[Tensor]) -> Tensor:
    """Binary cross-entropy between predicted masks and annotated ones, cut out at the regions; 0 for no region.

    Args:
        logits_RSS: [R, S, S] of all images, in order.
        boxes: B tensors [R_b, 4], pixels of the masks.
        matched: B tensors [R_b] int64, rows of the image's masks.
        masks: B tensors [N_b, H, W] bool.
    """
    whole = [mask.float() for mask in masks]
    labels = [torch.zeros(len(mask), dtype=torch.int64, device=logits_RSS.device) for mask in masks]
    return cast(Tensor, maskrcnn_loss(logits_RSS[:, None].float(), boxes, whole, labels, matched))


def paste_masks(logits_NSS: Tensor, box_N4: Tensor, height: int, width: int) -> Tensor:
    """[N, S, S] logits at their boxes [N, 4] -> [N, H, W] bool masks of the whole image.

    A pixel belongs to a mask where the logits, sampled bilinearly at its centre, are above 0.
    """
    if not len(box_N4):
        return logits_NSS.new_zeros((0, height, width), dtype=torch.bool)
    y_H = torch.arange(height, device=box_N4.device) + 0.5
    x_W = torch.arange(width, device=box_N4.device) + 0.5
    left_N, top_N, right_N, bottom_N = box_N4.float().unbind(1)
    across_NW = (x_W - left_N[:, None]) / (right_N - left_N).clamp(min=1e-6)[:, None] * 2 - 1
    down_NH = (y_H - top_N[:, None]) / (bottom_N - top_N).clamp(min=1e-6)[:, None] * 2 - 1
    count = len(box_N4)
    grid_NHW2 = torch.stack(
        [across_NW[:, None, :].expand(count, height, width), down_NH[:, :, None].expand(count, height, width)], -1
    )
    inside_NHW = (grid_NHW2.abs() <= 1).all(-1)
    sampled = F.grid_sample(logits_NSS[:, None].float(), grid_NHW2, padding_mode="border", align_corners=False)
    return (sampled[:, 0] > 0) & inside_NHW
