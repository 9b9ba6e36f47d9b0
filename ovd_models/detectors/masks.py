"""Predict masks inside boxes, and paste them into the image.

B images, R regions of all images, N boxes of one image, S side of a predicted mask. Boxes are xyxy in pixels.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

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
    x_W = torch.arange(width, device=box_N4.device) + 0.5
    y_H = torch.arange(height, device=box_N4.device) + 0.5
    left_N1, top_N1, right_N1, bottom_N1 = box_N4[:, :, None].unbind(1)
    x_NW = (x_W - left_N1) / (right_N1 - left_N1).clamp(min=1e-6) * 2 - 1
    y_NH = (y_H - top_N1) / (bottom_N1 - top_N1).clamp(min=1e-6) * 2 - 1
    shape = (len(box_N4), height, width)
    grid_NHW2 = torch.stack((x_NW[:, None].expand(shape), y_NH[:, :, None].expand(shape)), dim=-1)
    return F.grid_sample(probability_NSS[:, None], grid_NHW2, align_corners=False)[:, 0] >= threshold


def encode_masks(probability_NSS: Tensor, box_N4: Tensor, height: int, width: int) -> tuple[str, ...]:
    """COCO RLE counts of N masks."""
    rows = max(1, MAX_MASK_PIXELS // max(1, height * width))
    counts: list[str] = []
    for mask_NSS, part_N4 in zip(torch.split(probability_NSS, rows), torch.split(box_N4, rows), strict=True):
        if len(part_N4):
            columns = paste_masks(mask_NSS, part_N4, height, width).to(torch.uint8).permute(1, 2, 0).cpu().numpy()
            counts += [entry["counts"].decode() for entry in rle.encode(columns.copy(order="F"))]
    return tuple(counts)


def with_masks(detections: Sequence[Detections], logits_RSS: Tensor) -> list[Detections]:
    """Detections with masks from the logits [R, S, S] inside all their boxes, images in order."""
    parts = torch.split(logits_RSS.sigmoid(), [len(entry) for entry in detections])
    return [
        replace(entry, masks=encode_masks(part_NSS, entry.boxes, entry.height, entry.width))
        for entry, part_NSS in zip(detections, parts, strict=True)
    ]
