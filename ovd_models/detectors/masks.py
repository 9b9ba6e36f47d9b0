"""Predict masks inside boxes, and paste them into the image.

B images, R regions of all images, N boxes of one image, S side of a predicted mask. Boxes are xyxy in pixels.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from faster_coco_eval import mask as rle
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import maskrcnn_loss

from ovd_models.batches import Detections
from ovd_models.detectors.region_pool import POOLED, RegionPool

MASK_WIDTH = 256
MAX_MASK_PIXELS = 2**25
"""Pixels of the masks that are pasted at a time, to bound memory."""


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


def paste_masks(probability_NSS: Tensor, box_N4: Tensor, height: int, width: int, threshold: float = 0.5) -> Tensor:
    """[N, height, width] bool masks of the image from probabilities inside each box, bilinear between cell centres.

    A pixel belongs to the object if its probability is at least `threshold`; it is 0 outside the box.
    """
    # Column after column, as COCO's RLE takes them.
    masks_NHW = torch.zeros((len(box_N4), width, height), dtype=torch.bool, device=box_N4.device).transpose(1, 2)
    low_N2, high_N2 = box_N4[:, :2].floor() - 1, box_N4[:, 2:].ceil() + 1  # the rest of a large image takes most time
    limit_2 = box_N4.new_tensor([width, height])
    windows_N4 = torch.minimum(torch.cat((low_N2, high_N2), 1).clamp(min=0), limit_2.repeat(2)).long().tolist()
    for mask_HW, probability_SS, box_4, (x0, y0, x1, y1) in zip(
        masks_NHW, probability_NSS, box_N4, windows_N4, strict=True
    ):
        x_w = (torch.arange(x0, x1, device=box_N4.device) + 0.5 - box_4[0]) / (box_4[2] - box_4[0]).clamp(min=1e-6)
        y_h = (torch.arange(y0, y1, device=box_N4.device) + 0.5 - box_4[1]) / (box_4[3] - box_4[1]).clamp(min=1e-6)
        grid_1hw2 = torch.stack(torch.meshgrid(x_w * 2 - 1, y_h * 2 - 1, indexing="xy"), dim=-1)[None]
        pasted_hw = F.grid_sample(probability_SS[None, None], grid_1hw2, align_corners=False)[0, 0]
        mask_HW[y0:y1, x0:x1] = pasted_hw >= threshold
    return masks_NHW


def encode_masks(probability_NSS: Tensor, box_N4: Tensor, height: int, width: int) -> tuple[str, ...]:
    """COCO RLE counts of N masks."""
    rows = max(1, MAX_MASK_PIXELS // max(1, height * width))
    counts: list[str] = []
    for mask_NSS, part_N4 in zip(torch.split(probability_NSS, rows), torch.split(box_N4, rows), strict=True):
        if len(part_N4):
            columns = paste_masks(mask_NSS, part_N4, height, width).view(torch.uint8).permute(1, 2, 0).cpu().numpy()
            counts += [entry["counts"].decode() for entry in rle.encode(np.asfortranarray(columns))]
    return tuple(counts)


def with_masks(detections: Sequence[Detections], logits_RSS: Tensor) -> list[Detections]:
    """Detections with masks from the logits [R, S, S] inside all their boxes, images in order."""
    parts = torch.split(logits_RSS.sigmoid(), [len(entry) for entry in detections])
    return [
        replace(entry, masks=encode_masks(part_NSS, entry.boxes, entry.height, entry.width))
        for entry, part_NSS in zip(detections, parts, strict=True)
    ]
