"""OV-SAM's encoder and its naming of masks as traceable functions; its decoder is `ExportedSamDecoder`.

P prompts, S side of the model's square input, H x W original image, K names, D embedding width, L levels of the label
branch.
"""

import copy

import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from ovd_models.export.tracing import pool_traced
from ovd_models.ovsam.crops import square_crops
from ovd_models.ovsam.head import ROI_SIDE, name_logits, region_levels
from ovd_models.ovsam.model import OvSam
from ovd_models.segments import boxes_of


class ExportedOvSamEncoder(nn.Module):
    """CLIP's tower, the adapter and the label branch's pyramid."""

    def __init__(self, model: OvSam) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """[H, W, 3] uint8 RGB with a longer side S -> the embedding, L levels, and CLIP's last level."""
        model, side = self.model, self.model.config.sam.image_size
        levels = model.clip(model.clip.normalise(image.permute(2, 0, 1).float(), side)[None])
        return model.adapter(levels), *model.namer.pyramid(levels), levels[-1]


class ExportedNamer(nn.Module):
    """Names of masks, by the label branch and by CLIP."""

    def __init__(self, model: OvSam) -> None:
        super().__init__()
        self.model = model
        self.tower = model.clip.tower
        if self.cuts_out and isinstance(self.tower, VisionTransformer):  # whose crops have CLIP's own size
            self.tower = copy.deepcopy(self.tower)
            self.tower.positional_embedding = nn.Parameter(self.tower.get_buffer("own_places"), requires_grad=False)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Probabilities of names, whose rest to 1 is the background's.

        Args:
            inputs: in this order:
                the L levels of the encoder;
                what CLIP sees: its last level, or the original image [H, W, 3] uint8 if the model cuts masks out;
                [P, 1, H, W] logits of the decoder;
                [P, 4] xyxy in pixels of the encoder's input: box prompts, or those of the decoder;
                [K, D] unit rows;
                [K] CLIP's exponent for each name;
                [K] added to the log score of each name.

        Returns:
            [P, K].
        """
        *levels, seen, masks, boxes, text, clip_weight, bias = inputs
        model, config, strides = self.model, self.model.config, self.model.namer.strides
        text_K1D = text[:, None]
        rois_P5 = F.pad(boxes, (1, 0))
        level_P = region_levels(rois_P5, strides[0], len(levels))
        embedding_PD = model.namer.embed(pool_traced(levels, strides, level_P, boxes, ROI_SIDE))
        head_PK = name_logits(embedding_PD, text_K1D, config.log_scale).log_softmax(-1)
        inside_PHW = masks[:, 0] > 0
        own_PD = self._cut_out(seen, inside_PHW) if self.cuts_out else model.clip.region_embeddings(seen, rois_P5)
        clip_PK = name_logits(own_PD, text_K1D, config.log_scale).log_softmax(-1)
        filled_P1 = inside_PHW.flatten(1).any(1)[:, None]
        weight_PK = F.pad(clip_weight, (0, 1), value=config.alpha) * filled_P1
        fused_PK = (1 - weight_PK) * head_PK + weight_PK * clip_PK + F.pad(bias, (0, 1))
        return fused_PK.softmax(-1)[:, :-1]

    @property
    def cuts_out(self) -> bool:
        """Whether CLIP sees the image cut out along the mask."""
        return self.model.config.clip_view == "cut_out"

    def _cut_out(self, image: Tensor, inside_PHW: Tensor) -> Tensor:
        """[P, D] as `ClipPyramid.embed_crops`, for all masks at once."""
        clip, margin = self.model.clip, self.model.config.cut_out_margin
        colours_3HW = (image.permute(2, 0, 1).float() - clip.mean) / clip.std
        boxes_P4 = boxes_of(inside_PHW, whole_if_empty=True)
        alone_P3HW = torch.where(inside_PHW[:, None], colours_3HW, torch.zeros_like(colours_3HW))
        rows = torch.arange(inside_PHW.shape[0])
        margin_P = torch.full_like(boxes_P4[:, 0], margin)
        crops_P3ss = square_crops(alone_P3HW, rows, boxes_P4, margin_P, clip.config.image_size)
        return F.normalize(self.tower(crops_P3ss).float(), dim=-1)
