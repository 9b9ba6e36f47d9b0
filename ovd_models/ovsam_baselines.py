"""The two simple ways to name SAM's masks with CLIP, as OV-SAM's paper compares itself with (arXiv 2401.02955).

P prompts, D embedding width, K names, S side of the model's input, s side of CLIP's own input.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align

from ovd_models.ovsam import named
from ovd_models.ovsam_head import name_logits, text_of
from ovd_models.pyramid import ClipPyramid, TowerConfig
from ovd_models.sam import EncodedImage, SamModel, fit_image, scale_prompts
from ovd_models.segments import Prompts, Segments, boxes_of
from ovd_models.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """How CLIP is asked about a mask."""

    crop: Literal["image", "mask_features", "roi_features"] = "image"
    """Cut out of the image, or out of CLIP's features of the whole image: averaged under the mask, or RoIAlign with
    CLIP's own head."""
    margin: float = 1.0
    """Side of what is cut out relative to the mask's box; image crops are squares of the longer side."""
    background: Literal["keep", "mean", "black"] = "keep"
    """What is around the mask in an image crop: left as it is, CLIP's mean colour, or black."""


class SamClip(nn.Module):
    """SAM for the masks, CLIP for their names, nothing trained."""

    mean: Tensor
    std: Tensor

    def __init__(self, sam: SamModel, clip: ClipPyramid, tower: TowerConfig, config: BaselineConfig) -> None:
        super().__init__()
        self.sam, self.clip, self.config = sam, clip, config
        self.clip_side = int(tower.vision["image_size"])
        mean, std = (torch.tensor(values).view(-1, 1, 1) * 255 for values in (tower.mean, tower.std))
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def encode(self, image: Tensor) -> EncodedImage:
        """SAM's look at an image [3, H, W] uint8."""
        return self.sam.encode(image)

    @torch.no_grad()
    def segment(
        self, image: Tensor, prompts: Prompts, vocabulary: Vocabulary | None = None, encoded: EncodedImage | None = None
    ) -> Segments:
        """One mask a prompt, named if a vocabulary is given.

        Args:
            image: [3, H, W] uint8.
            prompts: in pixels of the image.
            vocabulary: any names.
            encoded: what `encode` made of the image.

        Raises:
            InputError: the prompts do not fit the image.
        """
        encoded = encoded or self.sam.encode(image)
        found = self.sam.segment(encoded, prompts)
        return found if vocabulary is None else self.name(image, found, vocabulary, encoded)

    @torch.no_grad()
    def name(self, image: Tensor, found: Segments, vocabulary: Vocabulary, encoded: EncodedImage) -> Segments:
        """The same masks of an image, named."""
        if self.config.crop == "image":
            crops = self.crops(image, found.masks)
            embedding_PD = F.normalize(self.clip.tower(crops).float(), dim=-1)
        else:
            embedding_PD = self.feature_embeddings(image, found.masks, encoded)
        return named(found, name_logits(embedding_PD, text_of(vocabulary))[:, :-1], vocabulary)

    def crops(self, image: Tensor, masks_PHW: Tensor) -> Tensor:
        """[P, 3, s, s] normalised squares around the masks; beyond the image's edge they have CLIP's mean colour."""
        colours = (image.float() - self.mean) / self.std
        rows = torch.zeros(len(masks_PHW), dtype=torch.int64, device=image.device)
        margin_P = torch.full((len(masks_PHW),), self.config.margin, device=image.device)
        if self.config.background == "keep":
            return square_crops(colours[None], rows, _boxes_or_whole(masks_PHW), margin_P, self.clip_side)
        fill = -self.mean / self.std if self.config.background == "black" else torch.zeros_like(self.mean)
        pictures = torch.where(masks_PHW[:, None], colours, fill)
        rows = torch.arange(len(masks_PHW), device=image.device)
        return square_crops(pictures, rows, _boxes_or_whole(masks_PHW), margin_P, self.clip_side)

    def feature_embeddings(self, image: Tensor, masks_PHW: Tensor, encoded: EncodedImage) -> Tensor:
        """[P, D] unit rows out of CLIP's features of the whole image."""
        side = self.sam.config.image_size
        fitted = (fit_image(image, side)[0] - self.mean) / self.std
        height, width = fitted.shape[-2:]
        top = self.clip(F.pad(fitted, (0, side - width, 0, side - height))[None])[-1]
        if self.config.crop == "mask_features":
            shown = F.interpolate(masks_PHW.float()[:, None], (height, width), mode="area")
            whole = F.pad(shown, (0, side - width, 0, side - height))
            weights_PHW = F.interpolate(whole, top.shape[-2:], mode="area")[:, 0]
            return self.clip.mask_embeddings(top.expand(len(masks_PHW), -1, -1, -1), weights_PHW)
        boxes_P4 = _boxes_or_whole(masks_PHW)
        centre_P2, half_P2 = (boxes_P4[:, :2] + boxes_P4[:, 2:]) / 2, (boxes_P4[:, 2:] - boxes_P4[:, :2]) / 2
        half_P2 = half_P2 * self.config.margin
        corners = torch.stack([centre_P2 - half_P2, centre_P2 + half_P2], dim=1)
        rois_P4 = scale_prompts(corners, encoded).view(-1, 4).clamp(0, side)
        return self.clip.region_embeddings(top, F.pad(rois_P4, (1, 0)))


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


def _boxes_or_whole(masks_PHW: Tensor) -> Tensor:
    """[P, 4] tight boxes; an empty mask has the whole image."""
    boxes_P4 = boxes_of(masks_PHW)
    whole = boxes_P4.new_tensor([0, 0, masks_PHW.shape[2], masks_PHW.shape[1]])
    return torch.where(masks_PHW.flatten(1).any(1)[:, None], boxes_P4, whole)
