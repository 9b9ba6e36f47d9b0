"""Pictures of single things for CLIP: squares around masks, with or without what is around the thing.

P masks, B pictures, s side of CLIP's own input.
"""

from typing import Literal

import torch
from torch import Tensor
from torchvision.ops import roi_align

from ovd_models.segments import PIXELS_AT_A_TIME, boxes_of

Background = Literal["keep", "mean", "black"]
"""What is around the mask in a crop: left as it is, CLIP's mean colour, or black."""


def cut_outs(
    image_3HW: Tensor,
    masks_PHW: Tensor,
    *,
    mean: Tensor,
    std: Tensor,
    margin: float,
    background: Background,
    side: int,
) -> Tensor:
    """[P, 3, s, s] normalised squares around masks; beyond the image's edge they have CLIP's mean colour.

    Args:
        image_3HW: uint8.
        masks_PHW: bool; an empty mask has the whole image.
        mean: [3, 1, 1] of CLIP's normalisation, in grey levels.
        std: the same.
        margin: side of a square relative to the longer side of the mask's box.
        background: what is around the mask.
        side: s.
    """
    colours = (image_3HW.float() - mean) / std
    margin_P = torch.full((len(masks_PHW),), margin, device=image_3HW.device)
    boxes_P4 = boxes_or_whole(masks_PHW)
    if background == "keep":
        rows = torch.zeros(len(masks_PHW), dtype=torch.int64, device=image_3HW.device)
        return square_crops(colours[None], rows, boxes_P4, margin_P, side)
    fill = -mean / std if background == "black" else torch.zeros_like(mean)
    few = max(1, PIXELS_AT_A_TIME // image_3HW.numel())  # a picture of the image's size is made for each mask
    parts = (torch.split(values, few) for values in (masks_PHW, boxes_P4, margin_P))
    crops = []
    for masks, boxes, margins in zip(*parts, strict=True):
        rows = torch.arange(len(masks), device=masks.device)
        crops.append(square_crops(torch.where(masks[:, None], colours, fill), rows, boxes, margins, side))
    return torch.cat(crops)


def square_crops(pictures_B3HW: Tensor, source_P: Tensor, boxes_P4: Tensor, margin_P: Tensor, side: int) -> Tensor:
    """[P, 3, s, s] squares around boxes, `margin` times their longer side; zeros beyond a picture's edge.

    Args:
        pictures_B3HW: normalised colours.
        source_P: [P] int64, the picture of each box.
        boxes_P4: xyxy in pixels of the picture.
        margin_P: [P].
        side: s.
    """
    centre_P2, sides_P2 = (boxes_P4[:, :2] + boxes_P4[:, 2:]) / 2, boxes_P4[:, 2:] - boxes_P4[:, :2]
    half_P1 = sides_P2.amax(1, keepdim=True) * margin_P[:, None] / 2
    rois_P5 = torch.cat([source_P[:, None].to(boxes_P4), centre_P2 - half_P1, centre_P2 + half_P1], dim=1)
    crops: Tensor = roi_align(pictures_B3HW, rois_P5, side, 1.0, 2, aligned=True)
    return crops


def boxes_or_whole(masks_PHW: Tensor) -> Tensor:
    """[P, 4] tight boxes; an empty mask has the whole image."""
    boxes_P4 = boxes_of(masks_PHW)
    whole = boxes_P4.new_tensor([0, 0, masks_PHW.shape[2], masks_PHW.shape[1]])
    return torch.where(masks_PHW.flatten(1).any(1)[:, None], boxes_P4, whole)
