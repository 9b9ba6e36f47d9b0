"""SAM2CLIP: the adapter from CLIP's levels to SAM's image embedding, and its loss (arXiv 2401.02955).

B images, C prompt width, W adapter width, h side of the embedding.
"""

from collections.abc import Sequence
from functools import partial

import torch
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.image_encoder import Block
from torch import Tensor, nn

from ovd_models.errors import InputError
from ovd_models.sam.model import SamConfig


class LevelProjection(nn.Module):
    """One CLIP level on the embedding's grid: a strided convolution, or a transposed one for coarser levels."""

    def __init__(self, channels: int, width: int, stride: int, target_stride: int) -> None:
        super().__init__()
        if max(stride, target_stride) % min(stride, target_stride):
            raise InputError(f"CLIP level of stride {stride}: does not fit SAM's stride {target_stride}")
        down, up = max(1, target_stride // stride), max(1, stride // target_stride)
        self.projection: nn.Module = (
            nn.ConvTranspose2d(channels, width, up, up) if up > 1 else nn.Conv2d(channels, width, down, down)
        )

    def forward(self, level_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, W, h, h]."""
        projected: Tensor = self.projection(level_BCHW)
        return projected


class Sam2Clip(nn.Module):
    """The adapter: CLIP's levels, each projected, summed, and refined by ViTDet blocks to SAM's image embedding.

    Args:
        channels: of CLIP's levels.
        strides: of CLIP's levels, in pixels.
        config: of SAM, whose width, heads, window, grid and prompt width the adapter shares.
        depth: number of blocks.
        grid: height and width of the embedding; a square of SAM's own size if None.
    """

    pos_embed: Tensor

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        config: SamConfig,
        depth: int,
        grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        grid = grid or (config.embedding_side, config.embedding_side)
        width, out = config.width, config.prompt_width
        self.patch_embeds = nn.ModuleList(
            LevelProjection(count, width, stride, config.patch_size)
            for count, stride in zip(channels, strides, strict=True)
        )
        self.level_encoding = nn.Embedding(len(channels), width)
        self.register_buffer("pos_embed", torch.zeros(1, *grid, width))
        self.blocks = nn.ModuleList(
            Block(
                dim=width,
                num_heads=config.heads,
                norm_layer=partial(nn.LayerNorm, eps=1e-6),
                use_rel_pos=True,
                window_size=config.window if index < depth - 1 else 0,
                input_size=grid,
            )
            for index in range(depth)
        )
        self.neck = nn.Sequential(
            nn.Conv2d(width, out, 1, bias=False),
            LayerNorm2d(out),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
            LayerNorm2d(out),
        )

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """CLIP's levels -> [B, C, h, h]."""
        hidden_BhhW = self.fused(levels)
        for block in self.blocks:
            hidden_BhhW = block(hidden_BhhW)
        embedding: Tensor = self.neck(hidden_BhhW.permute(0, 3, 1, 2))
        return embedding

    def fused(self, levels: Sequence[Tensor]) -> Tensor:
        """[B, h, h, W] sum of the projected levels with their level and position embeddings."""
        projected = [
            project(level) + code[:, None, None]
            for project, level, code in zip(self.patch_embeds, levels, self.level_encoding.weight, strict=True)
        ]
        return torch.stack(projected).sum(0).permute(0, 2, 3, 1) + self.pos_embed


def feature_distillation_loss(student_BChw: Tensor, teacher_BChw: Tensor, valid_Bhw: Tensor) -> Tensor:
    """Mean squared difference over the positions of the image, not of its padding; 0 if there are none."""
    difference_Bhw = (student_BChw - teacher_BChw.to(student_BChw.dtype)).square().mean(1)
    return (difference_Bhw * valid_Bhw).sum() / valid_Bhw.sum().clamp(min=1)


def valid_positions(sizes: Sequence[tuple[int, int]], patch: int, side: int) -> Tensor:
    """[B, h, h] bool: positions whose patch holds a pixel of the image, not padding alone.

    `sizes` are heights and widths of the resized images, and `patch` is the side of a patch, both in pixels.
    """
    limits_B2 = torch.tensor([[-(-height // patch), -(-width // patch)] for height, width in sizes]).view(-1, 2)
    place_h = torch.arange(side)
    return (place_h[:, None] < limits_B2[:, 0, None, None]) & (place_h < limits_B2[:, 1, None, None])
