"""EVA-02 as a detector's backbone: windowed attention, rotary positions and a pyramid from its last map alone.

EVA-02 (arXiv 2303.11331) in the manner of ViTDet (arXiv 2203.16527), on timm's blocks. B images, E width of a token,
H x W tokens, F pyramid channels.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from timm.layers.norm import LayerNorm2d
from timm.layers.pos_embed_sincos import build_rotary_pos_embed
from timm.models.eva import EvaBlock
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class EvaConfig:
    """The transformer; the defaults are EVA-02-L."""

    width: int = 1024
    depth: int = 24
    heads: int = 16
    hidden: int = 2730
    """Width of a block's MLP."""
    patch: int = 16
    """Side of a token in pixels."""
    trained_grid: int = 14
    """Tokens per side of the position table, as in pretraining."""
    rotary_grid: int = 16
    """Tokens per side of the grid whose rotary angles are interpolated."""
    window_share: float = 0.4
    """Window side over grid side: 32 of 80 tokens for the published 1280 px, 16 of 40 for 640."""
    global_every: int = 3
    """Every n-th block attends to the whole image, the others within windows."""
    drop_path: float = 0.4


class ConvNorm(nn.Conv2d):
    """A convolution followed by a layer norm over channels."""

    def __init__(self, width_in: int, width_out: int, size: int) -> None:
        super().__init__(width_in, width_out, size, padding=size // 2, bias=False)
        self.norm = LayerNorm2d(width_out)

    def forward(self, input: Tensor) -> Tensor:
        """[B, width_in, H, W] -> [B, width_out, H, W]."""
        return self.norm(super().forward(input))  # type: ignore[no-any-return]


class EvaPyramid(nn.Module):
    """Levels P2 to P7 of F channels from EVA-02's last map."""

    def __init__(self, config: EvaConfig, channels: int) -> None:
        super().__init__()
        self.config = c = config
        self.patches = nn.Conv2d(3, c.width, c.patch, c.patch)
        self.positions = nn.Parameter(torch.zeros(1, 1 + c.trained_grid**2, c.width))  # the first is the class token's
        nn.init.trunc_normal_(self.positions, std=0.02)
        self.blocks = nn.ModuleList(
            EvaBlock(
                c.width, c.heads, qkv_fused=False, mlp_ratio=(c.hidden + 0.5) / c.width, swiglu_mlp=True,
                scale_mlp=True, num_prefix_tokens=0, drop_path=c.drop_path * index / max(1, c.depth - 1),
                norm_layer=partial(nn.LayerNorm, eps=1e-6),
            )
            for index in range(c.depth)
        )  # fmt: skip
        half, quarter = c.width // 2, c.width // 4
        widths = (quarter, half, c.width, c.width)
        ends = [(ConvNorm(width, channels, 1), ConvNorm(channels, channels, 3)) for width in widths]
        up = (
            nn.ConvTranspose2d(c.width, half, 2, 2),
            LayerNorm2d(half),
            nn.GELU(),
            nn.ConvTranspose2d(half, quarter, 2, 2),
        )
        starts = (up, (nn.ConvTranspose2d(c.width, half, 2, 2),), (), (nn.MaxPool2d(2),))
        self.simple = nn.ModuleList(nn.Sequential(*start, *end) for start, end in zip(starts, ends, strict=True))
        self.p6, self.p7 = (nn.Conv2d(channels, channels, 3, 2, 1) for _ in range(2))

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, 3, height, width] -> six levels [B, F, height / stride, width / stride], strides 4 to 128."""
        c = self.config
        height, width = images.shape[-2:]
        # Positions belong to a square grid that the longer side fills; its side is even for the halved level.
        grid = 2 * math.ceil(max(height, width) / (2 * c.patch))
        side = grid * c.patch
        tokens_BHWE = self.patches(F.pad(images, (0, side - width, 0, side - height))).permute(0, 2, 3, 1)
        table = self.positions[:, 1:].reshape(1, c.trained_grid, c.trained_grid, c.width).permute(0, 3, 1, 2)
        placed = F.interpolate(table, (grid, grid), mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
        tokens_BHWE = tokens_BHWE + placed.to(tokens_BHWE.dtype)
        window = max(1, round(c.window_share * grid))
        angles = {size: rotary_angles(size, c, tokens_BHWE) for size in (grid, window)}
        for index, block in enumerate(self.blocks):
            size = grid if (index + 1) % c.global_every == 0 else window
            tokens_BHWE = run_block(block, tokens_BHWE, size, angles[size])
        last = tokens_BHWE.permute(0, 3, 1, 2)
        levels = [level(last) for level in self.simple]
        top = self.p6(levels[-1])
        levels += [top, self.p7(F.relu(top))]
        strides = [c.patch * 2.0**power for power in range(-2, 4)]
        return [
            level[..., : math.ceil(height / stride), : math.ceil(width / stride)]
            for level, stride in zip(levels, strides, strict=True)
        ]


def rotary_angles(size: int, config: EvaConfig, like: Tensor) -> Tensor:
    """[size * size, 2 * head width] sines and cosines of a square of tokens, row after row."""
    sine, cosine = build_rotary_pos_embed(
        [size, size],
        dim=config.width // config.heads,
        in_pixels=False,
        ref_feat_shape=[config.rotary_grid, config.rotary_grid],
        device=like.device,
    )
    return torch.cat((sine, cosine), dim=-1)


def run_block(block: nn.Module, tokens_BHWE: Tensor, window: int, angles: Tensor) -> Tensor:
    """[B, H, W, E] -> [B, H, W, E]: timm's `EvaBlock` with attention within windows of `window` x `window` tokens.

    The grid is padded to whole windows; `angles` are those of a window's tokens.
    """
    height, width = tokens_BHWE.shape[1:3]
    normed = block.norm1(tokens_BHWE)  # type: ignore[operator]
    padded = F.pad(normed, (0, 0, 0, -width % window, 0, -height % window))
    rows, columns = padded.shape[1] // window, padded.shape[2] // window
    split = padded.reshape(len(padded), rows, window, columns, window, -1).transpose(2, 3)
    attended = block.attn(split.reshape(-1, window * window, split.shape[-1]), rope=angles)  # type: ignore[operator]
    joined = attended.view_as(split).transpose(2, 3).reshape(padded.shape)[:, :height, :width]
    tokens_BHWE = tokens_BHWE + block.drop_path1(joined)  # type: ignore[operator]
    return tokens_BHWE + block.drop_path2(block.mlp(block.norm2(tokens_BHWE)))  # type: ignore[operator, no-any-return]
