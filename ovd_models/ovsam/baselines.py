"""The baselines of OV-SAM's paper: SAM's masks, named by CLIP on image crops or feature crops (arXiv 2401.02955).

P prompts, D embedding width.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ovd_models.ovsam.clip_pyramid import ClipPyramid
from ovd_models.ovsam.crops import Background
from ovd_models.ovsam.head import name_logits, synonym_rows
from ovd_models.ovsam.model import with_names
from ovd_models.sam.model import EncodedImage, SamModel, fit_image, scale_prompts
from ovd_models.segments import Prompts, Segments, boxes_of
from ovd_models.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """Input of CLIP for a mask."""

    crop: Literal["image", "mask_features", "roi_features"] = "image"
    """A crop of the image, or of CLIP's features of the whole image: averaged under the mask, or RoIAlign followed by
    CLIP's own head."""
    margin: float = 1.0
    """Side of the crop relative to the mask's box; image crops are squares of the longer side."""
    background: Background = "keep"
    """What surrounds the mask in an image crop."""


class SamClip(nn.Module):
    """SAM for the masks, CLIP for their names, without training."""

    def __init__(self, sam: SamModel, clip: ClipPyramid, config: BaselineConfig) -> None:
        super().__init__()
        self.sam, self.clip, self.config = sam, clip, config

    @torch.no_grad()
    def segment(
        self, image: Tensor, prompts: Prompts, vocabulary: Vocabulary | None = None, encoded: EncodedImage | None = None
    ) -> Segments:
        """One mask for each prompt of an image [3, H, W] uint8, named if a vocabulary is given.

        Prompts are in pixels of the image; `encoded` is SAM's encoding of it, if there is one already.

        Raises:
            InputError: the prompts do not fit the image.
        """
        encoded = encoded or self.sam.encode(image)
        segments = self.sam.segment(encoded, prompts)
        return segments if vocabulary is None else self.name(image, segments, vocabulary, encoded)

    @torch.no_grad()
    def name(self, image: Tensor, segments: Segments, vocabulary: Vocabulary, encoded: EncodedImage) -> Segments:
        """The same segments of an image, named."""
        config = self.config
        if config.crop == "image":
            embedding_PD = self.clip.embed_crops(image, segments.masks, config.margin, config.background)
        else:
            embedding_PD = self.feature_embeddings(image, segments.masks, encoded)
        return with_names(segments, name_logits(embedding_PD, synonym_rows(vocabulary))[:, :-1], vocabulary)

    def feature_embeddings(self, image: Tensor, masks_PHW: Tensor, encoded: EncodedImage) -> Tensor:
        """[P, D] unit rows from CLIP's features of the whole image."""
        side = self.sam.config.image_size
        fitted, _ = fit_image(image, side)
        height, width = fitted.shape[-2:]
        top = self.clip(self.clip.normalise(fitted, side)[None])[-1]
        if self.config.crop == "mask_features":
            shown = F.interpolate(masks_PHW.float()[:, None], (height, width), mode="area")
            whole = F.pad(shown, (0, side - width, 0, side - height))
            weights_PHW = F.interpolate(whole, top.shape[-2:], mode="area")[:, 0]
            return self.clip.mask_embeddings(top.expand(len(masks_PHW), -1, -1, -1), weights_PHW)
        boxes_P4 = boxes_of(masks_PHW, whole_if_empty=True)
        centre_P2, half_P2 = (boxes_P4[:, :2] + boxes_P4[:, 2:]) / 2, (boxes_P4[:, 2:] - boxes_P4[:, :2]) / 2
        half_P2 = half_P2 * self.config.margin
        corners = torch.stack([centre_P2 - half_P2, centre_P2 + half_P2], dim=1)
        rois_P4 = scale_prompts(corners, encoded).view(-1, 4).clamp(0, side)
        return self.clip.region_embeddings(top, F.pad(rois_P4, (1, 0)))
