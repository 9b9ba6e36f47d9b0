"""Feature pyramids P3 to P7 on a backbone, and RoIAlign on their levels.

B images, R regions, F pyramid channels.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers.format import Format
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.swin_transformer import (
    ShiftedWindowAttention,
    SwinTransformer,
    SwinTransformerBlock,
    shifted_window_attention,
)
from torchvision.ops import FeaturePyramidNetwork, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from ovd_models.detectors.backbones import feature_info
from ovd_models.detectors.resizing import by_level, image_indices

CANONICAL_SIZE, CANONICAL_LEVEL = 224, 4
"""A region of this side is pooled from the level of stride 2 ** CANONICAL_LEVEL (FPN, section 4.2)."""


class ShiftedWindows(ShiftedWindowAttention):  # type: ignore[misc]
    """Attention in shifted windows of any map (Swin, section 3.2).

    torchvision's does not shift the windows of a map that fills only one of them; the original always does.
    """

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, H, W, E] -> [B, H, W, E]."""
        height, width = tokens.shape[1:3]
        (rows, columns), shift = self.window_size, self.shift_size
        padded = F.pad(tokens, (0, 0, 0, -width % columns, 0, -height % rows))
        # Windows at the end also hold tokens from the start of the map, which the others do not attend to.
        row_H, column_W = (
            torch.arange(length, device=tokens.device) >= length - moved
            for length, moved in zip(padded.shape[1:3], shift, strict=True)
        )
        kind_HW = 2 * row_H[:, None] + column_W
        high, wide = row_H.shape[0] // rows, column_W.shape[0] // columns  # shapes, for tracing
        split = kind_HW.view(high, rows, wide, columns).transpose(1, 2)
        kind_MN = split.reshape(-1, rows * columns)
        mask_MNN = -100.0 * (kind_MN[:, None] != kind_MN[:, :, None])
        bias = self.get_relative_position_bias() + mask_MNN[:, None].to(tokens.dtype).repeat(len(tokens), 1, 1, 1)
        attended = shifted_window_attention(
            torch.roll(padded, (-shift[0], -shift[1]), dims=(1, 2)),
            self.qkv.weight,
            self.proj.weight,
            bias,
            self.window_size,
            self.num_heads,
            shift_size=[0, 0],
            attention_dropout=self.attention_dropout,
            dropout=self.dropout,
            qkv_bias=self.qkv.bias,
            proj_bias=self.proj.bias,
            training=self.training,
        )
        return torch.roll(attended, (shift[0], shift[1]), dims=(1, 2))[:, :height, :width]


class SwinMaps(nn.Module):
    """Swin's maps of strides 8, 16 and 32, each with its own layer norm.

    torchvision's Swin pads a map to whole windows before it shifts them, like the original. timm's shifts first, which
    gives other values if the windows do not fill the map.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        block = partial(SwinTransformerBlock, attn_layer=ShiftedWindows)
        self.layers: nn.Sequential = SwinTransformer(**options, block=block).features
        self.widths = [options["embed_dim"] * factor for factor in (2, 4, 8)]
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in self.widths)

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, 3, H, W] -> three maps [B, width, H / stride, W / stride]."""
        maps, tokens_BHWE = [], self.layers[:2](images)
        for start, norm in zip((2, 4, 6), self.norms, strict=True):
            tokens_BHWE = self.layers[start : start + 2](tokens_BHWE)
            maps.append(norm(tokens_BHWE).permute(0, 3, 1, 2).contiguous())
        return maps


class TimmMaps(nn.Module):
    """The maps of a timm feature extractor, channels first."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.trunk = backbone
        self.widths = feature_info(self.trunk).channels()
        self.channels_last = getattr(self.trunk, "output_fmt", None) == Format.NHWC

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, 3, H, W] -> maps [B, width, H / stride, W / stride]."""
        maps: list[Tensor] = self.trunk(images)
        return [level.permute(0, 3, 1, 2).contiguous() for level in maps] if self.channels_last else maps


class Pyramid(nn.Module):
    """A feature pyramid of F channels on a backbone's maps of strides 8, 16 and 32, with two coarser levels."""

    def __init__(self, maps: SwinMaps | TimmMaps, channels: int) -> None:
        super().__init__()
        self.maps = maps
        self.pyramid = FeaturePyramidNetwork(maps.widths, channels, LastLevelP6P7(channels, channels))

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, 3, H, W] -> five levels [B, F, H / stride, W / stride]."""
        named = OrderedDict((str(index), level) for index, level in enumerate(self.maps(images)))
        return list(self.pyramid(named).values())


def pool_regions(levels: Sequence[Tensor], strides: Sequence[int], boxes: Sequence[Tensor], size: int) -> Tensor:
    """RoIAlign of each region on the level that suits its size, without the half-pixel shift of the original RoIAlign.

    torchvision's `MultiScaleRoIAlign` always has the shift.

    Args:
        levels: maps [B, F, H / stride, W / stride], finest first.
        strides: of the levels, each twice the one before.
        boxes: B tensors [N, 4] xyxy in pixels.
        size: bins per side.

    Returns:
        [R, F, size, size], images in order.
    """
    box_R4 = torch.cat(list(boxes)).float()  # half precision is too coarse for coordinates
    region_R5 = torch.cat((image_indices(boxes)[:, None].float(), box_R4), dim=1)
    return pool_levels(levels, strides, region_levels(box_R4, strides), region_R5, size)


def region_levels(box_R4: Tensor, strides: Sequence[int]) -> Tensor:
    """[R] int64, the level of each box that suits its size (FPN, equation 1)."""
    side_R = ((box_R4[:, 2] - box_R4[:, 0]).clamp(min=0) * (box_R4[:, 3] - box_R4[:, 1]).clamp(min=0)).sqrt()
    finest, coarsest = int(math.log2(strides[0])), int(math.log2(strides[-1]))
    level_R = torch.floor(CANONICAL_LEVEL + torch.log2(side_R / CANONICAL_SIZE + 1e-8))
    return level_R.clamp(finest, coarsest).long() - finest


def pool_levels(
    levels: Sequence[Tensor], strides: Sequence[int], level_R: Tensor, region_R5: Tensor, size: int
) -> Tensor:
    """[R, F, size, size] float32 RoIAlign of regions [R, 5] (image index and xyxy), each on its own level.

    In float32 even under autocast: bfloat16 moves the edges of a region by pixels.
    """
    region_R5 = region_R5.float()
    order_R, counts = by_level(level_R, len(levels))
    aligned = [
        roi_align(level.float(), part_R5, size, 1 / stride, sampling_ratio=-1, aligned=True)
        for level, stride, part_R5 in zip(levels, strides, torch.split(region_R5[order_R], counts), strict=True)
    ]
    pooled_RFSS = torch.cat(aligned)
    return torch.empty_like(pooled_RFSS).index_copy(0, order_R, pooled_RFSS)
