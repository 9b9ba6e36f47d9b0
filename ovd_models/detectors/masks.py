"""Masks predicted inside boxes as masks of the image.

N boxes, S side of a predicted mask. Boxes are xyxy in pixels of the image.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from faster_coco_eval import mask as rle
from torch import Tensor
from torch.nn import functional as F

from ovd_models.batches import Detections

MASKS_AT_A_TIME = 32


def paste_masks(probability_NSS: Tensor, box_N4: Tensor, height: int, width: int, threshold: float = 0.5) -> Tensor:
    """Paste each box's mask into the image, bilinearly between the cells' centres.

    Args:
        probability_NSS: [N, S, S] inside each box.
        box_N4: [N, 4] in pixels of the image.
        height: of the image.
        width: of the image.
        threshold: least probability of a pixel of the object.

    Returns:
        [N, height, width] bool.
    """
    rows = max(1, math.floor(2**26 / max(1, height * width)))  # masks at a time, to bound memory
    pasted = [box_N4.new_zeros((0, height, width), dtype=torch.bool)]
    for mask_NSS, part_N4 in zip(torch.split(probability_NSS, rows), torch.split(box_N4, rows), strict=True):
        x_W = torch.arange(width, device=box_N4.device) + 0.5
        y_H = torch.arange(height, device=box_N4.device) + 0.5
        left_N1, top_N1, right_N1, bottom_N1 = part_N4[:, :, None].unbind(1)
        x_NW = (x_W - left_N1) / (right_N1 - left_N1).clamp(min=1e-6) * 2 - 1
        y_NH = (y_H - top_N1) / (bottom_N1 - top_N1).clamp(min=1e-6) * 2 - 1
        shape = (len(part_N4), height, width)
        grid_NHW2 = torch.stack((x_NW[:, None].expand(shape), y_NH[:, :, None].expand(shape)), dim=-1)
        pasted.append(F.grid_sample(mask_NSS[:, None], grid_NHW2, align_corners=False)[:, 0] >= threshold)
    return torch.cat(pasted)


def encode_masks(probability_NSS: Tensor, box_N4: Tensor, height: int, width: int) -> tuple[str, ...]:
    """COCO RLE counts of N masks, a few at a time, since each is as large as the image."""
    counts: list[str] = []
    for start in range(0, len(box_N4), MASKS_AT_A_TIME):
        rows = slice(start, start + MASKS_AT_A_TIME)
        pasted_NHW = paste_masks(probability_NSS[rows], box_N4[rows], height, width)
        columns = pasted_NHW.to(torch.uint8).permute(1, 2, 0).cpu().numpy()
        counts += [entry["counts"].decode() for entry in rle.encode(columns.copy(order="F"))]
    return tuple(counts)


def with_masks(detections: Sequence[Detections], logits_RSS: Tensor) -> list[Detections]:
    """Detections with masks from the logits [R, S, S] inside all their boxes, images in order."""
    parts = torch.split(logits_RSS.sigmoid(), [len(entry) for entry in detections])
    return [
        replace(entry, masks=encode_masks(part_NSS, entry.boxes, entry.height, entry.width))
        for entry, part_NSS in zip(detections, parts, strict=True)
    ]
