"""Training OV-SAM: SAM2CLIP by distillation from a SAM, then CLIP2SAM from masks with names (arXiv 2401.02955).

B images, P prompts of all images, C prompt width, h embedding side, L = 4 h, S side of the model's input, K names,
Y synonyms, D embedding width, N sampled points.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ovd_models.batches import ImageBatch
from ovd_models.losses import zero_loss
from ovd_models.ovsam.adapter import feature_distillation_loss, valid_positions
from ovd_models.ovsam.head import label_loss, mask_losses, read_points, uncertain_points
from ovd_models.ovsam.model import OvSam
from ovd_models.sam.training import SampledObjects, jitter_boxes, mask_ious, sample_objects, sample_pixels
from ovd_models.segments import MaskBatch


@dataclass(frozen=True)
class FeatureBatch(ImageBatch):
    """B images with their SAM embeddings."""

    features: Tensor
    """[B, C, h, h] float16 or float32."""


class Sam2ClipTraining(nn.Module):
    """Training step of the adapter; all else is frozen."""

    def __init__(self, model: OvSam) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        model.adapter.requires_grad_(True)

    def forward(self, batch: FeatureBatch) -> dict[str, Tensor]:
        """`distillation`: the mean squared difference from SAM's embedding over the image, without padding."""
        model = self.model
        pixels, sizes = model.preprocess(batch.images)
        student_BChw = model.adapter(model.clip(pixels))
        valid_Bhw = valid_positions(sizes, model.config.sam.patch_size, student_BChw.shape[-1])
        valid_Bhw = valid_Bhw.to(student_BChw.device, non_blocking=True)
        return {"distillation": feature_distillation_loss(student_BChw, batch.features, valid_Bhw)}


@dataclass(frozen=True, kw_only=True)
class Clip2SamConfig:
    """How CLIP2SAM is trained; the loss weights are the paper's."""

    prompts_per_image: int = 4
    """Objects of an image used as prompts, drawn with replacement: half as a box, half as a click."""
    box_jitter: float = 0.05
    """Standard deviation of a box's corners, relative to its sides."""
    max_jitter: float = 20.0
    """Maximum shift of a corner, in pixels of the model's input."""
    min_predicted_iou: float = 0.5
    """Minimum IoU of a click's predicted mask for its box to be the region; else the object's jittered box is."""
    num_points: int = 2048
    """N: sampled points of each mask."""
    label_weight: float = 2.0
    mask_weight: float = 5.0
    dice_weight: float = 5.0
    iou_weight: float = 1.0


class Clip2SamTraining(nn.Module):
    """Training step of mask decoder and label branch; CLIP, adapter and prompt encoder are frozen."""

    def __init__(self, model: OvSam, settings: Clip2SamConfig) -> None:
        super().__init__()
        self.model, self.settings = model.requires_grad_(False), settings
        model.mask_decoder.requires_grad_(True)
        model.namer.requires_grad_(True)
        if model.label_token is not None:
            model.label_token.requires_grad_(True)

    def forward(
        self, batch: MaskBatch, text_KYD: Tensor, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Weighted losses `classes`, `mask`, `dice` and, with an IoU head, `iou`; `batch.labels` index `text_KYD`."""
        model, settings = self.model, self.settings
        pixels, _ = model.preprocess(batch.images)
        with torch.no_grad():
            levels = model.clip(pixels)
            embedding_BChw = model.adapter(levels)
        objects = sample_objects(batch, model.config.sam.image_size, settings.prompts_per_image, generator)
        if not len(objects.labels):
            names = ["classes", "mask", "dice", *(["iou"] if model.config.iou_head else [])]
            return dict.fromkeys(names, zero_loss(self.parameters()))
        sparse_PnC, boxes_P4, by_box_P = self._prompts(objects, generator)
        dense = model.prompt_encoder.no_mask_embed.weight[:, :, None, None]
        low_PLL, ious_P = model.decode(embedding_BChw[objects.images], sparse_PnC, dense)
        side = model.config.sam.image_size
        shown_PSS = F.interpolate(low_PLL.detach()[:, None], (side, side), mode="bilinear")[:, 0] > 0
        true_P = mask_ious(shown_PSS.flatten(1), objects.masks.flatten(1))
        # Regions are those of test time, unless a click's mask missed the object.
        jittered_P = by_box_P | (true_P < settings.min_predicted_iou)
        rois_P4 = torch.where(jittered_P[:, None], boxes_P4, model.rois_of(low_PLL.detach(), None))
        rois_P5 = torch.cat([objects.images[:, None].to(rois_P4), rois_P4], dim=1)
        logits_PK = model.head_logits(model.namer.pyramid(levels), rois_P5, text_KYD)
        points_PN2 = uncertain_points(low_PLL.detach(), settings.num_points, generator)
        target_PN = read_points(objects.masks.float(), points_PN2)
        entropy, dice = mask_losses(read_points(low_PLL, points_PN2), target_PN)
        losses = {
            "classes": settings.label_weight * label_loss(logits_PK, objects.labels),
            "mask": settings.mask_weight * entropy,
            "dice": settings.dice_weight * dice,
        }
        if model.config.iou_head:
            losses["iou"] = settings.iou_weight * F.mse_loss(ious_P, true_P)
        return losses

    def _prompts(self, objects: SampledObjects, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
        """Embedded prompts [P, 2, C], the objects' jittered boxes [P, 4], and [P] bool, which prompts are boxes."""
        model, settings = self.model, self.settings
        side = model.config.sam.image_size
        boxes_P4 = jitter_boxes(objects.boxes, settings.box_jitter, settings.max_jitter, side, generator)
        boxed_PnC, _ = model.prompt_encoder(None, boxes_P4, None)
        points_P12 = sample_pixels(objects.masks, generator)[:, None]
        clicked_PnC, _ = model.prompt_encoder((points_P12, torch.ones_like(points_P12[..., 0])), None, None)
        count = len(boxes_P4)
        by_box_P = (torch.randperm(count, generator=generator) < count // 2).to(boxes_P4.device, non_blocking=True)
        return torch.where(by_box_P[:, None, None], boxed_PnC, clicked_PnC), boxes_P4, by_box_P
