"""Square crops around boxes and masks, with or without their background.

P masks, B images, s side of the crops.
"""

from typing import Literal

import torch
from torch import Tensor
from torchvision.ops import roi_align

from ovd_models.segments import PIXELS_AT_A_TIME, boxes_of

Background = Literal["keep", "mean", "black"]
"""What surrounds the mask in a crop: the image itself, CLIP's mean colour, or black."""


def crop_masks(
    colours_3HW: Tensor, masks_PHW: Tensor, black: Tensor, margin: float, background: Background, side: int
) -> Tensor:
    """[P, 3, s, s] square crops around masks; beyond the image's edge they have CLIP's mean colour.

    Args:
        colours_3HW: the normalised image.
        masks_PHW: bool; an empty mask stands for the whole image.
        black: [3, 1, 1], normalised.
        margin: side of a square relative to the longer side of the mask's box.
        background: what surrounds the mask.
        side: s.
    """
    boxes_P4 = boxes_of(masks_PHW, whole_if_empty=True)
    if background == "keep":
        rows = torch.zeros(len(masks_PHW), dtype=torch.int64, device=colours_3HW.device)
        return square_crops(colours_3HW[None], rows, boxes_P4, torch.full_like(boxes_P4[:, 0], margin), side)
    fill = black if background == "black" else torch.zeros_like(black)
    count = max(1, PIXELS_AT_A_TIME // colours_3HW.numel())  # each mask takes a copy of the image
    crops = []
    for masks, boxes in zip(torch.split(masks_PHW, count), torch.split(boxes_P4, count), strict=True):
        rows, margins = torch.arange(len(masks), device=masks.device), torch.full_like(boxes[:, 0], margin)
        shown = masks | ~masks.flatten(1).any(1)[:, None, None]
        crops.append(square_crops(torch.where(shown[:, None], colours_3HW, fill), rows, boxes, margins, side))
    return torch.cat(crops)


def square_crops(images_B3HW: Tensor, source_P: Tensor, boxes_P4: Tensor, margin_P: Tensor, side: int) -> Tensor:
    """[P, 3, s, s] squares around boxes, `margin` times their longer side; zeros beyond an image's edge.

    Args:
        images_B3HW: normalised colours.
        source_P: [P] int64, the image of each box.
        boxes_P4: xyxy in pixels of the image.
        margin_P: [P].
        side: s.
    """
    centre_P2, sides_P2 = (boxes_P4[:, :2] + boxes_P4[:, 2:]) / 2, boxes_P4[:, 2:] - boxes_P4[:, :2]
    half_P1 = sides_P2.amax(1, keepdim=True) * margin_P[:, None] / 2
    rois_P5 = torch.cat([source_P[:, None].to(boxes_P4), centre_P2 - half_P1, centre_P2 + half_P1], dim=1)
    crops: Tensor = roi_align(images_B3HW, rois_P5, side, 1.0, 2, aligned=True)
    return crops
