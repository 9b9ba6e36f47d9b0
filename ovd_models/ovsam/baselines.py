"""The two simple ways to name SAM's masks with CLIP, as OV-SAM's paper compares itself with (arXiv 2401.02955).

P prompts, D embedding width, K names, S side of the model's input, s side of CLIP's own input.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ovd_models.ovsam.clip_pyramid import ClipPyramid, TowerConfig
from ovd_models.ovsam.crops import Background, boxes_or_whole, cut_outs
from ovd_models.ovsam.head import name_logits, text_of
from ovd_models.ovsam.model import named
from ovd_models.sam.model import EncodedImage, SamModel, fit_image, scale_prompts
from ovd_models.segments import Prompts, Segments
from ovd_models.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """How CLIP is asked about a mask."""

    crop: Literal["image", "mask_features", "roi_features"] = "image"
    """Cut out of the image, or out of CLIP's features of the whole image: averaged under the mask, or RoIAlign with
    CLIP's own head."""
    margin: float = 1.0
    """Side of what is cut out relative to the mask's box; image crops are squares of the longer side."""
    background: Background = "keep"
    """What is around the mask in an image crop."""


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
            config, look = self.config, partial(cut_outs, mean=self.mean, std=self.std, side=self.clip_side)
            crops = look(image, found.masks, margin=config.margin, background=config.background)
            embedding_PD = self.clip.embed(crops)
        else:
            embedding_PD = self.feature_embeddings(image, found.masks, encoded)
        return named(found, name_logits(embedding_PD, text_of(vocabulary))[:, :-1], vocabulary)

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
        boxes_P4 = boxes_or_whole(masks_PHW)
        centre_P2, half_P2 = (boxes_P4[:, :2] + boxes_P4[:, 2:]) / 2, (boxes_P4[:, 2:] - boxes_P4[:, :2]) / 2
        half_P2 = half_P2 * self.config.margin
        corners = torch.stack([centre_P2 - half_P2, centre_P2 + half_P2], dim=1)
        rois_P4 = scale_prompts(corners, encoded).view(-1, 4).clamp(0, side)
        return self.clip.region_embeddings(top, F.pad(rois_P4, (1, 0)))
