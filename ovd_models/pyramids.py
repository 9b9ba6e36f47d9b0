"""Feature pyramids P3 to P7 on a timm backbone, and RoIAlign on their levels.

B images, R regions, F pyramid channels.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from timm.layers.format import Format
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from ovd_models.rcnn import RCNNConfig, build_backbone, feature_info

CANONICAL_SIZE, CANONICAL_LEVEL = 224, 4
"""A region of this side is looked at on the level of stride 2 ** CANONICAL_LEVEL (FPN, section 4.2)."""


class TimmPyramid(nn.Module):
    """A feature pyramid on any timm backbone that gives feature maps, with two coarser levels on top.

    Args:
        config: backbone, its strides and the pyramid's channels.
        norm_maps: put a layer norm on each map before the pyramid, as for Swin.
    """

    def __init__(self, config: RCNNConfig, norm_maps: bool) -> None:
        super().__init__()
        self.trunk = build_backbone(config)
        info = feature_info(self.trunk)
        self.channels_last = getattr(self.trunk, "output_fmt", None) == Format.NHWC
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in info.channels() if norm_maps)
        top = LastLevelP6P7(config.pyramid_channels, config.pyramid_channels)
        self.pyramid = FeaturePyramidNetwork(info.channels(), config.pyramid_channels, top)

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, 3, H, W] -> five levels [B, F, H / stride, W / stride]."""
        maps = self.trunk(images)
        if not self.channels_last and self.norms:
            maps = [level.permute(0, 2, 3, 1) for level in maps]
        if self.norms:
            maps = [norm(level) for norm, level in zip(self.norms, maps, strict=True)]
        if self.channels_last or self.norms:
            maps = [level.permute(0, 3, 1, 2).contiguous() for level in maps]
        named = OrderedDict((str(index), level) for index, level in enumerate(maps))
        return list(self.pyramid(named).values())


def pool_regions(levels: Sequence[Tensor], strides: Sequence[int], boxes: Sequence[Tensor], size: int) -> Tensor:
    """RoIAlign of each region on the level that suits its size, without the half-pixel shift of the original RoIAlign.

    torchvision's `MultiScaleRoIAlign` has the shift and cannot be told otherwise.

    Args:
        levels: maps [B, F, H / stride, W / stride], finest first.
        strides: of the levels, each twice the one before.
        boxes: B tensors [N, 4] xyxy in pixels.
        size: cells of a side.

    Returns:
        [R, F, size, size], images in order.
    """
    box_R4 = torch.cat(list(boxes)).to(levels[0].dtype)
    image_R = torch.repeat_interleave(torch.tensor([len(entry) for entry in boxes], device=box_R4.device))
    region_R5 = torch.cat((image_R[:, None].to(box_R4.dtype), box_R4), dim=1)
    side_R = (box_R4[:, 2:] - box_R4[:, :2]).clamp(min=0).prod(1).sqrt()
    wanted_R = torch.floor(CANONICAL_LEVEL + torch.log2(side_R / CANONICAL_SIZE + 1e-8))
    level_R = wanted_R.clamp(math.log2(strides[0]), math.log2(strides[-1])).long() - int(math.log2(strides[0]))
    pooled_RFSS = levels[0].new_zeros(len(box_R4), levels[0].shape[1], size, size)
    for index, (level, stride) in enumerate(zip(levels, strides, strict=True)):
        rows = torch.nonzero(level_R == index).squeeze(1)
        aligned = roi_align(level, region_R5[rows], size, 1 / stride, sampling_ratio=-1, aligned=True)
        pooled_RFSS = pooled_RFSS.index_copy(0, rows, aligned)
    return pooled_RFSS
