"""Pictures of a model's attention in a group of captioned images.

g images of a group, N proposals of an image, M proposals of the group.
"""

from collections.abc import Sequence

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ovd_models.drawing import draw_boxes

MAP_SIDE = 640
SHOWN, LEAST_SHOWN = 3, 0.01
"""Proposals per image that are drawn with their attention: how many, and with how much of it at least."""
DARKEST = 0.4
"""Brightness where there is no attention."""


def draw_attention(
    images: Sequence[Tensor], boxes: Sequence[Tensor], attention: Sequence[Tensor], title: str, captions: Sequence[str]
) -> Image.Image:
    """A group's images side by side, brighter where attention is high, with the proposals that have most of it.

    Args:
        images: g tensors [3, H, W] uint8.
        boxes: g tensors [N, 4] xyxy, pixels.
        attention: g tensors [N].
        title: drawn above the images.
        captions: g, drawn below the images.
    """
    panels = []
    for image, box, weight in zip(images, boxes, attention, strict=True):
        pixels = image.cpu().permute(1, 2, 0).float() * (
            DARKEST + (1 - DARKEST) * attention_map(box, weight, *image.shape[1:])[..., None]
        )
        most = weight.topk(min(SHOWN, len(weight))).indices.cpu()
        most = most[weight.cpu()[most] >= LEAST_SHOWN]
        texts = [f"{value:.2f}" for value in weight[most].tolist()]
        picture = Image.fromarray(pixels.to(torch.uint8).numpy())
        panels.append(draw_boxes(picture, box.cpu()[most], texts, list(range(len(most)))))
    height = max(panel.height for panel in panels)
    sheet = Image.new("RGB", (sum(panel.width + 6 for panel in panels) - 6, height + 48), "white")
    pen, font, x = ImageDraw.Draw(sheet), ImageFont.load_default(13), 0
    pen.text((4, 4), title, font=font, fill="black")
    for panel, caption in zip(panels, captions, strict=True):
        sheet.paste(panel, (x, 24))
        letters = max(8, panel.width // 8)
        pen.text((x + 2, height + 28), caption[:letters], font=font, fill="black")
        x += panel.width + 6
    return sheet


def attention_map(boxes: Tensor, attention: Tensor, height: int, width: int) -> Tensor:
    """[H, W] in [0, 1]: total attention of the boxes around each pixel, divided by the maximum; 1 without boxes."""
    if not len(boxes):
        return torch.ones(height, width)
    left, top, right, bottom = boxes.cpu()[:, :, None].unbind(1)
    x_W, y_H = torch.arange(width) + 0.5, torch.arange(height) + 0.5
    inside_NHW = ((y_H >= top) & (y_H < bottom))[:, :, None] & ((x_W >= left) & (x_W < right))[:, None, :]
    sums_HW = (inside_NHW * attention.cpu().float()[:, None, None]).sum(0)
    return sums_HW / sums_HW.max().clamp(min=1e-6)


def draw_similarity(similarity: Tensor, counts: Sequence[int]) -> Image.Image:
    """A heat map of the similarities [M, M] of a group's proposals, with lines between images of `counts` proposals."""
    values = similarity.cpu().float().numpy() if len(similarity) else np.zeros((1, 1))
    low, high = float(values.min()), float(values.max())
    colours = matplotlib.colormaps["viridis"]((values - low) / max(1e-6, high - low))[..., :3]
    scale = max(1, MAP_SIDE // len(values))
    side = scale * len(values)
    picture = Image.fromarray((colours * 255).astype(np.uint8)).resize((side, side), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(picture)
    for edge in np.cumsum(counts)[:-1].tolist():
        pen.line((edge * scale, 0, edge * scale, picture.height), fill="white", width=1)
        pen.line((0, edge * scale, picture.width, edge * scale), fill="white", width=1)
    return picture
